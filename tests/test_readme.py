"""Claims about README.md and docs/: their commands parse, what they name exists, their forks run.

python -m pytest -q tests/test_readme.py
"""

import argparse
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch

import discriminator
import eval_alpaca
import generate
import losses
import report
import reward_model
import settings
import train_ganpo
from apo import train_apo
from data import load_pairs
from helpers import LN2, ROOT, TESTS, close, flags, rows_of, run, tiny
from miniature import reproduce, world
from tools import bench, plots, track

PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
README, DOCS = PAGES[ROOT / "README.md"], ROOT / "docs"
PROGRAMS = {
    "train_ganpo.py": train_ganpo, "eval_alpaca.py": eval_alpaca, "generate.py": generate,
    "reward_model.py": reward_model, "apo.train_apo": train_apo, "miniature.world": world,
    "miniature.reproduce": reproduce, "tools.bench": bench, "tools.plots": plots,
    "tools.track": track,
}  # fmt: skip
OF_TORCHRUN = "nproc_per_node nnodes rdzv_backend rdzv_endpoint rdzv_id node_rank".split()
OF_VIEWERS = "logdir project".split()  # tensorboard, trackio


def each_page(function):
    ids = lambda path: path.name  # noqa: E731
    return pytest.mark.parametrize("page", PAGES, ids=ids)(function)


# ---------------------------------------------------------------------- README itself


def test_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 2200


def test_readme_shows_the_method_and_both_commands_at_once():
    lines = README.splitlines()
    assert any("──►" in line for line in lines[:12])
    shell = [line.split("#")[0].split("&&") for line in lines[:20] if line.startswith("pip ")]
    commands = [command.strip() for line in shell for command in line[1:]]
    assert commands == ["torchrun train_ganpo.py", 'pytest -m "not slow"']


def test_readme_names_every_file_of_the_root_and_every_folder():
    table = README.split("## Files")[1].split("\n## ")[0]
    named = {target for _, target in re.findall(r"^\| \[(\S+)\]\((\S+)\)", table, re.M)}
    files = {p.name for p in ROOT.glob("*.py")} | {"plain_chat.jinja"}
    folders = {p.name for p in ROOT.iterdir() if [*p.glob("*.py")]} | {"docs"}
    assert named == files | folders


def test_readme_shows_lines_of_the_committed_run():
    """But for the times, which every run has its own of."""

    def numbers(text):
        return re.findall(r"\| opo .* \| grad \S+|^ +\d\.\d +\d.* \+- .*$", text, re.M)

    log = numbers((ROOT / "assets/first_command/log.txt").read_text())
    assert len(log) > 96 and len(numbers(README)) >= 4
    for page in PAGES:
        assert {*numbers(PAGES[page])} <= {*log}, page.name


def test_every_step_of_algorithm_1_is_a_function_where_readme_says():
    table = README.split("## Algorithm 1 beside the code")[1].split("\n## ")[0]
    places = [row.split("|")[3] for row in table.splitlines() if row.startswith("|")][2:]
    names = 0
    for place in places:
        files = ["train_ganpo.py", *re.findall(r"in (\w+\.py)", place)]
        code = "".join((ROOT / file).read_text() for file in files)
        for name in re.findall(r"`(\w+)`", place):
            assert re.search(rf"^ *def {name}\(", code, re.M), (name, files)
            names += 1
    assert names > 10


# ---------------------------------------------------------------------- all pages


def commands_of(text):
    """Every command that starts python or torchrun: its words, after `&&` and without comments."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^(?:.*&& )?((?:python|torchrun) .*)", text, re.M)
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", text)
    return [shlex.split(line, comments=True) for line in lines]


@each_page
def test_readmes_commands_are_understood(page, tmp_path, monkeypatch):
    """By the programs' own parsers; that they run, in small, is what the other tests show."""
    monkeypatch.chdir(tmp_path)
    for words in commands_of(PAGES[page]):
        at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        at += words[at] == "-m"
        name, argv = words[at], words[at + 1 :]
        if name in PROGRAMS:
            parsed = PROGRAMS[name].parse_args(argv)
            if name == "tools.bench":
                settings.parse_args(parsed[1])
        elif name in FORKS:
            assert argv[0].removeprefix("--") in settings.flags().format_help()
        else:
            file = ROOT / name if name.endswith(".py") else ROOT / f"{name.replace('.', '/')}.py"
            assert file.is_file(), words


