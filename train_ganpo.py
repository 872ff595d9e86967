"""GANPO: preference optimisation with a latent adversarial regulariser (arXiv 2601.22083).

    torchrun train_ganpo.py               # or python: the miniature, built at its first use
    python train_ganpo.py --model DIR --dataset pairs.jsonl
    torchrun --nproc_per_node 2 train_ganpo.py --preset gemma-2-2b-it --checkpointing    # App. B

Algorithm 1 is the first section below and reads downwards. The flags are in settings.py. A run
writes config.json, metrics.csv, eval.csv, final.csv, discriminators.pt, state/ and hf/ to
--out_dir.

Latents are hidden states of a model's last layer, after the final norm. A critic is one of the two
discriminators. `run`, the first argument of many functions, is what build() returns. [choice k] is
row k of docs/choices.md. Shapes, in all files:

    B   pairs of a step on all ranks        H   hidden size of the model
    b   pairs of a micro-batch or rank      D   width of a discriminator
    N   texts: 2b, chosen ones first        V   vocabulary
    T   tokens of a packed row              R   response tokens of a packed row
    L   tokens of the longest text
"""

import cpu  # must come before torch

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import AutoConfig, PretrainedConfig

import attention
import checkpoint
import distributed
import lora
import paired
import policy
import report
from data import InputError, PreferenceData, Triplet, load_data
from discriminator import (
    autocast_of,
    build_critics,
    critic_settings,
    step_critics,
    trains_critics,
)
from distributed import all_ranks, print0
from flags import DTYPES, command_line, refuse
from generate import quiet
from losses import (
    LN2,
    OPO_LOSSES,
    LogProbs,
    discriminator_loss,
    generator_loss,
    latent_mse,
    logged_rewards,
    relativistic_bce,
    share_above_0,
    with_settings,
)
from packing import Packed, Survey, batch_indices, pack, plan_forwards, survey, tokens_in
from settings import build_miniature, is_miniature, needs_reference, parse_args

FINAL_PROMPTS, FINAL_TEMPERATURES = 1000, (0.0, 0.7, 1.0)  # of the miniature's final table

# ---------------------------------------------------------------------- Algorithm 1, one step


def train_step(run, batches: Iterable[Packed], step: int) -> dict[str, float]:
    """One step of Algorithm 1: updates critics and policy; returns the global batch's metrics.

    batches are this rank's micro-batches of the step. step counts from 0. Everything that depends
    on the whole batch (means of scores, adversarial losses) is computed from the scores of all
    ranks and micro-batches. The rest are means over pairs. So the result does not depend on how the
    batch is divided [choice 5]. With critics the graphs of all micro-batches are kept until the
    critics have been updated; without them each micro-batch goes backward at once. Raises
    FloatingPointError before the policy's update if a metric is not finite.
    """
    args = run.args
    factor = schedule(step, run.max_steps, args.warmup)
    set_lr(run.optimizer, args.lr * factor)
    if run.critics:
        set_lr(run.critic_optimizer, args.disc_lr * factor)  # [choice 24]
        run.critics.requires_grad_(True).train()

    # lines 5-10: the batch, latents and log-probabilities of policy and reference
    kept, of_pairs, of_batch = [], [], {}
    for batch in batches:
        out = forward_pairs(run, batch)
        of_pairs.append((batch.rows, out.per_pair))
        if run.critics:
            kept.append(out)
        else:
            backward(run, out.losses.sum() / args.batch_size, out.distances.sum() / args.batch_size)

    if run.critics:
        update, adversarial = update_discriminators, adversarial_loss
        if args.critic in paired.CRITICS:  # beyond the paper
            update, adversarial = paired.update_discriminators, paired.adversarial_loss
        # lines 11-19: scores, running means, one update of the discriminators
        of_batch |= update(run, kept, step)
        # lines 20-23: the policy's loss, by the updated and now frozen discriminators [choice 6]
        run.critics.requires_grad_(False).eval()
        loss_opo = sum(out.losses.sum() for out in kept) / args.batch_size
        loss_adv = adversarial(run, kept)
        of_batch["loss_adv"] = loss_adv.detach()
        backward(run, loss_opo, loss_adv)

    # line 24: the policy's update
    of_batch["grad_norm"] = distributed.clip_gradient(run.policy, args.grad_clip)
    metrics = report.step_metrics(of_pairs, of_batch, args, step)  # raises if one is not finite
    run.optimizer.step()
    run.optimizer.zero_grad()
    metrics["lr"] = args.lr * factor
    if run.critics:
        metrics["disc_lr"] = args.disc_lr * factor
    return metrics


