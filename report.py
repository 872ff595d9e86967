"""What a training run reports: the header, one line per step, the csv files and config.json.

Columns of metrics.csv are exact means over all pairs of the step on all ranks, taken before the
policy's update. Those of the adversarial loss (loss_adv, adv_to_opo_grad, adv_align) are taken
after the discriminators' update. A column that a setting has no value for stays empty. docs/log.md
explains each column. Shapes as in train_ganpo.py.
"""

import cpu

import csv
import io
import json
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Callable
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import paired
from data import InputError, PreferenceData, input_error_for
from distributed import from_rank_0, print0
from losses import LN2
from packing import Packed, Survey
from policy import at_least_fp32
from settings import parse_args, unused_flags
from winrate import standard_error

COLUMNS = (
    "step loss_opo loss_adv loss_disc_pos loss_disc_neg d_ra reward_chosen reward_rejected margin"
    " pref_acc disc_acc_pos disc_acc_neg score_gap_pos score_gap_neg latent_mse adv_to_opo_grad"
    " adv_align grad_norm disc_grad_norm lr disc_lr tokens tokens_per_s peak_gb seconds"
).split()
EVAL_COLUMNS = "step loss accuracy margin pairs".split()
FINAL_COLUMNS = "temperature model n strict_acc strict_acc_se mean_score mean_score_se".split()

# ---------------------------------------------------------------------- the metrics of a step


def squares_hook(per_pair: dict, name: str, batch: Packed) -> Callable:
    """Returns a gradient hook that stores each pair's sum of squares as per_pair[name], (b,)."""
    per_pair[name] = batch.lengths.new_zeros(len(batch.rows))  # where no gradient arrives

    def hook(gradient):
        of_token = at_least_fp32(gradient).square().sum(-1)
        per_pair[name] = torch.stack([x.sum() for x in batch.split_by_pair(of_token)])

    return hook


def alignment_hook(per_pair: dict, towards_reference: Tensor, batch: Packed) -> Callable:
    """Returns a gradient hook that stores how well the push on the latents is aligned.

    The push is -gradient, (T, H); towards_reference is h_ref - h_theta, (T, H). For each pair the
    sum over its tokens of the two vectors' cosine becomes per_pair["adv_align"], and the number of
    its tokens per_pair["adv_tokens"], (b,) each.
    """
    of_chosen = batch.mask.sum(1)[: len(batch.rows)]  # prompt and chosen answer
    per_pair["adv_tokens"] = of_chosen + batch.lengths[len(batch.rows) :]
    per_pair["adv_align"] = torch.zeros_like(per_pair["adv_tokens"])

    def hook(gradient):
        cosines = F.cosine_similarity(
            -at_least_fp32(gradient), at_least_fp32(towards_reference), dim=-1
        )
        per_pair["adv_align"] = torch.stack([x.sum() for x in batch.split_by_pair(cosines)])

    return hook


def step_metrics(parts: list, of_batch: dict[str, Tensor], args, step: int) -> dict[str, float]:
    """Returns a step's metrics as numbers, equal on all ranks.

    parts holds for each micro-batch of this rank the row numbers of its pairs and the values of
    each pair, name to (b,). They are gathered from all ranks, and become exact means. of_batch
    holds scalars that are those of the global batch already. Raises FloatingPointError, on all
    ranks, if a value is not finite; the message names the metric and the rows of the data.
    """
    device = of_batch["grad_norm"].device
    names = sorted(parts[0][1])  # one order on all ranks
    columns = [torch.cat([of_pair[name].double() for _, of_pair in parts]) for name in names]
    rows = [row for rows, _ in parts for row in rows]
    columns.append(torch.tensor(rows, dtype=torch.float64, device=device))
    mine = torch.stack(columns, dim=1).contiguous()
    everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, mine)
    scalars = torch.stack([x.double() for x in of_batch.values()])
    # one transfer to the host: all pairs' values, then the scalars
    flat = torch.cat([torch.cat(everywhere).flatten(), scalars]).tolist()
    of_pairs = np.array(flat[: -len(scalars)]).reshape(-1, len(columns))
    totals = dict(zip(names, of_pairs[:, :-1].sum(0).tolist(), strict=True))
    m = dict(zip(of_batch, flat[-len(scalars) :], strict=True))
    refuse_what_is_not_finite(totals | m, of_pairs, step)
    adv, opo = totals.pop("adv_grad", None), totals.pop("opo_grad", None)
    tokens_of_push = totals.pop("adv_tokens", None)
    align, tokens = totals.pop("adv_align", None), totals.pop("tokens")
    m |= {name: total / args.batch_size for name, total in totals.items()}
    m |= {"tokens": tokens, "margin": m["reward_chosen"] - m["reward_rejected"]}
    if adv is not None:
        m["adv_align"] = align / tokens_of_push
        if opo:
            m["adv_to_opo_grad"] = math.sqrt(adv / opo)
    return m


