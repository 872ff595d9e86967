"""Claims about the embedded world and sampling: miniature/world.py, generate.py, the first command.

    python -m pytest -q tests/test_miniature.py -m "not slow"

The judge is tried on answers written by hand, the solver against prompts read by regular
expressions, sampling against one row at a time without a cache.
"""

import cpu

import json
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import eval_alpaca
import generate as generate_module
import report
import reward_model
import train_ganpo
from apo import train_apo
from data import ChatEncoder, InputError, load_pairs, user_chat
from generate import Answer, generate, pick, uniforms
from helpers import (
    ROOT,
    SHAPES,
    SMALL,
    command,
    lines_of,
    make_model,
    read_csv,
    rows_of,
    wait_for,
    write_lines,
)
from miniature import world
from miniature.world import FAMILIES, Task, annotate, demonstrate, draw_tasks, judge

TINY = SMALL | {"sft_steps": 5}  # for claims that do not depend on what the reference has learnt

# ---------------------------------------------------------------------- tasks and judge

ANSWERS = {  # family: prompt, args or solution, right answers, nearly right ones, wrong ones
    "repeat": ("Write the word moki 3 times.", "moki moki moki",
               ["moki moki moki", " moki moki moki\n"], ["moki moki", "moki moki moki moki",
               "moki, moki, moki", "moki moki mokii"], ["", "x", "Hello!", "sabel"]),
    "reverse": ("Reverse the word sabel.", "lebas", ["lebas"],
                ["leba", "lebaz", "lebbas"], ["", "u", "QQQ", "123"]),
    "upper": ("Put moki fox in capitals.", "MOKI FOX", ["MOKI FOX"],
              ["MOKI FOx", "MOKIFOX", "MOKI-FOX"], ["moki fox", "", "no"]),
    "spell": ("Spell the word sabel with dashes.", "s-a-b-e-l", ["s-a-b-e-l"],
              ["s-a-b-e", "s-a-b-e-l-", "s-a-b-l"], ["q", "", "zzz"]),
    "sort": ("Sort these letters: k d z a", "a d k z", ["a d k z"],
             ["a d k", "a d k z.", "a d d k z"], ["", "Q", "hm?"]),
    "initials": ("Give the initials of: old red tin", "O.R.T.", ["O.R.T."],
                 ["O.R.T", "O.R.", "O. R. T."], ["ort", "", "xyz"]),
    "choose": ("What is the second word of: oak hen tin", "hen", ["hen"],
               ["he", "hens", "hhen"], ["oak", "", "tulip"]),
    "count": ("Count down from 9 to 6.", "9 8 7 6", ["9 8 7 6"],
              ["9 8 7", "9 8 7 6 5", "9, 8, 7, 6"], ["", "ten", "5"]),
    "name": ("Name 3 animals, but not cat.", ["animals", 3, "cat"],
             ["dog, fox, hen", "lion, goat, cow"],
             ["dog, fox", "dog, fox, cat", "dog, fox, dog", "dog, fox, red", "dog, fox, Hen"],
             ["", "dog fox hen", "I do not know", "red, blue, pink"]),
    "describe": ("Describe the river in 2 words.", [2], ["old, cold", "tiny, huge"],
                 ["old, old", "old, river", "old, cold, deep", "old"],
                 ["", "old cold", "It is a long river", "river, river, river"]),
    "end": ("Write 5 words that end with tin.", [5, "tin"],
            ["The old fox saw tin.", "The hen found the tin."],
            ["The hen found the tin", "the hen found the tin.", "The hen found the old tin.",
             "The hen fownd the tin.", "The tin found the hen."],
            ["", "tin", "Sure", "What do you want from me today?"]),
}  # fmt: skip


def hand_task(family):
    prompt, known, *answers = ANSWERS[family]
    args = known if isinstance(known, list) else []
    return Task(family, prompt, "" if args else known, args), answers


def test_every_family_has_hand_written_answers():
    assert set(ANSWERS) == set(FAMILIES) and len(FAMILIES) == 11
    assert set(world.OPEN) == {f for f in FAMILIES if hand_task(f)[0].args}


