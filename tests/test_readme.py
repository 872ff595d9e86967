"""Claims about README.md: it names every file and place, its commands parse, its forks run."""

import ast
import io
import re
import shlex
import tokenize
from pathlib import Path

import bench
import datasets
import game
import plots
import reproduce
import torch
import train_apo
from test_data import tiny
from test_train import close, run, tiny_world

import discriminator
import eval_alpaca
import generate
import losses
import miniature
import report
import reward_model
import train_ganpo
from data import load_pairs

__all__ = ["tiny_world"]  # the fixture

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text()


def test_readme_names_every_file_with_its_lines_and_every_function_with_its_place():
    files = dict(re.findall(r"^\| \[(\S+)\]\(\S+\) \| (\d+) \|", README, re.M))
    assert set(files) == {p.name for p in HERE.glob("*.py")} | {"plain_chat.jinja"}
    wrong = [
        f"{name} has {count} lines"
        for name, claimed in files.items()
        if (count := len((HERE / name).read_text().splitlines())) != int(claimed)
    ]
    places = re.findall(r"`(\w+)` (\w+\.py):(\d+)", README)
    for function, name, line in places:
        lines = (HERE / name).read_text().splitlines()
        (found,) = [i for i, text in enumerate(lines, 1) if re.match(rf" *def {function}\(", text)]
        if found != int(line):
            wrong.append(f"{function} is at {name}:{found}")
    assert len(places) > 10 and not wrong, wrong


def test_readmes_commands_are_understood():
    """By the programs' own parsers; that they run, in small, is what the other tests show."""
    programs = [train_ganpo, eval_alpaca, reward_model, train_apo]
    programs += [bench, generate, miniature, plots, reproduce]
    programs, seen = {f"{p.__name__}.py": p for p in programs}, set()
    text = README.replace("\\\n", " ")
    for line in re.findall(r"^(?:python|torchrun) .*|`(?:python|torchrun) [^`]*`", text, re.M):
        words = shlex.split(line.strip("`"), comments=True)
        name = next(word for word in words if word.endswith(".py"))
        assert (HERE / name).is_file(), line
        if name in programs:
            parsed = programs[name].parse_args(words[words.index(name) + 1 :])
            if name == "bench.py":
                train_ganpo.parse_args(parsed[1])
            seen.add(name)
    assert seen == set(programs)


def test_readme_shows_the_method_and_both_commands_at_once():
    lines = README.splitlines()
    assert any("──►" in line for line in lines[:8])
    shell = [line.split("#")[0].split("&&") for line in lines[:15] if line.startswith("pip ")]
    commands = [command.strip() for line in shell for command in line[1:]]
    assert commands == ["torchrun train_ganpo.py", 'pytest -m "not slow"']


def test_readme_explains_every_column_of_metrics_csv():
    table = README.split("## Reading the log")[1].split("##")[0]
    names = re.findall(r"^\| ([a-z_, ]+) \|", table, re.M)[1:]  # without the table's head
    explained = [name for row in names for name in row.split(", ")]
    assert sorted([*explained, "step"]) == sorted(report.COLUMNS)


def test_readme_choices_are_those_that_the_code_cites():
    table = README.split("## Choices")[1].split("##")[0]
    rows = {int(k) for k in re.findall(r"^\| (\d+) \|", table, re.M)}
    code = "".join(p.read_text() for p in HERE.glob("*.py") if not p.name.startswith("test_"))
    assert rows == set(range(1, 22)) == {int(k) for k in re.findall(r"\[choice (\d+)\]", code)}