def refuse_what_is_not_finite(m: dict[str, float], of_pairs: np.ndarray, step: int):
    """Raises FloatingPointError if a metric is not finite.

    of_pairs is (B, K + 1): each pair's K values and its row number. The rows that are named are
    those with a value that is not finite; all rows of the step if no single pair is to blame.
    """
    for name, value in m.items():
        if not math.isfinite(value):
            bad = ~np.isfinite(of_pairs[:, :-1]).all(1)
            rows = of_pairs[bad if bad.any() else slice(None), -1]
            raise FloatingPointError(
                f"step {step + 1}: {name} is {value}; the policy was not updated; rows of the data"
                f" (from 0): {', '.join(str(int(row)) for row in sorted(rows))}"
            )


def peak_gb(device: torch.device) -> float:
    """Returns this rank's peak memory in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:  # preferred, because a benchmark can set this peak back
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:  # not on macOS
        found = None
    if found:
        return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---------------------------------------------------------------------- csv files


class Table:
    """A csv file to which rows are added.

    Opened again after `step` finished steps, it keeps the rows of those steps and goes on after
    them; with step 0 it starts empty. Rank 0 writes; on the other ranks nothing happens.
    """

    def __init__(self, path: Path, columns: list[str], step: int = 0):
        self.file, self.steps = None, set()
        if dist.get_rank() == 0:
            rows = []
            if step and path.exists():
                rows = [row for row in whole_rows(path) if int(row["step"]) <= step]
            elif step:
                print0(f"{path} is gone: it begins anew after step {step}")
            self.steps = {int(row["step"]) for row in rows}
            unfinished = path.with_name(f".{path.name}.unfinished")
            self.file = unfinished.open("w", newline="")
            self.writer = csv.DictWriter(self.file, columns)
            self.writer.writeheader()
            with input_error_for(f"{path} is not of this run"):  # it has other columns
                self.writer.writerows(rows)
            self.sync()
            unfinished.rename(path)  # at no moment are the old rows in no file

    def write(self, row: dict):
        """Adds a row; floats are written with nine digits."""
        if self.file:
            short = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
            self.writer.writerow(short)
            self.file.flush()

    def sync(self):
        """Writes the rows to the disk, before a state says that their steps are done."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


def whole_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of metrics.csv or eval.csv, as text.

    A last row without its end is left out, because it may just be written. Raises InputError if the
    file is no such table, or if a row has more or fewer values than there are columns.
    """
    with input_error_for(f"{path} is damaged"):
        text = Path(path).read_text()
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        for i, row in enumerate(rows):
            if None in row or None in row.values():
                raise InputError(f"row {i} has more or fewer values than there are columns")
            int(row["step"])
    return rows


def read_table(path: Path) -> list[dict[str, float]]:
    """Returns the numbers of whole_rows(path) without empty columns; raises InputError likewise."""
    rows = whole_rows(path)
    with input_error_for(f"{path} is damaged"):
        numbers = [{k: float(v) for k, v in row.items() if v} for row in rows]
    return [row | {"step": int(row["step"])} for row in numbers]


# ---------------------------------------------------------------------- the terminal


def log_line(m: dict, max_steps: int, seconds_left: float) -> str:
    """Returns one step's line, of fixed width, with '-' for values that these settings lack."""

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
    """Returns what the log shows while the critics cannot tell policy from reference."""
    if args.lambda_adv == 0:
        return f"--lambda_adv 0: plain {args.loss}, no critic"
    if args.critic == "mse":
        return "neutral value: adv 0, the squared distance where policy = reference"
    if args.critic in paired.CRITICS:
        values = paired.neutral_values(args)
    else:
        terms = (2 if args.ema_decay else 4) * (-1 if args.adv_loss == "minimax" else 1)
        values = f"adv {terms * LN2:+.4f}, D {4 * LN2:.4f}, D acc 0.50, d_ra 0, score_gap 0"
    return f"neutral values (critics that cannot tell policy from reference): {values}"


