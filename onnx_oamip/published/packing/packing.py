"""The public functions ``pack`` and ``unpack``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnx_oamip.artifacts.output import check_output
from onnx_oamip.core.atomic_files import Batch, write_bytes
from onnx_oamip.core.clock import Clock
from onnx_oamip.core.errors import (
    DataError,
    GateFailed,
    ModelError,
    OutputError,
    SettingsError,
)
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Floats, Verification
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import batching
from onnx_oamip.data.dataset import at_data, check_extras
from onnx_oamip.data.feeds import comparison_size
from onnx_oamip.data.sources import Source, samples_of
from onnx_oamip.graph import loading as models
from onnx_oamip.graph import op_libraries
from onnx_oamip.graph.runtime import Session, resolve_device
from onnx_oamip.objective import at_outputs, find_objective, scale
from onnx_oamip.published.packing import (
    allocation,
    codebook,
    coding,
    container,
    layout,
)
from onnx_oamip.published.packing.allocation import Judge
from onnx_oamip.published.packing.coding import Coded
from onnx_oamip.published.packing.container import Contents
from onnx_oamip.published.packing.layout import Files, Place
from onnx_oamip.verification import equivalence

MAX_DROP = 0.5
"""Points that may be lost by default, where samples are given."""


@dataclass(frozen=True)
class Packed:
    """A packed model.

    Attributes:
        path: The model file.
        output: The packed file.
        sha256: Digest of the packed file.
        nbytes: Size of the packed file.
        original: The files of the model.
        contents: The files that ``unpack`` writes.
        verification: The measured loss, or None without evaluation samples.
        seconds: Duration of every stage.
    """

    path: str
    output: str
    sha256: str
    nbytes: int
    original: Files
    contents: Contents
    verification: Verification | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Unpacked:
    """An unpacked model.

    Attributes:
        path: The packed file.
        packed_sha256: Digest of the packed file.
        packed_bytes: Size of the packed file.
        output: The model file that was written.
        contents: The files that were written.
    """

    path: str
    packed_sha256: str
    packed_bytes: int
    output: str
    contents: Contents


def pack(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    lossless: bool = False,
    clusters: int | None = None,
    data: Source | None = None,
    eval_data: Source | None = None,
    max_drop: float | None = None,
    device: str = "auto",
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
    **reading: Any,
) -> Packed:
    """Store a model in fewer bytes; ``unpack`` restores a model file.

    Without ``data`` and ``clusters``, every bit is restored. With ``data``, every weight matrix gets a codebook of
    values that its entries share, chosen such that at most ``max_drop`` points are lost: of accuracy; without labels,
    of agreement; without classes, of relative output error.

    Args:
        path: Model file.
        output: Packed file to write.
        lossless: Refuse any loss; excludes ``clusters``, ``data``, ``eval_data`` and ``max_drop``.
        clusters: Number of values (2 to 256) in every weight matrix. Default with ``data``: chosen for each.
        data: Samples to choose codebooks with.
        eval_data: Samples to measure the loss on. Default: the evaluation part of ``data``.
        max_drop: Largest accepted loss in points. Default: 0.5.
        device: Device to measure on: ``auto``, ``cpu`` or ``cuda``.
        seed: Seed of the codebooks.
        batch_size: Samples per run.
        progress: Called as ``progress(stage, done, total)``.
        **reading: Options for images and tables, as in ``Settings``.

    Returns:
        The packed model.

    Raises:
        OamipError: Bad input or a missing package (``exit_code`` 2), or a loss above ``max_drop`` (1). No file is
            written.
    """
    _check(lossless=lossless, clusters=clusters, data=data, eval_data=eval_data, max_drop=max_drop)
    points = MAX_DROP if max_drop is None else max_drop
    settings = Settings.create(
        max_drop=points,
        device=device,
        seed=seed,
        batch_size=batch_size,
        **reading,
    )
    target = check_output(path, output, (data, eval_data))
    check_extras(data, eval_data)
    exact = clusters is None and data is None
    if not exact:
        codebook.check()
    clock = Clock()
    with clock("load"):
        original = layout.read(path)
        judge = None
        if data is not None:
            judge = _judge(path, original, data=data, eval_data=eval_data, settings=settings)
    sharing = _Sharing({}, {}, None)
    if not exact:
        with clock("codebooks"):
            sharing = _share(
                original,
                judge,
                clusters=clusters,
                settings=settings,
                progress=progress,
            )
    with clock("encode"):
        files = original.substitute(allocation.shared(original, sharing.values))
        contents = Contents(
            files=files,
            codes=_encode_rest(files, sharing, progress),
            original_sha256=original.sha256,
            lossless=files.sha256 == original.sha256,
            settings={
                "lossless": exact,
                "clusters": clusters,
                "max_drop": None if data is None else points,
                "seed": seed,
            },
        )
        packed = container.write(contents)
    with clock("verify"):
        if container.read(packed, str(target)) != contents:
            raise GateFailed(
                f"{path} does not come out of its packed form as it went in; please report this model."
            )
    with clock("write"):
        write_bytes(packed, target)
    return Packed(
        path=str(path),
        output=str(target),
        sha256=hashlib.sha256(packed).hexdigest(),
        nbytes=len(packed),
        original=original,
        contents=contents,
        verification=sharing.verification,
        seconds=clock.seconds,
    )


def unpack(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> Unpacked:
    """Write the model of a packed file, with its external data beside it.

    Args:
        path: Packed file.
        output: Model file to write.

    Returns:
        The unpacked model.

    Raises:
        ModelError: The file is damaged, or of another version. No file is written.
        OutputError: A file beside the model would be overwritten. No file is written.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise ModelError(f"{file}: {what}; give what 'onnx-oamip pack' wrote.")
    target = check_output(file, output)
    try:
        packed = file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    contents = container.read(packed, str(file))
    model_files = contents.files.contents
    sides = {name: _beside(target, name) for name in model_files if name}
    for name, side in sides.items():
        if side.exists() and (side.is_dir() or side.read_bytes() != model_files[name]):
            raise OutputError(
                f"{side} is there already, with something else in it; unpack into another folder."
            )
    with Batch() as batch:
        for name, side in sides.items():
            side.parent.mkdir(parents=True, exist_ok=True)
            batch.add(side, model_files[name])
        batch.add(target, model_files[""])
        batch.commit()
    return Unpacked(
        path=str(file),
        packed_sha256=hashlib.sha256(packed).hexdigest(),
        packed_bytes=len(packed),
        output=str(target),
        contents=contents,
    )


