"""The paper's claims on the miniature, measured one by one: writes RESULTS.md and its figures.

    python reproduce.py --seeds 5      # two cores: RESULTS.md says how long it took
    python reproduce.py --quick        # one seed, eight cells
    python reproduce.py --apo          # and train_apo.py's game in the first three worlds

A cell is one run of train_ganpo.py and its evaluation at six temperatures; a seed is a world of its
own (reference, pairs, run). Every core takes a cell at a time, and what a killed command has
finished stays finished (a cell whose settings have changed does not; remove out/reproduce when the
code has). Errors are standard errors over seeds, and differences are paired: of two cells in the
same worlds, whose sampling meets the same random numbers.
"""

import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import train_apo
from results import APO_WORLDS, FIG_4, REGIMES, ROOT, TEMPERATURES, Grid, write_results

import eval_alpaca
import miniature
import reward_model
import train_ganpo
from data import InputError
from distributed import cores
from flags import Parser, count, natural
from generate import quiet

PROMPTS = 500

# ---------------------------------------------------------------------- the cells

DPO, SIMPO, MSE = ["--lambda_adv=0"], ["--loss=simpo"], ["--disc=mse", "--lambda_adv=3"]
PAIRED, PAIRED_H = ["--critic=paired"], ["--critic=paired", "--critic_input=h", "--disc_steps=5"]
CELLS = {  # regime/name: flags; one factor away from ganpo, the default
    "mild/dpo": DPO,
    "mild/ganpo": [],
    "mild/simpo": SIMPO + DPO,
    "mild/ganpo_simpo": SIMPO,
    "mild/lambda_1": ["--lambda_adv=1"],
    "mild/disc_lr_half": ["--disc_lr=5e-5"],
    "mild/as_published": ["--lambda_adv=1", "--disc_lr=5e-5"],
    "mild/batch_means": ["--mean=batch"],
    "mild/nonsaturating": ["--adv_loss=nonsaturating"],
    "mild/padding": ["--disc_padding"],
    "mild/mlp": ["--disc=mlp"],
    "mild/mse": MSE,
    "mild/beta_1": [*DPO, "--beta=1"],
    "mild/beta_3": [*DPO, "--beta=3"],
    "mild/lr_8.4e-5": [*DPO, "--lr=8.4e-5"],  # DPO of the paired critic's margin
    "mild/paired": PAIRED,
    "mild/paired_h": PAIRED_H,
    "mild/paired_beta": [*PAIRED, "--beta=0.5"],  # two anchors, an idea of this repository
    "mild/mse_beta": [*MSE, "--beta=0.5"],
    "over/dpo": DPO,
    "over/ganpo": [],
    "over/mlp": ["--disc=mlp"],
    "over/mse": MSE,
    "over/beta_0.5": [*DPO, "--beta=0.5"],
    "over/beta_1": [*DPO, "--beta=1"],
    "over/beta_3": [*DPO, "--beta=3"],
    "over/lr_1.9e-4": [*DPO, "--lr=1.9e-4"],
    "over/paired": PAIRED,
    "over/paired_h": PAIRED_H,
    "over/paired_beta": [*PAIRED, "--beta=0.5"],  # two anchors, an idea of this repository
    "over/mse_beta": [*MSE, "--beta=0.5"],
    "far/dpo": DPO,
    "far/ganpo": [],
    "far/mse": MSE,
    "far/beta_1": [*DPO, "--beta=1"],
    "far/beta_3": [*DPO, "--beta=3"],
    "far/lr_2.6e-4": [*DPO, "--lr=2.6e-4"],
    "far/paired": PAIRED,
    "far/paired_h": PAIRED_H,
    "far/paired_beta": [*PAIRED, "--beta=0.5"],  # two anchors, an idea of this repository
    "far/mse_beta": [*MSE, "--beta=0.5"],
    "far/mse_1": [*MSE, "--lambda_adv=1"],  # the strength of an anchor, for the frontier
    "far/mse_10": [*MSE, "--lambda_adv=10"],
    "far/paired_3": [*PAIRED, "--lambda_adv=3"],
    "far/paired_30": [*PAIRED, "--lambda_adv=30"],
}
QUICK = "mild/dpo mild/ganpo mild/simpo mild/ganpo_simpo over/dpo over/ganpo over/mse over/paired"
APO = []  # flags of train_apo.py


def flags_of(cell) -> list[str]:
    return [f"--lr={REGIMES[cell.split('/')[0]]}", *CELLS[cell]]


def settings_of(cell) -> dict:
    """What a finished cell was made with."""
    flags = {"reference": [], "reward": [], "apo": APO}
    own = flags[cell] if cell in flags else flags_of(cell)
    return {"flags": own, "prompts": PROMPTS, "temperatures": [*TEMPERATURES]}


