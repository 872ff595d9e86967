"""Win rates, their errors, and AlpacaEval 2's control for length: numbers in, numbers out.

A score row, as eval_alpaca.py writes it, is a dict about one answer: prompt (the prompt's number),
length and length_baseline (characters of the two answers), and what a judge has given: win against
the baseline (1, 0, or 1/2 for a tie), score, strict and loose. A key that the judge has no value
for is absent or None. The keys of NOTICED say what was cut, the same with _baseline for the
baseline's answer; they are None where it is not known.
"""

from collections.abc import Callable
from operator import itemgetter

import numpy as np

NOTICED = {  # what a score row says beside its scores; results.json has the numbers of answers
    "cut_answer": "answers cut at --max_new_tokens",
    "cut_prompt": "answers to a prompt whose middle was left out",
    "cut_text": "texts longer than the positions of what scores them, which did not read their end",
    "left_out": "texts of which the chat template of what scores them leaves out a part",
    "spelled": "answers with special tokens as text, which what scores them did not read",
    "thinking": "answers that think aloud",
    "empty": "empty answers",
}
RESULT_COLUMNS = (
    "model baseline judge reward_model temperature seed strip_thinking n unjudged win_rate"
    " win_rate_se lc_win_rate mean_score mean_score_se strict_acc strict_acc_se loose_acc"
    " loose_acc_se avg_length"
).split() + [key + whose for key in NOTICED for whose in ("", "_baseline")]
PENALTIES = 1 / np.logspace(-4, 4, 10)  # L1, those that AlpacaEval tries
FOLDS = 5  # of the cross-validation that chooses one
LEAST_N = 100  # prompts of a length-controlled rate; docs/evaluation.md says why
VERDICTS = {  # what a judge gives, the rate it is counted in, and that rate's scale
    "win": ("win_rate", 100),
    "score": ("mean_score", 1),
    "strict": ("strict_acc", 100),
    "loose": ("loose_acc", 100),
}


def standard_error(values: np.ndarray) -> np.ndarray:
    """Returns the standard error of the mean over the first axis of values (n, ...).

    The n values are independent. A single value has no error: the result is nan.
    """
    n = len(values)
    return values.std(0, ddof=1) / n**0.5 if n > 1 else np.nan * values[0]


def mean_and_error(
    rows: list[dict], key: str, scale: float = 1.0
) -> tuple[float | None, float | None]:
    """Returns mean and standard error of a key of score rows, both times scale.

    The answers to one prompt are averaged first, so the error is that over prompts. Rows without
    the key are left out; if no row has it, both numbers are None. One prompt alone has no error,
    and neither have prompts with equal values: the formula's 0 would claim certainty.
    """
    values = {}
    for row in rows:
        if row.get(key) is not None:
            values.setdefault(row["prompt"], []).append(row[key])
    means = scale * np.array([np.mean(v) for v in values.values()])
    if not len(means):
        return None, None
    return float(means.mean()), float(standard_error(means)) if np.ptp(means) else None


def length_controlled(
    win: np.ndarray,
    delta: np.ndarray,
    place: np.ndarray,
    difficulty: np.ndarray | None = None,
    gamed: tuple | None = None,
) -> float | None:
    """Returns AlpacaEval 2's length-controlled win rate, in percent (arXiv 2404.04475).

    A logistic model without intercept is fitted to the preferences; the rate is its mean prediction
    for answers that are as long as the baseline's. An L1 penalty is chosen by cross-validation.

    win         (n,) preference for the model, in [0, 1]
    delta       (n,) length of the baseline's answer minus length of the model's, in characters
    place       (n,) the number of each instruction, which decides its fold
    difficulty  (n,) of the instructions, known for AlpacaEval's own judge and baseline
    gamed       features (m, 3), preferences (m,) and places (m,) of the baseline's own model when
                it was told to be verbose or concise; AlpacaEval adds them to every fit, each with
                weight 0.2 / 2

    Without difficulty the model has a term for length and a constant. Returns None if it cannot be
    fitted, because nothing varies: without gamed, all preferences or all lengths are equal.
    """
    if gamed is None and not (np.ptp(win) and np.ptp(delta)):
        return None
    n, spread = len(win), delta.std(ddof=1)
    features = [np.tanh(delta / spread) if spread else 0.0 * delta, np.ones(n)]
    if difficulty is not None:
        features.insert(1, difficulty)
    x, y, weight = np.stack(features, 1), win, np.ones(n)
    if gamed is not None:
        x, y, place = (np.concatenate(two) for two in zip((x, y, place), gamed, strict=True))
        weight = np.concatenate([weight, np.full(len(y) - n, 0.2 / 2)])
    b = logistic_regression(x, y, weight, best_penalty(x, y, weight, place % FOLDS))
    return float(100 * sigmoid(x[:n, 1:] @ b[1:]).mean())


