"""The paper's claims on the miniature, measured one by one: writes RESULTS.md and its figures.

    python reproduce.py --seeds 5      # two cores: RESULTS.md says how long it took
    python reproduce.py --quick        # one seed, eight cells

A cell is one run of train_ganpo.py and its evaluation at six temperatures; a seed is a world of its
own (reference, pairs, run). Every core takes a cell at a time, and what a killed command has
finished stays finished. Errors are standard errors over seeds, and differences are paired: of two
cells in the same worlds, whose sampling meets the same random numbers.
"""

import csv
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from datetime import date, timedelta
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import eval_alpaca
import miniature
import plots
import reward_model
import train_ganpo
from data import InputError
from distributed import cores
from flags import Parser, count, natural
from generate import quiet

ROOT = Path("out/reproduce")
PROMPTS = 500
TEMPERATURES = (0.0, 0.5, 0.7, 1.0, 1.2, 1.5)

# ---------------------------------------------------------------------- the cells

REGIMES = {"mild": "1e-4", "over": "3e-4", "far": "6e-4"}  # the policy's learning rate
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
    "mild/lr_9e-5": [*DPO, "--lr=9e-5"],  # DPO of the paired critic's margin
    "mild/paired": PAIRED,
    "mild/paired_h": PAIRED_H,
    "over/dpo": DPO,
    "over/ganpo": [],
    "over/batch_means": ["--mean=batch"],
    "over/mlp": ["--disc=mlp"],
    "over/mse": MSE,
    "over/beta_0.5": [*DPO, "--beta=0.5"],
    "over/beta_1": [*DPO, "--beta=1"],
    "over/beta_3": [*DPO, "--beta=3"],
    "over/lr_2.3e-4": [*DPO, "--lr=2.3e-4"],
    "over/paired": PAIRED,
    "over/paired_h": PAIRED_H,
    "far/dpo": DPO,
    "far/ganpo": [],
    "far/mse": MSE,
    "far/beta_1": [*DPO, "--beta=1"],
    "far/beta_3": [*DPO, "--beta=3"],
    "far/lr_3e-4": [*DPO, "--lr=3e-4"],
    "far/paired": PAIRED,
    "far/paired_h": PAIRED_H,
}
QUICK = "mild/dpo mild/ganpo mild/simpo mild/ganpo_simpo over/dpo over/ganpo over/mse over/paired"
FIG_4 = "mild/ganpo"  # its answers are scored by its discriminators and a reward model too


def flags_of(cell) -> list[str]:
    return [f"--lr={REGIMES[cell.split('/')[0]]}", *CELLS[cell]]


def pin(cores_left):
    """A worker's own core, and nothing on the terminal."""
    os.sched_setaffinity(0, {cores_left.get()})
    quiet()


def run_cell(seed: int, cell: str):
    """Trains and evaluates; `reference` and `reward` come first. Left alone where it is done."""
    home, world = ROOT / f"seed{seed}", miniature.ROOT / f"seed{seed}"
    folder, common = home / cell, [f"--seed={seed}"]
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    evaluate = [*common, f"--prompts={home / 'prompts.jsonl'}", f"--out={folder / 'eval-mini'}"]
    evaluate += ["--max_new_tokens=64", "--temperatures", *map(str, TEMPERATURES)]
    with (folder / "log").open("w") as log, redirect_stdout(log):
        if cell == "reference":
            eval_alpaca.main([*evaluate, "2.0", f"--model={world / 'model'}"])
        elif cell == "reward":
            reward_model.main([*common, f"--out_dir={folder / 'run'}"])
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
    (folder / "done").touch()


def prepare(seed: int):
    """The world of a seed, and the prompts that its cells are examined on."""
    world, home = miniature.build(seed), ROOT / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    lines = (world / "prompts.jsonl").read_text().splitlines(keepends=True)[:PROMPTS]
    (home / "prompts.jsonl").write_text("".join(lines))


