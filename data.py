"""Preference data: from rows of any of the usual schemas to token ids.

    data = load_pairs("ultrafeedback.jsonl.gz", "train", tokenizer, max_length=2048)
    data.triplets[0].prompt, .chosen, .rejected     # token ids

Rows that cannot be trained on are dropped and counted by reason; no row is repaired in silence.
This file knows no model and no ranks: every rank reads the same rows.
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

ACCEPTED = (
    "accepted are columns chosen and rejected as two chats (lists of {role, content}) that share"
    " all turns but the last, beside a prompt string or none; a prompt chat with one assistant"
    " message each; strings prompt, chosen, rejected; or two strings of \\n\\nHuman: and"
    " \\n\\nAssistant: turns"
)
MALFORMED_LIMIT = 0.01  # above this share of faulty rows it is the data set that is wrong


class InputError(ValueError):
    """What the user gave cannot be used; the message is the one line to show."""


class RowFault(Exception):
    """Why one row is dropped."""


class TooLong(RowFault):
    """Dropped for its length: nothing is wrong with the row."""


class Triplet(NamedTuple):
    """Token ids, int32: chosen and rejected continue prompt, which holds the assistant header
    [choice 12]."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    row: int  # in the source, counted from 0


class PreferenceData(NamedTuple):
    triplets: list[Triplet]
    dropped: Counter  # reason -> rows
    notes: Counter  # what was seen in rows that were kept -> rows
    n_rows: int
    fingerprint: str  # of every token id in order

    def steps(self, batch_size: int) -> int:
        """Of an epoch: whole batches only."""
        return len(self.triplets) // batch_size

    def summary(self) -> str:
        kept = f"{len(self.triplets):,} of {self.n_rows:,} rows"
        return f"{kept}; dropped: {counts(self.dropped)}; kept but noted: {counts(self.notes)}"


def counts(counter: Counter) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in counter.most_common()) or "none"


# ---------------------------------------------------------------------- rows


def read_rows(source: str, split: str):
    """A local .jsonl, .json or .parquet (also .gz), a folder, or a Hub id -> a sequence of
    dicts."""
    path = Path(source)
    kind = re.search(r"\.(jsonl|json|parquet)(\.gz)?$", source)
    if path.is_file() and not kind:
        raise InputError(f"{source}: not a .jsonl, .json or .parquet file (also .gz)")
    if not path.exists() and (kind or is_local(source)):
        raise InputError(f"{source}: no such file")
    if not path.is_file():
        return read_with_datasets(source, split)
    if split != "train":
        raise InputError(f"{source}: no split {split!r}; a single file has one, 'train'")
    try:
        raw = gzip.decompress(path.read_bytes()) if kind[2] else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read: {error}") from None
    return parse_parquet(source, raw) if kind[1] == "parquet" else parse_json(source, raw)


def parse_parquet(source: str, raw: bytes):
    import pyarrow  # comes with datasets; a second to import, so only where it is needed
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a whole parquet file: {error}") from None


