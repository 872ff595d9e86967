"""Claims about losses.py and discriminator.py: the equations, their gradients, and the two critics.

    pytest test_losses.py

Each loss is compared with loops over plain floats, written from the paper's formula with math.log
and math.exp. Numbers are float64 unless the claim is about another precision.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from discriminator import EncoderLayer, build_discriminator
from losses import (
    LN2,
    OPO_LOSSES,
    LogProbs,
    discriminator_loss,
    dpo_loss,
    generator_loss,
    implicit_rewards,
    ipo_loss,
    latent_mse,
    opo_loss,
    relativistic_bce,
    sft_loss,
    simpo_loss,
)

B, H = 5, 6  # pairs; width of the latents
KINDS = ("transformer", "mlp")
both_kinds = pytest.mark.parametrize("kind", KINDS)
both_games = pytest.mark.parametrize("game", ["minimax", "nonsaturating"])
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
ARGS = SimpleNamespace(beta=0.3, gamma_beta_ratio=0.5)


@pytest.fixture(autouse=True)
def same_numbers_whichever_test_ran_before():
    torch.manual_seed(0)


def draw(count, scale=1.0):
    """`count` vectors (B,), in float64."""
    return list(scale * torch.randn(count, B, dtype=torch.float64))


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradient(loss, *inputs):
    return torch.autograd.grad(loss.sum(), inputs)


# ---------------------------------------------------------------------- oracles: floats and loops


def sigma(x):
    return 1 / (1 + math.exp(-x))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def naive_dpo(w, lo, ref_w, ref_l):
    pairs = zip(w, lo, ref_w, ref_l, strict=True)
    return [-math.log(sigma(0.3 * (a - c) - 0.3 * (b - d))) for a, b, c, d in pairs]


def naive_ipo(w, lo, ref_w, ref_l):
    pairs = zip(w, lo, ref_w, ref_l, strict=True)
    return [(a - b - c + d - 1 / (2 * 0.3)) ** 2 for a, b, c, d in pairs]


def naive_simpo(w, lo, length_w, length_l):
    """From sums over the response; gamma = 0.3 * 0.5."""
    pairs = zip(w, lo, length_w, length_l, strict=True)
    return [-math.log(sigma(0.3 / n * a - 0.3 / m * b - 0.3 * 0.5)) for a, b, n, m in pairs]


def naive_bce(s1, s2, mu1, mu2):
    """Eq 14-15."""
    first = mean(math.log(sigma(s - mu2)) for s in s1)
    return -first - mean(math.log(1 - sigma(s - mu1)) for s in s2)


def naive_eq_19(s, mu):
    """disc_pos: the reference's chosen above the policy's, the policy's above the rejected."""
    return (
        -mean(math.log(sigma(x - mu["theta+"])) for x in s["ref+"])
        - mean(math.log(1 - sigma(x - mu["ref+"])) for x in s["theta+"])
        - mean(math.log(sigma(x - mu["ref-"])) for x in s["theta+"])
        - mean(math.log(1 - sigma(x - mu["theta+"])) for x in s["ref-"])
    )


def naive_eq_20(s, mu):
    """disc_neg: the reference's rejected above the policy's, the policy's above the chosen."""
    return (
        -mean(math.log(sigma(x - mu["theta-"])) for x in s["ref-"])
        - mean(math.log(1 - sigma(x - mu["ref-"])) for x in s["theta-"])
        - mean(math.log(sigma(x - mu["ref+"])) for x in s["theta-"])
        - mean(math.log(1 - sigma(x - mu["theta-"])) for x in s["ref+"])
    )


def naive_generator(game, s_theta, mu_ref):
    """The policy's term of Eq 18, or its non-saturating form."""
    if game == "minimax":
        return mean(math.log(1 - sigma(s - mu_ref)) for s in s_theta)
    return -mean(math.log(sigma(s - mu_ref)) for s in s_theta)


