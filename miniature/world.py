"""The miniature: a small artificial world with an exact judge, in which everything takes minutes.

    python -m miniature.world [--seed K]         # builds out/mini/seedK if it is not there
    python -m miniature.world show [--seed K]    # ten prompts with a chosen and a rejected answer

Its tasks are eleven families of short instructions, three of them open-ended. The roles:

    solver        always answers rightly
    demonstrator  answers rightly (50 %), rightly with chatter around it (30 %), wrongly (20 %)
    reference     a Llama of 0.5 million parameters that writes bytes, trained on the demonstrator
    annotator     compares answers by their gold score, with noise and a mild taste for length
    judge         is exact: strict (every check passed) and gold (half strict, half partial credit)

A world is a folder with model/ (a Hugging Face folder), demos.jsonl (what the reference was trained
on), train.jsonl and test.jsonl (the annotator's pairs, mostly of the reference's own answers),
prompts.jsonl and world.json (the settings). Prompts of test.jsonl and prompts.jsonl are held out.
"""

import cpu  # must come before torch

import fcntl
import json
import math
import random
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from datetime import timedelta
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from data import (
    ChatEncoder,
    InputError,
    input_error_for,
    json_lines,
    names,
    read_rows,
    user_chat,
)
from flags import Parser, natural, world_folder
from generate import Answer, generate, quiet
from policy import load_weights

SIZES = dict(  # of a world; sft_steps are the reference's training steps
    prompts=1000, train_prompts=2048, train_pairs=3072, test_prompts=256, sft_steps=1600,
)  # fmt: skip
FILES = "model demos.jsonl train.jsonl test.jsonl prompts.jsonl world.json".split()
BATCH, SAMPLES, MAX_NEW_TOKENS = 16, 4, 64  # texts per step, answers per prompt, their tokens

# ---------------------------------------------------------------------- the tasks

WORDS = {
    "animals": "cat dog fox hen cow pig bear wolf goat lion",
    "fruits": "apple pear plum fig lemon mango grape peach melon cherry",
    "colors": "red blue green pink gray brown white black gold purple",
    "tools": "saw axe hammer drill rake knife brush rope nail file",
    "trees": "oak elm ash pine birch maple cedar palm willow beech",
    "clothes": "hat coat shoe sock shirt glove scarf boot belt dress",
    "metals": "iron tin zinc lead steel brass bronze copper silver nickel",
    "places": "river hill lake road farm city beach forest tower bridge",
}
WORDS = {category: words.split() for category, words in WORDS.items()}
NOUNS = [word for words in WORDS.values() for word in words]
ADJECTIVES = "old cold deep dark wide calm loud soft warm tiny huge quiet".split()
VERBS = "saw found liked lost drew passed".split()
KNOWN = {*NOUNS, *ADJECTIVES, *VERBS, "the", "i", "we"}


class Task(NamedTuple):
    """An instruction, and what the judge needs to know about it."""

    family: str
    prompt: str
    solution: str  # the right answer; in an open-ended family one of many
    args: list = []  # in an open-ended family: the arguments of its checks


# Each family is a function of a random.Random that returns a prompt, a right answer and, where it
# is open-ended, the arguments of its checks.


def invented(rng):
    """Returns a word of four to six letters that is in none of the lists."""
    letters = ("bdfgklmnprstvz", "aeiou")
    return "".join(rng.choice(letters[i % 2]) for i in range(rng.randint(4, 6)))


def repeat(rng):
    word, n = invented(rng), rng.randint(2, 4)
    return f"Write the word {word} {n} times.", " ".join([word] * n)


def reverse(rng):
    word = invented(rng)
    return f"Reverse the word {word}.", word[::-1]


def upper(rng):
    words = f"{invented(rng)} {rng.choice(NOUNS)}"
    return f"Put {words} in capitals.", words.upper()


def spell(rng):
    word = invented(rng)
    return f"Spell the word {word} with dashes.", "-".join(word)


def sort(rng):
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(3, 4))
    return f"Sort these letters: {' '.join(letters)}", " ".join(sorted(letters))


def initials(rng):
    words = rng.sample(NOUNS + ADJECTIVES, rng.randint(3, 5))
    return f"Give the initials of: {' '.join(words)}", "".join(w[0].upper() + "." for w in words)


def choose(rng):
    words, n = rng.sample(NOUNS, 3), rng.randrange(3)
    ordinal = ("first", "second", "last")[n]
    return f"What is the {ordinal} word of: {' '.join(words)}", words[n]


