"""The small autoencoder, and the script that trains it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts import train_codec
from scripts.train_codec import STATE_FILE, train
from stdit.checkpoint_files import META
from stdit.codecs import tiny
from stdit.codecs.base import WEIGHTS_FILE, VideoCodec
from stdit.codecs.config import CodecConfig
from stdit.codecs.tiny import TinyCodec, split_groups
from stdit.data.config import BucketConfig, DataConfig
from stdit.errors import UserError
from stdit.pipelines.video_io import write_mp4
from stdit.settings import plain
from stdit.training.codec_config import CodecTraining
from stdit.training.codec_trainer import CodecTrainer, crop_to_motion, draw_groups
from stdit.training.config import OptimizerConfig

SMALL = (16, 16, 16)


@pytest.fixture
def codec() -> TinyCodec:
    torch.manual_seed(0)
    made = TinyCodec(channels=8, widths=SMALL)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made.latent_mean.normal_()
    made.latent_std.uniform_(0.5, 2)
    return made


def video(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("size", "latents"), [((1, 8, 8), (1, 1, 1)), ((9, 16, 24), (3, 2, 3)), ((7, 13, 20), (3, 2, 3))]
)
def test_sizes(codec: TinyCodec, size: tuple[int, int, int], latents: tuple[int, int, int]) -> None:
    encoded = codec.encode(video(*size))
    assert encoded.shape == (2, 8, *latents)
    assert codec.decode(encoded, *size).shape == (2, 3, *size)


def test_latent_frames_are_independent(codec: TinyCodec) -> None:
    clip = video(13, 16, 16)
    encoded = codec.encode(clip)
    torch.testing.assert_close(codec.encode(clip[:, :, :1]), encoded[:, :, :1])  # an image
    changed = clip.clone()
    changed[:, :, 5:9] = 0.5
    moved = (codec.encode(changed) - encoded).abs().amax((0, 1, 3, 4))
    assert moved[2] > 0.01 and (moved[[0, 1, 3]] < 1e-5).all()
    torch.testing.assert_close(codec.decode(encoded[:, :, :2]), codec.decode(encoded)[:, :, :5])


def test_saved_and_loaded(codec: TinyCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    again = VideoCodec.from_pretrained(tmp_path)
    assert isinstance(again, TinyCodec) and again.widths == SMALL
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
    assert again.fingerprint() == codec.fingerprint()
    assert torch.equal(again.encode(video(5, 8, 8)), codec.encode(video(5, 8, 8)))


@pytest.fixture
def clips(tmp_path: Path) -> DataConfig:
    lines = ["path,text"]
    for k in range(4):
        frames = np.full((9, 16, 16, 3), 40 * k, np.uint8)
        frames[:, :, 4 * k : 4 * k + 4] = 250
        write_mp4(tmp_path / f"{k}.mp4", frames, fps=8, metadata={})
        lines.append(f"{k}.mp4,clip {k}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    bucket = BucketConfig(num_frames=9, fps=8, height=16, width=16, batch_size=2)
    return DataConfig(manifest=str(tmp_path / "manifest.csv"), buckets=[bucket])


def settings(clips: DataConfig, **changes: object) -> CodecTraining:
    return CodecTraining(**{"data": clips, "channels": 4, "widths": SMALL, "save_every": 3} | changes)  # type: ignore


def test_training_resumes_bit_for_bit(
    clips: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings(clips, steps=7), whole)
    step = CodecTrainer.step

    def interrupted(self: CodecTrainer, number: int, batch: Tensor) -> float:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(CodecTrainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings(clips, steps=7), parts)
    assert [path.name for path in parts.iterdir()] == ["training.state"]
    monkeypatch.setattr(CodecTrainer, "step", step)
    train(settings(clips, steps=7), parts)
    found, expected = (VideoCodec.from_pretrained(folder) for folder in (parts, whole))
    assert found.fingerprint() == expected.fingerprint()
    assert not (parts / "training.state").exists()


def test_training_lowers_the_error_and_normalises(clips: DataConfig) -> None:
    losses = []
    trainer = CodecTrainer(settings(clips, steps=60, noise=0.1))
    batch = torch.stack([torch.full((3, 5, 16, 16), value) for value in (-0.5, 0.0, 0.7)])
    for number in range(60):
        losses.append(trainer.step(number, batch))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    latents = trainer.codec.encode_groups(split_groups(batch))
    assert trainer.codec.normalise(latents).std().item() == pytest.approx(1, abs=0.5)


def test_crops_show_what_moves() -> None:
    video = torch.zeros(2, 3, 9, 64, 64)
    for frame in range(9):
        video[0, :, frame, 4:12, 5 * frame : 5 * frame + 8] = 1  # along the top
        video[1, :, frame, 50:58, 5 * frame : 5 * frame + 8] = 1  # along the bottom
    groups, later = draw_groups(video, 9, torch.Generator().manual_seed(0))
    crops = crop_to_motion(groups, later, 32, torch.Generator().manual_seed(0))
    assert crops.shape == (6, 3, 4, 32, 32)
    shown = crops.amax((1, 2, 3, 4))
    assert shown.mean() > 0.6
    assert torch.equal(crop_to_motion(groups, later, 64, torch.Generator()), groups)
    still = draw_groups(torch.zeros(1, 3, 1, 64, 64), 2, torch.Generator())
    assert crop_to_motion(*still, 32, torch.Generator()).shape == (1, 3, 4, 32, 32)


def test_drawn_groups_differ_and_are_those_of_their_video() -> None:
    clips = video(13, 8, 8)
    groups, later = draw_groups(clips, 3, torch.Generator().manual_seed(0))
    every = split_groups(clips)
    found = [next(k for k, one in enumerate(every) if torch.equal(one, group)) for group in groups]
    assert len(set(found)) == 6 and all(k // 4 == n // 3 for n, k in enumerate(found))
    for k, frame in zip(found, later, strict=True):
        first = max(0, k % 4 * 4 - 3)
        assert torch.equal(frame, clips[k // 4, :, (first + 6) % 13])


def test_bad_input(clips: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"noise": -1, "groups": 0, "crop": 12, "steps": 0, "seed": -1}.items():
        with pytest.raises(UserError, match=f"{name} = {value}"):
            settings(clips, **{name: value})
    for name, value in {"channels": 0, "widths": (40, 64, 96)}.items():
        with pytest.raises(UserError, match=f"{name} = .*: must be"):
            settings(clips, **{name: value})
    TinyCodec(4, SMALL).save_pretrained(tmp_path / "done")
    monkeypatch.setattr("sys.argv", ["train_codec.py", "--output", str(tmp_path / "done")])
    with pytest.raises(UserError, match="holds a codec already"):
        train_codec.main()
    with pytest.raises(UserError, match="optimizer.name = adamw"):
        settings(clips, optimizer=OptimizerConfig(name="adamw"))
    with pytest.raises(UserError, match="data.cache = memory"):
        settings(replace(clips, cache="memory"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file cannot be written"):
        train(settings(clips), tmp_path / "file")


def test_a_state_of_other_settings_is_not_resumed(clips: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / STATE_FILE
    CodecTrainer(settings(clips, steps=7)).save(file, 3)
    assert CodecTrainer(settings(replace(clips, workers=2), steps=7, save_every=1)).resume(file) == 3
    for changes in ({"steps": 2}, {"widths": (32, 16, 16)}, {"seed": 1}):
        with pytest.raises(UserError, match=f"another training: {next(iter(changes))} differ"):
            train(settings(clips, **{"steps": 7} | changes), tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read .* delete it"):
        train(settings(clips, steps=7), tmp_path)
    assert [path.name for path in tmp_path.glob("*.state")] == [STATE_FILE]


def test_a_full_disk_leaves_no_half_state(
    clips: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stdit.training.codec_trainer.save_file", write)
    with pytest.raises(UserError, match="No space left on device.*: make room on the disk"):
        CodecTrainer(settings(clips)).save(tmp_path / STATE_FILE, 3)
    assert not list(tmp_path.glob("training.*"))


def test_a_loss_that_is_not_finite_ends_training(
    clips: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CodecTrainer, "step", lambda self, number, batch: [1.0, 1.0, float("nan")][number])
    with pytest.raises(UserError, match="the loss of step 2 is nan: lower optimizer.muon_lr"):
        train(settings(clips, steps=7), tmp_path / "codec")
    assert not list((tmp_path / "codec").iterdir())


def test_an_interrupted_export_is_done_again(
    clips: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = CodecTrainer(settings(clips, steps=3))
    trainer.save(tmp_path / STATE_FILE, 3)
    (tmp_path / "codec.json").write_text("{}")
    argv = ["train_codec.py", "--output", str(tmp_path), "--steps", "3", "--channels", "4"]
    argv += ["--widths", str(list(SMALL)), "--data", json.dumps(plain(clips))]
    monkeypatch.setattr("sys.argv", argv)
    train_codec.main()
    found = VideoCodec.from_pretrained(tmp_path).state_dict()  # kernels were rounded to bf16
    for name, tensor in trainer.codec.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-8, atol=0)
    assert not (tmp_path / STATE_FILE).exists()


def test_a_missing_or_damaged_package_codec_says_how_to_make_it(
    codec: TinyCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packaged"
    monkeypatch.setattr(tiny, "PACKAGED", folder)
    with pytest.raises(UserError, match=r"packaged: there is no such folder.*train_codec.py .* codec.path"):
        TinyCodec.from_config(CodecConfig(name="tiny"))
    codec.save_pretrained(folder)
    found = TinyCodec.from_config(CodecConfig(name="tiny", subfolder="vae"))  # which is for codec.path only
    assert found.fingerprint() == codec.fingerprint()
    (folder / WEIGHTS_FILE).write_bytes(b"half")
    with pytest.raises(UserError, match=r"packaged.* has 4 bytes.*train_codec.py .* codec.path"):
        TinyCodec.from_config(CodecConfig(name="tiny"))


def test_a_codec_without_its_weights_is_not_loaded(codec: TinyCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    (tmp_path / META).unlink()
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match="codec tiny could not be read"):
        VideoCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize("widths", [(8, 16, 16), (40, 64, 128), (0, 16, 16), (16, 16)])
def test_impossible_widths_are_refused(widths: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=rf"widths = \[{widths[0]}, .*three multiples of 16"):
        TinyCodec(4, widths)
