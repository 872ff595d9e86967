"""Evaluates a model: its answers, a judge's verdicts, win rates with their errors.

    python eval_alpaca.py --model out/run-000/hf                # the miniature, its exact judge
    torchrun --nproc_per_node 8 eval_alpaca.py --model out/run-001/hf --prompts alpaca_eval \\
        --judge rm --reward_model Skywork/Skywork-Reward-V2-Llama-3.1-8B
    python eval_alpaca.py --outputs T0.json T0.7.json --temperatures 0 0.7      # written elsewhere
    python eval_alpaca.py --judge annotations --annotations FILE --alpaca_data DIR

Judges: mini (the miniature's exact judge), rm (a reward model), annotations (published AlpacaEval
annotation files), ifeval (lm_eval's checks), gpt4 (prints the command to run, spends nothing).

Files in --out, where NAME is model or baseline and T0.7 the temperature:

    NAME-T0.7.jsonl      every answer as soon as it is written; an interrupted command continues it
    NAME-T0.7.json       the answers in AlpacaEval's own format
    NAME-T0.7.meta.json  how they were made
    scores.jsonl         a row for each answer
    results.json         a row for each temperature
    results.meta.json    what was judged and by whom; other results are not written over these

Rates are in percent, errors are standard errors over prompts. A value that the judge does not give
is null.
"""

import cpu  # noqa: F401  must come before torch

import csv
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import distributed
from checkpoint import (
    check_writable,
    load_discriminators,
    locked,
    sha256,
    weights_fingerprint,
    write_synced,
)
from data import (
    ChatEncoder,
    InputError,
    RowFault,
    filled,
    hub_check,
    input_error_for,
    json_lines,
    names,
    prompt_column,
    read_rows,
    split_thinking,
    to_messages,
    unread_columns,
    user_chat,
)
from distributed import print0, share_out
from flags import (
    DTYPES,
    Parser,
    at_least_0,
    command_line,
    count,
    fraction,
    given_flags,
    natural,
    refuse,
    seconds,
    world_folder,
)
from generate import (
    Answer,
    generate,
    prompts_to_ids,
    quiet,
    refuse_half_characters,
    template_notes,
)
from policy import (
    check_token_ids,
    load_weights,
    positions_of,
    read_any_config,
    read_tokenizer,
    unused_settings,
)
from report import read_config
from reward_model import RewardModel, hidden_states, read_reward_model, unread_of
from settings import build_miniature, is_miniature
from winrate import NOTICED, length_controlled, summary, table

JUDGES = ("mini", "rm", "annotations", "ifeval", "gpt4")
ONLY_ANNOTATIONS = {"annotations", "difficulty"}  # flags that no other judge uses
NOT_OF_OUTPUTS = {"model", "score_discriminators", "samples"}  # flags that need a model's weights
OF_WRITING = "chat_template max_new_tokens batch_size top_k top_p".split()  # by a model
OF_ANNOTATIONS = {"judge", "alpaca_data", "timeout", "out"} | ONLY_ANNOTATIONS  # those it uses
ALPACA, ALPACA_N = "tatsu-lab/alpaca_eval", 805  # AlpacaEval's data set, and its instructions
BASELINE_FILE = "alpaca_eval_gpt4_baseline.json"
OFFICIAL_FILES = "instruction_difficulty.csv", "df_gamed.csv"  # for the length-controlled rate
BASELINE_COLUMNS = ("output", "generator", "dataset", "datasplit")
READ_BY = {  # what judges read of a row of --prompts beside the prompt
    "mini": ("family", "solution", "args"),
    "ifeval": ("key", "instruction_id_list", "kwargs"),
}
ANY_ANSWERS = {"chosen": "a", "rejected": "b"}  # they make a prompt a row of preference data
OF_TEXT = "cut_text left_out spelled".split()  # what reward model and critics did not read
ANSWERS_AT = "answers at T "  # and a temperature: a key of results.meta.json
LEAST_ROOM = 32  # tokens of a prompt beside --max_new_tokens


class Prompt(NamedTuple):
    """One row of --prompts."""

    instruction: str  # its text, by which AlpacaEval's files know it
    dataset: str
    record: dict  # the whole row, for judges that need more
    chat: list[dict] | None = None  # its messages, if they are more than one user's turn

    @classmethod
    def of(cls, chat: list[dict], dataset: str, record: dict):
        """Returns the prompt of a chat. The text of one with several turns shows their roles."""
        if len(chat) == 1:
            return cls(chat[0]["content"], dataset, record)
        text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in chat)
        return cls(text, dataset, record, chat)

    @property
    def messages(self) -> list[dict]:
        return self.chat or user_chat(self.instruction)


# ---------------------------------------------------------------------- AlpacaEval's files


def alpaca_file(args, name: str) -> Path:
    """Returns the path of a file of AlpacaEval's data set, in --alpaca_data or from the Hub."""
    if args.alpaca_data:
        for path in (Path(args.alpaca_data, name), Path(args.alpaca_data, name + ".gz")):
            if path.is_file():
                return path
        raise InputError(f"--alpaca_data {args.alpaca_data}: no {name}")
    with input_error_for(f"{ALPACA}: {name} cannot be fetched; pass --alpaca_data DIR"):
        hub_check(ALPACA, "dataset")
        return Path(hf_hub_download(ALPACA, name, repo_type="dataset"))


def check_outputs(
    source: str | Path, rows, instructions: list[str] | None = None, empty_ok: bool = False
) -> list[str]:
    """Returns a line about the columns that are not read, if there are any, in a list.

    Raises InputError unless rows are a whole outputs file.

    Every row needs instruction, output (not empty, unless empty_ok) and generator, and no
    instruction may occur twice. With `instructions` the rows have to be those of these instructions
    in their order.
    """
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{source}: no list of outputs")
    seen = {}
    for i, row in enumerate(rows):
        for key in ("instruction", "output", "generator"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise InputError(f"{source}: row {i} has no {key}")
            refuse_half_characters(row[key], f"{source}: row {i}")
        if not row["output"].strip() and not empty_ok:
            raise InputError(f"{source}: row {i} has an empty output")
        if row["instruction"] in seen:
            first = seen[row["instruction"]]
            raise InputError(f"{source}: row {i} has the instruction of row {first}")
        seen[row["instruction"]] = i
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if filled(value))
    more = names(key for key in columns if key not in ("instruction", *BASELINE_COLUMNS))
    unread = [f"{source}: columns not read: {more}"] * bool(more)
    if instructions is None:
        return unread
    if len(rows) != len(instructions):
        raise InputError(f"{source}: {len(rows)} rows, {len(instructions)} needed")
    for i, (row, instruction) in enumerate(zip(rows, instructions, strict=True)):
        if row["instruction"] != instruction:
            known = row["instruction"] in set(instructions)
            what = "out of order" if known else "not for one of the prompts"
            raise InputError(f"{source}: row {i} is {what}: {row['instruction'][:60]!r}")
    return unread


