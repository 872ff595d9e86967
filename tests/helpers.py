"""What several test files share: tiny models and rows, runs of the programs, naive oracles.

A child process that plays a rank is forked from a server that has loaded this file, and with it
torch and the programs. So a child starts in a moment and has run nothing before.
"""

import cpu  # noqa: F401  must come before torch

import csv
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import train_ganpo
from data import Triplet, load_pairs
from packing import batch_indices, pack

TESTS = Path(__file__).resolve().parent
ROOT, DATA = TESTS.parent, TESTS / "data"
SHARED = ROOT.parent / "shared" / "data"  # real data, which not everyone has
LN2 = math.log(2)
VOCAB = 300
SMALL = dict(prompts=44, train_prompts=60, train_pairs=64, test_prompts=16, sft_steps=100)


def slow(*values):
    """A parameter of a test that only the slow tests try."""
    return pytest.param(*values, marks=pytest.mark.slow)


# ---------------------------------------------------------------------- a tiny tokenizer

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TURNS = (  # strips contents and ends a turn with a token and a line feed, as Gemma's does
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = "<s>" + TURNS


@cache
def tiny(template=CHAT, bos="<s>", merges=(), special=tuple(SPECIAL)):
    """A tokenizer with one token for each byte, for each merge and for each special token."""
    vocab = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=special[1])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[2:])})
    tokenizer.chat_template = template
    return tokenizer


# ---------------------------------------------------------------------- tiny models and rows

# grouped-query attention everywhere; windows shorter than the sequences; no scale or angle is 1
GEMMA3 = dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8, sliding_window_pattern=2)
SHAPES = {
    "llama": dict(),
    "gemma2": dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8, tie_word_embeddings=True),
    "mistral": dict(sliding_window=6),
    "qwen2": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": dict(head_dim=8),
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,  # multimodal: make_model adds the other part
    "granite": dict(
        embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.5,
        logits_scaling=4.0,
    ),
    "olmo2": dict(),
    "olmo3": dict(
        sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                               "original_max_position_embeddings": 64},
        },
    ),
    "phi3": dict(sliding_window=6, rope_parameters={"partial_rotary_factor": 0.5}),
    "smollm3": dict(no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=6),
}  # fmt: skip
LENGTHS = [(5, 9, 4), (1, 3, 11), (12, 1, 1), (7, 2, 8)]  # prompt, chosen, rejected