def two_models(run, batch: Packed, head_hook: Callable | None = None):
    """Lines 7-10: runs policy and reference on a micro-batch.

    Returns LogProbs, h_theta (T, H) and h_ref (T, H); h_ref is None without a reference. In
    backward, head_hook is called with the gradient (T, H) that the log-probabilities send to
    h_theta.
    """
    h_ref, ref_logp = None, (None, None)
    if run.ref:
        with torch.no_grad():
            ref = run.ref(batch, head=OPO_LOSSES[run.args.loss].needs_ref)
        h_ref, ref_logp = ref.h[0], (None, None) if ref.logp is None else ref.logp.chunk(2)
    out = run.policy(batch, head_hook=head_hook)
    return LogProbs(*out.logp.chunk(2), *ref_logp, *batch.lengths.chunk(2)), out.h[0], h_ref


def forward_pairs(run, batch: Packed) -> SimpleNamespace:
    """Lines 7-10 on one micro-batch; returns a namespace with what the rest of the step needs.

    losses     (b,) the preference loss of each pair, with graph
    h, h_ref   (N, L, H) latents of policy (with graph) and reference, and mask (N, L)
    distances  (b,) with --critic mse the fixed distance of Table 3; otherwise 0
    per_pair   a dict of (b,) tensors without graphs, by metric; hooks add more in backward

    Without a reference there are no latents. Raises InputError if --loss does not give one value
    per pair.
    """
    args, adversarial, per_pair = run.args, run.args.lambda_adv > 0, {}
    head_hook = report.squares_hook(per_pair, "opo_grad", batch) if adversarial else None
    give_back_memory(run)
    lp, h, h_ref = two_models(run, batch, head_hook)
    out = SimpleNamespace(losses=run.opo_loss(lp), per_pair=per_pair)
    if out.losses.shape != lp.logp_chosen.shape:  # a mean, say, would be divided by B once more
        shape = [*out.losses.shape]
        raise InputError(f"--loss {args.loss} gave shape {shape}, not one value per pair")
    chosen, rejected = (x.detach() for x in logged_rewards(lp, *run.of_rewards))
    per_pair |= {
        "loss_opo": out.losses.detach(),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "pref_acc": share_above_0(chosen - rejected),
        "tokens": sum(batch.mask.sum(1).chunk(2)),
    }
    out.distances = torch.zeros_like(per_pair["loss_opo"])
    if adversarial:
        h.register_hook(report.squares_hook(per_pair, "adv_grad", batch))
        h.register_hook(report.alignment_hook(per_pair, h_ref - h.detach(), batch))
    if run.ref:
        out.h, out.h_ref, out.mask = h[batch.gather], h_ref[batch.gather], batch.mask
        fixed = adversarial and args.critic == "mse"
        with torch.set_grad_enabled(fixed):
            of_texts = latent_mse(*map(policy.at_least_fp32, (out.h, out.h_ref)), out.mask)
            distances = sum((of_texts / 2).chunk(2))
        per_pair["latent_mse"] = distances.detach()
        if fixed:
            out.distances, per_pair["loss_adv"] = distances, distances.detach()
    return out


def own_scores(run, h: Tensor, mask: Tensor) -> Tensor:
    """Returns scores (2, b): disc_pos's of the first b texts and disc_neg's of the last b.

    h is (N, L, H), mask (N, L). With --checkpointing the critics keep only their inputs.
    """
    pos, neg = mask.chunk(2)
    inputs = ("disc_pos", h[: len(pos)], pos), ("disc_neg", h[len(pos) :], neg)
    with run.autocast():
        if run.args.checkpointing and torch.is_grad_enabled():
            scores = [recomputed(run.critics[k], *x, use_reentrant=False) for k, *x in inputs]
        else:
            scores = [run.critics[k](*x) for k, *x in inputs]
    return torch.stack(scores)


