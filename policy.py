"""One forward of a causal LM over packed pairs, the same code for the policy and its reference.

    lm = load_lm("google/gemma-2-2b-it", torch.float32)
    out = lm(pack(triplets))     # data.pack
    out.h                        # (1, T, H) last hidden states, after the final norm [choice 7]
    out.logp                     # (2B,) summed log-probabilities: B chosen, then B rejected

A micro-batch of B pairs is one row of T tokens, each pair laid out as [prompt, chosen, rejected]:
the prompt is read once, both answers continue it at position len(prompt), and rejected does not see
chosen (attention.py). No padding, fewer tokens, and the same function of the weights.
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
from data import Packed, blaming, check_model_name

# Small chunks keep logits in a CPU's cache and out of a GPU's memory; fewer tokens, or less work
# where the vocabulary is small, would cost more than they save.
TOKENS_PER_CHUNK, LOGITS_PER_CHUNK = 256, 2**22


class LatentsAndLogProbs(NamedTuple):
    h: Tensor  # (1, T, H) the packed row of latents
    logp: Tensor | None  # (2B,) chosen, then rejected


class PackedLM(nn.Module):
    """A Hugging Face causal LM whose forward takes data.Packed. Trunk and head are reached through
    this one forward, which is where FSDP2 hangs its hooks."""

    auto, settings = AutoModelForCausalLM, {}  # how load_lm makes the model

    def __init__(self, model, attention_kind: str = "loop"):
        super().__init__()
        self.model, self.attention_kind = model, attention_kind  # the latter as in attention.py

    def forward(
        self, batch: Packed, head: bool = True, head_probe: Callable | None = None
    ) -> LatentsAndLogProbs:
        """head=False leaves the log-probabilities out: a reference that only lends its latents
        (SimPO). head_probe is called in backward with what the log-probabilities send to the
        latents, (T, H)."""
        trunk = self.model.base_model
        ids, position_ids = batch.ids[None], batch.position_ids[None]
        layout = attention.layout(self.attention_kind, batch)
        out = trunk(ids, position_ids=position_ids, use_cache=False, layout=layout)
        h = out.last_hidden_state
        if not head:
            return LatentsAndLogProbs(h, None)
        h_head = h[0]  # a view of its own, so that its gradient is the head's alone
        if head_probe:
            h_head.register_hook(head_probe)
        return LatentsAndLogProbs(h, self.log_probs(h_head, batch))

    def log_probs(self, h: Tensor, batch: Packed) -> Tensor:
        """(T, H) -> (2B,). Response positions only, in chunks whose logits are recomputed in
        backward: with a vocabulary of 256k they would otherwise be the peak of memory."""
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
    return max(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // vocabulary)


def token_log_probs(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
):
    """(R, H), (V, H), (V,) or None, (R,)  ->  log p(label) (R,), the softmax in fp32 at least."""
    logits = at_least_fp32(F.linear(h, weight, bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, labels, reduction="none")


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------- loading

# The families whose own padded forward test_train.py compares with this one. Another one may differ
# in a detail that this file would silently leave out (a logit scale, attention sinks): add it there
# first.
FAMILIES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")


def check_config(config: PretrainedConfig, max_length: int):
    """Raises ValueError where this file's forward would not be the model's own, before any weight
    is read."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} is none of those checked here: {', '.join(FAMILIES)}"
        )
    positions = config.max_position_embeddings
    if max_length > positions:
        raise ValueError(f"--max_length {max_length} is beyond the model's {positions} positions")


def read_model_config(name: str, max_length: int, flag: str = "--model"):
    """A folder's or Hub id's config. InputError, flag first, if there is none, or if check_config
    refuses it."""
    check_model_name(name, flag)
    with blaming(f"{flag} {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_config(config, max_length)
    return config


def read_tokenizer(name: str, chat_template: str | None = None, flag: str = "--model"):
    """A folder's or Hub id's tokenizer, with the chat template of a file if that is named."""
    check_model_name(name, flag)
    with blaming(f"{flag} {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if chat_template:
        with blaming("--chat_template"):
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
    """A Hub id or a folder -> wrapper with its weights in dtype, dropout off. shell is a
    device, such as "meta": the same module there, its weights not read. checkpointing keeps only
    the layers' inputs and computes each layer again in backward."""
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
