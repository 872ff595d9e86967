"""A Bradley-Terry reward model on the same pairs: trains it, and scores answers with it.

    torchrun reward_model.py                                  # the miniature's pairs: half a minute
    torchrun reward_model.py --model DIR --dataset pairs.jsonl --lr 2e-6 --dtype bfloat16

    scores = RewardModel("out/reward/hf", device).score(conversations, answers)

The reward of an answer is a linear head's value at the last token of the chat template's text. The
weights are those of an AutoModelForSequenceClassification with one label, as published reward
models have them (Skywork-Reward-V2-Llama-3.1-8B), so such models are read as they are. Shapes as in
train_ganpo.py: b pairs of a micro-batch, B pairs of a step or data set, N texts of L tokens.
"""

import cpu  # noqa: F401  must come before torch

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

import attention
import distributed
import report
from checkpoint import (
    check_out_dir,
    claim_with_config,
    export_policy,
    load_state,
    newest_state,
    save_state,
)
from data import (
    ChatEncoder,
    InputError,
    Triplet,
    assistant_turn,
    input_error_for,
    leaves_out,
    load_data,
)
from distributed import print0
from flags import (
    DTYPES,
    Parser,
    command_line,
    count,
    fraction,
    given_flags,
    natural,
    number,
    positive,
    refuse,
    seconds,
    world_folder,
)
from generate import quiet
from losses import bradley_terry_loss, share_above_0
from packing import Packed, batch_indices, pack, plan_forwards
from policy import (
    PackedLM,
    at_least_fp32,
    check_token_ids,
    load_lm,
    load_weights,
    positions_of,
    read_any_config,
    read_model_config,
    read_tokenizer,
)
from settings import build_miniature, is_miniature

COLUMNS = "step loss accuracy lr grad_norm".split()

# ---------------------------------------------------------------------- rewards


class RewardLM(PackedLM):
    """PackedLM with a scalar head at the last token of each text."""

    auto, settings = AutoModelForSequenceClassification, {"num_labels": 1}
    # --model may be a causal LM, whose head of logits is left out
    new, unused = ("score.weight",), ("lm_head.weight",)

    def forward(self, batch: Packed) -> Tensor:
        """Returns rewards (2b,) in float32 or higher: b chosen answers, then b rejected ones."""
        h = super().forward(batch, head=False).h[0]
        last = batch.gather.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0]
        return head(self.model, h[last])


def head(model: PreTrainedModel, h: Tensor) -> Tensor:
    """Returns the rewards (N,) of the latents of last tokens, (N, H)."""
    return at_least_fp32(model.score(h)).sum(-1)  # a sum of one value: FSDP2 allows no view here


def is_classifier(config: PretrainedConfig) -> bool:
    """Returns whether a config's model has a head of labels and not one of logits."""
    return any("SequenceClassification" in name for name in config.architectures or ())


def read_reward_model(name: str, flag: str = "--reward_model", day: str | None = None) -> tuple:
    """Returns ChatEncoder and config of a reward model, a folder or Hub id; reads no weight.

    A chat template that writes today's date writes `day`. Raises InputError, which begins with
    `flag`, if it is no sequence classifier with one label and a chat template.
    """
    config = read_any_config(name, flag)
    tokenizer = read_tokenizer(name, flag=flag)
    with input_error_for(f"{flag} {name}"):
        if not tokenizer.chat_template:  # --chat_template is for the models that write
            raise InputError(
                "its tokenizer has no chat template, by which prompt and answer become the text"
                " that it scores; write the one it was trained with to chat_template.jinja in its"
                " folder"
            )
        if not is_classifier(config):
            raise InputError("not a reward model: it is no AutoModelForSequenceClassification")
        if config.num_labels != 1:
            raise InputError(f"not a reward model: it has {config.num_labels} labels, not one")
        if config.is_encoder_decoder:
            raise InputError("not supported: a reward model with an encoder and a decoder")
        encoder = ChatEncoder(tokenizer, day)
    return encoder, config


