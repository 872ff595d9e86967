"""What a run will hold, before a weight is read: its steps cut into forwards, and their memory,
from the real forward on tensors without data.

    cut = survey(steps, args, ranks)             # how their pairs will be cut into forwards
    needs = needed_memory(forward_pairs, args, config, cut, device, shards)    # bytes by part
    refuse_what_cannot_fit(needs, device)
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from game import autocast, build_critics
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.autograd.graph import saved_tensors_hooks
from transformers import PretrainedConfig

import attention
from data import InputError, Triplet, pack, plan_forwards, row_length
from flags import DTYPES
from losses import needs_reference
from policy import load_lm, rows_per_chunk


class Survey(NamedTuple):
    fewest: int  # forwards in a step
    most: int
    imbalance: float  # the busiest rank's tokens over the ranks' mean, minus 1, averaged over steps
    longest: list[Triplet]  # the forward with the most tokens
    heaviest: list[list[Triplet]]  # one rank's forwards of one step that have the most together


def tokens_in(pairs: list[Triplet]) -> int:
    return sum(map(row_length, pairs))


def survey(steps: Iterable[list[Triplet]], args, ranks: int) -> Survey:
    """steps: each one's pairs. How the loop will cut them."""
    counts, imbalance, longest, heaviest, most = [], [], [], [], 0
    for pairs in steps:
        parts = plan_forwards(pairs, ranks, args.micro_batch_size, args.micro_tokens)
        tokens = np.array([[tokens_in(mine) for mine in part] for part in parts])
        of_rank = tokens.sum(0)
        counts.append(len(parts))
        imbalance.append(of_rank.max() / of_rank.mean() - 1)
        part, rank = np.unravel_index(tokens.argmax(), tokens.shape)
        longest = max(longest, parts[part][rank], key=tokens_in)
        if of_rank.max() > most:
            most, rank = of_rank.max(), of_rank.argmax()
            heaviest = [part[rank] for part in parts]
    return Survey(min(counts), max(counts), float(np.mean(imbalance)), longest, heaviest)


@contextmanager
def players_without_weights(args, config: PretrainedConfig):
    """The `run` that forward_pairs takes, of tensors that have shapes only."""
    dtype, run = DTYPES[args.dtype], SimpleNamespace(args=args, ref=None)
    run.critics = build_critics(args, config)  # real, being small
    with FakeTensorMode(allow_non_fake_inputs=True):
        load = partial(load_lm, dtype=dtype, shell="cpu")
        run.policy = load(args.model, checkpointing=args.checkpointing)
        if needs_reference(args):
            run.ref = load(args.ref_model).requires_grad_(False)
        yield run


def needed_memory(
    forward_pairs: Callable,
    args,
    config: PretrainedConfig,
    cut: Survey,
    device: torch.device,
    shards: int,
) -> dict[str, float]:
    """Bytes by part on one rank at the peak of a step, of models that have no weights yet;
    forward_pairs(run, batch, sums) is the loop's."""
    dtype = DTYPES[args.dtype]
    with players_without_weights(args, config) as run:
        run.autocast = autocast(device, dtype, torch.device("cpu"))
        if attention.choose(args.attention, config, device, dtype) == "flex":
            for layer in run.policy.model.base_model.layers:  # its kernel keeps no scores
                layer.self_attn.attn_logit_softcapping = None
        forward = partial(forward_pairs, run, sums=defaultdict(float))
        try:
            return memory(run, forward, cut, shards)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise InputError(
                f"a loss or critic asks for a tensor's value, by .item(), an `if` or x[mask]"
                f" ({error.func}): it must work on tensors without data, as this estimate has"
            ) from None


def memory(run, forward: Callable, cut: Survey, shards: int) -> dict[str, float]:
    """Bytes on one rank at the peak of a step, by part. run holds the players as fake tensors in
    the dtype of compute, forward(batch) is that of a micro-batch."""
    forwards = cut.heaviest if run.critics else [cut.longest]  # whose graphs are alive at once
    sample = forwards[len(forwards) // 2]
    batch = pack(sample)
    lm = run.policy.model
    size = next(lm.parameters()).element_size()  # of compute
    master = max(4, size)
    weights = sum(p.numel() for p in lm.parameters())
    layers = sum(p.numel() for p in lm.base_model.layers.parameters())
    kept = kept_bytes(lambda: forward(batch), run)
    vocabulary = lm.get_output_embeddings().weight.shape[0]
    rows = min(rows_per_chunk(vocabulary), len(batch.labels))
    models = 1 if run.ref is None else 2
    critics = sum(p.numel() for p in run.critics.parameters()) if run.critics else 0
    return {
        "weights, moments, gradients": 4 * master * (weights / shards + critics),
        "reference": (models - 1) * size * weights / shards,
        # embedding and head of each model stay whole during a step, with a gradient; of the layers
        # the one in use and the next do
        "unsharded": (models + 1) * size * (weights - layers)
        + 3 * size * layers / len(lm.base_model.layers),
        # a chunk's logits, their softmax and its gradient, twice the first and last in bfloat16
        "logits": rows * vocabulary * {2: 16, 4: 12, 8: 24}[size],
        "graphs": kept / tokens_in(sample) * sum(map(tokens_in, forwards)),
    }


def kept_bytes(forward: Callable, run) -> int:
    """Of what forward() returns and autograd keeps for its backward, each storage once, the
    players' own weights left out."""
    kept = {}

    def note(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with saved_tensors_hooks(note, lambda x: x):
        out = forward()
    for x in vars(out).values():
        if torch.is_tensor(x):
            note(x)
    players = [m for m in (run.policy, run.ref, run.critics) if m is not None]
    for p in (p for module in players for p in module.parameters()):
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def available(device: torch.device) -> float:
    """Bytes that one rank may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (text := container.read_text().strip()) != "max":
        limits.append(int(text))
    return min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def gigabytes(needs: dict) -> str:
    parts = ", ".join(f"{part} {n / 2**30:.2f}" for part, n in needs.items())
    return f"memory per rank, estimated: {sum(needs.values()) / 2**30:.2f} GB ({parts})"


def refuse_what_cannot_fit(needs: dict, device: torch.device):
    """InputError where what is certainly there at once is more than the device has."""
    certain = sum(needs[part] for part in ("weights, moments, gradients", "reference", "graphs"))
    there = available(device)
    if certain > there:
        raise InputError(
            f"{gigabytes(needs)}; there: {there / 2**30:.2f} GB. More ranks, --checkpointing, or"
            " without a discriminator a smaller --micro_tokens need less"
        )
