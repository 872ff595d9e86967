"""Claims about APO: apo/train_apo.py, and what it asks of reward_model.py and generate.py.

python -m pytest -q tests/test_apo.py -m "not slow"
"""

import json
import math
import random
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import checkpoint
import distributed
import eval_alpaca
import reward_model
from apo import train_apo
from apo.train_apo import accuracy_and_ece, best_and_worst, difference_loss, pair_loss
from data import InputError, user_chat
from distributed import StopSignals
from generate import Answer, pick
from helpers import build_small_worlds, command, read_csv
from reward_model import RewardModel


def test_pair_losses_are_weighted_sums_of_plain_ones():
    chosen = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    rejected = torch.tensor([0.2, 0.7, 2.0], dtype=torch.float64)
    rows = (1, 3, 4)  # of the data: the last of two human pairs, and two of the game
    for form, game in (("ranking", lambda c, r: math.log1p(math.exp(r - c))),
                       ("difference", lambda c, r: r - c)):  # fmt: skip
        found = pair_loss(2, 0.025, form)(chosen, rejected, rows)
        expected = [
            math.log1p(math.exp(0.2 - 1.0)), 0.025 * game(-0.5, 0.7), 0.025 * game(2.0, 2.0)
        ]  # fmt: skip
        assert found.tolist() == pytest.approx(expected)
    assert difference_loss(chosen, rejected).tolist() == pytest.approx([-0.8, 1.2, 0.0])


def test_calibration_error_of_a_hand_computed_case():
    """Confidences .55 (two, one right), .75 (one right) and .95 (one wrong)."""
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    margins = np.array([logit(0.55), -logit(0.55), logit(0.75), -logit(0.95)])
    accuracy, ece = accuracy_and_ece(margins)
    assert accuracy == 0.5
    assert ece == pytest.approx(0.5 * abs(0.5 - 0.55) + 0.25 * 0.25 + 0.25 * 0.95)
    assert accuracy_and_ece(np.zeros(4)) == (0.5, 0.0)
    # ten bins from 0 to 1 on both orders: .61 and .68 lie in one, .58 in another
    assert accuracy_and_ece([logit(0.61), -logit(0.68)])[1] == pytest.approx(0.145)
    assert accuracy_and_ece([logit(0.58), -logit(0.62)])[1] == pytest.approx((0.42 + 0.62) / 2)
    sure = accuracy_and_ece(np.full(3, 50.0))
    assert sure[0] == 1 and sure[1] == pytest.approx(0, abs=1e-12)


def test_the_published_calibration_error_has_five_bins_of_confidence():
    """Both orders of a pair are mirror images, so ten bins hold what five from 1/2 to 1 hold."""
    margins = np.random.default_rng(0).normal(0.3, 1.5, 400)
    right, confidence = margins > 0, 1 / (1 + np.exp(-abs(margins)))
    expected = 0.0
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        here = (low <= confidence) & (confidence < low + 0.1)
        expected += abs(right[here].mean() - confidence[here].mean()) * here.mean()
    assert accuracy_and_ece(margins)[1] == pytest.approx(expected, abs=1e-12)


def test_best_of_n_is_the_argmax():
    rng = random.Random(0)
    for _ in range(50):
        rewards = [rng.choice([0.0, 1.0, 2.0]) for _ in range(4)]
        best, worst = best_and_worst(list("abcd"), rewards)
        assert "abcd".index(best) == int(np.argmax(rewards))
        assert "abcd".index(worst) == int(np.argmin(rewards))


