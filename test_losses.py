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
GAMES = ("minimax", "nonsaturating")
both_games = pytest.mark.parametrize("game", GAMES)
both_kinds = pytest.mark.parametrize("kind", ["transformer", "mlp"])
ARGS = SimpleNamespace(beta=0.3, gamma_beta_ratio=0.5)


@pytest.fixture(autouse=True)
def same_numbers_whichever_test_ran_before():
    torch.manual_seed(0)


def draw(count, scale=1.0):
    """`count` vectors (B,)."""
    return (scale * torch.randn(count, B, dtype=torch.float64)).unbind()


def constant(value):
    return torch.full((B,), value, dtype=torch.float64)


def close(actual, expected, rtol=1e-12, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def gradient(loss, *inputs):
    return torch.autograd.grad(loss.sum(), inputs)


# ---------------------------------------------------------------------- oracles: floats and loops


def sigma(x):
    return 1 / (1 + math.exp(-x))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


NAIVE = {  # one pair's loss, with beta = 0.3 and gamma = 0.3 * 0.5
    "dpo": lambda w, lo, ref_w, ref_l: -math.log(sigma(0.3 * (w - ref_w) - 0.3 * (lo - ref_l))),
    "ipo": lambda w, lo, ref_w, ref_l: (w - lo - ref_w + ref_l - 1 / (2 * 0.3)) ** 2,
    "simpo": lambda w, lo, *_: -math.log(sigma(0.3 * w - 0.3 * lo - 0.3 * 0.5)),
    "sft": lambda w, *_: -w,
}
PURE = {  # the functions under test, of the same arguments
    "dpo": lambda *logps: dpo_loss(*logps, 0.3),
    "ipo": lambda *logps: ipo_loss(*logps, 0.3),
    "simpo": lambda w, lo, *_: simpo_loss(w, lo, 0.3, 0.5),
    "sft": lambda w, *_: sft_loss(w),
}


def naive_bce(s1, s2, mu1, mu2):
    """Eq 14-15."""
    first = mean(math.log(sigma(s - mu2)) for s in s1)
    return -first - mean(math.log(1 - sigma(s - mu1)) for s in s2)


def naive_eq_19(s, mu, own="+", other="-"):
    """disc_pos puts ref+ above theta+ and theta+ above ref-; Eq 20, disc_neg, swaps the signs."""
    return (
        -mean(math.log(sigma(x - mu["theta" + own])) for x in s["ref" + own])
        - mean(math.log(1 - sigma(x - mu["ref" + own])) for x in s["theta" + own])
        - mean(math.log(sigma(x - mu["ref" + other])) for x in s["theta" + own])
        - mean(math.log(1 - sigma(x - mu["theta" + own])) for x in s["ref" + other])
    )


def naive_generator(game, s_theta, mu_ref):
    """The policy's term of Eq 18, or its non-saturating form."""
    if game == "minimax":
        return mean(math.log(1 - sigma(s - mu_ref)) for s in s_theta)
    return -mean(math.log(sigma(s - mu_ref)) for s in s_theta)


def naive_batch_generator(game, s_theta, s_ref):
    """Both terms, with the batch's means, as in the original relativistic average GAN."""
    if game == "minimax":
        return -naive_bce(s_ref, s_theta, mean(s_ref), mean(s_theta))
    return naive_bce(s_theta, s_ref, mean(s_theta), mean(s_ref))


# ---------------------------------------------------------------------- every loss is its equation


@pytest.mark.parametrize("name", NAIVE)
def test_every_preference_loss_is_its_equation(name):
    logps = draw(4, 3.0)
    expected = [NAIVE[name](*pair) for pair in torch.stack(logps, 1).tolist()]
    close(PURE[name](*logps), expected)


def test_implicit_rewards_are_beta_times_the_log_ratios():
    logps = draw(4, 3.0)
    pairs = torch.stack(logps, 1).tolist()
    chosen, rejected = implicit_rewards(*logps, 0.3)
    close(chosen, [0.3 * (w - ref_w) for w, _, ref_w, _ in pairs])
    close(rejected, [0.3 * (lo - ref_l) for _, lo, _, ref_l in pairs])


def test_relativistic_bce_is_eq_14_and_15():
    (s1, s2), (mu1, mu2, *_) = draw(2), draw(1)[0]
    expected = naive_bce(s1.tolist(), s2.tolist(), mu1.item(), mu2.item())
    close(relativistic_bce(s1, s2, mu1, mu2), expected)


@pytest.mark.parametrize("own, other", ["+-", "-+"])
def test_discriminator_loss_is_eq_19_and_with_the_signs_swapped_eq_20(own, other):
    names, scores, means = ("ref" + own, "theta" + own, "ref" + other), draw(3), draw(1)[0][:3]
    s = {name: x.tolist() for name, x in zip(names, scores, strict=True)}
    mu = {name: x.item() for name, x in zip(names, means, strict=True)}
    close(discriminator_loss(*scores, *means), naive_eq_19(s, mu, own, other))


@both_games
def test_generator_loss_is_eq_18_with_constant_means_and_both_terms_with_batch_means(game):
    s_theta, s_ref = draw(2)
    alone = generator_loss(s_theta, s_ref[0], game)
    close(alone, naive_generator(game, s_theta.tolist(), s_ref[0].item()))
    both = generator_loss(s_theta, s_ref.mean(), game, s_ref, s_theta.mean())
    close(both, naive_batch_generator(game, s_theta.tolist(), s_ref.tolist()))


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.float64])
def test_latent_mse_is_the_mean_over_units_and_real_tokens_only(mask_type):
    h_theta, h_ref = torch.randn(2, 3, 4, H, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    h_theta[mask == 0] += 1e6
    real = [[t for t in range(4) if row[t]] for row in mask.tolist()]
    a, b = h_theta.tolist(), h_ref.tolist()
    expected = [
        mean((a[i][t][u] - b[i][t][u]) ** 2 for t in real[i] for u in range(H)) for i in range(3)
    ]
    close(latent_mse(h_theta, h_ref, mask.to(mask_type)), expected)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "function",
    [
        *PURE.values(),
        lambda *logps: implicit_rewards(*logps, 0.3),
        lambda a, b, c, d: relativistic_bce(a, b, c[0], d[0]),
        lambda a, b, c, d: discriminator_loss(a, b, c, a.mean(), b.mean(), d[0]),
        lambda a, b, *_: generator_loss(a, b[0], "minimax"),
        lambda a, b, *_: generator_loss(a, b[0], "nonsaturating"),
        lambda a, b, *_: generator_loss(a, b.mean(), "minimax", b, a.mean()),
        lambda a, b, *_: generator_loss(a, b.mean(), "nonsaturating", b, a.mean()),
        lambda a, b, *_: latent_mse(a.view(1, B, 1), b.view(1, B, 1), torch.ones(1, B)),
    ],
)
def test_gradients_are_the_finite_differences(function):
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in draw(4)])


