"""What the programs' command lines share: numbers with bounds, errors in one line."""

import argparse
import math
import os
import sys
from functools import partial

import torch
import torch.distributed as dist

from data import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number in [low, high], or above low."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not low <= value <= high or value == math.inf or above and value == low:  # or nan
            ends = "(" if above else "[", ")" if high == math.inf else "]"
            raise argparse.ArgumentTypeError(f"{text} is not in {ends[0]}{low}, {high}{ends[1]}")
        return value

    return parse


positive, fraction = number(float, 0, above=True), number(float, 0, 1)
at_least_0, count, natural = number(float, 0), number(int, 1), number(int, 0)


class Parser(argparse.ArgumentParser):
    """Flags in full and a help of one screen; an error is an InputError, not a page of usage."""

    def __init__(self, program, about, usage=None):
        layout = partial(argparse.HelpFormatter, max_help_position=32, width=100)
        settings = dict(usage=usage, description=about.split("\n\n")[0], allow_abbrev=False)
        super().__init__(program, formatter_class=layout, **settings)

    def error(self, message):
        raise InputError(message)


def refuse(program: str, error: Exception):
    """Ends a program that cannot go on. All ranks find such errors, one speaks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(f"{program}: {error}" if os.environ.get("RANK", "0") == "0" else 1)
