"""What a training run says: the header, one line per step, and the csv files. Rank 0 writes.

Columns of metrics.csv are exact means over all pairs and ranks of the step, taken before the
policy's update; those of the adversarial term (loss_adv, adv_to_opo_grad, adv_align) after the
discriminators'. A column that a setting has no value for stays empty.
"""

import csv
import json
import os
import platform
import re
import resource
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from data import InputError, PreferenceData
from distributed import print0
from estimate import Survey
from game import GAMES
from settings import parse_args
from winrate import standard_error

COLUMNS = (
    "step loss_opo loss_adv loss_disc_pos loss_disc_neg d_ra reward_chosen reward_rejected margin"
    " pref_acc disc_acc_pos disc_acc_neg score_gap_pos score_gap_neg latent_mse adv_to_opo_grad"
    " adv_align grad_norm disc_grad_norm lr disc_lr tokens tokens_per_s peak_gb seconds"
).split()
EVAL_COLUMNS = "step loss accuracy margin pairs".split()
FINAL_COLUMNS = "temperature model n strict_acc strict_acc_se mean_score mean_score_se".split()


class Table:
    """A csv file, one row per write; opened again after `step` finished steps, it keeps their rows
    and goes on from there."""

    def __init__(self, path, columns, step=0):
        self.file, self.steps = None, set()
        if dist.get_rank() == 0:
            rows = []
            if step and path.exists():
                with path.open() as old:
                    whole = (row for row in csv.DictReader(old) if None not in row.values())
                    rows = [row for row in whole if int(row["step"]) <= step]
            self.steps = {int(row["step"]) for row in rows}
            unfinished = path.with_name(f".{path.name}.unfinished")
            self.file = unfinished.open("w", newline="")
            self.writer = csv.DictWriter(self.file, columns)
            self.writer.writeheader()
            self.writer.writerows(rows)
            self.sync()
            unfinished.rename(path)  # the old rows are never in no file

    def write(self, row: dict):
        if self.file:
            short = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
            self.writer.writerow(short)
            self.file.flush()

    def sync(self):
        """On the disk before a state says that these steps are done."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


def read_table(path: Path) -> list[dict[str, float]]:
    """metrics.csv, or another table of numbers, as rows without their empty places."""
    with Path(path).open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def log_line(m: dict, max_steps: int, seconds_left: float) -> str:
    """One step in fixed width; '-' where a setting has no such value."""

    def show(name, spec):
        return format(m[name], spec) if name in m else "-".rjust(len(format(0.0, spec)))

    left = timedelta(seconds=int(seconds_left))
    return (
        f"{m['step']:>5}/{max_steps} {m['step'] / max_steps:6.1%} {left} left"
        f" | opo {show('loss_opo', '6.4f')} adv {show('loss_adv', '+7.4f')}"
        f" | D {show('loss_disc_pos', '5.3f')} {show('loss_disc_neg', '5.3f')}"
        f" acc {show('disc_acc_pos', '4.2f')} {show('disc_acc_neg', '4.2f')}"
        f" | margin {show('margin', '+7.4f')} acc {show('pref_acc', '4.2f')}"
        f" | grad {show('grad_norm', '7.1e')} {m['tokens_per_s']:7.0f} tok/s"
    )


def neutral_values(args) -> str:
    """What critics that cannot tell policy from reference would print."""
    if args.lambda_adv == 0:
        return "lambda_adv 0: plain " + args.loss
    if args.disc == "mse":
        return "neutral values: adv 0 (the squared distance, where policy = reference)"
    return f"neutral values (critics that cannot tell apart): {GAMES[args.critic].neutral(args)}"


def print_header(
    run,
    tokenizer: PreTrainedTokenizerBase,
    data: PreferenceData,
    held_out: PreferenceData | None,
    cut: Survey,
):
    """What this run is: settings, how steps are cut, data, sizes, neutral values, and the first
    pair as the model sees it."""
    args = run.args
    preset = parse_args([f"--preset={args.preset}"])
    own = [f"{k}={v}" for k, v in vars(args).items() if v != getattr(preset, k) and k != "out_dir"]
    print0(f"preset {' '.join([args.preset, *own])}; all settings: {args.out_dir}/config.json")
    forwards = f"{cut.fewest}" if cut.fewest == cut.most else f"{cut.fewest} to {cut.most}"
    ranks = f"{run.world} rank(s)"
    if run.world > 1:
        ranks += f" (the busiest {cut.imbalance:.1%} above their mean)"
    print0(
        f"{args.batch_size} pairs/step = {ranks} x {forwards} forward(s) of up to"
        f" {args.micro_batch_size} pairs, {args.micro_tokens:,} tokens; {len(data.triplets)} pairs"
        f" = {data.steps(args.batch_size)} steps/epoch,"
        f" {len(data.triplets) % args.batch_size} left over;"
        f" {run.max_steps} steps"
    )
    print0(f"attention: {run.policy.attention_kind}")
    print0(f"data: {data.summary()}; fingerprint {data.fingerprint}")
    if held_out:
        print0(f"held out: {held_out.summary()}")
    numel = {
        k: sum(p.numel() for p in m.parameters()) for k, m in vars(run).items() if is_module(m)
    }
    print0("parameters: " + ", ".join(f"{k} {n:,}" for k, n in numel.items()))
    print0(neutral_values(args))
    if args.critic == "paired" and not args.model.startswith("out/mini/"):
        print0("--critic paired: its settings were found in the miniature, and nowhere else tried")
    t = data.triplets[0]  # what is scored stands between the marks
    for name, ids in (("chosen", t.chosen), ("rejected", t.rejected)):
        answer = tokenizer.decode(ids)
        if len(ids) > 50:
            answer = f"{tokenizer.decode(ids[:25])} [...] {tokenizer.decode(ids[-25:])}"
        prompt, sizes = tokenizer.decode(t.prompt[-50:]), f"{len(t.prompt)} + {len(ids)} tokens"
        prompt = "[...] " * (len(t.prompt) > 50) + prompt
        print0(f"first pair, {name}: {prompt!r} >>>{answer!r}<<< ({sizes})")


def is_module(x):
    return isinstance(x, torch.nn.Module)


FREE = (  # what may change when a run is resumed: its result stays the same
    "preset dataset split chat_template eval_split eval_every final_eval micro_batch_size"
    " micro_tokens attention checkpointing save_every keep timeout stop_after epochs max_steps"
    " out_dir resume versions device ranks held_out_fingerprint pairs dropped notes steps_per_epoch"
).split()


def config_of(
    args,
    device: torch.device,
    data: PreferenceData,
    held_out: PreferenceData | None,
    max_steps: int,
) -> dict:
    """All settings, versions, the data's fingerprint, and the numbers that follow from them, as
    they come back from config.json."""
    names = ("torch", "transformers", "datasets", "numpy")
    config = vars(args) | {
        "versions": {n: version(n) for n in names} | {"python": platform.python_version()},
        "device": str(device),
        "ranks": dist.get_world_size(),
        "data_fingerprint": data.fingerprint,
        "held_out_fingerprint": held_out.fingerprint if held_out else None,
        "pairs": len(data.triplets),
        "dropped": data.dropped,
        "notes": data.notes,
        "steps_per_epoch": data.steps(args.batch_size),
        "total_steps": max_steps,
    }
    return json.loads(json.dumps(config))


def read_config(out_dir: Path) -> dict | None:
    """What a run wrote to its config.json; None if the folder holds none."""
    try:
        config = json.loads((Path(out_dir) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config if "data_fingerprint" in config else None  # a model's folder has such a file too


def check_same(old: dict, new: dict):
    """InputError naming every setting by which a resumed run would not continue the old one."""
    changed = [k for k in sorted({*old, *new} - {*FREE}) if old.get(k) != new.get(k)]
    if changed:
        why = {"total_steps": " (on which the learning rate of every step depends)"}
        was = [f"{k} was {old.get(k)}, is now {new.get(k)}{why.get(k, '')}" for k in changed]
        raise InputError(f"--resume: {'; '.join(was)}")


def compare(temperature: float, reference: list, policy: list) -> list[dict]:
    """Verdicts of two models on the same prompts -> final.csv's rows: both models and policy minus
    reference, with standard errors, the difference's of the paired values. Strict accuracy in
    percent."""
    scores = {
        name: np.array([[100 * v.strict, v.gold] for v in verdicts])
        for name, verdicts in (("reference", reference), ("policy", policy))
    }
    scores["difference"] = scores["policy"] - scores["reference"]
    rows = []
    for model, x in scores.items():
        strict, gold = zip(x.mean(0).tolist(), standard_error(x).tolist(), strict=True)
        values = temperature, model, len(x), *strict, *gold
        rows.append(dict(zip(FINAL_COLUMNS, values, strict=True)))
    return rows


def final_lines(rows: list[dict]) -> str:
    lines = [
        f"{rows[0]['n']} held-out prompts, exact judge; +- standard error of paired differences",
        "                strict accuracy, %                        gold score",
        "  T     reference  policy   difference       reference  policy   difference",
    ]
    for ref, policy, d in zip(*[iter(rows)] * 3, strict=True):
        strict = f"{d['strict_acc']:+6.1f} +- {d['strict_acc_se']:.1f}"
        gold = f"{d['mean_score']:+7.3f} +- {d['mean_score_se']:.3f}"
        lines.append(
            f"  {ref['temperature']:3.1f}   {ref['strict_acc']:9.1f} {policy['strict_acc']:7.1f}"
            f" {strict}   {ref['mean_score']:12.3f} {policy['mean_score']:7.3f} {gold}"
        )
    return "\n".join(lines)


def peak_gb(device: torch.device) -> float:
    """This rank's peak in GiB: allocated on a GPU, resident on a CPU (Linux counts it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    # some sandboxes lack that line; it is preferred as bench.py can set it back
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