@both_games
def test_the_policy_gradient_under_batch_means_is_the_central_difference_of_the_formula(game):
    s_theta, s_ref = draw(2)
    s_theta = s_theta.clone().requires_grad_()
    (actual,) = gradient(
        generator_loss(s_theta, s_ref.mean(), game, s_ref, s_theta.mean()), s_theta
    )
    for i in range(B):
        up, down = s_theta.tolist(), s_theta.tolist()
        up[i], down[i] = up[i] + 1e-5, down[i] - 1e-5
        rise = naive_batch_generator(game, up, s_ref.tolist())
        rise -= naive_batch_generator(game, down, s_ref.tolist())
        close(actual[i], rise / 2e-5, atol=1e-9)


@both_games
def test_both_games_pull_equally_where_the_policy_scores_the_reference_mean(game):
    s_ref, s = constant(0.7), constant(0.7).requires_grad_()
    close(*gradient(generator_loss(s, s_ref.mean(), game), s), [-1 / 2 / B] * B)
    close(*gradient(generator_loss(s, s_ref.mean(), game, s_ref, s.mean()), s), [-1 / B] * B)


@both_games
def test_the_policy_loss_falls_wherever_its_score_rises(game):
    (s_ref,) = draw(1)
    for start in range(-10, 11):
        s = (start + s_ref.flip(0)).requires_grad_()
        losses = [
            generator_loss(s, s_ref.mean(), game),
            generator_loss(s, s_ref.mean(), game, s_ref, s.mean()),
        ]
        assert all((gradient(loss, s)[0] < 0).all() for loss in losses)
        assert generator_loss(s + 0.1, s_ref.mean(), game) < losses[0]


