"""The discriminators C_phi of GANPO: one raw score per text, and the running means of their scores.

    disc = build_discriminator("transformer", hidden_size=2304)
    scores = disc(h, mask)          # h (N, L, H), mask (N, L) -> (N,)

Two are trained: disc_pos on chosen answers and disc_neg on rejected ones. Shapes: N texts, L tokens
of a text, H hidden size of the language model, D width of the discriminator. Everything is computed
in the precision of the weights, float32 or higher, except matrix products under the caller's
autocast [choice 10].
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import distributed
from losses import masked_mean


class Discriminator(nn.Module):
    """What the paper's discriminators share: first layer, head, spectral norm and running means.

    A subclass adds layers of its own, calls initialise() at the end of __init__, and defines
    forward(h, mask), which returns one raw score per text.
    """

    def __init__(self, hidden_size: int, hidden: int, ema_decay: float):
        super().__init__()
        self.ema_decay = ema_decay
        # the averages of the mean scores mu_ref, mu_theta, mu_other; 0 as in Algorithm 1, line 3
        self.register_buffer("ema", torch.zeros(3))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.project_in = nn.Linear(hidden_size, hidden)
        self.head_in, self.head_out = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def normalised_layers(self):
        """Returns the layers that carry a spectral norm."""
        return self.project_in, self.head_in, self.head_out

    def initialise(self):
        """Draws Xavier weights, sets biases to 0 and then adds the spectral norms [choice 11].

        The order matters: a spectral norm keeps a copy of the weight, so drawing the weights after
        it would have no effect.
        """
        if self.ema.is_meta:  # without values; its parameters are only counted
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.normalised_layers():
            spectral_norm(layer)
        for _ in range(30):  # [choice 23]
            self.power_iterate()
        self.train()

    def head(self, pooled: Tensor) -> Tensor:
        """Returns the raw scores (N,) of pooled features (N, D)."""
        x = F.gelu(normalised(self.head_in, pooled))
        return normalised(self.head_out, x).squeeze(-1).to(self.ema.dtype)

    def train(self, mode: bool = True):
        """Sets train or eval mode, but spectral norms stay in eval mode, so that no forward changes
        them [choice 11]."""
        super().train(mode)
        for layer in self.normalised_layers():
            layer.parametrizations.eval()
        return self

    @torch.no_grad()
    def power_iterate(self):
        """Runs one power iteration of every spectral norm; called once per discriminator update.

        So every forward of a step, on every micro-batch and rank, divides by the same number.
        """
        for layer in self.normalised_layers():
            layer.parametrizations.train()
            layer.weight  # noqa: B018  reading it in train mode is what runs the iteration
            layer.parametrizations.eval()

    @torch.no_grad()
    def update_means(self, s_ref: Tensor, s_theta: Tensor, s_other: Tensor):
        """Updates the running means, Algorithm 1, lines 13-15 [choice 2].

        The arguments are the scores of the *global* batch, (B,) each; called once per step.
        """
        batch = torch.stack([s_ref.mean(), s_theta.mean(), s_other.mean()])
        self.ema.mul_(self.ema_decay).add_(batch, alpha=1 - self.ema_decay)
        self.num_updates += 1

    def means(self) -> Tensor:
        """Returns mu_ref, mu_theta and mu_other as a tensor (3,) [choice 2].

        The averages start at 0; the result is corrected for that, as in Adam. So it is the first
        batch's means after one update, and 0 before any.
        """
        n = self.num_updates.clamp(min=1).to(self.ema)
        return self.ema / (1 - self.ema_decay**n)


DISCRIMINATORS = {}  # classes by the name that --critic takes


def discriminator(name: str):
    """Returns a decorator that registers a discriminator's class under a name for --critic.

    The class is a subclass of Discriminator. It is called with hidden_size and hidden, and with the
    other settings of build_discriminator by keyword.
    """

    def register(cls):
        DISCRIMINATORS[name] = cls
        return cls

    return register


@discriminator("transformer")
class TransformerDiscriminator(Discriminator):
    """The discriminator of Fig 10.

    A linear layer to D units (spectral norm), learned positions, pre-norm encoder layers, a masked
    mean over the tokens, and a head of two layers (spectral norm). Tokens beyond max_length are not
    read [choice 8].
    """

    def __init__(self, hidden_size, hidden, ema_decay, layers, dropout, max_length, **_):
        super().__init__(hidden_size, hidden, ema_decay)
        # 8 heads as in Fig 10; fewer where a head would have less than 8 units
        heads = next(n for n in (8, 4, 2, 1) if hidden % n == 0 and (hidden // n >= 8 or n == 1))
        self.pos_embedding = nn.Parameter(torch.randn(max_length, hidden) * 0.02)
        # nn.TransformerEncoder would start all its layers as copies of one layer [choice 17]
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads, dropout) for _ in range(layers))
        self.initialise()

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Returns raw scores (N,) of latents h (N, L, H); mask (N, L) is 1 on real tokens."""
        length = min(h.shape[1], self.pos_embedding.shape[0])  # cut both together [choice 8]
        h, mask = h[:, :length], mask[:, :length].bool()
        x = normalised(self.project_in, h) + self.pos_embedding[:length]
        if padding_is_left_out(x):
            packed, lengths = x[mask][None], mask.sum(1).tolist()
            for layer in self.layers:
                packed = layer(packed, None, lengths)
            x = x.masked_scatter(mask[..., None], packed)
        else:
            for layer in self.layers:
                x = layer(x, mask)
        return self.head(masked_mean(x, mask))


