"""Runs logged to MLflow: what was asked, what came of it, and the files.

Experiment, credentials and the rest are MLflow's own environment variables (``MLFLOW_EXPERIMENT_NAME``,
``MLFLOW_TRACKING_TOKEN``; ``MLFLOW_RUN_ID`` names a run to log to in place of a new one).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from onnx_oamip.core.errors import OutputError
from onnx_oamip.core.extras import imports_of
from onnx_oamip.graph.loading import external_paths

Document: TypeAlias = Mapping[str, Any]
Log: TypeAlias = Callable[[Document, Iterable[Path | None]], None]
"""Takes the document of a run and files beside the model to keep with it; None stands for a file not asked for."""

MEASURED = (
    "masked_equivalence",
    "output_relative_error",
    "agreement",
    "accuracy_before",
    "accuracy_after",
    "latency_ratio",
    "samples",
)
LONGEST = 6000
"""Characters of a parameter's value that every MLflow server takes."""


@contextmanager
def run(uri: str | None, asked: Mapping[str, Any]) -> Iterator[Log]:
    """An MLflow run around some work, which calls what this yields with its document.

    ``uri``: where MLflow keeps runs, empty for what MLflow is set to, None for no run at all. ``asked``: parameters,
    logged at once; the document adds those that it alone knows. Work that fails leaves a run marked FAILED (KILLED
    where it was interrupted) with the tag ``error``. Raises EnvironmentMissing without MLflow and OutputError where it
    cannot log there, both before the work; OutputError where it could not log the result.
    """
    if uri is None:
        yield lambda *_: None
        return
    with imports_of("mlflow", "`mlflow`"):
        import mlflow
    given = _parameters(asked)
    with _told(mlflow, "cannot be used; nothing was done"):
        if uri:
            mlflow.set_tracking_uri(uri)
        mlflow.start_run(nested=True)

    def log(document: Document, files: Iterable[Path | None]) -> None:
        written = document["output"]["path"]
        kept = f"; the model itself was written to {written}" if written else ""
        with _told(mlflow, f"did not take the result{kept}"):
            found = _parameters(
                {**document["settings"], "model_sha256": document["model"]["sha256"]}
            )
            mlflow.log_params({name: value for name, value in found.items() if name not in given})
            mlflow.log_metrics(metrics(document))
            mlflow.set_tags(
                {f"version.{name}": value for name, value in document["versions"].items() if value}
            )
            mlflow.log_dict(dict(document), "report.json")
            for path in (*([Path(written), *external_paths(written)] if written else ()), *files):
                if path is not None:
                    mlflow.log_artifact(str(path))

    try:
        with _told(mlflow, "did not take the parameters; nothing was done"):
            mlflow.log_params(given)
        yield log
    except BaseException as error:
        with suppress(Exception):  # what failed first is what the user must see
            mlflow.set_tag("error", str(error) or type(error).__name__)
            mlflow.end_run("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    with _told(mlflow, "took the result, but not the end of the run"):
        mlflow.end_run()


def metrics(document: Document) -> dict[str, float]:
    """Numbers of a document of ``prune`` or ``plan``, without what was not measured.

    ``macs_before``, ``macs_after`` (of a plan ``macs_predicted``) and ``macs_kept``, their ratio; the same for params
    and bytes; what ``verification`` holds, by its names; ``groups`` and ``skipped`` as counts; ``seconds.STAGE``.
    """
    when = "after" if "after" in document else "predicted"
    found: dict[str, float | None] = {}
    for name, old in document["before"].items():
        new = document[when][name]
        found.update(
            {
                f"{name}_before": old,
                f"{name}_{when}": new,
                f"{name}_kept": new / old if old else None,
            }
        )
    checked = document.get("verification", {})
    found.update({name: checked.get(name) for name in MEASURED})
    found.update({name: len(document[name]) for name in ("groups", "skipped")})
    found.update(
        {
            f"seconds.{stage.replace(' ', '_')}": value
            for stage, value in document["timings"].items()
        }
    )
    return {name: float(value) for name, value in found.items() if value is not None}


def _parameters(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as text: words and paths as they are, all else as JSON; what is not set is left out."""
    found = {
        n: str(v) if isinstance(v, (str, Path)) else json.dumps(v)
        for n, v in values.items()
        if v is not None
    }
    return {name: text[:LONGEST] for name, text in found.items()}


@contextmanager
def _told(mlflow: Any, what: str) -> Iterator[None]:
    """Errors of MLflow, and of whatever client its stores use, as one sentence."""
    try:
        yield
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if "MLFLOW_ALLOW_FILE_STORE" in str(error):
            why = "it keeps runs in folders only where MLFLOW_ALLOW_FILE_STORE=true is set, and otherwise in a database"
            why = f"{why} such as sqlite:///mlflow.db"
        text = f"MLflow at {mlflow.get_tracking_uri()} {what}: {why}."
        raise OutputError(
            re.sub(r"//[^/@\s]*@", "//", text)
        ) from error  # a URI may hold a password
