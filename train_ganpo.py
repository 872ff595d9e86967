"""GANPO (arXiv 2601.22083): preference optimisation with a latent adversarial regulariser, Algorithm 1.

    torchrun train_ganpo.py --preset gemma-2-2b-it                # one GPU, the settings of App. B
    torchrun --nproc_per_node 8 train_ganpo.py --preset llama-3-8b-instruct --loss simpo
    python train_ganpo.py --model DIR --dataset pairs.jsonl       # the same thing with one process

Writes config.json, metrics.csv, eval.csv, discriminators.pt, state/ and hf/ to --out_dir.
The flags are in parse_args, Algorithm 1 is train_step, the loop around it is train.
Shapes: B pairs, N = 2B sequences, T tokens, H hidden; b is B's share of one rank or micro-batch.
"""

import argparse
import csv
import json
import math
import os
import platform
import resource
import sys
import time
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from checkpoint import export_policy, latest_step, load_state, save_discriminators, save_state
from data import InputError, batch_indices, first_line, load_pairs, pack
from discriminator import build_discriminator
from losses import (
    LN2,
    OPO_LOSSES,
    LogProbs,
    discriminator_loss,
    generator_loss,
    implicit_rewards,
    latent_mse,
    relativistic_bce,
)
from policy import at_least_fp32, check_config, load_lm

# ---------------------------------------------------------------------- flags

