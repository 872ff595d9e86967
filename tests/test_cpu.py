"""Claims about cpu.py: the user's settings win, and where Linux's calls are missing all falls back.

python -m pytest -q tests/test_cpu.py
"""

import cpu

import ctypes
import math
import os
import re
import resource
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import distributed
import report
import settings
import train_ganpo
from helpers import ROOT, run
from miniature import world

CPU = torch.device("cpu")


def no_file(*_, **__):
    raise FileNotFoundError("no such file here")


@pytest.fixture
def own(monkeypatch):
    """Sets variables as the user or torchrun would, and removes those of this process."""
    for name in [*os.environ]:
        if name.startswith(("OMP_", "GOMP_", "MALLOC_")) or name == "LOCAL_WORLD_SIZE":
            monkeypatch.delenv(name)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


# ---------------------------------------------------------------------- cores and threads


@pytest.mark.parametrize(
    "limit, expected", [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), (None, 8)]
)
def test_threads_follow_the_cores_that_a_container_may_use(limit, expected, own, monkeypatch):
    def read(path):
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        if limit is None:
            raise FileNotFoundError
        return limit + "\n"

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(Path, "read_text", read)
    assert cpu.cores() == cpu.chosen_threads(miniature=False) == expected


def test_without_linux_the_cores_are_the_machines(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(Path, "read_text", no_file)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpu.cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu.cores() == 1


@pytest.mark.parametrize("variables, of_miniature, of_others", [
    ({}, 2, 64),
    ({"OMP_NUM_THREADS": "5"}, None, None),  # the user's own
    ({"OMP_NUM_THREADS": "1"}, None, None),
    ({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, None, None),
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 1, 32),  # torchrun's 1 is nobody's wish
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, None, None),
    ({"LOCAL_WORLD_SIZE": "8"}, 1, 8),
    ({"LOCAL_WORLD_SIZE": "100"}, 1, 1),
])  # fmt: skip
def test_the_users_number_of_threads_wins_and_the_miniatures_is_a_constant(
    variables, of_miniature, of_others, own, monkeypatch
):
    own(**variables)
    for cores in (64, 1):
        monkeypatch.setattr(cpu, "cores", lambda cores=cores: cores)
        assert cpu.chosen_threads(miniature=True) == of_miniature  # whatever the machine
        if cores == 64:
            assert cpu.chosen_threads(miniature=False) == of_others


def test_a_session_has_the_chosen_threads(own, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "cores", lambda: 3)
    try:
        for miniature, expected in ((False, 3), (True, 2)):
            with distributed.session(9, miniature):
                assert torch.get_num_threads() == expected
        own(OMP_NUM_THREADS="7")
        with distributed.session(9, True):
            assert torch.get_num_threads() == 2  # left as it was
    finally:
        torch.set_num_threads(before)


def test_mkl_is_called_first_on_one_thread(monkeypatch, tmp_path):
    """Two threads at once may compute with less accuracy, see test_reliability.py."""

    class FirstCall(Exception):
        pass

    def first(*_):
        raise FirstCall

    monkeypatch.setattr(torch.Tensor, "cos", first)
    with pytest.raises(FirstCall), distributed.session(9):
        pass
    with pytest.raises(FirstCall):
        world.build(5, tmp_path, log=lambda line: None)


# ---------------------------------------------------------------------- how threads wait


@pytest.mark.parametrize("variables, expected", [
    ({}, ("3000", True)),
    ({"GOMP_SPINCOUNT": "5"}, ("5", False)),
    ({"OMP_WAIT_POLICY": "passive"}, ("None", False)),
])  # fmt: skip
def test_the_users_spin_count_wins(variables, expected, own):
    code = "import cpu, os; print(os.environ.get('GOMP_SPINCOUNT'), cpu.SPIN_COUNT_IS_OURS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **variables},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.split() == [str(x) for x in expected], done.stderr


# ---------------------------------------------------------------------- memory


class Library:
    def __init__(self, calls):
        self.mallopt = lambda *parameters: calls.append(parameters) or 1
        self.malloc_trim = lambda pad: calls.append("trimmed")


def without_mallopt(name):
    return object()


def without_a_library(name):
    raise OSError("no C library of that name")


def test_freed_memory_is_kept_unless_the_user_or_the_system_says_otherwise(own, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "freed_memory_is_kept", False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(calls))
    own(MALLOC_ARENA_MAX="2")
    cpu.keep_freed_memory()
    assert calls == [] and cpu.freed_memory_is_kept is False
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    own(GLIBC_TUNABLES="glibc.malloc.check=1")
    cpu.keep_freed_memory()
    assert calls == [] and cpu.freed_memory_is_kept is False
    monkeypatch.delenv("GLIBC_TUNABLES")
    cpu.keep_freed_memory()
    assert sorted(calls) == [(-4, 0), (-1, -1)] and cpu.freed_memory_is_kept is True


