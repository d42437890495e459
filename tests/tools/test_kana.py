"""Deformed glyphs of the hiragana data set; no font is needed."""

from __future__ import annotations

import numpy as np
import pytest

from tools.experiments import kana


def test_glyphs_without_deformation_are_sampled_at_the_centres(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TURN", "SCALE", "SHEAR", "MOVE", "BEND"):
        monkeypatch.setattr(kana, name, 0.0)
    step = kana.DRAWN // kana.SIDE
    drawn = np.random.default_rng(0).random((3, kana.DRAWN, kana.DRAWN))
    found = kana.deformed(drawn, np.random.default_rng(0))
    centres = drawn[:, step // 2 :: step, step // 2 :: step]
    np.testing.assert_array_equal(found, np.round(255 * centres).astype(np.uint8))


def test_deformations_differ_and_keep_the_ink() -> None:
    drawn = np.zeros((200, kana.DRAWN, kana.DRAWN))
    drawn[:, 24:60, 24:60] = 1.0
    found = kana.deformed(drawn, np.random.default_rng(0))
    assert found.shape == (200, kana.SIDE, kana.SIDE)
    assert len(np.unique(found.reshape(200, -1), axis=0)) == 200
    share = drawn[0].mean()
    assert found.mean() / 255 == pytest.approx(share, rel=0.15)
    assert found[:, kana.SIDE // 2, kana.SIDE // 2].mean() > 200