PAPER = dict(
    lambda_adv=1.0, disc_lr_ratio=0.5, simpo_beta=10.0, disc_hidden=512, disc_dropout=0.1,  # [choice 15]
    batch_size=128, max_length=2048, dtype="bfloat16", eval_split="test", eval_every=50,
)  # fmt: skip
PRESETS = {  # what --preset sets; every flag still overrides it. App. B, and SimPO's authors for SimPO
    "mini": dict(
        model="out/mini/seed0/model", dataset="out/mini/seed0/train.jsonl", lr=1e-4,
        lambda_adv=0.1, disc_lr_ratio=10.0, simpo_beta=2.0, gamma_beta_ratio=0.5, disc_layers=2,
        disc_hidden=32, disc_dropout=0.0, batch_size=32, max_length=256, dtype="float32",
        eval_split=None, eval_every=0,
    ),
    "gemma-2-2b-it": PAPER | dict(
        model="google/gemma-2-2b-it", dataset="trl-lib/ultrafeedback_binarized", lr=5e-7,
        disc_layers=2, gamma_beta_ratio=0.5,  # [choice 9] [choice 16]
    ),
    "llama-3-8b-instruct": PAPER | dict(
        model="meta-llama/Meta-Llama-3-8B-Instruct", lr=1e-6,
        dataset="princeton-nlp/llama3-ultrafeedback-armorm", disc_layers=4, gamma_beta_ratio=0.3,
    ),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def number(kind, low, high=2**31 - 1, above=False):
    """An argparse type: a finite number in [low, high], or above low."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not low <= value <= high or above and value == low:  # nan is in no range
            raise argparse.ArgumentTypeError(f"{text} is not in {'(' if above else '['}{low}, {high}]")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of the usage of 40 flags
        raise InputError(message)


def parse_args(argv):
    # fmt: off
    positive, share = number(float, 0, above=True), number(float, 0, 1)
    count, natural = number(int, 1), number(int, 0)
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    # where a default depends on --preset, the help names what sets it there: App. B is the paper's
    group = parser.add_argument_group("what to train").add_argument
    group("--preset", choices=PRESETS, default="mini", help="settings to start from [mini: ours; the others: App. B]")
    group("--model", help="policy, a folder or a Hub id [preset]")
    group("--ref_model", help="frozen reference [the model, as in DPO]")
    group("--dataset", help="Hub id, folder, or .jsonl/.json/.parquet file (also .gz) [preset]")
    group("--split", default="train", help="[train]")
    group("--eval_split", help="held-out split, or a file of its own [preset: test; none for own data]")
    group("--chat_template", help="jinja file for a tokenizer that has none [the tokenizer's own]")
    group("--max_length", type=number(int, 2), help="tokens of prompt + response [preset: 2048, App. B]")
    group = parser.add_argument_group("preference loss").add_argument
    group("--loss", choices=OPO_LOSSES, default="dpo", help="[dpo, Eq 3-4]")
    group("--beta", type=positive, help="[0.1, App. B; simpo: 10, its authors; mini: 2]")
    group("--gamma_beta_ratio", type=number(float, 0), help="SimPO's margin / beta [preset: its authors]")
    group = parser.add_argument_group("adversarial regulariser").add_argument
    group("--lambda_adv", type=number(float, 0), help="its weight; 0 is plain DPO or SimPO [preset: 1, App. B]")
    group("--lambda_warmup", type=share, default=0.0, help="share of the steps over which it rises [0, ours]")
    group("--adv_loss", choices=["minimax", "nonsaturating"], default="minimax", help="[minimax, Eq 18]")
    group("--mean", choices=["ema", "batch"], default="ema", help="of the scores [ema, Alg. 1]")
    group("--ema_decay", type=number(float, 0, 0.999999), default=0.9, help="alpha [0.9, App. B]")
    group("--disc", choices=["transformer", "mlp", "mse"], default="transformer", help="[transformer, Fig 10]")
    group("--disc_layers", type=count, help="[preset: 2 or 4, App. B]")
    group("--disc_hidden", type=count, help="[preset: 512, Fig 10]")
    group("--disc_dropout", type=number(float, 0, 0.99), help="[preset: 0.1, Fig 10; mini: 0, ours]")
    group("--disc_lr", type=number(float, 0), help="[preset: lr / 2, App. B; mini: 10 lr, ours]")
    group("--disc_every", type=count, default=1, help="steps per discriminator update [1, Alg. 1]")
    group = parser.add_argument_group("optimisation").add_argument
    group("--lr", type=number(float, 0), help="peak [preset: App. B]")
    group("--warmup", type=share, default=0.1, help="share of the steps, cosine to 0 after it [0.1, App. B]")
    group("--weight_decay", type=number(float, 0), default=0.0, help="of the policy [0, ours]")
    group("--grad_clip", type=positive, default=1.0, help="norm of the policy's gradient [1, ours]")
    group("--batch_size", type=count, help="pairs per step over all ranks [preset: 128, App. B]")
    group("--micro_batch_size", type=count, default=8, help="pairs per forward per rank: memory only [8, ours]")
    group("--epochs", type=count, default=1, help="[1, App. B]")
    group("--max_steps", type=count, help="[all of the epochs']")
    group("--stop_after", type=count, help="end after so many steps, schedule unchanged [never]")
    group("--dtype", choices=DTYPES, help="of the compute; weights stay float32 [preset]")
    group("--checkpointing", action="store_true", help="recompute layers in backward [off, ours]")
    group = parser.add_argument_group("running").add_argument
    group("--save_every", type=natural, default=0, help="steps between states; 0: at the end only [0, ours]")
    group("--eval_every", type=natural, help="steps between held-out evaluations, 0 for none [preset: 50]")
    group("--final_eval", type=natural, default=0, help="held-out pairs to score at the end, 0 for none [0]")
    group("--seed", type=natural, default=0, help="[0]")
    group("--out_dir", help="[the next free out/run-NNN]")
    group("--resume", action="store_true", help="continue the newest state of --out_dir")
    # fmt: on
    preset = PRESETS[parser.parse_known_args(argv)[0].preset]
    parser.set_defaults(**{k: v for k, v in preset.items() if not k.startswith("eval")})
    args = parser.parse_args(argv)
    args.ref_model = args.ref_model or args.model
    if args.eval_split is None and args.dataset == preset["dataset"]:
        args.eval_split = preset["eval_split"]
    if args.eval_every is None:
        args.eval_every = preset["eval_every"] if args.eval_split else 0
    if (args.eval_every or args.final_eval) and not args.eval_split:
        raise InputError("--eval_every and --final_eval need held-out pairs: pass --eval_split")
    simpo_beta, disc_lr_ratio = args.__dict__.pop("simpo_beta"), args.__dict__.pop("disc_lr_ratio")
    if args.beta is None:
        args.beta = simpo_beta if args.loss == "simpo" else 0.1
    if args.disc_lr is None:
        args.disc_lr = disc_lr_ratio * args.lr
    if args.resume and not args.out_dir:
        raise InputError("--resume needs --out_dir")
    return args


# ---------------------------------------------------------------------- set-up


def start_distributed():
    """One path for one process and many: torchrun's rendezvous, or a store of our own that needs no port."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:  # torchrun would leave one thread to each of several processes
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, cores))
    single = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **single)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def print0(*values):
    if dist.get_rank() == 0:
        print(*values, flush=True)


def shard(lm, mesh, dtype):
    """FSDP2: one group per layer, the rest (with embedding and head, which may be tied) in the root's."""
    mixed = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in lm.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    return fully_shard(lm, mesh=mesh, mp_policy=mixed)


