"""APO (arXiv 2311.08045): a game between a reward model and an LLM, played in rounds.

    python -m apo.train_apo                      # three rounds in the miniature, with two controls
    python -m apo.train_apo --aligner ganpo      # the LLM's step is one of GANPO
    torchrun -m apo.train_apo --model M --golden G --human H --held_out T --dtype bfloat16

    min over r, max over pi:  E_{y ~ pi} r(x, y) - E_{y ~ gold} r(x, y)

x is a prompt, y an answer, r the reward, pi the LLM. Reward model and LLM have prompts of their own
[choice 27]. In a round the LLM writes --samples answers to every prompt. The reward model starts
again from its base and is trained on human pairs and golden answers to its own prompts, with

    L_RM = L_BT(human pairs) + w L_BT(golden answer above each sample)

Then the LLM moves towards those of its answers, to the other prompts, that have a high reward, by
an offline method (--aligner). The paper bounds both divergences: that of the reward model by the
human pairs, that of the LLM by the aligner. No new human label is needed as the LLM's answers
change.

Flags after `--` go to train_ganpo.py, which takes the LLM's steps. --out_dir receives start/ and
start.log (the LLM before the first round), for each variant and round a folder with log, answers/,
reward/, pairs.jsonl, policy/ (a run of train_ganpo.py), eval/ and round.json, and rounds.csv. With
--resume a game continues after what is finished. Shapes: b pairs of a micro-batch.
"""

import cpu  # noqa: F401  must come before torch