def padding_is_left_out(x: Tensor) -> bool:
    """Returns whether encoder layers read texts one after the other: in a run in bfloat16 on a CPU,
    where padding costs time. On a GPU finding out where the texts end would cost more."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def quick_dropout(x: Tensor, p: float) -> Tensor:
    """Returns x with a share p of its values 0 and the others divided by 1 - p, as F.dropout.

    p is rounded to a multiple of 2^-16, because each value is decided by 16 random bits; torch
    draws a number of its own for each, which took a tenth of a step on a CPU.
    """
    steps = 2**16
    zeros = round(p * steps)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= zeros - steps // 2
    return x * kept.to(x.dtype).mul_(steps / (steps - zeros))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention over real tokens, then a GELU network four times as wide."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.ffn_in, self.ffn_out = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def drop(self, x: Tensor) -> Tensor:
        if self.dropout and self.training and padding_is_left_out(x):
            return quick_dropout(x, self.dropout)
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor, mask: Tensor | None, lengths: list[int] | None = None) -> Tensor:
        """Returns (N, L, D) for x (N, L, D) and mask (N, L), True on real tokens.

        With lengths, x is (1, R, D): the texts one after the other, of so many tokens, no padding.
        """
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        texts = qkv.split(lengths, dim=1) if lengths else [qkv]
        x = x + self.drop(self.out(torch.cat([self.attend(text, mask) for text in texts], dim=1)))
        return x + self.drop(self.ffn_out(self.drop(F.gelu(self.ffn_in(self.norm_ffn(x))))))

    def attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Returns what attention adds to each token, (N, L, D), for qkv (N, L, 3, heads, E)."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, L, E) each
        dropout = self.dropout if self.training else 0.0
        if dropout and padding_is_left_out(qkv):
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
            return (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        seen = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, seen, dropout).transpose(1, 2).flatten(2)


@discriminator("mlp")
class MLPDiscriminator(Discriminator):
    """The shallow discriminator of Table 3: masked mean of the latents, first layer, head."""

    def __init__(self, hidden_size, hidden, ema_decay, **_):
        super().__init__(hidden_size, hidden, ema_decay)
        self.initialise()

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Returns raw scores (N,) of latents h (N, L, H); mask (N, L) is 1 on real tokens."""
        pooled = masked_mean(h.to(self.ema.dtype), mask)
        return self.head(F.gelu(normalised(self.project_in, pooled)))


def normalised(layer: nn.Linear, x: Tensor) -> Tensor:
    """Applies a layer with spectral norm to x.

    The norm is computed in the precision of the weights, the product in that of autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight = layer.weight
    return F.linear(x.to(weight.dtype), weight, layer.bias)


# ---------------------------------------------------------------------- building and updating


def build_discriminator(
    kind: str,
    hidden_size: int,
    hidden: int = 512,
    layers: int = 2,
    dropout: float = 0.0,
    max_length: int = 2048,
    ema_decay: float = 0.9,
) -> nn.Module:
    """Returns a new discriminator for latents of width hidden_size.

    kind is a name in DISCRIMINATORS: transformer (Fig 10), mlp (Table 3), paired or paired_h
    (paired.py) or one of your own. hidden is D. Only the transformer uses layers, dropout and
    max_length (the number of learned positions, in tokens). Raises ValueError for another kind.
    """
    if kind not in DISCRIMINATORS:
        raise ValueError(f"unknown discriminator {kind!r}: {', '.join(DISCRIMINATORS)}")
    settings = dict(layers=layers, dropout=dropout, max_length=max_length)
    return DISCRIMINATORS[kind](hidden_size, hidden, ema_decay=ema_decay, **settings)


def critic_settings(args, hidden_size: int) -> dict:
    """Returns the arguments of build_discriminator; they are also saved beside the weights."""
    return {
        "kind": args.critic,
        "hidden_size": hidden_size,
        "hidden": args.disc_hidden,
        "layers": args.disc_layers,
        "dropout": args.disc_dropout,
        "max_length": args.max_length,
        "ema_decay": args.ema_decay,
    }


def trains_critics(args) -> bool:
    """Returns whether the settings need a critic that is trained."""
    return args.lambda_adv > 0 and args.critic != "mse"


def build_critics(args, hidden_size: int) -> nn.ModuleDict | None:
    """Returns disc_pos and disc_neg, or None where the settings need no trained critic.

    The critics are small, so every rank has whole copies, built alike from --seed. The CPU's random
    generator is left as it was, so that what follows is the same with and without critics.
    """
    if not trains_critics(args):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        settings = critic_settings(args, hidden_size)
        return nn.ModuleDict({k: build_discriminator(**settings) for k in ("disc_pos", "disc_neg")})


def autocast_of(device: torch.device, dtype: torch.dtype):
    """Returns a function that opens the autocast for the critics' products [choice 10].

    In a bfloat16 run they are computed in bfloat16, otherwise in the weights' precision.
    """
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def step_critics(run) -> Tensor:
    """Updates both critics once, with one power iteration; returns the norm of their gradient.

    Each rank's .grad is that of its own pairs' part of a global loss, so gradients are summed over
    ranks. The norm is that of the sum; the gradient is not clipped.
    """
    norm = distributed.sum_gradients(run.critics.parameters())
    run.critic_optimizer.step()
    for critic in run.critics.values():
        if isinstance(critic, Discriminator):
            critic.power_iterate()  # [choice 11]
    return norm