def check_input(args, world):
    """Everything that can be refused before a weight is read -> tokenizer, config, data, held-out data."""
    if args.batch_size % world:
        raise InputError(f"--batch_size {args.batch_size} is not divisible by {world} ranks")
    try:
        config, ref_config = (AutoConfig.from_pretrained(m) for m in (args.model, args.ref_model))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        check_config(config, args.max_length)
        check_config(ref_config, args.max_length)
    except Exception as error:  # transformers and tokenizers raise what they like
        models = args.model if args.ref_model == args.model else f"{args.model}, {args.ref_model}"
        raise InputError(f"--model {models}: {first_line(error)}") from None
    if ref_config.hidden_size != config.hidden_size and args.lambda_adv > 0:
        raise InputError(f"hidden sizes differ: {config.hidden_size}, reference {ref_config.hidden_size}")
    if args.chat_template:
        try:
            tokenizer.chat_template = Path(args.chat_template).read_text()
        except (OSError, UnicodeError) as error:
            raise InputError(f"--chat_template: {error}") from None
    data = load_pairs(args.dataset, args.split, tokenizer, args.max_length, print0)
    if len(data.triplets) < args.batch_size:
        raise InputError(f"{args.dataset}: {data.summary()}: fewer pairs than --batch_size {args.batch_size}")
    largest = max(int(ids.max()) for t in data.triplets for ids in t[:3])
    if largest >= config.vocab_size:
        raise InputError(f"token id {largest} is beyond the model's vocabulary of {config.vocab_size}")
    held_out = None
    if args.eval_every or args.final_eval:
        own_file = Path(args.eval_split).is_file()
        source = (args.eval_split, "train") if own_file else (args.dataset, args.eval_split)
        held_out = load_pairs(*source, tokenizer, args.max_length, print0)
        if not held_out.triplets:
            raise InputError(f"{source[0]}: no held-out pair is left: {held_out.summary()}")
    return tokenizer, config, data, held_out


def claim_out_dir(args):
    """--out_dir, or the next free out/run-NNN: rank 0 chooses. A folder that holds a run needs --resume."""
    choice = [args.out_dir, None]
    if dist.get_rank() == 0:
        if not args.out_dir:
            taken = [int(f.name[4:]) for f in Path("out").glob("run-*") if f.name[4:].isdigit()]
            choice[0] = f"out/run-{max(taken, default=-1) + 1:03d}"
        folder = Path(choice[0])
        if args.resume and latest_step(folder) is None:
            choice[1] = f"{folder}: no state to resume from"
        elif not args.resume and any((folder / f).exists() for f in ("config.json", "metrics.csv", "state")):
            choice[1] = f"{folder} holds a run: pass --resume, or another --out_dir"
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                choice[1] = f"--out_dir: {error}"
    dist.broadcast_object_list(choice)
    if choice[1]:
        raise InputError(choice[1])
    args.out_dir = choice[0]
    return Path(args.out_dir)


def critic_settings(args, config):
    """build_discriminator's arguments, also saved beside the weights."""
    return dict(
        kind=args.disc, hidden_size=config.hidden_size, hidden=args.disc_hidden,
        layers=args.disc_layers, dropout=args.disc_dropout, max_length=args.max_length,
        ema_decay=args.ema_decay,
    )  # fmt: skip


def build(args, config, device):
    """Models, critics and optimisers, only those that the settings need -> SimpleNamespace, `run` below."""
    mesh, dtype = init_device_mesh(device.type, (dist.get_world_size(),)), DTYPES[args.dtype]
    master = torch.promote_types(dtype, torch.float32)  # bf16 would round updates of 5e-7 away
    policy = shard(load_lm(args.model, master, args.checkpointing).to(device), mesh, dtype)
    assert {p.dtype for p in policy.parameters()} == {master}
    ref = None
    if OPO_LOSSES[args.loss].needs_ref or args.lambda_adv > 0:
        ref = shard(load_lm(args.ref_model, dtype).requires_grad_(False).to(device), mesh, dtype)
    critics = critic_optimizer = None
    if args.lambda_adv > 0 and args.disc != "mse":
        # replicated: small, and the same on every rank from one CPU seed; fork_rng keeps lambda 0 unshifted
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            settings = critic_settings(args, config)
            critics = torch.nn.ModuleDict({j: build_discriminator(**settings) for j in ("pos", "neg")})
        critics.to(device, master)
        critic_optimizer = torch.optim.AdamW(critics.parameters(), args.disc_lr, weight_decay=0.01)
        check_equal_on_ranks(critics)
    optimizer = torch.optim.AdamW(
        policy.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )
    return SimpleNamespace(
        args=args, device=device, policy=policy, optimizer=optimizer, ref=ref, critics=critics,
        critic_optimizer=critic_optimizer, rank=dist.get_rank(), world=dist.get_world_size(),
        autocast=partial(
            torch.autocast, device.type, torch.bfloat16, device.type == "cuda" and dtype == torch.bfloat16
        ),
    )  # fmt: skip


