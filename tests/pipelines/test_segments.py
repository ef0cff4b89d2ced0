"""Videos of several segments, and Open-Sora's mask strategies."""

import json
import shlex

import numpy as np
import pytest
import torch
import yaml

from stdit.codecs import CodecConfig, build_codec
from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.config import SampleConfig, VideoSettings
from stdit.pipelines.opensora_masks import MaskEntry, mask_entries_to_conditions, parse_mask_strategy
from stdit.pipelines.requests import Request, plan_requests
from stdit.pipelines.runner import sample_videos
from stdit.pipelines.sampling import sample_to_files
from stdit.pipelines.segments import Segments
from stdit.pipelines.video_io import read_frames, write_mp4
from tests import warm
from tests.codecs.tiny import save_tiny_vae, tiny_opensora_vae
from tests.pipelines.tiny import tiny_pipeline, write_run
from tests.warm import ROOT


def make(pipe, **settings):
    return next(iter(sample_videos(pipe, [Request("a red circle", 1, **settings)])))[1].astype(int)


def test_starts_and_total_frames():
    assert Segments(3, 2).starts(8) == [0, 6, 12] and Segments(3, 2).total_frames(8) == 20
    assert Segments(3, 2, loop=True).total_frames(8) == 18
    assert Segments(2).starts(16) == [0, 12]
    assert Segments().total_frames(8) == 8 and Segments().total_frames(1) == 1


def test_each_segment_begins_with_the_end_of_the_previous_one(pipe, monkeypatch):
    calls = []
    call = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe),
        "__call__",
        lambda self, *a, **k: calls.append((a, k, call(self, *a, **k))) or calls[-1][2],
    )
    segments = Segments(3, overlap=1)
    whole = make(pipe, segments=segments, segment_prompts=("a blue star", "a green cross"))
    assert whole.shape == (10, 8, 8, 3)
    assert [prompts for (prompts,), _, _ in calls] == [["a red circle"], ["a blue star"], ["a green cross"]]
    made = [result.frames[0] for _, _, result in calls]  # [T 3 H W]
    joined = torch.cat([made[0], made[1][1:], made[2][1:]]).permute(0, 2, 3, 1).numpy()
    assert np.abs(whole - joined * 255).max() <= 0.51
    for before, after in zip(made, made[1:], strict=False):
        torch.testing.assert_close(after[0], before[-1], atol=1e-5, rtol=0)
    first, alone = (result.frames for _, _, result in calls[:2])
    assert not torch.allclose(first[0, 1:], alone[0, 1:], atol=1e-2)


def test_each_segment_has_noise_of_its_own(pipe):
    """Two segments with the same prompt, and no differing conditioning frames, still differ."""
    still = FrameCondition(torch.zeros(3, 1, 8, 8), 3)
    whole = make(
        pipe, segments=Segments(2, overlap=1), conditions=(still,)
    )  # both segments begin or end grey
    assert np.abs(whole[0] - whole[4]).max() > 2


def test_a_single_segment_is_the_video_of_one_call(pipe):
    assert np.array_equal(make(pipe), make(pipe, segments=Segments(1)))
    assert np.abs(make(pipe, segments=Segments(2, overlap=2))[:4] - make(pipe)).max() <= 1


def test_a_loop_ends_with_its_first_frame(pipe, monkeypatch):
    calls = []
    call = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, *a, **k: calls.append(call(self, *a, **k)) or calls[-1]
    )
    whole = make(pipe, segments=Segments(2, overlap=1, loop=True))
    first, last = (one.frames for one in calls)
    torch.testing.assert_close(last[0, -1], first[0, 0], atol=1e-5, rtol=0)
    assert len(whole) == 6 and np.abs(whole[5] - last[0, 2].permute(1, 2, 0).numpy() * 255).max() <= 0.51


def test_conditions_are_indexed_in_the_whole_video(pipe):
    clip = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = make(
        pipe,
        segments=Segments(3, overlap=1),
        conditions=(FrameCondition(clip, 2), FrameCondition(clip[:, :1], -1)),
    )
    expected = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).numpy()
    assert np.abs(whole[2:6] - expected).max() <= 1
    assert np.abs(whole[9] - expected[0]).max() <= 1


def test_an_image_begins_a_video_of_two_segments(pipe):
    whole = make(pipe, segments=Segments(2, overlap=2), image=torch.zeros(3, 8, 8))
    assert len(whole) == 6 and np.abs(whole[0] - 127.5).max() <= 1


