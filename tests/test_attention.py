"""Claims about attention.py and attention_gpu.py: each kind against a mask written token by token.

    python -m pytest -q tests/test_attention.py

flex_attention itself runs here, forward only and not compiled. varlen_attn does not: a plain loop
stands in, which aligns its causal diagonal as the kernel's documentation says.
"""

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig

import attention
import attention_gpu
from data import InputError
from helpers import SHAPES, make_model, triplets_for
from packing import pack
from policy import load_lm

# rows around the size of a block of flex_attention's masks, 128
LENGTHS = [(5, 9, 4), (1, 3, 11), (130, 100, 140), (12, 1, 1), (7, 150, 8), (128, 128, 128)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def naive_mask(segments, window):
    """(T, T) bool: may query q read key k. Token by token, from what a pair's parts may see."""
    tokens = []  # of each position in the row: pair, part, place in its own sequence
    for pair, (_, n_prompt, n_chosen, n_rejected) in enumerate(segments):
        tokens += [(pair, "prompt", i) for i in range(n_prompt)]
        tokens += [(pair, "chosen", n_prompt + i) for i in range(n_chosen)]
        tokens += [(pair, "rejected", n_prompt + i) for i in range(n_rejected)]
    mask = np.zeros((len(tokens), len(tokens)), dtype=bool)
    for q, (q_pair, q_part, q_place) in enumerate(tokens):
        for k, (k_pair, k_part, k_place) in enumerate(tokens):
            mask[q, k] = (
                q_pair == k_pair
                and k_part in ("prompt", q_part)
                and k_place <= q_place
                and (window is None or q_place - k_place < window)
            )
    return mask


@pytest.mark.parametrize("window", [None, 1, 6, 40])
def test_block_masks_are_the_mask_token_by_token(window, monkeypatch):
    monkeypatch.setattr(attention_gpu, "BLOCK", 16)  # so that short rows have whole blocks
    lengths = [(8, 23, 1), (1, 3, 11), (33, 40, 50), (12, 1, 1), (7, 60, 8)]
    segments = pack(triplets_for(lengths)).segments
    expected = naive_mask(segments, window)
    mask = attention_gpu.block_mask(segments, window, CPU)
    T, n = len(expected), -(-len(expected) // 16)
    q, k = torch.arange(T)[:, None], torch.arange(T)[None]
    assert (mask.mask_mod(0, 0, q, k).numpy() == expected).all()
    # blocks: those that are read in part hold something, whole ones everything, the others nothing
    listed = {}
    for kind in ("kv", "full_kv"):
        counts, indices = (
            getattr(mask, f"{kind}_num_blocks")[0, 0],
            getattr(mask, f"{kind}_indices"),
        )
        for row in range(n):
            for column in indices[0, 0, row, : counts[row]].tolist():
                assert (row, column) not in listed
                listed[row, column] = kind
    for row in range(n):
        for column in range(n):
            block = expected[row * 16 :][:16, column * 16 :][:, :16]
            whole = block.shape[0] == 16 and block.all()
            kind = "full_kv" if whole else "kv" if block.any() else None
            assert listed.get((row, column)) == kind, (row, column)
    assert "full_kv" in listed.values() or window in (1, 6)


@pytest.mark.parametrize("softcap, fast", [(None, False), (None, True), (3.0, False)])
def test_the_loop_is_softmax_under_the_mask_token_by_token(softcap, fast, monkeypatch):
    """One layout for several windows, as for a model whose layers alternate; gradients too."""
    monkeypatch.setattr(attention, "backward_is_slow", lambda q: fast)
    batch = pack(triplets_for([(5, 9, 4), (1, 3, 11), (12, 1, 1), (7, 20, 8)]))
    torch.manual_seed(0)
    q = torch.randn(1, 4, len(batch.ids), 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, len(batch.ids), 8, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    layout = attention.layout("loop", batch)
    for window in (None, 6, 1, 40, None):
        found = layout.attend(q, k, v, 0.3, window, softcap)
        scores = 0.3 * q @ k.repeat_interleave(2, dim=1).transpose(2, 3)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        mask = torch.from_numpy(naive_mask(batch.segments, window))
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        expected = (weights @ v.repeat_interleave(2, dim=1)).transpose(1, 2)
        assert fast == ("FastBackward" in names_of_graph(found))
        weights = torch.randn_like(expected)
        gradients = [torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, expected)]
        for x, y in ((found, expected), *zip(*gradients, strict=True)):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def names_of_graph(x):
    """The names of the nodes next to a tensor in its graph."""
    nodes = [x.grad_fn]
    for _ in range(3):
        nodes += [n for node in nodes for n, _ in node.next_functions if n and n not in nodes]
    return " ".join(node.name() for node in nodes)


@pytest.mark.parametrize("n, m", [(60, 60), (50, 90)])
def test_the_fast_backward_is_as_precise_in_bfloat16_as_the_kernels_own(n, m):
    """Scores of a few units, which bfloat16 alone would round by several hundredths."""
    torch.manual_seed(0)
    sizes = ((6, n), (2, m), (2, m))
    qkv = [torch.randn(1, h, t, 64).bfloat16().requires_grad_() for h, t in sizes]
    mask = torch.zeros(n, m).masked_fill(
        ~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf
    )
    weights, found = torch.randn(1, 6, n, 64).bfloat16(), []
    for x, kind in (
        ([x.detach().double().requires_grad_() for x in qkv], False), (qkv, False), (qkv, True)
    ):  # fmt: skip
        kept = mask.to(x[0].dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "backward_is_slow", lambda q, kind=kind: kind)
            out = attention.causal_attention(*x, None if n == m else kept, 0.4, None)
        found.append(torch.autograd.grad(out, x, weights.to(out.dtype)))
    for exact, own, fast in zip(*found, strict=True):
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (own, fast)]
        assert errors[1] < 2 * errors[0] < 0.02, errors


def naive_varlen(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """torch.nn.attention.varlen's documented meaning: sequence i's queries (T_q, heads, D) are its
    last positions, window_size counts keys to the left (all for -1) and to the right."""
    assert enable_gqa == (q.shape[1] != k.shape[1]) and window_size[1] == 0
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert max_q == ends_q.diff().max() and max_k == ends_k.diff().max()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = []
    for i in range(len(ends_q) - 1):
        own_q, own_k, own_v = (
            x[ends[i] : ends[i + 1]] for x, ends in ((q, ends_q), (k, ends_k), (v, ends_k))
        )
        for j in range(len(own_q)):
            last = j + len(own_k) - len(own_q)  # bottom right
            first = 0 if window_size[0] == -1 else max(0, last - window_size[0])
            keys = slice(first, last + 1)
            weights = (torch.einsum("hd,khd->hk", own_q[j], own_k[keys]) * scale).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, own_v[keys]))
    return torch.stack(out)


