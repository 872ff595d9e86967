"""Claims about policy.py: the packed forward is the model's own, and what is refused before it.

    python -m pytest -q tests/test_policy.py

The oracle is naive: one text at a time through the model's own forward, without packing.
"""

import json
import math
import random
import re
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    SmolLM3Config,
)

import data
import distributed
import eval_alpaca
import generate
import policy
import reward_model
import train_ganpo
from data import ChatEncoder, InputError, user_chat
from helpers import (
    LENGTHS,
    LN2,
    SHAPES,
    command,
    flags,
    json_of,
    kept_bytes,
    launch,
    make_model,
    make_reward_model,
    naive_forward,
    rows_of,
    run,
    tiny,
    triplets_for,
    write_lines,
)
from miniature import world
from packing import pack
from policy import load_lm
from reward_model import RewardLM


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
        if family == "gemma3":  # its own forward goes through the multimodal model
            parameter_name = parameter_name.replace("model.", "model.language_model.", 1)
        grad = theirs[parameter_name].grad
        assert (p.grad - grad).abs().max() <= 1e-4 * grad.abs().max(), parameter_name


@pytest.mark.parametrize("family", SHAPES)
def test_generation_is_the_models_own(family, tmp_path, monkeypatch):
    """In batches that shrink as answers end, with prompts read in groups, with texts longer than
    the windows and than the room of the cache."""
    monkeypatch.setattr(generate, "ROOM", 3)
    monkeypatch.setattr(generate, "READ_TOGETHER", 0.9)
    name, encoder = make_model(tmp_path, family), ChatEncoder(tiny())
    chats = [user_chat(text) for text in ("abc", "fade a bed", "a", "cafe bead face")]
    # in float32, because an eager softmax of float64 scores gives padding NaN
    own = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    lm = policy.load_weights(AutoModelForCausalLM, name, dtype=torch.float32)
    stops = list(range(40))
    lm.generation_config.eos_token_id = stops
    answers = generate.generate(lm, encoder, chats, temperature=0, seed=0, max_new_tokens=24)
    for chat, answer in zip(chats, answers, strict=True):
        ids = torch.tensor([encoder.prompt_ids(chat)])
        new = own.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=stops)
        new = new[0, ids.shape[1] :].tolist()
        assert tiny().decode(new[:-1] if answer.ended else new) == answer.text
        assert len(new) == answer.tokens
    assert len({answer.tokens for answer in answers}) > 1


@pytest.mark.parametrize("family", SHAPES)
def test_a_sharded_model_in_bfloat16_is_the_plain_one(family, tmp_path):
    """Its weights stay in float32; angles and scales are rounded nowhere else than without it."""
    name, batch = make_model(tmp_path, family), pack(triplets_for(LENGTHS))
    with distributed.session(60) as device, torch.no_grad():
        load, mesh = partial(load_lm, name, torch.float32), distributed.make_mesh(device, 60)
        sharded = distributed.load_sharded(load, mesh, device, torch.bfloat16, "")(batch)
    plain = load_lm(name, torch.bfloat16)(batch)
    assert plain.h.dtype == torch.bfloat16
    assert torch.equal(sharded.h, plain.h) and torch.equal(sharded.logp, plain.logp)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "granite", "olmo3", "phi3", "smollm3"])
def test_two_ranks_train_and_export_every_family(family, tiny_world, tmp_path):
    """At learning rate 0 the policy stays the reference, and the export has the file's weights."""
    base = make_model(tmp_path / "base", family)
    more = ("--lr=0", "--max_steps=1", "--batch_size=4")
    rows, weights = run(tiny_world, tmp_path / "r", f"--model={base}", *more, ranks=2)
    assert rows[0]["loss_opo"] == pytest.approx(LN2, rel=1e-6)
    own = load_lm(base, torch.float32).model.state_dict()
    for key, value in weights.items():
        if not key.startswith(("pos.", "neg.")):
            assert torch.equal(value, own[key])


