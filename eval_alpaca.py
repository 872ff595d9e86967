"""Evaluates a model: its answers, a judge's verdicts, win rates with their errors.

    python eval_alpaca.py --model out/run-000/hf                # the miniature, its exact judge
    torchrun --nproc_per_node 8 eval_alpaca.py --model out/run-001/hf --prompts alpaca_eval \\
        --judge rm --reward_model Skywork/Skywork-Reward-V2-Llama-3.1-8B
    python eval_alpaca.py --judge annotations --annotations FILE --alpaca_data DIR

Judges: mini (the miniature's verifier), rm (a reward model), annotations (published AlpacaEval
annotation files), ifeval (lm_eval's checks), gpt4 (prints the command, spends nothing).

Writes to --out: NAME-T0.7.jsonl, every answer as it comes, from which an interrupted command goes
on; NAME-T0.7.json, AlpacaEval's own format, and NAME-T0.7.meta.json, how it was made, for NAME
model and baseline; scores.jsonl, a row per answer; results.json, a row per temperature. Rates are
in percent and errors are standard errors over prompts; what a judge has no value for is null.
"""

import csv
import hashlib
import json
import os
import platform
import re
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM

import distributed
import miniature
from checkpoint import load_discriminators, sha256, write_synced
from data import (
    ChatEncoder,
    InputError,
    blaming,
    check_model_name,
    first_line,
    json_lines,
    read_rows,
)
from distributed import print0, share_out
from flags import DTYPES, Parser, at_least_0, count, fraction, natural, positive, refuse
from generate import generate, quiet
from policy import read_tokenizer
from report import read_config
from reward_model import RewardModel, hidden_states
from winrate import length_controlled, summary, table

JUDGES = ("mini", "rm", "annotations", "ifeval", "gpt4")
ALPACA, ALPACA_N = "tatsu-lab/alpaca_eval", 805
BASELINE_FILE = "alpaca_eval_gpt4_baseline.json"


class Prompt(NamedTuple):
    instruction: str
    dataset: str
    record: dict  # what the file says besides, for judges that need more


# ---------------------------------------------------------------------- AlpacaEval's files


def alpaca_file(args, name: str) -> Path:
    """A file of AlpacaEval's data set: from --alpaca_data, or from the Hub."""
    if args.alpaca_data:
        for path in (Path(args.alpaca_data, name), Path(args.alpaca_data, name + ".gz")):
            if path.is_file():
                return path
        raise InputError(f"--alpaca_data {args.alpaca_data}: no {name}")
    with blaming(f"{ALPACA}: {name} cannot be fetched; pass --alpaca_data DIR"):
        return Path(hf_hub_download(ALPACA, name, repo_type="dataset"))


def check_outputs(source, rows, instructions=None, empty_ok=False):
    """InputError unless rows are a whole outputs file: instruction, output and generator in each,
    no instruction twice, and those of `instructions`, in their order."""
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{source}: no list of outputs")
    seen = {}
    for i, row in enumerate(rows):
        for key in ("instruction", "output", "generator"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise InputError(f"{source}: row {i} has no {key}")
        if not row["output"].strip() and not empty_ok:
            raise InputError(f"{source}: row {i} has an empty output")
        if row["instruction"] in seen:
            first = seen[row["instruction"]]
            raise InputError(f"{source}: row {i} has the instruction of row {first}")
        seen[row["instruction"]] = i
    if instructions is None:
        return
    if len(rows) != len(instructions):
        raise InputError(f"{source}: {len(rows)} rows, {len(instructions)} needed")
    for i, (row, instruction) in enumerate(zip(rows, instructions, strict=True)):
        if row["instruction"] != instruction:
            known = row["instruction"] in set(instructions)
            what = "out of order" if known else "of other prompts"
            raise InputError(f"{source}: row {i} is {what}: {row['instruction'][:60]!r}")


def read_alpaca_baseline(args) -> list[dict]:
    path = alpaca_file(args, BASELINE_FILE)
    rows = read_rows(str(path), "train")
    check_outputs(path, rows)
    if len(rows) != ALPACA_N:
        raise InputError(f"{path}: {len(rows)} rows, {ALPACA_N} needed")
    return rows


def read_prompts(args) -> list[Prompt]:
    """Of --prompts. InputError for a row without text, an instruction twice, or no rows."""
    if args.prompts == "alpaca_eval":
        rows = read_alpaca_baseline(args)
    else:
        rows = read_rows(args.prompts, "train")
    prompts = []
    for i, row in enumerate(rows):
        text = (row.get("instruction") or row.get("prompt")) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"--prompts {args.prompts}: row {i} has no text as instruction or prompt"
            )
        prompts.append(Prompt(text, row.get("dataset") or Path(args.prompts).stem, row))
    if not prompts:
        raise InputError(f"--prompts {args.prompts}: no rows")
    if len({p.instruction for p in prompts}) < len(prompts):
        raise InputError(f"--prompts {args.prompts}: an instruction is there twice")
    return prompts


