"""Writes what miniature/reproduce.py measured: RESULTS.md, RESULTS.csv and two figures.

    grid = Grid(seeds, cells, apo)           # reads out/reproduce
    write_results(grid, Path("miniature/RESULTS.md"))

A cell's name is regime/method. A key of a measure is a name, or a name and a temperature.
"""

import cpu  # noqa: F401  must come before torch

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data import input_error_for, read_rows
from report import read_table
from tools import plots
from winrate import standard_error

ROOT = Path("out/reproduce")
TEMPERATURES = (0.0, 0.5, 0.7, 1.0, 1.2, 1.5)
REGIMES = {"mild": "1e-4", "over": "3e-4", "far": "6e-4"}  # the policy's learning rate
APO_WORLDS = 3  # number of worlds in which APO's game is played
FIG_4 = "mild/ganpo"  # the cell whose answers discriminators and a reward model score too

# ---------------------------------------------------------------------- what was measured


def measures(seed: int, cell: str) -> dict:
    """Returns the measures of one cell in one world, numbers by key, from its files."""
    folder = ROOT / f"seed{seed}" / cell
    found = {}
    for row in json.loads((folder / "eval-mini" / "results.json").read_text()):
        found |= {(k, row["temperature"]): v for k, v in row.items() if isinstance(v, int | float)}
    if (folder / "run" / "metrics.csv").exists():
        rows = read_table(folder / "run" / "metrics.csv")
        for key in rows[-1]:  # means over the last fifth of the steps
            values = [row[key] for row in rows[-len(rows) // 5 :] if key in row]
            found[key] = sum(values) / len(values)
        found["seconds"] = sum(row["seconds"] for row in rows)
    scores = read_rows(str(folder / "eval-mini" / "scores.jsonl"), "train")
    for t in (1.5, 2.0):
        here = [s for s in scores if s["temperature"] == t]
        for key in ("critic_pos", "reward"):
            if here and key in here[0]:
                found["r_" + key, t] = np.corrcoef(columns(here, key, "score"))[0, 1]
    here = [s for s in scores if s["temperature"] == 0.7 and s["win"] is not None]
    if here:
        length, win = columns(here, "length", "win")
        found["win_long"] = 100 * win[length > np.quantile(length, 0.75)].mean()
    return found


def columns(rows: list[dict], *keys: str) -> np.ndarray:
    """Returns an array (len(keys), len(rows))."""
    return np.array([[row[k] for k in keys] for row in rows], dtype=float).T


class Grid:
    """The measures of all cells and seeds; apo says whether APO's game was played."""

    def __init__(self, seeds: Sequence[int], cells: list[str], apo: bool):
        self.seeds, self.cells = seeds, cells
        games = seeds[:APO_WORLDS] if apo else []
        self.rounds = [read_cell(apo_rounds, seed, "apo") for seed in games]
        cells = ["reference", *cells]
        self.of = {(s, c): read_cell(measures, s, c) for c in cells for s in seeds}

    def values(self, cell: str, key) -> np.ndarray:
        """Returns a measure in every world, (len(seeds),); nan where it is missing."""
        return np.array([self.of[s, cell].get(key, np.nan) for s in self.seeds])

    def show(self, cell: str, key, places: int = 1) -> str:
        """Returns a measure as text, mean +- standard error over the worlds."""
        return with_error(self.values(cell, key), places)

    def difference(self, a: str, b: str, key, places: int = 1) -> str:
        """Returns as text by how much a measure is greater in cell a than in cell b."""
        return with_error(self.values(a, key) - self.values(b, key), places, sign="+")


def read_cell(read: Callable, seed: int, cell: str) -> dict:
    """Returns read(seed, cell); raises InputError, which names the cell's folder, if that fails."""
    folder = ROOT / f"seed{seed}" / cell
    with input_error_for(f"{folder} is damaged (remove it, and the cell is done anew)"):
        return read(seed, cell)


def apo_rounds(seed: int, cell: str) -> dict:
    """Returns the rows of a game's rounds.csv, by variant and round."""
    with (ROOT / f"seed{seed}" / cell / "run" / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        who = row.pop("variant"), int(row.pop("round"))
        found[who] = {k: float(v) for k, v in row.items() if v}
    return found


def with_error(values: np.ndarray, places: int, sign: str = "") -> str:
    """Returns mean +- standard error as text; "-" where a world has no value."""
    if np.isnan(values).any():
        return "-"
    text = f"{values.mean():{sign}.{places}f}"
    return f"{text} +- {standard_error(values):.{places}f}" if len(values) > 1 else text


# The 97.5 % quantile of Student's t with n - 1 degrees of freedom, for n = 2, 3, ...
T_975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def verdict(
    values: np.ndarray, words: Sequence[str] = ("reproduces", "does not reproduce", "reversed")
) -> str:
    """Returns one of three words about a difference, (worlds,).

    They stand for a 95 % interval that lies above 0, contains 0, or lies below 0. A difference that
    is missing (nan) in a world is "not measured".
    """
    n = len(values)
    if np.isnan(values).any():
        return "not measured"
    if n < 2:
        return "one seed: no verdict"
    t = values.mean() / max(standard_error(values), 1e-12)
    limit = T_975[min(n - 2, len(T_975) - 1)]
    return words[0] if t > limit else words[2] if t < -limit else words[1]


# ---------------------------------------------------------------------- claims and verdicts


def claims(grid: Grid) -> list[tuple]:
    """Returns for each claim its place in the paper, the claim, what was measured, the verdict."""
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
    if {"mild/ganpo", "mild/dpo"} <= set(grid.cells):
        rows += claims_of_temperature(grid)
    claim("Fig 5", "GANPO wins more with long answers", "mild/ganpo", "mild/dpo",
          ("win rate in the longest quarter", "win_long"))  # fmt: skip
    for a, b, name in (("ganpo", "dpo", "DPO"), ("ganpo_simpo", "simpo", "SimPO")):
        claim("Fig 6-9", f"larger margins than with {name}", f"mild/{a}", f"mild/{b}",
              ("margin at the end", "margin"), places=3)  # fmt: skip
    names = {"ganpo": "transformer", "mlp": "MLP", "mse": "fixed MSE"}
    for regime in ("mild", "over"):
        for better, worse in (("ganpo", "mlp"), ("mlp", "mse"), ("ganpo", "mse")):
            what = f"{names[better]} above {names[worse]}, learning rate {REGIMES[regime]}"
            keys = ("strict", strict), ("win rate", win)
            claim("Table 3", what, f"{regime}/{better}", f"{regime}/{worse}", *keys)
    return rows


def claims_of_temperature(grid: Grid) -> list[tuple]:
    """Returns the rows of Fig 3 and Fig 4, of the form that claims() has."""
    rows = []
    for key, name in (("win_rate", "win rate"), ("strict_acc", "strict accuracy")):
        hot, cold = (
            grid.values("mild/ganpo", (key, t)) - grid.values("mild/dpo", (key, t))
            for t in (1.5, 0.5)
        )
        measured = f"at T = 1.5 {with_error(hot, 1, '+')}, at 0.5 {with_error(cold, 1, '+')}"
        rows.append(("Fig 3", f"the gap in {name} widens with T", measured, verdict(hot - cold)))
    what = "the discriminator follows the judge better than a reward model"
    for t in (1.5, 2.0):
        ours, reward = (grid.values(FIG_4, (f"r_{key}", t)) for key in ("critic_pos", "reward"))
        measured = f"r {with_error(ours, 2, '+')} against {with_error(reward, 2, '+')}"
        rows.append(("Fig 4", f"{what}, T = {t}", measured, verdict(ours - reward)))
    return rows


def apo_claims(grid: Grid) -> list[tuple]:
    """Returns for each claim of APO the claim, the measure, what was measured, the verdict."""

    def of(variant, number, key):
        return np.array([rounds[variant, number][key] for rounds in grid.rounds])

    last = max(number for _, number in grid.rounds[0])
    gain = {n: of("apo", n, "strict_acc") - of("frozen", n, "strict_acc") for n in (1, last)}
    sampled = {v: of(v, last, "sampled_acc") for v in ("apo", "frozen")}
    sampled["start"] = of("start", 0, "sampled_acc")
    over_rounds = f"round {last} minus round 1"
    rows = [
        ("the reward model's accuracy rises, 63.0 to 67.6", over_rounds, 1,
         of("apo", last, "rm_acc") - of("apo", 1, "rm_acc")),
        ("its calibration worsens, .019 to .031", over_rounds, 3,
         of("apo", last, "rm_ece") - of("apo", 1, "rm_ece")),
        ("above plain rejection sampling", f"strict in round {last}, apo minus frozen", 1,
         gain[last]),
        ("above plain rejection sampling, sampled at T = 1",
         f"strict in round {last}, apo minus frozen", 1, sampled["apo"] - sampled["frozen"]),
        ("above the start, sampled at T = 1", f"strict in round {last}, apo minus start", 1,
         sampled["apo"] - sampled["start"]),
        ("the gain over plain rejection sampling grows over rounds", over_rounds, 1,
         gain[last] - gain[1]),
        ("without human pairs accuracy falls, to 56.6", f"apo minus gail, round {last}", 1,
         of("apo", last, "rm_acc") - of("gail", last, "rm_acc")),
        ("without human pairs calibration worsens, to .167", f"gail minus apo, round {last}", 3,
         of("gail", last, "rm_ece") - of("apo", last, "rm_ece")),
    ]  # fmt: skip
    return [
        (what, how, with_error(values, places, "+"), verdict(values))
        for what, how, places, values in rows
    ]


RIVALS = {  # for each cell those that it should be better than, at each learning rate
    "paired": ["mse"],
    "paired_h": ["mse"],
    "paired_beta": ["paired", "mse", "mse_beta"],
}
STRENGTHS = {  # cells of one kind of anchor, weak to strong, at the highest learning rate
    "fixed MSE, lambda 1, 3, 10": ["mse_1", "mse", "mse_10"],
    "paired critic, lambda 3, 10, 30": ["paired_3", "paired", "paired_30"],
    "DPO, beta 1, 3": ["beta_1", "beta_3"],
    "fixed MSE and beta 0.5": ["mse_beta"],
    "paired critic and beta 0.5": ["paired_beta"],
}
AGAINST = [(f"{r}/{c}", f"{r}/{d}") for c, ds in RIVALS.items() for d in ds for r in REGIMES]
AGAINST += [("far/paired_3", "far/mse_1"), ("far/paired_30", "far/mse_10")]


def named_cells() -> set[str]:
    """Returns the cells that the section about the paired critic needs."""
    strengths = {f"far/{cell}" for cells in STRENGTHS.values() for cell in cells}
    return strengths | {cell for pair in AGAINST for cell in pair} | {f"{r}/dpo" for r in REGIMES}


def rivals(grid: Grid) -> list[tuple]:
    """Returns a row for each pair of cells in AGAINST.

    It holds both cells, their differences in strict accuracy at four temperatures, and whether the
    first cell is above the second at T = 0.7.
    """
    rows, keys = [], [("strict_acc", t) for t in (0.0, 0.7, 1.0, 1.5)]
    for critic, distance in AGAINST:
        if {critic, distance} <= set(grid.cells):
            differences = [grid.difference(critic, distance, key) for key in keys]
            first = grid.values(critic, keys[1]) - grid.values(distance, keys[1])
            rows.append(
                (critic, distance, *differences, verdict(first, ("above", "undecided", "below")))
            )
    return rows


def targets(grid: Grid) -> list[tuple]:
    """Returns a row for each target that was set for the paired critic before the runs.

    It holds the names of two cells, the least difference in strict accuracy at T = 0.7, what was
    measured, and whether the mean meets the target.
    """
    key, rows = ("strict_acc", 0.7), []
    best = max(("far/beta_1", "far/beta_3"), key=lambda c: grid.values(c, key).mean())
    for cell, other, least in (
        ("over/paired", "over/dpo", 12), ("far/paired", "far/dpo", 12),
        ("mild/paired", "mild/dpo", -1), ("over/paired", "over/mse", 0),
        ("far/paired", "far/mse", 0), ("far/paired", best, 0),
    ):  # fmt: skip
        d = grid.values(cell, key) - grid.values(other, key)
        met = "met" if d.mean() >= least else "not met"
        met = "not measured" if np.isnan(d).any() else met
        rows.append((f"{cell} minus {other}", f"at least {least}", with_error(d, 1, "+"), met))
    return rows


# ---------------------------------------------------------------------- RESULTS.md


def markdown(header: list[str], rows: Iterable) -> str:
    """Returns a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def method_table(grid: Grid, regime: str) -> str:
    """Returns the table of all methods of one regime."""
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
    header = ["method", *(f"strict, T = {t}" for t in (0, 0.7, 1.0, 1.5)), "minus DPO, T = 0.7",
              "win rate", "length-controlled", "gold", "length"]  # fmt: skip
    return markdown(header, rows)


def health_table(grid: Grid) -> str:
    """Returns the table of how training went in each cell."""
    keys = {"margin": 3, "latent_mse": 4, "disc_acc_pos": 2, "disc_acc_neg": 2}
    keys |= {"adv_to_opo_grad": 3, "adv_align": 2, "seconds": 0}
    rows = [[c, *(grid.show(c, k, places) for k, places in keys.items())] for c in grid.cells]
    header = ["cell", "margin", "latent distance", "D acc +", "D acc -", "gradient ratio",
              "alignment", "seconds, one core"]  # fmt: skip
    return markdown(header, rows)


def apo_table(grid: Grid) -> str:
    """Returns the table of APO's variants and rounds."""
    keys = {"rm_acc": 1, "rm_ece": 3, "strict_acc": 1, "mean_score": 3, "sampled_acc": 1}
    rows = [
        (*who, *(with_error(np.array([r[who].get(k, np.nan) for r in grid.rounds]), places)
                 for k, places in keys.items()))
        for who in grid.rounds[0]
    ]  # fmt: skip
    header = ["variant", "round", "accuracy", "ECE", "strict, T = 0.3", "gold",
              "strict, sampled at T = 1"]  # fmt: skip
    return markdown(header, rows)


def write_csv(grid: Grid, path: Path):
    """Writes what the tables of methods are made of, a row per seed, cell and temperature."""
    keys = "strict_acc mean_score win_rate lc_win_rate avg_length".split()
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["seed", "cell", "temperature", *keys])
        for (seed, cell), found in grid.of.items():
            for t in TEMPERATURES:
                values = [found.get((key, t)) for key in keys]
                table.writerow([seed, cell, t, *("" if v is None else f"{v:.6g}" for v in values)])


def draw_regimes(grid: Grid, path: Path):
    """Draws strict accuracy at the three learning rates."""
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


def draw_frontier(grid: Grid, path: Path):
    """Draws strict accuracy at high temperatures and at 0.7, a curve for each of STRENGTHS."""

    def point(cell):
        keys = [("strict_acc", t) for t in (1.0, 1.5, 0.7)]
        return [grid.values(f"far/{cell}", k) - grid.values("far/mse", k) for k in keys]

    curves = {name: [point(cell) for cell in cells] for name, cells in STRENGTHS.items()}
    title = f"learning rate {REGIMES['far']}, {len(grid.seeds)} worlds, +- standard error"
    plots.save(plots.frontier(curves, title + ", minus fixed MSE with lambda 3"), path)


BEYOND = """The first table compares means with targets that were set before the runs. In the second
table a 95 % interval decides.

The paired critic of differences reads h_theta - h_ref only. So at best it is a learned norm: its
push on the latents points along h_ref - h_theta (`alignment` under Training) and vanishes with that
difference. A fixed distance does the same, and its push is straighter. The critic that reads
latents (paired_h) learns more slowly than the policy moves. A stronger critic (lambda 30) lies
slightly on the worse side of the curve of stronger fixed distances. With a second anchor, on the
log-probabilities (beta 0.5 in place of 0.1), the paired critic is level with the fixed distance
alone. It is not above a fixed distance that has the second anchor too.

In the figure each method is a curve with one point per strength of its anchor. All points are
relative to fixed MSE with lambda 3."""


def introduction(grid: Grid) -> str:
    """Returns the first paragraph of RESULTS.md."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "numpy"))
    jobs = [*grid.of, *((seed, "reward") for seed in grid.seeds)]
    jobs += [(seed, "apo") for seed in grid.seeds[: len(grid.rounds)]]
    done = [json.loads((ROOT / f"seed{s}" / c / "done.json").read_text()) for s, c in jobs]
    took = f"{len(done)} cells, {sum(d['seconds'] for d in done) / 3600:.1f} hours of one core"
    seeds, prompts = ", ".join(map(str, grid.seeds)), int(grid.values("reference", ("n", 0.7))[0])
    return (
        f"Written by `python -m miniature.reproduce` on {date.today()} ({versions}); {took}. Seeds"
        f" {seeds}: {len(grid.seeds)} worlds with {prompts} held-out prompts each and an exact"
        " judge. Values are means +- standard errors over the worlds, and differences are paired."
        " Win rates are against the reference. Win rates and strict accuracy are in percent."
        " Nothing here is a claim about models of two billion parameters."
    )


def about_the_paired_critic(grid: Grid, figure: Path) -> list[str]:
    """Draws the figure and returns the section that compares the paired critic with rivals."""
    draw_frontier(grid, figure)
    columns = [f"difference at T = {t}" for t in (0, 0.7, 1.0, 1.5)]
    return [
        "## Is a learned critic better than a fixed distance?",
        BEYOND,
        markdown(["strict accuracy at T = 0.7", "target", "measured", "verdict"], targets(grid)),
        markdown(["critic", "compared with", *columns, "verdict at T = 0.7"], rivals(grid)),
        f"![strict accuracy at low and high temperature, by strength]({figure.name})",
    ]


def about_apo(grid: Grid) -> list[str]:
    """Returns the section about APO's game."""
    seeds = ", ".join(map(str, grid.seeds[: len(grid.rounds)]))
    return [
        "## Adversarial Preference Optimization",
        f"`python -m apo.train_apo` with its defaults, seeds {seeds}. The accuracy and the"
        " calibration error (ECE) of the reward model are measured on held-out pairs of the noisy"
        " annotator, the strict accuracy and the gold score of the LLM after the round. Numbers in"
        " the claims are the paper's, of 7B models.",
        markdown(["claim", "measure", "measured", "verdict"], apo_claims(grid)),
        apo_table(grid),
    ]


def write_results(grid: Grid, path: Path):
    """Writes RESULTS.md to path, and its csv file and figures beside it."""
    parts = [
        "# The paper's claims in miniature",
        introduction(grid),
        "## Claims",
        "A claim reproduces if the 95 % interval of what was measured (Student's t over the worlds)"
        " lies above 0. It is reversed if the interval lies below 0. If nothing had any effect,"
        " chance alone would decide one claim in twenty.",
        markdown(["paper", "claim", "measured", "verdict"], claims(grid)),
        f"![strict accuracy at three learning rates]({path.with_suffix('.png').name})",
    ]
    for regime, lr in REGIMES.items():
        if any(c.startswith(regime + "/") for c in grid.cells):
            parts += [f"## Methods at learning rate {lr} ({regime})", method_table(grid, regime)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if named_cells() <= set(grid.cells):
        parts += about_the_paired_critic(grid, path.with_name(path.stem + "-frontier.png"))
    if grid.rounds:
        parts += about_apo(grid)
    parts += [
        "## Training",
        "Means over the last fifth of the steps. Alignment is the cosine of the adversarial push"
        " and h_ref - h_theta.",
        health_table(grid),
    ]
    path.write_text("\n\n".join(parts) + "\n")
    write_csv(grid, path.with_suffix(".csv"))
    draw_regimes(grid, path.with_suffix(".png"))