@pytest.mark.parametrize("family", ANSWERS)
def test_judge_orders_right_nearly_right_and_wrong(family):
    task, (right, nearly, wrong) = hand_task(family)
    assert all(judge(task, answer) == (1, 1) for answer in right)
    for answer in nearly:
        verdict = judge(task, answer)
        assert verdict.strict == 0 and 0.3 < verdict.gold < 0.5, answer
    for answer in wrong:
        verdict = judge(task, answer)
        assert verdict.strict == 0 and 0 <= verdict.gold < 0.3, (answer, verdict)


CHATTY = ["Sure! {}", "{} Hope this helps!", "{}\n{}", "<|user|>{}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_solver_is_always_right_and_chatter_around_it_never(family):
    rng = random.Random(family)
    for _ in range(500):
        task = Task(family, *FAMILIES[family](rng))
        assert judge(task, task.solution) == (1, 1), task
        for chatty in CHATTY:
            assert judge(task, chatty.format(task.solution, task.solution)).strict == 0


def count_to(a, b):
    step = 1 if a < b else -1
    return " ".join(str(i) for i in range(a, b + step, step))


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ORDINALS = {"first": 0, "second": 1, "last": -1}
SOLVE = {  # from the prompt alone, by another way
    r"Write the word (\w+) (\d) times.": lambda w, n: (f"{w} " * int(n)).strip(),
    r"Reverse the word (\w+).": lambda w: "".join(reversed(w)),
    r"Put ([\w ]+) in capitals.": lambda w: "".join(chr(ord(c) - 32 * (c > "Z")) for c in w),
    r"Spell the word (\w+) with dashes.": lambda w: re.sub(r"(?<=.)(?=.)", "-", w),
    r"Sort these letters: ([\w ]+)": lambda w: " ".join(c for c in ALPHABET if c in w),
    r"Give the initials of: ([\w ]+)": lambda w: re.sub(r"(\w)\w* ?", r"\1.", w).upper(),
    r"What is the (\w+) word of: ([\w ]+)": lambda n, w: re.findall(r"\w+", w)[ORDINALS[n]],
    r"Count (?:down )?from (\d+) to (\d+).": lambda a, b: count_to(int(a), int(b)),
}  # fmt: skip


def test_prompts_say_what_is_judged():
    """Closed families are solved from the prompt's words; of open ones it names all that counts."""
    solved = 0
    for task in draw_tasks(random.Random(1), 3000):
        if task.args:
            assert all(str(x) in re.findall(r"\w+", task.prompt) for x in task.args), task
            continue
        ((match, solve),) = [
            (m, f) for p, f in SOLVE.items() if (m := re.fullmatch(p, task.prompt))
        ]
        assert solve(*match.groups()) == task.solution
        solved += 1
    assert solved > 1500


def test_demonstrator_is_right_chatty_and_wrong_in_the_designed_shares():
    rng = random.Random(0)
    tasks = draw_tasks(rng, 6000)
    said = [(task, demonstrate(rng, task.solution)) for task in tasks]
    right = sum(text == task.solution for task, text in said) / 6000
    chatty = sum(
        task.solution in text and len(text) >= len(task.solution) + 6 for task, text in said
    )
    assert abs(right - 0.5) < 0.02 and abs(chatty / 6000 - 0.3) < 0.02
    wrong = [judge(t, x).strict for t, x in said if t.solution not in x]
    assert len(wrong) > 1000 and sum(wrong) <= 0.01 * len(wrong)


@pytest.mark.parametrize("gap, longer", [(0.5, 0), (0.5, 17), (0.2, 0), (0.0, 10), (0.3, -8)])
def test_annotator_agrees_as_designed(gap, longer):
    """P(the better answer wins) = Phi((gap in gold - 0.02 * characters the worse is longer by) /
    (0.15 sqrt 2))."""
    rng, n = random.Random(0), 20_000
    wins = sum(
        annotate(rng, gap, "x" * 20) > annotate(rng, 0.0, "x" * (20 + longer)) for _ in range(n)
    )
    expected = statistics.NormalDist(0, 0.15 * math.sqrt(2)).cdf(gap - 0.02 * longer)
    assert abs(wins / n - expected) < 4 * math.sqrt(0.25 / n)


# ---------------------------------------------------------------------- the world on disk


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_seed_same_files_whatever_the_threads_and_another_seed_another_world(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cpu, "MINIATURE_THREADS", 1)  # two would wait for each other here
    first = world.build(0, tmp_path / "a", lambda line: None, TINY)
    torch.manual_seed(123)  # another state than the first build met
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(3)
        again = world.build(0, tmp_path / "b", lambda line: None, TINY)
        assert torch.get_num_threads() == 3 and torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    assert contents(again) == contents(first)
    other = contents(world.build(1, tmp_path / "a", lambda line: None, TINY))
    assert all(
        other[f] != v for f, v in contents(first).items() if f.endswith(("jsonl", "tensors"))
    )


def test_files_load_as_any_other_model_and_data_set(small):
    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    model = AutoModelForCausalLM.from_pretrained(small / "model")
    assert len(tokenizer) == model.config.vocab_size == 261
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for text in ("Sort these: é, 中, 🙂", "a\nb\tc  d"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    for name in ("train", "test"):
        data = load_pairs(str(small / f"{name}.jsonl"), "train", tokenizer, 256)
        assert len(data.triplets) == data.n_rows > 10 and not data.notes  # no tie, no inversion
    assert all(judge(t, t.solution).strict for t in world.read_tasks(small / "prompts.jsonl"))


def test_held_out_prompts_are_in_no_training_file(small):
    prompts = {name: [row["prompt"] for row in lines_of(small / f"{name}.jsonl")]
               for name in ("prompts", "test", "train", "demos")}  # fmt: skip
    assert len(set(prompts["prompts"])) == len(prompts["prompts"]) == SMALL["prompts"]
    assert not set(prompts["prompts"]) & set(prompts["test"])
    held_out = {*prompts["prompts"], *prompts["test"]}
    assert not held_out & {*prompts["train"], *prompts["demos"]}


def test_pairs_carry_the_judges_and_the_annotators_scores(small):
    for row in lines_of(small / "train.jsonl"):
        task = Task(**{k: row[k] for k in Task._fields})
        assert row["chosen"].strip() != row["rejected"].strip()
        assert row["score_chosen"] > row["score_rejected"]
        for side in ("chosen", "rejected"):
            assert row[f"gold_{side}"] == judge(task, row[side]).gold


def test_answers_that_are_cut_off_or_empty_or_hold_special_tokens_make_no_pairs(monkeypatch):
    rng, encoder = random.Random(0), ChatEncoder(world.build_tokenizer())
    tasks = draw_tasks(rng, 50)
    four = [Answer("cut off", 64, False), Answer(" ", 2, True), Answer("<|user|>", 2, True),
            Answer("whole", 6, True)]  # fmt: skip
    monkeypatch.setattr(world, "answer", lambda *a, **k: four * 50)
    rows = world.draw_pairs(None, encoder, tasks, 2, rng, 0, None)
    assert len(rows) == 100  # of the whole answer and the demonstration
    for row in rows:
        assert "whole" in (row["chosen"], row["rejected"]) and row["chosen"] != row["rejected"]
        assert not {"cut off", " ", "<|user|>"} & {row["chosen"], row["rejected"]}


def test_an_interrupted_build_leaves_nothing_and_a_killed_one_nothing_that_counts(
    tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world, "draw_pairs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            world.build(0, tmp_path, lambda line: None, TINY)
    assert [p.name for p in tmp_path.iterdir()] == [".seed0.lock"]
    code = "import sys; from miniature import world; world.build(0, sys.argv[1])"
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    try:
        wait_for(lambda: (tmp_path / ".seed0.unfinished" / "demos.jsonl").exists())
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "seed0").exists()
    monkeypatch.setattr(world, "draw_pairs", lambda *_: [])  # this part takes time
    folder = world.build(0, tmp_path, lambda line: None, TINY)
    assert (folder / "test.jsonl").exists() and not (tmp_path / ".seed0.unfinished").exists()


def test_two_builders_build_once_and_other_settings_are_refused(tmp_path, monkeypatch):
    builds = []

    def write(folder, settings, log):
        builds.append(folder)
        time.sleep(0.3)
        for name in world.FILES:
            (folder / name).write_text(json.dumps(settings) * (name == "world.json"))

    monkeypatch.setattr(world, "write_world", write)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: world.build(3, tmp_path, lambda line: None), range(2)))
    assert both == [tmp_path / "seed3"] * 2 and len(builds) == 1
    with pytest.raises(
        InputError, match="seed3 was built with other settings: remove .*/seed3, and"
    ):
        world.build(3, tmp_path, sizes=SMALL)


