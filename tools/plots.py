"""Draws figures from what the other programs wrote: means, errors and correlations.

    python -m tools.plots out/run-000 out/run-001 [--out figures] [--temperature 0.7]

A RUN is a folder of train_ganpo.py (metrics.csv, config.json), with the folder of eval_alpaca.py in
it (eval-*/results.json, scores.jsonl), or such an evaluation by itself. If no run has what a figure
needs, the figure is not drawn and the program says so.

    temperature.png   Fig 3a, 3b    win rate and strict accuracy against temperature
    critic.png        Fig 4         discriminator's and reward model's score against the judge's
    length.png        Fig 5         win rate by length of the answer
    margin.png        Fig 6-9       margins over training, with and without the adversarial loss
    health.png        ours          discriminators over training, beside their neutral values

miniature/results.py draws two more, regimes and frontier.
"""

import cpu  # noqa: F401  must come before torch

import sys
from pathlib import Path
from typing import NamedTuple

try:
    import matplotlib
except ImportError:
    sys.exit("figures need matplotlib: pip install -r requirements-dev.txt")
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from data import InputError, input_error_for, read_rows
from flags import Parser, at_least_0
from report import read_config, read_table
from winrate import standard_error

# Colours of Okabe and Ito, which colour-blind readers can tell apart. Lines and marks differ too,
# for prints in grey.
STYLES = [
    dict(color="#000000", linestyle="-", marker="o"),
    dict(color="#0072B2", linestyle="--", marker="s"),
    dict(color="#D55E00", linestyle="-.", marker="^"),
    dict(color="#009E73", linestyle=":", marker="D"),
    dict(color="#CC79A7", linestyle="-", marker="v"),
    dict(color="#E69F00", linestyle="--", marker="P"),
]
OF_RESULTS = "temperature n win_rate win_rate_se strict_acc strict_acc_se".split()
OF_SCORES = "temperature length win score".split()
NEUTRAL = dict(color="0.5", linewidth=1, zorder=0)
OUT_OF_DISTRIBUTION = (1.5, 2.0)  # Fig 4's temperatures


class Run(NamedTuple):
    """What is drawn of one RUN."""

    name: str
    style: dict  # of its lines
    loss: str | None  # --loss, from config.json
    metrics: list[dict]  # rows of metrics.csv
    results: list[dict]  # rows of results.json
    scores: list[dict]  # rows of scores.jsonl


def read_run(folder: Path, style: dict) -> Run:
    """Returns the run in a folder.

    Raises InputError if the folder holds nothing to draw, several evaluations, or damaged files.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    config, metrics = read_config(folder) or {}, []
    if (folder / "metrics.csv").is_file():
        metrics = read_table(folder / "metrics.csv")
        if not metrics or not config:
            raise InputError(f"{folder}: metrics.csv has no row, or config.json is not a run's")
    found = sorted(folder.glob("eval-*/results.json")) or sorted(folder.glob("results.json"))
    if len(found) > 1:
        names = ", ".join(f.parent.name for f in found)
        raise InputError(f"{folder}: several evaluations, pass one of them as RUN: {names}")
    if not metrics and not found:
        raise InputError(f"{folder}: neither metrics.csv nor results.json")
    results, scores = [], []
    for file in found:
        results = read_numbers(file, OF_RESULTS)
        scores = read_numbers(file.with_name("scores.jsonl"), OF_SCORES)
    if not metrics and not results:
        raise InputError(f"{folder}: no results with a temperature, so there is nothing to draw")
    if not config and folder.name.startswith("eval-"):
        config = read_config(folder.parent) or {}
    return Run(name_of(config) or folder.name, style, config.get("loss"), metrics, results, scores)


def read_numbers(file: Path, columns: list[str]) -> list[dict]:
    """Returns the rows of results.json or scores.jsonl that have a temperature, as those about
    published annotations have not; raises InputError if columns are no numbers and not null."""
    rows = read_rows(str(file), "train")
    with input_error_for(f"{file} is damaged"):
        rows = [row for row in rows if row.get("temperature") is not None]
        rows = [{"score": None} | row for row in rows]  # which some judges do not give
        for i, row in enumerate(rows):
            if bad := [k for k in columns if not isinstance(row[k], int | float | None)]:
                raise InputError(f"row {i} has no number as {bad[0]}")
    return rows


def name_of(config: dict) -> str | None:
    """Returns the name of a run's method as the paper writes it: DPO, GANPO(DPO), ..."""
    if "lambda_adv" not in config:  # not a run of train_ganpo.py
        return None
    loss = {"dpo": "DPO", "simpo": "SimPO", "ipo": "IPO", "sft": "SFT"}.get(config["loss"])
    loss = loss or config["loss"]
    if config["lambda_adv"] == 0:
        return loss
    others = {"mse": "MSE", "paired": "paired critic", "paired_h": "paired critic of latents"}
    other = others.get(config["critic"])
    return f"{loss} + {other}" if other else f"GANPO({loss})"