def read_alpaca_baseline(args) -> list[dict]:
    """Returns AlpacaEval's baseline outputs, whose instructions are its prompts."""
    path = alpaca_file(args, BASELINE_FILE)
    rows = read_rows(str(path), "train")
    check_outputs(path, rows)
    if len(rows) != ALPACA_N:
        raise InputError(f"{path}: {len(rows)} rows, {ALPACA_N} needed")
    return rows


def read_prompts(args) -> tuple[list[Prompt], list[str]]:
    """Returns the prompts of --prompts, and the columns of the file that are not read.

    Raises InputError if there are none, if a row cannot be used, or if an instruction occurs twice.
    """
    alpaca, where = args.prompts == "alpaca_eval", f"--prompts {args.prompts}"
    rows = read_alpaca_baseline(args) if alpaca else read_rows(args.prompts, "train")
    prompts, first, unread = [], {}, {}
    for i, row in enumerate(rows):
        try:
            pair = as_pair(row)
            chat = to_messages(pair)[0]
        except RowFault as reason:
            raise InputError(f"{where}: row {i}: {reason}") from None
        prompt = Prompt.of(chat, row.get("dataset") or Path(args.prompts).stem, row)
        text = prompt.instruction
        refuse_half_characters(text, f"{where}: row {i}")
        if text in first:
            raise InputError(f"{where}: row {i} has the instruction of row {first[text]}")
        first[text] = i
        prompts.append(prompt)
        unread |= dict.fromkeys(unread_columns(pair))
        unread |= dict.fromkeys(k for k in pair if filled(row.get(k)) and row[k] != pair[k])
    if not prompts:
        raise InputError(f"{where}: no rows")
    known = BASELINE_COLUMNS if alpaca else READ_BY.get(args.judge, ())
    return prompts, [name for name in unread if name not in {"instruction", "input", *known}]


def as_pair(row) -> dict:
    """Returns a row of --prompts as one of preference data, with any two answers.

    The prompt is a text as instruction (with Alpaca's input behind it, after an empty line) or a
    prompt as data.to_messages reads it: a text or a chat, with system and history. Raises RowFault
    if there is none, or an input without an instruction.
    """
    if not isinstance(row, dict):
        raise RowFault("not an object")
    pair = row | ANY_ANSWERS
    if filled(row.get("instruction")):
        parts = [row[key] for key in ("instruction", "input") if filled(row.get(key))]
        if not all(isinstance(part, str) for part in parts):
            raise RowFault("instruction or input is not text")
        pair["prompt"] = "\n\n".join(parts)
    elif filled(row.get("input")):
        raise RowFault("input without an instruction, to which it would belong")
    elif not filled(row.get(prompt_column(pair))):
        raise RowFault(f"no instruction and no prompt, text or chat, in {', '.join(row)}")
    return pair


# ---------------------------------------------------------------------- answers


