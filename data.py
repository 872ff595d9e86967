"""Preference data: from rows of any of the usual schemas to token ids.

    data = load_pairs("ultrafeedback.jsonl.gz", "train", tokenizer, max_length=2048)
    data.triplets[0].prompt, .chosen, .rejected     # token ids

Rows that cannot be trained on are dropped and counted by reason; no row is repaired in silence.
This file knows no model and no ranks: every rank reads the same rows. Many rows are tokenised by
several processes, and their ids kept on disk: the ranks of a machine take turns, so that the first
does the work and the others read its result.
"""

import cpu

import codecs
import fcntl
import gzip
import hashlib
import io
import json
import pickle
import re
import signal
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

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
LONGEST = 1000  # characters of an exception, or of names, that are shown
LONGEST_ROW = 10**8  # bytes of a line of JSON
LONGEST_TEXT = 5 * 10**6  # characters of a text; the tokens of more would fill the memory
TEMPLATE_SECONDS = 10  # in which a chat template writes a conversation
MERGED = 2  # tokens of a prompt that may merge with an answer's first characters
MANY = 10_000  # rows from which on several processes tokenise them and the ids are kept
PIECE = 1000  # of these rows, read or sent to another process at once
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


class TemplateError(Exception):
    """What a chat template raises, or what is wrong with it."""


def once_each(pairs: list[tuple]) -> dict:
    """Returns an object of JSON as a dict; raises InputError if a key stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise InputError(f"{names(keys - Counter([*found]))} is given twice")
    return found


JSON = json.JSONDecoder(object_pairs_hook=once_each)  # json alone takes the last of two values


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
    day: str | None = None  # ChatEncoder.day

    def steps(self, batch_size: int) -> int:
        """Returns the number of steps in an epoch: whole batches only."""
        return len(self.triplets) // batch_size

    def summary(self) -> str:
        """Returns one line about rows, drops and notes."""
        kept = f"{len(self.triplets):,} of {self.n_rows:,} rows"
        unread = f"; columns not read: {names(self.unread)}" if self.unread else ""
        day = f"; the chat template writes the day: {self.day}" if self.day else ""
        noted = counts(self.notes)
        return f"{kept}; dropped: {counts(self.dropped)}; kept but noted: {noted}{unread}{day}"


def counts(counter: Counter) -> str:
    """Returns a counter as text, the largest count first."""
    return ", ".join(f"{reason} {n}" for reason, n in counter.most_common()) or "none"


def names(words: Iterable[str]) -> str:
    """Returns words in one line that can be printed; many of them are cut short."""
    return shortened(", ".join(words).encode("utf-8", "backslashreplace").decode())


def shortened(text: str) -> str:
    """Returns a text as one line, at most LONGEST characters of it."""
    text = " ".join(text.split())
    return text[:LONGEST] + " ..." * (len(text) > LONGEST)


# ---------------------------------------------------------------------- errors in one line


@contextmanager
def input_error_for(what: str):
    """Turns any exception of a `with` block into an InputError of one line that begins with `what`.

    For calls of transformers, datasets, torch and the Hub, which raise many kinds of exceptions.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # that of a library in Rust is no Exception
        raise InputError(f"{what}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """Returns the first sentence of an exception's message, or of its cause's if it has one, as one
    line. Libraries spread it over several lines; a sentence that does not end is cut short."""
    error = error.__cause__ or error
    if isinstance(error, KeyError):  # whose message is the name alone
        return f"there is no {shortened(str(error))}"
    lines = str(error).split("\n")
    ends = [i for i, line in enumerate(lines, 1) if line.rstrip().endswith((".", "!", "?"))]
    sentence = "\n".join(lines[: min(ends, default=len(lines))])
    return shortened(sentence) or type(error).__name__


# ---------------------------------------------------------------------- rows


def read_rows(source: str, split: str, config: str | None = None) -> Sequence[dict]:
    """Returns the rows of a data set.

    source is a .jsonl, .json or .parquet file, also with .gz behind it, a folder, or a Hub id. A
    single file has one split, "train". config names one of several configs of a folder or Hub id.
    Raises InputError if it cannot be read, has no such split, or has no configs.
    """
    path = Path(source)
    kind = FILE_NAME.search(source)
    if path.is_file() and not kind:
        raise InputError(f"{source}: not a .jsonl, .json or .parquet file (also .gz)")
    if not path.exists() and (kind or is_local(source)):
        raise InputError(f"{source}: no such file")
    if not path.is_file():
        return read_with_datasets(source, split, config)
    if config:
        raise InputError(f"--dataset_config {config}: {source} is one file, which has no configs")
    if split != "train":
        raise InputError(f"{source}: no split {split!r}; a single file has one, 'train'")
    return parse_parquet(path) if kind[1] == "parquet" else [*parse_json(path)]


def open_unpacked(path: Path):
    """Returns an open file to read bytes from, unpacked where its name ends with .gz."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")