def check_equal_on_ranks(critics):
    sums = torch.stack([p.double().sum() for p in critics.parameters()])
    everywhere = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, sums)
    assert all(torch.equal(sums, other) for other in everywhere), "critics differ between ranks"


def rise(step, warmup_steps):
    """1 after a linear rise over warmup_steps, whose first step is not 0."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def schedule(step, max_steps, warmup):
    """App. B's learning rate as a share of its peak: (t + 1) / W for t < W = ceil(warmup T), cosine to 0."""
    warmup_steps = math.ceil(warmup * max_steps)
    if step < warmup_steps:
        return rise(step, warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))


# ---------------------------------------------------------------------- Algorithm 1


def all_ranks(local):
    """(..., b) of this rank -> (..., B) of all of them in rank order, this rank's part with its graph."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    parts[dist.get_rank()] = local
    return torch.cat(parts, dim=-1)


def two_models(run, batch, head_probe=None):
    """Lines 7-10: one micro-batch through policy and reference -> LogProbs and the latents of both, each
    (T, H); the reference's None where there is none."""
    h_ref, ref_logp = None, (None, None)
    if run.ref:
        with torch.no_grad():
            ref = run.ref(batch, head=OPO_LOSSES[run.args.loss].needs_ref)
        h_ref, ref_logp = ref.h[0], (None, None) if ref.logp is None else ref.logp.chunk(2)
    out = run.policy(batch, head_probe=head_probe)
    return LogProbs(*out.logp.chunk(2), *ref_logp, *batch.lengths.chunk(2)), out.h[0], h_ref


def rewards(lp, args):
    """What --loss takes for the reward of chosen and rejected, (b,) each: Eq 3-4, or SimPO's mean log-prob."""
    if OPO_LOSSES[args.loss].needs_ref:
        return implicit_rewards(*lp[:4], args.beta)
    return args.beta * lp.logp_chosen / lp.length_chosen, args.beta * lp.logp_rejected / lp.length_rejected


def quad_scores(critics, h_ref, h_theta, mask):
    """Line 12: latents (2b, L, H), chosen first -> (2, 3, b): per critic s_ref, s_theta, s_other."""
    (ref_pos, ref_neg), (theta_pos, theta_neg) = h_ref.chunk(2), h_theta.chunk(2)
    pos, neg = mask.chunk(2)
    s_pos = critics["pos"](torch.cat([ref_pos, theta_pos, ref_neg]), torch.cat([pos, pos, neg]))
    s_neg = critics["neg"](torch.cat([ref_neg, theta_neg, ref_pos]), torch.cat([neg, neg, pos]))
    return torch.stack([s_pos, s_neg]).unflatten(1, (3, -1))


def own_scores(critics, h, mask):
    """Latents (2b, L, H), chosen first -> (2, b): disc_pos on chosen, disc_neg on rejected."""
    pos, neg = mask.chunk(2)
    return torch.stack([critics["pos"](h[: len(pos)], pos), critics["neg"](h[len(pos) :], neg)])


def update_critics(run, scores, step):
    """Lines 13-19: running means, losses and one step of both discriminators, on the global scores
    (2, 3, B) of which this rank's part carries its graph -> metrics."""
    losses, metrics = [], {"d_ra": 4 * LN2}  # the constant that Eq 13 lacks [choice 13]
    for (sign, critic), s in zip(run.critics.items(), scores, strict=True):
        critic.update_means(*s.detach())
        mu = critic.means() if run.args.mean == "ema" else s.mean(-1)  # batch means carry gradient
        losses.append(discriminator_loss(*s, *mu))
        s_ref, s_theta, _ = s.detach()
        metrics["d_ra"] = metrics["d_ra"] - relativistic_bce(s_ref, s_theta, *mu.detach()[:2])
        metrics[f"loss_disc_{sign}"] = losses[-1].detach()
        metrics[f"disc_acc_{sign}"] = ((s_ref - s_theta).sign() + 1).mean() / 2  # ties count 1/2
        metrics[f"score_gap_{sign}"] = (s_ref - s_theta).mean()
    if step % run.args.disc_every == 0:  # [choice 4]
        run.critic_optimizer.zero_grad()
        sum(losses).backward()
        grads = [p.grad for p in run.critics.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)  # a sum: every rank's loss is the global one, with gradient to its own part
        for g, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(total.view_as(g))
        run.critic_optimizer.step()
        for critic in run.critics.values():
            critic.power_iterate()
        metrics["disc_grad_norm"] = flat.norm()
    return metrics


