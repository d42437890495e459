"""The user's own metric: a function of a model's outputs and labels, or of a model file."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from onnx_oamip.core import atomic_files
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.foreign_code import described, foreign_code
from onnx_oamip.core.records import Array
from onnx_oamip.graph import external_data

PATH = "path"
"""Name of the only parameter of a metric that reads a model file."""


@dataclass
class Metric:
    """A function that returns one number, larger for a better model.

    Attributes:
        name: Where it comes from, as ``module:function``.
        function: It is called with the outputs by name (samples along axis 0) and the labels (None without any), or
            with the path of a model file where its only parameter is called ``path``.
        original: Its value of the original model, None before that was measured.
    """

    name: str
    function: Callable[..., Any]
    original: float | None = field(default=None)

    @property
    def reads_model(self) -> bool:
        """True if the function takes the path of a model file."""
        try:
            parameters = list(inspect.signature(self.function).parameters)
        except (TypeError, ValueError):  # callables of other languages
            return False
        return parameters == [PATH]

    def of_outputs(self, outputs: Mapping[str, Array | list[Array]], labels: Array | None) -> float:
        """Evaluate the metric on the outputs of a model.

        Args:
            outputs: Arrays by output name, over all evaluation samples; a list of arrays where their shapes differ.
            labels: Labels of the samples, or None.

        Returns:
            The value.

        Raises:
            DataError: The function failed, or returned no finite number.
        """
        # The function may change its arguments; the labels are read again.
        own_labels = None if labels is None else labels.copy()
        return self._value(dict(outputs), own_labels)

    def of_model(self, proto: onnx.ModelProto) -> float:
        """Evaluate the metric on a model, which is written to a temporary file.

        Args:
            proto: The model.

        Returns:
            The value.

        Raises:
            DataError: The function failed, or returned no finite number.
        """
        with atomic_files.scratch() as folder:
            path = folder / "model.onnx"
            external_data.save(proto, path, f"{path.name}.data")
            return self._value(str(path))

    def _value(self, *arguments: Any) -> float:
        with foreign_code(f"`metric={self.name}`", DataError, "it is to return one number"):
            value = float(self.function(*arguments))
        if not math.isfinite(value):
            raise DataError(f"`metric={self.name}` returned {value}; expected a finite number.")
        return value


def load(source: str) -> Metric:
    """Import a metric by its name.

    Args:
        source: ``module:function``; modules of the working directory are found too.

    Returns:
        The metric.

    Raises:
        SettingsError: There is no such function.
    """
    module_name, separator, function = source.partition(":")
    if not separator or not module_name or not function:
        raise SettingsError(f"`metric={source}`: expected module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), function)
    except (Exception, SystemExit) as error:  # importing runs the user's own code
        raise SettingsError(f"`metric={source}` cannot be imported: {described(error)}.") from error
    if not callable(found):
        raise SettingsError(f"`metric={source}` is {type(found).__name__}, no function.")
    return Metric(source, found)