# ---------------------------------------------------------------------- known values, symmetries


def test_preference_losses_start_at_their_known_values():
    w, lo = draw(2, 3.0)
    assert LN2 == math.log(2)
    close(dpo_loss(w, lo, w, lo, 0.3), [math.log(2)] * B)
    close(ipo_loss(w, lo, w, lo, 0.3), [1 / (4 * 0.3**2)] * B)
    close(simpo_loss(w, w, 0.3, 0.5), [math.log(1 + math.exp(0.15))] * B)


def test_scores_that_tell_nothing_apart_cost_ln_2_a_term():
    s, mu = constant(1.3), constant(1.3).mean()
    close(relativistic_bce(s, s, mu, mu), 2 * math.log(2))
    close(discriminator_loss(s, s, s, mu, mu, mu), 4 * math.log(2))
    for game, sign in zip(GAMES, (-1, 1), strict=True):
        close(generator_loss(s, mu, game), sign * math.log(2))
        close(generator_loss(s, mu, game, s, mu), sign * 2 * math.log(2))


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


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b, c, x, y, z: relativistic_bce(a, b, x, y),
        lambda a, b, c, x, y, z: relativistic_bce(-b, -a, -y, -x),
        discriminator_loss,
        *(lambda a, b, c, x, y, z, game=game: generator_loss(a, x, game) for game in GAMES),
        *(lambda a, b, c, x, y, z, game=game: generator_loss(a, x, game, b, y) for game in GAMES),
    ],
)
def test_only_differences_of_scores_count_in_the_adversarial_losses(loss):
    inputs = [*draw(3), *draw(1)[0][:3]]
    close(loss(*(x + 7 for x in inputs)), loss(*inputs))


def test_negating_all_scores_swaps_real_and_fake():
    (a, b), (mu_a, mu_b, *_) = draw(2), draw(1)[0]
    close(relativistic_bce(-b, -a, -mu_b, -mu_a), relativistic_bce(a, b, mu_a, mu_b))


# ---------------------------------------------------------------------- far scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [400.0, -400.0])
def test_every_loss_and_gradient_is_finite_at_scores_of_400(far, dtype):
    a, b = ((sign * constant(far)).to(dtype).requires_grad_() for sign in (1, -1))
    losses = [
        dpo_loss(a, b, b, a, 1.0),
        ipo_loss(a, b, b, a, 1.0),
        simpo_loss(a, b, 1.0, 0.5),
        relativistic_bce(a, b, a.mean(), b.mean()),
        discriminator_loss(a, b, a, a.mean(), b.mean(), a.mean()),
        *(generator_loss(b, a.mean(), game) for game in GAMES),
        *(generator_loss(b, a.mean(), game, a, b.mean()) for game in GAMES),
    ]
    for loss in losses:
        assert loss.dtype == dtype
        assert all(x.isfinite().all() for x in (loss, *gradient(loss, a, b)))


TINY = math.exp(
    -400
)  # log(1 + e^x) and its slope are e^x far to the left of 0; x and 1 to the right


