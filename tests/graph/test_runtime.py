"""Sessions: what ONNX Runtime fuses and then refuses, and that nothing of a run leaves the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT
from graphs import MLP, RUNTIME, build

from onnx_oamip import prune
from onnx_oamip.api import proof
from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import (
    FUSION,
    UNFUSED,
    Session,
    runtime,
)
from onnx_oamip.reporting.documents import document
from onnx_oamip.verification.latency import Ratio, bench

SPREAD = """(float[N,3,6,6] x) => (float[N,5] y)
<float[8,3,3,3] w1, float[8] b1, float[8] gain, uint8[8] z = {120, 120, 120, 120, 120, 120, 120, 120},
 float[1] so = {0.05}, uint8[1] zo = {110}, float[8,5] w2, float[5] b2> {
    a = Conv(x, w1, b1)  q = QuantizeLinear<axis = 1>(a, gain, z)  d = DequantizeLinear<axis = 1>(q, gain, z)
    g = OPERATOR  p = QuantizeLinear(g, so, zo)  r = DequantizeLinear(p, so, zo)  m = GlobalMaxPool(r)
    e = Flatten(m)  y = Gemm(e, w2, b2)
}"""
"""A scale for every channel of an activation, and an operator that has an integer kernel."""
REFUSED = {
    "GlobalAveragePool(d)": "as it runs",
    "Sigmoid(d)": "as it is loaded",
    "AveragePool<kernel_shape = [2, 2]>(d)": "as it is loaded",
}
RUNS = ["MaxPool<kernel_shape = [2, 2]>(d)"]
if RUNTIME < (1, 32):
    REFUSED["Add(d, d)"] = "as it is loaded"
else:
    RUNS.append("Add(d, d)")  # from 1.32 on, it is fused only where the scales are single numbers
FEED = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}


def spread(operator: str) -> onnx.ModelProto:
    return build(SPREAD.replace("OPERATOR", operator))


@pytest.mark.parametrize("form", ["proto", "path"])
@pytest.mark.parametrize("operator", REFUSED)
def test_model_refused_after_fusion_runs_without_fusion(
    operator: str, form: str, tmp_path: Path
) -> None:
    rt, proto = runtime(), spread(operator)
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    plain = rt.SessionOptions()
    plain.log_severity_level = 4
    plain.graph_optimization_level = rt.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = Session(proto if form == "proto" else tmp_path / "a.onnx", "cpu")
    found = session.run(FEED)
    assert session.unfused
    np.testing.assert_allclose(
        found[0],
        rt.InferenceSession(proto.SerializeToString(), plain).run(None, FEED)[0],
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(Exception, match="cale"):
        rt.InferenceSession(proto.SerializeToString()).run(None, FEED)


@pytest.mark.parametrize("operator", RUNS)
def test_model_that_runs_fused_stays_fused(operator: str) -> None:
    session = Session(spread(operator), "cpu")
    session.run(FEED)
    assert not session.unfused


CODES = ", ".join(str((37 * i) % 255 - 127) for i in range(64))
HALF_CODES = [(5 * i) % 16 - 8 for i in range(64)]
ZEROS = "{3, -5, 0, 7, -1, 2, 9, -8}"
QUANTISED_WEIGHTS = {
    "per axis": "w = DequantizeLinear(c, s)  y = MatMul(x, w)",
    "per axis with zero points": "w = DequantizeLinear(c, s, z)  y = MatMul(x, w)",
    "per row": "w = DequantizeLinear<axis = 0>(c, s, z)  y = MatMul(x, w)",
    "per tensor": "w = DequantizeLinear(c, t)  y = MatMul(x, w)",
    "per tensor with a zero point": "w = DequantizeLinear(c, t, tz)  y = MatMul(x, w)",
    "codes of two nodes": """v = DequantizeLinear(c, s)  w = DequantizeLinear<axis = 0>(c, s)  h = MatMul(x, v)
        y = MatMul(h, w)""",
    "zero points of two nodes": """v = DequantizeLinear(c, s, z)  w = DequantizeLinear(d, s, z)  h = MatMul(x, v)
        y = MatMul(h, w)""",
    "quantised in the graph": """q = QuantizeLinear(f, s, z)  w = DequantizeLinear(q, s, z)
        p = QuantizeLinear(f, t, tz)  v = DequantizeLinear(p, t, tz)  h = MatMul(x, v)  y = MatMul(h, w)""",
    "unsigned": "w = DequantizeLinear(u, s)  y = MatMul(x, w)",
    "of four bits": "w = DequantizeLinear(i, s)  y = MatMul(x, w)",
    "in blocks": "w = DequantizeLinear<axis = 0, block_size = 4>(c, b)  y = MatMul(x, w)",
    "as integers": "k = MatMulInteger(n, c, un, tz)  y = Cast<to = 1>(k)",
    "as integers without zero points": "k = MatMulInteger(n, c)  y = Cast<to = 1>(k)",
    "as integers with codes of two nodes": """k = MatMulInteger(n, c, un, tz)  o = MatMulInteger(n, c, un)
        l = Add(k, o)  y = Cast<to = 1>(l)""",
    "as integers with zero points of two nodes": """k = MatMulInteger(n, c, un, z)  o = MatMulInteger(n, d, un, z)
        l = Add(k, o)  y = Cast<to = 1>(l)""",
    "as integers with a zero point of two inputs": """m = QuantizeLinear(x, t, tz)  k = MatMulInteger(m, c, tz, tz)
        y = Cast<to = 1>(k)""",
    "as integers that are rounded": """k = QLinearMatMul(n, t, un, c, t, tz, g, un)
        o = QLinearMatMul(n, t, un, d, t, tz, g, un)  v = DequantizeLinear(k, g, un)  w = DequantizeLinear(o, g, un)
        y = Add(v, w)""",
    "as integers of which one is dequantised": """k = MatMulInteger(n, c, un, tz)  l = Cast<to = 1>(k)
        w = DequantizeLinear(c, s)  y = MatMul(l, w)""",
}
"""Ways to store a weight as codes, among them those that an optimiser for processors without int8 handles wrongly."""


@pytest.mark.parametrize("way", QUANTISED_WEIGHTS)
def test_exact_session_computes_quantised_weights_as_stored(way: str) -> None:
    proto = build(
        f"""(float[N,8] x) => (float[N,8] y) <int8[8,8] c = {{{CODES}}}, int8[8,8] d = {{{CODES}}}, float[8,8] f,
        uint8[8,8] u = {{{", ".join(str(i) for i in range(64))}}}, int8[8] z = {ZEROS},
        float[8] s = {{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}}, float t = {{0.1}}, int8 tz = {{3}},
        float g = {{2.0}}, uint8 un = {{120}},
        float[2,8] b = {{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1}}>
        {{ n = QuantizeLinear(x, t, un)  {QUANTISED_WEIGHTS[way]} }}""",
        opset=21,
    )
    tensor = onnx.helper.make_tensor("i", onnx.TensorProto.INT4, [8, 8], HALF_CODES)
    proto.graph.initializer.append(tensor)  # the parser packs no codes of four bits
    feed = {"x": np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)}
    rt = runtime()
    plain = rt.SessionOptions()
    plain.graph_optimization_level = rt.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = rt.InferenceSession(proto.SerializeToString(), plain).run(None, feed)[0]
    found = Session(proto, "cpu", exact=True).run(feed)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_error_without_fusion_is_reported_once() -> None:
    session = Session(spread("Relu(d)"), "cpu", what="this model")
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot run this model on this data: .*x"):
        session.run({"x": FEED["x"][:, :2]})
    broken = spread("Relu(d)")
    broken.graph.node[0].op_type = "Nothing"
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot load the model: "):
        Session(broken, "cpu")


@pytest.mark.parametrize("operator", REFUSED)
def test_unfused_model_is_pruned_and_noted_in_the_report(
    operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    (tmp_path / "a.onnx").write_bytes(spread(operator).SerializeToString())
    data = {"x": np.random.default_rng(1).standard_normal((60, 3, 6, 6)).astype(np.float32)}
    report = prune(
        tmp_path / "a.onnx",
        data,
        tmp_path / "b.onnx",
        Settings.create(macs=0.6, align=1, device="cpu"),
    )
    assert document(report)["notes"].count(UNFUSED) == 1
    assert report.verification.masked_equivalence is not None
    assert report.verification.masked_equivalence <= 1e-6
    # It runs as the note says.
    rt = runtime()
    loaded = rt.InferenceSession(str(tmp_path / "b.onnx"), disabled_optimizers=[FUSION])
    np.testing.assert_array_equal(
        loaded.run(None, FEED)[0], Session(tmp_path / "b.onnx", "cpu").run(FEED)[0]
    )
    assert (
        len(
            bench([tmp_path / "a.onnx", tmp_path / "b.onnx"], [FEED], "cpu", rounds=1, memory=False)
        )
        == 2
    )


LISTENER = """
import sys

