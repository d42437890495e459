"""Batches: answers of the original on the channels that are kept, and versions that are held where memory allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.data import dataset

torch = pytest.importorskip("torch")

from onnx_oamip.recovery import batches  # noqa: E402
from onnx_oamip.recovery.features import Feature  # noqa: E402

TEXT = """(float[N, 4] x) => (float[N, 2] y) <float[4, 6] w1, float[6, 2] w2> {
    a = MatMul(x, w1)
    r = Relu(a)
    y = MatMul(r, w2)
}"""
COUNT, SIZE = 10, 3
ROUND = COUNT // SIZE
"""Batches in one round over the samples: the tenth sample of a round is left to another one."""
BYTES = SIZE * 4 * (4 + 2 + 2)
"""Inputs, two channels of the feature and two outputs, in float32."""


class Source:
    """Samples, a teacher that counts its answers, and changes that are counted."""

    def __init__(self, folder: Path) -> None:
        self.model = load(build(TEXT), folder)
        data = np.random.default_rng(0).normal(size=(COUNT, 4)).astype(np.float32)
        self.samples = dataset.load({"x": data}, self.model)
        feature = Feature("r", ((1, np.array([1, 4])),))
        self.teacher = batches.Teacher(
            self.model, ["r", "y"], [feature], device="cpu", runtime_device="cpu"
        )
        self.changes = 0

    def augment(self, feed: dict, rng: np.random.Generator) -> dict:
        self.changes += 1
        return {"x": feed["x"] + np.float32(rng.normal())}

    def batches(self, memory: int, *, is_changed: bool = True) -> batches.Batches:
        assert self.samples is not None
        return batches.Batches(
            self.samples,
            self.teacher,
            None,
            size=SIZE,
            augment=self.augment if is_changed else None,
            device="cpu",
            memory=memory,
            seed=0,
        )


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_truth_is_that_of_the_changed_samples_on_kept_channels(source: Source) -> None:
    batch = next(source.batches(0))
    x = batch.fed["x"].numpy()
    hidden = np.maximum(x @ source.model.constants["w1"], 0)
    np.testing.assert_allclose(batch.truth["r"].numpy(), hidden[:, [1, 4]], rtol=1e-5)
    expected = hidden @ source.model.constants["w2"]
    np.testing.assert_allclose(batch.truth["y"].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_versions_are_held_and_used_again_where_they_fit(source: Source) -> None:
    versions = batches.VERSIONS
    held = source.batches(versions * ROUND * BYTES)
    assert held.held_bytes == versions * ROUND * BYTES
    first = [next(held) for _ in range(versions * ROUND)]
    assert source.changes == versions * ROUND
    again = [next(held) for _ in range(versions * ROUND)]
    assert source.changes == versions * ROUND
    assert {id(batch) for batch in again} == {id(batch) for batch in first}
    assert [id(batch) for batch in again] != [id(batch) for batch in first]


def test_too_few_versions_are_not_held(source: Source) -> None:
    anew = source.batches(batches.LEAST_VERSIONS * ROUND * BYTES - 1)
    assert anew.held_bytes == 0
    steps = batches.VERSIONS * ROUND + 5
    seen = {id(batch) for batch in [next(anew) for _ in range(steps)]}
    assert (len(seen), source.changes) == (steps, steps)


def test_one_version_of_unchanged_samples_is_held(source: Source) -> None:
    held = source.batches(ROUND * BYTES, is_changed=False)
    assert held.held_bytes == ROUND * BYTES
    first = {id(next(held)) for _ in range(ROUND)}
    assert {id(next(held)) for _ in range(ROUND)} == first
    assert source.batches(ROUND * BYTES - 1, is_changed=False).held_bytes == 0


def test_channels_of_images_lie_next_to_each_other() -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    rows = images.reshape(2, -1)
    found = batches.fed({"images": images, "rows": rows}, "cpu")
    assert found["images"].is_contiguous(memory_format=torch.channels_last)
    assert found["rows"].is_contiguous()
    assert np.array_equal(found["images"].numpy(), images)
    assert np.array_equal(found["rows"].numpy(), rows)
