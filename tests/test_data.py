"""Claims about data.py and packing.py: which rows become triplets, their ids, order and packing.

    python -m pytest -q tests/test_data.py -m "not slow"

Nearly all of it runs on a byte-level tokenizer and rows that are made here, with the chat templates
in tests/data/templates. Claims on published tokenizers and data sets read the folder `shared`
beside the repository, or the folder that GANPO_TOKENIZERS names (mistral_nemo/tokenizer.json and
so on, with the names of PUBLISHED), and are skipped where that is absent.
"""

import cpu

import fcntl
import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import tarfile
import time
import tracemalloc
from collections import Counter
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

import data
import report
import reward_model
import settings
from data import (
    ChatEncoder,
    InputError,
    Triplet,
    find_template,
    input_error_for,
    load_data,
    load_pairs,
    split_thinking,
)
from helpers import CHAT, DATA, SHARED, SPECIAL, TURNS, close, json_of, run, tiny, write_lines
from packing import batch_indices, epoch_order, pack, plan_forwards, survey

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no published data at {SHARED}")

# ---------------------------------------------------------------------- templates, and rows

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"  # nothing ends or separates turns
MERGING = (  # with a token for ":y", the header's colon is another token where "yes" follows
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HEAD = "<|user|>q<|end|>\n<|assistant|>"  # how CHAT without its BOS renders the prompt "q"


def ids(text, tokenizer=None):
    """What a rendered conversation should become: tokenised whole, nothing added."""
    return (tokenizer or tiny()).encode(text, add_special_tokens=False)


def chat(*texts):
    """Turns of user and assistant."""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def answer(text):
    return [{"role": "assistant", "content": text}]


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def good(n):
    return [row(f"question {i}", f"yes {i}", f"no {i}") for i in range(n)]


def load(tmp_path, rows, tokenizer=None, max_length=512, **more):
    source = write_lines(tmp_path / "rows.jsonl", rows)
    return load_pairs(source, "train", tokenizer or tiny(), max_length, **more)


def lists(pairs):
    return [[ids.tolist() for ids in (t.prompt, t.chosen, t.rejected)] for t in pairs.triplets]


def error_of(source, split="train", **more):
    """The one line that names the source."""
    with pytest.raises(InputError) as caught:
        load_pairs(str(source), split, tiny(), 512, **more)
    message = str(caught.value)
    assert "\n" not in message and str(source) in message and len(message) < 3000, message
    assert not re.search("[\ud800-\udfff]", message)
    return message


# ---------------------------------------------------------------------- usual templates and data

TEMPLATE_FILES = DATA / "templates"
STYLES = {  # special tokens, end of turn, assistant header, a conversation as it is rendered
    "gemma": (
        ("<bos>", "<eos>", "<open>", "<close>"), "<close>", "<open>model\n",
        "<bos><open>user\nHello there!<close>\n<open>model\nHi.<close>\n"
        "<open>user\n2+2?<close>\n<open>model\n4<close>",
    ),
    "llama": (
        ("<begin>", "<end>", "<head>", "<text>"), "<end>", "<head>assistant<text>\n\n",
        "<begin><head>user<text>\n\nHello there!<end><head>assistant<text>\n\nHi.<end>"
        "<head>user<text>\n\n2+2?<end><head>assistant<text>\n\n4<end>",
    ),
}  # fmt: skip
REAL = {  # of published tokenizers the same, as token ids
    "gemma-2-2b-it": (
        107,
        [106, 2516, 108],
        "2 106 1645 108 4521 1104 235341 107 108 106 2516 108 2151 235265 107 108 106 1645 108 "
        "235284 235340 235284 235336 107 108 106 2516 108 235310 107",
    ),
    "llama-3-8b-instruct": (
        128009,
        [128006, 78191, 128007, 271],
        "128000 128006 882 128007 271 9906 1070 0 128009 128006 78191 128007 271 13347 13 128009 "
        "128006 882 128007 271 17 10 17 30 128009 128006 78191 128007 271 19 128009",
    ),
}


SYSTEM = [{"role": "system", "content": "Be kind."}]
CHATML = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant"
    "\nHello!<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
)
HEADERS = (  # as Llama 3 writes a conversation behind the system turn
    "{0}user{1}\n\nHi.{2}{0}assistant{1}\n\nHello!{2}{0}user{1}\n\n2+2?{2}{0}assistant{1}\n\n"
)
LLAMA = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
PUBLISHED = {  # BOS, prompt and answer "4" of a conversation with a system turn; is that folded?
    "mistral_nemo": (
        "<s>", "<s>[INST]Be kind.\n\nHi.[/INST]Hello!</s>[INST]2+2?[/INST]", "4</s>", 1,
    ),
    "qwen2_5": (None, CHATML, "4<|im_end|>", 0),
    "qwen3": (None, CHATML, "<think>\n\n</think>\n\n4<|im_end|>", 0),
    "smollm2": ("<|im_start|>", CHATML, "4<|im_end|>", 0),
    "phi3_style": (
        "<s>",
        "<s><|system|>\nBe kind.<|end|>\n<|user|>\nHi.<|end|>\n<|assistant|>\nHello!<|end|>\n"
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n", "4<|end|>", 0,
    ),
    "llama3_2_style": (
        "<begin>", "<begin><head>system<text>\n\nToday: 05 Jan 2024\n\nBe kind.<end>"
        + HEADERS.format("<head>", "<text>", "<end>"), "4<end>", 0,
    ),
}  # fmt: skip
NOT_FREE = {  # the same of templates whose licences do not let them stand here
    "gemma2": (
        "<bos>", "<bos><start_of_turn>user\nBe kind.\n\nHi.<end_of_turn>\n<start_of_turn>model\n"
        "Hello!<end_of_turn>\n<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
        "4<end_of_turn>", 1,
    ),
    "llama3": (
        "<|begin_of_text|>", "<|begin_of_text|>{}system{}\n\nBe kind.{}".format(*LLAMA)
        + HEADERS.format(*LLAMA), "4<|eot_id|>", 0,
    ),
    "llama3_2": (
        "<|begin_of_text|>", "<|begin_of_text|>{}system{}\n\nCutting Knowledge Date: December"
        " 2023\nToday Date: 05 Jan 2024\n\nBe kind.{}".format(*LLAMA)
        + HEADERS.format(*LLAMA), "4<|eot_id|>", 0,
    ),
}  # fmt: skip


def check_published(tokenizer, bos, prompt, answer, folded):
    notes, encoder = Counter(), ChatEncoder(tokenizer, "2024-01-05")
    talk = SYSTEM + chat("Hi.", "Hello!", "2+2?")
    triplet = encoder.triplet(talk, "4", "5", 2048, 0, notes)
    assert tokenizer.bos_token == bos and +notes == +Counter({"system turn folded": folded})
    for scored, text in ((triplet.chosen, answer), (triplet.rejected, answer.replace("4", "5"))):
        assert triplet.prompt.tolist() == ids(prompt, tokenizer)
        assert scored.tolist() == ids(text, tokenizer)
        assert scored[-1] == encoder.end_of_turn == ids(answer, tokenizer)[-1]
        if bos and not encoder.bos_is_marker:
            assert [*triplet.prompt, *scored].count(tokenizer.bos_token_id) == 1


def with_template(name, prompt, answer, bos):
    """The tiny tokenizer with a published template and the tokens that it writes."""
    found = dict.fromkeys(re.findall(r"<[^<>\s]+>|\[/?INST\]", prompt + answer))
    special = [token for token in found if token != bos and "think" not in token]
    tokenizer = tiny.__wrapped__(None, bos, special=(bos or "<unused>", "</s>", *special))
    tokenizer.add_tokens([token for token in found if "think" in token])  # no special ones
    tokenizer.chat_template = (TEMPLATE_FILES / f"{name}.jinja").read_text()
    return tokenizer


@pytest.fixture(params=STYLES)
def style(request):
    """A tokenizer with a template of our own, and the facts above as token ids."""
    special, *texts = STYLES[request.param]
    template = (TEMPLATE_FILES / f"{request.param}_style.jinja").read_text()
    tokenizer = tiny(template, special[0], special=special)
    end, header, conversation = (ids(text, tokenizer) for text in texts)
    return tokenizer, end[0], header, conversation


SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The published tokenizers with the facts above, by name."""
    folder, found = tmp_path_factory.mktemp("tokenizers"), {}
    for name, (end, header, conversation) in REAL.items():
        with tarfile.open(SHARED / f"tokenizers/{name}.tar.gz") as archive:
            archive.extractall(folder, **SAFELY)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        found[name] = tokenizer, end, header, [int(i) for i in conversation.split()]
    return found


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Rows of our own in the schemas of the usual data sets, with their usual faults."""
    folder, rng = tmp_path_factory.mktemp("usual"), random.Random(0)
    words = "the old fox saw a red hen by the cold river, and 3 % more: é, 中!".split()

    def say(n):
        return " ".join(rng.choices(words, k=n)) + rng.choice([".", "?", " \n"])

    prompts, chosen, rejected = ([say(rng.randint(3, 12)) for _ in range(500)] for _ in "pcr")
    for i, text in ((7, " \n"), (50, chosen[50]), (60, chosen[60]), (70, chosen[70] + "\n")):
        rejected[i] = text
    triples = list(zip(prompts, chosen, rejected, strict=True))
    scores = [{"score_chosen": 5.0, "score_rejected": 5.0 - (i % 10 > 0)} for i in range(500)]
    of_trl = [{"chosen": chat(p, c), "rejected": chat(p, r)} for p, c, r in triples]
    of_trl = [row | score for row, score in zip(of_trl, scores, strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(of_trl), folder / "ultrafeedback.parquet")
    systems = [[{"role": "system", "content": say(5)}] * (i % 3 == 0) for i in range(200)]
    turns = [s + chat(p, say(4), say(6)) for s, (p, _, _) in zip(systems, triples, strict=False)]
    turns[20][-1]["content"] *= 99  # no room for an answer
    answers = [(answer(c), answer(r)) for _, c, r in triples[100:300]]
    factory = [(t, *pair) for t, pair in zip(turns, answers, strict=True)]
    hh = [
        ["".join(f"\n\nHuman: {p}\n\nAssistant: {text}" for text in (chosen[0], x)) for x in (c, r)]
        for p, c, r in triples[100:400]
    ]
    hh[5][0] = hh[5][0].replace("Human: ", "Human: no ")
    hh[6][0] += "\n\nAssistant: and more"
    hh[9] = [text.rsplit("Assistant: ", 1)[0] + "Assistant: " for text in hh[9]]
    files = {
        "ultrafeedback_trl": of_trl,
        "ultrafeedback_h4": [
            {"prompt": p, "prompt_id": str(i), "messages": r["chosen"], **r}
            for i, (p, r) in enumerate(zip(prompts, of_trl, strict=True))
        ],
        "ultrafeedback_plain": [row(*t) for t in triples],
        "ultrafeedback_explicit_chat": [row(chat(p), answer(c), answer(r)) for p, c, r in triples],
        "factory_explicit": [row(*t) for t in factory],
        "factory_implicit": [{"chosen": t + c, "rejected": t + r} for t, c, r in factory],
        "hh": [{"chosen": c, "rejected": r} for c, r in hh],
        "orca_flat": [{"system": "s", "question": p, "chosen": c, "rejected": r}
                      for p, c, r in triples[:9]],
    }  # fmt: skip
    for name, rows in files.items():
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def check_conversation(tokenizer, end_of_turn, header, whole):
    turns = chat("  Hello there!", "Hi.  ", "2+2?")
    triplet = ChatEncoder(tokenizer).triplet(turns, "4", "5", 2048, 0, Counter())
    assert [*triplet.prompt, *triplet.chosen] == whole
    assert len(triplet.chosen) == 2 and whole[:-2][-len(header) :] == header


def check_rows(pairs, tokenizer, end_of_turn, header, max_length):
    for prompt, *answers in lists(pairs):
        assert prompt[0] == tokenizer.bos_token_id and prompt[-len(header) :] == header
        assert sum([prompt, *answers], []).count(tokenizer.bos_token_id) == 1
        for scored in answers:
            assert scored[-1] == end_of_turn or len(prompt + scored) == max_length
            assert end_of_turn not in scored[:-1] and len(prompt + scored) <= max_length


def check_schemas(sources, ties, load, **noted):
    """Those of data with scores come first."""
    first, *others = [load(source) for source in sources]
    for pairs in others:
        assert lists(pairs) == lists(first) and pairs.fingerprint == first.fingerprint
    for pairs, known in zip([first, *others], [{"score tie": ties}] * 3 + [{}] * 2, strict=True):
        assert pairs.dropped == {"empty answer": 1, "identical pair": 3}
        assert pairs.notes == known | noted
    return first


def test_templates_in_the_usual_styles_give_exactly_the_documented_ids(style):
    check_conversation(*style)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_the_documented_spans(name):
    bos, prompt, answer, folded = PUBLISHED[name]
    check_published(with_template(name, prompt, answer, bos), bos, prompt, answer, folded)


@pytest.mark.parametrize("name", {**PUBLISHED, **NOT_FREE})
def test_published_tokenizers_give_the_documented_spans(name):
    folder = Path(os.environ.get("GANPO_TOKENIZERS", "none"), name)
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer at {folder}: set GANPO_TOKENIZERS")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_published(tokenizer, *(PUBLISHED | NOT_FREE)[name])


def test_qwen3_writes_thinking_of_the_last_answer_alone_and_what_it_leaves_out_is_counted():
    name, notes = "qwen3", Counter()
    bos, prompt, answer, _ = PUBLISHED[name]
    tokenizer = with_template(name, prompt, answer, bos)
    talk = SYSTEM + chat("Hi.", "<think>\nSo.\n</think>\n\nHello!", "2+2?")
    thinks = "<think>\nEasy.\n</think>\n\n4"
    triplet = ChatEncoder(tokenizer).triplet(talk, thinks, "5", 2048, 0, notes)
    texts = prompt, thinks + "<|im_end|>", answer.replace("4", "5")
    assert [part.tolist() for part in triplet[:3]] == [ids(text, tokenizer) for text in texts]
    assert +notes == {"text left out by the chat template": 1}


@needs_shared
def test_real_templates_give_exactly_the_documented_ids(real):
    for facts in real.values():
        check_conversation(*facts)


@pytest.mark.parametrize("file", ["ultrafeedback_trl", "factory_implicit", "hh"])
def test_every_row_has_one_bos_an_unscored_header_and_an_end_of_turn(file, style, usual):
    tokenizer, *facts, _ = style
    pairs = load_pairs(str(usual / f"{file}.jsonl.gz"), "train", tokenizer, 300)
    assert len(pairs.triplets) > 190
    check_rows(pairs, tokenizer, *facts, 300)


SCHEMAS_WITH_SCORES = ["trl.jsonl.gz", "h4.jsonl.gz", "trl.parquet"]


def test_every_ultrafeedback_schema_gives_the_same_ids(style, usual):
    names = ["_trl.jsonl.gz", "_h4.jsonl.gz", ".parquet", "_plain.jsonl.gz"]
    names.append("_explicit_chat.jsonl.gz")
    first = check_schemas(
        [str(usual / f"ultrafeedback{name}") for name in names], 47,  # 50 less identical pairs
        lambda source: load_pairs(source, "train", style[0], 300),
    )  # fmt: skip
    assert (len(first.triplets), first.n_rows) == (496, 500)


def test_system_turns_are_folded_only_where_the_template_refuses_them(style, usual):
    implicit, explicit = (
        load_pairs(str(usual / f"factory_{kind}.jsonl.gz"), "train", style[0], 400)
        for kind in ("implicit", "explicit")
    )
    assert implicit.fingerprint == explicit.fingerprint
    assert implicit.dropped == explicit.dropped == {"prompt leaves no room": 1}
    takes_none = style[0].bos_token == "<bos>"
    assert implicit.notes["system turn folded"] == (67 if takes_none else 0)


def test_hh_rlhf_drops_are_counted_by_reason(style, usual):
    pairs = load_pairs(str(usual / "hh.jsonl.gz"), "train", style[0], 500)
    assert pairs.dropped == {"different prompts": 2, "empty answer": 1}
    assert pairs.summary().startswith("297 of 300 rows; dropped: different prompts 2, empty")


def test_the_flat_orca_file_is_refused_naming_its_columns(usual):
    message = error_of(usual / "orca_flat.jsonl.gz")
    assert "system, question, chosen, rejected" in message


@needs_shared
@pytest.mark.slow
def test_real_data_sets_keep_and_drop_what_was_counted(real):
    """All claims above on the published files and tokenizers."""
    for tokenizer, end_of_turn, header, _ in real.values():

        def load(name, tokenizer=tokenizer):
            return load_pairs(str(SHARED / "prefs" / name), "train", tokenizer, 2048)

        names = [f"ultrafeedback_{x}" for x in (*SCHEMAS_WITH_SCORES, "plain.jsonl.gz",
                                                "explicit_chat.jsonl.gz")]  # fmt: skip
        first = check_schemas(names, 95, load, **{"marks of a chat template in a text": 4})
        assert (len(first.triplets), first.n_rows) == (770, 774)
        implicit, explicit = (
            load(f"llamafactory_dpo_en_{kind}.jsonl.gz") for kind in ("implicit", "explicit")
        )
        assert implicit.fingerprint == explicit.fingerprint
        assert implicit.dropped == explicit.dropped == {"prompt leaves no room": 2}
        assert implicit.notes["system turn folded"] == (59 if end_of_turn == 107 else 0)
        hh = load("hh_harmless_base_test.jsonl.gz")
        reasons = {"different prompts": 4, "empty answer": 3, "turns do not alternate": 2}
        assert hh.dropped == reasons and len(hh.triplets) == 1470
        for pairs in (first, implicit):
            check_rows(pairs, tokenizer, end_of_turn, header, 2048)
    message = error_of(SHARED / "prefs/orca_dpo_pairs_flat.jsonl.gz")
    assert "system, question, chosen, rejected" in message


# ---------------------------------------------------------------------- schemas

HH = "\n\nHuman: q\n\nAssistant: "
SCHEMAS = {
    "plain strings": row("q", "yes", "no"),
    "two chats": {"chosen": chat("q", "yes"), "rejected": chat("q", "no")},
    "chats and a string": row("other", chat("q", "yes"), chat("q", "no")),
    "chats and no prompt": row(None, chat("q", "yes"), chat("q", "no")),
    "prompt chat": row(chat("q"), answer("yes"), answer("no")),
    "prompt chat repeated": row(chat("q"), chat("q", "yes"), chat("q", "no")),
    "more keys": row("", [{**m, "id": 1} for m in chat("q", "yes")], chat("q", "no")),
    "hh-rlhf": {"chosen": HH + "yes", "rejected": HH + "no"},
    "hh-rlhf's prompt": row(HH.rstrip(), " yes", " no"),
    "hh-rlhf's prompt without line feeds": row(HH.strip(), " yes", " no"),
    "hh-rlhf's prompt repeated": row(HH, HH + "yes", HH + "no"),
    "hh-rlhf with carriage returns": row(HH.replace("\n", "\r\n"), "yes", "no"),
    "other names of roles": row(
        [{"role": "User", "content": "q"}], [{"role": "model", "content": "yes"}], answer("no")
    ),
    "parts of another interface": row(
        chat([{"type": "input_text", "text": "q"}]),
        answer([{"type": "output_text", "text": "yes"}]), answer("no"),
    ),
    "an empty prompt": row([], chat("q", "yes"), chat("q", "no")),
    "hh-rlhf's prompt and messages": row(HH, answer("yes"), answer("no")),
    "hh-rlhf's prompt repeated without line feeds": row(HH, HH.strip() + " yes", HH + "no"),
    "messages": {"messages": chat("q"), "chosen": answer("yes")[0], "rejected": answer("no")[0]},
    "from and value": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"},
    },
    "chats of from and value": {
        name: [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]
        for name, text in (("chosen", "yes"), ("rejected", "no"))
    },
    "prompt chat and strings": row(chat("q"), "yes", "no"),
    "prompt string and messages": row("q", answer("yes"), answer("no")),
    "messages repeat the chosen chat": {
        "messages": chat("q", "yes"), "chosen": chat("q", "yes"), "rejected": chat("q", "no"),
    },
    "parts": row(
        chat([{"type": "text", "text": "q"}]),
        answer([{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]), answer("no"),
    ),
    "metadata and empty columns": row("q", "yes", "no") | {
        "prompt_id": "1", "score_chosen": 2, "chosen-rating": 4, "source": "own", "tools": "[]",
        "images": [], "system": "", "history": [["", ""]], "extra": None,
        "messages": [{"role": None}],
    },
}  # fmt: skip
KIND = [{"role": "system", "content": "be kind"}]
EARLIER = {  # the same prompt, with turns in columns of their own
    "chat": row(KIND + chat("p", "o", "q"), "yes", "no"),
    "developer": row([KIND[0] | {"role": "developer"}, *chat("p", "o", "q")], "yes", "no"),
    "columns": row("q", "yes", "no") | {"system": "be kind", "history": [["p", "o"]]},
    "history of messages": row("q", "yes", "no") | {"system": "be kind", "history": chat("p", "o")},
    "columns beside chats": {"chosen": chat("q", "yes"), "rejected": chat("q", "no"),
                             "system": "be kind", "history": [["p", "o"]]},
    "history that the chats hold": {"chosen": KIND + chat("p", "o", "q", "yes"),
                                    "rejected": KIND + chat("p", "o", "q", "no"),
                                    "history": [["p", "o"]]},
    "hh-rlhf": row("be kind\n\nHuman: p\n\nAssistant: o" + HH, " yes", " no"),
    "hh-rlhf in two chats": {
        name: f"be kind\n\nHuman: p\n\nAssistant: o{HH}{text}"
        for name, text in (("chosen", "yes"), ("rejected", "no"))
    },
    "system twice": row(KIND + chat("p", "o", "q"), "yes", "no") | {"system": "be kind"},
}  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_gives_the_ids_of_the_rendered_chat(schema, tmp_path):
    pairs = load(tmp_path, [SCHEMAS[schema]])
    assert lists(pairs) == [[ids("<s>" + HEAD), ids("yes<|end|>"), ids("no<|end|>")]]
    assert not pairs.dropped and not pairs.notes
    assert pairs.unread == (("prompt",) if schema == "chats and a string" else ())


@pytest.mark.parametrize("columns", EARLIER)
def test_system_and_history_become_turns(columns, tmp_path):
    pairs = load(tmp_path, [EARLIER[columns]])
    text = f"<s><|system|>be kind<|end|>\n<|user|>p<|end|>\n<|assistant|>o<|end|>\n{HEAD}"
    assert lists(pairs) == [[ids(text), ids("yes<|end|>"), ids("no<|end|>")]]
    assert not pairs.unread


def test_what_is_not_read_is_named_in_a_line_that_can_be_printed(tmp_path):
    deep = {"a": []}
    for _ in range(400):
        deep = {"a": [deep]}
    unread = load(tmp_path, [good(1)[0] | {"\ud800": 1, "e" * 2000: 2, "deep": deep}])
    line = unread.summary()
    line.encode()
    assert "columns not read: \\ud800, eee" in line and line.endswith("eee ...")
    assert len(line) < 1200


def test_columns_and_keys_of_messages_that_are_not_read_are_named_once(tmp_path):
    rows = good(3)
    rows[1] |= {"extra": 1, "meta": {"a": 0}, "dataset": "own"}
    rows[2] = {"chosen": chat("q", "yes"), "rejected": chat("q", "no"), "extra": 2}
    rows[2]["chosen"][1]["reasoning_content"] = "so"
    pairs = load(tmp_path, rows)
    assert pairs.unread == ("extra", "meta", "chosen.reasoning_content")
    assert pairs.summary().endswith("; columns not read: extra, meta, chosen.reasoning_content")
    assert "not read" not in load(tmp_path, good(3)).summary()


CASES = SHARED.parent / "cases"
READ_CASES = [  # file, rows, and what the rendered first prompt must hold
    ("07/system.jsonl", "You are a gardener"), ("07/history.jsonl", "I am Ada"),
    ("08/pairs.jsonl", "Hello!<"),
    *((f"09/{name}.jsonl", "<|user|>Name a thing number 0.<|end|>\n<|assistant|>")
      for name in ("axolotl", "prompt_chat_strings", "sharegpt", "sharegpt_lists")),
    ("10/developer.jsonl", "<|system|>Answer"), ("10/parts.jsonl", "<|user|>Name a thing"),
    ("15/bom.json", "Name a"), ("15/bom.jsonl", "Name a"), ("17/one.jsonl", "Name a"),
]  # fmt: skip
REFUSED_CASES = [
    ("07/tools.jsonl", "has tools 4"), ("07/images.jsonl", "has images 4"),
    ("10/tool_turns.jsonl", "tool turns 4"), ("10/assistant_first.jsonl", "assistant first 4"),
    ("19/dict_of_lists.jsonl", "a dict of lists in place of a list of messages 4"),
    ("16/clone", "pick one among the available configs: ['preference', 'kto']"),
    ("16/clone", "(--dataset_config NAME picks one of those of --dataset)"),
    ("17/two_files", "because column names don't match"),
]  # fmt: skip


@needs_shared
@pytest.mark.parametrize("file, expected", READ_CASES)
def test_files_of_reported_cases_are_read(file, expected):
    pairs = load_pairs(str(CASES / file), "train", tiny(), 512)
    prompt, chosen, _ = lists(pairs)[0]
    text = "".join(tiny().convert_ids_to_tokens(prompt)).replace("Ġ", " ").replace("Ċ", "\n")
    assert len(pairs.triplets) == 4 and expected in text
    assert chosen == ids("A red kite, number 0.<|end|>")


@needs_shared
@pytest.mark.parametrize("file, expected", REFUSED_CASES)
def test_files_of_reported_cases_are_refused_with_their_reason(
    file, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert expected in error_of(CASES / file)


@pytest.mark.parametrize("prompt", [
    "Explain.\n\nHuman: hi\n\nAssistant: ho", "What follows?\n\nHuman: hi", "q\n\nAssistant: x\n\nb"
])  # fmt: skip
def test_a_text_that_merely_holds_the_words_of_hh_rlhf_stays_one_turn_and_is_counted(
    prompt, tmp_path
):
    pairs = load(tmp_path, [row(prompt, "yes", "no\n\nHuman: more"), row("q", "yes", "no")])
    assert lists(pairs)[0][0] == ids(f"<s><|user|>{prompt}<|end|>\n<|assistant|>")
    assert pairs.notes == {"marks of a chat template in a text": 1}


@pytest.mark.parametrize("text", [
    "<|im_start|>user\nq<|im_end|>", "[INST] q [/INST]", "<start_of_turn>user\nq", "USER: q",
    "### Human: q", "a\n### Response:\nb",
])  # fmt: skip
def test_marks_of_another_chat_template_are_counted(text, tmp_path):
    pairs = load(tmp_path, [row(text, "yes", "no"), row("a USER: q [x]", "yes", "no")])
    assert pairs.notes == {"marks of a chat template in a text": 1}


def test_unknown_characters_and_texts_called_metadata_are_counted_and_named(tmp_path, monkeypatch):
    tokenizer = tiny.__wrapped__(CHAT)
    unknown = tokenizer.convert_tokens_to_ids("d")  # as if no token were known for it
    monkeypatch.setattr(type(tokenizer), "unk_token_id", unknown, raising=False)
    rows = [row("q", "yes", "nod") | {"source": "The cat sat on the mat."}, row("q", "yes", "no")]
    pairs = load(tmp_path, rows, tokenizer)
    assert pairs.notes == {"unknown characters": 1} and pairs.unread == ("source",)
    rows[0]["source"] = "ultrachat 200k"
    assert load(tmp_path, rows).unread == ()


def test_answers_that_repeat_the_prompt_and_empty_prompts_are_counted(tmp_path):
    rows = [row("q", "q yes", " q no"), row("q", "q yes", "no"), row(" ", "a", "b")]
    assert load(tmp_path, rows).notes == {"answers repeat the prompt": 1, "empty prompt": 1}


def test_all_common_turns_are_the_prompt(tmp_path):
    hh = HH + "a\n\nHuman: r\n\nAssistant: "
    rows = [
        {"chosen": chat("q", "a", "r", "b"), "rejected": chat("q", "a", "r", "c")},
        row(chat("q", "a", "r"), answer("b"), answer("c")),
        {"chosen": hh + "b", "rejected": hh + "c"},
    ]
    prompt = ids(f"<s>{HEAD}a<|end|>\n<|user|>r<|end|>\n<|assistant|>")
    keeps_spaces = tiny(CHAT.replace(" | trim", ""))  # so that hh-rlhf's must already be gone
    pairs = load(tmp_path, rows, keeps_spaces)
    assert lists(pairs) == [[prompt, ids("b<|end|>"), ids("c<|end|>")]] * 3


def test_nothing_is_folded_in_front_of_a_user_turn_by_an_empty_system_turn(tmp_path):
    rows = [row([{"role": "system", "content": " "}, *chat("q")], answer("a"), answer("b"))]
    template = NO_SYSTEM.replace(" | trim", "")
    assert lists(load(tmp_path, rows, tiny(template)))[0][0] == ids("<s>" + HEAD)


def test_a_refused_system_turn_opens_the_first_user_turn(tmp_path):
    system = [{"role": "system", "content": "be kind"}]
    rows = [row(system + chat("q", "a", "r"), answer("b"), answer("c")), *good(2)]
    folded, kept = load(tmp_path, rows, tiny(NO_SYSTEM)), load(tmp_path, rows)
    rest = "q<|end|>\n<|assistant|>a<|end|>\n<|user|>r<|end|>\n<|assistant|>"
    assert lists(folded)[0][0] == ids("<s><|user|>be kind\n\n" + rest)
    assert lists(kept)[0][0] == ids("<s><|system|>be kind<|end|>\n<|user|>" + rest)
    assert folded.notes == {"system turn folded": 1} and not kept.notes


def test_scores_that_tie_or_disagree_are_counted_and_the_rows_kept(tmp_path):
    rows = good(6)
    for r, scores in zip(rows, [(5, 5), (5.0, 5), (2, 3), (1, 4), (3, 2), (7, None)], strict=True):
        r["score_chosen"], r["score_rejected"] = scores
    pairs = load(tmp_path, rows)
    assert len(pairs.triplets) == 6 and pairs.notes == {"score tie": 2, "score inversion": 2}


# ---------------------------------------------------------------------- faults and lengths

FAULTS = [
    ("empty answer", row("q", " \n", "b")),
    ("empty answer", row("q", "a", "")),
    ("identical pair", row("q", "a", "a")),
    ("identical pair", row("q", "a", " a\n")),  # once the template has stripped them
    ("different prompts", {"chosen": chat("q", "a"), "rejected": chat("r", "b")}),
    ("different prompts", {"chosen": chat("q", "a"), "rejected": chat("q", "a", "r", "b")}),
    ("different prompts", row(chat("other"), chat("q", "a"), chat("q", "b"))),
    ("turns do not alternate", row([*chat("q"), *chat("r")], answer("a"), answer("b"))),
    ("assistant first", row(answer("q"), answer("a"), answer("b"))),
    ("assistant first", row([*answer("q"), *chat("r")], answer("a"), answer("b"))),
    ("tool turns", row([*chat("q"), {"role": "tool", "content": "r"}], "a", "b")),
    ("tool turns", row(chat("q"), [{**answer("")[0], "tool_calls": [{"id": "1"}]}], "b")),
    ("has tools", row("q", "a", "b") | {"tools": '[{"name": "f"}]'}),
    ("has images", row("q", "a", "b") | {"images": ["a.png"]}),
    ("has image", row(chat([{"type": "image", "text": None}]), "a", "b")),
    ("has document", row(chat([{"type": "document", "text": None}]), "a", "b")),
    ("has images", row([{**chat("q")[0], "images": ["a.png"]}], "a", "b")),
    ("has audio", row("q", "a", "b") | {"audio": {"path": "a.wav"}}),
    ("two system turns", row(KIND + chat("q"), "a", "b") | {"system": "other"}),
    ("system is not text", row("q", "a", "b") | {"system": ["s"]}),
    ("history is no list of [user, assistant]", row("q", "a", "b") | {"history": "earlier"}),
    ("history is no list of [user, assistant]", row("q", "a", "b") | {"history": [["p"]]}),
    ("a chat written as text", row("q", json.dumps(chat("q", "a")), json.dumps(chat("q", "b")))),
    ("a chat written as text", row(str(chat("q")), "a", "b")),
    ("turns do not alternate", {"chosen": answer("a"), "rejected": answer("b")}),
    ("answer is not the assistant's", row(chat("q"), chat("a"), answer("b"))),
    ("answer is not the assistant's", row(chat("q"), answer("a"), chat("b"))),
    ("literal special token", row("what is <|end|>?", "a", "b")),
    ("literal special token", row("q", "a</s>", "b")),
    ("literal special token", row("q", "a", "<s>b")),
    ("no chat", row("q", None, "b")),
    ("no prompt", row(None, "a", "b")),
    ("no chat", row("q", "a", answer("b"))),
    ("no chat", row(chat("q"), answer("a"), [])),
    ("content is not text", row(chat("q"), answer(None), answer("b"))),
    ("content is not text", row(chat([{"type": "text"}]), answer("a"), answer("b"))),
    ("content is not text", row(chat(["q"]), answer("a"), answer("b"))),
    ("content is not text", row(chat([]), answer("a"), answer("b"))),
    ("a dict of lists in place of a list of messages", row("q", {"role": ["user"]}, {})),
    ("no chat", row([{"role": None, "content": "q"}], answer("a"), answer("b"))),
    ("no chat", row(["q"], answer("a"), answer("b"))),
    ("turns do not alternate", row("\n\nHuman: p" + HH, "a", "b")),
    ("prompt ends with the assistant", row(HH + "Well,", "a", "b")),
    ("prompt ends with the assistant", row(chat("q", "Well,"), "a", "b")),
    ("half a character", row("q", "a \ud800", "b")),  # which JSON can hold
    ("half a character", row("q \udfff", "a", "b")),
    ("half a character", row("q", "a", "b") | {"system": "\ud800"}),
    ("half a character", row("q", "a", "b") | {"history": [["p", "\ud800"]]}),
    ("not an object", ["q", "a", "b"]),
]


@pytest.mark.parametrize("reason, fault", FAULTS)
def test_a_faulty_row_is_dropped_under_its_own_reason(reason, fault, tmp_path):
    first, *rest = good(100)
    pairs = load(tmp_path, [first, fault, *rest])
    assert pairs.dropped == {reason: 1} and pairs.n_rows == 101
    assert [t.row for t in pairs.triplets] == [0, *range(2, 101)]  # as numbered in the source


def test_more_than_one_percent_of_malformed_rows_stops_the_load_with_counts(tmp_path):
    assert len(load(tmp_path, [*good(99), row("q", "a", "a")]).triplets) == 99
    rows = [*good(150), row("q", "a", "a"), row("q", "", "a")]
    message = error_of(write_lines(tmp_path / "bad.jsonl", rows))
    first = "the first of each, from 0: identical pair in row 150, empty answer in row 151"
    for part in ("2 of 152 rows", "1%", "identical pair 1", "empty answer 1", first, "accepted"):
        assert part in message


def test_rows_that_cannot_be_used_are_outside_the_limit_but_at_most_half(tmp_path):
    rows = [*good(2), *(r | {"tools": ["f"]} for r in good(1)), row(KIND + answer("q"), "a", "b")]
    pairs = load(tmp_path, rows)
    assert pairs.dropped == {"has tools": 1, "assistant first": 1} and len(pairs.triplets) == 2
    rows.append(rows[2])
    message = error_of(write_lines(tmp_path / "tools.jsonl", rows))
    assert (
        "fewer than half of the 5 rows" in message and "has tools 2, assistant first 1" in message
    )


def test_rows_dropped_for_their_length_are_not_malformed(tmp_path):
    rows = [row("q" * 20, "a", "b"), row("q", "a" * 9 + "b", "a" * 9 + "c"), row("q", "a", "b")]
    pairs = load(tmp_path, rows, max_length=12)
    assert pairs.dropped == {"prompt leaves no room": 1, "identical after truncation": 1}
    assert [t.row for t in pairs.triplets] == [2]


@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_truncation_cuts_the_end_of_the_answers_and_keeps_the_prompt(room, tmp_path):
    prompt, chosen, rejected = ids("<s>" + HEAD), ids("abc<|end|>"), ids("x<|end|>")
    pairs = load(tmp_path, [row("q", "abc", "x")], max_length=len(prompt) + room)
    assert lists(pairs) == [[prompt, chosen[:room], rejected[:room]]]
    assert pairs.notes == ({"truncated": 1} if room < len(chosen) else {})
    assert not load(tmp_path, [row("q", "abc", "x")], max_length=len(prompt)).triplets


# ---------------------------------------------------------------------- thinking

THINKING = [  # an answer, what is thinking in it, and the rest
    ("<think>\nso\n</think>\n\nyes", "<think>\nso\n</think>\n\n", "yes"),
    ("so\n</think>\n\nyes", "so\n</think>\n\n", "yes"),
    (" <Reasoning>so</reasoning>yes", " <Reasoning>so</reasoning>", "yes"),
    ("[THINK]so[/THINK] yes", "[THINK]so[/THINK] ", "yes"),
    ("<thought>so, cut", "<thought>so, cut", ""),
    ("so</think>", "so</think>", ""),
    ("<think></think>a</think>\nb", "<think></think>", "a</think>\nb"),
    ("yes", "", "yes"),
    ("yes <think>so</think>", "", "yes <think>so</think>"),
    ("close it with </think> there", "", "close it with </think> there"),
]


@pytest.mark.parametrize("text, thinking, rest", THINKING)
def test_an_answer_is_split_into_thinking_and_the_rest(text, thinking, rest):
    assert split_thinking(text) == (thinking, rest)


def test_thinking_is_kept_and_counted_or_stripped_and_counted(tmp_path):
    think = "<think>so</think>\n"
    rows = [*good(4), row(chat("q", think + "a", "r"), think + "yes", think + "no")]
    rows.append(row("q", think + "yes", "no"))
    kept, stripped = (load(tmp_path, rows, strip_thinking=strip) for strip in (False, True))
    assert kept.notes == {"thinking in answers": 3, "thinking in earlier turns": 1}
    assert stripped.notes == {"thinking left out of answers": 3} | {
        "thinking left out of earlier turns": 1
    }
    assert not kept.dropped and not stripped.dropped
    assert lists(kept)[5][1] == ids(think + "yes<|end|>")
    assert lists(stripped)[5] == [ids("<s>" + HEAD), ids("yes<|end|>"), ids("no<|end|>")]
    prompt = ids(f"<s>{HEAD}a<|end|>\n<|user|>r<|end|>\n<|assistant|>")
    assert lists(stripped)[4] == [prompt, ids("yes<|end|>"), ids("no<|end|>")]


def test_pairs_that_only_thinking_tells_apart_or_fills_are_dropped_when_it_is_stripped(tmp_path):
    rows = [*good(2), row("q", "<think>a</think>yes", "yes"), row("q", "<think>a</think>", "no")]
    reasons = {"identical without thinking": 1, "an answer of thinking alone": 1}
    assert load(tmp_path, rows, strip_thinking=True).dropped == reasons
    assert not load(tmp_path, rows).dropped


def test_tags_of_thinking_may_be_special_tokens_in_what_the_assistant_says(tmp_path):
    tokenizer = tiny(special=(*SPECIAL, "<think>", "</think>"))
    think = "<think>so</think>"
    rows = [*good(100), row(chat("q", think, "r"), think + "yes", "no"), row("<think>", "a", "b")]
    pairs = load(tmp_path, rows, tokenizer)
    assert pairs.dropped == {"literal special token": 1}
    assert lists(pairs)[100][1] == ids(think + "yes<|end|>", tokenizer)


@needs_shared
def test_thinking_of_the_reported_case_is_counted_in_either_way():
    for strip, words in ((False, "in"), (True, "left out of")):
        source = str(CASES / "12/pairs.jsonl")
        pairs = load_pairs(source, "train", tiny(), 512, strip_thinking=strip)
        assert pairs.notes == {f"thinking {words} answers": 2} and len(pairs.triplets) == 2


@pytest.mark.parametrize("part", ["thinking", "an earlier turn"])
def test_text_that_the_template_leaves_out_is_counted(part, tmp_path):
    template = CHAT.replace("m.content |", "m.content.split('</think>')[-1] |")
    if part == "an earlier turn":
        template = CHAT.replace("in messages %}", "in messages if m.content != 'p' %}")
    rows = [row(chat("p", "o", "q"), "yes", "so</think>\nno"), row("q", "yes", "no")]
    pairs = load(tmp_path, rows, tiny(template))
    assert pairs.notes == {"text left out by the chat template": 1, "thinking in answers": 1}


# ---------------------------------------------------------------------- templates


INST = (  # knows no header: a space stands before each answer, as in Mistral's
    "<s>{% for m in messages %}{% if m.role == 'user' %}[q]{{ m.content }}[/q]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = [
    (CHAT, "<s>", "<s>" + HEAD, "<|end|>"),
    (TURNS, "<s>", "<s>" + HEAD, "<|end|>"),
    (TURNS, None, HEAD, "<|end|>"),
    (PLAIN, None, "q", "</s>"),
    (PLAIN, "<s>", "<s>q", "</s>"),
]


@pytest.mark.parametrize("merges", [False, True])
def test_what_stands_before_every_answer_is_its_header_unless_it_merges(merges, tmp_path):
    tokenizer = tiny(INST, "<s>", (("Ġ", "a"), ("Ġ", "b")) if merges else ())
    pairs = load(tmp_path, [row("q", "a", "b")], tokenizer)
    texts = ["<s>[q]q[/q]", " a</s>", " b</s>"] if merges else ["<s>[q]q[/q] ", "a</s>", "b</s>"]
    assert lists(pairs) == [[ids(text, tokenizer) for text in texts]]


@pytest.mark.parametrize("template, bos, prompt, end", TEMPLATES)
def test_one_bos_if_any_and_an_end_of_turn_or_the_eos(template, bos, prompt, end, tmp_path):
    pairs = load(tmp_path, [row("q", "a", "b")], tiny(template, bos))
    assert lists(pairs) == [[ids(prompt), ids("a" + end), ids("b" + end)]]


def test_a_prompt_that_merges_with_an_answer_is_cut_where_all_agree_and_counted(tmp_path):
    tokenizer = tiny(MERGING, None, ((":", "y"),))
    pairs = load(tmp_path, [row("q", "yes", "no")], tokenizer)
    texts = ["user:q\nassistant", ":yes\n</s>", ":no\n</s>"]
    assert lists(pairs) == [[ids(text, tokenizer) for text in texts]]
    assert pairs.notes == {"prompt is no token prefix": 1}


def test_a_tokenizer_without_chat_template_is_told_how_to_pass_one(tmp_path):
    with pytest.raises(InputError, match="^the tokenizer has no chat template.*--chat_template.*$"):
        load(tmp_path, good(1), tiny(None))


def test_a_template_that_cannot_be_rendered_is_refused(tmp_path):
    with pytest.raises(InputError, match="^the chat template cannot be used: .*$"):
        load(tmp_path, good(1), tiny("{% for m in messages %}"))


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {  # a template, and what is said of it
    "{{ ''.__class__.__mro__ }}": "cannot be used: access to .*'__class__' of 'str' .* unsafe",
    "{{ cycler.__init__.__globals__ }}": "cannot be used: access to attribute '__init__' of 'type'",
    "{{ 'a' * 1001 }}": r"cannot be used: it writes a text of 1,0\d\d characters",
    LOOP: "takes over 0.2 seconds for one conversation",
    "{% if messages[0].content | length > 1 %}" + LOOP + "{% endif %}": "takes over 0.2 seconds",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_one_line(template, tmp_path, monkeypatch):
    """Also one that loops for some rows only."""
    if LOOP in template:  # a busy machine may need as long for any other one
        monkeypatch.setattr(data, "TEMPLATE_SECONDS", 0.2)
    monkeypatch.setattr(data, "LONGEST_TEXT", 500)
    before, begin = signal.getsignal(signal.SIGVTALRM), time.monotonic()
    with pytest.raises(InputError, match=f"^the chat template {HOSTILE[template]}"):
        load(tmp_path, good(2), tiny(template + CHAT))
    assert time.monotonic() - begin < 5 and signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)  # no alarm is left


def test_the_time_in_which_a_process_is_stopped_is_not_the_template_s():
    with data.at_most(0.05):
        time.sleep(0.1)  # as for a stopped process, this is no time of the processor
    with pytest.raises(InputError, match="takes over 0.05 seconds"), data.at_most(0.05):
        while True:
            pass


def test_a_file_of_json_is_no_template(tmp_path):
    (tmp_path / "t.json").write_text('{"chat_template": "{{ messages }}"}')
    with pytest.raises(InputError, match="t.json: it is JSON.* pass a file"):
        find_template(str(tmp_path / "t.json"), tiny())


def test_a_row_that_the_template_refuses_or_does_not_show_is_dropped(tmp_path):
    """A template of single turns, and one that leaves an answer out."""
    single = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHAT
    rows = [*good(100), {"chosen": chat("q", "a", "r", "b"), "rejected": chat("q", "a", "r", "c")}]
    assert load(tmp_path, rows, tiny(single)).dropped == {"refused by the chat template": 1}
    silent = CHAT.replace("in messages %}", "in messages if m.content != 'skip' %}")
    pairs = load(tmp_path, [*good(100), row("q", "skip", "b")], tiny(silent))
    assert pairs.dropped == {"empty answer": 1}


def opens_thinking(opening):
    return CHAT.replace("<|assistant|>{% endif %}", f"<|assistant|>{opening}{{% endif %}}")


@pytest.mark.parametrize("opening", ["<think>", "<|system|>"])
def test_a_generation_prompt_that_full_conversations_leave_out_is_refused(opening, tmp_path):
    """As where it opens a passage of thinking. To write answers with such a template is fine."""
    tokenizer = tiny(opens_thinking(opening))
    with pytest.raises(InputError, match="its generation prompt ends with '<.*'"):
        load(tmp_path, good(1), tokenizer)
    encoder = ChatEncoder(tokenizer)
    assert encoder.prompt_ids(chat("q")) == ids("<s>" + HEAD + opening)
    assert encoder.end_of_turn == ids("<|end|>")[0]


@pytest.mark.parametrize("tail", ["<|assistant|>", "</s>"])
def test_the_end_of_turn_is_the_first_token_behind_the_answer(tail, tmp_path):
    template = CHAT.split("{% if add_gen")[0]
    header = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    if tail == "<|assistant|>":  # a template that always appends it
        template, header = template + tail, ""
    else:  # one that ends the conversation too, as Phi-3's
        header = header.replace("{% endif %}", f"{{% else %}}{tail}{{% endif %}}")
    tokenizer = tiny(template + header)
    pairs = load(tmp_path, [row("q", "a", "b")], tokenizer)
    assert lists(pairs) == [[ids("<s>" + HEAD), ids("a<|end|>"), ids("b<|end|>")]]
    whole = ChatEncoder(tokenizer).whole(chat("q"), "a")
    assert whole == ids("<s>" + HEAD + "a<|end|>\n" + tail)


def test_an_end_of_turn_need_not_be_a_special_token(tmp_path):
    tokenizer = tiny.__wrapped__(CHAT.replace("<|end|>", "<over>"))
    tokenizer.add_tokens(["<over>"])
    pairs = load(tmp_path, [row("q", "a", "b")], tokenizer)
    assert [t[-1] for t in lists(pairs)[0][1:]] == ids("<over><over>", tokenizer)
    assert len(pairs.triplets[0].chosen) == 2


def test_a_template_without_generation_prompt_shows_its_header_in_full_conversations(tmp_path):
    silent = tiny(CHAT.split("{% if add_gen")[0])
    rows = [row(KIND + chat("q", "a", "r"), "yes", "no"), *good(2)]
    assert lists(load(tmp_path, rows, silent)) == lists(load(tmp_path, rows))


MOVES = (  # the system turn stands in the last message of all, if that is the user's, as Nemo's
    "<s>{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_ANSWER_NO_SYSTEM = "{% set m = messages %}" + CHAT.replace(
    "in messages", "in (messages if messages[-1].role == 'user' else messages[-2:])"
)


@pytest.mark.parametrize("template", [MOVES, NO_ANSWER_NO_SYSTEM])
def test_a_system_turn_that_full_conversations_move_or_leave_out_is_folded(template, tmp_path):
    pairs = load(tmp_path, [row(KIND + chat("q"), "yes", "no"), *good(2)], tiny(template))
    prompt = ids("<s><|user|>be kind\n\n" + HEAD.removeprefix("<|user|>"))
    assert lists(pairs)[0] == [prompt, ids("yes<|end|>"), ids("no<|end|>")]
    assert pairs.notes == {"system turn folded": 1}


def test_a_row_whose_prompt_the_template_changes_is_dropped(tmp_path):
    changes = "{% if messages[-1].content == 'odd' %}<|system|>{% endif %}" + CHAT
    rows = [*good(100), row("q", "odd", "b")]
    assert load(tmp_path, rows, tiny(changes)).dropped == {"the template changes the prompt": 1}
    endless = CHAT.replace("<|end|>", "{% if m.content != 'odd' %}<|end|>{% endif %}")
    assert load(tmp_path, rows, tiny(endless)).dropped == {"the template ends no turn": 1}


@pytest.mark.parametrize("template", ["<s>" + CHAT, CHAT.replace("<|{{", "<s><|{{"), TURNS])
def test_a_whole_row_has_one_bos_whatever_the_template_writes(template, tmp_path):
    rows = [row(chat("q", "a", "r"), "yes", "no")]
    assert lists(load(tmp_path, rows, tiny(template))) == lists(load(tmp_path, rows))


def test_a_bos_that_opens_every_turn_stays(tmp_path):
    """As in SmolLM2's template."""
    template = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    pairs = load(tmp_path, good(1), tiny(template))
    assert lists(pairs)[0][0] == ids("<s>user\nquestion 0</s>\n<s>assistant\n")


def test_several_templates_without_a_default_are_one_line_that_names_them(tmp_path):
    tokenizer = tiny.__wrapped__(CHAT)
    tokenizer.chat_template = {"rag": CHAT, "tool_use": CHAT}
    with pytest.raises(InputError, match="several chat templates .rag, tool_use.*--chat_template"):
        load(tmp_path, good(1), tokenizer)
    tokenizer.chat_template["default"] = CHAT
    assert lists(load(tmp_path, good(1), tokenizer)) == lists(load(tmp_path, good(1)))


def test_a_template_is_chosen_by_name_or_read_from_a_file(tmp_path):
    several, file = tiny.__wrapped__(None), tmp_path / "chat.jinja"
    several.chat_template = {"rag": TURNS, "tool_use": CHAT}
    file.write_text(PLAIN, "utf-8-sig")
    assert find_template("rag", several) == TURNS
    assert find_template(str(file), several) == find_template(str(file), tiny()) == PLAIN
    with pytest.raises(
        InputError, match="chat: there is no such file, and none of .* templates: rag, tool_use$"
    ):
        find_template("chat", several)
    file.write_text("\n")
    with pytest.raises(InputError, match="^--chat_template .*chat.jinja: the file is empty"):
        find_template(str(file), tiny())


DATED = "{% set day = strftime_now('%d %b %Y, %-d.%m., %A') %}<|system|>{{ day }}<|end|>\n" + TURNS


def test_the_day_that_a_template_writes_is_todays_unless_another_is_given(tmp_path, monkeypatch):
    """A run that goes on tomorrow gives the day of its beginning."""
    first = load(tmp_path, good(2), tiny(DATED), day="2024-01-05")
    header = "<s><|system|>05 Jan 2024, 5.01., Friday<|end|>\n<|user|>"
    assert lists(first)[0][0][: len(ids(header))] == ids(header)
    assert first.day == "2024-01-05" and first.summary().endswith("writes the day: 2024-01-05")
    monkeypatch.setattr("data.date", SimpleNamespace(
        today=lambda: date(2024, 1, 6), fromisoformat=date.fromisoformat
    ))  # fmt: skip
    today, again = (load(tmp_path, good(2), tiny(DATED), day=day) for day in (None, first.day))
    assert today.day == "2024-01-06" and today.fingerprint != first.fingerprint
    assert again.fingerprint == first.fingerprint
    assert load(tmp_path, good(2), day="2024-01-05").day is None


def test_what_a_library_in_rust_raises_is_one_line_too():
    """It is no Exception."""
    with pytest.raises(InputError, match="^a file: panicked$"), input_error_for("a file"):
        raise BaseException("panicked")
    with pytest.raises(KeyboardInterrupt), input_error_for("a file"):
        raise KeyboardInterrupt


def test_ranks_on_two_sides_of_midnight_read_one_day(monkeypatch):
    """Every rank takes the day from rank 0."""
    calls = []
    monkeypatch.setattr(report, "from_rank_0", lambda f, _: calls.append(f()) or "2024-01-05")
    assert report.template_day(SimpleNamespace(resume=False)) == "2024-01-05"
    assert calls == [str(date.today())]


def test_a_run_that_goes_on_or_is_repeated_tomorrow_reads_the_day_of_its_beginning(
    tiny_world, tmp_path, monkeypatch, capsys
):
    (tmp_path / "dated.jinja").write_text(DATED)
    more = f"--chat_template={tmp_path / 'dated.jinja'}", "--lambda_adv=0", "--max_length=128"
    run(tiny_world, tmp_path / "r", *more, "--stop_after=1")
    began = json_of(tmp_path / "r" / "config.json")["template_day"]
    assert began == str(date.today()) and f"writes the day: {began}" in capsys.readouterr().out
    monkeypatch.setattr("report.date", SimpleNamespace(today=lambda: date(2099, 1, 1)))
    rows, _ = run(tiny_world, tmp_path / "r", *more, "--resume")
    assert len(rows) == 3 and f"writes the day: {began}" in capsys.readouterr().out
    assert json_of(tmp_path / "r" / "config.json")["template_day"] == began
    run(tiny_world, tmp_path / "s", f"--config={tmp_path / 'r/config.json'}")
    assert json_of(tmp_path / "s" / "config.json")["template_day"] == began
    for day in ("yesterday", 5):
        with pytest.raises(
            InputError, match=f"^the day {day!r}, which a config.json or .* no date$"
        ):
            ChatEncoder(tiny(DATED), day)


FAILING = {  # what a template does, and what is said of it
    "{{ '\\ud800' }}": "it writes half a character",
    "{{ 1 + 'a' }}": "unsupported operand",
    "{{ missing.word }}": "'missing' is undefined",
    "{{ [].pop() }}": "pop",
}


@pytest.mark.parametrize("fault", FAILING)
def test_whatever_a_template_raises_is_one_line(fault, tmp_path):
    with pytest.raises(InputError, match="^the chat template cannot be used: ") as caught:
        load(tmp_path, good(1), tiny(fault + CHAT))
    assert FAILING[fault] in str(caught.value)


def test_a_token_of_the_template_that_is_not_special_must_not_be_spelled_out_either(tmp_path):
    tokenizer = tiny.__wrapped__(CHAT.replace("<|end|>", "<over>"))
    tokenizer.add_tokens(["<over>"])
    rows = [*good(100), row("q", "a<over>", "b")]
    assert load(tmp_path, rows, tokenizer).dropped == {"literal special token": 1}


@needs_shared
@pytest.mark.parametrize("case", ["35", "36", "45"])
def test_templates_of_reported_cases_are_right_or_refused(case):
    special = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    tokenizer = tiny((CASES / case / "chat_template.jinja").read_text(), None, (), special)
    if case == "45":
        with pytest.raises(InputError, match="generation prompt ends with '< t h i n k >"):
            load_pairs(str(CASES / "45/pairs.jsonl"), "train", tokenizer, 512)
        return
    pairs = load_pairs(str(CASES / "15/bom.json"), "train", tokenizer, 512)
    turns = "<|im_start|>user\nName a thing number 0.<|im_end|>\n<|im_start|>assistant\n"
    texts = turns, "A red kite, number 0.<|im_end|>", "I do not know 0.<|im_end|>"
    assert lists(pairs)[0] == [ids(text, tokenizer) for text in texts]


def test_a_template_that_shows_no_answer_is_refused(tmp_path):
    deaf = CHAT.replace("in messages", "in messages if m.role == 'user'")
    with pytest.raises(InputError, match="cannot be used: it shows no answer"):
        load(tmp_path, good(1), tiny(deaf))


def test_a_system_turn_that_the_template_leaves_out_is_folded(tmp_path):
    silent = "{% for m in messages if m.role != 'system' %}" + CHAT.split("%}", 1)[1]
    pairs = load(tmp_path, [row([{"role": "system", "content": "s"}, *chat("q")],
                                answer("a"), answer("b"))], tiny("<s>" + silent))  # fmt: skip
    assert pairs.notes["system turn folded"] == 1


def test_a_template_that_ends_no_turn_needs_an_eos(tmp_path):
    tokenizer = tiny.__wrapped__(PLAIN)  # not the cached one, which others use
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no special token that ends a turn, .* no EOS"):
        load(tmp_path, good(1), tokenizer)


# ---------------------------------------------------------------------- sources

ROWS = [row("one\u2028line", "é", "ü"), *good(3)]  # U+2028 ends no line of JSON
JSONL = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS).encode() + b"\n\n"


def parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file.getvalue()


FILES = {
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.jsonl": JSONL,
    "mark.jsonl": b"\xef\xbb\xbf" + JSONL,  # a byte-order mark
    "mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "rows.jsonl.gz": gzip.compress(JSONL),
    "rows.parquet": parquet(),
}


@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_file_gives_the_same_triplets_and_has_one_split(file, tmp_path):
    (tmp_path / file).write_bytes(FILES[file])
    pairs, expected = load_pairs(str(tmp_path / file), "train", tiny(), 512), load(tmp_path, ROWS)
    assert lists(pairs) == lists(expected) and pairs.fingerprint == expected.fingerprint
    assert "no split 'test'; a single file has one, 'train'" in error_of(tmp_path / file, "test")


@pytest.mark.parametrize("kind", ["one data set", "its splits", "a file per split"])
def test_a_folder_gives_the_same_triplets_and_names_its_splits(kind, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict  # two seconds that forked children would pay for

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / kind
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}
    if kind == "one data set":
        del splits["test"]
        splits["train"].save_to_disk(source)
    elif kind == "its splits":
        DatasetDict(splits).save_to_disk(source)
    else:
        for split, rows in splits.items():
            rows.to_json(source / f"{split}.jsonl")
    for split in splits:
        pairs = load_pairs(str(source), split, tiny(), 512)
        expected = load(tmp_path, list(splits[split]))
        assert lists(pairs) == lists(expected) and pairs.fingerprint == expected.fingerprint
    assert f"no split 'dev'; it has {', '.join(splits)}" in error_of(source, "dev")


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk", "named in README.md"])
def test_other_files_of_a_data_set_s_folder_are_not_read(kind, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (folder := tmp_path / "folder").mkdir()
    if kind == "parquet":
        Dataset.from_list(good(3)).to_parquet(folder / "train.parquet")
    elif kind == "save_to_disk":
        Dataset.from_list(good(3)).save_to_disk(folder)
    else:
        write_lines(folder / "pairs.jsonl", good(3))
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files: pairs.jsonl\n---\n"
        )
    (folder / "notes.jsonl").write_text("no JSON")
    assert len(load_pairs(str(folder), "train", tiny(), 512).triplets) == 3


def configs_folder(folder):
    """A data set with two configs, one of which holds pairs."""
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    write_lines(folder / "a" / "train.jsonl", good(3))
    write_lines(folder / "a" / "test.jsonl", [row("q", "<think>so</think>yes", "no")])
    write_lines(folder / "b" / "train.jsonl", [{"text": "t"}])
    configs = (f"- config_name: {name}\n  data_dir: {name}\n" for name in "ab")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return str(folder)


def test_one_of_several_configs_is_read_and_the_refusal_lists_them(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = configs_folder(tmp_path / "two")
    pairs = load_pairs(source, "train", tiny(), 512, config="a")
    assert lists(pairs) == lists(load(tmp_path, good(3)))
    assert "available configs: ['a', 'b']" in (message := error_of(source))
    assert message.endswith("(--dataset_config NAME picks one of those of --dataset)")
    assert "'c' not found. Available: ['a', 'b']" in error_of(source, config="c")
    assert "no preference data in text" in error_of(source, config="b")


@pytest.mark.parametrize("program", [settings, reward_model])
def test_both_programs_hand_their_flags_to_the_pairs_and_the_held_out_ones(
    program, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    argv = [f"--dataset={configs_folder(tmp_path / 'two')}", "--dataset_config=a", "--batch_size=3"]
    args = program.parse_args([*argv, "--eval_split=test", "--strip_thinking"])
    args.template_day = "2024-01-05"
    data, held_out = load_data(args, tiny(DATED), 512, print, True)
    assert len(data.triplets) == 3 and held_out.notes == {"thinking left out of answers": 1}
    assert data.day == held_out.day == args.template_day == "2024-01-05"
    args.template_day, args.batch_size = None, 4
    with pytest.raises(InputError, match="fewer pairs than --batch_size 4: 3 of 3 rows"):
        load_data(args, tiny(), 512, print, False)


def test_a_held_out_split_is_one_of_the_data_set_and_what_lies_here_is_told(tmp_path, monkeypatch):
    """A stray file or folder of its name is no reason to leave the split out."""
    configs_folder(tmp_path / "two")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset=two", "--dataset_config=a", "--batch_size=3"]
    args = settings.parse_args([*argv, "--eval_split=test"])
    (tmp_path / "test").write_text("nothing")
    assert load_data(args, tiny(), 512, print, True)[1].n_rows > 0
    args.eval_split = "held"
    advice = "; what lies here is --eval_split ./held"
    with pytest.raises(InputError) as caught:
        load_data(args, tiny(), 512, print, True)
    assert "no split 'held'" in str(caught.value) and advice not in str(caught.value)
    (tmp_path / "held").mkdir()
    with pytest.raises(InputError, match=f"no split 'held'.*{advice}$"):
        load_data(args, tiny(), 512, print, True)


def test_a_config_of_what_has_none_is_refused(tmp_path):
    from datasets import Dataset

    file = write_lines(tmp_path / "rows.jsonl", good(1))
    assert "--dataset_config a" in (message := error_of(file, config="a")), message
    Dataset.from_list(good(1)).save_to_disk(tmp_path / "saved")
    assert "has no configs (--dataset_config)" in error_of(tmp_path / "saved", config="a")


DEEP = b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b', "chosen": "a", "rejected": "b"}'
UNUSABLE = {  # the file's bytes, and what the message must say beside its name
    "missing.jsonl": (None, "no such file"),
    "cut.jsonl": (b'{"a": 1}\n\n{"a": ', "line 3: not rows of JSON"),
    "cut.json": (b'[{"a": 1}', "line 1 column 10"),
    "latin1.jsonl": (b'{"a": "\xe9"}', "utf-8"),
    "cut.jsonl.gz": (FILES["rows.jsonl.gz"][:-9], "cannot be read"),
    "not.jsonl.gz": (JSONL, "cannot be read"),
    "bad.jsonl.gz": (FILES["rows.jsonl.gz"][:20] + b"\xff" * 20, "cannot be read"),
    "cut.parquet": (FILES["rows.parquet"][:-9], "cannot be read as parquet"),
    "empty.jsonl": (b"\n", "no rows"),
    "empty.json": (b"[]", "no rows"),
    "rows.csv": (b"chosen,rejected", "not a .jsonl, .json or .parquet file"),
    "labels.jsonl": (b'{"text": "a", "label": 1}', "text, label; accepted"),
    "half.jsonl": (b'{"prompt": "a", "chosen": "a"}', "prompt, chosen; accepted"),
    "bare.jsonl": (b'{"chosen": "a", "rejected": "b"}', "chosen, rejected; accepted"),
    "lists.json": (b"[[1]]", "a list; accepted"),
    "deep.jsonl": (json.dumps(good(1)[0]).encode() + b"\n" + DEEP, "line 2: too many brackets"),
    "deep.json": (b"[" + DEEP + b"]", "too many brackets"),
    "twice.jsonl": (b'{"a": 1}\n{"b": 1, "b": 1}', "line 2: b is given twice"),
    "twice.json": (b'[{"a": [{"role": "user", "role": "user"}]}]', "role is given twice"),
    "folder/train.jsonl": (DEEP, "line 1: too many brackets"),
    "folder/train.json": (DEEP, "line 1: too many brackets"),
    "folder/data/train.jsonl": (b'{"a": {"b": 1, "b": 2}}', "line 1: b is given twice"),
    "number.jsonl": (b'{"a": ' + b"1" * 5000 + b"}", "line 1: not rows of JSON"),
    "long.jsonl": (b'{"' + b"a" * 5000 + b'": 1}', "aaa ...; accepted"),
    "surrogate.jsonl": (b'{"\\ud800": 1}', r"in \ud800; accepted"),
}


@pytest.mark.parametrize("file", UNUSABLE)
def test_an_unusable_file_is_one_line_saying_what_and_where(file, tmp_path):
    content, expected = UNUSABLE[file]
    if content is not None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    assert expected in error_of(tmp_path / file.split("/")[0])


def test_a_column_of_parquet_with_two_values_of_a_key_is_one_line(tmp_path):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.StructArray.from_arrays([["a"], ["b"]], names=["content", "content"])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "rows.parquet")
    assert re.search("as parquet: .*duplicate field", error_of(tmp_path / "rows.parquet"))


def test_a_row_or_a_text_beyond_all_bounds_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_TEXT", 300)
    pairs = load(tmp_path, [*good(100), row("q", "a" * 301, "b")])
    assert pairs.dropped == {"a text of over 300 characters": 1} and len(pairs.triplets) == 100
    monkeypatch.setattr(data, "LONGEST_ROW", 10**4)
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.write(json.dumps(good(1)[0]) + '\n{"prompt": "')
        file.truncate(10**9)
    tracemalloc.start()
    assert "line 2: longer than a row may be, 10,000 bytes" in error_of(tmp_path / "rows.jsonl")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_a_token_id_that_no_model_has_is_one_line(tmp_path):
    tokenizer = tiny.__wrapped__()
    tokenizer.save_pretrained(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    content = json_of(file)
    content["model"]["vocab"]["q"] = 4_000_000_000
    file.write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    with pytest.raises(InputError, match="^the tokenizer gives token id 4000000000, which no"):
        load(tmp_path, [row("q", "a", "b")], tokenizer)


def test_a_data_set_that_cannot_be_fetched_is_one_line_with_the_cause(monkeypatch):
    def fail(source, config):
        raise ConnectionError("no route to host\nand a page of hints")

    monkeypatch.setattr("data.hub_check", lambda name, kind: None)
    monkeypatch.setattr("datasets.load_dataset", fail)
    assert "no route to host" in error_of("somebody/some-pairs")


REASONS = {  # what a library raises, and what is shown of it
    "spread over\n  lines.\nAnd hints": "spread over lines.",
    "no full\nstop": "no full stop",
    "": "ValueError",
    "x" * 2000: "x" * 1000 + " ...",
}


@pytest.mark.parametrize("message", REASONS)
def test_an_error_of_a_library_is_its_first_sentence_in_one_line(message):
    with pytest.raises(InputError) as caught, input_error_for("a file"):
        raise OSError("says nothing") from ValueError(message)
    assert str(caught.value) == f"a file: {REASONS[message]}"


# ---------------------------------------------------------------------- fingerprint


# ---------------------------------------------------------------------- many rows


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Two processes tokenise even few rows, and keep the ids in a folder of their own."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    return partial(monkeypatch.setattr, data, "MANY")


def mixed_rows():
    """Rows with faults of every kind, notes, and what JSON cannot hold as it is."""
    rows = good(400)
    rows[3] = row("x" * 600, "yes", "no")
    rows[5] = rows[5] | {"tools": ["t"], "source": "here"}
    rows[150] = row("same", "a", "a")
    rows[350] = row("half", "a \ud83d", "b")
    rows[7] |= {"score_chosen": 1.0, "score_rejected": 2.0, "other \ud83d": "text"}
    rows[9] = row("think", "<think>well</think>yes", "<think>hm</think>no")
    rows[390] |= {"more": "text"}
    return rows


def everything(pairs):
    fields = pairs._asdict() | {"triplets": lists(pairs), "rows": [t.row for t in pairs.triplets]}
    kinds = {a.dtype.name for t in pairs.triplets for a in t[:3]}
    return fields | {"summary": pairs.summary(), "kinds": kinds}


@pytest.mark.parametrize("strip", [False, True])
def test_many_rows_give_what_one_process_gives_and_are_tokenised_once(
    strip, many, tmp_path, monkeypatch
):
    more, lines = {"strip_thinking": strip, "log": lambda line: lines.append(line)}, []
    alone = load(tmp_path, mixed_rows(), **more)
    assert lines == [] and alone.dropped.total() == 4 and len(alone.unread) == 2
    many(400)
    first = load(tmp_path, mixed_rows(), **more)
    monkeypatch.setattr(data, "examine", end_this_process)  # nobody looks at a row again
    monkeypatch.setattr(cpu, "cores", lambda: 1)
    second = load(tmp_path, mixed_rows(), **more)
    assert everything(alone) == everything(first) == everything(second)
    begun, kept, read = lines
    assert begun == "tokenising 400 rows in 2 processes"
    assert re.fullmatch(r"token ids of 400 rows found in \d+ s and kept in (\S+)", kept)
    assert read == f"token ids of 400 rows read from {kept.split()[-1]}"


def test_a_worker_is_sent_its_own_rows_and_not_all(many, tmp_path, monkeypatch):
    """Otherwise what is sent would grow with the number of workers."""
    import datasets

    many(1), monkeypatch.setattr(data, "PIECE", 10)

    def sent(table, *_, **__):
        whole, share = (len(pickle.dumps(x)) for x in (table, table.shard(4, 1, contiguous=True)))
        raise RuntimeError(f"{share / whole:.1f} of all.")

    monkeypatch.setattr(datasets.Dataset, "map", sent)
    with pytest.raises(InputError, match=": 0.3 of all.$"):
        load(tmp_path, good(400))


def test_refusals_are_the_same_with_many_rows(many, tmp_path):
    rows = good(60) + [row("same", "a", "a")] * 2
    source = write_lines(tmp_path / "rows.jsonl", rows)
    alone = error_of(source)
    many(1)
    assert error_of(source) == alone and "identical pair in row 60" in alone


def test_kept_ids_are_those_of_the_same_rows_tokenizer_template_and_settings(monkeypatch):
    def key(rows=(1,), tokenizer=None, day="2024-01-05", max_length=64, strip_thinking=False):
        encoder = ChatEncoder(tokenizer or tiny(), day)
        settings = dict(max_length=max_length, strip_thinking=strip_thinking)
        return data.hash_of([*map(pickle.dumps, [*good(3), *rows])], encoder, **settings)

    dated = tiny(DATED)
    keys = [key(), key(rows=[]), key(rows=["\ud83d"]), key(max_length=65), key(strip_thinking=True),
            key(tokenizer=tiny(merges=(("a", "b"),))), key(tokenizer=tiny(TURNS)),
            key(tokenizer=dated), key(tokenizer=dated, day="2024-01-06")]  # fmt: skip
    assert len({*keys}) == len(keys) and key(day="2024-01-06") == key()
    monkeypatch.setattr(data, "version", lambda name: "another")
    assert key() != keys[0]


def end_this_process(*_, **__):
    os._exit(1)


def test_ids_that_cannot_be_kept_or_found_are_one_line(many, tmp_path, monkeypatch):
    many(1)
    monkeypatch.setattr(data, "examine", end_this_process)
    with pytest.raises(InputError, match="^tokenising, with .*: .*abruptly died"):
        load(tmp_path, good(4))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="^tokenising, with .*cache/ganpo .*: .*Not a directory"):
        load(tmp_path, good(4))


def test_a_process_waits_for_another_that_tokenises_the_same_rows_and_says_so(
    many, tmp_path, monkeypatch
):
    many(1)
    monkeypatch.setattr(data, "hash_of", lambda *_, **__: "key")
    (tmp_path / "cache" / "ganpo").mkdir(parents=True)
    with (tmp_path / "cache" / "ganpo" / "key.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        lines = []

        def log(line):
            lines.append(line)
            fcntl.flock(other, fcntl.LOCK_UN)

        assert len(load(tmp_path, good(4), log=log).triplets) == 4
    assert lines[0] == "waiting for another process, which tokenises the same rows"
    assert len(lines) == 3


def slowly(folder, rank):
    """On every rank a row takes long, and is counted."""
    import datasets

    look = data.examine

    def examine(row, **more):
        time.sleep(0.4)
        with open(folder / "looks", "a") as file:
            file.write("1\n")
        return look(row, **more)

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    data.MANY, data.examine, cpu.cores = 1, examine, lambda: 2


@pytest.mark.slow
def test_one_rank_tokenises_and_the_others_wait_beyond_the_time_out(tiny_world, tmp_path):
    alone, _ = run(tiny_world, tmp_path / "1", "--max_steps=1")
    more = dict(ranks=2, prepare=partial(slowly, tmp_path), log=str(tmp_path / "log"))
    shared, _ = run(tiny_world, tmp_path / "2", "--max_steps=1", "--timeout=3", **more)
    close(alone[0], shared[0], 1e-5)
    assert (tmp_path / "looks").read_text().count("1") == 28  # in 5.6 s


# ---------------------------------------------------------------------- fingerprints


def test_the_fingerprint_changes_with_one_token_with_the_order_and_with_the_rows(tmp_path):
    rows = good(3)
    changed = [[*rows[:2], {**rows[2], key: rows[2][key] + "!"}] for key in rows[2]]
    prints = [load(tmp_path, r).fingerprint for r in [rows, *changed, rows[::-1], rows[:2], rows]]
    assert prints[0] == prints[-1] and len(set(prints)) == 6


def test_the_fingerprint_changes_when_a_token_moves_across_a_border(tmp_path):
    tokenizer = tiny(PLAIN, None)  # nothing marks where the prompt ends
    a, b = (load(tmp_path, [r], tokenizer) for r in [row("ab", "cd", "x"), row("a", "bcd", "x")])
    assert sum(lists(a)[0], []) == sum(lists(b)[0], [])
    assert a.fingerprint != b.fingerprint


# ---------------------------------------------------------------------- order


@pytest.mark.parametrize("n, batch_size", [(10, 3), (12, 4), (5, 5), (7, 1)])
def test_each_epoch_is_another_permutation_without_its_incomplete_batch(n, batch_size):
    steps = n // batch_size
    batches = [batch_indices(step, n, batch_size, seed=0).tolist() for step in range(3 * steps)]
    assert all(len(batch) == batch_size for batch in batches)
    epochs = [sum(batches[first : first + steps], []) for first in (0, steps, 2 * steps)]
    for epoch in epochs:
        assert len(set(epoch)) == steps * batch_size and set(epoch) <= set(range(n))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_is_a_function_of_its_step_alone():
    in_order = [batch_indices(step, 20, 4, seed=3).tolist() for step in range(15)]
    for step in random.Random(0).sample(range(15), 15):  # as a resumed run may start anywhere
        epoch_order.cache_clear()
        assert batch_indices(step, 20, 4, seed=3).tolist() == in_order[step]
    assert batch_indices(0, 20, 4, seed=4).tolist() != in_order[0]


# ---------------------------------------------------------------------- packing

ROW = [(1, 1, 1), (5, 2, 7), (3, 6, 1), (4, 4, 4)]  # lengths of prompt, chosen, rejected


def distinct_triplets():
    """Every token is another number, so that none can stand in for another."""
    tokens = iter(range(100, 1000))
    return [
        Triplet(*(np.array([next(tokens) for _ in range(n)], dtype=np.int32) for n in lengths), i)
        for i, lengths in enumerate(ROW)
    ]


def triplets_of(lengths):
    ids = np.arange(2000, dtype=np.int32)
    return [Triplet(ids[: n - 2], ids[:1], ids[:1], row) for row, n in enumerate(lengths)]


@pytest.mark.parametrize("n, ranks, max_pairs, max_tokens", [
    (1, 1, 8, 999), (128, 1, 8, 1000), (128, 4, 3, 700), (30, 4, 8, 1500), (7, 8, 2, 100),
    (96, 2, 96, 2500),
])  # fmt: skip
def test_forwards_hold_every_pair_once_within_both_limits(n, ranks, max_pairs, max_tokens):
    lengths = np.exp(np.random.default_rng(n).normal(5, 0.7, n)).astype(int) + 3
    forwards = plan_forwards(triplets_of(lengths), ranks, max_pairs, max_tokens)
    assert sorted(t.row for part in forwards for mine in part for t in mine) == list(range(n))
    totals = np.zeros(ranks)
    for i, part in enumerate(forwards):
        assert len(part) == ranks  # every rank runs every forward
        sizes = {len(mine) for mine in part}
        assert len(sizes) == 1 or i == len(forwards) - 1  # the same number of pairs but at the end
        assert max(sizes) <= max_pairs
        tokens = [sum(len(ids) for t in mine for ids in t[:3]) for mine in part]
        assert max(tokens) <= max_tokens or max(sizes) == 1
        totals += tokens
        if i + 1 < len(forwards) and max(sizes) < max_pairs:  # and it was full
            first = [sum(map(len, mine[0][:3])) if mine else 0 for mine in forwards[i + 1]]
            assert (np.array(tokens) + first).max() > max_tokens
    if n % ranks == 0:
        assert totals.max() - totals.min() <= lengths.max()


def test_forwards_are_longest_first_and_a_pair_beyond_the_limit_is_alone():
    parts = plan_forwards(triplets_of([10, 500, 30, 20, 40]), 1, 8, 100)
    assert [[t.row for t in part[0]] for part in parts] == [[1], [4, 2, 3, 0]]
    parts = plan_forwards(triplets_of([10, 50, 30, 20, 40, 60]), 2, 2, 1000)
    assert [[[t.row for t in mine] for mine in part] for part in parts] == [
        [[5, 2], [1, 4]], [[3], [0]],
    ]  # fmt: skip


def test_a_survey_counts_the_forwards_and_finds_those_with_the_most_tokens():
    args = SimpleNamespace(micro_batch_size=2, micro_tokens=100)
    lengths = [30, 30, 30, 30], [90, 10, 40, 60], [120, 9, 8, 7]
    steps = [triplets_of(x) for x in lengths]
    alone = survey(steps, args, 1)
    assert (alone.fewest, alone.most, alone.imbalance) == (2, 3, 0)
    assert [t.row for t in alone.longest] == [0]  # of 120 tokens, in a forward of its own
    assert [[t.row for t in part] for part in alone.heaviest] == [[0], [3, 2], [1]]  # 200 in a step
    two = survey(steps, args, 2)
    assert (two.fewest, two.most) == (1, 2)
    # the ranks of each step have 60 and 60, 100 and 100, 127 and 17 tokens
    assert two.imbalance == pytest.approx((0 + 0 + 127 / 72 - 1) / 3)
    assert [[t.row for t in part] for part in two.heaviest] == [[0], [3]]


def naive_pack(triplets):
    """The layout token by token: ids, position ids, and where the parts of each sequence lie."""
    ids, positions, chosen, rejected = [], [], [], []

    def put(tokens, first_position):
        for k, token in enumerate(tokens):
            ids.append(int(token))
            positions.append(first_position + k)
        return list(range(len(ids) - len(tokens), len(ids)))

    for t in triplets:
        prompt = put(t.prompt, 0)
        chosen.append((prompt, put(t.chosen, len(prompt))))
        rejected.append((prompt, put(t.rejected, len(prompt))))
    return ids, positions, chosen + rejected


def test_packing_equals_the_naive_construction():
    packed = pack(distinct_triplets())
    ids, positions, places = naive_pack(distinct_triplets())
    predict, labels, owner, segments = [], [], [], []
    for sequence, (prompt, scored) in enumerate(places):
        for k, place in enumerate(scored):
            predict.append(scored[k - 1] if k else prompt[-1])
            labels.append(ids[place])
            owner.append(sequence)
    for i, (p, c, r) in enumerate(ROW):
        segments.append((places[i][0][0], p, c, r))
    assert packed.ids.tolist() == ids and packed.position_ids.tolist() == positions
    assert packed.predict.tolist() == predict and packed.labels.tolist() == labels
    assert packed.owner.tolist() == owner and packed.segments == tuple(segments)
    assert packed.lengths.tolist() == [len(scored) for _, scored in places]
    assert packed.mask.sum() == sum(2 * p + c + r for p, c, r in ROW)


def test_every_sequence_reads_as_if_it_stood_alone():
    triplets = distinct_triplets()
    packed = pack(triplets)
    assert packed.gather.shape == packed.mask.shape == (8, 12)
    answers = [t.chosen for t in triplets] + [t.rejected for t in triplets]
    for i, (t, scored) in enumerate(zip(triplets * 2, answers, strict=True)):
        at = packed.gather[i][packed.mask[i]]
        assert packed.ids[at].tolist() == [*t.prompt, *scored]
        assert packed.position_ids[at].tolist() == list(range(len(at)))
        assert packed.mask[i, : len(at)].all()  # the padding is at the end
        mine = packed.predict[packed.owner == i]
        assert packed.ids[mine].tolist() == [t.prompt[-1], *scored[:-1]]  # never the other answer
        assert packed.labels[packed.owner == i].tolist() == scored.tolist()


def test_a_packed_batch_moves_whole():
    packed = pack(distinct_triplets())
    for before, after in zip(packed, packed.to(torch.device("meta")), strict=True):
        assert after.is_meta if torch.is_tensor(before) else after == before
