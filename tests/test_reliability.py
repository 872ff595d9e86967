"""Claims about what survives: resume, states on disk, signals, lost ranks, kills, full disks.

    python -m pytest -q tests/test_reliability.py -m "not slow"
    python tests/test_reliability.py --kills 200    # kill -9 that often, resume, compare weights

The real program runs in this process or in forked ones.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # pytest has these folders on its path
    sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]

import cpu

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import checkpoint
import distributed
import reward_model
import train_ganpo
from data import load_pairs
from flags import command_line
from generate import show_error
from helpers import (
    ROOT,
    close,
    command,
    flags,
    furthest,
    join,
    json_of,
    make_model,
    make_rows,
    rows_of,
    run,
    slow,
    spawn,
    tiny,
    wait_for,
)
from losses import OPO_LOSSES
from packing import batch_indices, plan_forwards


def has_rows(out, n):
    """Whether a run has written that many rows of metrics.csv."""
    path = Path(out) / "metrics.csv"
    return path.exists() and path.read_bytes().count(b"\n") > n


def states(out):
    return sorted(f.name for f in (out / "state").iterdir())


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "stop, loss, decay, ranks",
    [
        (2, "dpo", 0.9, 2), (2, "simpo", 0, 1), (3, "dpo", 0.9, 1),
        (3, "simpo", 0, 2), slow(2, "dpo", 0.9, 1), slow(2, "simpo", 0, 2),
        slow(3, "dpo", 0.9, 2), slow(3, "simpo", 0, 1),
    ],
)  # fmt: skip
def test_stop_and_resume_equal_an_undisturbed_run_bit_for_bit(
    stop, loss, decay, ranks, tiny_world, tmp_path
):
    """Within an epoch and at the first step of the second one (3 steps), with the critics' dropout
    as noise."""
    more = (f"--loss={loss}", f"--ema_decay={decay}", "--epochs=2", "--disc_dropout=0.3",
            "--micro_batch_size=2", "--disc_every=2")  # fmt: skip
    straight, weights = run(tiny_world, tmp_path / "a", *more, ranks=ranks)
    run(tiny_world, tmp_path / "b", *more, f"--stop_after={stop}", ranks=ranks)
    assert len(rows_of(tmp_path / "b" / "metrics.csv")) == stop
    rows, again = run(tiny_world, tmp_path / "b", *more, "--resume", ranks=ranks)
    assert furthest(weights, again) == 0
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(straight, rows, strict=True):
        close(a, b, 0)


@pytest.mark.parametrize("first, then", [(1, 2), slow(2, 1)])
def test_another_number_of_ranks_continues_with_the_same_metrics(first, then, tiny_world, tmp_path):
    more = ("--epochs=2", "--lr=3e-4")
    straight, _ = run(tiny_world, tmp_path / "a", *more, ranks=first)
    run(tiny_world, tmp_path / "b", *more, "--stop_after=4", ranks=first)
    rows, _ = run(tiny_world, tmp_path / "b", *more, "--resume", ranks=then)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(straight, rows, strict=True):
        close(a, b, 1e-5)


def test_resuming_a_finished_run_says_so_and_changes_nothing(tiny_world, tmp_path, capsys):
    run(tiny_world, tmp_path / "r", "--max_steps=2")
    before = {f: f.read_bytes() for f in (tmp_path / "r").rglob("*") if f.is_file()}
    train_ganpo.main(flags(tiny_world, tmp_path / "r", "--max_steps=2", "--resume"))
    assert "has finished its 2 steps: nothing to do" in capsys.readouterr().out
    after = {f: f.read_bytes() for f in (tmp_path / "r").rglob("*") if f.is_file()}
    assert before == after


def test_a_run_that_ended_before_its_export_exports_when_resumed(
    six_steps, tiny_world, tmp_path, monkeypatch
):
    """Even where an earlier end has left an export of fewer steps."""
    more = ("--epochs=2",)
    _, weights = six_steps
    run(tiny_world, tmp_path / "r", *more, "--stop_after=3")

    def end(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export_policy", end)
        with pytest.raises(KeyboardInterrupt):
            train_ganpo.main(flags(tiny_world, tmp_path / "r", *more, "--resume"))
    torch.distributed.destroy_process_group()
    _, again = run(tiny_world, tmp_path / "r", *more, "--resume")
    assert furthest(weights, again) == 0


@pytest.fixture(scope="module")
def six_steps(tiny_world, tmp_path_factory):
    """Rows and weights of an undisturbed run of two epochs."""
    return run(tiny_world, tmp_path_factory.mktemp("six") / "r", "--epochs=2")


@pytest.fixture(scope="module")
def stopped(tiny_world, tmp_path_factory):
    """A run of 6 steps, stopped after 2; beside it its model again, other data, other models."""
    out = tmp_path_factory.mktemp("stopped") / "r"
    run(tiny_world, out, "--epochs=2", "--stop_after=2")
    make_rows(out.parent / "other.jsonl", 28, seed=7)
    make_model(out.parent / "other", seed=7)
    for name in ("same", "rope"):
        shutil.copytree(tiny_world / "llama", out.parent / name)
    write_config(out.parent / "rope", rope_parameters={"rope_theta": 7.0, "rope_type": "default"})
    shutil.copytree(tiny_world / "llama", out.parent / "stops")
    (out.parent / "stops" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return out


CHANGED = [
    ("lr", "0.003", ["--lr=1e-3", "--disc_lr=0.03"]),
    ("seed", "0", ["--seed=1"]),
    ("batch_size", "8", ["--batch_size=4", "--max_steps=6"]),
    ("loss", "dpo", ["--loss=ipo"]),
    ("lambda_adv", "0.1", ["--lambda_adv=0.2"]),
    ("beta", "0.1", ["--beta=0.2"]),
    ("ema_decay", "0.9", ["--ema_decay=0"]),
    ("critic", "transformer", ["--critic=mlp"]),
    ("disc_hidden", "16", ["--disc_hidden=32"]),
    ("disc_lr", "0.03", ["--disc_lr=0.02"]),
    ("max_length", "64", ["--max_length=63"]),
    ("grad_clip", "1.0", ["--grad_clip=2"]),
    ("total_steps", "6", ["--epochs=3"]),
    ("dtype", "float32", ["--dtype=bfloat16"]),
    (
        r"the data are not those that the run began with \(.*tokenizer.*\): the fingerprint",
        r"\w{16}", ["--dataset=DIR/other.jsonl"],
    ),
    *(
        (
            rf"DIR/{folder} {other} than the run began with: the fingerprint",
            r"\w{16}", [f"--model=DIR/{model}", f"--ref_model=DIR/{ref}"],
        )
        for folder, other, model, ref in (
            ("other", "holds other weights", "other", "same"),
            ("other", "holds other weights", "same", "other"),
            ("other", "holds other weights", "other", "other"),
            ("rope", "has another config.json or generation_config.json", "rope", "same"),
            ("rope", "has another config.json or generation_config.json", "same", "rope"),
            ("stops", "has another config.json or generation_config.json", "stops", "same"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("name, old, change", CHANGED, ids=lambda x: str(x)[:60])
def test_settings_that_change_the_result_are_refused_by_name(
    name, old, change, stopped, tiny_world, monkeypatch
):
    name, *change = (word.replace("DIR", str(stopped.parent)) for word in (name, *change))
    argv = flags(tiny_world, stopped, "--resume", "--epochs=2", *change)
    before = {f: f.stat().st_mtime_ns for f in stopped.rglob("*") if f.name != ".lock"}
    monkeypatch.setattr(train_ganpo, "build", None)  # before a weight is read
    with pytest.raises(SystemExit, match=rf"--resume: {name} was {old}[^;]*, is now [^;]*$"):
        train_ganpo.main(argv)
    assert before == {f: f.stat().st_mtime_ns for f in stopped.rglob("*") if f.name != ".lock"}


@pytest.mark.slow
@pytest.mark.skipif(cpu.cores() < 2, reason="one core has one thread")
def test_every_process_on_two_threads_gives_the_same_bits(small, tmp_path):
    """Before MKL was called first on one thread, one of ten processes gave others."""
    settings = "--batch_size=8 --max_steps=3 --eval_every=0 --max_length=256 --lr=1e-4".split()
    settings += [f"--model={small / 'model'}", f"--dataset={small / 'train.jsonl'}"]

    def weights(out, *more):
        done = command(ROOT / "train_ganpo.py", *settings, f"--out_dir={tmp_path / out}", *more)
        assert done.returncode == 0, done.stderr
        return (tmp_path / out / "hf" / "model.safetensors").read_bytes()

    undisturbed = weights("undisturbed")
    weights("stopped", "--stop_after=1")
    for i in range(10):
        shutil.copytree(tmp_path / "stopped", tmp_path / f"{i}")
        assert weights(f"{i}", "--resume") == undisturbed, i


def test_a_model_and_data_that_have_moved_continue_bit_for_bit(
    six_steps, stopped, tiny_world, tmp_path, capsys
):
    """Also in other files, and with a config.json that another version has written."""
    shutil.copytree(stopped, tmp_path / "r")
    for name in ("moved", "in_files"):
        shutil.copytree(tiny_world / "llama", tmp_path / name)
    shutil.copy(tiny_world / "train.jsonl", tmp_path / "moved.jsonl")
    (tmp_path / "in_files" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_world / "llama").save_pretrained(
        tmp_path / "in_files", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "in_files").glob("*.safetensors"))) > 2
    write_config(tmp_path / "in_files", transformers_version="9.0.0", _name_or_path="elsewhere")
    places = {"model": "moved", "ref_model": "in_files", "dataset": "moved.jsonl"}
    more = [f"--{flag}={tmp_path / name}" for flag, name in places.items()]
    rows, again = run(tiny_world, tmp_path / "r", "--epochs=2", "--resume", *more)
    assert "not bit for bit" not in capsys.readouterr().out
    assert furthest(six_steps[1], again) == 0
    for a, b in zip(six_steps[0], rows, strict=True):
        close(a, b, 0)


def test_a_reference_that_is_not_used_may_be_any(stopped, tiny_world, tmp_path):
    more = ("--loss=simpo", "--lambda_adv=0")
    run(tiny_world, tmp_path / "r", *more, "--stop_after=1")
    other = f"--ref_model={stopped.parent / 'other'}"
    rows, _ = run(tiny_world, tmp_path / "r", *more, other, "--resume")
    assert len(rows) == 3


def test_a_reward_model_is_resumed_from_the_weights_that_it_began_with(
    stopped, tiny_world, tmp_path
):
    argv = [f"--dataset={tiny_world / 'train.jsonl'}", f"--out_dir={tmp_path / 'r'}",
            "--batch_size=8", "--max_length=64", "--save_every=1"]  # fmt: skip
    reward_model.main([*argv, f"--model={tiny_world / 'llama'}"])
    shutil.rmtree(tmp_path / "r" / "state" / "step-000003")
    with pytest.raises(SystemExit, match="other holds other weights than the run began with"):
        reward_model.main([*argv, f"--model={stopped.parent / 'other'}", "--resume"])
    before = load_file(tmp_path / "r" / "hf" / "model.safetensors")
    reward_model.main([*argv, f"--model={stopped.parent / 'same'}", "--resume"])
    assert furthest(before, load_file(tmp_path / "r" / "hf" / "model.safetensors")) == 0


# ---------------------------------------------------------------------- fingerprints of weights


def write_config(folder, **changes):
    """Changes a model's config.json, key by key."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def tensors(**changes):
    """A few weights, one of them longer than what a fingerprint reads of it."""
    g = torch.Generator().manual_seed(0)
    return {"a": torch.randn(4, 6, generator=g), "b": torch.randn(4000, generator=g)} | changes