def test_top_k_and_top_p_draw_from_the_most_probable_alone():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25]]))
    u = (torch.arange(20_000) + 0.5).double() / 20_000

    def shares(**settings):
        tokens = pick(logits.expand(len(u), -1), 1.0, u, **settings)
        return torch.bincount(tokens, minlength=5) / len(u)

    assert shares(top_k=2).tolist() == pytest.approx([0, 0.4 / 0.65, 0, 0, 0.25 / 0.65], abs=1e-3)
    assert shares(top_p=0.6).tolist() == pytest.approx([0, 0.4 / 0.65, 0, 0, 0.25 / 0.65], abs=1e-3)
    assert shares(top_p=0.3).tolist() == [0, 1, 0, 0, 0]
    assert shares(top_p=0.0).tolist() == [0, 1, 0, 0, 0]
    both = shares(top_k=3, top_p=0.7)  # 0.4 of 0.85, and 0.65 of 0.85 reach 0.7 together
    assert both.tolist() == pytest.approx([0, 0.4 / 0.65, 0, 0, 0.25 / 0.65], abs=1e-3)
    assert shares(top_k=5, top_p=1.0).tolist() == pytest.approx(shares().tolist())


@pytest.fixture(scope="module")
def game(small, tmp_path_factory):
    """A folder to play in, where the miniature is a world of seconds."""
    folder = tmp_path_factory.mktemp("apo")
    shutil.copytree(small, folder / "out" / "mini" / "seed0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build_small_worlds(patch)
        yield folder


ARGV = "--rounds=2 --prompts=22 --batch_size=16 --max_new_tokens=32 --test_temperature=1".split()


@pytest.fixture(scope="module")
def handed(game):
    """What the first round of a variant hands to the reward model's training: pairs, and the weight
    of each; no exam."""
    rows = [json.loads(x) for x in open("out/mini/seed0/train.jsonl")]
    golden = [{"prompt": r["prompt"], "golden": r["solution"]} for r in rows]
    Path("solver.jsonl").write_text("\n".join(map(json.dumps, golden)))
    seen = {}

    def learn(args, config, tokenizer, triplets, held_out, device, loss):
        ones = torch.ones(1, dtype=torch.float64)
        weights = [loss(ones, ones, (t.row,)).item() / math.log(2) for t in triplets]
        seen[args.out_dir.split("/")[0]] = triplets, np.array(weights)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_model, "learn", learn)
        for out, more in (
            ("human", ["--variants=frozen"]),
            ("both", ["--variants=apo"]),
            ("alone", ["--variants=gail"]),
            ("twice", ["--variants=apo", "--apo_weight=3", "--samples=2"]),
        ):
            with pytest.raises(KeyboardInterrupt):
                train_apo.main([*ARGV, "--golden=solver.jsonl", f"--out_dir={out}", *more])
            torch.distributed.destroy_process_group()
    return seen


def test_weights_of_human_and_game_pairs(handed):
    (human, ones), (both, weights) = handed["human"], handed["both"]
    n = len(human)
    assert (ones == 1).all() and [t.row for t in both] == list(range(len(both)))
    assert all(map(equal, human, both)) and len(both) > n + 48
    assert weights[:n].tolist() == [1] * n
    assert weights[n:] == pytest.approx(np.full(len(both) - n, 0.1 / 4))
    alone, plain = handed["alone"]
    assert len(alone) == len(both) - n and all(map(equal, alone, both[n:])) and (plain == 1).all()
    _, twice = handed["twice"]
    assert len(twice) > n + 24
    assert twice[n:] == pytest.approx(np.full(len(twice) - n, 1.5))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_game_pairs_hold_the_golden_answer_above_each_other_sample(handed):
    both, weights = handed["both"]
    tokenizer = AutoTokenizer.from_pretrained("out/mini/seed0/model")
    golden = {}
    for row in map(json.loads, open("out/mini/seed0/train.jsonl")):
        golden.setdefault(row["prompt"], row["solution"])
    asked = list(golden)[:44]  # the reward model's 22 and the LLM's 22
    rows = [json.loads(x) for x in open("both/apo/round1/answers/model-T1.jsonl")]
    plain = lambda text: re.sub(r"<\|\w+\|>", "", text).strip()  # noqa: E731
    samples = [(asked[r["prompt"]], plain(r["text"])) for r in rows if r["ended"]]
    expected = [(golden[p], text) for p, text in samples if text != golden[p] and p in asked[:22]]
    assert len(rows) == 44 * 4 > len(samples)

    def answer(ids):
        text = tokenizer.decode(ids)
        assert text.endswith("<|end|>")
        return text.removesuffix("<|end|>").strip()

    found = [(answer(t.chosen), answer(t.rejected)) for t in both if weights[t.row] != 1]
    assert found == expected


