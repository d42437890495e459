"""Attention and recurrent networks for the coverage study: own, short definitions of well-known forms; needs torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Packed(nn.Module):
    """Self-attention with one linear layer for queries, keys and values, as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        p = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((p @ v).transpose(1, 2).reshape(n, length, -1))


class Separate(nn.Module):
    """Self-attention with three linear layers, as in BERT; ``mask`` is added to the scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.out = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        p = (scores if mask is None else scores + mask).softmax(-1)
        return self.out((p @ v).permute(0, 2, 1, 3).flatten(2))


class Fused(Separate):
    """The same through torch's scaled_dot_product_attention, causal."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: ARG002
        q, k, v = self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))
        p = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(p.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Block(nn.Module):
    """Attention and two linear layers; normalised before (ViT, GPT) or after (BERT)."""

    def __init__(self, width: int, attention: nn.Module, before: bool = True) -> None:
        super().__init__()
        self.attention, self.before = attention, before
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rest = () if mask is None else (mask,)
        if self.before:
            x = x + self.attention(self.one(x), *rest)
            return x + self.narrow(F.gelu(self.wide(self.two(x))))
        x = self.one(x + self.attention(x, *rest))
        return self.two(x + self.narrow(F.gelu(self.wide(x))))


class ViT(nn.Module):
    """Patches, class token, positions, two blocks."""

    def __init__(
        self, width: int = 64, heads: int = 4, depth: int = 2, size: int = 32, patch: int = 8
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.place = nn.Parameter(0.1 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, Packed(width, heads)) for _ in range(depth)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.out(self.norm(self.blocks(x))[:, 0])


class Bert(nn.Module):
    """Word and position embeddings, an attention mask as a second input, two outputs."""

    def __init__(
        self, vocabulary: int = 60, width: int = 64, heads: int = 4, depth: int = 2
    ) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, Separate(width, heads), before=False) for _ in range(depth)
        )
        self.pool, self.out = nn.Linear(width, width), nn.Linear(width, 3)
        self.tag = nn.Linear(width, 5)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.word(tokens) + self.place(places))
        extended = (1.0 - mask[:, None, None, :].to(x.dtype)) * -1e4
        for block in self.blocks:
            x = block(x, extended)
        return self.out(torch.tanh(self.pool(x[:, 0]))), self.tag(x)


class Gpt(nn.Module):
    """Causal attention; the embedding is also the output layer."""

    def __init__(
        self, vocabulary: int = 60, width: int = 64, heads: int = 4, depth: int = 2
    ) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.blocks = nn.Sequential(*(Block(width, Fused(width, heads)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.word.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.out(self.norm(self.blocks(self.word(tokens) + self.place(places))))


class Rms(nn.Module):
    """Root mean square normalisation, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Grouped(nn.Module):
    """Grouped-query attention with rotary positions: keys and values are repeated for several query heads."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        inner = self.size * shared
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * 0.1 ** torch.arange(half)
        angle = torch.cat([angle, angle], -1)
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angle.cos() + turned * angle.sin()

    def _repeat(self, x: Tensor) -> Tensor:
        n, shared, length, size = x.shape
        times = self.heads // self.shared
        return (
            x[:, :, None]
            .expand(n, shared, times, length, size)
            .reshape(n, shared * times, length, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self._rotate(self.q(x).view(n, length, self.heads, self.size).transpose(1, 2))
        k = self._repeat(
            self._rotate(self.k(x).view(n, length, self.shared, self.size).transpose(1, 2))
        )
        v = self._repeat(self.v(x).view(n, length, self.shared, self.size).transpose(1, 2))
        scores = q @ k.transpose(2, 3) * self.size**-0.5
        causal = torch.full((length, length), -1e4).triu(1)
        p = (scores + causal).softmax(-1)
        return self.out((p @ v).transpose(1, 2).reshape(n, length, -1))


class LlamaBlock(nn.Module):
    """Grouped-query attention and SwiGLU."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.one, self.two = Rms(width), Rms(width)
        self.attention = Grouped(width, heads, shared)
        self.gate, self.up = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, 3 * width, bias=False),
        )
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.one(x))
        y = self.two(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Two blocks, an output layer of its own."""

    def __init__(
        self, vocabulary: int = 60, width: int = 64, heads: int = 4, shared: int = 2, depth: int = 2
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, shared) for _ in range(depth)))
        self.norm, self.out = Rms(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.blocks(self.word(tokens))))


class Windows(nn.Module):
    """Attention inside windows, shifted or not, with a bias by relative position."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.side, self.window, self.shift = heads, side, window, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        at = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        apart = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", (apart[..., 0] * (2 * window - 1) + apart[..., 1]).flatten())
        self.table = nn.Parameter(0.1 * torch.randn((2 * window - 1) ** 2, heads))

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        s, w, m = self.side, self.window, self.side // self.window
        x = x.view(n, s, s, c)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(n, m, w, m, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)
        qkv = self.qkv(x).reshape(-1, w * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.table[self.index].view(w * w, w * w, -1).permute(2, 0, 1)
        p = (q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1) + bias[None]).softmax(-1)
        x = self.out((p @ v).transpose(1, 2).reshape(-1, w * w, c))
        x = x.view(-1, m, m, w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(n, s, s, c)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x.view(n, length, c)


class Swin(nn.Module):
    """Patches of four pixels, two window blocks, merged patches, one more block."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        self.first = nn.Sequential(*(Block(width, Windows(width, heads, 8, 4, s)) for s in (0, 2)))
        self.merged, self.merge = (
            nn.LayerNorm(4 * width),
            nn.Linear(4 * width, 2 * width, bias=False),
        )
        self.second = Block(2 * width, Windows(2 * width, heads, 4, 4, 0))
        self.last, self.out = nn.LayerNorm(2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(self.patch(x).flatten(2).transpose(1, 2)))
        x = x.view(x.shape[0], 8, 8, -1)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        x = self.merge(self.merged(torch.cat(parts, -1).flatten(1, 2)))
        return self.out(self.last(self.second(x)).mean(1))


def encoder() -> nn.Module:
    """torch's own encoder, with nn.MultiheadAttention inside."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(12, 64), stack, nn.Linear(64, 5))


class Recurrent(nn.Module):
    """Two recurrent layers and a classifier of the last step; the LSTM runs both ways."""

    def __init__(self, kind: str, width: int = 64) -> None:
        super().__init__()
        both = kind == "LSTM"
        self.body = getattr(nn, kind)(16, width, 2, batch_first=True, bidirectional=both)
        self.hidden, self.out = nn.Linear(width * (1 + both), 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.body(x)
        return self.out(F.relu(self.hidden(y[:, -1])))
