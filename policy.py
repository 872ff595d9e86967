"""One forward of a causal language model over packed pairs, the same for policy and reference.

    lm = load_lm("google/gemma-2-2b-it", torch.float32)
    out = lm(pack(triplets))     # packing.pack
    out.h                        # (1, T, H) last hidden states, after the final norm [choice 7]
    out.logp                     # (N,) summed log-probabilities: b chosen answers, then b rejected

A micro-batch of b pairs is one row of T tokens, each pair as [prompt, chosen, rejected]. The prompt
is read once, both answers continue it at position len(prompt), and the rejected answer does not see
the chosen one (attention.py). So there is no padding and there are fewer tokens, and the result is
the same function of the weights. Shapes: N = 2b texts, R response tokens, H hidden, V vocabulary.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

import attention
from data import InputError, input_error_for, is_local
from packing import Packed

# The head works in chunks of rows, so that the logits stay in a CPU's cache and do not fill a GPU's
# memory. A chunk has at least this many rows, and more where the vocabulary is small.
TOKENS_PER_CHUNK, LOGITS_PER_CHUNK = 256, 2**22


class LatentsAndLogProbs(NamedTuple):
    """What PackedLM returns."""

    h: Tensor  # (1, T, H) the latents of the packed row
    logp: Tensor | None  # (N,) chosen answers, then rejected ones; None without the head


class PackedLM(nn.Module):
    """A Hugging Face causal LM whose forward takes packing.Packed.

    Trunk and head are reached through this one forward, which is where FSDP2 has its hooks.
    """

    auto, settings = AutoModelForCausalLM, {}  # the class that load_lm builds, and its arguments

    def __init__(self, model, attention_kind: str = "loop"):
        super().__init__()
        self.model, self.attention_kind = model, attention_kind  # loop, varlen or flex

    def forward(
        self, batch: Packed, head: bool = True, head_hook: Callable | None = None
    ) -> LatentsAndLogProbs:
        """Returns latents and log-probabilities of a packed row.

        head=False leaves the log-probabilities out, for a reference that only lends its latents
        (SimPO). In backward, head_hook is called with the gradient (T, H) that the
        log-probabilities send to the latents.
        """
        trunk = self.model.base_model
        ids, position_ids = batch.ids[None], batch.position_ids[None]
        layout = attention.layout(self.attention_kind, batch)
        out = trunk(ids, position_ids=position_ids, use_cache=False, layout=layout)
        h = out.last_hidden_state
        if not head:
            return LatentsAndLogProbs(h, None)
        h_head = h[0]  # a view of its own, whose gradient comes from the head alone
        if head_hook:
            h_head.register_hook(head_hook)
        return LatentsAndLogProbs(h, self.log_probs(h_head, batch))

    def log_probs(self, h: Tensor, batch: Packed) -> Tensor:
        """Returns the summed log-probability of each answer, (N,), from latents h (T, H).

        Logits are computed for response tokens only, in chunks, and again in backward. With a
        vocabulary of 256,000 they would otherwise be the peak of memory.
        """
        head = self.model.get_output_embeddings()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        chunk = rows_per_chunk(head.weight.shape[0])
        recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        logp = torch.cat(
            [
                recompute(token_log_probs, h[rows], head.weight, head.bias, labels, softcap)
                for rows, labels in zip(
                    batch.predict.split(chunk), batch.labels.split(chunk), strict=True
                )
            ]
        )
        return logp.new_zeros(len(batch.lengths)).index_add(0, batch.owner, logp)


def rows_per_chunk(vocabulary: int) -> int:
    """Returns the number of response tokens whose logits are computed at once."""
    return max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // vocabulary)


def token_log_probs(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> Tensor:
    """Returns log p(label), (R,), in float32 or higher.

    h is (R, H), weight (V, H), bias (V,) or None, labels (R,) token ids. softcap is the model's
    final soft cap of logits, or None.
    """
    logits = at_least_fp32(F.linear(h, weight, bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, labels, reduction="none")


def at_least_fp32(x: Tensor) -> Tensor:
    """Returns x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------- loading

# The families whose own padded forward tests/test_policy.py compares with this file's. Another one
# may have a detail that this file would leave out in silence (a scale of the logits, attention
# sinks), so it has to be added to that test first.
FAMILIES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")


