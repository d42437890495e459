"""Keep-maps, and state dicts cut by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS, ROOT
from graphs import build
from safetensors.numpy import load_file, save_file

from onnx_oamip import apply, plan, prune
from onnx_oamip.api import proof
from onnx_oamip.artifacts import keep_maps
from onnx_oamip.cli import main
from onnx_oamip.core.errors import DataError, OutputError, SettingsError
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.verification.latency import Ratio

QUICK = {"importance": "l2", "allocate": "uniform", "refit": "none", "align": 1, "device": "cpu"}


def asked(**values: object) -> Settings:
    return Settings.create(**{**QUICK, "macs": 0.5, **values})


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned ResNet-20, its keep-map, and the weights it was exported from."""
    folder = tmp_path_factory.mktemp("resnet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
        prune(
            MODELS / "resnet20-fashion.onnx",
            None,
            folder / "out.onnx",
            asked(),
            keep_map=folder / "k.safetensors",
        )
    model = models.load(MODELS / "resnet20-fashion.onnx")
    save_file(
        {n: np.asarray(v) for n, v in model.constants.items() if v.dtype == np.float32},
        folder / "s.safetensors",
    )
    return folder


def test_keep_map_cuts_weights_to_those_of_the_pruned_model(resnet: Path) -> None:
    found = keep_maps.cut(
        resnet / "k.safetensors", resnet / "s.safetensors", resnet / "t.safetensors"
    )
    assert found.unmatched == ()
    cut = load_file(resnet / "t.safetensors")
    pruned = models.load(resnet / "out.onnx").constants
    assert sum(t.before != t.after for t in found.tensors) > 60
    for name, value in cut.items():
        np.testing.assert_array_equal(value, pruned[name], err_msg=name)


def test_keep_map_lists_indices_by_tensor_and_axis(resnet: Path) -> None:
    arrays = load_file(resnet / "k.safetensors")
    original, pruned = (
        models.load(p).constants for p in (MODELS / "resnet20-fashion.onnx", resnet / "out.onnx")
    )
    assert {"blocks.0.conv1.weight:0", "blocks.0.bn1.running_var:0", "fc.weight:1"} <= set(arrays)
    for key, index in arrays.items():
        name, _, axis = key.rpartition(":")
        assert index.dtype == np.int64
        assert len(index) == pruned[name].shape[int(axis)] < original[name].shape[int(axis)]


def test_renamed_and_transposed_weights_are_found_by_content(resnet: Path) -> None:
    state = load_file(resnet / "s.safetensors")
    turned = {
        f"model.{n}": np.ascontiguousarray(v.T) if n == "fc.weight" else v for n, v in state.items()
    }
    save_file({**turned, "step": np.zeros(3)}, resnet / "u.safetensors", metadata={"format": "pt"})
    found = keep_maps.cut(
        resnet / "k.safetensors", resnet / "u.safetensors", resnet / "v.safetensors"
    )
    assert found.unmatched == ()
    cut, pruned = load_file(resnet / "v.safetensors"), models.load(resnet / "out.onnx").constants
    np.testing.assert_array_equal(cut["model.fc.weight"], pruned["fc.weight"].T)
    np.testing.assert_array_equal(cut["model.conv1.weight"], pruned["conv1.weight"])
    assert cut["step"].shape == (3,)
    assert next(t for t in found.tensors if t.name == "step").weight is None


def test_apply_writes_the_same_keep_map(tmp_path: Path) -> None:
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <float[6,60] a, float[60,3] b> {"
        " h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    )
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    prune(
        tmp_path / "m.onnx", None, tmp_path / "a.onnx", asked(), keep_map=tmp_path / "a.safetensors"
    )
    plan(tmp_path / "m.onnx", None, tmp_path / "p.json", asked())
    apply(
        tmp_path / "m.onnx",
        tmp_path / "p.json",
        None,
        tmp_path / "b.onnx",
        keep_map=tmp_path / "b.safetensors",
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(OutputError, match="would overwrite"):
        prune(tmp_path / "m.onnx", None, tmp_path / "c.onnx", asked(), keep_map=tmp_path / "m.onnx")


def test_keep_map_of_unrelated_files_is_refused(
    resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep, state = resnet / "k.safetensors", resnet / "s.safetensors"

    def refused(rule: str, keep_map: Path = keep, weights: Path = state) -> None:
        with pytest.raises(DataError, match=rule):
            keep_maps.cut(keep_map, weights, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    refused("no such file", keep_map=tmp_path / "none")
    refused("no keep-map of this version", keep_map=state)
    (tmp_path / "bad").write_bytes(b"nonsense")
    refused("cannot be read as safetensors", weights=tmp_path / "bad")
    save_file({"other": np.ones(3)}, tmp_path / "other")
    refused("has none of the", weights=tmp_path / "other")
    save_file({"conv1.weight": np.ones((7, 1, 3, 3), np.float32)}, tmp_path / "shape")
    save_file({"bias": np.ones(4, np.float32)}, tmp_path / "twice")
    refused(
        "the same numbers as", keep_map=_map_of_equal_biases(tmp_path), weights=tmp_path / "twice"
    )
    refused(r"'conv1.weight' has shape \(7, 1, 3, 3\)", weights=tmp_path / "shape")
    about = {"conv1.weight": {"shape": [16, 1, 3, 3], "digests": ["", ""]}}
    metadata = {
        "onnx_oamip": json.dumps({"kind": "keep-map", "schema_version": 1, "weights": about})
    }
    for index in (np.asarray([3, 3]), np.asarray([99]), np.asarray([-1, 2]), np.asarray([0.5])):
        save_file({"conv1.weight:0": index}, tmp_path / "map", metadata=metadata)
        refused("damaged keep-map", keep_map=tmp_path / "map")
    assert (
        main(["checkpoint", "--keep-map", str(keep), "--state-dict", str(state), "-o", str(state)])
        == 2
    )
    assert "--state-dict itself" in capsys.readouterr().err


def _map_of_equal_biases(folder: Path) -> Path:
    """Keep-map of a network that stores the same numbers in two initialisers."""
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <float[6,4] a, float[4] p = {1, 1, 1, 1}, float[4,4] b,"
        " float[4] q = {1, 1, 1, 1}, float[4,3] c> {"
        " h = Gemm(x, a, p) r = Relu(h) i = Gemm(r, b, q) s = Relu(i) y = MatMul(s, c) }"
    )
    (folder / "equal.onnx").write_bytes(proto.SerializeToString())
    model = models.load(folder / "equal.onnx")
    coupling = couple(model)
    keep = np.arange(coupling.n_units) % 2 == 0
    keep_maps.save_keep_map(folder / "equal", model, coupling, keep)
    assert {"p:0", "q:0"} <= set(load_file(folder / "equal"))
    return folder / "equal"


def test_weight_that_the_file_stores_once_is_cut_under_both_its_names(
    resnet: Path, tmp_path: Path
) -> None:
    """The file has an Identity of a bias in place of an equal one, and the state dict has both."""
    name, other = "blocks.3.bn2.bias", "blocks.3.shortcut.1.bias"
    state = load_file(resnet / "s.safetensors")
    save_file({**state, other: state[name]}, tmp_path / "both")
    found = keep_maps.cut(resnet / "k.safetensors", tmp_path / "both", tmp_path / "cut")
    assert {t.name: t.weight for t in found.tensors}[other] == name
    cut = load_file(tmp_path / "cut")
    np.testing.assert_array_equal(cut[other], models.load(resnet / "out.onnx").constants[name])
    assert len(cut[other]) < len(state[name])


def test_checkpoint_command_lists_every_tensor(
    resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.safetensors"
    given = [
        "--keep-map",
        str(resnet / "k.safetensors"),
        "--state-dict",
        str(resnet / "s.safetensors"),
        "-o",
        str(out),
    ]
    assert main(["checkpoint", *given, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    shapes = {t["name"]: t["after"] for t in document["tensors"]}
    assert shapes == {n: list(v.shape) for n, v in load_file(out).items()}
    assert main(["checkpoint", *given]) == 0
    assert "conv1.weight" in capsys.readouterr().out


def test_checkpoint_cut_by_the_keep_map_computes_the_same_in_torch(resnet: Path) -> None:
    """The network of tools/train_models.py with cut weights against the model before refit."""
    torch = pytest.importorskip("torch", reason="needs torch")
    import sys

    from onnxruntime import InferenceSession

    sys.path.insert(0, str(ROOT / "tools"))
    from train_models import ResNet20

    # The exporter stores equal weights once: the biases of both normalisations in front of a sum have equal gradients.
    weights = load_file(resnet / "s.safetensors")
    for block in (3, 6):
        weights[f"blocks.{block}.shortcut.1.bias"] = weights[f"blocks.{block}.bn2.bias"]
    save_file(weights, resnet / "all.safetensors")
    keep_maps.cut(resnet / "k.safetensors", resnet / "all.safetensors", resnet / "t.safetensors")
    network = ResNet20().eval()
    assert not set(dict(network.named_parameters())) - set(weights)
    for name, value in load_file(resnet / "t.safetensors").items():
        module = network.get_submodule(name.rpartition(".")[0])
        tensor = torch.from_numpy(value.copy())
        leaf = name.rpartition(".")[2]
        setattr(
            module,
            leaf,
            torch.nn.Parameter(tensor) if leaf in dict(module.named_parameters()) else tensor,
        )
    images = np.random.default_rng(0).normal(size=(16, 1, 28, 28)).astype(np.float32)
    session = InferenceSession(str(resnet / "out.onnx"), providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: images})[0]
    with torch.no_grad():
        found = network(torch.from_numpy(images)).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_keep_map_of_an_unpruned_model_is_empty() -> None:
    model = models.load(MODELS / "lenet300-mnist.onnx")
    coupling = couple(model)
    everything = np.ones(coupling.n_units, bool)
    assert keep_maps.pruned_weights(model, coupling, everything) == {}
    assert rewrite.cut(model, coupling, everything).graph.node


def test_mask_of_decoupled_scores_is_refused_by_the_settings_alone() -> None:
    """Before the units are scored, which may take minutes."""
    keep_maps.check_mask("oamip", "joint", 0.1)
    with pytest.raises(SettingsError, match="of single layers by `mode=decoupled` are others"):
        keep_maps.check_mask("oamip", "decoupled", 0.1)
