"""Claims about tools/track.py: curves hold exactly what the csv files of a run hold.

pip install tensorboard && python -m pytest -q tests/test_track.py
"""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import rows_of, run
from tools import track


@pytest.fixture
def folder(tmp_path):
    """A run that has just begun."""
    path = tmp_path / "r"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"data_fingerprint": "f", "total_steps": 4}))
    return path


def write(folder, steps, losses, table="metrics"):
    with (folder / f"{table}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "d_ra"])
        writer.writerows([step, loss, ""] for step, loss in zip(steps, losses, strict=True))


@pytest.fixture
def curves(monkeypatch):
    """Whatever is written, by the opening that wrote it."""
    openings = []

    def record(path, config):
        openings.append([])
        return lambda step, values: openings[-1].append((step, values)), lambda: None

    monkeypatch.setitem(track.TO, "tensorboard", record)
    for library in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, library, None)  # an import would fail
    return openings


def meanwhile(monkeypatch, *changes):
    """Between two looks of the program at the files the next of the changes is made."""
    rest = iter(changes)
    monkeypatch.setattr(track.time, "sleep", lambda seconds: next(rest)())


def followed(folder, *more, to="tensorboard"):
    track.main([str(folder), f"--to={to}", *more])


def test_rows_of_a_running_run_are_written_once_when_they_are_whole(
    folder, curves, monkeypatch, capsys
):
    def half_a_row():
        write(folder, [1, 2], [0.5, 0.25])
        path = folder / "metrics.csv"
        path.write_text(path.read_text()[:-4])

    meanwhile(
        monkeypatch,
        half_a_row,
        lambda: (write(folder, [1, 2], [0.5, 0.25]), write(folder, [2], [3.0], "eval")),
        lambda: (write(folder, [1, 2, 3], [0.5, 0.25, 0.1]), (folder / "hf").mkdir()),
    )
    followed(folder)
    assert curves == [[
        (1, {"train/loss": 0.5}), (2, {"train/loss": 0.25}), (2, {"eval/loss": 3.0}),
        (3, {"train/loss": 0.1}),
    ]]  # fmt: skip
    printed = capsys.readouterr().out
    assert "until it has ended" in printed and "3 rows of metrics.csv, 1 of eval.csv" in printed


@pytest.mark.parametrize("at_once", [True, False])
def test_rows_that_a_resume_takes_back_are_written_anew(
    at_once, folder, curves, monkeypatch, capsys
):
    """Also if the rows of the same steps are there again before the program looks."""
    write(folder, [1, 2, 3], [0.5, 0.25, 0.1])
    changes = [
        lambda: write(folder, [1], [0.5]),
        lambda: (write(folder, [1, 2, 3, 4], [0.5, 0.25, 0.2, 0.05]), (folder / "hf").mkdir()),
    ]
    meanwhile(monkeypatch, *changes[at_once:])
    followed(folder)
    losses = [(step, values["train/loss"]) for step, values in curves[-1]]
    assert losses == [(1, 0.5), (2, 0.25), (3, 0.2), (4, 0.05)]
    assert capsys.readouterr().out.count("its curves are written anew") == 1


def test_once_writes_what_is_there_and_waits_for_nothing(folder, curves, monkeypatch, capsys):
    meanwhile(monkeypatch)
    followed(folder, "--once")
    write(folder, [1], [0.5])
    followed(folder, "--once")
    assert curves == [[], [(1, {"train/loss": 0.5})]]
    assert "until it has ended" not in capsys.readouterr().out


