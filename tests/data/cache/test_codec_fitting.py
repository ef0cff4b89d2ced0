import pytest
import torch

from stdit.codecs.pca import PCACodec
from stdit.data.cache.codec_fitting import fit_codec, fitted_name
from stdit.data.cache.maintenance import prune_cache, verify_cache


def codec():
    return PCACodec((2, 8, 8), channels=4, fit_clips=3)


def test_a_codec_is_fitted_once_to_the_same_clips(work, monkeypatch, tmp_path, write_video):
    first = fit_codec(codec(), work().plan, work().config)

    def fail(*args):
        raise AssertionError("fitted")

    with monkeypatch.context() as patch:
        patch.setattr(PCACodec, "fit", fail)
        again = fit_codec(codec(), work(seed=5).plan, work().config)
        with pytest.raises(AssertionError, match="fitted"):
            fit_codec(PCACodec((2, 8, 8), channels=5, fit_clips=3), work().plan, work().config)
        with pytest.raises(AssertionError, match="fitted"):
            fit_codec(codec(), work(cache="none").plan, work(cache="none").config)
    assert again.fingerprint() == first.fingerprint()
    video = torch.rand(1, 3, 8, 32, 32) * 2 - 1
    assert torch.equal(again.encode(video), first.encode(video))
    write_video(tmp_path / "1.mp4", num_frames=8)
    assert fit_codec(codec(), work().plan, work().config).fingerprint() != first.fingerprint()


def test_a_codec_fitted_to_other_clips_than_planned_is_not_kept(work, config, tmp_path):
    plan = work().plan
    (tmp_path / "1.mp4").write_bytes(b"damaged")
    assert fit_codec(codec(), plan, config).fitted
    assert not (config.cache_folder() / "codecs").exists()


def test_a_damaged_codec_is_fitted_again(work, config, caplog):
    first = fit_codec(codec(), work().plan, config)
    (weights,) = config.cache_folder().glob("codecs/*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    assert fit_codec(codec(), work().plan, config).fingerprint() == first.fingerprint()
    assert "is damaged" in caplog.text


def test_prune_removes_fitted_codecs_that_no_run_uses_and_broken_ones(work, config):
    plan = work().plan
    used, unused, broken = (PCACodec((2, 8, 8), channels=n, fit_clips=3) for n in (4, 5, 6))
    for one in (used, unused, broken):
        fit_codec(one, plan, config)
    folder = config.cache_folder()
    names = [fitted_name(one, plan, config) for one in (used, unused, broken)]
    assert sorted(path.name for path in (folder / "codecs").iterdir()) == sorted(names)
    assert verify_cache(folder).codecs == 3 and not verify_cache(folder).broken

    (weights,) = (folder / "codecs" / names[2]).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    assert verify_cache(folder).broken.keys() == {f"codecs/{names[2]}"}
    freed = sum(path.stat().st_size for path in (folder / "codecs" / names[2]).iterdir())
    dry = prune_cache(folder, dry_run=True)
    assert (dry.codecs, dry.bytes, dry.files.keys()) == (1, freed, {f"codecs/{names[2]}"})
    assert "1 fitted codecs" in str(dry) and weights.exists()
    assert prune_cache(folder).codecs == 1 and not weights.parent.exists()

    kept = prune_cache(folder, wanted_codecs=names[:1])
    assert (kept.codecs, kept.entries) == (1, 0)
    assert [path.name for path in (folder / "codecs").iterdir()] == names[:1]
    assert prune_cache(folder, wanted_codecs=names[:1]).codecs == 0
