"""Claims about the programs' command lines: flags, presets, and bad input, refused at once.

python -m pytest -q tests/test_cli.py -m "not slow"
"""

import gzip
import inspect
import json
import re
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import distributed
import eval_alpaca
import reward_model
import settings
import train_ganpo
from apo import train_apo
from checkpoint import load_discriminators
from data import InputError, user_chat
from discriminator import DISCRIMINATORS
from helpers import (
    LN2,
    SHARED,
    close,
    command,
    flags,
    furthest,
    lines_of,
    make_model,
    make_rows,
    rows_of,
    run,
    weights_of,
    write_lines,
)
from losses import OPO_LOSSES
from miniature import world

# ---------------------------------------------------------------------- flags and presets


def actions():
    """Every flag of train_ganpo.py but --help."""
    return {a.dest: a for a in settings.flags()._actions if a.dest != "help"}


def test_there_are_few_flags_and_each_help_names_its_default():
    assert len(actions()) <= 45
    for name, action in actions().items():
        inside = re.search(r"\[(.+)\]$", action.help)
        assert inside, f"--{name}: {action.help!r} ends with no [default]"
        if action.default not in (None, False):
            assert str(action.default).removesuffix(".0") in inside[1], f"--{name}: {action.help}"


def test_the_defaults_that_a_help_names_are_those_of_the_presets():
    """Numbers that depend on the preset: the miniature's and the paper's."""
    for name, action in actions().items():
        named = {float(x) for x in re.findall(r"\b\d+(?:\.\d+)?(?:e-?\d+)?\b", action.help)}
        for preset in ("mini", "gemma-2-2b-it", "llama-3-8b-instruct"):
            value = settings.PRESETS[preset].get(name)
            if isinstance(value, int | float):
                assert value in named, f"--{name}: {action.help} lacks {preset}'s {value}"


def test_presets_and_derived_defaults():
    gemma = train_ganpo.parse_args(["--preset=gemma-2-2b-it", "--lr=4e-7"])
    assert gemma.disc_lr == pytest.approx(2e-7) and gemma.lambda_adv == 1 and gemma.beta == 0.1
    assert (
        gemma.eval_split == "test"
        and gemma.save_every == 50
        and gemma.ref_model == "google/gemma-2-2b-it"
    )
    llama = train_ganpo.parse_args(["--preset=llama-3-8b-instruct", "--loss=simpo"])
    assert (llama.beta, llama.gamma_beta_ratio, llama.disc_layers) == (10, 0.3, 4)
    mini = train_ganpo.parse_args(["--loss=simpo", "--disc_lr=5e-5", "--seed=3"])
    assert (mini.beta, mini.disc_lr, mini.lambda_adv, mini.eval_every) == (2, 5e-5, 0.1, 32)
    assert mini.model == mini.ref_model == "out/mini/seed3/model"
    assert mini.eval_split == "out/mini/seed3/test.jsonl"
    own = train_ganpo.parse_args(["--dataset=mine.jsonl"])
    assert (own.eval_split, own.eval_every) == (None, 0)
    own = train_ganpo.parse_args(["--preset=gemma-2-2b-it", "--dataset=mine.jsonl"])
    assert own.eval_split is None and own.eval_every == 0


@pytest.mark.parametrize(
    "preset, family",
    [
        ("gemma-2-2b-it", "gemma2"),
        pytest.param("llama-3-8b-instruct", "llama", marks=pytest.mark.slow),
    ],
)
def test_the_papers_presets_train_a_tiny_model_of_their_family(
    preset, family, tiny_world, tmp_path
):
    """bf16 compute, critics of Fig 10 with dropout; the start is checked to bf16's tolerance."""
    train_ganpo.main([
        f"--preset={preset}", f"--model={tiny_world / family}", "--batch_size=8", "--max_length=64",
        f"--dataset={tiny_world / 'train.jsonl'}", "--max_steps=2", "--checkpointing",
        f"--out_dir={tmp_path / 'r'}",
    ])  # fmt: skip
    first, _ = rows_of(tmp_path / "r" / "metrics.csv")
    assert abs(first["loss_opo"] - LN2) < 2e-3 and first["disc_lr"] == first["lr"] / 2
    critics = load_discriminators(tmp_path / "r" / "discriminators.pt")
    assert len(critics["disc_pos"].layers) == {"gemma2": 2, "llama": 4}[family]