@pytest.mark.parametrize("family", [f for f in SHAPES if f != "gemma2"])
def test_varlen_with_gathered_keys_equals_the_loop(family, tmp_path, monkeypatch):
    """Latents, log-probabilities and every gradient."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", naive_varlen)
    name = make_model(tmp_path, family)
    batch = pack(triplets_for([(5, 9, 4), (1, 3, 11), (12, 1, 1)]))
    loop, own = (load_lm(name, torch.float64, attention_kind=kind) for kind in ("loop", "varlen"))
    outs = loop(batch), own(batch)
    torch.testing.assert_close(outs[1].h, outs[0].h, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outs[1].logp, outs[0].logp, rtol=1e-6, atol=1e-6)
    for out in outs:
        (out.logp * torch.linspace(-1, 1, 6)).sum().backward()
    for a, b in zip(loop.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_varlen_works_with_a_torch_that_knows_no_enable_gqa(tmp_path, monkeypatch):
    def older(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size):
        gqa = q.shape[1] != k.shape[1]
        return naive_varlen(
            q, k, v, ends_q, ends_k, max_q, max_k,
            scale=scale, window_size=window_size, enable_gqa=gqa,
        )  # fmt: skip

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    name, batch = make_model(tmp_path), pack(triplets_for([(5, 9, 4)]))
    loop, own = (load_lm(name, torch.float64, attention_kind=k)(batch) for k in ("loop", "varlen"))
    torch.testing.assert_close(own.logp, loop.logp, rtol=1e-6, atol=1e-6)


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("wanted, softcap, device, dtype, expected", [
    ("auto", None, CPU, FP32, "loop"), ("auto", 50.0, CPU, BF16, "loop"),
    ("auto", None, CUDA, FP32, "loop"), ("auto", None, CUDA, BF16, "varlen"),
    ("auto", 50.0, CUDA, BF16, "flex"), ("loop", 50.0, CUDA, BF16, "loop"),
    ("flex", None, CUDA, BF16, "flex"), ("varlen", None, CUDA, BF16, "varlen"),
    ("varlen", 50.0, CUDA, BF16, "--attention varlen has no soft-capping"),
    ("varlen", None, CUDA, FP32, "--attention varlen needs a GPU .*; here are cuda and float32"),
    ("flex", None, CPU, BF16, "--attention flex needs a GPU and .*; here are cpu and bfloat16"),
])  # fmt: skip
def test_attention_is_chosen_by_device_and_model_or_refused(
    wanted, softcap, device, dtype, expected
):
    config = PretrainedConfig(attn_logit_softcapping=softcap)
    if expected.startswith("--"):
        with pytest.raises(InputError, match=expected):
            attention.choose(wanted, config, device, dtype)
    else:
        assert attention.choose(wanted, config, device, dtype) == expected