def quad_scores(run, h_ref: Tensor, h_theta: Tensor, mask: Tensor) -> Tensor:
    """Line 12: returns, for each critic, s_ref, s_theta and s_other, (2, 3, b).

    Latents are (N, L, H). s_other are the scores of the reference's latents of the pair's other
    answer: disc_pos scores those of rejected answers.
    """
    b = len(mask) // 2
    h_other, other_mask = h_ref.roll(b, 0), mask.roll(b, 0)
    # three forwards of one shape, so that equal latents get equal scores to the last bit
    inputs = (h_ref, mask), (h_theta, mask), (h_other, other_mask)
    return torch.stack([own_scores(run, h, m) for h, m in inputs], dim=1)


def update_discriminators(run, kept: list, step: int) -> dict[str, Tensor]:
    """Lines 11-19: updates the running means and, every --disc_every steps, both discriminators.

    kept holds what forward_pairs returned for each micro-batch; metrics of each pair are added to
    its per_pair. The latents are detached, so no gradient reaches the policy. Returns the global
    batch's d_ra, loss_disc_pos, loss_disc_neg (Eq 19, 20) and, after an update, disc_grad_norm.
    """
    args, metrics, losses = run.args, {"d_ra": 4 * LN2}, 0  # the constant of Eq 13 [choice 13]
    scores = []
    for out in kept:
        scores.append(quad_scores(run, out.h_ref, out.h.detach(), out.mask))
        for name, (s_ref, s_theta, _) in zip(("pos", "neg"), scores[-1].detach(), strict=True):
            out.per_pair[f"score_gap_{name}"] = s_ref - s_theta
            out.per_pair[f"disc_acc_{name}"] = share_above_0(s_ref - s_theta)
    scores = all_ranks(torch.cat(scores, dim=-1))  # (2, 3, B); this rank's part has its graph
    for (name, critic), s in zip(run.critics.items(), scores, strict=True):
        critic.update_means(*s.detach())  # lines 13-15
        mu = critic.means() if args.ema_decay else s.mean(-1)  # batch means carry gradient
        loss = discriminator_loss(*s, *mu)  # lines 16-17
        losses = losses + loss
        s_ref, s_theta, _ = s.detach()
        metrics[f"loss_{name}"] = loss.detach()
        metrics["d_ra"] = metrics["d_ra"] - relativistic_bce(s_ref, s_theta, *mu.detach()[:2])
    if step % args.disc_every == 0:  # lines 18-19 [choice 4]
        run.critic_optimizer.zero_grad()
        losses.backward()
        metrics["disc_grad_norm"] = step_critics(run)
    return metrics


def adversarial_loss(run, kept: list) -> Tensor:
    """Line 22, Eq 18: returns L_adv of the global batch, by the updated and frozen discriminators.

    Its gradient reaches the policy's latents of this rank's pairs.
    """
    args, loss = run.args, 0
    s_theta = all_ranks(torch.cat([own_scores(run, out.h, out.mask) for out in kept], dim=-1))
    if args.ema_decay == 0:
        s_ref = all_ranks(torch.cat([own_scores(run, o.h_ref, o.mask) for o in kept], dim=-1))
    for j, critic in enumerate(run.critics.values()):
        if args.ema_decay:
            loss = loss + generator_loss(s_theta[j], critic.means()[0], args.adv_loss)
        else:
            mu_ref, mu_theta = s_ref[j].mean(), s_theta[j].mean()
            loss = loss + generator_loss(s_theta[j], mu_ref, args.adv_loss, s_ref[j], mu_theta)
    return loss


def backward(run, loss_opo: Tensor, loss_adv: Tensor):
    """Line 23: adds the gradient of L_OPO + lambda L_adv to the .grad of the policy's weights.

    Both arguments hold this rank's part of the gradient. The parts have to be summed, but FSDP2
    averages over ranks, so the loss is multiplied by the number of ranks.
    """
    lambda_adv = run.args.lambda_adv
    give_back_memory(run)
    loss = loss_opo + lambda_adv * loss_adv if lambda_adv > 0 else loss_opo
    (run.ranks * loss).backward()


def give_back_memory(run):
    """With --checkpointing gives back to the system what the phase before has left in pieces, so
    that forward and backward do not need more memory with each step."""
    if run.args.checkpointing:
        cpu.give_back_freed_memory()