def run_all(seeds, cells) -> float:
    """Everything that is not finished yet -> seconds."""
    begin = time.perf_counter()
    for seed in seeds:
        prepare(seed)
    context = get_context("spawn")
    cores_left, n = context.Queue(), cores()
    for core in sorted(os.sched_getaffinity(0))[:n]:
        cores_left.put(core)
    with ProcessPoolExecutor(n, context, pin, (cores_left,)) as pool:
        for stage in (["reference", "reward"], cells):
            jobs = [(seed, cell) for cell in stage for seed in seeds]
            left = [j for j in jobs if not (ROOT / f"seed{j[0]}" / j[1] / "done").exists()]
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
    return time.perf_counter() - begin


# ---------------------------------------------------------------------- what they measured


def measures(seed: int, cell: str) -> dict:
    """(what, temperature) or what -> a number, from the files of one cell."""
    folder = ROOT / f"seed{seed}" / cell
    found = {}
    for row in json.loads((folder / "eval-mini" / "results.json").read_text()):
        found |= {(k, row["temperature"]): v for k, v in row.items() if isinstance(v, int | float)}
    if (folder / "run" / "metrics.csv").exists():
        with (folder / "run" / "metrics.csv").open() as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        for key in rows[-1]:  # the last fifth of the run
            values = [row[key] for row in rows[-len(rows) // 5 :] if key in row]
            found[key] = sum(values) / len(values)
        found["seconds"] = sum(row["seconds"] for row in rows)
    scores = [json.loads(x) for x in (folder / "eval-mini" / "scores.jsonl").open()]
    for t in (1.5, 2.0):
        here = [s for s in scores if s["temperature"] == t]
        for key in ("critic_pos", "reward"):
            if here and key in here[0]:
                found["r_" + key, t] = plots.pearson(*columns(here, key, "score"), draws=2)[0]
    here = [s for s in scores if s["temperature"] == 0.7 and s["win"] is not None]
    if here:
        length, win = columns(here, "length", "win")
        found["win_long"] = 100 * win[length > np.quantile(length, 0.75)].mean()
    return found


def columns(rows, *keys):
    return np.array([[row[k] for k in keys] for row in rows], dtype=float).T


class Grid:
    """All measures of all seeds."""

    def __init__(self, seeds, cells):
        self.seeds, self.cells = seeds, cells
        self.of = {(s, c): measures(s, c) for c in ["reference", *cells] for s in seeds}

    def values(self, cell, key) -> np.ndarray:
        return np.array([self.of[s, cell].get(key, np.nan) for s in self.seeds])

    def show(self, cell, key, places=1) -> str:
        return with_error(self.values(cell, key), places)

    def difference(self, a, b, key, places=1) -> str:
        return with_error(self.values(a, key) - self.values(b, key), places, sign="+")


def with_error(values, places, sign="") -> str:
    if np.isnan(values).any():
        return "-"
    text = f"{values.mean():{sign}.{places}f}"
    return f"{text} +- {error_of(values):.{places}f}" if len(values) > 1 else text


def error_of(values) -> float:
    return values.std(ddof=1) / len(values) ** 0.5


def verdict(values) -> str:
    """Of a difference that the paper has above 0: two standard errors decide."""
    if len(values) < 2:
        return "one seed: no verdict"
    z = values.mean() / max(error_of(values), 1e-12)
    return "reproduces" if z > 2 else "reversed" if z < -2 else "does not reproduce"


def claims(grid):
    """-> per claim: where in the paper, what it says, what was measured, the verdict."""
    lc, win, strict = ("lc_win_rate", 0.7), ("win_rate", 0.7), ("strict_acc", 0.7)
    rows = []

    def claim(where, what, a, b, *keys, places=1):
        if {a, b} <= set(grid.cells):
            measured = "; ".join(f"{name} {grid.difference(a, b, k, places)}" for name, k in keys)
            first = grid.values(a, keys[0][1]) - grid.values(b, keys[0][1])
            rows.append((where, what, measured, verdict(first)))

    for a, b, names in (("ganpo", "dpo", "GANPO(DPO) above DPO"),
                        ("ganpo_simpo", "simpo", "GANPO(SimPO) above SimPO")):  # fmt: skip
        claim("Table 1", names, f"mild/{a}", f"mild/{b}", ("length-controlled win rate", lc),
              ("win rate", win), ("strict", strict))  # fmt: skip
    for key, name in (("win_rate", "win rate"), ("strict_acc", "strict accuracy")):
        if "mild/ganpo" in grid.cells:
            gap = [
                grid.values("mild/ganpo", (key, t)) - grid.values("mild/dpo", (key, t))
                for t in (1.5, 0.5)
            ]
            measured = (
                f"at T = 1.5 {with_error(gap[0], 1, '+')}, at 0.5 {with_error(gap[1], 1, '+')}"
            )
            rows.append(
                ("Fig 3", f"the gap in {name} widens with T", measured, verdict(gap[0] - gap[1]))
            )
    if FIG_4 in grid.cells:
        what = "the discriminator follows the judge better than a reward model"
        for t in (1.5, 2.0):
            ours, reward = (grid.values(FIG_4, (f"r_{key}", t)) for key in ("critic_pos", "reward"))
            measured = f"r {with_error(ours, 2, '+')} against {with_error(reward, 2, '+')}"
            rows.append(("Fig 4", f"{what}, T = {t}", measured, verdict(ours - reward)))
    claim("Fig 5", "GANPO wins more with long answers", "mild/ganpo", "mild/dpo",
          ("win rate in the longest quarter", "win_long"))  # fmt: skip
    for a, b in (("ganpo", "dpo"), ("ganpo_simpo", "simpo")):
        claim("Fig 6-9", f"larger margins than {b}'s", f"mild/{a}", f"mild/{b}",
              ("margin at the end", "margin"), places=3)  # fmt: skip
    names = {"ganpo": "transformer", "mlp": "MLP", "mse": "fixed MSE"}
    for regime in ("mild", "over"):
        for better, worse in (("ganpo", "mlp"), ("mlp", "mse"), ("ganpo", "mse")):
            what = f"{names[better]} above {names[worse]}, learning rate {REGIMES[regime]}"
            keys = ("strict", strict), ("win rate", win)
            claim("Table 3", what, f"{regime}/{better}", f"{regime}/{worse}", *keys)
    return rows


# ---------------------------------------------------------------------- RESULTS.md


def markdown(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def method_table(grid, regime) -> str:
    cells = [c for c in grid.cells if c.startswith(regime + "/")]
    base = f"{regime}/dpo"
    rows = []
    for cell in ["reference", *cells]:
        row = [cell.split("/")[-1]]
        row += [grid.show(cell, ("strict_acc", t)) for t in (0.0, 0.7, 1.0, 1.5)]
        versus = {cell, base} <= set(cells) and cell != base
        row.append(grid.difference(cell, base, ("strict_acc", 0.7)) if versus else "")
        row += [grid.show(cell, ("win_rate", 0.7)), grid.show(cell, ("lc_win_rate", 0.7))]
        row += [grid.show(cell, ("mean_score", 0.7), 3), grid.show(cell, ("avg_length", 0.7))]
        rows.append(row)
    header = ["", *(f"strict, T = {t}" for t in (0, 0.7, 1.0, 1.5)), "minus DPO, T = 0.7",
              "win rate", "length-controlled", "gold", "length"]  # fmt: skip
    return markdown(header, rows)


def health_table(grid) -> str:
    keys = {"margin": 3, "latent_mse": 4, "disc_acc_pos": 2, "disc_acc_neg": 2}
    keys |= {"adv_to_opo_grad": 3, "adv_align": 2, "seconds": 0}
    rows = [[c, *(grid.show(c, k, places) for k, places in keys.items())] for c in grid.cells]
    header = ["", "margin", "latent distance", "D acc +", "D acc -", "gradient ratio", "alignment",
              "seconds, one core"]  # fmt: skip
    return markdown(header, rows)


def write_csv(grid, path):
    """What the tables are made of: a row per seed, cell and temperature."""
    keys = "strict_acc mean_score win_rate lc_win_rate avg_length".split()
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["seed", "cell", "temperature", *keys])
        for (seed, cell), found in grid.of.items():
            for t in TEMPERATURES:
                values = [found.get((key, t)) for key in keys]
                table.writerow([seed, cell, t, *("" if v is None else f"{v:.6g}" for v in values)])


def draw_regimes(grid, path):
    methods = {"DPO": "dpo", "GANPO(DPO), Eq 18-20": "ganpo", "DPO, beta 1": "beta_1"}
    methods |= {"paired critic, differences": "paired", "paired critic, latents": "paired_h"}
    methods |= {"fixed MSE": "mse"}
    values = {
        (method, t): [
            grid.values(f"{regime}/{name}", ("strict_acc", t))
            if f"{regime}/{name}" in grid.cells
            else None
            for regime in REGIMES
        ]
        for t in (0.7, 1.0)
        for method, name in methods.items()
    }
    values = {k: v for k, v in values.items() if any(x is not None for x in v)}
    title = f"{len(grid.seeds)} worlds, +- standard error"
    plots.save(plots.regimes(values, list(REGIMES.values()), title), path)


def write_results(grid, path, seconds):
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "numpy"))
    took = f"{seconds / 60:.0f} minutes on {cores()} cores" if seconds > 60 else "taken from files"
    seeds = ", ".join(map(str, grid.seeds))
    parts = [
        "# The paper's claims in miniature",
        f"Written by `python reproduce.py` on {date.today()} ({versions}; {took}). Seeds {seeds}:"
        f" {len(grid.seeds)} worlds, {PROMPTS} held-out prompts each, an exact judge; mean +-"
        " standard error over the worlds; differences are paired. Win rates are against the"
        " reference, in percent, as is strict accuracy. Nothing here is a claim about models of two"
        " billion parameters.",
        "## Claims",
        "A claim reproduces if what was measured lies more than two standard errors above 0, and is"
        " reversed if as far below.",
        markdown(["paper", "claim", "measured", "verdict"], claims(grid)),
    ]
    parts.append(f"![strict accuracy at three learning rates]({path.with_suffix('.png').name})")
    for regime, lr in REGIMES.items():
        if any(c.startswith(regime + "/") for c in grid.cells):
            parts += [f"## Methods at learning rate {lr} ({regime})", method_table(grid, regime)]
    parts += [
        "## Training",
        "Means over the last fifth of the steps; alignment is the cosine of the adversarial push"
        " and h_ref - h_theta.",
        health_table(grid),
    ]
    path.write_text("\n\n".join(parts) + "\n")
    write_csv(grid, path.with_suffix(".csv"))
    draw_regimes(grid, path.with_suffix(".png"))


def main(argv=None):
    quiet()
    parser = Parser("reproduce.py", __doc__)
    parser.add_argument("--seeds", type=count, default=5, help="how many worlds [5]")
    parser.add_argument("--first_seed", type=natural, default=10, help="the others follow it [10]")
    parser.add_argument("--quick", action="store_true", help="one seed, eight cells")
    parser.add_argument("--out", default="RESULTS.md", help="[RESULTS.md]")
    try:
        args = parser.parse_args(sys.argv[1:] if argv is None else argv)
        seeds = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
        cells = QUICK.split() if args.quick else list(CELLS)
        seconds = run_all(seeds, cells)
        write_results(Grid(seeds, cells), Path(args.out), seconds)
        print(f"wrote {args.out}")
    except (InputError, OSError) as error:
        sys.exit(f"reproduce.py: {error}")


if __name__ == "__main__":
    main()
