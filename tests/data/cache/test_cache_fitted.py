import pytest
import torch

from stdit.codecs.pca import PCACodec
from stdit.data.cache.fitted import fitted


def codec():
    return PCACodec((2, 8, 8), channels=4, fit_clips=3)


def test_a_codec_is_fitted_once_to_the_same_clips(work, monkeypatch, tmp_path, write_video):
    first = fitted(codec(), work().plan, work().config)

    def fail(*args):
        raise AssertionError("fitted")

    with monkeypatch.context() as patch:
        patch.setattr(PCACodec, "fit", fail)
        again = fitted(codec(), work(seed=5).plan, work().config)
        with pytest.raises(AssertionError, match="fitted"):
            fitted(PCACodec((2, 8, 8), channels=5, fit_clips=3), work().plan, work().config)
        with pytest.raises(AssertionError, match="fitted"):
            fitted(codec(), work(cache="none").plan, work(cache="none").config)
    assert again.fingerprint() == first.fingerprint()
    video = torch.rand(1, 3, 8, 32, 32) * 2 - 1
    assert torch.equal(again.encode(video), first.encode(video))
    write_video(tmp_path / "1.mp4", num_frames=8)
    assert fitted(codec(), work().plan, work().config).fingerprint() != first.fingerprint()


def test_one_fitted_to_other_clips_than_planned_is_not_kept(work, config, tmp_path):
    plan = work().plan
    (tmp_path / "1.mp4").write_bytes(b"damaged")
    assert fitted(codec(), plan, config).fitted
    assert not (config.cache_folder() / "codecs").exists()


def test_a_damaged_one_is_fitted_anew(work, config, caplog):
    first = fitted(codec(), work().plan, config)
    (weights,) = config.cache_folder().glob("codecs/*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    assert fitted(codec(), work().plan, config).fingerprint() == first.fingerprint()
    assert "is damaged" in caplog.text
