"""From token ids to packed rows, and how a step's pairs are divided into forwards.

    batch = pack(data.triplets[:8])      # one row of T tokens for policy.PackedLM

A micro-batch of b pairs is one row without padding: [prompt, chosen, rejected] of the first pair,
then of the second, and so on. Each prompt stands there once, and both answers continue it. Shapes:
B pairs of a step, b pairs of one micro-batch, N = 2b texts (chosen ones first, then rejected ones),
T tokens of the row, L tokens of the longest text, R response tokens.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Triplet

# ---------------------------------------------------------------------- the order of the pairs


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which an epoch reads n pairs: a permutation (n,), read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False  # the cache hands the same array to every caller
    return order


def batch_indices(step: int, n: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns which of n pairs belong to a step, (batch_size,).

    It depends on the arguments alone, so a resumed run needs no state of a sampler. Pairs that are
    left over after an epoch's last whole batch are not used in that epoch.
    """
    epoch, position = divmod(step, n // batch_size)
    return epoch_order(n, seed, epoch)[position * batch_size : (position + 1) * batch_size]


# ---------------------------------------------------------------------- from a step to forwards


def row_length(triplet: Triplet) -> int:
    """Returns the number of tokens that a pair has in a packed row."""
    return sum(map(len, triplet[:3]))


def tokens_in(triplets: list[Triplet]) -> int:
    """Returns the number of tokens that pairs have in a packed row."""
    return sum(map(row_length, triplets))


def plan_forwards(
    triplets: list[Triplet], ranks: int, max_pairs: int, max_tokens: int
) -> list[list[list[Triplet]]]:
    """Divides the pairs of a step into forwards; returns for each forward each rank's pairs.

    Every rank runs every forward, because FSDP2 communicates in each. Only in the last forward can
    a rank be without pairs. The pairs are sorted by length, the longest first, and dealt to the
    ranks in alternating order (0, 1, 2, then 2, 1, 0), so that the ranks get nearly equal numbers
    of tokens. A forward holds at most max_pairs pairs and max_tokens tokens per rank; one with a
    pair that is longer than max_tokens holds one pair per rank.
    """
    lengths = np.array([row_length(t) for t in triplets])
    order = np.argsort(-lengths, kind="stable")
    dealt = np.pad(order, (0, -len(order) % ranks), constant_values=-1).reshape(-1, ranks)
    dealt[1::2] = dealt[1::2, ::-1]
    starts, tokens = [0], np.zeros(ranks)
    for i, more in enumerate(np.where(dealt < 0, 0, lengths[dealt])):
        tokens = tokens + more
        if i > starts[-1] and (i - starts[-1] == max_pairs or tokens.max() > max_tokens):
            starts.append(i)
            tokens = more
    forwards = np.split(dealt, starts[1:])
    return [[[triplets[i] for i in rank if i >= 0] for rank in part.T] for part in forwards]


class Survey(NamedTuple):
    """How the steps of an epoch are divided into forwards."""

    fewest: int  # the smallest number of forwards in a step
    most: int  # the largest
    imbalance: float  # tokens of the busiest rank over the ranks' mean, minus 1; mean over steps
    longest: list[Triplet]  # the forward with the most tokens
    heaviest: list[list[Triplet]]  # the forwards of the rank and step with the most tokens in all


def survey(steps: Iterable[list[Triplet]], args, ranks: int) -> Survey:
    """Returns the Survey of steps, each of which is given as its list of pairs."""
    counts, imbalance, longest, heaviest, most = [], [], [], [], 0
    for pairs in steps:
        forwards = plan_forwards(pairs, ranks, args.micro_batch_size, args.micro_tokens)
        tokens = np.array([[tokens_in(mine) for mine in forward] for forward in forwards])
        of_rank = tokens.sum(0)
        counts.append(len(forwards))
        imbalance.append(of_rank.max() / of_rank.mean() - 1)
        forward, rank = np.unravel_index(tokens.argmax(), tokens.shape)
        longest = max(longest, forwards[forward][rank], key=tokens_in)
        if of_rank.max() > most:
            most, rank = of_rank.max(), of_rank.argmax()
            heaviest = [forward[rank] for forward in forwards]
    return Survey(min(counts), max(counts), float(np.mean(imbalance)), longest, heaviest)


# ---------------------------------------------------------------------- from pairs to a packed row


class Packed(NamedTuple):
    """A micro-batch of b pairs as one row of T tokens. Text i < b is the chosen answer of pair i
    with its prompt, text b + i the rejected one."""

    ids: Tensor  # (T,)
    position_ids: Tensor  # (T,) chosen and rejected both continue at len(prompt)
    segments: tuple  # per pair (start, prompt, chosen, rejected): its first token, three lengths
    predict: Tensor  # (R,) for each response token, the position whose hidden state predicts it
    labels: Tensor  # (R,) that token's id
    owner: Tensor  # (R,) the text it belongs to
    gather: Tensor  # (N, L) the positions of each text's tokens, prompt and response
    mask: Tensor  # (N, L) True where gather holds a real token
    lengths: Tensor  # (N,) response tokens
    rows: tuple  # the pairs' row numbers in the data set, from 0

    def to(self, device: torch.device):
        """Returns the same batch with its tensors on a device."""
        return Packed(*(move(x, device) if torch.is_tensor(x) else x for x in self))

    def split_by_pair(self, x: Tensor) -> list[Tensor]:
        """Returns the parts of x (T, ...), one value per token, that belong to each pair."""
        return x.split([sum(segment[1:]) for segment in self.segments])


def move(x: Tensor, device: torch.device) -> Tensor:
    """Returns x on a device; the host does not wait for what a GPU is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def pack(triplets: list[Triplet]) -> Packed:
    """Returns the pairs as one row: [prompt, chosen, rejected] [prompt, chosen, rejected] ..."""
    ids, positions, segments, texts, responses = [], [], [], [[], []], [[], []]
    start = 0
    for t in triplets:
        p, c, r = len(t.prompt), len(t.chosen), len(t.rejected)
        segments.append((start, p, c, r))
        ids += [t.prompt, t.chosen, t.rejected]
        positions += [np.arange(p + c), p + np.arange(r)]
        prompt, chosen, rejected = np.split(start + np.arange(p + c + r), [p, p + c])
        for side, answer in enumerate((chosen, rejected)):
            texts[side].append(np.concatenate([prompt, answer]))
            # the last prompt position predicts an answer's first token
            responses[side].append(np.concatenate([prompt[-1:], answer[:-1]]))
        start += p + c + r
    texts, responses = texts[0] + texts[1], responses[0] + responses[1]
    lengths = np.array([len(x) for x in responses])
    width = max(map(len, texts))
    mask = np.arange(width) < np.array([len(s) for s in texts])[:, None]
    # Padding reads all positions in turn: a GPU adds the gradients of one position one by one.
    gather = (np.cumsum(~mask) - 1).reshape(mask.shape) % start
    gather[mask] = np.concatenate(texts)
    labels = [t.chosen for t in triplets] + [t.rejected for t in triplets]
    long = lambda x: torch.from_numpy(np.asarray(x, dtype=np.int64))  # noqa: E731
    return Packed(
        ids=long(np.concatenate(ids)),
        position_ids=long(np.concatenate(positions)),
        segments=tuple(segments),
        predict=long(np.concatenate(responses)),
        labels=long(np.concatenate(labels)),
        owner=long(np.repeat(np.arange(len(lengths)), lengths)),
        gather=long(gather),
        mask=torch.from_numpy(mask),
        lengths=long(lengths),
        rows=tuple(t.row for t in triplets),
    )
