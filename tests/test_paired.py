"""Claims about the paired critic: paired.py, and train_ganpo.py with --critic paired.

    python -m pytest -q tests/test_paired.py

The oracle is naive, in float64: one text at a time, Adam as torch has it, every gradient by
autograd over the whole batch. That results do not depend on micro-batches and ranks, and that a
step makes one transfer to the host, is in test_train.py.
"""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import paired
import train_ganpo
from checkpoint import load_discriminators
from data import load_pairs
from discriminator import build_discriminator
from helpers import (
    LN2,
    alignment,
    close,
    furthest,
    latent_gradient,
    naive_forward,
    run,
    softplus,
    tiny,
)
from losses import masked_mean
from packing import batch_indices
from paired import paired_discriminator_loss, paired_generator_loss

PAIRED = ("--critic=paired", "--disc_lr=3e-2", "--lambda_adv=5")


def test_losses_equal_sums_over_tokens_and_are_ln_2_where_the_models_agree(monkeypatch):
    monkeypatch.setattr(paired, "SLOPE_PENALTY", 7.0)
    torch.manual_seed(0)
    u, slopes = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    for i, n in enumerate((3, 5, 1)):
        tokens = zip(u[i, :n], slopes[i, :n], strict=True)
        d = sum(math.log1p(math.exp(-x)) + 3.5 * s for x, s in tokens) / n
        g = sum(math.log1p(math.exp(x)) for x in u[i, :n]) / n
        assert paired_discriminator_loss(u, slopes, mask)[i].item() == pytest.approx(d.item())
        assert paired_generator_loss(u, mask)[i].item() == pytest.approx(g)
    zero = torch.zeros_like(u)
    pair = paired_discriminator_loss(zero, zero, mask), paired_generator_loss(zero, mask)
    for loss in pair:
        assert loss.tolist() == pytest.approx([LN2] * 3)
    u[mask == 0] = math.nan  # what padding holds does not matter
    assert masked_mean(u, mask).isfinite().all()


