"""Claims about evaluation: winrate.py, eval_alpaca.py, reward_model.py, tools/plots.py.

    python -m pytest -q tests/test_eval.py -m "not slow"

Rates are compared with sums and fits written out here, and with AlpacaEval's published ones where
its files lie beside the repository; answers and scores with the same models called one answer at a
time.
"""

import csv
import gzip
import importlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import eval_alpaca
import generate as generate_py
import report
import reward_model
import winrate
from checkpoint import load_discriminators, locked
from data import ChatEncoder, InputError, load_pairs, read_rows, user_chat
from distributed import session
from generate import Answer, generate
from helpers import (
    CHAT,
    LN2,
    ROOT,
    SHARED,
    VOCAB,
    command,
    json_of,
    lines_of,
    make_model,
    make_reward_model,
    read_csv,
    rows_of,
    run,
    tiny,
    write_lines,
)
from miniature import world
from packing import pack
from policy import load_lm
from reward_model import RewardLM, RewardModel
from tools import ifeval, plots

ALPACA = SHARED / "alpaca_eval"
needs_alpaca = pytest.mark.skipif(not ALPACA.is_dir(), reason=f"{ALPACA} is not there")
PUBLISHED = ("FuseChat-Llama-3.2-1B-Instruct", "gpt-3.5-turbo-0301", "vicuna-13b")


# ---------------------------------------------------------------------- win rates


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """AlpacaEval's files with contents of our own: 805 instructions, difficulties, a baseline's
    answers and those of a model that was told to be verbose or concise."""
    folder, rng = tmp_path_factory.mktemp("alpaca"), random.Random(0)
    tasks = world.draw_tasks(rng, 805, distinct=True)
    rows = [
        {"instruction": t.prompt, "output": "x" * rng.randint(1, 400), "generator": "base"}
        for t in tasks
    ]
    packed = gzip.compress(json.dumps(rows).encode())
    (folder / f"{eval_alpaca.BASELINE_FILE}.gz").write_bytes(packed)
    difficulty = [rng.gauss(0, 1) for _ in rows]
    write_csv(folder / "instruction_difficulty.csv", "index instruction_difficulty",
              enumerate(difficulty))  # fmt: skip
    gamed = []
    for model, sign in (("verbose", -1), ("concise", 1)):
        for i, d in enumerate(difficulty):
            delta = sign * abs(rng.gauss(1, 1))
            gamed.append((rng.betavariate(5 - 3 * sign, 5 + 3 * sign), i, delta, d, False, model))
    write_csv(folder / "df_gamed.csv", "preference index std_delta_len instruction_difficulty"
              " not_gamed_baseline model", gamed)  # fmt: skip
    return folder


def write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.split(), *rows])


def read_baseline(folder):
    packed = (folder / f"{eval_alpaca.BASELINE_FILE}.gz").read_bytes()
    return json.loads(gzip.decompress(packed))


def own_annotations(folder, seed=1):
    """A judge's opinions of a model that wins by its longer answers and on difficult questions."""
    rng, rows = random.Random(seed), []
    difficulty = read_csv(folder / "instruction_difficulty.csv")
    for row, d in zip(read_baseline(folder), difficulty, strict=True):
        text = "y" * rng.randint(1, 600)
        z = 2 * np.tanh((len(text) - len(row["output"])) / 200) + float(d["instruction_difficulty"])
        wins = rng.random() < 1 / (1 + np.exp(1 - z))
        rows.append({"instruction": row["instruction"], "output_2": text, "generator_2": "mine",
                     "preference": 1 + abs(wins - rng.random() / 10)})  # fmt: skip
    return rows


def naive_length_controlled(folder, rows, by_position=False):
    """AlpacaEval 2's rate from its files in plain steps; the fit coordinate by coordinate, each
    by bisection of the derivative. The penalty is the best of ten, see the test of best_penalty."""
    baseline = read_baseline(folder)
    lengths = {r["instruction"]: len(r["output"]) for r in baseline}
    difficulty = {
        r["instruction"]: float(d["instruction_difficulty"])
        for r, d in zip(baseline, read_csv(folder / "instruction_difficulty.csv"), strict=True)
    }
    delta = [lengths[r["instruction"]] - len(r["output_2"]) for r in rows]
    mean = sum(delta) / len(delta)
    std = (sum((x - mean) ** 2 for x in delta) / (len(delta) - 1)) ** 0.5
    place = [list(lengths).index(r["instruction"]) for r in rows]
    of_place = list(difficulty.values())
    x = [[np.tanh(d / std), of_place[row if by_position else place[row]], 1.0]
         for row, d in enumerate(delta)]  # fmt: skip
    y, weight = [r["preference"] - 1 for r in rows], [1.0] * len(rows)
    for r in read_csv(folder / "df_gamed.csv"):
        x.append([np.tanh(float(r["std_delta_len"])), float(r["instruction_difficulty"]), 0.0])
        x[-1][2] = 1.0 if r["not_gamed_baseline"] == "True" else 0.0
        y.append(float(r["preference"]))
        weight.append(0.2 / 2)
        place.append(int(r["index"]))
    x, y, weight, b = np.array(x), np.array(y), np.array(weight), np.zeros(3)
    penalty = winrate.best_penalty(x, y, weight, np.array(place) % 5)

    def slope(j, value):
        moved = b.copy()
        moved[j] = value
        return (weight * (1 / (1 + np.exp(-x @ moved)) - y)) @ x[:, j]

    for _ in range(60):
        for j in range(3):
            at_0 = slope(j, 0.0)
            if abs(at_0) <= penalty:
                b[j] = 0.0
                continue
            sign = -np.sign(at_0)  # of the minimum
            low, high = sorted((0.0, 20.0 * sign))
            for _ in range(50):
                middle = (low + high) / 2
                if slope(j, middle) + sign * penalty > 0:
                    high = middle
                else:
                    low = middle
            b[j] = (low + high) / 2
    z = x[: len(rows), 1] * b[1] + b[2]
    return 100 * np.mean(1 / (1 + np.exp(-z)))


def annotate(file, out, data, *more):
    judge = ["--judge=annotations", f"--annotations={file}", f"--alpaca_data={data}"]
    eval_alpaca.main([*judge, f"--out={out}", *more])
    (row,) = json_of(out / "results.json")
    return row


def test_annotations_give_the_rates_of_a_naive_fit(alpaca, tmp_path):
    rows = own_annotations(alpaca)
    found = annotate(write_lines(tmp_path / "rows.jsonl", rows), tmp_path, alpaca)
    wins = np.array([r["preference"] - 1 for r in rows])
    assert abs(found["win_rate"] - 100 * wins.mean()) < 1e-9
    assert abs(found["win_rate_se"] - 100 * wins.std(ddof=1) / 805**0.5) < 1e-9
    assert abs(found["lc_win_rate"] - naive_length_controlled(alpaca, rows)) < 1e-6
    assert abs(found["lc_win_rate"] - found["win_rate"]) > 1  # so that the fit has something to do
    assert found["avg_length"] == pytest.approx(np.mean([len(r["output_2"]) for r in rows]))
    assert (found["model"], found["baseline"], found["n"]) == ("mine", "base", 805)
    assert found["strict_acc"] is found["mean_score"] is found["temperature"] is None


@needs_alpaca
def test_published_annotations_give_the_published_rates(tmp_path):
    for model in PUBLISHED:
        expected = json_of(ALPACA / "expected.json")[model]
        row = annotate(ALPACA / "annotations" / f"{model}.jsonl.gz", tmp_path / model, ALPACA)
        assert abs(row["win_rate"] - expected["win_rate_published"]) < 1e-6
        assert abs(row["win_rate_se"] - expected["se_published"]) < 1e-6
        assert abs(row["lc_win_rate"] - expected["lc_published"]) < 0.01
        assert abs(row["avg_length"] - expected["avg_length_published"]) < 1
        assert (row["model"], row["baseline"], row["n"]) == (model, "gpt4_1106_preview", 805)


def test_missing_annotations_have_the_difficulties_of_their_position_or_their_own(
    alpaca, tmp_path, capsys
):
    rows = own_annotations(alpaca)
    straight = annotate(write_lines(tmp_path / "all.jsonl", rows), tmp_path / "a", alpaca)
    mixed = random.Random(0).sample(rows, 805)
    mixed = annotate(write_lines(tmp_path / "mixed.jsonl", mixed), tmp_path / "b", alpaca)
    assert abs(mixed["lc_win_rate"] - straight["lc_win_rate"]) < 1e-9
    # the easy half missing: the rate moves as the difficulties of those that are left say
    of_row = [float(r["instruction_difficulty"])
              for r in read_csv(alpaca / "instruction_difficulty.csv")]  # fmt: skip
    left = [r for r, d in zip(rows, of_row, strict=True) if d < np.median(of_row)]
    file = write_lines(tmp_path / "half.jsonl", left)
    for how, flags in (("row position", []), ("the row's own", ["--difficulty=instruction"])):
        capsys.readouterr()
        half = annotate(file, tmp_path / how, alpaca, *flags)
        said = f"{len(left)} of 805 instructions have a preference; difficulties by {how}"
        assert said in capsys.readouterr().out
        expected = naive_length_controlled(alpaca, left, by_position=not flags)
        assert abs(half["lc_win_rate"] - expected) < 1e-6
        assert abs(half["lc_win_rate"] - straight["lc_win_rate"]) > 1