USELESS = [  # a loss or critic, and a flag that it does not use
    *((f"--critic={kind}", flag) for kind in ("paired", "paired_h") for flag in (
        "--disc_layers=3", "--disc_dropout=.1", "--ema_decay=.5", "--adv_loss=nonsaturating")),
    ("--critic=mlp", "--disc_layers=3"), ("--critic=mlp", "--disc_dropout=.1"),
    *((f"--loss={loss}", "--gamma_beta_ratio=.5") for loss in ("dpo", "ipo", "sft")),
]  # fmt: skip


@pytest.mark.parametrize("chosen, useless", USELESS)
def test_a_flag_that_the_chosen_loss_or_critic_does_not_use_is_refused(chosen, useless):
    reason, name = chosen.replace("=", " "), useless.split("=")[0]
    for argv in ([chosen, useless], [useless, chosen]):
        with pytest.raises(InputError, match=f"^{reason} does not use {name}$"):
            train_ganpo.parse_args(argv)


def test_every_flag_is_of_use_to_some_setting():
    """Each flag of critics is taken with one critic, and each default of a loss is a flag."""
    for name in settings.OF_CRITICS:
        assert name in actions()
    for loss in OPO_LOSSES.values():
        assert {*loss.defaults} <= {*actions()}
    takes = {p for cls in DISCRIMINATORS.values() for p in inspect.signature(cls).parameters}
    assert {*settings.OF_CLASS.values()} <= takes


@pytest.mark.parametrize("without, reason", [
    (["--lambda_adv=0"], "--lambda_adv 0"), (["--critic=mse", "--lambda_adv=1"], "--critic mse"),
])  # fmt: skip
def test_flags_of_critics_are_named_in_the_header_of_a_run_without_one(
    without, reason, tiny_world, tmp_path, capsys
):
    """One command line serves GANPO and its baselines, so these are not refused."""
    more = (*without, "--disc_lr=1e-3", "--ema_decay=0", "--max_steps=1")
    run(tiny_world, tmp_path / "r", *more)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [x for x in lines if x.startswith("not used with")]
    named, names = re.fullmatch(r"not used with (.*): (.*)", line).groups()
    assert named == reason
    assert {*names.split(", ")} == {"--disc_lr", "--ema_decay", "--disc_hidden"}
    run(tiny_world, tmp_path / "s", *more[len(without) :])
    assert "not used with" not in capsys.readouterr().out


def test_other_given_flags_that_have_no_effect_are_named_with_the_reason():
    argv = ["--loss=sft", "--lambda_adv=0", "--critic=mlp", "--ref_model=m", "--max_steps=1"]
    argv += ["--eval_split=test", "--eval_every=0", "--epochs=3"]
    assert settings.unused_flags(train_ganpo.parse_args(argv), argv) == {
        "--lambda_adv 0": ["--critic"],
        "--loss sft": ["--ref_model"],
        "--eval_every 0": ["--eval_split"],
        "--max_steps": ["--epochs"],
    }


# ---------------------------------------------------------------------- --config


