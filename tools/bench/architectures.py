"""Small versions of the networks people prune, in own definitions, with seeded random weights; needs torch.

The widths are chosen so that the inner layers outweigh the input and output ones, as they do at full size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import architectures_image as image
from . import architectures_token as token


@dataclass(frozen=True)
class Architecture:
    """One network: how to make it, inputs of two samples, and the most parameters that may stay at half of a group.

    ``heads`` is the number of attention heads that Torch-Pruning needs.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    most: float = 0.30
    heads: int = 0
    quantize: bool = False


def _images(size: int, channels: int = 3) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, channels, size, size),)


def _tokens(
    vocabulary: int, length: int = 8, mask: bool = False
) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        tokens = torch.randint(0, vocabulary, (2, length))
        return (tokens, torch.ones(2, length, dtype=torch.int64)) if mask else (tokens,)

    return make


ARCHITECTURES: tuple[Architecture, ...] = (
    # 784 inputs that cannot go: half of both hidden layers is 43.9 % of the parameters.
    Architecture(
        "MLP 784-256-256-10", lambda: image.mlp(784, 256, 10), lambda: (torch.randn(2, 784),), 0.45
    ),
    Architecture("LeNet (flatten)", image.LeNet, _images(28, 1)),
    Architecture("VGG-BN (flatten)", image.vgg, _images(32)),
    Architecture("ResNet-18-like", lambda: image.ResNet(image.Basic), _images(32)),
    Architecture("ResNet-50-like", lambda: image.ResNet(image.Bottleneck), _images(32)),
    Architecture("ResNeXt (g=8)", lambda: image.ResNet(image.Bottleneck, groups=8), _images(32)),
    Architecture(
        "ResNet, GroupNorm", lambda: image.ResNet(image.Basic, norm=image.group_norm), _images(32)
    ),
    Architecture("MobileNetV2", image.MobileNet, _images(32), 0.36),
    Architecture("DenseNet", image.DenseNet, _images(32), 0.35),
    Architecture("ShuffleNet (v1 and v2 blocks)", image.ShuffleNet, _images(32)),
    Architecture("Inception", image.Inception, _images(32)),
    Architecture("EfficientNet (SE)", image.EfficientNet, _images(32)),
    Architecture("ConvNeXt", image.ConvNeXt, _images(32)),
    Architecture("U-Net, ConvTranspose", lambda: image.UNet(transposed=True), _images(32)),
    Architecture("U-Net, Resize", lambda: image.UNet(transposed=False), _images(32)),
    Architecture("U-Net, QDQ", lambda: image.UNet(transposed=True), _images(32), quantize=True),
    Architecture("YOLO (C2f, SPPF, view head)", image.Yolo, _images(64)),
    Architecture("ESPCN (pixel shuffle, PReLU)", image.SuperResolution, _images(16, 1)),
    Architecture("DCGAN generator", image.Generator, lambda: (torch.randn(2, 16),)),
    Architecture("ViT (packed QKV)", token.ViT, _images(32), heads=4),
    Architecture("BERT (mask)", token.Bert, _tokens(60, mask=True), heads=4),
    Architecture("GPT (causal, tied embedding)", token.Gpt, _tokens(60), heads=4),
    Architecture("Llama (GQA, RoPE, SwiGLU)", token.Llama, _tokens(60), heads=4),
    Architecture("Swin (shifted windows)", token.Swin, _images(32), heads=4),
    Architecture(
        "torch TransformerEncoder", token.encoder, lambda: (torch.randn(2, 8, 12),), heads=4
    ),
    Architecture(
        "bi-LSTM + MLP", lambda: token.Recurrent("LSTM"), lambda: (torch.randn(2, 8, 16),), 0.40
    ),
    Architecture("GRU", lambda: token.Recurrent("GRU"), lambda: (torch.randn(2, 8, 16),), 0.40),
    Architecture(
        "Two towers", image.TwoTowers, lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 12))
    ),
)


def build(architecture: Architecture, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """The network in evaluation mode, with statistics and gains that are not trivial, and its inputs."""
    torch.manual_seed(seed)
    net = architecture.make().eval()
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if not tensor.is_floating_point():
                continue
            # Torch's encoder starts with equal layers, which an exporter stores once.
            if tensor.ndim > 1:
                tensor.add_(0.01 * torch.randn_like(tensor))
            if name.endswith(("running_var", "gamma")) or (
                tensor.ndim == 1 and name.endswith("weight")
            ):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1 and name.endswith(("bias", "running_mean")):
                tensor.normal_(0.0, 0.1)
    return net, architecture.inputs()
