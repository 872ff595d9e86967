"""Times the training step and measures its memory, alone or beside another program.

    python -m tools.bench [WORKLOAD]                                 # DPO
    python -m tools.bench --lambda_adv 1 --disc_hidden 512           # any flags of train_ganpo.py
    python -m tools.bench WORKLOAD --vs "python peer.py WORKLOAD"    # two programs in alternation
    python -m tools.bench --shape llama3-8b --estimate 8             # computed for 8 GPUs, not run

WORKLOAD is a folder with config.json, a transformers config whose model is initialised from seed 0,
and pairs.jsonl, rows of prompt_ids, chosen_ids and rejected_ids. Without WORKLOAD the program makes
one, of the shape that --shape names. It calls train_ganpo.train_step: one step to warm up, then
--steps on consecutive batches. Tokens are real tokens, 2 * prompt + chosen + rejected for a pair,
whether or not a program pads them or shares prompts. With --json the last line is an object with
tokens_per_s, step_s and peak_gb (GiB). The program under --vs has to end with such a line.

To compare speeds on a CPU, set MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=64000000000 for both
programs: otherwise only this one keeps freed memory (cpu.py).
"""

import cpu  # noqa: F401  must come before torch

import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

import distributed
import paired
import report
import settings
import train_ganpo
from data import InputError, Triplet, input_error_for, json_lines
from flags import DTYPES, Parser, command_line, count, natural, refuse
from generate import quiet
from packing import Survey, pack, survey, tokens_in
from tools.estimate import NoEstimate, estimated_memory, run_without_data

NAMES = "prompt_ids", "chosen_ids", "rejected_ids"
# Lengths in tokens of a prompt, a chosen and a rejected answer: median, lowest, highest.
LONG = (90, 20, 1000), (240, 20, 1000), (220, 20, 1000)  # as UltraFeedback's
SHORT = (60, 20, 200), (130, 20, 400), (115, 20, 400)
SHAPES = {  # of --shape: a transformers config, and lengths
    "v32k": (
        LlamaConfig(
            vocab_size=32000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
            intermediate_size=1408,
        ), SHORT,
    ),
    "gemma2-2b": (
        Gemma2Config(
            vocab_size=256000, hidden_size=2304, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, intermediate_size=9216,
        ), LONG,
    ),
    "qwen3-0.6b": (
        Qwen3Config(
            vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, intermediate_size=3072, tie_word_embeddings=True,
        ), LONG,
    ),
    "llama3-8b": (
        LlamaConfig(
            vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, intermediate_size=14336, rope_theta=500000.0,
        ), LONG,
    ),
}  # fmt: skip
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # FLOP/s of a dense product in bfloat16
ROUNDS = 3  # of each program under --vs
RANK = int(os.environ.get("RANK", 0))
GPUS_PER_NODE = 8  # for --estimate
# Of the GPU's peak, for --estimate. The memory's speed limits it: transformers computes norms,
# activations and residuals one operation after the other, and Gemma-2 has more of them.
ASSUMED_SHARES = {"gemma2": 0.25, "other": 0.36}


# ---------------------------------------------------------------------- the workload


def make_workload(folder: Path, shape: str, pairs: int):
    """Writes a workload of random token ids to a folder; shape is a name in SHAPES."""
    config, lengths = SHAPES[shape]
    config.save_pretrained(folder)
    rng = random.Random(0)

    def ids(median, low, high):
        length = round(median * math.exp(rng.gauss(0, 0.7)))
        return [rng.randrange(10, config.vocab_size) for _ in range(min(high, max(low, length)))]

    rows = [{k: ids(*x) for k, x in zip(NAMES, lengths, strict=True)} for _ in range(pairs)]
    (folder / "pairs.jsonl").write_text(json_lines(rows))


def read_workload(folder: Path, pairs: int) -> list[Triplet]:
    """Returns the first pairs of a workload. Raises InputError if it has fewer."""
    with input_error_for(f"{folder}: no workload"):
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines[:pairs]]
        triplets = [
            Triplet(*(np.array(row[k], dtype=np.int32) for k in NAMES), i)
            for i, row in enumerate(rows)
        ]
    if len(triplets) < pairs:
        raise InputError(f"{folder}: {len(triplets)} pairs, {pairs} needed")
    return triplets