def lines_of_code(source) -> int:
    """Without blank ones, comments and docstrings."""
    lines, beside = set(), {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in beside:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(lines)


def test_no_program_or_function_is_longer_than_readme_says():
    assert lines_of_code('"""About."""\nx = 1  # one\n\n# two\ny = [\n    x,\n]\n') == 4
    promise = r"more than (\d+) lines, no function of one more than (\d+), .* `train`, with (\d+)"
    files, most, loop = map(int, re.search(promise, README).groups())
    budgets = re.search(r"Budgets in lines of code.*?: (.*?)\. \(All\s+tested", README, re.S)[1]
    budgets = {words[-2]: int(words[-1]) for words in map(str.split, budgets.split(","))}
    programs = {p for p in HERE.glob("*.py") if not p.name.startswith("test_")}
    assert {*budgets} - {p.stem for p in programs} == {"others"}
    for path in programs:
        source = path.read_text()
        assert len(source.splitlines()) <= files, path.name
        assert lines_of_code(source) <= budgets.get(path.stem, budgets["others"]), path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                limit = loop if (path.stem, node.name) == ("train_ganpo", "train") else most
                assert node.end_lineno - node.lineno < limit, (path.name, node.name)


OTHERS = re.findall(r"```python\n(.*?)```", README, re.S)
IMPORTS = (  # of a file of one's own
    "import torch\nfrom losses import implicit_rewards, opo_loss\n",
    "import torch\nimport torch.nn.functional as F\n"
    "from discriminator import Discriminator, discriminator, normalised\n",
    "import torch\nfrom distributed import all_ranks\nfrom losses import LN2, softplus\n"
    "from game import GAMES, Game, own_scores, step_critics\n",
    "",
)


def test_readmes_other_preference_loss_trains(tiny_world, tmp_path):
    try:
        exec(IMPORTS[0] + OTHERS[0], {})
        rows, _ = run(tiny_world, tmp_path / "r", "--loss=hinge", "--epochs=4")
    finally:
        losses.OPO_LOSSES.pop("hinge")
    assert rows[0]["loss_opo"] == 1 and rows[-1]["loss_opo"] < 0.9


def test_readmes_other_critic_plays(tiny_world, tmp_path):
    try:
        exec(IMPORTS[1] + OTHERS[1], {})
        rows, _ = run(tiny_world, tmp_path / "r", "--disc=last", "--disc_lr=1e-2", "--epochs=4")
    finally:
        kind = discriminator.DISCRIMINATORS.pop("last")
    assert rows[-1]["loss_disc_pos"] < rows[0]["loss_disc_pos"]
    h, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    critic, other = kind(32, 16, 0.9), h.clone()
    other[0, 3:] = 9.0  # padding
    assert torch.equal(critic(h, mask), critic(other, mask))


def add_gan(rank):
    exec(IMPORTS[2] + OTHERS[2], {})


def test_readmes_other_game_is_played_the_same_on_two_ranks(tiny_world, tmp_path):
    more = "--critic=gan", "--disc_lr=1e-2", "--epochs=4"
    try:
        add_gan(0)
        alone, _ = run(tiny_world, tmp_path / "1", *more, "--micro_batch_size=8")
    finally:
        game.GAMES.pop("gan")
    two = dict(ranks=2, prepare=add_gan)
    shared, _ = run(tiny_world, tmp_path / "2", *more, "--micro_batch_size=3", **two)
    assert abs(alone[0]["loss_adv"] - 2 * game.LN2) < 0.2
    assert alone[-1]["disc_grad_norm"] > 0 and alone[-1]["loss_adv"] != alone[0]["loss_adv"]
    assert len(alone) == 12
    for a, b in zip(alone, shared, strict=True):
        close(a, b, 1e-5)


def test_readmes_other_data_set_is_read(tmp_path, monkeypatch):
    def row(i, *scores):
        answers = [{"response": f"answer {i} {s}", "overall_score": s} for s in scores]
        return {"instruction": f"Say {i}.", "completions": answers}

    rows = datasets.Dataset.from_list([row(0, 2.0, 9.5, 4.0), row(1, 3.0), row(2, 1.0, 7.0)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.chdir(tmp_path)
    exec(OTHERS[3], {})
    monkeypatch.undo()
    found = load_pairs(str(tmp_path / "pairs.jsonl"), "train", tiny(), 64).triplets
    texts = [tiny().decode(ids).replace(" ", "") for t in found for ids in (t.chosen, t.rejected)]
    assert len(OTHERS) == len(IMPORTS) and len(texts) == 4
    for text, score in zip(texts, ("9.5", "2.0", "7.0", "1.0"), strict=True):
        assert score in text
