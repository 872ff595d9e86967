"""IFEval's accuracies (arXiv 2311.07911) of answers, by the official checks that lm_eval brings.

    python -m venv ifeval && ifeval/bin/pip install 'lm_eval[ifeval]==0.4.13'
    ifeval/bin/python -m tools.ifeval out/run-001/eval-IFEval-ifeval/model-T*.json google/IFEval

lm_eval needs neither torch nor transformers for this, so it can have an environment of its own, and
this file imports neither. The answers are files in AlpacaEval's format, as eval_alpaca.py writes
them; the last argument is IFEval's prompts, a .jsonl file or a data set of the Hub.

    checks = Checks(prompts)                   # rows of IFEval's file
    found = [checks(row, text) for row, text in zip(prompts, texts)]
    accuracies(found)["prompt strict"]         # percent and its standard error

For the difference of two models, the same prompts are compared: winrate.standard_error of the
differences of all(found["strict"]).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from winrate import standard_error

COLUMNS = ("prompt strict", "prompt loose", "instruction strict", "instruction loose")


class Checks:
    """The checks of prompts, which are rows with prompt, instruction_id_list and kwargs.

    skipped says, by name, of which checks the own data cannot be loaded and why: two need nltk's
    punkt_tab. They are left out for all answers. Raises ImportError if lm_eval is not installed,
    and ValueError if a row does not name its checks or names one that lm_eval does not have.
    """

    def __init__(self, prompts: list[dict]):
        import langdetect
        from lm_eval.tasks.ifeval import instructions_registry, utils

        langdetect.DetectorFactory.seed = 0  # else the same text may be one language or another
        self.utils, self.skipped = utils, {}
        for i, row in enumerate(prompts):
            names, settings = row.get("instruction_id_list"), row.get("kwargs")
            if not isinstance(names, list) or not isinstance(settings, list):
                raise ValueError("prompts need instruction_id_list and kwargs")
            known = [*instructions_registry.INSTRUCTION_DICT]
            if len(names) != len(settings) or any(name not in known for name in names):
                raise ValueError(f"prompt {i} has checks that lm_eval does not know: {names}")
            for place, name in enumerate(names):
                if name in self.skipped:
                    continue
                try:
                    self.passed(row, "A text. And more.", "strict", [place])
                except Exception as error:
                    if type(error) is not LookupError:  # by which nltk says that it lacks data
                        refused = f"prompt {i}: {name} refuses its kwargs: {error}"
                        raise ValueError(refused) from None
                    self.skipped[name] = " ".join(str(error).strip("*\n ").split())[:60]

    def __call__(self, row: dict, text: str) -> dict[str, list[bool]]:
        """Returns which checks of a prompt the answer passes: a list for strict, one for loose."""
        names = row["instruction_id_list"]
        places = [i for i, name in enumerate(names) if name not in self.skipped]
        return {how: self.passed(row, text, how, places) for how in ("strict", "loose")}

    def passed(self, row: dict, text: str, how: str, places: list[int]) -> list[bool]:
        """Returns whether a text passes the checks at these places of the row's list."""
        names, settings = ([row[k][i] for i in places] for k in ("instruction_id_list", "kwargs"))
        one = self.utils.InputExample(0, names, row["prompt"], settings)
        test = getattr(self.utils, f"test_instruction_following_{how}")
        return test(one, text).follow_instruction_list


def accuracies(found: list[dict]) -> dict[str, tuple[float, float]]:
    """Returns the accuracies COLUMNS in percent, each with its standard error over prompts.

    found has, for each prompt, what Checks returns; a prompt without a check does not count. The
    checks of one prompt are not independent: the error of an accuracy by instruction is that of a
    ratio of two sums over prompts.
    """
    result = {}
    for column in COLUMNS:
        unit, how = column.split()
        lists = [one[how] for one in found if one[how]]
        passed, n = (np.array([f(x) for x in lists], dtype=float) for f in (sum, len))
        if unit == "prompt":
            passed, n = (passed == n).astype(float), np.ones(len(n))
        rate = passed.sum() / n.sum()
        error = standard_error((passed - rate * n) / n.mean())
        result[column] = 100 * float(rate), 100 * float(error)
    return result


def read_rows(path: str, keys: tuple[str, ...]) -> list[dict]:
    """Returns the rows of a .json list or .jsonl file; raises ValueError unless all have keys."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip()[:1] == "[" else None
        rows = rows or [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    for i, row in enumerate(rows):
        if missing := [k for k in keys if not isinstance(row, dict) or k not in row]:
            raise ValueError(f"{path}: row {i} has no {missing[0]}")
        if not isinstance(row[keys[0]], str):
            raise ValueError(f"{path}: row {i} has no text as {keys[0]}")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_prompts(name: str) -> list[dict]:
    """Returns IFEval's prompts from a file, or from a data set of the Hub."""
    if Path(name).exists():
        return read_rows(name, ("prompt", "instruction_id_list", "kwargs"))
    from datasets import load_dataset  # lm_eval needs it, too

    try:
        return list(load_dataset(name, split="train"))
    except Exception as error:  # of many kinds
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name}: no such file, nor a data set that can be read: {reason}"
        ) from None


def answers_to(prompts: list[dict], path: str) -> list[str]:
    """Returns the answers of a file, one to each prompt; raises ValueError unless all are there."""
    rows = read_rows(path, ("instruction", "output"))
    found = {row["instruction"]: row["output"] for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"{path}: {len(rows) - len(found)} instructions occur twice")
    texts = [found.get(row["prompt"]) for row in prompts]
    if bad := sum(not isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: {bad} of {len(prompts)} prompts have no answer")
    if len(found) > len(prompts):
        raise ValueError(f"{path}: {len(found) - len(prompts)} answers are to no prompt")
    return texts


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    parser = argparse.ArgumentParser("tools.ifeval", description=__doc__.split("\n\n")[0])
    parser.add_argument("answers", nargs="+", help="files that eval_alpaca.py has written")
    parser.add_argument("prompts", help="IFEval's prompts: a file, or google/IFEval")
    args = parser.parse_args(argv)
    try:
        prompts = read_prompts(args.prompts)
        texts = {path: answers_to(prompts, path) for path in args.answers}
        checks = Checks(prompts)
    except ImportError as error:
        sys.exit(f"tools.ifeval needs lm_eval: pip install 'lm_eval[ifeval]' ({error})")
    except (OSError, ValueError) as error:
        sys.exit(f"tools.ifeval: {error}")
    for name, reason in checks.skipped.items():
        print(f"check {name} is skipped: {reason}")
    print("accuracy in percent +- standard error over prompts")
    print("prompts" + "".join(column.rjust(20) for column in COLUMNS) + "  answers")
    for path, of_path in texts.items():
        found = [checks(row, text) for row, text in zip(prompts, of_path, strict=True)]
        cells = (
            f"{rate:.1f} +- {error:.1f}".rjust(20) for rate, error in accuracies(found).values()
        )
        print(f"{sum(bool(one['strict']) for one in found):>7}{''.join(cells)}  {path}")


if __name__ == "__main__":
    main()
