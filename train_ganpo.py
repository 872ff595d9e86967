"""GANPO (arXiv 2601.22083): preference optimisation with a latent adversarial regulariser,
Algorithm 1.

    torchrun train_ganpo.py               # or python: the miniature, built at first use
    python train_ganpo.py --model DIR --dataset pairs.jsonl
    torchrun --nproc_per_node 2 train_ganpo.py --preset gemma-2-2b-it --checkpointing    # App. B

Writes config.json, metrics.csv, eval.csv, final.csv, discriminators.pt, state/, hf/ to --out_dir.
The flags are in parse_args, Algorithm 1 is train_step, the loop around it is train.
Shapes: B pairs, N = 2B sequences, T tokens, H hidden; b pairs in one micro-batch or on one rank.
"""

import json
import math
import shlex
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

import attention
import distributed
import estimate
import miniature
import report
from checkpoint import (
    check_space,
    claim_out_dir,
    export_policy,
    load_state,
    newest_state,
    open_run,
    room_needed,
    save_discriminators,
    save_state,
)
from data import (
    InputError,
    batch_indices,
    load_held_out,
    load_pairs,
    pack,
    plan_forwards,
)
from discriminator import build_discriminator
from distributed import all_ranks, print0
from flags import DTYPES, Parser, at_least_0, count, fraction, natural, number, positive, refuse
from generate import quiet
from losses import (
    LN2,
    OPO_LOSSES,
    LogProbs,
    discriminator_loss,
    generator_loss,
    implicit_rewards,
    latent_mse,
    paired_discriminator_loss,
    paired_generator_loss,
    relativistic_bce,
    softplus,
    token_mean,
)
from policy import at_least_fp32, load_lm, read_model_config, read_tokenizer

# ---------------------------------------------------------------------- flags

# fmt: off
PAPER = dict(  # App. B and Fig 10 [choice 15]; beta of SimPO by its authors
    lambda_adv=1.0, disc_lr_ratio=0.5, simpo_beta=10.0, disc_hidden=512, disc_dropout=0.1,
    batch_size=128, max_length=2048, dtype="bfloat16", eval_split="test", eval_every=50,
    save_every=50, final_eval=0,
)
PAIRED = dict(lambda_adv=10.0, disc_hidden=64, disc_lr=3e-3)  # found in the miniature
PRESETS = {  # what --preset sets; every flag still overrides it
    "mini": dict(
        model="out/mini/seed{seed}/model", dataset="out/mini/seed{seed}/train.jsonl", lr=1e-4,
        lambda_adv=0.1, disc_lr_ratio=10.0, simpo_beta=2.0, gamma_beta_ratio=0.5, disc_layers=2,
        disc_hidden=32, disc_dropout=0.0, batch_size=32, max_length=256, dtype="float32",
        eval_split="out/mini/seed{seed}/test.jsonl", eval_every=32, save_every=0,
        final_eval=1000,
    ),
    "gemma-2-2b-it": PAPER | dict(
        model="google/gemma-2-2b-it", dataset="trl-lib/ultrafeedback_binarized", lr=5e-7,
        disc_layers=2, gamma_beta_ratio=0.5,  # [choice 9] [choice 16]
    ),
    "llama-3-8b-instruct": PAPER | dict(
        model="meta-llama/Meta-Llama-3-8B-Instruct", lr=1e-6, disc_layers=4, gamma_beta_ratio=0.3,
        dataset="princeton-nlp/llama3-ultrafeedback-armorm",
    ),
}
PRESETS["mini-paired"] = PRESETS["mini"] | dict(critic="paired")
FINAL_TEMPERATURES = 0.0, 0.7, 1.0
# fmt: on