@pytest.mark.parametrize(
    "game, far, value, slope",
    [
        ("minimax", 400.0, -400.0, -1.0),
        ("minimax", -400.0, -TINY, -TINY),
        ("nonsaturating", 400.0, TINY, -TINY),
        ("nonsaturating", -400.0, 400.0, -1.0),
    ],
)
def test_far_scores_follow_their_asymptotes(game, far, value, slope):
    s, zero = constant(far).requires_grad_(), constant(0.0)
    for loss, expected in (
        (generator_loss(s, zero[0], game), value),
        (relativistic_bce(zero, s, zero[0], s[0].detach()), 2 * max(far, TINY)),
    ):
        close(loss, expected, atol=0)
    close(*gradient(generator_loss(s, zero[0], game), s), [slope / B] * B, atol=0)


# ---------------------------------------------------------------------- the registry, and refusals


@pytest.mark.parametrize("name", NAIVE)
def test_registered_losses_take_sums_and_divide_by_the_lengths_where_they_need_means(name):
    needs_ref, lengths = name in ("dpo", "ipo"), torch.tensor([[3, 7, 1, 12, 5], [4, 2, 9, 1, 6]])
    w, lo, *ref = draw(4, 3.0)
    lp = LogProbs(w, lo, *(ref if needs_ref else (None, None)), *lengths)
    if not needs_ref:
        w, lo = w / lengths[0], lo / lengths[1]
    expected = [NAIVE[name](*pair) for pair in torch.stack([w, lo, *ref], 1).tolist()]
    close(OPO_LOSSES[name](lp, ARGS), expected)


def test_the_losses_on_offer_say_whether_they_need_the_reference():
    marks = {name: loss.needs_ref for name, loss in OPO_LOSSES.items()}
    assert marks == {"dpo": True, "ipo": True, "simpo": False, "sft": False}


def test_a_loss_of_ones_own_is_offered_under_its_name():
    @opo_loss("hinge", needs_ref=False)
    def hinge(lp, args):
        return (args.beta - (lp.logp_chosen - lp.logp_rejected)).clamp(min=0)

    registered = OPO_LOSSES.pop("hinge")  # and removed again, for the other tests
    assert registered is hinge and registered.needs_ref is False
    w, lo = draw(2)
    expected = [max(0.0, 0.3 - (a - b)) for a, b in zip(w.tolist(), lo.tolist(), strict=True)]
    close(registered(LogProbs(w, lo, None, None, None, None), ARGS), expected)


def test_generator_loss_refuses_another_kind_and_half_of_the_batch_means():
    s_theta, s_ref = draw(2)
    with pytest.raises(ValueError, match="hinge"):
        generator_loss(s_theta, s_ref.mean(), "hinge")
    for half in ({"s_ref": s_ref}, {"mu_theta": s_theta.mean()}):
        with pytest.raises(ValueError, match="together"):
            generator_loss(s_theta, s_ref.mean(), "minimax", **half)


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


@both_kinds
def test_around_the_encoder_a_critic_is_three_linear_layers_and_a_masked_mean(kind):
    disc, (h, mask) = critic(kind, layers=0), latents()
    first, second, third = disc.normalised_layers()
    for layer in disc.normalised_layers():
        nn.init.normal_(layer.bias)  # starts at 0, where a forgotten one would not show
    expected = []
    for sequence, length in zip(h.tolist(), mask.sum(1).tolist(), strict=True):
        x = naive_linear(first, [mean(unit) for unit in zip(*sequence[:length], strict=True)])
        if kind == "mlp":
            x = naive_gelu(x)
        else:  # learned positions, also averaged
            positions = zip(*disc.pos_embedding[:length].tolist(), strict=True)
            x = [v + mean(p) for v, p in zip(x, positions, strict=True)]
        expected += naive_linear(third, naive_gelu(naive_linear(second, x)))
    close(disc(h, mask), expected)


def test_an_encoder_layer_is_torchs_pre_norm_layer_with_the_same_weights():
    ours = EncoderLayer(16, heads=4, dropout=0.0).double()
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    parts = "norm_attention norm_ffn qkv out ffn_in ffn_out".split()
    names = "norm1. norm2. self_attn.in_proj_ self_attn.out_proj. linear1. linear2.".split()
    weights = {}
    for part, name in zip(parts, names, strict=True):
        for kind, parameter in getattr(ours, part).named_parameters():
            weights[name + kind] = nn.init.normal_(parameter, std=0.3)
    x, mask = torch.randn(3, 6, 16, dtype=torch.float64), latents()[1].bool()
    expected = functional_call(theirs, weights, x, {"src_key_padding_mask": ~mask})
    close(ours(x, mask), expected)


