import copy
import json
import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest
import torch

from stdit.codecs.stored_text import store_text
from stdit.errors import UserError
from stdit.hashing import hash_file
from stdit.pipelines.config import SampleConfig, VideoSettings
from stdit.pipelines.requests import Request, plan_requests
from stdit.pipelines.runner import sample_videos
from stdit.pipelines.sampling import sample_to_files
from stdit.pipelines.segments import Segments
from stdit.pipelines.video_io import read_metadata
from stdit.pipelines.writer import VideoWriter, free_stem, slug
from stdit.settings import parse
from tests.pipelines.tiny import write_run


def picture(path, colour="red"):
    PIL.Image.new("RGB", (8, 8), colour).save(path)
    return str(path)


def test_precedence_of_line_command_and_pipeline(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "fps": 4, "seed": 9, "negative_prompt": "c"}\n{"prompt": "b"}\n')
    config = SampleConfig(
        prompts=str(file),
        fps=6,
        num_samples=2,
        seed=1,
        negative_prompt="d",
        resolution="256",
        aspect_ratio="16:9",
    )
    requests = plan_requests(config)
    assert [(r.prompt, r.seed, r.settings.fps, r.index) for r in requests] == [
        ("a", 9, 4, 0),
        ("a", 10, 4, 0),
        ("b", 1, 6, 1),
        ("b", 2, 6, 1),
    ]
    assert [r.negative_prompt for r in requests] == ["c", "c", "d", "d"]
    assert requests[0].settings.num_frames is None and requests[0].settings.height == 192


def test_list_of_seeds_and_named_size():
    requests = plan_requests(SampleConfig(prompt="a", seeds=[5, 3], resolution="256", aspect_ratio="1:1"))
    assert [(r.seed, r.negative_prompt) for r in requests] == [(5, None), (3, None)]
    assert (requests[0].settings.height, requests[0].settings.width) == (256, 256)


@pytest.mark.parametrize(
    "text", ["[a b]", "[a, b]", "null", "123", "true", "{a}", "a: b", "- a", "# a", "&a", '"a"']
)
def test_a_prompt_is_used_verbatim(text):
    config = parse(SampleConfig, ["--prompt", text, f"--negative_prompt={text}"])
    (request,) = plan_requests(config)
    assert request.prompt == request.negative_prompt == text


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(), "no prompt"),
        (dict(prompt="  "), "no prompt"),
        (dict(prompt="a", prompts="b.txt"), "both prompt and prompts"),
        (dict(prompts="absent.txt"), "no such file"),
        (dict(prompt="a", num_frames=0), "num_frames = 0"),
        (dict(prompt="a", num_frames=10**20), "num_frames = 1.*must be a whole number from 1 to 16384"),
        (dict(prompt="a", resolution="16384", aspect_ratio="99:1"), "prompt 0: width = 163018"),
        (dict(prompt="a", height=8), "width is missing"),
        (dict(prompt="a", height=8, width=8, resolution="240p"), "both resolution and height/width"),
        (dict(prompt="a", aspect_ratio="16:9"), "without a resolution"),
        (dict(prompt="a", resolution="240p"), "resolution = 240p without an aspect_ratio"),
        (dict(prompt="a", resolution="huge", aspect_ratio="1:1"), "resolution 'huge'"),
        (dict(prompt="a", resolution="240p", aspect_ratio="wide"), "aspect_ratio 'wide'"),
        (dict(prompt="a", seed=-1), "seed = -1"),
        (dict(prompt="a", seeds=[]), "seeds = "),
        (dict(prompt="a", batch_size=0), "batch_size = 0"),
        (dict(prompt="a", num_samples=0), "num_samples = 0"),
        (dict(prompt="a", num_samples=10**20), "num_samples = 1"),
        (dict(prompt="a", format=[]), "format = "),
        (dict(prompt="a", image="absent.png"), "no such file"),
        (dict(prompt="a"), "no checkpoint"),
        (dict(prompt="a", checkpoint="absent"), "no such folder"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stdit.pipelines.bundled.BUNDLED", tmp_path / "nothing")
    monkeypatch.setattr("stdit.pipelines.sampling.load_pipeline", lambda *_: pytest.fail("loaded a model"))
    with pytest.raises(UserError, match=message):
        sample_to_files(SampleConfig(**settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(condition=["{}/a.png@4"]), "the video has the frames 0 to 3"),
        (dict(condition=["{}/a.png@1:2"]), "its source has 1 frames at 8 per second, not 2"),
        (dict(segments=2, overlap=4), "overlap = 4: a segment of num_frames = 4"),
        (dict(segments=2, overlap=2, condition=["{}/a.png@6"]), "the video has the frames 0 to 5"),
        (
            dict(condition=[f"{{}}/a.png@{place}" for place in range(4)]),
            "prompt 0: all 4 frames are conditioning frames",
        ),
        (dict(guidance_interval=(0.2, 0.8)), "for guidance_schedule = interval, not constant"),
        (dict(text_states="{}/text"), "text_states.json|a folder of text states"),
    ],
)
def test_requests_are_checked_against_recorded_settings_before_loading(
    pipe, tmp_path, monkeypatch, settings, message
):
    pipe.save_pretrained(tmp_path / "pipeline")
    picture(tmp_path / "a.png")
    monkeypatch.setattr("stdit.pipelines.sampling.load_pipeline", lambda *_: pytest.fail("loaded a model"))
    if "condition" in settings:
        settings = settings | {"condition": [text.format(tmp_path) for text in settings["condition"]]}
    if "text_states" in settings:
        settings = settings | {"text_states": settings["text_states"].format(tmp_path)}
    with pytest.raises(UserError, match=message):
        sample_to_files(SampleConfig(prompt="a", checkpoint=str(tmp_path / "pipeline"), **settings))


