"""The paper's claims on a real model: runs a grid on SmolLM2-135M-Instruct, one row per cell.

    python -m study.small_model --model SMOLLM2 --pairs ultrafeedback.jsonl --prompts ifeval.jsonl
    python -m study.small_model ... --cells "dpo 2e-5 0" "ganpo 2e-5 0"       # these alone

A cell is "method rate seed": one run of train_ganpo.py, the answers of its policy to IFEval's
prompts at three temperatures, and lm_eval's official checks (pip install 'lm_eval[ifeval]').
SMOLLM2 is a folder of the model, the pairs are of UltraFeedback. A fixed part of the pairs, chosen
by a hash of their prompts, is never trained on. Rows go to docs/small_model.csv as they are
finished; a command that was killed goes on where it was. Weights and answers are in out/small; the
weights of a finished cell are removed.
"""

import cpu  # noqa: F401  must come before torch

import csv
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

import eval_alpaca
import train_ganpo
from data import ChatEncoder, InputError, Triplet, json_lines, read_rows, user_chat
from flags import Parser
from generate import quiet
from packing import pack
from policy import load_lm, read_tokenizer
from report import read_table

ROOT, TABLE = Path("out/small"), Path("docs/small_model.csv")
HELD_OUT = 180  # rows that are never trained on; about 160 fit --max_length
TEMPERATURES, MAX_NEW_TOKENS = (0.0, 0.7, 1.0), 300
OF_PERPLEXITY = 0.7  # the temperature whose answers the reference judges

PUBLISHED = "--adv_loss=nonsaturating --lambda_adv=0.5 --disc_every=16".split()
METHODS = {
    "dpo": ["--lambda_adv=0"],
    "ganpo": [],  # as printed: App. B, Eq 18
    "ganpo_published": PUBLISHED,
    "simpo": ["--loss=simpo", "--lambda_adv=0"],
    "ganpo_simpo": ["--loss=simpo"],
    "mse": ["--critic=mse"],
    "paired": ["--critic=paired"],
    "beta_0.3": ["--lambda_adv=0", "--beta=0.3"],
    "beta_1": ["--lambda_adv=0", "--beta=1"],
}
RATES = ("1e-6", "2e-6", "5e-6", "1e-5", "2e-5", "5e-5")
SEARCH = [("dpo", rate, 0) for rate in RATES]


def split_pairs(path: str) -> tuple[Path, Path]:
    """Writes the rows to train on and the held-out ones, apart by prompt; returns both files."""
    rows = sorted(read_rows(path, "train"), key=prompt_hash)
    edge = prompt_hash(rows[HELD_OUT])  # rows of one prompt stay together
    parts = {"test": [], "train": []}
    for row in rows:
        parts["test" if prompt_hash(row) < edge else "train"].append(row)
    ROOT.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (ROOT / f"{name}.jsonl").write_text(json_lines(part))
    return ROOT / "train.jsonl", ROOT / "test.jsonl"


def prompt_hash(row: dict) -> str:
    first = row["prompt"] if "prompt" in row else row["chosen"][:-1]
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()