def compute_line(device: torch.device) -> str:
    """Returns a line about the device, and on a CPU about what cpu.py finds and sets."""
    if device.type == "cuda":
        return f"device: {torch.cuda.get_device_name(device)}"
    amx = "AMX for bfloat16" if cpu.has_amx() else "no AMX"
    threads = f"{torch.get_num_threads()} threads per process"
    spin = "GOMP_SPINCOUNT " + os.environ.get("GOMP_SPINCOUNT", "not set")
    return (
        f"device: cpu, {amx}, {threads} of {cpu.cores()} cores, {spin}"
        f"{'' if cpu.SPIN_COUNT_IS_OURS else ' (your own setting)'}; freed memory is"
        f" {'kept' if cpu.freed_memory_is_kept else 'given back'}"
    )


def print_header(
    run,
    argv: list[str],
    tokenizer: PreTrainedTokenizerBase,
    data: PreferenceData,
    held_out: PreferenceData | None,
    survey: Survey,
):
    """Prints what this run is: settings, division into forwards, data, sizes, the first pair."""
    args = run.args
    preset = parse_args([f"--preset={args.preset}"])
    vary = {k: v for k, v in vars(args).items() if v != getattr(preset, k, None)}
    own = [f"{k}={v}" for k, v in vary.items() if k != "out_dir"]
    print0(f"preset {' '.join([args.preset, *own])}; all settings: {args.out_dir}/config.json")
    for reason, unused in unused_flags(args, argv).items():
        print0(f"not used with {reason}: {', '.join(unused)}")
    forwards = f"{survey.fewest}"
    if survey.fewest != survey.most:
        forwards += f" to {survey.most}"
    ranks = f"{run.ranks} rank(s)"
    if run.ranks > 1:
        ranks += f" (the busiest has {survey.imbalance:.1%} more tokens than the mean)"
    print0(
        f"{args.batch_size} pairs/step = {ranks} x {forwards} forward(s) of up to"
        f" {args.micro_batch_size} pairs, {args.micro_tokens:,} tokens; {len(data.triplets)} pairs"
        f" = {data.steps(args.batch_size)} steps/epoch,"
        f" {len(data.triplets) % args.batch_size} left over;"
        f" {run.max_steps} steps"
    )
    kind = run.policy.attention_kind
    print0(f"{compute_line(run.device)}; {args.dtype}; attention: {kind}")
    print0(f"data: {data.summary()}; fingerprint {data.fingerprint}")
    if held_out:
        print0(f"held out: {held_out.summary()}")
    modules = {"policy": run.policy, "ref": run.ref, "critics": run.critics}
    sizes = {k: sum(p.numel() for p in m.parameters()) for k, m in modules.items() if m is not None}
    print0("parameters: " + ", ".join(f"{name} {n:,}" for name, n in sizes.items() if n))
    if run.policy.adapters:
        note = "; the reference is the policy without them" if run.ref else ""
        print0(f"LoRA: {run.policy.adapters}{note}")
    print0(neutral_values(args))
    t = data.triplets[0]
    for name, ids in (("chosen", t.chosen), ("rejected", t.rejected)):
        answer = tokenizer.decode(ids)
        if len(ids) > 50:
            answer = f"{tokenizer.decode(ids[:25])} [...] {tokenizer.decode(ids[-25:])}"
        prompt = "[...] " * (len(t.prompt) > 50) + tokenizer.decode(t.prompt[-50:])
        tokens = f"{len(t.prompt)} + {len(ids)} tokens"
        # what is scored stands between the marks
        print0(f"first pair, {name}: {prompt!r} >>>{answer!r}<<< ({tokens})")


