"""Claims about policy.py: the packed forward is the model's own, and what is refused before it.

    python -m pytest -q tests/test_policy.py

The oracle is naive: one text at a time through the model's own forward, without packing.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import policy
import train_ganpo
from helpers import (
    LENGTHS,
    LN2,
    SHAPES,
    command,
    flags,
    launch,
    make_model,
    naive_forward,
    rows_of,
    run,
    tiny,
    triplets_for,
)
from packing import pack
from policy import load_lm


@pytest.mark.parametrize("family", SHAPES)
def test_packed_forward_and_gradient_equal_the_models_own(family, tmp_path):
    name, triplets = make_model(tmp_path, family), triplets_for(LENGTHS)
    own = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float64, attn_implementation="eager"
    )
    packed = load_lm(name, torch.float64)
    latents, logps = naive_forward(own.eval(), triplets)
    batch = pack(triplets)
    out = packed(batch)
    # the families compute norms, rotary angles and eager softmax in fp32 even in a float64 model
    torch.testing.assert_close(out.logp, logps, rtol=1e-5, atol=1e-5)
    for row, mask, latent in zip(out.h[0][batch.gather], batch.mask, latents, strict=True):
        torch.testing.assert_close(row[mask], latent[0], rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 1, len(logps), dtype=torch.float64)
    (logps * weight).sum().backward()
    (out.logp * weight).sum().backward()
    theirs = dict(own.named_parameters())
    for parameter_name, p in packed.model.named_parameters():
        grad = theirs[parameter_name].grad
        assert (p.grad - grad).abs().max() <= 1e-4 * grad.abs().max(), parameter_name


def test_batch_mates_and_packing_order_change_nothing(tiny_world):
    lm, triplets = load_lm(str(tiny_world / "gemma2"), torch.float64), triplets_for(LENGTHS)
    with torch.no_grad():
        together = lm(pack(triplets)).logp
        backwards = lm(pack(triplets[::-1])).logp
        alone = [lm(pack([t])).logp for t in triplets]
    n = len(triplets)
    for i in range(n):
        for side in (0, 1):
            assert abs(alone[i][side] - together[i + side * n]) < 1e-6
            assert abs(backwards[n - 1 - i + side * n] - together[i + side * n]) < 1e-6


def test_rejected_does_not_see_chosen(tiny_world):
    lm = load_lm(str(tiny_world / "llama"), torch.float64)
    a, b = triplets_for([(6, 5, 7), (6, 5, 7)])
    with torch.no_grad():
        logp = lm(pack([a])).logp, lm(pack([a._replace(chosen=b.chosen)])).logp
    assert logp[0][1] == logp[1][1] and logp[0][0] != logp[1][0]


def test_a_head_in_chunks_is_the_head(tiny_world, monkeypatch):
    lm, batch = load_lm(str(tiny_world / "gemma2"), torch.float64), pack(triplets_for(LENGTHS))
    whole = lm(batch).logp
    monkeypatch.setattr("policy.TOKENS_PER_CHUNK", 3)
    monkeypatch.setattr("policy.LOGITS_PER_CHUNK", 1)
    torch.testing.assert_close(lm(batch).logp, whole, rtol=1e-12, atol=1e-12)


def test_the_attention_refuses_a_plain_call(tiny_world):
    lm = load_lm(str(tiny_world / "llama"), torch.float32)
    with pytest.raises(ValueError, match="needs a layout"):
        lm.model(torch.ones(1, 4, dtype=torch.int64))


def test_checkpointing_changes_no_gradient(tiny_world):
    grads = []
    for checkpointing in (False, True):
        lm = load_lm(str(tiny_world / "llama"), torch.float64, checkpointing)
        lm(pack(triplets_for(LENGTHS))).logp.sum().backward()
        grads.append([p.grad for p in lm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------------- loading


def forbid_reading(rank):
    if rank:
        AutoModelForCausalLM.from_pretrained = None


def test_one_rank_alone_reads_the_weights(tiny_world, tmp_path):
    launch(flags(tiny_world, tmp_path / "r", "--max_steps=1"), 2, prepare=forbid_reading)
    assert rows_of(tmp_path / "r" / "metrics.csv")[0]["loss_opo"] == pytest.approx(LN2, rel=1e-6)


def test_weights_that_cannot_be_read_are_one_line(tiny_world, tmp_path):
    broken = shutil.copytree(tiny_world / "llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="--model .*broken: [^\n]+$"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--model={broken}"))


def test_other_models_than_the_checked_ones_are_refused(tiny_world, tmp_path):
    assert {*policy.FAMILIES} == {*SHAPES}
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1)
    config.save_pretrained(tmp_path / "gpt2")
    tiny().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"weights that nobody reads")
    with pytest.raises(SystemExit, match="'gpt2' is not supported; these are: "):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--model={tmp_path / 'gpt2'}"))


def test_a_models_own_code_is_never_run(tiny_world, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(tiny_world / "llama", evil)
    config = json.loads((evil / "config.json").read_text())
    own = {f"Auto{k}": "evil.Evil" for k in ("Config", "ModelForCausalLM", "Tokenizer")}
    config |= {"model_type": "evil", "auto_map": own}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(SystemExit, match="evil contains custom code"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--model={evil}"))
    done = command("generate.py", "--model", evil, "hello", limit=60)
    assert done.returncode == 1 and done.stderr.startswith("generate.py: ")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- memory by arithmetic

WEIGHTS = {  # of the tiny models, counted by hand: 300 tokens, 32 wide, 4 and 2 heads of 8
    "llama": 2 * 300 * 32 + 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32,
    "gemma2": 300 * 32 + 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 4 * 32) + 32,
}


@pytest.mark.parametrize("family", WEIGHTS)
def test_the_least_memory_is_a_sum_that_can_be_done_by_hand(family, tiny_world):
    name, n = str(tiny_world / family), WEIGHTS[family]
    of = dict(checkpointing=False, kept_tokens=1000, shards=1)
    assert policy.least_memory(name, name, torch.float32, **of) == {
        "weights, moments, gradients": 16 * n,  # float32: weights, gradients, two moments
        "reference": 4 * n,
        "graphs": 1000 * 3 * 4 * (10 * 32 + 3 * 48),
    }
    assert policy.least_memory(name, name, torch.bfloat16, **of) == {
        "weights, moments, gradients": 16 * n,  # as with float32, of which the weights are
        "reference": 2 * n,
        "graphs": 1000 * 3 * 2 * (10 * 32 + 3 * 48),
    }
    of |= dict(checkpointing=True, shards=4)
    assert policy.least_memory(name, None, torch.float64, **of) == {
        "weights, moments, gradients": 32 * n / 4,
        "reference": 0,
        "graphs": 1000 * 3 * 8 * 32,
    }


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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_the_least_memory_is_not_more_than_autograd_keeps(family, checkpointing, tmp_path):
    """Otherwise a run that fits would be refused."""
    name, batch = make_model(tmp_path, family), pack(triplets_for([(20, 30, 25), (10, 40, 35)]))
    lm = load_lm(name, torch.float32, checkpointing)
    kept = len(batch.ids)
    least = policy.least_memory(name, None, torch.float32, checkpointing, kept, 1)["graphs"]
    assert 0.3 < least / kept_bytes(lm, batch) <= 1


@pytest.mark.parametrize("more", [(), ("--lambda_adv=0",), ("--critic=mse",)])
def test_the_graphs_that_count_are_those_that_are_alive_at_once(
    more, tiny_world, tmp_path, monkeypatch
):
    """With a trained critic those of a step, otherwise those of one forward."""
    seen = []
    inner = train_ganpo.least_memory
    monkeypatch.setattr(
        train_ganpo, "least_memory", lambda *a, **k: seen.append(k) or inner(*a, **k)
    )
    tokens = []  # of each step, of each forward
    step = train_ganpo.train_step

    def counted(run, batches, number):
        batches = list(batches)
        tokens.append([len(batch.ids) for batch in batches])
        return step(run, batches, number)

    monkeypatch.setattr(train_ganpo, "train_step", counted)
    run(tiny_world, tmp_path / "r", *more, "--micro_batch_size=3")
    alive = [max(x) for x in tokens] if more else [sum(x) for x in tokens]
    assert [x["kept_tokens"] for x in seen] == [max(alive)] and len(tokens) == 3


def test_what_cannot_fit_is_refused_with_the_numbers(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr("distributed.available_memory", lambda device: 2.0**20)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # before a weight is read
    with pytest.raises(SystemExit, match=(
        r"^train_ganpo.py: memory per rank, at least: 0.00 GiB \(weights, moments, gradients 0.00,"
        r" reference 0.00, graphs 0.00\); available: 0.00 GiB. More ranks or --checkpointing"
    )):  # fmt: skip
        train_ganpo.main(flags(tiny_world, tmp_path / "r"))
    assert not (tmp_path / "r").exists()
    needed = {"weights": 3 * 2.0**30, "graphs": 2.0**30}
    policy.refuse_what_cannot_fit(needed, 2.0**32)
    with pytest.raises(ValueError, match=r"4.00 GiB \(weights 3.00, graphs 1.00\); .*: 4.00 GiB"):
        policy.refuse_what_cannot_fit(needed, 2.0**32 - 1)