def make_model(folder, family="llama", seed=0, **changes):
    """Writes a model of random weights with the tiny tokenizer; returns its folder as text."""
    torch.manual_seed(seed)
    size = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    size |= SHAPES[family] | changes
    if family == "gemma3":
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=28)
        vision |= dict(num_attention_heads=2, patch_size=14)
        size = dict(text_config=size, vision_config=vision, mm_tokens_per_image=4,
                    image_token_index=299, boi_token_index=298, eoi_token_index=297)  # fmt: skip
    config = AutoConfig.for_model(family, **size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny().save_pretrained(folder)
    return str(folder)


def make_rows(path, n, seed=0):
    """Writes n rows of random letters; returns the file's path as text."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        texts = ["".join(rng.choices("abcdef ", k=rng.randint(3, 16))) + "." for _ in range(3)]
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    return write_lines(path, rows)


def triplets_for(lengths, seed=0):
    """Random triplets of given lengths of prompt, chosen and rejected answer."""
    g = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(6, VOCAB, (n,), generator=g).numpy()  # noqa: E731
    return [Triplet(*(ids(n) for n in row), i) for i, row in enumerate(lengths)]


def make_reward_model(folder, base):
    """A reward model of random head on a base's weights; returns its folder as text."""
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
    tiny().save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------------- files


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def json_of(path):
    return json.loads(Path(path).read_text())


def read_csv(path):
    """The rows of a csv file, as text by column."""
    with open(path) as file:
        return list(csv.DictReader(file))


def rows_of(path):
    """The rows of a csv file of numbers, without empty columns."""
    return [{k: float(v) for k, v in row.items() if v} for row in read_csv(path)]


# ---------------------------------------------------------------------- worlds of the miniature


def build_small_worlds(patch):
    """Makes world.build, until patch is undone, build worlds that take seconds."""
    from miniature import world

    build = world.build
    patch.setattr(
        world, "build", lambda seed, log=print: build(seed, log=lambda line: None, sizes=SMALL)
    )


# ---------------------------------------------------------------------- runs of train_ganpo.py


def flags(world, out, *more, family="llama"):
    return [
        f"--model={world / family}", f"--dataset={world / 'train.jsonl'}", f"--out_dir={out}",
        "--batch_size=8", "--max_length=64", "--lr=3e-3", "--disc_hidden=16", *more,
    ]  # fmt: skip


def run(world, out, *more, family="llama", ranks=1, **more_of_spawn):
    """Runs the program to its end; returns the rows of metrics.csv, and weights by name.

    The weights are those of weights_of.
    """
    argv = flags(world, out, *more, family=family)
    if ranks == 1 and not more_of_spawn:
        train_ganpo.main(argv)
    else:
        launch(argv, ranks, **more_of_spawn)
    return rows_of(out / "metrics.csv"), weights_of(out)


def weights_of(out):
    """The weights of a run's exported policy, and of both critics if there are any, by name."""
    weights = load_file(out / "hf" / "model.safetensors")
    if (out / "discriminators.pt").exists():
        saved = torch.load(out / "discriminators.pt", weights_only=True)
        for sign in ("pos", "neg"):
            weights |= {f"{sign}.{k}": v for k, v in saved[f"disc_{sign}"].items()}
    return weights


def launch(argv, ranks, **more):
    """Does what torchrun does, to the end."""
    assert join(spawn(argv, ranks, **more), 120) == [0] * ranks


def join(children, seconds=60):
    """Waits for all children; returns their exit codes, None for one that has not ended in time."""
    for child in children:
        child.join(seconds)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def spawn(argv, ranks=1, log=None, prepare=None, nodes=1):
    """Starts the program in one child process per rank and returns the children.

    log is a file for what they print; prepare(rank) is called first in each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    more = (ranks, port, log, prepare, nodes)
    children = [context.Process(target=one_rank, args=(argv, r, *more)) for r in range(ranks)]
    for child in children:
        child.start()
    return children


def one_rank(argv, rank, ranks, port, log, prepare, nodes):
    local = ranks // nodes
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank % local), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if log:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    if prepare:
        prepare(rank)
    train_ganpo.main(argv)


def command(*argv, torchrun=0, cwd=ROOT, limit=300):
    """Runs `python ARGV`, or `torchrun --nproc_per_node N ARGV`, as a user would.

    What this process has set for its own threads is not handed on.
    """
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"] if torchrun else []
    ours = ("OMP_", "MKL_", "GOMP_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(
        [sys.executable, *launcher, *argv], cwd=cwd, env=environment, capture_output=True,
        text=True, timeout=limit,
    )  # fmt: skip


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---------------------------------------------------------------------- comparing


def close(a, b, tolerance, but=()):
    """Asserts that two rows of metrics agree, but for timings and memory.

    The tolerance is relative, and absolute for values below 1.
    """
    untimed = set(a) - {"seconds", "tokens_per_s", "peak_gb", *but}
    assert set(a) == set(b)
    for k in untimed:
        assert abs(a[k] - b[k]) <= tolerance * max(1, abs(a[k])), (k, a[k], b[k])


def furthest(a, b):
    """The largest difference of two dicts of tensors."""
    assert set(a) == set(b)
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def kept_bytes(lm, batch):
    """What autograd keeps for backward, each storage once, without the model's own weights."""
    kept = {}

    def note(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = lm(batch)
    note(out.h)
    for p in lm.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


# ---------------------------------------------------------------------- naive oracles


def softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


def naive_forward(model, triplets):
    """Each text alone through the model's own forward: latents and summed log-probabilities of
    the answers, chosen ones first."""
    latents, logps = [], []
    for side in ("chosen", "rejected"):
        for t in triplets:
            answer = torch.tensor(getattr(t, side)).long()
            ids = torch.cat([torch.tensor(t.prompt).long(), answer])[None]
            out = model(ids, output_hidden_states=True)
            logp = out.logits[0, len(t.prompt) - 1 : -1].double().log_softmax(-1)
            latents.append(out.hidden_states[-1])
            logps.append(logp.gather(1, answer[:, None]).sum())
    return latents, torch.stack(logps)


def latent_gradient(loss, h_theta, triplets):
    """The gradient of loss at the latents, (T, H). The prompt's latents, which both answers share,
    count as one set of variables."""
    grads, rows = torch.autograd.grad(loss, h_theta, retain_graph=True), []
    b = len(triplets)
    for t, chosen, rejected in zip(triplets, grads[:b], grads[b:], strict=True):
        n = len(t.prompt)
        rows += [chosen[0, :n] + rejected[0, :n], chosen[0, n:], rejected[0, n:]]
    return torch.cat(rows)


def alignment(gradient, h_theta, h_ref, triplets):
    """The mean over tokens of the cosine of -gradient and h_ref - h_theta."""
    towards_reference = [
        (h_ref[i] - h_theta[i])[0, n:].detach()
        for j, t in enumerate(triplets)
        for i, n in ((j, 0), (j + len(triplets), len(t.prompt)))
    ]
    cosines = [
        -(g @ to) / (g.norm() * to.norm()) if to.norm() > 0 and g.norm() > 0 else torch.zeros(())
        for g, to in zip(gradient, torch.cat(towards_reference), strict=True)
    ]
    return sum(cosines) / len(cosines)


def plain_steps(lm, trained, ref, loss, rows, world):
    """Trains `trained`, weights of lm, for three steps of plain DPO or SimPO in a loop of its own;
    asserts that each step's loss is that of the program's row."""
    trained = [*trained]
    optimizer = torch.optim.AdamW(trained, 1.0, weight_decay=0, fused=True)
    data = load_pairs(str(world / "train.jsonl"), "train", tiny(), 64)
    for step, factor in enumerate((1.0, 1.0, 0.5)):
        optimizer.param_groups[0]["lr"] = 3e-3 * factor
        pairs = [data.triplets[i] for i in batch_indices(step, len(data.triplets), 8, 0)]
        batch = pack(sorted(pairs, key=lambda t: -sum(map(len, t[:3]))))  # longest first
        chosen, rejected = lm(batch).logp.chunk(2)
        if loss == "dpo":
            with torch.no_grad():
                ref_chosen, ref_rejected = ref(batch).logp.chunk(2)
            value = F.softplus(0.1 * (rejected - ref_rejected) - 0.1 * (chosen - ref_chosen))
        else:
            length_chosen, length_rejected = batch.lengths.chunk(2)
            value = F.softplus(2.0 * (0.5 - (chosen / length_chosen - rejected / length_rejected)))
        optimizer.zero_grad()
        (value.sum() / 8).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        assert rows[step]["loss_opo"] == pytest.approx(value.mean().item(), rel=1e-6)