def test_the_reward_model_never_sees_the_llms_prompts(handed):
    tokenizer = AutoTokenizer.from_pretrained("out/mini/seed0/model")
    rows = [json.loads(x) for x in open("out/mini/seed0/train.jsonl")]
    llms = list(dict.fromkeys(row["prompt"] for row in rows))[22:44]
    both, _ = handed["both"]
    read = [tokenizer.decode(t.prompt, skip_special_tokens=True) for t in both]
    assert len(both) > 100 and not any(prompt in text for prompt in llms for text in read)
    human, _ = handed["human"]
    assert len(human) == sum(row["prompt"] not in llms for row in rows) < len(rows)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rounds=4"], "--lr: 3 rates for 4 rounds"),
        (["--rounds=1", "--lr", "1e-4", "1e-5"], "--lr: 2 rates for 1 rounds"),
        (["--variants", "frozen", "--apo_weight=1"], "--variants frozen does not use --apo_weight"),
        (["--", "--timeout=5"], "--timeout after --: the game sets it"),
        (["--", "--resume"], "--resume after --: the game sets it"),
        (["--golden=rows.jsonl"], "--golden rows.jsonl: row 1 has no golden or solution: prompt"),
        (
            ["--golden=empty.jsonl"],
            "--golden empty.jsonl: row 0 has no golden or solution: prompt, ",
        ),
        (["--golden=other.jsonl"], "row 0 has no golden or solution: query, answer"),
        (["--golden=tools.jsonl"], "--golden tools.jsonl: row 0: has tools"),
        (["--golden=chat.jsonl"], "--golden chat.jsonl: row 0: its golden answer is no text"),
        (["--golden=half.jsonl"], "--golden half.jsonl: row 0 holds half a character"),
        (["--golden=few.jsonl"], "--batch_size 16: only 0 prompts for the LLM, 64 human pairs"),
        (["--human=nowhere.jsonl"], "nowhere.jsonl"),
        (["--held_out=long.jsonl"], "--held_out long.jsonl: 0 of 1 rows"),
        (
            ["--exam=few.jsonl", "--golden=golden.jsonl"],
            "--exam: few.jsonl: row 0 is no prompt of the miniature: it has no text as family",
        ),
        (["--exam=alpaca_eval"], "--exam: alpaca_eval: is no file here"),
        (["--model=./nowhere"], "--model ./nowhere"),
        (["--aligner=ppo"], "invalid choice"),
        (["--samples=1"], "1 is not in [2,"),
        (["--", "--losss=dpo"], "unrecognized arguments: --losss=dpo"),
        (["--", "--critic=paired", "--ema_decay=0"], "--critic paired does not use --ema_decay"),
        (["--", "--lr=1"], "--lr after --: the game sets it"),
    ],
)
def test_bad_input_ends_with_one_line(game, flags, message, monkeypatch):
    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    rows = [{"prompt": "a", "golden": "b"}, {"prompt": "c"}]
    pair = {"prompt": "a" * 300, "chosen": "b", "rejected": "c"}
    files = {
        "rows": rows, "few": rows[:1], "empty": [{"prompt": "a", "golden": " "}], "long": [pair],
        "golden": [{"prompt": f"p{i}", "golden": "b"} for i in range(32)],
        "other": [{"query": "a", "answer": "b"}],
        "tools": [{"prompt": "a", "golden": "b", "tools": ["f"]}],
        "chat": [{"prompt": "a", "golden": [{"role": "assistant", "content": "b"}]}],
        "half": [{"prompt": "a", "golden": "b \ud83d"}],
    }  # fmt: skip
    for name, content in files.items():
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    with pytest.raises(SystemExit) as refusal:
        train_apo.main([*ARGV, "--out_dir=never", *flags])
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert not Path("never").exists()  # the next attempt meets an empty place