def parse_args(argv):
    # fmt: off
    parser = Parser("train_ganpo.py", __doc__, "torchrun train_ganpo.py [--flag value ...]")
    # in brackets the default and where it comes from; App. B, Fig 10, Eq, Alg. 1 are the paper's
    add = parser.add_argument_group("what to train").add_argument
    add("--preset", choices=PRESETS, default="mini", help="settings to start from [mini, ours]")
    add("--model", help="the policy, a folder or a Hub id [preset]")
    add("--ref_model", help="the frozen reference [the model, as in DPO]")
    add("--dataset", help="Hub id, folder, or .jsonl/.json/.parquet, also .gz [preset]")
    add("--split", default="train", help="[train]")
    add("--eval_split", help="held-out split or a file of its own [preset; none for own data]")
    add("--chat_template", help="a jinja file [the tokenizer's own]")
    add("--max_length", type=number(int, 2), help="prompt + response tokens [2048, App. B]")
    add = parser.add_argument_group("preference loss").add_argument
    add("--loss", choices=OPO_LOSSES, default="dpo", help="[dpo, Eq 3-4]")
    add("--beta", type=positive, help="[0.1, App. B; simpo 10, its authors, mini 2]")
    add("--gamma_beta_ratio", type=at_least_0, help="SimPO gamma / beta [0.3 or 0.5, its authors]")
    add = parser.add_argument_group("adversarial regulariser").add_argument
    add("--lambda_adv", type=at_least_0, help="weight; 0: plain --loss [1, App. B; mini 0.1]")
    add("--lambda_warmup", type=fraction, default=0.0, help="share of steps of its rise [0, ours]")
    add("--adv_loss", choices=["minimax", "nonsaturating"], default="minimax", help="[Eq 18]")
    add("--mean", choices=["ema", "batch"], default="ema", help="means of the scores [ema, Alg. 1]")
    add("--ema_decay", type=number(float, 0, 0.999999), default=0.9, help="alpha [0.9, App. B]")
    add("--disc", choices=["transformer", "mlp", "mse"], default="transformer", help="[Fig 10]")
    add("--disc_layers", type=count, help="[2, for Llama 4, App. B]")
    add("--disc_hidden", type=count, help="[512, Fig 10; mini 32, ours]")
    add("--disc_dropout", type=number(float, 0, 0.99), help="[0.1, Fig 10; mini 0, ours]")
    add("--disc_lr", type=at_least_0, help="[lr / 2, App. B; mini 10 lr, ours]")
    add("--disc_padding", action="store_true", help="let it read padding, as the published code")
    add("--disc_every", type=count, default=1, help="steps per discriminator update [1, Alg. 1]")
    add = parser.add_argument_group("the paired critic, beyond the paper").add_argument
    add("--critic", choices=["paper", "paired"], help="the game [paper, Eq 18-20]")
    add("--critic_input", choices=["h", "diff"], default="diff", help="or h - h_ref [diff]")
    add("--disc_steps", type=count, default=1, help="its updates per step of the policy [1]")
    add("--r1", type=at_least_0, default=10.0, help="weight of its slopes' penalty [10]")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=at_least_0, help="peak [5e-7 Gemma, 1e-6 Llama, App. B; mini 1e-4, ours]")
    add("--warmup", type=fraction, default=0.1, help="share of steps, then cosine [0.1, App. B]")
    add("--weight_decay", type=at_least_0, default=0.0, help="of the policy [0, ours]")
    add("--grad_clip", type=positive, default=1.0, help="norm of the policy's gradient [1, ours]")
    add("--batch_size", type=count, help="pairs per step over all ranks [128, App. B; mini 32]")
    add("--micro_batch_size", type=count, default=8, help="pairs per forward and rank [8, ours]")
    add("--micro_tokens", type=count, default=16384, help="their tokens at most [16384, ours]")
    add("--epochs", type=count, default=1, help="[1, App. B]")
    add("--max_steps", type=count, help="[all of the epochs']")
    add("--stop_after", type=count, help="end after so many steps, schedule unchanged [never]")
    add("--dtype", choices=DTYPES, help="of compute; weights stay float32 [bfloat16; mini float32]")
    add("--checkpointing", action="store_true", help="recompute layers in backward [off, ours]")
    kinds = ["auto", *attention.LAYOUTS]
    add("--attention", choices=kinds, default="auto", help="[by device, precision and model]")
    add = parser.add_argument_group("running").add_argument
    add("--save_every", type=natural, help="steps between states, 0: at the end [50; mini 0]")
    add("--keep", type=count, default=2, help="newest states that stay [2]")
    add("--eval_every", type=natural, help="steps between held-out evaluations [50; mini 32]")
    add("--final_eval", type=natural, help="prompts of mini's final table [mini 1000]")
    add("--seed", type=natural, default=0, help="[0]")
    add("--out_dir", help="[the next free out/run-NNN]")
    add("--resume", action="store_true", help="continue from the newest state of --out_dir")
    add("--timeout", type=positive, default=600, help="seconds to wait for another rank [600]")
    # fmt: on
    first = parser.parse_known_args(argv)[0]
    preset, mini = (
        {k: v.format(seed=first.seed) if isinstance(v, str) else v for k, v in PRESETS[p].items()}
        for p in (first.preset, "mini")
    )
    preset["critic"] = first.critic or preset.get("critic", "paper")
    if preset["critic"] == "paired":
        preset |= PAIRED
    derived = ("simpo_beta", "disc_lr_ratio", "eval_split", "eval_every", "final_eval")
    parser.set_defaults(**{k: v for k, v in preset.items() if k not in derived})
    args = parser.parse_args(argv)
    args.ref_model = args.ref_model or args.model
    if args.beta is None:
        args.beta = preset["simpo_beta"] if args.loss == "simpo" else 0.1
    if args.disc_lr is None:
        args.disc_lr = preset["disc_lr_ratio"] * args.lr
    if args.eval_split is None and args.dataset == preset["dataset"]:
        args.eval_split = preset["eval_split"]
    if args.eval_every is None:
        args.eval_every = preset["eval_every"] if args.eval_split else 0
    if args.final_eval is None:
        args.final_eval = preset["final_eval"] if args.dataset == preset["dataset"] else 0
    if args.eval_every and not args.eval_split:
        raise InputError("--eval_every needs held-out pairs: pass --eval_split")
    if args.final_eval and args.dataset != mini["dataset"]:
        raise InputError("--final_eval is for the miniature's data only: it has an exact judge")
    if args.critic == "paired" and args.disc == "mse":
        raise InputError("--critic paired has a critic of its own: leave --disc mse out")
    if args.resume and not args.out_dir:
        raise InputError("--resume needs --out_dir")
    return args


