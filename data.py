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
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedTokenizerBase

ACCEPTED = (
    "accepted: columns chosen and rejected with two chats (lists of {role, content} or of"
    " {from, value}) that differ in the last turn only, with or without a prompt string; a chat as"
    " prompt, messages or conversations, and chosen and rejected with one assistant message each or"
    " strings; strings prompt, chosen, rejected; strings chosen and rejected of \\n\\nHuman: and"
    " \\n\\nAssistant: turns; beside each of them system and history"
)
FILE_NAME = re.compile(r"\.(jsonl|json|parquet)(\.gz)?$")
LONGEST = 500  # characters of an exception that are shown
MERGED = 2  # tokens of a prompt that may merge with an answer's first characters
MALFORMED_LIMIT = 0.01  # with a larger share of faulty rows the data set itself must be wrong


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line for the user."""


class RowFault(Exception):
    """The reason why one row is dropped: it is malformed."""


class TooLong(RowFault):
    """The reason why one row is dropped that is well formed but does not fit max_length."""


class Unusable(RowFault):
    """The reason why one row is dropped that is well formed, but holds more than texts of two
    speakers who take turns."""


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
    unread: tuple[str, ...] = ()  # columns and keys of messages that hold something and are ignored

    def steps(self, batch_size: int) -> int:
        """Returns the number of steps in an epoch: whole batches only."""
        return len(self.triplets) // batch_size

    def summary(self) -> str:
        """Returns one line about rows, drops and notes."""
        kept = f"{len(self.triplets):,} of {self.n_rows:,} rows"
        unread = f"; columns not read: {', '.join(self.unread)}" if self.unread else ""
        noted = counts(self.notes)
        return f"{kept}; dropped: {counts(self.dropped)}; kept but noted: {noted}{unread}"


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
        raise InputError(f"{what}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """Returns the first sentence of an exception's message, or of its cause's if it has one, as one
    line. Libraries may spread it over several lines; one that ends in no line is cut short."""
    error = error.__cause__ or error
    lines = str(error).split("\n")
    ends = [i for i, line in enumerate(lines, 1) if line.rstrip().endswith((".", "!", "?"))]
    text = " ".join(" ".join(lines[: min(ends, default=len(lines))]).split())
    if len(text) > LONGEST and not isinstance(error, InputError):
        text = text[:LONGEST] + " ..."
    return text or type(error).__name__


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
        text = raw.decode("utf-8-sig")  # without a byte-order mark
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

    *owner, name = source.split("/")
    folder = "___".join([*owner, datasets.naming.camelcase_to_snakecase(name)])
    if not (Path(source).exists() or (datasets.config.HF_DATASETS_CACHE / folder).exists()):
        with input_error_for(source):
            hub_check(source, "dataset")
    try:
        if Path(source, "dataset_dict.json").is_file() or Path(source, "state.json").is_file():
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(source)
    except Exception as error:  # the library and the Hub raise many kinds
        missing = "" if Path(source).exists() else "is no file here and "
        # the library wraps most errors of reading in one that says nothing
        if type(error) is datasets.exceptions.DatasetGenerationError:
            error = error.__cause__ or error
        reason = textwrap.shorten(str(error) or type(error).__name__, 500, placeholder=" ...")
        raise InputError(f"{source}: {missing}cannot be loaded as a data set: {reason}") from None
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    if split not in found:
        raise InputError(f"{source}: no split {split!r}; it has {', '.join(found)}")
    return found[split]


def is_local(name: str) -> bool:
    """Returns whether a name can only be a path, because no Hub id has this form."""
    return name.count("/") > 1 or name.startswith(("/", ".", "~"))


def hub_check(name: str, kind: str):
    """Raises InputError if a Hub id of a "model" or "dataset" is neither cached nor on the Hub.

    It asks once and briefly. The libraries would try again and again, for half a minute.
    """
    nothing = f"is no {'folder' if kind == 'model' else 'file'} here and"
    try:
        folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))
        if not (constants.HF_HUB_OFFLINE or (folder / "snapshots").is_dir()):
            getattr(HfApi(), f"{kind}_info")(name, timeout=5)
    except HfHubHTTPError as error:
        if type(error) is RepositoryNotFoundError:  # what else it answers, the libraries explain
            private = "a private one needs HF_TOKEN"
            raise InputError(f"{nothing} no {kind} on the Hub ({private})") from None
    except HFValidationError:
        raise InputError(f"{nothing} no name that a {kind} on the Hub can have") from None
    except Exception as error:  # httpx and the Hub's library raise many kinds
        raise InputError(f"{nothing} the Hub cannot be reached ({reason_of(error)})") from None


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
        usable = {"prompt", *PROMPT_CHATS} & {*columns} or HH_TURN.search(row["chosen"])
    if not usable:
        raise InputError(f"{source}: no preference data in {', '.join(columns)}; {ACCEPTED}")


# ---------------------------------------------------------------------- one row to messages

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold
THINKING = re.compile(  # a passage that is closed, or one that is opened and never closed
    r"(?:(?!<think|<reason).)*?</(?:think|thinking|reasoning)>\s*"
    r"|\s*<(think|thinking|reasoning)>(?:.*?</\1>\s*|.*)",
    re.DOTALL,
)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # how hh-rlhf writes a chat as one string
HH_PROMPT = re.compile(r"\n\nHuman:|\s*Human:.*\n\nAssistant:\s*$", re.DOTALL)
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # other names of our roles
TOOL_ROLES = set("tool tool_call tool_response function function_call observation ipython".split())
PROMPT_CHATS = "messages", "conversations", "conversation"  # other names of a prompt chat's column
MEDIA = "image images audio audios video videos".split()
TOOLS = "tools functions".split()
READ = {"prompt", "chosen", "rejected", "system", "history", *MEDIA, *TOOLS}
METADATA = set(  # words of the names of columns that are about a row, no part of what it says
    "id ids idx index uuid hash source sources dataset subset split model models score scores"
    " rating ratings reward rewards margin rank language lang category domain topic task license"
    " timestamp date url weight generator annotator votes".split()
)


def to_messages(row) -> tuple[list[dict], str, str]:
    """Returns the prompt's messages, the chosen and the rejected answer of a row.

    The row may have any schema of ACCEPTED. Raises RowFault if it has none of them, and Unusable
    if it holds what this project cannot use.
    """
    if not isinstance(row, dict):
        raise RowFault("not an object")
    refuse_more_than_text(row)
    prompt, chosen, rejected = row.get(prompt_column(row)), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str | list | dict):
            chosen, rejected, prompt = hh_turns(chosen), hh_turns(rejected), None
        elif isinstance(prompt, str) and HH_PROMPT.match(prompt):
            chosen, rejected = (s.removeprefix(prompt).strip() for s in (chosen, rejected))
            prompt = hh_turns("\n\n" + prompt.strip())
            prompt = prompt[: -1 if prompt[-1]["content"] == "" else None]
        chosen, rejected = (
            [{"role": "assistant", "content": s}] if isinstance(s, str) else s
            for s in (chosen, rejected)
        )
    chosen, rejected = to_chat(chosen), to_chat(rejected)
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        prompt = user_chat(prompt)
    if isinstance(prompt, list | dict):
        prompt = to_chat(prompt)
        # some data sets repeat the prompt inside both chats
        chosen, rejected = (
            c[len(prompt) :] if c[: len(prompt)] == prompt else c for c in (chosen, rejected)
        )
    else:  # a prompt string beside chats repeats the user's turn: the common turns are the prompt
        limit = min(len(chosen), len(rejected)) - 1
        n = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if len(chosen) != 1 or len(rejected) != 1:
        raise RowFault("different prompts")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise RowFault("answer is not the assistant's")
    prompt = with_earlier_turns(prompt, row.get("system"), row.get("history"))
    return checked(prompt, chosen[0]["content"], rejected[0]["content"])


def prompt_column(row: dict) -> str:
    """Returns the name of the column that holds a row's prompt.

    It is `messages` or a name like it only where there is no prompt and the answers are one message
    each: beside two whole chats such a column repeats one of them.
    """
    whole = isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1
    if filled(row.get("prompt")) or whole:
        return "prompt"
    return next((name for name in PROMPT_CHATS if filled(row.get(name))), "prompt")


def split_thinking(answer: str) -> tuple[str, str]:
    """Returns what an answer thinks aloud first, "" if nothing, and the answer without it.

    Some models write their thoughts between <think> and </think> (also thinking, reasoning) before
    the answer. Where the prompt opens the passage only its end is in the answer; where the answer
    was cut there is no end, and nothing is left.
    """
    found = THINKING.match(answer)
    return (found[0], answer[found.end() :]) if found else ("", answer)


def user_chat(text: str) -> list[dict]:
    """Returns a conversation of one turn, the user's."""
    return [{"role": "user", "content": text}]