def read_runs(folders: list[str]) -> list[Run]:
    """Returns the runs of all folders. Runs of one method have their folders' names added."""
    if len(folders) > len(STYLES):
        raise InputError(f"{len(folders)} runs: more than {len(STYLES)} lines cannot be told apart")
    runs = [read_run(Path(f), style) for f, style in zip(folders, STYLES, strict=False)]
    names = [r.name for r in runs]
    return [
        r._replace(name=f"{r.name} {Path(f).name}") if names.count(r.name) > 1 else r
        for r, f in zip(runs, folders, strict=True)
    ]


# ---------------------------------------------------------------------- figures
# Each function returns a figure, or None if no run has what it shows.


def temperature(runs: list[Run], args):
    """Fig 3a and 3b: win rate and strict accuracy against temperature."""
    runs = [r for r in runs if r.results]
    panels = [("win_rate", "win rate, %"), ("strict_acc", "strict accuracy, %")]
    panels = [
        (k, t) for k, t in panels if any(row[k] is not None for r in runs for row in r.results)
    ]
    if not panels:
        return None
    figure, axes = canvas(1, len(panels))
    for ax, (key, title) in zip(axes.flat, panels, strict=True):
        for run in runs:
            rows = [row for row in run.results if row[key] is not None]
            rows.sort(key=lambda row: row["temperature"])
            keys = ("temperature", key, f"{key}_se")  # one prompt has no error: null, then nan
            x, y, e = (np.array([row[k] for row in rows], dtype=float) for k in keys)
            ax.errorbar(x, y, e, label=run.name, capsize=2, markersize=4, **run.style)
        ax.set(xlabel="temperature", ylabel=title)
    axes.flat[0].set_title(judge_of(runs), fontsize=9, loc="left")
    if panels[0][0] == "win_rate":
        axes.flat[0].axhline(50, **NEUTRAL)
    axes.flat[-1].legend()
    return figure


def judge_of(runs: list[Run]) -> str:
    """Returns the judges of the runs and the numbers of their prompts, as a title."""
    rows = [row for r in runs for row in r.results]
    n = sorted({row["n"] for row in rows})
    judges = ", ".join(sorted({str(row["judge"]) for row in rows}))
    return f"judge {judges}, n = {' to '.join(map(str, {n[0], n[-1]}))}"


def critic(runs: list[Run], args):
    """Fig 4: scores of discriminator and reward model against the judge's.

    Draws the first run whose answers the discriminator has scored at high temperature.
    """
    keys = [("critic_pos", "discriminator's score"), ("reward", "reward model's score")]

    def pairs(run, key, t):
        rows = [s for s in run.scores if s["temperature"] == t and s.get("sample", 0) == 0]
        pairs = [(s.get(key), s["score"]) for s in rows]
        return [pair for pair in pairs if None not in pair]

    for run in runs:
        temperatures = [t for t in OUT_OF_DISTRIBUTION if pairs(run, "critic_pos", t)]
        have = [k for k in keys if all(pairs(run, k[0], t) for t in temperatures)]
        if temperatures:
            break
    else:
        return None
    figure, axes = canvas(len(temperatures), len(have), sharey=True)
    for row_of_axes, t in zip(axes, temperatures, strict=True):
        for ax, (key, title) in zip(row_of_axes, have, strict=True):
            x, y = np.array(pairs(run, key, t)).T
            r, low, high = pearson(x, y)
            ax.plot(x, y, ".", color="#0072B2", markersize=3, alpha=0.4)
            ax.set(xlabel=title, ylabel="judge's score")
            text = f"T = {t:g}: r = {r:+.2f} [{low:+.2f}, {high:+.2f}], n = {len(x)}"
            ax.set_title(text, fontsize=9, loc="left")
    figure.suptitle(f"{run.name}, one answer per prompt; 95 % bootstrap interval", fontsize=9)
    return figure


