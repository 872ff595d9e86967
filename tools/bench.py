"""Speed and memory of the training step, alone or beside another program.

    python bench.py [WORKLOAD]                               # DPO; without one, its own workload
    python bench.py --lambda_adv 1 --disc_hidden 512         # any flags of train_ganpo.py
    python bench.py WORKLOAD --vs "python peer.py WORKLOAD"  # in alternation, and the ratios
    python bench.py --shape llama3-8b --estimate 8           # computed: memory, time on 8 GPUs

WORKLOAD holds config.json, a transformers config that is initialised from seed 0, and pairs.jsonl,
rows of prompt_ids, chosen_ids, rejected_ids. What is timed is train_ganpo.train_step itself: one
step to warm up, then --steps on consecutive batches. Tokens are real ones, 2 * prompt + chosen +
rejected, whatever a program pads or shares. With --json, and of the other program, the last line is
an object with tokens_per_s, step_s and peak_gb.

On a CPU set MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=64000000000 for both sides when it is speed
that is compared: glibc would map and fault in every large block at each operation.
"""

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
from contextlib import contextmanager
from pathlib import Path

import estimate
import game
import numpy as np
import torch
import torch.distributed as dist
from estimate import tokens_in
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaConfig

import distributed
import report
import train_ganpo
from data import InputError, Triplet, json_lines, pack
from flags import DTYPES, Parser, count, natural
from generate import quiet

NAMES = "prompt_ids", "chosen_ids", "rejected_ids"
SHORT = (60, 20, 200), (130, 20, 400), (115, 20, 400)  # median, low, high: prompt and answers
LONG = (90, 20, 1000), (240, 20, 1000), (220, 20, 1000)  # as UltraFeedback's
SHAPES = {  # of --shape: a transformers config, lengths
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
    "llama3-8b": (
        LlamaConfig(
            vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, intermediate_size=14336, rope_theta=500000.0,
        ), LONG,
    ),
}  # fmt: skip
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bf16 FLOP/s of a dense product
ROUNDS = 3  # of each program under --vs
RANK = int(os.environ.get("RANK", 0))
ASSUMED_SHARE, GPUS_PER_NODE = 0.36, 8  # of the peak, for --estimate


# ---------------------------------------------------------------------- the workload


def make_workload(folder, shape, pairs):
    config, lengths = SHAPES[shape]
    config.save_pretrained(folder)
    rng = random.Random(0)

    def ids(median, low, high):
        length = round(median * math.exp(rng.gauss(0, 0.7)))
        return [rng.randrange(10, config.vocab_size) for _ in range(min(high, max(low, length)))]

    rows = [{k: ids(*x) for k, x in zip(NAMES, lengths, strict=True)} for _ in range(pairs)]
    (folder / "pairs.jsonl").write_text(json_lines(rows))


def read_workload(folder, pairs) -> list[Triplet]:
    try:
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines[:pairs]]
        triplets = [
            Triplet(*(np.array(row[k], dtype=np.int32) for k in NAMES), i)
            for i, row in enumerate(rows)
        ]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no workload: {error}") from None
    if len(triplets) < pairs:
        raise InputError(f"{folder}: {len(triplets)} pairs, {pairs} needed")
    return triplets


# ---------------------------------------------------------------------- measuring