def schedule(step: int, max_steps: int, warmup: float) -> float:
    """Returns a step's learning rate as a share of its peak, App. B.

    (step + 1) / W for step < W = ceil(warmup * max_steps), then a cosine to 0.
    """
    warmup_steps = math.ceil(warmup * max_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / (max_steps - warmup_steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float):
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------------- before the first step


def check_input(args, device: torch.device):
    """Checks everything that can be refused before a weight is read.

    Returns the tokenizer, the policy's config, the data, and the held-out data or None without
    --eval_every. Raises InputError. Nothing here communicates between ranks.
    """
    checkpoint.check_out_dir(args)
    if (
        args.dtype == "bfloat16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported()
    ):
        raise InputError("--dtype bfloat16: this GPU does not support it; pass --dtype float32")
    distributed.check_batch_size(args.batch_size)
    config = policy.read_model_config(args.model, args.max_length)
    ref_config = policy.read_model_config(args.ref_model, args.max_length, "--ref_model")
    tokenizer = policy.read_tokenizer(args.model, args.chat_template)
    lora.check(args)
    for c in (config, ref_config):
        attention.choose(args.attention, c, device, DTYPES[args.dtype])
    if needs_reference(args) and config.hidden_size != ref_config.hidden_size:
        sizes = f"{config.hidden_size}, of the reference {ref_config.hidden_size}"
        raise InputError(f"hidden size of the policy {sizes}: their latents cannot be compared")
    data, held_out = load_data(args, tokenizer, args.max_length, print0, args.eval_every > 0)
    if args.ref_model != args.model and needs_reference(args):
        check_tokens(args, data, tokenizer, config.vocab_size, ref_config.vocab_size)
    triplets = data.triplets + (held_out.triplets if held_out else [])
    for whose, c in (("--model", config), ("--ref_model", ref_config)):
        policy.check_token_ids((ids for t in triplets for ids in t[:3]), c, whose)
    return tokenizer, config, data, held_out


def check_tokens(args, data: PreferenceData, tokenizer, size: int, ref_size: int):
    """Raises InputError if a token of the data is another one to the reference's tokenizer.

    A reference without one is taken to have the policy's if both embeddings are as large.
    """
    if not policy.has_tokenizer(args.ref_model):
        missing = f"--ref_model {args.ref_model} has no tokenizer"
        if size != ref_size:
            raise InputError(f"{missing}, and its {ref_size} tokens are not --model's {size}")
        return print0(f"{missing}: --model's is used")
    other = policy.read_tokenizer(args.ref_model, flag="--ref_model")
    used = sorted({int(i) for t in data.triplets for ids in t[:3] for i in np.unique(ids)})
    names = (x.convert_ids_to_tokens(used) for x in (tokenizer, other))
    for i, *both in zip(used, *names, strict=True):
        if both[0] != both[1]:
            raise InputError(
                f"--ref_model has another tokenizer: token {i} is {both[1]!r} there, and"
                f" {both[0]!r} of --model"
            )


def plan(args, config: PretrainedConfig, data: PreferenceData, device: torch.device) -> Survey:
    """Returns the Survey of the first epoch; prints the memory that a rank needs at least.

    Raises InputError if less than that is available.
    """
    epoch = (pairs_of(data, step, args) for step in range(data.steps(args.batch_size)))
    plans = survey(epoch, args, dist.get_world_size())
    # the forwards whose graphs are kept at once
    alive = plans.heaviest if trains_critics(args) else [plans.longest]
    with torch.device("meta"):
        critics = build_critics(args, config.hidden_size)
    needed = policy.least_memory(
        args.model,
        args.ref_model if needs_reference(args) else None,
        DTYPES[args.dtype],
        args.checkpointing,
        kept_tokens=sum(map(tokens_in, alive)),
        shards=distributed.sharing_ranks(),
        adapters=lora.adapters_of(args),
        critics=sum(p.numel() for p in critics.parameters()) if critics else 0,
    )
    print0(policy.memory_line(needed))
    policy.refuse_what_cannot_fit(needed, distributed.available_memory(device))
    return plans


def build(args, config: PretrainedConfig, device: torch.device) -> SimpleNamespace:
    """Builds models, critics and optimisers, only those that the settings need.

    Returns `run`, which the functions of this file share:

    args, device, rank and ranks (their number); train adds max_steps and signals
    policy, ref         policy.PackedLM, sharded; ref may be None, or with LoRA lora.Reference
    critics             ModuleDict of disc_pos and disc_neg, or None
    optimizer, critic_optimizer, and trained, which holds all that a state saves
    opo_loss            the preference loss as a function of LogProbs
    of_rewards          needs_ref and beta, for losses.logged_rewards
    autocast            opens the autocast of the critics
    """
    dtype, run = DTYPES[args.dtype], SimpleNamespace(args=args, device=device)
    run.rank, run.ranks = dist.get_rank(), dist.get_world_size()
    run.opo_loss = with_settings(args.loss, vars(args))
    run.of_rewards = OPO_LOSSES[args.loss].needs_ref, args.beta
    mesh = distributed.make_mesh(device, args.timeout)
    master = torch.promote_types(dtype, torch.float32)  # bf16 would round updates of 5e-7 away

    adapters, own = lora.adapters_of(args), dtype if args.lora_rank else master

    def load(flag, name, *settings, **more):
        kind = attention.choose(args.attention, AutoConfig.from_pretrained(name), device, dtype)
        loader = partial(policy.load_lm, name, *settings, attention_kind=kind, **more)
        return distributed.load_sharded(loader, mesh, device, dtype, f"{flag} {name}:")

    run.policy = load("--model", args.model, own, args.checkpointing, adapters=adapters)
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {master}
    run.optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.999), weight_decay=0.0, fused=True)
    run.ref = run.critic_optimizer = None
    if needs_reference(args):
        run.ref = lora.reference(run.policy) or load("--ref_model", args.ref_model, dtype)
        run.ref.requires_grad_(False)
    run.critics = build_critics(args, config.hidden_size)
    if run.critics:
        run.critics.to(device, master)
        distributed.assert_equal_on_ranks(run.critics)
        betas = (0.5, 0.9) if args.critic in paired.CRITICS else (0.9, 0.999)
        run.critic_optimizer = torch.optim.AdamW(  # [choice 10]
            run.critics.parameters(), args.disc_lr, betas, weight_decay=0.01, fused=True
        )
    run.trained = distributed.Trained(run.policy, run.optimizer, run.critics, run.critic_optimizer)
    run.autocast = autocast_of(device, dtype)
    return run