class RewardModel:
    """Scores answers with a reward model, a folder or Hub id. Raises InputError if it is none.

    `day` is that of read_reward_model. A text has at most `positions` tokens.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        day: str | None = None,
    ):
        self.encoder, config = read_reward_model(name, day=day)
        with input_error_for(f"--reward_model {name}"):
            model = load_weights(AutoModelForSequenceClassification, name, dtype=dtype)
        self.model = model.to(device).eval()
        text_config = model.config.get_text_config()
        text_config.use_cache = False
        if text_config.pad_token_id is None:
            # some models then refuse several texts at once; here they never meet padding
            model.config.pad_token_id = text_config.pad_token_id = -1
        # RoBERTa and its kin count positions from padding_idx + 1
        offsets = (
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        )
        self.positions = positions_of(config) - max(offsets, default=0)

    def texts(self, conversations: list, answers: list[str]) -> list[list[int]]:
        """Returns the token ids of whole texts; conversations end with a user's turn."""
        return [
            self.encoder.whole(messages, self.encoder.plain(answer))
            for messages, answer in zip(conversations, answers, strict=True)
        ]

    def unread(self, conversations: list, answers: list[str]) -> list[dict]:
        """Returns for each answer what score() does not read of its text, as unread_of says it."""
        pairs = zip(conversations, answers, strict=True)
        room = self.positions - len(self.encoder.tail)
        return [unread_of(self.encoder, messages, answer, room) for messages, answer in pairs]

    @torch.inference_mode()
    def score(self, conversations: list, answers: list[str], batch_size: int = 32) -> list[float]:
        """Returns the reward of each answer, the logit of the model's own forward.

        A text that is longer than the model's positions loses its end. Only texts of equal length
        are scored together: without padding there is no padding token that a model could read, and
        every reward is that of the text alone.
        """
        texts = [text[: self.positions] for text in self.texts(conversations, answers)]
        check_token_ids(texts, self.model.config, "the reward model")
        of_length, rewards = {}, [0.0] * len(texts)
        for i, text in enumerate(texts):
            of_length.setdefault(len(text), []).append(i)
        for rows in of_length.values():
            for first in range(0, len(rows), batch_size):
                some = rows[first : first + batch_size]
                ids = torch.tensor([texts[i] for i in some], device=self.model.device)
                for i, logit in zip(some, self.model(ids).logits[:, 0].tolist(), strict=True):
                    rewards[i] = logit
                    if not math.isfinite(logit):
                        prompt = conversations[i][-1]["content"][:60]
                        raise FloatingPointError(f"reward {logit} of the answer to {prompt!r}")
        return rewards


def unread_of(encoder: ChatEncoder, messages: list[dict], answer: str, room: int) -> dict:
    """Returns what a model that scores an answer does not read of prompt and answer: whether they
    have more than `room` tokens (cut_text), whether the chat template leaves out a part (left_out),
    and whether special tokens that the answer spells out were left out (spelled)."""
    plain = encoder.plain(answer)
    ids, text = encoder.answer_and_text(messages, plain)
    lost = leaves_out(text, [*messages, assistant_turn(plain)])
    return {"cut_text": len(ids) > room, "left_out": lost, "spelled": plain != answer}


