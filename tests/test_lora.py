"""Claims about LoRA: what trains, that the reference is free, and what a run leaves behind.

    python -m pytest -q tests/test_lora.py -m "not slow"

The oracle writes W + alpha / r * B A into plain models, in float64. The slow tests compare with
peft, in an environment of its own.
"""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora
import policy
import settings
import train_ganpo
from checkpoint import state_folder
from data import load_pairs
from helpers import (
    LENGTHS,
    SHAPES,
    close,
    flags,
    furthest,
    json_of,
    kept_bytes,
    make_model,
    make_rows,
    naive_forward,
    plain_steps,
    run,
    slow,
    softplus,
    tiny,
    triplets_for,
)
from packing import batch_indices, pack
from policy import load_lm

RANK = ("--lora_rank=4", "--lora_alpha=6")


def adapters(folder, targets=None, base="", rank=4, alpha=6.0):
    """What load_lm takes, as lora.adapters_of gives it."""
    return partial(lora.Adapters, base or folder, rank, alpha, targets, 0)


def randomised(lm):
    """Gives every B values, as training does."""
    generator = torch.Generator().manual_seed(1)
    for p in lm.adapters.parameters()[1::2]:
        p.data.normal_(0, 0.1, generator=generator)
    return lm


def files_of(folder):
    """A and B of each layer, as an adapter's folder has them, by the layer's name."""
    weights = load_file(folder / "adapter_model.safetensors")
    names = {k.rpartition(".lora_")[0] for k in weights}
    return {
        name.removeprefix("base_model.model."): [weights[f"{name}.lora_{x}.weight"] for x in "AB"]
        for name in sorted(names)
    }


# ---------------------------------------------------------------------- the training step


def test_three_steps_equal_a_naive_lora(tiny_world, tmp_path):
    """DPO and the fixed distance of the latents, of which both read the reference."""
    more = ("--dtype=float64", "--critic=mse", "--lambda_adv=0.7", "--micro_batch_size=3", *RANK)
    run(tiny_world, tmp_path / "0", *more, "--lr=0", "--max_steps=1")
    rows, weights = run(tiny_world, tmp_path / "r", *more)
    plain, ref = (
        AutoModelForCausalLM.from_pretrained(tiny_world / "llama", dtype=torch.float64).eval()
        for _ in "pr"
    )
    trained = files_of(tmp_path / "0" / "adapter")
    assert len(trained) == 3 * 7 and all(not b.any() for _, b in trained.values())
    for p in (p for pair in trained.values() for p in pair):
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for pair in trained.values() for p in pair], weight_decay=0)

    def with_adapters():
        own = dict(plain.named_parameters())
        return {f"{k}.weight": own[f"{k}.weight"] + 1.5 * b @ a for k, (a, b) in trained.items()}

    data = load_pairs(str(tiny_world / "train.jsonl"), "train", tiny(), 64)
    for step, factor in enumerate((1.0, 1.0, 0.5)):
        optimizer.param_groups[0]["lr"] = 3e-3 * factor
        batch = [data.triplets[i] for i in batch_indices(step, len(data.triplets), 8, 0)]
        policy_now = partial(torch.func.functional_call, plain, with_adapters())
        h_theta, logp = naive_forward(lambda ids, now=policy_now, **k: now(ids, k), batch)
        with torch.no_grad():
            h_ref, ref_logp = naive_forward(ref, batch)
        delta = (logp - ref_logp)[:8] - (logp - ref_logp)[8:]
        opo = softplus(-0.1 * delta).mean()
        mse = sum(((a - b) ** 2).mean() for a, b in zip(h_theta, h_ref, strict=True)) / 16
        optimizer.zero_grad()
        (opo + 0.7 * mse).backward()
        norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        for name, known in (("loss_opo", opo), ("loss_adv", mse), ("grad_norm", norm)):
            assert rows[step][name] == pytest.approx(known.item(), rel=1e-5, abs=1e-9), name
    merged = with_adapters()
    for name, p in plain.named_parameters():
        assert (weights[name] - merged.get(name, p)).abs().max() < 1e-6, name
        assert torch.equal(weights[name], p.detach()) == (name not in merged), name


