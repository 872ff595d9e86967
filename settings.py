"""train_ganpo.py's flags, its presets, and what follows from them before anything is loaded.

The help of a flag names its default and where that comes from: the paper's App. B, Fig 10, Eq or
Alg. 1, the authors of SimPO, or us.
"""

import cpu

import inspect
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

import paired
from attention import LAYOUTS
from data import JSON, InputError, input_error_for
from discriminator import DISCRIMINATORS
from distributed import from_rank_0, print0
from flags import (
    DTYPES,
    Parser,
    at_least_0,
    count,
    fraction,
    given_flags,
    natural,
    number,
    positive,
    seconds,
    world_folder,
)
from losses import OPO_LOSSES

# fmt: off
PAPER = dict(  # App. B and Fig 10 [choice 15]; SimPO's beta by its authors
    lambda_adv=1.0, disc_lr_ratio=0.5, simpo_beta=10.0, disc_hidden=512, disc_dropout=0.1,
    batch_size=128, max_length=2048, dtype="bfloat16", eval_split="test", eval_every=50,
    save_every=50,
)
PAIRED = dict(lambda_adv=10.0, disc_hidden=64, disc_lr=3e-3)  # found in the miniature
PRESETS = {  # what --preset sets; every flag overrides it
    "mini": dict(
        model="out/mini/seed{seed}/model", dataset="out/mini/seed{seed}/train.jsonl", lr=1e-4,
        lambda_adv=0.1, disc_lr_ratio=10.0, simpo_beta=2.0, gamma_beta_ratio=0.5, disc_layers=2,
        disc_hidden=32, disc_dropout=0.0, batch_size=32, micro_batch_size=32, max_length=256,
        dtype="float32",
        eval_split="out/mini/seed{seed}/test.jsonl", eval_every=32, save_every=0,
    ),
    "gemma-2-2b-it": PAPER | dict(
        model="google/gemma-2-2b-it", dataset="trl-lib/ultrafeedback_binarized", lr=5e-7,
        disc_layers=2, gamma_beta_ratio=0.5,  # [choice 9] [choice 16]
    ),
    "llama-3-8b-instruct": PAPER | dict(
        model="meta-llama/Meta-Llama-3-8B-Instruct", lr=1e-6, disc_layers=4, gamma_beta_ratio=0.3,
        dataset="princeton-nlp/llama3-ultrafeedback-armorm",
    ),
}


def fast_dtype() -> str:
    """Returns the precision in which a small real model trains fastest here."""
    return "bfloat16" if torch.cuda.is_available() or cpu.has_amx() else "float32"


PRESETS["smollm2-135m-instruct"] = PAPER | dict(  # ours, to be confirmed by a study of real models
    model="HuggingFaceTB/SmolLM2-135M-Instruct", dataset="trl-lib/ultrafeedback_binarized",
    lr=2e-5, disc_layers=2, gamma_beta_ratio=0.5, batch_size=16, max_length=512,
    dtype=fast_dtype(),
)
PRESETS["mini-paired"] = PRESETS["mini"] | dict(critic="paired")
# as near to the authors' code as flags allow [choice 1] [choice 4] [choice 9]
PUBLISHED = dict(adv_loss="nonsaturating", lambda_adv=0.5, disc_layers=2, disc_every=16)
PRESETS["gemma-2-2b-it-published"] = PRESETS["gemma-2-2b-it"] | PUBLISHED | dict(
    max_length=1024, warmup=0.0,  # [choice 22]
)
PRESETS["llama-3-8b-instruct-published"] = PRESETS["llama-3-8b-instruct"] | PUBLISHED


