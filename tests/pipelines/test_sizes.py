"""Named sizes and lengths: what they are for a checkpoint, and that codec and model divide them."""

import pytest

from stdit.codecs.pca import PCACodec
from stdit.codecs.pixel import PixelCodec
from stdit.data.config import ASPECT_RATIOS, RESOLUTIONS, resolve_size
from stdit.models.stdit import STDiT
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.sampling import sample_to_files
from stdit.pipelines.sizes import list_sizes, size_multiple
from tests.codecs.tiny import tiny_opensora_vae
from tests.pipelines.tiny import tiny_pipeline, write_run


@pytest.mark.parametrize(
    "stride, patch, multiple",
    [
        ((4, 8, 8), (1, 2, 2), 16),
        ((4, 8, 8), (1, 1, 1), 8),
        ((1, 3, 5), (1, 1, 1), 30),
        ((1, 1, 1), (1, 1, 1), 2),
    ],
)
def test_named_sizes_are_multiples(stride, patch, multiple):
    codec = PCACodec(stride, 8 if stride != (1, 1, 1) else 3)
    assert size_multiple(codec, patch) == multiple
    for resolution in RESOLUTIONS:
        for aspect_ratio in ASPECT_RATIOS:
            for side, step, edge in zip(
                resolve_size(resolution, aspect_ratio, multiple), stride[1:], patch[1:], strict=True
            ):
                assert side % (step * edge) == side % 2 == 0


def test_open_soras_sizes():
    assert size_multiple(tiny_opensora_vae(), (1, 2, 2)) == 2


def test_table_of_sizes_without_loading_the_model(tmp_path, monkeypatch):
    pipe = tiny_pipeline(tmp_path)
    run = write_run(tmp_path / "run", pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    for name in ("from_config", "from_pretrained"):
        monkeypatch.setattr(STDiT, name, lambda *_, **__: pytest.fail("loaded the model"))
    for checkpoint in (run, run / "checkpoints" / "step-00000010", tmp_path / "pipeline"):
        table = list_sizes(SampleConfig(checkpoint=str(checkpoint))).splitlines()
        assert "multiples of 4" in table[0]
        assert table[1].split() == list(ASPECT_RATIOS)
        assert table[3].split()[:4] == ["240p", "488x208", "428x240", "392x260"]
        assert "2s   51 frames (51 in latents)" in table[-4]


def test_named_size_is_rounded_for_the_checkpoint(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", tiny_pipeline(tmp_path, PixelCodec()))
    made = []
    monkeypatch.setattr(
        "stdit.pipelines.runner.sample_rounds", lambda pipe, requests, *_: made.extend(requests) or []
    )
    settings = dict(checkpoint=str(run), prompt="a", resolution="42", output=str(tmp_path / "out"))
    sample_to_files(SampleConfig(**settings, aspect_ratio="1:1", format=["mp4"]))
    assert (made[0].settings.height, made[0].settings.width) == (40, 40)