@pytest.mark.parametrize("kept, checkpointing", product([True, False], repeat=2))
def test_with_checkpointing_kept_memory_is_given_back_before_backward(
    kept, checkpointing, monkeypatch
):
    calls = []
    monkeypatch.setattr(cpu, "freed_memory_is_kept", kept)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(calls))
    run = SimpleNamespace(args=SimpleNamespace(lambda_adv=0, checkpointing=checkpointing), ranks=1)
    loss = torch.ones((), requires_grad=True)
    loss.register_hook(lambda gradient: calls.append("backward"))
    train_ganpo.backward(run, loss, 0)
    assert calls == ["trimmed"] * (kept and checkpointing) + ["backward"]


@pytest.mark.parametrize("library", [without_mallopt, without_a_library])
def test_without_mallopt_the_allocator_is_left_alone(library, own, monkeypatch):
    monkeypatch.setattr(cpu, "freed_memory_is_kept", False)
    monkeypatch.setattr(ctypes, "CDLL", library)
    cpu.keep_freed_memory()
    assert cpu.freed_memory_is_kept is False


def test_memory_is_measured_where_linux_keeps_no_high_water_mark(monkeypatch):
    read, usual = Path.read_text, report.peak_gb(CPU)
    monkeypatch.setattr(Path, "read_text", lambda p: read(p).replace("VmHWM", "VmOther"))
    assert 0.1 < usual == pytest.approx(report.peak_gb(CPU), rel=0.5)
    monkeypatch.setattr(Path, "read_text", no_file)  # as where there is no /proc
    assert usual == pytest.approx(report.peak_gb(CPU), rel=0.5)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", "darwin")  # counts bytes
    assert report.peak_gb(CPU) == pytest.approx(most / 2**30, rel=0.1)


def test_the_memory_of_a_rank_is_its_share_of_the_smallest_limit(own, monkeypatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(Path, "read_text", no_file)
    assert distributed.available_memory(CPU) == 2**32
    monkeypatch.setattr(Path, "read_text", lambda path: "max\n")
    assert distributed.available_memory(CPU) == 2**32
    monkeypatch.setattr(Path, "read_text", lambda path: f"{2**31}\n")
    assert distributed.available_memory(CPU) == 2**31
    own(LOCAL_WORLD_SIZE="4")
    assert distributed.available_memory(CPU) == 2**29

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    monkeypatch.setattr(Path, "read_text", no_file)
    assert distributed.available_memory(CPU) == math.inf  # nothing is refused


# ---------------------------------------------------------------------- AMX


@pytest.mark.parametrize(
    "flags, expected", [("flags : fpu amx_bf16 amx_tile", True), ("flags : fpu", False), (None, 0)]
)
def test_amx_is_read_from_the_cpus_flags(flags, expected, monkeypatch):
    monkeypatch.setattr(Path, "read_text", (lambda path: flags) if flags else no_file)
    assert cpu.has_amx() == expected


@pytest.mark.parametrize("gpu, amx", [(False, False), (False, True), (True, False)])
def test_the_small_real_model_computes_in_bfloat16_where_that_is_fast(gpu, amx, monkeypatch):
    preset = settings.parse_args(["--preset=smollm2-135m-instruct"])
    assert preset.dtype == settings.fast_dtype() and preset.disc_hidden == preset.max_length == 512
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    assert settings.fast_dtype() == ("bfloat16" if gpu or amx else "float32")


# ---------------------------------------------------------------------- the header


def test_the_header_says_what_was_chosen(own, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(cpu, "cores", lambda: 8)
    monkeypatch.setattr(cpu, "SPIN_COUNT_IS_OURS", True)
    monkeypatch.setattr(cpu, "freed_memory_is_kept", True)
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    own(GOMP_SPINCOUNT="10000")
    assert report.compute_line(CPU) == (
        "device: cpu, AMX for bfloat16, 3 threads per process of 8 cores, GOMP_SPINCOUNT 10000;"
        " freed memory is kept"
    )
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    assert report.compute_line(CPU).startswith("device: cpu, no AMX, 3 threads ")
    own(GOMP_SPINCOUNT="7")
    monkeypatch.setattr(cpu, "SPIN_COUNT_IS_OURS", False)
    monkeypatch.setattr(cpu, "freed_memory_is_kept", False)
    assert "GOMP_SPINCOUNT 7 (your own setting); freed memory is given back" in (
        report.compute_line(CPU)
    )
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert "GOMP_SPINCOUNT not set (your own setting)" in report.compute_line(CPU)


def test_a_runs_header_has_that_line(tiny_world, tmp_path, capsys):
    run(tiny_world, tmp_path / "r", "--max_steps=1")
    found = re.findall(r"^device: cpu, .*AMX.*, (\d+) threads.*; float32; attention: loop$",
                       capsys.readouterr().out, re.M)  # fmt: skip
    assert found == [str(torch.get_num_threads())] and not dist.is_initialized()
