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
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

ACCEPTED = (
    "accepted: columns chosen and rejected with two chats (lists of {role, content}) that differ"
    " in the last turn only, with or without a prompt string; a prompt with a chat, and chosen and"
    " rejected with one assistant message each; strings prompt, chosen, rejected; strings chosen"
    " and rejected of \\n\\nHuman: and \\n\\nAssistant: turns"
)
FILE_NAME = re.compile(r"\.(jsonl|json|parquet)(\.gz)?$")
MALFORMED_LIMIT = 0.01  # with a larger share of faulty rows the data set itself must be wrong


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line for the user."""


class RowFault(Exception):
    """The reason why one row is dropped: it is malformed."""


class TooLong(RowFault):
    """The reason why one row is dropped that is well formed but does not fit max_length."""


class Triplet(NamedTuple):
    """The token ids of a pair, int32. The prompt ends with the assistant header, and both answers
    continue it [choice 12]."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    row: int  # its row number in the source, from 0


class PreferenceData(NamedTuple):
    """A tokenised data set."""

    triplets: list[Triplet]
    dropped: Counter  # rows that were dropped, by reason
    notes: Counter  # rows that were kept, by what was noticed in them
    n_rows: int  # rows of the source
    fingerprint: str  # a hash of all token ids in order

    def steps(self, batch_size: int) -> int:
        """Returns the number of steps in an epoch: whole batches only."""
        return len(self.triplets) // batch_size

    def summary(self) -> str:
        """Returns one line about rows, drops and notes."""
        kept = f"{len(self.triplets):,} of {self.n_rows:,} rows"
        return f"{kept}; dropped: {counts(self.dropped)}; kept but noted: {counts(self.notes)}"


def counts(counter: Counter) -> str:
    """Returns a counter as text, the largest count first."""
    return ", ".join(f"{reason} {n}" for reason, n in counter.most_common()) or "none"


# ---------------------------------------------------------------------- errors in one line


@contextmanager
def input_error_for(what: str):
    """Turns any exception of a `with` block into an InputError of one line that begins with `what`.

    For calls of transformers, datasets, torch and the Hub, which raise many kinds of exceptions.
    """
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or of its cause's message if it has one."""
    error = error.__cause__ or error
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------- rows


def read_rows(source: str, split: str) -> Sequence[dict]:
    """Returns the rows of a data set.

    source is a .jsonl, .json or .parquet file, also with .gz behind it, a folder, or a Hub id. A
    single file has one split, "train". Raises InputError if it cannot be read or has no such split.
    """
    path = Path(source)
    kind = FILE_NAME.search(source)
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


def parse_parquet(source: str, raw: bytes) -> list[dict]:
    import pyarrow  # comes with datasets; takes a second to import, so only where it is needed
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a whole parquet file: {error}") from None


