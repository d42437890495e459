"""Augmentation: random changes of samples, by kind of input or by a function of the user; the original labels them.

``images`` (3 channels, or 1 in a square, read by a layer with weights): a random part resized to the whole, mirrored,
with other brightness and contrast, and put together from parts of four unless they are small. ``audio`` (one long
axis): gain, shift and noise. ``tokens`` (whole numbers along one axis, all looked up in the same table): some are
replaced by others of the data, and the end is hidden where an input is a mask. Other inputs, such as tables, are left
as they are.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, overload

import numpy as np

from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.foreign_code import described, foreign_code
from onnx_oamip.core.records import Array, Floats, Model, Node
from onnx_oamip.graph.ops import Trait, consumers_by_tensor, has, lookup
from onnx_oamip.graph.ops.kinds import INDICES, PICKS

Feed: TypeAlias = Mapping[str, Array]
Augment: TypeAlias = Callable[[Feed, np.random.Generator], dict[str, Array]]
InputKind: TypeAlias = Literal["images", "audio", "tokens", "mask", "other"]

LEAST_CROP = 0.35
"""Smallest share of the area of an image that a crop keeps."""
SMALL_SIDE = 96
"""Images with a shorter side show one object that fills them: parts of several look like nothing else, so that only
half of them are changed, and less, each on its own."""
LEAST_CROP_OF_SMALL = 0.8
"""Smallest share of the area of such an image that a crop keeps."""
MIRRORED_ONLY = 0.5
"""Share of the feeds of a training whose large images are only mirrored. A model that is trained on parts of images
alone gets worse on whole ones at first, and recovers from that for hundreds of steps."""
MEETING = (0.3, 0.7)
"""Range of the point, in shares of height and width, at which the parts of four images meet."""
LEAST_SIDE = 8
"""Shortest side of an input that is taken for an image."""
LEAST_WAVE = 1000
"""Fewest positions of an input that is taken for a waveform."""
REPLACED = 0.1
"""Share of tokens that are replaced."""


def kinds(model: Model, feed: Feed) -> dict[str, InputKind]:
    """Find the kind of every input.

    Args:
        model: The model.
        feed: A feed of several samples, if there are several of one shape.

    Returns:
        The kind by name of the input.
    """
    readers = consumers_by_tensor(model)
    return {port.name: _kind(port.name, feed[port.name], readers, model) for port in model.inputs}


def weighted_inputs(model: Model) -> list[str]:
    """List the inputs that a layer with weights reads, such as images.

    Caches of keys and values and masks of attentions have four axes as well, but they only meet other activations.

    Args:
        model: The model.

    Returns:
        Names of inputs that are the data of a layer, through any nodes that multiply nothing.
    """
    readers = consumers_by_tensor(model)
    return [port.name for port in model.inputs if _is_weighted(port.name, readers, model)]


def _is_weighted(name: str, readers: Mapping[str, Sequence[Node]], model: Model) -> bool:
    """Tests for a tensor that is the data of a layer with weights before it is multiplied by anything else."""
    pending = [name]
    seen = {name}
    while pending:
        tensor = pending.pop()
        for node in readers.get(tensor, ()):
            if _is_index(tensor, node):
                continue  # what is looked up does not depend on the size of the numbers
            spec = lookup(node.domain, node.op, node.version)
            if spec is None or spec.cost is None:
                pending += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
            elif node.inputs[0] == tensor and _has_weight(node, model):
                return True
    return False


def _has_weight(node: Node, model: Model) -> bool:
    """Tests for an operand that is a constant of two axes or more."""
    return any(name in model.constants and len(model.shapes[name]) > 1 for name in node.inputs[1:])


def _is_index(tensor: str, node: Node) -> bool:
    """Tests for a tensor whose numbers a node takes for places, in a table or on a new axis."""
    slot = INDICES.get(node.op)
    return slot is not None and tensor in node.inputs[slot : slot + 1]


def _kind(
    name: str, values: Array, readers: Mapping[str, Sequence[Node]], model: Model
) -> InputKind:
    dtype, shape = values.dtype, values.shape
    is_float = dtype.kind == "f"
    if (is_float or dtype == np.uint8) and len(shape) == 4 and _channel_axis(shape) is not None:
        return "images" if _is_weighted(name, readers, model) else "other"
    if is_float and len(shape) in (2, 3) and shape[-1] >= LEAST_WAVE:
        return "audio" if len(shape) == 2 or shape[1] <= 2 else "other"
    if dtype.kind in "iub" and len(shape) == 2 and shape[1] > 1:
        return _kind_of_row(name, values, readers, model)
    return "other"


def _kind_of_row(
    name: str, values: Array, readers: Mapping[str, Sequence[Node]], model: Model
) -> InputKind:
    """Kind of an input that has whole numbers or truth values along one axis (samples, positions)."""
    is_looked_up = _is_looked_up(name, readers, model)
    is_binary = bool(((values == 0) | (values == 1)).all())
    if is_looked_up and not is_binary:
        return "tokens" if _is_sequence(values) else "other"
    is_mask = "mask" in name or (is_binary and not is_looked_up and _is_padding(values))
    return "mask" if is_mask else "other"


def _is_looked_up(name: str, readers: Mapping[str, Sequence[Node]], model: Model) -> bool:
    """Tests for an input whose positions are all looked up in the same table, or tables.

    A table with one vocabulary for each of its columns is taken apart first.
    """
    whole = _tables(name, readers, model, in_parts=False)
    return bool(whole) and _tables(name, readers, model, in_parts=True) == whole


def _tables(
    name: str,
    readers: Mapping[str, Sequence[Node]],
    model: Model,
    *,
    in_parts: bool,
) -> set[str]:
    """Constants in which an input is looked up as a whole, and those for a part of its positions if asked for."""
    tables = set()
    pending = [name]
    seen = {name}
    while pending:
        tensor = pending.pop()
        for node in readers.get(tensor, ()):
            if _is_index(tensor, node):
                if node.inputs[0] in model.constants:
                    tables.add(model.source(node.inputs[0]))
                continue
            is_picked = node.op in PICKS and node.inputs[0] == tensor
            if (is_picked and in_parts) or _treats_alike(node, tensor, seen, model):
                pending += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
    return tables


def _treats_alike(node: Node, tensor: str, followed: Collection[str], model: Model) -> bool:
    """Tests for a node that does the same to all elements of a tensor, which only meets single constants."""
    if has(node, Trait.MOVES):
        return node.inputs[0] == tensor
    return has(node, Trait.ELEMENTWISE) and all(
        not name
        or name in followed
        or (name in model.constants and model.constants[name].size == 1)
        for name in node.inputs
    )


def _is_sequence(ids: Array) -> bool:
    """Tests for values of a vocabulary (samples, positions): they vary, occur at several positions, and do not count.

    Two values are no vocabulary. A single sample does not show whether its values vary.
    """
    distinct = len(np.unique(ids))
    steps = np.diff(ids.astype(np.int64), axis=1)
    is_counting = 2 * np.count_nonzero(steps == 1) > np.count_nonzero(steps)
    if distinct <= 2 or is_counting:
        return False
    if len(ids) == 1:
        return True
    changes = np.diff(np.sort(ids, axis=0), axis=0)
    distinct_by_position = ids.shape[1] + np.count_nonzero(changes)
    return bool(distinct_by_position > max(distinct, ids.shape[1]))


def _is_padding(marks: Array) -> bool:
    """Tests for marks (samples, positions) of the tokens in front of a padding."""
    return bool(marks[:, 0].all() and (marks[:, 1:] <= marks[:, :-1]).all())


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Axis of the channels of an image; None for anything else."""
    for axis, sides in ((1, shape[2:]), (3, shape[1:3])):
        is_large = min(sides) >= LEAST_SIDE
        if is_large and (shape[axis] == 3 or (shape[axis] == 1 and sides[0] == sides[1])):
            return axis
    return None