@needs_alpaca
@pytest.mark.slow
def test_57_ranked_models_have_their_published_rates(tmp_path):
    """gpt4_gamed's published rate is not what AlpacaEval's own code gives either."""
    lengths = [len(row["output"]) for row in read_baseline(ALPACA)]
    off = {}
    for model in read_rows(str(ALPACA / "annotations57.jsonl.gz"), "train"):
        place, win = np.array(model["index"]), np.array(model["preference"]) - 1
        if model["model"] == "gpt4_1106_preview":  # the baseline against itself
            assert model["length_controlled"] == 50 and (win == 0.5).all()
        args = SimpleNamespace(alpaca_data=ALPACA, difficulty="position")
        with session(60, miniature=False):
            control = eval_alpaca.official_control(args, place)
        delta = np.array([lengths[i] for i in place]) - np.array(model["length"])
        found = control(win, delta, place)
        assert 100 * win.mean() == pytest.approx(model["win_rate"], abs=1e-6)
        off[model["model"]] = abs(found - model["length_controlled"])
    off = np.array(sorted(off.values()))
    print(f"{(off < 0.01).sum()} of {len(off)} within 0.01, largest {off[-1]:.3f}")
    assert len(off) == 57 and (off < 0.01).sum() >= 36 and off[-1] < 0.15


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(instruction="No such thing."), "row 3: not one of AlpacaEval's instructions"),
        (dict(preference="none"), r"row 3: preference 'none' is not in \[1, 2\]"),
        (dict(preference=0.4), r"row 3: preference 0.4 is not in \[1, 2\]"),
        (dict(output_2=None), "row 3: no text as output_2"),
        (dict(output_2="\ud83d"), "row 3 holds half a character"),
        (dict(output_1=7), "row 3: no text as output_1"),
        (dict(generator_1="another"), "row 3: no output_1, the answer of 'another'"),
        (dict(generator_2=None), "a row has no text as generator_2"),
        (dict(output_1="a"), "a row has no text as generator_1"),
        (dict(instruction=["No text."]), "row 3: not one of AlpacaEval's instructions"),
        (dict(preference=True), r"row 3: preference True is not in \[1, 2\]"),
        (dict(generator_2="yours"), "several values of generator_2: .'mine', 'yours'"),
        (0, "row 3: .* twice"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(change, message, alpaca, tmp_path):
    rows = own_annotations(alpaca)[:5]
    rows[3] = rows[0] if change == 0 else rows[3] | change
    with pytest.raises(SystemExit, match=rf"^eval_alpaca.py: --annotations .*{message}"):
        annotate(write_lines(tmp_path / "x.jsonl", rows), tmp_path / "out", alpaca)


def test_annotations_without_a_preference_are_left_out_and_counted(alpaca, tmp_path, capsys):
    rows = own_annotations(alpaca)
    for i, preference in ((3, None), (500, float("nan")), (700, 0)):
        rows[i]["preference"] = preference
    found = annotate(write_lines(tmp_path / "x.jsonl", rows), tmp_path, alpaca)
    printed = capsys.readouterr().out
    assert "prompts left out, because they have no verdict: 2\n" in printed
    rows[700]["preference"] = 1.5  # as which AlpacaEval reads 0
    rows = [r for i, r in enumerate(rows) if i not in (3, 500)]
    wins = np.array([r["preference"] - 1 for r in rows])
    assert (found["n"], found["unjudged"]) == (803, 2)
    none = [row | {"preference": None} for row in rows[:5]]
    none = annotate(write_lines(tmp_path / "none.jsonl", none), tmp_path / "none", alpaca)
    assert (none["n"], none["unjudged"], none["win_rate"]) == (0, 5, None)
    assert found["win_rate"] == pytest.approx(100 * wins.mean())
    assert found["win_rate_se"] == pytest.approx(100 * wins.std(ddof=1) / 803**0.5)
    expected = naive_length_controlled(alpaca, rows, by_position=True)
    assert abs(found["lc_win_rate"] - expected) < 1e-6
    scores = lines_of(tmp_path / "scores.jsonl")
    assert len(scores) == 805 and scores[3]["win"] is None and scores[700]["win"] == 0.5


def test_annotations_against_another_baseline_have_its_name_and_lengths(alpaca, tmp_path, capsys):
    rows = own_annotations(alpaca)
    for row in rows:
        row |= {"generator_1": "rival", "output_1": "<think>hm</think>" + "z" * 100}
    found = annotate(write_lines(tmp_path / "x.jsonl", rows), tmp_path, alpaca)
    assert (found["model"], found["baseline"]) == ("mine", "rival")
    assert {s["length_baseline"] for s in lines_of(tmp_path / "scores.jsonl")} == {117}
    assert (found["thinking"], found["thinking_baseline"]) == (0, 805)
    said = "of the baseline, answers that think aloud (their thinking is judged, too): 805\n"
    assert said in capsys.readouterr().out
    for row in rows:  # against itself: 50, as officially
        row |= {"generator_1": "mine", "preference": 1.5}
    found = annotate(write_lines(tmp_path / "y.jsonl", rows), tmp_path / "y", alpaca)
    assert found["win_rate"] == found["lc_win_rate"] == 50


def test_the_logistic_fit_is_a_minimum_of_the_penalised_cross_entropy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 3)), rng.random(200)
    weight = rng.random(200)
    y[:100] = x[:100, 0] > x[:100, 1]
    x[:, 2] *= 1e-3  # of no use: the penalty sets its coefficient to 0

    def objective(b):
        p = 1 / (1 + np.exp(-x @ b))
        loss = -(weight * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum()
        return loss + 0.37 * abs(b).sum()

    b = winrate.logistic_regression(x, y, weight, 0.37)
    assert b[2] == 0 and abs(b[:2]).min() > 0.01
    for i in range(3):
        for step in (-1e-3, 1e-3):
            moved = b.copy()
            moved[i] += step
            assert objective(moved) > objective(b)
    gradient = x.T @ (weight * (winrate.sigmoid(x @ b) - y))
    assert abs(gradient[:2] + 0.37 * np.sign(b[:2])).max() < 1e-8
    assert abs(gradient[2]) <= 0.37


def test_the_penalty_is_the_one_whose_fits_predict_best_what_they_have_not_seen():
    rng = np.random.default_rng(3)
    x, weight, fold = rng.normal(size=(60, 3)), rng.random(60), np.arange(60) % 5
    y = (rng.random(60) < 1 / (1 + np.exp(-x[:, 0]))).astype(float)
    means = []
    for penalty in winrate.PENALTIES:
        total = 0.0
        for k in range(5):
            b = winrate.logistic_regression(x[fold != k], y[fold != k], weight[fold != k], penalty)
            rows = [i for i in range(60) if fold[i] == k]
            p = [1 / (1 + math.exp(-(x[i] @ b))) for i in rows]
            entropy = [-math.log(q if y[i] else 1 - q) for i, q in zip(rows, p, strict=True)]
            total += np.average(entropy, weights=weight[rows])
        means.append(total)
    best = int(np.argmin(means))
    assert 0 < best < 9 and winrate.best_penalty(x, y, weight, fold) == winrate.PENALTIES[best]
    assert winrate.PENALTIES[5] == pytest.approx(1 / 2.7825594)


def test_length_control_takes_out_what_length_explains_and_nothing_else():
    rng = np.random.default_rng(0)
    delta = rng.normal(size=4000) * 300
    longer_wins = winrate.sigmoid(-3 * np.tanh(delta / delta.std()))
    by_length = (rng.random(4000) < longer_wins).astype(float)
    longer = delta < 100  # a model that mostly writes more, and wins by that alone
    assert by_length[longer].mean() > 0.65
    place = np.arange(4000)
    rate = winrate.length_controlled(by_length[longer], delta[longer], place[longer])
    assert abs(rate - 50) < 4
    of_its_own = (rng.random(4000) < 0.7).astype(float)
    rate = winrate.length_controlled(of_its_own, delta, place)
    assert abs(rate - 100 * of_its_own.mean()) < 0.6
    assert winrate.length_controlled(of_its_own, 0 * delta, place) is None
    assert winrate.length_controlled(0 * delta, delta, place) is None
    there = winrate.length_controlled(by_length, delta, place)
    back = winrate.length_controlled(1 - by_length, -delta, place)
    assert abs(there + back - 100) < 1e-6


def test_errors_are_over_prompts_not_over_their_samples():
    rows = [{"prompt": p, "x": v} for p, v in ((0, 1), (0, 0), (1, 1), (1, 1), (2, 0), (2, None))]
    mean, error = winrate.mean_and_error(rows, "x", 100)
    of_prompts = np.array([50.0, 100, 0])
    assert (mean, error) == (50, of_prompts.std(ddof=1) / 3**0.5)
    assert winrate.mean_and_error(rows, "y") == (None, None)
    assert winrate.mean_and_error(rows[:1], "x") == (1.0, None)
    assert winrate.mean_and_error([{"prompt": p, "x": 1} for p in range(9)], "x") == (1.0, None)
    assert np.isnan(winrate.standard_error(of_prompts[:1]))


def test_a_reward_that_is_no_number_ends_the_evaluation(tiny_world):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_world / "llama", num_labels=1)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    scorer = object.__new__(RewardModel)
    scorer.model, scorer.positions = model.eval(), 64
    scorer.encoder = ChatEncoder(tiny())
    with pytest.raises(FloatingPointError, match="reward nan of the answer to 'What now'"):
        scorer.score([user_chat("What now")], ["a"])


def test_a_summary_has_every_column_and_the_table_shows_them_together():
    rows = [
        {"prompt": i, "win": w, "score": s, "strict": float(s == 1), "length": 10 + i,
         "length_baseline": 12}
        for i, (w, s) in enumerate([(1.0, 1.0), (0.5, 0.25), (0.0, 0.5), (1.0, 1.0)])
    ]  # fmt: skip
    names = dict(model="m", baseline="b", judge="mini", temperature=0.7, seed=0)
    row = winrate.summary(rows, **names)
    assert list(row) == winrate.RESULT_COLUMNS
    assert (row["n"], row["win_rate"], row["strict_acc"], row["avg_length"]) == (4, 62.5, 50, 11.5)
    assert row["mean_score"] == 0.6875 and row["loose_acc"] is None
    text = winrate.table([row])
    assert "judge mini, model m, baseline b" in text
    error = f"{row['win_rate_se']:.1f}"
    line = rf"0.7 +4 +62.5 \+- {error} +- +0.688 \+- 0.1\d+ +50.0 \+- 28.9 +12$"
    assert re.search(line, text, re.MULTILINE)
    assert text.endswith("no length-controlled rate: 4 prompts are fewer than 100 (T 0.7)")
    assert all(len(line) <= 100 for line in text.splitlines())


def score_rows(win, length, n=100, **more):
    return [
        {"prompt": i, "win": win(i), "length": length(i), "length_baseline": 50} | more
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "rows, why",
    [
        (score_rows(lambda i: i % 2, lambda i: i, n=99), "99 prompts are fewer than 100"),
        (score_rows(lambda i: 0.5, lambda i: i), "all preferences, or all differences in length,"),
        (score_rows(lambda i: 0, lambda i: i), "all preferences, or all differences in length,"),
        (
            score_rows(lambda i: i % 2, lambda i: 9),
            "all preferences, or all differences in length,",
        ),
    ],
)
def test_no_length_controlled_rate_where_the_answers_cannot_carry_one(rows, why):
    row = winrate.summary(rows, temperature=0.7, judge="rm", model="m")
    assert row["win_rate"] is not None and row["lc_win_rate"] is None
    assert f"no length-controlled rate: {why}" in winrate.table([row])
    assert winrate.summary(rows * 2)["lc_win_rate"] is None  # more samples are not more prompts
    enough = score_rows(lambda i: i % 2, lambda i: i)
    assert winrate.summary(enough)["lc_win_rate"] is not None


def test_rates_that_are_far_apart_are_warned_of_as_alpaca_eval_does():
    def warned(win, lc):
        row = dict.fromkeys(winrate.RESULT_COLUMNS) | {"n": 805, "model": "m", "judge": "rm"}
        text = winrate.table([row | {"win_rate": win, "lc_win_rate": lc, "temperature": 1.0}])
        return f"far from the win rate: {lc:.1f} and {win:.1f} (T 1)" in text

    # by more than 10 points and by more than a quarter of the room
    assert warned(54.4, 36.5) and warned(20, 9) and warned(20, 41)
    assert not (warned(20, 11) or warned(20, 39) or warned(50, 38) or warned(50, 62))
    assert warned(50, 37) and warned(50, 63) and not warned(9.6, 18.1)


def test_one_prompt_has_no_error_anywhere():
    row = winrate.summary(score_rows(lambda i: 1, lambda i: 5, n=1, score=0.5, strict=1.0))
    assert [row[k] for k in row if k.endswith("_se")] == [None] * 4 and row["win_rate"] == 100
    verdicts = [world.Verdict(1, 1.0)]
    lines = report.final_lines(report.compare(0.7, verdicts, verdicts))
    assert "nan" not in lines and re.search(r"100.0 +100.0 +\+0.0 \+- - ", lines)


# ---------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """A tiny model, another as a baseline, and twelve of the miniature's prompts."""
    folder = tmp_path_factory.mktemp("exam")
    make_model(folder / "model", seed=1)
    make_model(folder / "other", seed=2)
    tasks = world.draw_tasks(random.Random(0), 12, distinct=True)
    write_lines(folder / "prompts.jsonl", [t._asdict() for t in tasks])
    return folder


def examine(folder, out, *more, model="model", prompts="prompts.jsonl"):
    eval_alpaca.main([
        f"--model={folder / model}", f"--prompts={folder / prompts}", f"--out={out}",
        "--max_new_tokens=12", "--batch_size=5", "--temperatures", "0", "0.7", *more,
    ])  # fmt: skip
    return json_of(out / "results.json"), lines_of(out / "scores.jsonl")


def texts_of(folder, tasks, temperature, samples=1):
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder))
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chats = [user_chat(t.prompt) for t in tasks]
    settings = dict(temperature=temperature, seed=0, max_new_tokens=12, samples=samples)
    return [a.text for a in generate(lm, encoder, chats, **settings)]