def train(folder: Path, args, method: str, rate: str, seed: int) -> dict:
    """Trains a cell; returns its training's measures."""
    files, run = split_pairs(args.pairs), folder / "run"
    train_ganpo.main([
        "--preset=smollm2-135m-instruct", f"--model={args.model}", f"--dataset={files[0]}",
        f"--eval_split={files[1]}", "--eval_every=10", "--save_every=0", "--keep=1",
        f"--seed={seed}", f"--lr={rate}", f"--out_dir={run}", *METHODS[method],
    ])  # fmt: skip
    found = {f"held_{k}": v for k, v in read_table(run / "eval.csv")[-1].items() if k != "step"}
    rows = read_table(run / "metrics.csv")
    found["step_seconds"] = float(np.median([row["seconds"] for row in rows]))
    found["peak_gb"] = max(row["peak_gb"] for row in rows)
    for key in ("margin", "latent_mse", "loss_adv", "disc_acc_pos", "disc_acc_neg", "score_gap_pos",
                "adv_align", "adv_to_opo_grad"):  # fmt: skip
        values = [row[key] for row in rows[-len(rows) // 5 :] if key in row]
        found[key] = sum(values) / len(values) if values else None
    return found


def examine(folder: Path, args, model: Path) -> dict:
    """Lets a model answer IFEval's prompts; returns the measures of its answers, by temperature."""
    out = folder / "eval"
    eval_alpaca.main([
        f"--model={model}", f"--prompts={args.prompts}", "--judge=ifeval", "--dtype=bfloat16",
        f"--max_new_tokens={MAX_NEW_TOKENS}", f"--out={out}",
        "--temperatures", *map(str, TEMPERATURES),
    ])  # fmt: skip
    scores, found = read_rows(str(out / "scores.jsonl"), "train"), {}
    for t in TEMPERATURES:
        here = [row for row in scores if row["temperature"] == t]
        for key in ("strict", "loose", "cut_answer", "length"):
            found[f"{key}_{t:g}"] = float(np.mean([row[key] for row in here if key in row]))
        answers = [row["output"] for row in answers_of(out, t)]
        found[f"repeated_{t:g}"] = float(np.mean([repeated(text) for text in answers]))
    found["perplexity"] = perplexity(args.model, answers_of(out, OF_PERPLEXITY))
    return found


def answers_of(out: Path, temperature: float) -> list[dict]:
    """Returns the rows of a policy's answers at a temperature."""
    (path,) = out.glob(f"model-T{temperature:g}*.jsonl")
    return read_rows(str(path), "train")


def repeated(text: str) -> float:
    """Returns the share of a text's runs of four words that stood in it before."""
    words = text.split()
    runs = Counter(zip(*(words[i:] for i in range(4)), strict=False))
    return 1 - len(runs) / runs.total() if runs else 0.0


@torch.no_grad()
def perplexity(model: str, answers: list[dict]) -> float:
    """Returns exp of the reference's mean negative log-probability per token of all answers."""
    encoder = ChatEncoder(read_tokenizer(model))
    lm, total, tokens = load_lm(model, torch.bfloat16), 0.0, 0
    for row in answers:
        chat = user_chat(row["instruction"])
        prompt = encoder.prompt_ids(chat)
        answer = encoder.answer_ids(chat, encoder.plain(row["output"]))[len(prompt) :]
        ids = (np.array(x, dtype=np.int32) for x in (prompt, answer, answer[:1]))
        total -= lm(pack([Triplet(*ids, 0)])).logp[0].item()
        tokens += len(answer)
    return float(np.exp(total / tokens))


def run_cell(args, method: str, rate: str, seed: int) -> dict:
    """Runs one cell; returns its row."""
    folder = ROOT / f"{method}-{rate}-{seed}"
    shutil.rmtree(folder / "run", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    begin, row = time.perf_counter(), {"method": method, "rate": rate, "seed": seed}
    with (folder / "log").open("a") as log, redirect_stdout(log):
        row |= train(folder, args, method, rate, seed)
        row |= examine(folder, args, folder / "run" / "hf")
    shutil.rmtree(folder / "run")
    return row | {"minutes": (time.perf_counter() - begin) / 60}


def finished() -> list[dict]:
    """Returns the rows of finished cells, as text."""
    if not TABLE.exists():
        return []
    with TABLE.open() as file:
        return list(csv.DictReader(file))


def add(row: dict):
    """Adds a row to the table; a later row may have more columns than the first ones."""
    rows = [*finished(), {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}]
    columns = dict.fromkeys(key for row in rows for key in row)
    unfinished = TABLE.with_suffix(".tmp")
    with unfinished.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    unfinished.rename(TABLE)


def parse_cell(text: str) -> tuple[str, str, int]:
    """Returns method, rate and seed of "method rate seed"."""
    method, rate, seed = text.split()
    if method not in METHODS:
        raise ValueError(f"no such method: {method}")
    return method, rate, int(seed)


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    parser = Parser("study.small_model", __doc__, "python -m study.small_model --model ...")
    for name, text in (("model", "a folder of SmolLM2-135M-Instruct"),
                       ("pairs", "a file of UltraFeedback's pairs"),
                       ("prompts", "a file of IFEval's prompts")):  # fmt: skip
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--cells", nargs="+", type=parse_cell, default=SEARCH,
        help='"method rate seed" ... [the search]')  # fmt: skip
    try:
        args = parser.parse_args(sys.argv[1:] if argv is None else argv)
        for cell in args.cells:
            done = {(row["method"], row["rate"], int(row["seed"])) for row in finished()}
            if cell not in done:
                row = run_cell(args, *cell)
                add(row)
                print(" ".join(map(str, cell)), f"{row['minutes']:.1f} minutes", flush=True)
    except (InputError, OSError) as error:
        sys.exit(f"study.small_model: {error}")


if __name__ == "__main__":
    main()