def test_of_a_multimodal_model_the_text_part_is_trained_and_exported(tiny_world, tmp_path, capsys):
    base = Path(make_model(tmp_path / "base", "gemma3"))
    said = f"{base}: of this multimodal model the text part is used, and exported alone"
    policy.print_once.cache_clear()
    run(tiny_world, tmp_path / "r", f"--model={base}", "--lr=0", "--max_steps=1")
    assert capsys.readouterr().out.count(said) == 1  # though policy and reference are read
    whole, text = (AutoModelForCausalLM.from_pretrained(f) for f in (base, tmp_path / "r" / "hf"))
    assert [type(m).__name__ for m in (whole, text)] == [
        "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"
    ]  # fmt: skip
    exported = json_of(tmp_path / "r" / "hf" / "config.json")  # with the names of transformers 4
    assert (exported["rope_theta"], exported["rope_local_base_freq"]) == (1e6, 1e4)
    ids = torch.arange(6, 40)[None]
    assert torch.equal(whole(ids).logits, text(ids).logits)
    assert text.get_output_embeddings().weight is text.get_input_embeddings().weight
    argv = [f"--model={base}", f"--dataset={tiny_world / 'train.jsonl'}", "--batch_size=8"]
    reward_model.main([*argv, "--max_length=64", f"--out_dir={tmp_path / 'rm'}"])
    scores = reward_model.RewardModel(str(tmp_path / "rm" / "hf"), torch.device("cpu"))
    assert type(scores.model).__name__ == "Gemma3TextForSequenceClassification"
    spoiled = base / "model.safetensors"  # what is not used has to be whole all the same
    save_file({k: v for k, v in load_file(spoiled).items() if "projector" not in k}, spoiled,
              {"format": "pt"})  # fmt: skip
    with pytest.raises(SystemExit, match="missing: model.multi_modal_projector"):
        run(tiny_world, tmp_path / "s", f"--model={base}")


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


@pytest.mark.parametrize("family, scale", [("gemma2", 3.0), ("llama", 1.0)])
def test_a_head_in_chunks_is_the_head(family, scale, tiny_world, monkeypatch):
    lm, batch = load_lm(str(tiny_world / family), torch.float64), pack(triplets_for(LENGTHS))
    lm.model.config.logits_scaling, found = scale, []
    for chunk in (1000, 3):
        monkeypatch.setitem(policy.CHUNK, "cpu", (chunk, 1))
        monkeypatch.setattr(policy, "ROWS_IN_CACHE", 2)
        logp = lm(batch).logp
        weights = torch.linspace(-1, 2, len(logp), dtype=torch.float64)
        found.append([logp, *torch.autograd.grad(weights @ logp, lm.parameters())])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


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
    save_file({}, tmp_path / "gpt2" / "model.safetensors")  # weights that nobody reads
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


# ---------------------------------------------------------------------- what is not the weights


def programs(world_folder, out, model, reward=False):
    """Every program that reads a model, with command lines that give it this one."""
    good, pairs = world_folder / "llama", world_folder / "train.jsonl"
    out.mkdir(exist_ok=True)
    tasks = world.draw_tasks(random.Random(0), 2, distinct=True)
    prompts = write_lines(out / "prompts.jsonl", [t._asdict() for t in tasks])
    exam = [f"--prompts={prompts}", f"--out={out / 'e'}", "--max_new_tokens=4", "--temperatures=0"]
    learn = [f"--dataset={pairs}", f"--out_dir={out / 'r'}", "--batch_size=8", "--max_length=64"]
    yield reward_model, [f"--model={model}", *learn]
    if reward:
        yield eval_alpaca, [f"--model={good}", f"--reward_model={model}", *exam]
        return
    plain = flags(world_folder, out / "s", "--loss=simpo", "--lambda_adv=0")
    yield train_ganpo, [*plain, f"--model={model}"]
    yield train_ganpo, flags(world_folder, out / "t", f"--ref_model={model}")
    yield generate, [f"--model={model}", "hello"]
    yield eval_alpaca, [f"--model={model}", *exam]
    yield eval_alpaca, [f"--model={good}", f"--baseline={model}", *exam]


