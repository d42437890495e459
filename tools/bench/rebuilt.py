"""The shipped networks as torch modules again, with the weights of their ONNX files, so that no checkpoint is needed.

Weights are matched by name; those that exporters rename and transpose, in the order in which layers run. Batch
normalisation that the file has folded stays folded. Needs torch.
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from onnx_oamip.graph.runtime import Session

from ..train_models import OPSET, RECIPES
from .studies import paths

SHAPE = (1, 28, 28)
LAYERS = {"Conv", "Gemm", "MatMul"}
TOLERANCE = 1e-4


def rebuild(name: str, file: Path | None = None) -> nn.Module:
    """A shipped network, or one of the same build pruned to ``file``, with the weights of that file.

    Layers take the shapes of their weights. Raises ValueError where torch and ONNX Runtime differ by more than 1e-4.
    """
    proto = onnx.load(file or paths(name)[0])
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        # Weights that were equal are stored once.
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
    net: nn.Module = RECIPES[name].build().eval()
    if not any(node.op_type == "BatchNormalization" for node in proto.graph.node):
        _fold(net)
    state: dict[str, Any] = {}
    layers, nodes = _layers(net), _nodes(proto, values)
    named = {node.input[1]: node for node in nodes}
    taken = {f"{path}.weight" for path, _ in layers} & set(named)
    left = iter([node for node in nodes if node.input[1] not in taken])
    for path, layer in layers:
        node = named[f"{path}.weight"] if f"{path}.weight" in taken else next(left)
        weight = values[node.input[1]]
        turned = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not _attribute(node, "transB")
        )
        state[f"{path}.weight"] = weight.T if turned else weight
        if len(node.input) > 2 and node.op_type in ("Conv", "Gemm"):
            state[f"{path}.bias"] = values[node.input[2]]
        if isinstance(layer, nn.Conv2d):
            layer.groups = _attribute(node, "group") or 1
    known = {**net.state_dict(), **dict.fromkeys(state)}
    state = {**{n: values[n] for n in known if n in values}, **state}
    missing = [n for n in known if n not in state and not n.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{name}: the file has no weights for {', '.join(missing)}.")
    _assign(net, {n: torch.from_numpy(np.array(v)) for n, v in state.items()})
    images = torch.rand(7, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here = net(images).numpy()
    there = Session(proto, "cpu").run({"input": images.numpy()})[0]
    if not np.abs(here - there).max() <= TOLERANCE * max(1.0, float(np.abs(there).max())):
        raise ValueError(
            f"{name}: the rebuilt network differs from its file by {np.abs(here - there).max():.2g}."
        )
    return net


def export(net: nn.Module, path: Path) -> onnx.ModelProto:
    """Export as the shipped networks were, batch normalisation kept, and load."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (torch.zeros(2, *SHAPE),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )
    return onnx.load(path)


def _layers(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Convolutions and linear layers by name, in the order in which they run."""
    ran: list[tuple[str, nn.Module]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, _, path=path: ran.append((path, module)))
        for path, layer in net.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        net(torch.zeros(1, *SHAPE))
    for hook in hooks:
        hook.remove()
    return ran


def _nodes(proto: onnx.ModelProto, values: dict[str, Any]) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if n.op_type in LAYERS and n.input[1] in values]


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), 0)


def _fold(net: nn.Module) -> None:
    """Batch normalisation away, a bias in the convolution before it."""
    for module in net.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d) and child.bias is None:
                child.bias = nn.Parameter(torch.zeros(child.out_channels))


def _assign(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Set every weight, whatever its shape, and the widths that layers know of."""
    for path, value in state.items():
        owner, _, name = path.rpartition(".")
        module = net.get_submodule(owner)
        if isinstance(getattr(module, name), nn.Parameter):
            setattr(module, name, nn.Parameter(value))
        elif getattr(module, name) is None:
            module.register_parameter(name, nn.Parameter(value))
        else:
            setattr(module, name, value)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = (
                module.weight.shape[0],
                module.weight.shape[1] * module.groups,
            )
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