@pytest.mark.parametrize("name", world.FILES)
def test_a_world_that_lacks_a_file_is_named_by_every_program(name, mini):
    folder = mini / "out" / "mini" / "seed0"
    shutil.move(folder / name, mini / "away")
    said = f"out/mini/seed0 is no whole world, it has no {name}: remove out/mini/seed0, and it is"
    starts = [
        (train_ganpo.main, []), (reward_model.main, []), (train_apo.main, []),
        (eval_alpaca.main, ["--model=away"]),
    ]  # fmt: skip
    for main, argv in starts if name == "world.json" else starts[:1]:
        with pytest.raises(SystemExit, match=f": {said} built anew$"):
            main(argv)
    shutil.move(mini / "away", folder / name)
    text = (folder / "world.json").read_text()
    (folder / "world.json").write_text(text[:-9])
    with pytest.raises(SystemExit, match="world.json is damaged: remove out/mini/seed0, and it is"):
        world.main([])


def test_damaged_rows_of_a_world_are_named_before_a_run(mini):
    folder = mini / "out" / "mini" / "seed0"
    prompts = lines_of(folder / "prompts.jsonl")
    write_lines(folder / "prompts.jsonl", [*prompts, {"prompt": "Go."}])
    said = "out/mini/seed0 is damaged .remove .* built anew.: out/mini/seed0/prompts.jsonl: row "
    with pytest.raises(SystemExit, match=f"^train_ganpo.py: {said}{len(prompts)} is no prompt"):
        train_ganpo.main(["--max_steps=1"])
    write_lines(folder / "prompts.jsonl", prompts)
    write_lines(folder / "train.jsonl", [{"prompt": "Go."}])
    with pytest.raises(SystemExit, match="train.jsonl is damaged: there is no 'family'"):
        world.main(["show"])


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(args=[1]), r"its solution 'tac' and args \[1\] do not agree"),
        (dict(args=7), "its solution 'tac' and args 7 do not agree"),
        (dict(family="describe"), "its solution 'tac' and args .* do not agree"),
        (dict(family="describe", args=[2]), r"its solution 'tac' and args \[2\] do not agree"),
        (dict(family="riddle"), "'riddle' is none of its families of tasks"),
        (dict(family=["reverse"]), "it has no text as family"),
        (dict(solution=None), "it has no text as solution"),
        (dict(prompt=3), "it has no text as prompt"),
        (None, "it has no text as family"),
    ],
)
def test_a_damaged_exam_is_refused_with_row_and_reason(change, reason, tmp_path):
    """The judge has to find the row's own solution right."""
    good = {"family": "reverse", "prompt": "Reverse the word cat.", "solution": "tac"}
    file = write_lines(tmp_path / "exam.jsonl", [good, change and good | change])
    with pytest.raises(
        InputError, match=f"exam.jsonl: row 1 is no prompt of the minia.*: {reason}"
    ):
        world.read_tasks(file)
    file = write_lines(tmp_path / "exam.jsonl", [good | {"args": []}, good | {"note": "x"}])
    with pytest.raises(InputError, match="row 1 is more than a prompt: it also has note"):
        world.read_tasks(file)