import hashlib
import json
import shlex
import shutil
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distributed
import report
import reward_model
import train_ganpo
from checkpoint import check_out_dir, claim_with_config, write_synced
from data import (
    ChatEncoder,
    InputError,
    RowFault,
    Triplet,
    counts,
    filled,
    input_error_for,
    json_lines,
    load_pairs,
    read_rows,
    to_messages,
    unread_columns,
)
from distributed import print0, share_out
from eval_alpaca import Prompt, Writer, judge_mini
from flags import (
    DTYPES,
    Parser,
    at_least_0,
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
from generate import quiet, refuse_half_characters
from losses import bradley_terry_loss
from miniature.world import read_tasks
from policy import check_token_ids, read_model_config, read_tokenizer
from reward_model import RewardModel
from settings import build_miniature, is_miniature
from settings import parse_args as parse_ganpo_args
from winrate import NOTICED, mean_and_error

VARIANTS = {  # the pairs that each variant's reward model learns from
    "apo": ("human", "game"),
    "frozen": ("human",),  # only in the first round: plain rejection sampling
    "gail": ("game",),  # without human pairs, the paper's GAIL
}
COLUMNS = (
    "variant round rm_acc rm_ece strict_acc strict_acc_se mean_score mean_score_se sampled_acc"
    " sampled_acc_se sampled_score sampled_score_se reward pairs"
).split()


# ---------------------------------------------------------------------- mathematics


def difference_loss(reward_golden: Tensor, reward_sample: Tensor) -> Tensor:
    """--apo_loss difference, the form of a WGAN: reward_sample - reward_golden, (b,)."""
    return reward_sample - reward_golden


def pair_loss(n_human: int, weight: float, form: str) -> Callable:
    """Returns the loss for reward_model.fit, where the first n_human rows are human pairs.

    These have the Bradley-Terry loss. The others are pairs of the game, and theirs is the loss that
    `form` names, ranking (Bradley-Terry) or difference, times weight [choice 18].
    """
    of_game = {"ranking": bradley_terry_loss, "difference": difference_loss}[form]

    def loss(chosen, rejected, rows):
        game = torch.tensor([row >= n_human for row in rows], device=chosen.device)
        human = bradley_terry_loss(chosen, rejected)
        return torch.where(game, weight * of_game(chosen, rejected), human)

    return loss


def accuracy_and_ece(margins, bins: int = 10) -> tuple[float, float]:
    """Returns accuracy and expected calibration error (ECE) of a reward model [choice 28].

    Both are in [0, 1]. margins are reward(chosen) - reward(rejected), (n,). The accuracy is the
    share of margins above 0; a margin of 0 counts 1/2. The ECE is that of APO's published code:
    each pair is asked in both orders, so sigma(margin) is the probability of an event that
    happened, and sigma(-margin) of one that did not. The 2n probabilities fall into `bins` bins of
    equal width between 0 and 1. ECE is the mean of |share that happened - mean probability| over
    the bins, weighted by their numbers.
    """
    margins = np.asarray(margins, dtype=float)
    accuracy = np.heaviside(margins, 0.5).mean()
    probability = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    happened = np.repeat([1.0, 0.0], len(margins))
    bucket = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [
        abs(happened[bucket == b].mean() - probability[bucket == b].mean()) * (bucket == b).mean()
        for b in np.unique(bucket)
    ]
    return float(accuracy), float(sum(gaps))


def best_and_worst(texts: list[str], rewards: list[float]) -> tuple[str, str]:
    """Returns the texts of highest and of lowest reward, the first ones among equals."""
    best = max(range(len(texts)), key=lambda i: rewards[i])
    worst = min(range(len(texts)), key=lambda i: rewards[i])
    return texts[best], texts[worst]


# ---------------------------------------------------------------------- a round


def read_golden(path: str) -> tuple[list[Prompt], list[str], list[str]]:
    """Returns prompts, their golden answers, the first one where a prompt occurs twice, and lines
    about what of the file is not read.

    A row has a prompt (or query, as APO's own converter calls it), which may be a text, one of
    hh-rlhf's turns, or a chat, and a golden answer (or solution, as the miniature's rows call it).
    Raises InputError for a row without them.
    """
    golden, unread, others = {}, {}, 0
    for i, row in enumerate(read_rows(path, "train")):
        row = row if isinstance(row, dict) else {}
        pair = {**row}
        for key, names in (("prompt", ("prompt", "query")), ("chosen", ("golden", "solution"))):
            pair[key] = next((row[name] for name in names if filled(row.get(name))), None)
            if pair[key] is None:
                names = " or ".join(names)
                raise InputError(f"--golden {path}: row {i} has no {names}: {', '.join(row)}")
        used = pair["prompt"], pair["chosen"]
        if not isinstance(pair["chosen"], str):
            raise InputError(f"--golden {path}: row {i}: its golden answer is no text")
        pair["rejected"] = f"{pair['chosen']}."  # any other answer makes it preference data
        try:
            chat, answer, _ = to_messages(pair)
        except RowFault as reason:
            raise InputError(f"--golden {path}: row {i}: {reason}") from None
        for text in (answer, *(turn["content"] for turn in chat)):
            refuse_half_characters(text, f"--golden {path}: row {i}")
        prompt = Prompt.of(chat, "golden", row)
        others += golden.setdefault(prompt.instruction, (prompt, answer))[1] != answer
        more = [name for name in ("chosen", "rejected") if filled(row.get(name))]
        of_row = (k for k in [*unread_columns(pair), *more] if k not in row or row[k] not in used)
        unread |= dict.fromkeys(of_row)
    notes = {
        f"columns not read: {', '.join(unread)}": unread,
        f"{others} rows have another golden answer to an earlier prompt and are not read": others,
    }
    prompts, answers = ([both[i] for both in golden.values()] for i in range(2))
    return prompts, answers, [note for note, holds in notes.items() if holds]


def once(path: Path, compute: Callable, fits: Callable):
    """Returns compute()'s value, or what an earlier command has written of it to path.

    Raises InputError if the file is damaged: what it holds is no JSON, or fits(value) is not true.
    """
    if not distributed.from_rank_0(path.exists, "--out_dir"):
        text = json.dumps(compute())
        distributed.from_rank_0(lambda: write_synced(path, text), "--out_dir")
    with input_error_for(f"{path} is damaged: remove it"):
        value = json.loads(path.read_text())
        if not fits(value):
            raise InputError("it does not hold what this game has written there")
        return value


def are_numbers(values: list, n: int) -> bool:
    """Returns whether values are a list of n numbers."""
    return [type(value) in (int, float) for value in values] == [True] * n


class Stopped(Exception):
    """Raised after a signal has ended the LLM's step; the state of that step is saved."""


class Game:
    """What all variants share: prompts with golden answers, human pairs, held-out pairs, an exam.

    It reads no weights. Raises InputError if something cannot be used.
    """

    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        self.config = read_model_config(args.model, args.max_length)
        self.tokenizer = read_tokenizer(args.model, args.chat_template)
        self.encoder = ChatEncoder(self.tokenizer, args.template_day)
        args.template_day = self.encoder.day
        self.length = args.max_length - len(self.encoder.tail)
        human, held_out = (
            load_pairs(source, "train", self.tokenizer, self.length, print0, day=args.template_day)
            for source in (args.human, args.held_out)
        )
        if not held_out.triplets:
            raise InputError(f"--held_out {args.held_out}: {held_out.summary()}")
        self.human, self.held_out = human.triplets, held_out.triplets
        self.about = {"human pairs": human.summary(), "held-out pairs": held_out.summary()}
        texts = (ids for t in self.human + self.held_out for ids in t[:3])
        check_token_ids(texts, self.config, f"--model {args.model}")
        prompts, golden, notes = read_golden(args.golden)
        for note in notes:
            print0(f"--golden {args.golden}: {note}")
        n = min(args.prompts, len(golden) // 2)
        # the reward model's prompts, with golden answers, and then the LLM's [choice 27]
        self.prompts, self.golden = prompts[: 2 * n], golden[:n]
        self.human = self.without_llms_prompts(self.human)
        m = len(self.human)
        if min(n, m) < args.batch_size:
            raise InputError(
                f"--batch_size {args.batch_size}: only {n} prompts for the LLM, {m} human pairs"
            )
        with input_error_for("--exam"):
            tasks = read_tasks(args.exam) if args.exam else []
        self.exam = [Prompt(task.prompt, "exam", task._asdict()) for task in tasks]
        writer = self.writer(args.model, args.samples)
        writer.read([p.messages for p in [*self.prompts, *self.exam]])
        for note in writer.notes:
            print0(f"--model: {note}")
        exam = [p.record for p in self.exam]
        asked = [p.messages for p in self.prompts], self.golden
        seen = [human.fingerprint, held_out.fingerprint, asked, exam, self.tokenizer.chat_template]
        self.fingerprint = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def without_llms_prompts(self, human: list[Triplet]) -> list[Triplet]:
        """Returns the human pairs whose prompts are not among the LLM's; prints how many are."""
        rows = read_rows(self.args.human, "train")
        llms = {json.dumps(p.messages) for p in self.prompts[len(self.golden) :]}
        kept = [t for t in human if json.dumps(to_messages(rows[t.row])[0]) not in llms]
        left_out = len(human) - len(kept)
        print0(f"human pairs: {left_out} of {len(human)} are about the LLM's prompts and left out")
        return kept

    def writer(self, model: str | Path, samples: int, **decoding) -> Writer:
        """Returns the writer of a model's samples; decoding is that of answers()."""
        args = self.args
        settings = dict(seed=args.seed, chat_template=args.chat_template, dtype=args.dtype)
        settings |= dict(max_new_tokens=args.max_new_tokens, batch_size=128, samples=samples)
        settings |= dict(top_k=0, top_p=1.0, strip_thinking=False) | decoding
        return Writer(str(model), "--model", Namespace(**settings), self.device, self.encoder.day)

    def answers(
        self, model: str | Path, prompts: list[Prompt], out: Path, temperature: float, samples: int,
        **decoding,
    ) -> list[list[str]]:  # fmt: skip
        """Returns a model's samples for each prompt without those that were cut off.

        decoding may hold top_k and top_p. Answers of an interrupted command, in out, are kept.
        """
        distributed.from_rank_0(lambda: out.mkdir(parents=True, exist_ok=True), "--out_dir")
        writer = self.writer(model, samples, **decoding)
        answers = writer.answers(prompts, temperature, out, "model")
        ended = [answer.ended for of_prompt in answers for answer in of_prompt]
        if cut := ended.count(False):
            limit = f"--max_new_tokens {self.args.max_new_tokens}"
            print0(f"{cut} of {len(ended)} answers were cut at {limit} and are not used")
        return [[answer.text for answer in of_prompt if answer.ended] for of_prompt in answers]

    def game_pairs(self, samples: list[list[str]]) -> list[Triplet]:
        """Returns pairs with the golden answer as chosen and each sample as rejected.

        samples are those to the reward model's prompts, which come first.
        """
        triplets, notes, dropped = [], Counter(), Counter()
        for prompt, gold, texts in zip(self.prompts, self.golden, samples, strict=False):
            messages = prompt.messages
            for text in texts:
                answers = gold, self.encoder.plain(text)
                notes["special tokens left out of a sample"] += answers[1] != text
                try:
                    triplets.append(self.encoder.triplet(messages, *answers, self.length, 0, notes))
                except RowFault as reason:
                    dropped[str(reason)] += 1
        print0(
            f"{len(triplets)} pairs of golden answer and sample; dropped: {counts(dropped)};"
            f" noted: {counts(+notes)}"
        )
        return triplets

    def train_reward(self, variant: str, samples: list[list[str]], folder: Path) -> list[float]:
        """Trains a round's reward model, from its base [choice 19], in folder.

        Returns its margins on the held-out human pairs.
        """
        args, sources = self.args, VARIANTS[variant]
        human = self.human if "human" in sources else []
        game = self.game_pairs(samples) if "game" in sources else []
        triplets = [t._replace(row=i) for i, t in enumerate([*human, *game])]
        if len(triplets) < args.batch_size:
            raise InputError(f"--batch_size {args.batch_size}: {len(triplets)} pairs in {folder}")
        # a weight is relative to that of the human pairs
        weight = args.apo_weight / args.samples if human else 1.0
        settings = vars(args) | dict(lr=args.rm_lr, out_dir=str(folder))
        settings |= dict(epochs=1, warmup=0.1)  # [choice 29]
        settings |= dict(micro_batch_size=args.batch_size, grad_clip=1.0, keep=1)
        margins = reward_model.learn(
            Namespace(**settings), self.config, self.tokenizer, triplets, self.held_out,
            self.device, pair_loss(len(human), weight, args.apo_loss),
        )  # fmt: skip
        return margins.tolist()

    def rewards(self, folder: Path, samples: list[list[str]]) -> list[list[float]]:
        """Returns rewards of the samples to the LLM's prompts, by the reward model in a folder."""
        dtype, day = DTYPES[self.args.dtype], self.encoder.day
        scorer = RewardModel(str(folder / "hf"), self.device, dtype, day)
        asked = [(p.messages, text) for p, texts in self.of_llm(samples) for text in texts]

        def of_part(part):
            both = [*zip(*part, strict=True)] or [[], []]
            return [*zip(scorer.score(*both), scorer.unread(*both), strict=True)]

        found = share_out(asked, of_part)
        for key, words in NOTICED.items():
            if n := sum(unread.get(key, False) for _, unread in found):
                print0(f"reward model: {words}: {n}")
        in_order = (reward for reward, _ in found)
        return [[next(in_order) for _ in texts] for _, texts in self.of_llm(samples)]

    def of_llm(self, samples: list[list[str]]) -> list[tuple[Prompt, list[str]]]:
        """Returns the LLM's prompts, each with its samples."""
        return [*zip(self.prompts, samples, strict=True)][len(self.golden) :]

    def pairs(self, samples: list[list[str]], rewards: list[list[float]]) -> list[dict]:
        """Returns rows of the best and the worst sample of each of the LLM's prompts.

        Rejection sampling trains on the best one only. So every prompt with a usable best one
        stays, and a stand-in takes the place of a worst one that is not usable [choice 20].
        """
        rows, best_only = [], self.args.aligner == "rejection"

        def usable(text):
            return text.strip() and not self.encoder.special_text.search(text)

        for (prompt, texts), scores in zip(self.of_llm(samples), rewards, strict=True):
            best, worst = best_and_worst(texts, scores) if texts else ("", "")
            if best_only and (worst.strip() == best.strip() or not usable(worst)):
                worst = "." if best.strip() != "." else ".."
            if usable(best) and usable(worst) and best.strip() != worst.strip():
                asked = prompt.chat or prompt.instruction
                rows.append({"prompt": asked, "chosen": best, "rejected": worst})
        return rows

    def align(self, policy: Path, k: int, folder: Path) -> bool:
        """Takes the LLM's step of round k on pairs.jsonl; returns whether a signal has ended it."""
        args, out = self.args, folder / "policy"
        argv = [f"--model={policy}", f"--dataset={folder / 'pairs.jsonl'}", f"--out_dir={out}"]
        # the reference is the LLM before the first round, not before this one [choice 21]
        argv += [f"--ref_model={args.model}", f"--lr={args.lr[k - 1]}", *aligner_flags(args)]
        if distributed.from_rank_0((out / "config.json").exists, "--out_dir"):
            argv.append("--resume")
        with ExitStack() as stack:
            return train_ganpo.train(parse_ganpo_args(argv), argv, stack, self.device)

    def examine(self, policy: str | Path, folder: Path) -> dict:
        """Returns columns of rounds.csv: the miniature's judge on the prompts of --exam.

        The LLM answers them twice, with the published test decoding and as the game samples.
        """
        if not self.exam:
            return {}
        args, found = self.args, []
        test = dict(top_k=args.test_top_k, top_p=args.test_top_p)  # [choice 30]
        for t, decoding, out in (
            (args.test_temperature, test, folder),
            (args.temperature, {}, folder / "sampled"),
        ):
            texts = self.answers(policy, self.exam, out, t, 1, **decoding)
            rows = judge_mini(self.exam, [text[0] if text else "" for text in texts])
            rows = [row | {"prompt": i} for i, row in enumerate(rows)]
            found += [*mean_and_error(rows, "strict", 100), *mean_and_error(rows, "score")]
        return dict(zip(COLUMNS[4:12], found, strict=True))

    def play(self, variant: str, k: int, policy: Path, folder: Path, frozen: Path | None) -> dict:
        """Plays round k, counted from 1, and returns its row of rounds.csv.

        policy is the LLM's folder before the round. frozen is the folder of a finished reward model
        to use, or None. Raises Stopped if a signal has asked for an end.
        """
        args, reward = self.args, frozen or folder / "reward"
        samples = self.answers(
            policy, self.prompts, folder / "answers", args.temperature, args.samples
        )
        if not any(samples):
            raise InputError(
                f"{folder}: no answer of the LLM ended within --max_new_tokens"
                f" {args.max_new_tokens}, and answers that were cut are not used; pass a larger one"
            )
        distributed.from_rank_0(lambda: reward.mkdir(exist_ok=True), "--out_dir")
        learn = partial(self.train_reward, variant, samples, reward)
        n = len(self.held_out)
        margins = once(reward / "margins.json", learn, partial(are_numbers, n=n))
        accuracy, ece = accuracy_and_ece(margins)
        distributed.free_memory()
        lengths = [len(texts) for _, texts in self.of_llm(samples)]

        def fit(rewards):
            return len(rewards) == len(lengths) and all(map(are_numbers, rewards, lengths))

        rewards = once(folder / "rewards.json", partial(self.rewards, reward, samples), fit)
        distributed.free_memory()
        rows = self.pairs(samples, rewards)
        if len(rows) < args.batch_size:
            raise InputError(
                f"--batch_size {args.batch_size}: only {len(rows)} of {len(rewards)} prompts"
                f" have usable answers that ended within --max_new_tokens {args.max_new_tokens}"
                f" ({folder})"
            )
        print0(f"{len(rows)} of the LLM's {len(rewards)} prompts have usable answers")
        text, path = json_lines(rows), folder / "pairs.jsonl"
        if path.exists() and path.read_bytes() != text.encode():
            print0(f"{path} does not hold what follows from rewards.json, and is written anew")
        distributed.from_rank_0(lambda: write_synced(path, text), "--out_dir")
        if self.align(policy, k, folder):
            raise Stopped
        distributed.free_memory()
        scores = [r for of_prompt in rewards for r in of_prompt]
        row = {"variant": variant, "round": k, "rm_acc": 100 * accuracy, "rm_ece": ece}
        row |= self.examine(folder / "policy" / "hf", folder / "eval")
        return row | {"reward": float(np.mean(scores)), "pairs": len(rows)}


# ---------------------------------------------------------------------- all rounds


def check_input(args, device: torch.device) -> Game:
    """Checks everything that can be refused before a weight is read; returns the game.

    Raises InputError. Nothing here communicates between ranks.
    """
    check_out_dir(args)
    distributed.check_batch_size(args.batch_size)
    return Game(args, device)


def play_all(args, argv: list[str], device: torch.device, stack: ExitStack, program: list[str]):
    """Plays all rounds of all variants and writes rounds.csv; the stack holds --out_dir's lock.

    argv and program are those of flags.command_line.
    """
    begin = time.perf_counter()
    args.template_day = report.template_day(args)
    build_miniature(args, partial(check_input, device=device))
    game = check_input(args, device)
    out = claim_with_config(args, stack, game.fingerprint)
    for whose, summary in game.about.items():
        print0(f"{whose}: {summary}")
    print0(
        f"{len(game.golden)} prompts of the reward model and as many of the LLM x {args.samples}"
        f" samples, {len(game.human)} human pairs,"
        f" {len(game.held_out)} held out; logs: {out}/start.log, {out}/*/round*/log\n{HEADER}"
    )
    start = printing_to(out / "start.log", partial(game.examine, args.model, out / "start"))
    table = [{"variant": "start", "round": 0} | start]
    print0(line(table[0]))
    for variant in args.variants:
        policy, frozen = Path(args.model), None
        for k in range(1, args.rounds + 1):
            folder = out / variant / f"round{k}"
            make = partial(folder.mkdir, parents=True, exist_ok=True)
            distributed.from_rank_0(make, "--out_dir")
            play = partial(game.play, variant, k, policy, folder, frozen)
            try:
                play = partial(printing_to, folder / "log", play)
                row = once(folder / "round.json", play, partial(is_row, variant=variant, k=k))
            except Stopped:
                words = shlex.join([*program, "--resume", *(w for w in argv if w != "--resume")])
                return print0(f"stopped; resume with: python {words}")
            table.append(row)
            print0(line(row))
            for state in ("policy/state", "reward/state"):  # of no use after the round
                shutil.rmtree(folder / state, ignore_errors=True)
            policy = folder / "policy" / "hf"
            if variant == "frozen":
                frozen = frozen or folder / "reward"
    rounds = report.Table(out / "rounds.csv", COLUMNS)
    for row in table:
        rounds.write(row)
    print0(f"wrote {out} in {time.perf_counter() - begin:.0f} s")


def is_row(row: dict, variant: str, k: int) -> bool:
    """Returns whether a value is round k's row of rounds.csv."""
    numbers = [v for key, v in row.items() if key != "variant" and v is not None]
    whole = {"rm_acc", "rm_ece", "reward", "pairs"} <= {*row} <= {*COLUMNS}
    whose = row["variant"], row["round"]
    return whole and whose == (variant, k) and are_numbers(numbers, len(numbers))


def printing_to(path: Path, function: Callable):
    """Returns function()'s value; what it prints is added to a file."""
    with path.open("a") as log, redirect_stdout(log):
        return function()


HEADER = "variant   round  RM accuracy    ECE    strict           gold             strict, sampled"


def line(row: dict) -> str:
    """Returns a row of rounds.csv as a line under HEADER."""

    def show(key, spec, width):
        return (format(row[key], spec) if row.get(key) is not None else "-").rjust(width)

    text = f"{row['variant']:<9} {row['round']:>5} {show('rm_acc', '.1f', 12)}"
    text += f" {show('rm_ece', '.3f', 6)}"
    text += f" {show('strict_acc', '.1f', 9)} +- {show('strict_acc_se', '.1f', 3)}"
    text += f" {show('mean_score', '.3f', 8)} +- {show('mean_score_se', '.3f', 5)}"
    return text + f" {show('sampled_acc', '.1f', 8)} +- {show('sampled_acc_se', '.1f', 3)}"


# ---------------------------------------------------------------------- the command

SHARED = "seed dtype max_length batch_size micro_tokens save_every".split()
OF_GAME = [*SHARED, *"model ref_model dataset out_dir lr keep chat_template checkpointing".split()]
OF_GAME += ["timeout", "resume"]


def aligner_flags(args) -> list[str]:
    """Returns train_ganpo.py's flags for the LLM's step that are the same in all rounds."""
    flags = [f"--{name}={getattr(args, name)}" for name in SHARED] + ["--keep=1"]
    flags += ["--micro_batch_size=8"]  # as the results in docs/apo.md were measured
    flags += ["--checkpointing"] * args.checkpointing
    flags += [f"--chat_template={args.chat_template}"] * bool(args.chat_template)
    plain = {"rejection": ["--loss=sft", "--lambda_adv=0"], "dpo": ["--lambda_adv=0"], "ganpo": []}
    return flags + plain[args.aligner] + args.to_aligner


# fmt: off
def flags() -> Parser:
    """Returns the parser of all flags."""
    usage = "torchrun -m apo.train_apo [--flag value ...] [-- flags of train_ganpo.py]"
    parser = Parser("apo.train_apo", __doc__, usage)
    add = parser.add_argument_group("what to play on").add_argument
    add("--model", help="the LLM and the reward model's base [the miniature's reference]")
    add("--golden", metavar="FILE", help="rows of prompt and golden [the miniature's solver]")
    add("--human", metavar="FILE", help="preference pairs [the miniature's annotator]")
    add("--held_out", metavar="FILE", help="pairs that examine the reward model [the miniature's]")
    add("--exam", metavar="FILE", help="prompts for the miniature's judge [its own; else none]")
    add("--chat_template", help="a jinja file, or one of the tokenizer's [its own]")
    add("--max_length", type=count, default=256, help="tokens of prompt + response [256]")
    add = parser.add_argument_group("the game [default; the paper's where it differs]").add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="[all three]")
    add("--rounds", type=count, default=3, help="[3]")
    add("--prompts", type=count, default=1024, help="of reward model and LLM, each its own [1024]")
    add("--samples", type=number(int, 2), default=4, help="answers per prompt [4]")
    add("--temperature", type=positive, default=1.0, help="of these answers [1; paper 1.2]")
    add("--apo_loss", choices=["ranking", "difference"], default="ranking", help="[ranking]")
    add("--apo_weight", type=positive, default=0.1, help="of all game pairs of a prompt [0.1]")
    add("--aligner", choices=["rejection", "dpo", "ganpo"], default="rejection", help="[rejection]")
    add("--lr", type=positive, nargs="+", default=[1e-4, 4e-5, 2e-5], help="of the LLM in each"
        " round [1e-4 4e-5 2e-5; paper 5e-6 2e-6 9e-7]")  # [choice 31]
    add("--rm_lr", type=positive, default=1e-3, help="of the reward model [1e-3; paper 1e-6]")
    add("--batch_size", type=count, default=32, help="pairs per step [32; paper 64]")
    add("--test_temperature", type=at_least_0, default=0.3, help="decoding of the exam [0.3]")
    add("--test_top_k", type=natural, default=5, help="[5]")
    add("--test_top_p", type=fraction, default=0.85, help="[0.85]")
    add = parser.add_argument_group("running").add_argument
    add("--micro_tokens", type=count, default=16384, help="per forward and rank [16384]")
    add("--max_new_tokens", type=count, default=64, help="of an answer [64]")
    add("--dtype", choices=DTYPES, default="float32", help="of compute [float32]")
    add("--checkpointing", action="store_true", help="recompute layers in backward")
    add("--save_every", type=natural, default=0, help="steps between states [0: none]")
    add("--seed", type=natural, default=0, help="[0]")
    add("--resume", action="store_true", help="continue the game of --out_dir")
    add("--timeout", type=seconds, default=3600, help="seconds to wait for another rank [3600]")
    add("--out_dir", default="out/apo", help="[out/apo]")
    return parser
# fmt: on


def parse_args(argv: list[str]):
    """Returns all settings; to_aligner holds the flags after `--`.

    Raises InputError for a flag that is wrong, also for one that train_ganpo.py would refuse.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    args = flags().parse_args(argv[:split])
    args.to_aligner = argv[split + 1 :]
    own = {"model": "model", "human": "train.jsonl", "held_out": "test.jsonl"}
    if args.golden is None:
        own |= {"golden": "train.jsonl", "exam": "prompts.jsonl"}
    for name, file in own.items():
        if getattr(args, name) is None:
            setattr(args, name, str(world_folder(args.seed) / file))
    given = given_flags(argv[:split])
    if len(args.lr) < args.rounds or "lr" in given and len(args.lr) > args.rounds:
        raise InputError(f"--lr: {len(args.lr)} rates for {args.rounds} rounds")
    if args.variants == ["frozen"] and (useless := given & {"apo_loss", "apo_weight"}):
        raise InputError(f"--variants frozen does not use --{', --'.join(sorted(useless))}")
    for word in args.to_aligner:
        if (name := word.split("=")[0].removeprefix("--")) in OF_GAME:
            raise InputError(f"--{name} after --: the game sets it")
    parse_ganpo_args([*aligner_flags(args), "--resume", "--out_dir=any"])  # may refuse a flag
    return args


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    program, argv = command_line(argv, "-m", "apo.train_apo")
    try:
        args = parse_args(argv)
        miniature = is_miniature(args.model, args.seed)
        with ExitStack() as stack:
            device = stack.enter_context(distributed.session(args.timeout, miniature))
            play_all(args, argv, device, stack, program)
    except (InputError, FloatingPointError, OSError) as error:
        refuse(program, error)


if __name__ == "__main__":
    main()
