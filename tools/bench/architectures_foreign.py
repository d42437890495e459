"""A sentence embedder and a Whisper-like encoder and decoder, in own definitions, for the study of foreign models.

Both take any batch and any length: the forms in which masks, positions and pooling are exported then differ from those
of fixed shapes. Needs torch.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of ``x`` to ``other`` (itself where None), three linear layers; keys without a bias."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        return x.view(n, length, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        source = x if other is None else other
        q, k, v = self._split(self.q(x)), self._split(self.k(source)), self._split(self.v(source))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            # As Whisper has it: queries and keys are both scaled by the fourth root.
            scale = q.shape[-1] ** -0.25
            scores = (q * scale) @ (k * scale).transpose(-1, -2)
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Embedder(nn.Module):
    """A sentence embedder: post-norm blocks, learned positions, the mean over tokens that are there, unit length.

    Two outputs: the embedding and that of a pooler (first token, tanh).
    """

    def __init__(
        self,
        vocabulary: int = 200,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
        longest: int = 64,
    ) -> None:
        super().__init__()
        self.word, self.place, self.kind = (
            nn.Embedding(n, width) for n in (vocabulary, longest, 2)
        )
        self.register_buffer("places", torch.arange(longest)[None])
        self.norm = nn.LayerNorm(width)
        self.attentions = nn.ModuleList(Attention(width, heads, fused=True) for _ in range(depth))
        self.ones, self.twos = (
            nn.ModuleList(nn.LayerNorm(width) for _ in range(depth)) for _ in range(2)
        )
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.pool = nn.Linear(width, width)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        places = self.places[:, : tokens.shape[1]]
        x = self.norm(self.word(tokens) + self.place(places) + self.kind(torch.zeros_like(tokens)))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for attention, one, wide, narrow, two in zip(
            self.attentions, self.ones, self.wide, self.narrow, self.twos, strict=True
        ):
            x = one(x + attention(x, mask=mask))
            x = two(x + narrow(F.gelu(wide(x))))
        there = attention_mask[..., None].expand(x.shape).to(x.dtype)
        mean = (x * there).sum(1) / there.sum(1).clamp(min=1e-9)
        return F.normalize(mean, p=2.0, dim=1), torch.tanh(self.pool(x[:, 0]))


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines of falling frequency, (length, width)."""
    rate = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angle = torch.arange(length)[:, None] * rate[None]
    return torch.cat([angle.sin(), angle.cos()], 1)


class Layer(nn.Module):
    """A pre-norm block; a decoder's also attends to the encoder's output."""

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.attention, self.one = Attention(width, heads, fused=not cross), nn.LayerNorm(width)
        self.cross = Attention(width, heads, fused=True) if cross else None
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.wide, self.narrow, self.two = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.LayerNorm(width),
        )

    def forward(self, x: Tensor, heard: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.one(x), mask=mask)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), heard)
        return x + self.narrow(F.gelu(self.wide(self.two(x))))


class Speech(nn.Module):
    """Two convolutions over a spectrogram (the second halves its length), sinusoidal positions, an encoder; a causal
    decoder with learned positions whose output layer is its embedding."""

    def __init__(
        self,
        bands: int = 16,
        vocabulary: int = 120,
        width: int = 64,
        heads: int = 4,
        depth: int = 1,
        longest: int = 64,
    ) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv1d(bands, width, 3, padding=1),
            nn.Conv1d(width, width, 3, 2, 1),
        )
        self.register_buffer("waves", sinusoids(longest, width))
        self.encoder = nn.ModuleList(Layer(width, heads, cross=False) for _ in range(depth))
        self.encoded = nn.LayerNorm(width)
        self.word, self.place = (
            nn.Embedding(vocabulary, width),
            nn.Parameter(0.1 * torch.randn(longest, width)),
        )
        self.register_buffer("mask", torch.full((longest, longest), -torch.inf).triu(1))
        self.decoder = nn.ModuleList(Layer(width, heads, cross=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, spectrogram: Tensor, tokens: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.first(spectrogram)))).permute(0, 2, 1)
        x = x + self.waves[: x.shape[1]]
        for layer in self.encoder:
            x = layer(x)
        heard = self.encoded(x)
        length = tokens.shape[1]
        y = self.word(tokens) + self.place[:length]
        for layer in self.decoder:
            y = layer(y, heard, self.mask[:length, :length])
        return self.norm(y) @ self.word.weight.T


@dataclass(frozen=True)
class Free:
    """One network with open axes: ``axes`` names them for every input, ``inputs`` makes (samples, a length) of them."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    axes: Mapping[str, Mapping[int, str]]
    longest: int = 64


def sentences(vocabulary: int) -> Callable[[int, int], dict[str, Tensor]]:
    """Tokens, and a mask that hides the end of every other sentence."""

    def make(count: int, length: int) -> dict[str, Tensor]:
        mask = torch.ones(count, length, dtype=torch.int64)
        mask[1::2, length - length // 3 :] = 0
        return {"tokens": torch.randint(0, vocabulary, (count, length)), "attention_mask": mask}

    return make


def speech(bands: int, vocabulary: int) -> Callable[[int, int], dict[str, Tensor]]:
    """A spectrogram of three frames a token, one more, and tokens."""

    def make(count: int, length: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, vocabulary, (count, length))
        return {"spectrogram": torch.randn(count, bands, 3 * length + 1), "tokens": tokens}

    return make


WORDS = {0: "batch", 1: "length"}
NETWORKS = (
    Free("sentence embedder", Embedder, sentences(200), {"tokens": WORDS, "attention_mask": WORDS}),
    Free(
        "speech encoder and decoder",
        Speech,
        speech(16, 120),
        {"spectrogram": {0: "batch", 2: "frames"}, "tokens": WORDS},
    ),
)


def build(entry: Free, seed: int) -> nn.Module:
    """The network in evaluation mode, with gains and biases that are not trivial."""
    torch.manual_seed(seed)
    net = entry.make().eval()
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5) if name.endswith("weight") else tensor.normal_(0.0, 0.1)
    return net


def export(entry: Free, dynamo: bool, file: Path, seed: int) -> None:
    """Write the network with all its axes open."""
    net = build(entry, seed)
    inputs = entry.inputs(3, 7)
    names = list(inputs)
    free: dict[str, Any] = {"dynamic_axes": {n: dict(axes) for n, axes in entry.axes.items()}}
    if dynamo:
        most = {"length": entry.longest, "frames": 2 * entry.longest}
        dims = {
            s: torch.export.Dim(s, min=4, max=most[s]) if s in most else torch.export.Dim(s)
            for axes in entry.axes.values()
            for s in axes.values()
        }
        free = {
            "dynamic_shapes": tuple({a: dims[s] for a, s in entry.axes[n].items()} for n in names)
        }
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            tuple(inputs.values()),
            str(file),
            input_names=names,
            dynamo=dynamo,
            external_data=False,
            **free,
        )
