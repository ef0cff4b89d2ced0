"""The checker of generated clips, on world 32: it accepts what shows the prompt, and rejects the rest."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stdit.data.shapes.checker import check, score
from stdit.data.shapes.outlines import SHAPES
from stdit.data.shapes.render import COLOURS, render
from stdit.data.shapes.scenes import Scene
from tests.data.shapes.clips import BASE, SMALL, counts, encoded, scenes


def accuracy(videos: list[np.ndarray], shown: list[Scene]) -> float:
    return float(np.mean([score(v, s.attributes)["strict"] for v, s in zip(videos, shown, strict=True)]))


@counts(12, 400)
def test_checker_is_right_on_rendered_clips(count: int) -> None:
    shown = scenes(count, seed=1)
    assert accuracy([render(scene) for scene in shown], shown) >= 0.99


@counts(10, 300)
@pytest.mark.parametrize("crf", [pytest.param(12, marks=pytest.mark.slow), 24])
def test_checker_is_right_after_h264(tmp_path: Path, crf: int, count: int) -> None:
    shown = scenes(count, seed=2)
    videos = [encoded(render(scene), tmp_path / "clip.mp4", crf) for scene in shown]
    assert videos[0].shape == (16, 32, 32, 3)
    assert accuracy(videos, shown) >= 0.99


@counts(8, 100)
def test_checker_accepts_blur_and_faint_noise(count: int) -> None:
    shown = scenes(count, seed=3)
    rng = np.random.default_rng(0)
    videos = []
    for scene in shown:
        video = render(scene).astype(float)
        for axis in (1, 2):
            video = (np.roll(video, 1, axis) + 2 * video + np.roll(video, -1, axis)) / 4
        videos.append((video + rng.normal(0, 8, video.shape)).clip(0, 255).astype(np.uint8))
    assert accuracy(videos, shown) >= 0.98


@counts(2, 20)
@pytest.mark.parametrize(("size", "frames"), [(64, 24), (48, 16), (128, 9)])
def test_checker_accepts_other_sizes(size: int, frames: int, count: int) -> None:
    shown = scenes(count, seed=4)
    assert accuracy([render(scene, frames, size) for scene in shown], shown) == 1


def test_checker_accepts_wide_frames() -> None:
    video = np.pad(render(BASE), ((0, 0), (0, 0), (12, 12), (0, 0)))
    assert score(video, BASE.attributes)["strict"]


def test_checker_rejects_noise_and_empty_videos() -> None:
    rng = np.random.default_rng(0)
    for low, high in ((0, 256), (60, 200)):
        verdict = check(rng.integers(low, high, (16, 32, 32, 3), dtype=np.uint8))
        assert (verdict.shape, verdict.colour, verdict.motion) == (None, None, None) and verdict.reason
    empty = check(np.zeros((16, 32, 32, 3), np.uint8))
    assert empty.background == "black" and empty.shape is None and empty.motion is None


@counts(3, 40)
def test_checker_rejects_still_jumping_and_shuffled_objects(count: int) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(count, seed=5):
        video = render(scene)
        shaken = [np.roll(video[0], tuple(rng.integers(-2, 3, 2)), (0, 1)) for _ in range(16)]
        jump = np.concatenate([video[[0] * 8], video[[15] * 8]])
        for name, wrong in (
            ("still", video[[0] * 16]),
            ("shaken", np.stack(shaken)),
            ("jump", jump),
            ("shuffled", video[rng.permutation(16)]),
            ("gone", np.concatenate([video[:10], video[:6] * 0 + video[0, 0, 0]])),
        ):
            assert check(wrong).motion is None, (name, scene)
        assert score(video[[0] * 16], scene.attributes)["shape"]


@counts(1, 30)
def test_checker_rejects_every_other_value(count: int) -> None:
    values: dict[str, Iterable[str]] = {
        "shape": SMALL.shapes,
        "colour": SMALL.colours,
        "motion": SMALL.motions,
        "background": SMALL.backgrounds,
    }
    for scene in scenes(count, seed=6):
        right = score(render(scene), scene.attributes)
        assert all(right.values())
        for name, options in values.items():
            for value in set(options) - {scene.attributes[name]}:
                change: dict[str, Any] = {name: value}
                wrong = score(render(replace(scene, **change)), scene.attributes)
                assert not (wrong[name] or wrong["strict"] or wrong["lenient"]), (scene, name, value)
                assert all(wrong[other] for other in values if other != name)
                assert wrong["shape_lenient"] == (name != "shape")


@pytest.mark.parametrize("shape", SMALL.shapes)
def test_checker_gives_a_lenient_shape_where_the_strict_one_fails(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outline = SHAPES[shape]
    scene = replace(BASE, shape=shape)
    with monkeypatch.context() as patch:
        patch.setitem(SHAPES, shape, lambda u, v: outline(u / 1.15, v * 1.15))
        stretched = render(scene)
    verdict = check(stretched)
    assert (verdict.shape, verdict.shape_lenient) == (None, shape), verdict.reason


@counts(2, 30)
@pytest.mark.parametrize("stranger", ["diamond", "ring", "ellipse", "rectangle", "upside down", "two"])
def test_checker_rejects_unknown_shapes(stranger: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triangle = SHAPES["triangle"]
    outlines = {
        "diamond": lambda u, v: (np.abs(u) + np.abs(v)) / np.sqrt(2) - 0.9,
        "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.8) - 0.3,
        "ellipse": lambda u, v: np.hypot(u / 1.2, v * 1.2) - 1.0,
        "rectangle": lambda u, v: np.maximum(np.abs(u / 1.2), np.abs(v * 1.2)) - 0.9,
        "upside down": lambda u, v: triangle(u, -v),
        "two": lambda u, v: np.hypot(np.abs(u) - 0.9, v) - 0.6,
    }
    for scene in scenes(count, seed=7):
        with monkeypatch.context() as patch:
            patch.setitem(SHAPES, stranger, outlines[stranger])
            video = render(replace(scene, shape=stranger))
        assert check(video).shape is None


@counts(3, 30)
def test_checker_rejects_morphs_and_changing_colours(count: int) -> None:
    for scene in scenes(count, seed=8):
        scene = replace(scene, x=16, y=16, radius=5.5)  # clear of the border
        video = render(scene)
        other = render(replace(scene, shape="cross" if scene.shape == "circle" else "circle"))
        morphs = video.copy()
        morphs[1::2] = other[1::2]
        assert check(morphs).shape is None, scene
        hue = render(replace(scene, colour="blue" if scene.colour == "red" else "red"))
        assert check(np.concatenate([video[::2], hue[1::2]])).colour is None


@pytest.mark.parametrize("rgb", [(110, 60, 15), (0, 220, 230), (255, 150, 180), (180, 180, 180)])
def test_checker_rejects_unknown_colours(rgb: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(COLOURS, "stranger", rgb)
        video = render(replace(BASE, colour="stranger"))
    verdict = check(video)
    assert verdict.colour is None and verdict.shape == "circle"


def test_checker_requires_uint8() -> None:
    with pytest.raises(ValueError, match="uint8"):
        check(np.zeros((16, 32, 32, 3), np.float32))
