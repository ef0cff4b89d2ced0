"""The same sampling command again: finished videos are kept, the others made, and a failure leaves nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from stdit.checkpoint_files import read_meta, write_manifest
from stdit.errors import UserError
from stdit.hashing import hash_file
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.contact_sheet import read_contents
from stdit.pipelines.finished import compared
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.sampling import sample_to_files
from stdit.pipelines.video_io import read_metadata
from tests import warm
from tests.launch import launch
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_model, tiny_pipeline, write_run

PROMPTS = ["a red circle", "a blue square", "a green cross", "a grey line"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return write_run(folder / "outputs" / "tiny", tiny_pipeline(folder))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


@pytest.fixture
def config(run: Path, prompts: Path, tmp_path: Path) -> SampleConfig:
    return SampleConfig(checkpoint=str(run), prompts=str(prompts), output=str(tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.mp4"))


INTERRUPTED = """
import os, runpy, signal, sys
from stdit.pipelines.pipeline import STDiTPipeline

denoise, videos = STDiTPipeline.denoise, []

def interrupted(*args):
    videos.append(1)
    if len(videos) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return denoise(*args)

STDiTPipeline.denoise = interrupted
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
"""Runs a script; Ctrl-C comes when the third video is begun."""


def test_the_same_command_resumes_an_interrupted_one(run: Path, prompts: Path, tmp_path: Path) -> None:
    def command(output: str) -> list[str]:
        settings = ["--batch_size", "1", "--num_inference_steps", "2", "--output", str(tmp_path / output)]
        script = str(warm.ROOT / "sample.py")
        return [script, "--checkpoint", str(run), "--prompts", str(prompts), *settings]

    out, script = tmp_path / "out", tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    stopped = warm.run([str(script), *command("out")])
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr, stopped.stderr
    before = contents(out)
    assert len(stems(out)) == 2 and "sheet.png" not in before

    again = warm.run(command("out"))
    assert again.returncode == 0, again.stderr
    assert "2 of 4 videos are finished already: skipped" in again.stdout
    after = contents(out)
    assert {name: after[name] for name in before} == before
    whole = warm.run(command("whole"))
    assert whole.returncode == 0, whole.stderr
    expected = contents(tmp_path / "whole")
    assert after.keys() == expected.keys() and "sheet.png" in after
    assert all(after[name] == expected[name] for name in expected if name != "sheet.png")
    assert read_contents(out / "sheet.png") == read_contents(tmp_path / "whole" / "sheet.png")
    assert [one["prompt"] for one in read_contents(out / "sheet.png")] == PROMPTS

    once_more = warm.run(command("out"))
    assert once_more.returncode == 0 and "all 4 videos are finished already" in once_more.stdout
    assert contents(out) == after


@pytest.mark.parametrize("ranks, sp, cfg", [pytest.param(2, 1, 1, marks=pytest.mark.slow), (4, 2, 2)])
def test_several_ranks_make_only_what_is_missing(
    run: Path, config: SampleConfig, tmp_path: Path, ranks: int, sp: int, cfg: int
) -> None:
    sample_to_files(config)
    out = tmp_path / "out"
    (out / "sheet.png").unlink()
    for path in out.glob("001-*"):
        path.unlink()
    before = contents(out)
    assert config.prompts is not None
    flags = ["--checkpoint", str(run), "--prompts", config.prompts, "--output", str(out)]
    mesh = ["--parallel.sp", str(sp), "--parallel.cfg", str(cfg)]
    code, output, errors = launch("sample.py", ranks, [*flags, *mesh], "warm")
    assert code == 0, errors
    assert output.count("3 of 4 videos are finished already: skipped") == 1
    after = contents(out)
    assert after.keys() - before.keys() == {
        "001-a-blue-square-seed0.mp4",
        "001-a-blue-square-seed0.json",
        "sheet.png",
    }
    assert {name: after[name] for name in before} == before
    assert [one["prompt"] for one in read_contents(out / "sheet.png")] == PROMPTS