# ---------------------------------------------------------------------- set-up


def check_input(args, world, device):
    """All that can be refused before a weight is read -> tokenizer, config, data, held-out data."""
    if (
        args.dtype == "bfloat16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported()
    ):
        raise InputError("--dtype bfloat16: this GPU cannot; pass --dtype float32")
    if args.batch_size % world:
        raise InputError(f"--batch_size {args.batch_size} is not divisible by {world} ranks")
    config = read_model_config(args.model, args.max_length)
    ref_config = read_model_config(args.ref_model, args.max_length, "--ref_model")
    tokenizer = read_tokenizer(args.model, args.chat_template)
    for c in (config, ref_config):
        attention.choose(args.attention, c, device, DTYPES[args.dtype])
    if args.lambda_adv > 0 and config.hidden_size != ref_config.hidden_size:
        sizes = f"{config.hidden_size}, of the reference {ref_config.hidden_size}"
        raise InputError(f"hidden size of the policy {sizes}: their latents cannot be compared")
    data = load_pairs(args.dataset, args.split, tokenizer, args.max_length, print0)
    if len(data.triplets) < args.batch_size:
        fewer = f"fewer pairs than --batch_size {args.batch_size}"
        raise InputError(f"{args.dataset}: {fewer}: {data.summary()}")
    largest = max(int(ids.max()) for t in data.triplets for ids in t[:3])
    if largest >= min(config.vocab_size, ref_config.vocab_size):
        raise InputError(f"token id {largest} is beyond the model's {config.vocab_size}")
    held_out = load_held_out(args, tokenizer, args.max_length, print0) if args.eval_every else None
    return tokenizer, config, data, held_out


def critic_settings(args, config):
    """build_discriminator's arguments, also saved beside the weights."""
    names = ("disc_hidden", "disc_layers", "disc_dropout")
    sizes = {name.removeprefix("disc_"): getattr(args, name) for name in names}
    common = {"max_length": args.max_length, "ema_decay": args.ema_decay}
    own = {"kind": args.disc, "hidden_size": config.hidden_size}
    if args.critic == "paired":
        own |= {"kind": "paired", "differences": args.critic_input == "diff"}
    return own | sizes | common


def build_critics(args, config):
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


def needs_reference(args):
    return OPO_LOSSES[args.loss].needs_ref or args.lambda_adv > 0


