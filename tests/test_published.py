"""Six recorded steps of the authors' own trainer, followed by this one.

    python -m pytest -q -m slow tests/test_published.py

The recording lies outside the repository, because it is not ours; docs/choices.md says how it was
made. What the two programs do differently is put in here: the learning rates of each step, running
means that start at the first batch's, and norms in float64.
"""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import train_ganpo
from data import PreferenceData, Triplet
from discriminator import Discriminator
from helpers import ROOT, SHARED, rows_of

RECORD, STEPS, PAIRS = SHARED.parent / "cases" / "published", 6, 8
OURS = {"weight": "parametrizations.weight.original", "u": "parametrizations.weight.0._u"}
OURS["v"] = "parametrizations.weight.0._v"


def load_recorded(critics):
    """Gives the critics the recorded start; layers with a spectral norm hold three tensors."""
    if critics["disc_pos"].ema.is_meta:  # built only to be counted
        return critics
    recorded, state = load_file(RECORD / "critics.safetensors"), critics.state_dict()
    for name, tensor in recorded.items():
        layer, kind = name.rsplit(".", 1)
        if f"{layer}.u" in recorded and kind in OURS:
            name = f"{layer}.{OURS[kind]}"
        assert state[name].shape == tensor.shape, name
        state[name] = tensor
    critics.double().load_state_dict(state)
    return critics


def update_means(critic, *scores):
    """Running means as published: the first batch's, then 0.9 of them and 0.1 of each batch's."""
    batch = torch.stack([s.mean() for s in scores])
    critic.ema.copy_(0.9 * critic.ema + 0.1 * batch if critic.num_updates else batch)
    critic.num_updates += 1


def norm_in_float64(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.slow
@pytest.mark.skipif(not RECORD.is_dir(), reason="the recorded steps are not at hand")
def test_six_steps_of_the_published_trainer(tmp_path, monkeypatch):
    ids = "prompt_input_ids", "chosen_input_ids", "rejected_input_ids"
    rows = [json.loads(line) for line in (RECORD / "rows.jsonl").open()][: STEPS * PAIRS]
    triplets = [
        Triplet(*(torch.tensor(row[k]).numpy() for k in ids), i) for i, row in enumerate(rows)
    ]
    log = json.loads((RECORD / "log.json").read_text())
    rates = [m["learning_rate"] for m in log["logs"] if "learning_rate" in m]
    disc_rates = [event[6] for event in log["events"] if event[0] == "disc_step"]
    build, take_step = train_ganpo.build_critics, train_ganpo.train_step

    def step_at_recorded_rates(run, batches, step):
        run.args.lr, run.args.disc_lr = rates[step], disc_rates[step]
        return take_step(run, batches, step)

    data = PreferenceData(triplets, Counter(), Counter(), len(triplets), "")
    patches = {
        "load_data": lambda *_: (data, None),
        "batch_indices": lambda step, *_: range(PAIRS * step, PAIRS * (step + 1)),
        "build_critics": lambda *args: load_recorded(build(*args)),
        "schedule": lambda *_: 1.0,
        "train_step": step_at_recorded_rates,
    }
    for name, new in patches.items():
        monkeypatch.setattr(train_ganpo, name, new)
    monkeypatch.setattr(Discriminator, "update_means", update_means)
    monkeypatch.setattr(Discriminator, "means", lambda critic: critic.ema)
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    settings = dict(
        model=RECORD / "model", dataset="recorded", out_dir=tmp_path, dtype="float64",
        adv_loss="nonsaturating", lambda_adv=0.5, disc_hidden=64, disc_layers=2, max_length=128,
        batch_size=PAIRS, micro_batch_size=PAIRS, chat_template=ROOT / "plain_chat.jinja",
    )  # fmt: skip
    train_ganpo.main([f"--{name}={value}" for name, value in settings.items()])

    ours = rows_of(tmp_path / "metrics.csv")
    for step, mine in enumerate(ours):
        theirs = {k: v for m in log["logs"] if m["gs"] == step for k, v in m.items()}
        assert mine["loss_opo"] == pytest.approx(theirs["dpo_loss"], abs=2e-6)
        both = theirs["g_loss_mimic"] + theirs["g_loss_mimic_rej"]
        assert mine["loss_adv"] == pytest.approx(both, abs=2e-6)
        for side in ("pos", "neg"):  # theirs is a fourth of Eq 19 and 20
            fourth = mine[f"loss_disc_{side}"] / 4
            assert fourth == pytest.approx(theirs[f"disc_loss_{side}"], abs=2e-6)
    assert len(ours) == STEPS
    mine = load_file(tmp_path / "hf" / "model.safetensors")
    start = load_file(RECORD / "model" / "model.safetensors")
    for name, theirs in load_file(RECORD / "policy_after_6.safetensors").items():
        assert (mine[name] - theirs).abs().max() < 1e-4, name
        assert (start[name] - theirs).abs().max() > 1e-3, name