# ---------------------------------------------------------------------- measuring


class Clock:
    """Measures the seconds of each phase of a step.

    A phase that begins within another one stops the other's time. The phases "discriminators" and
    "reference" are exceptions: everything within them, a backward too, counts to them.
    """

    def __init__(self, device: torch.device):
        self.seconds, self.stack, self.device = defaultdict(float), ["other"], device
        self.last = self.now()

    def now(self) -> float:
        """Returns the time in seconds, after a GPU has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def switch(self):
        """Adds the time since the last switch to the phase that was running."""
        now = self.now()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    @contextmanager
    def phase(self, name: str) -> Iterator:
        """Adds the time of a `with` block to a phase."""
        self.switch()
        within = self.stack[-1]  # with LoRA the reference calls the policy
        self.stack.append(within if within in ("discriminators", "reference") else name)
        try:
            yield
        finally:
            self.switch()
            self.stack.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """Returns the function, changed so that its time is added to a phase."""

        def wrapper(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return wrapper

    @contextmanager
    def timing_phases(self, run) -> Iterator:
        """Times the phases of the steps that are taken in a `with` block.

        For that it replaces the functions that the step looks up when it calls them.
        """
        places = [
            (game, name, "discriminators")
            for game in (train_ganpo, paired)
            for name in ("update_discriminators", "adversarial_loss")
        ]
        places += [
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "optimiser"),
            (run.optimizer, "step", "optimiser"),
            (run.policy, "forward", "policy forward"),
        ]
        if run.ref:
            places.append((run.ref, "forward", "reference"))
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        for owner, name, phase in places:
            setattr(owner, name, self.timed(phase, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def reset_peak(device: torch.device):
    """Sets the peak that report.peak_gb returns back to the memory in use, where that is possible.

    On a CPU it is possible on Linux only.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a large matrix product here, the best of several."""
    n, best, clock = 8192 if device.type == "cuda" else 2048, 0.0, Clock(device)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    for _ in range(6):
        begin = clock.now()
        a @ b
        best = max(best, 2 * n**3 / (clock.now() - begin))
    return best


def counting() -> FlopCounterMode:
    """Returns torch's counter of operations, made to know the attention kernel of CPUs too.

    Attention is counted as if every query saw every key.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    more = {
        forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    counter = FlopCounterMode(display=False, custom_mapping=more)
    # It would count by module too, which fails where a step calls autograd.grad (paired.py).
    nothing = dict.fromkeys(("__enter__", "__exit__"), lambda: None)
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, **nothing)
    return counter


def model_flops(
    args, config: PretrainedConfig, plans: Survey, device: torch.device, recomputed: bool
) -> float:
    """Returns the operations of both models for one token of a packed row.

    The policy's forward counts three times, because backward takes twice as many operations (with
    LoRA as many, for frozen weights have no gradient), and the reference's once. Discriminators do
    not count. recomputed says whether to add the forward that --checkpointing repeats.
    """
    with run_without_data(args, config, device) as run:
        batch, flops = pack(plans.longest), 0
        again = recomputed and args.checkpointing
        trained = 2 if args.lora_rank else 3
        for lm, times in ((run.policy, trained + again), (run.ref, 1)):
            if lm is not None:
                with torch.no_grad(), counting() as counter:
                    lm(batch)
                flops += times * counter.get_total_flops()
    return flops / tokens_in(plans.longest)


def measure(args, train_args, steps: list, model_dir: str) -> dict:
    """Times the training step, prints what was measured and returns it.

    steps holds the pairs of each step; the first step warms up.
    """
    device = distributed.start(train_args.timeout)
    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    plans = survey(steps[1:], train_args, dist.get_world_size())
    try:
        shards = distributed.sharing_ranks()
        estimated = total_gb(estimated_memory(train_args, config, plans, device, shards))
    except NoEstimate as error:
        distributed.print0(error)
        estimated = None
    run = train_ganpo.build(train_args, config, device)
    run.max_steps = args.steps + 2

    def flops(recomputed):
        of_token = model_flops(train_args, config, plans, device, recomputed)
        return of_token * tokens_in(steps[-1]) / run.ranks

    # torch's counter cannot look into flex_attention
    executed = flops(True) if run.policy.attention_kind == "flex" else None
    result = {"estimated_gb": estimated} | timed_steps(run, steps, executed)
    if device.type == "cuda":
        name, needed = torch.cuda.get_device_name(), flops(False)
        shares = [needed / result["last_step_s"] / peak for k, peak in PEAKS.items() if k in name]
        result["mfu"] = shares[0] if shares else None
    if RANK == 0:
        show(result)
    distributed.stop()
    return result