def adversarial_gradient(run, s_theta, s_ref):
    """Line 22: L_adv on the global batch of the updated discriminators' scores, (2, b) each of this rank
    -> L_adv, and its gradient with respect to this rank's s_theta (2, b)."""
    s_theta = all_ranks(s_theta.detach()).requires_grad_()
    loss = 0
    for j, critic in enumerate(run.critics.values()):
        if run.args.mean == "ema":
            mu_ref, both = critic.means()[0], ()
        else:
            s_ref_j = all_ranks(s_ref)[j]
            mu_ref, both = s_ref_j.mean(), (s_ref_j, s_theta[j].mean())
        loss = loss + generator_loss(s_theta[j], mu_ref, run.args.adv_loss, *both)
    (grad,) = torch.autograd.grad(loss, s_theta)
    return loss.detach(), grad.chunk(run.world, dim=-1)[run.rank]


def add_squares(sums, name):
    """A gradient hook that adds |gradient|^2 to sums[name]."""

    def hook(grad):
        sums[name] += at_least_fp32(grad).square().sum()

    return hook


def train_step(run, batches, step, max_steps):
    """One step of Algorithm 1 on this rank's micro-batches -> metrics of the global batch, as floats.

    Whatever depends on the whole batch (means, both adversarial losses) is computed on the scores of all
    ranks and micro-batches, so the result does not depend on how the batch is cut [choice 5]. With critics
    the graphs of all micro-batches are kept until the discriminators have moved; else each goes backward
    at once.
    """
    args, share = run.args, run.world / run.args.batch_size  # FSDP2 averages over ranks: undo, then mean
    lambda_adv = args.lambda_adv * rise(step, math.ceil(args.lambda_warmup * max_steps))
    factor = schedule(step, max_steps, args.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = args.lr * factor
    sums, kept = defaultdict(float), []  # sums over this rank's pairs; what waits for the discriminators
    probe = partial(add_squares, sums) if args.lambda_adv > 0 else lambda name: None
    if run.critics:
        run.critics.requires_grad_(True).train()

    # lines 7-10: features of policy and reference
    for batch in batches:
        lp, h, h_ref = two_models(run, batch, probe("opo_grad"))
        loss_opo = OPO_LOSSES[args.loss](lp, args)
        log_pairs(sums, lp, loss_opo, batch, args)
        if run.ref:
            if args.lambda_adv > 0:
                h.register_hook(probe("adv_grad"))
            h_theta, h_ref = h[batch.gather], h_ref[batch.gather]  # (2b, L, H)
            with torch.set_grad_enabled(args.lambda_adv > 0 and args.disc == "mse"):
                mse = latent_mse(at_least_fp32(h_theta), at_least_fp32(h_ref), batch.mask)  # (2b,)
            sums["latent_mse"] += mse.detach().sum() / 2
        if run.critics:
            with run.autocast():  # line 12, on detached latents
                scores = quad_scores(run.critics, h_ref, h_theta.detach(), batch.mask)
            kept.append((loss_opo, h_theta, h_ref if args.mean == "batch" else None, batch.mask, scores))
            continue
        loss = loss_opo.sum()
        if args.lambda_adv > 0:  # --disc mse
            loss = loss + lambda_adv * mse.sum() / 2
        (loss * share).backward()

    metrics = {}
    if run.critics:
        # lines 11-19: the discriminators
        for group in run.critic_optimizer.param_groups:
            group["lr"] = args.disc_lr * factor
        metrics = update_critics(run, all_ranks(torch.cat([k[-1] for k in kept], -1)), step)
        # lines 20-24: the policy, through the updated and now frozen discriminators [choice 6]
        run.critics.requires_grad_(False).eval()
        s_theta, s_ref = [], []
        with run.autocast():
            for _, h_theta, h_ref, mask, _ in kept:
                s_theta.append(own_scores(run.critics, h_theta, mask))
                if args.mean == "batch":
                    s_ref.append(own_scores(run.critics, h_ref, mask))
        metrics["loss_adv"], grad = adversarial_gradient(
            run, torch.cat(s_theta, -1), torch.cat(s_ref, -1) if s_ref else None
        )
        grad = grad.split([s.shape[-1] for s in s_theta], -1)
        for i, (s, g) in enumerate(zip(s_theta, grad, strict=True)):
            loss = kept[i][0].sum() * share + lambda_adv * run.world * (g * s).sum()
            kept[i] = None  # with its graph
            loss.backward()
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), args.grad_clip).full_tensor()
    metrics = reduce_metrics(sums, metrics, args)
    for name, value in metrics.items():
        if not math.isfinite(value):  # the same on every rank, and before the policy moves
            raise FloatingPointError(f"step {step + 1}: {name} is {value}; nothing of this step was saved")
    run.optimizer.step()
    run.optimizer.zero_grad()
    metrics["lr"] = args.lr * factor
    if run.critics:
        metrics["disc_lr"] = args.disc_lr * factor
    return metrics