def test_ctrl_c_ends_it_with_one_line(folder, curves, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(track.time, "sleep", interrupt)
    with pytest.raises(SystemExit, match="^tools.track: ended before the run has$"):
        followed(folder)


def test_tensorboard_reads_back_what_a_resumed_run_wrote(tiny_world, tmp_path):
    """The rows after the state are there once, and those of the resumed run."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, more = tmp_path / "r", (f"--eval_split={tiny_world / 'test.jsonl'}", "--eval_every=2")
    run(tiny_world, out, *more, "--save_every=2", "--stop_after=2")
    table = out / "metrics.csv"
    third = table.read_text().splitlines()[-1].split(",")
    third = ",".join(["3", *third[1:]])
    table.write_text(table.read_text() + third + "\n")  # of a process that was killed
    followed(out, "--once")
    run(tiny_world, out, *more, "--resume")
    followed(out)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    tables = {"train": rows_of(table), "eval": rows_of(out / "eval.csv")}
    for group, rows in tables.items():
        assert len(rows) >= 2
        for name in rows[0].keys() - {"step"}:
            points = [(point.step, point.value) for point in found.pop(f"{group}/{name}")]
            assert [step for step, _ in points] == [row["step"] for row in rows]
            values = [value for _, value in points]
            assert values == pytest.approx([row[name] for row in rows], rel=1e-6)  # float32
    assert not found


def test_wandb_is_offline_and_an_earlier_folder_of_the_run_is_replaced(folder, monkeypatch):
    told, other = [], folder / "wandb" / "offline-run-1-other"

    def init(**settings):
        session = folder / "wandb" / f"offline-run-{len(told)}-{settings['id']}"
        session.mkdir(parents=True)
        told.append(settings)
        return SimpleNamespace(
            log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    other.mkdir(parents=True)
    write(folder, [1], [0.5])
    for _ in range(2):
        followed(folder, "--once", to="wandb")
    settings, row, end, again = told[:4]
    assert settings == again and (row, end) == ((1, {"train/loss": 0.5}), "end")
    assert (settings["mode"], settings["dir"], settings["project"]) == ("offline", folder, "ganpo")
    assert settings["config"]["total_steps"] == 4
    assert len([*folder.glob("wandb/offline-run-*")]) == 2 and other.is_dir()


def test_trackio_forgets_only_what_it_had_of_this_folder(folder, monkeypatch):
    known, deleted, rows = [], [], []

    def init(name, config, **settings):
        known.append(SimpleNamespace(config=config, delete=lambda: deleted.append(name)))
        return SimpleNamespace(log=lambda values, step: rows.append(step), finish=lambda: None)

    def runs(project):
        if not known:
            raise ValueError("no project")
        return known

    stub = SimpleNamespace(init=init, Api=lambda: SimpleNamespace(runs=runs))
    monkeypatch.setitem(sys.modules, "trackio", stub)
    write(folder, [1], [0.5])
    followed(folder, "--once", to="trackio")
    known.append(SimpleNamespace(config={"folder": "elsewhere"}, delete=lambda: deleted.append(2)))
    followed(folder, "--once", to="trackio")
    assert deleted == [str(folder)] and rows == [1, 1]


def test_what_cannot_be_followed_is_one_line(folder, tmp_path, curves, monkeypatch):
    def refused(*argv):
        with pytest.raises(SystemExit) as line:
            track.main([str(x) for x in argv])
        assert "\n" not in str(line.value)
        return str(line.value)

    assert refused(tmp_path, "--to=wandb") == (
        f"tools.track: {tmp_path}: no run of train_ganpo.py or reward_model.py"
    )
    assert "--to: invalid choice: 'neptune'" in refused(folder, "--to=neptune")
    assert "arguments are required: --to" in refused(folder)
    for to in ("wandb", "trackio"):
        assert f"--to {to} needs {to}: pip install {to}" in refused(folder, "--to", to)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "WANDB_MODE is set, but curves" in refused(folder, "--to=wandb")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    assert "TRACKIO_SPACE_ID is set" in refused(folder, "--to=trackio")
    broken = SimpleNamespace(init=lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.delenv("WANDB_MODE")
    assert "--to wandb: division by zero" in refused(folder, "--to=wandb")
    write(folder, [1], ["high"])
    assert "metrics.csv is damaged: could not convert" in refused(
        folder, "--to=tensorboard", "--once"
    )
    Path(folder / "metrics.csv").write_text("loss\n1\n")
    assert "metrics.csv is damaged: there is no 'step'" in refused(
        folder, "--to=tensorboard", "--once"
    )
    for text in ("step,loss\n1\n2,0.5\n", "step,loss\n1,0.5,7\n"):
        Path(folder / "metrics.csv").write_text(text)
        few = "metrics.csv is damaged: row 0 has more or fewer values than there are columns"
        assert few in refused(folder, "--to=tensorboard", "--once")
    Path(folder / "eval.csv").write_bytes(b"step,loss\n\xff\n")
    Path(folder / "metrics.csv").unlink()
    assert "eval.csv is damaged: 'utf-8' codec" in refused(folder, "--to=tensorboard", "--once")
