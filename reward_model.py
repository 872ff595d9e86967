"""A Bradley-Terry reward model on the same pairs: trains it, and scores answers with it.

    torchrun reward_model.py                                  # the miniature's pairs: half a minute
    torchrun reward_model.py --model DIR --dataset pairs.jsonl --lr 2e-6 --dtype bfloat16

    scores = RewardModel("out/reward/hf", device).score(conversations, answers)

The reward of an answer is a linear head's value at the last token of the chat template's text. The
weights are an AutoModelForSequenceClassification of one label, as published reward models
(Skywork-Reward-V2-Llama-3.1-8B) are, so those are read as they come.
Shapes: B pairs, N sequences, T tokens, H hidden.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

import attention
import distributed
import miniature
import report
from checkpoint import (
    claim_with_config,
    export_policy,
    load_state,
    newest_state,
    save_state,
)
from data import (
    ChatEncoder,
    InputError,
    Packed,
    Triplet,
    batch_indices,
    blaming,
    load_held_out,
    load_pairs,
    pack,
    plan_forwards,
)
from distributed import print0
from flags import DTYPES, Parser, count, fraction, natural, number, positive, refuse
from generate import quiet
from losses import bradley_terry_loss, share_above_0
from policy import PackedLM, at_least_fp32, load_lm, read_model_config, read_tokenizer

COLUMNS = "step loss accuracy lr grad_norm".split()


class RewardLM(PackedLM):
    """PackedLM with a scalar head at the last token of each sequence."""

    auto, settings = AutoModelForSequenceClassification, {"num_labels": 1}

    def forward(self, batch: Packed):
        """data.Packed -> rewards (2B,): B chosen, then B rejected, in fp32 at least."""
        h = super().forward(batch, head=False).h[0]
        last = batch.gather.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0]
        return head(self.model, h[last])


def head(model: PreTrainedModel, h: Tensor):
    """(N, H) -> (N,)"""
    return at_least_fp32(model.score(h)).sum(-1)  # of one; FSDP2 wants no view


class RewardModel:
    """Scores answers with a folder or Hub id. InputError if it is no reward model."""

    def __init__(self, name: str, device: torch.device, dtype=torch.float32):
        tokenizer = read_tokenizer(name, flag="--reward_model")
        with blaming(f"--reward_model {name}"):
            self.encoder = ChatEncoder(tokenizer)
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            if not any("SequenceClassification" in a for a in config.architectures or ()):
                raise InputError("no reward model (no AutoModelForSequenceClassification)")
            model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype)
            if model.num_labels != 1:
                raise InputError(f"{model.num_labels} labels, not one")
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def score(self, conversations: list, answers: list[str], batch_size: int = 32) -> list[float]:
        """Conversations that end with a user's turn, an answer to each -> rewards."""
        limit = self.model.config.max_position_embeddings
        texts = [
            self.encoder.whole(messages, self.encoder.plain(answer))[:limit]
            for messages, answer in zip(conversations, answers, strict=True)
        ]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rewards = [0.0] * len(texts)
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            h, mask = hidden_states(self.model, [texts[i] for i in rows])
            scores = head(self.model, h[torch.arange(len(rows)), mask.sum(1) - 1])
            for i, score in zip(rows, scores.tolist(), strict=True):
                rewards[i] = score
        return rewards


def hidden_states(model: PreTrainedModel, texts: list[list[int]]):
    """Token ids through a Hugging Face model's trunk, padded on the right -> after the final norm
    (N, T, H), and the mask (N, T) bool."""
    lengths = torch.tensor([len(ids) for ids in texts], device=model.device)
    width = int(lengths.max())
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in texts], device=model.device)
    mask = torch.arange(width, device=model.device) < lengths[:, None]
    out = model.base_model(ids, attention_mask=mask.long(), use_cache=False)
    return out.last_hidden_state, mask


# ---------------------------------------------------------------------- training


