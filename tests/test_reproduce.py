"""Claims about miniature/reproduce.py and results.py: how a verdict is reached, a grid in small.

python -m pytest -q tests/test_reproduce.py
"""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import train_ganpo
from data import InputError
from helpers import build_small_worlds, read_csv
from miniature import reproduce
from miniature.reproduce import CELLS, QUICK, flags_of, run_cell
from miniature.results import Grid, named_cells, targets, verdict, with_error, write_results


def test_every_cell_is_a_run_that_train_ganpo_takes_and_differs_from_the_others():
    parsed = {}
    for cell in CELLS:
        args = vars(train_ganpo.parse_args(flags_of(cell)))
        parsed[cell] = json.dumps(args, sort_keys=True)
        assert args["dataset"] == "out/mini/seed0/train.jsonl"
    assert len(set(parsed.values())) == len(CELLS)
    assert named_cells() <= set(CELLS)
    assert set(QUICK.split()) <= set(CELLS) and len(QUICK.split()) == 8


def test_a_95_percent_interval_decides():
    up = np.array([1.0, 1.4, 0.6])  # 1 +- 0.23, times 4.30 below 1
    assert verdict(up) == "reproduces" and verdict(-up) == "reversed"
    assert verdict(np.array([1.0, 1.5, 0.5])) == "does not reproduce"  # 0.29 x 4.30 above 1
    five = np.array([1.0, 1.5, 0.5, 1.7, 0.3])
    assert verdict(five, ("above", "undecided", "below")) == "above"
    assert verdict(np.array([1.0, -1.5, 0.7])) == "does not reproduce"
    assert verdict(up[:1]) == "one seed: no verdict"
    assert verdict(np.array([1.0, np.nan, 1.0])) == "not measured"
    error = np.std(up, ddof=1) / 3**0.5
    assert with_error(up, 2, "+") == f"+1.00 +- {error:.2f}"
    assert with_error(up[:1], 1) == "1.0" and with_error(np.array([1.0, np.nan]), 1) == "-"


def test_a_target_whose_cells_have_no_accuracy_is_not_measured():
    def grid(value):
        return SimpleNamespace(values=lambda cell, key: np.array([50.0, value]))

    assert [row[-2:] for row in targets(grid(np.nan))] == [("-", "not measured")] * 6
    assert [row[-1] for row in targets(grid(50.0))].count("met") == 4  # those of at most 0


def test_a_damaged_record_of_a_cell_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = reproduce.ROOT / "seed10" / "mild/dpo" / "done.json"
    path.parent.mkdir(parents=True)
    for damage in ("{", "[1]"):
        path.write_text(damage)
        with pytest.raises(InputError, match="done.json is damaged: remove it"):
            reproduce.finished(10, "mild/dpo")


@pytest.mark.parametrize("name", ["reference/eval-mini/results.json", "apo/run/rounds.csv"])
def test_damaged_results_of_a_cell_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = reproduce.ROOT / "seed10" / name
    path.parent.mkdir(parents=True)
    path.write_text("{\n1\n")
    with pytest.raises(InputError, match=f"seed10/{name.split('/')[0]} is damaged .remove it, and"):
        Grid([10], [], apo="apo" in name)


def test_a_cell_that_fails_is_named_and_cells_that_wait_are_cancelled(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    cancelled, begun = threading.Event(), []

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *args, **more):
            super().shutdown(*args, **more)
            cancelled.set()

    def run_cell(seed, cell):
        begun.append(cell)
        if cell == "mild/dpo":
            raise SystemExit("train_ganpo.py: no memory")
        assert cancelled.wait(10)

    monkeypatch.setattr(reproduce, "run_cell", run_cell)
    with Pool(1) as pool, pytest.raises(SystemExit, match="no memory"):
        reproduce.run_jobs(pool, [(10, cell) for cell in [*CELLS][:4]])
    assert begun in (["mild/dpo"], ["mild/dpo", "mild/ganpo"])
    said = capsys.readouterr().out
    assert said == "failed: seed 10 mild/dpo; its log is out/reproduce/seed10/mild/dpo/log\n"


