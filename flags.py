"""What the programs' command lines share: numbers with bounds, and errors in one line."""

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from data import InputError, half_a_character

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def world_folder(seed: int, root: str | Path = "out/mini") -> Path:
    """Returns the folder of a world of the miniature: a seed's data and reference model."""
    return Path(root) / f"seed{seed}"


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """Returns a type for argparse: a finite number of that kind in [low, high].

    With above=True the number must be greater than low. The type raises ArgumentTypeError, which
    argparse shows as an error of one line.
    """

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid {kind.__name__}") from None
        # `not (low <= value)` is also true for nan
        if not low <= value <= high or value == math.inf or above and value == low:
            left, right = "(" if above else "[", ")" if high == math.inf else "]"
            raise argparse.ArgumentTypeError(f"{text} is not in {left}{low}, {high}{right}")
        return value

    return parse


positive, fraction = number(float, 0, above=True), number(float, 0, 1)
at_least_0, count, natural = number(float, 0), number(int, 1), number(int, 0, 2**63 - 1)
seconds = number(float, 0, 1e9, above=True)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help fits one screen and whose errors are InputErrors of one line.

    Flags must be written in full: an abbreviation could change its meaning with a new flag.
    """

    def __init__(self, program: str, about: str, usage: str | None = None):
        layout = partial(argparse.HelpFormatter, max_help_position=32, width=100)
        settings = dict(usage=usage, description=about.split("\n\n")[0], allow_abbrev=False)
        super().__init__(program, formatter_class=layout, **settings)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        for before, word in zip(["", *words], words, strict=False):
            if half_a_character(word):
                raise InputError(f"{ascii(word)} is no valid UTF-8: it holds half a character")
            if word.startswith("--") and word.endswith("="):
                raise InputError(f"{word[:-1]}: its value is empty")
            if not word.strip():
                flag = before.startswith("--") and "=" not in before
                raise InputError(
                    f"{before}: its value is empty" if flag else "an argument is empty"
                )
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise InputError(message)


def given_flags(argv: list[str]) -> set[str]:
    """Returns the names of the flags that stand on a command line, without their dashes."""
    return {word[2:].split("=")[0] for word in argv if word.startswith("--")}


def command_line(argv: list[str] | None, *program: str) -> tuple[list[str], list[str]]:
    """Returns how this program was started (a file, or -m and a module) and its arguments.

    If argv is None, both are those of the process, so a file that calls main() of another one gets
    its own name. Otherwise they are `program` and argv.
    """
    if argv is not None:
        return [*program], argv
    module = sys.modules["__main__"].__spec__
    return ["-m", module.name] if module else sys.argv[:1], sys.argv[1:]


def refuse(program: list[str], error: Exception):
    """Ends the program with exit status 1; rank 0 prints one line, which begins with its name.

    program is that of command_line. All ranks find such errors.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "")
    together = rank.isdigit() and ranks.isdigit() and int(rank) < int(ranks)
    alone = not together or "MASTER_ADDR" not in os.environ  # no rank 0 would speak for this one
    sys.exit(f"{Path(program[-1]).name}: {error}" if rank == "0" or alone else 1)