def pearson(x: np.ndarray, y: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Returns the correlation r of x and y, (n,) each, and the ends of its 95 % interval.

    The interval is from a bootstrap with so many draws of the n answers.
    """
    rng, n = np.random.default_rng(0), len(x)

    def r(x, y):
        x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))

    rows = rng.integers(n, size=(draws, n))
    low, high = np.quantile(r(x[rows], y[rows]), [0.025, 0.975])
    return float(r(x, y)), float(low), float(high)


def length(runs: list[Run], args):
    """Fig 5: win rate by length of the answer, in four groups of all runs' answers."""
    rows = {
        run.name: [
            s for s in run.scores if s["temperature"] == args.temperature and s["win"] is not None
        ]
        for run in runs
    }
    lengths = [s["length"] for of_run in rows.values() for s in of_run]
    if not lengths:
        return None
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).round())
    figure, axes = canvas(1, 1)
    ax, shown = axes.flat[0], [r for r in runs if rows[r.name]]
    for i, run in enumerate(shown):
        where = np.array([s["length"] for s in rows[run.name]])
        win = 100 * np.array([s["win"] for s in rows[run.name]])
        bucket = np.clip(np.searchsorted(edges, where, side="left") - 1, 0, len(edges) - 2)
        parts = [win[bucket == b] for b in range(len(edges) - 1)]
        x = np.arange(len(parts)) + 0.08 * (i - (len(shown) - 1) / 2)
        y = [p.mean() if len(p) else np.nan for p in parts]
        e = [standard_error(p) if len(p) > 1 else np.nan for p in parts]
        ax.errorbar(x, y, e, label=run.name, capsize=2, markersize=4, **run.style)
    low = [edges[0], *(edges[1:-1] + 1)]
    ax.set_xticks(
        range(len(edges) - 1), [f"{a:g} to {b:g}" for a, b in zip(low, edges[1:], strict=True)]
    )
    ax.axhline(50, **NEUTRAL)
    ax.set(xlabel="characters of the answer (quarters of all)", ylabel="win rate, %")
    ax.set_title(f"{judge_of(shown)}, T = {args.temperature:g}", fontsize=9, loc="left")
    ax.legend()
    return figure


def margin(runs: list[Run], args):
    """Fig 6-9: the margin of rewards over training, one panel for each --loss."""
    losses = [x for x in dict.fromkeys(r.loss for r in runs if r.metrics) if x]
    if not losses:
        return None
    figure, axes = canvas(1, len(losses))
    for ax, loss in zip(axes.flat, losses, strict=True):
        for run in (r for r in runs if r.loss == loss and r.metrics):
            over_training(ax, run, "margin")
        ax.axhline(0, **NEUTRAL)
        ax.set(xlabel="step", ylabel="reward margin, chosen - rejected")
        ax.legend()
    return figure


def health(runs: list[Run], args):
    """What the discriminators do over training, beside their neutral values."""
    runs = [r for r in runs if any("disc_acc_pos" in row for row in r.metrics)]
    if not runs:
        return None
    panels = [
        (("disc_acc_pos", "disc_acc_neg"), "P[C(h_ref) > C(h_theta)]", 0.5),
        (("score_gap_pos", "score_gap_neg"), "score gap, ref - policy", 0),
        (("d_ra",), "d_ra", 0),
        (("adv_to_opo_grad",), "|adversarial| / |preference| gradient", None),
    ]
    figure, axes = canvas(2, 2)
    for ax, (keys, title, neutral) in zip(axes.flat, panels, strict=True):
        for run in runs:
            for key, width in zip(keys, (2, 1), strict=False):
                if not any(key in row for row in run.metrics):
                    continue  # a run of the paired critic has no d_ra
                sign = f" {key[-3:]}" if len(keys) > 1 else ""
                over_training(ax, run, key, run.name + sign, width)
        if neutral is not None:
            ax.axhline(neutral, **NEUTRAL)
        ax.set(xlabel="step", ylabel=title)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle("grey: what critics show that cannot tell policy from reference", fontsize=9)
    return figure


