"""The embedded data set: scenes, captions, files and checker."""

import csv
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stdit.data.manifest.rows import near_misses
from stdit.data.shapes import build as build_module
from stdit.data.shapes.build import ShapesConfig, build, draw_clip, draw_prompts, write_video
from stdit.data.shapes.captions import SEEN, TEMPLATES, UNSEEN, UNSEEN_TEMPLATES, caption, paraphrase
from stdit.data.shapes.checker import check, score
from stdit.data.shapes.render import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    render,
    sample_scene,
    split_combinations,
)
from stdit.errors import UserError
from tests import warm

ROOT = Path(__file__).parents[2]
COMBOS = [(s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS]
BASE = Scene("circle", "red", "right", "black")


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, COMBOS) for _ in range(count)]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


# ---- scenes ----


def test_render_is_deterministic_and_follows_the_motion() -> None:
    scene = Scene("square", "blue", "right", "black", x=12, y=16, travel=8, radius=5)
    first, again = render(scene), render(scene)
    assert first.shape == (16, 32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    columns = np.arange(32) + 0.5
    blue = first[..., 2].astype(float).sum(1)  # [T W]
    centres = blue @ columns / blue.sum(1)
    assert centres[0] == pytest.approx(12, abs=0.1) and centres[-1] == pytest.approx(20, abs=0.1)
    assert tuple(first[0, 16, 12]) == COLOURS["blue"]


def test_render_is_anti_aliased_and_scales() -> None:
    small, large = render(BASE), render(BASE, size=64)
    partial = (small[..., 0] > 20) & (small[..., 0] < 200)
    assert partial.any()
    halved = large.astype(float).reshape(16, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(halved - small).mean() < 1.0


def test_scenes_vary_over_their_full_ranges() -> None:
    many = scenes(400)
    for name, low, high in (("x", 11, 21), ("y", 11, 21), ("travel", 6.96, 9.04), ("radius", 5.22, 6.78)):
        values = [getattr(scene, name) for scene in many]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high >= max(values) > high - 0.05 * (high - low)
    assert {scene.background for scene in many} == set(BACKGROUNDS)


@pytest.mark.parametrize("seed", range(5))
def test_split_holds_out_a_quarter_and_keeps_all_pairs(seed: int) -> None:
    train, held_out = split_combinations(seed)
    assert sorted(train + held_out) == sorted(COMBOS)
    assert len(held_out) >= len(COMBOS) / 4
    for i, j in combinations(range(3), 2):
        assert {(c[i], c[j]) for c in train} == {(c[i], c[j]) for c in COMBOS}
    assert split_combinations(seed) == (train, held_out)


def test_split_depends_on_the_seed() -> None:
    assert split_combinations(0)[1] != split_combinations(1)[1]


# ---- captions ----


def test_captions_are_deterministic_and_vary() -> None:
    texts = [caption(BASE, np.random.default_rng(i)) for i in range(200)]
    assert texts == [caption(BASE, np.random.default_rng(i)) for i in range(200)]
    assert len(set(texts)) > 195
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]|[{}|]|  ", text) for text in texts)


def test_every_value_has_many_words() -> None:
    for options in SEEN.values():
        assert all(len(set(wordings)) >= 12 for wordings in options.values())
    for options in UNSEEN.values():
        assert all(len(set(wordings)) >= 2 for wordings in options.values())
    assert {"shape", "colour", "motion"} <= set(UNSEEN)
    assert len(TEMPLATES) >= 20 and not set(TEMPLATES) & set(UNSEEN_TEMPLATES)


def test_no_phrase_names_two_values() -> None:
    for lists in (SEEN, UNSEEN):
        for options in lists.values():
            for one, other in combinations(options.values(), 2):
                assert not set(one) & set(other)


def test_unseen_words_never_occur_in_training_captions() -> None:
    phrases = [phrase for options in SEEN.values() for values in options.values() for phrase in values]
    trained = set().union(*map(words, phrases), *(words(re.sub(r"{.}", "", text)) for text in TEMPLATES))
    for options in UNSEEN.values():
        for phrase in (phrase for values in options.values() for phrase in values):
            assert not words(phrase) & trained, phrase
    # The lists above are all that captions are made of:
    rng = np.random.default_rng(0)
    for scene in scenes(2000):
        spoken = words(caption(scene, rng)) - {"an"}
        assert spoken <= trained


def unseen_names(text: str, scene: Scene) -> set[str]:
    """Return the attributes for which a text uses a held-out word."""
    forms = {name: [f for o in UNSEEN[name][scene.attributes[name]] for f in _forms(o)] for name in UNSEEN}
    return {name for name in forms if any(re.search(rf"\b{form}\b", text) for form in forms[name])}


def test_paraphrases_use_unseen_words() -> None:
    rng = np.random.default_rng(0)
    some = [unseen_names(paraphrase(scene, rng), scene) for scene in scenes(300)]
    assert all(some) and {len(names) for names in some} == {1, 2, 3}
    for scene in scenes(300):
        text = paraphrase(scene, rng, strict=True)
        assert unseen_names(text, scene) == {"shape", "colour", "motion"}, text


def _forms(option: str) -> list[str]:
    """Return both inflections of a verb phrase `third|participle rest`, or the phrase itself."""
    if "|" not in option:
        return [option]
    third, rest = option.split("|")
    return [rest, " ".join([third, *rest.split(" ")[1:]])]


# ---- checker ----


def encoded(frames: np.ndarray, path: Path, crf: int = 12) -> np.ndarray:
    write_video(path, frames, fps=8, crf=crf)
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def accuracy(videos: list[np.ndarray], shown: list[Scene]) -> float:
    return float(np.mean([score(v, s.attributes)["strict"] for v, s in zip(videos, shown, strict=True)]))


def test_checker_is_right_on_rendered_clips() -> None:
    shown = scenes(400, seed=1)
    assert accuracy([render(scene) for scene in shown], shown) >= 0.99


@pytest.mark.parametrize("crf", [pytest.param(12, marks=pytest.mark.slow), 24])
def test_checker_is_right_after_h264(tmp_path: Path, crf: int) -> None:
    shown = scenes(300, seed=2)
    videos = [encoded(render(scene), tmp_path / "clip.mp4", crf) for scene in shown]
    assert videos[0].shape == (16, 32, 32, 3)
    assert accuracy(videos, shown) >= 0.99


def test_checker_accepts_blur_and_faint_noise() -> None:
    shown = scenes(100, seed=3)
    rng = np.random.default_rng(0)
    videos = []
    for scene in shown:
        video = render(scene).astype(float)
        for axis in (1, 2):
            video = (np.roll(video, 1, axis) + 2 * video + np.roll(video, -1, axis)) / 4
        videos.append((video + rng.normal(0, 8, video.shape)).clip(0, 255).astype(np.uint8))
    assert accuracy(videos, shown) >= 0.98


@pytest.mark.parametrize(("size", "frames"), [(64, 16), (48, 9), (128, 24)])
def test_checker_accepts_other_sizes(size: int, frames: int) -> None:
    shown = scenes(20, seed=4)
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


def test_checker_rejects_still_jumping_and_shuffled_objects() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(40, seed=5):
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


def test_checker_rejects_every_other_value() -> None:
    values: dict[str, Iterable[str]] = {
        "shape": SHAPES,
        "colour": COLOURS,
        "motion": MOTIONS,
        "background": BACKGROUNDS,
    }
    for scene in scenes(30, seed=6):
        right = score(render(scene), scene.attributes)
        assert all(right.values())
        for name, options in values.items():
            for value in set(options) - {scene.attributes[name]}:
                change: dict[str, Any] = {name: value}
                wrong = score(render(replace(scene, **change)), scene.attributes)
                assert not (wrong[name] or wrong["strict"] or wrong["lenient"]), (scene, name, value)
                assert all(wrong[other] for other in values if other != name)
                assert wrong["shape_lenient"] == (name != "shape")


@pytest.mark.parametrize("shape", SHAPES)
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


@pytest.mark.parametrize("stranger", ["diamond", "ring", "ellipse", "rectangle", "upside down", "two"])
def test_checker_rejects_unknown_shapes(stranger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triangle = SHAPES["triangle"]
    outlines = {
        "diamond": lambda u, v: (np.abs(u) + np.abs(v)) / np.sqrt(2) - 0.9,
        "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.8) - 0.3,
        "ellipse": lambda u, v: np.hypot(u / 1.2, v * 1.2) - 1.0,
        "rectangle": lambda u, v: np.maximum(np.abs(u / 1.2), np.abs(v * 1.2)) - 0.9,
        "upside down": lambda u, v: triangle(u, -v),
        "two": lambda u, v: np.hypot(np.abs(u) - 0.9, v) - 0.6,
    }
    for scene in scenes(30, seed=7):
        with monkeypatch.context() as patch:
            patch.setitem(SHAPES, stranger, outlines[stranger])
            video = render(replace(scene, shape=stranger))
        assert check(video).shape is None


def test_checker_rejects_morphs_and_changing_colours() -> None:
    for scene in scenes(30, seed=8):
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
    assert check(video).colour is None and check(video).shape == "circle"


def test_checker_requires_uint8() -> None:
    with pytest.raises(ValueError, match="uint8"):
        check(np.zeros((16, 32, 32, 3), np.float32))


# ---- files ----

SMALL = ShapesConfig(num_clips=12, seed=3)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert build(folder, SMALL, workers=1)
    return folder


def test_build_writes_clips_that_show_their_captions(built: Path) -> None:
    rows = read(built / "manifest.csv")
    assert len(rows) == 12 and {row["text"] for row in rows} == {draw_clip(i, SMALL)[1] for i in range(12)}
    assert near_misses(rows[0]) == []
    train, _ = split_combinations(SMALL.seed)
    for row in rows:
        assert (row["shape"], row["colour"], row["motion"]) in train
        with av.open(built / row["path"]) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert frames.shape == (*(int(row[key]) for key in ("num_frames", "height", "width")), 3)
        assert score(frames, row)["strict"]
    assert not list(built.parent.glob("*.tmp"))


def test_build_writes_prompts(built: Path) -> None:
    train, held_out = split_combinations(SMALL.seed)
    trained = {row["text"] for row in read(built / "manifest.csv")}
    for name, combos in (
        ("heldout", held_out),
        ("paraphrase", held_out),
        ("paraphrase_strict", held_out),
        ("seen", train),
    ):
        rows = read(built / f"prompts_{name}.csv")
        assert len(rows) >= 96 and len({row["prompt"] for row in rows}) == len(rows)
        assert {(row["shape"], row["colour"], row["motion"]) for row in rows} == set(combos)
        assert {row["background"] for row in rows} == set(BACKGROUNDS)
        assert not trained & {row["prompt"] for row in rows}
        for row in rows:
            scene = Scene(row["shape"], row["colour"], row["motion"], row["background"])
            unseen = len(unseen_names(row["prompt"], scene))
            least, most = {"paraphrase": (1, 3), "paraphrase_strict": (3, 3)}.get(name, (0, 0))
            assert least <= unseen <= most, row
    sample = (built / "prompts.txt").read_text().splitlines()
    rows = read(built / "prompts_sample.csv")
    assert sample == [row["prompt"] for row in rows] and len(sample) == 8
    assert {row["shape"] for row in rows} == set(SHAPES) and len({row["motion"] for row in rows}) >= 5


def test_prompts_avoid_given_texts() -> None:
    once = draw_prompts("heldout", [("circle", "red", "up")], 1, seed=0)
    again = draw_prompts("heldout", [("circle", "red", "up")], 1, 0, frozenset({once[0]["prompt"]}))
    assert once[0]["prompt"] != again[0]["prompt"] and once[0]["shape"] == again[0]["shape"]


def test_build_is_deterministic_in_any_number_of_processes(built: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "shapes", SMALL, workers=2)
    assert digests(tmp_path / "shapes") == digests(built)
    assert build(tmp_path / "other", replace(SMALL, seed=4), workers=1)
    assert digests(tmp_path / "other")["videos/00000.mp4"] != digests(built)["videos/00000.mp4"]


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(30, seed=9):
        files = set()
        for _ in range(3):
            _leave_garbage_in_memory(rng)
            write_video(tmp_path / "clip.mp4", render(scene), fps=8, crf=12)
            files.add((tmp_path / "clip.mp4").read_bytes())
        assert len(files) == 1, scene


def _leave_garbage_in_memory(rng: np.random.Generator) -> None:
    """Fill memory that is then freed: an encoder that reads uninitialised memory shows it only if it is not zero."""
    garbage = [np.frombuffer(rng.bytes(int(n)), np.uint8).copy() for n in rng.integers(100, 200_000, 40)]
    del garbage


def test_build_reuses_and_replaces(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    config = ShapesConfig(num_clips=2)
    assert build(folder, config, workers=1)
    before = (folder / "manifest.csv").stat().st_mtime_ns
    assert not build(folder, config, workers=1)
    assert (folder / "manifest.csv").stat().st_mtime_ns == before
    (folder / "stdit-cache").mkdir()
    (folder / "stdit-cache" / "mine").write_text("hours of encoding")
    said = build(folder, replace(config, num_clips=3), workers=1)
    assert said == "written in place of those of num_clips 2; other files in the folder stay"
    assert len(read(folder / "manifest.csv")) == 3 and len(list((folder / "videos").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert (folder / "stdit-cache" / "mine").read_text() == "hours of encoding"
    build(folder, config, workers=1)
    assert len(list((folder / "videos").iterdir())) == 2


def test_a_replacement_that_is_interrupted_is_not_taken_for_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "shapes", ShapesConfig(num_clips=2)
    build(folder, config, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(build_module.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(folder, replace(config, num_clips=3), workers=1)
    assert build(folder, config, workers=1)
    assert len(read(folder / "manifest.csv")) == 2 == len(list((folder / "videos").iterdir()))


def test_build_starts_over_when_the_words_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ShapesConfig(num_clips=1)
    assert build(tmp_path / "shapes", config, workers=1)
    monkeypatch.setitem(SEEN["colour"], "red", ("reddish",))
    assert build(tmp_path / "shapes", config, workers=1)


def test_interrupted_build_leaves_nothing_and_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shapes"
    (tmp_path / "shapes.tmp" / "videos").mkdir(parents=True)  # as after kill -9
    (tmp_path / "shapes.tmp" / "videos" / "left.mp4").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_write_csv", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(folder, SMALL, workers=1)
    assert not list(tmp_path.iterdir())
    assert build(folder, SMALL, workers=1) and not (folder / "videos" / "left.mp4").exists()


def test_build_never_replaces_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not written by this command"):
        build(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not written by this command"):
        build(tmp_path / "file", SMALL)
    with pytest.raises(UserError, match="cannot be written"):
        build(tmp_path / "file" / "shapes", SMALL)


@pytest.mark.parametrize("wrong", [{"num_clips": 0}, {"size": 33}, {"size": 16}, {"seed": -1}, {"fps": 0}])
def test_settings_out_of_range_are_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        ShapesConfig(**wrong)


# ---- scripts/evaluate_adherence.py ----


def evaluate(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return warm.run(["scripts/evaluate_adherence.py", *map(str, args)])


def test_evaluate_scores_a_folder_of_videos(built: Path, tmp_path: Path) -> None:
    rows = read(built / "prompts_heldout.csv")[:4]
    for i, row in enumerate(rows):
        shown = Scene(row["shape"], row["colour"], row["motion"], row["background"])
        if i == 0:
            shown = replace(shown, colour="blue" if shown.colour != "blue" else "red")
        write_video(tmp_path / f"{i}.mp4", render(shown), fps=8, crf=12)
        (tmp_path / f"{i}.json").write_text(json.dumps({"prompt": row["prompt"]}))
    write_video(tmp_path / "stranger.mp4", render(BASE), fps=8, crf=12)
    done = evaluate(
        "--videos", tmp_path, "--prompts", built / "prompts_heldout.csv", "--output", tmp_path / "scores.json"
    )
    assert done.returncode == 0, done.stderr
    assert "heldout" in done.stdout and "75.0%" in done.stdout and "stranger.mp4" in done.stdout
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["scores"]["heldout"]["n"] == 4
    heldout = saved["scores"]["heldout"]
    assert (heldout["strict"], heldout["lenient"], heldout["shape"], heldout["shape_lenient"]) == (
        0.75,
        0.75,
        1,
        1,
    )
    assert [video["right"]["colour"] for video in saved["videos"]] == [False, True, True, True]


@pytest.mark.parametrize(
    "case",
    [
        "no videos",
        "no prompts file",
        "wrong columns",
        "nothing known",
        "no output",
        "no shape",
        "no text",
        "no video",
    ],
)
def test_evaluate_rejects_bad_input(case: str, built: Path, tmp_path: Path) -> None:
    prompts = built / ("missing.csv" if case == "no prompts file" else "prompts_heldout.csv")
    if case == "wrong columns":
        prompts = built / "manifest.csv"
    if case in ("no shape", "no text"):
        prompts = tmp_path / "odd.csv"
        prompts.write_bytes(
            b"prompt,shape,colour,motion,background\na,cube,red,up,black\n"
            if case == "no shape"
            else b"\xff\n"
        )
    if case == "no video":
        (tmp_path / "a.mp4").write_bytes(b"cut off")
        (tmp_path / "a.json").write_text(json.dumps({"prompt": read(prompts)[0]["prompt"]}))
    if case in ("nothing known", "no shape", "no text"):
        write_video(tmp_path / "a.mp4", render(BASE), fps=8, crf=12)
        (tmp_path / "a.json").write_text(json.dumps({"prompt": "a cat"}))
    output = ["--output", prompts / "scores.json"] if case == "no output" else []
    done = evaluate("--videos", tmp_path, "--prompts", prompts, *output)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    said = {
        "no shape": "shape = cube: must be one of circle",
        "no text": "is not a CSV in UTF-8",
        "no video": "a.mp4",
    }
    assert said.get(case, "") in done.stderr


def test_evaluate_samples_a_checkpoint(built: Path, tmp_path: Path) -> None:
    from tests.pipelines.tiny import tiny_pipeline

    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "run" / "pipeline")
    few = tmp_path / "prompts_few.csv"
    few.write_text("".join((built / "prompts_paraphrase.csv").read_text().splitlines(keepends=True)[:6]))
    settings = ("--num_frames", "4", "--size", "32", "--num_inference_steps", "2", "--batch_size", "2")
    outputs = []
    for name, batch in (("a", "2"), ("b", "5")):
        output = tmp_path / f"{name}.json"
        done = evaluate(
            "--checkpoint", tmp_path / "run", "--prompts", few, "--output", output, *settings[:-1], batch
        )
        assert done.returncode == 0, done.stderr
        assert "few" in done.stdout and "paraphrase" not in done.stdout
        outputs.append(json.loads(output.read_text()))
    assert (
        outputs[0]["scores"]["few"]["n"] == 5 and outputs[0]["scores"]["few"]["strict"] == 0
    )  # random weights
    assert outputs[0] == outputs[1]

    conditioned = (
        "--conditioning",
        "first",
        "last",
        "--conditioning_frames",
        "1",
        "--output",
        tmp_path / "conditioned.json",
    )
    done = evaluate("--checkpoint", tmp_path / "run", "--prompts", few, *settings, *conditioned)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "conditioned.json").read_text())
    assert found["scores"]["few"]["kept"] == 1 and all(
        row["conditioning_error"] < 1 for row in found["videos"]
    )
    done = evaluate(
        "--checkpoint",
        tmp_path / "run",
        "--prompts",
        few,
        *settings,
        *conditioned[:3],
        "--conditioning_frames",
        "2",
    )
    assert done.returncode == 2 and "num_frames = 4 must be larger" in done.stderr
