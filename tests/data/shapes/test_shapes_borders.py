"""The measure of patch borders: in real clips, in spoiled ones, and in scripts/evaluate_adherence.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stdit.data.shapes.build import write_video
from stdit.data.shapes.checker import patch_borders
from stdit.data.shapes.render import PLAIN, render
from stdit.pipelines.sources import find_checkpoint_source
from tests.data.shapes.clips import BASE, LARGE, SMALL, encoded, run_script, scenes
from tests.pipelines.tiny import tiny_pipeline


def with_borders(video: np.ndarray, patch: tuple[int, int], levels: float, noise: float = 2.0) -> np.ndarray:
    """Add noise, and an offset to every patch: these of one video have a standard deviation of ``levels``."""
    rng = np.random.default_rng(0)
    T, H, W, _ = video.shape
    grid = rng.normal(0, levels, (T, H // patch[0], W // patch[1], 3))
    offsets = grid.repeat(patch[0], axis=1).repeat(patch[1], axis=2)
    return (video + offsets + rng.normal(0, noise, video.shape)).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("world", [SMALL, LARGE], ids=lambda world: world.name)
def test_real_clips_have_none(world, tmp_path: Path) -> None:
    for scene in scenes(4, seed=1, world=world):
        clip = encoded(render(scene, world.num_frames, world.size), tmp_path / "clip.mp4")
        found = patch_borders(clip, 16, 16)
        assert (found is None) == (scene.background not in PLAIN)
        assert found is None or found == pytest.approx(1, abs=0.05), scene
    noisy = with_borders(render(replace(BASE, background="grey")), (16, 16), levels=0, noise=6)
    assert patch_borders(noisy, 16, 16) == pytest.approx(1, abs=0.05), "noise alone is no border"


@pytest.mark.parametrize("patch", [(16, 16), (8, 16), (32, 8)], ids=str)
def test_drawn_borders_are_seen(patch: tuple[int, int]) -> None:
    clip = render(replace(BASE, background="grey"))
    faint, strong = (patch_borders(with_borders(clip, patch, levels), *patch) for levels in (2, 6))
    assert faint is not None and strong is not None
    assert 1.2 < faint < strong and strong > 2.5
    other = patch_borders(with_borders(clip, patch, 6), 5, 5)
    assert other is not None and other < 1.3, "borders of other patches than the model's"


def test_a_frame_without_borders_or_without_anything_else_has_no_measure() -> None:
    assert patch_borders(render(BASE), 32, 32) is None
    assert patch_borders(render(BASE), 1, 1) is None


def test_evaluate_reports_them_for_a_folder_of_videos(tmp_path: Path) -> None:
    clip = render(replace(BASE, background="grey"))
    rows = []
    for index, video in enumerate((clip, with_borders(clip, (16, 16), 6))):
        write_video(tmp_path / f"{index}.mp4", video, fps=8, crf=12)
        (tmp_path / f"{index}.json").write_text(json.dumps({"prompt": f"clip {index}"}))
        rows.append(f"clip {index},circle,red,right,grey\n")
    (tmp_path / "prompts_two.csv").write_text("".join(["prompt,shape,colour,motion,background\n", *rows]))
    command = ["evaluate_adherence", "--videos", str(tmp_path)]
    command += ["--prompts", str(tmp_path / "prompts_two.csv"), "--output", str(tmp_path / "scores.json")]
    done = run_script(*command, "--patch", "16")
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "scores.json").read_text())
    plain, bordered = (video["borders"] for video in saved["videos"])
    assert plain == pytest.approx(1, abs=0.05) and bordered > 2
    mean = saved["scores"]["two"]["borders"]
    assert mean == (plain + bordered) / 2
    header, line = (line.split() for line in done.stdout.splitlines()[-2:])
    assert header[-4:] == ["noise", "borders", "positions", "sizes"] and line[-3] == f"{mean:.2f}"

    done = run_script(*command)
    assert done.returncode == 0 and "borders" not in done.stdout
    assert "borders" not in json.loads((tmp_path / "scores.json").read_text())["scores"]["two"]
    for wrong in (["--patch", "1"], ["--patch", "16", "--checkpoint", "x"]):
        flags = command[:1] if "--checkpoint" in wrong else command
        done = run_script(*flags, *wrong)
        assert done.returncode == 2 and f"patch = {wrong[1]}: must be at least 2" in done.stderr


def test_evaluate_takes_the_patches_of_a_checkpoint(tmp_path: Path) -> None:
    from scripts.evaluate_adherence import load

    pipe = tiny_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "pipeline")
    *_, patch = load(find_checkpoint_source(tmp_path / "pipeline"), [], "cpu")
    stride, size = pipe.codec.stride, pipe.transformer.config.patch_size
    assert patch == (stride[1] * size[1], stride[2] * size[2]) and min(patch) > 1
