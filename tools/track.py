"""Shows the curves of a run in TensorBoard, Weights & Biases or trackio.

    python -m tools.track out/run-000 --to tensorboard    # then: tensorboard --logdir out
    python -m tools.track out/run-000 --to wandb          # then: wandb sync, as it prints
    python -m tools.track out/run-000 --to trackio        # then: trackio show --project ganpo

It follows metrics.csv and eval.csv until the run writes hf/, its last file; with --once it ends
after what is there now. The library is imported only here, and writes to this machine's disk alone.

The curves hold what the csv files hold. A run that is resumed takes the rows after its last state
back and trains these steps again; the curves are then written anew, and they are so whenever this
program starts.
"""

import cpu  # noqa: F401  must come before torch

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data import InputError, reason_of
from flags import Parser
from report import read_config, read_table

TABLES = {"train": "metrics.csv", "eval": "eval.csv"}
PROJECT = "ganpo"
SECONDS = 2  # between two looks at the files


# ---------------------------------------------------------------------- where curves go
# Each function forgets what it has written of a run before, and returns log(step, values by name)
# and close().


def to_tensorboard(run: Path, config: dict) -> tuple[Callable, Callable]:
    """Writes event files to RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard", purge_step=0)  # readers drop what came before

    def log(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def to_wandb(run: Path, config: dict) -> tuple[Callable, Callable]:
    """Writes a folder for `wandb sync` to RUN/wandb."""
    import wandb

    name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
    for earlier in run.glob(f"wandb/offline-run-*-{name}"):
        shutil.rmtree(earlier)
    of_run = dict(project=PROJECT, name=run.name, id=name, config=config)
    session = wandb.init(**of_run, dir=run, mode="offline")
    return lambda step, values: session.log(values, step=step), session.finish


def to_trackio(run: Path, config: dict) -> tuple[Callable, Callable]:
    """Writes to trackio's own folder on this machine."""
    import trackio

    config = config | {"folder": str(run.resolve())}
    try:
        earlier = [*trackio.Api().runs(PROJECT)]
    except ValueError:  # no such project yet
        earlier = []
    for other in earlier:
        if (other.config or {}).get("folder") == config["folder"]:
            other.delete()
    quiet = dict(embed=False, auto_log_cpu=False, auto_log_gpu=False)
    session = trackio.init(project=PROJECT, name=str(run), config=config, **quiet)
    return lambda step, values: session.log(values, step=step), session.finish


TO = {"tensorboard": to_tensorboard, "wandb": to_wandb, "trackio": to_trackio}
SHOWN_BY = {  # the command that shows them
    "tensorboard": "tensorboard --logdir {run}",
    "wandb": "wandb sync {run}/wandb/offline-run-*",
    "trackio": f"trackio show --project {PROJECT}",
}
ELSEWHERE = {  # variables by which a library would write elsewhere, and the values that do not
    "wandb": {"WANDB_MODE": "offline"},
    "trackio": {"TRACKIO_SPACE_ID": "", "TRACKIO_SERVER_URL": ""},
}


def open_curves(run: Path, to: str) -> tuple[Callable, Callable]:
    """Returns log and close of one of TO; raises InputError if it cannot be used, or if there is no
    run."""
    config = read_config(run)
    if config is None or "total_steps" not in config:
        raise InputError(f"{run}: no run of train_ganpo.py or reward_model.py")
    for name, value in ELSEWHERE.get(to, {}).items():
        if os.environ.get(name, value) != value:
            raise InputError(f"{name} is set, but curves are written to this machine: unset it")
    try:
        return TO[to](run, config)
    except ImportError as error:
        raise InputError(f"--to {to} needs {to}: pip install {to} ({error})") from None
    except Exception as error:  # each library raises kinds of its own
        raise InputError(f"--to {to}: {reason_of(error)}") from None


# ---------------------------------------------------------------------- following


def read_rows(run: Path) -> dict[tuple, dict[str, float]]:
    """Returns the values of all whole rows, {name: value} by step and table, in this order.

    Raises InputError if a table is damaged.
    """
    found = {}
    for i, (table, file) in enumerate(TABLES.items()):
        path = run / file
        for row in read_table(path) if path.exists() else []:
            step = row.pop("step")
            found[step, i] = {f"{table}/{k}": v for k, v in row.items()}
    return dict(sorted(found.items()))


def follow(run: Path, to: str, once: bool) -> dict:
    """Writes a run's rows to where `to` says until the run has ended; returns them.

    With `once` it writes those that are there. Raises InputError as open_curves does.
    """
    (log, close), sent = open_curves(run, to), {}
    try:
        while True:
            ended = once or (run / "hf").exists()  # asked first: no row comes after hf/
            rows = read_rows(run)
            if not sent.items() <= rows.items():
                print(f"{run} was resumed: its curves are written anew", flush=True)
                close()
                (log, close), sent = open_curves(run, to), {}
            for key in sorted(rows.keys() - sent.keys()):
                log(key[0], rows[key])
            sent = rows
            if ended:
                return rows
            time.sleep(SECONDS)
    finally:
        close()


def parse_args(argv: list[str]):
    """Returns the settings of this program."""
    parser = Parser("tools.track", __doc__, "python -m tools.track RUN --to WHERE [--once]")
    parser.add_argument("run", metavar="RUN", type=Path, help="the --out_dir of train_ganpo.py")
    parser.add_argument("--to", choices=TO, required=True)
    parser.add_argument("--once", action="store_true", help="do not wait for more rows [wait]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        if not args.once:
            print(f"following {args.run} until it has ended; Ctrl-C ends this too", flush=True)
        rows = follow(args.run, args.to, args.once)
        of_eval = sum(table for _, table in rows)
        shown = SHOWN_BY[args.to].format(run=args.run)
        print(f"{len(rows) - of_eval} rows of metrics.csv, {of_eval} of eval.csv; see: {shown}")
    except KeyboardInterrupt:
        sys.exit("tools.track: ended before the run has")
    except (InputError, OSError) as error:
        sys.exit(f"tools.track: {error}")


if __name__ == "__main__":
    main()