def parse_json(source: str, raw: bytes) -> list:
    """Returns the rows of a JSON list, or of a text with one row of JSON in each line."""
    try:
        text = raw.decode("utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
    except ValueError as error:  # of decoding or of JSON
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
    """Returns the text of a .jsonl file with these rows."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_with_datasets(source: str, split: str) -> Sequence[dict]:
    """Returns the rows of a folder or Hub id; raises InputError without such data or split."""
    import datasets  # takes two seconds to import, so only where it is needed

    with input_error_for(f"{source}: is no file here and cannot be loaded as a data set"):
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
    """Returns whether a name can only be a path, because no Hub id has this form."""
    return name.count("/") > 1 or name.startswith(("/", ".", "~"))


def check_columns(source: str, rows: Sequence):
    """Raises InputError if the first row's columns are not those of preference data.

    The message says which columns were found and which are accepted.
    """
    if not len(rows):
        raise InputError(f"{source}: no rows")
    row = rows[0]
    columns = list(row) if isinstance(row, dict) else [f"a {type(row).__name__}"]
    usable = "chosen" in columns and "rejected" in columns
    if usable and isinstance(row["chosen"], str):  # without a chat: a prompt, or turns in the text
        usable = "prompt" in columns or HH_TURN.search(row["chosen"])
    if not usable:
        raise InputError(f"{source}: no preference data in {', '.join(columns)}; {ACCEPTED}")


# ---------------------------------------------------------------------- one row to messages

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold
HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # how hh-rlhf writes a chat as one string


def to_messages(row) -> tuple[list[dict], str, str]:
    """Returns the prompt's messages, the chosen and the rejected answer of a row.

    The row may have any schema of ACCEPTED. Raises RowFault if it has none of them.
    """
    if not isinstance(row, dict):
        raise RowFault("not an object")
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return checked(user_chat(prompt), chosen, rejected)
        chosen, rejected, prompt = hh_turns(chosen), hh_turns(rejected), None
    for chat in (chosen, rejected, *([prompt] if isinstance(prompt, list) else [])):
        check_chat(chat)
    if isinstance(prompt, list):
        # some data sets repeat the prompt inside both chats
        chosen, rejected = (
            c[len(prompt) :] if c[: len(prompt)] == prompt else c for c in (chosen, rejected)
        )
    else:  # a prompt string beside chats repeats the user's turn: the common turns are the prompt
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


def bare(message: dict) -> dict:
    """Returns a message without further keys that some data sets have."""
    return {"role": message["role"], "content": message["content"]}


def check_chat(chat):
    """Raises RowFault unless chat is a list of messages with a role and a text."""
    if not isinstance(chat, list) or not chat:
        raise RowFault("not text")
    for message in chat:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowFault("not text")
        if not isinstance(message.get("role"), str):
            raise RowFault("not text")


def hh_turns(text: str) -> list[dict]:
    """Returns the messages of a chat that hh-rlhf writes as one string."""
    parts = HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise RowFault("not text")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[r], "content": c.strip()}
        for r, c in zip(parts[1::2], parts[2::2], strict=True)
    ]


def checked(prompt: list[dict], chosen: str, rejected: str) -> tuple[list[dict], str, str]:
    """Returns its arguments. Raises RowFault if the prompt's turns do not alternate and end with
    the user's, if an answer is empty, or if the answers are equal."""
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
    """Turns messages into token ids with the tokenizer's own chat template.

    Rendering and tokenising are one call: tokenising the rendered text again would add a second
    BOS. Training and evaluation share this class. Raises InputError if the tokenizer has no
    template or its template cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
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
        """Returns the ids of messages, with generation_prompt followed by the assistant header."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False
        )

    def takes_system_turn(self) -> bool:
        """Returns whether the template shows a system turn: some raise, some leave it out."""
        system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
        try:
            return self.template([system, user]) != self.template([user])
        except jinja2.TemplateError:
            return False

    def find_end_of_turn(self):
        """Sets end_of_turn, the special token after an answer; tail, the ids after it; append_eos.

        The tail is a line feed in some templates. Where the template puts no such token, the
        tokenizer's EOS is added; without it a model would never learn to stop.
        """
        user = user_chat("u")
        ids = self.template([*user, {"role": "assistant", "content": "a"}])
        header = common_prefix(self.template(user, True), ids)
        special = [i for i in range(header, len(ids)) if ids[i] in self.special_ids]
        self.append_eos = not special
        self.tail = ids[special[-1] + 1 :] if special else []
        self.end_of_turn = ids[special[-1]] if special else self.tokenizer.eos_token_id
        if self.end_of_turn is None:
            raise InputError(
                "the chat template has no special token that ends a turn, and the tokenizer has"
                " no EOS token"
            )

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Returns the prompt's ids, up to and with the assistant header.

        Exactly one BOS stands in front if the tokenizer has one.
        """
        return self.with_bos(self.template(self.fold(messages), generation_prompt=True))

    def answer_ids(self, messages: list[dict], answer: str) -> list[int]:
        """Returns the ids of prompt and answer; the last one is the end of turn."""
        ids = self.template([*self.fold(messages), {"role": "assistant", "content": answer}])
        ids = ids + [self.end_of_turn] if self.append_eos else ids[: len(ids) - len(self.tail)]
        return self.with_bos(ids)

    def whole(self, messages: list[dict], answer: str) -> list[int]:
        """Returns the ids of prompt and answer with all that the template puts behind them."""
        return self.answer_ids(messages, answer) + self.tail

    def plain(self, text: str) -> str:
        """Returns a text without spelled-out special tokens, which would become real ones."""
        return self.special_text.sub("", text)

    def with_bos(self, ids: list[int]) -> list[int]:
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def fold(self, messages: list[dict]) -> list[dict]:
        """Returns messages with the system turn put before the first user turn's text, if the
        template (Gemma's, say) does not take a system turn."""
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
        """Returns the ids of a pair; an answer is cut where it and the prompt exceed max_length.

        notes counts what was noticed. Raises RowFault if the pair cannot be encoded, and TooLong
        if nothing that tells the answers apart is left.
        """
        for text in (*(m["content"] for m in messages), chosen, rejected):
            if self.special_text.search(text):  # the template would make a real token of it
                raise RowFault("literal special token")
            if not text.isascii() and SURROGATE.search(text):
                raise RowFault("not text")
        try:
            prompt = self.prompt_ids(messages)
            answers = [self.answer_ids(messages, chosen), self.answer_ids(messages, rejected)]
        except jinja2.TemplateError:
            raise RowFault("refused by the chat template") from None
        # a tokenizer may merge characters across the border of prompt and answer: both answers
        # then start where all three still agree
        n = min(common_prefix(prompt, ids) for ids in answers)
        if answers[0] == answers[1]:
            raise RowFault("identical pair")  # the template strips white space
        if min(map(len, answers)) <= n or n == 0:
            raise RowFault("empty answer")
        chosen, rejected = (ids[n:max_length] for ids in answers)
        if n >= max_length:
            raise TooLong("prompt leaves no room")
        if chosen == rejected:
            raise TooLong("identical after truncation")
        notes["prompt is no token prefix"] += n < len(prompt)
        notes["truncated"] += max(map(len, answers)) > max_length
        notes["system turn folded"] += self.folds_system and messages[0]["role"] == "system"
        ids = (np.array(ids, dtype=np.int32) for ids in (prompt[:n], chosen, rejected))
        return Triplet(*ids, row)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Returns the length of the longest common prefix."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


# ---------------------------------------------------------------------- whole data sets


def load_pairs(
    source: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    log: Callable = lambda line: None,
) -> PreferenceData:
    """Returns the pairs of a data set; prompt and answer have at most max_length tokens.

    source and split are those of read_rows. log(line) is told the progress. Raises InputError if
    the source cannot be used, or if more than 1 % of its rows are malformed.
    """
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
            f" {', '.join(f'{reason} in row {i}' for reason, i in first_row.items())}; {ACCEPTED}"
        )
    digest = hashlib.sha256()
    for ids in (ids for t in triplets for ids in t[:3]):
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return PreferenceData(triplets, too_long + faults, +notes, len(rows), digest.hexdigest()[:16])


def load_held_out(
    args, tokenizer: PreTrainedTokenizerBase, max_length: int, log: Callable
) -> PreferenceData:
    """Returns the pairs of --eval_split: a file of its own, or another split of --dataset.

    Other arguments as in load_pairs. Raises InputError as it does, and if no pair is left.
    """
    name = args.eval_split
    is_file = "/" in name or FILE_NAME.search(name) or Path(name).is_file()
    source = (name, "train") if is_file else (args.dataset, name)
    held_out = load_pairs(*source, tokenizer, max_length, log)
    if not held_out.triplets:
        raise InputError(f"{source[0]}: no held-out pair is left: {held_out.summary()}")
    return held_out
