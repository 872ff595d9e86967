"""Claims about tools/bench.py and tools/estimate.py: what they time, count, estimate and compare.

python -m pytest -q tests/test_bench.py -m "not slow"
"""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

import attention
import lora
import settings
import train_ganpo
from data import load_pairs
from discriminator import autocast_of, build_critics
from helpers import flags, tiny
from losses import OPO_LOSSES, PreferenceLoss, with_settings
from packing import pack, survey
from policy import load_lm
from tools import bench, estimate

CPU = torch.device("cpu")


@pytest.fixture
def workload(tmp_path):
    config = AutoConfig.for_model(
        "llama", vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "load")
    g = torch.Generator().manual_seed(0)
    lengths = [(7, 9, 5), (4, 12, 8), (6, 10, 11), (9, 3, 5), (8, 8, 8), (5, 6, 7)]
    with (tmp_path / "load" / "pairs.jsonl").open("w") as file:
        for row in lengths:
            ids = [torch.randint(10, 500, (n,), generator=g).tolist() for n in row]
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            file.write(json.dumps(dict(zip(names, ids, strict=True))) + "\n")
    return tmp_path / "load", lengths


def benched(capsys, *argv):
    """What it printed, and the object in its last line."""
    bench.main([*map(str, argv), "--json"])
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


def test_bench_counts_real_tokens_phases_and_the_products_of_the_step(
    workload, monkeypatch, capsys
):
    monkeypatch.setattr(bench, "matrix_rate", lambda *a: 1e9)
    folder, lengths = workload
    more = (folder, "--batch_size=2", "--steps=2", "--disc_hidden=32")
    plain, ganpo = (benched(capsys, *more, "--lambda_adv", x) for x in (0, 1))
    tokens = sum(2 * p + c + r for p, c, r in lengths[2:])  # the first batch warms up
    for printed, result in (plain, ganpo):
        assert result["tokens_per_s"] * result["step_s"] * 2 == pytest.approx(tokens)
        assert 0.1 < result["peak_gb"] < 8 and 0 < result["estimated_gb"] < 0.1
        assert result["matrix_rate_share"] == pytest.approx(result["tflops"] * 1e3)
        assert "tokens/s" in printed
    phases = {"data", "reference", "policy forward", "backward", "optimiser", "other"}
    assert set(plain[1]["phases"]) == phases
    assert set(ganpo[1]["phases"]) == phases | {"discriminators"}
    # the products of the last batch, each prompt once
    rows, answers = sum(map(sum, lengths[4:])), sum(c + r for _, c, r in lengths[4:])
    per_layer = 4 * 64 * 64 + 3 * 64 * 128
    trunk = 2 * 2 * per_layer * rows * (1 + 3)  # reference; policy forward and backward
    head = 2 * 64 * 500 * answers * (1 + 4)  # with the logits computed twice
    assert 1 <= plain[1]["flops"] / (trunk + head) < 1.1  # the attention itself is small


def test_bench_computes_what_a_gpus_attention_executes_and_does_not_count_it(
    workload, monkeypatch, capsys
):
    steps, step = [], train_ganpo.train_step
    monkeypatch.setattr(bench, "matrix_rate", lambda *a: 1e9)
    monkeypatch.setattr(attention, "choose", lambda *a: "flex")
    monkeypatch.setitem(attention.LAYOUTS, "flex", attention.Loop)
    monkeypatch.setattr(train_ganpo, "train_step", lambda *a: steps.append(a) or step(*a))
    folder, lengths = workload
    _, result = benched(capsys, folder, "--batch_size=2", "--steps=2", "--checkpointing")
    assert len(steps) == 1 + 2 + 1  # the first warms up, the last is timed by phase
    rows, answers = sum(map(sum, lengths[4:])), sum(c + r for _, c, r in lengths[4:])
    products = 2 * (2 * (4 * 64 * 64 + 3 * 64 * 128) * rows + 64 * 500 * answers)
    assert 0.9 < result["flops"] / (5 * products) < 1.2  # reference, policy, and its recomputation


def test_bench_estimates_from_the_shape_alone(workload, monkeypatch, capsys):
    monkeypatch.setattr("policy.AutoModelForCausalLM.from_pretrained", None)
    folder, lengths = workload
    more = (folder, "--batch_size=6", "--steps=0", "--checkpointing")
    printed, two = benched(capsys, *more, "--estimate=2")
    assert "1 to 1 forwards" in printed and "graphs" in printed
    rows, answers = sum(map(sum, lengths)), sum(c + r for _, c, r in lengths)
    products = 2 * (2 * (4 * 64 * 64 + 3 * 64 * 128) * rows + 64 * 500 * answers)
    assert 1 <= two["flops"] / (5 * products) < 1.1  # backward counts twice, and checkpointing
    assert two["step_s"] == pytest.approx(two["flops"] / 2 / (0.36 * 989e12))
    _, simpo = benched(capsys, *more, "--estimate=2", "--loss=simpo")
    assert simpo["flops"] == pytest.approx(two["flops"] * 4 / 5)
    assert simpo["estimated_gb"] < two["estimated_gb"]


def test_bench_makes_workloads_of_three_shapes(tmp_path):
    for shape, (config, lengths) in bench.SHAPES.items():
        (tmp_path / shape).mkdir()
        bench.make_workload(tmp_path / shape, shape, 3)
        assert AutoConfig.from_pretrained(tmp_path / shape).hidden_size == config.hidden_size
        for t in bench.read_workload(tmp_path / shape, 3):
            for ids, (_, low, high) in zip(t[:3], lengths, strict=True):
                assert low <= len(ids) <= high and ids.max() < config.vocab_size