def refused_by_all(message, world_folder, out, model, reward=False):
    """Asserts that each program ends with one line of that form, with nothing learnt or written."""
    for program, argv in programs(world_folder, out, model, reward):
        if "from one of" in message and f"--ref_model={model}" in argv:
            continue  # a reference's tokenizer is not read
        with pytest.raises(SystemExit) as stop:
            program.main(argv)
        assert re.search(message, str(stop.value)), (program, stop.value)
        assert f"{model}: " in str(stop.value) and "\n" not in str(stop.value)
        assert not [*out.glob("*/metrics.csv"), *out.glob("e/*"), *out.glob("*/hf")]


def renamed(old, new):
    return lambda weights: {k.replace(old, new, 1): v for k, v in weights.items()}


def without(name):
    return lambda weights: {k: v for k, v in weights.items() if k != name}


ONE = "model.layers.1.mlp.up_proj.weight"
WRONG_WEIGHTS = {  # how a file differs, and what is said
    "a LoRA's": (
        renamed("q_proj.weight", "q_proj.base_layer.weight"),
        r"missing: model.layers.0.self_attn.q_proj.weight, .*; unexpected: .*base_layer.*merge it",
    ),
    "a prefix of peft": (
        lambda weights: {f"base_model.model.{k}": v for k, v in weights.items()},
        r"missing: [^;]* and \d+ more; unexpected: base_model.model.[^;]* and \d+ more; .*merge it",
    ),
    "a prefix of torch.compile": (
        lambda weights: {f"_orig_mod.{k}": v for k, v in weights.items()},
        r"missing: [^;]* and \d+ more; unexpected: _orig_mod.[^;]* and \d+ more$",
    ),
    "one not a number": (
        lambda w: w | {ONE: w[ONE].index_fill(0, torch.tensor(2), math.nan)},
        f"not finite: {ONE}$",
    ),
    "one missing": (without(ONE), f"missing: {ONE}$"),
    "one too many": (lambda w: w | {"model.extra": torch.ones(2)}, "unexpected: model.extra$"),
    "another shape": (
        lambda w: w | {ONE: torch.ones(47, 32)},
        rf"of another shape: {ONE} \(47, 32\) in place of \(48, 32\)$",
    ),
}


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_weights_that_are_not_the_models_are_refused_by_every_program(kind, tiny_world, tmp_path):
    change, message = WRONG_WEIGHTS[kind]
    model = shutil.copytree(tiny_world / "llama", tmp_path / "model")
    head = make_reward_model(tmp_path / "reward", tiny_world / "llama")
    for folder in (model, tmp_path / "reward"):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})
    refused_by_all(message, tiny_world, tmp_path / "out", model)
    refused_by_all(message, tiny_world, tmp_path / "rewards", head, reward=True)
    with pytest.raises(InputError, match=message):
        world.examine(str(model), [], 0.0, 0)


def test_files_of_a_model_s_folder_that_are_not_the_model_s_may_be_anything(tiny_world, tmp_path):
    model = shutil.copytree(tiny_world / "llama", tmp_path / "model")
    (model / "log.json").write_text('{"step": 1}\n{"step": 2}\n')
    assert policy.weight_files(model) == [model / "model.safetensors"]


def test_a_folder_with_both_kinds_of_shards_is_read_from_safetensors(tiny_world, tmp_path):
    """As many on the Hub are."""
    model = shutil.copytree(tiny_world / "llama", tmp_path / "model")
    shards = in_shards(model)
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "none.bin"}}')
    assert policy.weight_files(model) == shards


