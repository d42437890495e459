"""More unlabelled images from few photographs: stamps of objects, composed on crops of the calibration photographs.

    apt-get download tuxpaint-stamps-default
    dpkg -x tuxpaint-stamps-default*.deb STAMPS
    python -m tools.composed_images --stamps STAMPS --photographs DIR [--count N] --out FILE.npz

``DIR`` is the folder of ``tools/photographs.py``. The stamps of Tux Paint are cut-out photographs and drawings of
animals, food, clothes, tools and vehicles. Crops of the photographs that are held out for evaluation are not used. The
file has the format of the other data of the larger networks. Needs Pillow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from . import photographs

LEFT_OUT = {"symbols", "seasonal", "naturalforces"}
"""Folders of stamps that show no single object."""
LEAST = 100
"""Pixels of the shorter side of a stamp."""
COUNT = 1024
SEED = 0
CROPS_SEED = 5
BLURRED = 0.3
"""Share of the backgrounds of which only the colours are left."""


def stamps(folder: Path) -> list[Path]:
    """Files of stamps in an unpacked package, in a fixed order."""
    found = []
    for file in sorted(folder.glob("**/stamps/**/*.png")):
        kind = file.parts[max(i for i, part in enumerate(file.parts) if part == "stamps") + 1]
        if kind in LEFT_OUT:
            continue
        with Image.open(file) as image:
            if min(image.size) >= LEAST:
                found.append(file)
    return found


def compose(
    files: Sequence[Path], backgrounds: photographs.Pixels, seed: int = SEED
) -> photographs.Pixels:
    """One image per background, uint8 [count, 3, side, side]: a stamp in any place, half to all of the image wide."""
    rng = np.random.default_rng(seed)
    count, _, side, _ = backgrounds.shape
    result = np.empty_like(backgrounds)
    for place in range(count):
        stamp = Image.open(files[place % len(files)]).convert("RGBA")
        stamp = stamp.crop(stamp.getbbox())
        scale = side * rng.uniform(0.5, 1.0) / max(stamp.size)
        size = [max(1, round(length * scale)) for length in stamp.size]
        stamp = stamp.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = backgrounds[rng.integers(count)].transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if rng.random() < BLURRED:
            image = image.resize((6, 6)).resize((side, side), Image.Resampling.BICUBIC)
        left, top = (int(rng.integers(-10, max(side - length + 10, -9))) for length in stamp.size)
        image.paste(stamp, (left, top), stamp)
        result[place] = np.asarray(image).transpose(2, 0, 1)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    from .make_larger_models import CODES  # imports torch

    parser = argparse.ArgumentParser(prog="tools.composed_images", description=__doc__)
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help="number of images")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    seen, _ = photographs.split(photographs.find(given.photographs))
    files = stamps(given.stamps)
    if not files or not seen:
        raise SystemExit(
            f"{len(files)} stamps in {given.stamps} and {len(seen)} photographs in {given.photographs}; both need some."
        )
    images = compose(files, photographs.crops(seen, given.count, CROPS_SEED))
    np.savez(given.out, input=images, **CODES)
    print(
        f"{len(images)} images of {len(files)} stamps on crops of {len(seen)} photographs in {given.out}"
    )


if __name__ == "__main__":
    main()