@pytest.mark.parametrize("loss", ["dpo", slow("simpo")])
def test_lambda_0_is_the_plain_loss_bit_for_bit_beside_a_second_model(loss, tiny_world, tmp_path):
    """What the reference gives is to the last bit what another copy of the model gives."""
    rows, weights = run(tiny_world, tmp_path / "r", f"--loss={loss}", "--lambda_adv=0", *RANK)
    name = str(tiny_world / "llama")
    lm = load_lm(name, torch.float32, adapters=adapters(name))
    ref = load_lm(name, torch.float32)
    plain_steps(lm, lm.adapters.parameters(), ref, loss, rows, tiny_world)
    for name, p in lora.merged(lm.model.state_dict(), lm.adapters.scale).items():
        assert torch.equal(weights[name], p), name


def test_the_base_is_read_once_stays_in_bfloat16_and_adapters_alone_train_in_float32(
    tiny_world, tmp_path, monkeypatch
):
    """With a critic, which reads the reference's latents, and with --checkpointing."""
    reads, seen, inner = [], [], train_ganpo.train_step
    monkeypatch.setattr(
        policy,
        "load_lm",
        lambda *a, **k: reads.extend([a] * ("shell" not in k)) or load_lm(*a, **k),
    )

    def watched(run, batches, step):
        metrics = inner(run, batches, step)
        seen.append(
            {
                k: p.full_tensor()
                for k, p in run.policy.model.named_parameters()
                if ".lora_" not in k
            }
        )
        trained = {p for group in run.optimizer.param_groups for p in group["params"]}
        assert trained == {p for p in run.policy.parameters() if p.requires_grad}
        assert {p.dtype for p in trained} == {torch.float32}
        assert {p.dtype for p in {*run.policy.parameters()} - trained} == {torch.bfloat16}
        assert not [*run.ref.parameters()]
        return metrics

    monkeypatch.setattr(train_ganpo, "train_step", watched)
    more = ("--dtype=bfloat16", "--checkpointing", *RANK)
    rows, weights = run(tiny_world, tmp_path / "r", *more, family="gemma2")
    assert len(reads) == 1 and rows[0]["margin"] == rows[0]["latent_mse"] == 0
    assert rows[2]["latent_mse"] > 0
    base = load_file(tiny_world / "gemma2" / "model.safetensors")
    for name, value in seen[-1].items():
        assert torch.equal(value, base[name].bfloat16()), name
    assert {x.dtype for name, x in weights.items() if name in base} == {torch.float32}
    a, b = files_of(tmp_path / "r" / "adapter")["model.layers.1.mlp.up_proj"]
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(weights[name], base[name].bfloat16().float() + 1.5 * b @ a)


@pytest.mark.parametrize("more", [
    slow(()), slow(["--critic=mlp"]), slow(["--critic=mse"]), ["--critic=paired"], ["--loss=simpo"],
])  # fmt: skip
def test_policy_and_reference_agree_exactly_at_the_start(more, tiny_world, tmp_path, capsys):
    first, *_, last = run(tiny_world, tmp_path / "r", *RANK, *more)[0]
    assert first["latent_mse"] == 0 and last["latent_mse"] > 0
    if "--loss=simpo" not in more:
        assert first["margin"] == first["reward_chosen"] == first["reward_rejected"] == 0
    printed = capsys.readouterr().out
    assert "checked: policy and reference agree before the first step" in printed
    assert (
        "LoRA: rank 4, alpha 6, 5,568 trained parameters in adapters of down_proj, gate_proj,"
        " k_proj, o_proj, q_proj, up_proj, v_proj; the reference is the policy without them\n"
    ) in printed