def build(args, config, device):
    """Models, critics and optimisers, only those that the settings need -> `run`, as the rest takes
    it."""
    dtype, run = DTYPES[args.dtype], SimpleNamespace(args=args, device=device)
    run.rank, run.world = dist.get_rank(), dist.get_world_size()
    mesh = distributed.make_mesh(device)
    master = torch.promote_types(dtype, torch.float32)  # bf16 would round updates of 5e-7 away

    def load(name, *settings):
        kind = attention.choose(args.attention, AutoConfig.from_pretrained(name), device, dtype)
        loader = partial(load_lm, name, *settings, attention_kind=kind)
        return distributed.load_sharded(loader, mesh, device, dtype, f"--model {name}:")

    run.policy = load(args.model, master, args.checkpointing)
    assert {p.dtype for p in run.policy.parameters()} == {master}
    run.optimizer = torch.optim.AdamW(
        run.policy.parameters(), args.lr, (0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )
    run.ref = run.critic_optimizer = None
    if needs_reference(args):
        run.ref = load(args.ref_model, dtype).requires_grad_(False)
    run.critics = build_critics(args, config)
    if run.critics:
        run.critics.to(device, master)
        distributed.assert_equal_on_ranks(run.critics)
        betas = (0.5, 0.9) if args.critic == "paired" else (0.9, 0.999)
        run.critic_optimizer = torch.optim.AdamW(  # [choice 10]
            run.critics.parameters(), args.disc_lr, betas, weight_decay=0.01, fused=True
        )
    run.autocast = autocast(device, dtype, device)
    return run


def autocast(device, dtype, tensors):
    """Of the critics' products on a device, here of tensors that may lie on another [choice 10]."""
    bf16 = device.type == "cuda" and dtype == torch.bfloat16
    return partial(torch.autocast, tensors.type, torch.bfloat16, enabled=bf16)


@contextmanager
def players_without_weights(args, config):
    """The `run` that forward_pairs takes, of tensors that have shapes only."""
    dtype, run = DTYPES[args.dtype], SimpleNamespace(args=args, ref=None)
    run.critics = build_critics(args, config)  # real, being small
    with FakeTensorMode(allow_non_fake_inputs=True):
        load = partial(load_lm, dtype=dtype, shell="cpu")
        run.policy = load(args.model, checkpointing=args.checkpointing)
        if needs_reference(args):
            run.ref = load(args.ref_model).requires_grad_(False)
        yield run


def needed_memory(args, config, cut, device, shards) -> dict[str, float]:
    """Bytes by part at the peak of a step, of models that have no weights yet."""
    dtype = DTYPES[args.dtype]
    with players_without_weights(args, config) as run:
        run.autocast = autocast(device, dtype, torch.device("cpu"))
        if attention.choose(args.attention, config, device, dtype) == "flex":
            for layer in run.policy.model.base_model.layers:  # its kernel keeps no scores
                layer.self_attn.attn_logit_softcapping = None
        forward = partial(forward_pairs, run, sums=defaultdict(float))
        return estimate.memory(run, forward, cut, shards)


def rise(step, steps):
    """From 1 / steps at step 0 linearly to 1."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def schedule(step, max_steps, warmup):
    """App. B's rate as a share of its peak: (t + 1) / W for t < W = ceil(warmup T), then cosine to
    0."""
    warmup_steps = math.ceil(warmup * max_steps)
    if step < warmup_steps:
        return rise(step, warmup_steps)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / (max_steps - warmup_steps))


# ---------------------------------------------------------------------- Algorithm 1


def two_models(run, batch, head_probe=None):
    """Lines 7-10: a micro-batch through policy and reference -> LogProbs and both latents, (T, H)
    each; the reference's are None where there is none."""
    h_ref, ref_logp = None, (None, None)
    if run.ref:
        with torch.no_grad():
            ref = run.ref(batch, head=OPO_LOSSES[run.args.loss].needs_ref)
        h_ref, ref_logp = ref.h[0], (None, None) if ref.logp is None else ref.logp.chunk(2)
    out = run.policy(batch, head_probe=head_probe)
    return LogProbs(*out.logp.chunk(2), *ref_logp, *batch.lengths.chunk(2)), out.h[0], h_ref


def rewards(lp, args):
    """What --loss takes as rewards of chosen and rejected, (b,) each: Eq 3-4, or SimPO's mean
    log-prob."""
    if OPO_LOSSES[args.loss].needs_ref:
        return implicit_rewards(*lp[:4], args.beta)
    chosen, rejected = lp.logp_chosen / lp.length_chosen, lp.logp_rejected / lp.length_rejected
    return args.beta * chosen, args.beta * rejected


def own_scores(run, h, mask):
    """Latents (2b, L, H), chosen first -> (2, b): disc_pos on chosen, disc_neg on rejected. With
    --checkpointing they too keep their inputs only."""
    pos, neg = mask.chunk(2)
    quads = ("disc_pos", h[: len(pos)], pos), ("disc_neg", h[len(pos) :], neg)
    with run.autocast():
        if run.args.checkpointing and torch.is_grad_enabled():
            scores = [checkpoint(run.critics[k], *x, use_reentrant=False) for k, *x in quads]
        else:
            scores = [run.critics[k](*x) for k, *x in quads]
    return torch.stack(scores)


def quad_scores(run, h_ref, h_theta, mask):
    """Line 12: latents (2b, L, H), chosen first -> (2, 3, b), per critic s_ref, s_theta,
    s_other."""
    b = len(mask) // 2
    h_other, other_mask = h_ref.roll(b, 0), mask.roll(b, 0)  # of the opposite sign
    # three forwards of one shape: equal latents get equal scores to the last bit
    quad = (h_ref, mask), (h_theta, mask), (h_other, other_mask)
    return torch.stack([own_scores(run, h, m) for h, m in quad], dim=1)


def update_critics(run, kept, sums, step):
    """Lines 13-19: means, losses and one update of both discriminators, on the global scores (2, 3,
    B), of which this rank's part carries its graph -> metrics."""
    scores = all_ranks(torch.cat([out.scores for _, out in kept], dim=-1))
    losses, metrics = 0, {"d_ra": 4 * LN2}  # the constant that Eq 13 lacks [choice 13]
    for (name, critic), s in zip(run.critics.items(), scores, strict=True):
        sign = name.removeprefix("disc_")
        critic.update_means(*s.detach())
        mu = critic.means() if run.args.mean == "ema" else s.mean(-1)  # these carry gradient
        loss = discriminator_loss(*s, *mu)
        losses = losses + loss
        s_ref, s_theta, _ = s.detach()
        metrics[f"loss_disc_{sign}"] = loss.detach()
        metrics[f"disc_acc_{sign}"] = ((s_ref - s_theta).sign() + 1).mean() / 2  # ties count 1/2
        metrics[f"score_gap_{sign}"] = (s_ref - s_theta).mean()
        metrics["d_ra"] = metrics["d_ra"] - relativistic_bce(s_ref, s_theta, *mu.detach()[:2])
    if step % run.args.disc_every == 0:  # [choice 4]
        run.critic_optimizer.zero_grad()
        losses.backward()  # the global loss, with gradient to this rank's own scores: hence a sum
        metrics["disc_grad_norm"] = distributed.sum_gradients(run.critics.parameters())
        run.critic_optimizer.step()
        for critic in run.critics.values():
            critic.power_iterate()  # [choice 11]
    return metrics


def adversarial_gradient(run, s_theta, s_ref):
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


def adversarial_terms(run, kept, sums, metrics):
    """Per micro-batch a scalar whose gradient is L_adv's, by the chain rule: dL_adv/ds times s."""
    s_theta, s_ref = [own_scores(run, out.h, out.mask) for _, out in kept], None
    if run.args.mean == "batch":
        s_ref = torch.cat([own_scores(run, out.h_ref, out.mask) for _, out in kept], dim=-1)
    metrics["loss_adv"], grad = adversarial_gradient(run, torch.cat(s_theta, dim=-1), s_ref)
    for g in grad.split([s.shape[-1] for s in s_theta], dim=-1):
        yield (g * s_theta.pop(0)).sum()


# ---------------------------------------------------------------------- the paired game


def by_critic(run, out):
    """For each critic its sign and it, then latents (b, L, H) of the policy and the reference with
    their mask, and the reference's of the opposite sign with theirs; in fp32 at least."""
    h, h_ref = (at_least_fp32(x).chunk(2) for x in (out.h, out.h_ref))
    mask = out.mask.chunk(2)
    for i, (name, critic) in enumerate(run.critics.items()):
        sign, o = name.removeprefix("disc_"), 1 - i
        yield sign, critic, h[i], h_ref[i], mask[i], h_ref[o], mask[o]


def paired_update(run, kept, sums, step):
    """--disc_steps updates of both critics on the step's detached latents -> metrics. Their losses
    are means over pairs, so gradients of micro-batches and ranks add up."""
    args, metrics = run.args, {}
    for inner in range(args.disc_steps if step % args.disc_every == 0 else 1):
        run.critic_optimizer.zero_grad()
        for _, out in kept:
            for sign, critic, theta, ref, mask, other, other_mask in by_critic(run, out):
                ends = [x.detach().requires_grad_() for x in critic.inputs(theta, ref)]
                scores = [critic.tokens(x) for x in ends]
                grads = torch.autograd.grad(sum(s.sum() for s in scores), ends, create_graph=True)
                slopes = sum(g.square().sum(-1) for g in grads)
                u = scores[1] - scores[0]
                loss = paired_discriminator_loss(u, slopes, mask, args.r1)
                if not critic.differences:  # a critic of texts: the reference's own two
                    loss = loss + softplus(critic(other, other_mask) - critic(ref, mask))
                (loss.sum() / args.batch_size).backward()
                if inner == 0:
                    sums[f"loss_disc_{sign}"] += loss.detach().sum()
                    won = token_mean((u.detach().sign() + 1) / 2, mask)  # ties count 1/2
                    sums[f"disc_acc_{sign}"] += won.sum()
                    sums[f"score_gap_{sign}"] += token_mean(u.detach(), mask).sum()
        if step % args.disc_every == 0:  # [choice 4]
            norm = distributed.sum_gradients(run.critics.parameters())
            metrics.setdefault("disc_grad_norm", norm)
            run.critic_optimizer.step()
    return metrics


def paired_terms(run, kept, sums, metrics):
    """Per micro-batch half the sum of both critics' losses for the policy, as a mean over pairs."""
    while kept:  # the caller takes them one by one
        out, losses = kept[0][1], 0
        for _, critic, theta, ref, mask, *_ in by_critic(run, out):
            x_theta, x_ref = critic.inputs(theta, ref)
            u = critic.tokens(x_ref) - critic.tokens(x_theta)
            losses = losses + paired_generator_loss(u, mask) / 2
        sums["loss_adv"] += losses.detach().sum()
        yield losses.sum() / run.args.batch_size


def forward_pairs(run, batch, sums):
    """Lines 7-12 on one micro-batch -> what the step needs of it, with graphs: losses (b,); latents
    h and h_ref (2b, L, H) with their mask, or mse (b,) for --disc mse; scores of detached latents
    (2, 3, b). Adds to the sums over pairs that become metrics."""
    args, adversarial = run.args, run.args.lambda_adv > 0
    out = SimpleNamespace(scores=None)
    probe = add_squares(sums, "opo_grad") if adversarial else None
    lp, h, h_ref = two_models(run, batch, probe)
    out.losses = OPO_LOSSES[args.loss](lp, args)
    sum_pairs(sums, lp, out.losses, batch, args)
    if adversarial:
        out.way = h_ref - h.detach()
        h.register_hook(add_squares(sums, "adv_grad"))
        h.register_hook(add_alignment(sums, out.way))
    if run.ref:
        out.h, h_ref, out.mask = h[batch.gather], h_ref[batch.gather], batch.mask
        with torch.set_grad_enabled(adversarial and args.disc == "mse"):
            out.mse = latent_mse(at_least_fp32(out.h), at_least_fp32(h_ref), batch.mask) / 2
        sums["latent_mse"] += out.mse.detach().sum()
    if run.critics:
        if args.disc_padding:
            out.mask = torch.ones_like(batch.mask)
        if args.critic == "paper":
            out.scores = quad_scores(run, h_ref, out.h.detach(), out.mask)
        out.h_ref = h_ref if args.critic == "paired" or args.mean == "batch" else None
    return out


def train_step(run, batches, step):
    """One step of Algorithm 1 on this rank's micro-batches -> metrics of the global batch, floats.

    What depends on the whole batch (means, both adversarial losses) is computed from the scores of
    all ranks and micro-batches, so the result does not depend on how the batch is cut [choice 5].
    With critics the graphs of all micro-batches are kept until the discriminators have moved;
    otherwise each micro-batch goes backward at once.
    """
    args, adversarial = run.args, run.args.lambda_adv > 0
    lambda_adv = args.lambda_adv * rise(step, math.ceil(args.lambda_warmup * run.max_steps))
    factor = schedule(step, run.max_steps, args.warmup)
    set_lr(run.optimizer, args.lr * factor)
    share = run.world / args.batch_size  # FSDP2 averages over ranks; the loss is a mean over pairs
    sums, kept = defaultdict(float), []  # over this rank's pairs; what waits for the discriminators
    per_pair = []  # (rows, values of each), to name the pairs if something is not finite
    if run.critics:
        set_lr(run.critic_optimizer, args.disc_lr * factor)
        run.critics.requires_grad_(True).train()

    # lines 5-12: the batch, features of policy and reference, their scores
    for batch in batches:
        out = forward_pairs(run, batch, sums)
        per_pair += [
            (batch.rows, x.detach()) for x in (out.losses[None], out.scores) if x is not None
        ]
        loss = out.losses.sum() * share
        if run.critics:
            kept.append((loss, out))
        else:
            (loss + lambda_adv * share * out.mse.sum() if adversarial else loss).backward()

    metrics = {}
    if run.critics:
        game = {
            "paper": (update_critics, adversarial_terms),
            "paired": (paired_update, paired_terms),
        }
        update, terms = game[args.critic]
        # lines 13-19: the discriminators
        metrics |= update(run, kept, sums, step)
        # lines 20-24: the policy, through the updated and now frozen discriminators [choice 6]
        run.critics.requires_grad_(False).eval()
        for term in terms(run, kept, sums, metrics):
            loss, _ = kept.pop(0)
            (loss + lambda_adv * run.world * term).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), args.grad_clip)
    metrics["grad_norm"] = norm.full_tensor()
    metrics = reduce_metrics(sums, metrics, args)
    for name, value in metrics.items():  # the same on every rank, and before the policy moves
        if not math.isfinite(value):
            rows = offenders(per_pair)
            raise FloatingPointError(
                f"step {step + 1}: {name} is {value}; the step was not taken; rows of the data"
                f" (from 0): {', '.join(map(str, rows))}"
            )
    run.optimizer.step()
    run.optimizer.zero_grad()
    metrics["lr"] = args.lr * factor
    if run.critics:
        metrics["disc_lr"] = args.disc_lr * factor
    return metrics


