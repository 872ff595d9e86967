"""Batched sampling from a causal LM, reproducible per prompt.

    python generate.py --model out/run-000/hf "Reverse the word moki." --temperature 0.7

    answers = generate(lm, ChatEncoder(tokenizer), conversations, temperature=0.7, seed=0)
    answers[0].text

The randomness of an answer is one uniform number per position. It depends on seed, prompt and
sample number alone, so neither the batch size nor the other prompts change an answer. (The last
bits of the logits depend on them, which can change an answer where two tokens are nearly tied.) Two
models, or two temperatures, meet the same randomness, which makes their comparison sharper.
"""

import cpu  # noqa: F401  must come before torch

import hashlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

import distributed
from data import ChatEncoder, InputError, half_a_character, input_error_for, leaves_out, user_chat
from flags import Parser, at_least_0, command_line, count, given_flags, natural, refuse
from policy import (
    check_token_ids,
    load_weights,
    positions_of,
    read_any_config,
    read_tokenizer,
    unused_settings,
)

COMPACT_BELOW = 0.9  # with a smaller share of unfinished rows, finished ones leave the batch
READ_TOGETHER = 0.7  # a prompt shorter than this share of its group's longest begins a new group
ROOM = 64  # tokens that are written before the cache of a layer is copied to a longer one


class Answer(NamedTuple):
    """One answer of a model. Only the text is known of one that was read from a file."""

    text: str
    tokens: int | None  # with the end of turn, if there is one
    ended: bool | None  # False if the answer was cut off at max_new_tokens


def uniforms(seed: int, prompt: list[int], sample: int, n: int) -> np.ndarray:
    """Returns n numbers in [0, 1), one for each position of an answer.

    prompt is the prompt's token ids, sample the number of the answer among those to this prompt.
    """
    digest = hashlib.sha256(repr((seed, sample, prompt)).encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).random(n)