def test_the_default_transformer_has_the_sizes_of_fig_10_and_the_decay_of_algorithm_1():
    disc = build_discriminator("transformer", H)
    assert disc.pos_embedding.shape == (2048, 512) and len(disc.layers) == 2
    assert all(layer.heads == 8 and layer.ffn_in.out_features == 2048 for layer in disc.layers)
    assert disc.ema_decay == 0.9


@pytest.mark.parametrize("hidden, heads", [(64, 8), (32, 4), (20, 2), (7, 1)])
def test_a_narrow_transformer_has_fewer_heads_rather_than_narrower_ones(hidden, heads):
    assert critic(hidden=hidden).layers[0].heads == heads


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown discriminator 'mse'"):
        build_discriminator("mse", H)


@both_kinds
def test_a_critic_gives_one_raw_score_per_sequence_in_the_precision_of_its_weights(kind):
    disc, (h, mask) = critic(kind).float(), latents()
    for latent_type in (torch.bfloat16, torch.float32, torch.float64):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                scores = disc(h.to(latent_type), mask)
            assert scores.shape == (3,) and scores.dtype == torch.float32


# ---------------------------------------------------------------------- critics: masks


@both_kinds
def test_padding_and_batch_mates_change_no_score(kind):
    disc, (h, mask) = critic(kind), latents()
    scores = disc(h, mask)
    close(disc(torch.where(mask.bool()[..., None], h, 0), mask.bool()), scores)
    longer = torch.cat([h, torch.randn(3, 4, H)], 1), torch.cat([mask, torch.zeros(3, 4)], 1)
    close(disc(*longer), scores)
    for i, length in enumerate(mask.sum(1)):
        close(disc(h[i : i + 1, :length], mask[i : i + 1, :length]), scores[i : i + 1])


def test_sequences_beyond_max_length_are_cut_with_their_mask():
    disc, (h, mask) = critic(max_length=4), latents((9, 6, 2), padded_to=9)
    close(disc(h, mask), disc(h[:, :4], mask[:, :4]))


# ---------------------------------------------------------------------- critics: initialisation