@dataclass(frozen=True)
class _Sharing:
    """Result of weight sharing.

    Attributes:
        values: Values of the codebook by tensor that shares weights.
        codes: Codings of tensors that are kept exact, as far as they are known.
        verification: The measured loss, or None without evaluation samples.
    """

    values: Mapping[Place, Floats]
    codes: Mapping[Place, Coded]
    verification: Verification | None


def _check(
    *,
    lossless: bool,
    clusters: int | None,
    data: Source | None,
    eval_data: Source | None,
    max_drop: float | None,
) -> None:
    """Check for contradictions between the parameters of ``pack``."""
    asked = {
        "`clusters`": clusters,
        "`data`": data,
        "`eval_data`": eval_data,
        "`max_drop`": max_drop,
    }
    for name, value in asked.items():
        if lossless and value is not None:
            raise SettingsError(
                f"`lossless` keeps every bit, which leaves {name} nothing to say; leave one out."
            )
        if name in ("`eval_data`", "`max_drop`") and value is not None and data is None:
            raise DataError(f"{name} is about what is measured on samples; give `data` as well.")
    if clusters is not None and not 2 <= clusters <= coding.CODEBOOK:
        raise SettingsError(f"`clusters` is {clusters}: it should be from 2 to {coding.CODEBOOK}.")