def pick(
    logits: Tensor, temperature: float, u: Tensor, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Returns the next token of n answers, (n,), by inverting the cumulated probabilities.

    logits is (n, V), u (n,) in [0, 1). The token is the first whose cumulated probability exceeds
    u; at temperature 0 it is the most probable one. With top_k > 0 only the k most probable tokens
    are drawn from, and with top_p < 1 of these only the fewest that together reach that share.
    Raises FloatingPointError if the logits are not finite.
    """
    if temperature == 0:
        highest = logits.max(-1)  # on a CPU in less than half of argmax's time
        check_finite(highest.values)
        return highest.indices
    p = (logits.double() / temperature).softmax(-1)
    if top_k or top_p < 1:
        ordered, tokens = p.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ordered[:, top_k:] = 0
        before = ordered.cumsum(-1) - ordered
        beyond = before >= top_p * ordered.sum(-1, keepdim=True)
        ordered[:, 1:][beyond[:, 1:]] = 0  # the most probable one always stays
        p = torch.zeros_like(p).scatter(-1, tokens, ordered)
    cdf = p.cumsum(-1)
    check_finite(cdf[:, -1])
    u = u[:, None] * cdf[:, -1:]  # the last sum is 1 except for rounding
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def check_finite(x: Tensor):
    """Raises FloatingPointError unless all values, which are made of logits, are finite."""
    if not x.isfinite().all():
        raise FloatingPointError(
            "the model's logits are not finite: its weights hold such numbers or exceed its"
            " precision, or the temperature is too close to 0"
        )


@torch.inference_mode()
def generate(
    lm: PreTrainedModel,
    encoder: ChatEncoder,
    conversations: list[list[dict]],
    *,
    temperature: float,
    seed: int,
    max_new_tokens: int = 512,
    samples: int = 1,
    batch_size: int = 128,
    cut_prompts: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    log: Callable | None = None,
) -> list[Answer]:
    """Returns one list: `samples` answers to the first conversation, then to the second, ...

    conversations end with a user's turn. temperature, top_k and top_p are those of pick. log(line)
    is told the progress every few seconds. Raises InputError if an answer could run past the
    model's positions; with cut_prompts a prompt that is too long loses its middle instead.
    """
    prompts = prompts_to_ids(encoder, conversations)
    check_token_ids(prompts, lm.config)
    positions = positions_of(lm.config)
    if cut_prompts:
        room = positions - max_new_tokens
        prompts = [p if len(p) <= room else p[: room // 2] + p[room // 2 - room :] for p in prompts]
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > positions:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's"
            f" {positions} positions"
        )
    stop = lm.generation_config.eos_token_id
    stop = {encoder.end_of_turn, *(stop if isinstance(stop, list) else [stop])} - {None}
    # prompts of similar length meet in a batch; the longest come first, so that a lack of memory
    # shows at once
    jobs = [(p, s) for p in range(len(prompts)) for s in range(samples)]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))
    of_token = partial(pick, temperature=temperature, top_k=top_k, top_p=top_p)
    written, n_tokens = {}, 0
    begin = reported = time.perf_counter()
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        u = np.stack([uniforms(seed, prompts[p], s, max_new_tokens) for p, s in batch])
        u = torch.from_numpy(u).to(lm.device)
        texts = write_batch(lm, [prompts[p] for p, _ in batch], stop, of_token, u)
        written |= zip(batch, texts, strict=True)
        n_tokens, now = n_tokens + sum(map(len, texts)), time.perf_counter()
        if log and (now - reported > 5 or len(written) == len(jobs)):
            left = timedelta(seconds=int((now - begin) * (len(jobs) / len(written) - 1)))
            speed = f"{n_tokens / (now - begin):,.0f} tok/s, {left} left"
            log(f"generated {len(written):,} of {len(jobs):,} answers, {speed}")
            reported = now
    answers = []
    for _, ids in sorted(written.items()):
        ended = ids[-1] in stop
        text = encoder.tokenizer.decode(ids[:-1] if ended else ids)
        answers.append(Answer(text, len(ids), ended))
    return answers


def write_batch(
    lm: PreTrainedModel, prompts: list[list[int]], stop: set[int], of_token: Callable, u: Tensor
) -> list[list[int]]:
    """Returns the token ids of one answer to each of n prompts, the stop token included.

    The longest prompt comes first. An answer ends at the first token of `stop`, or has u.shape[1]
    tokens; u is (n, positions). of_token(logits (n, V), u=(n,)) returns the next tokens. Prompts
    are padded on the left, so that all rows write at the right edge of one cache. Rows that have
    ended leave the cache together. (Putting new prompts in their places at once was 10 % slower on
    the miniature, where a forward over a prompt costs more than empty places do.)
    """
    cache, logits = read_prompts(lm, prompts)
    mask, lengths = mask_of(prompts, lm.device)
    # rows holds, for each row of the cache, the number of its prompt
    answers, rows = [[] for _ in prompts], list(range(len(prompts)))
    for position in range(u.shape[1]):
        token = of_token(logits.float(), u=u[:, position])
        for row, t in zip(rows, token.tolist(), strict=True):
            if not answers[row] or answers[row][-1] not in stop:
                answers[row].append(t)
        writing = [i for i, row in enumerate(rows) if answers[row][-1] not in stop]
        if not writing or position + 1 == u.shape[1]:
            break
        mask = F.pad(mask, (0, 1), value=1)
        if len(writing) < COMPACT_BELOW * len(rows):
            rows, keep = [rows[i] for i in writing], torch.tensor(writing, device=lm.device)
            cache.batch_select_indices(keep)
            token, mask, lengths, u = (x[keep] for x in (token, mask, lengths, u))
        logits = next_logits(lm, token[:, None], mask, lengths + position, cache)
    return answers


def mask_of(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns which places of n prompts padded on the left hold a token, and their lengths (n, 1).

    The longest comes first; the mask (n, longest) is 1 or 0.
    """
    lengths = torch.tensor([[len(p)] for p in prompts], device=device)
    width = len(prompts[0])
    return (torch.arange(width, device=device) >= width - lengths).long(), lengths


def next_logits(
    lm: PreTrainedModel, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache
) -> Tensor:
    """Returns the logits (n, V) after n rows of new tokens (n, m), which the cache takes in.

    mask is that of the cache's tokens and of the new ones; position_ids is (n, m).
    """
    more = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
    return lm(ids, attention_mask=mask, position_ids=position_ids, **more).logits[:, -1]


def read_prompts(lm: PreTrainedModel, prompts: list[list[int]]) -> tuple[DynamicCache, Tensor]:
    """Returns a cache of n prompts, the longest first, and the logits (n, V) after them.

    A place of padding costs as much as a token, so prompts of similar length are read together. A
    model with layers that are no attention reads all at once, into a cache of transformers.
    """
    kinds = {type(layer) for layer in DynamicCache(config=lm.config).layers}
    attention_alone, firsts = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}, [0]
    for i, prompt in enumerate(prompts):
        if attention_alone and len(prompt) < READ_TOGETHER * len(prompts[firsts[-1]]):
            firsts.append(i)
    caches, logits = [], []
    for first, end in pairwise([*firsts, len(prompts)]):
        group, width = prompts[first:end], len(prompts[first])
        ids = torch.tensor([[0] * (width - len(p)) + p for p in group], device=lm.device)
        mask, _ = mask_of(group, lm.device)
        caches.append(DynamicCache(config=lm.config))
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        logits.append(next_logits(lm, ids, mask, position_ids, caches[-1]))
    return joined(caches) if attention_alone else caches[0], torch.cat(logits)


