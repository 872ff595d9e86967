"""Claims about Algorithm 1 as train_ganpo.py runs it, and about what a run leaves behind.

    python -m pytest -q tests/test_train.py -m "not slow"

Everything runs train_ganpo.main itself on tiny models of random weights, in this process for one
rank and in forked ones for two. The oracle is Algorithm 1 written out naively in float64.
"""

import json
import math
import re
import shutil
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import discriminator
import paired
import report
import train_ganpo
from checkpoint import load_discriminators
from data import load_pairs
from discriminator import build_discriminator
from distributed import all_ranks
from helpers import (
    LENGTHS,
    LN2,
    alignment,
    close,
    flags,
    furthest,
    latent_gradient,
    make_model,
    naive_forward,
    plain_steps,
    rows_of,
    run,
    softplus,
    tiny,
    triplets_for,
)
from losses import OPO_LOSSES, PreferenceLoss
from miniature.world import Verdict
from packing import batch_indices, pack
from policy import PackedLM, load_lm

# ---------------------------------------------------------------------- Algorithm 1


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


def naive_algorithm_1(world, steps, loss, decay, kind, lambda_adv, beta, ratio, lr, disc_lr, total):
    """Algorithm 1 as the paper lists it, line by line: no packing, sharding, splitting or fused
    step."""
    args = str(world / "llama"), torch.float64
    policy, ref = (
        AutoModelForCausalLM.from_pretrained(args[0], dtype=args[1]).eval() for _ in "pr"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critics = [
            build_discriminator("transformer", 32, 16, 2, 0.0, 64, decay).double() for _ in range(2)
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
                decay * m + (1 - decay) * s.mean().item()
                for m, s in zip(averages[j], (s_ref, s_theta, s_other), strict=True)
            ]
            mu = [m / (1 - decay ** (step + 1)) for m in averages[j]]
            if decay == 0:
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
            if decay == 0:
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
    "loss, decay, kind",
    [("dpo", 0.9, "minimax"), ("simpo", 0, "minimax"),
     ("dpo", 0, "nonsaturating"), ("simpo", 0.5, "nonsaturating")],
)  # fmt: skip
def test_three_steps_equal_a_naive_algorithm_1(loss, decay, kind, tiny_world, tmp_path):
    expected, policy, critics = naive_algorithm_1(
        tiny_world, 3, loss, decay, kind, 0.7, 2.0 if loss == "simpo" else 0.1, 0.5, 3e-3, 3e-2, 3
    )
    rows, weights = run(
        tiny_world, tmp_path / "r", "--dtype=float64", f"--loss={loss}", f"--ema_decay={decay}",
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
    ("--loss=dpo", "--ema_decay=.5"), ("--loss=dpo", "--ema_decay=0"),
    ("--loss=simpo", "--ema_decay=.5"), ("--loss=simpo", "--ema_decay=0"), ("--critic=mse",),
    ("--lambda_adv=0",),
    ("--critic=paired",), ("--critic=paired_h",),
]  # fmt: skip


FAST = {(0, "float32"), (0, "float64"), (3, "float64"), (7, "float64")}


@pytest.mark.parametrize("setting, dtype", [
    pytest.param(s, dtype, marks=[pytest.mark.slow] * ((i, dtype) not in FAST),
                 id=f"{' '.join(s)} {dtype}")
    for i, s in enumerate(SETTINGS) for dtype in ("float32", "float64")
])  # fmt: skip
def test_results_do_not_depend_on_micro_batches_or_ranks(setting, dtype, tiny_world, tmp_path):
    """8 x 1, 1 x 8, and 2 ranks that divide rows of unequal length by tokens. Weights are compared
    in float64 only: in float32 AdamW makes whole steps of gradients that are 0 but for rounding,
    such as an attention key's bias."""
    setting = (*setting, f"--dtype={dtype}", "--lr=3e-4")
    whole, weights = run(tiny_world, tmp_path / "8", *setting, "--micro_batch_size=8")
    for ranks, divided in ((1, "--micro_batch_size=1"), (2, "--micro_tokens=90")):
        rows, others = run(tiny_world, tmp_path / str(ranks), *setting, divided, ranks=ranks)
        for a, b in zip(whole, rows, strict=True):
            close(a, b, 1e-5)
        assert dtype == "float32" or furthest(weights, others) < 1e-9


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


