"""Named sizes and lengths: what they are for a checkpoint, and that codec and model divide them."""

import pytest

from stdit.codecs.pca import PCACodec
from stdit.codecs.pixel import PixelCodec
from stdit.data.config import ASPECT_RATIOS, RESOLUTIONS, resolve_size
from stdit.models.stdit import STDiT
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.loading import load_pipeline
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
        assert table[8] == "lengths at 8 frames per second, by --num_frames:"
        assert table[10].split() == ["51", "6.38", "s", "(51", "in", "latents)"]
        assert table[-1] == "trained on: not recorded"


def test_named_size_is_rounded_for_the_checkpoint(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", tiny_pipeline(tmp_path, PixelCodec()))
    made = []
    monkeypatch.setattr(
        "stdit.pipelines.runner.sample_rounds", lambda pipe, requests, *_: made.extend(requests) or []
    )
    settings = dict(checkpoint=str(run), prompt="a", resolution="42", output=str(tmp_path / "out"))
    sample_to_files(SampleConfig(**settings, aspect_ratio="1:1", format=["mp4"]))
    assert (made[0].settings.height, made[0].settings.width) == (40, 40)


def test_sizes_and_lengths_that_the_model_was_trained_on_are_marked(tmp_path):
    sizes = [
        {"num_frames": 51, "height": 240, "width": 428, "fps": 24.0, "clips": 3},
        {"num_frames": 1, "height": 20, "width": 12, "fps": 24.0, "clips": 1},
    ]
    run = write_run(tmp_path / "run", tiny_pipeline(tmp_path), fps=24.0, trained_sizes=sizes)
    load_pipeline(run)[0].save_pretrained(tmp_path / "pipeline")
    for checkpoint in (run, tmp_path / "pipeline"):
        table = list_sizes(SampleConfig(checkpoint=str(checkpoint)))
        assert "488x208   428x240*    392x260" in table and table.count("x240*") == 1
        assert "lengths at 24 frames per second, by --num_frames; *: trained on:" in table
        assert (
            "51*   2.12 s  (51 in latents)" in table and "1*    image" in table and "102    4.25 s" in table
        )
        assert table.splitlines()[-3:] == [
            "trained on:",
            "    428x240, 51 frames at 24 fps (2.12 s), 3 clips",
            "      12x20, images, 1 clip",
        ]
    assert "51*   6.38 s" in list_sizes(SampleConfig(checkpoint=str(run), fps=8.0))