def naive_paired(world, steps, kind, inner, penalty, lambda_adv, lr, disc_lr):
    """Algorithm 1 with the losses of the paired critic."""
    policy, ref = (
        AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float64).eval()
        for _ in "pr"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critics = [build_discriminator(kind, 32, 16).double() for _ in "pn"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr, weight_decay=0)
    disc_optimizer = torch.optim.AdamW(
        [p for c in critics for p in c.parameters()], disc_lr, (0.5, 0.9)
    )
    data, rows = load_pairs(str(world / "train.jsonl"), "train", tiny(), 64), []

    def inputs(h_theta, h_ref):
        return (h_theta - h_ref, 0 * h_ref) if kind == "paired" else (h_theta, h_ref)

    for step in range(steps):
        factor = 1 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (steps - 1)))
        optimizer.param_groups[0]["lr"] = lr * factor
        disc_optimizer.param_groups[0]["lr"] = disc_lr * factor
        batch = [data.triplets[i] for i in batch_indices(step, len(data.triplets), 8, 0)]
        h_theta, logp = naive_forward(policy, batch)
        with torch.no_grad():
            h_ref, ref_logp = naive_forward(ref, batch)
        row = {}
        for k in range(inner):
            losses = []
            for j, critic in enumerate(critics):
                total = won = gap = 0
                for i in range(8 * j, 8 * j + 8):
                    theta, anchor = (
                        x.detach().requires_grad_() for x in inputs(h_theta[i].detach(), h_ref[i])
                    )
                    s_theta, s_ref = critic.token_scores(theta), critic.token_scores(anchor)
                    slopes = 0
                    for s, x in ((s_theta, theta), (s_ref, anchor)):
                        (g,) = torch.autograd.grad(s.sum(), x, create_graph=True)
                        slopes = slopes + (g**2).sum(-1)
                    u = s_ref - s_theta
                    total = total + (softplus(-u) + penalty / 2 * slopes).mean()
                    if kind == "paired_h":
                        other = critic.token_scores(h_ref[(i + 8) % 16]).mean()
                        total = total + softplus(other - critic.token_scores(h_ref[i]).mean())
                    won += ((u.sign() + 1) / 2).mean().item() / 8
                    gap += u.mean().item() / 8
                losses.append(total / 8)
                if k == 0:
                    sign = ("pos", "neg")[j]
                    row |= {f"loss_disc_{sign}": losses[-1].item(), f"disc_acc_{sign}": won}
                    row[f"score_gap_{sign}"] = gap
            disc_optimizer.zero_grad()
            sum(losses).backward()
            disc_optimizer.step()
        adv = 0
        for i in range(16):
            critic = critics[i // 8]
            theta, anchor = inputs(h_theta[i], h_ref[i])
            adv = (
                adv + softplus(critic.token_scores(anchor) - critic.token_scores(theta)).mean() / 16
            )
        delta = (logp - ref_logp)[:8] - (logp - ref_logp)[8:]
        opo = softplus(-0.1 * delta).mean()
        push, other = (latent_gradient(x, h_theta, batch) for x in (lambda_adv * adv, opo))
        row |= {"loss_adv": adv.item(), "loss_opo": opo.item()}
        row["adv_to_opo_grad"] = (push.norm() / other.norm()).item()
        row["adv_align"] = alignment(push, h_theta, h_ref, batch).item()
        rows.append(row)
        optimizer.zero_grad()
        (opo + lambda_adv * adv).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return rows, policy, critics


@pytest.mark.parametrize("kind, inner", [("paired", 1), ("paired_h", 5)])
def test_three_steps_equal_a_naive_paired_game(kind, inner, tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(paired, "SLOPE_PENALTY", 7.0)
    expected, policy, critics = naive_paired(tiny_world, 3, kind, inner, 7.0, 5.0, 3e-3, 3e-2)
    rows, weights = run(
        tiny_world, tmp_path / "r", *PAIRED, "--dtype=float64", "--micro_batch_size=3",
        f"--critic={kind}",
    )  # fmt: skip
    assert len(rows) == 3
    for row, known in zip(rows, expected, strict=True):
        for name, value in known.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for name, p in policy.named_parameters():
        assert (weights[name] - p).abs().max() < 1e-4, name
    for sign, critic in zip(("pos", "neg"), critics, strict=True):
        for name, p in critic.named_parameters():
            assert (weights[f"{sign}.{name}"] - p).abs().max() < 1e-4, name


@pytest.mark.parametrize("kind", paired.CRITICS)
def test_step_0_has_the_known_values_and_the_critic_soon_tells_apart(kind, tiny_world, tmp_path):
    rows, _ = run(tiny_world, tmp_path / "r", *PAIRED, f"--critic={kind}", "--epochs=8")
    first, last = rows[0], rows[-1]
    assert first["loss_adv"] == pytest.approx(LN2, abs=1e-6)
    assert first["score_gap_pos"] == first["score_gap_neg"] == first["latent_mse"] == 0
    assert first["disc_acc_pos"] == first["disc_acc_neg"] == 0.5 and first["adv_align"] == 0
    assert "d_ra" not in first
    assert min(last["disc_acc_pos"], last["disc_acc_neg"]) > 0.8 and last["adv_align"] > 0.1
    assert last["score_gap_pos"] > 0


def test_a_fixed_distance_pushes_straight_to_the_reference(tiny_world, tmp_path):
    rows, _ = run(tiny_world, tmp_path / "r", "--critic=mse", "--lambda_adv=1")
    assert rows[0]["adv_align"] == 0  # there is no way to go yet
    assert all(row["adv_align"] == pytest.approx(1, abs=1e-5) for row in rows[1:])


def test_the_critic_keeps_its_policy_nearer_to_the_reference(tiny_world, tmp_path):
    distance = {}
    for weight in (0, 0.001, 200):
        rows, _ = run(tiny_world, tmp_path / str(weight), *PAIRED, f"--lambda_adv={weight}",
                      "--epochs=8")  # fmt: skip
        distance[weight] = rows[-1].get("latent_mse")
    assert distance[200] < 0.7 * distance[0.001]


def test_a_paired_run_resumes_bit_for_bit(tiny_world, tmp_path):
    more = (*PAIRED, "--epochs=2", "--critic=paired_h")
    straight, weights = run(tiny_world, tmp_path / "a", *more)
    run(tiny_world, tmp_path / "b", *more, "--stop_after=2")
    rows, again = run(tiny_world, tmp_path / "b", *more, "--resume")
    assert furthest(weights, again) == 0 and len(rows) == 6
    for a, b in zip(straight, rows, strict=True):
        close(a, b, 0)
    critics = load_discriminators(tmp_path / "b" / "discriminators.pt")
    h = torch.randn(2, 4, 32)
    scores = critics["disc_pos"](h, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    tokens = critics["disc_pos"].token_scores(h)
    assert scores.tolist() == pytest.approx([tokens[0].mean().item(), tokens[1, :2].mean().item()])


def test_the_slope_penalty_is_the_one_that_was_tried():
    assert paired.SLOPE_PENALTY == 10.0


def test_the_preset_and_what_the_paired_critic_does_not_go_with():
    """What is refused with it is in test_cli.py."""
    mini, paired = (train_ganpo.parse_args([f"--preset={p}"]) for p in ("mini", "mini-paired"))
    assert (mini.critic, paired.critic, paired.lambda_adv, paired.disc_lr) == (
        "transformer", "paired", 10, 3e-3,
    )  # fmt: skip
    same = train_ganpo.parse_args(["--critic=paired"])
    assert vars(same) | {"preset": ""} == vars(paired) | {"preset": ""}
    gemma = train_ganpo.parse_args(["--preset=gemma-2-2b-it", "--critic=paired", "--lr=1e-6"])
    assert (gemma.disc_lr, gemma.lr, gemma.batch_size) == (3e-3, 1e-6, 128)
    latents = train_ganpo.parse_args(["--critic=paired_h"])
    assert vars(latents) | {"critic": "paired"} == vars(same)