def offenders(per_pair) -> list[int]:
    """The rows, on all ranks, of which some value is not finite; all of the step's if it was only a
    gradient."""
    mine = [
        (row, finite)
        for rows, values in per_pair
        for row, finite in zip(rows, values.isfinite().flatten(0, -2).all(0).tolist(), strict=True)
    ]
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    found = [pair for share in shares for pair in share]
    return sorted({row for row, finite in found if not finite} or {row for row, _ in found})


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def add_alignment(sums, towards):
    """A gradient hook: the cosine, token by token, of the push -gradient with `towards` (T, H), the
    way to the reference."""

    def hook(grad):
        cosines = F.cosine_similarity(-at_least_fp32(grad), at_least_fp32(towards), dim=-1)
        sums["adv_align"] += cosines.sum()
        sums["adv_tokens"] += cosines.numel()

    return hook


def add_squares(sums, name):
    """A gradient hook that adds |gradient|^2 to sums[name]."""

    def hook(grad):
        sums[name] += at_least_fp32(grad).square().sum()

    return hook


@torch.no_grad()
def sum_pairs(sums, lp, losses, batch, args):
    """Adds a micro-batch to the sums over pairs that become metrics."""
    chosen, rejected = rewards(lp, args)
    sums["loss_opo"] += losses.sum()
    sums["reward_chosen"] += chosen.sum()
    sums["reward_rejected"] += rejected.sum()
    sums["pref_acc"] += ((chosen - rejected).sign() + 1).sum() / 2  # ties count 1/2
    sums["tokens"] += batch.real_tokens


