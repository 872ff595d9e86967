"""Claims about the GPU path, tested without one: flex_attention as torch.compile traces it, the
call of varlen_attn, what FSDP2 fetches in advance, and how a GPU differs from a CPU elsewhere.

python -m pytest -q tests/test_attention_gpu.py
"""

import functools
import inspect
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention as flex_module
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2Config

import attention
import attention_gpu
import distributed
from data import InputError
from helpers import SHAPES, flags, make_model, slow, triplets_for
from packing import pack
from policy import fused_log_probs, load_lm, rows_per_chunk, token_log_probs
from test_attention import naive_varlen

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = [(20, 30, 40)], [(5, 9, 4)], [(50, 40, 30), (60, 50, 40)], [(130, 300, 200)]


# ---------------------------------------------------------------------- flex


class Graphs(list):
    """What dynamo hands to the compiler: a list of pairs of a graph and its inputs."""

    def __call__(self, graph, inputs):
        self.append((graph, inputs))
        return lookup_backend("aot_eager")(graph, inputs)

    def check(self):
        """Few graphs for all lengths of rows, no number as an input, always the kernel for rows of
        any length."""
        assert 0 < len(self) <= 6
        for graph, inputs in self:
            assert not [
                x for x in inputs if isinstance(x, float) or torch.is_tensor(x) and not x.ndim
            ]
            (call,) = (n for n in graph.graph.nodes if "flex_attention" in str(n.target))
            assert {"FORCE_USE_FLEX_ATTENTION": True}.items() <= call.args[6].items()


@pytest.fixture
def graphs(monkeypatch):
    """Compiles flex_attention without kernels, and says what was compiled."""
    found = Graphs()
    monkeypatch.setattr(flex_module, "_validate_device", lambda *qkv: None)  # backward on a CPU
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=found))
    torch._dynamo.reset()
    attention_gpu.flex_kernel.cache_clear()
    with torch._dynamo.config.patch(specialize_float=False):  # as torch starts
        yield found
    attention_gpu.flex_kernel.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("softcap", [3.0, slow(None)])