def changed(name, i):
    x = tensors()[name]
    x.view(-1)[i] += 1e-6
    return {name: x}


WEIGHTS = {
    "first value": tensors(**changed("b", 0)),
    "last value": tensors(**changed("b", -1)),
    "middle of a short one": tensors(**changed("a", 12)),
    "shape": tensors(a=tensors()["a"].view(6, 4)),
    "type": tensors(a=tensors()["a"].view(torch.int32)),
    "name": {"c" if k == "a" else k: v for k, v in tensors().items()},
    "one fewer": {"a": tensors()["a"]},
    "one more": tensors(c=torch.zeros(1)),
    "swapped": {"a": tensors()["b"], "b": tensors()["a"]},
}
SAVE = {
    "model.safetensors": save_file,
    "pytorch_model.bin": torch.save,
    "old pytorch_model.bin": partial(torch.save, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", SAVE)
def test_a_fingerprint_is_that_of_the_weights_and_not_of_their_place(kind, tmp_path):
    def fingerprint(name, weights):
        folder = tmp_path / name
        folder.mkdir()
        SAVE[kind](weights, folder / kind.split()[-1])
        return checkpoint.weights_fingerprint(folder)

    same = fingerprint("a", tensors())
    if not kind.startswith("old"):  # whose pickles hold addresses in memory
        assert same == fingerprint("b", tensors())
    others = {fingerprint(name, weights) for name, weights in WEIGHTS.items()}
    assert same not in others and len(others) == len(WEIGHTS)
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert same == checkpoint.weights_fingerprint(tmp_path / "moved")


def test_files_of_any_size_take_a_moment(tmp_path):
    """Here 16 GB in a file that takes no room on the disk."""
    size, n = 2**24, 1024
    layer = {"dtype": "F32", "shape": [size // 4]}
    header = {f"{i}": layer | {"data_offsets": [i * size, (i + 1) * size]} for i in range(n)}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + n * size)
    begin = time.monotonic()
    before = checkpoint.weights_fingerprint(tmp_path)
    assert time.monotonic() - begin < 1
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert checkpoint.weights_fingerprint(tmp_path) != before


@pytest.mark.parametrize("files", [{}, {"max_shard_size": "20KB"}])
def test_a_hub_id_is_known_by_its_cached_files(files, tiny_world, tmp_path, monkeypatch):
    """So another commit with the same weights continues, and so does a folder that holds them."""
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    shutil.copytree(tiny_world / "llama", repo / "snapshots" / "c0ffee")
    if files:
        (repo / "snapshots" / "c0ffee" / "model.safetensors").unlink()
        model = AutoModelForCausalLM.from_pretrained(tiny_world / "llama")
        model.save_pretrained(repo / "snapshots" / "c0ffee", **files)
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setattr(constants, name, str(tmp_path))
    fetched, local = [], str(tiny_world / "llama")
    monkeypatch.setattr(checkpoint, "get_checkpoint_shard_files", lambda *x: fetched.append(x[0]))
    for fingerprint in (checkpoint.weights_fingerprint, checkpoint.config_fingerprint):
        assert fingerprint("some/model") == fingerprint(local)
    assert fetched == ["some/model"] * bool(files)


def test_a_setting_that_another_transformers_knows_changes_no_fingerprint(tiny_world, monkeypatch):
    """So a run continues after an update."""
    model, init = str(tiny_world / "llama"), GenerationConfig.__init__

    def of_another_version(self, **settings):
        init(self, **settings)
        self.new_setting = None

    before = checkpoint.config_fingerprint(model)
    monkeypatch.setattr(GenerationConfig, "__init__", of_another_version)
    assert checkpoint.config_fingerprint(model) == before


# ---------------------------------------------------------------------- refused weights


@pytest.mark.parametrize("program", [train_ganpo, reward_model])
def test_after_refused_weights_the_corrected_command_may_use_the_same_out_dir(
    program, tiny_world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(tiny_world / "llama", tmp_path / "partial")
    weights = load_file(tmp_path / "partial" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "partial" / "model.safetensors", {"format": "pt"})
    argv = [f"--dataset={tiny_world / 'train.jsonl'}", f"--out_dir={tmp_path / 'r'}",
            "--batch_size=8", "--max_length=64"]  # fmt: skip
    with pytest.raises(SystemExit, match="partial.*model.norm.weight"):
        program.main([*argv, f"--model={tmp_path / 'partial'}"])
    program.main([*argv, f"--model={tiny_world / 'llama'}"])
    assert json_of(tmp_path / "r" / "config.json")["model"] == str(tiny_world / "llama")
    with pytest.raises(SystemExit, match="r holds a run: pass --resume, or another --out_dir"):
        program.main([*argv, f"--model={tiny_world / 'llama'}"])


# ---------------------------------------------------------------------- the name of the program


def test_a_file_that_calls_main_is_named_in_errors_and_in_the_line_to_resume(
    tiny_world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["my forks/my_loss.py", "--lamda_adv=1"])
    for program in (train_ganpo, reward_model):
        with pytest.raises(SystemExit, match="^my_loss.py: unrecognized arguments: --lamda_adv=1"):
            program.main()
    monkeypatch.setattr(sys, "argv", [sys.argv[0], *flags(tiny_world, tmp_path / "r")])
    monkeypatch.setattr(distributed.StopSignals, "anywhere", lambda *_: True)
    train_ganpo.main()
    *_, line = capsys.readouterr().out.splitlines()
    words = shlex.join([*sys.argv, "--resume"])
    assert line == f"stopped after step 1; resume with: {words}"
    assert words.startswith("'my forks/my_loss.py' --model=")


def test_a_module_is_named_as_it_was_started(monkeypatch):
    assert command_line(["--a"], "b.py") == (["b.py"], ["--a"])
    monkeypatch.setattr(sys, "argv", ["/somewhere/apo/train_apo.py", "--a"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="apo.train_apo"))
    assert command_line(None, "b.py") == (["-m", "apo.train_apo"], ["--a"])


def test_settings_that_do_not_may_change(six_steps, stopped, tiny_world, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "r")
    more = ("--epochs=2", "--micro_batch_size=3", "--save_every=1", "--checkpointing", "--keep=1")
    rows, _ = run(tiny_world, tmp_path / "r", *more, "--resume")
    for a, b in zip(six_steps[0], rows, strict=True):
        close(a, b, 1e-4)
    assert states(tmp_path / "r") == ["step-000006"]
    said = "equal up to rounding, not bit for bit: micro_batch_size was 32, is now 3\n"
    assert f"--resume: {said}" in capsys.readouterr().out


def test_other_held_out_pairs_are_named(stopped, tiny_world, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "r")
    make_rows(tmp_path / "other.jsonl", 8, seed=9)
    more = f"--eval_split={tmp_path / 'other.jsonl'}", "--eval_every=2", "--stop_after=3"
    run(tiny_world, tmp_path / "r", "--epochs=2", "--resume", *more)
    before = capsys.readouterr().out
    run(tiny_world, tmp_path / "r", "--epochs=2", "--resume", "--eval_every=2",
        f"--eval_split={tiny_world / 'test.jsonl'}")  # fmt: skip
    said = "the held-out pairs are other ones: eval.csv's new rows are about those"
    assert said not in before and f"--resume: {said}" in capsys.readouterr().out


def test_what_is_no_state_of_the_run_is_not_continued(stopped, tiny_world, tmp_path, capsys):
    out = shutil.copytree(stopped, tmp_path / "r")
    shutil.copytree(out / "state" / "step-000002", out / "state" / "step-000004")
    shutil.copytree(out / "state" / "step-000002", out / "state" / "step-000009-copy")
    argv = flags(tiny_world, out, "--resume", "--epochs=2", "--stop_after=3")
    (out / "metrics.csv").rename(tmp_path / "metrics.csv")
    train_ganpo.main(argv)
    said = capsys.readouterr().out
    assert "step-000004 is damaged" in said and "copy" not in said
    assert "resumed after step 2" in said and "metrics.csv is gone: it begins anew after" in said
    (out / "metrics.csv").write_text((tmp_path / "metrics.csv").read_text().replace(",", ";"))
    with pytest.raises(SystemExit, match="metrics.csv is damaged: there is no 'step'"):
        train_ganpo.main([*argv[:-1], "--stop_after=5"])


def test_a_state_of_other_shapes_is_one_line(stopped, tiny_world, tmp_path, monkeypatch):
    out = shutil.copytree(stopped, tmp_path / "r")
    config = json_of(out / "config.json") | {"disc_hidden": 24}
    (out / "config.json").write_text(json.dumps(config))
    more = "--epochs=2", "--resume", "--disc_hidden=24"
    with pytest.raises(
        SystemExit, match="of another run: disc_hidden 16 in place of 24; remove it"
    ):
        run(tiny_world, out, *more)
    monkeypatch.setattr(checkpoint, "check_owner", lambda *a: None)
    with pytest.raises(SystemExit, match="step-000002 is the state of another model, or of other"):
        run(tiny_world, out, *more)


@pytest.mark.parametrize("name, there, here", [
    ("seed", "1", "0"), ("lr", "0.001", "0.003"), ("model_weights", r"\w{16}", r"\w{16}"),
    ("data_fingerprint", r"\w{16}", r"\w{16}"), ("folder", "round-1", r"\."), (None, "", ""),
])  # fmt: skip
def test_a_state_that_another_run_has_written_is_refused(
    name, there, here, stopped, tiny_world, tmp_path, monkeypatch
):
    """Of the same shapes, whole, and copied into the folder of a run that is resumed."""
    out = shutil.copytree(stopped, tmp_path / "r")
    file = out / "state" / "step-000002" / "manifest.json"
    manifest = checkpoint.read_manifest(file.parent)
    assert manifest["run"]["folder"] == "." and {"lr", "seed"} < {*manifest["run"]}
    told = {"seed": 1, "lr": 0.001, "folder": "round-1"}.get(name, "c0ffee" * 2 + "beef")
    manifest["run"] = manifest["run"] | {name: told} if name else {}
    file.write_text(json.dumps(manifest | {"digest": checkpoint.digest(manifest)}))
    what = f"is the state of another run: {name} {there} in place of {here}; remove"
    what = what if name else "does not say of which run it is: remove it"
    with pytest.raises(SystemExit, match=f"step-000002 {what}"):
        run(tiny_world, out, "--epochs=2", "--resume")


def test_a_state_in_a_game_belongs_to_its_folder(stopped, tmp_path):
    """Those of two rounds have equal settings."""
    (stopped / "round-1" / "reward").mkdir(parents=True)
    own = checkpoint.run_of(stopped)
    assert checkpoint.run_of(stopped / "round-1" / "reward") == own | {"folder": "round-1/reward"}
    shutil.rmtree(stopped / "round-1")
    assert checkpoint.run_of(tmp_path / "nothing") == {}


@pytest.mark.parametrize("ranks", [1, slow(2)])
@pytest.mark.parametrize("part, value", [
    ("policy.model.model.norm.weight", "nan"), ("critics.disc_pos.ema", "inf"),
    ("policy.model.lm_head.weight.exp_avg_sq", "inf"),
])  # fmt: skip
def test_a_state_of_what_is_not_finite_is_neither_written_nor_read(
    part, value, ranks, stopped, tiny_world, tmp_path
):
    out, log = shutil.copytree(stopped, tmp_path / "r"), tmp_path / "log"
    folder = out / "state" / "step-000002"
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[part].view(-1)[-1] = float(value)
    with safe_open(file, "pt") as opened:
        save_file(tensors, file, opened.metadata())
    manifest = checkpoint.read_manifest(folder)
    manifest["files"] = {file.name: [file.stat().st_size, checkpoint.sha256(file)]}
    text = json.dumps(manifest | {"digest": checkpoint.digest(manifest)})
    (folder / "manifest.json").write_text(text)
    argv = flags(tiny_world, out, "--epochs=2", "--resume")
    assert join(spawn(argv, ranks, log=log)) == [1] * ranks
    message = f"step-000002: remove it, because it holds numbers that are not finite: {part}\n"
    assert message in log.read_text()


def test_weights_that_the_last_step_spoils_are_not_saved(tiny_world, tmp_path, monkeypatch):
    step = train_ganpo.train_step

    def spoils(run, batches, number):
        metrics = step(run, batches, number)
        with torch.no_grad():
            run.policy.model.lm_head.weight[3, 3] = math.inf
        return metrics

    monkeypatch.setattr(train_ganpo, "train_step", spoils)
    message = "step 1: no state is written, because it would hold numbers .*: policy.model.lm_head"
    with pytest.raises(SystemExit, match=message):
        run(tiny_world, tmp_path / "r", "--max_steps=1")
    monkeypatch.setattr(checkpoint, "save_state", lambda *a: None)
    with pytest.raises(SystemExit, match="the policy is not exported, because it .*: lm_head"):
        run(tiny_world, tmp_path / "s", "--max_steps=1")
    assert not [*tmp_path.glob("*/hf"), *tmp_path.glob("*/state/step*")]


def test_a_reader_that_is_gone_ends_the_run_with_a_state(tiny_world, tmp_path, monkeypatch):
    """As `| tee` whose terminal has been closed."""
    into, out_of = os.pipe()[::-1]
    os.close(out_of)
    monkeypatch.setattr(sys, "stdout", open(into, "w"))
    monkeypatch.setattr(distributed.StopSignals, "reader_is_gone", False)
    train_ganpo.main(flags(tiny_world, tmp_path / "r", "--epochs=2"))
    assert states(tmp_path / "r") == ["step-000001"]


def test_a_signal_ends_a_reward_models_training_with_a_state(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed.StopSignals, "anywhere", lambda *_: True)
    argv = [f"--model={tiny_world / 'llama'}", f"--dataset={tiny_world / 'train.jsonl'}",
            f"--out_dir={tmp_path / 'r'}", "--batch_size=8", "--max_length=64"]  # fmt: skip
    with pytest.raises(SystemExit, match="by a signal after step 1; --resume goes on from there"):
        reward_model.main([*argv, "--save_every=2"])
    assert states(tmp_path / "r") == ["step-000001"]


def test_ctrl_c_is_one_line(capsys):
    show_error(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted\n"


NO_RUN = "its config.json is missing, damaged or not that of a run: pass another --out_dir$"


@pytest.mark.parametrize("files, message", [
    ({}, "r: no run to resume$"),
    ({"notes.txt": ""}, "r: no run to resume$"),
    ({"config.json": '{"model_type": "llama"}'}, f"r holds config.json, but {NO_RUN}"),
    ({"config.json": '{"data_fing', "metrics.csv": ""}, f"csv and config.json, but {NO_RUN}"),
    ({"metrics.csv": ""}, f"r holds metrics.csv, but {NO_RUN}"),
])  # fmt: skip
def test_an_empty_or_foreign_folder_is_not_resumed_and_not_touched(
    files, message, tiny_world, tmp_path
):
    """Where a run's config.json is damaged, a second program would say --resume, and so on."""
    out = tmp_path / "r"
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    for more in (["--resume"], [])[: 1 + (NO_RUN in message)]:
        with pytest.raises(SystemExit, match=message):
            train_ganpo.main(flags(tiny_world, out, *more))
    assert {f.name: f.read_text() for f in out.iterdir()} == files


# ---------------------------------------------------------------------- states on disk


def test_the_newest_states_stay_each_whole_by_its_manifest(tiny_world, tmp_path):
    run(tiny_world, tmp_path / "r", "--epochs=2", "--save_every=1", "--keep=3")
    assert states(tmp_path / "r") == ["step-000004", "step-000005", "step-000006"]
    for folder in (tmp_path / "r" / "state").iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {f.name: f for f in folder.iterdir() if f.name != "manifest.json"}
        assert manifest["step"] == int(folder.name[5:]) and set(manifest["files"]) == set(files)
        assert all(name.endswith(".safetensors") for name in files)  # nothing to unpickle
        for name, (size, digest) in manifest["files"].items():
            assert files[name].stat().st_size == size and checkpoint.sha256(files[name]) == digest


def small_files(rank):
    checkpoint.FILE_BYTES = 20_000


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_of_many_files_is_resumed_as_exactly(ranks, tiny_world, tmp_path):
    _, weights = run(tiny_world, tmp_path / "s", ranks=ranks)
    children = spawn(flags(tiny_world, tmp_path / "r", "--stop_after=2"), ranks, None, small_files)
    assert join(children) == [0] * ranks
    files = list((tmp_path / "r" / "state" / "step-000002").glob("*.safetensors"))
    assert len(files) > 10 * ranks and all(f.stat().st_size < 60_000 for f in files)
    _, again = run(tiny_world, tmp_path / "r", "--resume", ranks=ranks)
    assert furthest(weights, again) == 0


def flip_a_byte(folder):
    (file,) = folder.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def cut(folder):
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def change_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"ranks": 1', '"ranks": 0'))


DAMAGES = {
    "flipped byte": (flip_a_byte, "missing or changed: .*safetensors"),
    "cut": (cut, "missing or changed: .*safetensors"),
    "missing file": (lambda f: next(f.glob("*.safetensors")).unlink(), "missing or changed"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no whole manifest"),
    "torn manifest": (lambda f: (f / "manifest.json").write_text('{"step"'), "no whole manifest"),
    "changed manifest": (change_manifest, "no whole manifest"),
}


SAVES = ("--epochs=2", "--save_every=2")


@pytest.fixture(scope="module")
def two_states(tiny_world, tmp_path_factory):
    """A run that has stopped after four of six steps."""
    folder = tmp_path_factory.mktemp("two")
    run(tiny_world, folder / "r", *SAVES, "--stop_after=4")
    return folder / "r"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    damage, six_steps, two_states, tiny_world, tmp_path, capsys
):
    out, more, (_, weights) = tmp_path / "r", SAVES, six_steps
    shutil.copytree(two_states, out)
    harm, message = DAMAGES[damage]
    harm(out / "state" / "step-000004")
    rows, again = run(tiny_world, out, *more, "--resume")
    printed = capsys.readouterr().out
    assert re.search(rf"step-000004 is damaged \({message}.*\): trying the state before", printed)
    assert "resumed after step 2" in printed
    assert furthest(weights, again) == 0 and [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    harm(out / "state" / "step-000006")
    run(tiny_world, out, *more, "--resume", "--stop_after=5")  # from 4, and 6 goes
    assert states(out) == ["step-000004", "step-000005"]
    for folder in (out / "state").iterdir():
        harm(folder)
    with pytest.raises(SystemExit, match="every state is damaged; remove its state/ to begin anew"):
        train_ganpo.main(flags(tiny_world, out, *more, "--resume"))


def test_a_run_killed_before_its_first_state_begins_anew(tiny_world, tmp_path, capsys):
    _, weights = run(tiny_world, tmp_path / "s")
    child = spawn(flags(tiny_world, tmp_path / "r"), prepare=slow_saves)
    wait_for(lambda: has_rows(tmp_path / "r", 1))
    child[0].kill()
    join(child)
    (tmp_path / "r" / "state" / "unfinished").mkdir(parents=True, exist_ok=True)
    (tmp_path / "r" / "state" / "unfinished" / "junk").write_text("x")
    rows, again = run(tiny_world, tmp_path / "r", "--resume")
    assert "resumed after step 0" in capsys.readouterr().out
    assert furthest(weights, again) == 0 and [r["step"] for r in rows] == [1, 2, 3]
    assert states(tmp_path / "r") == ["step-000003"]


def slow_saves(rank):
    inner = checkpoint.save_state
    checkpoint.save_state = lambda *a: (time.sleep(30), inner(*a))


def test_torn_rows_of_metrics_are_dropped(six_steps, tiny_world, tmp_path):
    run(tiny_world, tmp_path / "r", "--epochs=2", "--stop_after=4")
    path = tmp_path / "r" / "metrics.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1].replace("4,", "5,", 1)
                    + "\n2,0.5")  # fmt: skip
    rows, _ = run(tiny_world, tmp_path / "r", "--epochs=2", "--resume")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(six_steps[0], rows, strict=True):
        close(a, b, 0)


# ---------------------------------------------------------------------- room on the disk


def test_too_little_room_is_refused_before_training(tiny_world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(SystemExit, match=r"disk space: need 0\.00\d+ GB, have 1e-05 GB"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r"))
    assert not (tmp_path / "r" / "config.json").exists()


def test_a_read_only_disk_is_refused_in_one_line(small_disk, tiny_world):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SystemExit, match=r"--out_dir (?=.*/r\b).*\[Errno 30\] Read-only"):
        train_ganpo.main(flags(tiny_world, small_disk / "r"))


def test_room_that_is_gone_at_a_save_ends_the_run_and_leaves_the_state_before(
    six_steps, tiny_world, tmp_path, monkeypatch, capsys
):
    more, (_, weights) = ("--epochs=2", "--save_every=2"), six_steps
    usage = shutil.disk_usage(tmp_path)
    free = itertools.chain([10**12, 10**12], itertools.repeat(10_000))  # at the start, first save
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
        with pytest.raises(
            SystemExit, match="state of step 4 could not be written.*need 0.*intact"
        ):
            train_ganpo.main(flags(tiny_world, tmp_path / "r", *more))
    assert states(tmp_path / "r") == ["step-000002"]
    _, again = run(tiny_world, tmp_path / "r", *more, "--resume")
    assert "resumed after step 2" in capsys.readouterr().out and furthest(weights, again) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a megabyte or so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3000k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_fills_up_during_a_save_destroys_no_state(
    six_steps, small_disk, tiny_world, tmp_path, monkeypatch, capsys
):
    more, (_, weights) = ("--epochs=2", "--save_every=1", "--keep=1"), six_steps
    # as if another program took the room after it was checked
    inner = checkpoint.check_space

    def check(out_dir, needed):
        inner(out_dir, needed)
        if (small_disk / "r" / "state" / "step-000002").exists():
            (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_space", check)
        with pytest.raises(
            SystemExit, match="step 3 could not be written: .*No space left.*intact"
        ):
            train_ganpo.main(flags(tiny_world, small_disk / "r", *more))
    assert states(small_disk / "r") == ["step-000002"]
    (small_disk / "filler").unlink()
    _, again = run(tiny_world, small_disk / "r", *more, "--resume")
    assert "resumed after step 2" in capsys.readouterr().out and furthest(weights, again) == 0


# ---------------------------------------------------------------------- signals


LONG, LONG_STEPS = ("--epochs=8",), 24


@pytest.fixture(scope="module")
def undisturbed(tiny_world, tmp_path_factory):
    """Rows and weights of the long run, for 1 and 2 ranks."""
    folder = tmp_path_factory.mktemp("long")
    return {n: run(tiny_world, folder / str(n), *LONG, ranks=n) for n in (1, 2)}


@pytest.mark.parametrize(
    "ranks, number",
    [
        (1, signal.SIGUSR1), slow(1, signal.SIGINT), slow(1, signal.SIGTERM),
        slow(1, signal.SIGHUP), (2, signal.SIGTERM), slow(2, signal.SIGHUP),
    ],
)  # fmt: skip
def test_a_signal_finishes_the_step_saves_and_exits_0(
    ranks, number, undisturbed, tiny_world, tmp_path
):
    out, log = tmp_path / "r", tmp_path / "log"
    children = spawn(flags(tiny_world, out, *LONG), ranks, log)
    wait_for(lambda: has_rows(out, 3))
    os.kill(children[-1].pid, number)  # one rank only: the others have to hear of it
    assert join(children) == [0] * ranks
    (line,) = [x for x in log.read_text().splitlines() if x.startswith("stopped after step")]
    step = int(re.match(r"stopped after step (\d+); resume with: train_ganpo.py ", line)[1])
    assert line.endswith("--resume") and 3 <= step < LONG_STEPS
    assert states(out)[-1] == f"step-{step:06d}"
    rows, again = run(tiny_world, out, *LONG, "--resume", ranks=ranks)
    straight, weights = undisturbed[ranks]
    assert furthest(weights, again) == 0
    assert [r["step"] for r in rows] == list(range(1, LONG_STEPS + 1))
    for a, b in zip(straight, rows, strict=True):
        close(a, b, 0)


def test_a_hangup_that_is_ignored_stays_ignored():
    """nohup starts a program that way."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def slow_evaluation(rank):
    """So slow that a signal arrives within it, however busy the machine is."""
    inner = train_ganpo.two_models

    def forward(*args):
        if not torch.is_grad_enabled():
            time.sleep(0.3)
        return inner(*args)

    train_ganpo.two_models = forward


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_a_signal_ends_an_evaluation_which_is_made_up_for(ranks, tiny_world, tmp_path):
    held_out = make_rows(tmp_path / "many.jsonl", 60, seed=3)
    more = ("--max_steps=3", "--eval_every=2", f"--eval_split={held_out}", "--micro_batch_size=8")
    run(tiny_world, tmp_path / "s", *more, ranks=ranks)
    out, log = tmp_path / "r", tmp_path / "log"
    children = spawn(flags(tiny_world, out, *more), ranks, log, slow_evaluation)
    wait_for(lambda: has_rows(out, 2))
    os.kill(children[0].pid, signal.SIGTERM)
    assert join(children) == [0] * ranks
    assert "stopped after step 2;" in log.read_text()
    assert rows_of(out / "eval.csv") == []
    run(tiny_world, out, *more, "--resume", ranks=ranks)
    assert rows_of(out / "eval.csv") == rows_of(tmp_path / "s" / "eval.csv") != []


def test_a_signal_lets_the_last_evaluation_end(tiny_world, tmp_path):
    """There is no later step at which to make up for it."""
    held_out = make_rows(tmp_path / "many.jsonl", 30, seed=3)
    more = ("--max_steps=2", "--eval_every=9", f"--eval_split={held_out}", "--micro_batch_size=8")
    run(tiny_world, tmp_path / "s", *more)
    out = tmp_path / "r"
    (child,) = spawn(flags(tiny_world, out, *more), prepare=slow_evaluation)
    wait_for(lambda: has_rows(out, 2))
    os.kill(child.pid, signal.SIGTERM)
    assert join([child]) == [0] and (out / "hf").is_dir()
    assert rows_of(out / "eval.csv") == rows_of(tmp_path / "s" / "eval.csv")
    assert [row["step"] for row in rows_of(out / "eval.csv")] == [2]


def sleepy_saves(rank):
    inner = checkpoint.save_state

    def save(*args):
        time.sleep(0.5)
        inner(*args)

    checkpoint.save_state = save


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_a_signal_during_a_save_lets_it_finish(ranks, undisturbed, tiny_world, tmp_path):
    out, log = tmp_path / "r", tmp_path / "log"
    more = (*LONG, "--save_every=3")
    children = spawn(flags(tiny_world, out, *more), ranks, log, sleepy_saves)
    wait_for(lambda: has_rows(out, 3))  # the save of step 3 begins now
    time.sleep(0.1)
    os.kill(children[0].pid, signal.SIGTERM)
    assert join(children) == [0] * ranks
    assert re.search(r"stopped after step [34];", log.read_text())
    _, again = run(tiny_world, out, *more, "--resume", ranks=ranks)
    assert furthest(undisturbed[ranks][1], again) == 0


def stuck_steps(rank):
    inner = train_ganpo.train_step

    def step(run, batches, step):
        if step == 2:
            time.sleep(60)
        return inner(run, batches, step)

    train_ganpo.train_step = step


def test_a_second_signal_ends_the_process_at_once(tiny_world, tmp_path):
    (child,) = spawn(flags(tiny_world, tmp_path / "r"), prepare=stuck_steps)
    wait_for(lambda: has_rows(tmp_path / "r", 2))
    time.sleep(0.2)
    begin = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGTERM)
    assert join([child], 5) == [-signal.SIGTERM] and time.monotonic() - begin < 5


# ---------------------------------------------------------------------- not finite, or lost


def poisoned(rank):
    """The second pair of the last rank's third batch has a loss that is not finite."""
    dpo, calls = OPO_LOSSES["dpo"], itertools.count()  # call 0 is the check of the start

    def loss(lp, beta):
        value = dpo.function(lp, beta)
        if next(calls) == 3 and rank == int(os.environ["WORLD_SIZE"]) - 1:
            value = value * torch.tensor([1.0, float("nan"), *[1.0] * (len(value) - 2)])
        return value

    OPO_LOSSES["dpo"] = dpo._replace(function=loss)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_not_finite_stops_all_ranks_before_the_update_naming_the_pair(
    ranks, tiny_world, tmp_path
):
    out, log = tmp_path / "r", tmp_path / "log"
    children = spawn(flags(tiny_world, out, "--save_every=1"), ranks, log, poisoned)
    codes = join(children)
    assert all(code == 1 for code in codes)
    data = load_pairs(str(tiny_world / "train.jsonl"), "train", tiny(), 64)
    pairs = [data.triplets[i] for i in batch_indices(2, 28, 8, 0)]
    row = plan_forwards(pairs, ranks, 8, 16384)[0][-1][1].row
    (line,) = [x for x in log.read_text().splitlines() if x.startswith("train_ganpo.py:")]
    assert "step 3: loss_opo is nan; the policy was not updated" in line
    assert line.endswith(f"rows of the data (from 0): {row}")
    assert states(out) == ["step-000001", "step-000002"] and len(rows_of(out / "metrics.csv")) == 2
    _, again = run(tiny_world, out, "--save_every=1", "--resume", ranks=ranks)
    _, weights = run(tiny_world, tmp_path / "s", ranks=ranks)
    assert furthest(weights, again) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_others_with_an_error(number, tiny_world, tmp_path):
    out, log = tmp_path / "r", tmp_path / "log"
    children = spawn(flags(tiny_world, out, "--epochs=400", "--timeout=4"), 2, log)
    wait_for(lambda: has_rows(out, 2))
    os.kill(children[1].pid, number)
    children[0].join(30)
    code = children[0].exitcode
    join(children, 0)
    assert code not in (0, None)


def test_a_second_process_on_one_out_dir_is_refused(tiny_world, tmp_path):
    children = spawn(flags(tiny_world, tmp_path / "r", "--epochs=400"))
    try:
        wait_for(lambda: has_rows(tmp_path / "r", 1))
        with pytest.raises(SystemExit, match="r is in use by another process"):
            train_ganpo.main(flags(tiny_world, tmp_path / "r", "--epochs=400", "--resume"))
        assert children[0].is_alive()
    finally:
        children[0].kill()
        join(children)


# ---------------------------------------------------------------------- kill -9


KILLED, KILLED_STEPS = ("--epochs=8", "--save_every=1", "--disc_dropout=0.3"), 24


def survive(world, folder, kills, seed):
    """Kills the program that often at random moments, resuming each time -> weights and rows of the
    run that was left to end, and where each kill struck."""
    rng, out, struck = random.Random(seed), folder / "r", []
    while True:
        resume = ["--resume"] * (out / "config.json").exists()
        begun = has_rows(out, 0)
        (child,) = spawn(flags(world, out, *KILLED, *resume), log=folder / "log")
        if len(struck) == kills:
            assert join([child]) == [0], (folder / "log").read_text()[-2000:]
            return rows_of(out / "metrics.csv"), load_file(out / "hf" / "model.safetensors"), struck
        if begun and not resume:
            wait_for(lambda: has_rows(out, 1))
        time.sleep(rng.uniform(0.1, 1.5))
        child.kill()
        child.join()
        saving = (out / "state" / "unfinished").exists()
        struck.append("save" if saving else "step" if child.exitcode else "end")
        if child.exitcode == 0 or (out / "hf").exists():
            shutil.rmtree(out)  # it had ended: once more from the start
            struck.pop()


@pytest.mark.parametrize("kills", [2, slow(20)])
def test_kill_9_at_random_moments_and_resume_give_the_undisturbed_weights(
    kills, tiny_world, tmp_path
):
    straight, weights = run(tiny_world, tmp_path / "s", *KILLED)
    rows, again, struck = survive(tiny_world, tmp_path, kills, seed=kills)
    assert len(struck) == kills
    assert all(torch.equal(weights[k], again[k]) for k in again)
    assert [r["step"] for r in rows] == list(range(1, KILLED_STEPS + 1))
    for a, b in zip(straight, rows, strict=True):
        close(a, b, 0)


def main():
    parser = argparse.ArgumentParser("test_reliability.py", description="kill, resume, compare")
    parser.add_argument("--kills", type=int, default=200)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_model(folder / "llama")
        make_rows(folder / "train.jsonl", 28)
        straight, weights = run(folder, folder / "s", *KILLED)
        begin, equal, struck = time.monotonic(), 0, []
        while len(struck) < kills:  # ten kills on the way to each comparison
            (folder / "r").exists() and shutil.rmtree(folder / "r")
            rows, again, where = survive(folder, folder, min(10, kills - len(struck)), len(struck))
            struck += where
            assert all(torch.equal(weights[k], again[k]) for k in again)
            assert [r["step"] for r in rows] == [r["step"] for r in straight]
            equal += 1
    print(f"{len(struck)} kills, {struck.count('save')} of them during a save;", end=" ")
    print(f"{equal} of {equal} runs ended with the undisturbed weights;", end=" ")
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
