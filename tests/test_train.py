"""Claims about the forward, Algorithm 1 and the program: policy.py, train_ganpo.py, checkpoint.py.

    python -m pytest -q test_train.py -m "not slow"

Everything runs train_ganpo.main itself on tiny models of random weights, in this process for one
rank and in forked ones for two. The oracles are naive: one padded sequence at a time through the
model's own forward, Algorithm 1 written out in float64.
"""

import csv
import json
import math
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import estimate
import game
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_data import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import distributed
import losses
import report
import train_ganpo
from checkpoint import load_discriminators
from data import Triplet, batch_indices, load_pairs, pack
from discriminator import build_discriminator
from miniature import Verdict
from policy import PackedLM, load_lm

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared" / "data"
LN2 = math.log(2)
VOCAB = 300

# ---------------------------------------------------------------------- tiny models, rows, runs

SHAPES = {  # grouped-query attention everywhere; windows shorter than the sequences
    "llama": dict(),
    "gemma2": dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8, tie_word_embeddings=True),
    "mistral": dict(sliding_window=6),
    "qwen2": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": dict(head_dim=8),
}


def make_model(folder, family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    size = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    config = AutoConfig.for_model(family, **(size | SHAPES[family] | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny().save_pretrained(folder)
    return str(folder)


def make_rows(path, n, seed=0):
    rng, rows = random.Random(seed), []
    for _ in range(n):
        texts = ["".join(rng.choices("abcdef ", k=rng.randint(3, 16))) + "." for _ in range(3)]
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A folder with a model of each family, preference rows and held-out rows."""
    folder = tmp_path_factory.mktemp("tiny")
    for family in ("llama", "gemma2"):
        make_model(folder / family, family)
    make_rows(folder / "train.jsonl", 28)
    make_rows(folder / "test.jsonl", 11, seed=1)
    return folder


def flags(world, out, *more, family="llama"):
    return [
        f"--model={world / family}", f"--dataset={world / 'train.jsonl'}", f"--out_dir={out}",
        "--batch_size=8", "--max_length=64", "--lr=3e-3", "--disc_hidden=16", *more,
    ]  # fmt: skip


def rows_of(path):
    with open(path) as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def run(world, out, *more, family="llama", ranks=1, **more_of_spawn):
    """One run of the program -> rows of metrics.csv, weights of policy and critics by name."""
    argv = flags(world, out, *more, family=family)
    if ranks == 1:
        train_ganpo.main(argv)
    else:
        launch(argv, ranks, **more_of_spawn)
    weights = load_file(out / "hf" / "model.safetensors")
    if (out / "discriminators.pt").exists():
        saved = torch.load(out / "discriminators.pt", weights_only=True)
        for sign in ("pos", "neg"):
            weights |= {f"{sign}.{k}": v for k, v in saved[f"disc_{sign}"].items()}
    return rows_of(out / "metrics.csv"), weights


def launch(argv, ranks, **more):
    """What torchrun does, to the end."""
    children = spawn(argv, ranks, **more)
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * ranks


def spawn(argv, ranks=1, log=None, prepare=None, nodes=1):
    """The program in children of a server that has torch loaded but has run nothing -> them.
    log: a file for what they print; prepare(rank) is called first in each."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train", "test_reliability"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    more = (ranks, port, log, prepare, nodes)
    children = [context.Process(target=one_rank, args=(argv, r, *more)) for r in range(ranks)]
    for child in children:
        child.start()
    return children


def one_rank(argv, rank, ranks, port, log, prepare, nodes):
    local = ranks // nodes
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank % local), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if log:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    if prepare:
        prepare(rank)
    train_ganpo.main(argv)


def close(a, b, tolerance, but=()):
    """Two metrics rows: equal to a relative tolerance (absolute below 1), whatever is no timing."""
    untimed = set(a) - {"seconds", "tokens_per_s", "peak_gb", *but}
    assert set(a) == set(b)
    for k in untimed:
        assert abs(a[k] - b[k]) <= tolerance * max(1, abs(a[k])), (k, a[k], b[k])


def furthest(a, b):
    assert set(a) == set(b)
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def triplets_for(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(6, VOCAB, (n,), generator=g).numpy()  # noqa: E731
    return [Triplet(*(ids(n) for n in row), i) for i, row in enumerate(lengths)]


# ---------------------------------------------------------------------- the forward


LENGTHS = [(5, 9, 4), (1, 3, 11), (12, 1, 1), (7, 2, 8)]


def naive_forward(model, triplets):
    """Each sequence alone through the model's own forward -> latents, summed log-probs, chosen
    first."""
    latents, logps = [], []
    for side in ("chosen", "rejected"):
        for t in triplets:
            answer = torch.tensor(getattr(t, side)).long()
            ids = torch.cat([torch.tensor(t.prompt).long(), answer])[None]
            out = model(ids, output_hidden_states=True)
            logp = out.logits[0, len(t.prompt) - 1 : -1].double().log_softmax(-1)
            latents.append(out.hidden_states[-1])
            logps.append(logp.gather(1, answer[:, None]).sum())
    return latents, torch.stack(logps)


@pytest.mark.parametrize("family", SHAPES)
def test_packed_forward_and_gradient_equal_the_models_own(family, tmp_path):
    name, triplets = make_model(tmp_path, family), triplets_for(LENGTHS)
    own = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float64, attn_implementation="eager"
    )
    packed = load_lm(name, torch.float64)
    latents, logps = naive_forward(own.eval(), triplets)
    batch = pack(triplets)
    out = packed(batch)
    # the families compute norms, rotary angles and eager softmax in fp32 even in a float64 model
    torch.testing.assert_close(out.logp, logps, rtol=1e-5, atol=1e-5)
    for row, mask, latent in zip(out.h[0][batch.gather], batch.mask, latents, strict=True):
        torch.testing.assert_close(row[mask], latent[0], rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 1, len(logps), dtype=torch.float64)
    (logps * weight).sum().backward()
    (out.logp * weight).sum().backward()
    theirs = dict(own.named_parameters())
    for parameter_name, p in packed.model.named_parameters():
        grad = theirs[parameter_name].grad
        assert (p.grad - grad).abs().max() <= 1e-4 * grad.abs().max(), parameter_name


def test_batch_mates_and_packing_order_change_nothing(tiny_world):
    lm, triplets = load_lm(str(tiny_world / "gemma2"), torch.float64), triplets_for(LENGTHS)
    with torch.no_grad():
        together = lm(pack(triplets)).logp
        backwards = lm(pack(triplets[::-1])).logp
        alone = [lm(pack([t])).logp for t in triplets]
    n = len(triplets)
    for i in range(n):
        for side in (0, 1):
            assert abs(alone[i][side] - together[i + side * n]) < 1e-6
            assert abs(backwards[n - 1 - i + side * n] - together[i + side * n]) < 1e-6


def test_rejected_does_not_see_chosen(tiny_world):
    lm = load_lm(str(tiny_world / "llama"), torch.float64)
    a, b = triplets_for([(6, 5, 7), (6, 5, 7)])
    with torch.no_grad():
        logp = lm(pack([a])).logp, lm(pack([a._replace(chosen=b.chosen)])).logp
    assert logp[0][1] == logp[1][1] and logp[0][0] != logp[1][0]


def test_a_head_in_chunks_is_the_head(tiny_world, monkeypatch):
    lm, batch = load_lm(str(tiny_world / "gemma2"), torch.float64), pack(triplets_for(LENGTHS))
    whole = lm(batch).logp
    monkeypatch.setattr("policy.TOKENS_PER_CHUNK", 3)
    monkeypatch.setattr("policy.LOGITS_PER_CHUNK", 1)
    torch.testing.assert_close(lm(batch).logp, whole, rtol=1e-12, atol=1e-12)


def test_the_attention_refuses_a_plain_call(tiny_world):
    lm = load_lm(str(tiny_world / "llama"), torch.float32)
    with pytest.raises(ValueError, match="needs a layout"):
        lm.model(torch.ones(1, 4, dtype=torch.int64))


def test_checkpointing_changes_no_gradient(tiny_world):
    grads = []
    for checkpointing in (False, True):
        lm = load_lm(str(tiny_world / "llama"), torch.float64, checkpointing)
        lm(pack(triplets_for(LENGTHS))).logp.sum().backward()
        grads.append([p.grad for p in lm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------------- Algorithm 1


def softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


def naive_quad(critics, h_ref, h_theta):
    """s_ref, s_theta, s_other of each critic, one sequence at a time."""

    def score(critic, latents):
        return torch.cat([critic(h, torch.ones(h.shape[:2])) for h in latents])

    (ref_pos, ref_neg), (theta_pos, theta_neg) = ((h[:8], h[8:]) for h in (h_ref, h_theta))
    pos, neg = critics
    return [
        [score(pos, ref_pos), score(pos, theta_pos), score(pos, ref_neg)],
        [score(neg, ref_neg), score(neg, theta_neg), score(neg, ref_pos)],
    ]


def latent_gradient(loss, h_theta, triplets):
    """d loss / d latents, (T, H); the prompt's latents, which both answers share, are one set of
    variables."""
    grads, rows = torch.autograd.grad(loss, h_theta, retain_graph=True), []
    for t, chosen, rejected in zip(triplets, grads[:8], grads[8:], strict=True):
        n = len(t.prompt)
        rows += [chosen[0, :n] + rejected[0, :n], chosen[0, n:], rejected[0, n:]]
    return torch.cat(rows)


def alignment(gradient, h_theta, h_ref, triplets):
    """The mean over tokens of the cosine of -gradient and the way to the reference."""
    ways = [
        (h_ref[i] - h_theta[i])[0, n:].detach()
        for j, t in enumerate(triplets)
        for i, n in ((j, 0), (j + 8, len(t.prompt)))
    ]
    cosines = [
        -(g @ way) / (g.norm() * way.norm()) if way.norm() > 0 and g.norm() > 0 else torch.zeros(())
        for g, way in zip(gradient, torch.cat(ways), strict=True)
    ]
    return sum(cosines) / len(cosines)


def naive_algorithm_1(world, steps, loss, mean, kind, lambda_adv, beta, ratio, lr, disc_lr, total):
    """Algorithm 1 as the paper lists it, line by line: no packing, sharding, splitting or fused
    step."""
    args = str(world / "llama"), torch.float64
    policy, ref = (
        AutoModelForCausalLM.from_pretrained(args[0], dtype=args[1]).eval() for _ in "pr"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critics = [
            build_discriminator("transformer", 32, 16, 2, 0.0, 64, 0.9).double() for _ in range(2)
        ]
    optimizer = torch.optim.AdamW(policy.parameters(), lr, weight_decay=0)
    disc_optimizer = torch.optim.AdamW([p for c in critics for p in c.parameters()], disc_lr)
    data = load_pairs(str(world / "train.jsonl"), "train", tiny(), 64)
    averages, rows = [[0.0] * 3, [0.0] * 3], []
    for step in range(steps):
        warm = math.ceil(0.1 * total)
        factor = (
            (step + 1) / warm
            if step < warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        )
        optimizer.param_groups[0]["lr"], disc_optimizer.param_groups[0]["lr"] = (
            lr * factor,
            disc_lr * factor,
        )
        batch = [data.triplets[i] for i in batch_indices(step, len(data.triplets), 8, 0)]
        h_theta, logp = naive_forward(policy, batch)
        with torch.no_grad():
            h_ref, ref_logp = naive_forward(ref, batch)

        disc_losses, mus = [], []
        for j, (s_ref, s_theta, s_other) in enumerate(
            naive_quad(critics, h_ref, [h.detach() for h in h_theta])
        ):
            averages[j] = [
                0.9 * m + 0.1 * s.mean().item()
                for m, s in zip(averages[j], (s_ref, s_theta, s_other), strict=True)
            ]
            mu = [m / (1 - 0.9 ** (step + 1)) for m in averages[j]]
            if mean == "batch":
                mu = [s_ref.mean(), s_theta.mean(), s_other.mean()]
            disc_losses.append(
                softplus(mu[1] - s_ref).mean() + softplus(s_theta - mu[0]).mean()
                + softplus(mu[2] - s_theta).mean() + softplus(s_other - mu[1]).mean()
            )  # fmt: skip
            mus.append(mu)
        disc_optimizer.zero_grad()
        sum(disc_losses).backward()
        disc_optimizer.step()
        for critic in critics:
            critic.power_iterate()

        adv = 0
        for (s_ref, s_theta, _), mu in zip(naive_quad(critics, h_ref, h_theta), mus, strict=True):
            if mean == "batch":
                m_ref, m_theta = s_ref.detach().mean(), s_theta.mean()
                if kind == "minimax":
                    adv = (
                        adv
                        - softplus(m_theta - s_ref.detach()).mean()
                        - softplus(s_theta - m_ref).mean()
                    )
                else:
                    adv = (
                        adv
                        + softplus(m_ref - s_theta).mean()
                        + softplus(s_ref.detach() - m_theta).mean()
                    )
            elif kind == "minimax":
                adv = adv - softplus(s_theta - mu[0]).mean()
            else:
                adv = adv + softplus(mu[0] - s_theta).mean()
        if loss == "dpo":
            delta = (logp - ref_logp)[:8] - (logp - ref_logp)[8:]
            opo = softplus(-beta * delta).mean()
        else:
            mean_logp = logp / torch.tensor(
                [len(t.chosen) for t in batch] + [len(t.rejected) for t in batch]
            )
            opo = softplus(beta * (ratio - (mean_logp[:8] - mean_logp[8:]))).mean()
        push, other = (latent_gradient(term, h_theta, batch) for term in (lambda_adv * adv, opo))
        optimizer.zero_grad()
        (opo + lambda_adv * adv).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        mse = sum(((a - b) ** 2).mean() for a, b in zip(h_theta, h_ref, strict=True)) / 16
        terms = dict(
            loss_opo=opo, loss_adv=adv, latent_mse=mse,
            adv_to_opo_grad=push.norm() / other.norm(),
            adv_align=alignment(push, h_theta, h_ref, batch),
        )  # fmt: skip
        terms |= dict(zip(("loss_disc_pos", "loss_disc_neg"), disc_losses, strict=True))
        rows.append({name: value.item() for name, value in terms.items()})
    return rows, policy, critics


@pytest.mark.parametrize(
    "loss, mean, kind",
    [("dpo", "ema", "minimax"), ("simpo", "batch", "minimax"),
     ("dpo", "batch", "nonsaturating"), ("simpo", "ema", "nonsaturating")],
)  # fmt: skip
def test_three_steps_equal_a_naive_algorithm_1(loss, mean, kind, tiny_world, tmp_path):
    expected, policy, critics = naive_algorithm_1(
        tiny_world, 3, loss, mean, kind, 0.7, 2.0 if loss == "simpo" else 0.1, 0.5, 3e-3, 3e-2, 3
    )
    rows, weights = run(
        tiny_world, tmp_path / "r", "--dtype=float64", f"--loss={loss}", f"--mean={mean}",
        f"--adv_loss={kind}", "--lambda_adv=0.7", "--micro_batch_size=3",
    )  # fmt: skip
    assert len(rows) == 3
    for row, known in zip(rows, expected, strict=True):
        for name, value in known.items():
            assert abs(row[name] - value) <= 1e-5 * max(1, abs(value)), (name, row[name], value)
    for name, p in policy.named_parameters():
        # as far as fp32 norms inside the float64 model let two groupings of it agree under AdamW
        assert (weights[name] - p).abs().max() < 1e-4, name
    for sign, critic in zip(("pos", "neg"), critics, strict=True):
        for name, p in critic.named_parameters():
            assert (weights[f"{sign}.{name}"] - p).abs().max() < 1e-4, name


SETTINGS = [
    ("--loss=dpo", "--mean=ema"), ("--loss=dpo", "--mean=batch"), ("--loss=simpo", "--mean=ema"),
    ("--loss=simpo", "--mean=batch"), ("--disc=mse",), ("--lambda_adv=0",),
    ("--critic=paired",), ("--critic=paired", "--critic_input=h", "--disc_steps=2"),
]  # fmt: skip


@pytest.mark.parametrize("setting", [
    pytest.param(s, marks=[pytest.mark.slow] * (i not in (0, 3, 7)), id=" ".join(s))
    for i, s in enumerate(SETTINGS)
])  # fmt: skip
def test_results_do_not_depend_on_micro_batches_or_ranks(setting, tiny_world, tmp_path):
    """8 x 1, 1 x 8, and 2 ranks that cut rows of unequal length by tokens. Weights are compared in
    float64 only: in float32 AdamW makes whole steps of gradients that are 0 but for rounding, such
    as an attention key's bias."""
    for dtype in ("float32", "float64"):
        setting = (*(s for s in setting if "dtype" not in s), f"--dtype={dtype}", "--lr=3e-4")
        whole, weights = run(tiny_world, tmp_path / f"{dtype}8", *setting, "--micro_batch_size=8")
        for ranks, cut_by in ((1, "--micro_batch_size=1"), (2, "--micro_tokens=90")):
            rows, cut = run(tiny_world, tmp_path / f"{dtype}{ranks}", *setting, cut_by, ranks=ranks)
            for a, b in zip(whole, rows, strict=True):
                close(a, b, 1e-5)
            assert dtype == "float32" or furthest(weights, cut) < 1e-9


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_tied_soft_capped_gemma_2_is_the_same_on_two_ranks(dtype, tolerance, tiny_world, tmp_path):
    setting = (f"--dtype={dtype}", "--micro_batch_size=3", "--max_steps=2")
    one, _ = run(tiny_world, tmp_path / "1", *setting, family="gemma2")
    two, _ = run(tiny_world, tmp_path / "2", *setting, family="gemma2", ranks=2)
    assert len(two) == 2
    for a, b in zip(one, two, strict=True):
        close(a, b, tolerance, but=("disc_acc_pos", "disc_acc_neg") if dtype == "bfloat16" else ())


def demand_hybrid_sharding(rank):
    inner = train_ganpo.train_step

    def step(run, *more):
        for p in run.policy.model.base_model.layers.parameters():
            assert p.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
            assert [str(x) for x in p.placements] == ["R", "S(0)"]
        return inner(run, *more)

    train_ganpo.train_step = step


TWO_NODES = dict(family="gemma2", ranks=4, nodes=2, prepare=demand_hybrid_sharding)


@pytest.mark.slow
def test_two_nodes_that_shard_within_and_replicate_between_are_as_one_rank(tiny_world, tmp_path):
    setting = ("--micro_tokens=90", "--max_steps=2")
    one, _ = run(tiny_world, tmp_path / "1", *setting, family="gemma2")
    four, _ = run(tiny_world, tmp_path / "4", *setting, **TWO_NODES)
    assert len(four) == 2
    for a, b in zip(one, four, strict=True):
        close(a, b, 1e-5)


@pytest.mark.slow
def test_two_nodes_resume_bit_for_bit(tiny_world, tmp_path):
    setting = ("--micro_tokens=90", "--max_steps=3")
    _, weights = run(tiny_world, tmp_path / "4", *setting, **TWO_NODES)
    for more in (("--stop_after=2",), ("--resume",)):
        _, again = run(tiny_world, tmp_path / "r", *setting, *more, **TWO_NODES)
    assert furthest(weights, again) == 0


def forbid_reading(rank):
    if rank:
        AutoModelForCausalLM.from_pretrained = None


def test_one_rank_alone_reads_the_weights(tiny_world, tmp_path):
    launch(flags(tiny_world, tmp_path / "r", "--max_steps=1"), 2, prepare=forbid_reading)
    assert rows_of(tmp_path / "r" / "metrics.csv")[0]["loss_opo"] == pytest.approx(LN2, rel=1e-6)


def test_weights_that_cannot_be_read_are_one_line(tiny_world, tmp_path):
    broken = shutil.copytree(tiny_world / "llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="--model .*broken: [^\n]+$"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--model={broken}"))


class HostSyncs(TorchDispatchMode):
    """Names the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", SETTINGS, ids=" ".join)
def test_a_step_makes_one_transfer_to_the_host(setting, tiny_world, tmp_path, monkeypatch):
    inner, syncs, transfers = train_ganpo.train_step, HostSyncs(), []
    tolist = torch.Tensor.tolist

    def watched(run, batches, step):
        batches = list(batches)  # made of numpy, on the host
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: transfers.append(x) or tolist(x))
        with syncs:
            metrics = inner(run, batches, step)
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        return metrics

    monkeypatch.setattr(train_ganpo, "train_step", watched)
    run(tiny_world, tmp_path / "r", *setting, "--max_steps=2", "--micro_batch_size=3")
    assert len(transfers) == 2 and syncs.seen == []


@pytest.mark.parametrize("more", [(), ("--checkpointing",), ("--lambda_adv=0",)])
def test_the_estimate_of_graphs_is_what_autograd_keeps(more, tiny_world, tmp_path):
    """The same count over real tensors; what bench.py measures stands in README."""
    args = train_ganpo.parse_args(
        flags(tiny_world, tmp_path / "r", *more, "--micro_batch_size=3", family="gemma2")
    )
    config = AutoConfig.from_pretrained(args.model)
    pairs = load_pairs(args.dataset, "train", tiny(), 64).triplets
    cut = estimate.survey([pairs[:8], pairs[8:16], pairs[16:24]], args, 1)
    cpu = torch.device("cpu")
    needs = estimate.needed_memory(train_ganpo.forward_pairs, args, config, cut, cpu, 1)
    state = SimpleNamespace(args=args, critics=game.build_critics(args, config))
    state.autocast = game.autocast(cpu, torch.float32, cpu)
    state.policy = load_lm(args.model, torch.float32, args.checkpointing)
    state.ref = load_lm(args.model, torch.float32).requires_grad_(False)
    forwards = [cut.longest] if "--lambda_adv=0" in more else cut.heaviest
    of = partial(train_ganpo.forward_pairs, state, sums=defaultdict(float))
    kept = [estimate.kept_bytes(partial(of, pack(pairs)), state) for pairs in forwards]
    assert needs["graphs"] == pytest.approx(sum(kept), rel=0.1)
    weights = sum(p.numel() for p in state.policy.parameters())
    assert needs["reference"] == 4 * weights
    assert needs["weights, moments, gradients"] >= 16 * weights


def test_what_cannot_fit_is_refused_with_the_numbers(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "available", lambda device: 2.0**20)
    with pytest.raises(SystemExit, match=r"estimated: .* graphs .* there: 0.00 GB. More ranks"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_step_0_has_the_known_values(tiny_world, tmp_path):
    for loss, value in (("dpo", LN2), ("ipo", 25.0)):
        row = run(tiny_world, tmp_path / loss, f"--loss={loss}", "--max_steps=1")[0][0]
        assert abs(row["loss_opo"] / value - 1) < 1e-6
        assert row["reward_chosen"] == row["reward_rejected"] == row["margin"] == 0
        assert row["pref_acc"] == row["disc_acc_pos"] == row["disc_acc_neg"] == 0.5
        assert row["score_gap_pos"] == row["score_gap_neg"] == row["latent_mse"] == 0


def test_a_run_whose_reference_is_not_the_policy_stops_at_the_start(
    tiny_world, tmp_path, monkeypatch
):
    def spoiled(name, dtype, checkpointing=None, **more):
        lm = load_lm(name, dtype, **more)
        if checkpointing is None and not more.get("shell"):  # the reference's weights
            lm.model.base_model.norm.weight.data[3] += 0.1
        return lm

    monkeypatch.setattr(train_ganpo, "load_lm", spoiled)
    with pytest.raises(SystemExit, match="differ at the start: latents by"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r"))
    assert not (tmp_path / "r" / "metrics.csv").exists()


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_lambda_0_is_the_plain_loss_bit_for_bit(loss, tiny_world, tmp_path, monkeypatch):
    """No discriminator is built, and SimPO loads no reference."""
    loads = []

    def load(*args, **more):
        loads.extend([args] * ("shell" not in more))  # those that read weights
        return load_lm(*args, **more)

    monkeypatch.setattr(game, "build_discriminator", None)  # calling it would fail
    monkeypatch.setattr(train_ganpo, "load_lm", load)
    rows, weights = run(tiny_world, tmp_path / "r", f"--loss={loss}", "--lambda_adv=0")
    assert len(loads) == {"dpo": 2, "simpo": 1}[loss]

    policy, ref = (load_lm(str(tiny_world / "llama"), torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), 1.0, weight_decay=0, fused=True)
    data = load_pairs(str(tiny_world / "train.jsonl"), "train", tiny(), 64)
    for step, factor in enumerate((1.0, 1.0, 0.5)):
        optimizer.param_groups[0]["lr"] = 3e-3 * factor
        pairs = [data.triplets[i] for i in batch_indices(step, len(data.triplets), 8, 0)]
        batch = pack(sorted(pairs, key=lambda t: -sum(map(len, t[:3]))))  # longest first
        chosen, rejected = policy(batch).logp.chunk(2)
        if loss == "dpo":
            with torch.no_grad():
                ref_chosen, ref_rejected = ref(batch).logp.chunk(2)
            value = F.softplus(0.1 * (rejected - ref_rejected) - 0.1 * (chosen - ref_chosen))
        else:
            length_chosen, length_rejected = batch.lengths.chunk(2)
            value = F.softplus(2.0 * (0.5 - (chosen / length_chosen - rejected / length_rejected)))
        optimizer.zero_grad()
        (value.sum() / 8).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        assert rows[step]["loss_opo"] == pytest.approx(value.mean().item(), rel=1e-6)
    for name, p in policy.model.state_dict().items():
        assert torch.equal(weights[name], p), name
    unused = ("loss_adv", "disc_lr", "d_ra", "adv_to_opo_grad", "disc_grad_norm", "score_gap_pos")
    assert not set(unused) & set(rows[0])


@pytest.mark.parametrize("kind, more", [("paper", "--mean=batch"), ("paired", "--critic=paired")])
def test_neither_player_sends_gradient_to_the_other(kind, more, tiny_world, tmp_path, monkeypatch):
    """Seen from inside a real step: nothing in policy or reference while the discriminators move,
    and the discriminators do not move, nor their means, while the policy's gradient is taken."""
    update, seen = game.GAMES[kind].update, []

    def watched(run, kept, sums, step):
        metrics = update(run, kept, sums, step)
        assert all(p.grad is None for p in [*run.policy.parameters(), *run.ref.parameters()])
        seen.append((run, {k: v.clone() for k, v in run.critics.state_dict().items()}))
        seen[-1][0].grads = [p.grad.clone() for p in run.critics.parameters()]
        return metrics

    monkeypatch.setattr(game.GAMES[kind], "update", watched)
    run(tiny_world, tmp_path / "r", "--max_steps=1", more)
    ((state, critics),) = seen
    for name, value in state.critics.state_dict().items():
        assert torch.equal(value, critics[name]), name
    for p, grad in zip(state.critics.parameters(), state.grads, strict=True):
        assert torch.equal(p.grad, grad)
    assert all(p.grad is None for p in state.ref.parameters())


def test_discriminators_learn_and_stay_spectrally_normal(tiny_world, tmp_path):
    """Against a policy that stands still, so that what they learn is good from bad."""
    run(tiny_world, tmp_path / "r", "--lr=0", "--disc_lr=1e-2", "--epochs=6")
    for critic in load_discriminators(tmp_path / "r" / "discriminators.pt").values():
        assert critic.num_updates == 18
        for layer in critic.normalised_layers():
            assert abs(torch.linalg.matrix_norm(layer.weight, 2).item() - 1) < 0.02
    first, *_, last = rows_of(tmp_path / "r" / "metrics.csv")
    assert last["loss_disc_pos"] < first["loss_disc_pos"] - 0.02
    assert last["loss_disc_neg"] < first["loss_disc_neg"] - 0.02


@pytest.mark.parametrize("more, columns", [
    ((), set()),
    (("--disc=mlp",), set()),
    (("--disc=mse",), {"d_ra", "disc_lr", "disc_grad_norm", "loss_disc_pos", "score_gap_neg"}),
    (("--loss=sft", "--lambda_adv=0"), {"loss_adv", "latent_mse", "disc_acc_pos"}),
])  # fmt: skip
def test_metrics_have_every_column_and_leave_empty_what_has_no_value(
    more, columns, tiny_world, tmp_path
):
    out = tmp_path / "r"
    rows, _ = run(tiny_world, out, "--max_steps=2", "--lambda_adv=1", *more)
    header = (out / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[:3] == ["step", "loss_opo", "loss_adv"] and header[-1] == "seconds"
    assert [r["step"] for r in rows] == [1, 2]
    for row in rows:
        assert not columns & set(row)
        assert columns or set(row) == set(header)


def test_disc_every_k_updates_every_kth_step_and_means_every_step(tiny_world, tmp_path):
    rows, weights = run(tiny_world, tmp_path / "r", "--disc_every=2", "--max_steps=3")
    assert ["disc_grad_norm" in row for row in rows] == [True, False, True]
    assert weights["pos.num_updates"] == 3


def test_schedule_is_linear_then_cosine_to_0():
    known = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 18)) for k in range(18))]
    assert [train_ganpo.schedule(t, 20, 0.1) for t in range(20)] == pytest.approx(known)
    assert train_ganpo.schedule(0, 20, 0.0) == 1
    assert train_ganpo.schedule(4, 5, 1.0) == 1


def test_rows_are_means_over_the_whole_step_and_columns_agree(tiny_world, tmp_path):
    rows, _ = run(tiny_world, tmp_path / "r", "--micro_batch_size=3")
    for row in rows:
        assert row["margin"] == pytest.approx(
            row["reward_chosen"] - row["reward_rejected"], abs=1e-7
        )
        assert row["pref_acc"] * 16 == round(row["pref_acc"] * 16)
    data = load_pairs(str(tiny_world / "train.jsonl"), "train", tiny(), 64)
    for step, row in enumerate(rows):
        ts = [data.triplets[i] for i in batch_indices(step, len(data.triplets), 8, 0)]
        assert row["tokens"] == sum(2 * len(t.prompt) + len(t.chosen) + len(t.rejected) for t in ts)


@pytest.mark.parametrize("more", [(), ("--lambda_adv=1", "--disc=mse"), ("--loss=simpo",)])
def test_training_raises_accuracy_and_margin_on_its_own_pairs(more, tiny_world, tmp_path):
    rows, _ = run(tiny_world, tmp_path / "r", "--epochs=12", *more)
    last = rows[-6:]
    assert sum(r["loss_opo"] for r in last) / 6 < 0.8 * rows[0]["loss_opo"]
    assert min(r["pref_acc"] for r in last) > 0.85 and last[-1]["margin"] > rows[0]["margin"]


def test_autocast_leaves_the_spectral_norms_as_they_are(monkeypatch):
    critic, h, mask = (
        build_discriminator("transformer", 32, 16),
        torch.randn(4, 7, 32),
        torch.ones(4, 7),
    )
    plain, weights, linear = critic(h, mask), [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: weights.append(w) or linear(x, w, b))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = critic(h, mask)
    assert torch.equal(weights[0], critic.project_in.weight)  # what the products were taken with
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, plain)
    torch.testing.assert_close(mixed, plain, rtol=3e-2, atol=3e-2)


