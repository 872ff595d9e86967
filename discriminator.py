"""C_phi, the critic of GANPO: one raw score per sequence of latents, and the running means of its
scores.

    disc = build_discriminator("transformer", hidden_size=2304)
    scores = disc(h, attention_mask)          # h (B, T, H), attention_mask (B, T) -> (B,)

Shapes: B texts, T tokens, H the models' hidden size, D the critic's own.
Two are trained: disc_pos on chosen responses, disc_neg on rejected ones. Everything is computed in
the weights' precision, fp32, except matrix products under the caller's autocast [choice 10]; the
paired critic's callers have none, for the sake of its slopes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from losses import masked_mean


class Discriminator(nn.Module):
    """What both kinds share: a first layer and a head, spectrally normalised; spectral norm that
    moves only when told to; the running means."""

    def __init__(self, hidden_size: int, hidden: int, ema_decay: float):
        super().__init__()
        self.ema_decay = ema_decay
        # of the mean scores mu_ref, mu_theta, mu_other, from 0 as in Algorithm 1, line 3
        self.register_buffer("ema", torch.zeros(3))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.project_in = nn.Linear(hidden_size, hidden)
        self.head_in, self.head_out = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def normalised_layers(self):
        return self.project_in, self.head_in, self.head_out

    def finish(self):
        """Last in each __init__: Xavier weights and zero biases, then spectral norm, since the
        other way round would be undone by the norm's own copy of the weight [choice 11]."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.normalised_layers():
            spectral_norm(layer)
        for _ in range(30):
            self.power_iterate()
        self.train()

    def head(self, pooled: Tensor) -> Tensor:
        """(B, D) -> raw scores (B,)."""
        x = F.gelu(normalised(self.head_in, pooled))
        return normalised(self.head_out, x).squeeze(-1).to(self.ema.dtype)

    def train(self, mode: bool = True):
        """As always, but spectral norm stays in eval mode: no forward moves it [choice 11]."""
        super().train(mode)
        for layer in self.normalised_layers():
            layer.parametrizations.eval()
        return self

    @torch.no_grad()
    def power_iterate(self):
        """One power iteration for every spectral norm; called once per discriminator update, so
        that every forward of a step, on every micro-batch and rank, divides by the same sigma."""
        for layer in self.normalised_layers():
            layer.parametrizations.train()
            layer.weight  # noqa: B018  reading it in train mode is what runs the iteration
            layer.parametrizations.eval()

    @torch.no_grad()
    def update_means(self, s_ref: Tensor, s_theta: Tensor, s_other: Tensor):
        """Algorithm 1, lines 14-15, on the scores of the *global* batch, once per step [choice
        2]."""
        batch = torch.stack([s_ref.mean(), s_theta.mean(), s_other.mean()])
        self.ema.mul_(self.ema_decay).add_(batch, alpha=1 - self.ema_decay)
        self.num_updates += 1

    def means(self) -> Tensor:
        """mu_ref, mu_theta, mu_other, (3,): the moving averages freed of their start at 0, so the
        first batch's own means after one update, and 0 before any [choice 2]."""
        n = self.num_updates.clamp(min=1).to(self.ema)
        return self.ema / (1 - self.ema_decay**n)


DISCRIMINATORS = {}  # --disc NAME -> class, which takes all settings of build_discriminator


def discriminator(name: str):
    """Adds a critic's class under `name`."""

    def add(cls):
        DISCRIMINATORS[name] = cls
        return cls

    return add