def naive_batch_generator(game, s_theta, s_ref):
    """The original relativistic average GAN: both terms, means of the batch."""
    mu_theta, mu_ref = mean(s_theta), mean(s_ref)
    if game == "minimax":
        return -naive_bce(s_ref, s_theta, mu_ref, mu_theta)
    return naive_bce(s_theta, s_ref, mu_theta, mu_ref)


# ---------------------------------------------------------------------- every loss is its equation


def floats(tensors):
    return [t.tolist() for t in tensors]


def test_dpo_is_eq_3_and_4():
    logps = draw(4, 3.0)
    close(dpo_loss(*logps, 0.3), naive_dpo(*floats(logps)))


def test_ipo_is_the_squared_distance_of_the_log_ratio_from_half_of_one_over_beta():
    logps = draw(4, 3.0)
    close(ipo_loss(*logps, 0.3), naive_ipo(*floats(logps)))


def test_simpo_is_its_equation_on_mean_log_probabilities():
    chosen, rejected = draw(2, 3.0)
    expected = naive_simpo(*floats([chosen, rejected]), [1] * B, [1] * B)
    close(simpo_loss(chosen, rejected, 0.3, 0.5), expected)


def test_sft_is_the_negative_mean_log_probability_of_the_chosen_answer():
    (chosen,) = draw(1)
    close(sft_loss(chosen), [-a for a in chosen.tolist()])


def test_implicit_rewards_are_beta_times_the_log_ratios():
    logps = draw(4, 3.0)
    w, lo, ref_w, ref_l = floats(logps)
    chosen, rejected = implicit_rewards(*logps, 0.3)
    close(chosen, [0.3 * (a - c) for a, c in zip(w, ref_w, strict=True)])
    close(rejected, [0.3 * (b - d) for b, d in zip(lo, ref_l, strict=True)])
    close(dpo_loss(*logps, 0.3), [math.log(1 + math.exp(x)) for x in rejected - chosen])


def test_relativistic_bce_is_eq_14_and_15():
    s1, s2 = draw(2)
    mu1, mu2 = torch.tensor([0.7, -0.4], dtype=torch.float64)
    close(relativistic_bce(s1, s2, mu1, mu2), naive_bce(*floats([s1, s2]), 0.7, -0.4))


@pytest.mark.parametrize("sign, other, oracle", [("+", "-", naive_eq_19), ("-", "+", naive_eq_20)])
def test_discriminator_loss_is_eq_19_and_with_signs_swapped_eq_20(sign, other, oracle):
    names = ("ref" + sign, "theta" + sign, "ref" + other)
    scores, means = draw(3), torch.randn(3, dtype=torch.float64)
    expected = oracle(
        dict(zip(names, floats(scores), strict=True)),
        dict(zip(names, means.tolist(), strict=True)),
    )
    close(discriminator_loss(*scores, *means), expected)


@both_games
def test_generator_loss_with_constant_means_is_the_policy_term_of_eq_18(game):
    (s_theta,) = draw(1)
    mu_ref = torch.tensor(0.7, dtype=torch.float64)
    close(generator_loss(s_theta, mu_ref, game), naive_generator(game, s_theta.tolist(), 0.7))


