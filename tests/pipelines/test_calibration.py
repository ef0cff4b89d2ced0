"""``sample.py --calibrate``, and the measures of likeness that it prints."""

from pathlib import Path

import pytest
import torch

from stdit.pipelines import calibration
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.sampling import sample_to_files
from stdit.pipelines.similarity import psnr, ssim
from tests.pipelines.tiny import tiny_pipeline, write_run

TRIED = (0.01, 0.16, 0.3, 0.9)


def test_a_table_says_what_each_threshold_saves_and_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "TRIED", TRIED)  # for the steps of a tiny model
    run = write_run(tmp_path / "run", tiny_pipeline(tmp_path))
    config = SampleConfig(
        checkpoint=str(run),
        prompt=["a red circle", "a blue square"],
        num_inference_steps=12,
        output=str(tmp_path / "out"),
        calibrate=True,
    )
    assert sample_to_files(config) == [] and not (tmp_path / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index(next(one for one in lines if "PSNR" in one)) + 1 :]]
    rows = {row[0]: row[1:] for row in table[: len(TRIED) + 1]}
    assert list(rows) == ["off", *map(str, TRIED)]
    assert rows["off"] == ["24.0", "0%"]
    calls = [float(rows[str(threshold)][0]) for threshold in TRIED]
    assert calls == sorted(calls, reverse=True) and calls[0] == 24 > calls[-1]
    assert rows[str(TRIED[0])][2] == "100.0" and 5 < float(rows[str(TRIED[-1])][2]) < 90
    assert lines[-2].startswith("hardly any difference (45 dB): ")


def test_likeness_of_videos() -> None:
    videos = torch.rand(2, 3, 4, 16, 20, generator=torch.Generator().manual_seed(0))
    assert psnr(videos, videos).tolist() == [100, 100]
    torch.testing.assert_close(ssim(videos, videos), torch.ones(2).double())
    torch.testing.assert_close(psnr(videos, videos + 0.1), torch.full((2,), 20.0).double())
    noisy = videos + 0.1 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(1))
    noisier = videos + 0.3 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(1))
    assert (ssim(videos, noisier) < ssim(videos, noisy)).all() and (ssim(videos, noisy) < 1).all()
    torch.testing.assert_close(ssim(videos, noisy), ssim(noisy, videos))


def test_ssim_of_one_window_is_that_of_its_formula() -> None:
    x, y = torch.rand(2, 1, 1, 1, 11, 11, generator=torch.Generator().manual_seed(3)).double()
    places = torch.arange(-5, 6).double()
    line = torch.exp(-(places**2) / 4.5)
    window = line[:, None] * line / line.sum() ** 2
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy, vxy = ((window * a).sum() for a in ((x - mx) ** 2, (y - my) ** 2, (x - mx) * (y - my)))
    expected = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    torch.testing.assert_close(ssim(x, y)[0], expected)
