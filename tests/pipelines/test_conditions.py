"""Conditioning frames: their syntax, files, and effect in the pipeline."""

import numpy as np
import PIL.Image
import pytest
import torch

from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition, check_frame_source, load_frames, parse_frame_condition
from stdit.pipelines.video_io import write_mp4
from tests.pipelines.test_pipeline import any_pipe, fitted_pca, latents  # noqa: F401 (a fixture)
from tests.pipelines.tiny import tiny_pipeline


def video(frames, seed=0):
    return torch.rand(3, frames, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.png@0", FrameCondition("a.png", 0)),
        ("a.png@-1", FrameCondition("a.png", -1)),
        ("b@home/clip.mp4@8:4", FrameCondition("b@home/clip.mp4", 8, 4)),
        ("clip.mp4@8:4:0.5", FrameCondition("clip.mp4", 8, 4, 0.5)),
        ("clip.mp4@8::.5", FrameCondition("clip.mp4", 8, None, 0.5)),
        (r"C:\clip.mp4@0:2", FrameCondition(r"C:\clip.mp4", 0, 2)),
    ],
)
def test_condition_syntax(text, expected):
    assert parse_frame_condition(text) == expected
    assert parse_frame_condition(str(expected)) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.png", "must be FILE@frame"),
        ("a.png@first", "must be FILE@frame"),
        ("@3", "must be FILE@frame"),
        ("a.png@" + "9" * 5000, "must be FILE@frame"),
        ("a.png@0:0", "length must be at least 1"),
        ("a.png@0::0", "strength must be above 0"),
        ("a.png@0::1.5", "strength must be above 0"),
        ("a.png@0::1.2.3", "'1.2.3' is no strength"),
    ],
)
def test_bad_syntax_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_frame_condition(text)


def test_span_of_a_condition():
    assert FrameCondition("a", -1).span(16) == (15, 1)
    assert FrameCondition("a", 4).span(16) == (4, 12)
    assert FrameCondition("a", 4, 3).span(16) == (4, 3)
    with pytest.raises(UserError, match="frames 0 to 15, or -16 to -1"):
        FrameCondition("a", 16).span(16)
    with pytest.raises(UserError, match="from frame 12 on the video has 4 frames, not 5"):
        FrameCondition("a", -4, 5).span(16)


def frames_of(condition, num_frames=99, fps=8.0, height=8, width=8):
    return load_frames(condition.resolved(num_frames, fps), fps, height, width)


def test_frames_of_files(tmp_path, caplog):
    levels = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 16, 16, 3) * 20
    clip = tmp_path / "clip.mp4"
    write_mp4(clip, levels.numpy(), fps=8)
    frames = frames_of(FrameCondition(clip))
    assert frames.shape == (3, 12, 8, 8) and "16x16" in caplog.text and "8x8" in caplog.text
    torch.testing.assert_close(frames.mean((0, 2, 3)), torch.arange(12) * 20 / 127.5 - 1, atol=0.03, rtol=0)
    assert torch.equal(frames_of(FrameCondition(clip), fps=4), frames[:, ::2])
    assert torch.equal(frames_of(FrameCondition(clip), num_frames=5), frames[:, :5])
    assert torch.equal(frames_of(FrameCondition(clip, -3, 2, skip=4), num_frames=5), frames[:, 4:6])
    with pytest.raises(UserError, match="has 6 frames at 4 per second, not 9"):
        frames_of(FrameCondition(clip, 0, 9), fps=4)
    with pytest.raises(
        UserError, match="has 12 frames at 8 per second, of which the first 9 are skipped, not 4"
    ):
        frames_of(FrameCondition(clip, 0, 4, skip=9))
    PIL.Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    assert frames_of(FrameCondition(tmp_path / "red.png"))[:, 0, 0, 0].tolist() == [1, -1, -1]


