"""Anchors on trial: what might hold a policy near its reference better than a fixed distance.

    with playing("kl_theta", strength=3.0) as flags:
        train_ganpo.main([*flags, "--lr=6e-4", "--out_dir=out/trial"])

Each anchor is a fork of train_ganpo.py in a few lines: it replaces functions that the training step
looks up when it calls them, and puts them back afterwards. One process, float32, the miniature's
sizes. Shapes as in train_ganpo.py; M is the number of real tokens of a micro-batch, V the
vocabulary, W (V, H) the frozen reference's head.

Distances are means over the tokens of a text, then over chosen and rejected answers and over pairs,
and are multiplied by `strength`, which is --lambda_adv.
"""

import os
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import discriminator
import paired
import train_ganpo  # before torch, because it prepares the CPU's threads
from data import ChatEncoder, json_lines, load_pairs, read_rows
from discriminator import step_critics
from losses import LN2, OPO_LOSSES, masked_mean, opo_loss, sft_loss, softplus
from miniature import world
from packing import batch_indices, pack
from policy import load_lm

OUTPUT_SCALE = 6.0  # makes the input about as long as h - h_ref is, for the critic's slope penalty
VOCABULARY = 261  # of the miniature: bytes and special tokens
ANCHORS: dict[str, Callable] = {}  # by name: opens the fork, given a strength; yields flags


def anchor(function: Callable) -> Callable:
    """Registers a generator of one value as an anchor, by its name."""
    ANCHORS[function.__name__] = contextmanager(function)
    return function


def playing(name: str, strength: float):
    """Opens an anchor for a `with` block; gives the flags with which train_ganpo.py plays it."""
    return ANCHORS[name](strength)


def head_of(lm) -> Tensor:
    """Returns W, the weights (V, H) of a model's head, whole."""
    return whole(lm.model.get_output_embeddings().weight)


def whole(x: Tensor) -> Tensor:
    """Returns a weight that FSDP2 may have sharded, whole."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---------------------------------------------------------------------- fixed distances


@contextmanager
def distance(of_tokens: Callable, strength: float) -> Iterator[list[str]]:
    """Puts a distance in the place of --critic mse's.

    of_tokens(run, h, h_ref) is called with latents (M, H) and returns one value per token, (M,).
    """
    runs = []

    def build(*args):
        runs.append(real_build(*args))
        return runs[-1]

    def of_texts(h: Tensor, h_ref: Tensor, mask: Tensor) -> Tensor:
        values = h.new_zeros(mask.shape)
        values[mask] = of_tokens(runs[-1], h[mask], h_ref[mask])
        return masked_mean(values, mask)

    real_build = train_ganpo.build
    with mock.patch.multiple(train_ganpo, build=build, latent_mse=of_texts):
        yield ["--critic=mse", f"--lambda_adv={strength}"]


@anchor
def mse(strength):
    """The mean square of the latents' difference: Table 3's fixed distance."""
    yield ["--critic=mse", f"--lambda_adv={strength}"]


def log_probs(run, h: Tensor) -> Tensor:
    """Returns log p (M, V): what the reference's head makes of latents (M, H)."""
    return F.linear(h, head_of(run.ref)).log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Returns KL(p to q), (M,), of log-probabilities (M, V)."""
    return (p.exp() * (p - q)).sum(-1)


@anchor
def kl_ref(strength):
    """KL(p_ref to p_theta), both latents read by the reference's head."""
    with distance(lambda run, h, r: kl(log_probs(run, r), log_probs(run, h)), strength) as flags:
        yield flags


@anchor
def kl_theta(strength):
    """KL(p_theta to p_ref), both latents read by the reference's head."""
    with distance(lambda run, h, r: kl(log_probs(run, h), log_probs(run, r)), strength) as flags:
        yield flags


@anchor
def kl_own(strength):
    """KL(p_theta to p_ref), each model's latents read by its own head: no latent anchor, but the
    usual one on the whole vocabulary, on the same tokens."""

    def of_tokens(run, h, r):
        own = F.linear(h, head_of(run.policy)).log_softmax(-1)
        return kl(own, log_probs(run, r))

    with distance(of_tokens, strength) as flags:
        yield flags


def logit_change(run, h: Tensor, h_ref: Tensor) -> tuple[Tensor, Tensor]:
    """Returns p_ref (M, V), and W (h - h_ref) (M, V) less its mean under p_ref."""
    p = log_probs(run, h_ref).exp()
    z = F.linear(h - h_ref, head_of(run.ref))
    return p, z - (p * z).sum(-1, keepdim=True)


@anchor
def fisher(strength):
    """Half the variance of W (h - h_ref) under p_ref: the second order of both KLs."""

    def of_tokens(run, h, r):
        p, z = logit_change(run, h, r)
        return (p * z.square()).sum(-1) / 2

    with distance(of_tokens, strength) as flags:
        yield flags