def flags() -> Parser:
    """Returns the parser of all flags; defaults that depend on the preset are set in parse_args."""
    about = "GANPO: preference optimisation with a latent adversarial regulariser"
    parser = Parser("train_ganpo.py", about, "torchrun train_ganpo.py [--flag value ...]")
    add = parser.add_argument_group("what to train").add_argument
    add("--config", metavar="FILE", help="flags as JSON, or a run's config.json [none]")
    add("--preset", choices=PRESETS, default="mini", help="settings to start from [mini, ours]")
    add("--model", help="the policy, a folder or a Hub id [preset]")
    add("--ref_model", help="the frozen reference [the model, as in DPO]")
    add("--dataset", help="Hub id, folder, or .jsonl/.json/.parquet, also .gz [preset]")
    add("--dataset_config", help="which of the data set's configs [its only or default one]")
    add("--split", default="train", help="of --dataset [train]")
    add("--eval_split", help="held-out split or a file of its own [preset; none for own data]")
    add("--strip_thinking", action="store_true", help="leave out <think>...</think> [off, ours]")
    add("--chat_template", help="a jinja file, or one of the tokenizer's [its own]")
    add("--max_length", type=number(int, 2), help="of prompt + response [2048, App. B; mini 256]")
    add = parser.add_argument_group("preference loss").add_argument
    add("--loss", choices=OPO_LOSSES, default="dpo", help="[dpo, Eq 3-4]")
    add("--beta", type=positive, help="[0.1, App. B; simpo 10, its authors, mini 2]")
    add("--gamma_beta_ratio", type=at_least_0, help="SimPO gamma / beta [0.3 or 0.5, its authors]")
    add = parser.add_argument_group("adversarial regulariser").add_argument
    add("--lambda_adv", type=at_least_0, help="0: plain --loss [1, App. B; mini 0.1; paired 10]")
    add("--critic", choices=[*DISCRIMINATORS, "mse"],
        help="paired reads h - h_ref, paired_h reads h [transformer, Fig 10]")
    add("--adv_loss", choices=["minimax", "nonsaturating"], default="minimax",
        help="[minimax, Eq 18]")
    add("--ema_decay", type=number(float, 0, 0.999999), default=0.9,
        help="alpha of the mean scores; 0: the batch's own means [0.9, App. B]")
    add("--disc_layers", type=count, help="[2, llama preset 4, App. B]")
    add("--disc_hidden", type=number(int, 1, 2**16), help="[512, Fig 10; mini 32, paired 64, ours]")
    add("--disc_dropout", type=number(float, 0, 0.99), help="[0.1, Fig 10; mini 0, ours]")
    add("--disc_lr", type=at_least_0, help="[lr / 2, App. B; mini 10 lr, paired 3e-3, ours]")
    add("--disc_every", type=count, default=1, help="steps per critics' update [1, Alg. 1]")
    add = parser.add_argument_group("LoRA, beside frozen weights").add_argument
    add("--lora_rank", type=count, help="of adapters, which alone are trained [all weights are]")
    add("--lora_alpha", type=positive, help="the adapters' scale is alpha / rank [2 rank, ours]")
    add("--lora_targets", nargs="+", metavar="NAME", help="q_proj, say [all linear layers]")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=at_least_0, help="peak [5e-7 Gemma, 1e-6 Llama, App. B; mini 1e-4,"
        " smollm2 2e-5, ours]")
    add("--warmup", type=fraction, default=0.1, help="share of steps, then cosine [0.1, App. B]")
    add("--grad_clip", type=positive, default=1.0, help="norm of the policy's gradient [1, ours]")
    add("--batch_size", type=count, help="pairs per step over all ranks [128, App. B; mini 32]")
    add("--micro_batch_size", type=count, default=8,
        help="pairs per forward and rank [8; mini 32; ours]")
    add("--micro_tokens", type=count, default=16384,
        help="tokens per forward and rank [16384, ours]")
    add("--epochs", type=count, default=1, help="passes over the data [1, App. B]")
    add("--max_steps", type=count, help="[all of the epochs']")
    add("--stop_after", type=count, help="end after so many steps, schedule unchanged [never]")
    add("--dtype", choices=DTYPES, help="of compute; weights stay float32 [bfloat16; mini float32;"
        " smollm2 bfloat16 with a GPU or AMX, else float32]")
    add("--checkpointing", action="store_true", help="recompute layers in backward [off, ours]")
    kinds = ["auto", *LAYOUTS]
    add("--attention", choices=kinds, default="auto", help="[auto: by device, dtype and model]")
    add = parser.add_argument_group("running").add_argument
    add("--save_every", type=natural, help="steps between states, 0: at the end [50; mini 0]")
    add("--keep", type=count, default=2, help="newest states that stay [2]")
    add("--eval_every", type=natural, help="steps between evaluations; 0: none [50; mini 32]")
    add("--seed", type=natural, default=0, help="of data order, critics, the miniature [0]")
    add("--out_dir", help="[the next free out/run-NNN]")
    add("--resume", action="store_true", help="go on from the newest state of --out_dir [off]")
    add("--timeout", type=seconds, default=600, help="seconds to wait for another rank [600]")
    return parser