def test_scores_and_rates_are_those_of_each_answer_judged_by_itself(exam, tmp_path, capsys):
    results, scores = examine(exam, tmp_path, f"--baseline={exam / 'other'}", "--samples=2")
    tasks = world.read_tasks(exam / "prompts.jsonl")
    assert [r["temperature"] for r in results] == [0, 0.7] and len(scores) == 48
    for row in results:
        t = row["temperature"]
        own, other = (texts_of(exam / m, tasks, t, 2) for m in ("model", "other"))
        verdicts = [world.judge(tasks[i // 2], text) for i, text in enumerate(own)]
        gold = np.array([v.gold for v in verdicts])
        rival = np.array([world.judge(tasks[i // 2], x).gold for i, x in enumerate(other)])
        win = (gold > rival) + (gold == rival) / 2
        here = [s for s in scores if s["temperature"] == t]
        assert [s["score"] for s in here] == gold.tolist() and [s["win"] for s in here] == list(win)
        assert [(s["length"], s["length_baseline"]) for s in here] == [
            (len(a), len(b)) for a, b in zip(own, other, strict=True)
        ]
        assert row["win_rate"] == pytest.approx(100 * win.mean())
        by_prompt = win.reshape(12, 2).mean(1)
        assert row["win_rate_se"] == pytest.approx(100 * by_prompt.std(ddof=1) / 12**0.5)
        assert row["mean_score"] == pytest.approx(gold.mean()) and row["n"] == 12
        assert row["strict_acc"] == 100 * np.mean([v.strict for v in verdicts])
        outputs = json_of(tmp_path / f"model-T{t:g}.json")
        assert [o["output"] for o in outputs] == own[::2]
        assert set(outputs[0]) == {"instruction", "output", "generator", "dataset"}
    printed = capsys.readouterr().out
    assert "judge mini" in printed and printed.count("+-") == 5  # the legend's and 2 of each row


def test_answers_that_were_cut_are_counted_everywhere(exam, tmp_path, capsys, monkeypatch):
    def write(lm, encoder, chats, **settings):
        return [Answer(f"a{i}", 3, i % 3 > 0) for i in range(len(chats) * settings["samples"])]

    monkeypatch.setattr(eval_alpaca, "generate", write)
    results, scores = examine(exam, tmp_path, f"--baseline={exam / 'other'}", "--batch_size=12")
    assert [s["cut_answer"] for s in scores] == [True, False, False] * 8
    assert (
        [r["cut_answer"] for r in results] == [r["cut_answer_baseline"] for r in results] == [4] * 2
    )
    printed = capsys.readouterr().out
    assert "\nanswers cut at --max_new_tokens: 4 (T 0, T 0.7)\n" in printed
    assert "\nof the baseline, answers cut at --max_new_tokens: 4 (T 0, T 0.7)\n" in printed
    file = f"--baseline={tmp_path / 'baseline-T0.json'}"  # which does not say what was cut
    results, _ = examine(exam, tmp_path / "b", file, "--batch_size=12")
    assert [r["cut_answer_baseline"] for r in results] == [None] * 2
    assert [r["cut_text"] for r in results] == [None] * 2  # no model reads the texts


THOUGHTS = (  # answers, and what is left of them
    ("<think>\nA thing.\n</think>\n\nA kite.", "A kite."),
    ("A kite.", "A kite."),
    ("<think>\nA thing, but", ""),
)


@pytest.mark.parametrize("strip", [False, True])
def test_thinking_is_counted_and_judged_or_left_out(strip, exam, tmp_path, capsys, monkeypatch):
    judged = []
    monkeypatch.setattr(eval_alpaca, "generate", lambda lm, encoder, chats, **settings: [
        Answer(THOUGHTS[i % 3][0], 3, i % 3 < 2) for i in range(len(chats))])  # fmt: skip
    monkeypatch.setattr(eval_alpaca, "judge_mini", lambda prompts, texts: judged.append(texts) or [
        {"score": len(text)} for text in texts])  # fmt: skip
    rows = [{"instruction": t.prompt, "output": THOUGHTS[0][0], "generator": "g"}
            for t in world.read_tasks(exam / "prompts.jsonl")]  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps(rows))
    more = ["--batch_size=12", "--temperatures", "0", f"--baseline={tmp_path / 'b.json'}"]
    (row,), scores = examine(exam, tmp_path, *more, *["--strip_thinking"] * strip)
    texts = [of[strip] for of in THOUGHTS] * 4
    assert judged == [texts, [THOUGHTS[0][strip]] * 12]
    assert [s["length"] for s in scores] == list(map(len, texts))
    assert {s["length_baseline"] for s in scores} == {len(THOUGHTS[0][strip])}
    assert [s["thinking"] for s in scores] == [len(a) - len(b) for a, b in THOUGHTS] * 4
    assert (row["thinking"], row["thinking_baseline"], row["strip_thinking"]) == (8, 12, strip)
    assert (row["empty"], row["empty_baseline"]) == (4 * strip, 0)
    assert [o["output"] for o in json_of(tmp_path / "model-T0.json")] == texts
    said = "left out" if strip else "judged, too: see --strip_thinking"
    printed = capsys.readouterr().out
    assert f"\nanswers that think aloud (their thinking is {said}): 8 (T 0)\n" in printed
    assert ("\nempty answers: 4 (T 0)\n" in printed) == strip


def test_thinking_that_the_prompt_opens_ends_in_the_answer_or_is_all_of_it():
    opened, split = "<think>\n", eval_alpaca.split_answer
    assert split("A thing.\n</think>\n\nA kite.", True, opened)[1] == "A kite."
    assert split("A thing, but", True, opened) == ("A thing, but", "")
    assert split("A thing, but", False, opened) == ("A thing, but", "A thing, but")
    assert split("A kite.", True) == split("A kite.", True, "<think>\n\n</think>\n\n")
    assert split("A kite.", True) == ("", "A kite.")


DATED = CHAT.replace("<s>", "<s>{{ strftime_now('%d %b %Y') }}\n", 1)


def test_an_evaluation_keeps_the_date_of_its_first_day(exam, tmp_path, capsys, monkeypatch):
    def on(day, out, *temperatures):
        today = type("date", (date,), {"today": classmethod(lambda cls: cls(2026, 11, day))})
        monkeypatch.setattr(eval_alpaca, "date", today)
        return examine(tmp_path, out, at, other, "--temperatures", *temperatures)

    for name in ("model", "other"):
        shutil.copytree(exam / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(DATED)
    at, other = f"--prompts={exam / 'prompts.jsonl'}", f"--baseline={tmp_path / 'other'}"
    straight = on(24, tmp_path / "a", "0", "0.7")
    assert "the chat template writes the date, here always 2026-11-24\n" in capsys.readouterr().out
    on(24, tmp_path / "b", "0")
    assert on(25, tmp_path / "b", "0", "0.7") == straight
    assert json_of(tmp_path / "b" / "baseline-T0.7.meta.json")["day"] == "2026-11-24"
    assert on(25, tmp_path / "c", "0", "0.7") != straight
    (tmp_path / "model" / "chat_template.jinja").write_text(DATED.replace("%d %b %Y", "%d %U"))
    with pytest.raises(SystemExit, match="it writes the date in a form that is not known here"):
        on(25, tmp_path / "d", "0")


def test_scores_keep_the_date_of_the_reward_model_s_first_day(exam, tmp_path, capsys, monkeypatch):
    judge = make_reward_model(tmp_path / "rm", exam / "model")
    Path(judge, "chat_template.jinja").write_text(DATED)
    (tmp_path / "o.json").write_text(json.dumps(outputs()(exam)))
    argv = [f"--outputs={tmp_path / 'o.json'}", f"--prompts={exam / 'prompts.jsonl'}"]
    argv += [f"--reward_model={judge}", "--temperatures=0"]
    for day in (24, 25):
        today = type(
            "date", (date,), {"today": classmethod(lambda cls, day=day: cls(2026, 11, day))}
        )
        monkeypatch.setattr(eval_alpaca, "date", today)
        eval_alpaca.main(argv)
        said = "--reward_model: the chat template writes the date, here always 2026-11-24\n"
        assert said in capsys.readouterr().out


SAID = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
NEXT = [*SAID, {"role": "user", "content": "Go."}]
SYSTEM = {"role": "system", "content": "Rhyme."}


@pytest.mark.parametrize(
    "row, chat",
    [
        ({"instruction": " Go. "}, user_chat(" Go. ")),
        ({"prompt": "Go."}, user_chat("Go.")),
        ({"instruction": "Sum up.", "input": "A text."}, user_chat("Sum up.\n\nA text.")),
        ({"instruction": "Go.", "input": ""}, user_chat("Go.")),
        ({"instruction": "Go.", "system": "Rhyme."}, [SYSTEM, *user_chat("Go.")]),
        ({"prompt": "Go.", "history": [["Hi.", "Hello."]]}, NEXT),
        ({"messages": NEXT}, NEXT),
        ({"prompt": [SYSTEM, *NEXT]}, [SYSTEM, *NEXT]),
        ({"conversations": [{"from": "human", "value": "Go."}]}, user_chat("Go.")),
        ({"prompt": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Go.\n\nAssistant:"}, NEXT),
    ],
)
def test_a_row_of_prompts_is_read_whole(row, chat, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", [row | {"id": 7, "answer": "x", "tags": []}])
    (prompt,), unread = eval_alpaca.read_prompts(SimpleNamespace(prompts=file, judge="rm"))
    assert prompt.messages == chat and unread == ["answer"]
    if len(chat) == 1:
        assert prompt.instruction == chat[0]["content"]
    else:
        assert prompt.instruction.endswith("\n\nuser: Go.")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"instruction": "Go.", "tools": [{"name": "f"}]}, "has tools"),
        ({"prompt": "Go.", "images": ["a.png"]}, "has images"),
        ({"instruction": "Go.", "input": {"a": 1}}, "instruction or input is not text"),
        ({"instruction": ["Go."]}, "instruction or input is not text"),
        ({"prompt": "Go.", "input": "A text."}, "input without an instruction"),
        ({"messages": SAID}, "prompt ends with the assistant"),
        ({"prompt": "Go.", "history": "Hi."}, "history is no list of"),
        ({"question": "Go."}, "no instruction and no prompt, text or chat, in question"),
        ({"prompt": "Go \ud83d."}, "half a character"),
        ({"instruction": "Go.", "system": "\ud83d"}, "half a character"),
        ("Go.", "not an object"),
    ],
)
def test_a_row_of_prompts_that_cannot_be_used_is_refused(row, reason, exam, tmp_path):
    file = write_lines(tmp_path / "p.jsonl", [{"instruction": "Fine."}, row])
    with pytest.raises(SystemExit, match=f"^eval_alpaca.py: --prompts {file}: row 1:? .*{reason}"):
        examine(exam, tmp_path / "out", f"--prompts={file}", "--judge=ifeval")


def test_a_chat_is_answered_as_a_chat(exam, tmp_path, capsys):
    file = write_lines(tmp_path / "p.jsonl", [{"messages": NEXT, "reference": "x"}])
    out, reward = tmp_path / "out", SimpleNamespace()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(eval_alpaca, "judge_mini", lambda prompts, texts: [{}] * len(texts))
        patch.setattr(eval_alpaca, "task_of", lambda *_: reward)
        (row, _), _ = examine(exam, out, f"--prompts={file}")
    assert f"--prompts {file}: columns not read: reference\n" in capsys.readouterr().out
    lm = AutoModelForCausalLM.from_pretrained(exam / "model", dtype=torch.float32)
    answers = generate(lm, ChatEncoder(tiny()), [NEXT], temperature=0, seed=0, max_new_tokens=12)
    (found,) = json_of(out / "model-T0.json")
    assert found["output"] == answers[0].text and row["n"] == 1
    assert found["instruction"] == "user: Hi.\n\nassistant: Hello.\n\nuser: Go."


def test_generate_refuses_what_it_cannot_read_and_says_what_was_cut(exam, capsys):
    asked = [f"--model={exam / 'model'}", "--temperature=0", "--max_new_tokens=1"]
    with pytest.raises(SystemExit, match="^generate.py: .* is no valid UTF-8: it holds half"):
        generate_py.main([*asked, "Hi.", "\ud83d"])
    generate_py.main([*asked, "--seed=2", "Hi.<|end|>"])
    printed = capsys.readouterr().out
    assert printed.startswith("not used with --temperature 0: --seed\n")
    said = "1 of 1 prompts spell out special tokens, which the chat template makes real ones"
    assert f"\n--model: {said}\n" in printed
    assert printed.endswith(" [cut at --max_new_tokens 1]\n")


def test_a_run_is_examined_in_its_own_world_unless_a_seed_is_given(tmp_path):
    def seed(*more, **config):
        config = {"seed": 7, "data_fingerprint": ""} | config
        (tmp_path / "config.json").write_text(json.dumps(config))
        return eval_alpaca.parse_args([f"--model={tmp_path / 'hf'}", *more]).seed

    own = {"model": "out/mini/seed7/model", "dataset": "pairs.jsonl"}
    assert seed(**own) == seed(dataset="out/mini/seed7/train.jsonl") == 7
    assert seed("--seed=3", **own) == 3
    assert seed("--prompts=mine.jsonl", **own) == 0
    assert seed(model="out/mini/seed0/model", dataset="pairs.jsonl") == 0
    assert eval_alpaca.parse_args(["--model=some/model"]).seed == 0
    for damaged in (
        '{"seed": 7',
        '{"data_fingerprint": ""}',
        '{"data_fingerprint": "", "model": 5}',
    ):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(
            InputError, match=r"config.json is damaged or not that of a run \(pass --seed"
        ):
            eval_alpaca.parse_args([f"--model={tmp_path / 'hf'}"])
    assert eval_alpaca.parse_args([f"--model={tmp_path / 'hf'}", "--seed=3"]).seed == 3


def test_the_sidecar_says_how_the_answers_were_made(exam, tmp_path):
    examine(exam, tmp_path)
    meta = json_of(tmp_path / "model-T0.7.meta.json")
    assert (meta["temperature"], meta["max_new_tokens"], meta["seed"]) == (0.7, 12, 0)
    assert meta["chat_template"] == tiny().chat_template and "torch" in meta["versions"]
    other = eval_alpaca.fingerprint(str(exam / "other"), None)
    assert meta["fingerprint"] == eval_alpaca.fingerprint(str(exam / "model"), None) != other


def test_answers_that_are_not_those_of_the_prompts_are_refused(exam, tmp_path):
    """As of two programs that wrote into one folder, or of an edited file."""
    examine(exam, tmp_path)
    file = tmp_path / "model-T0.jsonl"
    rows = lines_of(file)
    for i, spoiled in enumerate(([rows[1], rows[0], *rows[2:]], [*rows, {}], [None, *rows])):
        write_lines(file, spoiled)
        line = (1, 13, 1)[i]
        with pytest.raises(
            SystemExit, match=f"T0.jsonl: line {line} is not the answer that belongs"
        ):
            examine(exam, tmp_path)
    write_lines(file, rows)
    with locked(tmp_path), pytest.raises(SystemExit, match="is in use by another process"):
        examine(exam, tmp_path)
    examine(exam, tmp_path)


LAST = (  # shows the last turn of the user, and the answer to it
    "{% set shown = 2 if messages[-1].role == 'assistant' else 1 %}{% for m in messages[-shown:] %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_what_an_evaluation_does_not_use_of_a_model_is_said(exam, tmp_path, capsys):
    model = shutil.copytree(exam / "model", tmp_path / "model")
    settings = {"repetition_penalty": 1.05, "min_p": 0.0, "stop_strings": ["x"]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "last.jinja").write_text(LAST)
    chat = [{"role": r, "content": f"{r} says"} for r in ("user", "assistant", "user")]
    write_lines(tmp_path / "chats.jsonl", [{"prompt": chat}, {"prompt": chat[-1:]}])
    judge = make_reward_model(tmp_path / "judge", exam / "model")
    flags = [f"--model={model}", f"--prompts={tmp_path / 'chats.jsonl'}", "--judge=rm"]
    flags += [f"--reward_model={judge}"]
    flags += [f"--chat_template={tmp_path / 'last.jinja'}", "--max_new_tokens=4"]
    eval_alpaca.main([*flags, f"--out={tmp_path / 'out'}", "--temperatures", "0"])
    said = capsys.readouterr().out
    assert "--model: the chat template leaves out text of 1 prompts\n" in said
    unused = "repetition_penalty 1.05, stop_strings ['x']"
    assert f"--model: settings of generation_config.json not used: {unused}\n" in said


def test_an_interrupted_evaluation_goes_on_at_the_first_missing_prompt(exam, tmp_path, monkeypatch):
    two = "--samples=2"  # a block is two prompts
    straight = examine(exam, tmp_path / "a", two)
    append, calls = eval_alpaca.append, []

    def die(path, rows):
        append(path, rows)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(eval_alpaca, "append", die)
    with pytest.raises(KeyboardInterrupt):
        examine(exam, tmp_path / "b", two)
    dist.destroy_process_group()
    partial = tmp_path / "b" / "model-T0.jsonl"
    assert len(lines_of(partial)) == 8
    partial.write_text(partial.read_text()[:-9])  # a kill tears the last line
    monkeypatch.setattr(eval_alpaca, "append", append)
    asked = []

    def count(lm, encoder, chats, **settings):
        asked.append(len(chats))
        return generate(lm, encoder, chats, **settings)

    monkeypatch.setattr(eval_alpaca, "generate", count)
    assert examine(exam, tmp_path / "b", two) == straight
    assert asked == [2, 2, 2, 2, 1] + [2] * 6  # 3 of 12 prompts had both answers at T = 0
    for name in ("model-T0.jsonl", "model-T0.7.jsonl", "model-T0.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert examine(exam, tmp_path / "b", two) == straight and len(asked) == 11


def test_answers_of_other_settings_are_not_taken_for_these(exam, tmp_path):
    examine(exam, tmp_path)
    for more, name in (
        ("--seed=1", "seed was 0, is now 1; pass another --out"),
        ("--max_new_tokens=13", "max_new_tokens was 12, is now 13; "),
        (f"--chat_template={ROOT / 'plain_chat.jinja'}", "chat_template is another; "),
    ):
        with pytest.raises(SystemExit, match=f"T0.jsonl was made with other settings: {name}"):
            examine(exam, tmp_path, more)
    with pytest.raises(SystemExit, match=r"fingerprint was \S+/model \(.*, is now \S+/other \("):
        examine(exam, tmp_path, model="other")


def test_the_default_folder_of_answers_differs_by_model_and_baseline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/hf", "models/b", "models/c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "answers.json.gz").touch()

    def out(model, *more):
        return eval_alpaca.parse_args([f"--model={model}", "--prompts=my.jsonl", *more]).out

    assert out("runs/a/hf") == "runs/a/eval-my-mini"  # where tools.plots looks for it
    assert out("models/b") == "models/eval-b-my-mini" and out("models/c/") != out("models/b")
    assert out("one/m") == "out/one--m/eval-my-mini" != out("two/m")
    assert out("models/b", "--baseline=runs/a/hf") == "models/eval-b-my-mini-vs-a"
    by_another = "--reward_model=org/r"
    assert out("models/b", "--judge=rm", by_another) == "models/eval-b-my-rm-by-org--r"
    assert out("models/b", by_another) == "models/eval-b-my-mini-by-org--r"
    assert out("models/b", "--baseline=answers.json.gz") == "models/eval-b-my-mini-vs-answers"
    monkeypatch.chdir(tmp_path / "models" / "b")
    assert out(".") == "eval-b-my-mini"


REFUSED = "results.json was made with other settings: "


def test_results_of_other_answers_or_of_another_judge_are_not_written_over(
    exam, tmp_path, monkeypatch, capsys
):
    """One default folder, or one --out; what only adds to the results is welcome."""
    monkeypatch.chdir(tmp_path)
    rows = outputs()(exam)
    others = [row | {"output": "b"} for row in rows]
    for name, content in (("o.json", rows), ("p.json", rows), ("x/o.json", others),
                          ("x/p.json", others)):  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps(content))
    make_reward_model(tmp_path / "a" / "rm", exam / "model")
    shutil.copytree("a", "moved")
    make_reward_model(tmp_path / "b" / "rm", exam / "other")
    shutil.copy(exam / "prompts.jsonl", "prompts.jsonl")
    tasks = lines_of("prompts.jsonl")
    tasks[3]["note"] = "new"
    Path("x").joinpath("prompts.jsonl").write_text("\n".join(map(json.dumps, tasks)))

    def judged(*flags, prompts="prompts.jsonl", file="o.json", at=("0",)):
        files = [file, "p.json"][: len(at)]
        eval_alpaca.main(
            ["--outputs", *files, f"--prompts={prompts}", "--temperatures", *at, *flags]
        )
        return capsys.readouterr().out.splitlines()[-1].removeprefix("wrote ")

    def refused(message, *flags, **more):
        with pytest.raises(SystemExit, match=f"{re.escape(message)}.* pass another --out$"):
            judged(*flags, **more)

    by = "--judge=rm", "--reward_model=a/rm"
    out = judged(*by)
    whole = Path(out, "results.json").read_bytes()
    refused(f"{out}/{REFUSED}content of --reward_model was ", "--judge=rm", "--reward_model=b/rm")
    refused(f"{REFUSED}prompts was ", *by, prompts="x/prompts.jsonl")
    refused(f"{REFUSED}answers at T 0 was ", *by, f"--out={out}", file="x/o.json")
    refused("results at T 0, which would be lost: add 0 to --temperatures, or", *by, at=("0.5",))
    refused(f"{REFUSED}strip_thinking was False, is now True", *by, "--strip_thinking")
    refused(f"{REFUSED}judge was rm, is now mini", by[1], f"--out={out}")
    assert Path(out, "results.json").read_bytes() == whole
    assert judged("--judge=rm", "--reward_model=moved/rm") == out  # the same model
    judged(*by, at=("0", "0.7"))
    assert [row["temperature"] for row in json_of(f"{out}/results.json")] == [0, 0.7]
    refused("results at T 0.7, which would be lost: add 0.7 to --temperatures, or", *by)
    versus = judged("--baseline=p.json")
    assert judged("--baseline=p.json") == versus != out
    refused(f"{versus}/{REFUSED}content of --baseline was ", "--baseline=x/p.json")
    refused(f"{REFUSED}content of --baseline was ", f"--out={versus}")
    refused(
        f"{REFUSED}content of --baseline was ",
        f"--out={versus}",
        f"--baseline={exam}/model",
        "--max_new_tokens=9",
    )
    more = "--out=model", "--max_new_tokens=9"
    judged(*more, f"--baseline={exam}/model")
    refused(f"{REFUSED}content of --baseline was ", *more)
    meta = Path(out, "results.meta.json")
    for damage in ("{", "[1]"):
        meta.write_text(damage)
        with pytest.raises(SystemExit, match="meta.json: how it was made cannot be read .pass ano"):
            judged(*by, at=("0", "0.7"))


def test_other_annotations_or_difficulties_are_not_written_over_in_one_folder(alpaca, tmp_path):
    rows = own_annotations(alpaca)[:5]
    file = write_lines(tmp_path / "x.jsonl", rows)
    first = annotate(file, tmp_path / "out", alpaca)
    assert annotate(file, tmp_path / "out", alpaca) == first
    with pytest.raises(SystemExit, match=f"{REFUSED}difficulty was position, is now instruction; "):
        annotate(file, tmp_path / "out", alpaca, "--difficulty=instruction")
    other = shutil.copytree(alpaca, tmp_path / "alpaca")
    with (other / "df_gamed.csv").open("a") as gamed:
        gamed.write("0.5,0,0,0,False,concise\n")
    with pytest.raises(SystemExit, match=f"{REFUSED}content of df_gamed.csv was .*; pass another"):
        annotate(file, tmp_path / "out", other)
    write_lines(tmp_path / "x.jsonl", rows[1:])
    with pytest.raises(SystemExit, match=f"{REFUSED}content of --annotations was .*; pass another"):
        annotate(file, tmp_path / "out", alpaca)


NO_SYSTEM = (  # and no thinking, as Qwen3's, and nothing beyond a line
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<|{{ m.role }}|>{{ (m.content | string).split('</think>')[-1].split('\n')[0] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_what_the_reward_model_s_template_changes_is_said(exam, tmp_path, capsys):
    """Of the prompts before anything is scored, and of every answer."""
    judge = make_reward_model(tmp_path / "rm", exam / "model")
    Path(judge, "chat_template.jinja").write_text(NO_SYSTEM)
    system = [{"role": "system", "content": "Be brief."}, *user_chat("Hi.")]
    prompts = write_lines(tmp_path / "p.jsonl", [
        {"prompt": system}, {"prompt": "Say <|end|>."}, {"prompt": "One\ntwo"}, {"prompt": "Go."},
    ])  # fmt: skip
    (system, *rest), _ = eval_alpaca.read_prompts(SimpleNamespace(prompts=prompts, judge="rm"))
    texts = "a", "b<|user|>", "<think>\nHm.\n</think>\n\nc", "<think>Hm.</think>c"
    rows = [{"instruction": p.instruction, "output": text, "generator": "g", "source": "x"}
            for p, text in zip((system, *rest), texts, strict=True)]  # fmt: skip
    (tmp_path / "o.json").write_text(json.dumps(rows))
    eval_alpaca.main([
        f"--outputs={tmp_path / 'o.json'}", "--temperatures=0", f"--prompts={prompts}",
        "--judge=rm", f"--reward_model={judge}", f"--baseline={tmp_path / 'o.json'}",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    for said in (
        "1 of 4 prompts spell out special tokens, which the chat template makes real ones",
        "1 system turns stand before the user's text",
        "the chat template leaves out text of 2 prompts",
    ):
        assert f"\n--reward_model: {said}\n" in printed
    assert f"--outputs {tmp_path / 'o.json'}: columns not read: source\n" in printed
    assert f"\n{tmp_path / 'o.json'}: columns not read: source\n" in printed
    (scores,) = Path(tmp_path).glob("eval-o-p-rm-*/scores.jsonl")
    scores = lines_of(scores)
    assert [s["spelled"] for s in scores] == [False, True, False, False]
    assert [s["left_out"] for s in scores] == [True, False, True, True]
    assert [s["left_out_baseline"] for s in scores] == [True, False, True, True]
    lost = "texts of which the chat template of what scores them leaves out a part: 3 (T 0)\n"
    spelled = "answers with special tokens as text, which what scores them did not read: 1 (T 0)\n"
    for said in (lost, spelled):
        assert f"\n{said}" in printed and f"\nof the baseline, {said}" in printed


@pytest.mark.parametrize(
    "family, changes",
    [
        ("bert", {}), ("roberta", {}), ("distilbert", dict(dim=32, n_heads=4, hidden_dim=48)),
        ("gemma3_text", dict(head_dim=8, use_bidirectional_attention=True)),
        ("m2m_100", dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32)),
    ],
)  # fmt: skip
def test_an_encoder_is_not_taken_for_a_model_that_writes(family, changes, exam, tmp_path):
    config = AutoConfig.for_model(family, **SIZE | changes)
    auto = {"gemma3_text": AutoModelForCausalLM, "m2m_100": AutoModel}
    auto.get(family, AutoModelForMaskedLM).from_config(config).save_pretrained(tmp_path / "m")
    tiny().save_pretrained(tmp_path / "m")
    said = (
        f"{tmp_path / 'm'}: a model of type '{family}' writes no text, .* gemma2, .*, smollm3 and"
    )
    with pytest.raises(SystemExit, match=f"^generate.py: --model {said}"):
        generate_py.main([f"--model={tmp_path / 'm'}", "Hi."])
    with pytest.raises(SystemExit, match=f"^eval_alpaca.py: --model {said}"):
        examine(exam, tmp_path / "out", f"--model={tmp_path / 'm'}")
    with pytest.raises(SystemExit, match=f"^eval_alpaca.py: --baseline {said}"):
        examine(exam, tmp_path / "out", f"--baseline={tmp_path / 'm'}")


def test_flags_that_are_not_used_are_named(exam, tmp_path, capsys):
    examine(exam, tmp_path, "--temperatures", "0", "--top_k=3", "--seed=1", "--alpaca_data=x",
            f"--baseline={exam / 'model'}")  # fmt: skip
    printed = capsys.readouterr().out
    assert "not used with --temperatures 0: --top_k, --seed\n" in printed
    assert "not used with the same --model: --baseline\n" in printed
    assert "prompts.jsonl: --alpaca_data\n" in printed
    with pytest.raises(SystemExit, match="--samples 2: at temperature 0 all answers to a prompt"):
        examine(exam, tmp_path / "b", "--temperatures", "0", "--samples=2")
    examine(exam, tmp_path / "c", "--top_k=3", "--seed=1")
    assert "not used" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^reward_model.py: --keep needs --save_every: without it"):
        reward_model.main(["--keep=3"])


def test_a_moved_model_is_the_same_and_other_weights_are_not(exam, tmp_path):
    shutil.copytree(exam / "model", tmp_path / "a")
    shutil.copytree(exam / "model", tmp_path / "b")
    at, out = f"--prompts={exam / 'prompts.jsonl'}", tmp_path / "out"
    first = examine(tmp_path, out, at, model="a")
    assert [row | {"model": 0} for row in examine(tmp_path, out, at, model="b")[0]] == [
        row | {"model": 0} for row in first[0]
    ]
    shutil.copy(exam / "other" / "model.safetensors", tmp_path / "a")
    with pytest.raises(SystemExit, match=r"settings: fingerprint was \S+/a \(\w+\), is now \S+/a"):
        examine(tmp_path, out, at, model="a")


def test_a_file_of_outputs_is_a_baseline_as_its_model_is(exam, tmp_path):
    more = "--temperatures", "0"
    by_model, scores = examine(exam, tmp_path / "a", f"--baseline={exam / 'other'}", *more)
    file = tmp_path / "a" / "baseline-T0.json"
    by_file, again = examine(exam, tmp_path / "b", f"--baseline={file}", *more)
    unknown = dict(cut_answer_baseline=None, cut_prompt_baseline=None)  # to a file
    assert [row | unknown for row in scores] == again
    assert by_file[0] | {"baseline": 0} == by_model[0] | {"baseline": 0} | unknown


def outputs(n=12, **changes):
    def make(folder):
        tasks = world.read_tasks(folder / "prompts.jsonl")[:n]
        rows = [{"instruction": t.prompt, "output": "a", "generator": "g"} for t in tasks]
        for key, value in changes.items():
            if value is None:
                del rows[3][key]
            else:
                rows[3][key] = rows[2][key] if value == "twice" else value
        return rows

    return make


def test_answers_made_elsewhere_are_judged_as_those_of_their_model(exam, tmp_path, capsys):
    """What their model's own evaluation has, but for what a file does not tell."""
    baseline = f"--baseline={exam / 'other'}"
    by_model, scores = examine(exam, tmp_path / "a", baseline)
    files = [str(tmp_path / f"a/model-T{t}.json") for t in ("0", "0.7")]
    eval_alpaca.main([
        "--outputs", *files, "--temperatures", "0", "0.7", baseline, "--max_new_tokens=12",
        f"--prompts={exam / 'prompts.jsonl'}", f"--out={tmp_path / 'b'}", "--batch_size=5",
    ])  # fmt: skip
    unknown = dict(cut_answer=None, cut_prompt=None)
    assert lines_of(tmp_path / "b" / "scores.jsonl") == [row | unknown for row in scores]
    by_file = json_of(tmp_path / "b" / "results.json")
    assert [row.pop("outputs") for row in by_file] == files
    assert by_file == [row | unknown for row in by_model]
    printed = capsys.readouterr().out
    assert "--outputs: not known of these answers, and so null: cut_answer, cut_prompt" in printed
    assert "not used" not in printed  # the baseline is a model, which writes by these flags
    assert not [*(tmp_path / "b").glob("model-T*")]  # it wrote no answers


def test_outputs_need_no_model_and_name_the_flags_of_writing(exam, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_alpaca, "generate", None)
    file = tmp_path / "vllm.json"
    rows = outputs(output="")(exam)
    file.write_text(json.dumps([row | {"datasplit": "eval"} for row in rows]))
    eval_alpaca.main([
        f"--outputs={file}", "--temperatures=0.7", f"--prompts={exam / 'prompts.jsonl'}",
        "--top_k=5", "--seed=3", "--dtype=float32", "--strip_thinking",
    ])  # fmt: skip
    assert "not used with --outputs: --top_k, --seed, --dtype\n" in capsys.readouterr().out
    (row,) = json_of(tmp_path / "eval-vllm-prompts-mini" / "results.json")
    assert (row["model"], row["outputs"], row["temperature"]) == ("g", str(file), 0.7)
    assert (row["empty"], row["cut_answer"], row["win_rate"]) == (1, None, None)


def test_outputs_are_compared_by_a_command_for_alpaca_evals_judge(alpaca, tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([row | {"generator": "m"} for row in read_baseline(alpaca)]))
    eval_alpaca.main([
        f"--outputs={file}", "--temperatures=0.7", "--prompts=alpaca_eval", "--judge=gpt4",
        f"--alpaca_data={alpaca}", f"--out={tmp_path / 'out'}",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert f"--model_outputs {file} --output_path {tmp_path}/out/gpt4-T0.7\n" in printed


@pytest.mark.parametrize("more, message", [
    (["--model=m"], "--outputs does not use --model"),
    (["--samples=2"], "--outputs does not use --samples"),
    (["--score_discriminators=d.pt"], "--outputs does not use --score_discriminators"),
    (["--judge=annotations", "--annotations=a.json"], "--judge annotations does not use --outputs"),
    (["--temperatures", "0", "0.7"], "--outputs has 1 files and --temperatures 2 values"),
    ([], "--outputs has 1 files and --temperatures 0 values"),
    (["--outputs", "FILE", "./FILE", "--temperatures", "0", "1"], "--outputs: a file is given tw"),
    (["--outputs", "nowhere.json", "--temperatures=0"], "nowhere.json: no such file"),
])  # fmt: skip
def test_what_contradicts_a_file_of_outputs_is_refused(more, message, exam, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text(json.dumps(outputs()(exam)))
    argv = ["--outputs=FILE", f"--prompts={exam / 'prompts.jsonl'}", "--out=out", *more]
    if "annotations" in str(more):
        argv = ["--outputs=FILE", *more]
    with pytest.raises(SystemExit, match=f"^eval_alpaca.py: {message}"):
        eval_alpaca.main(argv)
    assert not Path("out").exists()


def two_generators(folder):
    return [row | {"generator": "h" * (i % 2)} for i, row in enumerate(outputs()(folder))]


def swapped(folder):
    rows = outputs()(folder)
    rows[4], rows[5] = rows[5], rows[4]
    return rows


@pytest.mark.parametrize(
    "rows, message",
    [
        (outputs(11), "11 rows, 12 needed"),
        (outputs(instruction="twice"), "row 3 has the instruction of row 2"),
        (outputs(generator=None), "row 3 has no generator"),
        (outputs(output=None), "row 3 has no output"),
        (outputs(output=" \n"), "row 3 has an empty output"),
        (outputs(output="a \ud83d"), "row 3 holds half a character"),
        (
            outputs(instruction="Another one."),
            "row 3 is not for one of the prompts: 'Ano",
        ),
        (swapped, "row 4 is out of order"),
        (lambda folder: [], "no list of outputs"),
        (lambda folder: [1, 2], "row 0 has no instruction"),
    ],
)
def test_outputs_that_are_not_whole_are_refused_before_anything_is_written(
    rows, message, exam, tmp_path, monkeypatch
):
    monkeypatch.setattr(eval_alpaca, "generate", None)
    file = tmp_path / "outputs.json"
    file.write_text(json.dumps(rows(exam)))
    with pytest.raises(SystemExit, match=f"^eval_alpaca.py: {re.escape(str(file))}: {message}"):
        examine(exam, tmp_path / "out", f"--baseline={file}")
    if "empty" not in message:  # which an answer of a model may be
        argv = [f"--outputs={file}", "--temperatures=0", f"--prompts={exam / 'prompts.jsonl'}"]
        with pytest.raises(SystemExit, match=f"--outputs {re.escape(str(file))}: {message}"):
            eval_alpaca.main(argv)


def test_outputs_of_several_generators_are_refused(exam, tmp_path):
    (tmp_path / "o.json").write_text(json.dumps(two_generators(exam)))
    argv = [f"--outputs={tmp_path / 'o.json'}", "--temperatures=0"]
    with pytest.raises(SystemExit, match="answers of several generators: , h"):
        eval_alpaca.main([*argv, f"--prompts={exam / 'prompts.jsonl'}"])


def test_bad_input_is_one_line_before_anything_is_written(exam, tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_alpaca, "generate", None)
    bare = tmp_path / "bare"
    shutil.copytree(exam / "model", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    run(tiny_world, tmp_path / "run", "--max_steps=1")
    run(tiny_world, tmp_path / "paired", "--max_steps=1", "--critic=paired")
    paired = tmp_path / "paired" / "discriminators.pt"
    make_model(tmp_path / "wide", hidden_size=64)
    discs = tmp_path / "run" / "discriminators.pt"
    noise, other = tmp_path / "noise.pt", exam / "other"
    noise.write_bytes(b"noise")
    (tmp_path / "plain.jsonl").write_text('{"prompt": "Hello."}\n')
    (tmp_path / "twice.jsonl").write_text('{"prompt": "Hello."}\n' * 2)
    (tmp_path / "none.jsonl").write_text('{"question": "Hello."}\n')
    model, at = f"--model={exam / 'model'}", f"--prompts={tmp_path}"
    mini = f"--prompts={exam / 'prompts.jsonl'}"
    for argv, message in (
        ([mini], "--model is needed, or --outputs"),
        ([model, "--judge=oracle"], "argument --judge: invalid choice: 'oracle'"),
        ([f"--model={bare}", mini], f"--model {bare}: a model folder without weights"),
        (["--model=./nowhere", mini], "--model ./nowhere: no such folder"),
        ([model, mini, f"--baseline={bare}"], f"--baseline {bare}: a model folder without weights"),
        ([f"--model={tmp_path / 'wide'}", mini, f"--score_discriminators={discs}"],
         f"--score_discriminators {discs}: for latents of size 32; those of the model have 64"),
        ([model, mini, f"--score_discriminators={paired}"],
         f"--score_discriminators {paired}: these critics read h - h_ref, and this"),
        ([model, mini, f"--score_discriminators={noise}"], f"--score_discriminators {noise}: "),
        ([model, mini, "--judge=rm"], "--judge rm needs --reward_model"),
        ([model, mini, f"--reward_model={other}"], f"--reward_model {other}: not a reward model"),
        ([model, mini, "--judge=gpt4"], "--judge gpt4 needs --prompts alpaca_eval"),
        ([model, mini, "--judge=annotations"], "--judge annotations needs --annotations FILE"),
        ([model, "--judge=annotations", "--annotations=a.json"],
         "--judge annotations does not use --max_new_tokens, --model"),
        ([model, mini, "--max_new_tokens=250"],
         "--max_new_tokens 250 leaves 6 of the model's 256 positions for the prompt"),
        ([model, mini, "--temperatures", "0.7", "0.7"], "--temperatures: a value is given twice"),
        ([model, mini, "--temperatures", "nan"], "argument --temperatures: nan is not in [0, inf)"),
        ([model, f"{at}/plain.jsonl"], f"--judge mini: {tmp_path}/plain.jsonl: row 0 is no prompt"
         " of the miniature: it has no text as family"),
        ([model, f"{at}/twice.jsonl"], f"--prompts {tmp_path}/twice.jsonl: row 1 has"),
        ([model, f"{at}/none.jsonl"],
         f"--prompts {tmp_path}/none.jsonl: row 0: no instruction and no prompt, text or chat, in"
         " question"),
        ([model, f"{at}/x.jsonl"], f"{tmp_path}/x.jsonl: no such file"),
        ([model, "--prompts=alpaca_eval", f"--alpaca_data={tmp_path}"],
         f"--alpaca_data {tmp_path}: no alpaca_eval_gpt4_baseline.json"),
    ):  # fmt: skip
        limit = [] if any("max_new" in a for a in argv) else ["--max_new_tokens=12"]
        with pytest.raises(SystemExit) as end:
            eval_alpaca.main([*argv, *limit, f"--out={tmp_path / 'out'}"])
        assert str(end.value).startswith(f"eval_alpaca.py: {message}"), (argv, end.value)
        assert "\n" not in str(end.value)


def test_alpaca_eval_s_file_must_have_its_805_rows(exam, tmp_path):
    tasks = world.draw_tasks(random.Random(1), 804, distinct=True)
    rows = [{"instruction": t.prompt, "output": "a", "generator": "g"} for t in tasks]
    (tmp_path / eval_alpaca.BASELINE_FILE).write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match=r"alpaca_eval_gpt4_baseline.json: 804 rows, 805 needed"):
        eval_alpaca.main([f"--model={exam / 'model'}", "--prompts=alpaca_eval", "--judge=gpt4",
                          f"--alpaca_data={tmp_path}", "--max_new_tokens=12"])  # fmt: skip


def test_prompts_without_room_lose_their_middle_and_are_counted(exam, tmp_path, capsys):
    long = "x" * 100 + "y" * 200 + "z" * 100
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "Hello."}, {"prompt": long}])
    seen = []
    spy = lambda lm, prompts, *rest: seen.extend(prompts) or [[1]] * len(prompts)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("generate.write_batch", spy)
        shutil.copytree(exam / "model", tmp_path / "model")
        shutil.copy(prompts, tmp_path / "prompts.jsonl")
        patch.setattr(eval_alpaca, "task_of", lambda *_: world.Task("reverse", "", "x"))
        examine(tmp_path, tmp_path / "out", "--temperatures", "0")
    said = "1 of 2 prompts are longer than 244 tokens; the middle of these is left out"
    printed = capsys.readouterr().out
    assert f"--model: {said}\n" in printed
    assert "\nanswers to a prompt whose middle was left out: 1 (T 0)\n" in printed
    assert [s["cut_prompt"] for s in lines_of(tmp_path / "out" / "scores.jsonl")] == [False, True]
    whole = ChatEncoder(tiny()).prompt_ids(user_chat(long))
    assert sorted(map(len, seen))[-1] == 244
    longest = max(seen, key=len)
    assert longest == whole[:122] + whole[-122:]


def test_gpt4_prints_a_command_and_judges_nothing(exam, tmp_path, capsys):
    tasks = world.draw_tasks(random.Random(1), 805, distinct=True)
    rows = [{"instruction": t.prompt, "output": "a", "generator": "g"} for t in tasks]
    (tmp_path / eval_alpaca.BASELINE_FILE).write_text(json.dumps(rows))
    eval_alpaca.main([f"--model={exam / 'model'}", "--prompts=alpaca_eval", "--judge=gpt4",
                      f"--alpaca_data={tmp_path}", "--max_new_tokens=2", "--temperatures", "0",
                      f"--out={tmp_path / 'out'}"])  # fmt: skip
    printed = capsys.readouterr().out
    assert f"--model_outputs {tmp_path}/out/model-T0.json" in printed
    assert "alpaca_eval --annotators_config weighted_alpaca_eval_gpt4_turbo" in printed
    (row,) = json_of(tmp_path / "out" / "results.json")
    assert row["win_rate"] is row["mean_score"] is None and row["n"] == 805
    eval_alpaca.check_outputs("", json_of(tmp_path / "out" / "model-T0.json"),
                              [t.prompt for t in tasks], empty_ok=True)  # fmt: skip


# ---------------------------------------------------------------------- critics and IFEval


def test_critic_scores_are_the_discriminators_of_each_answer_s_latents(exam, tiny_world, tmp_path):
    run(tiny_world, tmp_path / "run", "--max_steps=2")
    file = tmp_path / "run" / "discriminators.pt"
    _, scores = examine(exam, tmp_path / "e", f"--score_discriminators={file}")
    critics = load_discriminators(file)
    tokenizer = AutoTokenizer.from_pretrained(exam / "model")
    lm = AutoModelForCausalLM.from_pretrained(exam / "model", dtype=torch.float32)
    outputs = json_of(tmp_path / "e" / "model-T0.7.json")
    here = [s for s in scores if s["temperature"] == 0.7]
    encoder = ChatEncoder(tokenizer)
    for row, o in zip(here, outputs, strict=True):
        text = encoder.special_text.sub("", o["output"])
        chat = [*user_chat(o["instruction"]), {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(chat, return_dict=False, return_tensors="pt")
        ids = ids[:, : ids.shape[1] - len(encoder.tail)]
        with torch.no_grad():
            h = lm(ids, output_hidden_states=True).hidden_states[-1]
            for key, critic in (("critic_pos", "disc_pos"), ("critic_neg", "disc_neg")):
                s = critics[critic](h, torch.ones(ids.shape))
                assert row[key] == pytest.approx(s.item(), abs=1e-5)


@pytest.fixture
def stub_lm_eval(monkeypatch):
    """lm_eval's interface with three checks: capitals, a line in stars, and one without data."""

    def follows(name, text):
        if name == "needs_data":
            raise LookupError("\n****\n  Resource punkt not found.\n****")
        if name == "broken":
            raise KeyError("n")
        return text.isupper() if name == "capitals" else "*" in text

    def check(prepare):
        return lambda one, text: SimpleNamespace(
            follow_instruction_list=[
                follows(name, prepare(text)) for name in one.instruction_id_list
            ]
        )

    utils = ModuleType("utils")
    utils.InputExample = lambda key, ids, prompt, kwargs: SimpleNamespace(instruction_id_list=ids)
    utils.test_instruction_following_strict = check(lambda text: text)
    utils.test_instruction_following_loose = check(lambda text: text + "*")
    package, langdetect = ModuleType("lm_eval.tasks.ifeval"), ModuleType("langdetect")
    known = dict.fromkeys(("capitals", "star", "needs_data", "broken"))
    package.utils, package.instructions_registry = utils, SimpleNamespace(INSTRUCTION_DICT=known)
    langdetect.DetectorFactory = SimpleNamespace(seed=None)
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval", package)
    monkeypatch.setitem(sys.modules, "langdetect", langdetect)


CHECKED = (["capitals"], ["capitals", "star"], ["star", "needs_data"], ["needs_data"])
CHECKED = [
    {"prompt": f"p{i}", "instruction_id_list": ids, "kwargs": [{}] * len(ids)}
    for i, ids in enumerate(CHECKED)
]
CHECKED_TEXTS = ["ABC", "ABC", "abc*", "ABC"]


def test_ifeval_counts_whole_prompts_and_says_what_it_skips(stub_lm_eval, capsys):
    prompts = [eval_alpaca.Prompt(row["prompt"], "d", row) for row in CHECKED]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        judge = eval_alpaca.judge_of_ifeval(prompts)
    finally:
        dist.destroy_process_group()
    printed = capsys.readouterr().out
    assert "check needs_data is skipped: Resource punkt not found." in printed
    assert "1 of 4 prompts have no other check" in printed
    assert judge(prompts, CHECKED_TEXTS) == [
        {"strict": 1, "loose": 1, "score": 1},
        {"strict": 0, "loose": 1, "score": 0.5},
        {"strict": 1, "loose": 1, "score": 1},
        {},
    ]


def test_tools_ifeval_prints_accuracies_with_their_errors_over_prompts(
    stub_lm_eval, tmp_path, capsys
):
    answers = [
        {"instruction": row["prompt"], "output": text}
        for row, text in zip(CHECKED, CHECKED_TEXTS, strict=True)
    ]
    file, prompts = tmp_path / "a.json", tmp_path / "p.jsonl"
    write_lines(prompts, CHECKED)
    file.write_text(json.dumps(answers[::-1]))
    ifeval.main([str(file), str(prompts)])
    printed = capsys.readouterr().out
    assert "check needs_data is skipped: Resource punkt not found." in printed
    # strict by prompt 1, 0, 1; by check 1 of 1, 1 of 2, 1 of 1
    by_prompt = np.array([1, 0, 1]).std(ddof=1) / 3**0.5
    by_check = (np.array([1, 1, 1]) - 3 / 4 * np.array([1, 2, 1])).std(ddof=1) / 3**0.5 / (4 / 3)
    cells = [f"{100 * x:.1f}" for x in (2 / 3, by_prompt, 1, 0, 3 / 4, by_check, 1, 0)]
    assert re.findall(r"[\d.]+(?= \+-)|(?<=\+- )[\d.]+", printed.splitlines()[-1]) == cells
    assert printed.splitlines()[-1].split()[0] == "3" and printed.endswith(f"  {file}\n")

    def refused(answers, rows=CHECKED):
        file.write_text(json.dumps(answers))
        write_lines(prompts, rows)
        with pytest.raises(SystemExit) as end:
            ifeval.main([str(file), str(prompts)])
        return str(end.value)

    twice = f"tools.ifeval: {file}: 1 instructions occur twice"
    assert refused([*answers, answers[0]]) == twice
    assert refused([{"instruction": 1, "output": ""}]).endswith("row 0 has no text as instruction")
    file.write_bytes(b"\xff")
    with pytest.raises(SystemExit, match=f"^tools.ifeval: {file}: not JSON: 'utf-8' codec"):
        ifeval.main([str(file), str(prompts)])
    other = CHECKED[0] | {"instruction_id_list": ["broken"]}
    assert refused(answers[:1], [other]).endswith("prompt 0: broken refuses its kwargs: 'n'")
    assert refused(answers[1:]) == f"tools.ifeval: {file}: 1 of 4 prompts have no answer"
    more = [*answers, {"instruction": "x", "output": "y"}]
    assert refused(more) == f"tools.ifeval: {file}: 1 answers are to no prompt"
    assert refused([{"text": "a"}]) == f"tools.ifeval: {file}: row 0 has no instruction"
    assert refused(answers, [{"prompt": "p0"}]).endswith("row 0 has no instruction_id_list")
    other = CHECKED[0] | {"instruction_id_list": ["unheard"]}
    assert refused(answers[:1], [other]).endswith("checks that lm_eval does not know: ['unheard']")


def test_ifeval_without_lm_eval_writes_the_answers_and_says_where_they_are_scored(
    exam, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    rows = [row | {"prompt": f"Say {row['prompt']}."} for row in CHECKED]
    prompts, out = write_lines(tmp_path / "p.jsonl", rows), tmp_path / "out"
    more = f"--prompts={prompts}", "--judge=ifeval", "--dtype=bfloat16"
    (row, _), _ = examine(exam, out, *more)
    command = f"python -m tools.ifeval {out}/model-T*.json {prompts}"
    printed = capsys.readouterr().out
    assert f"the answers are written, and scored where it is by: {command}\n" in printed
    assert "\nmodel, T 0.7: 4 of 4 answers, bfloat16\n" in printed
    assert row["strict_acc"] is None and row["n"] == 4
    with pytest.raises(SystemExit, match="^tools.ifeval needs lm_eval: pip install 'lm_eval"):
        ifeval.main([f"{out}/model-T0.json", str(prompts)])


IFEVAL = SHARED / "ifeval" / "ifeval_prompts.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not IFEVAL.is_file(), reason=f"{IFEVAL} is not there")
def test_lm_eval_s_checks_judge_in_an_environment_of_their_own(tmp_path):
    """Answers that no check passes, those that echo the prompt, and one that passes for sure."""
    python = tmp_path / "env" / "bin" / "python"
    make = [sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"]
    subprocess.run(make, check=True)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile"]
    pip.append("lm_eval[ifeval]==0.4.13")
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"lm_eval cannot be installed: {done.stderr[-200:]}")
    rows = [r for r in lines_of(IFEVAL) if r["instruction_id_list"] == ["punctuation:no_comma"]]
    prompts = write_lines(tmp_path / "p.jsonl", rows)
    for name, text in (
        ("none", ""),
        ("all", "No such sign."),
        ("some", "First, a sign\nthen none"),
    ):
        answers = [{"instruction": row["prompt"], "output": text} for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(answers))
    files = [tmp_path / f"{name}.json" for name in ("none", "all", "some")]
    ask = [python, "-m", "tools.ifeval", *files, prompts]
    done = subprocess.run(ask, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    rates = [line.split()[1:11:3] for line in done.stdout.splitlines()[-3:]]
    assert rates == [["0.0"] * 4, ["100.0"] * 4, ["0.0", "100.0"] * 2]


# ---------------------------------------------------------------------- reward model


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A reward model of random weights for each family, not tied to a pad token."""
    folder = tmp_path_factory.mktemp("reward")
    for family in ("llama", "gemma2"):
        base = make_model(folder / f"{family}-base", family)
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        model.save_pretrained(folder / family)
        tiny().save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_and_padded_rewards_are_the_models_own(family, reward_folder, tiny_world):
    rm = RewardModel(str(reward_folder / family), torch.device("cpu"))
    triplets = load_pairs(str(tiny_world / "train.jsonl"), "train", tiny(), 64).triplets[:6]
    rows = lines_of(tiny_world / "train.jsonl")[:6]
    lm = load_lm(str(reward_folder / family), torch.float32, wrapper=RewardLM)
    with torch.no_grad():
        packed = lm(pack(reward_model.with_tail(triplets, rm.encoder)))
    chats = [user_chat(r["prompt"]) for r in rows] * 2
    texts = [r["chosen"] for r in rows] + [r["rejected"] for r in rows]
    padded = rm.score(chats, texts, batch_size=5)
    for i, (messages, text) in enumerate(zip(chats, texts, strict=True)):
        whole = [*messages, {"role": "assistant", "content": text}]
        ids = tiny().apply_chat_template(whole, return_dict=False, return_tensors="pt")
        assert (ids == tiny().bos_token_id).sum() == 1
        with torch.no_grad():
            own = rm.model(ids).logits[0, 0].item()
        assert padded[i] == pytest.approx(own, abs=1e-5)
        assert packed[i].item() == pytest.approx(own, abs=1e-5)
        assert rm.score([messages], [text])[0] == pytest.approx(own, abs=1e-5)


SIZE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_labels=1,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=100,
    initializer_range=0.2,
)  # fmt: skip
CLASSIFIERS = {
    "bert": {}, "roberta": dict(pad_token_id=2), "xlm-roberta": dict(pad_token_id=0),
    "deberta-v2": dict(relative_attention=True, position_biased_input=False, pos_att_type=["p2c"]),
    "deberta": {}, "modernbert": dict(global_attn_every_n_layers=2, local_attention=8),
    "electra": dict(embedding_size=16), "distilbert": dict(dim=32, n_heads=4, hidden_dim=48),
    "gpt2": {}, "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": dict(sliding_window=6),
    "gemma": dict(head_dim=8), "gemma2": dict(head_dim=8, sliding_window=6), "gpt_neox": {},
    "phi3": dict(pad_token_id=None), "gemma3_text": dict(head_dim=8, sliding_window=6),
    "mpnet": {}, "opt": dict(ffn_dim=48, word_embed_proj_dim=32), "falcon": {},
}  # fmt: skip


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_any_classifier_of_one_label_scores_a_batch_as_text_by_text(family, tmp_path):
    """And reads as many tokens as it has positions, no more."""
    settings = dict(bos_token_id=0, eos_token_id=1, pad_token_id=None)
    if family not in ("gpt2", "llama", "falcon"):
        settings["pad_token_id"] = 1
    config = AutoConfig.for_model(family, **SIZE | settings | CLASSIFIERS[family])
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    rm = RewardModel(str(tmp_path), torch.device("cpu"))
    offset = {"roberta": 3, "xlm-roberta": 1, "mpnet": 2}.get(family, 0)
    assert rm.positions == 100 - offset
    chats = [user_chat("Hello.")] * 5
    answers = ["a", "bc", "b", "a " * 99, "cd"]
    rewards = rm.score(chats, answers)
    unread = [text["cut_text"] for text in rm.unread(chats, answers)]
    assert unread == [False, False, False, True, False]
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for chat, answer, reward in zip(chats, answers, rewards, strict=True):
        turns = [*chat, {"role": "assistant", "content": answer}]
        ids = tiny().apply_chat_template(turns, return_dict=False)[: rm.positions]
        with torch.no_grad():
            assert alone(torch.tensor([ids])).logits.item() == pytest.approx(reward, abs=1e-5)
    assert len({round(r, 4) for r in rewards}) == 5


def test_texts_beyond_the_reward_model_s_positions_are_counted(exam, tmp_path, capsys):
    make_model(tmp_path / "base", max_position_embeddings=40)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    model.save_pretrained(tmp_path / "rm")
    tiny().save_pretrained(tmp_path / "rm")
    reward = f"--reward_model={tmp_path / 'rm'}"
    file = [{"instruction": t.prompt, "output": "a" * (9 * (i > 2)) + "b", "generator": "g"}
            for i, t in enumerate(world.read_tasks(exam / "prompts.jsonl"))]  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps(file))
    more = f"--baseline={tmp_path / 'b.json'}", "--temperatures", "0"
    (row,), scores = examine(exam, tmp_path / "out", reward, *more)
    encoder = ChatEncoder(tiny())
    for key, text in (("", lambda i: lines_of(tmp_path / "out" / "model-T0.jsonl")[i]["text"]),
                      ("_baseline", lambda i: file[i]["output"])):  # fmt: skip
        whole = [encoder.whole(user_chat(file[i]["instruction"]), encoder.plain(text(i)))
                 for i in range(12)]  # fmt: skip
        cut = [len(ids) > 40 for ids in whole]
        assert [s[f"cut_text{key}"] for s in scores] == cut and row[f"cut_text{key}"] == sum(cut)
    assert 0 < row["cut_text_baseline"] < 12
    said = "texts longer than the positions of what scores them, which did not read their end: "
    assert f"\n{said}{row['cut_text']} (T 0)\n" in capsys.readouterr().out


def test_special_tokens_in_an_answer_do_not_end_its_turn(reward_folder):
    rm = RewardModel(str(reward_folder / "llama"), torch.device("cpu"))
    chat, special = user_chat("Hello."), rm.encoder.tokenizer.eos_token
    one, two = rm.score([chat] * 2, [f"a{special}b", "ab"])
    assert one == two


def train_rewards(world, out, *more):
    reward_model.main([
        f"--model={world / 'llama'}", f"--dataset={world / 'train.jsonl'}", f"--out_dir={out}",
        "--batch_size=8", "--max_length=64", "--lr=3e-3", *more,
    ])  # fmt: skip
    return rows_of(out / "metrics.csv")


def test_a_reward_model_learns_its_pairs_and_reloads_with_equal_rewards(
    tiny_world, tmp_path, capsys
):
    held_out = f"--eval_split={tiny_world / 'train.jsonl'}"
    rows = train_rewards(tiny_world, tmp_path / "a", "--epochs=12", held_out)
    assert rows[-1]["loss"] < 0.3 < 0.5 < rows[0]["loss"] and rows[-1]["accuracy"] > 0.9
    printed = capsys.readouterr().out
    loss, accuracy = re.search(r"held out: 28 pairs, loss (\S+), accuracy (\S+)", printed).groups()
    rm = RewardModel(str(tmp_path / "a" / "hf"), torch.device("cpu"))
    data = lines_of(tiny_world / "train.jsonl")
    chats = [user_chat(r["prompt"]) for r in data]
    chosen, rejected = (
        np.array(rm.score(chats, [r[k] for r in data])) for k in ("chosen", "rejected")
    )
    assert np.log1p(np.exp(rejected - chosen)).mean() == pytest.approx(float(loss), abs=1e-4)
    assert (chosen > rejected).mean() == pytest.approx(float(accuracy), abs=1e-3)
    with pytest.raises(SystemExit, match="^reward_model.py: .* holds a run: pass --resume"):
        train_rewards(tiny_world, tmp_path / "a")


def test_reward_training_does_not_depend_on_micro_batches(tiny_world, tmp_path):
    a = train_rewards(tiny_world, tmp_path / "a", "--dtype=float64")
    b = train_rewards(tiny_world, tmp_path / "b", "--dtype=float64", "--micro_batch_size=3")
    assert len(a) == 3
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-6)
    names = [tmp_path / n / "hf" / "config.json" for n in "ab"]
    assert names[0].read_text() == names[1].read_text()
    assert AutoConfig.from_pretrained(names[0].parent).num_labels == 1


def test_bradley_terry_of_equal_rewards_is_ln_2_and_its_gradient_pushes_apart():
    chosen = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = reward_model.bradley_terry_loss(chosen, torch.zeros(3))
    assert loss.tolist() == [LN2] * 3
    loss.sum().backward()
    assert chosen.grad.tolist() == [-0.5] * 3


def test_what_is_no_reward_model_is_refused(exam, tmp_path):
    with pytest.raises(InputError, match="not a reward model"):
        RewardModel(str(exam / "model"), torch.device("cpu"))
    model = AutoModelForSequenceClassification.from_pretrained(exam / "model", num_labels=3)
    model.save_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="3 labels, not one"):
        RewardModel(str(tmp_path), torch.device("cpu"))
    shutil.copytree(tmp_path, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(
        InputError, match=f"{tmp_path}/bare: .* no chat template.*jinja in its"
    ) as e:
        RewardModel(str(tmp_path / "bare"), torch.device("cpu"))
    assert "--chat_template" not in str(e.value)  # which is not for this model
    config = AutoConfig.for_model(
        "bart", num_labels=1, architectures=["BartForSequenceClassification"]
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a reward model with an encoder and a decoder"):
        reward_model.read_reward_model(str(tmp_path))


def test_the_rm_judge_compares_rewards(exam, reward_folder, tmp_path):
    rm_flag = f"--reward_model={reward_folder / 'llama'}"
    baseline = f"--baseline={exam / 'other'}"
    results, scores = examine(exam, tmp_path, "--judge=rm", rm_flag, baseline)
    rm = RewardModel(str(reward_folder / "llama"), torch.device("cpu"))
    here = [s for s in scores if s["temperature"] == 0.7]
    own, other = (json_of(tmp_path / f"{role}-T0.7.json") for role in ("model", "baseline"))
    chats = [user_chat(o["instruction"]) for o in own]
    a, b = (np.array(rm.score(chats, [o["output"] for o in rows])) for rows in (own, other))
    assert [s["reward"] for s in here] == [s["score"] for s in here]
    assert [s["reward"] for s in here] == pytest.approx(a.tolist(), abs=1e-5)
    assert [s["win"] for s in here] == ((np.sign(a - b) + 1) / 2).tolist()
    assert results[1]["mean_score"] == pytest.approx(a.mean(), abs=1e-5)
    assert results[1]["strict_acc"] is None


# ---------------------------------------------------------------------- exported folders


def write_settings(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))


def own_answers(folder):
    """What transformers' own generate writes for five prompts, one at a time."""
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for text in ("abc", "fade a bed", "face", "a", "cafe bead"):
        ids = torch.tensor([ChatEncoder(tiny()).prompt_ids(user_chat(text))])
        answers.append(lm.generate(ids, max_new_tokens=20)[0, ids.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_at_learning_rate_0_the_export_generates_as_its_base_does(where, tiny_world, tmp_path):
    base = tmp_path / "base"
    make_model(base)
    # a temperature without sampling is a fault, for which transformers refuses to save
    settings = {"temperature": 0.6, "repetition_penalty": 1.3, "eos_token_id": [1, 2]}
    if where == "config.json":
        (base / where).write_text(json.dumps(json_of(base / where) | settings))
        (base / "generation_config.json").unlink()
    else:
        write_settings(base, **settings)
    free = own_answers(base)
    assert not {1, 2, 5} & {token for answer in free for token in answer}
    if where != "config.json":  # now the base stops early
        settings["eos_token_id"] = [1, free[0][3], free[2][7]]
        write_settings(base, **settings)
    run(tiny_world, tmp_path / "r", f"--model={base}", "--lr=0", "--max_steps=1")
    stopped = own_answers(base)
    assert own_answers(tmp_path / "r" / "hf") == stopped
    assert (stopped != free) == (where != "config.json")
    exported = json_of(tmp_path / "r" / "hf" / "generation_config.json")
    end = ChatEncoder(tiny()).end_of_turn
    assert exported["eos_token_id"] == [*settings["eos_token_id"], end]
    assert exported["repetition_penalty"] == 1.3 and exported["temperature"] == 0.6
    run(tiny_world, tmp_path / "s", f"--model={tmp_path / 'r' / 'hf'}", "--max_steps=1")
    assert json_of(tmp_path / "s" / "hf" / "generation_config.json") == exported


@pytest.mark.parametrize("pad", [None, "</s>", "<|end|>"])
def test_an_exported_reward_model_scores_in_batches_as_text_by_text(pad, tiny_world, tmp_path):
    """Also if the tokenizer pads with the end of turn, at which the reward is read."""
    world_here = shutil.copytree(tiny_world, tmp_path / "world")
    tokenizer = AutoTokenizer.from_pretrained(world_here / "llama")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>\n", "<|end|>")
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(world_here / "llama")
    train_rewards(world_here, tmp_path / "r")
    folder, rows = tmp_path / "r" / "hf", lines_of(tiny_world / "train.jsonl")[:6]
    chats = [[*user_chat(r["prompt"]), {"role": "assistant", "content": r["chosen"]}] for r in rows]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if pad == "</s>":
        assert tokenizer.pad_token == pad
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    batch = tokenizer.apply_chat_template(
        chats, padding=True, return_dict=True, return_tensors="pt"
    )
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        rewards = model(**batch).logits[:, 0].tolist()
    rm = RewardModel(str(folder), torch.device("cpu"))
    ours = rm.score([user_chat(r["prompt"]) for r in rows], [r["chosen"] for r in rows])
    assert rewards == pytest.approx(ours, abs=1e-5)


def test_the_text_part_of_a_multimodal_model_answers(exam, tmp_path):
    text = json_of(exam / "model" / "config.json") | {"model_type": "gemma3_text", "head_dim": 8}
    text = {k: v for k, v in text.items() if k not in ("architectures", "rope_parameters")}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=28)
    vision |= dict(num_attention_heads=2, patch_size=14)
    tokens = dict(image_token_index=299, boi_token_index=298, eoi_token_index=297)
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tiny().save_pretrained(tmp_path / "m")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "m"), "max_position_embeddings")
    results, _ = examine(exam, tmp_path / "e", f"--model={tmp_path / 'm'}")
    assert [r["n"] for r in results] == [12, 12]
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    row = lines_of(tmp_path / "e" / "model-T0.jsonl")[0]
    task = lines_of(exam / "prompts.jsonl")[0]["prompt"]
    ids = torch.tensor([ChatEncoder(tiny()).prompt_ids(user_chat(task))])
    own = lm.generate(ids, max_new_tokens=row["tokens"], do_sample=False)[0, ids.shape[1] :]
    assert tiny().decode(own) == row["text"]
    with pytest.raises(SystemExit, match="--max_new_tokens 500 leaves 0 of the model's 256"):
        examine(exam, tmp_path / "f", f"--model={tmp_path / 'm'}", "--max_new_tokens=500")


# ---------------------------------------------------------------------- pictures


def make_run(folder, loss="dpo", lambda_adv=0.1, win=50.0, seed=0):
    """What a training run and its evaluation leave, of random numbers."""
    rng = np.random.default_rng(seed)
    (folder / "eval-mini-mini").mkdir(parents=True)
    config = {"loss": loss, "lambda_adv": lambda_adv, "critic": "transformer"}
    (folder / "config.json").write_text(json.dumps(config | {"data_fingerprint": "x"}))
    keys = ["step", "margin"]
    if lambda_adv:
        keys += ["disc_acc_pos", "disc_acc_neg", "score_gap_pos", "score_gap_neg", "d_ra"]
        keys += ["adv_to_opo_grad"]
    with (folder / "metrics.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(keys)
        table.writerows([[i + 1, *rng.random(len(keys) - 1)] for i in range(40)])
    results = [
        {"temperature": t, "win_rate": win + t, "win_rate_se": 1.0, "strict_acc": 40 - t, "n": 60,
         "strict_acc_se": 1.5, "judge": "mini"}
        for t in (0.0, 0.7, 1.5)
    ]  # fmt: skip
    (folder / "eval-mini-mini" / "results.json").write_text(json.dumps(results))
    rows = [
        {"temperature": t, "prompt": i, "length": int(rng.integers(5, 90)),
         "win": float(rng.integers(2)), "score": rng.random(), "reward": rng.normal()}
        | ({"critic_pos": float(rng.normal())} if lambda_adv else {})
        for t in (0.7, 1.5) for i in range(60)
    ]  # fmt: skip
    write_lines(folder / "eval-mini-mini" / "scores.jsonl", rows)
    return str(folder)


def test_every_figure_is_drawn_from_a_run_and_its_evaluation(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", lambda_adv=0), make_run(tmp_path / "b", seed=1),
            make_run(tmp_path / "c", "simpo", 0, seed=2),
            make_run(tmp_path / "d", "simpo", seed=3)]  # fmt: skip
    plots.main([*runs, f"--out={tmp_path / 'figures'}"])
    names = {f"{name}.png" for name in plots.FIGURES}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == names and len(names) == 5
    assert all((tmp_path / "figures" / n).stat().st_size > 10_000 for n in names)
    assert capsys.readouterr().out.count("wrote") == 5


def test_lines_and_error_bars_are_the_numbers_of_results_json(tmp_path):
    folders = [make_run(tmp_path / "a", lambda_adv=0), make_run(tmp_path / "b", win=70.0)]
    runs = plots.read_runs(folders)
    assert [r.name for r in runs] == ["DPO", "GANPO(DPO)"]
    figure = plots.temperature(runs, None)
    for ax, key in zip(figure.axes, ("win_rate", "strict_acc"), strict=True):
        for run_, bars in zip(runs, ax.containers, strict=True):
            line, _, (spread,) = bars
            assert line.get_ydata().tolist() == [row[key] for row in run_.results]
            ends = [s[:, 1].tolist() for s in spread.get_segments()]
            e = [row[f"{key}_se"] for row in run_.results]
            assert ends == [[y - d, y + d] for y, d in zip(line.get_ydata(), e, strict=True)]
    (ax,) = plots.length(runs, SimpleNamespace(temperature=0.7)).axes
    edges = [tuple(map(int, t.get_text().split(" to "))) for t in ax.get_xticklabels()]
    for run_, (line, _, (spread,)) in zip(runs, ax.containers, strict=True):
        rows = [s for s in run_.scores if s["temperature"] == 0.7]
        parts = [[100 * s["win"] for s in rows if a <= s["length"] <= b] for a, b in edges]
        assert len(parts) == 4 and sum(map(len, parts)) == 60
        assert line.get_ydata() == pytest.approx([np.mean(p) for p in parts])
        errors = [(s[1, 1] - s[0, 1]) / 2 for s in spread.get_segments()]
        assert errors == pytest.approx([np.std(p, ddof=1) / len(p) ** 0.5 for p in parts])
    (ax,) = plots.margin(runs, None).axes
    assert [line.get_label() for line in ax.lines[:2]] == ["DPO", "GANPO(DPO)"]
    mean = np.mean([row["margin"] for row in runs[0].metrics[:2]])  # a twentieth of 40 steps
    assert ax.lines[0].get_ydata()[0] == pytest.approx(mean)


def test_r_is_pearson_s_and_its_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(100, 150))
    y = 0.6 * x + 0.8 * rng.normal(size=x.shape)
    hits = 0
    for a, b in zip(x, y, strict=True):
        r, low, high = plots.pearson(a, b, draws=300)
        assert r == pytest.approx(np.corrcoef(a, b)[0, 1])
        hits += low < 0.6 < high
    assert 88 <= hits <= 99


def test_what_no_run_has_is_named_and_what_is_no_run_is_refused(tmp_path, capsys):
    alone = tmp_path / "run"
    make_run(alone, lambda_adv=0)
    (alone / "metrics.csv").unlink()
    plots.main([str(alone / "eval-mini-mini"), f"--out={tmp_path / 'f'}"])
    printed = capsys.readouterr().out
    assert "margin: these runs have nothing to draw" in printed and "wrote" in printed
    assert "critic: these runs" in printed and "health: these runs" in printed
    (tmp_path / "empty").mkdir()
    shutil.copytree(alone / "eval-mini-mini", alone / "eval-other")
    (tmp_path / "published").mkdir()  # as --judge annotations writes it
    (tmp_path / "published" / "results.json").write_text('[{"temperature": null, "n": 1}]')
    (tmp_path / "published" / "scores.jsonl").write_text('{"prompt": 0, "win": 1.0}\n')
    for folder, message in (
        (tmp_path / "published", "no results with a temperature"),
        (tmp_path / "empty", "neither metrics.csv nor results.json"),
        (tmp_path / "nowhere", "no such folder"),
        (alone, "several evaluations, pass one of them as RUN: eval-mini-mini, eval-other"),
    ):
        with pytest.raises(SystemExit, match=f"^tools.plots: .*{message}"):
            plots.main([str(folder), f"--out={tmp_path / 'g'}"])
    with pytest.raises(SystemExit, match="7 runs: more than 6 lines"):
        plots.main(["x"] * 7)


def damaged(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("file, old, new, message", [
    ("metrics.csv", "\n2,", "\n2,0.5\n3,", "metrics.csv is damaged: row 1 has more or fewer"),
    ("metrics.csv", "\n2,", "\n2,7,", "metrics.csv is damaged: row 1 has more or fewer values"),
    ("metrics.csv", "\n2,", "\nx,", "metrics.csv is damaged: invalid literal for int"),
    ("metrics.csv", "\n2,", "\n2,x", "metrics.csv is damaged: could not convert string to float"),
    ("metrics.csv", "step", "stop", "metrics.csv is damaged: there is no 'step'"),
    ("config.json", "{", "[", "b: metrics.csv has no row, or config.json is not a run's"),
    ("eval-mini-mini/results.json", '"n"', '"m"', "results.json is damaged: there is no 'n'"),
    ("eval-mini-mini/results.json", "51.5", '"51.5"', "results.json is damaged: row 2 has no numb"),
    ("eval-mini-mini/results.json", "[{", "[1, {", "results.json is damaged: 'int' object"),
    ("eval-mini-mini/results.json", "]", "", "results.json: not rows of JSON"),
    ("eval-mini-mini/scores.jsonl", '"win"', '"won"', "scores.jsonl is damaged: there is no 'win'"),
    ("eval-mini-mini/scores.jsonl", '"length": ', '"length": null, "l": ', "length: cannot be dr"),
])  # fmt: skip
def test_a_damaged_file_of_one_run_is_named_before_a_figure_is_written(
    file, old, new, message, tmp_path
):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    damaged(tmp_path / "b" / file, old, new)
    with pytest.raises(SystemExit) as end:
        plots.main([*runs, f"--out={tmp_path / 'figures'}"])
    assert str(end.value).startswith("tools.plots: ") and "\n" not in str(end.value)
    assert message in str(end.value) and not (tmp_path / "figures").exists()


def test_a_table_that_a_resumed_run_cannot_go_on_with_is_named(tmp_path):
    path = tmp_path / "metrics.csv"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for text, message in (
            ("step,loss\n1,0.5,7\n2,1\n", "is damaged: row 0 has more or fewer values"),
            ("step,loss\n1\n2,1\n", "is damaged: row 0 has more or fewer values"),
            ("step,less\n1,0.5\n", "is not of this run: .*less"),
        ):
            path.write_text(text)
            with pytest.raises(InputError, match=f"metrics.csv {message}"):
                report.Table(path, ["step", "loss"], 2)
            assert path.read_text() == text
    finally:
        dist.destroy_process_group()


def test_scores_that_the_judge_did_not_give_are_no_points(tmp_path):
    """And a row of metrics.csv that is just being written is left out."""
    run_ = Path(make_run(tmp_path / "a"))
    rows = lines_of(run_ / "eval-mini-mini" / "scores.jsonl")
    for i, row in enumerate(rows):
        row["score"] = row["score"] if i % 2 else None
    write_lines(run_ / "eval-mini-mini" / "scores.jsonl", rows)
    (run_ / "metrics.csv").open("a").write("41,0.")
    (one,) = plots.read_runs([str(run_)])
    assert len(one.metrics) == 40
    (left, _), *_ = [plots.critic([one], None).axes]
    assert len(left.lines[0].get_xdata()) == 30
    write_lines(run_ / "eval-mini-mini" / "scores.jsonl", [r | {"score": None} for r in rows])
    assert plots.critic(plots.read_runs([str(run_)]), None) is None


def test_a_figure_appears_whole_or_not_at_all(tmp_path):
    class Broken:
        def savefig(self, path, **_):
            path.write_bytes(b"half")
            raise OSError("no space left")

    with pytest.raises(OSError):
        plots.save(Broken(), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_figures_without_matplotlib_are_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "tools.plots")
    with pytest.raises(SystemExit, match="matplotlib: pip install -r requirements-dev.txt$"):
        importlib.import_module("tools.plots")  # as miniature.reproduce does before its work


# ---------------------------------------------------------------------- whole commands


@pytest.mark.slow
def test_two_ranks_write_what_one_does(exam, tmp_path):
    one = examine(exam, tmp_path / "a", f"--baseline={exam / 'other'}")
    done = command(
        "eval_alpaca.py", f"--model={exam / 'model'}",
        f"--prompts={exam / 'prompts.jsonl'}", f"--baseline={exam / 'other'}",
        f"--out={tmp_path / 'b'}", "--max_new_tokens=12", "--batch_size=5", "--temperatures", "0",
        "0.7", torchrun=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    b = tmp_path / "b"
    assert (json_of(b / "results.json"), lines_of(b / "scores.jsonl")) == one
    assert lines_of(b / "model-T0.7.jsonl") == lines_of(tmp_path / "a" / "model-T0.7.jsonl")


@pytest.mark.slow
def test_two_ranks_train_the_reward_model_of_one(tiny_world, tmp_path):
    one = train_rewards(tiny_world, tmp_path / "a")
    done = command(
        "reward_model.py", f"--model={tiny_world / 'llama'}",
        f"--dataset={tiny_world / 'train.jsonl'}", f"--out_dir={tmp_path / 'b'}", "--batch_size=8",
        "--max_length=64", "--lr=3e-3", torchrun=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for a, b in zip(one, rows_of(tmp_path / "b" / "metrics.csv"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_a_real_tiny_model_answers_all_of_alpaca_eval(alpaca, exam, tmp_path):
    """Without the published files a random model answers the 805 instructions of our own."""
    there = SHARED.is_dir()
    model = SHARED / "models" / "stories260K" if there else exam / "model"
    folder, tokens = (ALPACA, 64) if there else (alpaca, 32)
    eval_alpaca.main([
        f"--model={model}", f"--chat_template={ROOT / 'plain_chat.jinja'}", "--judge=gpt4",
        "--prompts=alpaca_eval", f"--alpaca_data={folder}", "--temperatures", "0.7",
        f"--max_new_tokens={tokens}", f"--out={tmp_path}",
    ])  # fmt: skip
    rows, baseline = json_of(tmp_path / "model-T0.7.json"), read_baseline(folder)
    eval_alpaca.check_outputs("", rows, [r["instruction"] for r in baseline])
    assert len({r["output"] for r in rows}) > 790
    assert [r["dataset"] for r in rows] == [r.get("dataset", "alpaca_eval") for r in baseline]