@both_games
def test_generator_loss_with_both_means_has_both_terms(game):
    s_theta, s_ref = draw(2)
    actual = generator_loss(s_theta, s_ref.mean(), game, s_ref, s_theta.mean())
    close(actual, naive_batch_generator(game, s_theta.tolist(), s_ref.tolist()))


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.float64])
def test_latent_mse_is_the_mean_over_units_and_real_tokens_only(mask_type):
    h_theta, h_ref = torch.randn(2, 3, 4, H, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    expected = []
    for a, b, real in zip(h_theta.tolist(), h_ref.tolist(), mask.tolist(), strict=True):
        tokens = [t for t in range(4) if real[t]]
        expected.append(mean((a[t][i] - b[t][i]) ** 2 for t in tokens for i in range(H)))
    close(latent_mse(h_theta, h_ref, mask.to(mask_type)), expected)
    h_theta[mask == 0] += 1e6
    close(latent_mse(h_theta, h_ref, mask.to(mask_type)), expected)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "function, inputs",
    [
        (lambda *logps: dpo_loss(*logps, 0.3), 4),
        (lambda *logps: ipo_loss(*logps, 0.3), 4),
        (lambda *logps: simpo_loss(*logps, 0.3, 0.5), 2),
        (sft_loss, 1),
        (lambda *logps: implicit_rewards(*logps, 0.3), 4),
        (lambda a, b, c, d: relativistic_bce(a, b, c[0], d[0]), 4),
        (lambda a, b: relativistic_bce(a, b, a.mean(), b.mean()), 2),
        (lambda a, b, c: discriminator_loss(a, b, c, a.mean(), b.mean(), c.mean()), 3),
        (lambda a, b: generator_loss(a, b[0], "minimax"), 2),
        (lambda a, b: generator_loss(a, b[0], "nonsaturating"), 2),
        (lambda a, b: generator_loss(a, b.mean(), "minimax", b, a.mean()), 2),
        (lambda a, b: generator_loss(a, b.mean(), "nonsaturating", b, a.mean()), 2),
        (lambda a, b: latent_mse(a[None, :, None], b[None, :, None], torch.ones(1, B)), 2),
    ],
)
def test_gradients_are_the_finite_differences(function, inputs):
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in draw(inputs)])


@both_games
def test_the_policy_gradient_under_batch_means_is_the_central_difference_of_the_formula(game):
    s_theta, s_ref = draw(2)
    s_theta.requires_grad_()
    loss = generator_loss(s_theta, s_ref.mean(), game, s_ref, s_theta.mean())
    (actual,) = gradient(loss, s_theta)
    for i in range(B):
        up, down = s_theta.tolist(), s_theta.tolist()
        up[i], down[i] = up[i] + 1e-5, down[i] - 1e-5
        rise = naive_batch_generator(game, up, s_ref.tolist())
        rise -= naive_batch_generator(game, down, s_ref.tolist())
        close(actual[i], rise / 2e-5, 1e-9)


def test_minimax_and_nonsaturating_pull_equally_where_the_policy_scores_the_reference_mean():
    s = torch.full((B,), 0.7, dtype=torch.float64, requires_grad=True)
    for game in ("minimax", "nonsaturating"):
        close(*gradient(generator_loss(s, s.detach()[0], game), s), [-0.5 / B] * B)
        both_terms = generator_loss(s, s.detach().mean(), game, s.detach(), s.mean())
        close(*gradient(both_terms, s), [-1 / B] * B)


@both_games
def test_the_policy_loss_falls_wherever_its_score_rises(game):
    s_ref, *_ = draw(1)
    for start in torch.arange(-10, 10, 0.5, dtype=torch.float64):
        s = (start + torch.linspace(-1, 1, B)).requires_grad_()
        constant = generator_loss(s, s_ref.mean(), game)
        batch = generator_loss(s, s_ref.mean(), game, s_ref, s.mean())
        assert (gradient(constant, s)[0] < 0).all() and (gradient(batch, s)[0] < 0).all()
        assert generator_loss(s + 0.1, s_ref.mean(), game) < constant


# ---------------------------------------------------------------------- known values, symmetries


def test_losses_start_at_their_known_values():
    w, lo = draw(2, 3.0)
    close(torch.tensor(LN2, dtype=torch.float64), math.log(2))
    close(dpo_loss(w, lo, w, lo, 0.3), [math.log(2)] * B)
    close(ipo_loss(w, lo, w, lo, 0.3), [1 / (4 * 0.3**2)] * B)
    close(simpo_loss(w, w, 0.3, 0.5), [math.log(1 + math.exp(0.15))] * B)
    close(torch.stack(implicit_rewards(w, lo, w, lo, 0.3)), [[0.0] * B] * 2)