# ---------------------------------------------------------------------- config.json

# These may differ when a run is resumed, because its result stays the same. What a path leads to is
# known by a fingerprint.
MAY_CHANGE_ON_RESUME = (
    "preset model ref_model dataset dataset_config split strip_thinking chat_template eval_split"
    " golden human held_out exam eval_every micro_batch_size micro_tokens attention checkpointing"
    " save_every keep timeout stop_after epochs max_steps out_dir resume versions device ranks"
    " threads held_out_fingerprint pairs dropped notes steps_per_epoch"
).split()
# Of these the last bits of a float32 sum depend.
EXACT_ONLY_WITH = "versions device ranks threads micro_batch_size micro_tokens attention".split()
# What has changed if a fingerprint has.
FINGERPRINTS = {
    "model_weights": "{model} holds other weights than the run began with",
    "model_config": "{model} has another config.json or generation_config.json than the run"
    " began with",
    "ref_model_weights": "{ref_model} holds other weights than the run began with",
    "ref_model_config": "{ref_model} has another config.json or generation_config.json than the run"
    " began with",
    "data_fingerprint": "the data are not those that the run began with (other rows, another"
    " tokenizer or another chat template)",
}


def config_of(
    args,
    device: torch.device,
    data: PreferenceData,
    held_out: PreferenceData | None,
    max_steps: int,
) -> dict:
    """Returns what config.json holds, as it will be read back.

    That is all settings, versions, the fingerprint of the data, and the numbers that follow from
    them.
    """
    names = ("torch", "transformers", "datasets", "numpy")
    config = vars(args) | {
        "versions": {n: version(n) for n in names} | {"python": platform.python_version()},
        "device": str(device),
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
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
    """Returns what a run wrote to its config.json, or None if the folder holds no run."""
    try:
        config = json.loads((Path(out_dir) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    is_run = isinstance(config, dict) and "data_fingerprint" in config
    return config if is_run else None  # a model's folder has such a file too


def template_day(args) -> str | None:
    """Returns the day that a chat template which writes today's date writes in this run: today, or
    that on which a run that is resumed, or repeated from its config.json, began. All ranks call it
    and get that of rank 0."""

    def read():
        config = read_config(args.out_dir) if args.resume else vars(args)
        return config and config.get("template_day") or str(date.today())

    return from_rank_0(read, "")


def check_same(old: dict, new: dict):
    """Raises InputError that names everything by which a resumed run would not continue the old
    one. Prints what lets it continue only up to rounding."""
    values = {
        k: f"was {old.get(k)}, is now {new.get(k)}"
        for k in sorted({*old, *new})
        if old.get(k) != new.get(k)
    }
    differences = []
    for k in [k for k in values if k not in MAY_CHANGE_ON_RESUME]:
        text = f"{k} {values[k]}"
        if k in FINGERPRINTS:
            text = f"{FINGERPRINTS[k].format(**new)}: the fingerprint {values[k]}"
        elif k == "total_steps":
            text += " (on which the learning rate of every step depends)"
        differences.append(text)
    if differences:  # one text, if policy and reference are one model
        raise InputError(f"--resume: {'; '.join(dict.fromkeys(differences))}")
    if old.get("held_out_fingerprint") not in (None, new.get("held_out_fingerprint")):
        print0("--resume: the held-out pairs are other ones: eval.csv's new rows are about those")
    if rounding := [f"{k} {values[k]}" for k in EXACT_ONLY_WITH if k in values]:
        print0(f"--resume: equal up to rounding, not bit for bit: {'; '.join(rounding)}")


# ---------------------------------------------------------------------- the miniature's final table


def compare(temperature: float, reference: list, policy: list) -> list[dict]:
    """Returns three rows of final.csv: reference, policy, and policy minus reference.

    reference and policy are the judge's verdicts (miniature.world.Verdict) on the same prompts.
    Strict accuracy is in percent. Errors are standard errors of the mean; those of the difference
    are of the paired values.
    """
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
    """Returns the rows of final.csv as a table for the terminal."""
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
    return "\n".join(lines).replace("nan", "-")  # one prompt has no error