def test_every_program_is_started_somewhere():
    started = [word for text in PAGES.values() for words in commands_of(text) for word in words]
    assert {*PROGRAMS} <= {*started}


@each_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", path.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in slugs, target


def options_of(program, monkeypatch):
    """Every flag that a program's parser knows."""
    found = []

    class Done(Exception):
        pass

    def stop(parser, *_):
        found.extend(word for action in parser._actions for word in action.option_strings)
        raise Done

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Done):
            program.parse_args([])
    return found


def test_every_flag_that_a_page_names_exists(monkeypatch):
    known = {word for p in PROGRAMS.values() for word in options_of(p, monkeypatch)}
    known |= {f"--{name}" for name in (*OF_TORCHRUN, *OF_VIEWERS)}
    known |= {"--kills"}  # tests/test_reliability.py
    assert {"--lambda_adv", "--temperatures", "--estimate", "--aligner", "--quick"} <= known
    for page, text in PAGES.items():
        ours = re.sub(r"--vs \"[^\"]*\"|^lm_eval.*", "", text.replace("\\\n", " "), flags=re.M)
        unknown = {*re.findall(r"(?<![\w-])--[a-z]\w*", ours)} - known
        assert not unknown, (page.name, unknown)


@each_page
def test_every_file_function_and_test_that_a_page_names_exists(page):
    """What stands in code font: files by their path, functions with their module."""
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    tests = "".join(
        path.read_text() for path in [*TESTS.glob("test_*.py"), *ROOT.glob("test_*.py")]
    )
    modules = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    for name in re.findall(r"`([^`\s]+)`", text):
        if re.fullmatch(r"[\w/]+\.(py|jinja)", name) and name not in FORKS:
            assert (ROOT / name).is_file(), name
        elif re.fullmatch(r"test_\w+", name):
            assert re.search(rf"^def {name}\(", tests, re.M), name
        elif (dotted := re.fullmatch(r"(\w+)\.(\w+)", name)) and dotted[1] in modules:
            assert re.search(rf"^(def |class )?{dotted[2]}\b", modules[dotted[1]], re.M), name
    assert not re.search(r"\.py:\d+|\bline \d+ of `?\w+\.py", text)  # no line numbers of code


def test_promises_name_tests_that_exist():
    text, code = PAGES[DOCS / "reliability.md"], (TESTS / "test_reliability.py").read_text()
    promised = re.findall(r"\| `(test_\w+)` \|", text)
    assert len(promised) > 10
    for name in promised:
        assert re.search(rf"^def {name}\(", code, re.M), name


def test_readme_explains_every_column_of_metrics_csv():
    table = PAGES[DOCS / "log.md"].split("## Columns of metrics.csv")[1].split("\n## ")[0]
    names = re.findall(r"^\| ([a-z_, ]+) \|", table, re.M)[1:]  # without the table's head
    explained = [name for row in names for name in row.split(", ")]
    assert sorted(explained) == sorted(report.COLUMNS)
    for name in (*report.EVAL_COLUMNS[1:], *report.FINAL_COLUMNS[:3]):
        assert f"`{name}`" in table, name


def test_readme_choices_are_those_that_the_code_cites():
    rows = {int(k) for k in re.findall(r"^\| (\d+) \|", PAGES[DOCS / "choices.md"], re.M)}
    files = [*ROOT.glob("*.py"), *ROOT.glob("apo/*.py"), *ROOT.glob("miniature/*.py")]
    code = "".join(p.read_text() for p in files if not p.name.startswith("test_"))
    cited = {int(k) for k in re.findall(r"\[choice (\d+)\]", code)}
    assert rows == set(range(1, max(rows) + 1)) == cited
    for page, text in PAGES.items():
        assert {int(k) for k in re.findall(r"\[choice (\d+)\]", text)} <= rows, page.name


# ---------------------------------------------------------------------- forks