def parse_json(source: str, raw: bytes):
    """One JSON list of rows, or one row a line."""
    try:
        text = raw.decode("utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
    except ValueError as error:  # both decoding and JSON
        raise InputError(f"{source}: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{source}, line {number}: not JSON: {error}") from None
    return rows


def json_lines(rows: Iterable[dict]) -> str:
    """What parse_json reads."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_with_datasets(source: str, split: str):
    import datasets  # two seconds to import, so only where it is needed

    with input_error_for(f"{source}: neither a file here nor a data set"):
        if Path(source, "dataset_dict.json").is_file() or Path(source, "state.json").is_file():
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(source)
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    if split not in found:
        raise InputError(f"{source}: no split {split!r}; it has {', '.join(found)}")
    return found[split]


def is_local(name: str) -> bool:
    """Whether a name can only be a path here, as no Hub id has that form."""
    return name.count("/") > 1 or name.startswith(("/", ".", "~"))


@contextmanager
def input_error_for(what: str):
    """Whatever is raised within (transformers, datasets, torch and the Hub raise what they like) as
    an InputError of one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    error = error.__cause__ or error
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_columns(source: str, rows: list):
    """The data set as a whole is no preference data: say what was found and what is accepted."""
    if not len(rows):
        raise InputError(f"{source}: no rows")
    row = rows[0]
    columns = list(row) if isinstance(row, dict) else [f"a {type(row).__name__}"]
    usable = "chosen" in columns and "rejected" in columns
    if usable and isinstance(row["chosen"], str):  # without a chat, a prompt or hh-rlhf's turns
        usable = "prompt" in columns or HH_TURN.search(row["chosen"])
    if not usable:
        raise InputError(f"{source}: no preference data in {', '.join(columns)}; {ACCEPTED}")


# ---------------------------------------------------------------------- one row to messages

SURROGATE = re.compile("[\ud800-\udfff]")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def to_messages(row) -> tuple[list[dict], str, str]:
    """A row of any accepted schema -> the prompt's messages, chosen and rejected text. RowFault if
    it is none."""
    if not isinstance(row, dict):
        raise RowFault("not an object")
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            chat = [{"role": "user", "content": prompt}]
            return checked(chat, chosen, rejected)
        chosen, rejected, prompt = hh_turns(chosen), hh_turns(rejected), None
    for chat in (chosen, rejected, *([prompt] if isinstance(prompt, list) else [])):
        check_chat(chat)
    if isinstance(prompt, list):
        # some sets repeat the prompt inside both chats
        chosen, rejected = (
            c[len(prompt) :] if c[: len(prompt)] == prompt else c for c in (chosen, rejected)
        )
    else:  # a prompt string beside chats repeats the user turn: the common turns are the prompt
        limit = min(len(chosen), len(rejected)) - 1
        n = next((i for i in range(limit) if bare(chosen[i]) != bare(rejected[i])), limit)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if len(chosen) != 1 or len(rejected) != 1:
        raise RowFault("different prompts")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise RowFault("answer is not the assistant's")
    return checked([bare(m) for m in prompt], chosen[0]["content"], rejected[0]["content"])


def user_chat(text: str) -> list[dict]:
    """Returns a conversation of one turn, the user's."""
    return [{"role": "user", "content": text}]


def bare(message: dict):
    return {"role": message["role"], "content": message["content"]}


def check_chat(chat):
    if not isinstance(chat, list) or not chat:
        raise RowFault("not text")
    for message in chat:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowFault("not text")
        if not isinstance(message.get("role"), str):
            raise RowFault("not text")


def hh_turns(text: str):
    parts = HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise RowFault("not text")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[r], "content": c.strip()}
        for r, c in zip(parts[1::2], parts[2::2], strict=True)
    ]


def checked(prompt, chosen, rejected):
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise RowFault("turns do not alternate")
    if not chosen.strip() or not rejected.strip():
        raise RowFault("empty answer")
    if chosen == rejected:
        raise RowFault("identical pair")
    return prompt, chosen, rejected


# ---------------------------------------------------------------------- messages to ids