def test_show_prints_ten_pairs_with_scores(small, capsys):
    world.show(small)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30 and len(set(lines[::3])) == 10
    assert all(re.match(r"    chosen   '.*' +gold [01]\.\d\d, annotator", x) for x in lines[1::3])


# ---------------------------------------------------------------------- sampling


def encoder_of(folder):
    return ChatEncoder(AutoTokenizer.from_pretrained(folder))


def naive(lm, encoder, messages, temperature, seed, sample, n):
    """One answer, every token from a forward over the whole text."""
    ids = prompt = encoder.prompt_ids(messages)
    noise = uniforms(seed, prompt, sample, n)
    for u in noise:
        with torch.no_grad():
            logits = lm(torch.tensor([ids])).logits[0, -1].double().numpy()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p = np.exp(logits / temperature - (logits / temperature).max())
            token = int((np.cumsum(p / p.sum()) > u).argmax())
        ids = [*ids, token]
        if token in (encoder.end_of_turn, lm.config.get_text_config().eos_token_id):
            return encoder.tokenizer.decode(ids[len(prompt) : -1]), len(ids) - len(prompt), True
    return encoder.tokenizer.decode(ids[len(prompt) :]), n, False


PROMPTS = ["abc", "a", "fed cab fed", "bb bb bb bb bb bb", "cde", "", "dead beef", "face"]


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("temperature", [0, 0.7, 1.5])
def test_batched_sampling_equals_one_row_at_a_time_without_a_cache(family, temperature, tmp_path):
    folder = make_model(tmp_path, family, initializer_range=0.3)
    encoder = encoder_of(folder)
    # Gemma-2's eager attention gives nan for padding in float64
    dtype = torch.float32 if family == "gemma2" else torch.float64
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    chats = [user_chat(prompt) for prompt in PROMPTS]
    settings = dict(temperature=temperature, seed=5, max_new_tokens=14, samples=2, batch_size=5)
    answers = generate(lm, encoder, chats, **settings)
    expected = [
        naive(lm, encoder, messages, temperature, 5, sample, 14)
        for messages in chats
        for sample in range(2)
    ]
    assert [tuple(a) for a in answers] == expected
    if temperature == 0:
        assert answers[::2] == answers[1::2]
    else:
        assert len({a.text for a in answers}) > len(PROMPTS)