@pytest.mark.parametrize("argv", [
    ["--preset=gemma-2-2b-it", "--lr=4e-7", "--dataset_config=a", "--strip_thinking"],
    ["--loss=simpo", "--seed=3", "--lambda_adv=0", "--disc_layers=3", "--epochs=2"],
    ["--critic=paired_h", "--dataset=mine.jsonl", "--checkpointing"],
    ["--preset=mini-paired", "--disc_hidden=32", "--beta=0.1"],
    ["--critic=mlp", "--ema_decay=0", "--dataset=a.jsonl", "--eval_split=b.jsonl", "--keep=1"],
])  # fmt: skip
def test_the_config_of_a_run_stands_for_the_flags_that_made_it(argv, tmp_path):
    """Settings that no critic of the run uses are in it too, and neither refused nor named."""
    args, file = train_ganpo.parse_args(argv), tmp_path / "config.json"
    held = vars(args) | {"out_dir": "elsewhere", "resume": True, "data_fingerprint": "f"}
    file.write_text(json.dumps(held | {"versions": {}, "total_steps": 3}))
    again = [f"--config={file}"]
    assert vars(train_ganpo.parse_args(again)) == vars(args)
    assert settings.unused_flags(args, again) == settings.unused_flags(args, argv)


def test_flags_on_the_command_line_win_and_others_follow_from_them(tmp_path):
    args = train_ganpo.parse_args(["--lr=1e-3", "--seed=2"])
    (tmp_path / "run.json").write_text(json.dumps(vars(args) | {"data_fingerprint": "f"}))
    new = train_ganpo.parse_args([f"--config={tmp_path / 'run.json'}", "--lr=2e-3", "--seed=5"])
    assert (args.disc_lr, new.disc_lr) == (pytest.approx(1e-2), pytest.approx(2e-2))
    assert new.model == "out/mini/seed5/model"  # as if the first command had had this seed
    by_hand = {"preset": "mini-paired", "lr": 1e-3, "disc_lr": 0.5, "batch_size": 4}
    by_hand |= {"out_dir": "out/x", "checkpointing": True, "strip_thinking": False}
    by_hand["max_steps"] = None
    (tmp_path / "hand.json").write_text(json.dumps(by_hand))
    new = train_ganpo.parse_args(["--lr=2e-3", "--config", str(tmp_path / "hand.json")])
    assert (new.critic, new.lr, new.disc_lr, new.batch_size) == ("paired", 2e-3, 0.5, 4)
    assert (new.out_dir, new.checkpointing, new.strip_thinking) == ("out/x", True, False)


BAD_FILES = [  # what a file of flags holds, and what the one line must say after its name
    (None, "No such file"),
    ("{", "Expecting property name"),
    ("[]", "no JSON object of flags"),
    ('{"lr": 1e-4, "lr": 1e-3}', "lr is given twice"),
    ('{"lamda_adv": 1, "lr": 1e-3, "size": 2}', "no flag of train_ganpo.py: lamda_adv, size"),
    ('{"config": "other.json"}', "no flag of train_ganpo.py: config"),
    ('{"help": true}', "no flag of train_ganpo.py: help"),
    ('{"lr": NaN}', "argument --lr: nan is not in"),
    ('{"lr": "fast"}', "argument --lr: 'fast' is not a valid float"),
    ('{"lr": true}', "lr is true, not a text or a number"),
    ('{"batch_size": [8]}', "batch_size is [8], not a text or a number"),
    ('{"batch_size": 2.5}', "argument --batch_size: '2.5' is not a valid int"),
    ('{"loss": "ppo"}', "argument --loss: invalid choice: 'ppo'"),
    ('{"preset": "mini", "checkpointing": 1}', "checkpointing is 1, not true or false"),
    ('{"template_day": "tomorrow"}', "Invalid isoformat string: 'tomorrow'"),
]


@pytest.mark.parametrize("text, message", BAD_FILES)
def test_a_file_of_flags_that_cannot_be_used_is_one_line_with_its_name(text, message, tmp_path):
    file = tmp_path / "flags.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as refused:
        train_ganpo.main([f"--config={file}"])
    line = str(refused.value)
    assert line.startswith(f"train_ganpo.py: --config {file}: ") and message in line
    assert "\n" not in line