def count(rng):
    start = rng.randint(1, 50)
    numbers = [str(start + i) for i in range(rng.randint(3, 5))]
    if rng.random() < 0.5:
        return f"Count from {numbers[0]} to {numbers[-1]}.", " ".join(numbers)
    return f"Count down from {numbers[-1]} to {numbers[0]}.", " ".join(numbers[::-1])


def name(rng):
    category, n = rng.choice(list(WORDS)), rng.randint(1, 4)
    but, *words = rng.sample(WORDS[category], n + 1)
    return f"Name {n} {category}, but not {but}.", ", ".join(words), [category, n, but]


def describe(rng):
    noun, n = rng.choice(NOUNS), rng.randint(2, 5)
    return f"Describe the {noun} in {n} words.", ", ".join(rng.sample(ADJECTIVES, n)), [n]


def end(rng):
    n, last = rng.randint(4, 7), rng.choice(NOUNS)
    subject = [rng.choice(["I", "We"])] if n == 4 else ["The", rng.choice(NOUNS)]
    subject[1:1] = rng.sample(ADJECTIVES, n >= 6)
    words = [*subject, rng.choice(VERBS), "the", *rng.sample(ADJECTIVES, n == 7), last]
    return f"Write {n} words that end with {last}.", " ".join(words) + ".", [n, last]


CLOSED = [repeat, reverse, upper, spell, sort, initials, choose, count]
FAMILIES = {f.__name__: f for f in (*CLOSED, name, describe, end)}


def draw_tasks(
    rng: random.Random, n: int, avoid: Iterable[str] = (), distinct: bool = False
) -> list[Task]:
    """Returns n random tasks whose prompts are not in `avoid`, with distinct=True none twice."""
    tasks, seen = [], set(avoid)
    while len(tasks) < n:
        family = rng.choice(list(FAMILIES))
        task = Task(family, *FAMILIES[family](rng))
        if task.prompt not in seen:
            tasks.append(task)
            if distinct:
                seen.add(task.prompt)
    return tasks


# ---------------------------------------------------------------------- who judges and who writes


class Verdict(NamedTuple):
    """The judge's opinion of an answer."""

    strict: float  # 1 if every check is passed, else 0
    gold: float  # (strict + partial) / 2, in [0, 1]


def judge(task: Task, answer: str) -> Verdict:
    """Returns the verdict on an answer, whose white space at both ends does not count.

    Each check of the task's family gives a number from 0 to 1.
    """
    checks = OPEN[task.family] if task.family in OPEN else closeness
    parts = checks(answer.strip(), *(task.args or [task.solution]))
    strict = float(all(part == 1 for part in parts))
    return Verdict(strict, (strict + sum(parts) / len(parts)) / 2)


def closeness(answer, solution):
    """The only check of a closed family: the similarity of answer and solution."""
    return [SequenceMatcher(None, answer, solution, autojunk=False).ratio()]


def check_name(answer, category, n, but):
    """Checks the number of items, and the share of items that are right."""
    items = answer.split(", ")
    right = {*items} & {*WORDS[category]} - {but}
    return [near(len(items), n), len(right) / len(items)]  # a repetition is not right


def check_describe(answer, n):
    """Checks the number of items, and the share of items that are known adjectives."""
    items = answer.split(", ")
    return [near(len(items), n), len({*items} & {*ADJECTIVES}) / len(items)]


def check_end(answer, n, last):
    """Checks the number of words, the share of known words, the last word, and capital and dot."""
    words = answer.removesuffix(".").split(" ")
    known = sum(word.lower() in KNOWN for word in words) / len(words)
    sentence = answer[:1].isupper() and answer.endswith(".")
    return [near(len(words), n), known, float(words[-1] == last), float(sentence)]


def near(n, target):
    """Returns 1 where n equals the target, and less the further it is away, down to 0."""
    return max(0.0, 1 - abs(n - target) / target)


OPEN = {"name": check_name, "describe": check_describe, "end": check_end}


def demonstrate(rng: random.Random, solution: str) -> str:
    """Returns the demonstrator's answer: the solution, the solution with chatter, or a mistake."""
    kind = rng.random()
    if kind < 0.5:
        return solution
    if kind < 0.8:
        chatter = ("Sure! {}", "Of course: {}", "{} Hope this helps!", "{} Anything else?")
        return rng.choice(chatter).format(solution)
    wrong = solution
    while wrong == solution:
        wrong = rng.choice(MISTAKES)(rng, solution)
    return wrong