seen = []
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"}
sys.addaudithook(lambda event, args: seen.append(f"{event} {args[1:2]}") if event in NETWORK else None)
if sys.argv[1] == "ask":
    import socket
    try:
        socket.create_connection(("localhost", 9), timeout=0.1).close()
    except OSError:
        pass
else:
    from onnx_oamip.cli import main
    assert main(sys.argv[2:]) == 0
print(len(seen), *seen)
"""


def listened(home: Path, *arguments: str) -> tuple[str, list[str]]:
    """(what a fresh process asked of the network, files that it left in its home)."""
    reported = {
        "ORT_DISABLE_TELEMETRY",
        "ORT_RUNNING_UNIT_TESTS",
        "CI",
        "TF_BUILD",
        "GITHUB_ACTIONS",
        "XDG_CACHE_HOME",
    }
    env = {k: v for k, v in os.environ.items() if k not in reported}
    env |= {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", LISTENER, *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.splitlines()[-1], sorted(p.name for p in home.rglob("*") if p.is_file())


def test_runtime_prints_nothing_about_a_graph_that_it_cannot_load(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own fallback prints lines, and tries the same providers again, for errors that Python raises."""
    rt = runtime()
    asked: list[int] = []

    class Unreadable(rt.InferenceSession):  # type: ignore[misc, name-defined]
        def _create_inference_session(self, *_: object) -> None:
            asked.append(1)
            raise ValueError("the message is not readable")

    monkeypatch.setattr(rt, "InferenceSession", Unreadable)
    with pytest.raises(ModelError, match="the message is not readable"):
        Session(build(MLP), "cpu")
    assert asked == [1]
    assert capfd.readouterr() == ("", "")


def test_runtime_sends_nothing_over_the_network(tmp_path: Path) -> None:
    """Neither by Python, nor by a runtime that keeps an identifier and reports what it loads."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "a.onnx").write_bytes(spread("Relu(d)").SerializeToString())
    np.savez(
        tmp_path / "data.npz",
        x=np.random.default_rng(1).standard_normal((60, 3, 6, 6)).astype(np.float32),
    )
    files = [
        "--data",
        str(tmp_path / "data.npz"),
        "-o",
        str(tmp_path / "b.onnx"),
        "--report",
        str(tmp_path / "b.html"),
    ]
    asked, left = listened(
        home,
        "prune",
        "prune",
        str(tmp_path / "a.onnx"),
        *files,
        "--macs",
        "0.6",
        "--align",
        "1",
        "-q",
        "--force",
    )
    assert asked == "0"
    assert (tmp_path / "b.html").exists()
    assert not [name for name in left if "deviceid" in name or name.startswith("onnxruntime")], left


def test_network_listener_detects_a_request(tmp_path: Path) -> None:
    assert int(listened(tmp_path, "ask")[0].split()[0]) > 0