def test_scores_that_tell_nothing_apart_cost_ln_2_a_term():
    s = torch.full((B,), 1.3, dtype=torch.float64)
    mu = s.mean()
    close(relativistic_bce(s, s, mu, mu), 2 * math.log(2))
    close(discriminator_loss(s, s, s, mu, mu, mu), 4 * math.log(2))
    close(generator_loss(s, mu, "minimax"), -math.log(2))
    close(generator_loss(s, mu, "nonsaturating"), math.log(2))
    close(generator_loss(s, mu, "minimax", s, mu), -2 * math.log(2))
    close(generator_loss(s, mu, "nonsaturating", s, mu), 2 * math.log(2))


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 5.0])
def test_same_scores_with_batch_means_cost_2_ln_2_and_at_most_a_quarter_of_their_variance(scale):
    (s,) = draw(1, scale)
    excess = relativistic_bce(s, s, s.mean(), s.mean()) - 2 * math.log(2)
    assert 0 < excess <= s.var(correction=0) / 4


def test_swapping_chosen_and_rejected_negates_the_dpo_logit():
    w, lo, ref_w, ref_l = draw(4, 3.0)
    there, back = dpo_loss(w, lo, ref_w, ref_l, 0.3), dpo_loss(lo, w, ref_l, ref_w, 0.3)
    close(back - there, 0.3 * ((w - ref_w) - (lo - ref_l)))  # softplus(z) - softplus(-z) = z


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_what_policy_and_reference_share_does_not_count(loss):
    w, lo, ref_w, ref_l, shift_w, shift_l = draw(6, 3.0)
    shifted = loss(w + shift_w, lo + shift_l, ref_w + shift_w, ref_l + shift_l, 0.3)
    close(shifted, loss(w, lo, ref_w, ref_l, 0.3))


def test_only_differences_of_scores_count_in_the_adversarial_losses():
    a, b, c = draw(3)
    mu = torch.randn(3, dtype=torch.float64)
    moved = [a + 7, b + 7, c + 7, *(mu + 7)]
    close(relativistic_bce(a + 7, b + 7, *(mu[:2] + 7)), relativistic_bce(a, b, *mu[:2]))
    close(discriminator_loss(*moved), discriminator_loss(a, b, c, *mu))
    for game in ("minimax", "nonsaturating"):
        close(generator_loss(a + 7, mu[0] + 7, game), generator_loss(a, mu[0], game))
        with_both = generator_loss(a + 7, mu[0] + 7, game, b + 7, mu[1] + 7)
        close(with_both, generator_loss(a, mu[0], game, b, mu[1]))


def test_negating_all_scores_swaps_real_and_fake():
    a, b = draw(2)
    mu_a, mu_b = torch.randn(2, dtype=torch.float64)
    close(relativistic_bce(-b, -a, -mu_b, -mu_a), relativistic_bce(a, b, mu_a, mu_b))


# ---------------------------------------------------------------------- far scores


@both_precisions
@pytest.mark.parametrize("s_real, s_fake", [(400.0, -400.0), (-400.0, 400.0), (400.0, 400.0)])
def test_every_loss_and_gradient_is_finite_at_scores_of_400(s_real, s_fake, dtype):
    a = torch.full((B,), s_real, dtype=dtype, requires_grad=True)
    b = torch.full((B,), s_fake, dtype=dtype, requires_grad=True)
    losses = [
        dpo_loss(a, b, b, a, 1.0),
        ipo_loss(a, b, b, a, 1.0),
        simpo_loss(a, b, 1.0, 0.5),
        relativistic_bce(a, b, a.mean(), b.mean()),
        discriminator_loss(a, b, a, a.mean(), b.mean(), a.mean()),
        *(generator_loss(b, a.mean(), game) for game in ("minimax", "nonsaturating")),
        *(generator_loss(b, a.mean(), g, a, b.mean()) for g in ("minimax", "nonsaturating")),
    ]
    for loss in losses:
        assert loss.dtype == dtype
        for value in (loss, *gradient(loss, a, b)):
            assert value.isfinite().all()


