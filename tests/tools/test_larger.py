"""The study of larger networks: its photographs, its figures, and what it says where files are missing."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image

from tools import composed_images, photographs
from tools.bench import larger
from tools.bench.studies import LeftOut, Row


def picture(seed: int, size: tuple[int, int] = (260, 230)) -> Image.Image:
    """Blobs of colour, which survive WebP."""
    blobs = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str) -> bytes:
    held = io.BytesIO()
    image.save(held, form)
    return held.getvalue()


def test_photographs_are_found_once_and_icons_ignored(tmp_path: Path) -> None:
    resources, backgrounds = (
        tmp_path / "usr/share/gcompris-qt/rcc",
        tmp_path / "usr/share/backgrounds",
    )
    resources.mkdir(parents=True)
    backgrounds.mkdir(parents=True)
    icon, transparent = picture(4, (64, 64)), picture(5).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    held = [picture(1), icon, picture(2), transparent, picture(1, (520, 460))]
    data = (
        b"qres\x00RIFF at random" + b"--".join(encoded(image, "WEBP") for image in held) + b"tail"
    )
    (resources / "erase.rcc").write_bytes(data)
    (backgrounds / "one.jpg").write_bytes(encoded(picture(3), "JPEG"))
    found = photographs.find(tmp_path)
    assert [image.format for image in found] == ["WEBP", "WEBP", "JPEG"]
    for image, seed in zip(found, (1, 2, 3), strict=True):
        assert (
            np.abs(np.asarray(image, np.float32) - np.asarray(picture(seed), np.float32)).mean()
            < 10
        )


def test_empty_folder_has_no_photographs(tmp_path: Path) -> None:
    assert photographs.find(tmp_path) == []


def test_stamps_are_composed_on_backgrounds(tmp_path: Path) -> None:
    """Every image shows its stamp on the colour of the background; symbols and small stamps are left out."""
    sizes = {"animals/cat": 120, "symbols/arrow": 120, "food/crumb": 40}
    for name, side in sizes.items():
        file = tmp_path / "share" / "stamps" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        stamp = Image.new("RGBA", (side, side))
        stamp.paste((255, 0, 0, 255), (10, 10, side - 10, side - 10))
        stamp.save(file)
    files = composed_images.stamps(tmp_path)
    assert [file.stem for file in files] == ["cat"]
    green = np.zeros((3, 3, 64, 64), np.uint8)
    green[:, 1] = 200
    found = composed_images.compose(files, green, seed=1)
    is_stamp = (found[:, 0] > 250) & (found[:, 1] < 5)
    is_background = (found[:, 0] == 0) & (found[:, 1] == 200)
    shares = is_stamp.mean((1, 2))
    assert ((shares > 0.1) & (shares < 1)).all()
    assert (is_stamp | is_background).mean() > 0.9  # all but the rim of the stamp
    assert np.array_equal(found, composed_images.compose(files, green, seed=1))


@pytest.mark.parametrize("count", [2, 7, 40])
def test_photographs_are_split_without_overlap(count: int) -> None:
    seen, unseen = photographs.split(range(count), seed=1)
    assert sorted([*seen, *unseen]) == list(range(count))
    assert 0 <= len(seen) - len(unseen) <= 1
    assert photographs.split(range(count), seed=1) == (seen, unseen)


def test_crops_cover_every_photograph_and_stay_inside() -> None:
    plain = [Image.new("RGB", (300, 210), (50 * i, 0, 255)) for i in range(3)]
    found = photographs.crops(plain, 8)
    assert (found.shape, found.dtype) == ((8, 3, 224, 224), np.uint8)
    assert [set(np.unique(crop[0])) for crop in found] == [{50 * (i % 3)} for i in range(8)]
    assert np.unique(found[:, 2]).tolist() == [255]
    assert photographs.crops(plain, 2, size=60).shape == (2, 3, 60, 60)


def test_first_crop_is_the_centre_square() -> None:
    image = Image.new("RGB", (448, 224))
    image.paste((200, 100, 0), (112, 0, 336, 224))
    (found,) = photographs.crops([image], 1)
    assert found[:, 112, 112].tolist() == [200, 100, 0]
    assert (found[0, :, 3:-3] == 200).all()


def test_missing_file_error_names_the_command_that_makes_it(tmp_path: Path) -> None:
    assert "--larger" in str(larger.absent("vgg16", None))
    (tmp_path / "vgg16.onnx").touch()
    said = str(larger.absent("vgg16", tmp_path))
    assert "has no vgg16.npz;" in said
    assert "python -m tools.make_larger_models vgg16" in said
    (tmp_path / "vgg16.npz").touch()
    assert larger.absent("vgg16", tmp_path) is None


def test_study_without_its_files_has_no_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert larger.run(tmp_path / "out", 0, larger=tmp_path) == ""
    assert capsys.readouterr().out.count("is left out") == len(larger.NETWORKS)
    assert not (tmp_path / "out").exists()


def test_agreement_compares_with_predictions_of_the_original(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    node = helper.make_node("Gemm", ["input", "w"], ["logits"])
    ports = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k])
        for n, k in (("input", 12), ("logits", 8))
    ]
    graph = helper.make_graph(
        [node], "g", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    save(model, tmp_path / "m.onnx")
    codes = np.random.default_rng(1).integers(0, 256, (2, 50, 12), np.uint8)
    scales = {"input.scale": np.float32(1 / 128), "input.offset": np.float32(-1)}
    np.savez(tmp_path / "m.npz", **{"input": codes[0], "eval.input": codes[1]}, **scales)
    bench = larger.Bench("m", tmp_path)
    expected = (codes[1].astype(np.float32) / 128 - 1) @ weight
    np.testing.assert_allclose(bench.expected, expected, rtol=1e-5, atol=1e-5)
    row = bench.row(0.5, "ours", model)
    assert (row["judged by"], row["before"], row["after"], row["MACs kept"]) == (
        "agreement",
        100.0,
        100.0,
        1.0,
    )
    assert (row["first five kept %"], row["divergence"]) == (100.0, 0.0)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(-weight, "w"))
    other = bench.row(0.5, "ours", model)
    assert other["points lost"] == 100 - other["after"] > 50


def test_divergence_and_top_predictions_of_synthetic_logits() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    assert larger.divergence(np.log(p), np.log(q) + 3) == pytest.approx(0.25 * np.log(2), rel=1e-12)
    assert larger.first_kept(np.array([[4.0, 3, 2, 1]]), np.array([[4.0, 1, 2, 3]]), first=2) == 0.5


def test_summary_shows_the_best_rival_of_every_row() -> None:
    common = {"model": "a", "judged by": "accuracy", "before": 90.0}
    after = {"ours": 88.0, "random": 20.0, "onnxsim Wanda": 70.0, "Torch-Pruning L2": 80.5}
    rows = [{**common, "MACs asked": 0.5, "method": m, "after": v} for m, v in after.items()]
    rows.append({**common, "MACs asked": 0.25, "method": "ours", "why not": "no"})
    half, quarter = larger.summary(rows)
    assert (half["best rival"], half["its figure"], half["ours ahead by"]) == (
        "Torch-Pruning L2",
        80.5,
        7.5,
    )
    assert quarter["ours"] is None
    assert "best rival" not in quarter


def test_only_missing_rows_of_chosen_methods_and_budgets_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, float]] = []

    def method(name: str) -> larger.Measured:
        def rows(budgets: Sequence[float]) -> Iterator[Row]:
            for budget in budgets:
                measured.append((name, budget))
                row = {"model": "m", "MACs asked": budget, "method": name}
                yield {**row, "judged by": "accuracy", "before": 90.0, "after": 80.0}

        return rows

    monkeypatch.setattr(larger, "absent", lambda *_: None)
    monkeypatch.setattr(larger, "Bench", lambda *_: None)
    known = {"ours": method("ours"), "random": method("random")}
    monkeypatch.setattr(larger, "_methods", lambda *_, **__: known)
    larger.run(tmp_path, 0, ("m",), tmp_path, ("ours",), (0.5,))
    larger.run(tmp_path, 0, ("m",), tmp_path, ("ours", "random"), (0.5, 0.8))
    assert measured == [("ours", 0.5), ("ours", 0.8), ("random", 0.5), ("random", 0.8)]
    with pytest.raises(LeftOut, match="no method 'L2'; there are: ours, random"):
        larger.run(tmp_path, 0, ("m",), tmp_path, ("L2",))
