"""Measures the paper's claims in the miniature, one by one: writes RESULTS.md and its figures.

    python -m miniature.reproduce              # five worlds
    python -m miniature.reproduce --quick      # one world, eight cells
    python -m miniature.reproduce --apo        # APO's game too, in the first three worlds

A cell is one run of train_ganpo.py in one world, and its evaluation at six temperatures. A seed
stands for a world: reference, pairs, and the seed of the run. Cells run side by side, one on each
core. out/reproduce keeps what is finished, so a command that was killed continues where it was. A
cell whose settings have changed is done again; remove out/reproduce when the code has changed.
Differences are paired: both cells ran in the same worlds and sampled with the same random numbers.
Errors are standard errors over seeds.
"""

import cpu  # must come before torch

import json
import os
import shutil
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch

import eval_alpaca
import reward_model
import train_ganpo
from apo import train_apo
from data import InputError, input_error_for
from flags import Parser, count, natural, world_folder
from generate import quiet
from miniature import world
from miniature.results import (
    APO_WORLDS,
    FIG_4,
    REGIMES,
    ROOT,
    TEMPERATURES,
    Grid,
    write_results,
)

PROMPTS = 500  # on which each cell is examined

# ---------------------------------------------------------------------- the cells

DPO, SIMPO, MSE = ["--lambda_adv=0"], ["--loss=simpo"], ["--critic=mse", "--lambda_adv=3"]
PUBLISHED = "--adv_loss=nonsaturating --lambda_adv=0.5 --disc_every=16".split()
PAIRED, PAIRED_H = ["--critic=paired"], ["--critic=paired_h"]
CELLS = {  # flags by regime/name; a regime is a learning rate, ganpo is the default
    "mild/dpo": DPO,
    "mild/ganpo": [],
    "mild/simpo": SIMPO + DPO,
    "mild/ganpo_simpo": SIMPO,
    "mild/lambda_1": ["--lambda_adv=1"],
    "mild/disc_lr_half": ["--disc_lr=5e-5"],
    "mild/app_b": ["--lambda_adv=1", "--disc_lr=5e-5"],  # App. B with Eq 18
    "mild/published": [*PUBLISHED, "--disc_lr=5e-5"],
    "mild/batch_means": ["--ema_decay=0"],
    "mild/nonsaturating": ["--adv_loss=nonsaturating"],
    "mild/mlp": ["--critic=mlp"],
    "mild/mse": MSE,
    "mild/beta_1": [*DPO, "--beta=1"],
    "mild/beta_3": [*DPO, "--beta=3"],
    "mild/lr_8.4e-5": [*DPO, "--lr=8.4e-5"],  # at which DPO reaches the paired critic's margin
    "mild/paired": PAIRED,
    "mild/paired_h": PAIRED_H,
    "mild/paired_beta": [*PAIRED, "--beta=0.5"],  # a second anchor
    "mild/mse_beta": [*MSE, "--beta=0.5"],
    "over/dpo": DPO,
    "over/ganpo": [],
    "over/mlp": ["--critic=mlp"],
    "over/mse": MSE,
    "over/beta_0.5": [*DPO, "--beta=0.5"],
    "over/beta_1": [*DPO, "--beta=1"],
    "over/beta_3": [*DPO, "--beta=3"],
    "over/lr_1.9e-4": [*DPO, "--lr=1.9e-4"],
    "over/paired": PAIRED,
    "over/paired_h": PAIRED_H,
    "over/paired_beta": [*PAIRED, "--beta=0.5"],  # a second anchor
    "over/mse_beta": [*MSE, "--beta=0.5"],
    "far/dpo": DPO,
    "far/ganpo": [],
    "far/mse": MSE,
    "far/beta_1": [*DPO, "--beta=1"],
    "far/beta_3": [*DPO, "--beta=3"],
    "far/lr_2.6e-4": [*DPO, "--lr=2.6e-4"],
    "far/paired": PAIRED,
    "far/paired_h": PAIRED_H,
    "far/paired_beta": [*PAIRED, "--beta=0.5"],  # a second anchor
    "far/mse_beta": [*MSE, "--beta=0.5"],
    "far/mse_1": [*MSE, "--lambda_adv=1"],  # these four: for the figure of strengths
    "far/mse_10": [*MSE, "--lambda_adv=10"],
    "far/paired_3": [*PAIRED, "--lambda_adv=3"],
    "far/paired_30": [*PAIRED, "--lambda_adv=30"],
}
QUICK = "mild/dpo mild/ganpo mild/simpo mild/ganpo_simpo over/dpo over/ganpo over/mse over/paired"
APO = []  # flags of apo.train_apo; none, its defaults