# ---------------------------------------------------------------------- answers


class Writer:
    """A model that writes answers, loaded when the first one is missing."""

    def __init__(self, name: str, flag: str, args, device):
        check_model_name(name, flag)
        weights = ("*.safetensors", "*.bin")
        if Path(name).is_dir() and not any(f for w in weights for f in Path(name).glob(w)):
            raise InputError(f"{flag} {name}: a model folder without weights")
        with blaming(f"{flag} {name}"):
            self.config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        self.name, self.args, self.device, self._lm = name, args, device, None
        self.encoder = ChatEncoder(read_tokenizer(name, args.chat_template, flag))

    @property
    def lm(self):
        if self._lm is None:
            dtype = DTYPES[self.args.dtype]
            self._lm = AutoModelForCausalLM.from_pretrained(
                self.name, dtype=dtype, trust_remote_code=False
            ).to(self.device)
        return self._lm

    def settings(self, prompts, temperature) -> dict:
        """What the answers depend on, and what they were made with."""
        args, names = self.args, ("torch", "transformers")
        texts = json.dumps([p.instruction for p in prompts])
        return {
            "model": self.name,
            "fingerprint": fingerprint(self.name, self.config),
            "prompts": hashlib.sha256(texts.encode()).hexdigest(),
            "temperature": temperature,
            "samples": args.samples,
            "max_new_tokens": args.max_new_tokens,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "seed": args.seed,
            "dtype": args.dtype,
            "chat_template": self.encoder.tokenizer.chat_template,
            "versions": {n: version(n) for n in names} | {"python": platform.python_version()},
        }

    def answers(self, prompts, temperature, out: Path, role: str) -> list[list[str]]:
        """--samples texts for each prompt. Those that an earlier command wrote are kept."""
        path, samples = out / f"{role}-T{temperature:g}.jsonl", self.args.samples
        n = len(prompts) * samples
        rows = distributed.from_rank_0(
            lambda: self.earlier(path, self.settings(prompts, temperature)), "--out"
        )
        block = max(1, self.args.batch_size // samples) * dist.get_world_size()
        write, said = partial(self.write, temperature), time.monotonic()
        for first in range(len(rows) // samples, len(prompts), block):
            more = [
                {"prompt": first + i, "sample": s} | answer._asdict()
                for i, answers in enumerate(share_out(prompts[first : first + block], write))
                for s, answer in enumerate(answers)
            ]
            rows += more
            distributed.from_rank_0(partial(append, path, more), "--out")
            if len(rows) == n or time.monotonic() - said > 10:
                print0(f"{role}, T {temperature:g}: {len(rows):,} of {n:,} answers")
                said = time.monotonic()
        texts = [row["text"] for row in rows]
        texts = [texts[i : i + samples] for i in range(0, len(texts), samples)]
        if dist.get_rank() == 0:
            self.write_outputs(path.with_suffix(".json"), prompts, [t[0] for t in texts])
        return texts

    def write(self, temperature, prompts) -> list[list]:
        """--samples answers (generate.Answer) for each prompt."""
        args = self.args
        answers = generate(
            self.lm,
            self.encoder,
            [miniature.chat(p.instruction) for p in prompts],
            temperature=temperature,
            seed=args.seed,
            samples=args.samples,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            top_k=args.top_k,
            top_p=args.top_p,
            cut_prompts=True,
        )
        return [answers[i : i + args.samples] for i in range(0, len(answers), args.samples)]

    def earlier(self, path, settings) -> list[dict]:
        """The whole prompts of a file that an interrupted command has left; its sidecar."""
        meta = path.with_suffix(".meta.json")
        if path.exists():
            old = json.loads(meta.read_text())
            changed = [k for k in settings if k != "versions" and old.get(k) != settings[k]]
            if changed:
                raise InputError(f"{path} was made with another {', '.join(changed)}")
            rows = []
            for line in path.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:  # a kill tore it
                    break
            rows = rows[: len(rows) // settings["samples"] * settings["samples"]]
        else:
            write_synced(meta, json.dumps(settings, indent=1) + "\n")
            rows = []
        write_synced(path, json_lines(rows))
        return rows

    def write_outputs(self, path, prompts, texts):
        """AlpacaEval's own format, the first sample of each prompt."""
        rows = [
            {"instruction": p.instruction, "output": text, "generator": self.name}
            | {"dataset": p.dataset}
            for p, text in zip(prompts, texts, strict=True)
        ]
        check_outputs(path, rows, [p.instruction for p in prompts], empty_ok=True)
        write_synced(path, json.dumps(rows, indent=1) + "\n")


def append(path, rows):
    with path.open("a") as file:
        file.write(json_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def fingerprint(name: str, config) -> str:
    """Of a folder's weights, config and tokenizer; the commit of a Hub id."""
    if not Path(name).is_dir():
        return config._commit_hash
    kinds = (".safetensors", ".bin", ".json", ".jinja", ".model")
    files = sorted(f for f in Path(name).iterdir() if f.suffix in kinds)
    text = json.dumps([[f.name, sha256(f)] for f in files])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------- judges
# Each takes prompts and a text for each -> per answer a dict of score, strict, loose: what it has.


def judge_mini(prompts, texts):
    verdicts = [miniature.judge(task_of(p), text) for p, text in zip(prompts, texts, strict=True)]
    return [{"score": v.gold, "strict": v.strict} for v in verdicts]


def task_of(prompt) -> miniature.Task:
    known = {k: v for k, v in prompt.record.items() if k in miniature.Task._fields}
    try:
        return miniature.Task(**known)
    except TypeError:
        raise InputError("--judge mini: these prompts are none of the miniature's") from None


class IFEval:
    """The official checks, as lm_eval ships them. A check whose own data cannot be loaded is
    skipped for all answers, and said."""

    def __init__(self, prompts):
        try:
            from lm_eval.tasks.ifeval import utils
        except ImportError as error:
            raise InputError(
                f"--judge ifeval: pip install 'lm_eval[ifeval]' ({first_line(error)})"
            ) from None
        self.utils, self.skipped = utils, {}
        for p in prompts:
            if not {"instruction_id_list", "kwargs"} <= set(p.record):
                raise InputError("--judge ifeval: prompts need instruction_id_list and kwargs")
            for name, settings in self.checks(p):
                try:
                    self.follows(p, name, settings, "A text. And more.", "strict")
                except LookupError as error:  # nltk's
                    self.skipped[name] = " ".join(str(error).strip("*\n ").split())[:60]
        for name, reason in self.skipped.items():
            print0(f"check {name} is skipped: {reason}")
        if none := sum(not self.checks(p) for p in prompts):
            print0(f"{none} of {len(prompts)} prompts have no other check")

    def checks(self, prompt):
        pairs = zip(prompt.record["instruction_id_list"], prompt.record["kwargs"], strict=True)
        return [(name, settings) for name, settings in pairs if name not in self.skipped]

    def follows(self, prompt, name, settings, text, how) -> bool:
        one = self.utils.InputExample(0, [name], prompt.instruction, [settings])
        test = getattr(self.utils, f"test_instruction_following_{how}")
        return test(one, text).follow_all_instructions

    def __call__(self, prompts, texts):
        rows = []
        for p, text in zip(prompts, texts, strict=True):
            strict, loose = (
                [self.follows(p, name, settings, text, how) for name, settings in self.checks(p)]
                for how in ("strict", "loose")
            )
            rows.append(
                {"strict": float(all(strict)), "loose": float(all(loose)), "score": np.mean(strict)}
                if strict
                else {}
            )
        return rows


class Critics:
    """Both discriminators' scores of an answer, on the latents of the model that wrote it."""

    def __init__(self, path: str, writer: Writer):
        with blaming(f"--score_discriminators {path}"):
            self.critics = load_discriminators(path, writer.device)
            if getattr(self.critics["disc_pos"], "differences", False):
                raise InputError("critics of h - h_ref cannot score a text alone")
            size, own = self.critics["disc_pos"].project_in.in_features, writer.config.hidden_size
            if size != own:
                raise InputError(f"for latents of size {size}, the model's are {own}")
        self.writer = writer

    @torch.inference_mode()
    def __call__(self, prompts, texts, batch_size=32):
        encoder, rows = self.writer.encoder, []
        limit = self.writer.config.max_position_embeddings
        ids = [
            encoder.answer_ids(miniature.chat(p.instruction), encoder.plain(text))[:limit]
            for p, text in zip(prompts, texts, strict=True)
        ]
        for first in range(0, len(ids), batch_size):
            h, mask = hidden_states(self.writer.lm, ids[first : first + batch_size])
            scores = [critic(h.float(), mask).tolist() for critic in self.critics.values()]
            rows += [{"critic_pos": p, "critic_neg": n} for p, n in zip(*scores, strict=True)]
        return rows


# ---------------------------------------------------------------------- the commands


def annotated(args):
    """--judge annotations: AlpacaEval's own numbers from its published files."""
    baseline = read_alpaca_baseline(args)
    place = {row["instruction"]: i for i, row in enumerate(baseline)}
    found = {}
    for i, row in enumerate(read_rows(args.annotations, "train")):
        where = f"--annotations {args.annotations}: row {i}"
        index, preference = place.get(row.get("instruction")), row.get("preference")
        if index is None or index in found or not isinstance(row.get("output_2"), str):
            raise InputError(f"{where}: not one of AlpacaEval's instructions, twice, or no output")
        if not isinstance(preference, int | float) or not 1 <= preference <= 2:
            raise InputError(f"{where}: preference {preference!r} is not in [1, 2]")
        found[index] = row
    if len(found) < ALPACA_N:
        print0(f"{len(found)} of {ALPACA_N} instructions are annotated")
    scores = [
        {"prompt": index, "sample": 0, "win": row["preference"] - 1}
        | {"length": len(row["output_2"]), "length_baseline": len(baseline[index]["output"])}
        for index, row in sorted(found.items())
    ]
    with alpaca_file(args, "instruction_difficulty.csv").open() as file:
        rows = csv.DictReader(file)
        difficulty = {int(r["index"]): float(r["instruction_difficulty"]) for r in rows}
    with alpaca_file(args, "df_gamed.csv").open() as file:
        gamed = list(csv.DictReader(file))
    gamed_x = [
        (np.tanh(float(r["std_delta_len"])), float(r["instruction_difficulty"]),
         r["not_gamed_baseline"] == "True")
        for r in gamed
    ]  # fmt: skip
    control = partial(
        length_controlled,
        # by instruction, not by row: rows may be missing or elsewhere
        difficulty=np.array([difficulty[s["prompt"]] for s in scores]),
        gamed=(np.array(gamed_x, dtype=float), np.array([float(r["preference"]) for r in gamed])),
    )
    model = next(iter(found.values())).get("generator_2")
    names = {"model": model, "baseline": baseline[0]["generator"]}
    return [summary(scores, control, **names, judge="annotations")], scores


class Examination:
    """Whoever gives values to answers, made before the first one is written."""

    def __init__(self, args, prompts, writer, device):
        self.judge = {"mini": judge_mini}.get(args.judge)
        if args.judge == "mini":
            for p in prompts:
                task_of(p)
        elif args.judge == "ifeval":
            self.judge = IFEval(prompts)
        dtype = DTYPES[args.dtype]
        self.reward = RewardModel(args.reward_model, device, dtype) if args.reward_model else None
        self.by_reward = args.judge == "rm"
        file = args.score_discriminators
        self.critics = Critics(file, writer) if file else None

    def __call__(self, prompts, answers, own: bool) -> list[dict]:
        """A row per answer, prompt by prompt, the work shared among the ranks."""
        items = [(i, s, text) for i, texts in enumerate(answers) for s, text in enumerate(texts)]
        return share_out(items, partial(self.rows, prompts, own))

    def rows(self, prompts, own, items) -> list[dict]:
        """items: number of a prompt, of a sample, and its text."""
        rows = [{"prompt": i, "sample": s, "length": len(text)} for i, s, text in items]
        asked, texts = [prompts[i] for i, _, _ in items], [text for _, _, text in items]
        columns = [self.judge(asked, texts)] if self.judge else []
        if self.reward:
            rewards = self.reward.score([miniature.chat(p.instruction) for p in asked], texts)
            keys = ("score", "reward") if self.by_reward else ("reward",)
            columns.append([dict.fromkeys(keys, reward) for reward in rewards])
        if self.critics and own:
            columns.append(self.critics(asked, texts))
        for more in columns:
            for row, values in zip(rows, more, strict=True):
                row |= values
        return rows


def compare(own: list[dict], other: list[dict] | None):
    """Adds to the model's rows the baseline's lengths, and wins by score: 1, 0, or a tie's 1/2."""
    for i, row in enumerate(own):
        row |= {"win": None, "length_baseline": other[i]["length"] if other else None}
        if other and row.get("score") is not None:
            row["win"] = float(np.heaviside(row["score"] - other[i]["score"], 0.5))


def evaluate(args, device):
    """-> results.json's rows, scores.jsonl's rows."""
    if args.judge == "annotations":
        return annotated(args)
    prompts = read_prompts(args)
    writer = Writer(args.model, "--model", args, device)
    room = writer.config.max_position_embeddings - args.max_new_tokens
    if room < 32:
        raise InputError(f"--max_new_tokens {args.max_new_tokens}: leaves {room} for the prompt")
    baseline, fixed = None, None
    if args.baseline and Path(args.baseline).is_file():
        fixed = read_rows(args.baseline, "train")
        check_outputs(args.baseline, fixed, [p.instruction for p in prompts])
        fixed = [[row["output"]] * args.samples for row in fixed]
    elif args.baseline:
        baseline = Writer(args.baseline, "--baseline", args, device)
    examine = Examination(args, prompts, writer, device)
    lengths = [len(writer.encoder.prompt_ids(miniature.chat(p.instruction))) for p in prompts]
    if cut := sum(n > room for n in lengths):
        print0(f"{cut} of {len(prompts)} prompts are longer than {room} tokens: cut in the middle")
    out = Path(args.out)
    distributed.from_rank_0(lambda: out.mkdir(parents=True, exist_ok=True), "--out")
    results, scores, settings = [], [], {"model": args.model, "baseline": args.baseline}
    for temperature in args.temperatures:
        answers = writer.answers(prompts, temperature, out, "model")
        rows, other = examine(prompts, answers, own=True), None
        texts = fixed or baseline and baseline.answers(prompts, temperature, out, "baseline")
        if texts:
            other = examine(prompts, texts, own=False)
        compare(rows, other)
        settings |= {"judge": args.judge, "temperature": temperature, "seed": args.seed}
        results.append(summary(rows, **settings))
        scores += [{"temperature": temperature} | row for row in rows]
        if args.judge == "gpt4":
            print0(f"elsewhere, with an OpenAI key: {gpt4_command(args, out, temperature)}")
    return results, scores


def gpt4_command(args, out, temperature) -> str:
    return (
        "pip install alpaca_eval && alpaca_eval --annotators_config weighted_alpaca_eval_gpt4_turbo"
        f" --model_outputs {out}/model-T{temperature:g}.json"
        + (f" --reference_outputs {args.baseline}" if args.baseline else "")
        + f" --output_path {out}/gpt4-T{temperature:g}"
    )


def parse_args(argv):
    # fmt: off
    parser = Parser("eval_alpaca.py", __doc__)
    add = parser.add_argument
    add("--model", help="a Hugging Face folder or Hub id")
    add("--baseline", help="a model, or a file of its outputs [mini: its reference; AlpacaEval's]")
    add("--prompts", default="mini", help="mini, alpaca_eval, or a file of instructions [mini]")
    add("--judge", choices=JUDGES, default="mini", help="[mini]")
    add("--reward_model", help="its folder or Hub id: the judge of rm, a column beside another's")
    add("--score_discriminators", metavar="FILE", help="a run's discriminators.pt: columns")
    add("--annotations", metavar="FILE", help="of --judge annotations")
    add("--alpaca_data", metavar="DIR", help=f"AlpacaEval's files [{ALPACA} on the Hub]")
    add("--chat_template", help="a jinja file [the tokenizer's own]")
    add("--temperatures", type=at_least_0, nargs="+", default=[0.0, 0.5, 0.7, 1.0, 1.2, 1.5],
        help="[0 0.5 0.7 1.0 1.2 1.5]")
    add("--samples", type=count, default=1, help="answers per prompt [1]")
    add("--top_k", type=natural, default=0, help="most probable tokens to draw from [0: all]")
    add("--top_p", type=fraction, default=1.0, help="of their probability [1]")
    add("--max_new_tokens", type=count, help="[2048; miniature 64]")
    add("--batch_size", type=count, default=128, help="answers written at once per rank [128]")
    add("--dtype", choices=DTYPES, help="of all models [bfloat16 on a GPU, else float32]")
    add("--seed", type=natural, help="of sampling, and the miniature's world [its run's; else 0]")
    add("--timeout", type=positive, default=3600, help="seconds to wait for another rank [3600]")
    add("--out", help="folder [eval-PROMPTS-JUDGE beside the model's]")
    # fmt: on
    args = parser.parse_args(argv)
    if args.judge == "annotations":
        if not args.annotations:
            raise InputError("--judge annotations needs --annotations FILE")
        name = re.sub(r"\.jsonl?(\.gz)?$", "", Path(args.annotations).name)
        args.out, args.prompts = args.out or f"out/annotations-{name}", "alpaca_eval"
        return args
    if not args.model:
        raise InputError("--model is needed")
    if args.judge == "rm" and not args.reward_model:
        raise InputError("--judge rm needs --reward_model")
    if args.judge == "gpt4" and args.prompts != "alpaca_eval":
        raise InputError("--judge gpt4 needs --prompts alpaca_eval")
    if len(set(args.temperatures)) < len(args.temperatures):
        raise InputError("--temperatures: one is there twice")
    mini = args.prompts == "mini"
    if args.seed is None:
        args.seed = world_of(args.model) if mini else 0
    args.max_new_tokens = args.max_new_tokens or (miniature.MAX_NEW_TOKENS if mini else 2048)
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if not args.out:
        folder = Path(args.model)
        folder = folder.parent if folder.is_dir() else Path("out") / folder.name
        args.out = str(folder / f"eval-{Path(args.prompts).stem}-{args.judge}")
    return args


def world_of(model: str) -> int:
    """The seed of the world that a run's hf/ was trained in: another world's prompts may be those
    it was trained on. 0 for any other model."""
    run = read_config(Path(model).parent) or {"seed": 0}
    used = {Path(run[k]).parent for k in ("model", "ref_model", "dataset") if k in run}
    return run["seed"] if miniature.world(run["seed"]) in used else 0


def find_defaults(args):
    """Names that stand for files: the miniature's, built at first use, AlpacaEval's baseline."""
    world = miniature.world(args.seed)
    if args.prompts == "mini":
        args.prompts = str(world / "prompts.jsonl")
        miniature.build_if_used(args.seed, args.prompts)
        args.baseline = args.baseline or str(world / "model")
    elif args.prompts == "alpaca_eval" and args.judge not in ("gpt4", "annotations"):
        args.baseline = args.baseline or str(alpaca_file(args, BASELINE_FILE))
    if args.baseline == args.model:
        args.baseline = None


def main(argv=None):
    quiet()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        with distributed.session(args.timeout) as device:
            find_defaults(args)
            results, scores = evaluate(args, device)
            out = Path(args.out)
            if dist.get_rank() == 0:
                out.mkdir(parents=True, exist_ok=True)
                write_synced(out / "scores.jsonl", json_lines(scores))
                write_synced(out / "results.json", json.dumps(results, indent=1) + "\n")
            print0(f"{table(results)}\nwrote {out}")
    except (InputError, FloatingPointError, OSError) as error:
        refuse("eval_alpaca.py", error)


if __name__ == "__main__":
    main()
