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