@pytest.mark.parametrize("setting", [
    (), slow("--loss=simpo"), slow("--critic=mse"), slow("--critic=mlp"),
    slow("--critic=paired"), slow("--lambda_adv=0"),
])  # fmt: skip
def test_results_do_not_depend_on_micro_batches_ranks_or_checkpointing(
    setting, tiny_world, tmp_path
):
    setting = (*([setting] if isinstance(setting, str) else setting), *RANK, "--dtype=float64")
    whole, weights = run(tiny_world, tmp_path / "8", *setting, "--micro_batch_size=8")
    for ranks, divided in (
        (1, ("--micro_batch_size=1", "--checkpointing")),
        (2, ["--micro_tokens=90"]),
    ):
        rows, others = run(tiny_world, tmp_path / str(ranks), *setting, *divided, ranks=ranks)
        for a, b in zip(whole, rows, strict=True):
            close(a, b, 1e-5)
        assert furthest(weights, others) < 1e-9
        ours, theirs = (files_of(tmp_path / x / "adapter") for x in ("8", str(ranks)))
        for pair, other in zip(ours.values(), theirs.values(), strict=True):
            assert all((x - y).abs().max() < 1e-9 for x, y in zip(pair, other, strict=True))


# ---------------------------------------------------------------------- what a run leaves behind


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_a_state_has_the_adapters_alone_and_resumes_bit_for_bit(ranks, tiny_world, tmp_path):
    more = (*RANK, "--dtype=bfloat16", "--save_every=1")
    straight, weights = run(tiny_world, tmp_path / "a", *more, ranks=ranks)
    run(tiny_world, tmp_path / "b", *more, "--stop_after=2", ranks=ranks)
    rows, again = run(tiny_world, tmp_path / "b", *more, "--resume", ranks=ranks)
    for a, b in zip(straight, rows, strict=True):
        close(a, b, 0)
    assert furthest(weights, again) == 0
    state = {}
    for path in state_folder(tmp_path / "b", 3).glob("*.safetensors"):
        state |= load_file(path)
    saved = {k.removeprefix("policy.model.") for k in state if k.startswith("policy.")}
    layers = files_of(tmp_path / "b" / "adapter")
    assert saved == {
        f"{layer}.lora_{x}{key}"
        for layer in layers for x in "AB" for key in ("", ".step", ".exp_avg", ".exp_avg_sq")
    }  # fmt: skip
    if ranks == 1:
        for layer, (_, b) in layers.items():
            assert torch.equal(state[f"policy.model.{layer}.lora_B"], b) and b.any()


def test_a_finished_run_without_its_adapter_exports_it_when_resumed(tiny_world, tmp_path, capsys):
    more = (*RANK, "--max_steps=1")
    run(tiny_world, tmp_path / "r", *more)
    before = files_of(tmp_path / "r" / "adapter")
    (tmp_path / "r" / "adapter").rename(tmp_path / "elsewhere")
    run(tiny_world, tmp_path / "r", *more, "--resume")
    for pair, again in zip(
        before.values(), files_of(tmp_path / "r" / "adapter").values(), strict=True
    ):
        assert all(torch.equal(x, y) for x, y in zip(pair, again, strict=True))
    run(tiny_world, tmp_path / "r", *more, "--resume")
    assert "nothing to do" in capsys.readouterr().out