# fmt: on


OF_SCORES = "ema_decay adv_loss".split()  # of critics whose scores have running means
OF_CLASS = {"disc_layers": "layers", "disc_dropout": "dropout"}  # flag and argument of the class
OF_CRITICS = [*OF_SCORES, *OF_CLASS, *"disc_hidden disc_lr disc_every".split()]


# What a run's config.json holds beside its flags; a new run finds its own.
NO_FLAGS = (
    "versions device ranks threads data_fingerprint held_out_fingerprint pairs dropped notes"
    " steps_per_epoch total_steps model_weights model_config ref_model_weights ref_model_config"
    " template_day"
).split()
OF_ITS_FOLDER = "out_dir resume".split()  # flags of a run that a new one from its file has not
TAKES = {  # by argparse's nargs: what JSON has for a flag
    None: ((str, int, float), "a text or a number"), 0: (bool, "true or false"),
    "+": (list, "a list"),
}  # fmt: skip
FIRST = "preset seed critic lr".split()  # on which the defaults of other flags depend


def flags_of_file(argv: list[str]) -> tuple[list[str], str | None]:
    """Returns the flags of --config FILE as words of a command line, and the file's template_day.

    A file written by hand gives all its flags. The config.json of a run holds every setting, and
    stands for the flags that differ from their defaults, so that what follows from another flag
    also follows from one on the command line. Raises InputError, which names the file, if it holds
    anything but flags and NO_FLAGS, or a value that its flag does not take.
    """
    parser, words = flags(), []
    file = parser.parse_known_args(argv)[0].config
    if file is None:
        return words, None
    with input_error_for(f"--config {file}"):
        held = JSON.decode(Path(file).read_text("utf-8-sig"))
        if not isinstance(held, dict):
            raise InputError("no JSON object of flags")
        kinds = {a.dest: a.nargs for a in parser._actions if a.dest not in ("help", "config")}
        if unknown := [k for k in held if k not in {*kinds, *NO_FLAGS}]:
            raise InputError(f"no flag of train_ganpo.py: {', '.join(unknown)}")
        day = held.get("template_day") and str(date.fromisoformat(held["template_day"]))
        of_run = "data_fingerprint" in held
        held = {k: v for k, v in held.items() if k not in NO_FLAGS and v is not None}
        for key in sorted(held, key=lambda k: k not in FIRST):
            value, (right, kind) = held[key], TAKES[kinds[key]]
            if not isinstance(value, right) or isinstance(value, bool) != (right is bool):
                raise InputError(f"{key} is {json.dumps(value)}, not {kind}")
            of_key = [f"--{key}={value}"]
            if right in (bool, list):
                of_key = [f"--{key}"] * value if right is bool else [f"--{key}", *map(str, value)]
            parser.parse_args(of_key)
            default = of_run and getattr(parse_args(words), key)
            if not of_run or key not in OF_ITS_FOLDER and value != default:
                words += of_key
    return words, day


