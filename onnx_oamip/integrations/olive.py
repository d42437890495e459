"""A pass for Olive (microsoft/Olive, ``olive-ai``), so that pruning is one step of its workflows.

Olive finds passes by name in a package configuration. ``python -m onnx_oamip.integrations.olive > passes.json`` writes
the one that ships with Olive and this pass, for ``olive run --config workflow.json --package-config passes.json``. From
Python it is ``olive.workflows.run(workflow, package_config=package_config())``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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

SEARCHED = tuple(kind.name for kind in KINDS if kind.name != "threshold")
"""Budgets that a search of Olive may be given lists of values for."""
SETTINGS = {name: field for name, field in Settings.model_fields.items() if name != "device"}
"""The device is Olive's to choose: its accelerator."""


class OnnxOamip(Pass):  # type: ignore[misc]
    """Removes channels and neurons of an ONNX model to a budget, refits the rest and checks the result.

    Options are the settings of ``onnx-oamip prune``, and samples: ``data`` as on the command line, or ``data_config``,
    the name of one of Olive's; likewise ``eval_data`` and ``eval_data_config``.
    """

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: Any) -> bool:  # noqa: ARG004
        """Latency, and the widths that pay, are measured on the accelerator."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:  # noqa: ARG003
        options = {
            name: PassConfigParam(
                type_=field.annotation,
                default_value=field.get_default(),
                # Olive takes lists of values only for options that have something to search.
                search_defaults=Categorical([None]) if name in SEARCHED else None,
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

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        if not isinstance(model, ONNXModelHandler):
            raise SettingsError(
                f"OnnxOamip prunes ONNX models, not {type(model).__name__}; convert the model first."
            )
        device = (
            "cuda" if self.accelerator_spec.execution_provider == "CUDAExecutionProvider" else "cpu"
        )
        settings = Settings.create(
            **{name: getattr(config, name) for name in SETTINGS}, device=device
        )
        output = Path(resolve_onnx_path(output_model_path))
        output.parent.mkdir(parents=True, exist_ok=True)
        found = pipeline.prune(
            model.model_path,
            _source(config, "data"),
            output,
            settings,
            _source(config, "eval_data"),
        )
        document = documents.document(found)
        pruned = model_proto_to_olive_model(onnx.load(output), output, config)
        kept = {name: document[name] for name in ("before", "after", "verification", "notes")}
        pruned.model_attributes = {**(model.model_attributes or {}), "onnx_oamip": kept}
        return pruned


def package_config() -> dict[str, Any]:
    """Olive's package configuration with this pass in it."""
    content: dict[str, Any] = json.loads(
        Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8")
    )
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


def _source(config: Any, name: str) -> str | Mapping[str, Array] | None:
    """A path as it is, or all batches of one of Olive's data sets as arrays by input name, with ``labels``."""
    given, path = getattr(config, f"{name}_config"), getattr(config, name)
    if given is None:
        return None if path is None else str(path)
    if path is not None:
        raise SettingsError(f"{name} and {name}_config are both given; leave out one of them.")
    batches = list(validate_config(given, DataConfig).to_data_container().create_dataloader())
    pairs = [b if isinstance(b, (tuple, list)) and len(b) == 2 else (b, None) for b in batches]
    if not pairs or not all(isinstance(inputs, Mapping) for inputs, _ in pairs):
        raise DataError(
            f"{name}_config yields no batches by input name; its data set must give dicts of arrays."
        )
    try:
        found = {
            key: np.concatenate([_array(inputs[key]) for inputs, _ in pairs]) for key in pairs[0][0]
        }
    except (KeyError, ValueError) as error:
        message = (
            f"{name}_config yields batches of unequal names or shapes ({error}); make them equal."
        )
        raise DataError(message) from error
    return {**_labels([labels for _, labels in pairs]), **found}


def _labels(batches: list[Any]) -> dict[str, Array]:
    """Classes, where there are any: Olive's own data sets give every sample the label 0 where they know none."""
    parts = [np.atleast_1d(_array(part)) for part in batches if part is not None]
    if not parts or any(p.ndim != 1 or p.dtype.kind not in "iu" for p in parts):
        return {}
    labels = np.concatenate(parts)
    return {"labels": labels} if len(np.unique(labels)) > 1 else {}


def _array(value: Any) -> Array:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=2))  # noqa: T201
