"""Random changes of samples by kind of input, and by a function of the user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import Array, Model
from onnx_oamip.data import augmentation


def model(folder: Path, inputs: str) -> Model:
    """A network with some inputs, the first of which a layer reads."""
    first = inputs.split("]")[1].split(",")[0].strip()
    length = inputs.split("]")[0].split(",")[-1]
    body = f"f = Cast<to = 1>({first}) y = MatMul(f, w)"
    return load(build(f"({inputs}) => (float[] y) <float[{length},2] w> {{ {body} }}"), folder)


@pytest.mark.parametrize(
    ("declared", "shape", "kind"),
    [
        ("float[N, 3, 32, 32] x", (4, 3, 32, 32), "images"),
        ("float[N, 1, 28, 28] x", (4, 1, 28, 28), "images"),
        ("float[N, 32, 48, 3] x", (4, 32, 48, 3), "images"),
        ("float[N, 1, 80, 300] x", (4, 1, 80, 300), "other"),
        ("float[N, 16000] x", (4, 16000), "audio"),
        ("float[N, 1, 16000] x", (4, 1, 16000), "audio"),
        ("uint8[N, 32, 48, 3] x", (4, 32, 48, 3), "images"),
        ("uint8[N, 3, 32, 48] x", (4, 3, 32, 48), "images"),
        ("int64[N, 3, 32, 48] x", (4, 3, 32, 48), "other"),
        ("float[N, 12] x", (4, 12), "other"),
    ],
)
def test_kind_of_an_input_follows_from_type_and_shape(
    declared: str, shape: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    loaded = model(tmp_path, declared)
    port = loaded.inputs[0]
    feed = {port.name: np.zeros(shape, port.dtype)}
    assert augmentation.kinds(loaded, feed) == {port.name: kind}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (
            "k = Concat<axis = 2>(x, q) k2 = Transpose<perm = [0, 1, 3, 2]>(k) y = MatMul(q, k2)",
            "other",
        ),
        ("a = MatMul(q, q) s = Add(a, x) p = Softmax(s) y = MatMul(p, q)", "other"),
        ("c = Conv(x, w) y = MatMul(c, q)", "images"),
    ],
    ids=["keys", "mask", "image"],
)
def test_only_inputs_that_a_layer_reads_are_images(body: str, kind: str, tmp_path: Path) -> None:
    inputs = "float[N, 3, 8, 8] x, float[N, 3, 8, 8] q"
    loaded = load(build(f"({inputs}) => (float[] y) <float[3,3,1,1] w> {{ {body} }}"), tmp_path)
    feed = {name: np.zeros((4, 3, 8, 8), np.float32) for name in "xq"}
    assert augmentation.kinds(loaded, feed) == {"x": kind, "q": "other"}


@pytest.mark.parametrize("body", ["e = Gather(w, i)", "e = OneHot(i, depth, ends)"])
def test_maps_of_classes_are_no_images(body: str, tmp_path: Path) -> None:
    text = f"""(uint8[N,1,8,8] x) => (float[] y)
        <float[5,4] w, float[4,2] v, int64 depth = {{4}}, float[2] ends = {{0, 1}}> {{
        i = Cast<to = 7>(x) {body} y = MatMul(e, v) }}"""
    feed = {"x": np.zeros((4, 1, 8, 8), np.uint8)}
    assert augmentation.kinds(load(build(text), tmp_path), feed) == {"x": "other"}


@pytest.mark.parametrize(
    ("shape", "changed_share"),
    [((6, 3, 20, 24), 0.5), ((6, 20, 24, 3), 0.5), ((6, 3, 96, 100), 1.0)],
    ids=["nchw", "nhwc", "large"],
)
def test_images_change_within_their_range(shape: tuple[int, ...], changed_share: float) -> None:
    batch = np.random.default_rng(0).uniform(-2, 3, shape).astype(np.float32)
    changed = augmentation.images(batch, np.random.default_rng(1))
    again = augmentation.images(batch, np.random.default_rng(1))
    assert changed.shape == shape
    assert changed.dtype == np.float32
    assert batch.min() <= changed.min() < changed.max() <= batch.max()
    moved = [np.abs(a - b).max() > 0.1 for a, b in zip(changed, batch, strict=True)]
    assert np.mean(moved) == changed_share
    assert np.array_equal(changed, again)


@pytest.mark.parametrize("shape", [(8, 3, 20, 24), (8, 96, 100, 3)], ids=["nchw", "nhwc"])
def test_images_of_whole_numbers_are_rounded(shape: tuple[int, ...]) -> None:
    batch = np.random.default_rng(0).integers(5, 250, shape).astype(np.uint8)
    changed = augmentation.images(batch, np.random.default_rng(1))
    exact = augmentation.images(batch.astype(np.float32), np.random.default_rng(1))
    assert (changed.shape, changed.dtype) == (shape, np.uint8)
    assert np.array_equal(changed, np.rint(exact))
    assert (changed != batch).any()


def test_pieced_images_are_parts_of_four_that_meet_near_the_centre() -> None:
    values = np.arange(1.0, 9.0, dtype=np.float32)
    batch = np.broadcast_to(values[:, None, None, None], (8, 3, 20, 30))
    found = augmentation.pieced(batch, np.random.default_rng(0))
    assert found.shape == batch.shape
    assert (found == found[:, :1, :, :]).all()
    corners = [found[:, 0, y, x] for y in (0, -1) for x in (0, -1)]
    assert all(sorted(corner) == list(values) for corner in corners)
    for image in found[:, 0]:
        top = 1 + np.flatnonzero((image[1:] != image[:-1]).any(axis=1))
        left = 1 + np.flatnonzero((image[:, 1:] != image[:, :-1]).any(axis=0))
        assert len(top) <= 1
        assert len(left) <= 1
        assert all(0.3 * 20 <= place <= 0.7 * 20 + 1 for place in top)
        assert all(0.3 * 30 <= place <= 0.7 * 30 + 1 for place in left)


@pytest.mark.parametrize(("side", "is_pieced"), [(96, True), (95, False)])
def test_only_large_images_are_put_together_from_several(
    side: int, is_pieced: bool, tmp_path: Path
) -> None:
    loaded = model(tmp_path, f"float[N, 3, {side}, {side}] x")
    values = np.array([0.0, 1.0, 2.0, 4.0, 8.0, 16.0], np.float32)
    noise = np.random.default_rng(0).uniform(0, 1e-3, (6, 3, side, side)).astype(np.float32)
    feed = {"x": values[:, None, None, None] + noise}
    change = augmentation.choose("auto", loaded, feed).function
    assert change is not None
    images = change(feed, np.random.default_rng(1))["x"]
    steps = np.array([np.abs(np.diff(image, axis=-1)).max() for image in images])
    assert np.mean(steps > 0.5) > 0.5 if is_pieced else steps.max() < 0.1


@pytest.mark.parametrize(
    "shape", [(2, 3, 96, 100), (2, 96, 100, 3)], ids=["channels first", "channels last"]
)
def test_images_of_a_training_are_only_mirrored_in_half_of_the_feeds(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    loaded = model(tmp_path, f"float[{', '.join(map(str, ('N', *shape[1:])))}] x, float[N, 5] z")
    rng = np.random.default_rng(0)
    feed = {
        "x": rng.uniform(-2, 3, shape).astype(np.float32),
        "z": np.ones((2, 5), np.float32),
    }
    change = augmentation.for_training("auto", loaded, feed).function
    assert change is not None
    as_it_is = feed["x"]
    turned = np.flip(as_it_is, 3 if shape[1] == 3 else 2)
    states = []
    for _ in range(60):
        found = change(feed, rng)
        assert found["x"].dtype == np.float32
        assert np.array_equal(found["z"], feed["z"])
        for image, old, mirrored in zip(found["x"], as_it_is, turned, strict=True):
            same = [np.array_equal(image, other) for other in (old, mirrored)]
            states.append("as it is" if same[0] else "mirrored" if same[1] else "changed")
    shares = {state: states.count(state) / len(states) for state in set(states)}
    assert shares == pytest.approx({"as it is": 0.25, "mirrored": 0.25, "changed": 0.5}, abs=0.15)


@pytest.mark.parametrize(
    ("setting", "side"), [("auto", 95), ("none", 96)], ids=["small images", "no changes"]
)
def test_changes_of_a_training_are_the_chosen_ones_without_large_images(
    setting: str, side: int, tmp_path: Path
) -> None:
    loaded = model(tmp_path, f"float[N, 3, {side}, {side}] x")
    feed = {"x": np.random.default_rng(0).normal(size=(4, 3, side, side)).astype(np.float32)}
    found = augmentation.for_training(setting, loaded, feed)
    expected = augmentation.choose(setting, loaded, feed)
    assert found.description == expected.description
    if expected.function is None:
        assert found.function is None
        return
    assert found.function is not None
    for seed in range(4):
        here, there = (
            chosen.function(feed, np.random.default_rng(seed))["x"]
            for chosen in (found, expected)
            if chosen.function is not None
        )
        assert np.array_equal(here, there)


def test_crop_resamples_a_ramp_linearly() -> None:
    ramp = np.tile(np.arange(10.0, dtype=np.float32), (1, 3, 1))
    found = augmentation._resampled(ramp, 2, np.array([0.25, 4.5, 8.75, 20.0]))
    assert found[0, 0].tolist() == [0.25, 4.5, 8.75, 9.0]


def test_waveforms_keep_shape_and_type() -> None:
    batch = np.sin(np.arange(3000.0)).reshape(2, 1500).astype(np.float16)
    changed = augmentation.audio(batch, np.random.default_rng(0))
    assert (changed.shape, changed.dtype) == (batch.shape, batch.dtype)
    assert not np.array_equal(changed, batch)


def test_tokens_are_replaced_by_tokens_of_the_data_where_the_mask_shows_them() -> None:
    rng = np.random.default_rng(0)
    ids = rng.choice([7, 8, 9, 50], (20, 16))
    mask = np.ones((20, 16), np.int64)
    mask[:, 12:] = 0
    change = augmentation.automatic({"ids": "tokens", "attention_mask": "mask"})
    changed = change({"ids": ids, "attention_mask": mask}, rng)
    assert set(np.unique(changed["ids"])) == {7, 8, 9, 50}
    assert np.array_equal(changed["ids"][:, 0], ids[:, 0])
    assert np.array_equal(changed["ids"][:, 12:], ids[:, 12:])
    assert 0 < (changed["ids"] != ids).mean() < 0.2
    lengths = changed["attention_mask"].sum(axis=1)
    assert lengths.min() >= 6
    assert lengths.max() <= 12
    assert len(set(lengths.tolist())) > 1


LOOKUPS = {
    "whole": "i = Unsqueeze(x, last) j = Cast<to = 7>(i) e = Gather(w, j)",
    "negative from the end": """less = Less(x, zero) around = Add(x, length) i = Where(less, around, x)
        e = Gather(w, i)""",
    "whole and shifted": "e = Gather(w, x) s = Slice(x, one, nine, one) f = Gather(w, s)",
    "computed positions": """p = Cast<to = 7>(x) q = CumSum(p, one) f = Gather(v, q) e = Gather(w, x)""",
    "column by column": """a = Gather<axis = 1>(x, zero) b = Gather<axis = 1>(x, one)
        e = Gather(w, a) f = Gather(v, b)""",
    "split columns": "a, b = Split<axis = 1>(x, three) e = Gather(w, a) f = Gather(v, b)",
    "with offsets of columns": "i = Add(x, offsets) e = Gather(w, i)",
    "whole and a column of another table": """e = Gather(w, x) b = Gather<axis = 1>(x, one)
        f = Gather(v, b)""",
    "not looked up": "e = Cast<to = 1>(x)",
}
"""Nodes behind an input x (4, 6) of whole numbers that end in e."""
CONSTANTS = """float[100,8] w, float[100,8] v, int64 zero = {0}, int64[1] one = {1}, int64[1] nine = {9},
    int64[1] last = {-1}, int64[2] three = {3, 3}, int64 length = {100}, int64[6] offsets = {0, 1, 2, 3, 4, 5}"""


@pytest.mark.parametrize(
    ("lookups", "expected"),
    [
        *((name, "x: tokens") for name in list(LOOKUPS)[:4]),
        *((name, "none") for name in list(LOOKUPS)[4:]),
    ],
)
def test_tokens_are_looked_up_in_one_table_at_all_positions(
    lookups: str, expected: str, tmp_path: Path
) -> None:
    body = LOOKUPS[lookups]
    outputs = "float[] e, float[] f" if " f = " in body else "float[] e"
    text = f"(int64[N,6] x) => ({outputs}) <{CONSTANTS}> {{ {body} }}"
    feed = {"x": np.random.default_rng(0).integers(0, 20, (16, 6))}
    found = augmentation.choose("auto", load(build(text), tmp_path), feed)
    assert found.description == expected


def _padded(lengths: tuple[int, ...], *, left: bool = False) -> Array:
    """Rows of ones, of so many of twelve places."""
    mask = np.arange(12) < np.array(lengths)[:, None]
    return mask[:, ::-1] if left else mask


WORDS = np.random.default_rng(0).integers(0, 50, (4, 12))
PLACES = np.tile(np.arange(12), (4, 1))


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("ids", WORDS, "tokens"),
        ("ids", WORDS[:1], "tokens"),
        ("ids", np.tile(WORDS[:1], (4, 1)), "other"),
        ("ids", WORDS % 4 + 4 * np.arange(12), "other"),
        ("ids", PLACES, "other"),
        ("ids", PLACES[:1], "other"),
        ("ids", np.where(_padded((12, 9, 5, 2)), PLACES + 2, 1), "other"),
        ("ids", WORDS % 2, "other"),
        ("x", WORDS, "other"),
        ("x", WORDS % 2, "other"),
        ("x", WORDS % 2 == 1, "other"),
        ("x", _padded((12, 9, 5, 2)), "mask"),
        ("x", _padded((12, 9, 5, 2)).astype(np.int64), "mask"),
        ("x", _padded((9, 5), left=True), "other"),
        ("mask", _padded((9, 5), left=True), "mask"),
    ],
    ids=[
        "words",
        "words of one sample",
        "equal in all samples",
        "values of their own at every position",
        "positions",
        "positions of one sample",
        "positions of padded samples",
        "segments",
        "table",
        "table of zeros and ones",
        "table of truth values",
        "padding",
        "padding as whole numbers",
        "padding on the left, without a name",
        "padding on the left",
    ],
)
def test_kind_of_whole_numbers_follows_from_their_values(
    name: str, values: Array, kind: str, tmp_path: Path
) -> None:
    declared = "bool" if values.dtype == bool else "int64"
    body = "y = Gather(w, ids)" if name == "ids" else f"f = Cast<to = 1>({name}) y = MatMul(f, w)"
    text = f"({declared}[N,12] {name}) => (float[] y) <float[12,2] w> {{ {body} }}"
    assert augmentation.kinds(load(build(text), tmp_path), {name: values}) == {name: kind}


def test_masks_hide_the_last_of_the_tokens_that_they_show() -> None:
    mask = _padded((12, 8, 5, 1), left=True).astype(np.int64)
    change = augmentation.automatic({"ids": "tokens", "mask": "mask"})
    found = change({"ids": WORDS, "mask": mask}, np.random.default_rng(3))["mask"]
    assert (found <= mask).all()
    for before, after in zip(mask, found, strict=True):
        shown = np.flatnonzero(before)
        left = np.flatnonzero(after)
        assert len(shown) <= 2 * len(left)
        assert np.array_equal(left, shown[: len(left)])
    assert (found.sum(axis=1) < mask.sum(axis=1)).any()


def test_tables_stay_as_they_are(tmp_path: Path) -> None:
    loaded = model(tmp_path, "float[N, 12] x")
    chosen = augmentation.choose("auto", loaded, {"x": np.zeros((1, 12), np.float32)})
    assert chosen == augmentation.Chosen(None, "none")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("images", "is not none, auto or module:function"),
        ("no_such_module:f", "cannot be imported"),
    ],
)
def test_unknown_function_is_refused(setting: str, expected: str, tmp_path: Path) -> None:
    loaded = model(tmp_path, "float[N, 12] x")
    with pytest.raises(SettingsError, match=expected):
        augmentation.choose(setting, loaded, {"x": np.zeros((1, 12), np.float32)})


def test_function_of_the_user_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_changes.py").write_text(
        "def double(feed, rng):\n    return {k: 2 * v for k, v in feed.items()}\n"
        "def cut(feed, rng):\n    return {k: v[:, 1:] for k, v in feed.items()}\n"
        "def fail(feed, rng):\n    raise RuntimeError('broken')\n"
        "def text(feed, rng):\n    return {k: v.astype(str) for k, v in feed.items()}\n"
        "def undefined(feed, rng):\n    return {k: v * float('nan') for k, v in feed.items()}\n"
        "def large(feed, rng):\n    return {k: v.astype('f8') * 1e39 for k, v in feed.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded = model(tmp_path, "float[N, 12] x")
    fed = {"x": np.ones((2, 12), np.float32)}
    rng = np.random.default_rng(0)
    double = augmentation.choose("own_changes:double", loaded, fed).function
    assert double is not None
    assert double(fed, rng)["x"].tolist() == [[2.0] * 12] * 2
    for name, message in (
        ("cut", r"returned \(2, 11\) for 'x'"),
        ("fail", "RuntimeError: broken"),
        ("text", r"`augment=own_changes:text` returned the type <U\d+ for 'x'; expected float32"),
        ("undefined", "`augment=own_changes:undefined` returned NaN or infinite values for 'x'"),
        ("large", "`augment=own_changes:large` returned NaN or infinite values for 'x'"),
    ):
        function = augmentation.choose(f"own_changes:{name}", loaded, fed).function
        assert function is not None
        with pytest.raises(DataError, match=message):
            function(fed, rng)


def test_copies_are_made_on_access_and_the_same_again() -> None:
    feeds = [{"x": np.full((2, 3), value)} for value in (1.0, 2.0)]
    copies = augmentation.Copies(feeds, _scaled, 3, seed=7)
    assert len(copies) == 6
    found = list(copies)
    scales = [copy["x"][0, 0] / (1 + place // 3) for place, copy in enumerate(found)]
    assert len(set(scales)) == 6
    assert copies[4]["x"].tolist() == found[4]["x"].tolist() == copies[3:5][1]["x"].tolist()
    assert augmentation.Copies(feeds, _scaled, 3, seed=8)[0]["x"][0, 0] != found[0]["x"][0, 0]


def _scaled(feed: augmentation.Feed, rng: np.random.Generator) -> dict[str, Array]:
    return {name: rng.uniform(1, 2) * value for name, value in feed.items()}


@pytest.mark.parametrize(
    ("declared", "shape", "is_changed"),
    [
        ("float[N, 3, 96, 128] x", (4, 3, 96, 128), True),
        ("float[N, 96, 96, 3] x", (4, 96, 96, 3), True),
        ("float[N, 3, 32, 128] x", (4, 3, 32, 128), False),
        ("float[N, 16000] x", (4, 16000), False),
        ("float[N, 12] x", (4, 12), False),
    ],
)
def test_a_refit_gets_copies_of_large_images_only(
    declared: str, shape: tuple[int, ...], is_changed: bool, tmp_path: Path
) -> None:
    loaded = model(tmp_path, declared)
    feed = {"x": np.zeros(shape, np.float32)}
    assert (augmentation.for_refit("auto", loaded, feed) is not None) == is_changed
    assert augmentation.for_refit("none", loaded, feed) is None