def test_files_with_other_settings_stay_and_are_named(
    config: SampleConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_to_files(config)
    before = contents(tmp_path / "out")
    capsys.readouterr()
    sample_to_files(replace(config, guidance_scale=3.0))
    said = capsys.readouterr().out
    assert "000-a-red-circle-seed0.mp4 stays as it is (guidance_scale = 1.5, not 3.0), and 3 more: " in said
    assert "finished already" not in said
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert len(after) == 2 * len(before) and "000-a-red-circle-seed0-2.mp4" in after
    for settings in ({}, {"guidance_scale": 3.0}):
        assert sample_to_files(replace(config, **settings)) == []
    assert contents(tmp_path / "out") == after


def test_another_checkpoint_makes_other_videos(
    config: SampleConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_to_files(config)
    assert len(sample_to_files(replace(config, ema=False))) == 9
    assert "stays as it is (checkpoint_hash = xxh3:" in capsys.readouterr().out


def test_damaged_and_missing_files_are_made(
    config: SampleConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sample_to_files(config)
    first, second, third, _ = (out / f"{stem}.mp4" for stem in stems(out))
    first.write_bytes(first.read_bytes()[:-30])  # its metadata stand at the front
    second.with_suffix(".json").unlink()
    third.unlink()
    written = sample_to_files(config)
    assert {path.name for path in written} == {
        *(f"000-a-red-circle-seed0-2.{kind}" for kind in ("mp4", "json")),
        second.with_suffix(".json").name,
        *(f"{third.stem}.{kind}" for kind in ("mp4", "json")),
        "sheet-2.png",
    }
    said = capsys.readouterr().out
    assert f"{first.name} stays as it is (it is cut short)" in said
    assert "2 of 4 videos are finished already" in said
    assert json.loads(second.with_suffix(".json").read_text())["files"] == [second.name]


def test_what_is_recorded_of_the_training_makes_no_other_video(
    config: SampleConfig, run: Path, tmp_path: Path
) -> None:
    """An earlier version, which recorded less, has made the same videos from these weights."""
    sample_to_files(config)
    changed = Path(shutil.copytree(run, tmp_path / "changed"))
    folder = changed / "checkpoints" / "step-00000010"
    meta = {name: value for name, value in read_meta(folder).items() if name not in ("files", "format")}
    write_manifest(folder, {**meta, "lineage": [{"step": 4}]})
    assert load_pipeline(changed)[0].config["lineage"] == [{"step": 4}]
    assert sample_to_files(replace(config, checkpoint=str(changed))) == []


def test_a_damaged_json_is_written_again(config: SampleConfig, tmp_path: Path) -> None:
    sample_to_files(config)
    file = tmp_path / "out" / "001-a-blue-square-seed0.json"
    expected = file.read_bytes()
    file.write_bytes(expected[:-9])
    assert sample_to_files(config) == [file] and file.read_bytes() == expected


def test_a_video_is_found_when_its_prompt_has_moved_or_appears_twice(
    config: SampleConfig, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_to_files(config)
    prompts.write_text("\n".join(["something new", *PROMPTS, PROMPTS[0]]))
    written = sample_to_files(replace(config, format="mp4"))
    assert [path.name for path in written if path.suffix == ".mp4"] == [
        "000-something-new-seed0.mp4",
        "005-a-red-circle-seed0.mp4",
    ]
    again = sample_to_files(replace(config, format=["mp4", "gif"]))
    assert {path.suffix for path in again} == {".gif", ".json"} and len(again) == 12
    metadata = json.loads((tmp_path / "out" / "000-a-red-circle-seed0.json").read_text())
    assert metadata["files"] == ["000-a-red-circle-seed0.mp4", "000-a-red-circle-seed0.gif"]


def test_files_name_no_folder_of_the_machine(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the working folder are named by their paths in it, others by name and hash: they may be anywhere."""
    lora = write_random_adapter(tmp_path / "loras" / "style.safetensors", tiny_model())
    pictures = [tmp_path / folder / "x.png" for folder in ("red", "blue")]
    for picture in pictures:
        picture.parent.mkdir()
        PIL.Image.new("RGB", (8, 8), picture.parent.name).save(picture)
    config = SampleConfig(
        checkpoint=str(run),
        prompt="a",
        lora=[str(lora)],
        image=str(pictures[0]),
        condition=[f"{pictures[1]}@-1"],
        output=str(tmp_path / "out"),
    )
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    files = sample_to_files(config)
    for file in files:
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content and str(run.parent).encode() not in content, file
    facts = read_metadata(files[0])
    blue = f"{hash_file(pictures[1])}/x.png"
    assert facts["checkpoint"] == "tiny/checkpoints/step-00000010"
    assert facts["loras"][0]["file"] == "style.safetensors" and facts["image"] == "x.png"
    assert facts["conditions"] == [f"{blue}@-1::1"]
    assert facts["conditioning_files"] == {"x.png": hash_file(pictures[0]), blue: hash_file(pictures[1])}

    monkeypatch.chdir(tmp_path)
    assert sample_to_files(config) == []
    inside = read_metadata(sample_to_files(replace(config, output="again"))[0])
    assert list(inside["conditioning_files"]) == ["red/x.png", "blue/x.png"]
    assert inside["loras"][0]["file"] == "loras/style.safetensors"


def test_a_sheet_alone_is_not_made_twice(config: SampleConfig, tmp_path: Path) -> None:
    assert len(sample_to_files(replace(config, format="png"))) == 5
    assert sample_to_files(replace(config, format="png")) == []
    assert len(sample_to_files(replace(config, format="png", num_inference_steps=2))) == 5


def test_a_failure_leaves_no_empty_folder(
    config: SampleConfig, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    nested = replace(config, output=str(tmp_path / "samples" / "of" / "today"))
    with monkeypatch.context() as patch:
        patch.setattr(STDiTPipeline, "denoise", fails)
        with pytest.raises(UserError, match="more memory"):
            sample_to_files(nested)
    assert not (tmp_path / "samples").exists()

    with monkeypatch.context() as patch:
        patch.setattr("stdit.pipelines.video_io.write_mp4", fails)
        with pytest.raises(RuntimeError):
            sample_to_files(nested)
    assert not (tmp_path / "samples").exists()

    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "codec" / "codec.json").write_text("{")
    result = warm.run(
        [str(warm.ROOT / "sample.py"), "--checkpoint", str(broken), "--prompt", "a"], cwd=tmp_path
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert not (broken / "samples").exists()


def test_odd_sizes_say_what_the_file_has(run: Path, tmp_path: Path) -> None:
    import av

    flags = ["--checkpoint", str(run), "--prompt", "a", "--height", "9", "--width", "7", "--output", "out"]
    result = warm.run([str(warm.ROOT / "sample.py"), *flags, "--format", "mp4"], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "height = 9, width = 7: H.264 needs even sizes, so the mp4 has 8 x 10" in result.stderr
    (path,) = (tmp_path / "out").glob("*.mp4")
    with av.open(str(path)) as container:
        size = (container.streams.video[0].height, container.streams.video[0].width)
    beside = json.loads(path.with_suffix(".json").read_text())
    for metadata in (beside, read_metadata(path)):
        assert (metadata["height"], metadata["width"]) == size == (10, 8)
        assert metadata["padded_from"] == {"height": 9, "width": 7}
    again = warm.run([str(warm.ROOT / "sample.py"), *flags, "--format", "mp4"], cwd=tmp_path)
    assert "the video is finished already" in again.stdout


def test_videos_of_versions_without_a_setting_had_its_default() -> None:
    old = {"prompt": "a", "seed": 0, "model_calls": 8}
    new = {
        **old,
        "solver": None,
        "cache": "off",
        "pab": [],
        "pab_timesteps": (450.0, 930.0),
        "model_calls": 7,
    }
    assert compared(old) == compared(new) != compared({**new, "cache": "slow"})
    whole_paths = {**old, "image": "/a/x.png", "conditions": ["/a/x.png@3:1:1"]}
    names = {**old, "image": "x.png", "conditions": ["x.png@3:1:1"]}
    assert compared({**whole_paths, "conditioning_files": {"/a/x.png": "xxh3:1"}}) == compared(
        {**names, "conditioning_files": {"x.png": "xxh3:1"}}
    )