def parse_parquet(path: Path) -> list[dict]:
    import pyarrow  # comes with datasets; takes a second to import, so only where it is needed
    import pyarrow.parquet

    try:
        with open_unpacked(path) as file:
            return pyarrow.parquet.read_table(io.BytesIO(file.read())).to_pylist()
    except (pyarrow.ArrowException, OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as parquet: {reason_of(error)}") from None


def parse_json(path: Path) -> Iterator:
    """Yields the rows of a file: those of a JSON list, or one row of JSON in each line."""
    where = path
    try:
        with open_unpacked(path) as file:
            if file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
                yield from JSON.decode(file.read().decode("utf-8-sig"))
                return
            for number, line in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), 1):
                where = f"{path}, line {number}"
                if len(line) > LONGEST_ROW:
                    raise InputError(f"longer than a row may be, {LONGEST_ROW:,} bytes")
                if (text := line.decode("utf-8-sig" if number == 1 else "utf-8")).strip():
                    yield JSON.decode(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: too many brackets within brackets") from None
    except ValueError as error:  # of decoding or of JSON
        form = "rows of JSON in UTF-8, one in each line or all in one list"
        raise InputError(f"{where}: not {form}: {error}") from None


def json_lines(rows: Iterable[dict]) -> str:
    """Returns the text of a .jsonl file with these rows."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_with_datasets(source: str, split: str, config: str | None) -> Sequence[dict]:
    """Returns the rows of a folder or Hub id; raises InputError without such data or split."""
    import datasets  # takes two seconds to import, so only where it is needed

    *owner, name = source.split("/")
    folder = "___".join([*owner, datasets.naming.camelcase_to_snakecase(name)])
    if not (Path(source).exists() or (datasets.config.HF_DATASETS_CACHE / folder).exists()):
        with input_error_for(source):
            hub_check(source, "dataset")
    try:
        if Path(source, "dataset_dict.json").is_file() or Path(source, "state.json").is_file():
            if config:
                raise ValueError("a folder of save_to_disk has no configs (--dataset_config)")
            found = datasets.load_from_disk(source)
        else:
            if Path(source).exists():
                check_json_files(datasets.load_dataset_builder(source, config).config.data_files)
            found = datasets.load_dataset(source, config)
    except Exception as error:  # the library and the Hub raise many kinds
        missing = "" if Path(source).exists() else "is no file here and "
        # the library wraps most errors of reading in one that says nothing
        if type(error) is datasets.exceptions.DatasetGenerationError:
            error = error.__cause__ or error
        reason = shortened(str(error)) or type(error).__name__
        if "Config name is missing" in reason:
            reason += " (--dataset_config NAME picks one of those of --dataset)"
        raise InputError(f"{source}: {missing}cannot be loaded as a data set: {reason}") from None
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    if split not in found:
        raise InputError(f"{source}: no split {split!r}; it has {', '.join(found)}")
    return found[split]


def check_json_files(of_split: dict[str, list[str]] | None):
    """Raises InputError as parse_json does for the files of JSON that are a folder's data set.

    pyarrow takes the last of two values in a message, and does not survive deep brackets. What else
    lies in the folder is not read.
    """
    for file in map(Path, chain(*(of_split or {}).values())):
        if file.is_file() and FILE_NAME.search(file.name) and ".parquet" not in file.suffixes:
            deque(parse_json(file), maxlen=0)


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
        raise InputError(f"{source}: no preference data in {names(columns)}; {ACCEPTED}")


# ---------------------------------------------------------------------- one row to messages

SURROGATE = re.compile("[\ud800-\udfff]")
THINKING = re.compile(r"[<[](/?)(think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)
HH_TURN = re.compile(r"\r?\n\r?\n(Human|Assistant):")  # how hh-rlhf writes a chat as one string
OTHER_TEMPLATES = re.compile(
    r"<\|(im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system)\|>|\[/?INST\]"
    r"|<(start|end)_of_turn>|^(### ?)?(Human|Assistant|Instruction|Response|USER|ASSISTANT):",
    re.MULTILINE,
)
CHAT_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
TOOL_ROLES = set("tool tool_call tool_response function function_call observation ipython".split())
PROMPT_CHATS = "messages", "conversations", "conversation"  # other names of a prompt chat's column
MEDIA = "image images audio audios video videos".split()
TOOLS = "tools functions".split()
TEXT_PARTS = "text input_text output_text".split()
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
    if any(isinstance(x, str) and CHAT_AS_TEXT.match(x) for x in (prompt, chosen, rejected)):
        raise RowFault("a chat written as text")
    strings = isinstance(chosen, str) and isinstance(rejected, str)
    if strings and isinstance(prompt, str | list | dict):
        chosen, rejected = (answer_chat(text, prompt) for text in (chosen, rejected))
    elif strings:
        chosen, rejected, prompt = hh_turns(chosen), hh_turns(rejected), None
    chosen, rejected = to_chat(chosen), to_chat(rejected)
    if isinstance(prompt, str) and (strings or len(chosen) == len(rejected) == 1):
        prompt = prompt_chat(prompt)
    if isinstance(prompt, list | dict) and prompt:
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

    Some models write their thoughts between <think> and </think> (also thinking, thought,
    reasoning) before the answer. Where the prompt opens the passage only its end is in the answer,
    at the end of a line. Where the answer was cut there is no end, and nothing is left.
    """
    tag = THINKING.search(answer)
    if not tag:
        return "", answer
    if tag[1]:  # it ends what the prompt has opened
        rest = answer[tag.end() :].lstrip()
        mentioned = rest and "\n" not in answer[tag.end() : len(answer) - len(rest)]
    else:
        rest = re.split(rf"[<[]/{tag[2]}[>\]]", answer[tag.end() :], maxsplit=1, flags=re.I)[1:]
        rest = "".join(rest).lstrip()
        mentioned = answer[: tag.start()].strip()
    return ("", answer) if mentioned else (answer[: len(answer) - len(rest)], rest)


def what_is_said(messages: list[dict]) -> Iterator[str]:
    """Yields the texts of messages without white space around them; an assistant's in two parts,
    its thinking without tags and the rest, because templates write tags of their own."""
    for m in messages:
        thinking, rest = "", m["content"]
        if m["role"] == "assistant":
            thinking, rest = split_thinking(rest)
        yield from (THINKING.sub("", thinking).strip(), rest.strip())


def without_thinking(messages: list[dict], *answers: str) -> tuple[list[dict], str, str]:
    """Returns a pair without what the assistant thinks in it. Raises Unusable if an answer is
    nothing else, or if nothing else tells the answers apart."""
    chosen, rejected = (split_thinking(text)[1] for text in answers)
    if not chosen or not rejected:
        raise Unusable("an answer of thinking alone")
    if chosen == rejected:
        raise Unusable("identical without thinking")
    turns = [(m, split_thinking(m["content"])[1]) for m in messages]
    turns = [assistant_turn(rest) if m["role"] == "assistant" else m for m, rest in turns]
    return turns, chosen, rejected


def half_a_character(text: str) -> bool:
    """Returns whether a text holds half a surrogate pair, which is no Unicode; JSON can hold it."""
    return not text.isascii() and SURROGATE.search(text) is not None


def user_chat(text: str) -> list[dict]:
    """Returns a conversation of one turn, the user's."""
    return [{"role": "user", "content": text}]


def assistant_turn(text: str) -> dict:
    """Returns a message of the assistant."""
    return {"role": "assistant", "content": text}


def is_hh(prompt) -> bool:
    """Returns whether a prompt is a chat of hh-rlhf, and not a text that merely holds its words."""
    speakers = HH_TURN.findall(prompt) if isinstance(prompt, str) else []
    begins = speakers and prompt.lstrip().startswith("Human:")
    return bool(begins or "Human" in speakers and prompt.rstrip().endswith("\nAssistant:"))


def prompt_chat(text: str) -> list[dict]:
    """Returns the conversation of a prompt that is a string, which hh-rlhf writes with turns."""
    turns = hh_turns("\n\n" + text.strip()) if is_hh(text) else user_chat(text)
    return turns[:-1] if turns[-1] == assistant_turn("") else turns


def answer_chat(text: str, prompt) -> list[dict]:
    """Returns the chat of an answer that is a string; hh-rlhf's may repeat the prompt's turns."""
    if is_hh(prompt):
        text = text.removeprefix(prompt).strip()
    repeats = is_hh(prompt) and text.startswith("Human:")
    return hh_turns("\n\n" + text) if repeats else [assistant_turn(text)]


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
    role = role.lower()
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
        for kind in ("image", "audio", "video", "document", "file", "thinking"):
            if kind in part["type"]:
                raise Unusable(f"has {kind}")
        if part["type"] not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RowFault("content is not text")
    return "".join(part["text"] for part in parts) if parts else None


def refuse_more_than_text(columns: dict):
    """Raises Unusable if a row or a message holds tools, pictures or sound."""
    for name in (*TOOLS, *MEDIA):
        if filled(columns.get(name)):
            raise Unusable(f"has {name}")


def filled(value) -> bool:
    """Returns whether a value of JSON holds anything; a string of an empty list does not."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
        elif value is not None and str(value).strip() not in ("", "[]", "{}", "null"):
            return True
    return False


def with_earlier_turns(prompt: list[dict], system, history) -> list[dict]:
    """Returns a prompt with the columns system (a text) and history (a list of [user, assistant]
    or of messages) in front of it. Raises RowFault if they are something else."""
    first = prompt[:1] if prompt and prompt[0]["role"] == "system" else []
    rest, turns = prompt[len(first) :], []
    for pair in (history if isinstance(history, list) else [history]) * filled(history):
        if isinstance(pair, dict):
            turns.append(to_message(pair))
        elif isinstance(pair, list) and [type(text) for text in pair] == [str, str]:
            turns += [*user_chat(pair[0]), assistant_turn(pair[1])]
        else:
            raise RowFault("history is no list of [user, assistant]")
    if filled(system):
        if not isinstance(system, str):
            raise RowFault("system is not text")
        own = [{"role": "system", "content": system}]
        if first not in ([], own):
            raise RowFault("two system turns")
        first = own
    repeated = turns == rest[: len(turns)]  # the chat holds these turns already
    return [*first, *([] if repeated else turns), *rest]


def unread_columns(row: dict) -> list[str]:
    """Returns the columns of a usable row, and the keys of its messages, that hold something which
    is not read and is no metadata (ids, scores, sources)."""
    chats = "prompt", prompt_column(row), "chosen", "rejected"
    chosen, prompt = row["chosen"], row.get("prompt")
    unread = [name for name in row if name not in {*READ, *chats}]
    if isinstance(chosen, list):  # then columns beside it may repeat what is in the chat
        unread = [name for name in unread if row[name] != chosen]
        said = [text.strip() for m in chosen for text in m.values() if isinstance(text, str)]
        if len(chosen) > 1 and isinstance(prompt, str) and prompt.strip() not in said:
            unread.append("prompt")
    unread = [name for name in unread if filled(row[name]) and not is_metadata(name, row[name])]
    for column in dict.fromkeys(chats):
        chat = row.get(column)
        for message in [chat] if isinstance(chat, dict) else chat if isinstance(chat, list) else []:
            for key in message.keys() - {"role", "content", "from", "value"}:
                if filled(message[key]) and not is_metadata(key, message[key]):
                    unread.append(f"{column}.{key}")
    return unread


def is_metadata(name: str, value) -> bool:
    """Returns whether a column's name says metadata: an id, or only words of METADATA beside the
    names of the columns that it is about; and the value is no text of more than three words."""
    if isinstance(value, str) and len(value.split()) > 3:
        return False
    words = re.split(r"\W|_", name.lower())
    about = {*words} - {"chosen", "rejected", "prompt"}
    return bool(about) and (about <= METADATA or words[-1] in ("id", "index"))


def hh_turns(text: str) -> list[dict]:
    """Returns the messages of a chat that hh-rlhf writes as one string; a text before its turns is
    the system's."""
    system, *parts = HH_TURN.split(text)
    if not parts:
        raise RowFault("no prompt")
    turns = [{"role": "system", "content": system.strip()}] if system.strip() else []
    roles = {"Human": "user", "Assistant": "assistant"}
    for role, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": roles[role], "content": content.strip()})
    return turns


def checked(prompt: list[dict], chosen: str, rejected: str) -> tuple[list[dict], str, str]:
    """Returns its arguments. Raises RowFault if the prompt's turns do not alternate and end with
    the user's, if an answer is empty, or if the answers are equal; Unusable if the assistant
    speaks first or last in the prompt."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if turns and turns[0]["role"] == "assistant":
        raise Unusable("assistant first")
    if turns and turns[-1]["role"] == "assistant":
        raise Unusable("prompt ends with the assistant")
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise RowFault("turns do not alternate")
    if not chosen.strip() or not rejected.strip():
        raise RowFault("empty answer")
    if chosen == rejected:
        raise RowFault("identical pair")
    return prompt, chosen, rejected


# ---------------------------------------------------------------------- messages to ids


def find_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the chat template that --chat_template names: one of the tokenizer's several, or a
    jinja file. Raises InputError if it is neither."""
    several = isinstance(tokenizer.chat_template, dict)
    own = tokenizer.chat_template if several else {}
    if name in own:
        return own[name]
    with input_error_for(f"--chat_template {name}"):
        if not Path(name).is_file():
            own = f", and none of the tokenizer's templates: {', '.join(own)}" * several
            raise InputError(f"there is no such file{own}")
        text = Path(name).read_text("utf-8-sig")
        if not text.strip():
            raise InputError("the file is empty")
        if is_json(text):
            raise InputError(
                "it is JSON, no template: pass a file with the template alone, as text"
            )
    return text


def is_json(text: str) -> bool:
    """Returns whether a text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


DAY_CODES = "%F %D %T %R %-d %-m %e %d %m %y %Y %b %B %a %A %j %x %X %c %H %I %M %S %p".split()


def on_day(template: str, day: str) -> str:
    """Returns a chat template in which strftime_now knows only the first moment of a day.

    It raises an error for a code that is not in DAY_CODES.
    """
    codes = {code: date.fromisoformat(day).strftime(code) for code in DAY_CODES}
    text = "format" + "".join(f"|replace('{code}', '{codes[code]}')" for code in DAY_CODES)
    unknown = "raise_exception('it writes the date in a form that is not known here: ' ~ format)"
    return (
        f"{{% macro strftime_now(format) %}}{{% set text = {text} %}}"
        f"{{% if '%' in text %}}{{{{ {unknown} }}}}{{% endif %}}{{{{ text }}}}{{% endmacro %}}"
        f"\n{template}"
    )


@contextmanager
def at_most(seconds: float):
    """Raises InputError in a `with` block that writes a conversation and computes for longer.

    A process that was stopped for a while has not computed: the time is the processor's. Only a
    process's first thread can be interrupted so; in others nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_):
        raise InputError(f"the chat template takes over {seconds:g} seconds for one conversation")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class ChatEncoder:
    """Turns messages into token ids with the tokenizer's own chat template.

    Training and evaluation share this class. day is the one that a template which writes today's
    date writes, by default today's; the attribute day is None with any other template. Raises
    InputError if the tokenizer has no template or its template cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: str | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "the tokenizer has no chat template: pass one with --chat_template FILE (jinja)"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise InputError(
                f"the tokenizer has several chat templates ({', '.join(tokenizer.chat_template)})"
                " and none is the default: pass the name of one with --chat_template"
            )
        self.tokenizer, self.day = tokenizer, None
        self.chat_template = tokenizer.get_chat_template()
        if "strftime_now" in self.chat_template:  # a run that goes on tomorrow must read the same
            self.day = day or str(date.today())
            try:
                self.chat_template = on_day(self.chat_template, self.day)
            except (TypeError, ValueError):
                given = "which a config.json or .meta.json gives for the chat template"
                raise InputError(f"the day {self.day!r}, {given}, is no date") from None
        self.bos = tokenizer.bos_token_id
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens)
        self.markers = set(tokenizer.convert_tokens_to_ids(list(special)))
        # some tokenizers hold the tokens of their templates as added, but not as special ones
        added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
        self.markers |= {i for i, text in added.items() if text.strip()}
        try:
            self.probe()
        except TemplateError as error:
            raise InputError(f"the chat template cannot be used: {error}") from None
        self.folds_system = not self.takes_system_turn()
        written = self.markers & {*self.prompt_ids(user_chat("u")), self.end_of_turn}
        special |= {added[i] for i in written if i in added}
        self.special_text = re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")

    def render(self, messages: list[dict], generation_prompt: bool = False) -> str:
        """Returns the text of messages, with generation_prompt followed by the assistant header."""
        try:
            with at_most(TEMPLATE_SECONDS):
                text = self.tokenizer.apply_chat_template(
                    messages, chat_template=self.chat_template, tokenize=False,
                    add_generation_prompt=generation_prompt,
                )  # fmt: skip
        except InputError:
            raise
        except Exception as error:  # a template is code: it may raise anything
            raise TemplateError(reason_of(error)) from None
        if len(text) > 2 * LONGEST_TEXT:
            raise TemplateError(f"it writes a text of {len(text):,} characters")
        return text

    def template(self, messages: list[dict], generation_prompt: bool = False) -> list[int]:
        """Returns the ids of messages, with generation_prompt followed by the assistant header."""
        return self.ids_of(self.render(messages, generation_prompt))

    def ids_of(self, text: str) -> list[int]:
        """Returns the ids of a rendered text; nothing is added to it, no second BOS either."""
        if half_a_character(text):
            raise TemplateError("it writes half a character")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def two_answers(self, messages: list[dict]) -> tuple[list[int], list[int], int]:
        """Returns the ids of messages with two different answers, and where the ids part."""
        a, b = (self.template([*messages, assistant_turn(text)]) for text in "ab")
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
            raise TemplateError("it shows no answer of the assistant")
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
        return all(self.shows(system, t) for t in (turns, [*turns, assistant_turn("a"), *turns]))

    def shows(self, system: dict, turns: list[dict]) -> bool:
        """Returns whether the template shows a system turn alike with and without an answer."""
        try:
            without, lost = self.with_answer(turns)
        except TemplateError:
            return True  # it takes no such turns at all, which is not the system turn's fault
        try:
            ids, lost_with_system = self.with_answer([system, *turns])
        except TemplateError:
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
        return self.answer_and_text(messages, answer)[0]

    def answer_and_text(self, messages: list[dict], answer: str) -> tuple[list[int], str]:
        """Returns the ids of prompt and answer, and the text that the template makes of them."""
        text = self.render([*self.fold(messages), assistant_turn(answer)])
        ids = self.ids_of(text)
        ids = ids + [self.end_of_turn] if self.append_eos else ids[: len(ids) - len(self.tail)]
        return self.with_bos(ids), text

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
        texts = [text for text in (system["content"], user["content"]) if text.strip()]
        return [{**user, "content": "\n\n".join(texts)}, *rest]

    def triplet(
        self, messages: list[dict], chosen: str, rejected: str, max_length: int, row: int,
        notes: Counter,
    ) -> Triplet:  # fmt: skip
        """Returns the ids of a pair; an answer is cut where it and the prompt exceed max_length.

        notes counts what was noticed. Raises RowFault if the pair cannot be encoded, and TooLong
        if nothing that tells the answers apart is left.
        """
        for turn in (*messages, assistant_turn(chosen), assistant_turn(rejected)):
            text = turn["content"]
            if turn["role"] == "assistant":  # whose tags of thinking may be special tokens
                text = THINKING.sub("", text)
            if self.special_text.search(text):  # the template would make a real token of it
                raise RowFault("literal special token")
            if half_a_character(text):
                raise RowFault("half a character")
            if len(text) > LONGEST_TEXT:
                raise TooLong(f"a text of over {LONGEST_TEXT:,} characters")
        try:
            prompt = self.prompt_ids(messages)
            encoded = [self.answer_and_text(messages, text) for text in (chosen, rejected)]
        except TemplateError:
            raise RowFault("refused by the chat template") from None
        # a tokenizer may merge characters across the border of prompt and answer: both answers
        # then start where all three still agree
        answers = [ids for ids, _ in encoded]
        n = min(common_prefix(prompt, ids) for ids in answers)
        if answers[0] == answers[1]:
            raise RowFault("identical pair")  # the template strips white space
        if min(map(len, answers)) <= n or n == 0:
            raise RowFault("empty answer")
        if len(prompt) - n > MERGED:
            raise RowFault("the template changes the prompt")
        if any(ids[-1] != self.end_of_turn for ids in answers):
            raise RowFault("the template ends no turn")
        left_out = any(
            leaves_out(text, [*messages, assistant_turn(answer)])
            for (_, text), answer in zip(encoded, (chosen, rejected), strict=True)
        )
        chosen, rejected = (ids[n:max_length] for ids in answers)
        if n >= max_length:
            raise TooLong("prompt leaves no room")
        if chosen == rejected:
            raise TooLong("identical after truncation")
        notes["text left out by the chat template"] += left_out
        notes["prompt is no token prefix"] += n < len(prompt)
        unknown = {self.tokenizer.unk_token_id} - {self.bos, self.end_of_turn}
        notes["unknown characters"] += not unknown.isdisjoint([*prompt, *chosen, *rejected])
        notes["truncated"] += max(map(len, answers)) > max_length
        notes["system turn folded"] += self.folds_system and messages[0]["role"] == "system"
        try:
            ids = [np.array(ids, dtype=np.int32) for ids in (prompt[:n], chosen, rejected)]
        except OverflowError:
            most = max(map(max, answers))
            raise InputError(f"the tokenizer gives token id {most}, which no model has") from None
        return Triplet(*ids, row)


def leaves_out(text: str, messages: list[dict]) -> bool:
    """Returns whether a rendered text lacks something that the messages say."""
    return any(text.count(said) < n for said, n in Counter(what_is_said(messages)).items())


def common_prefix(a: list[int], b: list[int]) -> int:
    """Returns the length of the longest common prefix."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


# ---------------------------------------------------------------------- whole data sets


def load_pairs(
    source: str, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int,
    log: Callable = lambda line: None, config: str | None = None, strip_thinking: bool = False,
    day: str | None = None,
) -> PreferenceData:  # fmt: skip
    """Returns the pairs of a data set; prompt and answer have at most max_length tokens.

    source, split and config are those of read_rows. log(line) is told the progress. With
    strip_thinking what the assistant thinks aloud is left out. day is that of ChatEncoder. Raises
    InputError if the source cannot be used, if more than 1 % of its rows are malformed, or if more
    than half of them hold what this project cannot use (tools, images, ...).
    """
    rows = read_rows(source, split, config)
    check_columns(source, rows)
    encoder = ChatEncoder(tokenizer, day)
    if encoder.opened:
        raise InputError(
            f"the chat template cannot be trained with: its generation prompt ends with"
            f" {encoder.opened!r}, which its full conversations leave out; pass a template without"
            " that with --chat_template FILE"
        )
    triplets, notes, dropped = [], Counter(), {k: Counter() for k in (RowFault, TooLong, Unusable)}
    first_row, unread = {}, {}  # the first row of each fault; the columns that are not read
    of_kind = {kind.__name__: counter for kind, counter in dropped.items()}
    look = partial(examine, encoder=encoder, max_length=max_length, strip_thinking=strip_thinking)
    found = map(look, rows) if len(rows) < MANY else examine_many(rows, look, log)
    for i, (ids, said) in enumerate(found):
        if ids is None:
            kind, reason = said
            of_kind[kind][reason] += 1
            first_row.setdefault(reason, i)
        else:
            triplets.append(Triplet(*ids, i))
            notes.update(said[0])
            unread |= dict.fromkeys(said[1])
    faults, too_long, unusable = dropped.values()
    if faults.total() > MALFORMED_LIMIT * len(rows):
        first = ", ".join(f"{fault} in row {first_row[fault]}" for fault in faults)
        raise InputError(
            f"{source}: {faults.total()} of {len(rows)} rows are malformed, more than "
            f"{MALFORMED_LIMIT:.0%}: {counts(faults)}; the first of each, from 0: {first};"
            f" {ACCEPTED}"
        )
    if unusable.total() > len(rows) / 2:
        raise InputError(
            f"{source}: fewer than half of the {len(rows)} rows can be used, because this project"
            f" reads only texts of a user and an assistant who take turns: {counts(unusable)}"
        )
    digest = hashlib.sha256()
    for ids in (ids for t in triplets for ids in t[:3]):
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    dropped, fingerprint = too_long + faults + unusable, digest.hexdigest()[:16]
    return PreferenceData(
        triplets, dropped, +notes, len(rows), fingerprint, tuple(unread), encoder.day
    )


def examine(row, encoder: ChatEncoder, max_length: int, strip_thinking: bool) -> tuple:
    """Returns a row's ids of prompt, chosen and rejected, and [its notes, the columns not read].

    For a row that is dropped returns None, and the name of RowFault's kind and the reason.
    """
    notes = Counter()
    try:
        pair = as_given = to_messages(row)
        if strip_thinking:
            pair = without_thinking(*pair)
        ids = encoder.triplet(*pair, max_length, 0, notes)[:3]
    except RowFault as fault:
        return None, (type(fault).__name__, str(fault))
    notes.update(noticed(row, *as_given, stripped=strip_thinking))
    return ids, (notes, unread_columns(row))


IDS = "prompt chosen rejected".split()


def examine_batch(rows: list[bytes], look: Callable) -> dict[str, list]:
    """Returns what `look` finds in pickled rows, as columns that `datasets` can store."""
    found, none = [look(pickle.loads(row)) for row in rows], [np.zeros(0, np.int32)] * len(IDS)
    columns = {k: [(ids or none)[j] for ids, _ in found] for j, k in enumerate(IDS)}
    return columns | {"said": [json.dumps([ids is not None, *words]) for ids, words in found]}


def examine_many(rows: Sequence, look: partial, log: Callable) -> Iterator[tuple]:
    """Yields look(row) of every row, as many processes find it as there are cores.

    The workers, their progress and the cache are those of `datasets`. The results lie in its cache
    folder (HF_DATASETS_CACHE), by a hash of all that they depend on. log(line) is told where.
    Raises InputError if that folder cannot be used or a worker ends.
    """
    import datasets  # see read_with_datasets
    import pyarrow

    folder, pickled = Path(datasets.config.HF_DATASETS_CACHE, "ganpo"), [*map(pickle.dumps, rows)]
    key = hash_of(pickled, **look.keywords)
    ids = datasets.List(datasets.Value("int32"))
    kinds = datasets.Features(dict.fromkeys(IDS, ids) | {"said": datasets.Value("string")})
    # in pieces, because a worker is sent the whole of each piece that holds a row of its own
    pieces = (pickled[i : i + PIECE] for i in range(0, len(rows), PIECE))
    column = pyarrow.chunked_array([*pieces], pyarrow.large_binary())
    del pickled  # which would hold all rows once more
    workers, begin = cpu.cores(), time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Path(folder, f"{key}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log("waiting for another process, which tokenises the same rows")
                fcntl.flock(lock, fcntl.LOCK_EX)  # for ranks that wait here no time-out runs
            there = {*folder.glob(f"{key}*.arrow")}
            if not there:
                log(f"tokenising {len(rows):,} rows in {workers} processes")
            table = datasets.Dataset(pyarrow.table({"row": column})).map(
                examine_batch, input_columns="row", batched=True, batch_size=100,
                remove_columns="row", fn_kwargs={"look": look}, features=kinds,
                num_proc=workers if workers > 1 else None, new_fingerprint=key,
                cache_file_name=str(folder / f"{key}.arrow"), desc="tokenised",
            )  # fmt: skip
            same = there == {*folder.glob(f"{key}*.arrow")}
    except (OSError, RuntimeError) as error:  # the latter if a worker was killed
        raise InputError(f"tokenising, with {folder} for the ids: {reason_of(error)}") from None
    how = "read from" if same else f"found in {time.monotonic() - begin:.0f} s and kept in"
    log(f"token ids of {len(rows):,} rows {how} {folder}/{key}*.arrow")
    for part in table.with_format("arrow").iter(PIECE):
        part = part.combine_chunks()
        columns = [part[k].chunk(0) for k in IDS]
        ends = [column.offsets.to_numpy() for column in columns]
        values = [column.values.to_numpy() for column in columns]
        for i, words in enumerate(part["said"].to_pylist()):
            kept, *said = json.loads(words)
            of_row = (v[e[i] : e[i + 1]].copy() for v, e in zip(values, ends, strict=True))
            yield (tuple(of_row) if kept else None), said


def hash_of(rows: list[bytes], encoder: ChatEncoder, **settings) -> str:
    """Returns a hash of all that examine depends on: pickled rows, tokenizer, template, day,
    settings, and this code with that of the libraries."""
    versions = [version(name) for name in ("transformers", "tokenizers")]
    texts = [encoder.day, settings, versions]
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(texts).encode())
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)  # with its template
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.read_bytes())
    for row in rows:
        digest.update(row)
    return digest.hexdigest()[:32]