def test_16_bit_grey_and_rotated_pictures(tmp_path):
    """16-bit grey is not clipped at 255, and the EXIF rotation is applied, to files and to pictures in memory."""
    grey = PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    grey.save(tmp_path / "grey.png")
    rotated = PIL.Image.new("RGB", (8, 8), "red")
    rotated.paste("blue", (4, 0, 8, 8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate clockwise
    rotated.save(tmp_path / "rotated.png", exif=exif)
    for name in ("grey.png", "rotated.png"):
        file, picture = tmp_path / name, PIL.Image.open(tmp_path / name)
        assert torch.equal(frames_of(FrameCondition(file)), frames_of(FrameCondition(picture)))
    levels = torch.arange(64).reshape(8, 8) * 1000 // 256
    torch.testing.assert_close(frames_of(FrameCondition(tmp_path / "grey.png"))[0, 0], levels / 127.5 - 1)
    assert frames_of(FrameCondition(tmp_path / "rotated.png"))[2, 0, :, 0].tolist() == [-1] * 4 + [1] * 4


def test_frames_of_another_size_are_resized_with_a_warning(caplog):
    assert frames_of(FrameCondition(video(6)), num_frames=4, height=4, width=6).shape == (3, 4, 4, 6)
    assert "8x8" in caplog.text and "6x4" in caplog.text


def test_missing_and_unreadable_files(tmp_path):
    for name in ("absent.mp4", "a" * 300, "a\0b.png"):
        with pytest.raises(UserError, match=f"{name}: there is no such file"):
            check_frame_source(str(tmp_path / name))
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="clip.mp4: not a"):
        check_frame_source(tmp_path / "clip.mp4")


def test_conditioning_frames_are_kept_at_their_index(any_pipe):  # noqa: F811
    codec = any_pipe.codec
    conditions = [FrameCondition(video(4)), FrameCondition(video(1, 7), -1)]
    found = latents(any_pipe, conditions=conditions, num_frames=16)
    first = int(codec.causal_first_frame)
    start = codec.encode(conditions[0].source[None])[0]
    still = conditions[1].source[None].repeat(1, 1, first + codec.stride[0], 1, 1)
    assert torch.equal(found[0, :, : start.shape[1]], start)
    assert torch.equal(found[0, :, -1:], codec.encode(still)[0, :, first : first + 1])
    middle = slice(start.shape[1], -1)
    free = latents(any_pipe, num_frames=16)
    assert not torch.allclose(
        found[0, :, middle], free[0, :, middle], atol=1e-4
    )  # generated frames depend on them
    alone = latents(any_pipe, conditions=[conditions[0]], num_frames=16)
    assert not torch.allclose(found[0, :, middle], alone[0, :, middle], atol=1e-4)


def test_later_conditions_overwrite_earlier_ones(pipe):
    found = latents(pipe, conditions=[FrameCondition(video(4)), FrameCondition(video(2, 1), 1)], num_frames=8)
    assert torch.equal(found[0, :, 0], video(4)[:, 0]) and torch.equal(found[0, :, 3], video(4)[:, 3])
    assert torch.equal(found[0, :, 1:3], video(2, 1))


def test_conditions_per_prompt(pipe):
    conditions = [[FrameCondition(video(1), 2)], []]
    both = latents(pipe, ["a", "b"], (1, 2), conditions=conditions)
    torch.testing.assert_close(both[0], latents(pipe, "a", (1,), conditions=conditions[0])[0])
    torch.testing.assert_close(both[1], latents(pipe, "b", (2,))[0], atol=1e-5, rtol=1e-5)


def test_an_image_is_a_condition_on_the_first_frame(pipe):
    assert torch.equal(
        latents(pipe, image=video(1)[:, 0]), latents(pipe, conditions=[FrameCondition(video(1), 0)])
    )


def test_partial_strength_starts_from_noised_frames(pipe):
    """Against the steps below the level, written out."""
    clip, sigmas = video(4), torch.linspace(1, 0, 9)
    settings = {"num_inference_steps": 8, "guidance_scale": 1.0}
    found = latents(pipe, conditions=[FrameCondition(clip, strength=0.5)], **settings)
    states, mask = pipe.prompt_encoder.encode(["a red circle moves up"])
    noise = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = torch.lerp(clip[None], noise, 0.5)
    size = torch.tensor([8.0])
    for now, after in zip(sigmas[4:-1], sigmas[5:], strict=True):
        with torch.no_grad():
            output = pipe.transformer(x, 1000 * now[None], states, mask, size, size, size).sample
        x = x + (now - after) * pipe.flow.velocity(output, x, now[None, None])
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_too_few_steps_for_a_strength(pipe, caplog):
    still, weak = FrameCondition(video(2)), FrameCondition(video(2), strength=0.9)
    kept, found = (latents(pipe, conditions=[one], num_inference_steps=3) for one in (still, weak))
    assert torch.equal(kept, found)
    assert "a strength above 0.667 are kept as they are: 3 steps are too few" in caplog.text
    with pytest.raises(UserError, match="all are conditioning frames"):
        latents(pipe, conditions=[FrameCondition(video(4), strength=0.9)], num_inference_steps=3)


def test_all_frames_conditioned_is_an_error(pipe):
    with pytest.raises(UserError, match="4 latent frames, and all are conditioning frames"):
        latents(pipe, conditions=[FrameCondition(video(4))])


def test_a_picture_fills_the_latent_frame_that_it_lies_in(tmp_path):
    pipe = tiny_pipeline(tmp_path, fitted_pca())
    found = latents(pipe, conditions=[FrameCondition(video(1), 3)], num_frames=8)  # inside latent frame 1
    still = pipe.codec.encode(video(1)[None].repeat(1, 1, 2, 1, 1))
    assert torch.equal(found[0, :, 1:2], still[0])
