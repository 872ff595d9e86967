"""The game between the critics and the policy, lines 12-22 of Algorithm 1, and the paired one.

A game is a pair of functions and an entry in GAMES:

    update(run, kept, sums, step) -> metrics        moves run.critics, on detached latents
    terms(run, kept, sums, metrics) -> (loss, term) per micro-batch, for the policy's backward

kept    what forward_pairs has left of each micro-batch of this rank: latents h (2b, L, H), with
        graph, and their mask; scores of detached latents where the game needs_scores; h_ref where
        it does not, or with --mean batch; and loss. terms empties it, so that a graph is freed as
        soon as it has gone backward
loss    this rank's part of the mean preference loss, ready made
term    a scalar whose gradients, summed over micro-batches and ranks, are L_adv's
sums    for the log: sums over this rank's pairs, which become means over all pairs
metrics for the log: values that are already those of the global batch

Shapes: B pairs on all ranks, b pairs in one micro-batch, L tokens, H hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

import distributed
from discriminator import Discriminator, build_discriminator
from distributed import all_ranks
from losses import (
    LN2,
    discriminator_loss,
    generator_loss,
    masked_mean,
    paired_discriminator_loss,
    paired_generator_loss,
    relativistic_bce,
    share_above_0,
    softplus,
)
from policy import at_least_fp32

Terms = Iterator[tuple[Tensor, Tensor]]


@dataclass
class Game:
    update: Callable
    terms: Callable
    needs_scores: bool  # of both latents, (2, 3, b), by quad_scores
    neutral: Callable  # args -> what critics that cannot tell policy from reference would print


def critic_settings(args, config: PretrainedConfig) -> dict:
    """build_discriminator's arguments, also saved beside the weights."""
    names = ("disc_hidden", "disc_layers", "disc_dropout")
    sizes = {name.removeprefix("disc_"): getattr(args, name) for name in names}
    common = {"max_length": args.max_length, "ema_decay": args.ema_decay}
    own = {"kind": args.disc, "hidden_size": config.hidden_size}
    if args.critic == "paired":
        own |= {"kind": "paired", "differences": args.critic_input == "diff"}
    return own | sizes | common


def build_critics(args, config: PretrainedConfig) -> torch.nn.ModuleDict | None:
    """Both discriminators, or None where the settings need none."""
    if args.lambda_adv == 0 or args.disc == "mse":
        return None
    # replicated, being small: built alike on every rank from one CPU seed; forking the generator
    # leaves what follows as it is at lambda 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        settings = critic_settings(args, config)
        return torch.nn.ModuleDict(
            {name: build_discriminator(**settings) for name in ("disc_pos", "disc_neg")}
        )


def autocast(device: torch.device, dtype: torch.dtype, tensors: torch.device):
    """Of the critics' products on a device, here of tensors that may lie on another [choice 10]."""
    bf16 = device.type == "cuda" and dtype == torch.bfloat16
    return partial(torch.autocast, tensors.type, torch.bfloat16, enabled=bf16)


def step_critics(run) -> Tensor:
    """One update of both critics by the gradients on all ranks, which are summed -> their norm."""
    norm = distributed.sum_gradients(run.critics.parameters())
    run.critic_optimizer.step()
    for critic in run.critics.values():
        if isinstance(critic, Discriminator):
            critic.power_iterate()  # [choice 11]
    return norm


# ---------------------------------------------------------------------- the paper's: Eq 18-20


def own_scores(run, h: Tensor, mask: Tensor) -> Tensor:
    """Latents (2b, L, H), chosen first -> (2, b): disc_pos on chosen, disc_neg on rejected. With
    --checkpointing they too keep their inputs only."""
    pos, neg = mask.chunk(2)
    own = ("disc_pos", h[: len(pos)], pos), ("disc_neg", h[len(pos) :], neg)
    with run.autocast():
        if run.args.checkpointing and torch.is_grad_enabled():
            scores = [checkpoint(run.critics[k], *x, use_reentrant=False) for k, *x in own]
        else:
            scores = [run.critics[k](*x) for k, *x in own]
    return torch.stack(scores)


def quad_scores(run, h_ref: Tensor, h_theta: Tensor, mask: Tensor) -> Tensor:
    """Line 12: latents (2b, L, H), chosen first -> (2, 3, b), per critic s_ref, s_theta,
    s_other."""
    b = len(mask) // 2
    h_other, other_mask = h_ref.roll(b, 0), mask.roll(b, 0)  # of the opposite sign
    # three forwards of one shape: equal latents get equal scores to the last bit
    quad = (h_ref, mask), (h_theta, mask), (h_other, other_mask)
    return torch.stack([own_scores(run, h, m) for h, m in quad], dim=1)


def update_critics(run, kept: list, sums: dict, step: int) -> dict:
    """Lines 13-19: means, losses and one update of both discriminators, on the global scores (2, 3,
    B), of which this rank's part carries its graph -> metrics."""
    scores = all_ranks(torch.cat([out.scores for out in kept], dim=-1))
    losses, metrics = 0, {"d_ra": 4 * LN2}  # the constant that Eq 13 lacks [choice 13]
    for (name, critic), s in zip(run.critics.items(), scores, strict=True):
        sign = name.removeprefix("disc_")
        critic.update_means(*s.detach())
        mu = critic.means() if run.args.mean == "ema" else s.mean(-1)  # these carry gradient
        loss = discriminator_loss(*s, *mu)
        losses = losses + loss
        s_ref, s_theta, _ = s.detach()
        metrics[f"loss_disc_{sign}"] = loss.detach()
        metrics[f"disc_acc_{sign}"] = share_above_0(s_ref - s_theta).mean()
        metrics[f"score_gap_{sign}"] = (s_ref - s_theta).mean()
        metrics["d_ra"] = metrics["d_ra"] - relativistic_bce(s_ref, s_theta, *mu.detach()[:2])
    if step % run.args.disc_every == 0:  # [choice 4]
        run.critic_optimizer.zero_grad()
        losses.backward()  # the global loss, with gradient to this rank's own scores: hence a sum
        metrics["disc_grad_norm"] = step_critics(run)
    return metrics