def joined(caches: list[DynamicCache]) -> DynamicCache:
    """Returns one cache of the rows of several, whose layers are emptied; the first is longest."""
    for i, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        caches[0].layers[i] = GrowingLayer(layers)
        for layer in layers:
            layer.reset()
    return caches[0]


class GrowingLayer(DynamicLayer):
    """The keys and values of one layer, which new ones are written behind, in place.

    transformers' own layers copy all that they hold for every new token. `layers` are such layers
    of several groups of rows, the longest first; the others are padded on the left. With a sliding
    window only the tokens that the next one sees are held.
    """

    def __init__(self, layers: tuple[DynamicLayer]):
        super().__init__()
        self.lazy_initialization(layers[0].keys, layers[0].values)
        self.is_sliding = layers[0].is_sliding
        self.sliding_window = layers[0].sliding_window if self.is_sliding else None
        self.length, self.buffers = layers[0].get_seq_length(), None
        self.keys, self.values = (
            torch.cat([F.pad(x, (0, 0, parts[0].shape[2] - x.shape[2], 0)) for x in parts])
            for parts in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
        )

    @property
    def held(self) -> int:
        n = self.keys.shape[2]
        return min(n, self.sliding_window - 1) if self.is_sliding else n

    def update(self, keys: Tensor, values: Tensor, *_, **unused) -> tuple[Tensor, Tensor]:
        """Returns the keys and values (n, heads, held + 1, E) that a new token (n, heads, 1, E)
        of each row sees."""
        held = self.held
        if self.buffers is None or self.end == self.buffers[0].shape[2]:
            seen = (x[:, :, x.shape[2] - held :] for x in (self.keys, self.values))
            self.buffers, self.end = [F.pad(x, (0, 0, 0, ROOM)) for x in seen], held
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.end] = new[:, :, 0]
        self.end, self.length = self.end + 1, self.length + 1
        begin = self.end - held - 1
        self.keys, self.values = (buffer[:, :, begin : self.end] for buffer in self.buffers)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns how many keys query_length new tokens see, and the position of the first one."""
        return self.held + query_length, self.length - self.held

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor):
        """Drops all rows but these; what is held is then copied to new buffers."""
        self.keys, self.values, self.buffers = self.keys[indices], self.values[indices], None


def refuse_half_characters(text: str, where: str):
    """Raises InputError if a text is no Unicode: no tokenizer reads half a surrogate pair."""
    if half_a_character(text):
        raise InputError(f"{where} holds half a character (half of a surrogate pair)")


def prompts_to_ids(encoder: ChatEncoder, conversations: list[list[dict]]) -> list[list[int]]:
    """Returns the token ids of conversations, which end with a user's turn.

    Raises InputError, which tells a conversation's number from 0, if one is no Unicode or if the
    chat template refuses it.
    """
    found = []
    for i, messages in enumerate(conversations):
        for turn in messages:
            refuse_half_characters(turn["content"], f"prompt {i}")
        with input_error_for(f"prompt {i} is refused by the chat template"):
            found.append(encoder.prompt_ids(messages))
    return found


def template_notes(encoder: ChatEncoder, chats: list[list[dict]]) -> list[str]:
    """Returns lines about what a chat template makes of prompts: how many spell out special tokens,
    have a system turn that goes into the user's, or are not shown whole; and the date, if it writes
    one."""
    texts = [[turn["content"] for turn in chat] for chat in chats]
    spelled = sum(any(map(encoder.special_text.search, of_chat)) for of_chat in texts)
    folded = sum(encoder.folds_system and chat[0]["role"] == "system" for chat in chats)
    lost = sum(leaves_out(encoder.render(encoder.fold(chat), True), chat) for chat in chats)
    spell = f"{spelled} of {len(chats)} prompts spell out special tokens"
    lines = {
        f"{spell}, which the chat template makes real ones": spelled,
        f"{folded} system turns stand before the user's text": folded,
        f"the chat template leaves out text of {lost} prompts": lost,
        f"the chat template writes the date, here always {encoder.day}": encoder.day,
    }
    return [line for line, holds in lines.items() if holds]


def show_error(kind, error, traceback):
    """Shows an exception that nobody has caught, as sys.excepthook."""
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def quiet():
    """Turns off the libraries' progress bars and warnings, which would stand between our lines.

    Also makes of Ctrl-C one line, and writes characters that the terminal cannot show as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = show_error
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def parse_args(argv: list[str]):
    parser = Parser("generate.py", __doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or Hub id")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--chat_template", help="a jinja file, or one of the tokenizer's [its own]")
    parser.add_argument("--temperature", type=at_least_0, default=0.7, help="[0.7]")
    parser.add_argument("--max_new_tokens", type=count, default=128, help="[128]")
    parser.add_argument("--seed", type=natural, default=0, help="of sampling [0]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """Runs the program with a command line, by default that of the process."""
    quiet()
    program, argv = command_line(argv, "generate.py")
    try:
        args = parse_args(argv)
        if args.temperature == 0 and "seed" in given_flags(argv):
            print("not used with --temperature 0: --seed")
        config, chats = read_any_config(args.model), [user_chat(p) for p in args.prompts]
        encoder = ChatEncoder(read_tokenizer(args.model, args.chat_template))
        check_token_ids(prompts_to_ids(encoder, chats), config, f"--model {args.model}")
        print(*(f"--model: {line}\n" for line in template_notes(encoder, chats)), sep="", end="")
        if unused := unused_settings(args.model):
            print(f"settings of generation_config.json not used: {unused}")
        settings = {k: getattr(args, k) for k in ("temperature", "max_new_tokens", "seed")}
        with distributed.session(timeout=600) as device:  # for the number of threads
            with input_error_for(f"--model {args.model}"):
                lm = load_weights(AutoModelForCausalLM, args.model, dtype="auto").to(device)
            answers = generate(lm, encoder, chats, **settings)
    except (InputError, FloatingPointError, OSError) as error:
        refuse(program, error)
    for prompt, answer in zip(args.prompts, answers, strict=True):
        cut = "" if answer.ended else f" [cut at --max_new_tokens {args.max_new_tokens}]"
        print(f"{prompt}\n    {answer.text}{cut}")


if __name__ == "__main__":
    main()