class Writer:
    """A model that writes answers. Its weights are read when the first missing answer is needed.

    name is a folder or Hub id, flag the flag it was given by. args holds chat_template, dtype,
    seed, samples, max_new_tokens, batch_size, top_k, top_p and strip_thinking. A chat template that
    writes today's date writes `day` instead. Raises InputError, which begins with the flag, if
    there is no config, tokenizer, chat template or, in a folder, no weights.
    """

    def __init__(self, name: str, flag: str, args, device: torch.device, day: str | None = None):
        self.name, self.flag, self.args, self.device, self._lm = name, flag, args, device, None
        self.config = read_any_config(name, flag)
        self.room = positions_of(self.config) - args.max_new_tokens  # tokens of a prompt
        tokenizer = read_tokenizer(name, args.chat_template, flag)
        with input_error_for(f"{flag} {name}"):
            self.encoder = ChatEncoder(tokenizer, day)

    def read(self, chats: list[list[dict]]):
        """Reads all prompts. Sets cut, the numbers of those that are longer than there is room for,
        and notes, lines about what this model does not use or changes.

        Raises InputError if a prompt cannot be used or if there is no room.
        """
        if self.room < LEAST_ROOM:
            positions, whose = positions_of(self.config), self.flag.strip("-")
            raise InputError(
                f"--max_new_tokens {self.args.max_new_tokens} leaves {max(self.room, 0)} of the"
                f" {whose}'s {positions} positions for the prompt; {LEAST_ROOM} are needed"
            )
        with input_error_for(f"{self.flag} {self.name}"):
            ids = prompts_to_ids(self.encoder, chats)
            check_token_ids(ids, self.config)
        self.cut = {i for i, prompt in enumerate(ids) if len(prompt) > self.room}
        longer = f"{len(self.cut)} of {len(chats)} prompts are longer than {self.room} tokens"
        self.notes = [f"{longer}; the middle of these is left out"] * bool(self.cut)
        self.notes += template_notes(self.encoder, chats)
        if unused := unused_settings(self.name):
            self.notes.append(f"settings of generation_config.json not used: {unused}")

    @property
    def lm(self) -> PreTrainedModel:
        if self._lm is None:
            dtype = DTYPES[self.args.dtype]
            with input_error_for(f"{self.flag} {self.name}"):
                lm = load_weights(AutoModelForCausalLM, self.name, dtype=dtype)
                self._lm = lm.to(self.device)
        return self._lm

    def unfinished(self, n: int, out: Path, name: str) -> bool:
        """Returns whether answers to n prompts are missing in the files out/name-T*."""
        files = [answers_file(out, name, t) for t in self.args.temperatures]
        rows = [f.read_bytes().count(b"\n") if f.exists() else 0 for f in files]
        return min(rows) < n * self.args.samples

    def sampling(self, temperature: float) -> dict:
        """Returns the settings by which answers are drawn."""
        names = "samples max_new_tokens top_k top_p seed dtype".split()
        settings = {"temperature": temperature} | {k: getattr(self.args, k) for k in names}
        settings["chat_template"] = self.encoder.tokenizer.chat_template
        return settings | {"day": self.encoder.day}

    def settings(self, prompts: list[Prompt], temperature: float) -> dict:
        """Returns all that the answers depend on, and the versions that they were made with."""
        names, texts = ("torch", "transformers"), json.dumps([p.instruction for p in prompts])
        return {
            "model": self.name,
            "fingerprint": fingerprint(self.name, self.config),
            "prompts": hashlib.sha256(texts.encode()).hexdigest(),
            **self.sampling(temperature),
            "versions": {n: version(n) for n in names} | {"python": platform.python_version()},
        }

    def answers(
        self, prompts: list[Prompt], temperature: float, out: Path, name: str
    ) -> list[list[Answer]]:
        """Returns --samples answers to each prompt, on all ranks, and writes them to out/name-T*.

        Those that an earlier command has written are kept. Raises InputError if that command had
        other settings.
        """
        path, samples = answers_file(out, name, temperature), self.args.samples
        n = len(prompts) * samples
        rows = distributed.from_rank_0(
            lambda: self.earlier(path, self.settings(prompts, temperature)), "--out"
        )
        block = max(1, self.args.batch_size // samples) * dist.get_world_size()
        write, reported = partial(self.write, temperature), time.monotonic()
        for first in range(len(rows) // samples, len(prompts), block):
            more = [
                {"prompt": first + i, "sample": s} | answer._asdict()
                for i, answers in enumerate(share_out(prompts[first : first + block], write))
                for s, answer in enumerate(answers)
            ]
            rows += more
            distributed.from_rank_0(partial(append, path, more), "--out")
            if len(rows) == n or time.monotonic() - reported > 10:
                done = f"{len(rows):,} of {n:,} answers, {self.args.dtype}"
                print0(f"{name}, T {temperature:g}: {done}")
                reported = time.monotonic()
        answers = [Answer(row["text"], row["tokens"], row["ended"]) for row in rows]
        answers = [answers[i : i + samples] for i in range(0, len(answers), samples)]
        texts = [self.split(of_prompt[0].text)[1] for of_prompt in answers]
        write = partial(self.write_outputs, path.with_suffix(".json"), prompts, texts)
        distributed.from_rank_0(write, "--out")
        return answers

    def split(self, text: str) -> tuple[str, str]:
        """Returns what an answer thinks aloud, and the text of it that is judged."""
        return split_answer(text, self.args.strip_thinking, self.encoder.opened)

    def write(self, temperature: float, prompts: list[Prompt]) -> list[list[Answer]]:
        """Returns --samples new answers to each prompt."""
        args = self.args
        answers = generate(
            self.lm,
            self.encoder,
            [p.messages for p in prompts],
            temperature=temperature,
            seed=args.seed,
            samples=args.samples,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            top_k=args.top_k,
            top_p=args.top_p,
            cut_prompts=True,
        )
        return [answers[i : i + args.samples] for i in range(0, len(answers), args.samples)]

    def earlier(self, path: Path, settings: dict) -> list[dict]:
        """Returns the rows that an interrupted command has left in path, whole prompts only.

        Rewrites path with these rows. If there is no such file, writes the file of settings beside
        it. Raises InputError if its settings differ.
        """
        rows = []
        if path.exists() and path.stat().st_size:
            check_same_settings(path, settings)
            samples = settings["samples"]
            for i, line in enumerate(path.read_bytes().splitlines()):
                try:
                    row = json.loads(line)
                except ValueError:  # the command was killed while it wrote this line
                    break
                kinds = {"prompt": int, "sample": int, "text": str, "tokens": int, "ended": bool}
                whole = isinstance(row, dict) and all(
                    isinstance(row.get(key), kind) for key, kind in kinds.items()
                )
                if not whole or (row["prompt"], row["sample"]) != divmod(i, samples):
                    wrong = f"line {i + 1} is not the answer that belongs there"
                    raise InputError(f"{path}: {wrong}: remove the file")
                rows.append(row)
            rows = rows[: len(rows) // samples * samples]
        else:
            text = json.dumps(settings, indent=1) + "\n"
            write_synced(path.with_suffix(".meta.json"), text)
        write_synced(path, json_lines(rows))
        return rows

    def write_outputs(self, path: Path, prompts: list[Prompt], texts: list[str]):
        """Writes one answer to each prompt in AlpacaEval's own format."""
        rows = [
            {"instruction": p.instruction, "output": text, "generator": self.name}
            | {"dataset": p.dataset}
            for p, text in zip(prompts, texts, strict=True)
        ]
        check_outputs(path, rows, [p.instruction for p in prompts], empty_ok=True)
        write_synced(path, json.dumps(rows, indent=1) + "\n")


def split_answer(text: str, strip: bool, opened: str = "") -> tuple[str, str]:
    """Returns what an answer thinks aloud, and the text that is judged: the rest, or all of it.

    strip says which. opened is what the chat template puts between the assistant's header and the
    answer. If that opens a passage of thoughts which the answer does not close, the answer is
    nothing else.
    """
    thinking, rest = split_thinking(text)
    if not thinking and split_thinking(opened + "any")[1] == "":
        thinking, rest = text, ""
    return thinking, rest if strip else text


def answers_file(out: Path, name: str, temperature: float) -> Path:
    return out / f"{name}-T{temperature:g}.jsonl"


def read_meta(path: Path) -> dict:
    """Returns how the answers beside a file NAME-T*.meta.json were made."""
    with input_error_for(f"{path}: how it was made cannot be read (pass another --out)"):
        return dict(json.loads(path.read_text()))


def first_day(out: Path) -> str:
    """Returns the day which the answers in a folder have from their chat template, else today.

    Some templates write today's date. An evaluation that is continued later keeps its first day.
    """
    days = [read_meta(path).get("day") for path in sorted(out.glob("*.meta.json"))]
    return next(filter(None, days), str(date.today()))


def check_same_settings(path: Path, settings: dict):
    """Raises InputError if the answers in path were made with other values of these settings."""
    if not path.exists() or not path.stat().st_size:  # without an answer there is nothing to mix
        return
    old, changed = read_meta(path.with_suffix(".meta.json")), []
    for key, new in settings.items():
        if key in ("versions", "model") or old.get(key) == new:
            continue
        was, now = ("not given" if v is None else str(v) for v in (old.get(key), new))
        if key == "fingerprint":  # a moved folder is the same model
            was, now = f"{old.get('model')} ({was})", f"{settings['model']} ({now})"
        long = len(was + now) > 200
        changed.append(f"{key} is another" if long else f"{key} was {was}, is now {now}")
    if changed:
        changed = "; ".join(changed)
        raise InputError(f"{path} was made with other settings: {changed}; pass another --out")


def check_results(out: Path, settings: dict):
    """Raises InputError if a folder's results.json has results that would not be given again.

    settings say what is judged and by whom; results.meta.json holds them. They may add to those of
    the results: what was not given may be given now.
    """
    if (path := out / "results.json").exists():
        old = read_meta(path.with_suffix(".meta.json"))
        lost = [key for key in old if key.startswith(ANSWERS_AT) and key not in settings]
        if lost:
            lost = ", ".join(key.removeprefix(ANSWERS_AT) for key in lost)
            raise InputError(
                f"{path} has results at T {lost}, which would be lost: add {lost} to"
                " --temperatures, or pass another --out"
            )
        check_same_settings(path, {k: settings.get(k) for k, v in old.items() if v is not None})


def content(file: str | Path | None) -> str | None:
    """Returns a hash of a file, None of None."""
    return file and sha256(Path(file))[:16]


def append(path: Path, rows: list[dict]):
    """Adds rows to a .jsonl file and writes them to the disk."""
    with path.open("a") as file:
        file.write(json_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def fingerprint(name: str, config: PretrainedConfig | None) -> str:
    """Returns a hash of a folder's weights, config and tokenizer, or the commit of a Hub id."""
    if not Path(name).is_dir():
        return config._commit_hash
    files = sorted(f for f in Path(name).iterdir() if f.suffix in (".json", ".jinja", ".model"))
    return short_hash(
        json.dumps([weights_fingerprint(name), *([f.name, sha256(f)] for f in files)])
    )


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------- judges
# A judge is called with n prompts and a text for each, and returns n dicts that hold those of the
# keys score, strict and loose that it has a value for.


def judge_mini(prompts: list[Prompt], texts: list[str]) -> list[dict]:
    """Returns strict accuracy and gold score by the miniature's exact judge."""
    from miniature import world  # imported only where it is used

    verdicts = [world.judge(task_of(p), text) for p, text in zip(prompts, texts, strict=True)]
    return [{"score": v.gold, "strict": v.strict} for v in verdicts]


def task_of(prompt: Prompt, where: str = "--judge mini"):
    """Returns the miniature.world.Task of a prompt; raises InputError, which begins with `where`,
    if it is none."""
    from miniature import world  # imported only where it is used

    return world.task_of(prompt.record, where)


def judge_of_ifeval(prompts: list[Prompt]) -> Callable:
    """Returns a judge by the official checks of IFEval (tools/ifeval.py).

    strict and loose are 1 if all checks are passed; score is the share of checks passed strictly.
    Raises ImportError if lm_eval, which brings the checks, is not installed, and InputError if the
    prompts do not name theirs.
    """
    from tools.ifeval import Checks  # imported only where it is used

    def rows_of(prompts):
        return [p.record | {"prompt": p.instruction} for p in prompts]

    def judge(prompts: list[Prompt], texts: list[str]) -> list[dict]:
        found = [checks(row, text) for row, text in zip(rows_of(prompts), texts, strict=True)]
        return [
            {k: float(all(one[k])) for k in one} | {"score": np.mean(one["strict"])}
            if one["strict"]
            else {}
            for one in found
        ]

    try:
        checks = Checks(rows_of(prompts))
    except ValueError as error:
        raise InputError(f"--judge ifeval: {error}") from None
    for name, reason in checks.skipped.items():
        print0(f"check {name} is skipped: {reason}")
    if none := sum({*p.record["instruction_id_list"]} <= {*checks.skipped} for p in prompts):
        print0(f"{none} of {len(prompts)} prompts have no other check")
    return judge


class Critics:
    """Scores answers by both discriminators of a run, on the latents of the model that wrote them.

    Called as a judge; each row has critic_pos, critic_neg and OF_TEXT. Raises InputError if the
    file is not one of discriminators or does not fit the model.
    """

    def __init__(self, path: str, writer: Writer):
        self.writer, where = writer, f"--score_discriminators {path}"
        if not Path(path).is_file():
            raise InputError(f"{where}: no such file")
        try:
            self.critics = load_discriminators(path, writer.device)
        except Exception:  # torch's message advises to load such a file without its safeguards
            raise InputError(f"{where}: not a whole file of discriminators") from None
        if getattr(self.critics["disc_pos"], "reads_differences", False):
            raise InputError(
                f"{where}: these critics read h - h_ref, and this program loads no reference"
            )
        size, own = (
            self.critics["disc_pos"].project_in.in_features,
            writer.config.get_text_config().hidden_size,
        )
        if size != own:
            raise InputError(f"{where}: for latents of size {size}; those of the model have {own}")

    @torch.inference_mode()
    def __call__(self, prompts: list[Prompt], texts: list[str], batch_size: int = 32) -> list[dict]:
        encoder, rows = self.writer.encoder, []
        limit = positions_of(self.writer.config)
        pairs = [(p.messages, text) for p, text in zip(prompts, texts, strict=True)]
        ids = [encoder.answer_ids(messages, encoder.plain(text)) for messages, text in pairs]
        for first in range(0, len(ids), batch_size):
            texts = [text[:limit] for text in ids[first : first + batch_size]]
            h, mask = hidden_states(self.writer.lm, texts)
            scores = [critic(h.float(), mask).tolist() for critic in self.critics.values()]
            rows += [{"critic_pos": p, "critic_neg": n} for p, n in zip(*scores, strict=True)]
        unread = [unread_of(encoder, *pair, limit) for pair in pairs]
        return [row | of_text for row, of_text in zip(rows, unread, strict=True)]


# ---------------------------------------------------------------------- published annotations


def annotated(args) -> tuple[list[dict], list[dict], dict]:
    """Returns the rows of results.json and scores.jsonl for --judge annotations, and what
    results.meta.json holds.

    The numbers are AlpacaEval's own, from its published files. Raises InputError if one of these
    cannot be used.
    """
    baseline = read_alpaca_baseline(args)
    place, found = {row["instruction"]: i for i, row in enumerate(baseline)}, {}
    for i, row in enumerate(read_rows(args.annotations, "train")):
        row = dict(row) if isinstance(row, dict) else {}
        where = f"--annotations {args.annotations}: row {i}"
        instruction, preference = row.get("instruction"), row.get("preference")
        index = place.get(instruction) if isinstance(instruction, str) else None
        if index is None:
            raise InputError(f"{where}: not one of AlpacaEval's instructions")
        if index in found:
            raise InputError(f"{where}: its instruction occurs twice")
        if "output_1" not in row:  # then the other answer is that of AlpacaEval's baseline
            other = row.get("generator_1", baseline[index]["generator"])
            if other != baseline[index]["generator"]:
                raise InputError(f"{where}: no output_1, the answer of {other!r}")
            row |= {"output_1": baseline[index]["output"], "generator_1": other}
        for key in ("output_1", "output_2"):
            if not isinstance(row.get(key), str):
                raise InputError(f"{where}: no text as {key}")
            refuse_half_characters(row[key], where)
        if preference is None or preference != preference:
            row["preference"] = None  # the judge has failed: null, or nan
        elif isinstance(preference, bool):
            raise InputError(f"{where}: preference {preference!r} is not in [1, 2]")
        elif preference == 0:
            row["preference"] = 1.5  # so AlpacaEval once wrote a tie
        elif not isinstance(preference, int | float) or not 1 <= preference <= 2:
            raise InputError(f"{where}: preference {preference!r} is not in [1, 2]")
        found[index] = row
    if not found:
        raise InputError(f"--annotations {args.annotations}: no rows")
    names = {
        key: one_of(found.values(), column, args.annotations)
        for key, column in (("model", "generator_2"), ("baseline", "generator_1"))
    }
    scores = []
    for index, row in sorted(found.items()):
        win = row["preference"] and row["preference"] - 1
        scores.append({"prompt": index, "sample": 0, "win": win})
        for key, whose in (("output_2", ""), ("output_1", "_baseline")):
            thinking = split_thinking(row[key])[0]
            scores[-1] |= {f"length{whose}": len(row[key]), f"thinking{whose}": len(thinking)}
    control = official_control(args, [r["prompt"] for r in scores if r["win"] is not None])
    result = summary(scores, control, **names, judge="annotations")
    if names["model"] == names["baseline"]:
        result["lc_win_rate"] = 50.0  # by construction, as officially
    judged = {"judge": "annotations", "difficulty": args.difficulty}
    judged["content of --annotations"] = content(args.annotations)
    for name in (BASELINE_FILE, *OFFICIAL_FILES):
        judged[f"content of {name}"] = content(alpaca_file(args, name))
    distributed.from_rank_0(lambda: check_results(Path(args.out), judged), "--out")
    return [result], scores, judged


def one_of(rows: Iterable[dict], column: str, source: str) -> str:
    """Returns the value of a column; raises InputError unless all rows have it and it is one."""
    values = list(dict.fromkeys(row.get(column) for row in rows))
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"--annotations {source}: a row has no text as {column}")
    if len(values) > 1:
        raise InputError(f"--annotations {source}: several values of {column}: {values[:3]}")
    return values[0]


def official_control(args, prompts: list[int]) -> Callable:
    """Returns length_controlled with the difficulties of these prompts and the gamed answers.

    Where annotations are missing, AlpacaEval gives the i-th row the difficulty of instruction i;
    --difficulty instruction gives each row that of its own. What was done is printed.
    """
    n, by_position = len(prompts), args.difficulty == "position"
    if n < ALPACA_N:
        how = "the row's own instruction"
        if by_position:
            how = "row position, as AlpacaEval does (--difficulty instruction: by its own)"
        print0(f"{n} of {ALPACA_N} instructions have a preference; difficulties by {how}")
    elif not by_position:
        print0("not used with all annotations: --difficulty")
    path = alpaca_file(args, OFFICIAL_FILES[0])
    with input_error_for(str(path)), path.open() as file:
        of_prompt = {int(r["index"]): r["instruction_difficulty"] for r in csv.DictReader(file)}
        difficulty = [float(of_prompt[i]) for i in (range(n) if by_position else prompts)]
    path = alpaca_file(args, OFFICIAL_FILES[1])
    with input_error_for(str(path)), path.open() as file:
        rows = list(csv.DictReader(file))
        names = "std_delta_len", "instruction_difficulty", "preference", "index"
        length, of_rows, preference, index = np.array([[float(r[k]) for r in rows] for k in names])
        constant = np.array([r["not_gamed_baseline"] == "True" for r in rows], dtype=float)
    gamed = np.stack([np.tanh(length), of_rows, constant], 1), preference, index
    return partial(length_controlled, difficulty=np.array(difficulty), gamed=gamed)


# ---------------------------------------------------------------------- an evaluation


def check_input(args, device: torch.device) -> SimpleNamespace:
    """Checks everything that can be refused before a model's weights are read.

    Nothing here communicates between ranks. Raises InputError; otherwise returns

    prompts   list of Prompt
    writer    Writer of --model, or None with --outputs
    own       the answers of each file of --outputs by its temperature
    baseline  Writer of --baseline, or None
    outputs   the answers of a --baseline that is a file, --samples equal ones per prompt, or None
    judge     the judge, or None if --judge has no verdicts of its own here
    critics   Critics of --score_discriminators, or None
    unread    columns of --prompts that are not read
    notes     lines about what models do not use or change
    reward    what read_reward_model returns of --reward_model, or a pair of None
    """
    check_writable(Path(args.out), "--out")
    prompts, unread = read_prompts(args)
    instructions, own, notes = [p.instruction for p in prompts], {}, []
    for temperature, file in zip(args.temperatures, args.outputs or (), strict=False):
        *own[temperature], more = read_outputs(file, instructions)
        notes += more
    writer = None if own else Writer(args.model, "--model", args, device, args.day)
    baseline = outputs = judge = critics = None
    reward = None, None
    if args.baseline == "alpaca_eval" or args.baseline and Path(args.baseline).is_file():
        file = args.baseline
        if file == "alpaca_eval":
            file = str(alpaca_file(args, BASELINE_FILE))
        rows = read_rows(file, "train")
        notes += check_outputs(file, rows, instructions)
        outputs = [[Answer(row["output"], None, None)] * args.samples for row in rows]
    elif args.baseline:
        baseline = Writer(args.baseline, "--baseline", args, device, args.day)
    chats = [p.messages for p in prompts]
    for who in filter(None, (writer, baseline)):
        who.read(chats)
        notes += [f"{who.flag}: {line}" for line in who.notes]
    for name, who in (("model", writer), ("baseline", baseline)):
        for temperature in args.temperatures if who else ():
            path = answers_file(Path(args.out), name, temperature)
            check_same_settings(path, who.sampling(temperature))
    if args.judge == "mini":
        judge = judge_mini
        for i, p in enumerate(prompts):
            task_of(p, f"--judge mini: {args.prompts}: row {i}")
    elif args.judge == "ifeval":
        try:
            judge = judge_of_ifeval(prompts)
        except ImportError as error:
            print0(
                f"--judge ifeval: no lm_eval here ({error}); the answers are written, and scored"
                f" where it is by: python -m tools.ifeval {args.out}/model-T*.json {args.prompts}"
            )
    if args.reward_model:
        encoder, config = reward = read_reward_model(args.reward_model, day=args.day)
        with input_error_for(f"--reward_model {args.reward_model}"):
            check_token_ids(prompts_to_ids(encoder, chats), config)
        notes += [f"--reward_model: {line}" for line in template_notes(encoder, chats)]
    if args.score_discriminators:
        critics = Critics(args.score_discriminators, writer)
    return SimpleNamespace(
        prompts=prompts, writer=writer, own=own, baseline=baseline, outputs=outputs, judge=judge,
        critics=critics, unread=unread, notes=notes, reward=reward,
    )  # fmt: skip


def read_outputs(file: str, instructions: list[str]) -> tuple[str, list[list[Answer]], list[str]]:
    """Returns the generator of a file of --outputs, its answers, one to each instruction, and what
    check_outputs returns.

    Raises InputError if the file cannot be read, or is not one model's answers to them all.
    """
    where, rows = f"--outputs {file}", read_rows(file, "train")
    unread = check_outputs(where, rows, instructions, empty_ok=True)
    if len(whose := {row["generator"]: None for row in rows}) > 1:
        raise InputError(f"{where}: answers of several generators: {', '.join(whose)}")
    return next(iter(whose)), [[Answer(row["output"], None, None)] for row in rows], unread


def score_rows(
    inputs: SimpleNamespace, reward: RewardModel | None, args, who: Writer | None, items: list
) -> list[dict]:
    """Returns a score row for each item: numbers of prompt and sample, and the Answer.

    who has written the answers, None if they were read from a file. The critics read the latents of
    --model, so they score its answers alone.
    """
    rows, texts = [], []
    for i, s, answer in items:
        split = who.split if who else partial(split_answer, strip=args.strip_thinking)
        thinking, text = split(answer.text)
        rows.append({"prompt": i, "sample": s, "length": len(text), "thinking": len(thinking)})
        rows[-1]["cut_answer"] = None if answer.ended is None else not answer.ended
        rows[-1]["cut_prompt"] = i in who.cut if who else None
        rows[-1] |= {"empty": not text.strip()} | dict.fromkeys(OF_TEXT)
        texts.append(text)
    prompts = [inputs.prompts[i] for i, _, _ in items]
    columns = [inputs.judge(prompts, texts)] if inputs.judge else []
    if reward:
        asked = [p.messages for p in prompts], texts
        keys = ("score", "reward") if args.judge == "rm" else ("reward",)
        columns.append([dict.fromkeys(keys, value) for value in reward.score(*asked)])
        columns.append(reward.unread(*asked))
    if inputs.critics and who is inputs.writer:
        columns.append(inputs.critics(prompts, texts))
    for more in columns:
        for row, values in zip(rows, more, strict=True):
            # of texts: by one of the two that read them
            row |= values | {k: row[k] or values[k] for k in OF_TEXT if k in values}
    return rows


def compare(own: list[dict], other: list[dict] | None):
    """Adds win, and what is known of the baseline's answers, to the model's score rows.

    other holds the baseline's rows in the same order, or is None. The higher score wins; equal
    scores count 1/2.
    """
    for i, row in enumerate(own):
        row["win"] = None
        for key in ("length", *NOTICED):
            row[f"{key}_baseline"] = other[i].get(key) if other else None
        if other and row.get("score") is not None:
            row["win"] = float(np.heaviside(row["score"] - other[i]["score"], 0.5))


def judged_by(args, inputs: SimpleNamespace) -> dict:
    """Returns what an evaluation judges and by whom, beside what the answers' own files tell."""
    encoder, config = inputs.reward
    files = dict(zip(args.temperatures, args.outputs or (), strict=False))
    baseline = inputs.outputs and short_hash(repr(inputs.outputs))
    if inputs.baseline:
        baseline = fingerprint(args.baseline, inputs.baseline.config)
    return {
        "judge": args.judge,
        "strip_thinking": args.strip_thinking,
        "dtype": args.dtype,
        "day": encoder and encoder.day,
        "prompts": short_hash(repr([p.record for p in inputs.prompts])),
        "content of --baseline": baseline,
        "content of --reward_model": config and fingerprint(args.reward_model, config),
        "content of --score_discriminators": content(args.score_discriminators),
        **{f"{ANSWERS_AT}{t:g}": content(files.get(t)) or "--model's" for t in args.temperatures},
    }


def evaluate(args, device: torch.device, stack: ExitStack) -> tuple[list[dict], list[dict], dict]:
    """Returns the rows of results.json and of scores.jsonl, and what results.meta.json holds;
    writes the answers to --out, which it locks until the stack ends."""
    inputs = check_input(args, device)
    prompts, writer, out = inputs.prompts, inputs.writer, Path(args.out)
    for line in inputs.notes:
        print0(line)
    judged = distributed.from_rank_0(lambda: judged_by(args, inputs), "--out")
    distributed.from_rank_0(lambda: check_results(out, judged), "--out")
    reward = None
    if args.reward_model:
        reward = RewardModel(args.reward_model, device, DTYPES[args.dtype], args.day)

    def examine(answers, who):
        items = [
            (i, s, answer)
            for i, of_prompt in enumerate(answers)
            for s, answer in enumerate(of_prompt)
        ]
        return share_out(items, partial(score_rows, inputs, reward, args, who))

    if inputs.own:
        print0("--outputs: not known of these answers, and so null: cut_answer, cut_prompt")
    if inputs.unread:
        print0(f"--prompts {args.prompts}: columns not read: {', '.join(inputs.unread)}")
    for name, who in (("model", writer), ("baseline", inputs.baseline)):
        if who and who.unfinished(len(prompts), out, name):
            who.lm  # noqa: B018  read now, so that none writes if the other cannot be used
    distributed.from_rank_0(partial(stack.enter_context, locked(out)), "--out")
    results, scores = [], []
    names = "model baseline judge reward_model seed strip_thinking".split()
    settings = {k: getattr(args, k) for k in names}
    for temperature in args.temperatures:
        if writer:
            answers = writer.answers(prompts, temperature, out, "model")
        else:
            settings["model"], answers = inputs.own[temperature]
            settings["outputs"] = args.outputs[args.temperatures.index(temperature)]
        rows = examine(answers, writer)
        other = inputs.outputs
        if inputs.baseline:
            other = inputs.baseline.answers(prompts, temperature, out, "baseline")
        compare(rows, examine(other, inputs.baseline) if other else None)
        results.append(summary(rows, **settings, temperature=temperature))
        scores += [{"temperature": temperature} | row for row in rows]
        if args.judge == "gpt4":
            reference = args.baseline
            if inputs.baseline:
                reference = answers_file(out, "baseline", temperature).with_suffix(".json")
            mine = settings.get("outputs") or f"{out}/model-T{temperature:g}.json"
            command = gpt4_command(reference, mine, f"{out}/gpt4-T{temperature:g}")
            print0(f"run this where there is an OpenAI key: {command}")
    return results, scores, judged


def gpt4_command(reference: str | Path | None, outputs: str, out: str) -> str:
    """Returns the command by which AlpacaEval's own judge compares a file of outputs with those of
    a reference file, by default those of AlpacaEval's baseline."""
    return (
        "pip install alpaca_eval && alpaca_eval --annotators_config weighted_alpaca_eval_gpt4_turbo"
        f" --model_outputs {outputs}"
        + (f" --reference_outputs {reference}" if reference else "")
        + f" --output_path {out}"
    )


def write_results(out: Path, results: list[dict], scores: list[dict], judged: dict):
    """Writes what evaluate or annotated returned."""
    out.mkdir(parents=True, exist_ok=True)
    write_synced(out / "results.meta.json", json.dumps(judged, indent=1) + "\n")
    write_synced(out / "scores.jsonl", json_lines(scores))
    write_synced(out / "results.json", json.dumps(results, indent=1) + "\n")


# ---------------------------------------------------------------------- the program


def flags() -> Parser:
    """Returns the parser of all flags."""
    # fmt: off
    parser = Parser("eval_alpaca.py", __doc__)
    add = parser.add_argument
    add("--model", help="a Hugging Face folder or Hub id")
    add("--outputs", nargs="+", metavar="FILE",
        help="answers in AlpacaEval's format in place of --model, a file per temperature")
    add("--baseline", help="a model, or a file of its outputs [mini: its reference; AlpacaEval's]")
    add("--prompts", default="mini", help="mini, alpaca_eval, or a file of instructions [mini]")
    add("--judge", choices=JUDGES, default="mini", help="[mini]")
    add("--reward_model", help="folder or Hub id; judges with rm, adds a column with other judges")
    add("--score_discriminators", metavar="FILE", help="a run's discriminators.pt; adds columns")
    add("--annotations", metavar="FILE", help="what --judge annotations reads")
    add("--difficulty", choices=["position", "instruction"], default="position",
        help="of annotations where rows are missing: looked up by [position, as AlpacaEval]")
    add("--alpaca_data", metavar="DIR", help=f"AlpacaEval's files [{ALPACA} on the Hub]")
    add("--chat_template", help="for --model and --baseline: a jinja file, or one of their own")
    add("--temperatures", type=at_least_0, nargs="+", default=[0.0, 0.5, 0.7, 1.0, 1.2, 1.5],
        help="[0 0.5 0.7 1.0 1.2 1.5]")
    add("--strip_thinking", action="store_true", help="judge answers without their thinking [with]")
    add("--samples", type=count, default=1, help="answers per prompt [1]")
    add("--top_k", type=natural, default=0, help="draw from the k most probable tokens [0: all]")
    add("--top_p", type=fraction, default=1.0, help="draw from this share of probability [1]")
    add("--max_new_tokens", type=count, help="[2048; miniature 64]")
    add("--batch_size", type=count, default=128, help="answers written at once per rank [128]")
    add("--dtype", choices=DTYPES, help="of all models [bfloat16 on a GPU, else float32]")
    add("--seed", type=natural, help="of sampling, and the miniature's world [its run's; else 0]")
    add("--timeout", type=seconds, default=3600, help="seconds to wait for another rank [3600]")
    add("--out", help="folder [beside the model's, named by model, prompts, judge and baseline]")
    # fmt: on
    return parser


def parse_args(argv: list[str]):
    """Returns all settings. Names that stand for the miniature's files are replaced by paths."""
    args = flags().parse_args(argv)
    if args.judge == "annotations":
        if not args.annotations:
            raise InputError("--judge annotations needs --annotations FILE")
        if useless := sorted(given_flags(argv) - OF_ANNOTATIONS):
            raise InputError(f"--judge annotations does not use --{', --'.join(useless)}")
        name = re.sub(r"\.jsonl?(\.gz)?$", "", Path(args.annotations).name)
        args.out = args.out or f"out/annotations-{name}"
        return args
    if useless := sorted(given_flags(argv) & ONLY_ANNOTATIONS):
        raise InputError(f"--judge {args.judge} does not use --{', --'.join(useless)}")
    if args.outputs:
        check_outputs_flags(args, given_flags(argv))
    elif not args.model:
        raise InputError("--model is needed, or --outputs")
    if args.judge == "rm" and not args.reward_model:
        raise InputError("--judge rm needs --reward_model")
    if args.judge == "gpt4" and args.prompts != "alpaca_eval":
        raise InputError("--judge gpt4 needs --prompts alpaca_eval")
    if len(set(args.temperatures)) < len(args.temperatures):
        raise InputError("--temperatures: a value is given twice")
    if args.samples > 1 and not any(args.temperatures):
        raise InputError(
            f"--samples {args.samples}: at temperature 0 all answers to a prompt are equal; leave"
            " --samples out, or pass other --temperatures"
        )
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    args.out = args.out or default_out(args)
    if args.prompts == "mini":
        from miniature import world  # imported only where it is used

        if args.seed is None and args.model:
            args.seed = world_of(args.model)
        args.seed = args.seed or 0
        args.max_new_tokens = args.max_new_tokens or world.MAX_NEW_TOKENS
        args.prompts = str(world_folder(args.seed) / "prompts.jsonl")
        args.baseline = args.baseline or str(world_folder(args.seed) / "model")
    elif args.prompts == "alpaca_eval" and args.judge != "gpt4":
        args.baseline = args.baseline or "alpaca_eval"
    args.seed, args.max_new_tokens = args.seed or 0, args.max_new_tokens or 2048
    if args.model and args.baseline and Path(args.baseline).resolve() == Path(args.model).resolve():
        args.baseline = None
    return args


def check_outputs_flags(args, given: set[str]):
    """Raises InputError if a given flag contradicts --outputs, or its files and --temperatures are
    not equally many."""
    if useless := sorted(given & NOT_OF_OUTPUTS):
        raise InputError(f"--outputs does not use --{', --'.join(useless)}")
    if len({Path(file).resolve() for file in args.outputs}) < len(args.outputs):
        raise InputError("--outputs: a file is given twice")
    n = len(args.temperatures) if "temperatures" in given else 0
    if len(args.outputs) != n:
        raise InputError(
            f"--outputs has {len(args.outputs)} files and --temperatures {n} values: name the"
            " temperature of each file"
        )


def default_out(args) -> str:
    """Returns the folder for the answers of --model, another one for every model, --baseline and
    --reward_model.

    It lies beside the model's folder, or the first file of --outputs, or in out/ for a Hub id.
    """
    whose = args.outputs[0] if args.outputs else args.model
    folder, name = Path(whose), short_name(whose)
    what = f"{Path(args.prompts).stem}-{args.judge}"
    if args.reward_model:
        what += f"-by-{short_name(args.reward_model)}"
    if args.baseline:
        what += f"-vs-{short_name(args.baseline)}"
    if not folder.exists():
        return str(Path("out", name, f"eval-{what}"))
    is_run = folder.resolve().name == "hf"  # then its parent has the name
    return str(folder.parent / (f"eval-{what}" if is_run else f"eval-{name}-{what}"))


def short_name(model: str) -> str:
    """Returns a name for the folder or Hub id of a model, or for a file of outputs."""
    path = Path(model)
    if not path.exists():
        return model.replace("/", "--")
    path = path.resolve()
    return path.parent.name if path.name == "hf" else path.name.split(".json")[0]


def unused_flags(args, argv: list[str]) -> dict[str, list[str]]:
    """Returns the given flags that this evaluation does not use, by the reason."""
    given, greedy = given_flags(argv), "temperatures" in args and not any(args.temperatures)
    of_draws = ["top_k", "top_p"] + ["seed"] * (not is_miniature(args.prompts, args.seed))
    by_file = args.baseline in (None, "alpaca_eval") or Path(args.baseline).is_file()
    dtype = ["dtype"] * (not args.reward_model)
    by_nobody = args.outputs is not None and by_file  # no model writes
    no_alpaca = "alpaca_eval" not in (args.prompts, args.baseline)
    reasons = {
        "--temperatures 0": (greedy, of_draws),
        f"--prompts {args.prompts}": (no_alpaca and args.judge != "annotations", ["alpaca_data"]),
        "--outputs": (by_nobody, [*OF_WRITING, *of_draws[2:], *dtype]),
        "the same --model": (args.baseline is None and args.judge != "annotations", ["baseline"]),
    }
    unused = {
        reason: [f"--{name}" for name in names if name in given]
        for reason, (holds, names) in reasons.items()
        if holds
    }
    return {reason: names for reason, names in unused.items() if names}


def world_of(model: str) -> int:
    """Returns the seed of the world that a run's hf/ was trained in, and 0 for any other model.

    Another world's prompts may be among those that the model was trained on. Raises InputError if
    the run's config.json is damaged.
    """
    file = Path(model).parent / "config.json"
    run = read_config(file.parent)
    with input_error_for(
        f"{file} is damaged or not that of a run (pass --seed, which says in what world of the"
        " miniature the model is examined)"
    ):
        if run is None and Path(model).name == "hf" and file.exists():
            raise InputError("it has no data_fingerprint")
        run = run or {"seed": 0}
        used = {Path(run[k]).parent for k in ("model", "ref_model", "dataset") if k in run}
        return run["seed"] if world_folder(run["seed"]) in used else 0


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    program, argv = command_line(argv, "eval_alpaca.py")
    try:
        args = parse_args(argv)
        miniature = is_miniature(args.prompts, args.seed)
        with ExitStack() as stack, distributed.session(args.timeout, miniature) as device:
            for reason, unused in unused_flags(args, argv).items():
                print0(f"not used with {reason}: {', '.join(unused)}")
            if args.judge == "annotations":
                found = annotated(args)
            else:
                args.day = distributed.from_rank_0(lambda: first_day(Path(args.out)), "--out")
                build_miniature(args, partial(check_input, device=device))
                found = evaluate(args, device, stack)
            out = Path(args.out)
            distributed.from_rank_0(lambda: write_results(out, *found), "--out")
            print0(f"{table(found[0])}\nwrote {out}")
    except (InputError, FloatingPointError, OSError) as error:
        refuse(program, error)


if __name__ == "__main__":
    main()
