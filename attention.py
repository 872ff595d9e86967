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
        if backward_is_slow(q) and torch.is_grad_enabled():
            return FastBackward.apply(q, k, v, mask, scaling)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return (scores + mask).softmax(-1).to(q.dtype) @ v


def backward_is_slow(q: Tensor) -> bool:
    """Returns whether FastBackward is faster than scaled_dot_product_attention's own backward."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


class FastBackward(torch.autograd.Function):
    """scaled_dot_product_attention for bfloat16 on a CPU, whose own backward is several times
    slower than products of whole matrices. Arguments as in causal_attention.

    In backward the logarithm of the softmax's divisor becomes three further columns of the queries,
    and what is subtracted from the gradient of the softmax three of the gradient. So both are
    subtracted within the product, which adds in float32, and only then is the result rounded.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scaling):
        ctx.scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        more = dict(is_causal=mask is None, attn_mask=mask, scale=scaling)
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, divisor = kernel(q, keys, values, **more)
        ctx.save_for_backward(q, k, v, mask, out, divisor)
        return out

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, mask, out, divisor = ctx.saved_tensors
        k, v, n = k[0], v[0], q.shape[2]
        inner = (gradient * out).sum(-1, keepdim=True, dtype=divisor.dtype)
        q_and = with_columns(q, -divisor[..., None] / ctx.scaling, len(k))
        gradient_and, zero = with_columns(gradient, -inner, len(k)), q.new_zeros(1, 1, 1)
        ones = k.new_ones(*k.shape[:2], 3)
        p = torch.baddbmm(zero, q_and, torch.cat([k, ones], -1).mT, beta=0, alpha=ctx.scaling)
        scores = p.unflatten(1, (-1, n))
        if mask is None:
            scores.exp_().tril_()
        else:
            scores.add_(mask).exp_()
        of_scores = (gradient_and @ torch.cat([v, ones], -1).mT).mul_(p)
        of_q = (of_scores @ k).mul_(ctx.scaling).view(q.shape)
        of_k = (of_scores.mT @ q_and[..., :-3]).mul_(ctx.scaling)
        return of_q, of_k[None], (p.mT @ gradient_and[..., :-3])[None], None, None


def with_columns(x: Tensor, column: Tensor, key_heads: int) -> Tensor:
    """Returns x (1, heads, n, E) with a column (1, heads, n, 1), which is split into three numbers
    of the precision of x, as (key heads, n of each of its queries, E + 3)."""
    high = column.to(x.dtype)
    middle = (column - high).to(x.dtype)
    low = (column - high - middle).to(x.dtype)
    return torch.cat([x, high, middle, low], -1).view(key_heads, -1, x.shape[-1] + 3)


LAYOUTS = {"loop": Loop, "varlen": Varlen, "flex": Flex}
