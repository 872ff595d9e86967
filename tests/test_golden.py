"""The golden trajectory: ten steps of GANPO whose numbers are committed in data/golden.csv.

python -m pytest -q tests/test_golden.py
python tests/test_golden.py        # writes data/golden.csv anew
"""

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # pytest has these folders on its path
    sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import report
from helpers import DATA, close, make_model, rows_of, run

GOLDEN = DATA / "golden.csv"


def golden_run(folder, *more):
    """Ten steps of GANPO(DPO) in float64 from a random Llama on committed rows; returns metrics."""
    model = AutoModelForCausalLM.from_pretrained(make_model(folder / "llama"))
    rng = np.random.default_rng(0)  # the same numbers on every machine, unlike torch's
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(0.2 * rng.standard_normal(p.shape) + (p.dim() == 1)))
    model.save_pretrained(folder / "llama")
    shutil.copy(DATA / "golden_rows.jsonl", folder / "train.jsonl")
    settings = "--dtype=float64", "--lr=1e-3", "--disc_lr=1e-3", "--max_steps=10", "--epochs=4"
    rows, _ = run(folder, folder / "run", *settings, *more)
    return rows


def test_ten_steps_follow_the_committed_trajectory(tmp_path):
    # divided otherwise than the committed run, so that its rounding errors differ
    found, golden = golden_run(tmp_path, "--micro_batch_size=3"), rows_of(GOLDEN)
    assert len(golden) == 10 and golden[-1]["loss_opo"] < golden[0]["loss_opo"] - 0.05
    for a, b in zip(golden, found, strict=True):
        close(a, {k: v for k, v in b.items() if k in a}, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["avx2", "default"])
def test_another_cpu_model_follows_the_same_trajectory(instructions):
    """The libraries' code for older CPUs adds products in another order."""
    mkl = {"avx2": "AVX2", "default": "SSE4_2"}[instructions]
    older = {"ATEN_CPU_CAPABILITY": instructions, "MKL_ENABLE_INSTRUCTIONS": mkl}
    command = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    said = subprocess.check_output([sys.executable, "-c", command], env=os.environ | older)
    assert said.decode().strip().lower() == instructions
    name = f"{__file__}::{test_ten_steps_follow_the_committed_trajectory.__name__}"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", name]
    subprocess.run(command, env=os.environ | older, check=True, cwd=Path(__file__).parents[1])


def write_golden():
    with tempfile.TemporaryDirectory() as folder:
        rows = golden_run(Path(folder))
    exact = rows[0].keys() - {"seconds", "tokens_per_s", "peak_gb"}
    with GOLDEN.open("w", newline="") as file:
        columns = [k for k in report.COLUMNS if k in exact]
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.9g}" for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    write_golden()
