"""Attention over packed rows, in which the two answers of a pair share one prompt: three ways.

    loop     each answer's attention by itself: any device, any precision; what a CPU uses
    varlen   one kernel for the whole row, torch.nn.attention.varlen: bfloat16 on a GPU
    flex     flex_attention with block masks: bfloat16 on a GPU; for soft-capped scores (Gemma-2)

A row is [prompt, chosen, rejected] [prompt, chosen, rejected] ..., T tokens; both answers continue
the prompt, and rejected does not see chosen. transformers would read such a row by its position
ids and take each rejected answer for a sequence of its own, without its prompt: hence the model's
attention is always replaced by one of these, and none of them is ever replaced by another.
"""

import functools
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig

from data import InputError, Packed, move

NAME = "shared_prompt"  # under which transformers finds the attention below
BLOCK = 128  # tokens per side of a block of flex_attention's masks


def choose(wanted: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """--attention -> loop, varlen or flex. dtype is that of compute. InputError
    where the wanted one would be wrong or cannot run."""
    kernels = device.type == "cuda" and dtype == torch.bfloat16
    softcap = getattr(config, "attn_logit_softcapping", None)
    if wanted == "auto":
        return ("flex" if softcap else "varlen") if kernels else "loop"
    if wanted != "loop" and not kernels:
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"--attention {wanted} needs a GPU and bfloat16, not {device.type}, {name}"
        )
    if wanted == "varlen" and softcap:
        raise InputError("--attention varlen knows no soft-capping, which this model has: use flex")
    return wanted


def layout(kind: str, batch: Packed):
    """How the attention of every layer reads this data.Packed; made once per forward."""
    return LAYOUTS[kind](batch)


def shared_prompt_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None,
    layout=None, **unused,
):  # fmt: skip
    """transformers' attention interface over one packed row: query (1, heads, T, D), key and value
    with as many heads or a divisor of it  ->  (1, T, heads, D), None. ValueError without a
    layout."""
    if layout is None:
        raise ValueError(
            f"attention {NAME!r} needs a layout: call the model through policy.PackedLM"
        )
    return layout.attend(query, key, value, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, shared_prompt_attention)


def tensor_on(x: np.ndarray, device: torch.device) -> Tensor:
    return move(torch.from_numpy(x), device)


# ---------------------------------------------------------------------- loop


class Loop:
    """Each segment's answers one after the other."""

    def __init__(self, batch):
        self.segments = batch.segments

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling, window, softcap) -> Tensor:
        out, settings = [], (scaling, window, softcap)
        for start, n_prompt, n_chosen, n_rejected in self.segments:
            prompt, first = start + n_prompt, start + n_prompt + n_chosen
            q, k, v = (x[:, :, start:first] for x in (query, key, value))
            out.append(causal_attention(q, k, v, *settings))
            own = slice(first, first + n_rejected)  # its keys: the prompt's and its own
            k, v = (torch.cat([x[:, :, start:prompt], x[:, :, own]], dim=2) for x in (key, value))
            out.append(causal_attention(query[:, :, own], k, v, *settings))
        return torch.cat(out, dim=2).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scaling, window, softcap) -> Tensor:
    """q (1, heads, n, D) are the last n positions of the sequence that k and v (1, kv_heads, m, D)
    cover."""
    n, m = q.shape[2], k.shape[2]
    windowed = window is not None and m > window
    mask = None
    if n < m or windowed or softcap is not None:  # the diagonal ends in the lower right corner
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


# ---------------------------------------------------------------------- varlen


class Varlen:
    """Queries as they lie in the row; keys and values gathered, so that the prompt's come again
    before each rejected answer's. The kernel ends its causal diagonal in the lower right corner,
    which is where the last n positions of a longer sequence belong."""

    def __init__(self, batch):
        queries, keys, index = [], [], []
        for start, n_prompt, n_chosen, n_rejected in batch.segments:
            first = start + n_prompt + n_chosen
            queries += [n_prompt + n_chosen, n_rejected]
            keys += [n_prompt + n_chosen, n_prompt + n_rejected]
            index += [np.arange(start, first), np.arange(start, start + n_prompt)]
            index += [np.arange(first, first + n_rejected)]
        # a second to import, so only where it is needed
        from torch.nn.attention.varlen import varlen_attn

        device, self.kernel = batch.ids.device, varlen_attn
        self.takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
        self.index = tensor_on(np.concatenate(index), device)
        self.ends = [tensor_on(np.cumsum([0, *n], dtype=np.int32), device) for n in (queries, keys)]
        self.longest = max(queries), max(keys)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling, window, softcap) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        k, v = k.index_select(0, self.index), v.index_select(0, self.index)
        gqa = {}
        if q.shape[1] != k.shape[1] and self.takes_gqa:  # before torch 2.12 nobody asked
            gqa = {"enable_gqa": True}
        left = -1 if window is None else window - 1  # keys before a query's own; -1 is all
        out = self.kernel(
            q, k, v, *self.ends, *self.longest, scale=scaling, window_size=(left, 0), **gqa
        )
        return out[None]