def test_text_states_are_checked_before_a_model_is_loaded(pipe, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", pipe)
    monkeypatch.setattr("stdit.pipelines.sampling.load_pipeline", lambda *_: pytest.fail("loaded a model"))
    config = SampleConfig(
        prompt="a", segment_prompts=["b"], checkpoint=str(run), text_states=str(tmp_path / "text")
    )
    assert list(store_text(pipe.prompt_encoder, ["a"], tmp_path / "text")) == [1]
    with pytest.raises(UserError, match="no states of 1 captions, such as 'b'"):
        sample_to_files(config)
    shutil.rmtree(tmp_path / "text")
    wider = copy.copy(pipe.prompt_encoder)
    wider.channels = 32
    wider.encode = lambda texts: (torch.ones(len(texts), 1, 32), torch.ones(len(texts), 1, dtype=torch.bool))
    assert list(store_text(wider, ["", "a", "b"], tmp_path / "text")) == [3]
    with pytest.raises(UserError, match="the states have 32 channels, but the model takes 16"):
        sample_to_files(config)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_an_unreadable_image(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a.png: (not a readable image|is empty \(0 bytes\))"):
        plan_requests(SampleConfig(prompt="a", image=str(tmp_path / "a.png")))


def test_an_unwritable_output_folder(pipe, tmp_path):
    run = write_run(tmp_path / "run", pipe)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        sample_to_files(SampleConfig(prompt="a", checkpoint=str(run), output=str(tmp_path / "file" / "out")))


def test_a_missing_device(pipe, tmp_path):
    run = write_run(tmp_path / "run", pipe)
    with pytest.raises(UserError, match="device = cuda:77"):
        sample_to_files(SampleConfig(prompt="a", checkpoint=str(run), device="cuda:77"))


def test_equal_settings_share_a_batch_and_order_is_kept(pipe, monkeypatch):
    sizes = []
    encode = pipe.encode_prompt
    monkeypatch.setattr(
        pipe, "encode_prompt", lambda prompts, *rest: sizes.append(len(prompts)) or encode(prompts, *rest)
    )
    long = VideoSettings(num_frames=6)
    requests = [Request("a", 1), Request("b", 2), Request("a", 3), Request("c", 4, long)]
    results = list(sample_videos(pipe, requests, batch_size=2))
    assert sizes == [2, 1, 1]
    assert [video.request for video in results] == requests
    assert [video.frames.shape for video in results] == [(4, 8, 8, 3)] * 3 + [(6, 8, 8, 3)]
    alone = next(iter(sample_videos(pipe, [requests[1]])))[1]
    assert np.abs(alone.astype(int) - results[1][1]).max() <= 1  # rounding of a level at most


def test_files_have_metadata_and_are_never_overwritten_nor_made_twice(pipe, tmp_path, capsys, caplog):
    run = write_run(tmp_path / "run", pipe)
    prompts = tmp_path / "p.csv"
    prompts.write_text("prompt,shape,image\nA red Ball: it moves!,ball,\n圆 star,star,first.png\n")
    picture(tmp_path / "first.png")
    config = SampleConfig(checkpoint=str(run), prompts=str(prompts), seed=3, format=["mp4", "gif", "png"])
    written = sample_to_files(config)
    folder = run / "samples" / "prompts"
    assert sorted(path.name for path in written) == sorted(path.name for path in folder.iterdir())
    assert {path.name for path in written} == {
        "000-a-red-ball-it-moves-seed3.mp4",
        "000-a-red-ball-it-moves-seed3.gif",
        "000-a-red-ball-it-moves-seed3.json",
        "001-圆-star-seed3.mp4",
        "001-圆-star-seed3.gif",
        "001-圆-star-seed3.json",
        "sheet.png",
    }
    assert all(str(path) in capsys.readouterr().out for path in written[:1])
    inside = read_metadata(folder / "000-a-red-ball-it-moves-seed3.mp4")
    beside = json.loads((folder / "000-a-red-ball-it-moves-seed3.json").read_text())
    assert inside.items() <= beside.items()
    assert (
        inside["prompt"] == "A red Ball: it moves!"
        and inside["seed"] == 3
        and inside["extra"] == {"shape": "ball"}
    )
    assert (inside["num_frames"], inside["num_inference_steps"], inside["fps"]) == (4, 3, 8.0)
    weights = run / "checkpoints" / "step-00000010" / "ema" / "ema.safetensors"
    assert inside["checkpoint_hash"] == hash_file(weights) and inside["checkpoint_step"] == 10

    assert caplog.text.count("was trained without conditioning frames") == 1
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert sample_to_files(config) == []
    assert "all 2 videos are finished already" in capsys.readouterr().out
    picture(tmp_path / "first.png", "blue")  # the second prompt's
    again = sample_to_files(config)
    assert {path.name for path in again} == {
        *(f"001-圆-star-seed3-2.{kind}" for kind in ("mp4", "gif", "json")),
        "sheet-2.png",
    }
    said = capsys.readouterr().out
    assert "1 of 2 videos is finished already: skipped" in said
    assert "001-圆-star-seed3.mp4 stays as it is (conditioning_files = " in said
    assert all(path.read_bytes() == content for path, content in before.items())
    elsewhere = sample_to_files(replace(config, output=str(tmp_path / "elsewhere")))
    assert before[written[0]] == elsewhere[0].read_bytes()  # same seed, same pixels, same file


def test_requests_runner_and_writer_without_the_command(pipe, tmp_path):
    request = Request(
        "a wave rises", 0, VideoSettings(fps=4), segment_prompts=("it breaks",), segments=Segments(2, 1)
    )
    reported = []
    writer = VideoWriter(
        tmp_path / "videos", ["mp4", "png"], pipe.config, {"checkpoint_hash": "x"}, reported.append
    )
    writer.write(sample_videos(pipe, [request]))
    files = writer.finish()
    names = ["000-a-wave-rises-seed0.mp4", "000-a-wave-rises-seed0.json", "sheet.png"]
    assert files == reported == [tmp_path / "videos" / name for name in names]
    metadata = read_metadata(files[0])
    assert (metadata["checkpoint_hash"], metadata["fps"], metadata["segments"]) == ("x", 4, 2)
    assert metadata["num_frames"] == pipe.config.num_frames


def test_a_full_disk_is_explained(pipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = write_run(tmp_path / "run", pipe)
    monkeypatch.setattr("stdit.pipelines.writer.write_json_atomic", full)
    with pytest.raises(UserError, match="No space left on device. Free some space"):
        sample_to_files(SampleConfig(prompt="a", checkpoint=str(run)))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("out of memory")],
)
def test_out_of_memory_is_explained(pipe, monkeypatch, error):
    monkeypatch.setattr(pipe, "denoise", Mock(side_effect=error))
    with pytest.raises(UserError, match="2 videos at once need more memory than there is: lower batch_size"):
        next(sample_videos(pipe, [Request("a", 1), Request("a", 2)]))


def test_slugs():
    assert slug("A red ball!") == "a-red-ball" and slug("?!") == "video"
    assert len(slug("long " * 50)) <= 40


def test_free_names(tmp_path):
    (tmp_path / "a.json").write_text("")
    assert free_stem(tmp_path, "a") == "a-2" and free_stem(tmp_path, "b") == "b"
