"""scripts/evaluate_adherence.py: of folders of videos, models and codecs."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts import evaluate_adherence
from stdit.codecs.pixel import PixelCodec
from stdit.codecs.tiny import TinyCodec
from stdit.data.shapes.build import ShapesConfig, build, write_video
from stdit.data.shapes.render import render
from stdit.data.shapes.scenes import Scene
from stdit.data.shapes.worlds import WORLDS, sample_scene
from stdit.errors import UserError
from tests.data.shapes.clips import BASE, FEW, read, run_script
from tests.lora.tiny import write_random_adapter


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert build(folder, FEW["32"], workers=1)
    return folder


def evaluate(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script("evaluate_adherence", *args)


def test_evaluate_scores_a_folder_of_videos(built: Path, tmp_path: Path) -> None:
    rows = read(built / "prompts_heldout.csv")[:4]
    for i, row in enumerate(rows):
        shown = Scene(row["shape"], row["colour"], row["motion"], row["background"])
        if i == 0:
            shown = replace(shown, colour="blue" if shown.colour != "blue" else "red")
        write_video(tmp_path / f"{i}.mp4", render(shown), fps=8, crf=12)
        (tmp_path / f"{i}.json").write_text(json.dumps({"prompt": row["prompt"]}))
    (tmp_path / "!damaged.mp4").write_bytes(b"")  # the first by name
    for name, facts in (("stranger", None), ("list", "[]"), ("number", '{"prompt": [1]}')):
        write_video(tmp_path / f"{name}.mp4", render(BASE), fps=8, crf=12)
        if facts:
            (tmp_path / f"{name}.json").write_text(facts)
    done = evaluate(
        "--videos", tmp_path, "--prompts", built / "prompts_heldout.csv", "--output", tmp_path / "scores.json"
    )
    assert done.returncode == 0, done.stderr
    assert (
        "heldout" in done.stdout
        and "75.0%" in done.stdout
        and "4 of 8 videos have no known prompt" in done.stdout
    )
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


def test_evaluate_samples_a_checkpoint(built: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.pipelines.tiny import tiny_pipeline

    pipe = tiny_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
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
    assert outputs[0]["changed_settings"] == {"num_frames": 4, "size": 32, "num_inference_steps": 2}

    file = write_random_adapter(tmp_path / "lora", pipe.transformer)
    flags = ("--lora", f"{file}:0.5", "--world", "ring", "--output", tmp_path / "adapted.json")
    done = evaluate("--checkpoint", tmp_path / "run", "--prompts", few, *settings, *flags)
    assert done.returncode == 0, done.stderr
    adapted = json.loads((tmp_path / "adapted.json").read_text())
    assert adapted["changed_settings"]["lora"] == [f"{file}:0.5"]
    write_random_adapter(file, pipe.transformer, base_hash="xxh3:0")
    done = evaluate("--checkpoint", tmp_path / "run", "--prompts", few, *settings, *flags)
    assert done.returncode == 2 and "was trained on the weights xxh3:0" in done.stderr

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
    assert "trained without conditioning frames" in caplog.text
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
    assert done.returncode == 2 and "num_frames = 4: must be larger than the 4 conditioning" in done.stderr


def test_settings_without_an_effect_on_a_model_and_its_untrained_sizes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = Namespace(num_frames=16, size=32, **dict.fromkeys(evaluate_adherence.SAMPLING))
    sizes = [{"num_frames": 25, "height": 64, "width": 64, "fps": 12}]
    evaluate_adherence.check_sampling(args, {"trained_sizes": sizes, "fps": 12})
    assert (
        "16 frames of 32x32 at 12 fps: the model was not trained on that, but on 25 frames of 64x64"
        in caplog.text
    )
    args.refine_level = 0.5
    with pytest.raises(UserError, match="refine_level = 0.5 would have no effect"):
        evaluate_adherence.check_sampling(args, {})
    evaluate_adherence.check_sampling(args, {"refine_pairs": 2})


@pytest.fixture(scope="module")
def prompts64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert build(folder, replace(FEW["64"], num_clips=1), workers=1)
    return folder


def show(folder: Path, rows: list[dict[str, str]], changes: dict[int, dict[str, str]]) -> None:
    """Write videos of prompts of world 64 as sample.py does, some of them showing something else."""
    folder.mkdir()
    for i, row in enumerate(rows):
        shown = row | changes.get(i, {})
        act = ("relation", "other_shape", "other_colour") if shown["relation"] else ("motion",)
        combo = tuple(shown[name] for name in ("shape", "colour", *act))
        scene = sample_scene(np.random.default_rng(i), [combo], WORLDS["64"])
        frames = render(replace(scene, background=shown["background"]), 24, 64)
        write_video(folder / f"{i}.mp4", frames, fps=12, crf=12)
        (folder / f"{i}.json").write_text(json.dumps({"prompt": row["prompt"]}))


def test_evaluate_knows_world_64_by_its_prompts(prompts64: Path, tmp_path: Path) -> None:
    pairs, ones = read(prompts64 / "prompts_relations.csv")[:3], read(prompts64 / "prompts_heldout.csv")[:2]
    first = pairs[0]
    swapped = {"shape": first["other_shape"], "colour": first["other_colour"]}
    swapped |= {"other_shape": first["shape"], "other_colour": first["colour"]}
    alone = {"relation": "", "motion": "right"}
    show(tmp_path / "videos", pairs + ones, {0: swapped, 1: alone, 4: {"background": "vertical stripes"}})
    files = [prompts64 / f"prompts_{name}.csv" for name in ("heldout", "relations")]
    done = evaluate(
        "--videos", tmp_path / "videos", "--prompts", *files, "--output", tmp_path / "scores.json"
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "scores.json").read_text())
    relations, heldout = (saved["scores"][name] for name in ("relations", "heldout"))
    assert (relations["n"], relations["strict"], relations["lenient"]) == (3, 1 / 3, 1 / 3)
    assert relations["relation"] == 2 / 3 and "motion" not in relations
    assert heldout["strict"] == 1 / 2 and heldout["motion"] == 1 and "relation" not in heldout
    assert 0 <= heldout["noise"] < 2 and "noise" in done.stdout
    noises = {video["seen"]["background"]: video["noise"] for video in saved["videos"]}
    assert noises["vertical stripes"] is None and noises["black"] is not None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_frames", "0"], "num_frames = 0: must be from 1 to"),
        (["--size", "-8"], "size = -8: must be from 1 to"),
        (["--size", "64000"], "size = 64000: must be from 1 to"),
        (["--seed", "-1"], "seed = -1: must be from 0 to"),
        (["--seed", str(2**70)], "must be from 0 to"),
        (["--conditioning_frames", "0"], "conditioning_frames = 0: must be from 1 to"),
        (["--refine_level", "2"], "refine_level = 2.0: must be between"),
        (["--guidance_scale", "-1"], "guidance_scale = -1.0: must be at least 0"),
        (["--num_inference_steps", "0"], "num_inference_steps = 0: must be"),
        (["--videos", "videos", "--refine_pairs", "4"], "--refine_pairs has no effect with --videos"),
        (["--videos", "videos", "--size", "32"], "--size has no effect with --videos"),
        (["--videos", "videos", "--seed", "1"], "--seed has no effect with --videos"),
        (["--codec", "codec", "--guidance_scale", "2"], "--guidance_scale has no effect with --codec"),
        (["--codec", "codec", "--conditioning", "first"], "--conditioning has no effect with --codec"),
        (["--conditioning_frames", "4"], "--conditioning_frames has no effect without --conditioning"),
        (["--codec", "codec", "--lora", "lora"], "--lora has no effect with --codec"),
        (["--codec", "codec", "--lora_other_base"], "--lora_other_base has no effect with --codec"),
        (["--lora", "absent"], "lora absent: there is no such file"),
        (["--world", "ring"], "--world has no effect without --prompts: add them"),
        (["--output", "."], "output . is a folder: name a file, such as scores.json"),
    ],
)
def test_evaluate_rejects_settings_without_a_meaning(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate_adherence.py", *flags])
    with pytest.raises(UserError, match=said):
        evaluate_adherence.main()


def test_videos_of_world_64_are_scored_by_its_prompts(
    prompts64: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(FEW["64"], num_clips=1)
    monkeypatch.setattr(ShapesConfig, "of", lambda world: few)
    rows = [read(prompts64 / f"prompts_{name}.csv")[0] for name in ("sample", "heldout", "relations")]
    show(tmp_path / "videos", rows, {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", "evaluate_adherence.py --videos videos --output scores.json".split())
    evaluate_adherence.main()
    scores = json.loads(Path("scores.json").read_text())["scores"]
    assert {name: found["lenient"] for name, found in scores.items()} == dict.fromkeys(
        ("sample", "heldout", "relations"), 1
    )


def test_evaluate_scores_a_codec_by_clips_of_the_prompts(built: Path, tmp_path: Path) -> None:
    rows = (built / "prompts_heldout.csv").read_text().splitlines()[:4]
    (tmp_path / "prompts_few.csv").write_text("\n".join(rows) + "\n")
    PixelCodec().save_pretrained(tmp_path / "pixel")
    evaluated = ("--prompts", tmp_path / "prompts_few.csv", "--output", tmp_path / "scores.json")
    done = evaluate("--codec", tmp_path / "pixel", *evaluated)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]["few"]
    assert scores["n"] == 3 and scores["strict"] == 1 and scores["noise"] < 2  # that of h264
    torch.manual_seed(0)
    TinyCodec().save_pretrained(tmp_path / "untrained")
    done = evaluate("--codec", tmp_path / "untrained", *evaluated)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["few"]["strict"] == 0
    done = evaluate("--codec", tmp_path / "absent", *evaluated)
    assert done.returncode and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