@pytest.fixture(scope="module")
def small_grid(tmp_path_factory):
    """Two worlds of seconds, three cells each, in a folder of their own."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(reproduce, "PROMPTS", 20)
        patch.setattr(
            reproduce,
            "APO",
            ["--prompts=32", "--batch_size=8", "--max_new_tokens=32", "--rounds=2"],
        )
        build_small_worlds(patch)
        cells, seeds = ["mild/dpo", "mild/ganpo", "over/paired"], [0, 1]
        for seed in seeds:
            reproduce.prepare(seed)
            for cell in ("reference", "reward", "apo", *cells):
                run_cell(seed, cell)
        grid = Grid(seeds, cells, apo=True)
        write_results(grid, folder / "RESULTS.md")
        yield folder, grid


@pytest.mark.slow
def test_a_small_grid_gives_tables_of_its_own_numbers(small_grid):
    folder, grid = small_grid
    text = (folder / "RESULTS.md").read_text()
    strict = {}
    for seed in (0, 1):
        for cell in ("mild/dpo", "mild/ganpo"):
            file = folder / "out/reproduce" / f"seed{seed}" / cell / "eval-mini" / "results.json"
            rows = {r["temperature"]: r for r in json.loads(file.read_text())}
            strict[seed, cell] = rows[0.7]["strict_acc"]
            assert rows[0.7]["n"] == 20 and rows[0.7]["baseline"].endswith("model")
    d = np.array([strict[s, "mild/ganpo"] - strict[s, "mild/dpo"] for s in (0, 1)])
    shown = f"{d.mean():+.1f} +- {abs(d[0] - d[1]) / 2:.1f}"
    assert (
        f"strict {shown} |" in text
        and grid.difference("mild/ganpo", "mild/dpo", ("strict_acc", 0.7)) == shown
    )
    assert re.search(r"\| Fig 4 \| the discriminator .* T = 2.0 \| r [+-]0\.\d\d", text)
    assert "| over/paired |" in text and (folder / "RESULTS.png").stat().st_size > 10_000
    rounds = [
        {(r["variant"], r["round"]): r for r in read_csv(path)}
        for path in sorted(folder.glob("out/reproduce/seed?/apo/run/rounds.csv"))
    ]
    a, b = (float(r["apo", "2"]["rm_acc"]) - float(r["apo", "1"]["rm_acc"]) for r in rounds)
    assert f"| round 2 minus round 1 | {(a + b) / 2:+.1f} +- {abs(a - b) / 2:.1f} |" in text
    table = read_csv(folder / "RESULTS.csv")
    rows = {(r["seed"], r["cell"], r["temperature"]): r for r in table}
    assert len(rows) == 2 * 4 * 6  # with the reference
    assert float(rows["1", "mild/dpo", "0.7"]["strict_acc"]) == strict[1, "mild/dpo"]


@pytest.mark.slow
def test_finished_cells_are_left_alone_and_the_baseline_is_sampled_once(small_grid, monkeypatch):
    folder, _ = small_grid
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_ganpo, "main", None)
    run_cell(0, "mild/dpo")
    home = folder / "out/reproduce/seed1"
    for t in ("0.7", "1.5"):
        a = home / "reference/eval-mini" / f"model-T{t}.jsonl"
        b = home / "mild/dpo/eval-mini" / f"baseline-T{t}.jsonl"
        assert a.read_text() == b.read_text()
    assert "baseline" not in (home / "mild/dpo/log").read_text().split("judge")[0]
    monkeypatch.setitem(reproduce.CELLS, "mild/dpo", ["--lambda_adv=0", "--beta=0.2"])
    with pytest.raises(TypeError, match="not callable"):  # its settings have changed: again
        run_cell(0, "mild/dpo")