def check_config(config: PretrainedConfig, max_length: int):
    """Raises ValueError if the model is not in FAMILIES or has fewer than max_length positions."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} is not supported; these are: {', '.join(FAMILIES)}"
        )
    positions = config.max_position_embeddings
    if max_length > positions:
        raise ValueError(f"--max_length {max_length} is beyond the model's {positions} positions")


def check_model_folder(name: str, flag: str = "--model"):
    """Raises InputError, which names `flag`, for a folder that is missing or has no weights."""
    folder = Path(name)
    if not folder.is_dir():
        if is_local(name):
            raise InputError(f"{flag} {name}: no such folder")
        return  # a Hub id
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise InputError(f"{flag} {name}: a model folder without weights")


def read_model_config(name: str, max_length: int, flag: str = "--model") -> PretrainedConfig:
    """Returns the config of a folder or Hub id, before any weight is read.

    Raises InputError, which begins with `flag`, if there is no config, if a folder has no weights,
    or if check_config refuses the model.
    """
    check_model_folder(name, flag)
    with input_error_for(f"{flag} {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_config(config, max_length)
    return config


def read_tokenizer(name: str, chat_template: str | None = None, flag: str = "--model"):
    """Returns the tokenizer of a folder or Hub id; chat_template is a file that replaces its own.

    Raises InputError, which begins with `flag`, if either cannot be read.
    """
    with input_error_for(f"{flag} {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if chat_template:
        with input_error_for("--chat_template"):
            tokenizer.chat_template = Path(chat_template).read_text()
    return tokenizer


def load_lm(
    name: str,
    dtype: torch.dtype,
    checkpointing: bool = False,
    attention_kind: str = "loop",
    shell: str | None = None,
    wrapper: type[PackedLM] = PackedLM,
) -> PackedLM:
    """Returns a model of a folder or Hub id, wrapped for packed rows, without dropout.

    dtype is that of the weights. With checkpointing each layer keeps only its input and is computed
    again in backward. shell is a device such as "meta": the same module is then made there without
    its weights being read. wrapper is PackedLM or a subclass.
    """
    own_code = dict(trust_remote_code=False) | wrapper.settings
    settings = dict(attn_implementation=attention.NAME, dtype=dtype)
    if shell is None:
        model = wrapper.auto.from_pretrained(name, **own_code, **settings)
    else:
        config = AutoConfig.from_pretrained(name, **own_code)
        with torch.device(shell):
            model = wrapper.auto.from_config(config, trust_remote_code=False, **settings)
    model.eval()  # for good: dropout would make policy and reference differ before the first step
    if checkpointing:
        for layer in model.base_model.layers:
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
    return wrapper(model, attention_kind)


# ---------------------------------------------------------------------- memory by arithmetic


def least_memory(
    name: str,
    ref_name: str | None,
    dtype: torch.dtype,
    checkpointing: bool,
    kept_tokens: int,
    shards: int,
) -> dict[str, float]:
    """Returns a lower bound of one rank's memory in a step: a dict of part to bytes.

    name is the policy's folder or Hub id, ref_name the reference's or None. dtype is the precision
    of compute. kept_tokens is the number of tokens whose graphs are alive at once on one rank.
    shards is the number of ranks that share one copy of the weights. No weight is read. A layer
    keeps, per token, its input with checkpointing, and otherwise about ten vectors of the hidden
    size and three of the feed-forward network's.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    size = dtype.itemsize
    master = max(4, size)  # the policy's own weights, its gradients and AdamW's two moments
    layer = config.hidden_size
    if not checkpointing:
        layer = 10 * config.hidden_size + 3 * config.intermediate_size
    return {
        "weights, moments, gradients": 4 * master * parameters_of(name) / shards,
        "reference": size * parameters_of(ref_name) / shards if ref_name else 0,
        "graphs": kept_tokens * config.num_hidden_layers * size * layer,
    }


def parameters_of(name: str) -> int:
    """Returns the number of parameters of a folder or Hub id; tied ones count once."""
    lm = load_lm(name, torch.float32, shell="meta")
    return sum(p.numel() for p in lm.parameters())


def refuse_what_cannot_fit(needed: dict[str, float], available: float):
    """Raises InputError if one rank certainly needs more bytes than are available."""
    if sum(needed.values()) > available:
        raise InputError(
            f"{memory_line(needed)}; available: {available / 2**30:.2f} GiB. More ranks"
            " or --checkpointing need less; without a trained critic also a smaller --micro_tokens"
        )


def memory_line(needed: dict[str, float]) -> str:
    """Returns one line about bytes by part, in GiB."""
    parts = ", ".join(f"{part} {n / 2**30:.2f}" for part, n in needed.items())
    return f"memory per rank, at least: {sum(needed.values()) / 2**30:.2f} GiB ({parts})"
