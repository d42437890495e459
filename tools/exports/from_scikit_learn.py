"""scikit-learn: a scaler and an MLPClassifier by skl2onnx, in single and in double precision.

Both give a label and probabilities. ``zipmap=False`` makes the probabilities a tensor; by default skl2onnx writes them
as a sequence of dictionaries, which is no tensor.
"""

from __future__ import annotations

from pathlib import Path

from skl2onnx import to_onnx
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from . import digits

PACKAGES = ("sklearn", "skl2onnx")
TYPES = {"sklearn-float": FloatTensorType, "sklearn-double": DoubleTensorType}
MADE_BY = dict.fromkeys(TYPES, "skl2onnx.to_onnx(zipmap=False)")


def write(folder: Path) -> None:
    """Train one pipeline and export it in both precisions."""
    pipeline = make_pipeline(StandardScaler(), MLPClassifier((48, 32), random_state=0))
    pipeline.fit(*digits.training(folder, 64))
    for name, kind in TYPES.items():
        proto = to_onnx(
            pipeline, initial_types=[("pixels", kind([None, 64]))], options={"zipmap": False}
        )
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