@discriminator("transformer")
class TransformerDiscriminator(Discriminator):
    """Fig 10: linear to `hidden` (spectral norm), learned positions, pre-norm encoder layers,
    masked mean, a two-layer head (spectral norm)."""

    def __init__(self, hidden_size, hidden, ema_decay, layers, dropout, max_length, **_):
        super().__init__(hidden_size, hidden, ema_decay)
        # 8 heads as in Fig 10, fewer where they would be narrower than 8 units
        heads = next(n for n in (8, 4, 2, 1) if hidden % n == 0 and (hidden // n >= 8 or n == 1))
        self.pos_embedding = nn.Parameter(torch.randn(max_length, hidden) * 0.02)
        # a list, since nn.TransformerEncoder starts all its layers as copies of one [choice 17]
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads, dropout) for _ in range(layers))
        self.finish()

    def forward(self, h: Tensor, attention_mask: Tensor) -> Tensor:
        """Latents h (B, T, H), attention_mask (B, T), 1 on real tokens -> raw scores (B,)."""
        length = min(h.shape[1], self.pos_embedding.shape[0])  # cut both together [choice 8]
        h, mask = h[:, :length], attention_mask[:, :length].bool()
        x = normalised(self.project_in, h) + self.pos_embedding[:length]
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(masked_mean(x, mask))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention over real tokens and a GELU feed-forward four times as wide."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.ffn_in, self.ffn_out = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def drop(self, x: Tensor):
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x: Tensor, mask: Tensor):
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D) each
        dropout = self.dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], dropout)
        x = x + self.drop(self.out(a.transpose(1, 2).flatten(2)))
        return x + self.drop(self.ffn_out(self.drop(F.gelu(self.ffn_in(self.norm_ffn(x))))))


@discriminator("mlp")
class MLPDiscriminator(Discriminator):
    """Table 3's shallow critic: the masked mean of the latents, then the first layer and the
    head."""

    def __init__(self, hidden_size, hidden, ema_decay, **_):
        super().__init__(hidden_size, hidden, ema_decay)
        self.finish()

    def forward(self, h: Tensor, attention_mask: Tensor) -> Tensor:
        """Latents h (B, T, H), attention_mask (B, T), 1 on real tokens -> raw scores (B,)."""
        pooled = masked_mean(h.to(self.ema.dtype), attention_mask)
        return self.head(F.gelu(normalised(self.project_in, pooled)))


@discriminator("paired")
class TokenCritic(nn.Module):
    """The paired game's critic: a small MLP on each token's latent, no spectral norm, no means.
    With differences it reads h_theta - h_ref, whose place for the reference is 0."""

    def __init__(self, hidden_size, hidden, differences, **_):
        super().__init__()
        self.differences = differences
        self.project_in = nn.Linear(hidden_size, hidden)
        self.middle, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def inputs(self, h_theta: Tensor, h_ref: Tensor) -> tuple[Tensor, Tensor]:
        """What it reads of policy and reference, (B, T, H) each."""
        if self.differences:
            return h_theta - h_ref, torch.zeros_like(h_ref)
        return h_theta, h_ref

    def tokens(self, x: Tensor) -> Tensor:
        """(B, T, H) -> raw scores (B, T)."""
        x = F.gelu(self.middle(F.gelu(self.project_in(x))))
        return self.out(x).squeeze(-1)

    def forward(self, h: Tensor, attention_mask: Tensor) -> Tensor:
        """Latents h (B, T, H), attention_mask (B, T), 1 on real tokens -> their mean score (B,)."""
        return masked_mean(self.tokens(h), attention_mask)


def normalised(layer: nn.Linear, x: Tensor) -> Tensor:
    """A spectrally normalised layer: sigma in the weights' precision, the product in autocast's."""
    with torch.autocast(x.device.type, enabled=False):
        weight = layer.weight
    return F.linear(x.to(weight.dtype), weight, layer.bias)


def build_discriminator(
    kind: str,
    hidden_size: int,
    hidden: int = 512,
    layers: int = 2,
    dropout: float = 0.0,
    max_length: int = 2048,
    ema_decay: float = 0.9,
    differences: bool = False,
) -> Discriminator | TokenCritic:
    """A critic for latents of width hidden_size. kind: transformer (Fig 10), mlp (Table 3) or
    paired (the paired game's); only the first has use for layers, dropout and max_length (learned
    positions), only the last for differences. ValueError for another kind."""
    if kind not in DISCRIMINATORS:
        known = ", ".join(DISCRIMINATORS)
        raise ValueError(f"unknown discriminator {kind!r}: {known} (mse is losses.latent_mse)")
    settings = dict(layers=layers, dropout=dropout, max_length=max_length, differences=differences)
    return DISCRIMINATORS[kind](hidden_size, hidden, ema_decay=ema_decay, **settings)
