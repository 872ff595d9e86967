"""GANPO (arXiv 2601.22083): preference optimisation with a latent adversarial regulariser,
Algorithm 1.

    torchrun train_ganpo.py               # or python: the miniature, built at first use
    python train_ganpo.py --model DIR --dataset pairs.jsonl
    torchrun --nproc_per_node 2 train_ganpo.py --preset gemma-2-2b-it --checkpointing    # App. B

Writes config.json, metrics.csv, eval.csv, final.csv, discriminators.pt, state/, hf/ to --out_dir.
The flags are in settings.py, Algorithm 1 is train_step, the loop around it is train.
Shapes: B pairs, T tokens of a packed row, L of a sequence, H hidden; b pairs in one micro-batch or
on one rank.
"""

import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

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
    Packed,
    PreferenceData,
    Triplet,
    batch_indices,
    load_held_out,
    load_pairs,
    pack,
    plan_forwards,
)
from distributed import print0
from flags import DTYPES, refuse
from game import GAMES, autocast, build_critics, critic_settings, quad_scores
from generate import quiet
from losses import (
    LN2,
    OPO_LOSSES,
    LogProbs,
    latent_mse,
    needs_reference,
    relativistic_bce,
    rewards,
    share_above_0,
)
from metrics import (
    add_alignment,
    add_squares,
    reduce_metrics,
    refuse_what_is_not_finite,
    sum_pairs,
)
from policy import at_least_fp32, load_lm, read_model_config, read_tokenizer
from settings import parse_args

FINAL_TEMPERATURES = 0.0, 0.7, 1.0

# ---------------------------------------------------------------------- set-up


def check_input(args, device: torch.device):
    """All that can be refused before a weight is read -> tokenizer, config, data, held-out data."""
    if (
        args.dtype == "bfloat16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported()
    ):
        raise InputError("--dtype bfloat16: this GPU cannot; pass --dtype float32")
    distributed.check_batch_size(args.batch_size)
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


def build(args, config: PretrainedConfig, device: torch.device) -> SimpleNamespace:
    """Models, critics and optimisers, only those that the settings need -> `run`, which the rest
    takes: args, device, rank, world; policy and ref (policy.PackedLM, sharded; ref may be None),
    critics (ModuleDict of disc_pos and disc_neg, or None), their optimizer and critic_optimizer,
    autocast() for the critics. train adds players, signals and max_steps."""
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


def schedule(step: int, max_steps: int, warmup: float) -> float:
    """App. B's rate as a share of its peak: (t + 1) / W for t < W = ceil(warmup T), then cosine to
    0."""
    warmup_steps = math.ceil(warmup * max_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / (max_steps - warmup_steps))


# ---------------------------------------------------------------------- Algorithm 1


def two_models(run, batch: Packed, head_probe: Callable | None = None):
    """Lines 7-10: a micro-batch through policy and reference -> LogProbs and both latents, (T, H)
    each; the reference's are None where there is none."""
    h_ref, ref_logp = None, (None, None)
    if run.ref:
        with torch.no_grad():
            ref = run.ref(batch, head=OPO_LOSSES[run.args.loss].needs_ref)
        h_ref, ref_logp = ref.h[0], (None, None) if ref.logp is None else ref.logp.chunk(2)
    out = run.policy(batch, head_probe=head_probe)
    return LogProbs(*out.logp.chunk(2), *ref_logp, *batch.lengths.chunk(2)), out.h[0], h_ref


def forward_pairs(run, batch: Packed, sums: dict) -> SimpleNamespace:
    """Lines 7-12 on one micro-batch -> what the step needs of it, with graphs: losses (b,); latents
    h and h_ref (2b, L, H) with their mask; mse (2b,) for --disc mse; scores of detached latents (2,
    3, b); and watched, without graphs, what should be finite of each pair. Adds to the sums over
    pairs that become metrics. InputError if --loss does not give one value per pair."""
    args, adversarial, out = run.args, run.args.lambda_adv > 0, SimpleNamespace()
    probe = add_squares(sums, "opo_grad") if adversarial else None
    lp, h, h_ref = two_models(run, batch, probe)
    out.losses = OPO_LOSSES[args.loss](lp, args)
    if out.losses.shape != lp.logp_chosen.shape:  # a mean, say, would be divided by B again
        raise InputError(f"--loss {args.loss}: shape {[*out.losses.shape]}, not one value per pair")
    out.watched = [out.losses.detach()]
    sum_pairs(sums, lp, out.losses, batch, args)
    if adversarial:
        # in `out`, though a hook alone reads it: estimate.py counts what `out` and autograd keep
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
        if GAMES[args.critic].needs_scores:
            out.scores = quad_scores(run, h_ref, out.h.detach(), out.mask)
            out.watched.append(out.scores.detach())
        out.h_ref = h_ref if not GAMES[args.critic].needs_scores or args.mean == "batch" else None
    return out


