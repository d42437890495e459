"""Logging of runs to MLflow: parameters, metrics and files.

Experiment, credentials and the rest are MLflow's own environment variables (``MLFLOW_EXPERIMENT_NAME``,
``MLFLOW_TRACKING_TOKEN``; ``MLFLOW_RUN_ID`` names a run to log to instead of a new one).
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

Document: TypeAlias = Mapping[str, Any]
Log: TypeAlias = Callable[[Document, Iterable[Path | None]], None]
"""Logs the document of a run, and files beside the model; None stands for a file that was not requested."""

VERIFICATION_METRICS = (
    "masked_equivalence",
    "output_relative_error",
    "agreement",
    "accuracy_before",
    "accuracy_after",
    "latency_ratio",
    "samples",
)
RECOVERY_METRICS = ("before", "after", "steps", "accepted")
MAX_PARAMETER_CHARACTERS = 6000
"""Length of a parameter's value that every MLflow server accepts."""


@contextmanager
def run(
    uri: str | None, asked: Mapping[str, Any], words: Callable[[str], str] = str
) -> Iterator[Log]:
    """Run some work inside an MLflow run.

    Work that fails leaves a run marked FAILED (KILLED if it was interrupted) with the tag ``error``.

    Args:
        uri: Tracking URI, empty for the one that MLflow is set to, None for no MLflow run at all.
        asked: Parameters, logged at once. The document adds those that are known only at the end.
        words: Turns the message of a failure into the one that the user sees.

    Yields:
        Function to call with the document of the run.

    Raises:
        EnvironmentMissing: MLflow is not installed.
        OutputError: MLflow cannot log there (before the work), or could not log the result.
    """
    if uri is None:
        yield lambda *_: None
        return
    with imports_of("mlflow", "`mlflow`"):
        import mlflow
    parameters = _parameters(asked)
    with _reported(mlflow, "cannot be used; nothing was done"):
        if uri:
            mlflow.set_tracking_uri(uri)
        mlflow.start_run(nested=True)

    def log(document: Document, files: Iterable[Path | None]) -> None:
        output = document["output"]["path"]
        if output:
            addition = f"; the model itself was written to {output}"
        else:
            addition = ""
        with _reported(mlflow, f"did not take the result{addition}"):
            _log_document(mlflow, document, parameters)
            for path in _written_files(output, files):
                mlflow.log_artifact(str(path))

    try:
        with _reported(mlflow, "did not take the parameters; nothing was done"):
            mlflow.log_params(parameters)
        yield log
    except BaseException as error:
        # The user must see the first failure, not one of marking the run.
        with suppress(Exception):
            mlflow.set_tag("error", words(str(error)) or type(error).__name__)
            mlflow.end_run("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    with _reported(mlflow, "took the result, but not the end of the run"):
        mlflow.end_run()


def _log_document(
    mlflow: Any,
    document: Document,
    logged: Mapping[str, str],
) -> None:
    """Log parameters that were not logged yet, metrics, versions and the document itself."""
    known_at_the_end = {**document["settings"], "model_sha256": document["model"]["sha256"]}
    parameters = _parameters(known_at_the_end)
    mlflow.log_params({name: value for name, value in parameters.items() if name not in logged})
    mlflow.log_metrics(metrics(document))
    versions = document["versions"].items()
    mlflow.set_tags({f"version.{name}": version for name, version in versions if version})
    mlflow.log_dict(dict(document), "report.json")


def _written_files(output: str | None, files: Iterable[Path | None]) -> list[Path]:
    """The model with the weights beside it, and the other files of a run."""
    paths: list[Path] = []
    if output:
        from onnx_oamip.graph.loading import external_paths  # heavy, and not needed without MLflow

        paths += [Path(output), *external_paths(output)]
    paths += [path for path in files if path is not None]
    return paths


def metrics(document: Document) -> dict[str, float]:
    """Collect the numbers of a document.

    Args:
        document: Document of ``prune`` or ``plan``.

    Returns:
        ``macs_before``, ``macs_after`` (``macs_predicted`` of a plan) and their ratio ``macs_kept``; the same for
        params and bytes; the measurements of ``verification`` by their names, and the ends ``latency_ratio_low`` and
        ``latency_ratio_high`` of the interval of its latency; ``recovery_before``, ``recovery_after``
        (held-out losses), ``recovery_steps`` and ``recovery_accepted``; the counts ``groups`` and ``skipped``;
        ``seconds.STAGE``. Numbers that were not measured are left out.
    """
    when = "after" if "after" in document else "predicted"
    numbers: dict[str, float | None] = {}
    for name, before in document["before"].items():
        after = document[when][name]
        numbers[f"{name}_before"] = before
        numbers[f"{name}_{when}"] = after
        numbers[f"{name}_kept"] = after / before if before else None
    verification = document.get("verification", {})
    for name in VERIFICATION_METRICS:
        numbers[name] = verification.get(name)
    if numbers["latency_ratio"] is not None:
        numbers["latency_ratio_low"] = verification["latency"]["low"]
        numbers["latency_ratio_high"] = verification["latency"]["high"]
    recovery = document.get("recovery") or {}
    for name in RECOVERY_METRICS:
        numbers[f"recovery_{name}"] = recovery.get(name)
    for name in ("groups", "skipped"):
        numbers[name] = len(document[name])
    for stage, seconds in document["timings"].items():
        numbers[f"seconds.{stage.replace(' ', '_')}"] = seconds
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _parameters(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as text: words and paths as they are, everything else as JSON. Unset ones are left out."""
    parameters = {}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, (str, Path)):
            text = str(value)
        else:
            text = json.dumps(value)
        parameters[name] = text[:MAX_PARAMETER_CHARACTERS]
    return parameters


@contextmanager
def _reported(mlflow: Any, finding: str) -> Iterator[None]:
    """Report errors of MLflow, and of the clients of its stores, in one sentence."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].rstrip(".")
        if "MLFLOW_ALLOW_FILE_STORE" in str(error):
            reason = (
                "it keeps runs in folders only where MLFLOW_ALLOW_FILE_STORE=true is set, and otherwise in a database "
                "such as sqlite:///mlflow.db"
            )
        text = f"MLflow at {mlflow.get_tracking_uri()} {finding}: {reason}."
        # A URI may hold a password.
        raise OutputError(re.sub(r"//[^/@\s]*@", "//", text)) from error
