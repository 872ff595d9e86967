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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

import distributed
from data import ChatEncoder, InputError, half_a_character, input_error_for, user_chat
from flags import Parser, at_least_0, command_line, count, given_flags, natural, refuse
from policy import (
    check_token_ids,
    load_weights,
    positions_of,
    read_any_config,
    read_tokenizer,
)

COMPACT_BELOW = 0.75  # with a smaller share of unfinished rows, finished ones leave the batch


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
    """
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
    u = u[:, None] * cdf[:, -1:]  # the last sum is 1 except for rounding
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

    An answer ends at the first token of `stop`, or has u.shape[1] tokens; u is (n, positions).
    of_token(logits (n, V), u=(n,)) returns the next tokens. Prompts are padded on the left, so that
    all rows write at the right edge of one cache. Rows that have ended leave the cache together.
    (Putting new prompts in their places at once was 10 % slower on the miniature, where a forward
    over a prompt costs more than empty places do.)
    """
    width, device = max(map(len, prompts)), lm.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=lm.config)
    # rows holds, for each row of the cache, the number of its prompt
    answers, rows = [[] for _ in prompts], list(range(len(prompts)))
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
        settings = {k: getattr(args, k) for k in ("temperature", "max_new_tokens", "seed")}
        with distributed.session(timeout=600) as device:  # for the number of threads
            with input_error_for(f"--model {args.model}"):
                lm = load_weights(AutoModelForCausalLM, args.model, dtype="auto").to(device)
            answers = generate(lm, encoder, chats, **settings)
    except (InputError, OSError) as error:
        refuse(program, error)
    for prompt, answer in zip(args.prompts, answers, strict=True):
        cut = "" if answer.ended else f" [cut at --max_new_tokens {args.max_new_tokens}]"
        print(f"{prompt}\n    {answer.text}{cut}")


if __name__ == "__main__":
    main()
