"""One forward of a causal LM over packed pairs, the same code for the policy and its reference.

    lm = load_lm("google/gemma-2-2b-it", torch.float32)
    out = lm(pack(triplets))     # data.pack
    out.h                        # (1, T, H) last hidden states, after the final norm [choice 7]
    out.logp                     # (2B,) summed log-probabilities: B chosen, then B rejected

A micro-batch of B pairs is one row of T tokens, each pair laid out as [prompt, chosen, rejected]:
the prompt is read once, both answers continue it at position len(prompt), and rejected does not see
chosen. No padding, fewer tokens, and the same function of the weights.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM

ATTENTION = "shared_prompt"  # the name under which transformers finds the attention below
LOGITS_PER_CHUNK = 2**27  # 0.5 GB in fp32 whatever the vocabulary


class LatentsAndLogProbs(NamedTuple):
    h: Tensor  # (1, T, H) the packed row of latents
    logp: Tensor | None  # (2B,) chosen, then rejected


class PackedLM(nn.Module):
    """A Hugging Face causal LM whose forward takes data.Packed. Trunk and head are reached through
    this one forward, which is where FSDP2 hangs its hooks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, head: bool = True, head_probe=None) -> LatentsAndLogProbs:
        """head=False leaves the log-probabilities out: a reference that only lends its latents
        (SimPO). head_probe is called in backward with what the log-probabilities send to the
        latents, (T, H)."""
        trunk = self.model.base_model
        ids, position_ids = batch.ids[None], batch.position_ids[None]
        out = trunk(ids, position_ids=position_ids, use_cache=False, segments=batch.segments)
        h = out.last_hidden_state
        if not head:
            return LatentsAndLogProbs(h, None)
        h_head = h[0]  # a view of its own, so that its gradient is the head's alone
        if head_probe:
            h_head.register_hook(head_probe)
        return LatentsAndLogProbs(h, self.log_probs(h_head, batch))

    def log_probs(self, h: Tensor, batch) -> Tensor:
        """(T, H) -> (2B,). Response positions only, in chunks whose logits are recomputed in
        backward: with a vocabulary of 256k they would otherwise be the peak of memory."""
        head = self.model.get_output_embeddings()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        chunk = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
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


def token_log_probs(h, weight, bias, labels, softcap):
    """(R, H), (V, H), (V,) or None, (R,)  ->  log p(label) (R,), the softmax in fp32 at least."""
    logits = at_least_fp32(F.linear(h, weight, bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, labels, reduction="none")


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------- attention


def shared_prompt_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    softcap=None,
    segments=None,
    **unused,
):
    """transformers' attention interface over one packed row: query (1, heads, T, D), key and value
    with as many heads or a divisor of it  ->  (1, T, heads, D), None. segments as in
    data.Packed."""
    if segments is None:
        raise ValueError(
            f"attention {ATTENTION!r} needs segments: call the model through policy.PackedLM"
        )
    attend = functools.partial(
        causal_attention, scaling=scaling, window=sliding_window, softcap=softcap
    )
    out = []
    for start, n_prompt, n_chosen, n_rejected in segments:
        prompt, first = start + n_prompt, start + n_prompt + n_chosen
        q, k, v = (x[:, :, start:first] for x in (query, key, value))
        out.append(attend(q, k, v))
        if n_rejected:  # its keys are the prompt's and its own, chosen's left out
            own = slice(first, first + n_rejected)
            k, v = (torch.cat([x[:, :, start:prompt], x[:, :, own]], dim=2) for x in (key, value))
            out.append(attend(query[:, :, own], k, v))
    return torch.cat(out, dim=2).transpose(1, 2), None


def causal_attention(q, k, v, scaling, window, softcap):
    """q (1, heads, n, D) are the last n positions of the sequence that k and v (1, kv_heads, m, D)
    cover."""
    n, m = q.shape[2], k.shape[2]
    windowed = window is not None and m > window
    mask = None
    if n < m or windowed or softcap is not None:  # the diagonal ends in the lower right corner
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if windowed:
            mask = mask.triu(m - n - window + 1)
    if softcap is None:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    return at_least_fp32(scores).masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype) @ v


AttentionInterface.register(ATTENTION, shared_prompt_attention)

# ---------------------------------------------------------------------- loading

# The families whose own padded forward test_train.py compares with this one. Another one may differ
# in a detail that this file would silently leave out (a logit scale, attention sinks): add it there
# first.
FAMILIES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")


def check_config(config, max_length: int):
    """Raises ValueError where this file's forward would not be the model's own, before any weight
    is read."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} is none of those checked here: {', '.join(FAMILIES)}"
        )
    positions = config.max_position_embeddings
    if max_length > positions:
        raise ValueError(f"max_length {max_length} is beyond the model's {positions} positions")


def load_lm(name: str, dtype: torch.dtype, checkpointing: bool = False) -> PackedLM:
    """A Hub id or a folder -> PackedLM with its weights in dtype, dropout off. checkpointing
    keeps only the layers' inputs and computes each layer again in backward."""
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
    )
    model.eval()  # for good: dropout would make policy and reference differ before the first step
    if checkpointing:
        for layer in model.base_model.layers:
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
    return PackedLM(model)