@pytest.mark.slow
def test_bench_puts_another_program_beside_itself(workload, capsys, monkeypatch):
    line = json.dumps({"tokens_per_s": 1.0, "step_s": [0.5, 1.5], "peak_gb": 2.0})
    bench.main([str(workload[0]), "--batch_size=2", "--steps=2", "--vs", f"echo '{line}'"])
    printed = capsys.readouterr().out.splitlines()[1:]
    rows = {x.split()[0]: [float(v) for v in x.split()[1:]] for x in printed}
    assert set(rows) == {"tokens_per_s", "step_s", "peak_gb"}
    here, other, ratio = rows["tokens_per_s"]
    assert other == 1 and here > 1 and ratio == pytest.approx(here, abs=0.01)
    assert rows["step_s"][1] == 1  # a list of steps counts as their mean
    monkeypatch.setattr(bench, "ROUNDS", 1)
    with pytest.raises(SystemExit, match="^tools.bench: .*echo hello printed no JSON object"):
        bench.main([str(workload[0]), "--batch_size=2", "--vs", "echo hello"])
    with pytest.raises(SystemExit, match="^tools.bench: .*echo 5 printed no JSON object"):
        bench.main([str(workload[0]), "--batch_size=2", "--vs", "echo 5"])


def test_bench_refuses_what_it_cannot_measure(workload, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "pairs.jsonl").write_text("[1]\n" * 99)
    for argv, message in (
        ((tmp_path / "nothing",), "no workload"),
        ((tmp_path / "damaged",), "damaged: no workload: list indices must"),
        ((workload[0], "--vs=echo", "--json"), "--vs prints a table"),
        ((workload[0], "--vs=echo", "--estimate=8"), "--vs prints a table"),
        ((workload[0], "--batch_size=4"), "6 pairs, 12 needed"),
    ):
        with pytest.raises(SystemExit, match=rf"^tools.bench: .*{message}"):
            bench.main([str(x) for x in argv])
    for text, message in (
        ("{", "not a valid JSON file"),
        ("{}", "no workload: Unrecognized model"),
    ):
        (workload[0] / "config.json").write_text(text)
        with pytest.raises(SystemExit, match=f"^tools.bench: .*{message}"):
            bench.main([str(workload[0]), "--batch_size=2"])


# ---------------------------------------------------------------------- the estimate of memory


SETTINGS = [
    (), ("--checkpointing",), ("--lambda_adv=0",), ("--critic=mse",), ("--critic=paired",),
    ("--lora_rank=4",),
]  # fmt: skip


@pytest.mark.parametrize("more", SETTINGS, ids=" ".join)
def test_the_estimate_of_graphs_is_what_autograd_keeps(more, tiny_world, tmp_path):
    """The same count over real tensors; what bench.py measures stands in docs/speed.md."""
    args = settings.parse_args(
        flags(tiny_world, tmp_path / "r", *more, "--micro_batch_size=3", family="gemma2")
    )
    config = AutoConfig.from_pretrained(args.model)
    pairs = load_pairs(args.dataset, "train", tiny(), 64).triplets
    plans = survey([pairs[:8], pairs[8:16], pairs[16:24]], args, 1)
    parts = estimate.estimated_memory(args, config, plans, CPU, 1)
    run = SimpleNamespace(args=args, critics=build_critics(args, config.hidden_size))
    run.opo_loss, run.of_rewards = with_settings(args.loss, vars(args)), (True, args.beta)
    run.autocast = autocast_of(CPU, torch.float32)
    adapters, load = lora.adapters_of(args), partial(load_lm, args.model, torch.float32)
    run.policy = load(args.checkpointing, adapters=adapters)
    run.ref = lora.reference(run.policy) or load().requires_grad_(False)
    forwards = plans.heaviest if run.critics else [plans.longest]
    kept = []
    for pairs in forwards:
        kept.append(estimate.kept_bytes(run, pack(pairs)))
        if run.critics:
            run.critics.requires_grad_(True)
    assert parts["graphs"] == pytest.approx(sum(kept), rel=0.1)
    sizes = [p.numel() for p in run.policy.parameters() if p.requires_grad]
    assert parts["reference"] == (0 if adapters else 4 * sum(sizes))
    of = "adapters" if adapters else "weights"
    assert parts[f"{of}, moments, gradients"] == 16 * sum(sizes)


def test_a_step_that_reads_a_tensors_value_is_measured_without_an_estimate(
    workload, monkeypatch, capsys
):
    def curious(lp):
        scale = 1 / max(1.0, lp.logp_chosen.abs().max().item())
        return scale * (lp.logp_rejected - lp.logp_chosen)

    def sparse(lp):
        return lp.logp_rejected - lp.logp_chosen[lp.logp_chosen < 0].mean()

    for loss, asked in ((curious, "_local_scalar_dense"), (sparse, "nonzero")):
        monkeypatch.setitem(OPO_LOSSES, "mine", PreferenceLoss(loss, False, {}))
        argv = [workload[0], "--batch_size=2", "--loss=mine"]
        with pytest.raises(SystemExit, match=f"reads a tensor's value, .*{asked}"):
            bench.main([*map(str, argv), "--estimate=2"])
    printed, result = benched(capsys, *argv, "--steps=1")
    assert "no estimate of memory: the loss or a critic reads" in printed
    assert result["estimated_gb"] is None and result["tokens_per_s"] > 0