def reduce_metrics(sums, metrics, args):
    """One all-reduce of the sums over pairs, one transfer to the host -> floats."""
    device = metrics["grad_norm"].device
    total = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=device) for v in sums.values()]
    )
    dist.all_reduce(total)
    values = torch.cat([total, torch.stack([v.double() for v in metrics.values()])]).tolist()
    m = dict(zip([*sums, *metrics], values, strict=True))
    for name in {*sums} - {"tokens", "adv_grad", "opo_grad", "adv_align", "adv_tokens"}:
        m[name] /= args.batch_size
    m["margin"] = m["reward_chosen"] - m["reward_rejected"]
    if args.lambda_adv > 0:
        adv, opo = m.pop("adv_grad"), m.pop("opo_grad")
        m["adv_align"] /= m.pop("adv_tokens")
        if opo:
            m["adv_to_opo_grad"] = math.sqrt(adv / opo)
        m.setdefault("loss_adv", m["latent_mse"])  # --disc mse
    return m


@torch.no_grad()
def check_start(run, batch):
    """Before the first step policy and reference are one function: equal latents and scores,
    rewards 0, DPO's loss ln 2, IPO's 1 / (4 beta^2), critics that cannot tell apart.
    FloatingPointError if not."""
    args = run.args
    lp, h, h_ref = two_models(run, batch)
    off = {"latents": (h - h_ref).abs().max() / h_ref.abs().max()}
    if OPO_LOSSES[args.loss].needs_ref:
        off["rewards"] = torch.stack(rewards(lp, args)).abs().max()
    known = {"dpo": LN2, "ipo": 1 / (4 * args.beta**2)}.get(args.loss)
    if known:
        off["loss"] = (OPO_LOSSES[args.loss](lp, args) / known - 1).abs().max()
    if run.critics and args.critic == "paper":
        run.critics.eval()
        for s in quad_scores(run, h_ref[batch.gather], h[batch.gather], batch.mask):
            s_ref, s_theta, _ = s
            excess = relativistic_bce(s_ref, s_theta, s_ref.mean(), s_theta.mean()) - 2 * LN2
            beyond = torch.maximum(-excess, excess - s_ref.var(correction=0) / 4)  # of [0, Var / 4]
            off[f"scores {len(off)}"] = (s_ref - s_theta).abs().max()
            off[f"relativistic loss {len(off)}"] = beyond
    worst = torch.stack([w.double() for w in off.values()])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    tolerance = 2e-3 if args.dtype == "bfloat16" else 1e-6
    bad = [
        f"{k} by {w:.1e}" for k, w in zip(off, worst.tolist(), strict=True) if not w <= tolerance
    ]
    if bad:
        raise FloatingPointError(
            f"policy and reference, one model, differ at the start: {', '.join(bad)}"
        )