def with_tail(triplets: list[Triplet], encoder: ChatEncoder) -> list[Triplet]:
    """Whole answers with what the template puts after the end of turn, as in RewardModel.score."""

    def add(ids):
        return np.append(ids, encoder.tail).astype(ids.dtype) if whole(ids) else ids

    def whole(ids):
        return encoder.tail and ids[-1] == encoder.end_of_turn

    return [t._replace(chosen=add(t.chosen), rejected=add(t.rejected)) for t in triplets]


def plain_loss(chosen: Tensor, rejected: Tensor, rows: tuple):
    return bradley_terry_loss(chosen, rejected)


def fit(
    lm: torch.nn.Module,
    triplets: list[Triplet],
    args,
    device: torch.device,
    out_dir: Path,
    pair_loss: Callable = plain_loss,
):
    """--epochs of Adam on the mean of pair_loss(rewards of chosen, of rejected, rows of the data),
    (b,) each; logs, saves states, and takes up the newest one of out_dir."""
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(lm.parameters(), args.lr, weight_decay=0.0, fused=True)
    players = lm, optimizer, None, None
    steps = args.epochs * (len(triplets) // args.batch_size)
    manifest = newest_state(out_dir)
    start = manifest["step"] if manifest else 0
    if start:
        load_state(out_dir, manifest, *players)
        print0(f"resumed after step {start}")
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup * steps), steps)
    (share,) = schedule.lr_lambdas  # of the peak, as a function of the step
    table = report.Table(out_dir / "metrics.csv", COLUMNS, start)
    for step in range(start, steps):
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        order = batch_indices(step, len(triplets), args.batch_size, args.seed)
        pairs = [triplets[i] for i in order]
        for part in plan_forwards(pairs, world, args.micro_batch_size, args.micro_tokens):
            batch = pack(part[rank]).to(device)
            chosen, rejected = lm(batch).chunk(2)
            losses = pair_loss(chosen, rejected, batch.rows)
            (losses.sum() * world / args.batch_size).backward()  # FSDP2 averages over ranks
            won = share_above_0(chosen - rejected)
            sums += torch.stack([losses, won]).detach().double().sum(1)
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), args.grad_clip).full_tensor()
        dist.all_reduce(sums)
        (loss, accuracy), norm = (sums / args.batch_size).tolist(), norm.item()
        if not np.isfinite(loss + norm):
            raise FloatingPointError(f"step {step + 1}: loss {loss}, gradient {norm}")
        lr = args.lr * share(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        table.write(dict(step=done, loss=loss, accuracy=accuracy, lr=lr, grad_norm=norm))
        if done % max(1, steps // 20) == 0 or done == steps:
            print0(f"{done:>5}/{steps} loss {loss:.4f} accuracy {accuracy:.2f} grad {norm:.1e}")
        if args.save_every and done % args.save_every == 0:
            table.sync()
            save_state(out_dir, done, args.keep, *players)


@torch.no_grad()
def margins(lm: torch.nn.Module, triplets: list[Triplet], args, device: torch.device) -> Tensor:
    """reward(chosen) - reward(rejected) of every pair, in order, on all ranks, (B,) float64."""
    index = {t.row: i for i, t in enumerate(triplets)}
    found = torch.zeros(len(triplets), dtype=torch.float64, device=device)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for part in plan_forwards(triplets, ranks, args.micro_batch_size, args.micro_tokens):
        batch = pack(part[rank] or triplets[:1]).to(device)  # a forward is collective
        chosen, rejected = lm(batch).chunk(2)
        if part[rank]:
            found[[index[row] for row in batch.rows]] = (chosen - rejected).double()
    dist.all_reduce(found)
    return found


def parse_args(argv):
    # fmt: off
    parser = Parser("reward_model.py", __doc__)
    add = parser.add_argument
    add("--model", help="what to start from, a folder or a Hub id [the miniature's reference]")
    add("--dataset", help="as for train_ganpo.py [the miniature's]")
    add("--split", default="train", help="[train]")
    add("--eval_split", help="held-out split or file [the miniature's; none for own data]")
    add("--chat_template", help="a jinja file [the tokenizer's own]")
    add("--max_length", type=number(int, 2), help="[2048; miniature 256]")
    add("--lr", type=positive, default=1e-3, help="[1e-3, for the miniature; 2B: about 1e-5]")
    add("--warmup", type=fraction, default=0.1, help="share of steps, then cosine to 0 [0.1]")
    add("--grad_clip", type=positive, default=1.0, help="[1]")
    add("--epochs", type=count, default=1, help="[1]")
    add("--batch_size", type=count, default=32, help="pairs per step over all ranks [32]")
    add("--micro_batch_size", type=count, default=8, help="pairs per forward and rank [8]")
    add("--micro_tokens", type=count, default=16384, help="their tokens at most [16384]")
    add("--dtype", choices=DTYPES, default="float32", help="of compute [float32]")
    add("--checkpointing", action="store_true", help="recompute layers in backward")
    add("--save_every", type=natural, default=0, help="steps between states [0: none]")
    add("--keep", type=count, default=2, help="newest states that stay [2]")
    add("--seed", type=natural, default=0, help="[0]")
    add("--resume", action="store_true", help="continue from the newest state of --out_dir")
    add("--timeout", type=positive, default=600, help="seconds to wait for another rank [600]")
    add("--out_dir", default="out/reward", help="[out/reward]")
    # fmt: on
    args = parser.parse_args(argv)
    world = miniature.world(args.seed)
    if args.dataset is None and args.eval_split is None:
        args.eval_split = str(world / "test.jsonl")
    args.max_length = args.max_length or (2048 if args.dataset else 256)
    args.model = args.model or str(world / "model")
    args.dataset = args.dataset or str(world / "train.jsonl")
    return args


def learn(
    args,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    triplets: list[Triplet],
    held_out: list[Triplet] | None,
    device: torch.device,
    pair_loss: Callable = plain_loss,
):
    """A reward model in --out_dir from --model, fitted to triplets -> its margins on held_out's, or
    None."""
    out_dir, dtype, encoder = Path(args.out_dir), DTYPES[args.dtype], ChatEncoder(tokenizer)
    loader = partial(
        load_lm, args.model, torch.promote_types(dtype, torch.float32), args.checkpointing,
        attention.choose("auto", config, device, dtype), wrapper=RewardLM,
    )  # fmt: skip
    torch.manual_seed(args.seed)  # the head's start
    mesh = distributed.make_mesh(device)
    lm = distributed.load_sharded(loader, mesh, device, dtype, f"--model {args.model}:")
    lm.model.config.pad_token_id = tokenizer.pad_token_id  # for those who pad
    fit(lm, with_tail(triplets, encoder), args, device, out_dir, pair_loss)
    found = None
    if held_out:
        found = margins(lm, with_tail(held_out, encoder), args, device)
        accuracy, loss = (
            share_above_0(found).mean(),
            bradley_terry_loss(found, 0 * found).mean(),
        )
        print0(f"held out: {len(found)} pairs, loss {loss:.4f}, accuracy {accuracy:.3f}")
    export_policy(lm, tokenizer, out_dir / "hf")
    return found


def train(args, device: torch.device, stack: ExitStack):
    miniature.build_if_used(args.seed, args.model, args.dataset)
    distributed.check_batch_size(args.batch_size)
    config = read_model_config(args.model, args.max_length)
    tokenizer = read_tokenizer(args.model, args.chat_template)
    length = args.max_length - len(ChatEncoder(tokenizer).tail)
    data = load_pairs(args.dataset, args.split, tokenizer, length, print0)
    if len(data.triplets) < args.batch_size:
        raise InputError(f"{args.dataset}: fewer pairs than --batch_size: {data.summary()}")
    print0(f"data: {data.summary()}")
    held_out = load_held_out(args, tokenizer, length, print0).triplets if args.eval_split else None
    steps = args.epochs * data.steps(args.batch_size)
    claim_with_config(args, stack, data.fingerprint, total_steps=steps)
    learn(args, config, tokenizer, data.triplets, held_out, device)
    print0(f"wrote {args.out_dir}/hf")


def main(argv=None):
    quiet()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        with ExitStack() as stack:
            train(args, stack.enter_context(distributed.session(args.timeout)), stack)
    except (InputError, FloatingPointError, OSError) as error:
        refuse("reward_model.py", error)


if __name__ == "__main__":
    main()