def _sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Height and width of images."""
    return shape[2:] if _channel_axis(shape) == 1 else shape[1:3]


def pieced(images: Array, rng: np.random.Generator) -> Array:
    """Put every image together from parts of four, which meet at a point near the centre.

    A fit and a training learn more of such images than of blended ones: each part has the contrasts of a photograph.

    Args:
        images: Images (samples, channels, height, width).
        rng: Source of random numbers.

    Returns:
        New images of the same shape. Each of the four parts has every image once.
    """
    count, _, height, width = images.shape
    top, left = (rng.uniform(*MEETING, (count, 1)) * side for side in (height, width))
    is_below = np.arange(height) >= top
    is_right = np.arange(width) >= left
    part = 2 * is_below[:, None, :, None] + is_right[:, None, None, :]
    result = images[rng.permutation(count)]
    for number in range(1, 4):
        np.copyto(result, images[rng.permutation(count)], where=part == number)
    return result


def automatic(found: Mapping[str, InputKind]) -> Augment:
    """Build the changes for inputs of some kinds.

    Args:
        found: Kind by name of the input.

    Returns:
        A function that changes a feed, every input on its own.
    """

    def augment(feed: Feed, rng: np.random.Generator) -> dict[str, Array]:
        changed = dict(feed)
        for name, kind in found.items():
            if kind == "images":
                changed[name] = images(feed[name], rng)
            elif kind == "audio":
                changed[name] = audio(feed[name], rng)
        if any(kind == "tokens" for kind in found.values()):
            _change_tokens(changed, found, rng)
        return changed

    return augment


def images(batch: Array, rng: np.random.Generator) -> Array:
    """Crop, mirror and colour images, and put large ones together from parts of several.

    Args:
        batch: Images (samples, channels, height, width) or (samples, height, width, channels).
        rng: Source of random numbers.

    Returns:
        Changed images of the same shape and type.
    """
    axis = _channel_axis(batch.shape)
    planes = batch if axis == 1 else np.moveaxis(batch, 3, 1)
    low, high = float(planes.min()), float(planes.max())
    is_small = min(planes.shape[2:]) < SMALL_SIDE
    least = LEAST_CROP_OF_SMALL if is_small else LEAST_CROP
    result = planes.astype(np.float32)
    for place in rng.permutation(len(result))[: len(result) // 2 if is_small else None]:
        result[place] = _one_image(result[place], least, rng)
    if not is_small:
        result = pieced(result, rng)
    result = np.clip(result, low, high)
    if batch.dtype.kind != "f":
        result = np.rint(result)
    if axis != 1:
        result = np.moveaxis(result, 1, 3)
    return np.ascontiguousarray(result.astype(batch.dtype))


def mirrored(batch: Array, rng: np.random.Generator) -> Array:
    """Mirror half of the images, left to right.

    Args:
        batch: Images (samples, channels, height, width) or (samples, height, width, channels).
        rng: Source of random numbers.

    Returns:
        Images of the same shape and type.
    """
    width_axis = 3 if _channel_axis(batch.shape) == 1 else 2
    is_mirrored = rng.random(len(batch)) < 0.5
    return np.where(is_mirrored[:, None, None, None], np.flip(batch, width_axis), batch)


def _one_image(image: Array, least: float, rng: np.random.Generator) -> Array:
    """A random part of one image (channels, height, width), resized, mirrored and coloured."""
    height, width = image.shape[1:]
    area = rng.uniform(least, 1.0)
    stretch = np.exp(rng.uniform(-np.log(4 / 3), np.log(4 / 3)) / 2)
    tall = min(np.sqrt(area) * stretch, 1.0) * height
    wide = min(np.sqrt(area) / stretch, 1.0) * width
    top, left = rng.uniform(0, height - tall), rng.uniform(0, width - wide)
    part = _resampled(image, 1, top + (np.arange(height) + 0.5) * tall / height - 0.5)
    part = _resampled(part, 2, left + (np.arange(width) + 0.5) * wide / width - 0.5)
    if rng.random() < 0.5:
        part = part[:, :, ::-1]
    spread = part.std()
    mean = part.mean(axis=(1, 2), keepdims=True)
    contrast = rng.uniform(0.7, 1.3)
    shift = rng.uniform(-0.3, 0.3) * spread + rng.uniform(-0.1, 0.1, mean.shape) * spread
    return np.asarray((part - mean) * contrast + mean + shift, np.float32)


def _resampled(image: Array, axis: int, places: Floats) -> Array:
    """Linear interpolation along one axis."""
    length = image.shape[axis]
    places = places.clip(0, length - 1)
    first = np.floor(places).astype(np.int64)
    second = np.minimum(first + 1, length - 1)
    shape = [1, 1, 1]
    shape[axis] = len(places)
    share = (places - first).astype(np.float32).reshape(shape)
    return np.asarray(image.take(first, axis) * (1 - share) + image.take(second, axis) * share)


def audio(batch: Array, rng: np.random.Generator) -> Array:
    """Change gain, shift waveforms in time and add noise.

    Args:
        batch: Waveforms, time on the last axis.
        rng: Source of random numbers.

    Returns:
        Changed waveforms of the same shape and type.
    """
    result = batch.astype(np.float32)
    for place in range(len(result)):
        wave = np.roll(result[place], int(rng.integers(result.shape[-1])), axis=-1)
        gain = np.exp(rng.uniform(-0.7, 0.7))
        noise = rng.standard_normal(wave.shape) * wave.std() * rng.uniform(0, 0.1)
        result[place] = gain * (wave + noise)
    return result.astype(batch.dtype)


def _change_tokens(
    feed: dict[str, Array], found: Mapping[str, InputKind], rng: np.random.Generator
) -> None:
    """Hide the ends of sequences in masks, and replace tokens that no mask hides, in place."""
    masks = [name for name, kind in found.items() if kind == "mask"]
    for name in masks:
        mask = feed[name].copy()
        for row in mask:
            shown = np.flatnonzero(row)
            used = len(shown)
            if used > 1:
                row[shown[int(rng.integers((used + 1) // 2, used + 1)) :]] = 0
        feed[name] = mask
    for name, kind in found.items():
        if kind != "tokens":
            continue
        ids = feed[name]
        replaced = rng.random(ids.shape) < REPLACED
        for mask_name in masks:
            if feed[mask_name].shape == ids.shape:
                replaced &= feed[mask_name] != 0
        replaced[:, 0] = False  # the first token often stands for the whole sequence
        drawn = rng.choice(ids.reshape(-1), ids.shape)
        feed[name] = np.where(replaced, drawn, ids).astype(ids.dtype)


class Copies(Sequence[dict[str, Array]]):
    """Augmented copies of feeds, made on access from a seed, so that every access makes the same copies again."""

    def __init__(self, feeds: Sequence[Feed], change: Augment, count: int, seed: int) -> None:
        """Refer to feeds without reading them.

        Args:
            feeds: The feeds.
            change: Makes a changed feed.
            count: Copies of every feed. Those of one feed follow each other.
            seed: Seed of all random choices.
        """
        self._per_feed = count
        self._feeds = feeds
        self._change = change
        self._seed = seed

    def __len__(self) -> int:
        return len(self._feeds) * self._per_feed

    @overload
    def __getitem__(self, place: int) -> dict[str, Array]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[str, Array]]: ...
    def __getitem__(self, place: int | slice) -> dict[str, Array] | list[dict[str, Array]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        rng = np.random.default_rng([self._seed, place])
        return self._change(self._feeds[place // self._per_feed], rng)


@dataclass(frozen=True)
class Chosen:
    """The changes of a run, and their description for the report."""

    function: Augment | None
    description: str


def choose(setting: str, model: Model, feed: Feed) -> Chosen:
    """Find the changes that a setting asks for.

    Args:
        setting: ``none``, ``auto`` or ``module:function``.
        model: The original.
        feed: A feed of several samples, which show the kinds of inputs.

    Returns:
        The function, None where nothing is changed.

    Raises:
        SettingsError: The function cannot be imported.
    """
    if setting == "none":
        return Chosen(None, "none")
    if setting != "auto":
        return Chosen(_of_user(setting), setting)
    found = kinds(model, feed)
    changed = {name: kind for name, kind in found.items() if kind not in ("other", "mask")}
    if not changed:
        return Chosen(None, "none")
    described_kinds = ", ".join(f"{name}: {kind}" for name, kind in changed.items())
    return Chosen(automatic(found), described_kinds)


def for_training(setting: str, model: Model, feed: Feed) -> Chosen:
    """Find the changes of the samples that a model is trained on.

    Args:
        setting: ``none``, ``auto`` or ``module:function``.
        model: The original.
        feed: A feed of several samples, which show the kinds of inputs.

    Returns:
        As for :func:`choose`. With ``auto``, images that are at least ``SMALL_SIDE`` high and wide are only mirrored in
        some of the feeds, the other inputs of which stay as they are.

    Raises:
        SettingsError: The function cannot be imported.
    """
    chosen = choose(setting, model, feed)
    if setting != "auto" or chosen.function is None:
        return chosen
    large = _large_images(model, feed)
    return replace(chosen, function=_mirroring_some(chosen.function, large)) if large else chosen


def _mirroring_some(change: Augment, images_found: Collection[str]) -> Augment:
    """Changes of feeds, in place of which the images of some feeds are only mirrored."""

    def augment(feed: Feed, rng: np.random.Generator) -> dict[str, Array]:
        if rng.random() >= MIRRORED_ONLY:
            return change(feed, rng)
        return {**feed, **{name: mirrored(feed[name], rng) for name in images_found}}

    return augment


def for_refit(setting: str, model: Model, feed: Feed) -> Augment | None:
    """Find the changes behind the augmented copies that a refit takes into account.

    Args:
        setting: ``none``, ``auto`` or ``module:function``.
        model: The original.
        feed: A feed of several samples, which show the kinds of inputs.

    Returns:
        The function. None where nothing is changed, and with ``auto`` without images among the inputs that are at
        least ``SMALL_SIDE`` high and wide: smaller ones are changed too little to be worth a second refit.

    Raises:
        SettingsError: The function cannot be imported.
    """
    if setting == "auto" and not _large_images(model, feed):
        return None
    return choose(setting, model, feed).function


def _large_images(model: Model, feed: Feed) -> list[str]:
    """Inputs with images that are at least ``SMALL_SIDE`` high and wide."""
    images_found = [name for name, kind in kinds(model, feed).items() if kind == "images"]
    return [name for name in images_found if min(_sides(feed[name].shape)) >= SMALL_SIDE]


def _of_user(setting: str) -> Augment:
    module_name, separator, function_name = setting.partition(":")
    if not separator or not module_name or not function_name:
        raise SettingsError(
            f"`augment={setting}` is not none, auto or module:function; give one of these."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # importing runs the user's own code
        raise SettingsError(
            f"`augment={setting}` cannot be imported: {described(error)}."
        ) from error

    def augment(feed: Feed, rng: np.random.Generator) -> dict[str, Array]:
        with foreign_code(
            f"`augment={setting}`", DataError, "it is to return a feed like the one it is given"
        ):
            found = {name: np.asarray(value) for name, value in dict(function(feed, rng)).items()}
        return {
            name: _checked(name, found.get(name), value, setting) for name, value in feed.items()
        }

    return augment


def _checked(name: str, found: Array | None, given: Array, setting: str) -> Array:
    """The array that a user's function returned for an input, in the type of the given one.

    Raises DataError where there is none, or one of another shape, of no numbers, or with values that are not finite.
    """
    start = f"`augment={setting}` returned"
    if found is None or found.shape != given.shape:
        got = "nothing" if found is None else found.shape
        raise DataError(f"{start} {got} for '{name}'; expected the shape {given.shape}.")
    if given.dtype == object:
        return found.astype(object)
    if found.dtype.kind not in "biuf" and found.dtype != given.dtype:
        raise DataError(f"{start} the type {found.dtype} for '{name}'; expected {given.dtype}.")
    with np.errstate(over="ignore", invalid="ignore"):
        result = found.astype(given.dtype)
    if not (np.isfinite(found).all() and np.isfinite(result).all()):
        raise DataError(
            f"{start} NaN or infinite values for '{name}'; expected finite {given.dtype}."
        )
    return result
