"""Convolutional networks for the coverage study: own, short definitions of well-known forms; needs torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(width: int) -> nn.Module:
    """Eight groups."""
    return nn.GroupNorm(8, width)


def conv(
    inputs: int,
    outputs: int,
    size: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: nn.Module | None = None,
    norm: Norm = nn.BatchNorm2d,
) -> nn.Sequential:
    """Convolution, normalisation, activation."""
    kernel = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(kernel, norm(outputs), nn.ReLU() if act is None else act)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """Two hidden layers."""
    layers = (
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )
    return nn.Sequential(*layers)


class LeNet(nn.Module):
    """Caffe's: 20 and 50 filters, 500 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.hidden, self.out = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.one(x)), 2)
        x = F.max_pool2d(F.relu(self.two(x)), 2)
        return self.out(F.relu(self.hidden(x.view(x.size(0), -1))))


def vgg() -> nn.Module:
    """Four stages and a classifier on the flattened maps."""
    plan = ((3, 32), (32, 64), (64, 128), (128, 128))
    stages = [m for a, b in plan for m in (conv(a, b), nn.MaxPool2d(2))]
    return nn.Sequential(
        *stages, nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10)
    )


class Basic(nn.Module):
    """Two 3x3 convolutions."""

    widen = 1

    def __init__(self, inputs: int, width: int, stride: int, groups: int, norm: Norm) -> None:  # noqa: ARG002
        super().__init__()
        self.body = nn.Sequential(
            conv(inputs, width, 3, stride, norm=norm),
            conv(width, width, act=nn.Identity(), norm=norm),
        )
        plain = stride == 1 and inputs == width
        self.side = (
            nn.Identity() if plain else conv(inputs, width, 1, stride, act=nn.Identity(), norm=norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.side(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (of any group count), 1x1."""

    widen = 2

    def __init__(self, inputs: int, width: int, stride: int, groups: int, norm: Norm) -> None:
        super().__init__()
        out = width * self.widen
        self.body = nn.Sequential(
            conv(inputs, width, 1, norm=norm),
            conv(width, width, 3, stride, groups, norm=norm),
            conv(width, out, 1, act=nn.Identity(), norm=norm),
        )
        plain = stride == 1 and inputs == out
        self.side = (
            nn.Identity() if plain else conv(inputs, out, 1, stride, act=nn.Identity(), norm=norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.side(x))


class ResNet(nn.Module):
    """Stem, three stages of two blocks, global average, classifier."""

    def __init__(
        self, block: type[Basic] | type[Bottleneck], groups: int = 1, norm: Norm = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.stem = conv(3, 32, norm=norm)
        blocks: list[nn.Module] = []
        inputs = 32
        for width, stride in ((32, 1), (64, 2), (128, 2)):
            blocks += [block(inputs, width, stride, groups, norm)]
            inputs = width * block.widen
            blocks += [block(inputs, width, 1, groups, norm)]
        self.stages = nn.Sequential(*blocks)
        self.out = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.adaptive_avg_pool2d(self.stages(self.stem(x)), 1).flatten(1))


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """Inverted residual, with or without excitation."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, act: type[nn.Module], excite: bool
    ) -> None:
        super().__init__()
        wide = inputs * 4
        self.body = nn.Sequential(
            conv(inputs, wide, 1, act=act()),
            conv(wide, wide, 3, stride, wide, act()),
            Excite(wide) if excite else nn.Identity(),
            conv(wide, outputs, 1, act=nn.Identity()),
        )
        self.plain = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.plain else self.body(x)


def _inverted(act: type[nn.Module], excite: bool) -> nn.Module:
    plan = ((16, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 64, 2), (64, 64, 1))
    blocks = [Inverted(a, b, s, act, excite) for a, b, s in plan]
    head = (
        conv(64, 256, 1, act=act()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(256, 10),
    )
    return nn.Sequential(conv(3, 16, 3, 2, act=act()), *blocks, *head)


def MobileNet() -> nn.Module:  # noqa: N802
    """MobileNetV2: ReLU6, no excitation."""
    return _inverted(nn.ReLU6, excite=False)


def EfficientNet() -> nn.Module:  # noqa: N802
    """MBConv with squeeze and excitation, SiLU."""
    return _inverted(nn.SiLU, excite=True)


class Dense(nn.Module):
    """A dense layer: normalise, activate, convolve, join."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def DenseNet() -> nn.Module:  # noqa: N802
    """Two dense blocks and a transition."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1, bias=False)]
    width = 32
    for block in range(2):
        for _ in range(4):
            layers.append(Dense(width, 16))
            width += 16
        if not block:
            half = nn.Conv2d(width, width // 2, 1, bias=False)
            layers += [nn.BatchNorm2d(width), nn.ReLU(), half, nn.AvgPool2d(2)]
            width //= 2
    tail = (
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )
    return nn.Sequential(*layers, *tail)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleOne(nn.Module):
    """ShuffleNet: grouped 1x1, shuffle, depthwise, grouped 1x1, residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.one = conv(width, width, 1, groups=groups)
        self.two = conv(width, width, 3, groups=width, act=nn.Identity())
        self.three = conv(width, width, 1, groups=groups, act=nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.three(self.two(shuffle(self.one(x), self.groups))))


class ShuffleTwo(nn.Module):
    """ShuffleNetV2: chunk, transform one half, join, shuffle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            conv(half, half, 1),
            conv(half, half, 3, groups=half, act=nn.Identity()),
            conv(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return shuffle(torch.cat([left, self.body(right)], 1), 2)


def ShuffleNet() -> nn.Module:  # noqa: N802
    """Both kinds of blocks."""
    return nn.Sequential(
        conv(3, 144, 3, 2),
        ShuffleOne(144, 3),
        ShuffleOne(144, 3),
        conv(144, 256, 1),
        ShuffleTwo(256),
        ShuffleTwo(256),
        conv(256, 256, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Mixed(nn.Module):
    """Four branches, joined."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = conv(inputs, width, 1)
        self.three = nn.Sequential(conv(inputs, width, 1), conv(width, width))
        self.five = nn.Sequential(conv(inputs, width // 2, 1), conv(width // 2, width, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def Inception() -> nn.Module:  # noqa: N802
    """Two mixed blocks."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    return nn.Sequential(conv(3, 32, 3, 2), Mixed(32, 32), nn.MaxPool2d(2), Mixed(128, 64), *head)


class Next(nn.Module):
    """ConvNeXt block: depthwise 7x7, LayerNorm over channels last, two linear layers, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class Channels(nn.Module):
    """LayerNorm over channels first, as ConvNeXt's downsampling writes it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).pow(2).mean(1, keepdim=True)
        return (
            self.weight[:, None, None] * ((x - mean) / torch.sqrt(spread + 1e-6))
            + self.bias[:, None, None]
        )


def ConvNeXt() -> nn.Module:  # noqa: N802
    """Patches, two stages."""
    return nn.Sequential(
        nn.Conv2d(3, 40, 4, 4),
        Channels(40),
        Next(40),
        Next(40),
        Channels(40),
        nn.Conv2d(40, 80, 2, 2),
        Next(80),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(80),
        nn.Linear(80, 10),
    )


class UNet(nn.Module):
    """Two levels down and up with skips; upsampling by ConvTranspose, or by Resize to the skip's size."""

    def __init__(self, transposed: bool, width: int = 24) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [conv(3, width), conv(width, 2 * width), conv(2 * width, 4 * width)]
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(w, w // 2, 2, 2) if transposed else conv(w, w // 2, 1)
            for w in (4 * width, 2 * width)
        )
        self.join = nn.ModuleList([conv(4 * width, 2 * width), conv(2 * width, width)])
        self.out = nn.Conv2d(width, 2, 1)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if not i else F.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[1::-1], strict=True):
            x = up(x)
            if not self.transposed:
                x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = join(torch.cat([skip, x], 1))
        return self.out(x)


class C2f(nn.Module):
    """YOLOv8's block: split in two, a chain of bottlenecks, join everything."""

    def __init__(self, inputs: int, outputs: int, depth: int = 2, skip: bool = True) -> None:
        super().__init__()
        self.half = outputs // 2
        self.first = conv(inputs, outputs, 1, act=nn.SiLU())
        self.last = conv((2 + depth) * self.half, outputs, 1, act=nn.SiLU())
        self.chain = nn.ModuleList(
            nn.Sequential(
                conv(self.half, self.half, act=nn.SiLU()), conv(self.half, self.half, act=nn.SiLU())
            )
            for _ in range(depth)
        )
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.chain:
            parts.append(parts[-1] + block(parts[-1]) if self.skip else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Backbone, SPPF, one upsampling path, and a head that views, joins levels, and decodes boxes from bins."""

    def __init__(self, classes: int = 4, bins: int = 8, width: int = 32) -> None:
        super().__init__()
        act = nn.SiLU()
        self.stem = nn.Sequential(
            conv(3, width, 3, 2, act=act), conv(width, 2 * width, 3, 2, act=act)
        )
        self.high = C2f(2 * width, 2 * width)
        self.down = conv(2 * width, 4 * width, 3, 2, act=act)
        self.low = C2f(4 * width, 4 * width)
        self.pool = conv(4 * width, 2 * width, 1, act=act)
        self.pooled = conv(8 * width, 4 * width, 1, act=act)
        self.merge = C2f(6 * width, 2 * width, 1, skip=False)
        self.box = nn.ModuleList(self._head(w, 4 * bins) for w in (2 * width, 4 * width))
        self.label = nn.ModuleList(self._head(w, classes) for w in (2 * width, 4 * width))
        self.bins, self.classes = bins, classes

    @staticmethod
    def _head(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(conv(inputs, 32, act=nn.SiLU()), nn.Conv2d(32, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(self.stem(x))
        low = self.low(self.down(high))
        pools = [self.pool(low)]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        low = self.pooled(torch.cat(pools, 1))
        high = self.merge(torch.cat([F.interpolate(low, scale_factor=2.0), high], 1))
        levels = [
            torch.cat([box(level), label(level)], 1)
            for box, label, level in zip(self.box, self.label, (high, low), strict=True)
        ]
        joined = torch.cat(
            [v.view(v.shape[0], 4 * self.bins + self.classes, -1) for v in levels], 2
        )
        box, label = joined.split((4 * self.bins, self.classes), 1)
        bins = box.view(box.shape[0], 4, self.bins, -1).softmax(2)
        steps = torch.arange(self.bins, dtype=torch.float32).view(1, 1, -1, 1)
        return torch.cat([(bins * steps).sum(2), label.sigmoid()], 1)


def SuperResolution() -> nn.Module:  # noqa: N802
    """ESPCN with PReLU; the pixel shuffle is in the middle, so that its channels may go."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 5, padding=2),
        nn.PReLU(64),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.PReLU(64),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.PixelShuffle(2),
        nn.PReLU(16),
        nn.Conv2d(16, 4, 3, padding=1),
        nn.PixelShuffle(2),
    )


def Generator() -> nn.Module:  # noqa: N802
    """DCGAN: a linear layer viewed as maps, transposed convolutions."""
    layers: list[nn.Module] = [
        nn.Linear(16, 2048),
        nn.Unflatten(1, (128, 4, 4)),
        nn.BatchNorm2d(128),
        nn.ReLU(),
    ]
    for a, b in ((128, 96), (96, 64)):
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(64, 1, 4, 2, 1), nn.Tanh())


class TwoTowers(nn.Module):
    """Two inputs, two outputs: an image and a table, normalised and compared, and classified together."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(
            conv(3, 48), conv(48, 96, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.right = nn.Sequential(nn.Linear(12, 128), nn.GELU(), nn.Linear(128, 96))
        self.out = nn.Sequential(nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 5))

    def forward(self, image: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        a, b = F.relu(self.left(image)), self.right(table)
        near = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)
        return near, self.out(torch.cat([a, b], 1))