HH = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Go.\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"query": HH, "query_id": "0", "golden": " A hen."},  # APO's own converter
        {"prompt": HH, "golden": " A hen."},
        {"messages": [{"role": "user", "content": "Go."}], "prompt": "Go.", "solution": "A hen."},
    ],
)
def test_golden_answers_are_read_in_apo_s_own_format_too(row, tmp_path):
    (tmp_path / "g.json").write_text(json.dumps([row, row]))
    (prompt,), (golden,), notes = train_apo.read_golden(str(tmp_path / "g.json"))
    assert notes == ["columns not read: messages"] * ("messages" in row)
    said = [user_chat("Hi.")[0], {"role": "assistant", "content": "Hello!"}, *user_chat("Go.")]
    assert prompt.messages == (said if HH in row.values() else user_chat("Go."))
    assert golden == "A hen."


def test_what_is_not_read_of_golden_answers_is_said(tmp_path):
    row = {"prompt": "Go.", "query": "Run.", "golden": "A hen.", "solution": "A hen."}
    row |= {"chosen": "A cat.", "rejected": "A dog.", "system": "Rhyme.", "tags": [], "why": "x"}
    chat = {"prompt": [{"role": "user", "content": "Hi.", "mood": "glad"}], "golden": "Hi."}
    rows = [row, chat, {"prompt": "Hi.", "golden": "Hello."}]
    (tmp_path / "g.json").write_text(json.dumps(rows))
    (first, _), golden, notes = train_apo.read_golden(str(tmp_path / "g.json"))
    assert first.messages == [{"role": "system", "content": "Rhyme."}, *user_chat("Go.")]
    assert golden == ["A hen.", "Hi."]
    assert notes == [
        "columns not read: query, why, chosen, rejected, prompt.mood",
        "1 rows have another golden answer to an earlier prompt and are not read",
    ]


