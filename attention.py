"""Attention over packed rows, in which the two answers of a pair share one prompt.

    loop     one answer after the other; any device and precision; what a CPU uses
    varlen   one kernel for the whole row (torch.nn.attention.varlen); bfloat16 on a GPU
    flex     flex_attention with block masks; bfloat16 on a GPU; soft-capped scores (Gemma-2)

A row of T tokens is [prompt, chosen, rejected] [prompt, chosen, rejected] ... Both answers continue
the prompt, and the rejected one does not see the chosen one. transformers by itself would read such
a row by its position ids: it would take each rejected answer for a new sequence without its prompt.
So the model's attention is always replaced by one of these three, and none of the three silently
replaces another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig

from attention_gpu import Flex, Varlen
from data import InputError
from packing import Packed

NAME = "shared_prompt"  # under which transformers finds the attention below


def choose(wanted: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Returns loop, varlen or flex for --attention, here `wanted`, which may be auto.

    dtype is the precision of compute. Raises InputError if the wanted kind cannot run there or
    would give wrong results for this model.
    """
    kernels = device.type == "cuda" and dtype == torch.bfloat16
    softcap = getattr(config, "attn_logit_softcapping", None)
    if wanted == "auto":
        return ("flex" if softcap else "varlen") if kernels else "loop"
    if wanted != "loop" and not kernels:
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"--attention {wanted} needs a GPU and bfloat16; here are {device.type} and {name}"
        )
    if wanted == "varlen" and softcap:
        raise InputError("--attention varlen has no soft-capping, which this model needs: use flex")
    return wanted


def layout(kind: str, batch: Packed):
    """Returns what the attention of every layer needs to know of a row; made once per forward."""
    return LAYOUTS[kind](batch)


def shared_prompt_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None,
    layout=None, **unused,
):  # fmt: skip
    """The attention that transformers calls in every layer, over one packed row.

    query is (1, heads, T, D); key and value have as many heads or a divisor of that number. layout
    comes from layout() above. Returns the output (1, T, heads, D), and None in place of attention
    weights. Raises ValueError if the model was called without a layout.
    """
    if layout is None:
        raise ValueError(
            f"attention {NAME!r} needs a layout: call the model through policy.PackedLM"
        )
    return layout.attend(query, key, value, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, shared_prompt_attention)


class Loop:
    """One answer after the other, by torch's scaled_dot_product_attention."""

    def __init__(self, batch: Packed):
        self.segments = batch.segments

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling, window, softcap) -> Tensor:
        """Returns (1, T, heads, D). window is the number of keys that a query sees, or None."""
        out, settings = [], (scaling, window, softcap)
        for start, n_prompt, n_chosen, n_rejected in self.segments:
            prompt, first = start + n_prompt, start + n_prompt + n_chosen
            q, k, v = (x[:, :, start:first] for x in (query, key, value))
            out.append(causal_attention(q, k, v, *settings))
            own = slice(first, first + n_rejected)  # it sees the prompt's keys and its own
            k, v = (torch.cat([x[:, :, start:prompt], x[:, :, own]], dim=2) for x in (key, value))
            out.append(causal_attention(query[:, :, own], k, v, *settings))
        return torch.cat(out, dim=2).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scaling, window, softcap) -> Tensor:
    """Returns causal attention (1, heads, n, D), with a soft cap and a window if those are given.

    q (1, heads, n, D) holds the last n positions of the sequence of m positions that k and v
    (1, key heads, m, D) cover.
    """
    n, m = q.shape[2], k.shape[2]
    windowed = window is not None and m > window
    mask = None
    if n < m or windowed or softcap is not None:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if windowed:
            mask = mask.triu(m - n - window + 1)
    if softcap is None:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype) @ v


LAYOUTS = {"loop": Loop, "varlen": Varlen, "flex": Flex}