def adversarial_gradient(run, s_theta: Tensor, s_ref: Tensor | None) -> tuple[Tensor, Tensor]:
    """Line 22, Eq 18: L_adv of the updated discriminators' scores, this rank's (2, b); s_ref only
    for --mean batch -> L_adv on the global batch, and its gradient with respect to this rank's
    s_theta."""
    s_theta = all_ranks(s_theta.detach()).requires_grad_()
    s_ref = all_ranks(s_ref) if s_ref is not None else None
    loss = 0
    for j, critic in enumerate(run.critics.values()):
        if s_ref is None:
            mu_ref, both = critic.means()[0], ()
        else:
            mu_ref, both = s_ref[j].mean(), (s_ref[j], s_theta[j].mean())
        loss = loss + generator_loss(s_theta[j], mu_ref, run.args.adv_loss, *both)
    (grad,) = torch.autograd.grad(loss, s_theta)
    return loss.detach(), grad.chunk(run.world, dim=-1)[run.rank]


def adversarial_terms(run, kept: list, sums: dict, metrics: dict) -> Terms:
    """The terms by the chain rule: dL_adv/ds times s."""
    s_theta, s_ref = [own_scores(run, out.h, out.mask) for out in kept], None
    if run.args.mean == "batch":
        s_ref = torch.cat([own_scores(run, out.h_ref, out.mask) for out in kept], dim=-1)
    metrics["loss_adv"], grad = adversarial_gradient(run, torch.cat(s_theta, dim=-1), s_ref)
    for g in grad.split([s.shape[-1] for s in s_theta], dim=-1):
        yield kept.pop(0).loss, (g * s_theta.pop(0)).sum()


def neutral_values(args) -> str:
    terms = (2 if args.mean == "ema" else 4) * (-1 if args.adv_loss == "minimax" else 1)
    return f"adv {terms * LN2:+.4f}, D {4 * LN2:.4f}, D acc 0.50, d_ra 0, score_gap 0"


# ---------------------------------------------------------------------- the paired one


def by_critic(run, out: SimpleNamespace):
    """For each critic its sign and it, then latents (b, L, H) of the policy and the reference with
    their mask, and the reference's of the opposite sign with theirs; in fp32 at least."""
    h, h_ref = (at_least_fp32(x).chunk(2) for x in (out.h, out.h_ref))
    mask = out.mask.chunk(2)
    for i, (name, critic) in enumerate(run.critics.items()):
        sign, o = name.removeprefix("disc_"), 1 - i
        yield sign, critic, h[i], h_ref[i], mask[i], h_ref[o], mask[o]


def paired_update(run, kept: list, sums: dict, step: int) -> dict:
    """--disc_steps updates of both critics on the step's detached latents -> metrics. Their losses
    are means over pairs, so gradients of micro-batches and ranks add up."""
    args, metrics = run.args, {}
    for inner in range(args.disc_steps if step % args.disc_every == 0 else 1):
        run.critic_optimizer.zero_grad()
        for out in kept:
            for sign, critic, theta, ref, mask, other, other_mask in by_critic(run, out):
                ends = [x.detach().requires_grad_() for x in critic.inputs(theta, ref)]
                s_theta, s_ref = (critic.tokens(x) for x in ends)
                both = s_theta.sum() + s_ref.sum()
                grads = torch.autograd.grad(both, ends, create_graph=True)
                slopes = sum(g.square().sum(-1) for g in grads)
                u = s_ref - s_theta
                loss = paired_discriminator_loss(u, slopes, mask, args.r1)
                if not critic.differences:  # a critic of texts: the reference's own two
                    loss = loss + softplus(critic(other, other_mask) - critic(ref, mask))
                (loss.sum() / args.batch_size).backward(inputs=[*critic.parameters()])
                if inner == 0:
                    out.watched.append(loss.detach())
                    sums[f"loss_disc_{sign}"] += loss.detach().sum()
                    won = masked_mean(share_above_0(u.detach()), mask)
                    sums[f"disc_acc_{sign}"] += won.sum()
                    sums[f"score_gap_{sign}"] += masked_mean(u.detach(), mask).sum()
        if step % args.disc_every == 0:  # [choice 4]
            metrics.setdefault("disc_grad_norm", step_critics(run))
    return metrics


def paired_terms(run, kept: list, sums: dict, metrics: dict) -> Terms:
    """The terms: half the sum of both critics' losses for the policy, a mean over pairs."""
    while kept:
        out, losses = kept.pop(0), 0
        for _, critic, theta, ref, mask, *_ in by_critic(run, out):
            x_theta, x_ref = critic.inputs(theta, ref)
            u = critic.tokens(x_ref) - critic.tokens(x_theta)
            losses = losses + paired_generator_loss(u, mask) / 2
        sums["loss_adv"] += losses.detach().sum()
        yield out.loss, losses.sum() / run.args.batch_size


def paired_neutral_values(args) -> str:
    of_texts = f" + {LN2:.4f}" if args.critic_input == "h" else ""
    return f"adv {LN2:+.4f}, D {LN2:.4f}{of_texts} + slopes, D acc 0.50, score_gap 0"


GAMES = {  # --critic NAME
    "paper": Game(update_critics, adversarial_terms, needs_scores=True, neutral=neutral_values),
    "paired": Game(paired_update, paired_terms, needs_scores=False, neutral=paired_neutral_values),
}