@torch.no_grad()
def check_start(run, batch: Packed):
    """Checks that policy and reference are one function before the first step.

    Then latents and scores are equal, rewards are 0, DPO's loss is ln 2, IPO's is 1 / (4 beta^2),
    and the critics cannot tell the two models apart. Raises FloatingPointError otherwise.
    """
    args = run.args
    lp, h, h_ref = two_models(run, batch)
    off = {"latents": (h - h_ref).abs().max() / h_ref.abs().max()}
    if OPO_LOSSES[args.loss].needs_ref:
        off["rewards"] = torch.stack(logged_rewards(lp, *run.of_rewards)).abs().max()
    known = {"dpo": LN2, "ipo": 1 / (4 * args.beta**2)}.get(args.loss)
    if known:
        off["loss"] = (run.opo_loss(lp) / known - 1).abs().max()
    if run.critics and args.critic not in paired.CRITICS:
        run.critics.eval()
        scores = quad_scores(run, h_ref[batch.gather], h[batch.gather], batch.mask)
        for name, (s_ref, s_theta, _) in zip(run.critics, scores, strict=True):
            off[f"scores of {name}"] = (s_ref - s_theta).abs().max()
            # for equal scores Eq 14-15 lies between 2 ln 2 and 2 ln 2 + Var(s) / 4
            excess = relativistic_bce(s_ref, s_theta, s_ref.mean(), s_theta.mean()) - 2 * LN2
            beyond = torch.maximum(-excess, excess - s_ref.var(correction=0) / 4)
            off[f"relativistic loss of {name}"] = beyond
    worst = torch.stack([w.double() for w in off.values()])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    tolerance = 2e-3 if args.dtype == "bfloat16" else 1e-6
    bad = [
        f"{k} by {w:.1e}" for k, w in zip(off, worst.tolist(), strict=True) if not w <= tolerance
    ]
    if not worst.isfinite().all():
        raise FloatingPointError("the models' outputs on the first batch are not finite numbers")
    if bad:
        raise FloatingPointError(
            f"policy and reference are one model, but they differ at the start: {', '.join(bad)}"
        )