@anchor
def jensen_shannon(strength):
    """The Jensen-Shannon divergence, which the paper's game estimates, between the two models' next
    tokens, computed instead of learned; times 4, so that its second order is that of the KLs."""

    def of_tokens(run, h, r):
        p, q = log_probs(run, h), log_probs(run, r)
        middle = torch.logaddexp(p, q) - LN2
        return 2 * (kl(p, middle) + kl(q, middle))

    with distance(of_tokens, strength) as flags:
        yield flags


class Covariance:
    """A moving covariance (H, H) of vectors (M, H)."""

    def __init__(self, decay: float = 0.9):
        self.decay, self.sums, self.weight = decay, 0, 0

    def update(self, x: Tensor):
        x = x - x.mean(0)
        self.sums = self.decay * self.sums + (1 - self.decay) * (x.T @ x) / len(x)
        self.weight = self.decay * self.weight + (1 - self.decay)

    def inverse(self) -> Tensor:
        """Returns (Sigma + eps I)^-1, eps a hundredth of the mean variance."""
        sigma = self.sums / self.weight
        eps = sigma.diagonal().mean() / 100
        return torch.linalg.inv(sigma + eps * torch.eye(len(sigma)))


@anchor
def mahalanobis(strength):
    """(h - h_ref)' Sigma^-1 (h - h_ref) / H, Sigma the reference's moving covariance."""
    sigma = Covariance()

    def of_tokens(run, h, r):
        if h.requires_grad:
            sigma.update(r)
        x = h - r
        return ((x @ sigma.inverse()) * x).mean(-1)

    with distance(of_tokens, strength) as flags:
        yield flags


# ---------------------------------------------------------------------- learned critics


@contextmanager
def critic(cls: type, strength: float, **more) -> Iterator[list[str]]:
    """Puts a class of critic in the place of --critic paired's, whose game it then plays.

    cls has inputs and token_scores as paired.TokenCritic. `more` replaces functions of paired.
    """

    def build(*args):
        run = real_build(*args)
        for module in run.critics.values():
            module.run = [run]  # in a list, so that the models are no part of the critic
        return run

    real_build = train_ganpo.build
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(discriminator.DISCRIMINATORS, paired=cls))
        stack.enter_context(mock.patch.object(train_ganpo, "build", build))
        if more:
            stack.enter_context(mock.patch.multiple(paired, **more))
        yield ["--critic=paired", f"--lambda_adv={strength}"]


@anchor
def paired_diff(strength):
    """The paired critic of differences, as --critic paired plays it."""
    yield ["--critic=paired", f"--lambda_adv={strength}"]


class OutputCritic(paired.TokenCritic):
    """Reads the difference as the output sees it: sqrt(p_ref) times W (h - h_ref) without its mean
    under p_ref, (M, V), times OUTPUT_SCALE. Without that the square of its length is twice
    `fisher`."""

    def __init__(self, hidden_size, hidden, **_):
        super().__init__(VOCABULARY, hidden)

    def inputs(self, h_theta, h_ref):
        p, z = logit_change(self.run[0], h_theta, h_ref)
        x = OUTPUT_SCALE * p.sqrt() * z
        return x, torch.zeros_like(x)


@anchor
def paired_output(strength):
    """The paired critic in the output's geometry."""
    with critic(OutputCritic, strength) as flags:
        yield flags


class TokenWeights(paired.TokenCritic):
    """Says, from the reference's latents, which tokens of a text count: w (N, L) of mean 1."""

    def weights(self, h_ref: Tensor, mask: Tensor) -> Tensor:
        scores = self.token_scores(h_ref).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) * mask.sum(-1, keepdim=True)


def weighted_kl(run, out, index: int, critic: TokenWeights) -> tuple[Tensor, Tensor]:
    """Returns w (b, L) and w KL(p_theta to p_ref) (b, L) of the chosen (index 0) or rejected texts
    of a micro-batch."""
    h, r, mask = (x.chunk(2)[index] for x in (out.h, out.h_ref, out.mask))
    w = critic.weights(r, mask)
    values = h.new_zeros(mask.shape)
    values[mask] = kl(log_probs(run, h[mask]), log_probs(run, r[mask]))
    return w, w * values