def to_chat(chat) -> list[dict]:
    """Returns a chat as a list of {role, content}; chat may be one message in place of a list.

    Raises RowFault unless its messages have a role and a text, Unusable if one holds more.
    """
    chat = [chat] if isinstance(chat, dict) else chat
    if not isinstance(chat, list) or not chat or not all(isinstance(m, dict) for m in chat):
        raise RowFault("no chat")
    return [to_message(m) for m in chat]


def to_message(message: dict) -> dict:
    """Returns one message of a chat as {role, content}, with roles as they are called here.

    Further keys, which some data sets have, are left out. Raises what to_chat raises.
    """
    role, content = message.get("role"), message.get("content")
    if role is None:
        role, content = message.get("from"), message.get("value")
    if isinstance(role, list):
        raise RowFault("a dict of lists in place of a list of messages")
    if not isinstance(role, str):
        raise RowFault("no chat")
    calls = filled(message.get("tool_calls")) or filled(message.get("function_call"))
    if role in TOOL_ROLES or calls:
        raise Unusable("tool turns")
    refuse_more_than_text(message)
    if isinstance(content, list):
        content = joined(content)
    if not isinstance(content, str):
        raise RowFault("content is not text")
    return {"role": ROLES.get(role, role), "content": content}


def joined(parts: list) -> str:
    """Returns the text of a content that is a list of parts, {"type": "text", "text": ...}."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RowFault("content is not text")
        for kind in ("image", "audio", "video"):
            if kind in part["type"]:
                raise Unusable(f"has {kind}")
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise RowFault("content is not text")
    return "".join(part["text"] for part in parts) if parts else None


def refuse_more_than_text(columns: dict):
    """Raises Unusable if a row or a message holds tools, pictures or sound."""
    for name in (*TOOLS, *MEDIA):
        if filled(columns.get(name)):
            raise Unusable(f"has {name}")


def filled(value) -> bool:
    """Returns whether a value of JSON holds anything; a string of an empty list does not."""
    if isinstance(value, dict | list):
        return any(map(filled, value.values() if isinstance(value, dict) else value))
    return value is not None and str(value).strip() not in ("", "[]", "{}", "null")


def with_earlier_turns(prompt: list[dict], system, history) -> list[dict]:
    """Returns a prompt with the columns system (a text) and history (a list of [user, assistant])
    in front of it. Raises RowFault if they are something else."""
    first = prompt[:1] if prompt and prompt[0]["role"] == "system" else []
    rest, turns = prompt[len(first) :], []
    if filled(history):
        if not isinstance(history, list):
            raise RowFault("history is no list of [user, assistant]")
        for pair in history:
            if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
                raise RowFault("history is no list of [user, assistant]")
            turns += [*user_chat(pair[0]), {"role": "assistant", "content": pair[1]}]
    if filled(system):
        if not isinstance(system, str):
            raise RowFault("system is not text")
        own = [{"role": "system", "content": system}]
        if first not in ([], own):
            raise RowFault("two system turns")
        first = own
    return [*first, *turns, *rest]


def unread_columns(row: dict) -> list[str]:
    """Returns the columns of a usable row, and the keys of its messages, that hold something which
    is not read and is no metadata (ids, scores, sources)."""
    chats = "prompt", prompt_column(row), "chosen", "rejected"
    found = [name for name in row if name not in {*READ, *chats}]
    if isinstance(row["chosen"], list):  # then columns beside it may repeat what is in the chat
        found = [name for name in found if row[name] != row["chosen"]]
        turns = [
            text.strip() for m in row["chosen"] for text in m.values() if isinstance(text, str)
        ]
        if (
            len(turns) > 2
            and isinstance(row.get("prompt"), str)
            and row["prompt"].strip() not in turns
        ):
            found.append("prompt")
    unread = [name for name in found if filled(row[name]) and not is_metadata(name)]
    for column in dict.fromkeys(chats):
        chat = row.get(column)
        for message in [chat] if isinstance(chat, dict) else chat if isinstance(chat, list) else []:
            for key in message.keys() - {"role", "content", "from", "value"}:
                if filled(message[key]) and not is_metadata(key):
                    unread.append(f"{column}.{key}")
    return unread


def is_metadata(name: str) -> bool:
    """Returns whether a column's name says metadata: an id, or only words of METADATA beside the
    names of the columns that it is about."""
    words = [
        w for w in re.split(r"\W|_", name.lower()) if w not in ("chosen", "rejected", "prompt")
    ]
    return bool(words) and ({*words} <= METADATA or words[-1] in ("id", "index"))


def hh_turns(text: str) -> list[dict]:
    """Returns the messages of a chat that hh-rlhf writes as one string."""
    parts = HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise RowFault("no Human/Assistant turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[r], "content": c.strip()}
        for r, c in zip(parts[1::2], parts[2::2], strict=True)
    ]


def checked(prompt: list[dict], chosen: str, rejected: str) -> tuple[list[dict], str, str]:
    """Returns its arguments. Raises RowFault if the prompt's turns do not alternate and end with
    the user's, if an answer is empty, or if the answers are equal; Unusable if the assistant
    speaks first."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if turns and turns[0]["role"] == "assistant":
        raise Unusable("assistant first")
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
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise InputError(
                f"the tokenizer has several chat templates ({', '.join(tokenizer.chat_template)})"
                " and none is the default: write one to a file and pass it with --chat_template"
            )
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        self.special_text = re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")
        self.markers = set(tokenizer.convert_tokens_to_ids(list(special)))
        # some tokenizers hold the tokens of their templates as added, but not as special ones
        added = tokenizer.added_tokens_decoder.items()
        self.markers |= {i for i, token in added if token.content.strip()}
        try:
            self.probe()
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template cannot be used: {reason_of(error)}") from None
        self.folds_system = not self.takes_system_turn()

    def template(self, messages: list[dict], generation_prompt: bool = False) -> list[int]:
        """Returns the ids of messages, with generation_prompt followed by the assistant header."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False
        )

    def two_answers(self, messages: list[dict]) -> tuple[list[int], list[int], int]:
        """Returns the ids of messages with two different answers, and where the ids part."""
        answers = ({"role": "assistant", "content": text} for text in "ab")
        a, b = (self.template([*messages, answer]) for answer in answers)
        return a, b, common_prefix(a, b)

    def probe(self):
        """Learns from two conversations that differ in the answer what stands around an answer.

        Sets end_of_turn, the first token behind an answer that no text gives; tail, the ids after
        it; append_eos, if there is no such token: the tokenizer's EOS is added then, because
        without it a model would never learn to stop. (The tail is a line feed in some templates,
        the next header in others.) Sets no_header, if add_generation_prompt changes nothing, and
        opened, what the generation prompt holds beyond the header of a full conversation. Sets
        bos_is_marker, if BOS also opens or ends turns.
        """
        user = user_chat("u")
        a, b, start = self.two_answers(user)
        if a == b:
            raise jinja2.TemplateError("it shows no answer of the assistant")
        behind = a[len(a) - common_prefix(a[start:][::-1], b[start:][::-1]) :]
        end = next((i for i, token in enumerate(behind) if token in self.markers), None)
        self.append_eos = end is None
        self.tail = [] if end is None else behind[end + 1 :]
        self.end_of_turn = self.tokenizer.eos_token_id if end is None else behind[end]
        if self.end_of_turn is None:
            raise InputError(
                "the chat template has no special token that ends a turn, and the tokenizer has"
                " no EOS token"
            )
        first = next((i for i, token in enumerate(a) if token != self.bos), 0)
        self.bos_is_marker = any(
            token == self.bos and not self.markers & {*a[i + 1 : i + 2]}
            for i, token in enumerate(a[first:], first)
        )
        prompt = self.template(user, True)
        self.no_header = prompt == self.template(user) and prompt != a[:start]
        prompt = self.with_bos(self.prompt_ids_of(user))
        lost = prompt[common_prefix(prompt, self.with_bos(a)) :]
        opens = len(lost) > MERGED or not self.markers.isdisjoint(lost)
        self.opened = self.tokenizer.decode(lost) if opens else ""

    def takes_system_turn(self) -> bool:
        """Returns whether the template shows a system turn, and in a full conversation where the
        prompt has it: some templates raise, some leave it out, some move it."""
        system, turns = {"role": "system", "content": "Be kind to all."}, user_chat("u")
        answer = {"role": "assistant", "content": "a"}
        return all(self.shows(system, t) for t in (turns, [*turns, answer, *turns]))

    def shows(self, system: dict, turns: list[dict]) -> bool:
        """Returns whether the template shows a system turn alike with and without an answer."""
        try:
            without, lost = self.with_answer(turns)
        except jinja2.TemplateError:
            return True  # it takes no such turns at all, which is not the system turn's fault
        try:
            ids, lost_with_system = self.with_answer([system, *turns])
        except jinja2.TemplateError:
            return False
        return ids != without and lost_with_system <= max(MERGED, lost)

    def with_answer(self, messages: list[dict]) -> tuple[list[int], int]:
        """Returns the ids of messages with an answer, and how many of the prompt's they change."""
        prompt = self.with_bos(self.prompt_ids_of(messages))
        ids = self.with_bos(self.two_answers(messages)[0])
        return ids, len(prompt) - common_prefix(prompt, ids)

    def prompt_ids_of(self, messages: list[dict]) -> list[int]:
        """Returns the ids of messages as they are, up to and with the assistant header."""
        if self.no_header:
            ids, _, start = self.two_answers(messages)
            return ids[:start]
        return self.template(messages, generation_prompt=True)

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Returns the prompt's ids, up to and with the assistant header.

        Exactly one BOS stands in front if the tokenizer has one.
        """
        return self.with_bos(self.prompt_ids_of(self.fold(messages)))

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
        """Returns ids with one BOS in front and no other, if the tokenizer has one.

        Where BOS also opens or ends turns, only those in front are made one.
        """
        if self.bos is None:
            return ids
        if not self.bos_is_marker:
            return [self.bos, *(i for i in ids if i != self.bos)]
        first = next((i for i, token in enumerate(ids) if token != self.bos), 0)
        return [self.bos, *ids[first:]]

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
                raise RowFault("half a character")
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
        if len(prompt) - n > MERGED:
            raise RowFault("the template changes the prompt")
        if any(ids[-1] != self.end_of_turn for ids in answers):
            raise RowFault("the template ends no turn")
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
    the source cannot be used, if more than 1 % of its rows are malformed, or if more than
    half of them hold what this project cannot use (tools, images, ...).
    """
    rows = read_rows(source, split)
    check_columns(source, rows)
    encoder = ChatEncoder(tokenizer)
    if encoder.opened:
        raise InputError(
            f"the chat template cannot be trained with: its generation prompt ends with"
            f" {encoder.opened!r}, which its full conversations leave out; pass a template without"
            " that with --chat_template FILE"
        )
    triplets, faults, unusable, too_long, notes = [], Counter(), Counter(), Counter(), Counter()
    first_row, unread = {}, {}  # the first row of each fault, and of each column that is not read
    for i, row in enumerate(rows):
        try:
            triplets.append(encoder.triplet(*to_messages(row), max_length, i, notes))
        except TooLong as reason:
            too_long[str(reason)] += 1
        except Unusable as reason:
            unusable[str(reason)] += 1
        except RowFault as reason:
            faults[str(reason)] += 1
            first_row.setdefault(str(reason), i)
        else:
            unread |= dict.fromkeys(unread_columns(row), i)
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
    if unusable.total() > len(rows) / 2:
        raise InputError(
            f"{source}: fewer than half of the {len(rows)} rows can be used, because this project"
            f" reads only texts of a user and an assistant who take turns: {counts(unusable)}"
        )
    digest = hashlib.sha256()
    for ids in (ids for t in triplets for ids in t[:3]):
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    dropped = too_long + faults + unusable
    fingerprint = digest.hexdigest()[:16]
    return PreferenceData(triplets, dropped, +notes, len(rows), fingerprint, tuple(unread))


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