@both_kinds
def test_the_same_seed_gives_the_same_critic_and_another_seed_another(kind):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(critic(kind).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    weights = "project_in.parametrizations.weight.original"
    assert not torch.equal(states[0][weights], states[2][weights])


def test_encoder_layers_do_not_start_as_copies():  # [choice 17]
    first, second = critic().layers
    for name in ("qkv", "out", "ffn_in", "ffn_out"):
        assert not torch.equal(getattr(first, name).weight, getattr(second, name).weight)


@both_kinds
def test_linear_layers_start_with_zero_bias_and_xavier_weights(kind):
    disc = critic(kind)
    for layer in disc.modules():
        if isinstance(layer, nn.Linear):
            spectral = layer in disc.normalised_layers()
            raw = layer.parametrizations.weight.original if spectral else layer.weight
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.85 * bound < raw.abs().max() <= bound and (layer.bias == 0).all()


# ---------------------------------------------------------------------- critics: spectral norm


def assert_spectral_norms_are_1(disc):
    norms = [torch.linalg.matrix_norm(layer.weight, 2) for layer in disc.normalised_layers()]
    close(torch.stack(norms), [1.0, 1.0, 1.0], atol=0.02)


@pytest.mark.parametrize("kind, hidden_size, hidden", [("transformer", H, 32), ("mlp", 768, 512)])
def test_spectral_norms_start_within_2_percent_of_1(kind, hidden_size, hidden):
    assert_spectral_norms_are_1(critic(kind, hidden_size=hidden_size, hidden=hidden))


@both_kinds
def test_spectral_norms_stay_within_2_percent_of_1_while_training(kind):
    disc, (h, mask) = critic(kind), latents()
    optimiser = torch.optim.AdamW(disc.parameters(), lr=1e-3)
    stale = copy.deepcopy(disc)
    for _ in range(50):
        optimiser.zero_grad()
        disc(h, mask).sum().backward()
        optimiser.step()
        disc.power_iterate()
    assert_spectral_norms_are_1(disc)
    stale.load_state_dict(dict(disc.named_parameters()), strict=False)
    with pytest.raises(AssertionError):  # the weights have moved: without iterations it fails
        assert_spectral_norms_are_1(stale)


@both_kinds
def test_no_forward_moves_a_buffer_and_train_and_eval_agree_without_dropout(kind):
    disc, (h, mask) = critic(kind), latents()
    before = copy.deepcopy(dict(disc.named_buffers()))
    scores = [disc(h, mask), *(disc.train(mode)(h, mask) for mode in (True, False, True))]
    assert all(torch.equal(scores[0], other) for other in scores)
    assert any(name.endswith("_u") for name in before)
    assert all(torch.equal(before[name], now) for name, now in disc.named_buffers())


def test_dropout_changes_scores_in_train_mode_only():
    disc, (h, mask) = critic(dropout=0.1), latents()
    assert (disc.train()(h, mask) != disc(h, mask)).all()
    assert torch.equal(disc.eval()(h, mask), disc(h, mask))


# ---------------------------------------------------------------------- critics: running means


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_running_means_start_at_0_then_are_adams_bias_corrected_averages(decay):
    disc, average = critic("mlp", ema_decay=decay), [0.0] * 3
    close(disc.means(), average, atol=0)
    for step in range(1, 8):
        scores = draw(3)
        disc.update_means(*scores)
        batch = [mean(s.tolist()) for s in scores]
        average = [decay * a + (1 - decay) * b for a, b in zip(average, batch, strict=True)]
        close(disc.means(), [a / (1 - decay**step) for a in average])
        if step == 1:
            close(disc.means(), batch)


def test_running_means_and_spectral_norms_are_restored_exactly_from_the_state_dict():
    disc, other = critic(), critic()
    for _ in range(3):
        disc.update_means(*draw(3))
        disc.power_iterate()
    other.load_state_dict(copy.deepcopy(disc.state_dict()))
    assert torch.equal(other.means(), disc.means()) and disc.means().any()
    scores, (h, mask) = draw(3), latents()
    for restored in (disc, other):
        restored.update_means(*scores)
        restored.power_iterate()
    assert torch.equal(other.means(), disc.means())
    assert torch.equal(other(h, mask), disc(h, mask))


# ---------------------------------------------------------------------- who receives gradient


@both_kinds
@both_games
def test_the_policy_loss_passes_a_frozen_critic_and_reaches_the_policy_latents_only(kind, game):
    disc, (h_ref, mask) = critic(kind).requires_grad_(False), latents()
    h_ref, h_theta = h_ref.requires_grad_(), torch.randn_like(h_ref).requires_grad_()
    s_ref, s_theta = disc(h_ref, mask), disc(h_theta, mask)
    disc.update_means(s_ref, s_theta, s_ref)  # from scores with a graph, yet constants
    generator_loss(s_theta, disc.means()[0], game).backward()
    assert (h_theta.grad[mask == 1] != 0).all() and (h_theta.grad[mask == 0] == 0).all()
    assert h_ref.grad is None and all(p.grad is None for p in disc.parameters())


@both_kinds
def test_the_critic_loss_on_detached_latents_reaches_every_weight_of_the_critic_only(kind):
    disc, (h, mask) = critic(kind), latents()
    quad = [torch.randn_like(h).requires_grad_() for _ in range(3)]
    scores = [disc(x.detach(), mask) for x in quad]
    disc.update_means(*scores)
    discriminator_loss(*scores, *disc.means()).backward()
    assert all((p.grad != 0).any() for p in disc.parameters())
    assert all(x.grad is None for x in quad) and not disc.means().requires_grad