@pytest.mark.parametrize("s, mu", [(400.0, 0.0), (-400.0, 0.0), (400.0, 390.0), (0.0, 40.0)])
def test_far_scores_follow_their_asymptotes(s, mu):
    """log(1 + e^x) is e^x far to the left of 0 and x far to the right; its slope e^x and 1."""
    scores = torch.full((B,), s, dtype=torch.float64, requires_grad=True)
    mu, x = torch.tensor(mu, dtype=torch.float64), s - mu
    below, above = math.log1p(math.exp(-abs(x))), abs(x) + math.log1p(math.exp(-abs(x)))
    softplus_x, softplus_minus_x = (above, below) if x > 0 else (below, above)
    slope = math.exp(-abs(x)) / (1 + math.exp(-abs(x)))  # of the flat side
    for game, value in (("minimax", -softplus_x), ("nonsaturating", softplus_minus_x)):
        loss = generator_loss(scores, mu, game)
        flat = (x > 0) == (game == "nonsaturating")
        expected = -(slope if flat else 1 - slope) / B
        torch.testing.assert_close(loss.item(), value, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            gradient(loss, scores)[0][0].item(), expected, rtol=1e-12, atol=0
        )
    close(relativistic_bce(scores, scores, mu, mu), softplus_x + softplus_minus_x)


# ---------------------------------------------------------------------- the registry, and refusals


def logprobs(with_ref=True):
    w, lo, ref_w, ref_l = draw(4, 3.0)
    lengths = torch.tensor([[3, 7, 1, 12, 5], [4, 2, 9, 1, 6]])
    return LogProbs(w, lo, ref_w if with_ref else None, ref_l if with_ref else None, *lengths)


def test_four_losses_are_offered_and_only_dpo_and_ipo_need_the_reference():
    marks = {name: loss.needs_ref for name, loss in OPO_LOSSES.items()}
    assert marks == {"dpo": True, "ipo": True, "simpo": False, "sft": False}


@pytest.mark.parametrize("name, oracle", [("dpo", naive_dpo), ("ipo", naive_ipo)])
def test_losses_with_a_reference_use_sums_over_the_response(name, oracle):
    lp = logprobs()
    close(OPO_LOSSES[name](lp, ARGS), oracle(*floats(lp[:4])))


def test_simpo_and_sft_divide_by_the_lengths_and_take_no_reference():
    lp = logprobs(with_ref=False)
    chosen, rejected, length_chosen, length_rejected = floats(lp[:2] + lp[4:])
    expected = naive_simpo(chosen, rejected, length_chosen, length_rejected)
    close(OPO_LOSSES["simpo"](lp, ARGS), expected)
    expected = [-a / n for a, n in zip(chosen, length_chosen, strict=True)]
    close(OPO_LOSSES["sft"](lp, ARGS), expected)


def test_a_loss_of_ones_own_is_offered_under_its_name():
    @opo_loss("hinge", needs_ref=False)
    def hinge(lp, args):
        return (args.beta - (lp.logp_chosen - lp.logp_rejected)).clamp(min=0)

    registered = OPO_LOSSES.pop("hinge")
    assert registered is hinge and hinge.needs_ref is False
    lp = logprobs(with_ref=False)
    pairs = zip(*floats(lp[:2]), strict=True)
    close(registered(lp, ARGS), [max(0.0, 0.3 - (a - b)) for a, b in pairs])