def flags_of(cell: str) -> list[str]:
    """Returns a cell's flags for train_ganpo.py."""
    return [f"--lr={REGIMES[cell.split('/')[0]]}", *CELLS[cell]]


def settings_of(cell: str) -> dict:
    """Returns what a finished cell was made with, as its done.json says it."""
    flags = {"reference": [], "reward": [], "apo": APO}
    own = flags[cell] if cell in flags else flags_of(cell)
    return {"flags": own, "prompts": PROMPTS, "temperatures": [*TEMPERATURES]}


def finished(seed: int, cell: str) -> dict | None:
    """Returns the done.json of a cell, or None if it has yet to be done with these settings."""
    path = ROOT / f"seed{seed}" / cell / "done.json"
    record = {}
    if path.exists():
        with input_error_for(f"{path} is damaged: remove it"):
            record = dict(json.loads(path.read_text()))
    return record if record.items() >= settings_of(cell).items() else None


# ---------------------------------------------------------------------- running them


def worker_on_each_core() -> ProcessPoolExecutor:
    """Returns a pool of one process per core."""
    context, n = get_context("spawn"), cpu.cores()
    visible = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(n)
    free_cores = context.Queue()
    for core in visible[:n]:
        free_cores.put(core)
    return ProcessPoolExecutor(n, context, start_worker, (free_cores,))


def start_worker(free_cores):
    """Gives a worker a core from a queue of their numbers, and one thread.

    A program in the miniature would take two threads, but here every core has a worker already.
    OMP_NUM_THREADS overrides the two.
    """
    core = free_cores.get()
    if hasattr(os, "sched_setaffinity"):  # Linux only
        os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    quiet()


def run_cell(seed: int, cell: str):
    """Trains and evaluates one cell, if it is not finished.

    Every other cell needs "reference", and the one of Fig 4 needs "reward" too.
    """
    if finished(seed, cell):
        return
    begin, folder = time.perf_counter(), ROOT / f"seed{seed}" / cell
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "log").open("w") as log, redirect_stdout(log):
        if cell == "reference":
            model = f"--model={world_folder(seed) / 'model'}"
            eval_alpaca.main([*evaluation_flags(seed, cell), "2.0", model])
        elif cell == "reward":
            reward_model.main([f"--seed={seed}", f"--out_dir={folder / 'run'}"])
        elif cell == "apo":
            train_apo.main([f"--seed={seed}", *APO, f"--out_dir={folder / 'run'}"])
        else:
            train_and_evaluate(seed, cell, folder)
    record = settings_of(cell) | {"seconds": round(time.perf_counter() - begin, 1)}
    (folder / "done.json").write_text(json.dumps(record))


def evaluation_flags(seed: int, cell: str) -> list[str]:
    """Returns flags for eval_alpaca.py; the temperatures are the last ones."""
    home = ROOT / f"seed{seed}"
    flags = [f"--seed={seed}", f"--prompts={home / 'prompts.jsonl'}", "--max_new_tokens=64"]
    flags += [f"--out={home / cell / 'eval-mini'}"]
    return [*flags, "--temperatures", *map(str, TEMPERATURES)]


