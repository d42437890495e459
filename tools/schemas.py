"""Write the JSON schemas of the documents of ``--json``: ``python -m tools.schemas``.

Every command runs on a small network, and its document gives keys and types. Keys of objects whose names belong to the
model, the machine or the run are open. Any value may be null, where it was not measured, and later releases may add
keys.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

from onnx_oamip.artifacts.plan_schema import PlanFile
from onnx_oamip.artifacts.recovered_models import Recovered
from onnx_oamip.cli import main
from onnx_oamip.core.records import Measure, Model, Recovery
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.loading import load
from onnx_oamip.objective import detect
from onnx_oamip.planning.latency_tables import LatencyTable
from onnx_oamip.reporting.documents import recovered as make_recovered

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
OPEN = frozenset(
    {
        "bindings",
        "compared",
        "extras",
        "folded",
        "lengths",
        "options",
        "opset",
        "outputs",
        "system",
        "timings",
        "values",
        "versions",
    }
)
"""Keys whose object has names of its own."""
FREE = frozenset({"settings", "reading", "metric", "connections", "fp16_zip"})
"""Keys whose value has another form under other options: it is not described."""
SENTENCES = frozenset({"failures", "notes", "problems", "warnings"})
"""Keys whose value is a list of texts, of which a run has any number: measured times and sizes decide some of them."""
NULLABLE = ["object", "null"]
MODEL, DATA = "lenet300-mnist.onnx", "mnist.npz"
QUICK = ["--importance", "l2", "--cache", "off", "--device", "cpu"]
COMMANDS = {
    "inspect": [MODEL],
    "prune": [
        *(
            MODEL,
            "--data",
            DATA,
            "--macs",
            "0.5",
            "-o",
            "half.onnx",
            "--keep-map",
            "kept.safetensors",
        ),
        *("--force", *QUICK),
    ],
    "score": [MODEL, "--data", DATA, "-o", "scores.npz", *QUICK],
    "plan": [MODEL, "--data", DATA, "--macs", "0.5", "-o", "plan.json", *QUICK],
    "verify": [MODEL, "half.onnx", "--data", DATA],
    "frontier": [MODEL, "--data", DATA, "--levels", "0.5,0.0001", *QUICK],
    "bench": [MODEL, "half.onnx", "--seconds", "0.1"],
    "profile": [MODEL, "-o", "table.json", "--seconds", "0.1"],
    "pack": [MODEL, "-o", "packed"],
    "unpack": ["packed", "-o", "unpacked.onnx"],
    "int8": ["half.onnx", "--data", DATA, "-o", "int8.onnx"],
    "run": ["run.toml"],
    "compare": ["half.json", "run.json"],
    "checkpoint": ["--keep-map", "kept.safetensors", "--state-dict", "weights.st", "-o", "cut.st"],
    "config": [],
    "ops": [],
    "solvers": [],
    "doctor": [],
}
"""Arguments of every command that prints a document."""
RUN = f"""
model = "{MODEL}"
data = "{DATA}"
importance = "l2"
cache = "off"
device = "cpu"
[prune]
macs = 0.5
force = true
[int8]
[check]
seconds = 0.1
"""
"""File of the command ``run``."""


def documents(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run every command.

    Args:
        folder: Folder with the model and its data, where files are written.

    Yields:
        The command and its document.
    """
    with contextlib.chdir(folder):
        for command, arguments in COMMANDS.items():
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                status = main([command, *arguments, "--json"])
            assert status == 0, command
            document = json.loads(out.getvalue())
            if command in ("prune", "run"):
                name = "half" if command == "prune" else command
                Path(f"{name}.json").write_text(out.getvalue(), encoding="utf-8")
            yield command, document


def recovered(model: Model) -> dict[str, Any]:
    """Document of ``recover`` with made-up numbers: it needs torch, which is not installed everywhere.

    Args:
        model: Original and pruned model.

    Returns:
        The document.
    """
    measure = Measure("y", "y", "classes", "accuracy", 0.5, {"agreement": 0.9}, warnings=("few",))
    found = Recovery(
        accepted=True,
        before=0.2,
        after=0.1,
        steps=10,
        best_step=5,
        batch=8,
        seconds=1.0,
        ended="budget",
        samples=80,
        held_out=20,
        augment="none",
        device="cpu",
        weights=3,
        slowed=0,
        held_bytes=100,
        features=("a",),
        left_out=("b",),
        curve=((5, 0.1),),
        outputs_before=(measure,),
        outputs=(measure,),
    )
    objective = detect(model, None, None, {})
    result = Recovered(
        model, model, model.proto, "o.onnx", "0", found, objective, {"load": 1.0}, {}
    )
    return make_recovered(result)


def schema_of(value: Any, key: str = "") -> dict[str, Any]:
    """Describe a value.

    Args:
        value: Value of a document.
        key: Its key.

    Returns:
        The schema.
    """
    if key in FREE or value is None:
        return {}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, (int, float)):
        return {"type": ["number", "null"]}
    if isinstance(value, str):
        return {"type": ["string", "null"]}
    if isinstance(value, list) and key in SENTENCES:
        return {"type": ["array", "null"], "items": schema_of("")}
    if isinstance(value, list):
        return {"type": ["array", "null"], "items": _merged([schema_of(item) for item in value])}
    if key in OPEN:
        return {"type": ["object", "null"]}
    properties = {name: schema_of(item, name) for name, item in value.items()}
    return {"type": NULLABLE, "properties": properties, "required": sorted(properties)}


def _merged(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema for all items of a list; an item of another form leaves it open."""
    result = next((schema for schema in schemas if schema), {})
    for schema in schemas:
        if not schema or schema == result:
            continue
        if schema.get("type") != result.get("type") or schema.get("type") != NULLABLE:
            return {}
        shared = set(result["properties"]) & set(schema["properties"])
        properties = {
            name: result["properties"][name] or schema["properties"][name] for name in shared
        }
        result = {"type": NULLABLE, "properties": properties, "required": sorted(shared)}
    return result


def schemas() -> dict[str, dict[str, Any]]:
    """Make all schemas.

    Returns:
        Schema by the name of its file.
    """
    result: dict[str, dict[str, Any]] = {
        "plan-file": PlanFile.model_json_schema(),
        "latency-table": LatencyTable.model_json_schema(),
        "settings": Settings.schema_document(),
    }
    whole = np.load(ROOT / "models" / DATA)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / MODEL).write_bytes((ROOT / "models" / MODEL).read_bytes())
        (folder / "run.toml").write_text(RUN, encoding="utf-8")
        np.savez(folder / DATA, **{k: whole[k][:64] if whole[k].ndim else whole[k] for k in whole})
        weights = onnx.load(folder / MODEL).graph.initializer
        save_file({w.name: numpy_helper.to_array(w) for w in weights}, folder / "weights.st")
        for command, document in documents(folder):
            result[command] = schema_of(document)
        result["recover"] = schema_of(recovered(load(folder / MODEL)))
    result["prune"]["properties"]["recovery"] = result["recover"]["properties"]["recovery"]
    result["apply"] = result["prune"]
    result["error"] = schema_of({"schema_version": 1, "error": "", "hint": "", "status": 2})
    titles = {name: {"$schema": DIALECT, "title": f"onnx-oamip {name}"} for name in result}
    return {name: {**titles[name], **schema} for name, schema in result.items()}


def write() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        text = json.dumps(schema, indent=1, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["ONNX_OAMIP_CACHE"] = "off"
    write()
