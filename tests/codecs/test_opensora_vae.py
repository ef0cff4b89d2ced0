"""Open-Sora's video VAE with random weights: definition, weight names, lengths, saving and loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.base import VideoCodec
from stdit.codecs.opensora_vae import CausalConv3d, OpenSoraCodec, OpenSoraVAEConfig
from stdit.errors import UserError
from tests.codecs.tiny import tiny_opensora_vae
from tests.pipelines.tiny import tiny_pipeline

LENGTHS = (1, 5, 17, 18, 34, 51)


@pytest.fixture(scope="module")
def codec() -> OpenSoraCodec:
    return tiny_opensora_vae()


def video(frames: int, height: int = 8, width: int = 8, batch: int = 1) -> Tensor:
    return (
        torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    )


def test_names_and_shapes_are_those_of_the_released_weights() -> None:
    """As listed by mindspore-lab/mindone (examples/opensora_hpcai/tools/pt_pnames_vae1.2.txt)."""
    with torch.device("meta"):
        codec = OpenSoraCodec(OpenSoraVAEConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in codec.state_dict().items()}
    for name, shape in {
        "spatial_vae.module.encoder.conv_in.weight": (128, 3, 3, 3),
        "spatial_vae.module.encoder.conv_out.weight": (8, 512, 3, 3),
        "spatial_vae.module.decoder.conv_in.weight": (512, 4, 3, 3),
        "spatial_vae.module.decoder.conv_out.bias": (3,),
        "spatial_vae.module.quant_conv.weight": (8, 8, 1, 1),
        "spatial_vae.module.post_quant_conv.weight": (4, 4, 1, 1),
        "temporal_vae.encoder.conv_in.conv.weight": (128, 4, 3, 3, 3),
        "temporal_vae.encoder.block_res_blocks.1.0.conv1.conv.weight": (256, 128, 3, 3, 3),
        "temporal_vae.encoder.block_res_blocks.1.0.conv3.conv.weight": (256, 128, 1, 1, 1),
        "temporal_vae.encoder.block_res_blocks.3.3.conv2.conv.weight": (512, 512, 3, 3, 3),
        "temporal_vae.encoder.conv_blocks.1.conv.weight": (256, 256, 3, 3, 3),
        "temporal_vae.encoder.conv_blocks.2.conv.bias": (256,),
        "temporal_vae.encoder.conv2.conv.weight": (8, 512, 1, 1, 1),
        "temporal_vae.encoder.res_blocks.3.conv2.conv.weight": (512, 512, 3, 3, 3),
        "temporal_vae.quant_conv.conv.weight": (8, 8, 1, 1, 1),
        "temporal_vae.post_quant_conv.conv.weight": (4, 4, 1, 1, 1),
        "temporal_vae.decoder.conv1.conv.bias": (512,),
        "temporal_vae.decoder.block_res_blocks.0.0.conv3.conv.weight": (128, 256, 1, 1, 1),
        "temporal_vae.decoder.block_res_blocks.2.0.conv1.conv.weight": (256, 512, 3, 3, 3),
        "temporal_vae.decoder.conv_blocks.1.conv.weight": (512, 256, 3, 3, 3),
        "temporal_vae.decoder.conv_blocks.2.conv.weight": (1024, 512, 3, 3, 3),
        "temporal_vae.decoder.conv_out.conv.weight": (4, 128, 3, 3, 3),
    }.items():
        assert shapes[name] == shape, name
    # 20 residual blocks each way with two convolutions; conv3 where widths differ; and the other convolutions.
    convolutions = [
        name for name in shapes if name.startswith("temporal_vae") and name.endswith("conv.weight")
    ]
    assert len(convolutions) == 2 * 20 * 2 + 4 + 2 * 4 + 2
    assert not any("conv1.conv.bias" in name for name in shapes if "res_blocks" in name)


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 1), (17, 5), (18, 6), (34, 10), (51, 15), (102, 30), (408, 120)]
)
def test_published_counts(codec: OpenSoraCodec, frames: int, latents: int) -> None:
    assert codec.latent_shape(frames, 8, 8)[0] == latents
    with torch.device("meta"):
        released = OpenSoraCodec(OpenSoraVAEConfig())
    assert released.latent_shape(frames, 240, 320) == (latents, 30, 40)
    assert (released.stride, released.channels) == ((4, 8, 8), 4)


def test_which_latent_holds_a_frame(codec: OpenSoraCodec) -> None:
    assert [codec.latent_index(frame) for frame in (0, 1, 4, 5, 16, 17, 18, 50)] == [0, 1, 1, 2, 4, 5, 6, 14]
    for index in range(15):
        first = codec.start_frame(index)
        assert codec.latent_index(first) == index == codec.latent_index(first - 1) + 1


@pytest.mark.parametrize("frames", [3, 16, 20, 51])
def test_which_latent_holds_a_frame_of_a_whole_video(codec: OpenSoraCodec, frames: int) -> None:
    latents = codec.latent_shape(frames, 8, 8)[0]
    starts = [codec.start_frame(index, frames) for index in range(latents + 1)]
    assert starts[0] == 0 and starts[-1] == frames
    held = [codec.latent_index(frame, frames) for frame in range(frames)]
    assert held == [index for index in range(latents) for _ in range(starts[index], starts[index + 1])]


@pytest.mark.parametrize(
    "frames, start, end", [(51, 0, 17), (51, 17, 34), (51, 34, 51), (20, 17, 20), (16, 0, 16)]
)
def test_frames_inside_a_video(codec: OpenSoraCodec, frames: int, start: int, end: int) -> None:
    """Whole chunks are encoded as in the whole video."""
    clip = video(frames)
    first, found = codec.encode_span(clip[:, :, start:end], start, frames)
    torch.testing.assert_close(found, codec.encode(clip)[:, :, first : first + found.shape[2]])
    assert (first, first + found.shape[2]) == (
        codec.latent_index(start, frames),
        codec.latent_index(end - 1, frames) + 1,
    )


@pytest.mark.parametrize(
    "frames, start, count", [(51, 0, 12), (51, 40, 4), (20, -1, 1), (16, -1, 1), (16, -6, 3)]
)
def test_frames_inside_latent_frames_stand_still(
    codec: OpenSoraCodec, frames: int, start: int, count: int
) -> None:
    clip, start = video(count), start % frames
    still = [clip[:, :, min(max(frame - start, 0), count - 1)] for frame in range(frames)]
    first, found = codec.encode_span(clip, start, frames)
    end = codec.start_frame(first + found.shape[2], frames)
    torch.testing.assert_close(found, codec.encode(torch.stack(still[:end], 2))[:, :, first:])


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_see_no_later_frame(stride: int) -> None:
    conv = CausalConv3d(2, 3, 3, time_stride=stride)
    x = torch.randn(1, 2, 8, 4, 4)
    later = x.clone()
    later[:, :, 5:] += 1
    y, z = conv(x), conv(later)
    assert y.shape == (1, 3, 8 // stride, 4, 4)
    first = 5 // stride  # the first output that may see frame 5
    assert torch.equal(y[:, :, :first], z[:, :, :first])
    assert (y[:, :, first] - z[:, :, first]).abs().max() > 1e-3
    # The last output of a window ends with the window's last frame.
    expected = nn.functional.conv3d(x[:, :, -3:], conv.conv.weight, conv.conv.bias, padding=(0, 1, 1))
    torch.testing.assert_close(y[:, :, -1:], expected)


@pytest.mark.parametrize("frames", LENGTHS)
def test_chunks_are_encoded_independently(codec: OpenSoraCodec, frames: int) -> None:
    x = video(frames, batch=2)
    latents = codec.encode(x)
    assert latents.shape == (2, 4, *codec.latent_shape(frames, 8, 8)) and latents.dtype == torch.float32
    parts = torch.cat([codec.encode(chunk) for chunk in x.split(17, dim=2)], dim=2)
    torch.testing.assert_close(latents, parts)
    torch.testing.assert_close(codec.encode(x[1:]), latents[1:], atol=1e-5, rtol=1e-4)

    decoded = codec.decode(latents, frames)
    assert decoded.shape == x.shape and decoded.isfinite().all()
    counts = [len(chunk) for chunk in torch.arange(frames).split(17)]
    pieces = [codec.decode(z, n) for z, n in zip(latents.split(5, dim=2), counts, strict=True)]
    torch.testing.assert_close(decoded, torch.cat(pieces, dim=2))


def test_encoding_equals_the_definition(codec: OpenSoraCodec) -> None:
    """Encode a chunk of 6 frames step by step; 2 frames of zeros in front make 8."""
    x = video(6)
    vae: Any = codec.spatial_vae["module"]
    with torch.no_grad():
        images = torch.stack([vae.encode(x[:, :, t]).latent_dist.mode() for t in range(6)], dim=2) * 0.18215
        filled = torch.cat([torch.zeros(1, 4, 2, 4, 4), images], dim=2)
        mean = codec.temporal_vae.quant_conv(codec.temporal_vae.encoder(filled))[:, :4]
    shift, scale = (
        torch.tensor(values).view(1, 4, 1, 1, 1)
        for values in ((-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06))
    )
    torch.testing.assert_close(codec.encode(x), (mean - shift) / scale)

    z = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        frames = codec.temporal_vae.decoder(codec.temporal_vae.post_quant_conv(z * scale + shift))
        assert frames.shape[2] == 8
        expected = torch.stack([vae.decode(frames[:, :, t] / 0.18215).sample for t in range(2, 8)], dim=2)
    torch.testing.assert_close(codec.decode(z, 6), expected.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_frames_are_dropped_at_the_end_of_their_chunk(codec: OpenSoraCodec) -> None:
    latents = codec.encode(video(39))  # 17 + 17 + 5
    whole = codec.decode(latents)
    assert whole.shape[2] == 17 + 17 + 8 == codec.pixel_shape(12, 4, 4)[0]
    assert torch.equal(codec.decode(latents, 39), torch.cat([whole[:, :, :34], whole[:, :, 37:]], dim=2))
    assert torch.equal(codec.decode(latents, 20), whole[:, :, :20])
    with pytest.raises(ValueError, match="fewer than"):
        codec.decode(latents, 43)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 11), (1, 1)])
def test_any_size_is_restored(codec: OpenSoraCodec, height: int, width: int) -> None:
    x = video(3, height, width)
    latents = codec.encode(x)
    assert latents.shape[2:] == codec.latent_shape(3, height, width)
    assert codec.decode(latents, 3, height, width).shape == x.shape


def test_saved_and_loaded(codec: OpenSoraCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path / "codec")
    assert {f.name for f in (tmp_path / "codec").iterdir()} == {
        "codec.json",
        "config.json",
        "meta.json",
        "model.safetensors",
    }
    saved = load((tmp_path / "codec" / "model.safetensors").read_bytes())
    assert saved["scale"].shape == saved["shift"].shape == (1, 4, 1, 1, 1)
    assert {name.split(".")[0] for name in saved} == {"spatial_vae", "temporal_vae", "scale", "shift"}
    built = build_codec(CodecConfig(name="opensora", path=str(tmp_path / "codec")))
    for again in (built, VideoCodec.from_pretrained(tmp_path / "codec")):
        assert type(again) is OpenSoraCodec
        assert again.fingerprint() == codec.fingerprint()
        assert torch.equal(again.encode(video(18)), codec.encode(video(18)))
        assert not any(parameter.requires_grad for parameter in again.parameters())
    assert tiny_opensora_vae(seed=1).fingerprint() != codec.fingerprint()
    save_file(saved | {"scale": 2 * saved["scale"]}, tmp_path / "codec" / "model.safetensors")
    for load_saved in (
        VideoCodec.from_pretrained,
        lambda path: build_codec(CodecConfig(name="opensora", path=str(path))),
    ):
        with pytest.raises(UserError, match="model.safetensors has .* were written"):
            load_saved(tmp_path / "codec")
    (tmp_path / "codec" / "meta.json").unlink()
    other = VideoCodec.from_pretrained(tmp_path / "codec")
    assert other.fingerprint() != codec.fingerprint()
    torch.testing.assert_close(2 * other.encode(video(5)), codec.encode(video(5)))


def test_bf16(codec: OpenSoraCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    half = build_codec(CodecConfig(name="opensora", path=str(tmp_path), dtype="bf16"))
    assert half.dtype == torch.bfloat16
    latents = half.encode(video(5))
    assert latents.dtype == half.decode(latents, 5).dtype == torch.float32
    torch.testing.assert_close(latents, codec.encode(video(5)), atol=0.1, rtol=0.1)


def test_bad_weights(codec: OpenSoraCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> VideoCodec:
        return build_codec(CodecConfig(name="opensora", path=str(tmp_path)))

    codec.save_pretrained(tmp_path)
    (tmp_path / "meta.json").unlink()  # as a downloaded folder, which has none
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    saved = load(content)
    weights.write_bytes(content[:-50])
    with pytest.raises(UserError, match="cannot be read .* cut short"):
        build()
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="pointer of Git LFS"):
        build()
    lost = "temporal_vae.decoder.conv1.conv.bias"
    save_file({name: t for name, t in saved.items() if name != lost} | {"more": torch.zeros(2)}, weights)
    with pytest.raises(UserError, match=rf"missing: {lost} \[8\]\n  surplus: more \[2\]"):
        build()
    weights.write_bytes(content)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "VideoAutoencoderPipeline", "vae_2d": {}})
    )
    with pytest.raises(UserError, match="of another shape: spatial_vae.module.encoder.conv_in.weight"):
        build()  # a config.json of Open-Sora tells no sizes: those of the released VAE
    (tmp_path / "config.json").write_text(json.dumps({"scale": "much"}))
    with pytest.raises(UserError, match="opensora could not be read"):
        build()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no local folder 'nobody/nothing', and the hub did not give"):
        build_codec(CodecConfig(name="opensora", path="nobody/nothing"))


def test_in_a_pipeline(codec: OpenSoraCodec, tmp_path: Path) -> None:
    """The last chunk is padded in front, so the pipeline must pass the number of frames to the decoder."""
    pipe = tiny_pipeline(tmp_path, codec)
    call = dict(prompt="a red circle", num_frames=18, height=8, width=8, num_inference_steps=2)
    made = [
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type=kind).frames
        for kind in ("latent", "pt")
    ]
    assert made[0].shape == (1, 4, 6, 4, 4)
    torch.testing.assert_close(made[1], (codec.decode(made[0], 18).transpose(1, 2) / 2 + 0.5).clamp(0, 1))

    image = pipe(**call | {"num_frames": 1}, output_type="pt").frames
    assert image.shape == (1, 1, 3, 8, 8)
    pipe.save_pretrained(tmp_path / "pipeline")
    again = VideoCodec.from_pretrained(tmp_path / "pipeline" / "vae")
    assert again.fingerprint() == codec.fingerprint()
