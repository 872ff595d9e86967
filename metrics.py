"""What a step measures: sums over pairs on every rank, of which one all-reduce makes the exact
means in metrics.csv (its columns: report.py). Shapes: b pairs of a micro-batch, T tokens of its
packed row, H hidden."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data import Packed
from losses import LogProbs, rewards, share_above_0
from policy import at_least_fp32


def refuse_what_is_not_finite(metrics: dict, watched: list, step: int):
    """FloatingPointError, on all ranks, as metrics are the same on all, naming term and rows.
    watched: of each micro-batch its rows, and values of each pair, (..., b)."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            rows = ", ".join(map(str, offenders(watched)))
            raise FloatingPointError(
                f"step {step + 1}: {name} is {value}; the step was not taken; rows of the data"
                f" (from 0): {rows}"
            )


def offenders(watched: list) -> list[int]:
    """The rows, on all ranks, of which some value is not finite; all of the step's if it was only a
    gradient."""
    mine = []
    for rows, values in watched:
        finite = torch.stack([v.isfinite().reshape(-1, len(rows)).all(0) for v in values]).all(0)
        mine += zip(rows, finite.tolist(), strict=True)
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    found = [pair for share in shares for pair in share]
    return sorted({row for row, finite in found if not finite} or {row for row, _ in found})


def add_alignment(sums: dict, towards: Tensor):
    """A gradient hook: the cosine, token by token, of the push -gradient with `towards` (T, H), the
    way to the reference."""

    def hook(grad):
        cosines = F.cosine_similarity(-at_least_fp32(grad), at_least_fp32(towards), dim=-1)
        sums["adv_align"] += cosines.sum()
        sums["adv_tokens"] += cosines.numel()

    return hook


def add_squares(sums: dict, name: str):
    """A gradient hook that adds |gradient|^2 to sums[name]."""

    def hook(grad):
        sums[name] += at_least_fp32(grad).square().sum()

    return hook


@torch.no_grad()
def sum_pairs(sums: dict, lp: LogProbs, losses: Tensor, batch: Packed, args):
    """Adds a micro-batch to the sums over pairs that become metrics."""
    chosen, rejected = rewards(lp, args)
    sums["loss_opo"] += losses.sum()
    sums["reward_chosen"] += chosen.sum()
    sums["reward_rejected"] += rejected.sum()
    sums["pref_acc"] += share_above_0(chosen - rejected).sum()
    sums["tokens"] += batch.real_tokens


def reduce_metrics(sums: dict, metrics: dict, args) -> dict[str, float]:
    """One all-reduce of the sums over pairs, one transfer to the host -> floats."""
    device = metrics["grad_norm"].device
    total = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=device) for v in sums.values()]
    )
    dist.all_reduce(total)
    values = torch.cat([total, torch.stack([v.double() for v in metrics.values()])]).tolist()
    m = dict(zip([*sums, *metrics], values, strict=True))
    for name in {*sums} - {"tokens", "adv_grad", "opo_grad", "adv_align", "adv_tokens"}:
        m[name] /= args.batch_size
    m["margin"] = m["reward_chosen"] - m["reward_rejected"]
    if args.lambda_adv > 0:
        adv, opo = m.pop("adv_grad"), m.pop("opo_grad")
        m["adv_align"] /= m.pop("adv_tokens")
        if opo:
            m["adv_to_opo_grad"] = math.sqrt(adv / opo)
        if args.disc == "mse":
            m["loss_adv"] = m["latent_mse"]
    return m