# ---------------------------------------------------------------------- a game of one's own


def least_squares_update(run, kept, step):
    """A least-squares GAN's critics: no running means, no relativism."""
    total = 0
    for out in kept:
        s_ref = train_ganpo.own_scores(run, out.h_ref, out.mask)
        s_theta = train_ganpo.own_scores(run, out.h.detach(), out.mask)
        losses = (s_ref - 1).square() + s_theta.square()
        out.per_pair |= dict(zip(("loss_disc_pos", "loss_disc_neg"), losses.detach(), strict=True))
        total = total + losses.sum() / run.args.batch_size
    run.critic_optimizer.zero_grad()
    total.backward()
    return {"disc_grad_norm": discriminator.step_critics(run)}


def least_squares_loss(run, kept):
    own = [train_ganpo.own_scores(run, out.h, out.mask) for out in kept]
    return (all_ranks(torch.cat(own, dim=-1)) - 1).square().mean(-1).sum()


def test_a_fork_that_replaces_both_functions_plays_another_game_saved_and_resumed(
    tiny_world, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_ganpo, "update_discriminators", least_squares_update)
    monkeypatch.setattr(train_ganpo, "adversarial_loss", least_squares_loss)
    more = ("--disc_lr=1e-2", "--dtype=float64")
    straight, weights = run(tiny_world, tmp_path / "a", *more)
    run(tiny_world, tmp_path / "b", *more, "--stop_after=2")
    rows, again = run(tiny_world, tmp_path / "b", *more, "--resume")
    assert furthest(weights, again) == 0 and len(rows) == 3
    other, _ = run(tiny_world, tmp_path / "c", *more, "--micro_batch_size=3")
    for a, b, c in zip(straight, rows, other, strict=True):
        close(a, b, 0)
        close(a, c, 1e-5)
        assert "d_ra" not in a and "score_gap_pos" not in a
    critics = load_discriminators(tmp_path / "a" / "discriminators.pt")
    assert all(critic.num_updates == 0 for critic in critics.values())  # as the fork leaves them
    # the first losses by hand: of critics that score the reference alone
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pos, neg = (build_discriminator("transformer", 32, 16, max_length=64) for _ in "pn")
    data = load_pairs(str(tiny_world / "train.jsonl"), "train", tiny(), 64).triplets
    batch = [data[i] for i in batch_indices(0, len(data), 8, 0)]
    ref = AutoModelForCausalLM.from_pretrained(tiny_world / "llama", dtype=torch.float64).eval()
    with torch.no_grad():
        h, _ = naive_forward(ref, batch)
        s = [pos.double()(x, torch.ones(x.shape[:2])) for x in h[:8]]
    known = sum((x - 1) ** 2 + x**2 for x in s).item() / 8
    assert straight[0]["loss_disc_pos"] == pytest.approx(known, rel=1e-5)
    assert straight[-1]["loss_disc_pos"] < straight[0]["loss_disc_pos"]


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

    monkeypatch.setattr("policy.load_lm", spoiled)
    with pytest.raises(SystemExit, match="differ at the start: latents by"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r"))
    assert not (tmp_path / "r" / "metrics.csv").exists()


def test_a_reference_whose_tokens_are_others_is_refused(tiny_world, tmp_path):
    """Its vocabulary is as large, so that every token id is one of its own."""
    ref = shutil.copytree(tiny_world / "llama", tmp_path / "ref")
    vocabulary = (ref / "tokenizer.json").read_text()
    (ref / "tokenizer.json").write_text(swapped(vocabulary, '"a": ', '"b": '))
    with pytest.raises(SystemExit, match="ref_model has another tokenizer: token .* is 'b' there"):
        run(tiny_world, tmp_path / "r", f"--ref_model={ref}")


def test_a_reference_without_tokenizer_has_the_policys_if_it_is_as_large(
    tiny_world, tmp_path, capsys
):
    for name, size in (("ref", 300), ("larger", 308)):
        make_model(tmp_path / name, seed=3, vocab_size=size)
        for file in tmp_path.glob(f"{name}/*token*"):
            file.unlink()
    more = f"--ref_model={tmp_path / 'ref'}", "--max_steps=1"
    run(tiny_world, tmp_path / "r", *more)
    assert f"--ref_model {tmp_path / 'ref'} has no tokenizer: --model's is used\n" in (
        capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="larger has no tokenizer, and its 308 tokens are not"):
        run(tiny_world, tmp_path / "s", f"--ref_model={tmp_path / 'larger'}")


def swapped(text, one, other):
    """Swaps the numbers after two texts."""
    a, b = (re.search(re.escape(x) + r"(\d+)", text)[1] for x in (one, other))
    return text.replace(one + a, one + b, 1).replace(other + b, other + a, 1)


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_lambda_0_is_the_plain_loss_bit_for_bit(loss, tiny_world, tmp_path, monkeypatch):
    """No discriminator is built, and SimPO loads no reference."""
    loads = []

    def load(*args, **more):
        loads.extend([args] * ("shell" not in more))  # those that read weights
        return load_lm(*args, **more)

    monkeypatch.setattr(discriminator, "build_discriminator", None)  # calling it would fail
    monkeypatch.setattr("policy.load_lm", load)
    rows, weights = run(tiny_world, tmp_path / "r", f"--loss={loss}", "--lambda_adv=0")
    assert len(loads) == {"dpo": 2, "simpo": 1}[loss]

    policy, ref = (load_lm(str(tiny_world / "llama"), torch.float32) for _ in range(2))
    plain_steps(policy, policy.parameters(), ref, loss, rows, tiny_world)
    for name, p in policy.model.state_dict().items():
        assert torch.equal(weights[name], p), name
    unused = ("loss_adv", "disc_lr", "d_ra", "adv_to_opo_grad", "disc_grad_norm", "score_gap_pos")
    assert not set(unused) & set(rows[0])


@pytest.mark.parametrize(
    "module, more", [(train_ganpo, "--ema_decay=0"), (paired, "--critic=paired")]
)
def test_neither_policy_nor_critics_send_gradient_to_the_other(
    module, more, tiny_world, tmp_path, monkeypatch
):
    """Seen from inside a real step: nothing in policy or reference while the discriminators move,
    and the discriminators do not move, nor their means, while the policy's gradient is taken."""
    update, seen = module.update_discriminators, []

    def watched(run, kept, step):
        metrics = update(run, kept, step)
        assert all(p.grad is None for p in [*run.policy.parameters(), *run.ref.parameters()])
        seen.append((run, {k: v.clone() for k, v in run.critics.state_dict().items()}))
        seen[-1][0].grads = [p.grad.clone() for p in run.critics.parameters()]
        return metrics

    monkeypatch.setattr(module, "update_discriminators", watched)
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
    (("--critic=mlp",), set()),
    (("--critic=mse",), {"d_ra", "disc_lr", "disc_grad_norm", "loss_disc_pos", "score_gap_neg"}),
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


@pytest.mark.parametrize("more", [(), ("--lambda_adv=1", "--critic=mse"), ("--loss=simpo",)])
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
    inner = checkpoint.export_policy

    def keep(policy, tokenizer, folder):
        with torch.no_grad():
            trained["logp"] = policy(pack(triplets_for(LENGTHS))).logp
        inner(policy, tokenizer, folder)

    monkeypatch.setattr(checkpoint, "export_policy", keep)
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
    run(tiny_world, tmp_path / "r", "--adv_loss=nonsaturating", "--ema_decay=0")
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    (settings,) = [line for line in lines if line.startswith("preset mini ")]
    assert " adv_loss=nonsaturating ema_decay=0.0" in settings and "critic" not in settings
    assert settings.endswith(f"all settings: {tmp_path / 'r' / 'config.json'}")
    assert "8 pairs/step = 1 rank(s) x 1 forward(s) of up to 32 pairs" in text
    assert "28 pairs = 3 steps/epoch, 4 left over" in text
    assert f"adv {4 * LN2:+.4f}, D {4 * LN2:.4f}" in text
    assert "28 of 28 rows; dropped: none" in text
    of_pair = r"first pair, (\w+): '<s> .* <\|assistant\|>' >>>'(.*) <\|end\|>'<<< "
    (chosen, good), (rejected, bad) = re.findall(of_pair, text)
    assert (chosen, rejected) == ("chosen", "rejected") and good != bad
    steps = [line for line in lines if "tok/s" in line]
    assert [s.split()[0] for s in steps] == ["1/3", "2/3", "3/3"]
    assert len({len(s) for s in steps}) == 1 and len(steps[0]) <= 140
    assert "100.0%" in steps[-1] and "0:00:00 left" in steps[-1]


def test_the_terminal_names_another_game_than_the_presets(tiny_world, tmp_path, capsys):
    run(tiny_world, tmp_path / "r", "--critic=paired", "--max_steps=1")
    assert "preset mini " in (text := capsys.readouterr().out) and " critic=paired " in text


def test_what_is_not_finite_is_named_with_its_rows_or_with_all_of_the_step():
    pairs = np.array([[0.5, 1.0, 7], [np.inf, 1.0, 3], [0.5, np.nan, 5]])  # values, row number
    metrics = {"loss_opo": math.inf, "grad_norm": 1.0}
    with pytest.raises(FloatingPointError, match=r"^step 3: loss_opo is inf; .*: 3, 5$"):
        report.refuse_what_is_not_finite(metrics, pairs, 2)
    whole = np.where(np.isfinite(pairs), pairs, 0.0)
    with pytest.raises(FloatingPointError, match=r"^step 1: grad_norm is nan; .*: 3, 5, 7$"):
        report.refuse_what_is_not_finite({"loss_opo": 1.0, "grad_norm": math.nan}, whole, 0)
    report.refuse_what_is_not_finite({"loss_opo": 1.0, "grad_norm": 1.0}, whole, 0)


@pytest.mark.parametrize("wrong", [
    lambda lp: (lp.logp_rejected - lp.logp_chosen).mean(),
    lambda lp: torch.stack([lp.logp_chosen, lp.logp_rejected]),
])  # fmt: skip
def test_a_loss_that_is_no_value_per_pair_is_refused(wrong, tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(OPO_LOSSES, "wrong", PreferenceLoss(wrong, True, {}))
    with pytest.raises(SystemExit, match="--loss wrong gave shape .*, not one value per pair"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", "--loss=wrong"))


def test_a_loss_that_reads_a_tensors_value_trains(tiny_world, tmp_path, monkeypatch):
    def curious(lp):
        scale = 1 / max(1.0, lp.logp_chosen.abs().max().item())
        return softplus(scale * (lp.logp_rejected - lp.logp_chosen))

    def sparse(lp):
        return softplus(lp.logp_rejected - lp.logp_chosen[lp.logp_chosen < 0].mean())

    start = load_file(tiny_world / "llama" / "model.safetensors")
    for loss in (curious, sparse):
        monkeypatch.setitem(OPO_LOSSES, "mine", PreferenceLoss(loss, False, {}))
        rows, weights = run(tiny_world, tmp_path / loss.__name__, "--loss=mine")
        assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)
        assert furthest(start, {k: weights[k] for k in start}) > 1e-3


def test_a_diverging_run_stops_before_the_update(tiny_world, tmp_path):
    with pytest.raises(SystemExit, match=r"step \d+: \w+ is (nan|inf)"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", "--lr=1e30", "--epochs=9"))
    assert all(
        math.isfinite(v) for r in rows_of(tmp_path / "r" / "metrics.csv") for v in r.values()
    )
    assert not (tmp_path / "r" / "hf").exists()
