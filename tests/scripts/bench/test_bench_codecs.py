"""The table of scripts/bench/codecs.py."""

import pytest

from scripts.bench import codecs
from stdit.codecs.memory import decoding_bytes
from stdit.codecs.vaes import VAES
from stdit.parallel.sequence.planner import format_gib
from tests.launch import exit_code


@pytest.mark.slow
def test_each_codec_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["codecs.py", "--resolution", "144p", "--num_frames", "9"])
    codecs.main()
    title, _, _, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert title == "GiB for 9 frames of 144 x 256 pixels (height x width)"
    cells = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert list(cells) == ["pixel", "pca", "tiny", "opensora", *VAES]
    codec = codecs.codec_without_weights("AutoencoderKLWan")
    needed = format_gib(decoding_bytes(codec, codec.latent_shape(9, 144, 256)))
    assert cells["AutoencoderKLWan"] == ["16x3x18x32", "0.473", needed, cells["AutoencoderKLWan"][3]]
    assert all(float(own[3]) > 0 for own in cells.values())


def test_an_unknown_codec_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(codecs.main, monkeypatch, "--codecs", "VAE") == 2
    assert (
        "--codecs VAE: must be one of pixel, pca, tiny, opensora, AutoencoderKL," in capsys.readouterr().err
    )
