"""A pass for Olive (microsoft/Olive, ``olive-ai``), which makes pruning one step of its workflows.

Olive finds passes by name in a package configuration. ``python -m onnx_oamip.integrations.olive > passes.json`` writes
the one that ships with Olive and this pass, for ``olive run --config workflow.json --package-config passes.json``. From
Python it is ``olive.workflows.run(workflow, package_config=package_config())``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from onnx_oamip.api import pipeline
from onnx_oamip.core.budgets import KINDS
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import Array
from onnx_oamip.core.settings import Settings
from onnx_oamip.reporting import documents

try:
    from olive.common.config_utils import validate_config
    from olive.data.config import DataConfig
    from olive.model import ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.onnx.common import get_external_data_config, model_proto_to_olive_model
    from olive.passes.pass_config import PassConfigParam
    from olive.search.search_parameter import Categorical
except ImportError as missing:
    raise ImportError(
        f"the pass for Olive needs the packages of the extra 'olive' ({missing}); install them with "
        "pip install 'onnx-oamip[olive]'."
    ) from missing

SEARCHED_BUDGETS = tuple(kind.name for kind in KINDS if kind.name != "threshold")
"""Budgets for which a search of Olive accepts lists of values."""
SETTINGS = {name: field for name, field in Settings.model_fields.items() if name != "device"}
"""Options of the pass. The device is chosen by Olive: its accelerator."""

SUMMARY = ("before", "after", "verification", "recovery", "notes")
"""Entries of the report that the attributes of the pruned model hold; there is none of a recovery without one."""


class OnnxOamip(Pass):  # type: ignore[misc]
    """Prunes an ONNX model to a budget, refits it and verifies the result.

    Options are the settings of ``onnx-oamip prune``, and samples: ``data`` as on the command line, or ``data_config``,
    the name of one of Olive's; likewise ``eval_data`` and ``eval_data_config``.
    """

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: Any) -> bool:  # noqa: ARG004
        """Report that the pass depends on the accelerator.

        Args:
            accelerator_spec: Not used.

        Returns:
            False: latency, and the widths that reduce it, are measured on the accelerator.
        """
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:  # noqa: ARG003
        options = {
            name: PassConfigParam(
                type_=field.annotation,
                default_value=field.get_default(),
                # Olive takes lists of values only for options that have something to search.
                search_defaults=Categorical([None]) if name in SEARCHED_BUDGETS else None,
                description=f"As `{name}` of onnx_oamip.Settings.",
            )
            for name, field in SETTINGS.items()
        }
        for name, use in (("data", "calibrate with"), ("eval_data", "measure on")):
            options[name] = PassConfigParam(
                type_=str, description=f"Samples to {use}, as for onnx-oamip prune."
            )
            options[f"{name}_config"] = PassConfigParam(
                type_=DataConfig | dict,
                description=f"Samples to {use}: batches by input name, with or without labels.",
            )
        return {**options, **get_external_data_config()}

    @classmethod
    def _validators(cls) -> dict[str, Callable[..., Any]]:
        return {}

    def _run_for_config(
        self,
        model: Any,
        config: Any,
        output_model_path: str,
    ) -> Any:
        if not isinstance(model, ONNXModelHandler):
            raise SettingsError(
                f"OnnxOamip prunes ONNX models, not {type(model).__name__}; convert the model first."
            )
        provider = self.accelerator_spec.execution_provider
        if provider == "CUDAExecutionProvider":
            device = "cuda"
        else:
            device = "cpu"
        options = {name: getattr(config, name) for name in SETTINGS}
        settings = Settings.create(**options, device=device)
        output = Path(resolve_onnx_path(output_model_path))
        output.parent.mkdir(parents=True, exist_ok=True)
        report = pipeline.prune(
            model.model_path,
            _source(config, "data"),
            output,
            settings,
            _source(config, "eval_data"),
        )
        document = documents.document(report)
        pruned = model_proto_to_olive_model(onnx.load(output), output, config)
        summary = {name: document[name] for name in SUMMARY if document[name] is not None}
        pruned.model_attributes = {**(model.model_attributes or {}), "onnx_oamip": summary}
        return pruned


def package_config() -> dict[str, Any]:
    """Build the package configuration for Olive.

    Returns:
        The configuration that ships with Olive, with this pass added.
    """
    default = Path(OlivePackageConfig.get_default_config_path())
    content: dict[str, Any] = json.loads(default.read_text(encoding="utf-8"))
    content["passes"][OnnxOamip.__name__] = {
        "module_path": f"onnx_oamip.integrations.olive.{OnnxOamip.__name__}",
        "supported_providers": ["CPUExecutionProvider", "CUDAExecutionProvider"],
        "supported_accelerators": ["cpu", "gpu"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
        "dataset": "dataset_optional",
        "module_dependencies": ["onnx-oamip"],
    }
    return content


class _Batch(NamedTuple):
    """One batch of an Olive data set: arrays by input name, and labels if it yields any."""

    inputs: Any
    labels: Any


def _source(config: Any, name: str) -> str | Mapping[str, Array] | None:
    """Data of the pass: a path, or all batches of an Olive data set as arrays by input name, with ``labels``."""
    data_config = getattr(config, f"{name}_config")
    path = getattr(config, name)
    if data_config is None:
        return None if path is None else str(path)
    if path is not None:
        raise SettingsError(f"{name} and {name}_config are both given; leave out one of them.")
    batches = _batches(data_config)
    if not batches or not all(isinstance(batch.inputs, Mapping) for batch in batches):
        raise DataError(
            f"{name}_config yields no batches by input name; its data set must give dicts of arrays."
        )
    arrays = {}
    try:
        for key in batches[0].inputs:
            arrays[key] = np.concatenate([_array(batch.inputs[key]) for batch in batches])
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{name}_config yields batches of unequal names or shapes ({error}); make them equal."
        ) from error
    return {**_labels([batch.labels for batch in batches]), **arrays}


def _batches(data_config: Any) -> list[_Batch]:
    loader = validate_config(data_config, DataConfig).to_data_container().create_dataloader()
    batches = []
    for batch in loader:
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            batches.append(_Batch(*batch))
        else:
            batches.append(_Batch(batch, None))
    return batches


def _labels(batches: list[Any]) -> dict[str, Array]:
    """Classes, if there are any: Olive's own data sets label every sample 0 if they know none."""
    parts = [np.atleast_1d(_array(part)) for part in batches if part is not None]
    if not parts or any(part.ndim != 1 or part.dtype.kind not in "iu" for part in parts):
        return {}
    labels = np.concatenate(parts)
    if len(np.unique(labels)) > 1:
        return {"labels": labels}
    return {}


def _array(value: Any) -> Array:
    """A numpy array of a tensor of PyTorch or of anything that numpy accepts."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=2))  # noqa: T201