def test_a_segment_without_frames_to_generate_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("made another segment first"))
    clip = torch.zeros(3, 8, 8, 8)
    for segments, condition in {
        Segments(2, 1): FrameCondition(clip, 4, 3),
        Segments(2, 1, loop=True): FrameCondition(clip, 4, 2),
        Segments(3, 2): FrameCondition(clip, 2),
    }.items():
        with pytest.raises(UserError, match="all 4 frames of segment 2 are conditioning frames"):
            make(pipe, segments=segments, conditions=(condition,))
    Segments(2, 1).check_frames_left([FrameCondition(clip, 4, 3, strength=0.5)], 4)
    Segments(2, 1).check_frames_left([FrameCondition(clip, 4, 2)], 4)


def test_segments_with_a_causal_codec(pipe, tmp_path):
    name = "AutoencoderKLWan"
    codec = build_codec(CodecConfig(name=name, path=str(save_tiny_vae(name, tmp_path / "vae"))))
    own = tiny_pipeline(tmp_path, codec)
    whole = make(own, segments=Segments(2, overlap=5), settings=VideoSettings(num_frames=9))
    assert whole.shape == (13, 8, 8, 3)


def test_segments_with_open_soras_codec(tmp_path, monkeypatch):
    """A quarter of 51 frames are 12, but 9 are whole latent frames."""
    own = tiny_pipeline(tmp_path, tiny_opensora_vae())
    calls = []
    call = type(own).__call__
    monkeypatch.setattr(
        type(own), "__call__", lambda self, *a, **k: calls.append(k["conditions"]) or call(self, *a, **k)
    )
    whole = make(own, segments=Segments(2), settings=VideoSettings(num_frames=51, num_inference_steps=1))
    assert [[len(one.source[0]) for one in some] for (some,) in calls] == [[], [9]]
    assert whole.shape == (51 + 42, 8, 8, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(segments=0), "segments = 0: must be at least 1"),
        (
            dict(segments=2, segment_prompts=["b", "c"]),
            "segments = 2: must be at least 3, the number of prompts",
        ),
        (dict(segments=10**9), "segments = 1000000000: must be at most"),
        (dict(segment_prompts=["b", " "]), "prompt 0: segment_prompts has an empty prompt"),
        (dict(segments=2, overlap=0), "overlap = 0"),
        (dict(segments=2, num_frames=4, overlap=4), "overlap = 4: a segment of num_frames = 4"),
        (dict(segments=2, num_frames=4, overlap=2, loop=True), "would have 4 conditioning frames"),
        (dict(loop=True), "loop needs a second segment"),
        (dict(segments=2, num_frames=4, overlap=1, condition=["a.png@7"]), "frames 0 to 6"),
        (dict(mask_strategy="0"), "names reference 0, but reference_path has 0"),
        (dict(reference_path="a.png"), "reference_path without mask_strategy"),
        (dict(mask_strategy="0,x"), "must be up to six numbers"),
        (dict(mask_strategy="0,0,0,0,inf"), "must be up to six numbers"),
        (dict(mask_strategy="0,0,0,0,1,0,0"), "must be up to six numbers"),
        (dict(mask_strategy="0,0,0,0,0", reference_path="a.png"), "the length at least 1"),
        (dict(mask_strategy="0,0,0,0,1,2", reference_path="a.png"), "the edit ratio from 0 to 1"),
        (dict(mask_strategy="0", reference_path="absent.png"), "absent.png: there is no such file"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        plan_requests(SampleConfig(prompt="a", **settings))


def test_segment_prompts_and_scores():
    config = SampleConfig(prompt="a", segment_prompts=["b"], aesthetic=6.5, motion=5, camera="pan left")
    (request,) = plan_requests(config)
    suffix = " aesthetic score: 6.5. motion score: 5. camera motion: pan left."
    assert (request.prompt, request.segment_prompts) == ("a" + suffix, ("b" + suffix,))
    assert request.segments == Segments(2)
    assert plan_requests(SampleConfig(prompt="a", camera=""))[0].prompt == "a"
    assert plan_requests(SampleConfig(prompt="a", segment_prompts=["b"], segments=4))[0].segments.count == 4


def test_mask_strategy_syntax():
    entries = parse_mask_strategy("0; 1,1,2,-4,3,0.25 ;", ["a.mp4", "b.png"])
    assert entries == [MaskEntry(0, "a.mp4", 0, 0, 1, 0.0), MaskEntry(1, "b.png", 2, -4, 3, 0.25)]
    assert parse_mask_strategy("", []) == []


class Causal:
    """Latent frame 0 holds one frame, the others four."""

    causal_first_frame, stride, latent_frame_group = True, (4, 8, 8), 1

    def latent_shape(self, num_frames, height, width):
        return (1 + -(-(num_frames - 1) // 4), 1, 1)

    def start_frame(self, index, num_frames=None):
        return index if index < 1 else 1 + 4 * (index - 1)


def test_mask_strategy_counts_in_latent_frames():
    entries = parse_mask_strategy("0,0,0,0,2,0;1,0,3,-1,1,0.5;0,0,0,0,1,1", ["a"])
    found = mask_entries_to_conditions(entries, Causal(), Segments(2, 5), 17)
    assert found == [FrameCondition("a", 0, 5, 1.0, 0), FrameCondition("a", 12 + 13, 4, 0.5, 9)]
    found = mask_entries_to_conditions(
        parse_mask_strategy("0,0,0,-2,2;0,0,0,-1,5;0,0,2,0,1", ["a"]), Causal(), Segments(), 17
    )
    assert found == [
        FrameCondition("a", 12, 5),
        FrameCondition("a", 16, 1),
        FrameCondition("a", 0, 1, skip=5),
    ]
    with pytest.raises(UserError, match="names segment 2, but the video has 2"):
        mask_entries_to_conditions(parse_mask_strategy("2,0", ["a"]), Causal(), Segments(2), 17)
    with pytest.raises(UserError, match="start 9, but a segment has 5 latent frames"):
        mask_entries_to_conditions(parse_mask_strategy("0,0,0,9", ["a"]), Causal(), Segments(), 17)


def test_metadata_name_conditions_and_segments(pipe, tmp_path):
    run = write_run(tmp_path / "run", pipe)
    write_mp4(tmp_path / "clip.mp4", np.full((4, 8, 8, 3), 200, np.uint8), fps=8)
    config = SampleConfig(
        checkpoint=str(run),
        prompt="a",
        segment_prompts=["b"],
        overlap=1,
        condition=[f"{tmp_path}/clip.mp4@1:2"],
        reference_path=f"{tmp_path}/clip.mp4",
        mask_strategy="1,0,0,-1,1,0",
        format="mp4",
    )
    _, path = sample_to_files(config)
    facts = json.loads(path.read_text())
    assert facts["conditions"] == ["clip.mp4@1:2:1"] and facts["mask_strategy"][0]["source"] == "clip.mp4"
    assert facts["mask_strategy"][0]["segment"] == 1
    assert (facts["segment_prompts"], facts["segments"], facts["num_frames"]) == (["b"], 2, 4)
    assert (facts["overlap"], facts["loop"]) == (1, False)


@pytest.fixture(scope="module")
def own_clips(tmp_path_factory):
    """A run with the lengths and the codec of configs/train/own-clips.yaml, in small frames."""
    recipe = yaml.safe_load((ROOT / "configs" / "train" / "own-clips.yaml").read_text())
    codec = build_codec(CodecConfig(**{**recipe["codec"], "stride": tuple(recipe["codec"]["stride"])}))
    codec.fit([torch.rand(3, 8, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1])
    folder = tmp_path_factory.mktemp("own_clips")
    size = {"num_frames": recipe["data"]["buckets"][0]["num_frames"], "height": 32, "width": 32}
    return write_run(folder / "outputs" / "clips", tiny_pipeline(folder, codec), **size)


def commands_for_long_videos():
    page = (ROOT / "stdit" / "pipelines" / "README.md").read_text()
    _, _, section = page.partition("## Long videos")
    return [line for line in section.partition("## ")[0].splitlines() if line.startswith("python sample.py")]


def sample(run, tmp_path, *flags):
    script = str(ROOT / "sample.py")
    return warm.run(
        [
            script,
            *flags,
            "--checkpoint",
            str(run),
            "--num_inference_steps",
            "2",
            "--output",
            str(tmp_path / "out"),
        ]
    )


@pytest.mark.parametrize("command", commands_for_long_videos())
def test_commands_of_the_page_work_on_a_model_of_own_clips(own_clips, tmp_path, command):
    _, _, *flags = shlex.split(command)
    result = sample(own_clips, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    (video,) = (tmp_path / "out").glob("*.mp4")
    expected = 40 if "--segment_prompts" in flags else 36  # 3 segments: 16 + 2 x 12; in a loop 3 x 12
    assert len(read_frames(video, 1000)) == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--overlap", "5", "--loop", "true"], "use overlap 4 or less"),
        (["--overlap", "13"], "use overlap 12 or less"),
        (["--overlap", "16"], "use overlap 12 or less"),
        (["--num_frames", "4"], "num_frames = 4 is 1 latent frame, and"),
    ],
)
def test_an_overlap_that_leaves_no_latent_frame_is_refused_before_loading(
    own_clips, tmp_path, flags, message
):
    result = sample(own_clips, tmp_path, "--prompt", "a", "--segments", "4", *flags)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "sampling from" not in result.stdout and not (tmp_path / "out").exists()