# ---------------------------------------------------------------------- what a run leaves behind


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_hf_folder_reloads_with_identical_logits(family, tiny_world, tmp_path, monkeypatch):
    trained = {}
    inner = train_ganpo.export_policy

    def keep(policy, tokenizer, folder):
        with torch.no_grad():
            trained["logp"] = policy(pack(triplets_for(LENGTHS))).logp
        inner(policy, tokenizer, folder)

    monkeypatch.setattr(train_ganpo, "export_policy", keep)
    run(tiny_world, tmp_path / "r", "--max_steps=2", family=family)
    folder = tmp_path / "r" / "hf"
    with torch.no_grad():
        again = PackedLM(load_lm(str(folder), torch.float32).model)(
            pack(triplets_for(LENGTHS))
        ).logp
    assert torch.equal(again, trained["logp"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config._attn_implementation != "shared_prompt"
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family == "gemma2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny().chat_template
    moved = furthest(load_file(folder / "model.safetensors"),
                     load_file(tiny_world / family / "model.safetensors"))  # fmt: skip
    assert moved > 1e-4


def test_discriminators_file_scores_as_the_run_did(tiny_world, tmp_path):
    run(tiny_world, tmp_path / "r", "--max_steps=2")
    critics = load_discriminators(tmp_path / "r" / "discriminators.pt")
    assert set(critics) == {"disc_pos", "disc_neg"}
    saved = torch.load(tmp_path / "r" / "discriminators.pt", weights_only=True)
    for name, critic in critics.items():
        assert not critic.training and critic.means().shape == (3,)
        for k, value in critic.state_dict().items():
            assert torch.equal(value, saved[name][k])


def test_config_json_has_settings_versions_and_fingerprint(tiny_world, tmp_path):
    run(tiny_world, tmp_path / "r", "--max_steps=1")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    data = load_pairs(str(tiny_world / "train.jsonl"), "train", tiny(), 64)
    assert config["data_fingerprint"] == data.fingerprint and config["pairs"] == 28
    assert config["versions"]["torch"] == torch.__version__
    assert config["steps_per_epoch"] == 3 and config["total_steps"] == 1
    assert config["lambda_adv"] == 0.1 and config["disc_lr"] == pytest.approx(10 * 3e-3)


def test_eval_csv_is_the_exact_mean_however_it_is_cut(tiny_world, tmp_path):
    more = (f"--eval_split={tiny_world / 'test.jsonl'}", "--eval_every=2")
    results = []
    for name, size, ranks in (("a", 8, 1), ("b", 2, 1), ("c", 3, 2)):
        run(tiny_world, tmp_path / name, *more, f"--micro_batch_size={size}", ranks=ranks)
        results.append(rows_of(tmp_path / name / "eval.csv"))
    assert [(r["step"], r["pairs"]) for r in results[0]] == [(2, 11), (3, 11)]  # and the end
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(a, b, 1e-5)


def test_final_rows_are_means_with_the_standard_errors_of_paired_differences():
    reference = [Verdict(0, 0.25), Verdict(1, 1), Verdict(0, 0), Verdict(1, 1)]
    policy = [Verdict(1, 1), Verdict(1, 1), Verdict(0, 0.25), Verdict(1, 1)]
    first, second, difference = report.compare(0.7, reference, policy)
    assert [first[k] for k in ("temperature", "model", "n")] == [0.7, "reference", 4]
    assert (first["strict_acc"], second["strict_acc"], difference["strict_acc"]) == (50, 75, 25)
    assert difference["strict_acc_se"] == pytest.approx(statistics.stdev([100, 0, 0, 0]) / 2)
    assert difference["mean_score"] == 0.25 and second["mean_score"] == 0.8125
    assert difference["mean_score_se"] == pytest.approx(statistics.stdev([0.75, 0, 0.25, 0]) / 2)
    *_, line = report.final_lines([first, second, difference]).splitlines()
    assert re.findall(r"[+-]?[\d.]+", line)[:3] == ["0.7", "50.0", "75.0"]
    assert "+25.0 +- 25.0" in line and "0.562   0.812  +0.250 +- 0.177" in line


def test_the_terminal_shows_what_is_trained_on_and_one_line_a_step(tiny_world, tmp_path, capsys):
    run(tiny_world, tmp_path / "r", "--adv_loss=nonsaturating", "--mean=batch")
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    (settings,) = [line for line in lines if line.startswith("preset mini ")]
    assert " adv_loss=nonsaturating mean=batch" in settings and "critic" not in settings
    assert settings.endswith(f"all settings: {tmp_path / 'r' / 'config.json'}")
    assert "8 pairs/step = 1 rank(s) x 1 forward(s) of up to 8 pairs" in text
    assert "28 pairs = 3 steps/epoch, 4 left over" in text
    assert f"adv {4 * LN2:+.4f}, D {4 * LN2:.4f}" in text
    assert "28 of 28 rows; dropped: none" in text
    chosen = next(line for line in lines if line.startswith("first pair, chosen"))
    assert chosen.count(">>>") == chosen.count("<<<") == 1 and "<|end|>'<<<" in chosen
    steps = [line for line in lines if "tok/s" in line]
    assert [s.split()[0] for s in steps] == ["1/3", "2/3", "3/3"]
    assert len({len(s) for s in steps}) == 1 and len(steps[0]) <= 140
    assert "100.0%" in steps[-1] and "0:00:00 left" in steps[-1]


def test_the_terminal_names_another_game_than_the_presets(tiny_world, tmp_path, capsys):
    run(tiny_world, tmp_path / "r", "--critic=paired", "--max_steps=1")
    assert "preset mini " in (text := capsys.readouterr().out) and " critic=paired " in text


def test_memory_is_measured_where_linux_keeps_no_high_water_mark(monkeypatch):
    cpu, read = torch.device("cpu"), Path.read_text
    usual = report.peak_gb(cpu)
    monkeypatch.setattr(Path, "read_text", lambda p: read(p).replace("VmHWM", "VmOther"))
    assert 0.1 < usual == pytest.approx(report.peak_gb(cpu), rel=0.5)


def test_runs_without_out_dir_take_the_next_free_folder(tiny_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [f for f in flags(tiny_world, "x", "--max_steps=1") if "out_dir" not in f]
    for _ in range(2):
        train_ganpo.main(argv)
    assert sorted(p.name for p in Path("out").iterdir()) == ["run-000", "run-001"]


# ---------------------------------------------------------------------- flags and bad input


def test_presets_and_derived_defaults():
    gemma = train_ganpo.parse_args(["--preset=gemma-2-2b-it", "--lr=4e-7"])
    assert gemma.disc_lr == pytest.approx(2e-7) and gemma.lambda_adv == 1 and gemma.beta == 0.1
    assert (
        gemma.eval_split == "test"
        and gemma.save_every == 50
        and gemma.ref_model == "google/gemma-2-2b-it"
    )
    llama = train_ganpo.parse_args(["--preset=llama-3-8b-instruct", "--loss=simpo"])
    assert (llama.beta, llama.gamma_beta_ratio, llama.disc_layers) == (10, 0.3, 4)
    mini = train_ganpo.parse_args(["--loss=simpo", "--disc_lr=5e-5", "--seed=3"])
    assert (mini.beta, mini.disc_lr, mini.lambda_adv, mini.eval_every) == (2, 5e-5, 0.1, 32)
    assert mini.model == mini.ref_model == "out/mini/seed3/model" and mini.final_eval == 1000
    assert mini.eval_split == "out/mini/seed3/test.jsonl" and gemma.final_eval == 0
    own = train_ganpo.parse_args(["--dataset=mine.jsonl"])
    assert (own.eval_split, own.eval_every, own.final_eval) == (None, 0, 0)
    own = train_ganpo.parse_args(["--preset=gemma-2-2b-it", "--dataset=mine.jsonl"])
    assert own.eval_split is None and own.eval_every == 0


@pytest.mark.parametrize(
    "preset, family",
    [
        ("gemma-2-2b-it", "gemma2"),
        pytest.param("llama-3-8b-instruct", "llama", marks=pytest.mark.slow),
    ],
)
def test_the_papers_presets_train_a_tiny_model_of_their_family(
    preset, family, tiny_world, tmp_path
):
    """bf16 compute, critics of Fig 10 with dropout; the start is checked to bf16's tolerance."""
    train_ganpo.main([
        f"--preset={preset}", f"--model={tiny_world / family}", "--batch_size=8", "--max_length=64",
        f"--dataset={tiny_world / 'train.jsonl'}", "--max_steps=2", "--checkpointing",
        f"--out_dir={tmp_path / 'r'}",
    ])  # fmt: skip
    first, _ = rows_of(tmp_path / "r" / "metrics.csv")
    assert abs(first["loss_opo"] - LN2) < 2e-3 and first["disc_lr"] == first["lr"] / 2
    critics = load_discriminators(tmp_path / "r" / "discriminators.pt")
    assert len(critics["disc_pos"].layers) == {"gemma2": 2, "llama": 4}[family]


BAD = [  # flags, and what the one line must say
    (["--nonsense=1"], "unrecognized arguments: --nonsense"),
    (["--lamda_adv=1"], "unrecognized arguments"),
    (["--preset=gpt-5"], "invalid choice: 'gpt-5'"),
    (["--lr=nan"], "--lr: nan is not in"),
    (["--lr=inf"], "--lr: inf is not in"),
    (["--lr=-1e-3"], "--lr: -1e-3 is not in"),
    (["--beta=0"], "--beta: 0 is not in (0"),
    (["--ema_decay=1"], "--ema_decay: 1 is not in"),
    (["--warmup=1.5"], "--warmup: 1.5 is not in [0, 1]"),
    (["--batch_size=0"], "--batch_size: 0 is not in [1"),
    (["--batch_size=2.5"], "--batch_size: '2.5' is no int"),
    (["--batch_size=64"], "fewer pairs than --batch_size 64"),
    (["--dataset=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--split=test"], "no split 'test'; a single file has one, 'train'"),
    (["--model=nowhere/at/all"], "--model nowhere/at/all: no such folder"),
    (["--max_length=2"], "fewer pairs than --batch_size 8: 0 of 28 rows; dropped: prompt leaves"),
    (["--out_dir=/proc/run"], "--out_dir [Errno 2] No such file or directory: '/proc/run'"),
    (["--max_length=512"], "--max_length 512 is beyond the model's 256 positions"),
    (["--chat_template=nowhere.jinja"], "--chat_template: "),
    (["--eval_every=2"], "pass --eval_split"),
    (["--final_eval=5"], "--final_eval is for the miniature's data only"),
    (["--resume"], "no run to resume"),
]  # fmt: skip


@pytest.mark.parametrize(
    "bad, message", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_input_is_one_line_before_any_model_is_loaded(
    bad, message, tiny_world, tmp_path, monkeypatch
):
    monkeypatch.setattr("policy.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(SystemExit) as stop:
        train_ganpo.main(flags(tiny_world, tmp_path / "r", *bad))
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert stop.value.code not in (0, None)
    assert not (tmp_path / "r").exists()


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_numbers(
    tiny_world, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    args = train_ganpo.parse_args(flags(tiny_world, tmp_path / "r"))
    with pytest.raises(ValueError, match="--batch_size 8 is not divisible by 3 ranks"):
        train_ganpo.check_input(args, torch.device("cpu"))


def test_other_models_than_the_checked_ones_are_refused(tiny_world, tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1)
    config.save_pretrained(tmp_path / "gpt2")
    tiny().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SystemExit, match="'gpt2' is none of those checked here"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--model={tmp_path / 'gpt2'}"))


def test_a_dtype_that_the_gpu_cannot_do_is_refused(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    args = train_ganpo.parse_args(flags(tiny_world, tmp_path / "r", "--dtype=bfloat16"))
    with pytest.raises(ValueError, match="--dtype bfloat16: this GPU cannot"):
        train_ganpo.check_input(args, torch.device("cpu"))


def test_a_models_own_code_is_never_run(tiny_world, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(tiny_world / "llama", evil)
    config = json.loads((evil / "config.json").read_text())
    own = {f"Auto{k}": "evil.Evil" for k in ("Config", "ModelForCausalLM", "Tokenizer")}
    config |= {"model_type": "evil", "auto_map": own}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(SystemExit, match="evil contains custom code"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--model={evil}"))
    done = subprocess.run([sys.executable, "generate.py", "--model", evil, "hello"], cwd=HERE,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("generate.py: ")
    assert not (tmp_path / "ran").exists()


def test_a_line_of_a_megabyte_and_nul_bytes_train(tiny_world, tmp_path):
    rows = (tiny_world / "train.jsonl").read_text()
    for chosen in ("a" * 1_000_000, "ab \0 cd\0", "\0"):
        rows += json.dumps({"prompt": "abc", "chosen": chosen, "rejected": "b"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    begin = time.monotonic()
    run(tiny_world, tmp_path / "r", f"--dataset={tmp_path / 'rows.jsonl'}", "--micro_batch_size=3")
    assert time.monotonic() - begin < 20
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["pairs"] == 31 and config["notes"]["truncated"] == 1


def test_token_ids_and_latents_that_do_not_fit_are_refused(tiny_world, tmp_path):
    for name, changes in (("small", {"vocab_size": 100}), ("wide", {"hidden_size": 64})):
        make_model(tmp_path / name, **changes)
    with pytest.raises(SystemExit, match="beyond the model's 100"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--model={tmp_path / 'small'}"))
    with pytest.raises(SystemExit, match="hidden size of the policy 32, of the reference 64"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--ref_model={tmp_path / 'wide'}"))


def test_an_out_dir_that_holds_a_run_is_refused_and_untouched(tiny_world, tmp_path):
    rows, _ = run(tiny_world, tmp_path / "r", "--max_steps=1")
    with pytest.raises(SystemExit, match="holds a run: pass --resume"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r"))
    assert rows_of(tmp_path / "r" / "metrics.csv") == rows


@pytest.mark.parametrize("wrong", [
    lambda lp, args: (lp.logp_rejected - lp.logp_chosen).mean(),
    lambda lp, args: torch.stack([lp.logp_chosen, lp.logp_rejected]),
])  # fmt: skip
def test_a_loss_that_is_no_value_per_pair_is_refused(wrong, tiny_world, tmp_path, monkeypatch):
    wrong.needs_ref = True
    monkeypatch.setitem(losses.OPO_LOSSES, "wrong", wrong)
    with pytest.raises(SystemExit, match="--loss wrong: shape .*, not one value per pair"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", "--loss=wrong"))


def test_a_loss_that_asks_for_a_value_is_refused_by_the_estimate(tiny_world, tmp_path, monkeypatch):
    def curious(lp, args):
        return lp.logp_rejected * (0 if lp.logp_chosen.sum() > 0 else 1)

    def sparse(lp, args):
        return lp.logp_rejected - lp.logp_chosen[lp.logp_chosen < 0].sum()

    for loss, asked in ((curious, "_local_scalar_dense"), (sparse, "nonzero")):
        loss.needs_ref = False
        monkeypatch.setitem(losses.OPO_LOSSES, "mine", loss)
        with pytest.raises(SystemExit, match=f"asks for a tensor's value, .*{asked}"):
            train_ganpo.main(flags(tiny_world, tmp_path / "r", "--loss=mine"))
    assert not (tmp_path / "r").exists()


def test_a_diverging_run_stops_before_the_update(tiny_world, tmp_path):
    with pytest.raises(SystemExit, match=r"step \d+: \w+ is (nan|inf)"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", "--lr=1e30", "--epochs=9"))
    assert all(
        math.isfinite(v) for r in rows_of(tmp_path / "r" / "metrics.csv") for v in r.values()
    )
    assert not (tmp_path / "r" / "hf").exists()


# ---------------------------------------------------------------------- the command line


def command(*argv, torchrun=0):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"] if torchrun else []
    argv = [sys.executable, *launcher, "train_ganpo.py", *argv]
    return subprocess.run(argv, cwd=HERE, capture_output=True, text=True, timeout=600)


def test_python_and_torchrun_do_the_same(tiny_world, tmp_path):
    for name, torchrun in (("python", 0), ("torchrun", 1)):
        done = command(*flags(tiny_world, tmp_path / name, "--max_steps=2"), torchrun=torchrun)
        assert done.returncode == 0, done.stderr
    a, b = (
        load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("python", "torchrun")
    )
    assert furthest(a, b) == 0


@pytest.mark.parametrize(
    "limit, expected", [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), (None, 8)]
)
def test_threads_follow_the_cores_that_a_container_may_use(limit, expected, monkeypatch):
    def read(path):
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        if limit is None:
            raise FileNotFoundError
        return limit + "\n"

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(Path, "read_text", read)
    assert distributed.cores() == expected


def test_a_bad_flag_exits_non_zero_with_one_line():
    done = command("--lr=nan")
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "--lr: nan" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no real data beside the repository")
@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_readme_command_on_real_preferences_with_one_and_two_processes(loss, tmp_path):
    rows = []
    for ranks in (1, 2):
        out = tmp_path / f"{loss}{ranks}"
        done = command(
            f"--model={SHARED / 'models/stories260K'}", "--chat_template=plain_chat.jinja",
            f"--dataset={SHARED / 'prefs/ultrafeedback_trl.jsonl.gz'}", "--max_length=512",
            "--batch_size=32", "--max_steps=4", f"--loss={loss}", f"--out_dir={out}",
            torchrun=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows.append(rows_of(out / "metrics.csv"))
    assert len(rows[0]) == 4
    # AdamW turns gradients of rounding size into whole steps: looser with every step
    close(rows[0][0], rows[1][0], 1e-5)
    close(rows[0][3], rows[1][3], 1e-3)


# ---------------------------------------------------------------------- the golden trajectory

GOLDEN = HERE / "assets" / "golden.csv"  # python test_train.py writes it anew


def golden_run(folder, *more):
    """Ten steps of GANPO(DPO) in float64 from a random Llama on committed rows -> metrics."""
    model = AutoModelForCausalLM.from_pretrained(make_model(folder / "llama"))
    rng = np.random.default_rng(0)  # of the same numbers on every machine, unlike torch's
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(0.2 * rng.standard_normal(p.shape) + (p.dim() == 1)))
    model.save_pretrained(folder / "llama")
    shutil.copy(HERE / "assets" / "golden_rows.jsonl", folder / "train.jsonl")
    settings = "--dtype=float64", "--lr=1e-3", "--disc_lr=1e-3", "--max_steps=10", "--epochs=4"
    rows, _ = run(folder, folder / "run", *settings, *more)
    return rows


def test_ten_steps_follow_the_committed_trajectory(tmp_path):
    # cut otherwise than the committed run, so that its rounding errors differ
    found, golden = golden_run(tmp_path, "--micro_batch_size=3"), rows_of(GOLDEN)
    assert len(golden) == 10 and golden[-1]["loss_opo"] < golden[0]["loss_opo"] - 0.05
    for a, b in zip(golden, found, strict=True):
        close(a, {k: v for k, v in b.items() if k in a}, 1e-5)


def write_golden():
    with tempfile.TemporaryDirectory() as folder:
        rows = golden_run(Path(folder))
    exact = [
        k for k in report.COLUMNS if k in rows[0].keys() - {"seconds", "tokens_per_s", "peak_gb"}
    ]
    with GOLDEN.open("w", newline="") as file:
        table = csv.DictWriter(file, exact, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.9g}" for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    write_golden()