def test_generator_loss_refuses_another_kind_and_half_of_the_batch_means():
    s_theta, s_ref = draw(2)
    with pytest.raises(ValueError, match="hinge"):
        generator_loss(s_theta, s_ref.mean(), "hinge")
    with pytest.raises(ValueError, match="together"):
        generator_loss(s_theta, s_ref.mean(), "minimax", s_ref=s_ref)
    with pytest.raises(ValueError, match="together"):
        generator_loss(s_theta, s_ref.mean(), "minimax", mu_theta=s_theta.mean())


# ---------------------------------------------------------------------- critics: what they compute


def critic(kind="transformer", **settings):
    sizes = {"hidden_size": H, "hidden": 32, "max_length": 12} | settings
    return build_discriminator(kind, **sizes).double()


def latents(lengths=(5, 3, 1), padded_to=6):
    """Latents and mask, real tokens first; what lies on the padding is large."""
    h = torch.randn(len(lengths), padded_to, H, dtype=torch.float64)
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    return torch.where(mask[..., None], h, 100 * h), mask.long()


def naive_linear(layer, x):
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]


def naive_gelu(x):
    return [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x]


def naive_pool(tokens):
    return [mean(unit) for unit in zip(*tokens, strict=True)]


def randomise_biases(disc):
    for name, parameter in disc.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # they start at 0, where a forgotten one would not show


def test_the_mlp_is_the_masked_mean_and_three_layers_with_gelu_between():
    disc, (h, mask) = critic("mlp"), latents()
    randomise_biases(disc)
    first, second, third = disc.normalised_layers()
    expected = []
    for sequence, length in zip(h.tolist(), mask.sum(1), strict=True):
        x = naive_gelu(naive_linear(first, naive_pool(sequence[:length])))
        expected += naive_linear(third, naive_gelu(naive_linear(second, x)))
    close(disc(h, mask), expected)


def test_the_transformer_around_its_encoder_is_fig_10():
    """Projection plus positions; masked mean; linear, GELU, linear. The encoder has no layers."""
    disc, (h, mask) = critic(layers=0), latents()
    randomise_biases(disc)
    project_in, first, second = disc.normalised_layers()
    expected = []
    for sequence, length in zip(h.tolist(), mask.sum(1), strict=True):
        places = zip(sequence[:length], disc.pos_embedding.tolist(), strict=False)
        tokens = [
            [a + b for a, b in zip(naive_linear(project_in, x), position, strict=True)]
            for x, position in places
        ]
        expected += naive_linear(second, naive_gelu(naive_linear(first, naive_pool(tokens))))
    close(disc(h, mask), expected)


def test_an_encoder_layer_is_torchs_pre_norm_layer_with_the_same_weights():
    ours = EncoderLayer(16, heads=4, dropout=0.0).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    names = "norm1 norm2 self_attn.in_proj_ self_attn.out_proj linear1 linear2".split()
    parts = "norm_attention norm_ffn qkv out ffn_in ffn_out".split()
    weights = {
        f"{a}{kind}" if a.endswith("_") else f"{a}.{kind}": getattr(getattr(ours, b), kind)
        for a, b in zip(names, parts, strict=True)
        for kind in ("weight", "bias")
    }
    x, mask = torch.randn(3, 6, 16, dtype=torch.float64), latents()[1].bool()
    expected = functional_call(theirs, weights, x, {"src_key_padding_mask": ~mask})
    close(ours(x, mask), expected)


def test_the_default_transformer_has_the_sizes_of_fig_10():
    disc = build_discriminator("transformer", H)
    assert disc.pos_embedding.shape == (2048, 512) and len(disc.layers) == 2
    assert all(layer.heads == 8 and layer.ffn_in.out_features == 2048 for layer in disc.layers)


@pytest.mark.parametrize("hidden, heads", [(64, 8), (32, 4), (20, 2), (7, 1)])
def test_a_narrow_transformer_has_fewer_heads_rather_than_narrower_ones(hidden, heads):
    assert critic(hidden=hidden).layers[0].heads == heads


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown discriminator 'mse'"):
        build_discriminator("mse", H)