def train_step(run, batches: Iterable[Packed], step: int) -> dict[str, float]:
    """One step of Algorithm 1 on this rank's micro-batches -> metrics of the global batch, floats.

    What depends on the whole batch (means, both adversarial losses) is computed from the scores of
    all ranks and micro-batches, and what does not is a mean over pairs, so the result does not
    depend on how the batch is cut [choice 5].
    With critics the graphs of all micro-batches are kept until the discriminators have moved;
    otherwise each micro-batch goes backward at once.
    """
    args, adversarial = run.args, run.args.lambda_adv > 0
    factor = schedule(step, run.max_steps, args.warmup)
    set_lr(run.optimizer, args.lr * factor)
    sums, kept = defaultdict(float), []  # over this rank's pairs; what waits for the discriminators
    watched = []  # to name the pairs if something is not finite
    if run.critics:
        set_lr(run.critic_optimizer, args.disc_lr * factor)
        run.critics.requires_grad_(True).train()

    # lines 5-12: the batch, features of policy and reference, their scores
    for batch in batches:
        out = forward_pairs(run, batch, sums)
        out.loss = out.losses.sum() / args.batch_size  # this rank's part of a mean over pairs
        watched.append((batch.rows, out.watched))
        if run.critics:
            kept.append(out)
        else:
            backward(run, out.loss, out.mse.sum() / args.batch_size if adversarial else 0)

    metrics = {}
    if run.critics:
        game = GAMES[args.critic]
        # lines 13-19: the discriminators
        metrics |= game.update(run, kept, sums, step)
        # lines 20-24: the policy, through the updated and now frozen discriminators [choice 6]
        run.critics.requires_grad_(False).eval()
        for loss, term in game.terms(run, kept, sums, metrics):
            backward(run, loss, term)
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), args.grad_clip)
    metrics["grad_norm"] = norm.full_tensor()
    metrics = reduce_metrics(sums, metrics, args)
    refuse_what_is_not_finite(metrics, watched, step)  # before the policy moves
    run.optimizer.step()
    run.optimizer.zero_grad()
    metrics["lr"] = args.lr * factor
    if run.critics:
        metrics["disc_lr"] = args.disc_lr * factor
    return metrics


def backward(run, loss: Tensor, term: Tensor | int):
    """Line 23, of this rank's parts of L_OPO and L_adv. FSDP2 averages gradients over ranks where
    these parts add up: hence times their number."""
    (run.world * (loss + run.args.lambda_adv * term)).backward()