def test_flex_equals_the_loop_for_rows_of_every_length_with_few_graphs(softcap, graphs):
    """Outputs and gradients, with and without a window, under no_grad, plain and recomputed."""
    torch.manual_seed(0)
    for lengths in ROWS:
        batch = pack(triplets_for(lengths))
        T, flex, loop = len(batch.ids), *(attention.layout(k, batch) for k in ("flex", "loop"))
        assert (T + flex.padding) % 128 == 0 and T + flex.padding >= 256
        for window in (None, 6):
            qkv = [torch.randn(1, h, T + flex.padding, 8, dtype=torch.float64) for h in (8, 4, 4)]
            call = partial(flex.attend, scaling=0.25, window=window, softcap=softcap)
            with torch.no_grad():
                outs = [call(*qkv)[:, :T]]
            qkv = [x.requires_grad_() for x in qkv]
            outs += [
                call(*qkv)[:, :T],
                checkpoint(call, *qkv, use_reentrant=False, preserve_rng_state=False)[:, :T],
            ]
            cut = [x.detach()[:, :, :T].requires_grad_() for x in qkv]
            expected = loop.attend(*cut, 0.25, window, softcap)
            weights = torch.randn_like(expected)
            gradients = torch.autograd.grad((expected * weights).sum(), cut)
            for out in outs:
                torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
                if out.requires_grad:
                    found = torch.autograd.grad((out * weights).sum(), qkv)
                    for a, b in zip(found, gradients, strict=True):
                        torch.testing.assert_close(a[:, :, :T], b, rtol=1e-5, atol=1e-6)
                        assert not a[:, :, T:].any()  # padding takes no part
    graphs.check()


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_models_train_through_flex_as_through_the_loop(family, tmp_path, graphs):
    """Latents, log-probabilities and every gradient, with layers that are recomputed."""
    name = make_model(tmp_path, family)
    loop, flex = (load_lm(name, torch.float64, True, kind) for kind in ("loop", "flex"))
    for lengths in ([(5, 9, 4)], [(130, 100, 20), (12, 1, 1), (7, 130, 8)]):
        batch = pack(triplets_for(lengths))
        outs = loop(batch), flex(batch)
        torch.testing.assert_close(outs[1].h, outs[0].h, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(outs[1].logp, outs[0].logp, rtol=1e-6, atol=1e-6)
        assert outs[1].h._base is None  # FSDP2 takes no view from a model
        for out in outs:
            (out.logp * torch.linspace(-1, 1, len(out.logp)) + out.h.mean()).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(flex(batch).logp, outs[0].logp, rtol=1e-6, atol=1e-6)
    for a, b in zip(loop.parameters(), flex.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    graphs.check()


def test_flex_is_refused_where_torch_compile_is_off(graphs):
    batch = pack(triplets_for([(5, 9, 4)]))
    qkv = torch.zeros(3, 1, 2, 256, 16)
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(InputError, match="--attention flex needs torch.compile, .* off here"):
            attention.layout("flex", batch).attend(*qkv, 1.0, None, 3.0)
    assert not graphs


@pytest.mark.parametrize("largest", [None, 32, 16, 8])
def test_flex_takes_the_largest_blocks_that_fit_the_shared_memory(largest, monkeypatch, capsys):
    """None stands for those that torch chooses."""
    tried = []

    def compile_kernels(heads, key_heads, size, softcap, device, options):
        assert (heads, key_heads, size, softcap) == (8, 4, 256, 50.0)
        tried.append({v for k, v in options.items() if "BLOCK" in k})
        if largest and (not tried[-1] or tried[-1] != {largest}):
            raise RuntimeError("No valid triton configs. out of resource: shared memory")

    card = type("card", (), {"shared_memory_per_block_optin": 101376})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_gpu, "compile_kernels", compile_kernels)
    attention_gpu.fitting_options.cache_clear()
    config = Gemma2Config(num_attention_heads=8, num_key_value_heads=4, head_dim=256)
    choose = partial(attention.choose, "auto", config, CUDA, torch.bfloat16)
    if largest == 8:
        with pytest.raises(InputError, match="more shared memory than the 101,376 bytes of this"):
            choose()
    else:
        assert choose() == choose() == "flex"
        printed = capsys.readouterr().out
        assert printed == "" if largest is None else f"blocks of {largest} tokens" in printed
        assert tried[-1] == ({largest} - {None}) and len(tried) == len({*map(str, tried)})

    def broken(*arguments):
        raise RuntimeError("another fault")

    monkeypatch.setattr(attention_gpu, "compile_kernels", broken)
    attention_gpu.fitting_options.cache_clear()
    with pytest.raises(RuntimeError, match="another fault"):
        choose()


# ---------------------------------------------------------------------- varlen


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_is_called_as_torch_defines_it(window, monkeypatch):
    """By its own signature and on tensors without data, then by a plain loop in its place."""
    calls = []

    @functools.wraps(varlen_attn)
    def recorded(*args, **more):
        calls.append(inspect.signature(varlen_attn).bind(*args, **more))
        return naive_varlen(*args, **more)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", recorded)
    batch = pack(triplets_for([(5, 9, 4), (1, 3, 11), (12, 1, 1)]))
    q, *kv = (torch.randn(1, h, len(batch.ids), 8, dtype=torch.float64) for h in (4, 2, 2))
    loop, own = (
        attention.layout(k, batch).attend(q, *kv, 0.3, window, None) for k in ("loop", "varlen")
    )
    torch.testing.assert_close(own, loop, rtol=1e-6, atol=1e-6)
    (call,) = calls
    arguments = [x.bfloat16() if torch.is_tensor(x) and x.ndim == 3 else x for x in call.args]
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = varlen_attn(*arguments, **call.kwargs)
    assert out.shape == own[0].shape


# ---------------------------------------------------------------------- ranks


@pytest.mark.parametrize("lambda_adv", [0, 1])
def test_every_backward_fetches_each_layer_before_its_turn(
    lambda_adv, tiny_world, tmp_path, monkeypatch
):
    """Of four micro-batches: one backward each without a critic, and one for all with critics."""
    import train_ganpo

    fetched, backward = [], train_ganpo.backward
    inner = FSDPParamGroup._prefetch_unshard

    def prefetch(group, kind):
        fetched[-1].append(group._module_fqn)
        return inner(group, kind)

    def recorded(*args):
        fetched.append([])
        backward(*args)

    monkeypatch.setattr(FSDPParamGroup, "_prefetch_unshard", staticmethod(prefetch))
    monkeypatch.setattr(train_ganpo, "backward", recorded)
    more = "--max_steps=1", "--micro_batch_size=2", f"--lambda_adv={lambda_adv}"
    train_ganpo.main(flags(tiny_world, tmp_path / "run", *more))
    # the root, which is never resharded, may ask again; that is without effect
    order = [
        [n[-1] for n, _ in itertools.groupby(x) if n.endswith(("0", "1", "2"))] for x in fetched
    ]
    assert order == ([4 * ["2", "1", "0"]] if lambda_adv else 4 * [["2", "1", "0"]])


def test_groups_within_and_between_nodes_wait_as_long_as_all_ranks_do(monkeypatch):
    limits = {}
    monkeypatch.setattr(distributed, "_set_pg_timeout", lambda t, g: limits.update({g: t.seconds}))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = distributed.make_mesh(CPU, 77)
        assert limits == {mesh.get_group(name): 77 for name in ("replicate", "shard")}
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------- elsewhere


def test_on_a_gpu_attention_never_goes_through_cudnn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert distributed.start(9).type == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Calls(TorchDispatchMode):
    """Records operations and their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_gpu, dtype", [(True, torch.float64), (False, torch.float32)])
def test_log_probabilities_are_summed_in_float64_on_a_gpu(on_gpu, dtype, tmp_path, monkeypatch):
    lm, batch = load_lm(make_model(tmp_path), torch.float32), pack(triplets_for([(5, 9, 4)]))
    h = torch.randn(18, 32)
    expected = lm.log_probs(h, batch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
    with torch.no_grad(), Calls() as calls:
        found = lm.log_probs(h, batch)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    ((_, args),) = (call for call in calls.seen if call[0].startswith("index_add"))
    assert args[0].dtype == args[3].dtype == dtype


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_head_is_one_graph_for_every_number_of_rows(softcap, graphs):
    """As it is compiled for bfloat16 on a GPU; values and gradients are those of the plain one."""
    torch.manual_seed(0)
    fused_log_probs.cache_clear()
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    for n in (90, 18, 270, 630):
        h = torch.randn(n, 8, dtype=torch.float64, requires_grad=True)
        arguments = h, weight, None, torch.randint(50, (n,)), softcap
        plain = token_log_probs(*arguments)
        fused = checkpoint(fused_log_probs(), *arguments, use_reentrant=False)
        torch.testing.assert_close(fused, plain)
        both = [torch.autograd.grad(x.square().sum(), (h, weight)) for x in (fused, plain)]
        torch.testing.assert_close(*both)
    assert len(graphs) == 1
    assert not [x for x in graphs[0][1] if torch.is_tensor(x) and not x.ndim]
    fused_log_probs.cache_clear()


def test_chunks_of_the_head_are_larger_on_a_gpu():
    for vocabulary, of_cpu, of_cuda in (
        (256000, 256, 1048), (400000, 256, 1024), (128256, 261, 2092), (300, 111848, 894784)
    ):  # fmt: skip
        assert rows_per_chunk(vocabulary, CPU) == of_cpu
        assert rows_per_chunk(vocabulary, CUDA) == of_cuda


def test_padding_reads_all_positions_equally_often():
    """Gradients of one position are added one by one on a GPU."""
    batch = pack(triplets_for([(5, 90, 4), (1, 3, 11), (12, 1, 1)]))
    counts = torch.bincount(batch.gather[~batch.mask], minlength=len(batch.ids))
    assert counts.max() - counts.min() <= 1
