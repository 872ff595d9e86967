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
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)

import attention
from attention_gpu import compiled
from data import JSON, InputError, find_template, hub_check, input_error_for, is_local, reason_of
from packing import Packed

# The head works in chunks of rows, so that the logits do not fill the memory: the least number of
# rows and of logits in a chunk. On a GPU that is 1 GiB in float32. The gradient of the head's
# weights is added once per chunk.
CHUNK = {"cpu": (256, 2**25), "cuda": (1024, 2**28)}


ROWS_IN_CACHE = 16  # of the logits on a CPU, for what follows the product


class LatentsAndLogProbs(NamedTuple):
    """What PackedLM returns."""

    h: Tensor  # (1, T, H) the latents of the packed row
    logp: Tensor | None  # (N,) chosen answers, then rejected ones; None without the head


class PackedLM(nn.Module):
    """A Hugging Face causal LM whose forward takes packing.Packed.

    Trunk and head are reached through this one forward, which is where FSDP2 has its hooks.
    """

    auto, settings = AutoModelForCausalLM, {}  # the class that load_lm builds, and its arguments
    new, unused = (), ()  # what load_weights allows
    adapters = None  # with LoRA, a lora.Adapters

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
        if layout.padding:
            ids, position_ids = (F.pad(x, (0, layout.padding)) for x in (ids, position_ids))
        out = trunk(ids, position_ids=position_ids, use_cache=False, layout=layout)
        h = out.last_hidden_state
        if layout.padding:
            h = F.pad(h, (0, 0, 0, -layout.padding))  # a copy, because FSDP2 wants no view here
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
        scale = getattr(self.model.config, "logits_scaling", 1.0)
        chunk = rows_per_chunk(head.weight.shape[0], h.device)
        if h.device.type == "cpu" and len(batch.labels) > chunk and head.bias is None:
            more = batch.labels, softcap, scale, chunk
            logp = ChunkedLogProbs.apply(h[batch.predict], head.weight, *more)
        else:
            fuse = h.is_cuda and h.dtype == torch.bfloat16
            scores = fused_log_probs() if fuse else token_log_probs
            recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            logp = torch.cat(
                [
                    recompute(scores, h[rows], head.weight, head.bias, labels, softcap, scale)
                    for rows, labels in zip(
                        batch.predict.split(chunk), batch.labels.split(chunk), strict=True
                    )
                ]
            )
        # A GPU adds in any order. In float64 that is not seen, so policy and reference stay equal.
        wide = torch.float64 if logp.is_cuda else logp.dtype
        sums = logp.new_zeros(len(batch.lengths), dtype=wide)
        return sums.index_add(0, batch.owner, logp.to(wide)).to(logp.dtype)


def rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    """Returns the number of response tokens whose logits are computed at once on a device."""
    rows, logits = CHUNK["cuda" if device.type == "cuda" else "cpu"]
    return max(rows, logits // vocabulary)


def token_log_probs(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Returns log p(label), (R,), in float32 or higher.

    h is (R, H), weight (V, H), bias (V,) or None, labels (R,) token ids. softcap is the model's
    final soft cap of logits (Gemma 2), or None; scale is what they are divided by (Granite).
    """
    logits = at_least_fp32(F.linear(h, weight, bias))
    if scale != 1:
        logits = logits / scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, labels, reduction="none")


class ChunkedLogProbs(torch.autograd.Function):
    """token_log_probs of more rows than one chunk on a CPU, by a head without bias.

    autograd would add the chunks' gradients in the precision of the weights, each addition as large
    as the weights; here they are added in float32. And what follows the product is done in rows
    that stay in the cache, several times faster than torch's log_softmax of a chunk.
    """

    @staticmethod
    def forward(ctx, h, weight, labels, softcap, scale, chunk):
        ctx.save_for_backward(h, weight, labels)
        ctx.settings = softcap, scale, chunk
        chunks = zip(h.split(chunk), labels.split(chunk), strict=True)
        return torch.cat([scores_of(F.linear(x, weight), y, softcap, scale) for x, y in chunks])

    @staticmethod
    def backward(ctx, gradient):
        h, weight, labels = ctx.saved_tensors
        softcap, scale, chunk = ctx.settings
        of_h, of_weight = [], torch.zeros_like(weight, dtype=gradient.dtype)
        chunks = (x.split(chunk) for x in (h, labels, gradient))
        for x, y, g in zip(*chunks, strict=True):
            of_logits = F.linear(x, weight)
            scores_of(of_logits, y, softcap, scale, g)
            of_h.append(of_logits @ weight)
            of_weight += of_logits.T @ x
        return torch.cat(of_h), of_weight.to(weight.dtype), None, None, None, None


def scores_of(logits: Tensor, labels: Tensor, softcap, scale, gradient: Tensor | None = None):
    """Returns log p(label), (R,), of logits (R, V), in float32 or higher; see token_log_probs.

    With gradient, (R,), that of the result, it overwrites the logits by their gradient instead.
    """
    scores = []
    for i in range(0, len(logits), ROWS_IN_CACHE):
        rows = slice(i, i + ROWS_IN_CACHE)
        z, y = at_least_fp32(logits[rows]), labels[rows, None]
        if scale != 1:
            z = z / scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        top = z.amax(-1, keepdim=True)
        p = (z - top).exp_()
        total = p.sum(-1, keepdim=True)
        if gradient is None:
            scores.append(z.gather(1, y) - top - total.log_())
            continue
        g = gradient[rows, None]
        p.mul_(-g / total).scatter_add_(1, y, g)  # the softmax's gradient
        if softcap is not None:
            p *= 1 - (z / softcap).square_()
        logits[rows] = p if scale == 1 else p / scale
    return torch.cat(scores).squeeze(1) if scores else None


@functools.cache
def fused_log_probs():
    """Returns token_log_probs, compiled: the logits stay in bfloat16 in a GPU's memory, and are
    read and written a few times in place of some thirty."""
    return compiled(token_log_probs)


def at_least_fp32(x: Tensor) -> Tensor:
    """Returns x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------- loading

# The families whose own padded forward tests/test_policy.py compares with this file's. Another one
# may have a detail that this file would leave out in silence (a scale of the logits, attention
# sinks), so it has to be added to that test first.
FAMILIES = (
    "gemma2", "gemma3", "gemma3_text", "granite", "llama", "mistral", "olmo2", "olmo3", "phi3",
    "qwen2", "qwen3", "smollm3",
)  # fmt: skip

# the files in which transformers looks for weights, in its order
WEIGHTS = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME
# types of plain weights, as safetensors and torch name them
PLAIN = {"F64", "F32", "BF16", "F16", torch.float64, torch.float32, torch.bfloat16, torch.float16}
LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer file of Git LFS begins
MERGE = (
    "merge it first (peft: AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload()"
    ".save_pretrained(FOLDER), and the tokenizer's save_pretrained(FOLDER)) and pass FOLDER"
)
# constants that older versions of transformers wrote beside the weights, as GPT-2's masks
OLD_BUFFERS = ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"
ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function"}
NAMES_SHOWN = 3  # of the weights that are missing, say; the others are counted


def check_config(config: PretrainedConfig, max_length: int):
    """Raises ValueError if the model is not in FAMILIES, if the angles of its positions depend on
    the other texts of a batch, or if it has fewer than max_length positions."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model type {config.model_type!r} is not supported; these are: {', '.join(FAMILIES)}"
        )
    text = config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None) or ()
    if unknown := {*kinds} - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of type {unknown.pop()!r} are not supported")
    if window is not None and window < 1:
        raise ValueError(f"its config has sliding_window {window}, with which a token sees nothing")
    if "sliding_attention" in kinds and not (window and getattr(text, "use_sliding_window", True)):
        raise ValueError(
            "its config contradicts itself: layer_types has sliding_attention, but sliding_window"
            " or use_sliding_window switches it off"
        )
    known = {"default", *ROPE_INIT_FUNCTIONS}
    if unknown := {part["rope_type"] for part in rope_parts(config)} - known:
        raise ValueError(
            f"position scaling {unknown.pop()!r} is not one that transformers knows:"
            f" {', '.join(sorted(known))}"
        )
    if longrope_limits(config):
        raise ValueError(
            "position scaling 'longrope' is not supported: its angles depend on the longest text"
            " of a batch, so a pair's log-probabilities would depend on the other pairs"
        )
    positions = positions_of(config)
    if max_length > positions:
        raise ValueError(f"--max_length {max_length} is beyond the model's {positions} positions")


def longrope_limits(config: PretrainedConfig) -> list[int]:
    """Returns the lengths of a batch's longest text at which longrope takes other angles."""
    key = "original_max_position_embeddings"
    return [part[key] for part in rope_parts(config) if part["rope_type"] == "longrope"]


def rope_parts(config: PretrainedConfig) -> list[dict]:
    """Returns the settings of rotary positions that a config has, one for each type of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    return [part for part in parts if "rope_type" in part]


def positions_of(config: PretrainedConfig) -> int:
    """Returns the number of positions of a text, with longrope those at which its first angles
    hold; raises InputError if the config names none."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        raise InputError(
            f"model type {config.model_type!r} is not supported: its config has no"
            " max_position_embeddings, the number of tokens that a text may have"
        )
    return min([positions, *longrope_limits(config)])


def check_token_ids(texts: Iterable, config: PretrainedConfig, whose: str = "the model"):
    """Raises InputError if a text, a sequence of token ids, has one beyond the embedding."""
    vocabulary = config.get_text_config().vocab_size
    largest = max((int(np.max(ids)) for ids in texts if len(ids)), default=0)
    if largest >= vocabulary:
        raise InputError(
            f"token id {largest} is beyond the vocabulary of {whose}, {vocabulary} tokens"
        )


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of weights in a folder, without reading a value.

    Raises InputError unless they and the other files of the model are whole.
    """
    there = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if links := [f.name for f in folder.iterdir() if not f.exists()]:
        raise InputError(f"{links[0]} is a link to a file that is not there: copy the file itself")
    if not there:
        raise InputError(f"a model folder without weights: none of {', '.join(WEIGHTS)} is there")
    path, *others = there
    index = path.with_name(f"{path.name}.index.json")
    if index in others:  # both would say what the weights are
        raise InputError(f"holds both {path.name} and {index.name}: remove one of them")
    kinds = "*config.json", "*token*.json", "vocab*.json", "*.model"  # transformers reads no others
    for file in (path, *(file for kind in kinds for file in folder.glob(kind))):
        check_file(file)
    if path.suffix != ".json":
        return [path]
    shards = sorted({*json.loads(path.read_text())["weight_map"].values()})
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        more = f" ({len(missing)} of {len(shards)} files are missing)"
        raise InputError(f"{path.name} names {missing[0]}, which is not there{more}")
    for shard in shards:
        check_file(folder / shard)
    return [folder / shard for shard in shards]


def as_list(stops: int | list[int] | None) -> list[int]:
    """Returns a generation config's eos_token_id, which may be one number or none, as a list."""
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def check_file(path: Path):
    """Raises InputError if a file is a Git LFS pointer, is cut or damaged, or holds weights of a
    type that is no floating-point number of 16 bits or more."""
    with path.open("rb") as file:
        start, reason, kinds = file.read(len(LFS)), None, {}
    if start == LFS:
        raise InputError(
            f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in"
            f" {path.parent}"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:  # compares the header with the size
                names = file.keys()
                kinds = {name: file.get_slice(name).get_dtype() for name in names}
        # before torch 1.6 a .bin was a pickle, which begins with 80, and no zip archive
        elif path.suffix == ".bin" and start[:1] != b"\x80" and not zipfile.is_zipfile(path):
            reason = "not a zip archive of torch.save"
        elif path.suffix == ".bin":  # on "meta" no value is read
            weights = dict(torch.load(path, map_location="meta", weights_only=True))
            kinds = {name: getattr(x, "dtype", type(x)) for name, x in weights.items()}
        elif path.suffix == ".json":
            check_json(path.name, JSON.decode(path.read_text("utf-8")))
    except InputError as error:  # the file is whole
        raise InputError(f"{path.name}: {error}") from None
    except pickle.UnpicklingError:  # its message advises to trust the file
        reason = "it holds Python objects, not tensors alone"
    except Exception as error:  # each library has kinds of its own
        reason = reason_of(error)
    if reason:
        size = f"{path.stat().st_size:,} bytes"
        raise InputError(f"{path.name} is cut or damaged ({size}; {reason}): fetch it again")
    for name, kind in kinds.items():
        if name.endswith(".weight") and kind not in PLAIN:
            raise InputError(
                f"{path.name} holds {name} as {kind}: quantised weights are not supported; pass the"
                " model in float32, bfloat16 or float16"
            )


def check_json(name: str, content: dict):
    """Raises InputError if what a model's file of JSON holds would be passed over or would end in
    an error that does not name it; any other exception if it is no file of that name."""
    if name == GENERATION_CONFIG_NAME:
        stops = dict(content).get("eos_token_id")
        if any(not isinstance(i, int) for i in as_list(stops)):
            raise InputError(f"eos_token_id is {stops!r}, no token ids")
        with input_error_for("no settings that transformers can use"):
            GenerationConfig.from_dict(content)
    elif name == TOKENIZER_CONFIG_FILE:
        templates = dict(content).get("chat_template") or ""
        named = templates if isinstance(templates, list) else [{"template": templates}]
        if not all(isinstance(t, dict) and isinstance(t.get("template"), str) for t in named):
            raise InputError(f"chat_template is {templates!r}, no text and no list of named texts")
    elif name == CONFIG_NAME:
        for part in (content, content.get("text_config") or {}):
            check_angles(part)
            for key in ACTIVATIONS & part.keys():
                if part[key] is not None and str(part[key]) not in ACT2FN:
                    raise InputError(f"{key} is {part[key]!r}, which transformers does not know")
    elif name in WEIGHTS:
        dict(content["weight_map"])


def check_angles(config: dict):
    """Raises InputError if a config.json gives a setting of the rotary positions two values: beside
    the others, under rope_scaling (an older name) or rope_parameters (transformers takes one). Also
    if rope_theta is no positive number."""
    said = {k: config[k] for k in ("rope_theta", "partial_rotary_factor") if k in config}
    for name in ("rope_scaling", "rope_parameters"):
        part = config.get(name) or {}
        part = part.get("full_attention", part)  # some models have a set per type of layer
        if "type" in part:
            part = {"rope_type": part["type"]} | part
        for key, value in part.items():
            if value != said.setdefault(key, value):
                raise InputError(f"{key} is {said[key]!r}, but {value!r} in {name}: remove one")
    base = said.get("rope_theta")
    if base is not None and not (isinstance(base, int | float) and base > 0):
        raise InputError(f"rope_theta is {base!r}, no positive number")


def read_any_config(name: str, flag: str = "--model") -> PretrainedConfig:
    """Returns the config of a folder or Hub id of any family, before any weight is read.

    Raises InputError, which begins with `flag`, if there is none, if the weights are an adapter,
    quantised or, in a folder, not whole files, if the number of positions is not known, or if the
    model is neither one that writes text nor given by --reward_model.
    """
    folder = Path(name)
    with input_error_for(f"{flag} {name}"):
        if not folder.is_dir():
            if is_local(name):
                raise InputError("no such folder")
            hub_check(name, "model")
            for file in (CONFIG_NAME, GENERATION_CONFIG_NAME, TOKENIZER_CONFIG_FILE):
                path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
                if path:
                    check_file(Path(path))
        if find_adapter_config_file(name):
            raise InputError(f"holds an adapter, which is no whole model: {MERGE}")
        if folder.is_dir():
            weight_files(folder)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        quantised = getattr(config, "quantization_config", None)
        quantised = quantised or getattr(config.get_text_config(), "quantization_config", None)
        if quantised:
            kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise InputError(
                f"the weights are quantised ({kind}), which is not supported: pass the model that"
                " was quantised, in float32, bfloat16 or float16"
            )
        positions_of(config)
        if flag == "--reward_model":
            return config
        if not writes(config):
            raise InputError(
                f"a model of type {config.model_type!r} writes no text, because it is no causal"
                f" language model, as are {', '.join(FAMILIES)} and others of AutoModelForCausalLM"
            )
        check_token_ids(
            [as_list(generation_settings(name).eos_token_id)], config, "the model (eos_token_id)"
        )
    return config


def writes(config: PretrainedConfig) -> bool:
    """Returns whether a model is a causal language model, no token of which sees those after it."""
    kind, text = config.model_type, config.get_text_config()
    backwards = getattr(text, "use_bidirectional_attention", False)
    return kind in CAUSAL and kind not in MASKED and not (config.is_encoder_decoder or backwards)


def read_model_config(name: str, max_length: int, flag: str = "--model") -> PretrainedConfig:
    """Returns the config of a model that can be trained, a folder or Hub id, as read_any_config.

    Of a multimodal model it is that of the text part. Also raises InputError if check_config
    refuses the model.
    """
    config = read_any_config(name, flag)
    with input_error_for(f"{flag} {name}"):
        check_config(config, max_length)
    return config.get_text_config()


def has_tokenizer(name: str) -> bool:
    """Returns whether a model's folder holds files of a tokenizer; a Hub id counts as if it did."""
    kinds = "*token*", "vocab*", "merges*", "*.model", "*.tiktoken"
    return not Path(name).is_dir() or any(any(Path(name).glob(kind)) for kind in kinds)


def read_tokenizer(name: str, chat_template: str | None = None, flag: str = "--model"):
    """Returns the tokenizer of a folder or Hub id; chat_template names one of its own several, or
    is a file that replaces them.

    A printed line says what of its tokenizer_config.json another file replaces, as
    chat_template.jinja and special_tokens_map.json do. Raises InputError, which begins with `flag`,
    if either cannot be read.
    """
    with input_error_for(f"{flag} {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        said = get_tokenizer_config(name)
    for key in ("chat_template", *tokenizer.SPECIAL_TOKENS_ATTRIBUTES):
        value = said.get(key)
        if isinstance(value, list):
            value = {template["name"]: template["template"] for template in value}
        elif isinstance(value, dict):  # a token with its settings
            value = value.get("content")
        if value and value != getattr(tokenizer, key) and int(os.environ.get("RANK", 0)) == 0:
            print_once(f"{name}: another file's {key} is used, not that of tokenizer_config.json")
    if chat_template:
        tokenizer.chat_template = find_template(chat_template, tokenizer)
    return tokenizer


def load_weights(auto, name: str, new: tuple = (), unused: tuple = (), **settings):
    """Returns a model of a folder or Hub id, all of whose weights are those of its files.

    auto is the class of transformers that reads it, settings are arguments of its from_pretrained.
    If the files are those of another class, `new` names weights that may be missing and are then
    drawn at random, which a printed line says, and `unused` names weights of the files that may be
    left out. Raises InputError if any other name is missing, unexpected or of another shape. Of a
    multimodal Gemma 3 only the text part is returned, which a printed line says.
    """
    model, found = auto.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
        **settings,
    )  # fmt: skip
    missing, unexpected = (set(found[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    unexpected = {key for key in unexpected if not key.endswith(OLD_BUFFERS)}
    shapes = {
        f"{key} {tuple(theirs)} in place of {tuple(ours)}"
        for key, theirs, ours in found["mismatched_keys"]
    }
    if type(model).__name__ in (model.config.architectures or ()):
        new = unused = ()  # the files are those of such a model
    drawn, untied = missing & {*new}, set()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings and model._tied_weights_keys:
        if head.weight is not embedding.weight:
            untied = {"config.json ties the embeddings, but the files hold two different ones"}
    kinds = {
        "missing": missing - drawn,
        "unexpected": unexpected - {*unused},
        "of another shape": shapes,
        "contradictory": untied,
    }
    ranges = {k: torch.stack(x.aminmax()) for k, x in model.named_parameters() if x.numel()}
    kinds["not finite"] = {name for name, x in ranges.items() if not x.isfinite().all()}
    faults = [f"{kind}: {first_names(names)}" for kind, names in kinds.items() if names]
    if faults:
        adapter = re.search(r"lora_|base_layer|base_model\.model\.", " ".join(unexpected))
        more = f"; these are weights of an adapter: {MERGE}" if adapter else ""
        kind = type(model).__name__
        raise InputError(f"the weights are not those of {kind}: {'; '.join(faults)}{more}")
    if zero := {k for k, x in ranges.items() if model.get_parameter(k).ndim > 1 and not x.any()}:
        print(f"{name}: all values are 0, as in a broken download: {first_names(zero)}", flush=True)
    if drawn:
        print(f"{name} has no {first_names(drawn)}: it is new and drawn at random", flush=True)
    text = text_part(model, auto)
    if text is not model:
        print_once(f"{name}: of this multimodal model the text part is used, and exported alone")
    return text


print_once = functools.cache(functools.partial(print, flush=True))  # policy and reference say it


def text_part(model, auto):
    """Returns the text model in a multimodal Gemma 3, with the same weights; any other as it is.

    auto is the class of transformers that has read the model.
    """
    if model.config.model_type != "gemma3":
        return model
    config = model.config.get_text_config()
    for key in ("tie_word_embeddings", "num_labels"):
        setattr(config, key, getattr(model.config, key))
    with torch.device("meta"):
        text = auto.from_config(
            config, attn_implementation=config._attn_implementation, dtype=model.dtype
        )
    for name, part in model.named_children():  # trunk and head
        setattr(text, name, getattr(part, "language_model", part))
    if text.can_generate():
        text.generation_config = model.generation_config
    return text


def first_names(names: set[str]) -> str:
    """Returns the first names in one line, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(sorted(names)[:NAMES_SHOWN]) + more


def generation_settings(name: str) -> GenerationConfig:
    """Returns how a folder or Hub id generates, as transformers reads it beside the weights."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # without a file of its own it is part of config.json
        return GenerationConfig.from_pretrained(
            name, config_file_name="config.json", _from_model_config=True
        )


# settings of transformers' generate that generate.py has no use for, and their neutral values
UNUSED_SETTINGS = {
    "repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "min_p": (0.0,),
    "typical_p": (1.0,), "suppress_tokens": (), "begin_suppress_tokens": (), "bad_words_ids": (),
    "stop_strings": (),
}  # fmt: skip


def unused_settings(name: str) -> str:
    """Returns the settings of a folder's or Hub id's generation that generate.py does not use."""
    config = generation_settings(name)
    values = {key: getattr(config, key, None) for key in UNUSED_SETTINGS}
    return ", ".join(
        f"{key} {value}"
        for key, value in values.items()
        if value is not None and value not in UNUSED_SETTINGS[key]
    )


def load_lm(
    name: str,
    dtype: torch.dtype,
    checkpointing: bool = False,
    attention_kind: str = "loop",
    shell: str | None = None,
    wrapper: type[PackedLM] = PackedLM,
    adapters: Callable | None = None,
) -> PackedLM:
    """Returns a model of a folder or Hub id, wrapped for packed rows, without dropout.

    dtype is that of the weights. With checkpointing each layer keeps only its input and is computed
    again in backward. shell is a device such as "meta": the same module is then made there without
    its weights being read. wrapper is PackedLM or a subclass.
    adapters is called with the result: what lora.adapters_of returns.
    """
    settings = dict(attn_implementation=attention.NAME, dtype=dtype)
    if shell is None:
        allowed = dict(new=wrapper.new, unused=wrapper.unused)
        model = load_weights(wrapper.auto, name, **allowed, **wrapper.settings, **settings)
    else:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **wrapper.settings)
        with torch.device(shell):
            model = wrapper.auto.from_config(config, trust_remote_code=False, **settings)
        model = text_part(model, wrapper.auto)
        if model.can_generate():  # from_config leaves these settings out, and the export has them
            model.generation_config = generation_settings(name)
    model.eval()  # for good: dropout would make policy and reference differ before the first step
    if checkpointing:
        for layer in model.base_model.layers:
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
    lm = wrapper(model, attention_kind)
    if adapters:
        adapters(lm)
    return lm


# ---------------------------------------------------------------------- memory by arithmetic


def least_memory(
    name: str,
    ref_name: str | None,
    dtype: torch.dtype,
    checkpointing: bool,
    kept_tokens: int,
    shards: int,
    adapters: Callable | None = None,
    critics: int = 0,
) -> dict[str, float]:
    """Returns a lower bound of one rank's memory in a step: a dict of part to bytes.

    name is the policy's folder or Hub id, ref_name the reference's or None. dtype is the precision
    of compute. kept_tokens is the number of tokens whose graphs are alive at once on one rank.
    shards is the number of ranks that share one copy of the weights. adapters is what
    lora.adapters_of returns: they alone are trained, on every rank. critics is the number of the
    critics' parameters, which every rank has whole. No weight is read. A layer keeps, per token,
    its input with checkpointing, and otherwise about ten vectors of the hidden size (four beside
    frozen weights) and three of the feed-forward network's.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    size = dtype.itemsize
    master = max(4, size)  # the policy's own weights, its gradients and AdamW's two moments
    layer = config.hidden_size
    if not checkpointing:
        layer = (4 if adapters else 10) * config.hidden_size + 3 * config.intermediate_size
    weights = parameters_of(name)
    parts = {"weights, moments, gradients": 4 * master * weights / shards}
    if adapters:
        trained = parameters_of(name, adapters) - weights
        parts = {
            "frozen weights": size * weights / shards,
            "adapters, moments, gradients": 4 * master * trained,
        }
    return parts | {
        "reference": size * parameters_of(ref_name) / shards if ref_name and not adapters else 0,
        "graphs": kept_tokens * config.num_hidden_layers * size * layer,
        "critics": 4 * master * critics,
    }


def parameters_of(name: str, adapters: Callable | None = None) -> int:
    """Returns the number of parameters of a folder or Hub id, with those of adapters; tied ones
    count once."""
    with input_error_for(name):
        lm = load_lm(name, torch.float32, shell="meta", adapters=adapters)
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
