"""How much memory a training step needs: the real forward, run on tensors without data.

    plans = survey(steps, args, ranks)                               # packing.survey
    parts = estimated_memory(args, config, plans, device, shards)    # bytes by part

Training itself prints only what policy.least_memory computes. This closer estimate belongs to
tools/bench.py. It needs no GPU and reads no weight. Shapes as in train_ganpo.py.
"""

import cpu  # noqa: F401  must come before torch

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.autograd.graph import saved_tensors_hooks
from transformers import PretrainedConfig

import attention
import lora
import paired
import train_ganpo
from data import InputError
from discriminator import autocast_of, build_critics
from flags import DTYPES
from losses import OPO_LOSSES, with_settings
from packing import Packed, Survey, pack, tokens_in
from policy import least_memory, load_lm, rows_per_chunk
from settings import needs_reference


class NoEstimate(InputError):
    """The step cannot run on tensors without data; the message is the line to show."""


@contextmanager
def run_without_data(args, config: PretrainedConfig, device: torch.device) -> Iterator:
    """Opens a `with` block and yields a `run` like train_ganpo.build's, of tensors without data.

    device is where the run would take place. The tensors themselves lie on the CPU.
    """
    dtype, run = DTYPES[args.dtype], SimpleNamespace(args=args, ref=None)
    run.opo_loss = with_settings(args.loss, vars(args))
    run.of_rewards = OPO_LOSSES[args.loss].needs_ref, args.beta
    run.critics = build_critics(args, config.hidden_size)  # small enough to hold data
    run.autocast = autocast_of(torch.device("cpu"), dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        load = partial(load_lm, dtype=dtype, shell="cpu")
        adapters = lora.adapters_of(args)
        run.policy = load(args.model, checkpointing=args.checkpointing, adapters=adapters)
        if needs_reference(args):
            run.ref = lora.reference(run.policy) or load(args.ref_model).requires_grad_(False)
        yield run


def estimated_memory(
    args, config: PretrainedConfig, plans: Survey, device: torch.device, shards: int
) -> dict[str, float]:
    """Returns bytes by part that one rank holds at the peak of a step.

    args are train_ganpo.py's settings, config is the model's. plans says how the steps are divided
    into forwards. device is where they would run, which need not be here. shards is the number of
    ranks that share one copy of the weights. Raises NoEstimate if the loss or a critic asks for a
    tensor's value.
    """
    dtype = DTYPES[args.dtype]
    ref_model = args.ref_model if needs_reference(args) else None
    adapters = lora.adapters_of(args)
    parts = least_memory(args.model, ref_model, dtype, args.checkpointing, 0, shards, adapters)
    kind = attention.choose(args.attention, config, device, dtype)
    with run_without_data(args, config, device) as run:
        if kind == "flex":
            for layer in run.policy.model.base_model.layers:  # its kernel keeps no scores
                layer.self_attn.attn_logit_softcapping = None
        forwards = plans.heaviest if run.critics else [plans.longest]  # whose graphs live at once
        sample = forwards[len(forwards) // 2]
        batch = pack(sample)
        try:
            kept = kept_bytes(run, batch)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NoEstimate(
                "no estimate of memory: the loss or a critic reads a tensor's value, as .item() or"
                f" x[mask] does ({error.func})"
            ) from None
    # copies of embedding and head, and of a layer, and with them the gradients
    copies, in_use = (1, 2) if adapters else (3 if run.ref else 2, 3)
    lm = run.policy.model
    weights, layers = (
        sum(p.numel() for p in module.parameters()) for module in (lm, lm.base_model.layers)
    )
    vocabulary = lm.get_output_embeddings().weight.shape[0]
    rows = min(rows_per_chunk(vocabulary, device), len(batch.labels))
    fused = device.type == "cuda" and dtype == torch.bfloat16  # policy.fused_log_probs
    critics = sum(p.numel() for p in run.critics.parameters()) if run.critics else 0
    size = dtype.itemsize
    return parts | {
        "graphs": kept / tokens_in(sample) * sum(map(tokens_in, forwards)),
        "critics": 4 * max(4, size) * critics,
        # The embedding and head of each model stay whole during a step, the policy's with a
        # gradient. Of the layers, the one in use and the next are whole. LoRA has one model, and
        # no gradient of its weights.
        "unsharded": copies * size * (weights - layers)
        + in_use * size * layers / len(lm.base_model.layers),
        # A chunk's logits and their gradient. Unless fused, their softmax too, and in bfloat16 the
        # logits and the gradient in float32 once more.
        "logits": rows * vocabulary * (4 if fused else {2: 16, 4: 12, 8: 24}[size]),
    }


def kept_bytes(run, batch: Packed) -> int:
    """Returns the bytes that a micro-batch keeps until the policy's backward.

    They are what autograd saves, what forward_pairs returns, and what a hook on the latents holds.
    Each storage counts once, and the weights do not count.
    """
    kept = {}

    def note(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with saved_tensors_hooks(note, lambda x: x):
        out = train_ganpo.forward_pairs(run, batch)
        scores = run_critics(run, out) if run.critics else []
    for x in (*vars(out).values(), *scores):
        if torch.is_tensor(x):
            note(x)
    modules = [m for m in (run.policy, run.ref, run.critics) if m is not None]
    for p in (p for module in modules for p in module.parameters()):
        kept.pop(p.untyped_storage()._cdata, None)
    in_hook = 0
    if run.args.lambda_adv > 0:  # report.alignment_hook's h_ref - h_theta, (T, H)
        in_hook = len(batch.ids) * out.h.shape[-1] * out.h.element_size()
    return in_hook + sum(storage.nbytes() for storage in kept.values())


def run_critics(run, out) -> list[torch.Tensor]:
    """Scores the latents of a micro-batch at the moment at which most of the graphs are alive.

    That is before the discriminators' backward, or with the paired critic before the policy's. out
    is what forward_pairs returned. Returns the scores.
    """
    if run.args.critic not in paired.CRITICS:
        return [train_ganpo.quad_scores(run, out.h_ref, out.h.detach(), out.mask)]
    run.critics.requires_grad_(False)
    return [
        critic.token_scores(x)
        for _, critic, h_theta, h_ref, *_ in paired.of_each_critic(run, out)
        for x in critic.inputs(h_theta, h_ref)
    ]