def noticed(row: dict, messages: list[dict], *answers: str, stripped: bool) -> dict[str, int]:
    """Returns counts of what is worth knowing about a row that is kept; stripped says whether its
    thinking was left out."""
    of_turns = [split_thinking(m["content"])[0] for m in messages if m["role"] == "assistant"]
    of_answers, rests = zip(*map(split_thinking, answers), strict=True)
    *earlier, asked = (m["content"].strip() for m in messages)
    answers = [text.lstrip() for text in answers]
    better, worse = row.get("score_chosen"), row.get("score_rejected")
    scored = isinstance(better, int | float) and isinstance(worse, int | float)
    kept = "left out of" if stripped else "in"
    return {
        f"thinking {kept} answers": sum(map(bool, of_answers)),
        f"thinking {kept} earlier turns": sum(map(bool, of_turns)),
        "tags of thinking within an answer": any(map(THINKING.search, rests)),
        "marks of a chat template in a text": any(
            map(OTHER_TEMPLATES.search, (*earlier, asked, *answers))
        ),
        "empty prompt": asked == "",
        "answers repeat the prompt": asked != "" and all(a.startswith(asked) for a in answers),
        "score tie": scored and better == worse,
        "score inversion": scored and better < worse,
    }


def load_data(
    args, tokenizer: PreTrainedTokenizerBase, max_length: int, log: Callable, evaluates: bool
) -> tuple[PreferenceData, PreferenceData | None]:
    """Returns the pairs of --dataset, and if the program evaluates those of --eval_split.

    --eval_split is a file of its own, or another split of --dataset. Other arguments as in
    load_pairs. args.template_day is a day; afterwards it is None if the template writes none.
    Raises InputError as load_pairs does, and if there are too few pairs.
    """
    load = partial(
        load_pairs, tokenizer=tokenizer, max_length=max_length, log=log,
        strip_thinking=args.strip_thinking, day=args.template_day,
    )  # fmt: skip
    data, held_out = load(args.dataset, args.split, config=args.dataset_config), None
    if len(data.triplets) < args.batch_size:
        fewer = f"fewer pairs than --batch_size {args.batch_size}"
        raise InputError(f"{args.dataset}: {fewer}: {data.summary()}")
    if evaluates:
        name = args.eval_split
        if "/" in name or FILE_NAME.search(name):
            held_out = load(name, "train")
        else:
            try:
                held_out = load(args.dataset, name, config=args.dataset_config)
            except InputError as error:
                here = f"; what lies here is --eval_split ./{name}" if Path(name).exists() else ""
                raise InputError(f"{error}{here}") from None
        if not held_out.triplets:
            raise InputError(f"--eval_split {name}: no pair is left: {held_out.summary()}")
    args.template_day = data.day
    return data, held_out