class ChatEncoder:
    """Messages to token ids by the tokenizer's own chat template, in one pass (rendering to text
    and tokenising that again would double the BOS). Training and evaluation share it."""

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "the tokenizer has no chat template: pass one with --chat_template FILE (jinja)"
            )
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        self.special_text = re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")
        self.special_ids = set(tokenizer.convert_tokens_to_ids(list(special)))
        try:
            self.find_end_of_turn()
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template cannot be used: {first_line(error)}") from None
        self.folds_system = not self.takes_system_turn()

    def template(self, messages: list[dict], generation_prompt: bool = False) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False
        )

    def takes_system_turn(self) -> bool:
        """Neither refused nor silently left out."""
        system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
        try:
            return self.template([system, user]) != self.template([user])
        except jinja2.TemplateError:
            return False

    def find_end_of_turn(self):
        """The special token that the template puts after an answer, and what (a line feed) follows
        it. A template without one gets the tokenizer's EOS, or the model would never
        stop."""
        user = [{"role": "user", "content": "u"}]
        ids = self.template([*user, {"role": "assistant", "content": "a"}])
        header = common_prefix(self.template(user, True), ids)
        special = [i for i in range(header, len(ids)) if ids[i] in self.special_ids]
        self.append_eos = not special
        self.tail = ids[special[-1] + 1 :] if special else []
        self.end_of_turn = ids[special[-1]] if special else self.tokenizer.eos_token_id
        if self.end_of_turn is None:
            raise InputError("the chat template ends no turn and the tokenizer has no EOS token")

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The prompt with the assistant header, exactly one BOS in front if the tokenizer has
        one."""
        return self.with_bos(self.template(self.fold(messages), generation_prompt=True))

    def answer_ids(self, messages: list[dict], answer: str) -> list[int]:
        """The whole conversation; its last token is the end of turn."""
        ids = self.template([*self.fold(messages), {"role": "assistant", "content": answer}])
        ids = ids + [self.end_of_turn] if self.append_eos else ids[: len(ids) - len(self.tail)]
        return self.with_bos(ids)

    def whole(self, messages: list[dict], answer: str) -> list[int]:
        """The whole conversation as the template writes it, what follows the end of turn too."""
        return self.answer_ids(messages, answer) + self.tail

    def plain(self, text: str) -> str:
        """A model's own text without special tokens that it spells out: they would end its turn."""
        return self.special_text.sub("", text)

    def with_bos(self, ids):
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def fold(self, messages: list[dict]):
        """Gemma's template refuses a system turn: it then opens the first user turn."""
        if not self.folds_system or messages[0]["role"] != "system":
            return messages
        system, user, *rest = messages
        return [{**user, "content": system["content"] + "\n\n" + user["content"]}, *rest]

    def triplet(
        self,
        messages: list[dict],
        chosen: str,
        rejected: str,
        max_length: int,
        row: int,
        notes: Counter,
    ) -> Triplet:
        """RowFault, or TooLong where no token of an answer is left; notes counts what was seen."""
        for text in (*(m["content"] for m in messages), chosen, rejected):
            if self.special_text.search(text):  # one-pass templating cannot escape it
                raise RowFault("literal special token")
            if not text.isascii() and SURROGATE.search(text):  # JSON can hold half a character
                raise RowFault("not text")
        try:
            prompt = self.prompt_ids(messages)
            answers = [self.answer_ids(messages, chosen), self.answer_ids(messages, rejected)]
        except jinja2.TemplateError:
            raise RowFault("refused by the chat template") from None
        # a tokenizer may merge across the border: both answers then start where all three still
        # agree
        n = min(common_prefix(prompt, ids) for ids in answers)
        if answers[0] == answers[1]:
            raise RowFault("identical pair")  # the template strips white space
        if min(map(len, answers)) <= n or n == 0:
            raise RowFault("empty answer")
        chosen, rejected = (ids[n:max_length] for ids in answers)
        if n >= max_length or chosen == rejected:
            raise TooLong(
                "prompt leaves no room" if n >= max_length else "identical after truncation"
            )
        notes["prompt is no token prefix"] += n < len(prompt)
        notes["truncated"] += max(map(len, answers)) > max_length
        notes["system turn folded"] += self.folds_system and messages[0]["role"] == "system"
        return Triplet(
            *(np.array(ids, dtype=np.int32) for ids in (prompt[:n], chosen, rejected)), row
        )


def common_prefix(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def load_pairs(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    log: Callable = lambda line: None,
) -> PreferenceData:
    """Everything above. InputError if the source cannot be used or more than 1 % of its rows are
    malformed."""
    rows = read_rows(source, split)
    check_columns(source, rows)
    encoder = ChatEncoder(tokenizer)
    triplets, faults, too_long, notes = [], Counter(), Counter(), Counter()
    first_row = {}  # of each fault
    for i, row in enumerate(rows):
        try:
            triplets.append(encoder.triplet(*to_messages(row), max_length, i, notes))
        except TooLong as reason:
            too_long[str(reason)] += 1
        except RowFault as reason:
            faults[str(reason)] += 1
            first_row.setdefault(str(reason), i)
        else:
            better, worse = row.get("score_chosen"), row.get("score_rejected")
            if isinstance(better, int | float) and isinstance(worse, int | float):
                notes["score tie"] += better == worse
                notes["score inversion"] += better < worse
        if (i + 1) % 10_000 == 0:
            log(f"tokenised {i + 1:,} of {len(rows):,} rows")
    if faults.total() > MALFORMED_LIMIT * len(rows):
        raise InputError(
            f"{source}: {faults.total()} of {len(rows)} rows are malformed, more than "
            f"{MALFORMED_LIMIT:.0%}: {counts(faults)}; the first of each, from 0:"
            f" {', '.join(f'{reason} {i}' for reason, i in first_row.items())}; {ACCEPTED}"
        )
    digest = hashlib.sha256()
    for ids in (ids for t in triplets for ids in t[:3]):
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return PreferenceData(triplets, too_long + faults, +notes, len(rows), digest.hexdigest()[:16])


def load_held_out(
    args, tokenizer: PreTrainedTokenizerBase, max_length: int, log: Callable
) -> PreferenceData:
    """--eval_split: a file of its own, or a split of --dataset. InputError if no pair is left."""
    own_file = Path(args.eval_split).is_file()
    source = (args.eval_split, "train") if own_file else (args.dataset, args.eval_split)
    held_out = load_pairs(*source, tokenizer, max_length, log)
    if not held_out.triplets:
        raise InputError(f"{source[0]}: no held-out pair is left: {held_out.summary()}")
    return held_out