def test_same_seed_prompt_and_temperature_same_text_in_any_batch_and_order(small):
    encoder = encoder_of(small / "model")
    lm = AutoModelForCausalLM.from_pretrained(small / "model")
    assert lm.dtype == torch.float32
    chats = [user_chat(task.prompt) for task in world.read_tasks(small / "prompts.jsonl")[:16]]
    order = np.random.default_rng(0).permutation(len(chats))
    for temperature in (0, 1.0):
        settings = dict(temperature=temperature, seed=1, max_new_tokens=40)
        whole = generate(lm, encoder, chats, **settings)
        for size in (1, 3, 16):
            assert generate(lm, encoder, chats, **settings, batch_size=size) == whole
        mixed = generate(lm, encoder, [chats[i] for i in order], **settings, batch_size=7)
        assert mixed == [whole[i] for i in order]
        assert generate(lm, encoder, chats[9:10], **settings) == whole[9:10]
        shorter = generate(lm, encoder, chats, **settings | {"max_new_tokens": 20})
        assert all(b.text.startswith(a.text) for a, b in zip(shorter, whole, strict=True))
    other = generate(lm, encoder, chats, **settings | {"seed": 2})
    assert sum(a == b for a, b in zip(other, whole, strict=True)) < len(chats) / 2
    assert generate(lm, encoder, [], **settings) == []


def test_a_long_prompt_does_not_lengthen_the_others(small):
    """Short prompts are not padded to its length when they are read."""
    lm, encoder = AutoModelForCausalLM.from_pretrained(small / "model"), encoder_of(small / "model")
    chats, places, forward = [user_chat(x) for x in ("a" * 300, *"bcdefgh")], [], lm.forward
    lm.forward = lambda ids, **more: places.append(ids.numel()) or forward(ids, **more)
    settings = dict(temperature=0, seed=0, max_new_tokens=1)
    answers = generate(lm, encoder, chats, **settings)
    assert sum(places) == sum(len(encoder.prompt_ids(chat)) for chat in chats)
    assert answers == [generate(lm, encoder, [chat], **settings)[0] for chat in chats]


@pytest.mark.parametrize("window", [None, 5])
def test_the_cache_is_written_in_place(window, monkeypatch):
    """One copy per ROOM tokens; with a window no more is held than the next token sees."""
    monkeypatch.setattr(generate_module, "ROOM", 4)
    layer = DynamicSlidingWindowLayer(window) if window else DynamicLayer()
    written = torch.randn(2, 2, 20, 3)  # rows, heads, tokens, size
    layer.update(written[:, :, :7], -written[:, :, :7])
    layer, places = generate_module.GrowingLayer((layer,)), set()
    for n in range(8, 21):
        keys, values = layer.update(written[:, :, n - 1 : n], -written[:, :, n - 1 : n])
        seen = written[:, :, max(0, n - window) if window else 0 : n]
        assert torch.equal(keys, seen) and torch.equal(values, -seen)
        places.add(layer.buffers[0].data_ptr())
        first = n + 1 - min(n + 1, window or n + 1)
        assert layer.get_seq_length() == n and layer.get_mask_sizes(1) == (n + 1 - first, first)
    assert len(places) <= 4 and layer.buffers[0].shape[2] == (4 if window else 19) + 4
    layer.batch_select_indices(torch.tensor([1]))
    keys, _ = layer.update(written[1:, :, :1], written[1:, :, :1])
    assert torch.equal(keys[:, :, :-1], written[1:, :, -4 if window else 0 :])