def test_what_the_llm_s_template_makes_of_prompts_is_said_before_the_game(game, capsys):
    rows = [{"prompt": f"p{i}", "golden": "b", "note": "x"} for i in range(32)]
    rows[0]["prompt"], rows[1]["prompt"] = "Say <|end|>.", "y" * 500
    Path("notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match="--exam: alpaca_eval"):
        train_apo.main([*ARGV, "--golden=notes.jsonl", "--exam=alpaca_eval", "--out_dir=never"])
    assert "--golden notes.jsonl: columns not read: note\n" in capsys.readouterr().out
    with mock.patch.object(train_apo, "claim_with_config", side_effect=InputError("enough")):
        with pytest.raises(SystemExit, match="enough"):
            train_apo.main([*ARGV, "--golden=notes.jsonl", "--out_dir=never"])
    printed = capsys.readouterr().out
    spelled = "1 of 32 prompts spell out special tokens, which the chat template makes real ones"
    assert f"\n--model: {spelled}\n" in printed
    cut = "1 of 32 prompts are longer than 480 tokens; the middle of these is left out"
    assert f"\n--model: {cut}\n" in printed


ONE_ROUND = "--variants=apo --rounds=1 --lr 1e-4 --golden=solver.jsonl --samples=2".split()
ONE_ROUND += "--prompts=22 --batch_size=16 --max_new_tokens=32".split()


@pytest.fixture
def played(game, handed, monkeypatch):
    """A round of a game without training: the reward model is random, the LLM stays as it is."""
    base = "out/mini/seed0/model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)

    def learn(args, config, tokenizer, triplets, held_out, *rest):
        for part in (model, tokenizer):
            part.save_pretrained(Path(args.out_dir, "hf"))
        return torch.arange(len(held_out))

    def align(self, policy, k, folder):
        shutil.copytree(base, folder / "policy" / "hf", dirs_exist_ok=True)

    monkeypatch.setattr(reward_model, "learn", learn)
    monkeypatch.setattr(train_apo.Game, "align", align)
    monkeypatch.setattr(distributed, "free_memory", lambda: None)  # it takes time
    if not Path("played").exists():  # by the first test that asks for it
        train_apo.main([*ONE_ROUND, "--out_dir=played"])
    return Path("played/apo/round1")


ROW = b'{"variant": "%s", "round": 1, "rm_acc": 1, "rm_ece": 1, "reward": 1, "pairs": 1}'


@pytest.mark.parametrize("name, damage", [
    ("round.json", b'{"variant": "ap'), ("round.json", b"[1]"),
    ("round.json", b'{"variant": "apo", "round": 1}'), ("round.json", ROW % b"gail"),
    ("rewards.json", b"[[1.0], [2.0]]"),
    ("reward/margins.json", b"{}"), ("reward/margins.json", b"[0.5, null]"),
    ("answers/model-T1.jsonl", b'{"prompt": 3}\n'), ("answers/model-T1.meta.json", b"{"),
])  # fmt: skip
def test_a_damaged_file_of_a_game_is_named(name, damage, played, game, tmp_path):
    shutil.copytree("played", tmp_path / "again")
    folder = tmp_path / "again" / "apo" / "round1"
    if name != "round.json":
        (folder / "round.json").unlink()
    (folder / name).write_bytes(damage)
    with pytest.raises(SystemExit, match="^apo.train_apo: ") as end:
        train_apo.main([*ONE_ROUND, "--resume", f"--out_dir={tmp_path / 'again'}"])
    assert f"{folder / name}" in str(end.value) and "\n" not in str(end.value)


def test_pairs_that_do_not_follow_from_the_rewards_are_written_anew(played, game, tmp_path):
    shutil.copytree("played", tmp_path / "again")
    folder = tmp_path / "again" / "apo" / "round1"
    (folder / "round.json").unlink()
    pairs = (folder / "pairs.jsonl").read_bytes()
    (folder / "pairs.jsonl").write_bytes(pairs[:-9])
    train_apo.main([*ONE_ROUND, "--resume", f"--out_dir={tmp_path / 'again'}"])
    assert (folder / "pairs.jsonl").read_bytes() == pairs
    said = "pairs.jsonl does not hold what follows from rewards.json, and is written anew"
    assert said in (folder / "log").read_text()
    assert (folder / "round.json").read_text() == (played / "round.json").read_text()


def test_what_a_reward_model_of_the_game_does_not_read_is_counted(played):
    """In the log of the round: samples hold special tokens as text."""
    rows = [json.loads(line) for line in (played / "answers/model-T1.jsonl").open()]
    marked = [r for r in rows if r["ended"] and re.search(r"<\|\w+\|>", r["text"])]
    of_llm = sum(r["prompt"] >= 22 for r in marked)
    log = (played / "log").read_text()
    assert 0 < of_llm < len(marked)
    cut = sum(not row["ended"] for row in rows)
    assert f"{cut} of 88 answers were cut at --max_new_tokens 32 and are not used\n" in log
    pairs = len((played / "pairs.jsonl").read_text().splitlines())
    assert cut and f"{pairs} of the LLM's 22 prompts have usable answers\n" in log
    assert f"what scores them did not read: {of_llm}\n" in log
    assert f"; noted: special tokens left out of a sample {len(marked) - of_llm}\n" in log


def test_a_game_whose_answers_are_cut_says_so(game, monkeypatch):
    flags = [*ARGV, "--variants=apo", "--max_new_tokens=1"]
    with pytest.raises(SystemExit, match="only 0 of 22 prompts have usable answers that ended"):
        train_apo.main([*flags, "--out_dir=cut"])  # some are empty, and so have ended
    cut = Answer("a", 1, False)
    write = lambda lm, encoder, chats, samples, **more: [cut] * samples * len(chats)  # noqa: E731
    monkeypatch.setattr(eval_alpaca, "generate", write)
    with pytest.raises(SystemExit, match="no answer of the LLM ended within --max_new_tokens 1, "):
        train_apo.main([*flags, "--out_dir=all"])


def test_a_reward_model_stopped_and_resumed_equals_an_undisturbed_one(game, monkeypatch):
    flags = ["--batch_size=16", "--save_every=2"]
    reward_model.main([*flags, "--out_dir=whole"])
    save = reward_model.save_state

    def die(out_dir, step, *rest):
        save(out_dir, step, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_model, "save_state", die)
    with pytest.raises(KeyboardInterrupt):
        reward_model.main([*flags, "--out_dir=parts"])
    torch.distributed.destroy_process_group()
    monkeypatch.setattr(reward_model, "save_state", save)
    with pytest.raises(SystemExit, match="holds a run: pass --resume"):
        reward_model.main([*flags, "--out_dir=parts"])
    with pytest.raises(SystemExit, match="lr was 0.001, is now 0.1"):
        reward_model.main([*flags, "--out_dir=parts", "--resume", "--lr=0.1"])
    reward_model.main([*flags, "--out_dir=parts", "--resume"])
    for name in ("metrics.csv", "hf/model.safetensors"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()


@pytest.mark.slow
def test_a_game_interrupted_anywhere_ends_as_an_undisturbed_one(game, monkeypatch):
    train_apo.main([*ARGV, "--out_dir=a", "--save_every=2"])
    rows = read_csv("a/rounds.csv")
    assert [(r["variant"], r["round"]) for r in rows] == [
        ("start", "0"), *((v, str(n)) for v in train_apo.VARIANTS for n in (1, 2)),
    ]  # fmt: skip
    assert not Path("a/frozen/round2/reward").exists()
    for variant, k in ((r["variant"], int(r["round"])) for r in rows[1:]):
        folder = Path("a", variant, f"round{k}")
        config = json.loads((folder / "policy/config.json").read_text())
        before = f"a/{variant}/round{k - 1}/policy/hf" if k > 1 else "out/mini/seed0/model"
        assert (config["model"], config["lr"]) == (before, [1e-4, 4e-5][k - 1])
        assert config["ref_model"] == "out/mini/seed0/model"
        meta = json.loads((folder / "eval/model-T1.meta.json").read_text())
        assert (meta["model"], meta["top_k"], meta["top_p"]) == (str(folder / "policy/hf"), 5, 0.85)
        assert not list(folder.glob("*/state"))

    def interrupt(module, name, when):
        inner, calls = getattr(module, name), []

        def die(*args, **more):
            result = inner(*args, **more)
            calls.append(name)
            if len(calls) == when:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(module, name, die)
        with pytest.raises(KeyboardInterrupt):
            train_apo.main(["--out_dir=b", *ARGV, "--save_every=2", *resume])
        torch.distributed.destroy_process_group()
        monkeypatch.setattr(module, name, inner)

    resume = []
    for module, name, when in (
        (eval_alpaca, "append", 3),  # after a round's answers
        (reward_model, "save_state", 1),  # inside a reward model
        (reward_model, "export_policy", 1),  # before its margins are written
        (checkpoint, "save_state", 1),  # inside the LLM's step
        (train_apo, "write_synced", 2),
        (checkpoint, "export_policy", 2),
    ):
        interrupt(module, name, when)
        resume = ["--resume"]
    train_apo.main(["--out_dir=b", *ARGV, "--save_every=2", *resume])
    assert Path("a/rounds.csv").read_text() == Path("b/rounds.csv").read_text()
    with pytest.raises(SystemExit, match="samples was 4, is now 2"):
        train_apo.main(["--out_dir=b", *ARGV, "--save_every=2", "--resume", "--samples=2"])
    with pytest.raises(SystemExit, match="holds a run: pass --resume"):
        train_apo.main(["--out_dir=b", *ARGV])
    rows = Path("out/mini/seed0/train.jsonl").read_text().splitlines(keepends=True)
    Path("human.jsonl").write_text("".join(rows[1:]))
    other = ["--resume", "--human=human.jsonl"]
    with pytest.raises(SystemExit, match="the data are not those that the run began with"):
        train_apo.main(["--out_dir=b", *ARGV, "--save_every=2", *other])


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])  # within the LLM's two steps, and after them
def test_a_signal_ends_the_game_and_it_resumes(step, game, monkeypatch, capsys):
    flags = [*ARGV, "--variants=gail", "--rounds=1", "--batch_size=8"]
    inner, polls = StopSignals.anywhere, []

    def anywhere(self, device):
        polls.append(self)
        return inner(self, device) or len(polls) >= step

    monkeypatch.setattr(StopSignals, "anywhere", anywhere)
    out = f"--out_dir=stop{step}"
    train_apo.main([*flags, out])
    said = capsys.readouterr().out.splitlines()[-1]
    words = " ".join(["--resume", *flags, out])
    assert said == f"stopped; resume with: python -m apo.train_apo {words}"
    monkeypatch.undo()
    train_apo.main(["--resume", *flags, out])
    train_apo.main([*flags, f"--out_dir=straight{step}"])
    texts = [Path(x, "rounds.csv").read_text() for x in (out[10:], f"straight{step}")]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("aligner", ["rejection", "dpo", "ganpo"])