def begin(run, out_dir: Path, data: PreferenceData) -> int:
    """Loads the newest state or checks the start; returns the number of finished steps.

    Raises InputError if all states are damaged, and FloatingPointError as check_start does.
    """
    args, start = run.args, 0
    if args.resume:
        manifest = checkpoint.newest_state(out_dir)
        if manifest:
            start = manifest["step"]
            checkpoint.load_state(out_dir, manifest, run.trained)
        elif any(Path(out_dir, "state").glob("step-*")):
            raise InputError(f"{out_dir}: every state is damaged; remove its state/ to begin anew")
        print0(f"resumed after step {start}")
    if start == 0 and run.ref and args.ref_model == args.model:
        check_start(run, next(micro_batches(run, data, 0)))
        print0("checked: policy and reference agree before the first step")
    elif start == 0:
        print0("policy and reference not compared: there is no reference, or it is another model")
    return start


# ---------------------------------------------------------------------- the loop


def pairs_of(data: PreferenceData, step: int, args) -> list[Triplet]:
    """Lines 5-6: returns the B pairs of a step, those of all ranks."""
    order = batch_indices(step, len(data.triplets), args.batch_size, args.seed)
    return [data.triplets[i] for i in order]


def my_forwards(run, pairs: list[Triplet]) -> list[list[Triplet]]:
    """Returns this rank's pairs, forward by forward; all ranks have equally many forwards."""
    args = run.args
    forwards = plan_forwards(pairs, run.ranks, args.micro_batch_size, args.micro_tokens)
    return [forward[run.rank] for forward in forwards]


def micro_batches(run, data: PreferenceData, step: int) -> Iterator[Packed]:
    """Yields this rank's micro-batches of a step."""
    for mine in my_forwards(run, pairs_of(data, step, run.args)):
        yield pack(mine).to(run.device)


@torch.no_grad()
def evaluate(run, triplets: list[Triplet], to_the_end: bool) -> dict | None:
    """Returns loss, accuracy, margin (exact means over held-out pairs) and the number of pairs.

    Unless to_the_end, a signal ends the evaluation early and the result is None.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=run.device)
    for mine in my_forwards(run, triplets):
        if not to_the_end and run.signals.anywhere(run.device):
            return None
        # a rank without pairs in the last forward repeats one pair, with weight 0
        lp, *_ = two_models(run, pack(mine or triplets[:1]).to(run.device))
        chosen, rejected = logged_rewards(lp, *run.of_rewards)
        loss, margin = run.opo_loss(lp), chosen - rejected
        rows = torch.stack([loss, share_above_0(margin), margin, torch.ones_like(margin)])
        totals += rows.double().sum(1) * bool(mine)
    dist.all_reduce(totals)
    loss, accuracy, margin, pairs = totals.tolist()
    return {
        "loss": loss / pairs,
        "accuracy": accuracy / pairs,
        "margin": margin / pairs,
        "pairs": int(pairs),
    }


def final_table(run, out_dir: Path):
    """Writes and prints final.csv: reference and policy on the miniature's held-out prompts."""
    from miniature import world  # imported only where it is used

    args, rows = run.args, []
    tasks = world.read_tasks(Path(args.dataset).with_name("prompts.jsonl"))[:FINAL_PROMPTS]
    for temperature in FINAL_TEMPERATURES:
        settings = {"temperature": temperature, "seed": args.seed}
        verdicts = [
            distributed.share_out(tasks, partial(world.examine, model, **settings))
            for model in (args.ref_model, out_dir / "hf")
        ]
        rows += report.compare(temperature, *verdicts)
    table = report.Table(out_dir / "final.csv", report.FINAL_COLUMNS)
    for row in rows:
        table.write(row)
    print0(report.final_lines(rows))