def hidden_states(model: PreTrainedModel, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Returns the latents (N, L, H) of N texts, after the final norm, and their mask (N, L), bool.

    texts are token ids; they are padded on the right. model is a Hugging Face model with any head.
    """
    width = max(map(len, texts))
    lengths = torch.tensor([len(ids) for ids in texts], device=model.device)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in texts], device=model.device)
    mask = torch.arange(width, device=model.device) < lengths[:, None]
    out = model.base_model(ids, attention_mask=mask.long(), use_cache=False)
    return out.last_hidden_state, mask


# ---------------------------------------------------------------------- training


def with_tail(triplets: list[Triplet], encoder: ChatEncoder) -> list[Triplet]:
    """Returns the triplets with encoder.tail after every answer that has its end of turn.

    RewardModel.score reads the same text. An answer that was cut off has no end of turn and stays.
    """

    def add(ids):
        whole = encoder.tail and ids[-1] == encoder.end_of_turn
        return np.append(ids, encoder.tail).astype(ids.dtype) if whole else ids

    return [t._replace(chosen=add(t.chosen), rejected=add(t.rejected)) for t in triplets]


def padding_token(encoder: ChatEncoder, config: PretrainedConfig) -> int | None:
    """Returns the id of a token for padding, the tokenizer's own one if that can be used.

    In transformers a reward model's own forward reads the reward at the last token that is not
    padding. So the token must not be the last one of a text. None if there is no such token.
    """
    of, last = encoder.tokenizer, (encoder.tail or [encoder.end_of_turn])[-1]
    own = (of.pad_token_id, of.unk_token_id, of.bos_token_id, of.eos_token_id)
    known = (i for i in (*own, *sorted(encoder.markers)) if i is not None)
    return next((i for i in known if i != last and i < config.vocab_size), None)


def plain_loss(chosen: Tensor, rejected: Tensor, rows: tuple) -> Tensor:
    return bradley_terry_loss(chosen, rejected)


def fit(
    lm: torch.nn.Module,
    triplets: list[Triplet],
    args,
    device: torch.device,
    out_dir: Path,
    pair_loss: Callable = plain_loss,
):
    """Trains a RewardLM for --epochs with AdamW on the mean of pair_loss over the pairs of a step.

    pair_loss(chosen (b,), rejected (b,), rows) returns (b,); it is given rewards and the pairs' row
    numbers. The learning rate is 0 in the first step, rises, and falls as a cosine. Writes
    metrics.csv and states to out_dir, and continues from its newest state. Raises
    FloatingPointError if loss or gradient is not finite.
    """
    optimizer = torch.optim.AdamW(lm.parameters(), args.lr, weight_decay=0.0, fused=True)
    trained = distributed.Trained(lm, optimizer, None, None)
    steps = args.epochs * (len(triplets) // args.batch_size)
    manifest = newest_state(out_dir)
    start = manifest["step"] if manifest else 0
    if start:
        load_state(out_dir, manifest, trained)
        print0(f"resumed after step {start}")
    schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup * steps), steps)
    (share,) = schedule.lr_lambdas  # of the peak, as a function of the step
    table = report.Table(out_dir / "metrics.csv", COLUMNS, start)
    with distributed.StopSignals() if args.save_every else nullcontext() as signals:
        for step in range(start, steps):
            order = batch_indices(step, len(triplets), args.batch_size, args.seed)
            loss, accuracy = backward(lm, [triplets[i] for i in order], args, device, pair_loss)
            norm = distributed.clip_gradient(lm, args.grad_clip).item()
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
            stopping = signals and signals.anywhere(device)
            if stopping or args.save_every and done % args.save_every == 0:
                table.sync()
                save_state(out_dir, done, args.keep, trained)
            if stopping and done < steps:
                raise InputError(
                    f"stopped by a signal after step {done}; --resume goes on from there"
                )


def backward(
    lm: torch.nn.Module, pairs: list[Triplet], args, device: torch.device, pair_loss: Callable
) -> list[float]:
    """Adds the gradient of a step's mean loss; returns that loss and the accuracy.

    pairs are those of all ranks. Equal rewards count 1/2 in the accuracy.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for part in plan_forwards(pairs, ranks, args.micro_batch_size, args.micro_tokens):
        batch = pack(part[rank]).to(device)
        chosen, rejected = lm(batch).chunk(2)
        losses = pair_loss(chosen, rejected, batch.rows)
        (losses.sum() * ranks / args.batch_size).backward()  # FSDP2 averages over ranks
        won = share_above_0(chosen - rejected)
        sums += torch.stack([losses, won]).detach().double().sum(1)
    dist.all_reduce(sums)
    return (sums / args.batch_size).tolist()


@torch.no_grad()
def margins(lm: torch.nn.Module, triplets: list[Triplet], args, device: torch.device) -> Tensor:
    """Returns reward(chosen) - reward(rejected) of all pairs in order, on all ranks, (B,) float64.

    Row numbers of the triplets have to differ.
    """
    index = {t.row: i for i, t in enumerate(triplets)}
    found = torch.zeros(len(triplets), dtype=torch.float64, device=device)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for part in plan_forwards(triplets, ranks, args.micro_batch_size, args.micro_tokens):
        # every rank runs every forward, so one without pairs repeats the first
        batch = pack(part[rank] or triplets[:1]).to(device)
        chosen, rejected = lm(batch).chunk(2)
        if part[rank]:
            found[[index[row] for row in batch.rows]] = (chosen - rejected).double()
    dist.all_reduce(found)
    return found


# ---------------------------------------------------------------------- the program


def parse_args(argv: list[str]):
    # fmt: off
    parser = Parser("reward_model.py", __doc__)
    add = parser.add_argument
    add("--model", help="what to start from, a folder or a Hub id [the miniature's reference]")
    add("--dataset", help="as for train_ganpo.py [the miniature's]")
    add("--dataset_config", help="which of the data set's configs [its only or default one]")
    add("--split", default="train", help="[train]")
    add("--eval_split", help="held-out split or file [the miniature's; none for own data]")
    add("--strip_thinking", action="store_true", help="leave out <think>...</think> [off]")
    add("--chat_template", help="a jinja file, or one of the tokenizer's [its own]")
    add("--max_length", type=number(int, 2), help="of prompt + response [2048; miniature 256]")
    add("--lr", type=positive, default=1e-3, help="[1e-3, for the miniature; 2B: about 1e-5]")
    add("--warmup", type=fraction, default=0.1, help="share of steps, then cosine to 0 [0.1]")
    add("--grad_clip", type=positive, default=1.0, help="norm of the gradient [1]")
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
    add("--timeout", type=seconds, default=600, help="seconds to wait for another rank [600]")
    add("--out_dir", default="out/reward", help="[out/reward]")
    # fmt: on
    args = parser.parse_args(argv)
    world = world_folder(args.seed)
    if args.dataset is None and args.eval_split is None:
        args.eval_split = str(world / "test.jsonl")
    own = args.model is not None and args.dataset is not None
    args.max_length = args.max_length or (2048 if own else 256)
    args.model = args.model or str(world / "model")
    args.dataset = args.dataset or str(world / "train.jsonl")
    if "keep" in given_flags(argv) and not args.save_every:
        raise InputError("--keep needs --save_every: without it no state is written")
    return args


def check_input(args) -> tuple:
    """Checks everything that can be refused before a weight is read.

    Returns the tokenizer, the config, the data, and the held-out data or None without --eval_split,
    as train_ganpo.check_input does. Raises InputError. Nothing here communicates between ranks.
    """
    check_out_dir(args)
    distributed.check_batch_size(args.batch_size)
    config = read_model_config(args.model, args.max_length)
    tokenizer = read_tokenizer(args.model, args.chat_template)
    length = args.max_length - len(ChatEncoder(tokenizer).tail)
    data, held_out = load_data(args, tokenizer, length, print0, bool(args.eval_split))
    triplets = data.triplets + (held_out.triplets if held_out else [])
    check_token_ids((ids for t in triplets for ids in t[:3]), config, f"--model {args.model}")
    return tokenizer, config, data, held_out


def learn(
    args,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    triplets: list[Triplet],
    held_out: list[Triplet] | None,
    device: torch.device,
    pair_loss: Callable = plain_loss,
) -> Tensor | None:
    """Trains a reward model from --model on triplets and writes it to hf/ in --out_dir.

    Returns its margins on the held-out pairs, (B,), or None without such pairs. pair_loss is that
    of fit().
    """
    out_dir, dtype, encoder = Path(args.out_dir), DTYPES[args.dtype], ChatEncoder(tokenizer)
    loader = partial(
        load_lm, args.model, torch.promote_types(dtype, torch.float32), args.checkpointing,
        attention.choose("auto", config, device, dtype), wrapper=RewardLM,
    )  # fmt: skip
    torch.manual_seed(args.seed)  # the new head is drawn at random
    mesh = distributed.make_mesh(device, args.timeout)
    lm = distributed.load_sharded(loader, mesh, device, dtype, f"--model {args.model}:")
    tokenizer = copy.deepcopy(tokenizer)  # its padding is the reward model's alone
    lm.model.config.pad_token_id = tokenizer.pad_token_id = padding_token(encoder, config)
    fit(lm, with_tail(triplets, encoder), args, device, out_dir, pair_loss)
    found = None
    if held_out:
        found = margins(lm, with_tail(held_out, encoder), args, device)
        accuracy = share_above_0(found).mean()
        loss = bradley_terry_loss(found, 0 * found).mean()
        print0(f"held out: {len(found)} pairs, loss {loss:.4f}, accuracy {accuracy:.3f}")
    export_policy(lm, tokenizer, out_dir / "hf")
    return found


def train(args, device: torch.device, stack: ExitStack):
    """Runs the program; the stack holds the lock of --out_dir. Raises InputError or
    FloatingPointError with one line for the user."""
    args.template_day = report.template_day(args)
    build_miniature(args, check_input)
    tokenizer, config, data, held_out = check_input(args)
    print0(f"data: {data.summary()}")
    steps = args.epochs * data.steps(args.batch_size)
    claim_with_config(args, stack, data.fingerprint, total_steps=steps)
    learn(args, config, tokenizer, data.triplets, held_out and held_out.triplets, device)
    print0(f"wrote {args.out_dir}/hf")


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    program, argv = command_line(argv, "reward_model.py")
    try:
        args = parse_args(argv)
        miniature = is_miniature(args.model, args.seed)
        with ExitStack() as stack:
            device = stack.enter_context(distributed.session(args.timeout, miniature))
            train(args, device, stack)
    except (InputError, FloatingPointError, OSError) as error:
        refuse(program, error)


if __name__ == "__main__":
    main()
