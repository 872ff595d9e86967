"""The mathematics of GANPO as pure functions of tensors, and the table of preference losses.

Equation numbers are those of arXiv 2601.22083. Shapes: B pairs of a step or a micro-batch, N texts,
L tokens of a text, H hidden size. Where a docstring gives no shape, an argument is a float tensor
of shape (B,). Log-probabilities are natural logarithms. Every function computes in the precision of
its inputs.

All losses are written with softplus(x) = log(1 + e^x), because -log sigma(x) = softplus(-x) and
-log(1 - sigma(x)) = softplus(x) hold without overflow for every x.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LN2 = 0.6931471805599453  # softplus(0): a discriminator's loss where it cannot tell inputs apart


def softplus(x: Tensor) -> Tensor:
    """Returns log(1 + e^x), of any shape.

    F.softplus by itself is a straight line from x = 20 on, which is wrong by 2e-9 in float64.
    """
    return F.softplus(x, threshold=40.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the real tokens of each text [choice 3].

    x is (N, L) or (N, L, D). mask is (N, L), 1 on real tokens and 0 on padding, with at least one
    real token per text. The result is (N,) or (N, D).
    """
    mask = mask.bool().view(*mask.shape, *[1] * (x.ndim - 2))
    return torch.where(mask, x, 0).sum(1) / mask.sum(1)


def share_above_0(x: Tensor) -> Tensor:
    """Returns 1 where x > 0, 1/2 where x = 0 and 0 where x < 0, for x of any shape."""
    return (x.sign() + 1) / 2


# ---------------------------------------------------------------------- preference losses


def dpo_loss(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_logp_chosen: Tensor,
    ref_logp_rejected: Tensor,
    beta: float,
) -> Tensor:
    """Direct preference optimisation, Eq 3-4.

    -log sigma(beta * [(logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected)])

    The log-probabilities are sums over the answer's tokens. Returns (B,); ln 2 where the policy
    equals the reference.
    """
    chosen, rejected = implicit_rewards(
        logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, beta
    )
    return softplus(rejected - chosen)


def simpo_loss(
    logp_chosen: Tensor, logp_rejected: Tensor, beta: float, gamma_beta_ratio: float
) -> Tensor:
    """SimPO (arXiv 2405.14734, Eq 6).

    -log sigma(beta * (logp_chosen - logp_rejected) - gamma), gamma = beta * gamma_beta_ratio

    The log-probabilities are *means* over the answer's tokens. Returns (B,).
    """
    return softplus(beta * (gamma_beta_ratio - (logp_chosen - logp_rejected)))


def ipo_loss(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_logp_chosen: Tensor,
    ref_logp_rejected: Tensor,
    beta: float,
) -> Tensor:
    """IPO (arXiv 2310.12036, Eq 17).

    ([(logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected)] - 1 / (2 beta))^2

    The log-probabilities are *means* over the answer's tokens [choice 26]. Returns (B,);
    1 / (4 beta^2) where the policy equals the reference.
    """
    log_ratio = (logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected)
    return (log_ratio - 1 / (2 * beta)).square()


def sft_loss(logp_chosen: Tensor) -> Tensor:
    """Supervised fine-tuning on the chosen answer: its negative log-likelihood per token.

    The log-probability is the *mean* over the answer's tokens, as in simpo_loss. Returns (B,).
    """
    return -logp_chosen