def test_every_aligner_takes_its_step_on_the_best_and_worst(game, aligner):
    flags = ["--variants=apo", "--rounds=1", "--apo_loss=difference"]
    train_apo.main([*ARGV, *flags, f"--aligner={aligner}", f"--out_dir={aligner}",
                    "--", "--beta=0.3"])  # fmt: skip
    config = json.loads(Path(aligner, "apo/round1/policy/config.json").read_text())
    assert (config["loss"], config["lambda_adv"], config["beta"]) == {
        "rejection": ("sft", 0, 0.3), "dpo": ("dpo", 0, 0.3), "ganpo": ("dpo", 0.1, 0.3),
    }[aligner]  # fmt: skip
    home = Path(aligner, "apo/round1")
    pairs = {r["prompt"]: r for r in map(json.loads, (home / "pairs.jsonl").open())}
    tasks = {}
    for row in map(json.loads, open("out/mini/seed0/train.jsonl")):
        tasks.setdefault(row["prompt"], [])
    asked = list(tasks)[:44]
    for row in map(json.loads, (home / "answers/model-T1.jsonl").open()):
        if row["ended"]:
            tasks[asked[row["prompt"]]].append(row["text"])
    reward, n = RewardModel(str(home / "reward/hf"), torch.device("cpu")), 0
    for prompt in asked[22:]:  # the LLM's
        texts = tasks[prompt]
        scores = reward.score([user_chat(prompt)] * len(texts), texts) if texts else []
        best, worst = best_and_worst(texts, scores) if texts else ("", "")
        good = [bool(text.strip()) and not re.search(r"<\|\w+\|>", text) for text in (best, worst)]
        two = all(good) and best.strip() != worst.strip()
        if two or aligner == "rejection" and good[0]:
            n += 1
            assert pairs[prompt]["chosen"] == best
            assert pairs[prompt]["rejected"] == (worst if two else ".")
    assert n == len(pairs) >= 16


@pytest.mark.slow
def test_two_ranks_play_the_game_of_one(game, handed):
    home = shutil.copytree("out/mini/seed0", game / "world")
    flags = [*ARGV, "--variants=apo", "--rounds=1", f"--model={home}/model"]
    flags += [f"--golden={game}/solver.jsonl", f"--human={home}/train.jsonl"]
    flags += [f"--held_out={home}/test.jsonl", f"--exam={home}/prompts.jsonl"]
    train_apo.main([*flags, f"--out_dir={game}/one"])
    done = command("-m", "apo.train_apo", *flags, f"--out_dir={game}/two", torchrun=2)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(x, "apo/round1/round.json").read_text()) for x in ("one", "two"))
    assert one.pop("variant") == two.pop("variant")
    none = {k for k, v in one.items() if v is None}  # errors of rates where all are equal
    assert none == {k for k, v in two.items() if v is None} and len(one) > len(none) + 5
    assert {k: one[k] for k in {*one} - none} == pytest.approx(
        {k: two[k] for k in {*two} - none}, rel=1e-3
    )