def test_weights_of_zeros_are_named_and_old_constants_are_no_weights(tiny_world, tmp_path, capsys):
    model = shutil.copytree(tiny_world / "llama", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights |= {ONE: 0 * weights[ONE], "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    policy.load_weights(AutoModelForCausalLM, str(model))
    assert capsys.readouterr().out.endswith(f"all values are 0, as in a broken download: {ONE}\n")


def test_only_training_from_a_causal_lm_draws_a_new_head_and_says_so(tiny_world, tmp_path, capsys):
    said = r"llama has no score.weight: it is new and drawn at random"
    out = [f"--out_dir={tmp_path / n}" for n in "abc"]
    (program, argv), *_ = programs(tiny_world, tmp_path / "o", tiny_world / "llama")
    program.main([*argv, out[0]])
    assert re.search(said, capsys.readouterr().out)
    (_, argv), *_ = programs(tiny_world, tmp_path / "o", tmp_path / "a" / "hf")
    program.main([*argv, out[1]])  # a reward model learns on with its head
    assert "score.weight" not in capsys.readouterr().out
    file = tmp_path / "a" / "hf" / "model.safetensors"
    save_file(without("score.weight")(load_file(file)), file, {"format": "pt"})
    refused_by_all("missing: score.weight", tiny_world, tmp_path / "p", file.parent, reward=True)


def test_a_config_that_ties_two_different_embeddings_is_refused(tiny_world, tmp_path):
    model = shutil.copytree(tiny_world / "llama", tmp_path / "model")
    change_config(model, tie_word_embeddings=True)
    message = "contradictory: config.json ties the embeddings, but the files hold two different"
    for program, argv in programs(tiny_world, tmp_path / "out", model):
        if program is not reward_model:  # it has no head of logits
            with pytest.raises(SystemExit, match=message):
                program.main(argv)


def change_config(folder, name="config.json", **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def in_shards(folder):
    (kind,) = json_of(folder / "config.json")["architectures"]
    lm = getattr(transformers, kind).from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    lm.save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


def adapter_alone(folder):
    for file in folder.glob("[cm]*.*"):
        file.unlink()
    save_file({}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')


TWO_BASES = {"rope_theta": 1, "rope_scaling": {"rope_theta": 2}}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
NOT_PLAIN = {
    "an adapter beside": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge it first"),
    "an adapter alone": (adapter_alone, r"merge it first \(peft: .*merge_and_unload.*save_pretr"),
    "an angle that is none": (
        lambda f: change_config(f, rope_theta=-1, rope_parameters=None),
        "config.json: rope_theta is -1, no positive number",
    ),
    "quantised": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised \(gptq\)",
    ),
    "quantised, and not said so": (
        lambda f: save_file(
            {k: v.to(torch.int8) for k, v in load_file(f / "model.safetensors").items()},
            f / "model.safetensors", {"format": "pt"},
        ),
        "model.safetensors holds .*weight as I8: quantised weights are not supported",
    ),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_bytes(POINTER),
        "model.safetensors is a Git LFS pointer.*`git lfs pull`",
    ),
    "a .bin pointer": (
        lambda f: as_bin(f).write_bytes(POINTER),
        "pytorch_model.bin is a Git LFS pointer.*`git lfs pull`",
    ),
    "a tokenizer's pointer": (
        lambda f: (f / "tokenizer.json").write_bytes(POINTER), "tokenizer.json is a Git LFS pointer"
    ),
    "cut": (lambda f: cut(f / "model.safetensors"), "model.safetensors is cut or damaged"),
    "quantised in a .bin": (
        lambda f: torch.save({"lm_head.weight": torch.zeros(2, dtype=torch.int8)}, as_bin(f)),
        "pytorch_model.bin holds lm_head.weight as torch.int8: quantised weights are not supported",
    ),
    "a cut index": (
        lambda f: cut(in_shards(f)[0].with_name("model.safetensors.index.json")),
        "model.safetensors.index.json is cut or damaged",
    ),
    "an index without names": (
        lambda f: in_shards(f)[0].with_name("model.safetensors.index.json").write_text("{}"),
        "index.json is cut or damaged .*; there is no 'weight_map'",
    ),
    "an old index beside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "holds both model.safetensors and model.safetensors.index.json: remove one",
    ),
    "a link to nothing": (
        lambda f: (f / "more.safetensors").symlink_to(f / "blobs" / "0"),
        "more.safetensors is a link to a file that is not there",
    ),
    "a pickled object": (
        lambda f: torch.save({"a": Path("b")}, as_bin(f)),
        "pytorch_model.bin is cut or damaged .*; it holds Python objects, not tensors alone",
    ),
    "a stop by name": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "generation_config.json: eos_token_id is '</s>', no token ids",
    ),
    "a text in place of a number": (
        lambda f: (f / "generation_config.json").write_text('{"max_new_tokens": "9"}'),
        "generation_config.json: no settings that transformers can use: '<=' not supported",
    ),
    "two values of a key": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace("{", '{"hidden_act": "relu", ', 1)
        ),
        "config.json: hidden_act is given twice",
    ),
    "two bases of the angles": (
        lambda f: change_config(f, rope_theta=77.0),
        "config.json: rope_theta is 77.0, but 10000.0 in rope_parameters: remove one",
    ),
    "two scalings of positions": (
        lambda f: change_config(f, rope_scaling={"type": "linear", "factor": 2.0}),
        "config.json: rope_type is 'linear', but 'default' in rope_parameters: remove one",
    ),
    "two bases in the text part": (
        lambda f: change_config(f, text_config=TWO_BASES), "rope_theta is 1, but 2 in rope_scaling",
    ),
    "an unknown activation": (
        lambda f: change_config(f, hidden_act="foo"),
        "config.json: hidden_act is 'foo', which transformers does not know",
    ),
    "a template that is a number": (
        lambda f: change_config(f, "tokenizer_config.json", chat_template=5),
        "tokenizer_config.json: chat_template is 5, no text and no list of named texts",
    ),
    "templates that are none": (
        lambda f: change_config(f, "tokenizer_config.json", chat_template=[{"name": "default"}]),
        "tokenizer_config.json: chat_template is .*'default'.*, no text and no list of named texts",
    ),
    "cut settings": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [1,'),
        "generation_config.json is cut or damaged",
    ),
    "a cut .bin": (lambda f: cut(as_bin(f)), "pytorch_model.bin is cut or damaged"),
    "a cut shard": (
        lambda f: cut(in_shards(f)[1]),
        r"model-00002-of-0000\d.safetensors is cut",
    ),
    "no shard": (
        lambda f: in_shards(f)[1].unlink(),
        r"index.json names model-00002-of-0000\d.safetensors, which is not there \(1 of \d files",
    ),
    "no type": (
        lambda f: (f / "config.json").write_text("{}"),
        "Unrecognized model in .*. Should have a `model_type` key in its config.json.",
    ),
    "no tokenizer": (
        lambda f: [file.unlink() for file in f.glob("token*")],
        r"from one of: \(1\) .*, \(2\) .* or \(3\) .* convert\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_not_plain_weights_is_one_line_before_any_is_read(
    kind, tiny_world, tmp_path, monkeypatch
):
    spoil, message = NOT_PLAIN[kind]
    model = shutil.copytree(tiny_world / "llama", tmp_path / "model")
    reward = Path(make_reward_model(tmp_path / "reward", tiny_world / "llama"))
    spoil(model)
    spoil(reward)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    refused_by_all(message, tiny_world, tmp_path / "out", model)
    refused_by_all(message, tiny_world, tmp_path / "rewards", reward, reward=True)