class Clock:
    """Seconds by phase: what is entered within a phase is not counted to that phase, except that a
    backward within the discriminators' is theirs."""

    def __init__(self, device):
        self.seconds, self.stack, self.device = defaultdict(float), ["other"], device
        self.last = self.now()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def switch(self):
        now = self.now()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    def enter(self, phase):
        self.switch()
        self.stack.append("discriminators" if self.stack[-1] == "discriminators" else phase)

    def leave(self):
        self.switch()
        self.stack.pop()

    def timed(self, phase, function):
        def wrapper(*args, **kwargs):
            self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return wrapper

    @contextmanager
    def watching(self, run):
        """The step's own functions report to this clock."""
        places = [
            (train_ganpo, "quad_scores", "discriminators"),
            (game, "own_scores", "discriminators"),
            (game.GAMES[run.args.critic], "update", "discriminators"),
            (game, "adversarial_gradient", "discriminators"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "optimiser"),
            (run.optimizer, "step", "optimiser"),
            (run.policy, "forward", "policy forward"),
            (run.ref, "forward", "reference"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places if owner]
        for owner, name, phase in places:
            if owner:
                setattr(owner, name, self.timed(phase, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory


def matrix_rate(device, dtype) -> float:
    """FLOP/s of a large product here, the best of several."""
    n, best, clock = 8192 if device.type == "cuda" else 2048, 0.0, Clock(device)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    for _ in range(6):
        begin = clock.now()
        a @ b
        best = max(best, 2 * n**3 / (clock.now() - begin))
    return best


def counting() -> FlopCounterMode:
    """torch's counter with the attention kernel of CPUs, which it leaves out; like all attention it
    is counted whole, causal or not."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    more = {
        forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=more)


def model_flops(args, config, cut, recomputed: bool) -> float:
    """Of one token of a packed row: the products of the policy's forward three times, as backward
    takes two more, and of the reference's; no discriminator. recomputed adds what --checkpointing
    does again."""
    with estimate.players_without_weights(args, config) as run:
        batch, flops = pack(cut.longest), 0
        again = recomputed and args.checkpointing
        for lm, times in ((run.policy, 3 + again), (run.ref, 1)):
            if lm is not None:
                with torch.no_grad(), counting() as counter:
                    lm(batch)
                flops += times * counter.get_total_flops()
    return flops / tokens_in(cut.longest)


def measure(args, train_args, steps, model_dir) -> dict:
    """One step to warm up, then --steps timed ones -> rates, peak, seconds by phase."""
    device, config = distributed.start(train_args.timeout), AutoConfig.from_pretrained(model_dir)
    dtype = DTYPES[train_args.dtype]
    cut = estimate.survey(steps[1:], train_args, dist.get_world_size())
    shards, forward = distributed.sharing_ranks(), train_ganpo.forward_pairs
    needs = estimate.needed_memory(forward, train_args, config, cut, device, shards)
    run = train_ganpo.build(train_args, config, device)
    run.max_steps = args.steps + 2

    def batches(step, clock=None):
        for mine in train_ganpo.my_forwards(run, steps[step]):
            load = clock.timed("data", pack) if clock else pack
            yield load(mine).to(device)

    train_ganpo.train_step(run, batches(0), 0)
    rates = [matrix_rate(device, dtype)]
    reset_peak(device)
    seconds, tokens, sync = [], 0, Clock(device)
    for step in range(1, args.steps + 1):
        begin = sync.now()
        tokens += train_ganpo.train_step(run, batches(step), step)["tokens"]
        seconds.append(sync.now() - begin)
    peak = report.peak_gb(device)
    rates.append(matrix_rate(device, dtype))
    # one step more for what would disturb the others: its phases, then its operations counted
    clock = Clock(device)
    with clock.watching(run):
        train_ganpo.train_step(run, batches(args.steps, clock), args.steps + 1)
    clock.switch()
    with counting() as counter:
        train_ganpo.train_step(run, batches(args.steps), args.steps + 1)
    flops = counter.get_total_flops()
    result = {
        "tokens_per_s": tokens / sum(seconds),
        "step_s": statistics.mean(seconds),
        "peak_gb": peak,
        "estimated_gb": sum(needs.values()) / 2**30,
        "flops": flops,
        "tflops": flops / seconds[-1] / 1e12,
        "matrix_rate_share": flops / seconds[-1] / max(rates),
        "phases": dict(clock.seconds),
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        wanted = model_flops(train_args, config, cut, False) * tokens_in(steps[-1]) / run.world
        peaks = [wanted / seconds[-1] / p for k, p in PEAKS.items() if k in name]
        result["mfu"] = peaks[0] if peaks else None
    if RANK == 0:
        show(result)
    distributed.stop()
    return result


def show(result):
    print(f"{result['tokens_per_s']:,.0f} tokens/s, {result['step_s']:.2f} s per step,"
          f" peak {result['peak_gb']:.2f} GB (estimated {result['estimated_gb']:.2f}),"
          f" {result['tflops']:.3f} TFLOP/s as executed,"
          f" {result['matrix_rate_share']:.0%} of the matrix rate measured here"
          + (f", MFU {result['mfu']:.0%}" if result.get("mfu") else ""))  # fmt: skip
    total = sum(result["phases"].values())
    for phase, s in sorted(result["phases"].items(), key=lambda x: -x[1]):
        print(f"    {phase:<16}{s:8.3f} s {s / total:6.1%}")


def compute(args, train_args, steps, model_dir) -> dict:
    """--estimate: nothing is run, no weight is made."""
    ranks, config = args.estimate, AutoConfig.from_pretrained(model_dir)
    cut = estimate.survey(steps, train_args, ranks)
    shards, gpu = min(ranks, GPUS_PER_NODE), torch.device("cuda")
    needs = estimate.needed_memory(train_ganpo.forward_pairs, train_args, config, cut, gpu, shards)
    tokens = statistics.mean(map(tokens_in, steps))
    flops = model_flops(train_args, config, cut, True) * tokens
    seconds = flops / ranks / (ASSUMED_SHARE * PEAKS["H200"])
    if RANK == 0:
        print(estimate.gigabytes(needs))
        print(f"{flops / 1e12:,.0f} TFLOP per step of {tokens:,.0f} tokens in rows, {seconds:.2f} s"
              f" on {ranks} H200 at an assumed {ASSUMED_SHARE:.0%} of its peak, transfers hidden;"
              f" {cut.fewest} to {cut.most} forwards, imbalance {cut.imbalance:.1%}")  # fmt: skip
    return {"estimated_gb": sum(needs.values()) / 2**30, "flops": flops, "step_s": seconds}


# ---------------------------------------------------------------------- two programs


def last_object(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise InputError(
            f"{shlex.join(command)} printed no such line: {done.stderr[-300:]}"
        ) from None


def versus(argv, other):
    """Both in alternation, this one first; medians, and this one's over the other's."""
    ours = [sys.executable, __file__, *map(str, argv), "--json"]
    runs = [(last_object(ours), last_object(shlex.split(other))) for _ in range(ROUNDS)]
    print(f"median of {ROUNDS} runs each, in alternation{'':<8}here     other     ratio")
    for key in ("tokens_per_s", "step_s", "peak_gb"):
        values = [[np.mean(r[side].get(key, np.nan)) for r in runs] for side in (0, 1)]
        a, b = map(statistics.median, values)
        if not np.isnan(b):
            print(f"    {key:<36}{a:10.2f}{b:10.2f}{a / b:10.2f}")


def run_here(args, flags, folder: Path) -> dict:
    pairs, workload = args.batch_size * (args.steps + 1), args.workload
    if not workload:
        make_workload(folder, args.shape, pairs)
        workload = folder
    triplets = read_workload(workload, pairs)
    steps = [triplets[i : i + args.batch_size] for i in range(0, pairs, args.batch_size)]
    config, model_dir = AutoConfig.from_pretrained(workload), str(folder / "model")
    config.save_pretrained(model_dir)
    given = [f"--model={model_dir}", f"--batch_size={args.batch_size}", "--lambda_adv=0"]
    given += ["--max_length=2048"]
    train_args = train_ganpo.parse_args(given + flags)
    if args.estimate:
        return compute(args, train_args, steps, model_dir)
    if RANK == 0:  # who alone will read the weights
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(model_dir)
    return measure(args, train_args, steps, model_dir)


def parse_args(argv: list[str]):
    """-> what is meant for this file, what for train_ganpo.py."""
    # the folder comes first: argparse would take an unknown flag's value for it
    workload = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    usage = "bench.py [WORKLOAD] [--flag value ...]; other flags are train_ganpo.py's"
    parser = Parser("bench.py", __doc__, usage)
    parser.add_argument("--shape", choices=SHAPES, default="v32k", help="of its workload [v32k]")
    parser.add_argument("--batch_size", type=count, default=8, help="pairs per step [8]")
    parser.add_argument("--steps", type=natural, default=2, help="timed ones [2]")
    parser.add_argument("--json", action="store_true", help="an object as the last line")
    parser.add_argument("--vs", metavar="COMMAND", help="another program, in alternation")
    parser.add_argument("--estimate", type=count, metavar="RANKS", help="compute, run nothing")
    args, flags = parser.parse_known_args(argv[1:] if workload else argv)
    args.workload = workload
    if not (args.steps or args.estimate):
        raise InputError("--steps 0: nothing to time")
    return args, flags


def main(argv=None):
    quiet()
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, flags = parse_args(argv)
        if args.vs:
            at = next(i for i, word in enumerate(argv) if word.split("=")[0] == "--vs")
            rest = argv[:at] + argv[at + 1 + (argv[at] == "--vs") :]
            return versus(rest, args.vs)
        with tempfile.TemporaryDirectory() as folder:
            done = run_here(args, flags, Path(folder))
    except InputError as error:
        sys.exit(f"bench.py: {error}")
    if args.json and RANK == 0:
        print(json.dumps(done))


if __name__ == "__main__":
    main()