@anchor
def weighing(strength):
    """A critic that weighs tokens on top of KL(p_theta to p_ref): it looks for the tokens at which
    the policy has moved most, and pays for weights that are not equal (their KL to equal ones)."""

    def update(run, kept, step):
        run.critic_optimizer.zero_grad()
        for out in kept:
            for i, module in enumerate(run.critics.values()):
                w, values = weighted_kl(run, out, i, module)
                mask = out.mask.chunk(2)[i]
                price = masked_mean(torch.where(mask, w * w.clamp_min(1e-9).log(), 0), mask)
                scale = values.detach().sum() / mask.sum() + 1e-6  # of one batch's KL
                loss = price - masked_mean(values, mask) / scale
                inputs = [*module.parameters()]
                (loss.sum() / run.args.batch_size).backward(inputs=inputs)
        return {"disc_grad_norm": step_critics(run)}

    def loss(run, kept):
        parts = []
        for out in kept:
            for i, module in enumerate(run.critics.values()):
                values = weighted_kl(run, out, i, module)[1]
                parts.append(masked_mean(values, out.mask.chunk(2)[i]).sum() / 2)
        return sum(parts) / run.args.batch_size

    with critic(TokenWeights, strength, update_discriminators=update, adversarial_loss=loss) as f:
        yield f


@anchor
def population(strength):
    """d' (Sigma + eps I)^-1 d for each sign: d the batch's mean difference of latents, Sigma the
    moving covariance of both models' latents. The closed form of a linear critic (Fisher GAN)."""
    sigmas = Covariance(), Covariance()

    def update(run, kept, step):
        return {}

    def loss(run, kept):
        total = 0
        for i, sigma in enumerate(sigmas):
            h, r = (
                torch.cat([getattr(o, k).chunk(2)[i][o.mask.chunk(2)[i]] for o in kept])
                for k in ("h", "h_ref")
            )
            sigma.update(torch.cat([h.detach(), r]))
            d = (h - r).mean(0)
            total = total + d @ sigma.inverse() @ d / 2
        return total

    with critic(TokenWeights, strength, update_discriminators=update, adversarial_loss=loss) as f:
        yield f


# ---------------------------------------------------------------------- states beyond the pairs


def states_file(seed: int, tasks: int = 2048) -> Path:
    """Returns a file of the reference's own answers to tasks that are in no pair: two per prompt,
    sampled at temperature 1, as "chosen" and "rejected". It is written at its first use."""
    path = Path("out/study") / f"seed{seed}" / "states.jsonl"
    if not path.exists():
        folder = world.build(seed)
        known = {row["prompt"] for row in read_rows(str(folder / "train.jsonl"), "train")}
        known |= {task.prompt for task in world.read_tasks(folder / "prompts.jsonl")}
        chosen = world.draw_tasks(random.Random(seed), tasks, known, distinct=True)
        lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        write_answers(path, lm, encoder_of(folder / "model"), chosen, seed)
    return path


def encoder_of(folder: Path) -> ChatEncoder:
    return ChatEncoder(AutoTokenizer.from_pretrained(folder))


def write_answers(path: Path, lm, encoder: ChatEncoder, tasks: list, seed: int):
    """Writes two answers of a model to each task, where they are whole and differ."""
    answers = world.answer(lm, encoder, tasks, 1.0, seed, samples=2)
    rows = [
        {"prompt": task.prompt, "chosen": a.text, "rejected": b.text}
        for task, a, b in zip(tasks, answers[::2], answers[1::2], strict=True)
        if a.ended
        and b.ended
        and a.text.strip() != b.text.strip() != "" != a.text.strip()
        and not encoder.special_text.search(a.text + b.text)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json_lines(rows))
    unfinished.rename(path)


@contextmanager
def states(next_batch: Callable, strength: float) -> Iterator[list[str]]:
    """Adds KL(p_theta to p_ref) on other texts to the same on the pairs, half of each.

    next_batch(run, n) is called in every forward with the number of its pairs, and returns a packed
    row of about as many pairs of other texts.
    """

    def of_tokens(run, h, r):
        return kl(log_probs(run, h), log_probs(run, r))

    def forward_pairs(run, batch):
        out = real_forward(run, batch)
        if out.distances.requires_grad:
            other = next_batch(run, len(batch.rows))
            with torch.no_grad():
                h_ref = run.ref(other, head=False).h[0]
            h = run.policy(other, head=False).h[0]
            values = of_tokens(run, h[other.gather], h_ref[other.gather])
            of_texts = masked_mean(values, other.mask) / 2
            out.distances = (out.distances + sum(of_texts.chunk(2)).mean()) / 2
        return out

    real_forward = train_ganpo.forward_pairs
    with distance(of_tokens, strength) as flags:
        with mock.patch.object(train_ganpo, "forward_pairs", forward_pairs):
            yield flags


