"""The codecs without pretrained weights: pixel and pca."""

import pytest
import torch
from einops import rearrange

from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.base import VideoCodec
from stdit.codecs.pca import PATCHES_PER_CLIP, PCACodec
from stdit.errors import UserError


def videos(count: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, 4, generator=generator)
    smooth = coarse.repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    return list(0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=generator) - 0.5)


def fitted(channels: int = 24, stride: tuple[int, int, int] = (2, 4, 4), seed: int = 0) -> PCACodec:
    codec = PCACodec(stride, channels)
    codec.fit(videos(seed=seed))
    return codec


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 17, 30)])
def test_pixel_is_lossless(size: tuple[int, int, int]) -> None:
    codec = build_codec(CodecConfig(name="pixel"))
    video = torch.rand(2, 3, *size) * 2 - 1
    assert codec.latent_shape(*size) == size
    assert torch.equal(codec.decode(codec.encode(video), *size), video)
    assert codec.latent_variance is None
    assert codec.device == torch.device("cpu")


def test_pixel_has_no_weights_to_load() -> None:
    with pytest.raises(UserError, match="leave codec.path out"):
        build_codec(CodecConfig(name="pixel", path="somewhere"))


@pytest.mark.parametrize("size", [(1, 4, 4), (8, 16, 16), (7, 13, 18)])
def test_pca_with_all_components_is_exact(size: tuple[int, int, int]) -> None:
    codec = fitted(channels=96)
    video = torch.rand(2, 3, *size) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (2, 96, *codec.latent_shape(*size))
    torch.testing.assert_close(codec.decode(latents, *size), video, atol=2e-5, rtol=0)


def test_pca_latents_have_the_stated_variance() -> None:
    codec = fitted()
    data = torch.stack(videos())
    latents = rearrange(codec.encode(data), "b c t h w -> (b t h w) c")
    assert codec.latent_variance is not None
    torch.testing.assert_close(latents.var(0, correction=0), codec.latent_variance, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(latents.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    assert codec.latent_variance.mean().item() == pytest.approx(1, rel=1e-4)
    assert bool((codec.latent_variance.diff() <= 0).all())


def test_pca_explained_variance_is_what_the_reconstruction_keeps() -> None:
    codec = PCACodec((2, 4, 4), 10)
    explained = codec.fit(videos())
    data = torch.stack(videos())
    lost = (codec._decode(codec.encode(data)) - data).square().sum()
    patches = codec._patches(data).flatten(0, 3)
    total = (patches - patches.mean(0)).square().sum()
    assert 0 < explained < 1
    assert 1 - (lost / total).item() == pytest.approx(explained, abs=1e-4)


def test_pca_fit_repeats_and_stops_at_fit_clips() -> None:
    assert fitted().fingerprint() == fitted().fingerprint() != fitted(seed=1).fingerprint()
    few = PCACodec((2, 4, 4), 24, fit_clips=2)
    few.fit(iter(videos()))
    two = PCACodec((2, 4, 4), 24)
    two.fit(videos()[:2])
    assert few.fingerprint() == two.fingerprint()


def test_pca_samples_the_patches_of_large_clips() -> None:
    codec = PCACodec((1, 4, 4), 8)
    (rows,) = codec._sampled_patches([torch.rand(3, 2, 90, 90)])
    assert rows.shape == (PATCHES_PER_CLIP, 48)


def test_pca_saved_and_loaded(tmp_path) -> None:
    codec = fitted()
    codec.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    for again in (
        VideoCodec.from_pretrained(tmp_path),
        build_codec(CodecConfig(name="pca", path=str(tmp_path))),
    ):
        assert isinstance(again, PCACodec)
        assert again.fitted
        assert (again.stride, again.channels) == ((2, 4, 4), 24)
        assert again.explained_variance == codec.explained_variance
        assert again.fingerprint() == codec.fingerprint()
        video = torch.stack(videos(2))
        assert torch.equal(again.encode(video), codec.encode(video))


def test_pca_unfitted() -> None:
    codec = build_codec(CodecConfig(name="pca"))
    assert isinstance(codec, PCACodec)
    assert not codec.fitted
    assert codec.latent_variance is None
    assert (codec.stride, codec.channels) == ((4, 8, 8), 160)
    with pytest.raises(UserError, match="not fitted"):
        codec.encode(torch.zeros(1, 3, 4, 8, 8))
    with pytest.raises(UserError, match="not fitted"):
        codec.decode(torch.zeros(1, 160, 1, 1, 1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no video"),
        ([torch.ones(3, 2, 4, 4)], "a single colour"),
        ([torch.full((3, 2, 4, 4), torch.nan)], "finite"),
    ],
)
def test_pca_cannot_be_fitted(bad: list[torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PCACodec((2, 4, 4), 8).fit(bad)


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match="3 x 2 x 4 x 4 = 96 values"):
        build_codec(CodecConfig(name="pca", stride=(2, 4, 4), channels=97))
    with pytest.raises(UserError, match="at least 1"):
        build_codec(CodecConfig(name="pca", stride=(0, 8, 8)))
    with pytest.raises(UserError, match="at least 1 clip"):
        CodecConfig(fit_clips=0)
    with pytest.raises(UserError, match="must be one of pixel"):
        build_codec(CodecConfig(name="vqgan"))  # type: ignore[arg-type]


def test_wrong_tensors() -> None:
    codec = fitted()
    with pytest.raises(ValueError, match="a video is a float tensor"):
        codec.encode(torch.zeros(3, 2, 4, 4))
    with pytest.raises(ValueError, match="a video is a float tensor"):
        codec.encode(torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="latents of pca"):
        codec.decode(torch.zeros(1, 3, 2, 4, 4))
    with pytest.raises(ValueError, match="fewer than"):
        codec.decode(torch.zeros(1, 24, 1, 1, 1), num_frames=3)


def test_folders_that_hold_no_codec(tmp_path) -> None:
    with pytest.raises(UserError, match="has no codec.json"):
        VideoCodec.from_pretrained(tmp_path)
    (tmp_path / "codec.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        VideoCodec.from_pretrained(tmp_path)
    (tmp_path / "codec.json").write_text('{"name": "os.system"}')
    with pytest.raises(UserError, match="must be one of"):
        VideoCodec.from_pretrained(tmp_path)
    fitted().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="safetensors has .* bytes, but .* were written"):
        VideoCodec.from_pretrained(tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="is damaged"):
        VideoCodec.from_pretrained(tmp_path)
    build_codec(CodecConfig(name="pixel")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no PCACodec"):
        build_codec(CodecConfig(name="pca", path=str(tmp_path)))