def parse_args(argv: list[str]):
    """Returns all settings; what neither a flag nor the preset says follows from other settings.

    Flags of --config FILE count as if they stood at the beginning of the command line. Raises
    InputError for a flag that is wrong, that contradicts another one, or that the chosen loss or
    critic does not use.
    """
    words, day = flags_of_file(argv)
    argv, parser = words + argv, flags()
    first = parser.parse_known_args(argv)[0]
    preset = {
        k: v.format(seed=first.seed) if isinstance(v, str) else v
        for k, v in PRESETS[first.preset].items()
    }
    preset["critic"] = first.critic or preset.get("critic", "transformer")
    if preset["critic"] in paired.CRITICS:
        preset |= PAIRED
    derived = ("simpo_beta", "disc_lr_ratio", "eval_split", "eval_every")
    parser.set_defaults(**{k: v for k, v in preset.items() if k not in derived})
    args = parser.parse_args(argv)
    refuse_useless(args, given_flags(argv))
    if args.lora_rank and args.ref_model not in (None, args.model):
        raise InputError(
            f"--ref_model {args.ref_model}: with --lora_rank the reference is --model itself, its"
            " adapters off; leave --ref_model out, or train without --lora_rank"
        )
    args.ref_model = args.ref_model or args.model
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if args.beta is None:
        own = OPO_LOSSES[args.loss].defaults.get("beta", 0.1)  # without one, for the log's rewards
        args.beta = preset["simpo_beta"] if args.loss == "simpo" else own
    if args.disc_lr is None:
        args.disc_lr = preset["disc_lr_ratio"] * args.lr
    if args.eval_split is None and args.dataset == preset["dataset"]:
        args.eval_split = preset["eval_split"]
    if args.eval_every is None:
        args.eval_every = preset["eval_every"] if args.eval_split else 0
    if args.eval_every and not args.eval_split:
        raise InputError("--eval_every needs held-out pairs: pass --eval_split")
    if args.resume and not args.out_dir:
        raise InputError("--resume needs --out_dir")
    del args.config  # the run's own config.json holds what it said
    args.template_day = day
    return args


def refuse_useless(args, given: set[str]):
    """Raises InputError for a given flag that the chosen loss or critic does not use."""
    useless = OF_SCORES if args.critic in paired.CRITICS else []
    if args.critic in DISCRIMINATORS:
        takes = inspect.signature(DISCRIMINATORS[args.critic].__init__).parameters
        useless = useless + [flag for flag, name in OF_CLASS.items() if name not in takes]
    for name in useless:
        if name in given:
            raise InputError(f"--critic {args.critic} does not use --{name}")
    for name in ("lora_alpha", "lora_targets"):
        if name in given and not args.lora_rank:
            raise InputError(f"--{name} needs --lora_rank")
    if "gamma_beta_ratio" in given and "gamma_beta_ratio" not in OPO_LOSSES[args.loss].defaults:
        raise InputError(f"--loss {args.loss} does not use --gamma_beta_ratio")


def unused_flags(args, argv: list[str]) -> dict[str, list[str]]:
    """Returns the given flags that this run does not use, by the reason.

    They are named and not refused, so that one command line serves GANPO and its baselines.
    """
    reasons = {
        "--lambda_adv 0": (args.lambda_adv == 0, ["critic", *OF_CRITICS]),
        "--critic mse": (args.lambda_adv > 0 and args.critic == "mse", OF_CRITICS),
        f"--loss {args.loss}": (not needs_reference(args), ["ref_model"]),
        "--eval_every 0": (args.eval_every == 0, ["eval_split"]),
        "--max_steps": (args.max_steps is not None, ["epochs"]),
    }
    given = given_flags(flags_of_file(argv)[0] + argv)
    unused = {
        reason: [f"--{name}" for name in names if name in given]
        for reason, (holds, names) in reasons.items()
        if holds
    }
    return {reason: names for reason, names in unused.items() if names}


def needs_reference(args) -> bool:
    """Returns whether the reference is needed, for its log-probabilities or for its latents."""
    return OPO_LOSSES[args.loss].needs_ref or args.lambda_adv > 0


def is_miniature(path: str | None, seed: int) -> bool:
    """Returns whether a path lies directly in world_folder(seed), however it is written."""
    return path is not None and Path(path).resolve().parent == world_folder(seed).resolve()


def build_miniature(args, check: Callable):
    """Builds the miniature's world of --seed, if a path of args lies in it and it is not there yet.

    All ranks call it, rank 0 builds. Building takes more than a minute, so check(args) is called
    before, with paths to an untrained stand-in of the same shape: what cannot be used is refused at
    once. check must not communicate between ranks.
    """
    if any(is_miniature(x, args.seed) for x in vars(args).values() if isinstance(x, str)):
        from miniature import world  # imported only where it is used

        from_rank_0(lambda: world.build_after(check, args, print0), "")