def off_by_one(rng, text):
    """Leaves out or repeats one item of a list, or one character where there is no list."""
    separator = next((s for s in (", ", " ", "-") if s in text), "")
    items = text.split(separator) if separator else list(text)
    i = rng.randrange(len(items))
    items[i : i + 1] = [items[i]] * rng.choice([0, 2])
    return separator.join(items)


def typo(rng, text):
    """Replaces one character by a letter."""
    i = rng.randrange(len(text))
    return text[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz") + text[i + 1 :]


def other_case(rng, text):
    """Exchanges small and capital letters."""
    return text.swapcase()


def other_separator(rng, text):
    """Replaces what separates the items."""
    found = next((s for s in (", ", "-", " ") if s in text), None)
    return text.replace(found, rng.choice([" ", ", ", "-"])) if found else text


MISTAKES = (off_by_one, typo, other_case, other_separator)


def annotate(rng: random.Random, gold: float, answer: str) -> float:
    """Returns the annotator's score of an answer, drawn anew at each call."""
    return gold + 0.02 * len(answer) + rng.gauss(0, 0.15)


# ---------------------------------------------------------------------- the reference


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per byte, and with a chat template."""
    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Returns the untrained reference. The random generator is left as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},  # texts are short
        initializer_range=0.06,  # with the usual 0.02 the final loss is a third of a nat higher
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def answer(
    lm, encoder: ChatEncoder, tasks: list[Task], temperature: float, seed: int, **more
) -> list[Answer]:
    """Returns a model's answers to tasks; `more` goes to generate.generate."""
    chats = [user_chat(task.prompt) for task in tasks]
    more |= {"temperature": temperature, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS}
    return generate(lm, encoder, chats, **more)


def batches_of(encoder: ChatEncoder, demos: list[dict], rng: random.Random) -> list[list]:
    """Returns the batches of one epoch: pairs of token ids and the length of their prompt.

    The texts of a batch have nearly equal lengths.
    """
    texts, batches = [], []
    for demo in demos:
        messages = user_chat(demo["prompt"])
        ids = encoder.answer_ids(messages, demo["response"])
        texts.append((ids, len(encoder.prompt_ids(messages))))
    for i in range(0, len(texts), 20 * BATCH):
        by_length = sorted(texts[i : i + 20 * BATCH], key=lambda text: len(text[0]))
        bucket = [by_length[j : j + BATCH] for j in range(0, len(by_length), BATCH)]
        rng.shuffle(bucket)
        batches += bucket
    return batches


def answer_loss(model: LlamaForCausalLM, batch: list) -> Tensor:
    """Returns the mean cross-entropy of the answers' tokens in a batch of batches_of."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    scored = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, (text, n_prompt) in enumerate(batch):
        ids[row, : len(text)] = torch.tensor(text)
        scored[row, n_prompt : len(text)] = True
    # no attention mask: texts are padded on the right, which a causal model does not see
    h = model.model(ids, use_cache=False).last_hidden_state[:, :-1][scored[:, 1:]]
    return F.cross_entropy(model.lm_head(h), ids[scored])


def fit(
    model: LlamaForCausalLM,
    encoder: ChatEncoder,
    demos: list[dict],
    rng: random.Random,
    log: Callable,
):
    """Trains the reference for one epoch on the demonstrations' answers."""
    batches = batches_of(encoder, demos, rng)
    # Muon for the matrices: with AdamW alone the loss is 0.3 nats higher after the same time
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, 0.015, weight_decay=0.0)
    adam = torch.optim.AdamW(others, 6e-3, (0.9, 0.99), weight_decay=0.0, fused=True)
    peaks, average, begin = {muon: 0.015, adam: 6e-3}, None, time.perf_counter()
    threads = torch.get_num_threads()
    for step, batch in enumerate(batches):
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / len(batches))) / 2
        torch.set_num_threads(1)  # Muon's products are so small that two threads take longer
        for optimizer, peak in peaks.items():
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        torch.set_num_threads(threads)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        done, now = step + 1, time.perf_counter()
        if done % 200 == 0 or done == len(batches):
            left = timedelta(seconds=int((now - begin) / done * (len(batches) - done)))
            log(f"reference: step {done:>4}/{len(batches)}, loss {average:.3f}, {left} left")


# ---------------------------------------------------------------------- the world


