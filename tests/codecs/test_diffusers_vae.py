"""The adapter for diffusers' VAEs, with tiny random VAEs in diffusers' format."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.base import VideoCodec
from stdit.codecs.diffusers_vae import DiffusersCodec
from stdit.errors import UserError
from stdit.models.size import tensor_bytes
from tests.codecs.tiny import TINY_VAES, save_tiny_vae

STRIDES = {
    "AutoencoderKL": (1, 2, 2),
    "AutoencoderKLCogVideoX": (4, 8, 8),
    "AutoencoderKLHunyuanVideo": (4, 8, 8),
    "AutoencoderKLLTXVideo": (8, 32, 32),
    "AutoencoderKLWan": (4, 8, 8),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"

every_vae = pytest.mark.parametrize("name", TINY_VAES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny_vae(name, tmp_path_factory.mktemp(name)) for name in TINY_VAES}


def build(name: str, path: Path, **settings: object) -> DiffusersCodec:
    codec = build_codec(CodecConfig(name=name, path=str(path), **settings))  # type: ignore[arg-type]
    assert isinstance(codec, DiffusersCodec)
    return codec


@every_vae
@pytest.mark.parametrize("size", [(1, 32, 32), (2, 20, 37), (5, 8, 8), (16, 8, 8), (21, 8, 8)])
def test_shapes_and_ranges(folders: dict[str, Path], name: str, size: tuple[int, int, int]) -> None:
    codec = build(name, folders[name])
    assert codec.stride == STRIDES[name]
    video = torch.rand(2, 3, *size) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (2, codec.channels, *codec.latent_shape(*size))
    assert latents.dtype == torch.float32
    assert torch.equal(codec.encode(video), latents)
    torch.testing.assert_close(codec.encode(video[1:]), latents[1:], atol=1e-4, rtol=1e-4)

    # Uncut, the VAE makes exactly the frames that the adapter believes.
    whole = codec.decode(latents)
    assert whole.shape == (2, 3, *codec.pixel_shape(*latents.shape[2:]))
    decoded = codec.decode(latents, *size)
    assert torch.equal(decoded, whole[:, :, : size[0], : size[1], : size[2]])
    assert decoded.isfinite().all()
    assert decoded.abs().max() <= 1


@every_vae
def test_first_frame_stands_alone_in_causal_vaes(folders: dict[str, Path], name: str) -> None:
    codec = build(name, folders[name])
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    alone, first = codec.encode(video[:, :, :1])[:, :, 0], codec.encode(video)[:, :, 0]
    # The group norms of CogVideoX and HunyuanVideo see all frames, so these are causal in their sizes only.
    if name not in ("AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"):
        torch.testing.assert_close(alone, first, atol=1e-4, rtol=1e-3)
    assert codec.latent_shape(1, 32, 32)[0] == 1
    assert codec.latent_shape(17, 32, 32)[0] == {1: 17, 4: 5, 8: 3}[codec.stride[0]]


def test_latents_are_normalised_with_the_constants_of_the_vae(folders: dict[str, Path]) -> None:
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1

    def raw(name: str, pixels: torch.Tensor) -> torch.Tensor:
        vae = getattr(diffusers, name).from_pretrained(folders[name])
        with torch.no_grad():
            return vae.encode(pixels).latent_dist.mode()

    name = "AutoencoderKLWan"
    mean, std = (
        torch.tensor(TINY_VAES[name][key]).view(4, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    torch.testing.assert_close(build(name, folders[name]).encode(video), (raw(name, video) - mean) / std)
    name = "AutoencoderKLHunyuanVideo"
    torch.testing.assert_close(build(name, folders[name]).encode(video), raw(name, video) * 0.476986)
    name = "AutoencoderKLCogVideoX"
    torch.testing.assert_close(build(name, folders[name]).encode(video), raw(name, video) * 1.15258426)
    name = "AutoencoderKL"
    image = (raw(name, video[:, :, 3]) - 0.1) * 0.18215
    torch.testing.assert_close(build(name, folders[name]).encode(video)[:, :, 3], image)
    name = "AutoencoderKLLTXVideo"
    tensors = load_file(folders[name] / WEIGHTS)
    mean, std = (tensors[key].view(8, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(build(name, folders[name]).encode(video), (raw(name, video) - mean) / std)


@every_vae
def test_decode_undoes_the_normalisation(folders: dict[str, Path], name: str) -> None:
    codec = build(name, folders[name])
    latents = torch.randn(1, codec.channels, 3, 2, 2)
    z = latents / codec.factor + codec.shift
    if name == "AutoencoderKL":
        expected = torch.stack([codec.vae.decode(frame).sample for frame in z.unbind(2)], 2)
    elif name == "AutoencoderKLLTXVideo":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = codec.vae.decode(z, torch.zeros(1)).sample
    else:
        expected = codec.vae.decode(z).sample
    torch.testing.assert_close(codec.decode(latents), expected.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_decoder_noise_is_fixed_and_moves_no_generator(folders: dict[str, Path]) -> None:
    codec = build("AutoencoderKLLTXVideo", folders["AutoencoderKLLTXVideo"])
    latents = torch.randn(1, codec.channels, 2, 1, 1)
    before = torch.get_rng_state()
    assert torch.equal(codec.decode(latents), codec.decode(latents))
    assert torch.equal(torch.get_rng_state(), before)


@every_vae
def test_bf16(folders: dict[str, Path], name: str) -> None:
    codec, exact = build(name, folders[name], dtype="bf16"), build(name, folders[name])
    assert codec.dtype == torch.bfloat16
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    latents = codec.encode(video)
    assert latents.dtype == codec.decode(latents).dtype == torch.float32
    torch.testing.assert_close(latents, exact.encode(video), atol=0.1, rtol=0.1)


@every_vae
def test_saved_and_loaded(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    codec = build(name, folders[name])
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    codec.save_pretrained(tmp_path / "codec")
    assert {file.suffix for file in (tmp_path / "codec").iterdir()} == {".json", ".safetensors"}
    again = VideoCodec.from_pretrained(tmp_path / "codec", torch_dtype=torch.float32)
    assert type(again) is DiffusersCodec
    assert again.fingerprint() == codec.fingerprint()
    video = torch.rand(1, 3, 5, 16, 16)
    assert torch.equal(again.encode(video), codec.encode(video))
    save_tiny_vae(name, tmp_path / "other", seed=1)
    assert build(name, tmp_path / "other").fingerprint() != codec.fingerprint()


def test_whole_pipeline_folder(tmp_path: Path) -> None:
    save_tiny_vae("AutoencoderKL", tmp_path / "vae")
    with pytest.raises(UserError, match=r"its folders vae have: choose one by codec\.subfolder"):
        build("AutoencoderKL", tmp_path)
    assert build("AutoencoderKL", tmp_path, subfolder="vae").channels == 4


@pytest.mark.parametrize("path", ["/no/such/folder", "./neither", "a/b/c"])
def test_a_missing_path_is_an_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    with pytest.raises(UserError, match="no such local folder") as caught:
        build_codec(CodecConfig(name="AutoencoderKLWan", path=path))
    assert path in str(caught.value)
    assert "hub id" in str(caught.value)


def test_no_path() -> None:
    with pytest.raises(UserError, match=r"codec\.path is not set"):
        build_codec(CodecConfig(name="AutoencoderKLWan"))


def test_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no local folder 'nobody/nothing', and the hub did not give"):
        build_codec(CodecConfig(name="AutoencoderKLWan", path="nobody/nothing"))


def test_a_vae_of_another_class_is_an_error(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"holds AutoencoderKL: use codec\.name AutoencoderKL"):
        build("AutoencoderKLWan", folders["AutoencoderKL"])


def test_folders_with_bad_weights(tmp_path: Path) -> None:
    name = "AutoencoderKLWan"
    save_tiny_vae(name, tmp_path)
    weights = tmp_path / WEIGHTS
    tensors, content = load_file(weights), weights.read_bytes()

    weights.write_bytes(content[:-50])
    with pytest.raises(UserError, match="could not be read from the folder"):
        build(name, tmp_path)
    save_file({key: value for key, value in tensors.items() if "conv_in" not in key}, weights)
    with pytest.raises(UserError, match="lacks 4 of its weights"):
        build(name, tmp_path)
    save_file(tensors | {"quant_conv.bias": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match="could not be read from the folder"):
        build(name, tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        build(name, tmp_path)
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        build(name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    weights.write_bytes(content)
    with pytest.raises(UserError, match="holds no JSON object"):
        build(name, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        build(name, tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        build(name, weights)


@every_vae
def test_a_released_encoder_is_reloaded_when_it_is_needed(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    codec, whole, read = build(name, folders[name]), build(name, folders[name]), []
    codec.release_encoder(lambda: read.append(1) or build(name, folders[name]))
    assert tensor_bytes(codec) < 0.8 * tensor_bytes(whole)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    latents = whole.encode(video)
    assert torch.equal(codec.decode(latents), whole.decode(latents))
    assert codec.fingerprint() == whole.fingerprint() and not read
    codec.save_pretrained(tmp_path)
    assert VideoCodec.from_pretrained(tmp_path).fingerprint() == whole.fingerprint() and len(read) == 1
    assert torch.equal(codec.encode(video), latents) and torch.equal(codec.encode(video), latents)
    assert tensor_bytes(codec) == tensor_bytes(whole) and len(read) == 2


def test_reloading_different_weights_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    other = save_tiny_vae("AutoencoderKL", tmp_path, seed=1)
    codec = build("AutoencoderKL", folders["AutoencoderKL"])
    codec.release_encoder(lambda: build("AutoencoderKL", other))
    with pytest.raises(UserError, match="codec.path holds other weights than when the run began"):
        codec.encode(torch.zeros(1, 3, 1, 32, 32))