OF_PHI3 = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
OF_OTHERS = {*"q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()}


@pytest.mark.parametrize("family", SHAPES)
def test_every_family_adapts_the_layers_of_its_decoder_and_can_be_merged(family, tmp_path):
    name, batch = make_model(tmp_path, family), pack(triplets_for(LENGTHS))
    plain = load_lm(name, torch.float64)
    lm = load_lm(name, torch.float64, adapters=adapters(name))
    inside = {k.removesuffix(".lora_A") for k in lm.model.state_dict() if k.endswith(".lora_A")}
    kinds = OF_PHI3 if family == "phi3" else OF_OTHERS
    assert {k.rpartition(".")[2] for k in inside} == kinds == {*lm.adapters.targets}
    assert len(inside) == 3 * len(kinds)
    assert all(k.startswith("model.layers.") for k in inside)
    randomised(lm)
    with torch.no_grad():
        expected, changed = plain(batch), lm(batch)
        again = lora.reference(lm)(batch)
        plain.model.load_state_dict(lora.merged(lm.model.state_dict(), lm.adapters.scale))
        merged = plain(batch)
    assert torch.equal(again.logp, expected.logp) and torch.equal(again.h, expected.h)
    assert (changed.h - expected.h).abs().max() > 1e-2
    torch.testing.assert_close(merged.h, changed.h, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged.logp, changed.logp, rtol=1e-9, atol=1e-9)


def test_the_adapters_folder_says_what_peft_needs(tiny_world, tmp_path):
    run(tiny_world, tmp_path / "r", "--lora_rank=4", "--max_steps=1", "--lora_targets", "v_proj",
        "q_proj")  # fmt: skip
    assert json_of(tmp_path / "r" / "adapter" / "adapter_config.json") == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8.0,
        "base_model_name_or_path": str(tiny_world / "llama"), "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "inference_mode": True,
    }  # fmt: skip
    saved = files_of(tmp_path / "r" / "adapter")
    assert {*saved} == {f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qv"}
    a, b = saved["model.layers.2.self_attn.v_proj"]
    assert a.shape == (4, 32) and b.shape == (16, 4)
    assert 0.9 / 32**0.5 < a.abs().max() <= 1 / 32**0.5


# ---------------------------------------------------------------------- what is refused


REFUSED = [
    (("--lora_rank=4", "--lora_targets", "lm_head", "q_proj", "v"),
     r"--model .*llama: --lora_targets lm_head v: the model's layers have no such linear layer;"
     r" there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$"),
    (("--lora_alpha=4",), "--lora_alpha needs --lora_rank$"),
    (("--lora_targets", "q_proj"), "--lora_targets needs --lora_rank$"),
    (("--lora_rank=4", "--ref_model=other"),
     "--ref_model other: with --lora_rank the reference is --model itself, its adapters off; leave"
     " --ref_model out, or train without --lora_rank$"),
    (("--lora_rank=0",), "--lora_rank: 0 is not in"),
]  # fmt: skip


@pytest.mark.parametrize("more, message", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_the_data_is_read(
    more, message, tiny_world, tmp_path
):
    argv = flags(tiny_world, tmp_path / "r", "--dataset=nowhere.jsonl", *more)
    with pytest.raises(SystemExit, match=message):
        train_ganpo.main(argv)
    assert not (tmp_path / "r").exists()


def test_the_model_itself_may_be_named_as_the_reference(tiny_world, tmp_path):
    argv = flags(tiny_world, tmp_path / "r", *RANK)
    assert settings.parse_args([*argv, f"--ref_model={tiny_world / 'llama'}"]) == (
        settings.parse_args(argv)
    )


def test_a_resumed_run_keeps_its_adapters_shape(tiny_world, tmp_path):
    run(tiny_world, tmp_path / "r", *RANK, "--max_steps=1")
    argv = flags(tiny_world, tmp_path / "r", "--max_steps=1", "--resume", "--lora_rank=2")
    with pytest.raises(
        SystemExit, match="lora_alpha was 6.0, is now 4.0; lora_rank was 4, is now 2"
    ):
        train_ganpo.main(argv)


# ---------------------------------------------------------------------- memory


def test_the_least_memory_of_lora_is_a_sum_that_can_be_done_by_hand(tiny_world):
    name, n = str(tiny_world / "llama"), 42_464
    trained = 3 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    of = dict(kept_tokens=1000, shards=2, adapters=adapters(name))
    assert policy.least_memory(name, name, torch.bfloat16, False, **of) == {
        "frozen weights": 2 * n / 2,  # the ranks share them
        "adapters, moments, gradients": 16 * trained,  # in float32, whole on every rank
        "reference": 0,
        "graphs": 1000 * 3 * 2 * (4 * 32 + 3 * 48),
        "critics": 0,
    }


@pytest.mark.parametrize("family, targets", [("llama", ["down_proj"]), ("phi3", None)])
def test_the_least_memory_of_lora_is_not_more_than_autograd_keeps(family, targets, tmp_path):
    """Otherwise a run that fits would be refused. Fewer adapters keep fewer inputs of layers."""
    name, batch = make_model(tmp_path, family), pack(triplets_for([(20, 30, 25), (10, 40, 35)]))
    of = adapters(name, targets)
    least = policy.least_memory(name, None, torch.float32, False, len(batch.ids), 1, of)["graphs"]
    lm = load_lm(name, torch.float32, adapters=of)
    assert 0.3 < least / kept_bytes(lm, batch) <= 1


# ---------------------------------------------------------------------- peft


PEFT = ["peft==0.21.2", "accelerate==1.15.0", "psutil==7.2.2"]
THERE = """
import json, sys, torch, peft
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
asked, found = json.load(sys.stdin), {"version": peft.__version__}

def adapted(world, run, **more):
    base = AutoModelForCausalLM.from_pretrained(
        f"{world}/model", dtype=torch.float32, attn_implementation="eager").eval()
    return PeftModel.from_pretrained(base, f"{world}/{run}/adapter", **more).eval()

def logp(lm, prompt, answer):
    logits = lm(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()

def margin(lm, prompt, chosen, rejected):
    return logp(lm, prompt, chosen) - logp(lm, prompt, rejected)

for world in asked["worlds"]:
    with torch.no_grad():
        rows = [adapted(world, "run")(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
                for ids in asked["texts"]]
    lm, losses = adapted(world, "start", is_trainable=True), []
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1.0, weight_decay=0)
    for lr, batch in asked["steps"]:
        optimizer.param_groups[0]["lr"] = lr
        with torch.no_grad(), lm.disable_adapter():
            reference = torch.stack([margin(lm, *pair) for pair in batch])
        now = torch.stack([margin(lm, *pair) for pair in batch])
        loss = F.softplus(-0.1 * (now - reference)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    weights = dict(lm.merge_and_unload().named_parameters())  # tied ones once
    save_file({k: p.detach() for k, p in weights.items()}, f"{world}/merged.safetensors")
    found[world] = rows, losses
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def peft(tmp_path_factory):
    """Runs THERE, with peft and what it needs beside the packages that are there."""
    folder = tmp_path_factory.mktemp("peft")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    done = subprocess.run([*pip, *PEFT], capture_output=True, text=True)
    if not (folder / "peft").is_dir():
        pytest.skip(f"peft cannot be installed: {done.stderr[-200:]}")

    def there(**asked):
        done = subprocess.run(
            [sys.executable, "-c", THERE], input=json.dumps(asked), capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(folder)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["version"] == PEFT[0].partition("==")[2]
        return found

    return there


@pytest.mark.slow
def test_peft_trains_the_same_and_loads_what_a_run_leaves_behind(peft, tmp_path):
    """From the same A and B, on the same pairs: each loss, the merged weights, the logits."""
    worlds, expected = {}, {}
    texts = [t.prompt.tolist() + t.chosen.tolist() for t in triplets_for(LENGTHS)]
    for family in ("llama", "gemma2", "phi3", "gemma3"):
        world = tmp_path / family
        make_model(world / "model", family)
        make_rows(world / "train.jsonl", 28)
        more = (*RANK, "--lambda_adv=0", "--lr=3e-4", "--epochs=2")
        run(world, world / "start", *more, "--lr=0", "--max_steps=1", family="model")
        worlds[str(world)] = run(world, world / "run", *more, family="model")
        lm = AutoModelForCausalLM.from_pretrained(world / "run" / "hf", attn_implementation="eager")
        with torch.no_grad():
            logits = [lm(torch.tensor([ids])).logits[0, -1] for ids in texts]
        expected[str(world)] = torch.stack(logits)
    data, steps = load_pairs(str(world / "train.jsonl"), "train", tiny(), 64).triplets, []
    for step in range(6):
        pairs = [data[i] for i in batch_indices(step, len(data), 8, 0)]
        pairs = [[ids.tolist() for ids in t[:3]] for t in pairs]
        steps.append((3e-4 * train_ganpo.schedule(step, 6, 0.1), pairs))
    found = peft(worlds=[*worlds], steps=steps, texts=texts)
    for world, (rows, weights) in worlds.items():
        logits, losses = found[world]
        torch.testing.assert_close(torch.tensor(logits), expected[world], rtol=1e-5, atol=1e-5)
        assert losses == pytest.approx([row["loss_opo"] for row in rows], abs=1e-5)
        merged = load_file(f"{world}/merged.safetensors")
        merged = {k.replace("language_model.", ""): x for k, x in merged.items()}
        start = load_file(f"{world}/start/hf/model.safetensors")
        assert furthest(weights, {k: merged[k] for k in weights}) < 1e-5
        assert furthest(weights, start) > 5e-4