def _judge(
    path: str | os.PathLike[str],
    files: Files,
    *,
    data: Source,
    eval_data: Source | None,
    settings: Settings,
) -> Judge:
    op_libraries.use(settings.op_library)
    device = resolve_device(settings.device)
    model = models.load(path, stated=settings.shapes)
    samples, held_out = samples_of(model, data, eval_data, settings)
    model = at_data(model, samples)
    size = comparison_size(model, settings.batch_size, settings.activation_memory_limit)
    original = Session(path, device, what=str(path))
    samples = batching.tried(original, samples, size)
    held_out = batching.alike(original, samples, held_out)
    assert held_out is not None
    objective = find_objective(model, settings, samples, held_out)
    graph = onnx.load(path, load_external_data=False).graph
    named = {name for node in graph.node for name in node.output}
    objective = at_outputs(model, objective, [t for t in objective.tensors if t not in named])
    objective = scale(model, objective, samples, device, batch_size=size)
    if equivalence.watched(model, objective) != [port.name for port in model.outputs]:
        original = equivalence.watch(model, objective, device, what=str(path))
    return Judge(
        files=files,
        model=model,
        objective=objective,
        original=original,
        calibration=samples,
        held_out=held_out,
        device=device,
        batch_size=size,
    )


def _share(
    files: Files,
    judge: Judge | None,
    *,
    clusters: int | None,
    settings: Settings,
    progress: Progress | None,
) -> _Sharing:
    """Share weights in codebooks of ``clusters`` values, or of sizes that ``judge`` measures."""
    shareable = [place for place in files.places if codebook.shares(place, files.words(place))]
    points = settings.max_drop
    seed = settings.seed
    assert points is not None
    if clusters is not None:
        values = {place: _codebook(files, place, clusters, seed) for place in shareable}
        if judge is None:
            verification = None
        else:
            verification = _accepted(judge, values, points)
        return _Sharing(values, {}, verification)
    assert judge is not None
    codes = _encode(files, shareable, progress)
    exact_bytes = {place: len(code.blob) for place, code in codes.items()}
    choices = allocation.candidates(files, exact_bytes, seed, progress)
    values, measured = allocation.smallest(judge, choices, points, progress)
    return _Sharing(values, codes, measured)


def _encode(
    files: Files,
    places: list[Place],
    progress: Progress | None,
) -> dict[Place, Coded]:
    codes = {}
    for i, place in enumerate(places):
        codes[place] = coding.encode(files.words(place), place.form)
        if progress:
            progress("encode", i + 1, len(places))
    return codes


def _encode_rest(
    files: Files,
    sharing: _Sharing,
    progress: Progress | None,
) -> tuple[Coded, ...]:
    """Codings of all tensors, with those that are known already."""
    codes = {p: code for p, code in sharing.codes.items() if p not in sharing.values}
    missing = [place for place in files.places if place not in codes]
    codes |= _encode(files, missing, progress)
    return tuple(codes[place] for place in files.places)


def _codebook(
    files: Files,
    place: Place,
    clusters: int,
    seed: int,
) -> Floats:
    distribution = codebook.histogram(codebook.numbers(place, files.words(place)))
    itemsize = place.form.dtype.itemsize
    return codebook.cluster(distribution, clusters, itemsize, seed).values


def _accepted(
    judge: Judge,
    values: Mapping[Place, Floats],
    points: float,
) -> Verification:
    """The measured loss of shared weights; raises GateFailed if it is above ``points``."""
    verification = judge.measure(allocation.shared(judge.files, values), judge.held_out)
    lost = judge.lost(verification)
    # Not `lost > points`: a loss that is not a number is not accepted.
    if not lost <= points:
        raise GateFailed(
            f"with this many shared values {lost:.2f} points are lost on {judge.held_out.source}, more than "
            f"`max_drop={points:g}`; nothing was written; give more `clusters`, or leave it out to have it chosen."
        )
    return verification


def _beside(target: Path, name: str) -> Path:
    """Path of a file beside the model; raises OutputError for the model's own path or one outside its folder."""
    side = target.parent / name
    if side.resolve() == target.resolve():
        raise OutputError(f"the model keeps weights in a file called {name}; give -o another name.")
    if not side.resolve().is_relative_to(target.parent.resolve()):
        raise OutputError(
            f"{side} leads out of the folder of {target}; unpack into another folder."
        )
    return side