# ---------------------------------------------------------------------- the loop


def pairs_of(data, step, args):
    order = batch_indices(step, len(data.triplets), args.batch_size, args.seed)
    return [data.triplets[i] for i in order]


def my_forwards(run, pairs):
    """This rank's share of the pairs, forward by forward, as many on every rank."""
    args = run.args
    parts = plan_forwards(pairs, run.world, args.micro_batch_size, args.micro_tokens)
    return [part[run.rank] for part in parts]


def micro_batches(run, data, step):
    for mine in my_forwards(run, pairs_of(data, step, run.args)):
        yield pack(mine).to(run.device)


@torch.no_grad()
def evaluate(run, triplets):
    """Held-out pairs under --loss -> loss, accuracy, margin, exact means over pairs and ranks; None
    if a signal ends it."""
    totals = torch.zeros(4, dtype=torch.float64, device=run.device)
    for mine in my_forwards(run, triplets):
        if run.signals.anywhere(run.device):
            return None
        # a rank without pairs in the last forward repeats one, with weight 0
        lp, *_ = two_models(run, pack(mine or triplets[:1]).to(run.device))
        chosen, rejected = rewards(lp, run.args)
        loss, margin = OPO_LOSSES[run.args.loss](lp, run.args), chosen - rejected
        rows = torch.stack([loss, (margin.sign() + 1) / 2, margin, torch.ones_like(margin)])
        totals += rows.double().sum(1) * bool(mine)
    dist.all_reduce(totals)
    loss, accuracy, margin, pairs = totals.tolist()
    return {
        "loss": loss / pairs,
        "accuracy": accuracy / pairs,
        "margin": margin / pairs,
        "pairs": int(pairs),
    }


def final_table(run, out_dir):
    """Reference and trained policy on the miniature's held-out prompts, shared among the ranks."""
    args, rows = run.args, []
    prompts = Path(args.dataset).with_name("prompts.jsonl")
    tasks = miniature.read_tasks(prompts)[: args.final_eval]
    for temperature in FINAL_TEMPERATURES:
        settings = {"temperature": temperature, "seed": args.seed}
        verdicts = [
            distributed.share_out(tasks, partial(miniature.examine, model, **settings))
            for model in (args.ref_model, out_dir / "hf")
        ]
        rows += report.compare(temperature, *verdicts)
    table = report.Table(out_dir / "final.csv", report.FINAL_COLUMNS)
    for row in rows:
        table.write(row)
    print0(report.final_lines(rows))