def train(
    args, argv: list[str], stack: ExitStack, device: torch.device, program=("train_ganpo.py",)
) -> bool:
    """Trains, evaluates, saves and exports; returns whether a signal has asked for an end.

    argv and program are those of flags.command_line. The stack holds the lock of --out_dir and the
    signal handlers. Raises InputError or FloatingPointError with one line for the user.
    """
    args.template_day = report.template_day(args)
    build_miniature(args, partial(check_input, device=device))
    tokenizer, config, data, held_out = check_input(args, device)
    plans = plan(args, config, data, device)
    out_dir = checkpoint.claim_out_dir(args, stack)
    args.out_dir = str(out_dir)
    max_steps = args.max_steps or data.steps(args.batch_size) * args.epochs
    reference = args.ref_model if needs_reference(args) else None
    run_config = report.config_of(args, device, data, held_out, max_steps)
    run_config |= checkpoint.model_fingerprints(model=args.model, ref_model=reference)
    if args.resume:
        report.check_same(report.read_config(out_dir), run_config)
    run = build(args, config, device)
    run.max_steps, last = max_steps, min(max_steps, args.stop_after or max_steps)
    run.signals = stack.enter_context(distributed.StopSignals())
    torch.manual_seed(args.seed + 1 + run.rank)  # the critics' dropout is the only noise to come
    report.print_header(run, argv, tokenizer, data, held_out, plans)
    start = begin(run, out_dir, data)
    checkpoint.check_space(out_dir, checkpoint.room_needed(run.trained, args.keep, out_dir))
    wants_table = args.eval_every > 0 and is_miniature(args.dataset, args.seed)
    ready = partial(checkpoint.open_run, out_dir, run_config, start, last, wants_table)
    if not distributed.from_rank_0(ready, "--out_dir"):
        print0(f"{out_dir} has finished its {start} steps: nothing to do")
        return False
    metrics_csv = report.Table(out_dir / "metrics.csv", report.COLUMNS, start)
    eval_csv = report.Table(out_dir / "eval.csv", report.EVAL_COLUMNS, start)

    def is_due(done):  # no row where only --stop_after ends the run
        return args.eval_every and (done % args.eval_every == 0 or done == max_steps)

    def evaluate_held_out(done):
        if result := evaluate(run, held_out.triplets, done == max_steps):
            eval_csv.write({"step": done} | result)
            values = ", ".join(f"{k} {v:.4g}" for k, v in result.items())
            print0(f"held out: step {done}, {values}")

    if start and is_due(start):
        if distributed.from_rank_0(lambda: start not in eval_csv.steps, "eval.csv"):
            evaluate_held_out(start)  # a signal had ended it
    clock = time.perf_counter()
    for step in range(start, last):
        tick = time.perf_counter()
        m = train_step(run, micro_batches(run, data, step), step)
        done, now = step + 1, time.perf_counter()
        m |= {"step": done, "seconds": now - tick, "tokens_per_s": m["tokens"] / (now - tick)}
        m |= {"tokens": int(m["tokens"]), "peak_gb": report.peak_gb(device)}
        metrics_csv.write(m)
        print0(report.log_line(m, run.max_steps, (now - clock) / (done - start) * (last - done)))
        if is_due(done):
            evaluate_held_out(done)
        stopping = run.signals.anywhere(device)
        if stopping or done == last or args.save_every and done % args.save_every == 0:
            metrics_csv.sync()
            eval_csv.sync()
            checkpoint.save_state(out_dir, done, args.keep, run.trained)
        if stopping and done < last:
            again = resume_command(program, argv, out_dir)
            print0(f"stopped after step {done}; resume with: {again}")
            return True
    print0(f"trained {last - start} steps in {time.perf_counter() - clock:.0f} s")
    if run.critics:
        path, settings = out_dir / "discriminators.pt", critic_settings(args, config.hidden_size)
        checkpoint.save_discriminators(path, run.critics, settings)
    checkpoint.export_policy(run.policy, tokenizer, out_dir / "hf")
    if wants_table:
        final_table(run, out_dir)
    print0(f"wrote {out_dir}")
    return run.signals.anywhere(device)


def resume_command(program: Iterable[str], argv: list[str], out_dir: Path) -> str:
    """Returns the program and its arguments that continue this run."""
    rest = [word for word in argv if word != "--resume"]
    if not any(word.startswith("--out_dir") for word in rest):
        rest += ["--out_dir", str(out_dir)]
    return shlex.join([*program, *rest, "--resume"])


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    program, argv = command_line(argv, "train_ganpo.py")
    try:
        args = parse_args(argv)
        miniature = is_miniature(args.model, args.seed)
        with ExitStack() as stack:
            device = stack.enter_context(distributed.session(args.timeout, miniature))
            train(args, argv, stack, device, program)
    except (InputError, FloatingPointError, OSError) as error:
        refuse(program, error)


if __name__ == "__main__":
    main()
