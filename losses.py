"""The mathematics of GANPO as pure functions of tensors, and the table of --loss.

B pairs, T tokens of a text, H hidden; every argument is a float tensor of shape (B,) unless it says
otherwise, log-probabilities are natural logarithms, and each function works in the precision of its
inputs. Equation numbers are those of arXiv 2601.22083. Everything is written with softplus, because
-log sigma(x) = softplus(-x) and -log(1 - sigma(x)) = softplus(x) hold without overflow at any |x|.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LN2 = 0.6931471805599453  # softplus(0): what a critic that cannot tell apart pays per term


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). F.softplus alone is a straight line from x = 20 on: in float64 off by 2e-9."""
    return F.softplus(x, threshold=40.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: (B, T) or (B, T, D), mask (B, T), 1 on real tokens, at least one
    per row  ->  (B,) or (B, D) [choice 3]"""
    mask = mask.bool().view(*mask.shape, *[1] * (x.ndim - 2))
    return torch.where(mask, x, 0).sum(1) / mask.sum(1)


def share_above_0(x: Tensor) -> Tensor:
    """1 where x > 0, 1/2 where it is 0, 0 below: of differences, who wins, ties shared."""
    return (x.sign() + 1) / 2


# ---------------------------------------------------------------------- preference optimisation


def dpo_loss(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_logp_chosen: Tensor,
    ref_logp_rejected: Tensor,
    beta: float,
) -> Tensor:
    """Eq 3-4, direct preference optimisation, on log-probabilities summed over the response.

    -log sigma(beta * [(logp_w - ref_w) - (logp_l - ref_l)])  ->  (B,); ln 2 where policy = ref.
    """
    chosen, rejected = implicit_rewards(
        logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, beta
    )
    return softplus(rejected - chosen)


def simpo_loss(
    logp_chosen: Tensor, logp_rejected: Tensor, beta: float, gamma_beta_ratio: float
) -> Tensor:
    """SimPO (arXiv 2405.14734, Eq 6), on log-probabilities *averaged* over the response's tokens.

    -log sigma(beta * (logp_w - logp_l) - gamma), gamma = beta * gamma_beta_ratio  ->  (B,)
    """
    return softplus(beta * (gamma_beta_ratio - (logp_chosen - logp_rejected)))


def ipo_loss(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_logp_chosen: Tensor,
    ref_logp_rejected: Tensor,
    beta: float,
) -> Tensor:
    """IPO (arXiv 2310.12036, Eq 17), on log-probabilities summed over the response.

    ([(logp_w - ref_w) - (logp_l - ref_l)] - 1 / (2 beta))^2  ->  (B,); 1 / (4 beta^2) where policy
    = ref.
    """
    log_ratio = (logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected)
    return (log_ratio - 1 / (2 * beta)).square()


def sft_loss(logp_chosen: Tensor) -> Tensor:
    """Supervised fine-tuning on the chosen answer: its mean negative log-likelihood per token  ->
    (B,).

    Takes the log-probability *averaged* over the response's tokens, as simpo_loss does.
    """
    return -logp_chosen


def bradley_terry_loss(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """A reward model's loss (Bradley and Terry 1952): -log p(chosen above rejected), where

    p = sigma(reward_chosen - reward_rejected)  ->  (B,); ln 2 at equal rewards.
    """
    return softplus(reward_rejected - reward_chosen)


def implicit_rewards(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_logp_chosen: Tensor,
    ref_logp_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The reward that DPO's policy implies (Eq 3-4): beta * (logp - ref_logp), chosen and rejected
    ->  two (B,)."""
    return beta * (logp_chosen - ref_logp_chosen), beta * (logp_rejected - ref_logp_rejected)


class LogProbs(NamedTuple):
    """What a preference loss may use, all (B,): log-probabilities summed over the response, and its
    tokens."""

    logp_chosen: Tensor
    logp_rejected: Tensor
    ref_logp_chosen: Tensor | None  # None where the loss has needs_ref = False
    ref_logp_rejected: Tensor | None
    length_chosen: Tensor
    length_rejected: Tensor

    def per_token(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probabilities of chosen and rejected, averaged over the response."""
        return self.logp_chosen / self.length_chosen, self.logp_rejected / self.length_rejected


# --loss NAME -> function(lp: LogProbs, args) -> (B,); args has beta and gamma_beta_ratio
OPO_LOSSES = {}


def opo_loss(name: str, needs_ref: bool):
    """Adds a preference loss under `name`; one without a reference is not made to load and run
    it."""

    def add(function):
        function.needs_ref = needs_ref
        OPO_LOSSES[name] = function
        return function

    return add


@opo_loss("dpo", needs_ref=True)
def _dpo(lp: LogProbs, args) -> Tensor:
    return dpo_loss(
        lp.logp_chosen, lp.logp_rejected, lp.ref_logp_chosen, lp.ref_logp_rejected, args.beta
    )


@opo_loss("ipo", needs_ref=True)
def _ipo(lp: LogProbs, args) -> Tensor:
    return ipo_loss(
        lp.logp_chosen, lp.logp_rejected, lp.ref_logp_chosen, lp.ref_logp_rejected, args.beta
    )


@opo_loss("simpo", needs_ref=False)
def _simpo(lp: LogProbs, args) -> Tensor:  # [choice 14]
    return simpo_loss(*lp.per_token(), args.beta, args.gamma_beta_ratio)


@opo_loss("sft", needs_ref=False)
def _sft(lp: LogProbs, args) -> Tensor:
    return sft_loss(lp.per_token()[0])


def rewards(lp: LogProbs, args) -> tuple[Tensor, Tensor]:
    """What the log calls rewards of chosen and rejected, (b,) each: Eq 3-4's where --loss needs the
    reference, else SimPO's, beta times the mean log-probability."""
    if OPO_LOSSES[args.loss].needs_ref:
        return implicit_rewards(*lp[:4], args.beta)
    chosen, rejected = lp.per_token()
    return args.beta * chosen, args.beta * rejected


def needs_reference(args) -> bool:
    """Of log-probabilities, or of latents."""
    return OPO_LOSSES[args.loss].needs_ref or args.lambda_adv > 0


# ---------------------------------------------------------------------- the adversarial game
# s_ref, s_theta, s_other: one critic's raw scores of the reference's latents of its own sign, of
# the policy's, and of the reference's of the opposite sign; mu_*: their means, scalars.


def relativistic_bce(s_real: Tensor, s_fake: Tensor, mu_real: Tensor, mu_fake: Tensor) -> Tensor:
    """Eq 14-15 with Eq 11: how badly the critic puts `real` above the average `fake`, and the
    reverse.

    -E log sigma(s_real - mu_fake) - E log(1 - sigma(s_fake - mu_real))  ->  scalar; 2 ln 2 at equal
    scores.
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
    """Eq 19; and Eq 20 with the signs swapped, which is the same function of the other critic's
    scores.

    BCE(ref, theta) + BCE(theta, ref of the opposite sign)  ->  scalar; 4 ln 2 at equal scores.
    """
    return relativistic_bce(s_ref, s_theta, mu_ref, mu_theta) + relativistic_bce(
        s_theta, s_other, mu_theta, mu_other
    )


def generator_loss(
    s_theta: Tensor,
    mu_ref: Tensor,
    kind: str,
    s_ref: Tensor | None = None,
    mu_theta: Tensor | None = None,
) -> Tensor:
    """Eq 18, the policy's loss under one critic (L_adv is the sum of the two critics')  ->  scalar.

    minimax        -BCE(ref, theta), whose policy term is   E log(1 - sigma(s_theta - mu_ref))
    nonsaturating   BCE(theta, ref), whose policy term is  -E log sigma(s_theta - mu_ref)
    [choice 1] Without s_ref the policy's term alone, as the means are constants (Algorithm 1); with
    s_ref and mu_theta both terms, as in the original relativistic average GAN, where mu_theta
    carries gradient. Raises ValueError for another kind, or for s_ref without mu_theta.
    """
    if kind not in ("minimax", "nonsaturating"):
        raise ValueError(f"unknown adversarial loss {kind!r}: minimax or nonsaturating")
    if (s_ref is None) != (mu_theta is None):
        raise ValueError(
            "s_ref and mu_theta go together: both for two terms, neither for the policy's alone"
        )
    if s_ref is not None:
        if kind == "minimax":
            return -relativistic_bce(s_ref, s_theta, mu_ref, mu_theta)
        return relativistic_bce(s_theta, s_ref, mu_theta, mu_ref)
    if kind == "minimax":
        return -softplus(s_theta - mu_ref).mean()
    return softplus(mu_ref - s_theta).mean()


def latent_mse(h_theta: Tensor, h_ref: Tensor, mask: Tensor) -> Tensor:
    """Table 3's fixed critic: squared distance of two latents (B, T, H), mean over units and real
    tokens  ->  (B,).

    mask (B, T) is 1 on real tokens, at least one per row.
    """
    return masked_mean((h_theta - h_ref).square().mean(-1), mask)


# ---------------------------------------------------------------------- the paired game
# Beyond the paper: near h_theta = h_ref the two terms of Eq 19 push the policy's score with equal
# force in opposite directions, so the critic learns good against bad, not policy against reference.
# Here it compares the two models' latents of one token of one text, u = D(x_ref) - D(x_theta),
# (B, T), and a penalty on its slope, not a bound, lets its force vanish as they meet.


def paired_discriminator_loss(u: Tensor, slopes: Tensor, mask: Tensor, r1: float) -> Tensor:
    """softplus(-u) + r1 / 2 * slopes, mean over real tokens  ->  (B,); ln 2 at equal latents of a
    flat critic.

    slopes (B, T): |dD/dx|^2 at the reference's latent plus that at the policy's (the R1 and R2
    penalties of Mescheder et al. 2018).
    """
    return masked_mean(softplus(-u) + r1 / 2 * slopes, mask)


def paired_generator_loss(u: Tensor, mask: Tensor) -> Tensor:
    """softplus(u), mean over real tokens  ->  (B,); ln 2 where policy = reference."""
    return masked_mean(softplus(u), mask)