@both_kinds
def test_a_critic_gives_one_raw_score_per_sequence_in_its_own_precision(kind):
    disc, (h, mask) = critic(kind).float(), latents()
    for latent_type in (torch.bfloat16, torch.float32, torch.float64):
        scores = disc(h.to(latent_type), mask)
        assert scores.shape == (3,) and scores.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert disc(h.float(), mask).dtype == torch.float32
    assert len(set(disc(h.float(), mask).tolist())) == 3


# ---------------------------------------------------------------------- critics: masks


@both_kinds
def test_padding_and_batch_mates_change_no_score(kind):
    disc, (h, mask) = critic(kind), latents()
    scores = disc(h, mask)
    other_content = torch.where(mask.bool()[..., None], h, torch.randn_like(h))
    close(disc(other_content, mask), scores)
    close(disc(h, mask.bool()), scores)
    longer = torch.cat([h, torch.randn(3, 4, H)], 1), torch.cat([mask, torch.zeros(3, 4)], 1)
    close(disc(*longer), scores)
    for i, length in enumerate(mask.sum(1)):
        alone = disc(h[i : i + 1, :length], mask[i : i + 1, :length])
        close(alone, scores[i : i + 1])
    close(disc(h.flip(0), mask.flip(0)), scores.flip(0))


@both_kinds
def test_padding_receives_no_gradient(kind):
    disc, (h, mask) = critic(kind), latents()
    (grad,) = gradient(disc(h.requires_grad_(), mask), h)
    assert (grad[mask == 0] == 0).all() and (grad[mask == 1] != 0).any(-1).all()


def test_sequences_beyond_max_length_are_cut_with_their_mask():
    disc, (h, mask) = critic(max_length=4), latents((9, 6, 2), padded_to=9)
    close(disc(h, mask), disc(h[:, :4], mask[:, :4]))


# ---------------------------------------------------------------------- critics: initialisation


def test_the_same_seed_gives_the_same_critic_and_another_seed_another():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(critic().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["pos_embedding"], states[2]["pos_embedding"])


def test_encoder_layers_do_not_start_as_copies():  # [choice 17]
    first, second = critic().layers
    for name in ("qkv", "out", "ffn_in", "ffn_out"):
        assert not torch.equal(getattr(first, name).weight, getattr(second, name).weight)


@both_kinds
def test_linear_layers_start_with_zero_bias_and_xavier_weights(kind):
    disc = critic(kind)
    for layer in disc.modules():
        if isinstance(layer, nn.Linear):
            assert (layer.bias == 0).all()
            if layer not in disc.normalised_layers():  # there the weight is divided by its norm
                bound = math.sqrt(6 / (layer.in_features + layer.out_features))
                assert 0.97 * bound < layer.weight.abs().max() <= bound


# ---------------------------------------------------------------------- critics: spectral norm


def spectral_norms(disc):
    return torch.stack([torch.linalg.matrix_norm(x.weight, 2) for x in disc.normalised_layers()])


@pytest.mark.parametrize("kind, hidden_size, hidden", [("transformer", H, 32), ("mlp", 768, 512)])
def test_spectral_norms_start_within_2_percent_of_1(kind, hidden_size, hidden):
    disc = critic(kind, hidden_size=hidden_size, hidden=hidden)
    close(spectral_norms(disc), [1.0, 1.0, 1.0], 0.02)


@both_kinds
def test_spectral_norms_stay_within_2_percent_of_1_while_training(kind):
    disc, (h, mask) = critic(kind), latents()
    optimiser = torch.optim.AdamW(disc.parameters(), lr=1e-3)
    raw = disc.head_in.parametrizations.weight.original
    before = raw.detach().clone()
    for _ in range(50):
        optimiser.zero_grad()
        disc(h, mask).sum().neg().backward()
        optimiser.step()
        disc.power_iterate()
    close(spectral_norms(disc), [1.0, 1.0, 1.0], 0.02)
    assert (raw - before).norm() > 0.05 * before.norm()  # so there was work to do


