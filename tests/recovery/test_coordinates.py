"""Coordinates of weights: exact changes and gradients, equal steps in all directions of the inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.core.records import Model
from onnx_oamip.data import dataset

torch = pytest.importorskip("torch")

from onnx_oamip.recovery import coordinates, engine  # noqa: E402

LAYERS = {
    "Gemm, transposed": "(float[N, 6] x) => (float[N, 4] y) <float[4, 6] w> { y = Gemm<transB = 1>(x, w) }",
    "MatMul": "(float[N, 5, 6] x) => (float[N, 5, 4] y) <float[6, 4] w> { y = MatMul(x, w) }",
    "MatMul from the left": "(float[N, 6, 5] x) => (float[N, 4, 5] y) <float[4, 6] w> { y = MatMul(w, x) }",
    "Conv": """(float[N, 4, 6, 6] x) => (float[N, 6, 3, 3] y) <float[6, 2, 3, 3] w>
        { y = Conv<group = 2, pads = [1, 1, 1, 1], strides = [2, 2]>(x, w) }""",
    "depthwise": """(float[N, 4, 6, 6] x) => (float[N, 4, 2, 2] y) <float[4, 1, 3, 3] w>
        { y = Conv<group = 4, strides = [2, 2]>(x, w) }""",
}


SAMPLES = 40


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return load(build(LAYERS[request.param]), tmp_path)


def inputs(model: Model) -> dict[str, np.ndarray]:
    """Inputs that vary ten times more along one direction than along the others."""
    rng = np.random.default_rng(0)
    (port,) = model.inputs
    own = model.shapes[port.name][1:]
    common = rng.normal(size=(SAMPLES, *(1 for _ in own)))
    return {port.name: (rng.normal(size=(SAMPLES, *own)) + 10 * common).astype(np.float32)}


def found(model: Model) -> coordinates.Coordinates:
    """Coordinates of the only weight, from all rows of all samples."""
    by_name = coordinates.find(
        model,
        ["w"],
        dataset.load(inputs(model), model),
        batch=SAMPLES // 4,
        device="cpu",
        runtime_device="cpu",
        seed=0,
    )
    return by_name["w"]


def drawn(place: coordinates.Coordinates) -> torch.Tensor:
    return torch.randn(place.places.shape, generator=torch.Generator().manual_seed(0))


def test_coordinates_of_a_change_are_found_again(layer: Model) -> None:
    place = found(layer)
    wanted = drawn(place)
    change = place.change(wanted, torch.zeros(layer.shapes["w"]))
    assert change.shape == layer.shapes["w"]
    assert torch.allclose(place.coordinates(change), wanted, atol=1e-4)


def test_gradient_predicts_the_effect_of_a_change(layer: Model) -> None:
    """Products with a gradient are the same for a change and for its coordinates."""
    place = found(layer)
    step = drawn(place)
    gradient = torch.randn(layer.shapes["w"], generator=torch.Generator().manual_seed(1))
    of_weight = (gradient * place.change(step, gradient)).sum()
    assert torch.allclose((place.gradient(gradient) * step).sum(), of_weight, rtol=1e-4)


def test_steps_of_one_size_change_outputs_by_one_amount(
    layer: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one output, in any direction of its coordinates."""
    monkeypatch.setattr(coordinates, "DAMPING", 1e-6)
    place = found(layer)
    fed = {name: torch.from_numpy(value) for name, value in inputs(layer).items()}
    ours = engine.Engine(layer, ["y"], weights=["w"])
    weight = ours.weights["w"]
    columns = place.places.shape[2]
    effects = []
    with torch.no_grad():
        for column in range(columns):
            step = torch.zeros(place.places.shape)
            step[0, 0, column] = 1
            weight.copy_(place.change(step, weight))
            effects.append(float(ours.run(fed)[0].square().sum()))
    assert max(effects) < 1.01 * min(effects)


def test_weight_of_two_layers_has_the_coordinates_of_both_inputs(tmp_path: Path) -> None:
    text = """(float[N, 6] x) => (float[N, 6] y) <float[6, 6] w> {
        a = MatMul(x, w)
        r = Relu(a)
        y = MatMul(r, w)
    }"""
    model = load(build(text), tmp_path)
    first = load(build(text.replace("MatMul(r, w)", "Identity(r)")), tmp_path)
    assert not torch.allclose(found(model).root, found(first).root)


@pytest.mark.parametrize(
    "text",
    [
        "{ t = Transpose(w)  y = MatMul(x, t) }",
        "{ a = MatMul(x, w)  y = Gemm<transB = 1>(a, w) }",
    ],
    ids=["behind a view", "in two forms"],
)
def test_weight_that_is_no_single_matrix_has_none(text: str, tmp_path: Path) -> None:
    model = load(build(f"(float[N, 6] x) => (float[N, 6] y) <float[6, 6] w> {text}"), tmp_path)
    samples = dataset.load(inputs(model), model)
    options = {"batch": 10, "device": "cpu", "runtime_device": "cpu", "seed": 0}
    assert not coordinates.find(model, ["w"], samples, **options)


def test_layer_without_inputs_keeps_the_elements_of_its_weight() -> None:
    root = coordinates._inverse_root(np.zeros((1, 3, 3)))
    assert np.allclose(root, np.eye(3) / np.sqrt(coordinates.DAMPING))