def timed_steps(run, steps: list, flops: float | None = None) -> dict:
    """Takes all steps, then the last one again; returns rates, peak and seconds by phase.

    flops are the operations of the last step; None counts them in a further step.
    """
    device, dtype, timed = run.device, DTYPES[run.args.dtype], len(steps) - 1

    def batches(step, clock=None):
        load = clock.timed("data", pack) if clock else pack
        for mine in train_ganpo.my_forwards(run, steps[step]):
            yield load(mine).to(device)

    train_ganpo.train_step(run, batches(0), 0)
    rates = [matrix_rate(device, dtype)]
    reset_peak(device)
    seconds, tokens, clock = [], 0, Clock(device)
    for step in range(1, timed + 1):
        begin = clock.now()
        tokens += train_ganpo.train_step(run, batches(step), step)["tokens"]
        seconds.append(clock.now() - begin)
    peak = report.peak_gb(device)
    rates.append(matrix_rate(device, dtype))
    # phases and operations are taken from further steps, because watching them takes time
    clock = Clock(device)
    with clock.timing_phases(run):
        train_ganpo.train_step(run, batches(timed, clock), timed + 1)
    clock.switch()
    if flops is None:
        with counting() as counter:
            train_ganpo.train_step(run, batches(timed), timed + 1)
        flops = counter.get_total_flops()
    return {
        "tokens_per_s": tokens / sum(seconds),
        "step_s": statistics.mean(seconds),
        "last_step_s": seconds[-1],
        "peak_gb": peak,
        "flops": flops,
        "tflops": flops / seconds[-1] / 1e12,
        "matrix_rate_share": flops / seconds[-1] / max(rates),
        "phases": dict(clock.seconds),
    }


def show(result: dict):
    """Prints what was measured, one line and then a line for each phase."""
    estimated = result["estimated_gb"]
    print(f"{result['tokens_per_s']:,.0f} tokens/s, {result['step_s']:.2f} s per step,"
          f" peak {result['peak_gb']:.2f} GiB"
          + (f" (estimated {estimated:.2f})" if estimated else "") +
          f", {result['tflops']:.3f} TFLOP/s as executed,"
          f" {result['matrix_rate_share']:.0%} of the matrix rate measured here"
          + (f", MFU {result['mfu']:.0%}" if result.get("mfu") else ""))  # fmt: skip
    total = sum(result["phases"].values())
    for phase, s in sorted(result["phases"].items(), key=lambda x: -x[1]):
        print(f"    {phase:<16}{s:8.3f} s {s / total:6.1%}")


# ---------------------------------------------------------------------- computing


def total_gb(parts: dict[str, float]) -> float:
    """Returns the sum of bytes by part, in GiB."""
    return sum(parts.values()) / 2**30


def compute(args, train_args, steps: list, model_dir: str) -> dict:
    """For --estimate: prints and returns the memory and time that a step on GPUs needs.

    Both are computed; nothing is run, and no weight is made. steps holds the pairs of each step.
    """
    ranks, config = args.estimate, AutoConfig.from_pretrained(model_dir).get_text_config()
    plans, gpu = survey(steps, train_args, ranks), torch.device("cuda")
    parts = estimated_memory(train_args, config, plans, gpu, min(ranks, GPUS_PER_NODE))
    tokens = statistics.mean(map(tokens_in, steps))
    flops = model_flops(train_args, config, plans, gpu, True) * tokens
    share = ASSUMED_SHARES.get(config.model_type, ASSUMED_SHARES["other"])
    seconds = flops / ranks / (share * PEAKS["H200"])
    if RANK == 0:
        print(f"estimated memory per rank: {total_gb(parts):.2f} GiB")
        for part, n in parts.items():
            print(f"    {part:<28}{n / 2**30:8.2f} GiB")
        print(f"{flops / 1e12:,.0f} TFLOP per step of {tokens:,.0f} tokens in rows, {seconds:.2f} s"
              f" on {ranks} H200 at an assumed {share:.0%} of its peak, without transfers;"
              f" {plans.fewest} to {plans.most} forwards, imbalance {plans.imbalance:.1%}"
              )  # fmt: skip
    return {"estimated_gb": total_gb(parts), "flops": flops, "step_s": seconds}