@both_kinds
def test_no_forward_moves_a_buffer_and_train_and_eval_agree_without_dropout(kind):
    disc, (h, mask) = critic(kind), latents()
    before = copy.deepcopy(dict(disc.named_buffers()))
    scores = [disc.train(mode)(h, mask) for mode in (True, False, True, False)]
    assert all(torch.equal(scores[0], other) for other in scores)
    assert any(name.endswith("_u") for name in before)
    assert all(torch.equal(before[name], now) for name, now in disc.named_buffers())


def test_dropout_changes_scores_in_train_mode_only():
    disc, (h, mask) = critic(dropout=0.1), latents()
    assert (disc.train()(h, mask) != disc(h, mask)).all()
    assert torch.equal(disc.eval()(h, mask), disc(h, mask))


# ---------------------------------------------------------------------- critics: running means


@both_kinds
def test_running_means_start_at_0_and_equal_the_batch_after_one_update(kind):
    disc, scores = critic(kind), draw(3)
    close(disc.means(), [0.0] * 3, 0)
    disc.update_means(*(s.requires_grad_() for s in scores))
    close(disc.means(), [mean(s.tolist()) for s in scores])
    assert not disc.means().requires_grad


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_running_means_are_adams_bias_corrected_averages(decay):
    disc, average = critic(ema_decay=decay), [0.0] * 3
    for step in range(1, 8):
        scores = draw(3)
        disc.update_means(*scores)
        for i, s in enumerate(floats(scores)):
            average[i] = decay * average[i] + (1 - decay) * mean(s)
        close(disc.means(), [a / (1 - decay**step) for a in average])


def test_the_decay_is_that_of_algorithm_1_by_default():
    assert build_discriminator("mlp", H).ema_decay == 0.9


def test_running_means_and_spectral_norms_are_restored_exactly_from_the_state_dict():
    disc, other = critic(), critic()
    for _ in range(3):
        disc.update_means(*draw(3))
        disc.power_iterate()
    other.load_state_dict(copy.deepcopy(disc.state_dict()))
    scores, (h, mask) = draw(3), latents()
    for restored in (disc, other):
        restored.update_means(*scores)
        restored.power_iterate()
    assert torch.equal(other.means(), disc.means())
    assert torch.equal(other(h, mask), disc(h, mask))


# ---------------------------------------------------------------------- who receives gradient


@both_kinds
@both_games
def test_the_policy_loss_reaches_the_policy_latents_only_and_through_a_frozen_critic(kind, game):
    disc, (h_ref, mask) = critic(kind).requires_grad_(False), latents()
    disc.update_means(*draw(3))
    h_theta = torch.randn_like(h_ref).requires_grad_()
    mu_ref, *_ = disc.means()
    generator_loss(disc(h_theta, mask), mu_ref, game).backward()
    assert (h_theta.grad[mask == 1] != 0).any(-1).all()
    assert all(p.grad is None for p in disc.parameters()) and not mu_ref.requires_grad


@both_kinds
def test_the_critic_loss_on_detached_latents_reaches_every_weight_of_the_critic_only(kind):
    disc, (h, mask) = critic(kind), latents()
    quad = [torch.randn_like(h).requires_grad_() for _ in range(3)]
    scores = [disc(x.detach(), mask) for x in quad]
    disc.update_means(*scores)
    discriminator_loss(*scores, *disc.means()).backward()
    assert all((p.grad != 0).any() for p in disc.parameters())
    assert all(x.grad is None for x in quad)


def test_constant_means_leave_the_policy_score_the_only_way_for_gradient():
    s_ref, s_theta = (s.requires_grad_() for s in draw(2))
    generator_loss(s_theta, s_ref.mean().detach(), "minimax").backward()
    assert (s_theta.grad < 0).all() and s_ref.grad is None