def log_pairs(sums, lp, loss_opo, batch, args):
    """Adds a micro-batch's pairs to the sums that become metrics."""
    with torch.no_grad():
        chosen, rejected = rewards(lp, args)
        sums["loss_opo"] += loss_opo.sum()
        sums["reward_chosen"] += chosen.sum()
        sums["reward_rejected"] += rejected.sum()
        sums["pref_acc"] += ((chosen - rejected).sign() + 1).sum() / 2  # ties count 1/2
        sums["tokens"] += batch.real_tokens


def reduce_metrics(sums, metrics, args):
    """One all-reduce of the sums over pairs and one transfer to the host -> floats."""
    values = [torch.as_tensor(v, dtype=torch.float64) for v in sums.values()]
    device = metrics["grad_norm"].device
    total = torch.stack([v.to(device) for v in values])
    dist.all_reduce(total)
    total = torch.cat([total, torch.stack([v.double() for v in metrics.values()])]).tolist()
    out = dict(zip([*sums, *metrics], total, strict=True))
    for name in {"loss_opo", "reward_chosen", "reward_rejected", "pref_acc", "latent_mse"} & set(out):
        out[name] /= args.batch_size
    out["margin"] = out["reward_chosen"] - out["reward_rejected"]
    if args.lambda_adv > 0:
        adv, opo = out.pop("adv_grad"), out.pop("opo_grad")
        out["adv_to_opo_grad"] = math.sqrt(adv / opo) if opo else math.nan
        if args.disc == "mse":
            out["loss_adv"] = out["latent_mse"]
    return out


@torch.no_grad()
def check_start(run, batch):
    """Before the first step policy and reference are the same function: h_theta = h_ref, s_theta = s_ref,
    rewards 0, DPO's loss ln 2, IPO's 1 / (4 beta^2), and a pair of critics that cannot tell apart."""
    args = run.args
    lp, h, h_ref = two_models(run, batch)
    wrong = {"latents": (h - h_ref).abs().max() / h_ref.abs().max()}
    if OPO_LOSSES[args.loss].needs_ref:
        wrong["rewards"] = torch.stack(rewards(lp, args)).abs().max()
        known = {"dpo": LN2, "ipo": 1 / (4 * args.beta**2)}
        if args.loss in known:
            wrong["loss"] = (OPO_LOSSES[args.loss](lp, args) - known[args.loss]).abs().max()
    if run.critics:
        with run.autocast():
            scores = quad_scores(run.critics.eval(), h_ref[batch.gather], h[batch.gather], batch.mask)
        wrong["scores"] = (scores[:, 0] - scores[:, 1]).abs().max()
        for s_ref, s_theta, _ in scores:
            excess = relativistic_bce(s_ref, s_theta, s_ref.mean(), s_theta.mean()) - 2 * LN2
            bound = s_ref.var(correction=0) / 4
            wrong["relativistic loss"] = torch.maximum(-excess, excess - bound).clamp(min=0)
    worst = torch.stack([w.double() for w in wrong.values()])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    tolerance = 2e-3 if args.dtype == "bfloat16" else 1e-6
    bad = [f"{name} off by {w:.2e}" for name, w in zip(wrong, worst.tolist(), strict=True) if not w <= tolerance]
    if bad:
        raise FloatingPointError(
            f"policy and reference are the same model but differ before the first step: {', '.join(bad)}"
        )


# ---------------------------------------------------------------------- the loop


def micro_batches(run, data, step):
    """This rank's share of the step's pairs, as many micro-batches on every rank."""
    indices = batch_indices(step, len(data.triplets), run.args.batch_size, run.args.seed)
    mine = indices.reshape(run.world, -1)[run.rank]
    size = run.args.micro_batch_size
    for i in range(0, len(mine), size):
        yield pack([data.triplets[j] for j in mine[i : i + size]]).to(run.device)


