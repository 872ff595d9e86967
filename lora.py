"""LoRA (arXiv 2106.09685): small matrices are trained beside the frozen weights, with --lora_rank.

    lm = load_lm(name, torch.bfloat16, adapters=lora.adapters_of(args))
    ref = lora.reference(lm)     # the same weights, with the adapters off

An adapted linear layer gives W x + alpha / r * B A x. Its frozen W (O, I) is in the precision of
compute and sharded like any weight. A (r, I) and B (O, r) are float32 and whole on every rank. A
begins random and B as 0, so the policy begins as the model itself. Therefore the reference needs no
weights of its own: it is the policy with its adapters off [choice 32]. A and B are parameters of
the linear layer, so all other names stay as they are.
"""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from data import InputError, input_error_for
from policy import load_lm


def adapters_of(args) -> Callable | None:
    """Returns what load_lm takes to add the adapters of these settings; None without LoRA."""
    if not args.lora_rank:
        return None
    settings = args.lora_rank, args.lora_alpha, args.lora_targets, args.seed
    return partial(Adapters, args.model, *settings)


def check(args):
    """Raises InputError if --lora_targets names no linear layer of --model."""
    if args.lora_targets:
        with input_error_for(f"--model {args.model}"):
            load_lm(args.model, torch.float32, shell="meta", adapters=adapters_of(args))


def reference(lm: nn.Module) -> nn.Module | None:
    """Returns a policy.PackedLM as it was before training; None if it has no adapters."""
    return Reference(lm) if lm.adapters else None


class Reference(nn.Module):
    """A policy with its adapters off, called like a second model. It has no weights of its own."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = (lm,)  # no part of this module, because its weights would count twice

    @torch.no_grad()
    def forward(self, batch, **settings):
        (lm,) = self.lm
        lm.adapters.on = False
        try:
            return lm(batch, **settings)
        finally:
            lm.adapters.on = True


class Adapters:
    """The adapters of a policy.PackedLM, which becomes lm.adapters; all other weights are frozen.

    targets are names of linear layers in the decoder's layers, such as q_proj; None is all. A is
    drawn from seed as peft does, between -1 / sqrt(I) and 1 / sqrt(I). Raises InputError if a name
    is not there.
    """

    def __init__(
        self, base: str, rank: int, alpha: float, targets: list[str] | None, seed: int,
        lm: nn.Module,
    ):  # fmt: skip
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
        inside = f"{lm.model.base_model_prefix}.layers."
        linear = {
            name: layer
            for name, layer in lm.model.named_modules()
            if name.startswith(inside) and isinstance(layer, nn.Linear)
        }
        there = {name.rpartition(".")[2] for name in linear}
        self.targets = sorted({*targets} if targets else there)
        if unknown := [name for name in self.targets if name not in there]:
            raise InputError(
                f"--lora_targets {' '.join(unknown)}: the model's layers have no such linear layer;"
                f" there are {', '.join(sorted(there))}"
            )
        self.layers = {k: v for k, v in linear.items() if k.rpartition(".")[2] in self.targets}
        lm.requires_grad_(False).adapters, self.on = self, True
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            outputs, inputs = layer.weight.shape
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            a = torch.empty(rank, inputs).uniform_(-1, 1, generator=generator) / math.sqrt(inputs)
            layer.lora_A = nn.Parameter(a.to(layer.weight.device, dtype))
            layer.lora_B = nn.Parameter(layer.weight.new_zeros(outputs, rank, dtype=dtype))
            layer.register_forward_hook(self.add)

    def add(self, layer: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        """A forward hook: adds the layer's adapter to its output y, in the precision of y."""
        if not self.on:
            return y
        low = F.linear(inputs[0], layer.lora_A.to(y.dtype))
        return y.add(F.linear(low, layer.lora_B.to(y.dtype)), alpha=self.scale)

    def parameters(self) -> list[nn.Parameter]:
        """Returns A and B of each layer: all that is trained."""
        return [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]

    def __str__(self):
        trained = sum(p.numel() for p in self.parameters())
        size = f"rank {self.rank}, alpha {self.alpha:g}, {trained:,} trained parameters"
        return f"{size} in adapters of {', '.join(self.targets)}"

    def save(self, folder: Path):
        """Writes the folder of an adapter that peft loads onto the model of --model.

        The folder appears whole or not at all.
        """
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.base,
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": self.targets, "inference_mode": True,
        }  # fmt: skip
        prefix = "base_model.model."
        multimodal = AutoConfig.from_pretrained(self.base).model_type == "gemma3"
        weights = {}
        for name, layer in self.layers.items():
            if multimodal:  # whose other part has layers of the same names
                name = name.replace("model.", "model.language_model.", 1)
                config["exclude_modules"] = r".*\.vision_tower\..*"
            for key in ("lora_A", "lora_B"):
                weights[f"{prefix}{name}.{key}.weight"] = getattr(layer, key).detach().cpu()
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        (unfinished / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(weights, unfinished / "adapter_model.safetensors", {"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def merged(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Returns a model's weights by name with its adapters merged, W + scale * B A.

    All are in the precision of the adapters, in which a change is not rounded away. scale is that
    of Adapters. To save memory it takes all but the adapters out of `weights`.
    """
    dtype = next(x.dtype for name, x in weights.items() if ".lora_" in name)
    plain = {name: weights.pop(name).to(dtype) for name in [*weights] if ".lora_" not in name}
    for layer in [name.removesuffix("lora_A") for name in weights if name.endswith(".lora_A")]:
        change = weights[f"{layer}lora_B"] @ weights[f"{layer}lora_A"]
        plain[f"{layer}weight"] = plain[f"{layer}weight"] + scale * change
    return plain