# ---------------------------------------------------------------------- flex


class Flex:
    """A block mask per window size, from the keys that each query sees: two ranges of the row,
    [prompt_from, prompt_to) for a rejected answer's prompt, and [own_from, query]."""

    def __init__(self, batch):
        self.segments, self.device, self.masks = batch.segments, batch.ids.device, {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling, window, softcap) -> Tensor:
        if window not in self.masks:
            self.masks[window] = block_mask(self.segments, window, self.device)
        out = flex_kernel(query.is_cuda)(
            query, key, value, soft_capped(softcap) if softcap else None, self.masks[window],
            scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2)


@functools.cache
def flex_kernel(cuda: bool):
    """Compiled on a GPU; in one graph, so that it fails rather than become a T x T product."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import, as above

    return torch.compile(flex_attention, dynamic=True, fullgraph=True) if cuda else flex_attention


@functools.cache
def soft_capped(cap: float):
    return lambda score, batch, head, q, k: cap * torch.tanh(score / cap)


def visible_ranges(segments: tuple, window: int | None) -> np.ndarray:
    """(3, T): for each query prompt_from, prompt_to and own_from; the first two are equal where the
    query's own range begins with its prompt."""
    ranges = []
    for start, n_prompt, n_chosen, n_rejected in segments:
        for first, n, before in (
            (start, n_prompt + n_chosen, 0),
            (start + n_prompt + n_chosen, n_rejected, n_prompt),
        ):
            i = np.arange(n)
            oldest = np.zeros(n, int) if window is None else np.maximum(before + i - window + 1, 0)
            prompt_to = np.full(n, start + before)
            prompt_from = np.minimum(start + oldest, prompt_to)
            own_from = first + np.maximum(oldest - before, 0)
            ranges.append(np.stack([prompt_from, prompt_to, own_from]))
    return np.concatenate(ranges, axis=1)


def block_mask(segments: tuple, window: int | None, device: torch.device):
    """-> a BlockMask: which blocks of keys a block of queries reads wholly, in part (then by the
    ranges), or not at all."""
    from torch.nn.attention.flex_attention import BlockMask  # slow to import, as above

    ranges = visible_ranges(segments, window)
    prompt_from, prompt_to, own_from = ranges
    T = ranges.shape[1]
    query, n = np.arange(T), -(-T // BLOCK)
    seen, covered = (np.zeros((n, n + 1), int) for _ in "sc")  # queries that see any, that see all
    for begin, end in ((prompt_from, prompt_to), (own_from, query + 1)):
        some = begin < end
        add_ranges(seen, query[some], begin[some] // BLOCK, (end[some] - 1) // BLOCK + 1)
        add_ranges(covered, query, -(-begin // BLOCK), end // BLOCK)
    seen, covered = (x.cumsum(1)[:, :n] for x in (seen, covered))
    whole = covered == BLOCK
    part = (seen > 0) & ~whole
    order = []
    for blocks in (part, whole):
        count, indices = blocks.sum(1), np.argsort(~blocks, axis=1, kind="stable")
        order += [tensor_on(x.astype(np.int32), device)[None, None] for x in (count, indices)]
    prompt_from, prompt_to, own_from = tensor_on(ranges.astype(np.int32), device)

    def mask(batch, head, q, k):
        return (k >= prompt_from[q]) & (k < prompt_to[q]) | (k >= own_from[q]) & (k <= q)

    return BlockMask.from_kv_blocks(*order, BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(T, T))


def add_ranges(marks, query, begin, end):
    """Adds one to marks[query's block, begin:end], as differences that a cumulative sum undoes."""
    some = begin < end
    np.add.at(marks, (query[some] // BLOCK, begin[some]), 1)
    np.add.at(marks, (query[some] // BLOCK, end[some]), -1)


LAYOUTS = {"loop": Loop, "varlen": Varlen, "flex": Flex}
