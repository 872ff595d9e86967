"""Claims about study/: every anchor on trial plays, and takes nothing with it.

python -m pytest -q tests/test_study.py -m "slow or not slow"
"""

import json
import math

import numpy as np
import pytest
import torch

import paired
import train_ganpo
from helpers import build_small_worlds
from losses import OPO_LOSSES
from study import critics, screen, small_model

REPLACED = {
    (train_ganpo, name): getattr(train_ganpo, name)
    for name in ("build", "latent_mse", "forward_pairs", "evaluate", "final_table")
} | {
    (paired, name): getattr(paired, name) for name in ("update_discriminators", "adversarial_loss")
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with out/mini/seed0, a small world, and what critics.damage needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("study"))
        build_small_worlds(patch)
        critics.world.build(0)
        for order in screen.DAMAGED:
            screen.damaged(0, order)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", critics.ANCHORS)
def test_every_anchor_plays_and_puts_back_what_it_replaced(name, place):
    losses = dict(OPO_LOSSES)
    with critics.playing(name, 1.0) as flags:
        train_ganpo.main(
            [*flags, "--max_steps=3", "--eval_every=0", f"--out_dir=out/{name}", "--batch_size=16",
             "--lr=1e-3"]
        )  # fmt: skip
    rows = screen.read_table(screen.Path("out", name, "metrics.csv"))
    assert len(rows) == 3 and math.isfinite(rows[-1]["grad_norm"])
    if name not in ("beta", "sft_term", "chi_squared"):
        assert rows[-1]["adv_to_opo_grad"] > 0
    assert all(getattr(*key) is value for key, value in REPLACED.items()) and losses == OPO_LOSSES


def test_distances_between_next_tokens_are_those_of_naive_sums():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = logits.softmax(-1)
    naive = [
        sum(a * math.log(a / b) for a, b in zip(*ab, strict=True)) for ab in zip(p, q, strict=True)
    ]
    found = critics.kl(*logits.log_softmax(-1))
    assert torch.allclose(found, torch.tensor(naive, dtype=torch.float64))
    sigma = critics.Covariance(decay=0.5)
    x, y = torch.randn(2, 9, 3, dtype=torch.float64)
    sigma.update(x), sigma.update(y)
    both = [np.cov(z.numpy().T, bias=True) for z in (x, y)]
    wanted = (0.25 * both[0] + 0.5 * both[1]) / 0.75
    wanted += np.eye(3) * np.trace(wanted) / 3 / 100
    assert np.allclose(sigma.inverse(), np.linalg.inv(wanted), rtol=1e-4)


def test_pairs_of_the_real_study_are_apart_by_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(small_model, "HELD_OUT", 10)
    rows = [{"prompt": f"q {i // 2}", "chosen": f"a {i}", "rejected": "b"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = ([json.loads(line) for line in f.read_text().splitlines()]
                   for f in small_model.split_pairs("pairs.jsonl"))  # fmt: skip
    assert len(test) in (9, 10) and len(train) + len(test) == 60
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in test)
    assert small_model.repeated("a b c d a b c d") == pytest.approx(0.2)
    assert small_model.repeated("a") == 0