def bradley_terry_loss(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """The loss of a reward model (Bradley and Terry, 1952).

    -log sigma(reward_chosen - reward_rejected)

    Returns (B,); ln 2 where the two rewards are equal.
    """
    return softplus(reward_rejected - reward_chosen)


def implicit_rewards(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_logp_chosen: Tensor,
    ref_logp_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Returns the rewards that DPO's policy implies for chosen and rejected answers, Eq 3-4.

    beta * (logp - ref_logp), two tensors of shape (B,).
    """
    return beta * (logp_chosen - ref_logp_chosen), beta * (logp_rejected - ref_logp_rejected)


# ---------------------------------------------------------------------- the table of --loss


class LogProbs(NamedTuple):
    """What a preference loss may use of each pair, six tensors of shape (B,).

    Log-probabilities are sums over the answer's tokens, lengths are numbers of those tokens. The
    reference's are None where the loss is registered with needs_ref=False.
    """

    logp_chosen: Tensor
    logp_rejected: Tensor
    ref_logp_chosen: Tensor | None
    ref_logp_rejected: Tensor | None
    length_chosen: Tensor
    length_rejected: Tensor

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Returns the policy's mean log-probability per token of chosen and rejected answers."""
        return self.logp_chosen / self.length_chosen, self.logp_rejected / self.length_rejected

    def ref_per_token(self) -> tuple[Tensor, Tensor]:
        """Returns the reference's, as per_token returns the policy's."""
        chosen, rejected = self.ref_logp_chosen, self.ref_logp_rejected
        return chosen / self.length_chosen, rejected / self.length_rejected


class PreferenceLoss(NamedTuple):
    """An entry of OPO_LOSSES."""

    function: Callable[..., Tensor]  # (LogProbs, **settings) to one loss per pair, (B,)
    needs_ref: bool  # whether it reads the reference's log-probabilities
    defaults: dict[str, float]  # its settings, and their values where no flag says otherwise


OPO_LOSSES: dict[str, PreferenceLoss] = {}  # by the name that --loss takes


def opo_loss(name: str, needs_ref: bool, **defaults: float):
    """Returns a decorator that registers a preference loss under a name for --loss.

    needs_ref says whether the loss reads the reference's log-probabilities. If not, the reference
    is loaded only for its latents, where --lambda_adv is above 0. defaults are the loss's settings,
    such as beta=0.1. A flag of the same name overrides a default.
    """

    def register(function):
        OPO_LOSSES[name] = PreferenceLoss(function, needs_ref, defaults)
        return function

    return register


def with_settings(name: str, settings: Mapping) -> Callable[[LogProbs], Tensor]:
    """Returns the preference loss `name` as a function of LogProbs alone.

    Its settings are taken from the mapping; one that is absent or None keeps its default.
    """
    loss = OPO_LOSSES[name]
    given = {k: settings[k] for k in loss.defaults if settings.get(k) is not None}
    return partial(loss.function, **(loss.defaults | given))


@opo_loss("dpo", needs_ref=True, beta=0.1)  # App. B
def _dpo(lp: LogProbs, beta: float) -> Tensor:
    return dpo_loss(*lp[:4], beta)


@opo_loss("ipo", needs_ref=True, beta=0.1)  # App. B's for DPO
def _ipo(lp: LogProbs, beta: float) -> Tensor:
    return ipo_loss(*lp.per_token(), *lp.ref_per_token(), beta)


@opo_loss("simpo", needs_ref=False, beta=10.0, gamma_beta_ratio=0.5)  # its authors' for Gemma-2-9B
def _simpo(lp: LogProbs, beta: float, gamma_beta_ratio: float) -> Tensor:  # [choice 14]
    return simpo_loss(*lp.per_token(), beta, gamma_beta_ratio)


@opo_loss("sft", needs_ref=False)
def _sft(lp: LogProbs) -> Tensor:
    return sft_loss(lp.per_token()[0])


def logged_rewards(lp: LogProbs, needs_ref: bool, beta: float) -> tuple[Tensor, Tensor]:
    """Returns what the log calls the rewards of chosen and rejected answers, (B,) each.

    For a loss that needs the reference they are the implicit rewards of Eq 3-4. For the others they
    are SimPO's: beta times the mean log-probability per token.
    """
    if needs_ref:
        return implicit_rewards(*lp[:4], beta)
    chosen, rejected = lp.per_token()
    return beta * chosen, beta * rejected


# ---------------------------------------------------------------------- adversarial losses
# One discriminator gives raw scores to three sets of latents: s_ref to the reference's of its own
# sign, s_theta to the policy's, and s_other to the reference's of the opposite sign. The sign of
# disc_pos is that of chosen answers, the sign of disc_neg that of rejected ones. mu_ref, mu_theta
# and mu_other are the means of these scores, scalars.


def relativistic_bce(s_real: Tensor, s_fake: Tensor, mu_real: Tensor, mu_fake: Tensor) -> Tensor:
    """The relativistic average binary cross-entropy, Eq 14-15 with Eq 11.

    -E log sigma(s_real - mu_fake) - E log(1 - sigma(s_fake - mu_real))

    It is small where every real score is above the mean fake score and every fake score is below
    the mean real score. Returns a scalar; 2 ln 2 where all scores are equal.
    """
    return softplus(mu_fake - s_real).mean() + softplus(s_fake - mu_real).mean()


def discriminator_loss(
    s_ref: Tensor,
    s_theta: Tensor,
    s_other: Tensor,
    mu_ref: Tensor,
    mu_theta: Tensor,
    mu_other: Tensor,
) -> Tensor:
    """The loss of one discriminator: Eq 19 for disc_pos, Eq 20 for disc_neg.

    BCE(ref, theta) + BCE(theta, reference of the opposite sign)

    Both equations are the same function; each takes the scores of its own discriminator
    [choice 25]. Returns a scalar; 4 ln 2 where all scores are equal.
    """
    return relativistic_bce(s_ref, s_theta, mu_ref, mu_theta) + relativistic_bce(
        s_theta, s_other, mu_theta, mu_other
    )


def generator_loss(
    s_theta: Tensor,
    mu_ref: Tensor,
    adv_loss: str,
    s_ref: Tensor | None = None,
    mu_theta: Tensor | None = None,
) -> Tensor:
    """The policy's loss under one discriminator, Eq 18; L_adv is the sum over both [choice 1].

    adv_loss        whole loss         its part with s_theta
    minimax         -BCE(ref, theta)   E log(1 - sigma(s_theta - mu_ref))
    nonsaturating   BCE(theta, ref)    -E log sigma(s_theta - mu_ref)

    Without s_ref and mu_theta only the part with s_theta is computed: with the running means of
    Algorithm 1 the other part is a constant. With both of them the whole loss is computed, as in
    the original relativistic average GAN, where mu_theta carries gradient. Returns a scalar. Raises
    ValueError for another adv_loss, or if only one of s_ref and mu_theta is given.
    """
    if adv_loss not in ("minimax", "nonsaturating"):
        raise ValueError(f"unknown adversarial loss {adv_loss!r}: minimax or nonsaturating")
    if (s_ref is None) != (mu_theta is None):
        raise ValueError("s_ref and mu_theta go together: give both or neither")
    if s_ref is not None:
        if adv_loss == "minimax":
            return -relativistic_bce(s_ref, s_theta, mu_ref, mu_theta)
        return relativistic_bce(s_theta, s_ref, mu_theta, mu_ref)
    if adv_loss == "minimax":
        return -softplus(s_theta - mu_ref).mean()
    return softplus(mu_ref - s_theta).mean()


def latent_mse(h_theta: Tensor, h_ref: Tensor, mask: Tensor) -> Tensor:
    """The fixed distance of Table 3: the mean squared difference of two sets of latents.

    h_theta and h_ref are (N, L, H). mask is (N, L), 1 on real tokens. The mean is over hidden units
    and real tokens. Returns (N,).
    """
    return masked_mean((h_theta - h_ref).square().mean(-1), mask)
