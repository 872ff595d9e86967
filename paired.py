"""The paired critic, beyond the paper: one that compares the two models token by token.

Near h_theta = h_ref the two terms of Eq 19 push the policy's score with equal force in opposite
directions. So the paper's discriminators learn to tell good answers from bad ones, and their push
on the policy has no direction. The paired critic D compares the latents that policy and reference
give to the same token of the same text:

    u = D(x_ref) - D(x_theta),    x = h - h_ref (--critic paired) or x = h (--critic paired_h)
    critic   softplus(-u) + SLOPE_PENALTY / 2 * (|dD/dx|^2 at x_ref + |dD/dx|^2 at x_theta)
    policy   softplus(u)

A penalty on the critic's slope takes the place of spectral norm: it lets the force on the policy
vanish as policy and reference meet. Its settings were found in the miniature and have been tried at
no other scale. Shapes as in train_ganpo.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discriminator import discriminator, step_critics
from distributed import all_ranks
from losses import LN2, masked_mean, share_above_0, softplus
from policy import at_least_fp32

SLOPE_PENALTY = 10.0  # weight of the R1 and R2 penalties (Mescheder et al., 2018)


@discriminator("paired")
class TokenCritic(nn.Module):
    """A small network on each token's latent by itself; no spectral norm, no running means.

    It reads h_theta - h_ref. The reference's own input is then 0.
    """

    updates = 1  # of the critics in a step
    reads_differences = True  # so that it can score no text without the reference

    def __init__(self, hidden_size, hidden, **_):
        super().__init__()
        self.project_in = nn.Linear(hidden_size, hidden)
        self.middle, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def inputs(self, h_theta: Tensor, h_ref: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x_theta and x_ref, what the critic reads of both models, (N, L, H) each."""
        return h_theta - h_ref, torch.zeros_like(h_ref)

    def token_scores(self, x: Tensor) -> Tensor:
        """Returns raw scores (N, L) of inputs (N, L, H)."""
        x = F.gelu(self.middle(F.gelu(self.project_in(x))))
        return self.out(x).squeeze(-1)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Returns the mean score (N,) of latents h (N, L, H); mask (N, L) is 1 on real tokens."""
        return masked_mean(self.token_scores(h), mask)


@discriminator("paired_h")
class LatentCritic(TokenCritic):
    """Reads the latents themselves; it also tells good texts from bad ones."""

    updates, reads_differences = 5, False

    def inputs(self, h_theta: Tensor, h_ref: Tensor) -> tuple[Tensor, Tensor]:
        return h_theta, h_ref


CRITICS = "paired", "paired_h"  # those of --critic that play this game


def paired_discriminator_loss(u: Tensor, slopes: Tensor, mask: Tensor) -> Tensor:
    """softplus(-u) + SLOPE_PENALTY / 2 * slopes, the mean over real tokens.

    u is (N, L). slopes is (N, L): |dD/dx|^2 at the reference's input plus that at the policy's.
    mask is (N, L), 1 on real tokens. Returns (N,); ln 2 where policy = reference and D is constant.
    """
    return masked_mean(softplus(-u) + SLOPE_PENALTY / 2 * slopes, mask)


def paired_generator_loss(u: Tensor, mask: Tensor) -> Tensor:
    """softplus(u), the mean over real tokens. u and mask are (N, L).

    Returns (N,); ln 2 where policy = reference.
    """
    return masked_mean(softplus(u), mask)


def neutral_values(args) -> str:
    """Returns what the log shows while the critic cannot tell policy from reference."""
    of_texts = f" + {LN2:.4f}" if args.critic == "paired_h" else ""
    return f"adv {LN2:+.4f}, D {LN2:.4f}{of_texts} + slope penalty, D acc 0.50, score_gap 0"


def of_each_critic(run, out):
    """Yields seven values for disc_pos and then for disc_neg; out is forward_pairs' result.

    They are "pos" or "neg", the critic, the latents h_theta and h_ref (b, L, H), their mask (b, L),
    and h_ref and mask of the pairs' other answers. Latents are in float32 or higher.
    """
    h, h_ref = (at_least_fp32(x).chunk(2) for x in (out.h, out.h_ref))
    mask = out.mask.chunk(2)
    for i, (name, critic) in enumerate(run.critics.items()):
        other = 1 - i
        sign = name.removeprefix("disc_")
        yield sign, critic, h[i], h_ref[i], mask[i], h_ref[other], mask[other]


def update_discriminators(run, kept: list, step: int) -> dict[str, Tensor]:
    """Updates both critics `updates` times, in every --disc_every-th step.

    kept holds what train_ganpo.forward_pairs returned for each micro-batch; metrics of each pair,
    from before the first update, are added to its per_pair. The latents are detached. The losses
    are means over pairs, so gradients of micro-batches and ranks add up. Returns disc_grad_norm of
    the first update, or an empty dict in a step without one.
    """
    args, metrics = run.args, {}
    due = step % args.disc_every == 0  # [choice 4]
    for i in range(run.critics.disc_pos.updates if due else 1):
        run.critic_optimizer.zero_grad()
        for out in kept:
            for sign, critic, theta, ref, mask, other, other_mask in of_each_critic(run, out):
                x_theta, x_ref = (
                    x.detach().requires_grad_() for x in critic.inputs(theta.detach(), ref)
                )
                s_theta, s_ref = critic.token_scores(x_theta), critic.token_scores(x_ref)
                gradients = torch.autograd.grad(
                    s_theta.sum() + s_ref.sum(), (x_theta, x_ref), create_graph=True
                )
                slopes = sum(g.square().sum(-1) for g in gradients)
                u = s_ref - s_theta
                loss = paired_discriminator_loss(u, slopes, mask)
                if not critic.reads_differences:
                    # The critic keeps telling good texts from bad ones, by the reference's latents
                    # alone, so that this does not push the policy.
                    loss = loss + softplus(critic(other, other_mask) - critic(ref, mask))
                (loss.sum() / args.batch_size).backward(inputs=[*critic.parameters()])
                if i == 0:
                    u = u.detach()
                    out.per_pair[f"loss_disc_{sign}"] = loss.detach()
                    out.per_pair[f"disc_acc_{sign}"] = masked_mean(share_above_0(u), mask)
                    out.per_pair[f"score_gap_{sign}"] = masked_mean(u, mask)
        if due:
            metrics.setdefault("disc_grad_norm", step_critics(run))
    return metrics


def adversarial_loss(run, kept: list) -> Tensor:
    """Returns L_adv, a scalar: half the sum of both critics' losses, the mean over all pairs.

    Its value is that of the global batch. Its gradient reaches the latents of this rank's pairs.
    """
    losses = []
    for out in kept:
        both = []
        for _, critic, theta, ref, mask, *_ in of_each_critic(run, out):
            x_theta, x_ref = critic.inputs(theta, ref)
            u = critic.token_scores(x_ref) - critic.token_scores(x_theta)
            both.append(paired_generator_loss(u, mask))
        losses.append(sum(both) / 2)
    return all_ranks(torch.cat(losses)).mean()
