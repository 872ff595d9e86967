"""Screens the anchors of study/critics.py in the miniature: writes one row per run to a csv file.

    python -m study.screen                                     # the screening: worlds 15 to 17
    python -m study.screen --first_seed 20 --seeds 5 --cells kl_theta=3 mse=3 --out study/fresh.csv

A cell is one run of train_ganpo.py, at one of three learning rates and with one strength of one
anchor. Its policy answers 1,000 held-out prompts at three temperatures; the exact judge gives the
share of right answers in percent, and the margin is that on held-out pairs at the end. Cells run
side by side, one on each core. out/study keeps what is finished, so a command that was killed goes
on where it was. Remove it when the code has changed.
"""

import cpu  # noqa: F401  must come before torch

import csv
import json
import shutil
import sys
import time
from concurrent.futures import Executor, as_completed
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import train_ganpo
from data import InputError
from flags import Parser, count, natural, world_folder
from generate import quiet
from miniature import world
from miniature.reproduce import worker_on_each_core
from miniature.results import REGIMES
from policy import load_lm
from report import read_table
from study import critics

ROOT = Path("out/study")
PROMPTS, TEMPERATURES = 1000, (0.0, 0.7, 1.0)
DAMAGED = (101, 102)  # orders of the data in which DPO over-trains, for critics.damage
STRENGTHS = {
    "beta": (0.1, 0.3, 1, 3),
    "mse": (1, 3, 10, 30),
    "kl_ref": (0.3, 1, 3, 10),
    "kl_theta": (0.3, 1, 3, 10),
    "kl_own": (0.3, 1, 3, 10),
    "fisher": (0.3, 1, 3, 10),
    "jensen_shannon": (0.3, 1, 3, 10),
    "mahalanobis": (0.3, 1, 3),
    "paired_diff": (10, 30),
    "paired_output": (1, 3, 10),
    "weighing": (1, 3),
    "population": (1, 10),
    "reference_states": (1, 3),
    "policy_states": (1, 3),
    "damage": (1, 10),
    "sft_term": (0.1, 1),
    "chi_squared": (0.03, 0.1),
}
EARLY, MIXED = "early", "mix"  # baselines made from DPO's own run: no training of their own
SHARES = (0.25, 0.5, 0.75)  # of the way from the reference to DPO's policy


