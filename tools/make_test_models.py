"""Write the exported models of ``tests/data``: ``python -m tools.make_test_models``; needs torch and onnxscript.

Tiny versions of networks of the coverage study, seeded random weights, by both exporters of torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import torch
from torch import nn

from .bench import architectures_foreign as foreign
from .bench import architectures_image as image
from .bench import architectures_token as token
from .bench.architectures import Architecture
from .bench.coverage import EXPORTERS, export
from .bench.studies import ROOT

FOLDER = ROOT / "tests" / "data"


def _pixels(size: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 3, size, size),)


def _words(mask: bool = False) -> tuple[torch.Tensor, ...]:
    tokens = torch.randint(0, 12, (2, 6))
    return (tokens, torch.ones(2, 6, dtype=torch.int64)) if mask else (tokens,)


def _pooled(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def _generator() -> nn.Module:
    head = (nn.Linear(6, 256), nn.Unflatten(1, (16, 4, 4)), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(
        *head, nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)
    )


NETWORKS = (
    Architecture("vit", lambda: token.ViT(32, 4, 1, 16, 8), lambda: _pixels(16)),
    Architecture("bert", lambda: token.Bert(12, 32, 4, 1), lambda: _words(mask=True)),
    Architecture("gpt", lambda: token.Gpt(12, 32, 4, 1), _words),
    Architecture("llama", lambda: token.Llama(12, 32, 4, 2, 1), _words),
    Architecture("yolo", lambda: image.Yolo(3, 4, 8), lambda: _pixels(32)),
    Architecture(
        "squeeze-excite",
        lambda: _pooled(
            image.conv(3, 16), image.Inverted(16, 16, 1, nn.SiLU, excite=True), width=16
        ),
        lambda: _pixels(8),
    ),
    Architecture(
        "shuffle",
        lambda: _pooled(image.conv(3, 72), image.ShuffleOne(72, 3), image.ShuffleTwo(72), width=72),
        lambda: _pixels(8),
    ),
    Architecture("unet-resize", lambda: image.UNet(transposed=False, width=8), lambda: _pixels(16)),
    Architecture("generator", _generator, lambda: (torch.randn(2, 6),)),
    Architecture(
        "group-norm",
        lambda: _pooled(
            image.conv(3, 16, norm=image.group_norm),
            image.Basic(16, 16, 1, 1, image.group_norm),
            width=16,
        ),
        lambda: _pixels(8),
    ),
)


FOREIGN = (
    foreign.Free(
        "embedder",
        lambda: foreign.Embedder(20, 16, 4, 1, 24),
        foreign.sentences(20),
        {"tokens": foreign.WORDS, "attention_mask": foreign.WORDS},
        24,
    ),
    foreign.Free(
        "speech",
        lambda: foreign.Speech(4, 12, 16, 4, 1, 24),
        foreign.speech(4, 12),
        {"spectrogram": {0: "batch", 2: "frames"}, "tokens": foreign.WORDS},
        24,
    ),
)


def main() -> None:
    """Export every network both ways."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "foreign").mkdir(exist_ok=True)
    for exporter, dynamo in EXPORTERS.items():
        with tempfile.TemporaryDirectory() as folder:
            for entry in NETWORKS:
                file, _ = export(entry, dynamo, Path(folder), 0)
                _save(file, FOLDER / f"{entry.name}-{exporter.lower()}.onnx")
            for free in FOREIGN:
                file = Path(folder) / "free.onnx"
                foreign.export(free, dynamo, file, 0)
                _save(file, FOLDER / "foreign" / f"{free.name}-{exporter.lower()}.onnx")


def _save(file: Path, target: Path) -> None:
    """Without what the exporter says about the machine: stack traces hold paths."""
    proto = onnx.load(file)
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:], proto.metadata_props[:], proto.graph.value_info[:]
    for tensor in proto.graph.initializer:
        del tensor.metadata_props[:]
    onnx.save(proto, target)
    print(target.name, target.stat().st_size)


if __name__ == "__main__":
    main()