FORKS = ("my_loss.py", "trl_peer.py")  # a reader's own file; the other side of a comparison
OTHERS = re.findall(r"```python\n(.*?)```", PAGES[DOCS / "forking.md"], re.S)
LOSS, CRITIC, GAME, CONVERSION = OTHERS


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Writes code to a file of its own and runs that as a program with a command line.

    What it registers or replaces is undone afterwards.
    """
    for table in (losses.OPO_LOSSES, discriminator.DISCRIMINATORS):
        for name in [*table]:
            monkeypatch.setitem(table, name, table[name])
    before = [{*losses.OPO_LOSSES}, {*discriminator.DISCRIMINATORS}]
    for name in ("update_discriminators", "adversarial_loss"):
        monkeypatch.setattr(train_ganpo, name, getattr(train_ganpo, name))

    def run_as_file(code, *argv):
        path = tmp_path / "mine.py"
        path.write_text(code)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, argv)])
        return runpy.run_path(str(path), run_name="__main__")

    yield run_as_file
    for table, names in zip((losses.OPO_LOSSES, discriminator.DISCRIMINATORS), before, strict=True):
        for name in {*table} - names:
            del table[name]


def test_readmes_other_preference_loss_trains(fork, tiny_world, tmp_path):
    (in_readme,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert in_readme == LOSS
    fork(LOSS, *flags(tiny_world, tmp_path / "r", "--loss=hinge", "--epochs=4"))
    rows = rows_of(tmp_path / "r" / "metrics.csv")
    assert rows[0]["loss_opo"] == 1 and rows[-1]["loss_opo"] < 0.9


def test_readmes_other_critic_plays(fork, tiny_world, tmp_path):
    argv = flags(tiny_world, tmp_path / "r", "--critic=last", "--disc_lr=1e-2", "--epochs=4")
    kind = fork(CRITIC, *argv)["LastTokenDiscriminator"]
    rows = rows_of(tmp_path / "r" / "metrics.csv")
    assert rows[-1]["loss_disc_pos"] < rows[0]["loss_disc_pos"]
    h, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    critic, other = kind(32, 16, 0.9), h.clone()
    other[0, 3:] = 9.0  # padding
    assert torch.equal(critic(h, mask), critic(other, mask))


def replace_the_game(path, rank):
    runpy.run_path(path, run_name="mine")


def test_readmes_other_game_is_played_the_same_on_two_ranks(fork, tiny_world, tmp_path):
    more = "--disc_lr=1e-2", "--epochs=4"
    fork(GAME, *flags(tiny_world, tmp_path / "1", *more, "--micro_batch_size=8"))
    alone = rows_of(tmp_path / "1" / "metrics.csv")
    two = dict(ranks=2, prepare=partial(replace_the_game, str(tmp_path / "mine.py")))
    shared, _ = run(tiny_world, tmp_path / "2", *more, "--micro_batch_size=3", **two)
    assert abs(alone[0]["loss_adv"] - 2 * LN2) < 0.2
    assert alone[-1]["disc_grad_norm"] > 0 and alone[-1]["loss_adv"] != alone[0]["loss_adv"]
    assert len(alone) == 12 and "d_ra" not in alone[0]
    for a, b in zip(alone, shared, strict=True):
        close(a, b, 1e-5)


def test_readmes_other_data_set_is_read(fork, tmp_path, monkeypatch):
    def row(i, *scores):
        answers = [{"response": f"answer {i} {s}", "overall_score": s} for s in scores]
        return {"instruction": f"Say {i}.", "completions": answers}

    rows = datasets.Dataset.from_list([row(0, 2.0, 9.5, 4.0), row(1, 3.0), row(2, 1.0, 7.0)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.chdir(tmp_path)
    fork(CONVERSION)
    found = load_pairs(str(Path("pairs.jsonl").resolve()), "train", tiny(), 64).triplets
    texts = [tiny().decode(ids).replace(" ", "") for t in found for ids in (t.chosen, t.rejected)]
    assert len(texts) == 4
    for text, score in zip(texts, ("9.5", "2.0", "7.0", "1.0"), strict=True):
        assert score in text