@anchor
def reference_states(strength):
    """kl_theta on the pairs and on the reference's own answers to other prompts."""
    rows = []

    def next_batch(run, n):
        if not rows:
            tokenizer = AutoTokenizer.from_pretrained(run.args.model)
            path = str(states_file(run.args.seed))
            rows.extend(load_pairs(path, "train", tokenizer, run.args.max_length).triplets)
        batch = [rows.pop(0) for _ in range(n)]
        rows.extend(batch)
        return pack(batch)

    with states(next_batch, strength) as flags:
        yield flags


@anchor
def policy_states(strength, every=8):
    """kl_theta on the pairs and on fresh answers of the policy to their prompts, drawn anew in
    every 8th step."""
    fresh, calls = [], []

    def next_batch(run, n):
        if len(calls) % every == 0:
            folder = Path(run.args.model)
            if not calls:
                calls.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
            lm = calls[0]
            with torch.no_grad():
                for name, x in run.policy.model.named_parameters():
                    lm.get_parameter(name).copy_(whole(x))
            tasks = world.draw_tasks(random.Random(len(calls)), n, distinct=True)
            path = Path("out/study") / f"seed{run.args.seed}" / f"fresh-{os.getpid()}.jsonl"
            write_answers(path, lm, encoder_of(folder), tasks, len(calls))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            fresh[:] = load_pairs(str(path), "train", tokenizer, run.args.max_length).triplets
            path.unlink()
        calls.append(None)
        return pack(fresh)

    with states(next_batch, strength) as flags:
        yield flags


# ---------------------------------------------------------------------- a critic trained on damage


@anchor
def damage(strength):
    """The paired critic of latents, trained once on the reference against policies that DPO has
    over-trained in other orders of the data, and then frozen."""

    def update(run, kept, step):
        if step == 0:
            learn_damage(run)
        return {}

    with critic(FrozenCritic, strength, update_discriminators=update) as flags:
        yield flags


class FrozenCritic(paired.LatentCritic):
    """Reads latents, and is updated once per batch of learn_damage."""

    updates = 1


def learn_damage(run, orders=(101, 102), steps=300):
    """Trains both critics to tell the reference's latents from those of over-trained policies."""
    args, folder = run.args, Path("out/study") / f"seed{run.args.seed}"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_pairs(args.dataset, "train", tokenizer, args.max_length).triplets
    models = [load_lm(str(folder / f"damaged{k}" / "hf"), torch.float32) for k in orders]
    for step in range(steps):
        batch = pack([rows[i] for i in batch_indices(step, len(rows), 16, args.seed)])
        with torch.no_grad():
            h_ref, h = (
                lm(batch, head=False).h[0][batch.gather] for lm in (run.ref, models[step % 2])
            )
        out = SimpleNamespace(h=h, h_ref=h_ref, mask=batch.mask, per_pair={})
        settings = Namespace(disc_every=1, batch_size=16)
        trained = SimpleNamespace(
            args=settings, critics=run.critics, critic_optimizer=run.critic_optimizer
        )
        run.critics.requires_grad_(True)
        paired_update(trained, [out], 0)


paired_update = paired.update_discriminators  # the real one, while an anchor replaces it


# ---------------------------------------------------------------------- without any critic


def plain(loss: str = "dpo", **flags) -> list[str]:
    return ["--lambda_adv=0", f"--loss={loss}", *(f"--{k}={v}" for k, v in flags.items())]


@anchor
def beta(strength):
    """DPO with another beta: the anchor that everybody has."""
    yield plain(beta=strength)


@contextmanager
def preference_loss(name: str, function: Callable) -> Iterator[list[str]]:
    """Registers a preference loss for a `with` block; gives its flags."""
    with mock.patch.dict(OPO_LOSSES):
        opo_loss(name, needs_ref=True, beta=0.1)(function)
        yield plain(name)


@anchor
def sft_term(strength):
    """DPO plus `strength` times the negative log-likelihood per token of the chosen answer."""
    dpo = OPO_LOSSES["dpo"].function

    def loss(lp, beta):
        return dpo(lp, beta) + strength * sft_loss(lp.per_token()[0])

    with preference_loss("dpo_sft", loss) as flags:
        yield flags


@anchor
def chi_squared(strength):
    """Chi-squared PO (arXiv 2407.13399): DPO with the link z + log z of the ratio z = pi / pi_ref,
    clipped; `strength` is its beta."""

    def link(logp, ref_logp):
        log_ratio = logp - ref_logp
        return (log_ratio.clamp(-80, 20).exp() + log_ratio).clamp(-CLIP, CLIP)

    def loss(lp, beta):
        chosen = link(lp.logp_chosen, lp.ref_logp_chosen)
        rejected = link(lp.logp_rejected, lp.ref_logp_rejected)
        return softplus(-strength * (chosen - rejected))

    with preference_loss("chi_squared", loss) as flags:
        yield flags


CLIP = 1e4  # of the link; the paper clips at twice the largest reward over beta