def test_a_flag_of_a_file_that_nothing_uses_is_refused_or_named_like_any_other(tmp_path):
    file = tmp_path / "flags.json"
    file.write_text('{"critic": "mlp", "disc_layers": 2, "lambda_adv": 0}')
    with pytest.raises(InputError, match="^--critic mlp does not use --disc_layers$"):
        train_ganpo.parse_args([f"--config={file}"])
    argv = [f"--config={file}", "--critic=transformer"]
    named = settings.unused_flags(train_ganpo.parse_args(argv), argv)
    assert named == {"--lambda_adv 0": ["--critic", "--disc_layers"]}


def test_a_run_is_repeated_from_its_config_json_and_resumed(
    tiny_world, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    more = "--loss=simpo", "--beta=3", "--critic=mlp", "--seed=4", "--micro_batch_size=4"
    _, first = run(tiny_world, tmp_path / "r", *more)
    config, printed = tmp_path / "r" / "config.json", capsys.readouterr().out
    beside_flags = {*json.loads(config.read_text())} - {*actions()}
    assert beside_flags == {*settings.NO_FLAGS}  # a new name must be added there
    argv = [f"--config={config}"]
    train_ganpo.main([*argv, "--stop_after=1"])  # a folder of its own
    train_ganpo.main([*argv, "--out_dir=out/run-000", "--resume"])
    out = tmp_path / "out" / "run-000"
    assert furthest(first, weights_of(out)) == 0
    assert "resumed after step 1" in (again := capsys.readouterr().out)
    header, later = (re.findall(r"preset .*(?=; all)", text)[-1] for text in (printed, again))
    assert later == f"{header} resume=True"


# ---------------------------------------------------------------------- bad input

BAD = [  # flags, and what the one line must say
    (["--nonsense=1"], "unrecognized arguments: --nonsense"),
    (["--lamda_adv=1"], "unrecognized arguments"),
    (["--preset=gpt-5"], "invalid choice: 'gpt-5'"),
    (["--lr=nan"], "--lr: nan is not in"),
    (["--lr=inf"], "--lr: inf is not in"),
    (["--lr=-1e-3"], "--lr: -1e-3 is not in"),
    (["--beta=0"], "--beta: 0 is not in (0"),
    (["--ema_decay=1"], "--ema_decay: 1 is not in"),
    (["--warmup=1.5"], "--warmup: 1.5 is not in [0, 1]"),
    (["--batch_size=0"], "--batch_size: 0 is not in [1"),
    (["--batch_size=2.5"], "--batch_size: '2.5' is not a valid int"),
    (["--batch_size=64"], "fewer pairs than --batch_size 64"),
    (["--dataset=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--split=test"], "no split 'test'; a single file has one, 'train'"),
    (["--model=nowhere/at/all"], "--model nowhere/at/all: no such folder"),
    (["--max_length=2"], "fewer pairs than --batch_size 8: 0 of 28 rows; dropped: prompt leaves"),
    (["--out_dir=/proc/run"], "--out_dir"),
    (["--max_length=512"], "--max_length 512 is beyond the model's 256 positions"),
    (["--chat_template=nowhere.jinja"], "--chat_template nowhere.jinja: "),
    (["--eval_every=2"], "pass --eval_split"),
    (["--resume"], "no run to resume"),
]  # fmt: skip


@pytest.mark.parametrize(
    "bad, message", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_input_is_one_line_before_any_model_is_loaded(
    bad, message, tiny_world, tmp_path, monkeypatch
):
    monkeypatch.setattr("policy.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(SystemExit) as stop:
        train_ganpo.main(flags(tiny_world, tmp_path / "r", *bad))
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert stop.value.code not in (0, None)
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------------- input before the miniature


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    """An empty folder to run in, where the miniature must not be built."""
    monkeypatch.chdir(tmp_path)

    def built(*_, **__):
        pytest.fail("the miniature was built for input that is no good")

    monkeypatch.setattr(world, "build", built)
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(40)]
    write_lines(tmp_path / "good.jsonl", rows)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9])
    write_lines(tmp_path / "columns.jsonl", [{"text": "a", "label": 1}] * 40)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.csv").write_text("step\n")
    (tmp_path / "used" / "config.json").write_text('{"data_fingerprint": ""}')
    make_model(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    return tmp_path


def refused_at_once(program, argv):
    """The one line, of less than ten seconds and one line."""
    begin = time.process_time()  # a cold disk and other tests do not count
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    assert time.process_time() - begin < 10
    message = str(stop.value)
    stand_in = str(Path(tempfile.gettempdir(), tempfile.gettempprefix()))  # its path means nothing
    assert "\n" not in message and stand_in not in message, message
    return message


FIRST = [  # what a user of the miniature may get wrong; it takes more than a minute to build
    (["--dataset=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--dataset=cut.jsonl.gz"], "cut.jsonl.gz: cannot be read"),
    (["--dataset=columns.jsonl"], "columns.jsonl: .*text, label; accepted"),
    (["--eval_split=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--model=bare"], "--model bare: a model folder without weights"),
    (["--model=nowhere/at/all"], "--model nowhere/at/all: no such folder"),
    (["--ref_model=nowhere/at/all"], "--ref_model nowhere/at/all: no such folder"),
    (["--out_dir=used"], "used holds a run: pass --resume, or another --out_dir"),
    (["--out_dir=good.jsonl/run"], "--out_dir.*good.jsonl.*[Nn]ot a directory"),
    (["--resume", "--out_dir=nothing"], "nothing: no run to resume"),
    (["--chat_template=nowhere.jinja"], "--chat_template nowhere.jinja: there is no such file$"),
    (["--chat_template=."], r"--chat_template \.: there is no such file$"),
    (["--seed=99999999999999999999"], "--seed: 9+ is not in"),
    (["--timeout=1e300"], "--timeout: 1e300 is not in"),
    (["--disc_hidden=10000000"], "--disc_hidden: 10000000 is not in"),
    (["--dataset="], "--dataset: its value is empty$"),
    (["--model", ""], "--model: its value is empty$"),
    (["--out_dir=r\udce4un"], r"'--out_dir=r\\udce4un' is no valid UTF-8"),
    (["--lamda_adv=1"], "unrecognized arguments: --lamda_adv=1"),
    (["--lr=nan"], "--lr: nan is not in"),
    (["--batch_size=100000"], "seed0/train.jsonl: fewer pairs than --batch_size 100000"),
    (["--dataset=good.jsonl", "--batch_size=64"], "good.jsonl: fewer pairs than --batch_size 64"),
    (["--max_length=100000"], "--max_length 100000 is beyond the model's 512 positions"),
    (["--max_length=3"], "fewer pairs than --batch_size 32: .*prompt leaves no room"),
    (["--split=test"], "no split 'test'; a single file has one, 'train'"),
    (["--attention=flex"], "--attention flex needs a GPU and bfloat16"),
    (["--critic=paired", "--ema_decay=0"], "--critic paired does not use --ema_decay"),
]


@pytest.mark.parametrize("argv, message", FIRST, ids=lambda x: " ".join(x) * isinstance(x, list))
def test_bad_input_is_refused_in_seconds_before_the_miniature_is_built(
    argv, message, nothing_built
):
    assert re.match(f"train_ganpo.py: .*{message}", refused_at_once(train_ganpo, argv))
    assert not (nothing_built / "out" / "run-000").exists()


OTHERS = [
    (reward_model, ["--dataset=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (reward_model, ["--model=bare"], "--model bare: a model folder without weights"),
    (reward_model, ["--eval_split=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (reward_model, ["--batch_size=100000"], "fewer pairs than --batch_size 100000"),
    (reward_model, ["--max_length=100000"], "--max_length 100000 is beyond"),
    (eval_alpaca, ["--model=bare"], "--model bare: a model folder without weights"),
    (eval_alpaca, ["--model=nowhere/at/all"], "--model nowhere/at/all: no such folder"),
    (eval_alpaca, ["--model=out/mini/seed0/model", "--max_new_tokens=500"], "--max_new_tokens 500"),
    (eval_alpaca, ["--model=out/mini/seed0/model", "--baseline=bare"], "--baseline bare: a model"),
    (eval_alpaca, ["--model=out/mini/seed0/model", "--chat_template=nowhere"], "--chat_template"),
    (eval_alpaca, ["--model=out/mini/seed0/model", "--out=good.jsonl/e"], "--out good.jsonl/e: "),
    (eval_alpaca, ["--model=m", "--annotations=a.json"], "--judge mini does not use --annotations"),
    (train_apo, ["--golden=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (train_apo, ["--model=bare"], "--model bare: a model folder without weights"),
    (train_apo, ["--held_out=columns.jsonl"], "columns.jsonl: .*text, label; accepted"),
    (train_apo, ["--batch_size=100000"], "--batch_size 100000: only"),
    (train_apo, ["--rounds=4"], "--lr: 3 rates for 4 rounds"),
]


@pytest.mark.parametrize(
    "program, argv, message", OTHERS, ids=lambda x: getattr(x, "__name__", str(x)[:40])
)
def test_other_programs_refuse_bad_input_before_the_miniature_is_built(
    program, argv, message, nothing_built
):
    name = {train_apo: "apo.train_apo"}.get(program, f"{program.__name__}.py")
    assert re.match(f"{name}: .*{message}", refused_at_once(program, argv))


# ---------------------------------------------------------------------- processes


MEETING = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("program", [train_ganpo, reward_model, eval_alpaca])
@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "1"}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but not MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2, but RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4, but RANK is not set"),
        ({"PMI_SIZE": "8"}, "PMI_SIZE is 8, but RANK is not set"),
        (MEETING | {"RANK": "x"}, "RANK is 'x', which is no number"),
        (MEETING | {"RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_processes_that_were_not_told_how_to_meet_are_refused(
    program, variables, message, nothing_built, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    argv = ["--model=out/mini/seed0/model"] * (program is eval_alpaca)
    line = refused_at_once(program, argv)
    assert f": {message}: start several processes by torchrun --nproc_per_node N " in line


def test_ranks_that_cannot_meet_are_one_line(nothing_built, monkeypatch):
    for name, value in (MEETING | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    late = mock.Mock(side_effect=torch.distributed.DistStoreError("Timed out after 4 seconds."))
    monkeypatch.setattr("torch.distributed.init_process_group", late)
    line = refused_at_once(train_ganpo, [])
    assert line.endswith(
        "could not meet the other ranks at 127.0.0.1:1: Timed out after 4 seconds."
    )


def test_a_launcher_of_one_process_is_no_obstacle(tiny_world, tmp_path, monkeypatch):
    for name in distributed.OTHER_LAUNCHERS:
        monkeypatch.setenv(name, "1")
    rows, _ = run(tiny_world, tmp_path / "r", "--max_steps=1")
    assert [row["step"] for row in rows] == [1]


# ---------------------------------------------------------------------- bad input of other kinds


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_numbers(
    tiny_world, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    args = train_ganpo.parse_args(flags(tiny_world, tmp_path / "r"))
    with pytest.raises(ValueError, match="--batch_size 8 is not divisible by 3 ranks"):
        train_ganpo.check_input(args, torch.device("cpu"))


def test_a_dtype_that_the_gpu_cannot_do_is_refused(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    args = train_ganpo.parse_args(flags(tiny_world, tmp_path / "r", "--dtype=bfloat16"))
    with pytest.raises(ValueError, match="--dtype bfloat16: this GPU does not"):
        train_ganpo.check_input(args, torch.device("cpu"))


def test_a_line_of_a_megabyte_and_nul_bytes_train(tiny_world, tmp_path):
    rows = (tiny_world / "train.jsonl").read_text()
    for chosen in ("a" * 1_000_000, "ab \0 cd\0", "\0"):
        rows += json.dumps({"prompt": "abc", "chosen": chosen, "rejected": "b"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    begin = time.process_time()
    run(tiny_world, tmp_path / "r", f"--dataset={tmp_path / 'rows.jsonl'}", "--micro_batch_size=3")
    assert time.process_time() - begin < 20
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["pairs"] == 31 and config["notes"]["truncated"] == 1


def test_token_ids_and_latents_that_do_not_fit_are_refused(tiny_world, tmp_path):
    for name, changes in (("small", {"vocab_size": 228}), ("wide", {"hidden_size": 64})):
        make_model(tmp_path / name, **changes)
    far = [{"prompt": "a", "chosen": "\u0101", "rejected": "b"}]  # one of its tokens is 229
    held_out = f"--eval_split={write_lines(tmp_path / 'far.jsonl', far)}", "--eval_every=1"
    for flag in ("--model", "--ref_model"):
        with pytest.raises(SystemExit, match=f"beyond the vocabulary of {flag}, 228 tokens"):
            argv = f"{flag}={tmp_path / 'small'}", *held_out
            train_ganpo.main(flags(tiny_world, tmp_path / "r", *argv))
    for more in ("--lambda_adv=1", "--lambda_adv=0"):
        argv = flags(tiny_world, tmp_path / "r", f"--ref_model={tmp_path / 'wide'}", more)
        with pytest.raises(SystemExit, match="hidden size of the policy 32, of the reference 64"):
            train_ganpo.main(argv)


def test_an_out_dir_that_holds_a_run_is_refused_and_untouched(tiny_world, tmp_path):
    rows, _ = run(tiny_world, tmp_path / "r", "--max_steps=1")
    with pytest.raises(SystemExit, match="holds a run: pass --resume"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r"))
    assert rows_of(tmp_path / "r" / "metrics.csv") == rows


def test_runs_without_out_dir_take_the_next_free_folder(tiny_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [f for f in flags(tiny_world, "x", "--max_steps=1") if "out_dir" not in f]
    for _ in range(2):
        train_ganpo.main(argv)
    assert sorted(p.name for p in Path("out").iterdir()) == ["run-000", "run-001"]


# ---------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_python_and_torchrun_do_the_same(tiny_world, tmp_path):
    for name, torchrun in (("python", 0), ("torchrun", 1)):
        argv = flags(tiny_world, tmp_path / name, "--max_steps=2")
        done = command("train_ganpo.py", *argv, torchrun=torchrun)
        assert done.returncode == 0, done.stderr
    a, b = (
        load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("python", "torchrun")
    )
    assert furthest(a, b) == 0


def test_a_bad_flag_exits_non_zero_with_one_line():
    done = command("train_ganpo.py", "--lr=nan")
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "--lr: nan" in done.stderr


def real_preferences(folder):
    """A small real model and UltraFeedback; without them a random one and our own rows."""
    if SHARED.is_dir():
        return SHARED / "models/stories260K", SHARED / "prefs/ultrafeedback_trl.jsonl.gz"
    make_model(folder / "model", max_position_embeddings=512)
    make_rows(folder / "plain.jsonl", 200)
    rows = [
        {k: [*user_chat(row["prompt"]), {"role": "assistant", "content": row[k]}]
         for k in ("chosen", "rejected")}
        for row in lines_of(folder / "plain.jsonl")
    ]  # fmt: skip
    return folder / "model", write_lines(folder / "trl.jsonl", rows)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_readme_command_on_real_preferences_with_one_and_two_processes(loss, tmp_path):
    model, data = real_preferences(tmp_path)
    rows = []
    for ranks in (1, 2):
        out = tmp_path / f"{loss}{ranks}"
        done = command(
            "train_ganpo.py", f"--model={model}", f"--dataset={data}", "--max_length=512",
            "--chat_template=plain_chat.jinja", "--batch_size=32", "--max_steps=4",
            f"--loss={loss}", f"--out_dir={out}", torchrun=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows.append(rows_of(out / "metrics.csv"))
    assert len(rows[0]) == 4
    # AdamW turns gradients of rounding size into whole steps: looser with every step
    close(rows[0][0], rows[1][0], 1e-5)
    close(rows[0][3], rows[1][3], 1e-3)