def over_training(ax, run: Run, key: str, label: str | None = None, width: float = 1.5):
    """Draws a column of metrics.csv, as a moving average over a twentieth of the run."""
    rows = [row for row in run.metrics if key in row]
    step, value = (np.array([row[k] for row in rows]) for k in ("step", key))
    window = max(1, len(rows) // 20)
    kernel = np.ones(window) / window
    style = {k: v for k, v in run.style.items() if k != "marker"} | {"linewidth": width}
    ax.plot(np.convolve(step, kernel, "valid"), np.convolve(value, kernel, "valid"),
            label=label or run.name, **style)  # fmt: skip


def canvas(rows: int, columns: int, **settings):
    """Returns a figure with so many panels, of a width at which README can show it."""
    width = 8 if columns > 1 else 5
    return plt.subplots(
        rows, columns, figsize=(width, 3.2 * rows), squeeze=False, layout="constrained", **settings
    )


def regimes(values: dict, rates: list[str], title: str):
    """Returns miniature/results.py's figure of strict accuracy at three learning rates.

    values[method, temperature] holds for each rate an array over seeds, or None where the method
    was not run. There is one panel per temperature.
    """
    temperatures = sorted({t for _, t in values})
    figure, axes = canvas(1, len(temperatures))
    for ax, t in zip(axes.flat, temperatures, strict=True):
        for (method, _), style in zip((k for k in values if k[1] == t), STYLES, strict=False):
            found = [(i, v) for i, v in enumerate(values[method, t]) if v is not None]
            x, y = [i for i, _ in found], [v.mean() for _, v in found]
            e = [standard_error(v) for _, v in found]
            ax.errorbar(x, y, e, label=method, capsize=2, markersize=4, **style)
        ax.set_xticks(range(len(rates)), rates)
        ax.set(xlabel="learning rate of the policy", ylabel=f"strict accuracy at T = {t:g}, %")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes.flat[0].set_title(title, fontsize=9, loc="left")
    return figure


def frontier(curves: dict, title: str):
    """Returns miniature/results.py's figure of strict accuracy at high temperatures and at 0.7.

    curves[method] holds points. A point is three arrays over seeds: strict accuracy at T = 1.0, 1.5
    and 0.7, minus that of another method in the same worlds.
    """
    figure, axes = canvas(1, 2)
    for (method, points), style in zip(curves.items(), STYLES, strict=False):
        mean = np.array([[v.mean() for v in point] for point in points]).T
        error = np.array([[standard_error(v) for v in point] for point in points]).T
        for ax, i in zip(axes.flat, (0, 1), strict=True):
            bars = dict(xerr=error[i], yerr=error[2], capsize=2, elinewidth=0.7, markersize=4)
            ax.errorbar(mean[i], mean[2], label=method, **bars, **style)
    for ax, t in zip(axes.flat, (1.0, 1.5), strict=True):
        ax.axhline(0, **NEUTRAL)
        ax.axvline(0, **NEUTRAL)
        ax.set(xlabel=f"strict accuracy at T = {t:g}, points", ylabel="strict accuracy at T = 0.7")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=9)
    return figure


FIGURES = {f.__name__: f for f in (temperature, critic, length, margin, health)}


def save(figure, path: Path):
    """Writes a whole figure as a png file and closes it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=150, metadata={"Software": None})
    unfinished.rename(path)
    plt.close(figure)


def parse_args(argv: list[str]):
    """Returns the settings of this program."""
    parser = Parser("tools.plots", __doc__, "python -m tools.plots RUN [RUN ...] [--out figures]")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="figures", help="[figures]")
    parser.add_argument("--temperature", type=at_least_0, default=0.7, help="of Fig 5 [0.7]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        runs, figures = read_runs(args.runs), {}
        for name, draw in FIGURES.items():  # all, before the first is written
            with input_error_for(f"{name}: cannot be drawn"):
                figures[name] = draw(runs, args)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            if figure is None:
                print(f"{name}: these runs have nothing to draw")
                continue
            path = Path(args.out) / f"{name}.png"
            save(figure, path)
            print(f"wrote {path}")
    except (InputError, OSError, ValueError) as error:
        sys.exit(f"tools.plots: {error}")


if __name__ == "__main__":
    main()