class Gone:
    """The Hub's interface, which answers that there is no such thing."""

    def __getattr__(self, name):
        return mock.Mock(side_effect=RepositoryNotFoundError("404", response=mock.MagicMock()))


@pytest.mark.parametrize("answer, message", [
    (None, r"is no \w+ here and the Hub cannot be reached \(.*refused.*\)$"),
    (Gone, r"is no \w+ here and no \w+ on the Hub \(a private one needs HF_TOKEN\)$"),
])  # fmt: skip
def test_an_id_that_the_hub_does_not_give_is_one_line_in_a_moment(
    answer, message, tiny_world, tmp_path, monkeypatch
):
    """The libraries alone try it again for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    if answer:
        monkeypatch.setattr("data.HfApi", answer)
    begin = time.monotonic()
    refused_by_all(message, tiny_world, tmp_path / "out", "some/model")
    refused_by_all(message, tiny_world, tmp_path / "out", "some/model", reward=True)
    with pytest.raises(SystemExit, match=f"some/pairs: {message}"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", "--dataset=some/pairs"))
    assert time.monotonic() - begin < 10


def test_what_another_file_of_a_tokenizer_replaces_is_said(tiny_world, tmp_path, capsys):
    folder = shutil.copytree(tiny_world / "llama", tmp_path / "m")
    file = folder / "tokenizer_config.json"
    template, own = (folder / "chat_template.jinja").read_text(), json_of(file)
    same = {"chat_template": template}
    same["eos_token"] = {"__type": "AddedToken", "content": own["eos_token"], "special": True}
    file.write_text(json.dumps(own | same))
    policy.read_tokenizer(str(folder))
    assert capsys.readouterr().out == ""
    file.write_text(json.dumps(own | {"chat_template": "another"}))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    tokenizer = policy.read_tokenizer(str(folder))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (template, "<|end|>")
    said = f"{folder}: another file's KEY is used, not that of tokenizer_config.json\n"
    keys = "chat_template", "eos_token"
    assert capsys.readouterr().out == "".join(said.replace("KEY", key) for key in keys)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_cached_file_of_a_hub_id_is_checked_too(file, tiny_world, tmp_path, monkeypatch):
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    shutil.copytree(tiny_world / "llama", repo / "snapshots" / "c0ffee")
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(tmp_path))
    file = repo / "snapshots" / "c0ffee" / file
    policy.read_any_config("some/model")
    file.write_text(file.read_text().replace("{", '{"a": 1, "a": 1, ', 1))
    with pytest.raises(InputError, match=f"^--model some/model: {file.name}: a is given twice$"):
        policy.read_any_config("some/model")


def test_older_and_newer_names_of_one_setting_may_stand_side_by_side(tiny_world, tmp_path):
    """As in our own exports, and Qwen2-VL's `type` is another one than its rope_type."""
    angles = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    policy.check_angles({
        "rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": {"full_attention": angles, "sliding_attention": {"rope_theta": 1e3}},
    })  # fmt: skip
    policy.check_angles({"rope_scaling": {"type": "mrope", "rope_type": "default"},
                         "rope_parameters": {"rope_type": "default"}})  # fmt: skip


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_hub_is_not_asked_for_what_is_cached_or_offline(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("data.HfApi", Gone)
    (tmp_path / f"{kind}s--some--cached" / "snapshots").mkdir(parents=True)
    data.hub_check("some/cached", kind)
    with pytest.raises(InputError, match=f"no {kind} on the Hub"):
        data.hub_check("some/other", kind)
    with pytest.raises(InputError, match=f"no name that a {kind} on the Hub can have"):
        data.hub_check("an other", kind)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data.hub_check("some/other", kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin shards"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_values_are_the_files_in_every_form_and_precision(family, form, dtype, tmp_path):
    folder = Path(make_model(tmp_path / "m", family))
    file = folder / "model.safetensors"
    weights = {k: v.to(dtype) for k, v in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    change_config(folder, dtype=str(dtype).removeprefix("torch."))
    if form == "shards":
        in_shards(folder)
    elif form == "bin":
        as_bin(folder)
    elif form == "bin shards":
        names = {k: f"pytorch_model-{i % 2}.bin" for i, k in enumerate(weights)}
        for shard in {*names.values()}:
            torch.save({k: v for k, v in weights.items() if names[k] == shard}, folder / shard)
        index = {"metadata": {}, "weight_map": names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        file.unlink()
    assert len([*folder.glob("*.bin"), *folder.glob("*.safetensors")]) > ("shards" in form)
    policy.read_model_config(str(folder), 64)
    args = SimpleNamespace(chat_template=None, dtype="float32", max_new_tokens=8)
    loaded = {  # training, reward model's training, generation, evaluation
        load_lm(str(folder), torch.float32).model: torch.float32,
        load_lm(str(folder), torch.float32, wrapper=RewardLM).model: torch.float32,
        policy.load_weights(AutoModelForCausalLM, str(folder), dtype="auto"): dtype,
        eval_alpaca.Writer(str(folder), "--model", args, torch.device("cpu")).lm: torch.float32,
    }
    for model, wanted in loaded.items():
        found = dict(model.named_parameters())
        if found.pop("score.weight", None) is not None:
            found["lm_head.weight"] = weights.get("lm_head.weight", torch.empty(0)).to(wanted)
        assert {*found} - {*weights} <= {"lm_head.weight"} and {*weights} <= {*found}
        for name, value in weights.items():
            assert torch.equal(found[name], value.to(wanted)) and found[name].dtype == wanted


def scaled(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | more}


LONG = scaled("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4,
              original_max_position_embeddings=16)  # fmt: skip


def test_angles_that_depend_on_the_batch_are_refused_or_not_reached(tiny_world, tmp_path):
    model = make_model(tmp_path / "m", **LONG)
    with pytest.raises(SystemExit, match="position scaling 'longrope' .* longest text of a batch"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", f"--model={model}"))
    with pytest.raises(SystemExit, match="and 12 new ones exceed the model's 16 positions"):
        generate.main([f"--model={model}", "--max_new_tokens=12", "hello"])
    with pytest.raises(ValueError, match="position scaling 'other' is not .*: default, dynamic, "):
        policy.check_config(LlamaConfig(rope_parameters={"rope_type": "other"}), 64)
    nested = AutoConfig.from_pretrained(model)
    nested.rope_parameters = {"full_attention": nested.rope_parameters}
    with pytest.raises(ValueError, match="position scaling 'longrope'"):
        policy.check_config(nested, 64)


CONTRADICTS = "contradicts itself: layer_types has sliding_attention"


@pytest.mark.parametrize("changes, message", [
    ({"use_sliding_window": False}, CONTRADICTS),
    ({"sliding_window": None}, CONTRADICTS),
    ({"sliding_window": 0}, "sliding_window 0, with which a token sees nothing"),
    ({"layer_types": ["chunked_attention"] * 2}, "layers of type 'chunked_attention' are not"),
])  # fmt: skip
def test_a_config_that_contradicts_itself_about_windows_is_refused(changes, message):
    """The model itself would mask by the types of its layers."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    config = SmolLM3Config(**{"use_sliding_window": True, "sliding_window": 8} | layers)
    policy.check_config(config, 64)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        policy.check_config(config, 64)


YARN = scaled("yarn", original_max_position_embeddings=32)
LLAMA3 = scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32)  # fmt: skip


@pytest.mark.parametrize("changes", [scaled("linear"), scaled("dynamic"), YARN, LLAMA3],
                         ids=["linear", "dynamic", "yarn", "llama3"])  # fmt: skip
def test_with_other_position_scaling_a_pair_is_alone_as_beside_the_longest_one(changes, tmp_path):
    """Up to the model's positions, beyond which --max_length is refused."""
    name = make_model(tmp_path, max_position_embeddings=64, **changes)
    policy.read_model_config(name, 64)
    with pytest.raises(InputError, match="--max_length 65 is beyond the model's 64 positions"):
        policy.read_model_config(name, 65)
    lm, own = load_lm(name, torch.float64), AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float64, attn_implementation="eager"
    )  # fmt: skip
    short, long = triplets_for([(5, 9, 4), (20, 44, 30)])
    with torch.no_grad():
        before, together, after = (lm(pack(x)).logp for x in ([short], [short, long], [short]))
        expected = naive_forward(own, [short])[1]
    assert torch.equal(before, after)
    torch.testing.assert_close(together[[0, 2]], before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)


BACKWARDS = {"use_bidirectional_attention": True}


@pytest.mark.parametrize("family, more, message", [
    ("t5", {}, "model type 't5' is not supported"),
    ("bloom", {}, "model type 'bloom' is not supported"),
    ("bert", {"is_decoder": True}, "type 'bert' writes no text, .* as are gemma2, .*, smollm3 and"),
    ("gemma3_text", BACKWARDS, "a model of type 'gemma3_text' writes no text"),
])  # fmt: skip
def test_a_model_without_positions_or_an_encoder_is_one_line_in_every_program(
    family, more, message, tiny_world, tmp_path
):
    AutoConfig.for_model(family, **more).save_pretrained(tmp_path / "m")
    tiny().save_pretrained(tmp_path / "m")
    save_file({}, tmp_path / "m" / "model.safetensors")
    refused_by_all(message, tiny_world, tmp_path / "out", tmp_path / "m")


def test_a_stop_beyond_the_vocabulary_is_one_line_in_every_program(tiny_world, tmp_path):
    model = make_model(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}')
    message = r"token id 99999 is beyond the vocabulary of the model \(eos_token_id\), 300 tokens"
    refused_by_all(message, tiny_world, tmp_path / "out", model)


def test_token_ids_beyond_the_embedding_are_one_line_in_every_program(tiny_world, tmp_path):
    model = make_model(tmp_path / "model", vocab_size=100)
    reward = make_reward_model(tmp_path / "reward", model)
    runs = [*programs(tiny_world, tmp_path / "out", model)]
    runs += programs(tiny_world, tmp_path / "out", reward, reward=True)
    for program, argv in runs:
        with pytest.raises(SystemExit, match=r": token id \d+ is beyond the .*, 100 tokens$"):
            program.main(argv)
        assert not [*(tmp_path / "out").glob("e/*")]


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
        "critics": 0,
    }
    assert policy.least_memory(name, name, torch.bfloat16, **of) == {
        "weights, moments, gradients": 16 * n,  # as with float32, of which the weights are
        "reference": 2 * n,
        "graphs": 1000 * 3 * 2 * (10 * 32 + 3 * 48),
        "critics": 0,
    }
    of |= dict(checkpointing=True, shards=4, critics=77)
    assert policy.least_memory(name, None, torch.float64, **of) == {
        "weights, moments, gradients": 32 * n / 4,
        "reference": 0,
        "graphs": 1000 * 3 * 8 * 32,
        "critics": 4 * 8 * 77,  # whole on every rank
    }


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
    inner = policy.least_memory
    monkeypatch.setattr(policy, "least_memory", lambda *a, **k: seen.append(k) or inner(*a, **k))
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
    # disc_hidden 16, 2 layers: project_in, positions, layers of 12 matrices, head
    d, n = 16, 0 if more else 2
    layers = 2 * (12 * d * d + 13 * d)
    assert seen[0]["critics"] == n * (33 * d + 64 * d + layers + d * d + d + d + 1)


def test_critics_that_cannot_fit_are_refused_before_they_are_made(tiny_world, tmp_path):
    with pytest.raises(SystemExit, match=r"critics 3\d{3}\.\d\d\); available"):
        train_ganpo.main(flags(tiny_world, tmp_path / "r", "--disc_hidden=65536"))


def test_what_cannot_fit_is_refused_with_the_numbers(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr("distributed.available_memory", lambda device: 2.0**20)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # before a weight is read
    with pytest.raises(SystemExit, match=(
        r"^train_ganpo.py: memory per rank, at least: 0.00 GiB \(weights, moments, gradients 0.00,"
        r" reference 0.00, graphs 0.00, critics 0.00\); available: 0.00 GiB. More ranks or"
    )):  # fmt: skip
        train_ganpo.main(flags(tiny_world, tmp_path / "r"))
    assert not (tmp_path / "r").exists()
    needed = {"weights": 3 * 2.0**30, "graphs": 2.0**30}
    policy.refuse_what_cannot_fit(needed, 2.0**32)
    with pytest.raises(ValueError, match=r"4.00 GiB \(weights 3.00, graphs 1.00\); .*: 4.00 GiB"):
        policy.refuse_what_cannot_fit(needed, 2.0**32 - 1)
