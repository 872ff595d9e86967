"""Batched sampling from a causal LM, reproducible per prompt.

    python generate.py --model out/run-000/hf "Reverse the word moki." --temperature 0.7

    answers = generate(lm, ChatEncoder(tokenizer), conversations, temperature=0.7, seed=0)
    answers[0].text

The randomness of an answer is one uniform number per position, drawn from (seed, prompt, sample)
alone, so batch size, batch mates and order do not change it: in fp32 on a CPU only a near tie that
the last bits of the logits decide can come out differently.
Two models, or two temperatures, meet the same randomness, which makes their comparison sharper.
"""

import cpu  # noqa: F401  must come before torch

import hashlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from data import ChatEncoder, InputError, first_line
from flags import Parser, at_least_0, count, natural
from policy import read_tokenizer

COMPACT_BELOW = 0.75  # share of rows still writing at which the others leave the batch


class Answer(NamedTuple):
    text: str
    tokens: int  # with the end of turn, if it came
    ended: bool  # False: cut off at max_new_tokens


def uniforms(seed: int, prompt: list[int], sample: int, n: int) -> np.ndarray:
    """(n,) numbers in [0, 1), one per position of one answer."""
    digest = hashlib.sha256(repr((seed, sample, prompt)).encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).random(n)


def pick(
    logits: Tensor, temperature: float, u: Tensor, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """logits (B, V), u (B,) in [0, 1) -> tokens (B,): the first whose cumulated probability exceeds
    u; at temperature 0 the most probable. top_k > 0 leaves the k most probable tokens, top_p < 1
    then the fewest that reach it together."""
    if temperature == 0:
        return logits.argmax(-1)
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
    u = u[:, None] * cdf[:, -1:]  # the sum is 1 but for rounding
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


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
    log=None,
) -> list[Answer]:
    """Answers of a Hugging Face causal LM to conversations that end with a user's turn, prompt by
    prompt, `samples` for each. log(line) hears of the progress every few seconds. InputError if an
    answer could run past the model's positions, unless cut_prompts: such a prompt then loses its
    middle."""
    prompts = [encoder.prompt_ids(messages) for messages in conversations]
    if cut_prompts:
        room = lm.config.max_position_embeddings - max_new_tokens
        prompts = [p if len(p) <= room else p[: room // 2] + p[room // 2 - room :] for p in prompts]
    longest, positions = max(map(len, prompts), default=0), lm.config.max_position_embeddings
    if longest + max_new_tokens > positions:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's"
            f" {positions} positions"
        )
    stop = lm.generation_config.eos_token_id
    stop = {encoder.end_of_turn, *(stop if isinstance(stop, list) else [stop])} - {None}
    # of one length as far as possible; the longest first, so that what does not fit fails at once
    jobs = [(p, s) for p in range(len(prompts)) for s in range(samples)]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))
    written, begin = {}, time.perf_counter()
    said, n_tokens = begin, 0
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        u = np.stack([uniforms(seed, prompts[p], s, max_new_tokens) for p, s in batch])
        u = torch.from_numpy(u).to(lm.device)
        of_token = partial(pick, temperature=temperature, top_k=top_k, top_p=top_p)
        texts = write_batch(lm, [prompts[p] for p, _ in batch], stop, of_token, u)
        written |= zip(batch, texts, strict=True)
        n_tokens, now = n_tokens + sum(map(len, texts)), time.perf_counter()
        if log and (now - said > 5 or len(written) == len(jobs)):
            left = timedelta(seconds=int((now - begin) * (len(jobs) / len(written) - 1)))
            speed = f"{n_tokens / (now - begin):,.0f} tok/s, {left} left"
            log(f"generated {len(written):,} of {len(jobs):,} answers, {speed}")
            said = now
    answers = []
    for _, ids in sorted(written.items()):
        ended = ids[-1] in stop
        text = encoder.tokenizer.decode(ids[:-1] if ended else ids)
        answers.append(Answer(text, len(ids), ended))
    return answers


def write_batch(
    lm: PreTrainedModel, prompts: list[list[int]], stop: set[int], of_token: Callable, u: Tensor
) -> list[list[int]]:
    """Token ids of one answer to each prompt, up to and with the first of `stop`, at most
    u.shape[1] of them. Prompts are padded on the left, so that all rows write at the right edge of
    one cache; rows that have ended leave it. (Refilling their places at once, continuous batching,
    was 10 % slower on the miniature, where its own prefills cost more than empty places.)"""
    width, device = max(map(len, prompts)), lm.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=lm.config)
    answers, rows = [[] for _ in prompts], list(range(len(prompts)))  # rows: whose are in the cache
    for position in range(u.shape[1]):
        out = lm(
            ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = of_token(out.logits[:, -1].float(), u=u[:, position])
        for row, t in zip(rows, token.tolist(), strict=True):
            if not answers[row] or answers[row][-1] not in stop:
                answers[row].append(t)
        writing = [i for i, row in enumerate(rows) if answers[row][-1] not in stop]
        if not writing:
            break
        mask = F.pad(mask, (0, 1), value=1)
        position_ids = position_ids[:, -1:] + 1
        if len(writing) < COMPACT_BELOW * len(rows):
            rows, keep = [rows[i] for i in writing], torch.tensor(writing, device=device)
            cache.batch_select_indices(keep)
            token, mask, position_ids, u = (x[keep] for x in (token, mask, position_ids, u))
        ids = token[:, None]
    return answers


def quiet():
    """No progress bars and warnings of the libraries between our lines."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def parse_args(argv: list[str]):
    parser = Parser("generate.py", __doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder or Hub id")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--chat_template", help="a jinja file [the tokenizer's own]")
    parser.add_argument("--temperature", type=at_least_0, default=0.7, help="[0.7]")
    parser.add_argument("--max_new_tokens", type=count, default=128, help="[128]")
    parser.add_argument("--seed", type=natural, default=0, help="[0]")
    return parser.parse_args(argv)


def main():
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        args = parse_args(sys.argv[1:])
        chats = [[{"role": "user", "content": prompt}] for prompt in args.prompts]
        settings = {k: getattr(args, k) for k in ("temperature", "max_new_tokens", "seed")}
        encoder = ChatEncoder(read_tokenizer(args.model, args.chat_template))
        lm = AutoModelForCausalLM.from_pretrained(
            args.model, dtype="auto", trust_remote_code=False
        ).to(device)
        answers = generate(lm, encoder, chats, **settings)
    except (InputError, OSError, ValueError) as error:
        sys.exit(f"generate.py: {first_line(error)}")
    for prompt, answer in zip(args.prompts, answers, strict=True):
        print(f"{prompt}\n    {answer.text}")


if __name__ == "__main__":
    main()
