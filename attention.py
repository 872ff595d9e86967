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

from attention_gpu import Flex, Varlen, fitting_options
from data import InputError
from packing import Packed

NAME = "shared_prompt"  # under which transformers finds the attention below


def choose(wanted: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Returns loop, varlen or flex for --attention, here `wanted`, which may be auto.

    dtype is the precision of compute. Raises InputError if the wanted kind cannot run there or
    would give wrong results for this model. On a GPU flex's kernels are compiled here.
    """
    kernels = device.type == "cuda" and dtype == torch.bfloat16
    config = config.get_text_config()
    softcap = getattr(config, "attn_logit_softcapping", None)
    if wanted == "auto":
        wanted = ("flex" if softcap else "varlen") if kernels else "loop"
    if wanted != "loop" and not kernels:
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"--attention {wanted} needs a GPU and bfloat16; here are {device.type} and {name}"
        )
    if wanted == "varlen" and softcap:
        raise InputError("--attention varlen has no soft-capping, which this model needs: use flex")
    if wanted == "flex" and torch.cuda.is_available():
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        fitting_options(heads, key_heads, size, softcap, device)
    return wanted


def layout(kind: str, batch: Packed):
    """Returns the Loop, Varlen or Flex of a packed row, made once per forward for all layers."""
    return LAYOUTS[kind](batch)


def shared_prompt_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None,
    layout=None, **unused,
):  # fmt: skip
    """The attention that transformers calls in every layer, over one packed row.

    query is (1, heads, T, E), E the size of a head; key and value have as many heads or a divisor
    of that number. layout comes from layout() above; attention_mask is not used. Returns the output
    (1, T, heads, E), and None in place of attention weights. Raises ValueError if the model was
    called without a layout.
    """
    if layout is None:
        raise ValueError(
            f"attention {NAME!r} needs a layout: call the model through policy.PackedLM"
        )
    return layout.attend(query, key, value, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, shared_prompt_attention)


class Loop:
    """One answer after the other, by torch's scaled_dot_product_attention."""

    padding = 0  # tokens that the model has to read after the row

    def __init__(self, batch: Packed):
        self.prompts = [segment[1] for segment in batch.segments]
        # tokens of prompt and chosen answer together, then of the rejected one, pair by pair
        self.sizes = [n for _, p, c, r in batch.segments for n in (p + c, r)]
        self.masks = {}  # every layer uses the same ones

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling, window, softcap) -> Tensor:
        """Returns (1, T, heads, E). window is the number of keys that a query sees, or None."""
        out = []
        # one split, because the gradient of a slice of the row is a whole row of zeros
        parts = zip(*(x.split(self.sizes, dim=2) for x in (query, key, value)), strict=True)
        for n_prompt, (q, k, v), (q_own, k_own, v_own) in zip(
            self.prompts, *[iter(parts)] * 2, strict=True
        ):
            # the rejected answer sees the keys of the prompt and its own
            k_own = torch.cat([k[:, :, :n_prompt], k_own], dim=2)
            v_own = torch.cat([v[:, :, :n_prompt], v_own], dim=2)
            for qkv in ((q, k, v), (q_own, k_own, v_own)):
                mask = self.mask(qkv[0], qkv[1], window, softcap)
                out.append(causal_attention(*qkv, mask, scaling, softcap))
        return torch.cat(out, dim=2).transpose(1, 2)

    def mask(self, q: Tensor, k: Tensor, window: int | None, softcap: float | None):
        """Returns what is added to the scores (n, m): 0 where a query sees a key, else -inf.

        q has n positions, the last of the m that k has. Returns None where the kernel needs no
        mask: n = m, no soft cap, and no window shorter than m.
        """
        n, m = q.shape[2], k.shape[2]
        windowed = window is not None and m > window
        if n == m and not windowed and softcap is None:
            return None
        kind = n, m, window if windowed else None
        if kind not in self.masks:
            seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
            if windowed:
                seen = seen.triu(m - n - window + 1)
            mask = torch.zeros(n, m, dtype=q.dtype, device=q.device)
            self.masks[kind] = mask.masked_fill(~seen, float("-inf"))
        return self.masks[kind]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling, softcap):
    """Returns causal attention (1, heads, n, E), with a soft cap of the scores if that is given.

    q is (1, heads, n, E); k and v are (1, key heads, m, E). mask comes from Loop.mask.
    """
    if softcap is None:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return (scores + mask).softmax(-1).to(q.dtype) @ v


LAYOUTS = {"loop": Loop, "varlen": Varlen, "flex": Flex}