@torch.no_grad()
def evaluate(run, triplets):
    """The preference loss on held-out pairs -> {loss, accuracy, margin, pairs}, exact means over ranks."""
    size, totals = run.args.micro_batch_size, torch.zeros(4, dtype=torch.float64, device=run.device)
    for first in range(0, len(triplets), size * run.world):
        mine = triplets[first + run.rank * size :][:size]
        # every rank runs the same number of forwards: one without pairs repeats some, with weight 0
        batch = pack(mine or triplets[:1]).to(run.device)
        lp, *_ = two_models(run, batch)
        chosen, rejected = rewards(lp, run.args)
        loss, margin = OPO_LOSSES[run.args.loss](lp, run.args), chosen - rejected
        rows = torch.stack([loss, (margin.sign() + 1) / 2, margin, torch.ones_like(margin)])
        totals += rows.double().sum(1) * bool(mine)
    dist.all_reduce(totals)
    *sums, pairs = totals.tolist()
    return dict(zip(("loss", "accuracy", "margin"), (s / pairs for s in sums), strict=True)) | {"pairs": int(pairs)}


COLUMNS = (
    "step loss_opo loss_adv loss_disc_pos loss_disc_neg d_ra reward_chosen reward_rejected margin pref_acc "
    "disc_acc_pos disc_acc_neg score_gap_pos score_gap_neg latent_mse adv_to_opo_grad grad_norm "
    "disc_grad_norm lr disc_lr tokens tokens_per_s peak_gb seconds"
).split()
EVAL_COLUMNS = "step loss accuracy margin pairs".split()


class Table:
    """A csv file on rank 0, one row per call; after a resume its rows beyond `step` are dropped first."""

    def __init__(self, path, columns, step):
        self.file = None
        if dist.get_rank() == 0:
            rows = [r for r in csv.DictReader(path.open()) if int(r["step"]) <= step] if path.exists() else []
            self.file = path.open("w", newline="")
            self.writer = csv.DictWriter(self.file, columns)
            self.writer.writeheader()
            self.writer.writerows(rows)

    def write(self, row):
        if self.file:
            self.writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
            self.file.flush()


def log_line(m, max_steps, seconds_left):
    def show(name, spec):
        return format(m[name], spec) if name in m else " " * (len(format(0.0, spec)) - 1) + "-"

    left = f"{int(seconds_left) // 3600}:{int(seconds_left) // 60 % 60:02d}:{int(seconds_left) % 60:02d}"
    return (
        f"{m['step']:>6}/{max_steps} {m['step'] / max_steps:6.1%} left {left} | opo {show('loss_opo', '7.4f')} "
        f"adv {show('loss_adv', '+8.4f')} | D {show('loss_disc_pos', '6.3f')} {show('loss_disc_neg', '6.3f')} "
        f"acc {show('disc_acc_pos', '4.2f')} {show('disc_acc_neg', '4.2f')} | "
        f"margin {show('margin', '+8.4f')} acc {show('pref_acc', '4.2f')} | "
        f"grad {show('grad_norm', '8.2e')} {m['tokens_per_s']:8.0f} tok/s"
    )


def neutral_values(args):
    """What critics that cannot tell apart would print, with one decoded column per name."""
    if args.lambda_adv == 0:
        return "lambda_adv 0: no critics"
    if args.disc == "mse":
        return "neutral values: adv 0 (mse, policy = reference)"
    sign = -1 if args.adv_loss == "minimax" else 1
    terms = 2 if args.mean == "ema" else 4
    return (
        f"neutral values (critics that cannot tell apart): adv {sign * terms * LN2:+.4f}, D {4 * LN2:.4f}, "
        f"D acc 0.50, d_ra 0, score_gap 0"
    )


