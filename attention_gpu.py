"""The two kinds of attention over packed rows that need a GPU: varlen and flex."""

import functools
import inspect
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data import InputError
from packing import Packed, move

BLOCK = 128  # tokens per side of a block of flex_attention's masks
# Options of flex_attention's kernels for GPUs with less and less shared memory; {} are torch's own.
KERNEL_OPTIONS = [{}] + [
    dict.fromkeys("fwd_BLOCK_M fwd_BLOCK_N".split(), n)
    | dict.fromkeys("bwd_BLOCK_M1 bwd_BLOCK_N1 bwd_BLOCK_M2 bwd_BLOCK_N2".split(), n)
    | {"num_stages": 1}
    for n in (32, 16)
]


def tensor_on(x: np.ndarray, device: torch.device) -> Tensor:
    return move(torch.from_numpy(x), device)


def compiled(function: Callable, **options) -> Callable:
    """Returns torch.compile of a function, as one graph for all lengths of rows."""
    # otherwise a soft cap would be an input of the graph, which flex_attention cannot take and
    # which makes the head keep its logits in float32
    torch._dynamo.config.specialize_float = True
    return torch.compile(function, dynamic=True, **options)


# ---------------------------------------------------------------------- varlen


class Varlen:
    """One varlen_attn per layer.

    Queries keep the order of the row. Keys and values are gathered, so that those of the prompt are
    repeated before those of each rejected answer. The kernel aligns its causal mask at the end of
    each sequence, which is right for the last n positions of a longer one.
    """

    padding = 0  # tokens that the model has to read after the row

    def __init__(self, batch: Packed):
        queries, keys, index = [], [], []
        for start, n_prompt, n_chosen, n_rejected in batch.segments:
            first = start + n_prompt + n_chosen
            queries += [n_prompt + n_chosen, n_rejected]
            keys += [n_prompt + n_chosen, n_prompt + n_rejected]
            index += [np.arange(start, first), np.arange(start, start + n_prompt)]
            index += [np.arange(first, first + n_rejected)]
        # takes a second to import, so it is imported only where it is used
        from torch.nn.attention.varlen import varlen_attn

        device, self.kernel = batch.ids.device, varlen_attn
        self.takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
        self.index = tensor_on(np.concatenate(index), device)
        self.starts = [
            tensor_on(np.cumsum([0, *n], dtype=np.int32), device) for n in (queries, keys)
        ]
        self.longest = max(queries), max(keys)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling, window, softcap) -> Tensor:
        """Returns (1, T, heads, E). window is the number of keys that a query sees, or None."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, E)
        k, v = k.index_select(0, self.index), v.index_select(0, self.index)
        gqa = {}
        if q.shape[1] != k.shape[1] and self.takes_gqa:  # torch before 2.12 has no such argument
            gqa = {"enable_gqa": True}
        left = -1 if window is None else window - 1  # keys before a query's own; -1 means all
        out = self.kernel(
            q, k, v, *self.starts, *self.longest, scale=scaling, window_size=(left, 0), **gqa
        )
        return out[None]


# ---------------------------------------------------------------------- flex


class Flex:
    """One flex_attention per layer, with a block mask for each window size.

    The mask follows from the keys that each query sees. They are two ranges of the row:
    [prompt_from, prompt_to) is the prompt of a rejected answer, [own_from, query] is the rest.
    The row is padded to whole blocks, at least two. In a last block that is cut the backward kernel
    reads values that are not there (pytorch#153799), and a single block would need a graph of its
    own. The padding is one more prompt, which sees itself and which no other token sees.
    """

    def __init__(self, batch: Packed):
        T = len(batch.ids)
        self.padding = max(2, -(-T // BLOCK)) * BLOCK - T
        self.segments = (*batch.segments, (T, self.padding, 0, 0))
        self.device, self.masks = batch.ids.device, {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling, window, softcap) -> Tensor:
        """Returns (1, T, heads, E), T with padding. window is the number of keys that a query sees,
        or None."""
        if window not in self.masks:
            self.masks[window] = block_mask(self.segments, window, self.device)
        heads, key_heads = query.shape[1], key.shape[1]
        options = fitting_options(heads, key_heads, query.shape[3], softcap, self.device)
        out = flex_kernel()(
            query, key, value, soft_capped(softcap) if softcap else None, self.masks[window],
            scale=scaling, enable_gqa=heads != key_heads, kernel_options=options,
        )  # fmt: skip
        return out.transpose(1, 2)


@functools.cache
def flex_kernel():
    """Returns flex_attention, compiled as one whole graph for all lengths of rows.

    Where it cannot be compiled it raises: uncompiled it would be a T x T product, whose gradient
    under checkpointing is wrong.
    """
    from torch.nn.attention.flex_attention import flex_attention  # slow to import, as above

    def kernel(*args, **options):
        if not torch.compiler.is_dynamo_compiling():
            raise InputError(
                "--attention flex needs torch.compile, which is switched off here (for example by"
                " TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE): switch it on, or pass"
                " --attention loop"
            )
        return flex_attention(*args, **options)

    return compiled(kernel, fullgraph=True)


@functools.cache
def fitting_options(
    heads: int, key_heads: int, size: int, softcap: float | None, device: torch.device
) -> dict:
    """Returns options of flex_attention with which its kernels fit the shared memory of a GPU.

    size is that of a head. The kernels are compiled, forward and backward, and training uses them
    afterwards. Where torch's own do not fit, a printed line names what is used. Raises InputError
    if none fits.
    """
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # torch's other kernel, for short rows, fails
    if device.type != "cuda":
        return options
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    for smaller in KERNEL_OPTIONS:
        try:
            compile_kernels(heads, key_heads, size, softcap, device, options | smaller)
        except Exception as error:
            if "out of resource" not in str(error):
                raise
            continue
        if smaller and int(os.environ.get("RANK", 0)) == 0:
            print(
                f"flex attention: torch's own kernels do not fit the {shared:,} bytes of shared"
                f" memory of this GPU; blocks of {smaller['fwd_BLOCK_M']} tokens are used instead",
                flush=True,
            )
        return options | smaller
    raise InputError(
        f"--attention flex needs more shared memory than the {shared:,} bytes of this GPU, with"
        f" heads of size {size}: pass --attention loop, or use an A100, an H100 or a newer GPU"
    )


def compile_kernels(heads, key_heads, size, softcap, device, options: dict):
    """Runs flex_attention forward and backward on a short row, with arguments as above."""
    mask = block_mask(((0, 3 * BLOCK, 0, 0),), None, device)
    shapes = [(1, 3 * BLOCK, n, size) for n in (heads, key_heads, key_heads)]
    qkv = [torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    qkv = [x.transpose(1, 2).requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = flex_kernel()(
            *qkv, soft_capped(softcap) if softcap else None, mask, scale=size**-0.5,
            enable_gqa=heads != key_heads, kernel_options=options,
        )  # fmt: skip
        torch.autograd.grad(out, qkv, torch.zeros_like(out))


@functools.cache
def soft_capped(cap: float):
    """Returns flex_attention's score_mod for a soft cap."""
    return lambda score, batch, head, q, k: cap * torch.tanh(score / cap)


def visible_ranges(segments: tuple, window: int | None) -> np.ndarray:
    """Returns prompt_from, prompt_to and own_from for every query of the row, (3, T).

    prompt_from equals prompt_to where a query's own range begins with its prompt.
    """
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
    """Returns flex_attention's BlockMask of a row.

    It says which blocks of keys a block of queries reads wholly, which in part (those are then
    masked by the ranges), and which not at all.
    """
    from torch.nn.attention.flex_attention import BlockMask  # slow to import, as above

    ranges = visible_ranges(segments, window)
    prompt_from, prompt_to, own_from = ranges
    T = ranges.shape[1]
    query, n = np.arange(T), -(-T // BLOCK)
    # per block of queries and block of keys: queries that see any of its keys, that see all of them
    seen, covered = (np.zeros((n, n + 1), int) for _ in range(2))
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
    # separate tensors: views of one would be another graph
    prompt_from, prompt_to, own_from = (tensor_on(x, device) for x in ranges.astype(np.int32))

    def mask(batch, head, q, k):
        return (k >= prompt_from[q]) & (k < prompt_to[q]) | (k >= own_from[q]) & (k <= q)

    return BlockMask.from_kv_blocks(*order, BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(T, T))


def add_ranges(marks: np.ndarray, query: np.ndarray, begin: np.ndarray, end: np.ndarray):
    """Adds 1 at begin and -1 at end, both in blocks, in the row of each query's block.

    A cumulative sum then gives how many queries have a block of keys in their range [begin, end).
    """
    some = begin < end
    np.add.at(marks, (query[some] // BLOCK, begin[some]), 1)
    np.add.at(marks, (query[some] // BLOCK, end[some]), -1)