def best_penalty(x: np.ndarray, y: np.ndarray, weight: np.ndarray, fold: np.ndarray) -> float:
    """Returns the one of PENALTIES whose fits predict best what they have not seen.

    x, y and weight are those of logistic_regression; fold (n,) says which of FOLDS folds a row is
    in. A fit to four folds is measured by its mean cross-entropy, weighted, on the fifth.
    """
    losses = np.zeros(len(PENALTIES))
    for k in range(FOLDS):
        seen, b = fold != k, None
        for i, penalty in enumerate(PENALTIES):
            b = logistic_regression(x[seen], y[seen], weight[seen], penalty, b)
            z = x[~seen] @ b
            entropy = np.logaddexp(0, z) - y[~seen] * z
            losses[i] += np.average(entropy, weights=weight[~seen])
    return PENALTIES[losses.argmin()]


def logistic_regression(
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    penalty: float,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the b (k,) that minimises
    sum_i weight_i cross_entropy(y_i, sigmoid(x_i b)) + penalty sum |b|.

    x is (n, k), y (n,) in [0, 1], weight (n,), start (k,) where to begin, by default at 0. The
    method is proximal gradient descent with Nesterov's acceleration, which begins anew where it
    leads uphill (FISTA). Raises FloatingPointError if it does not converge.
    """
    step = 4 / np.linalg.eigvalsh((x * weight[:, None]).T @ x)[-1]
    b = ahead = np.zeros(x.shape[1]) if start is None else start
    t = 1.0
    for _ in range(100_000):
        new = ahead - step * x.T @ (weight * (sigmoid(x @ ahead) - y))
        new = np.sign(new) * np.maximum(abs(new) - step * penalty, 0)
        t = 1.0 if (ahead - new) @ (new - b) > 0 else t
        moved, t_new = abs(new - b).max(), (1 + (1 + 4 * t * t) ** 0.5) / 2
        ahead, b, t = new + (t - 1) / t_new * (new - b), new, t_new
        if moved < 1e-12:
            return b
    raise FloatingPointError("the length-controlled fit has not converged")


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def summary(rows: list[dict], control: Callable = length_controlled, **settings) -> dict:
    """Returns a row of results.json: the answers of one model at one temperature.

    rows are score rows. control(win, delta, place), arrays (n,), gives the length-controlled win
    rate in percent. settings are the columns that do not follow from rows, such as model and judge.
    n is the number of prompts with a verdict, or of all where the judge gives none here.
    """
    result = dict.fromkeys(RESULT_COLUMNS) | settings
    prompts = {r["prompt"] for r in rows}
    judged = {r["prompt"] for r in rows if any(r.get(k) is not None for k in VERDICTS)}
    if not judged and settings.get("judge") != "annotations":
        judged = prompts
    result |= {"n": len(judged), "unjudged": len(prompts - judged)}
    for key, (name, scale) in VERDICTS.items():
        result[name], result[f"{name}_se"] = mean_and_error(rows, key, scale)
    compared = [r for r in rows if r.get("win") is not None]
    win = np.array([r["win"] for r in compared])
    delta = np.array([r["length_baseline"] - r["length"] for r in compared], dtype=float)
    place = np.array([r["prompt"] for r in compared])
    if len({*place}) >= LEAST_N:
        result["lc_win_rate"] = control(win, delta, place)
    result["avg_length"] = float(np.mean([r["length"] for r in rows]))
    for key in (key + whose for key in NOTICED for whose in ("", "_baseline")):
        known = [bool(r[key]) for r in rows if r.get(key) is not None]
        result[key] = sum(known) if known else None
    return result


def table(results: list[dict]) -> str:
    """Returns rows of results.json as a table for the terminal."""

    def show(row, key, places, width):
        if row[key] is None:
            return "-".rjust(width)
        error = f" +- {row[key + '_se']:.{places}f}" if row.get(key + "_se") is not None else ""
        return f"{row[key]:.{places}f}{error}".rjust(width)

    first = results[0]
    lines = [
        f"judge {first['judge']}, model {first['model']}, baseline {first['baseline'] or 'none'};",
        "rates in percent, +- standard error, length in characters",
        "   T     n   win rate        length-contr.  score              strict          length",
    ]
    for row in results:
        temperature = "-" if row["temperature"] is None else f"{row['temperature']:g}"
        lines.append(
            f"{temperature:>4} {row['n']:>5} {show(row, 'win_rate', 1, 14)}"
            f" {show(row, 'lc_win_rate', 1, 13)}  {show(row, 'mean_score', 3, 17)}"
            f" {show(row, 'strict_acc', 1, 14)} {show(row, 'avg_length', 0, 8)}"
        )
        if row["loose_acc"] is not None:
            lines[-1] += f"  loose {show(row, 'loose_acc', 1, 0)}"
    return "\n".join(lines + remarks(results))


def remarks(results: list[dict]) -> list[str]:
    """Returns lines about what the numbers of results.json's rows hide; none where that is
    nothing."""
    lines = []

    def add(text: str, value_of: Callable):
        """Adds a line with value_of(row) of each row, unless it is 0 or None everywhere."""
        temperatures = {}
        for row in results:
            if value := value_of(row):
                at = [] if row["temperature"] is None else [f"T {row['temperature']:g}"]
                temperatures.setdefault(value, []).extend(at)
        if temperatures:
            values = (f"{v} ({', '.join(at)})" if at else f"{v}" for v, at in temperatures.items())
            lines.append(f"{text}: {', '.join(values)}")

    thoughts = {True: "left out", False: "judged, too: see --strip_thinking", None: "judged, too"}
    thoughts = thoughts[results[0]["strip_thinking"]]
    for key, words in NOTICED.items():
        words += f" (their thinking is {thoughts})" if key == "thinking" else ""
        add(words, itemgetter(key))
        add(f"of the baseline, {words}", itemgetter(f"{key}_baseline"))
    add("prompts left out, because they have no verdict", itemgetter("unjudged"))
    add("no length-controlled rate", without_control)
    add("WARNING: the length-controlled rate is far from the win rate", far_apart)
    return lines


def without_control(row: dict) -> str | None:
    """Returns why a row of results.json has a win rate, but no length-controlled one."""
    if row["win_rate"] is None or row["lc_win_rate"] is not None:
        return None
    if row["n"] < LEAST_N:
        return f"{row['n']} prompts are fewer than {LEAST_N}"
    return "all preferences, or all differences in length, are equal"


def far_apart(row: dict) -> str | None:
    """Returns both rates of a row of results.json if they are so far apart that AlpacaEval warns:
    by more than 10 points and by more than a quarter of the room on that side."""
    win, lc = row["win_rate"], row["lc_win_rate"]
    if lc is None or abs(lc - win) <= max(10, (win if lc < win else 100 - win) / 4):
        return None
    return f"{lc:.1f} and {win:.1f}"
