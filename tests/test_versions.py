"""The exported folder in other versions of transformers, each in an environment of its own.

python -m pytest -q -m slow tests/test_versions.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint import add_older_names
from helpers import LENGTHS, SHAPES, make_model, make_rows, run, triplets_for

# of each version: what to install beside the packages that are there, and whether it reads the
# tokenizer files of version 5
VERSIONS = {
    "5.22.0": (["transformers==5.22.0"], True),
    "4.57.6": (["transformers==4.57.6", "huggingface-hub<1", "tokenizers<0.23", "requests"], False),
}
THERE = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
asked, found = json.load(sys.stdin), {"version": transformers.__version__}
for folder in asked["folders"]:
    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager")
    rows = [lm(torch.tensor([ids])).logits[0, -1].tolist() for ids in asked["texts"]]
    chat = [{"role": "user", "content": "fed cab"}]
    text = asked["chats"] and AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, tokenize=True, return_dict=False)
    found[folder] = rows, text
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "rope, older",
    [
        ({"rope_type": "default", "rope_theta": 5.0}, {"rope_theta": 5.0}),
        (
            {"rope_type": "yarn", "rope_theta": 5.0, "factor": 2.0, "partial_rotary_factor": 0.5},
            {
                "rope_theta": 5.0, "partial_rotary_factor": 0.5,
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
            },
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 5.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
            },
            {
                "rope_theta": 5.0, "rope_local_base_freq": 7.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (None, {}),
    ],
)  # fmt: skip
def test_an_export_names_its_angles_as_version_4_does(rope, older, tmp_path):
    config = {"model_type": "any"} | ({"rope_parameters": rope} if rope else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    add_older_names(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == config | older


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_an_export_is_the_same_model_in_an_earlier_version(version, tmp_path):
    packages, reads_tokenizer = VERSIONS[version]
    deps = [] if len(packages) > 1 else ["--no-deps"]
    pip = [sys.executable, "-m", "pip", "install", "-q", *deps, "--target", tmp_path / "env"]
    done = subprocess.run([*pip, *packages], capture_output=True, text=True)
    if not (tmp_path / "env" / "transformers").is_dir():
        pytest.skip(f"transformers {version} cannot be installed: {done.stderr[-200:]}")
    make_rows(tmp_path / "train.jsonl", 8)
    texts = [t.prompt.tolist() + t.chosen.tolist() for t in triplets_for(LENGTHS)]
    folders, expected = [], []
    for family in SHAPES:
        rope = SHAPES[family].get("rope_parameters", {})
        if family == "olmo3":  # version 4 knows one base of the angles for all its layers
            rope = rope | {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        make_model(tmp_path / family, family, **({"rope_parameters": rope} if rope else {}))
        run(tmp_path, tmp_path / f"{family}-run", "--lr=0", "--lambda_adv=0", family=family)
        folders.append(str(tmp_path / f"{family}-run" / "hf"))
        lm = AutoModelForCausalLM.from_pretrained(folders[-1], attn_implementation="eager")
        with torch.no_grad():
            expected.append(torch.stack([lm(torch.tensor([ids])).logits[0, -1] for ids in texts]))
    asked = json.dumps({"folders": folders, "texts": texts, "chats": reads_tokenizer})
    done = subprocess.run(
        [sys.executable, "-c", THERE], input=asked, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "env")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == version
    for folder, logits in zip(folders, expected, strict=True):
        rows, text = found[folder]
        torch.testing.assert_close(torch.tensor(rows), logits, rtol=1e-5, atol=1e-5, msg=folder)
        assert not reads_tokenizer or len(text) > 3