def finished(seed: int, cell: str) -> dict | None:
    """The record of a cell that is done, with its seconds."""
    path = ROOT / f"seed{seed}" / cell / "done.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if record.items() >= settings_of(cell).items() else None


def pin(cores_left):
    """A worker's own core, and nothing on the terminal."""
    os.sched_setaffinity(0, {cores_left.get()})
    quiet()


def run_cell(seed: int, cell: str):
    """Trains and evaluates; `reference` and `reward` come first. Left alone where it is done."""
    home, world = ROOT / f"seed{seed}", miniature.world(seed)
    folder, common = home / cell, [f"--seed={seed}"]
    if finished(seed, cell):
        return
    begin = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    evaluate = [*common, f"--prompts={home / 'prompts.jsonl'}", f"--out={folder / 'eval-mini'}"]
    evaluate += ["--max_new_tokens=64", "--temperatures", *map(str, TEMPERATURES)]
    with (folder / "log").open("w") as log, redirect_stdout(log):
        if cell == "reference":
            eval_alpaca.main([*evaluate, "2.0", f"--model={world / 'model'}"])
        elif cell == "reward":
            reward_model.main([*common, f"--out_dir={folder / 'run'}"])
        elif cell == "apo":
            train_apo.main([*common, *APO, f"--out_dir={folder / 'run'}"])
        else:
            train = ["--final_eval=0", "--eval_every=0", f"--out_dir={folder / 'run'}"]
            train_ganpo.main([*common, *flags_of(cell), *train])
            (folder / "eval-mini").mkdir()
            for file in (home / "reference" / "eval-mini").glob("model-*"):  # sampled once
                shutil.copy(file, folder / "eval-mini" / file.name.replace("model", "baseline", 1))
            if cell == FIG_4:
                evaluate += ["2.0", f"--reward_model={home / 'reward' / 'run' / 'hf'}"]
                evaluate += [f"--score_discriminators={folder / 'run' / 'discriminators.pt'}"]
            model = [f"--model={folder / 'run' / 'hf'}", f"--baseline={world / 'model'}"]
            eval_alpaca.main([*evaluate, *model])
            shutil.rmtree(folder / "run" / "state")
    record = settings_of(cell) | {"seconds": round(time.perf_counter() - begin, 1)}
    (folder / "done.json").write_text(json.dumps(record))


def prepare(seed: int):
    """The world of a seed, and the prompts that its cells are examined on."""
    world, home = miniature.build(seed), ROOT / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    lines = (world / "prompts.jsonl").read_text().splitlines(keepends=True)[:PROMPTS]
    (home / "prompts.jsonl").write_text("".join(lines))


def run_all(seeds, cells, apo):
    """Everything that is not finished yet."""
    for seed in seeds:
        prepare(seed)
    context = get_context("spawn")
    cores_left, n = context.Queue(), cores()
    for core in sorted(os.sched_getaffinity(0))[:n]:
        cores_left.put(core)
    with ProcessPoolExecutor(n, context, pin, (cores_left,)) as pool:
        for stage in (["reference", "reward"], ["apo"] * apo + cells):
            jobs = [(s, c) for c in stage for s in (seeds[:APO_WORLDS] if c == "apo" else seeds)]
            left = [job for job in jobs if not finished(*job)]
            start, futures = time.perf_counter(), {pool.submit(run_cell, *j): j for j in left}
            for i, future in enumerate(as_completed(futures), 1):
                future.result()
                seconds = (time.perf_counter() - start) / i * (len(left) - i)
                seed, cell = futures[future]
                where = f"{len(jobs) - len(left) + i}/{len(jobs)}"
                print(
                    f"{where} seed {seed} {cell}, {timedelta(seconds=int(seconds))} left",
                    flush=True,
                )


def parse_args(argv: list[str]):
    parser = Parser("reproduce.py", __doc__)
    parser.add_argument("--seeds", type=count, help="how many worlds [5; with --quick 1]")
    parser.add_argument("--first_seed", type=natural, default=10, help="the others follow it [10]")
    parser.add_argument("--apo", action="store_true", help="play train_apo.py's game too")
    parser.add_argument("--quick", action="store_true", help="one seed, eight cells")
    parser.add_argument("--out", help="[RESULTS.md; with --quick out/reproduce/quick.md]")
    args = parser.parse_args(argv)
    args.out = args.out or (str(ROOT / "quick.md") if args.quick else "RESULTS.md")
    args.seeds = args.seeds or (1 if args.quick else 5)
    return args


def main(argv=None):
    quiet()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        cells = QUICK.split() if args.quick else list(CELLS)
        run_all(seeds, cells, args.apo)
        apo = args.apo or all(finished(seed, "apo") for seed in seeds[:APO_WORLDS])
        write_results(Grid(seeds, cells, apo), Path(args.out))
        print(f"wrote {args.out}")
    except (InputError, OSError) as error:
        sys.exit(f"reproduce.py: {error}")


if __name__ == "__main__":
    main()
