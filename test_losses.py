"""Claims about losses.py and discriminator.py: the equations, their gradients, and the two critics.

    pytest test_losses.py

Each loss is compared with loops over plain floats, written from the paper's formula with math.log
and math.exp. Numbers are float64 unless the claim is about another precision.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import discriminator
from discriminator import (
    EncoderLayer,
    build_discriminator,
    padding_is_left_out,
    quick_dropout,
)
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
    logged_rewards,
    opo_loss,
    relativistic_bce,
    sft_loss,
    simpo_loss,
    with_settings,
)

B, H = 5, 6  # pairs; width of the latents
SETTINGS = {"beta": 0.3, "gamma_beta_ratio": 0.5}
both_kinds = pytest.mark.parametrize("kind", ["transformer", "mlp"])
ADV_LOSSES = ("minimax", "nonsaturating")
both_adv_losses = pytest.mark.parametrize("adv_loss", ADV_LOSSES)


@pytest.fixture(autouse=True)
def one_seed_and_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other: 3 s become 50
    yield
    torch.set_num_threads(threads)


def draw(count, scale=1.0):
    """`count` vectors (B,)."""
    return [scale * torch.randn(B, dtype=torch.float64) for _ in range(count)]


def constant(value):
    return torch.full((B,), value, dtype=torch.float64)


def check_close(actual, expected, rtol=1e-12, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


# ---------------------------------------------------------------------- oracles: floats and loops


def sigma(x):
    return 1 / (1 + math.exp(-x))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def log_sigma(s, mu):
    return mean(math.log(sigma(x - mu)) for x in s)


def log_rest(s, mu):
    return mean(math.log(1 - sigma(x - mu)) for x in s)


def naive_eq_19(s, mu, own="+", other="-"):
    """disc_pos puts ref+ above theta+ and theta+ above ref-; Eq 20, disc_neg, swaps the signs."""
    return (
        -log_sigma(s["ref" + own], mu["theta" + own])
        - log_rest(s["theta" + own], mu["ref" + own])
        - log_sigma(s["theta" + own], mu["ref" + other])
        - log_rest(s["ref" + other], mu["theta" + own])
    )


PREFERENCE = {  # one pair's loss; beta = 0.3, gamma = 0.3 * 0.5
    "dpo": lambda w, lo, ref_w, ref_l: -math.log(sigma(0.3 * (w - ref_w) - 0.3 * (lo - ref_l))),
    "ipo": lambda w, lo, ref_w, ref_l: (w - lo - ref_w + ref_l - 1 / (2 * 0.3)) ** 2,
    "simpo": lambda w, lo, *_: -math.log(sigma(0.3 * w - 0.3 * lo - 0.3 * 0.5)),
    "sft": lambda w, *_: -w,
}
ADVERSARIAL = {  # of the scores r (ref), t (theta) and their means: Eq 14-15, four forms of Eq 18
    "bce": lambda r, t, mu_r, mu_t: -log_sigma(r, mu_t) - log_rest(t, mu_r),
    "minimax": lambda r, t, mu_r, mu_t: log_rest(t, mu_r),
    "nonsaturating": lambda r, t, mu_r, mu_t: -log_sigma(t, mu_r),
    "minimax, both terms": lambda r, t, mu_r, mu_t: log_sigma(r, mu_t) + log_rest(t, mu_r),
    "nonsaturating, both terms": lambda r, t, mu_r, mu_t: -log_sigma(t, mu_r) - log_rest(r, mu_t),
}
UNDER_TEST = {  # the functions of the same arguments
    "dpo": lambda *logps: dpo_loss(*logps, 0.3),
    "ipo": lambda *logps: ipo_loss(*logps, 0.3),
    "simpo": lambda w, lo, *_: simpo_loss(w, lo, 0.3, 0.5),
    "sft": lambda w, *_: sft_loss(w),
    "bce": relativistic_bce,
    **{kind: lambda r, t, x, y, kind=kind: generator_loss(t, x, kind) for kind in ADV_LOSSES},
    **{
        kind + ", both terms": lambda r, t, x, y, kind=kind: generator_loss(t, x, kind, r, y)
        for kind in ADV_LOSSES
    },
}
preference = pytest.mark.parametrize("name", PREFERENCE)
adversarial = pytest.mark.parametrize("name", ADVERSARIAL)


# ---------------------------------------------------------------------- every loss is its equation


@preference
def test_every_preference_loss_is_its_equation(name):
    logps = draw(4, 3.0)
    expected = [PREFERENCE[name](*pair) for pair in torch.stack(logps, 1).tolist()]
    check_close(UNDER_TEST[name](*logps), expected)


def test_implicit_rewards_are_beta_times_the_log_ratios():
    logps = draw(4, 3.0)
    pairs = torch.stack(logps, 1).tolist()
    chosen, rejected = implicit_rewards(*logps, 0.3)
    check_close(chosen, [0.3 * (w - ref_w) for w, _, ref_w, _ in pairs])
    check_close(rejected, [0.3 * (lo - ref_l) for _, lo, _, ref_l in pairs])


@adversarial
def test_every_adversarial_loss_is_its_equation(name):
    inputs = [*draw(2), *draw(1)[0][:2]]
    check_close(UNDER_TEST[name](*inputs), ADVERSARIAL[name](*(x.tolist() for x in inputs)))


@pytest.mark.parametrize("own, other", ["+-", "-+"])
def test_discriminator_loss_is_eq_19_and_with_the_signs_swapped_eq_20(own, other):
    names, scores, means = ("ref" + own, "theta" + own, "ref" + other), draw(3), draw(1)[0][:3]
    s = {name: x.tolist() for name, x in zip(names, scores, strict=True)}
    mu = {name: x.item() for name, x in zip(names, means, strict=True)}
    check_close(discriminator_loss(*scores, *means), naive_eq_19(s, mu, own, other))


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.float64])
def test_latent_mse_is_the_mean_over_units_and_real_tokens_only(mask_type):
    h_theta, h_ref = torch.randn(2, 3, 4, H, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    h_theta[mask == 0] += 1e6
    expected = []
    for a, b, real in zip(h_theta.tolist(), h_ref.tolist(), mask.tolist(), strict=True):
        tokens = [t for t in range(4) if real[t]]
        expected.append(mean((a[t][u] - b[t][u]) ** 2 for t in tokens for u in range(H)))
    check_close(latent_mse(h_theta, h_ref, mask.to(mask_type)), expected)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "function",
    [
        *(UNDER_TEST[name] for name in PREFERENCE),
        *(lambda a, b, c, d, n=n: UNDER_TEST[n](a, b, c[0], d[0]) for n in ADVERSARIAL),
        lambda *logps: implicit_rewards(*logps, 0.3),
        lambda a, b, c, d: discriminator_loss(a, b, c, a.mean(), b.mean(), d[0]),
        lambda a, b, *_: latent_mse(a.view(1, B, 1), b.view(1, B, 1), torch.ones(1, B)),
    ],
)
def test_gradients_are_the_finite_differences(function):
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in draw(4)])


@adversarial
def test_the_gradient_under_batch_means_is_the_central_difference_of_the_equation(name):
    s_ref, s_theta = draw(2)
    s_theta.requires_grad_()
    loss = UNDER_TEST[name](s_ref, s_theta, s_ref.mean(), s_theta.mean())
    actual, ref = gradient(loss, s_theta), s_ref.tolist()
    for i in range(B):
        up, down = s_theta.tolist(), s_theta.tolist()
        up[i], down[i] = up[i] + 1e-5, down[i] - 1e-5
        rise = ADVERSARIAL[name](ref, up, mean(ref), mean(up))
        rise -= ADVERSARIAL[name](ref, down, mean(ref), mean(down))
        check_close(actual[i], rise / 2e-5, atol=1e-9)


@both_adv_losses
def test_both_adversarial_losses_pull_equally_where_the_policy_scores_the_reference_mean(adv_loss):
    s_ref, s = constant(0.7), constant(0.7).requires_grad_()
    check_close(gradient(generator_loss(s, s_ref.mean(), adv_loss), s), [-1 / 2 / B] * B)
    check_close(
        gradient(generator_loss(s, s_ref.mean(), adv_loss, s_ref, s.mean()), s), [-1 / B] * B
    )


@both_adv_losses
def test_the_policy_loss_falls_wherever_its_score_rises(adv_loss):
    s_ref, noise = draw(2)
    for start in range(-10, 11):
        s = (start + noise).requires_grad_()
        alone = generator_loss(s, s_ref.mean(), adv_loss)
        both = generator_loss(s, s_ref.mean(), adv_loss, s_ref, s.mean())
        assert (gradient(alone, s) < 0).all() and (gradient(both, s) < 0).all()
        assert generator_loss(s + 0.1, s_ref.mean(), adv_loss) < alone


# ---------------------------------------------------------------------- known values, symmetries


def test_preference_losses_start_at_their_known_values():
    w, lo = draw(2, 3.0)
    check_close(dpo_loss(w, lo, w, lo, 0.3), [math.log(2)] * B)
    check_close(ipo_loss(w, lo, w, lo, 0.3), [1 / (4 * 0.3**2)] * B)
    check_close(simpo_loss(w, w, 0.3, 0.5), [math.log(1 + math.exp(0.15))] * B)


def test_scores_that_tell_nothing_apart_cost_ln_2_each():
    assert LN2 == math.log(2)
    s, mu = constant(1.3), constant(1.3).mean()
    for name, terms in zip(ADVERSARIAL, (2, -1, 1, -2, 2), strict=True):
        check_close(UNDER_TEST[name](s, s, mu, mu), terms * math.log(2))
    check_close(discriminator_loss(s, s, s, mu, mu, mu), 4 * math.log(2))


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 5.0])
def test_same_scores_with_batch_means_cost_2_ln_2_and_at_most_a_quarter_of_their_variance(scale):
    (s,) = draw(1, scale)
    excess = relativistic_bce(s, s, s.mean(), s.mean()) - 2 * math.log(2)
    assert 0 < excess <= s.var(correction=0) / 4


def test_swapping_chosen_and_rejected_negates_the_dpo_logit():
    w, lo, ref_w, ref_l = draw(4, 3.0)
    there, back = dpo_loss(w, lo, ref_w, ref_l, 0.3), dpo_loss(lo, w, ref_l, ref_w, 0.3)
    check_close(back - there, 0.3 * ((w - ref_w) - (lo - ref_l)))  # softplus(z) - softplus(-z) = z


def test_only_differences_of_scores_count_in_the_adversarial_losses():
    inputs = [*draw(3), *draw(1)[0][:3]]
    check_close(discriminator_loss(*(x + 7 for x in inputs)), discriminator_loss(*inputs))
    pair = inputs[:2] + inputs[3:5]
    for name in ADVERSARIAL:
        check_close(UNDER_TEST[name](*(x + 7 for x in pair)), UNDER_TEST[name](*pair))


# ---------------------------------------------------------------------- far scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [400.0, -400.0])
def test_every_loss_and_gradient_is_finite_at_scores_of_400(far, dtype):
    a, b = (constant(x).to(dtype).requires_grad_() for x in (far, -far))
    losses = [UNDER_TEST[name](a, b, b, a) for name in PREFERENCE]
    losses += [UNDER_TEST[name](a, b, a.mean(), b.mean()) for name in ADVERSARIAL]
    losses += [discriminator_loss(a, b, a, a.mean(), b.mean(), a.mean())]
    for loss in losses:
        assert loss.dtype == dtype and loss.isfinite().all()
        assert gradient(loss, a).isfinite().all()


@pytest.mark.parametrize("x", [-30.0, 19.9, 20.1, 25.0, 39.9, 40.1])
def test_float64_is_right_to_its_last_digits_where_the_losses_bend(x):
    s, zero = constant(x).requires_grad_(), constant(0.0)[0]
    loss = generator_loss(s, zero, "minimax")
    check_close(loss, -math.log1p(math.exp(x)), rtol=4e-16, atol=0)
    check_close(gradient(loss, s), [-1 / (1 + math.exp(-x)) / B] * B, rtol=4e-16, atol=0)


# far to the left of 0, log(1 + e^x) and its slope are e^x; far to the right, x and 1
@pytest.mark.parametrize(
    "adv_loss, far, value, slope",
    [
        ("minimax", 400.0, -400.0, -1.0),
        ("minimax", -400.0, -math.exp(-400), -math.exp(-400)),
        ("nonsaturating", 400.0, math.exp(-400), -math.exp(-400)),
        ("nonsaturating", -400.0, 400.0, -1.0),
    ],
)
def test_far_scores_follow_their_asymptotes(adv_loss, far, value, slope):
    s, mu_ref = constant(far).requires_grad_(), torch.zeros((), dtype=torch.float64)
    loss = generator_loss(s, mu_ref, adv_loss)
    check_close(loss, value, atol=0)
    check_close(gradient(loss, s), [slope / B] * B, atol=0)


# ---------------------------------------------------------------------- the registry, and refusals


@preference
def test_registered_losses_take_sums_and_divide_by_the_lengths_where_they_need_means(name):
    needs_ref, lengths = name in ("dpo", "ipo"), torch.tensor([[3, 7, 1, 12, 5], [4, 2, 9, 1, 6]])
    w, lo, *ref = draw(4, 3.0)
    lp = LogProbs(w, lo, *(ref if needs_ref else (None, None)), *lengths)
    if name != "dpo":
        w, lo = w / lengths[0], lo / lengths[1]
    if name == "ipo":  # [choice 26]
        ref = [ref[0] / lengths[0], ref[1] / lengths[1]]
    expected = [PREFERENCE[name](*pair) for pair in torch.stack([w, lo, *ref], 1).tolist()]
    check_close(with_settings(name, SETTINGS)(lp), expected)


def test_the_losses_on_offer_say_whether_they_need_the_reference():
    marks = {name: loss.needs_ref for name, loss in OPO_LOSSES.items()}
    assert marks.items() >= {"dpo": True, "ipo": True, "simpo": False, "sft": False}.items()


def test_a_setting_that_is_not_given_keeps_the_default_that_stands_beside_its_loss():
    assert OPO_LOSSES["dpo"].defaults == OPO_LOSSES["ipo"].defaults == {"beta": 0.1}
    assert OPO_LOSSES["simpo"].defaults == {"beta": 10.0, "gamma_beta_ratio": 0.5}
    lp, ones = LogProbs(*draw(4, 3.0), None, None), torch.ones(B)
    check_close(with_settings("dpo", {})(lp), dpo_loss(*lp[:4], 0.1))
    lp = lp._replace(length_chosen=ones, length_rejected=ones)
    check_close(with_settings("ipo", {"beta": None, "lr": 1.0})(lp), ipo_loss(*lp[:4], 0.1))
    check_close(with_settings("simpo", {"beta": 2.0})(lp), simpo_loss(*lp[:2], 2.0, 0.5))


def test_a_loss_of_ones_own_is_offered_under_its_name():
    @opo_loss("hinge", needs_ref=False, margin=1.0)
    def hinge(lp, margin):
        return (margin - (lp.logp_chosen - lp.logp_rejected)).clamp(min=0)

    try:
        assert OPO_LOSSES["hinge"] == (hinge, False, {"margin": 1.0})
        loss = with_settings("hinge", {"margin": 0.3})
    finally:
        del OPO_LOSSES["hinge"]  # for the other tests
    w, lo = draw(2)
    expected = [max(0.0, 0.3 - (a - b)) for a, b in zip(w.tolist(), lo.tolist(), strict=True)]
    check_close(loss(LogProbs(w, lo, None, None, None, None)), expected)


def test_logged_rewards_are_dpos_with_a_reference_and_simpos_without():
    lp = LogProbs(*draw(4, 3.0), torch.arange(1, B + 1), torch.arange(2, B + 2))
    with_ref = torch.stack(logged_rewards(lp, True, 0.3))
    check_close(with_ref, torch.stack(implicit_rewards(*lp[:4], 0.3)))
    chosen, rejected = logged_rewards(lp._replace(ref_logp_chosen=None), False, 0.3)
    check_close(chosen, [0.3 * w / n for n, w in enumerate(lp.logp_chosen.tolist(), 1)])
    check_close(rejected, [0.3 * lo / n for n, lo in enumerate(lp.logp_rejected.tolist(), 2)])


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
    check_close(disc(h, mask), expected)


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
    check_close(ours(x, mask), expected)


def test_the_defaults_are_those_of_fig_10_and_appendix_b():
    disc = build_discriminator("transformer", H)
    assert disc.pos_embedding.shape == (2048, 512) and len(disc.layers) == 2
    assert all(layer.ffn_in.out_features == 2048 for layer in disc.layers)
    assert disc.ema_decay == 0.9 and 0.019 < disc.pos_embedding.std() < 0.021


@pytest.mark.parametrize("hidden, heads", [(512, 8), (64, 8), (32, 4), (20, 2), (7, 1)])
def test_heads_are_8_as_in_fig_10_but_fewer_rather_than_narrower_than_8_units(hidden, heads):
    assert critic(hidden=hidden).layers[0].heads == heads


def test_without_the_padding_scores_and_gradients_are_the_same(monkeypatch):
    disc, (h, mask) = critic(), latents((13, 1, 7), padded_to=14)  # one text is cut to 12 tokens
    forwards = []
    disc.layers[0].ffn_in.register_forward_pre_hook(lambda _, x: forwards.append(x[0].shape))
    results = []
    for packed in (False, True):
        monkeypatch.setattr(discriminator, "padding_is_left_out", lambda x, packed=packed: packed)
        own = h.clone().requires_grad_()
        disc.zero_grad()
        scores = disc(own, mask)
        scores.square().sum().backward()
        weights = [x.grad.clone() for x in disc.parameters()]
        results.append([scores, own.grad, *weights])
    assert forwards == [(3, 12, 32), (1, 20, 32)]
    for padded, packed in zip(*results, strict=True):
        check_close(packed, padded)


def test_quick_dropout_zeroes_each_value_by_itself_and_keeps_the_mean():
    x, p = torch.ones(1000, 1001, dtype=torch.float64, requires_grad=True), 0.1
    y = quick_dropout(x, p)
    zeros = (y == 0).double()
    assert abs(zeros.mean() - p) < 5 * math.sqrt(p * (1 - p) / zeros.numel())
    check_close(y[y > 0].mean(), 1 / (1 - p), 1e-4)
    # values that share a random number of 64 bits, and others
    for lag in (1, 2, 3, 4, 64):
        both = (zeros.flatten()[lag:] * zeros.flatten()[:-lag]).mean()
        assert abs(both - p * p) < 5 * p * math.sqrt(1 - p * p) / math.sqrt(zeros.numel())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)
    assert not torch.equal(quick_dropout(x, p), y)


def test_where_padding_is_left_out_dropout_is_where_it_was(monkeypatch):
    disc, (h, mask) = critic(dropout=0.5), latents()
    expected, dropped = disc.eval()(h, mask), []
    monkeypatch.setattr(discriminator, "padding_is_left_out", lambda x: True)
    monkeypatch.setattr(
        discriminator, "quick_dropout", lambda x, p: dropped.append([*x.shape]) or x
    )
    check_close(disc(h, mask), expected)
    assert dropped == []  # in eval mode
    check_close(disc.train()(h, mask), expected)
    of_layer = [[1, 4, n, n] for n in (5, 3, 1)] + [[1, 9, 32], [1, 9, 128], [1, 9, 32]]
    assert dropped == 2 * of_layer


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown discriminator 'mse'"):
        build_discriminator("mse", H)


@both_kinds
def test_a_critic_gives_one_raw_score_per_sequence_in_the_precision_of_its_weights(kind):
    disc, (h, mask) = critic(kind).float(), latents()
    h = h.bfloat16()  # exact in every precision below
    expected = disc(h.float(), mask)
    assert expected.shape == (3,) and expected.dtype == torch.float32
    for latent_type in (torch.bfloat16, torch.float64):
        assert torch.equal(disc(h.to(latent_type), mask), expected)
    while_normalising = []  # is autocast on where sigma is computed?
    disc.project_in.parametrizations.weight.register_forward_hook(
        lambda *_: while_normalising.append(torch.is_autocast_enabled("cpu"))
    )
    assert not padding_is_left_out(h)
    with torch.autocast("cpu", torch.bfloat16):
        assert padding_is_left_out(h)
        scores = disc(h, mask)
    assert scores.dtype == torch.float32 and while_normalising == [False]
    check_close(scores, expected, 0.05, 0.05)


# ---------------------------------------------------------------------- critics: masks


@both_kinds
def test_padding_and_batch_mates_change_no_score(kind):
    disc, (h, mask) = critic(kind), latents()
    scores = disc(h, mask)
    check_close(disc(torch.where(mask.bool()[..., None], h, 0), mask.bool()), scores)
    longer = torch.cat([h, torch.randn(3, 4, H)], 1), torch.cat([mask, torch.zeros(3, 4)], 1)
    check_close(disc(*longer), scores)
    for i, length in enumerate(mask.sum(1)):
        check_close(disc(h[i : i + 1, :length], mask[i : i + 1, :length]), scores[i : i + 1])


def test_sequences_beyond_max_length_are_cut_with_their_mask():
    disc, (h, mask) = critic(max_length=4), latents((9, 6, 2), padded_to=9)
    check_close(disc(h, mask), disc(h[:, :4], mask[:, :4]))


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
    check_close(torch.stack(norms), [1.0, 1.0, 1.0], atol=0.02)


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
    disc.power_iterate()  # must leave spectral norm at rest
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
    check_close(disc.means(), average, atol=0)
    for step in range(1, 8):
        scores = draw(3)
        disc.update_means(*scores)
        batch = [mean(s.tolist()) for s in scores]
        average = [decay * a + (1 - decay) * b for a, b in zip(average, batch, strict=True)]
        check_close(disc.means(), [a / (1 - decay**step) for a in average])
        if step == 1:
            check_close(disc.means(), batch)


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
@both_adv_losses
def test_the_policy_loss_passes_a_frozen_critic_and_reaches_the_policy_latents_only(kind, adv_loss):
    disc, (h_ref, mask) = critic(kind).requires_grad_(False), latents()
    h_ref, h_theta = h_ref.requires_grad_(), torch.randn_like(h_ref).requires_grad_()
    s_ref, s_theta = disc(h_ref, mask), disc(h_theta, mask)
    disc.update_means(s_ref, s_theta, s_ref)  # from scores with a graph, yet constants
    generator_loss(s_theta, disc.means()[0], adv_loss).backward()
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