def print_header(run, tokenizer, data, held_out, steps_per_epoch, max_steps):
    args = run.args
    print0(" ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None))
    per_rank = args.batch_size // run.world
    micro = math.ceil(per_rank / args.micro_batch_size)
    print0(
        f"{args.batch_size} pairs/step = {run.world} ranks x {per_rank} pairs, {micro} forwards of up to "
        f"{min(args.micro_batch_size, per_rank)}; {len(data.triplets)} pairs = {steps_per_epoch} steps/epoch, "
        f"{len(data.triplets) % args.batch_size} left over; {max_steps} steps"
    )
    print0(f"data: {data.summary()}; fingerprint {data.fingerprint}")
    if held_out:
        print0(f"held out: {held_out.summary()}")
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    critics = f"{count(run.critics):,} in both critics" if run.critics else "no critics"
    print0(f"parameters: policy {count(run.policy):,}, {critics}, {'a' if run.ref else 'no'} reference")
    print0(neutral_values(args))
    t = data.triplets[0]  # what is scored stands between the marks
    for name, ids in (("chosen", t.chosen), ("rejected", t.rejected)):
        prompt, answer = tokenizer.decode(t.prompt[-40:]), tokenizer.decode(ids[-40:])
        shown = answer if len(ids) <= 40 else tokenizer.decode(ids[:20]) + " [...] " + tokenizer.decode(ids[-20:])
        print0(f"first pair, {name}: {prompt!r} >>>{shown!r}<<< ({len(t.prompt)} + {len(ids)} tokens)")


def write_config(out_dir, args, run, data, held_out, steps_per_epoch, max_steps):
    names = ("torch", "transformers", "datasets", "numpy")
    config = vars(args) | {
        "versions": {n: version(n) for n in names} | {"python": platform.python_version()},
        "device": str(run.device),
        "ranks": run.world,
        "data": {"fingerprint": data.fingerprint, "pairs": len(data.triplets), "rows": data.n_rows,
                 "dropped": data.dropped, "notes": data.notes},
        "held_out_fingerprint": held_out.fingerprint if held_out else None,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": max_steps,
    }  # fmt: skip
    if run.rank == 0:
        (out_dir / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def train(args):
    device = start_distributed()
    tokenizer, config, data, held_out = check_input(args, dist.get_world_size())
    out_dir = claim_out_dir(args)
    steps_per_epoch = len(data.triplets) // args.batch_size
    max_steps = args.max_steps or steps_per_epoch * args.epochs
    last = min(max_steps, args.stop_after or max_steps)
    run = build(args, config, device)
    torch.manual_seed(args.seed + 1 + run.rank)  # for the critics' dropout, the only noise after this
    print_header(run, tokenizer, data, held_out, steps_per_epoch, max_steps)
    players = run.policy, run.optimizer, run.critics, run.critic_optimizer
    start = 0
    if args.resume:
        start = latest_step(out_dir)
        load_state(out_dir, start, *players)
        print0(f"resumed after step {start}")
    elif run.ref and args.ref_model == args.model:
        check_start(run, next(micro_batches(run, data, 0)))
        print0("checked: policy and reference agree before the first step")
    else:
        print0("not checked at the start: no reference, or another model")
    write_config(out_dir, args, run, data, held_out, steps_per_epoch, max_steps)
    metrics_csv = Table(out_dir / "metrics.csv", COLUMNS, start)
    eval_csv = Table(out_dir / "eval.csv", EVAL_COLUMNS, start)
    begin = time.perf_counter()
    for step in range(start, last):
        tick = time.perf_counter()
        metrics = train_step(run, micro_batches(run, data, step), step, max_steps)
        done, seconds = step + 1, time.perf_counter() - tick
        metrics |= {"step": done, "tokens": int(metrics["tokens"]), "seconds": seconds,
                    "tokens_per_s": metrics["tokens"] / seconds, "peak_gb": peak_gb(device)}  # fmt: skip
        metrics_csv.write(metrics)
        left = (time.perf_counter() - begin) / (done - start) * (last - done)
        print0(log_line(metrics, max_steps, left))
        if args.eval_every and done % args.eval_every == 0 or args.final_eval and done == last:
            pairs = held_out.triplets[: args.final_eval] if done == last and args.final_eval else held_out.triplets
            result = evaluate(run, pairs) | {"step": done}
            eval_csv.write(result)
            print0(f"held out after step {done}: " + " ".join(f"{k} {v:.4g}" for k, v in result.items()))
        if done == last or args.save_every and done % args.save_every == 0:
            save_state(out_dir, done, *players)
    export_policy(run.policy, tokenizer, out_dir / "hf")
    if run.critics:
        save_discriminators(out_dir / "discriminators.pt", run.critics, critic_settings(args, config))
    print0(f"wrote {out_dir}")
    dist.barrier()  # a rank that leaves early aborts the others
    dist.destroy_process_group()


def peak_gb(device):
    """This rank's peak: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv=None):
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        train(parse_args(sys.argv[1:] if argv is None else argv))
    except (InputError, FloatingPointError) as error:  # found by every rank, said by one
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(f"train_ganpo.py: {error}" if os.environ.get("RANK", "0") == "0" else 1)


if __name__ == "__main__":
    main()