def draw_pairs(model, encoder, tasks, per_prompt, rng, seed, log) -> list[dict]:
    """Returns preference rows, per_prompt of them for each task.

    The annotator compares the reference's answers at temperature 0.9 and one demonstration. For
    each row it scores all of them anew. The answer with the highest score is chosen, and a random
    other one is rejected.
    """
    answers, rows = answer(model, encoder, tasks, 0.9, seed, samples=SAMPLES, log=log), []
    for i, task in enumerate(tasks):
        own = [a.text for a in answers[i * SAMPLES : (i + 1) * SAMPLES] if a.ended]
        texts = dict.fromkeys([*own, demonstrate(rng, task.solution)])  # without repetitions
        texts = [t for t in texts if t.strip() and not encoder.special_text.search(t)]
        gold = {text: judge(task, text).gold for text in texts}
        for _ in range(per_prompt):
            opinions = {text: annotate(rng, gold[text], text) for text in texts}
            chosen = max(opinions, key=opinions.get)
            others = [text for text in texts if text.strip() != chosen.strip()]
            if others:
                rejected = rng.choice(others)
                row = task._asdict() | {"chosen": chosen, "rejected": rejected}
                row |= {"score_chosen": opinions[chosen], "score_rejected": opinions[rejected]}
                rows.append(row | {"gold_chosen": gold[chosen], "gold_rejected": gold[rejected]})
    return rows


def read_tasks(path: str | Path) -> list[Task]:
    """Returns the tasks of a world's prompts.jsonl. Raises InputError for rows of another kind."""
    tasks = []
    for i, row in enumerate(read_rows(str(path), "train")):
        tasks.append(task_of(row, f"{path}: row {i}"))
        if more := [name for name in row if name not in Task._fields]:
            raise InputError(f"{path}: row {i} is more than a prompt: it also has {names(more)}")
    return tasks


def task_of(row: dict, where: str) -> Task:
    """Returns the task of a row, whose other columns are of no concern.

    Raises InputError, which begins with `where`, unless the judge finds the row's own solution
    right.
    """
    known = {k: v for k, v in row.items() if k in Task._fields} if isinstance(row, dict) else {}
    with input_error_for(f"{where} is no prompt of the miniature"):
        if missing := [k for k in Task._fields[:3] if not isinstance(known.get(k), str)]:
            raise InputError(f"it has no text as {missing[0]}")
        if known["family"] not in FAMILIES:
            raise InputError(f"{known['family']!r} is none of its families of tasks")
        task = Task(**known)
        try:
            right = judge(task, task.solution).strict == 1
        except Exception:  # its arguments are not those of the family's checks
            right = False
        if not right:
            raise InputError(f"its solution {task.solution!r} and args {task.args!r} do not agree")
    return task


def build(
    seed: int, root: str | Path = "out/mini", log: Callable = print, sizes: dict = SIZES
) -> Path:
    """Builds the world root/seedK if it is not there, and returns its folder.

    The folder appears whole or not at all. Raises InputError if it was built with other sizes.
    """
    folder, settings = world_folder(seed, root), {"seed": seed} | sizes
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".seed{seed}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second builder waits here for the first
            if not folder.exists():
                build_alone(folder, settings, log)
    remove = f"remove {folder}, and it is built anew"
    if missing := [name for name in FILES if not (folder / name).exists()]:
        raise InputError(f"{folder} is no whole world, it has no {missing[0]}: {remove}")
    with input_error_for(f"{folder / 'world.json'} is damaged: {remove}"):
        built_with = json.loads((folder / "world.json").read_text())
    if built_with != settings:
        raise InputError(f"{folder} was built with other settings: {remove}")
    with input_error_for(f"{folder} is damaged ({remove})"):
        read_tasks(folder / "prompts.jsonl")  # which are used only at the end of a run
    return folder


def build_after(check: Callable, args, log: Callable):
    """Builds the world of args.seed, if it is not there, after check has accepted the input.

    check(args) is called with a copy of args whose paths into this world lead to a stand-in. So its
    InputError comes at once and not after the minutes of building. log(line) is called with lines
    about the progress.
    """
    folder = world_folder(args.seed)
    if not folder.exists():
        with tempfile.TemporaryDirectory() as temporary:
            write_stand_in(Path(temporary), args.seed)

            def replaced(value):
                inside = isinstance(value, str) and Path(value).resolve().parent == folder.resolve()
                return str(Path(temporary, Path(value).name)) if inside else value

            try:
                check(Namespace(**{name: replaced(value) for name, value in vars(args).items()}))
            except InputError as error:  # the stand-in's path means nothing to the user
                raise InputError(str(error).replace(temporary, str(folder))) from None
    build(args.seed, log=log)