# ---------------------------------------------------------------------- two programs


def last_object(command: list[str]) -> dict:
    """Runs a command and returns the JSON object in its last line.

    Raises InputError if there is none.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = None
    if not isinstance(found, dict):
        said = " ".join(done.stderr[-300:].split())
        raise InputError(f"{shlex.join(command)} printed no JSON object in its last line: {said}")
    return found


def versus(argv: list[str], other: str):
    """Runs this program and another one in alternation; prints their medians and ratios."""
    ours = [sys.executable, "-m", "tools.bench", *map(str, argv), "--json"]
    runs = [(last_object(ours), last_object(shlex.split(other))) for _ in range(ROUNDS)]
    print(f"median of {ROUNDS} runs each, in alternation{'':<8}here     other     ratio")
    for key in ("tokens_per_s", "step_s", "peak_gb"):
        values = [[np.mean(r[side].get(key, np.nan)) for r in runs] for side in (0, 1)]
        a, b = map(statistics.median, values)
        if not np.isnan(b):
            print(f"    {key:<36}{a:10.2f}{b:10.2f}{a / b:10.2f}")


# ---------------------------------------------------------------------- the command


def run_here(args, flags: list[str], folder: Path) -> dict:
    """Measures or computes one workload; folder is empty and receives workload and model."""
    pairs, workload = args.batch_size * (args.steps + 1), args.workload
    if not workload:
        make_workload(folder, args.shape, pairs)
        workload = folder
    triplets = read_workload(workload, pairs)
    steps = [triplets[i : i + args.batch_size] for i in range(0, pairs, args.batch_size)]
    with input_error_for(f"{workload}: no workload"):
        config, model_dir = AutoConfig.from_pretrained(workload), str(folder / "model")
    config.save_pretrained(model_dir)
    given = [f"--model={model_dir}", f"--batch_size={args.batch_size}", "--lambda_adv=0"]
    train_args = settings.parse_args([*given, "--max_length=2048", *flags])
    if args.estimate:
        return compute(args, train_args, steps, model_dir)
    if RANK == 0:  # the only one that reads the weights
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(model_dir)
    return measure(args, train_args, steps, model_dir)


def parse_args(argv: list[str]):
    """Returns the settings of this program, and the other flags, which are train_ganpo.py's."""
    # the folder comes first, because argparse would take the value of an unknown flag for it
    workload = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    usage = "python -m tools.bench [WORKLOAD] [--flag value ...]; other flags are train_ganpo.py's"
    parser = Parser("tools.bench", __doc__, usage)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="v32k", help="of a workload made here [v32k]")
    add("--batch_size", type=count, default=8, help="pairs per step [8]")
    add("--steps", type=natural, default=2, help="number of timed steps [2]")
    add("--json", action="store_true", help="print a JSON object as the last line")
    add("--vs", metavar="COMMAND", help="another program, to run in alternation with this one")
    add("--estimate", type=count, metavar="RANKS", help="compute for so many GPUs, run nothing")
    args, flags = parser.parse_known_args(argv[1:] if workload else argv)
    args.workload = workload
    if not (args.steps or args.estimate):
        raise InputError("--steps 0: there is nothing to time")
    if args.vs and (args.json or args.estimate):
        raise InputError("--vs prints a table of timings: pass it without --json and --estimate")
    return args, flags


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    program, argv = command_line(argv, "-m", "tools.bench")
    try:
        args, flags = parse_args(argv)
        if args.vs:
            at = next(i for i, word in enumerate(argv) if word.split("=")[0] == "--vs")
            rest = argv[:at] + argv[at + 1 + (argv[at] == "--vs") :]
            return versus(rest, args.vs)
        with tempfile.TemporaryDirectory() as folder:
            done = run_here(args, flags, Path(folder))
    except (InputError, FloatingPointError, OSError) as error:
        refuse(program, error)
    if args.json and RANK == 0:
        print(json.dumps(done))


if __name__ == "__main__":
    main()