def test_a_model_with_layers_that_are_no_attention_answers_as_it_does_by_itself(small):
    config = AutoConfig.for_model(
        "lfm2", vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    lm, encoder = AutoModelForCausalLM.from_config(config).eval(), encoder_of(small / "model")
    chats = [user_chat(prompt) for prompt in PROMPTS]
    settings = dict(temperature=0, seed=0, max_new_tokens=12)
    whole = generate(lm, encoder, chats, **settings)
    assert whole == [generate(lm, encoder, [chat], **settings)[0] for chat in chats]


def test_generation_stops_at_the_end_of_turn_and_is_cut_without_one(small):
    encoder = encoder_of(small / "model")
    lm = AutoModelForCausalLM.from_pretrained(small / "model")
    chats = [user_chat(task.prompt) for task in world.read_tasks(small / "prompts.jsonl")]
    answers = generate(lm, encoder, chats, temperature=0.7, seed=0, max_new_tokens=64)
    ended = [a for a in answers if a.ended]
    assert len(ended) > len(answers) / 2
    for a in answers:
        assert "<|end|>" not in a.text and (a.ended or a.tokens == 64)
        assert a.tokens <= 64
    # a second stop token, as the generation config of real models names them
    space = encoder.tokenizer.convert_tokens_to_ids("Ġ")
    lm.generation_config.eos_token_id = [space]
    for a, b in zip(generate(lm, encoder, chats, temperature=0.7, seed=0, max_new_tokens=64),
                    answers, strict=True):  # fmt: skip
        assert a.text == b.text.split(" ")[0]


def test_the_prompt_is_training_s_prompt(small, monkeypatch):
    encoder = encoder_of(small / "model")
    data = load_pairs(str(small / "train.jsonl"), "train", encoder.tokenizer, 256)
    seen = []

    def spy(lm, prompts, *rest):
        seen.extend(prompts)
        return [[encoder.end_of_turn]] * len(prompts)

    monkeypatch.setattr(generate_module, "write_batch", spy)
    lm = AutoModelForCausalLM.from_pretrained(small / "model")
    chats = [user_chat(row["prompt"]) for row in lines_of(small / "train.jsonl")]
    generate(lm, encoder, chats, temperature=0, seed=0, max_new_tokens=9)
    assert sorted(seen) == sorted(t.prompt.tolist() for t in data.triplets)


def test_pick_draws_each_token_as_often_as_its_probability():
    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 3
    logits[0, [0, 7]] = -math.inf  # never drawn
    u = (torch.arange(100_000) + 0.5).double() / 100_000
    for temperature in (0.5, 1.0):
        tokens = pick(logits.expand(len(u), -1), temperature, u)
        share = torch.bincount(tokens, minlength=50) / len(u)
        assert (share - (logits[0] / temperature).softmax(-1)).abs().max() < 2e-5
        assert share[0] == share[7] == 0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert not {0, 7} & set(pick(logits.expand(2, -1), 1.0, ends).tolist())
    assert pick(logits, 0, u[:1]) == logits.argmax()
    for wrong in (math.nan, math.inf):
        logits[0, 3] = wrong
        for t in (0, 0.7):
            with pytest.raises(FloatingPointError, match="logits are not finite: its weights"):
                pick(logits, t, u[:1])


def test_noise_depends_on_seed_prompt_and_sample_and_on_nothing_else():
    base = uniforms(0, [1, 2, 3], 0, 50)
    assert np.array_equal(uniforms(0, [1, 2, 3], 0, 99)[:50], base)
    for other in (uniforms(1, [1, 2, 3], 0, 50), uniforms(0, [1, 2, 4], 0, 50),
                  uniforms(0, [1, 2, 3], 1, 50)):  # fmt: skip
        assert not np.isin(other, base).any()
    assert abs(np.concatenate([uniforms(s, [4], 0, 1000) for s in range(50)]).mean() - 0.5) < 0.005


def test_progress_tells_answers_speed_and_time_left(small):
    lm = AutoModelForCausalLM.from_pretrained(small / "model")
    lines = []
    chats = [user_chat("a"), user_chat("b")]
    generate(lm, encoder_of(small / "model"), chats, temperature=0, seed=0,
             max_new_tokens=5, log=lines.append)  # fmt: skip
    assert re.fullmatch(r"generated 2 of 2 answers, [\d,]+ tok/s, 0:00:00 left", lines[-1])


def test_a_prompt_beyond_the_models_positions_is_refused(small):
    lm = AutoModelForCausalLM.from_pretrained(small / "model")
    with pytest.raises(InputError, match=r"a prompt of \d+ tokens and 500 new ones exceed .* 512"):
        generate(lm, encoder_of(small / "model"), [user_chat("a" * 40)], temperature=0, seed=0,
                 max_new_tokens=500)  # fmt: skip


def test_command_line_prints_an_answer_per_prompt(small):
    done = command("generate.py", "Reverse the word moki.", "Hello", "--model", small / "model")
    assert done.returncode == 0 and done.stdout.startswith("Reverse the word moki.\n    ")
    assert "\nHello\n    " in done.stdout
    with pytest.raises(SystemExit) as stop:
        generate_module.main(["Hello", "--model", "./nowhere"])
    assert str(stop.value) == "generate.py: --model ./nowhere: no such folder"


# ---------------------------------------------------------------------- a run in the miniature


def test_a_run_in_the_miniature_ends_with_the_final_table_unless_eval_every_is_0(
    mini, monkeypatch, capsys
):
    monkeypatch.setattr(train_ganpo, "FINAL_PROMPTS", 8)
    train_ganpo.main(["--max_steps=1", "--out_dir=a"])
    rows = read_csv("a/final.csv")
    assert [*rows[0]] == report.FINAL_COLUMNS and len(rows) == 9
    assert {row["temperature"] for row in rows} == {"0", "0.7", "1"}
    assert {row["n"] for row in rows} == {"8"}
    assert "8 held-out prompts, exact judge" in capsys.readouterr().out
    assert [row["step"] for row in rows_of("a/eval.csv")] == [1]
    train_ganpo.main(["--max_steps=1", "--out_dir=b", "--eval_every=0"])
    assert not (mini / "b" / "final.csv").exists() and rows_of("b/eval.csv") == []
    (mini / "a" / "final.csv").unlink()  # as if the run had been killed before it
    train_ganpo.main(["--max_steps=1", "--out_dir=a", "--resume"])
    assert read_csv("a/final.csv") == rows


# ---------------------------------------------------------------------- the first command


def copy_of_the_tree(to):
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.jinja")]:
        shutil.copy(file, to)
    shutil.copytree(ROOT / "miniature", to / "miniature")
    return to


@pytest.mark.slow
def test_the_first_command_builds_trains_and_learns(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    # alone it takes two and a half minutes; here other tests run beside it
    done = command("train_ganpo.py", torchrun=1, cwd=tree, limit=900)
    assert done.returncode == 0, done.stderr
    table = read_csv(tree / "out/run-000/final.csv")
    rows = {(float(r["temperature"]), r["model"]): r for r in table}
    assert len(rows) == 9 and all(row["n"] == "1000" for row in rows.values())
    for temperature in (0.7, 1.0):
        for column in ("strict_acc", "mean_score"):
            gain = rows[temperature, "difference"]
            assert float(gain[column]) > 2 * float(gain[column + "_se"])
    assert "1000 held-out prompts, exact judge" in done.stdout and "96/96" in done.stdout
    # the world is built once; two processes share the final table's prompts
    again = command("train_ganpo.py", "--max_steps=2", torchrun=2, cwd=tree, limit=900)
    assert again.returncode == 0, again.stderr
    assert "building" in done.stdout and "building" not in again.stdout
    assert [row["n"] for row in read_csv(tree / "out/run-001/final.csv")] == ["1000"] * 9