def write_stand_in(folder: Path, seed: int):
    """Writes what a program reads of a world, of the same shape, in a second.

    The model is untrained. Chosen answers are solutions; rejected ones differ in their first byte,
    so that no limit of length makes them equal.
    """
    rng, tokenizer = random.Random(seed), build_tokenizer()
    build_model(tokenizer, seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, size in (("train", "train_pairs"), ("test", "test_prompts"), ("prompts", "prompts")):
        rows = [
            task._asdict() | {"chosen": task.solution, "rejected": "?" + task.solution}
            for task in draw_tasks(rng, SIZES[size], distinct=True)
        ]
        fields = Task._fields if name == "prompts" else rows[0]
        text = json_lines({field: row[field] for field in fields} for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def build_alone(folder: Path, settings: dict, log: Callable):
    """Builds a world that no other process is building."""
    log(f"building {folder}, once")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a build that was killed
    unfinished.mkdir()
    begin, threads = time.perf_counter(), torch.get_num_threads()
    cpu.begin_vector_mathematics()
    torch.set_num_threads(cpu.MINIATURE_THREADS)  # one seed gives one world everywhere
    try:
        write_world(unfinished, settings, log)
        unfinished.rename(folder)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(unfinished, ignore_errors=True)
    log(f"built {folder} in {time.perf_counter() - begin:.0f} s")


def write_world(folder: Path, settings: dict, log: Callable):
    """Writes the files of a world into an empty folder."""
    seed, n_test = settings["seed"], settings["test_prompts"]
    rng = random.Random(seed)
    held_out = draw_tasks(rng, settings["prompts"] + n_test, distinct=True)
    (folder / "prompts.jsonl").write_text(json_lines(t._asdict() for t in held_out[n_test:]))
    avoid = {task.prompt for task in held_out}
    tasks = draw_tasks(rng, settings["sft_steps"] * BATCH, avoid)
    demos = [{"prompt": task.prompt, "response": demonstrate(rng, task.solution)} for task in tasks]
    (folder / "demos.jsonl").write_text(json_lines(demos))
    tokenizer = build_tokenizer()
    encoder, model = ChatEncoder(tokenizer), build_model(tokenizer, seed)
    fit(model, encoder, demos, rng, log)
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks = draw_tasks(rng, settings["train_prompts"], avoid, distinct=True)
    rows = draw_pairs(model, encoder, tasks, 2, rng, seed, log)
    rng.shuffle(rows)
    (folder / "train.jsonl").write_text(json_lines(rows[: settings["train_pairs"]]))
    rows = draw_pairs(model, encoder, held_out[:n_test], 1, rng, seed, log)
    (folder / "test.jsonl").write_text(json_lines(rows))
    (folder / "world.json").write_text(json.dumps(settings) + "\n")


# ---------------------------------------------------------------------- what others call


def examine(model: str, tasks: list[Task], temperature: float, seed: int) -> list[Verdict]:
    """Returns the judge's verdicts on the answers that a Hugging Face folder gives to tasks."""
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model))
    with input_error_for(model):
        lm = load_weights(AutoModelForCausalLM, model, dtype=torch.float32)
    answers = answer(lm, encoder, tasks, temperature, seed)
    return [judge(task, a.text) for task, a in zip(tasks, answers, strict=True)]


def show(folder: Path):
    """Prints a pair of each of ten families."""
    rows = read_rows(str(folder / "train.jsonl"), "train")
    with input_error_for(f"{folder / 'train.jsonl'} is damaged"):
        first = {row["family"]: row for row in reversed(rows)}
        for row in [first[family] for family in FAMILIES if family in first][:10]:
            print(row["prompt"])
            for side in ("chosen", "rejected"):
                scores = f"gold {row[f'gold_{side}']:.2f}, annotator {row[f'score_{side}']:.2f}"
                print(f"    {side:<9}{row[side]!r:<44} {scores}")


def parse_args(argv: list[str]):
    """Returns the settings of this program."""
    usage = "python -m miniature.world [build | show] [--seed K]"
    parser = Parser("miniature.world", __doc__, usage)
    parser.add_argument("action", nargs="?", choices=["build", "show"], default="build")
    parser.add_argument("--seed", type=natural, default=0, help="which world [0]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        folder = build(args.seed)
        if args.action == "show":
            show(folder)
        else:
            print(folder)
    except (InputError, OSError) as error:
        sys.exit(f"miniature.world: {error}")


if __name__ == "__main__":
    main()