def run_cell(seed: int, regime: str, name: str, strength: float):
    """Trains and examines one cell, if it is not finished."""
    folder = ROOT / f"seed{seed}" / regime / f"{name}={strength:g}"
    if (folder / "row.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    flags = [f"--seed={seed}", f"--lr={REGIMES[regime]}", "--micro_batch_size=8"]
    is_dpo = (name, strength) == ("beta", 0.1)  # of which early stopping needs losses on the way
    flags += [f"--eval_every={8 if is_dpo else 96}", f"--out_dir={folder / 'run'}"]
    with (folder / "log").open("w") as log, redirect_stdout(log):
        with critics.playing(name, strength) as more, kept_best(folder):
            train_ganpo.main([*flags, *more])
        row = {"seed": seed, "regime": regime, "anchor": name, "strength": strength}
        row |= measures(folder / "run", seed) | {"seconds": round(time.perf_counter() - begin, 1)}
        rows = [row]
        if is_dpo:
            rows += baselines(row, folder, seed)
    (folder / "row.json").write_text(json.dumps(rows))
    shutil.rmtree(folder / "run")


def kept_best(folder: Path):
    """Saves the policy whenever its loss on held-out pairs is the lowest so far; no final table."""
    best = [float("inf")]

    def evaluate(run, triplets, to_the_end):
        result = real_evaluate(run, triplets, to_the_end)
        if result["loss"] < best[0]:
            best[0] = result["loss"]
            weights = {k: critics.whole(x) for k, x in run.policy.named_parameters()}
            torch.save(weights, folder / "run" / "best.pt")
        return result

    real_evaluate = train_ganpo.evaluate
    return mock.patch.multiple(train_ganpo, evaluate=evaluate, final_table=lambda *_: None)


def measures(run: Path, seed: int) -> dict:
    """Returns strict accuracy by temperature and the training's measures at its end."""
    found = strict_accuracy(run / "hf", seed)
    found["margin"] = read_table(run / "eval.csv")[-1]["margin"]
    rows = read_table(run / "metrics.csv")[-20:]
    for key in ("adv_align", "adv_to_opo_grad", "latent_mse"):
        values = [row[key] for row in rows if key in row]
        found[key] = sum(values) / len(values) if values else None
    return found


def strict_accuracy(model: Path, seed: int) -> dict[str, float]:
    """Returns the share of right answers, in percent, by temperature."""
    tasks = world.read_tasks(world_folder(seed) / "prompts.jsonl")[:PROMPTS]
    found = {}
    for t in TEMPERATURES:
        verdicts = world.examine(str(model), tasks, t, seed)
        found[f"strict_{t}"] = 100 * float(np.mean([v.strict for v in verdicts]))
    return found


def baselines(dpo: dict, folder: Path, seed: int) -> list[dict]:
    """Returns rows of early stopping, and of weights between the reference's and DPO's."""
    run, model = folder / "run", world_folder(seed) / "model"
    lm, end = (load_lm(str(path), torch.float32) for path in (model, run / "hf"))
    start, end = ({k: x.detach().clone() for k, x in m.named_parameters()} for m in (lm, end))
    kinds = {(EARLY, 0): torch.load(run / "best.pt", weights_only=True)}
    for share in SHARES:
        kinds[MIXED, share] = {k: start[k].lerp(end[k], share) for k in start}
    rows = []
    for (name, strength), weights in kinds.items():
        for key, x in lm.named_parameters():
            x.data.copy_(weights[key])
        mixed = folder / "mixed"
        shutil.copytree(run / "hf", mixed, dirs_exist_ok=True)
        lm.model.save_pretrained(mixed)
        rows.append(dpo | {"anchor": name, "strength": strength, "margin": None}
                    | strict_accuracy(mixed, seed))  # fmt: skip
        shutil.rmtree(mixed)
    return rows


def damaged(seed: int, order: int):
    """Over-trains DPO in a world with another order of its data, for critics.damage."""
    folder, home = ROOT / f"seed{seed}" / f"damaged{order}", world_folder(seed)
    if (folder / "hf").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    log = ROOT / f"seed{seed}" / f"damaged{order}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, redirect_stdout(file):
        train_ganpo.main([
            f"--model={home / 'model'}", f"--dataset={home / 'train.jsonl'}", f"--seed={order}",
            "--lambda_adv=0", f"--lr={REGIMES['far']}", "--eval_every=0", f"--out_dir={folder}",
        ])  # fmt: skip


def run_all(seeds: range, cells: list[tuple[str, float]], regimes: list[str]):
    """Runs everything that is not finished; prints progress."""
    for seed in seeds:
        world.build(seed)
        critics.states_file(seed)
    with worker_on_each_core() as pool:
        needs_damage = any(name == "damage" for name, _ in cells)
        finish(pool, [(damaged, s, k) for s in seeds for k in DAMAGED if needs_damage])
        finish(pool, [(run_cell, s, r, *c) for c in cells for r in regimes for s in seeds])


def finish(pool: Executor, jobs: list[tuple]):
    """Runs jobs, a function and its arguments each, and prints how many are done."""
    futures, begin = {pool.submit(*job): job for job in jobs}, time.perf_counter()
    for i, future in enumerate(as_completed(futures), 1):
        future.result()  # raises the error of a job that failed
        left = (time.perf_counter() - begin) / i * (len(jobs) - i)
        print(f"{i}/{len(jobs)} {futures[future][1:]}, {left / 60:.0f} minutes left", flush=True)


def write_rows(path: Path, seeds: range, cells: list, regimes: list[str]):
    """Writes the rows of all cells that are finished."""
    rows = []
    for name, strength in cells:
        for regime in regimes:
            for seed in seeds:
                file = ROOT / f"seed{seed}" / regime / f"{name}={strength:g}" / "row.json"
                rows += json.loads(file.read_text()) if file.exists() else []
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


def parse_cell(text: str) -> tuple[str, float]:
    """Returns the anchor and the strength of "anchor=strength"."""
    name, _, strength = text.partition("=")
    if name not in critics.ANCHORS:
        raise ValueError(f"no such anchor: {name}")
    return name, float(strength)


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    parser = Parser("study.screen", __doc__, "python -m study.screen [--flag value ...]")
    add = parser.add_argument
    add("--seeds", type=count, default=3, help="how many worlds [3]")
    add("--first_seed", type=natural, default=15, help="of the first world [15]")
    add("--cells", nargs="+", type=parse_cell, help="anchor=strength ... [all]")
    add("--regimes", nargs="+", choices=REGIMES, default=[*REGIMES], help="[all three]")
    add("--out", type=Path, default=Path("study/screening.csv"), help="[study/screening.csv]")
    try:
        args = parser.parse_args(sys.argv[1:] if argv is None else argv)
        cells = args.cells or [(name, s) for name, all_ in STRENGTHS.items() for s in all_]
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        try:
            run_all(seeds, cells, args.regimes)
        finally:
            write_rows(args.out, seeds, cells, args.regimes)
        print(f"wrote {args.out}")
    except (InputError, OSError) as error:
        sys.exit(f"study.screen: {error}")


if __name__ == "__main__":
    main()