def train_and_evaluate(seed: int, cell: str, folder: Path):
    """Runs train_ganpo.py and eval_alpaca.py for a cell, in its folder."""
    home, run, evaluation = ROOT / f"seed{seed}", folder / "run", folder / "eval-mini"
    # RESULTS.md was measured with micro-batches of 8 pairs, and float32 sums depend on them
    more = ["--micro_batch_size=8", "--eval_every=0", f"--out_dir={run}"]
    train_ganpo.main([f"--seed={seed}", *flags_of(cell), *more])
    evaluation.mkdir()
    for file in (home / "reference" / "eval-mini").glob("model-*"):  # its answers are in all cells
        shutil.copy(file, evaluation / file.name.replace("model", "baseline", 1))
    flags = evaluation_flags(seed, cell)
    if cell == FIG_4:
        flags += ["2.0", f"--reward_model={home / 'reward' / 'run' / 'hf'}"]
        flags += [f"--score_discriminators={run / 'discriminators.pt'}"]
    baseline = world_folder(seed) / "model"
    eval_alpaca.main([*flags, f"--model={run / 'hf'}", f"--baseline={baseline}"])
    shutil.rmtree(run / "state")


def prepare(seed: int):
    """Builds the world of a seed, and writes the prompts on which its cells are examined."""
    folder, home = world.build(seed), ROOT / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    lines = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)[:PROMPTS]
    (home / "prompts.jsonl").write_text("".join(lines))


def run_all(seeds: range, cells: list[str], apo: bool):
    """Runs all cells that are not finished; apo says whether APO's game is one of them."""
    for seed in seeds:
        prepare(seed)
    with worker_on_each_core() as pool:
        for stage in (["reference", "reward"], ["apo"] * apo + cells):
            jobs = [(s, c) for c in stage for s in (seeds[:APO_WORLDS] if c == "apo" else seeds)]
            run_jobs(pool, jobs)


def run_jobs(pool: Executor, jobs: list[tuple[int, str]]):
    """Runs those of some cells, pairs of seed and cell, that are not finished; prints progress.

    If a cell fails, prints which one and where its log is, and raises its error. Cells that have
    not begun by then are cancelled; otherwise all of them would run before the error is seen.
    """
    left = [job for job in jobs if not finished(*job)]
    start, futures = time.perf_counter(), {pool.submit(run_cell, *job): job for job in left}
    try:
        for i, future in enumerate(as_completed(futures), 1):
            seed, cell = futures[future]
            if future.exception():
                log = ROOT / f"seed{seed}" / cell / "log"
                print(f"failed: seed {seed} {cell}; its log is {log}", flush=True)
            future.result()  # raises the error of a cell that failed
            seconds = (time.perf_counter() - start) / i * (len(left) - i)
            where = f"{len(jobs) - len(left) + i}/{len(jobs)}"
            time_left = timedelta(seconds=int(seconds))
            print(f"{where} seed {seed} {cell}, {time_left} left", flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


# ---------------------------------------------------------------------- the command


def parse_args(argv: list[str]):
    """Returns the settings of this program."""
    usage = "python -m miniature.reproduce [--flag value ...]"
    parser = Parser("miniature.reproduce", __doc__, usage)
    add = parser.add_argument
    add("--seeds", type=count, help="how many worlds [5; with --quick 1]")
    add("--first_seed", type=natural, default=10, help="of the first world; the others follow [10]")
    add("--apo", action="store_true", help="also play the game of apo.train_apo")
    add("--quick", action="store_true", help="one world, eight cells")
    add("--out", help="[miniature/RESULTS.md; with --quick out/reproduce/quick.md]")
    args = parser.parse_args(argv)
    args.out = Path(args.out or (ROOT / "quick.md" if args.quick else "miniature/RESULTS.md"))
    args.seeds = args.seeds or (1 if args.quick else 5)
    return args


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        cells = QUICK.split() if args.quick else list(CELLS)
        run_all(seeds, cells, args.apo)
        apo = args.apo or all(finished(seed, "apo") for seed in seeds[:APO_WORLDS])
        write_results(Grid(seeds, cells, apo), args.out)
        print(f"wrote {args.out}")
    except (InputError, OSError) as error:
        sys.exit(f"miniature.reproduce: {error}")


if __name__ == "__main__":
    main()