def set_lr(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def check_start(run, batch: Packed):
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
    if run.critics and GAMES[args.critic].needs_scores:
        run.critics.eval()
        scores = quad_scores(run, h_ref[batch.gather], h[batch.gather], batch.mask)
        for name, (s_ref, s_theta, _) in zip(run.critics, scores, strict=True):
            off[f"scores of {name}"] = (s_ref - s_theta).abs().max()
            # of equal scores Eq 14-15 is between 2 ln 2 and 2 ln 2 + Var(s) / 4
            excess = relativistic_bce(s_ref, s_theta, s_ref.mean(), s_theta.mean()) - 2 * LN2
            beyond = torch.maximum(-excess, excess - s_ref.var(correction=0) / 4)
            off[f"relativistic loss of {name}"] = beyond
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


def pairs_of(data: PreferenceData, step: int, args) -> list[Triplet]:
    order = batch_indices(step, len(data.triplets), args.batch_size, args.seed)
    return [data.triplets[i] for i in order]


def my_forwards(run, pairs: list[Triplet]) -> list[list[Triplet]]:
    """This rank's share of the pairs, forward by forward, as many on every rank."""
    args = run.args
    parts = plan_forwards(pairs, run.world, args.micro_batch_size, args.micro_tokens)
    return [part[run.rank] for part in parts]


def micro_batches(run, data: PreferenceData, step: int) -> Iterator[Packed]:
    for mine in my_forwards(run, pairs_of(data, step, run.args)):
        yield pack(mine).to(run.device)


@torch.no_grad()
def evaluate(run, triplets: list[Triplet], to_the_end: bool) -> dict | None:
    """Held-out pairs under --loss -> loss, accuracy, margin, exact means over pairs and ranks; None
    if a signal ends it, which otherwise has to wait."""
    totals = torch.zeros(4, dtype=torch.float64, device=run.device)
    for mine in my_forwards(run, triplets):
        if not to_the_end and run.signals.anywhere(run.device):
            return None
        # a rank without pairs in the last forward repeats one, with weight 0
        lp, *_ = two_models(run, pack(mine or triplets[:1]).to(run.device))
        chosen, rejected = rewards(lp, run.args)
        loss, margin = OPO_LOSSES[run.args.loss](lp, run.args), chosen - rejected
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


def plan(
    args, config: PretrainedConfig, data: PreferenceData, device: torch.device
) -> estimate.Survey:
    """How an epoch's steps will be cut into forwards. InputError if their memory cannot fit."""
    epoch = (pairs_of(data, step, args) for step in range(data.steps(args.batch_size)))
    cut, shards = estimate.survey(epoch, args, dist.get_world_size()), distributed.sharing_ranks()
    needs = estimate.needed_memory(forward_pairs, args, config, cut, device, shards)
    print0(estimate.gigabytes(needs))
    estimate.refuse_what_cannot_fit(needs, device)
    return cut


def begin(run, out_dir: Path, data: PreferenceData) -> int:
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


def train(args, argv: list[str], stack: ExitStack, device: torch.device) -> bool:
    """The loop -> whether a signal has asked for an end."""
    miniature.build_if_used(args.seed, args.model, args.dataset)
    tokenizer, config, data, held_out = check_input(args, device)
    cut = plan(args, config, data, device)
    out_dir = claim_out_dir(args, stack)
    args.out_dir = str(out_dir)
    max_steps = args.max_steps or data.steps(args.batch_size) * args.epochs
    run_config = report.config_of(args, device, data, held_out, max_steps)
    if args.resume:
        report.check_same(report.read_config(out_dir), run_config)
    run = build(args, config, device)
    run.max_steps, last = max_steps, min(max_steps, args.stop_after or max_steps)
    run.signals = stack.enter_context(distributed.StopSignals())
    run.players = run.policy, run.optimizer, run.critics, run.critic_optimizer
    torch.manual_seed(args.seed + 1 + run.rank)  # the critics' dropout is the only noise to come
    report.print_header(run, tokenizer, data, held_out, cut)
    start = begin(run, out_dir, data)
    check_space(out_dir, room_needed(run, out_dir))
    if not distributed.from_rank_0(lambda: open_run(out_dir, run_config, start, last), "--out_dir"):
        print0(f"{out_dir} has finished its {start} steps: nothing to do")
        return False
    metrics_csv = report.Table(out_dir / "metrics.csv", report.COLUMNS, start)
    eval_csv = report.Table(out_dir / "eval.csv", report.EVAL_COLUMNS, start)

    def is_due(done):  # --stop_after is no end: an undisturbed run has no row there
        return args.eval_every and (done % args.eval_every == 0 or done == max_steps)

    def held_out_row(done):
        if result := evaluate(run, held_out.triplets, done == max_steps):
            eval_csv.write({"step": done} | result)
            print0(
                f"held out: step {done}, " + ", ".join(f"{k} {v:.4g}" for k, v in result.items())
            )

    if start and is_due(start):
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
        if is_due(done):
            held_out_row(done)
        stopping = run.signals.anywhere(device)
        if stopping or done == last or args.save_every and done % args.save_every == 0:
            metrics_csv.sync()
            eval_csv.sync()
            save_state(out_dir, done, args.keep, *run.players)
        if stopping and done < last:
            print0(f"stopped after step {done}; resume with: {resume_command(argv, out_dir)}")
            return True
    print0(f"trained {last - start} steps in {time.perf_counter() - clock:.0f} s")
    if run.critics:
        path = out_dir / "discriminators.pt"
        save_discriminators(path, run.critics, critic_settings(args, config))
    export_policy(run.policy, tokenizer, out_dir / "hf")
    if args.final_eval:
        final_table(run, out_dir)
    print0(f"wrote {out_dir}")
    return run.signals.anywhere(device)


def resume_command(argv: list[str], out_dir: Path) -> str:
    rest = [word for word in argv if word != "--resume"]
    if not any(word.startswith("--out_dir") for word in rest):
        rest += ["--out_dir", str(out_dir)]
    return shlex.join(["train_ganpo.py", *rest, "--resume"])


def main(argv: list[str] | None = None):
    quiet()
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse_args(argv)
        with ExitStack() as stack:
            train(args, argv, stack, stack.enter_context(distributed.session(args.timeout)))
    except (InputError, FloatingPointError, OSError) as error:
        refuse("train_ganpo.py", error)


if __name__ == "__main__":
    main()