def begin(run, out_dir, data) -> int:
    """Takes up the newest state, or checks the start -> the number of steps that are done."""
    args, start = run.args, 0
    if args.resume:
        manifest = newest_state(out_dir)
        if manifest:
            start = manifest["step"]
            load_state(out_dir, manifest, *run.players)
        elif any(Path(out_dir, "state").glob("step-*")):
            raise InputError(f"{out_dir}: no state is whole; remove its state/ to begin anew")
        print0(f"resumed after step {start}")
    if start == 0 and run.ref and args.ref_model == args.model:
        check_start(run, next(micro_batches(run, data, 0)))
        print0("checked: policy and reference agree before the first step")
    elif start == 0:
        print0("not checked before the first step: no reference, or another model")
    return start


def train(args, argv, stack):
    device = distributed.start(args.timeout)
    world = miniature.ROOT / f"seed{args.seed}"
    if world in (Path(args.model).parent, Path(args.dataset).parent):  # built at first use
        distributed.from_rank_0(lambda: miniature.build(args.seed, log=print0), "miniature:")
    tokenizer, config, data, held_out = check_input(args, dist.get_world_size(), device)
    epoch = (pairs_of(data, step, args) for step in range(len(data.triplets) // args.batch_size))
    cut = estimate.survey(epoch, args, dist.get_world_size())
    needs = needed_memory(args, config, cut, device, distributed.sharing_ranks())
    estimate.refuse_what_cannot_fit(needs, device)
    out_dir = claim_out_dir(args, stack)
    args.out_dir = str(out_dir)
    run = build(args, config, device)
    run.signals = stack.enter_context(distributed.StopSignals())
    run.players = run.policy, run.optimizer, run.critics, run.critic_optimizer
    run.steps_per_epoch = len(data.triplets) // args.batch_size
    run.max_steps = args.max_steps or run.steps_per_epoch * args.epochs
    last = min(run.max_steps, args.stop_after or run.max_steps)
    torch.manual_seed(args.seed + 1 + run.rank)  # the critics' dropout is the only noise to come
    report.print_header(run, tokenizer, data, held_out, cut, needs)
    run_config = json.loads(json.dumps(report.config_of(run, data, held_out)))
    if args.resume:
        report.check_same(report.read_config(out_dir), run_config)
    start = begin(run, out_dir, data)
    check_space(out_dir, room_needed(run, out_dir))
    if not distributed.from_rank_0(lambda: open_run(out_dir, run_config, start, last), "--out_dir"):
        print0(f"{out_dir} has finished its {start} steps: nothing to do")
        return distributed.stop()
    metrics_csv = report.Table(out_dir / "metrics.csv", report.COLUMNS, start)
    eval_csv = report.Table(out_dir / "eval.csv", report.EVAL_COLUMNS, start)

    def held_out_row(done):
        if result := evaluate(run, held_out.triplets):
            eval_csv.write({"step": done} | result)
            print0(
                f"held out: step {done}, " + ", ".join(f"{k} {v:.4g}" for k, v in result.items())
            )

    if args.eval_every and start and start % args.eval_every == 0:
        if distributed.from_rank_0(lambda: start not in eval_csv.steps, "eval.csv"):
            held_out_row(start)  # a signal had ended it
    clock = time.perf_counter()
    for step in range(start, last):
        tick = time.perf_counter()
        m = train_step(run, micro_batches(run, data, step), step)
        done, now = step + 1, time.perf_counter()
        m |= {"step": done, "seconds": now - tick, "tokens_per_s": m["tokens"] / (now - tick)}
        m |= {"tokens": int(m["tokens"]), "peak_gb": report.peak_gb(device)}
        metrics_csv.write(m)
        print0(report.log_line(m, run.max_steps, (now - clock) / (done - start) * (last - done)))
        if args.eval_every and done % args.eval_every == 0:
            held_out_row(done)
        stopping = run.signals.anywhere(device)
        if stopping or done == last or args.save_every and done % args.save_every == 0:
            metrics_csv.sync()
            eval_csv.sync()
            save_state(out_dir, done, args.keep, *run.players)
        if stopping and done < last:
            print0(f"stopped after step {done}; resume with: {resume_command(argv, out_dir)}")
            return distributed.stop()
    print0(f"trained {last - start} steps in {time.perf_counter() - clock:.0f} s")
    if run.critics:
        path = out_dir / "discriminators.pt"
        save_discriminators(path, run.critics, critic_settings(args, config))
    export_policy(run.policy, tokenizer, out_dir / "hf")
    if args.final_eval:
        final_table(run, out_dir)
    print0(f"wrote {out_dir}")
    distributed.stop()


def resume_command(argv, out_dir) -> str:
    rest = [word for word in argv if word != "--resume"]
    if not any(word.startswith("--out_dir") for word in rest):
        rest += ["--out_dir", str(out_dir)]
    return shlex.join(["train_ganpo.py", *rest, "--resume"])


def main(argv=None):
    quiet()
    argv = sys.argv[1:] if argv is None else argv
    try:
        with ExitStack() as stack:
            train(parse_args(argv), argv, stack)
    except (InputError, FloatingPointError, OSError) as error:
        refuse("train_ganpo.py", error)


if __name__ == "__main__":
    main()
