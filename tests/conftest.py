"""Set-up of all tests: one thread per process, and the fixtures that several files share."""

import os
import shutil

# On a busy machine threads wait for each other. What the tests start as a command of its own does
# not inherit this (helpers.command).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cpu  # noqa: E402, I001  must come before torch

import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers")

from helpers import SMALL, build_small_worlds, make_model, make_rows  # noqa: E402


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder with a model of each of two families, preference rows and held-out rows."""
    folder = tmp_path_factory.mktemp("tiny")
    for family in ("llama", "gemma2"):
        make_model(folder / family, family)
    make_rows(folder / "train.jsonl", 28)
    make_rows(folder / "test.jsonl", 11, seed=1)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A world of the miniature that takes seconds to build, seed 0.

    Test processes that run side by side share one: the first builds it, the others wait.
    """
    from miniature import world

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MINIATURE_THREADS", 1)
        return world.build(0, root / "mini", log=lambda line: None, sizes=SMALL)


@pytest.fixture
def mini(small, tmp_path, monkeypatch):
    """A folder to run in, where the miniature is that small world and others are as small."""
    shutil.copytree(small, tmp_path / "out" / "mini" / "seed0")
    build_small_worlds(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path
