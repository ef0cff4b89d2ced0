import pytest
import torch
from accelerate.state import AcceleratorState

from scripts.bench.loader import main, parse_args
from tests.training.tiny import tiny_settings


def test_each_loader_is_measured_and_compared_with_training(tmp_path, capsys):
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    manifest = str(tmp_path / "clips" / "manifest.csv")
    main(
        [
            *tiny_settings(tmp_path),
            "--data.manifest",
            manifest,
            "--seconds",
            "0.02",
            "--loaders=1",
            "--threads",
            "1",
        ]
    )
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(None, 2)[0] for line in lines[2:]] == [
        "training", "memory", "disk, 0 loaders", "disk, 1 loaders", "mp4, 0 loaders", "mp4, 1 loaders",
        "mp4, codec, 1 loaders", "(text encoder)",
    ]  # fmt: skip
    rates = [float(line.split()[-2].replace(",", "")) for line in lines[2:]]
    ratios = [float(line.split()[-1].rstrip("x")) for line in lines[2:]]
    assert ratios[0] == 1 and all(rate > 0 for rate in rates)
    assert ratios[1] == pytest.approx(rates[1] / rates[0], rel=0.1)


def test_its_own_flags_are_separated_from_those_of_training():
    own, rest = parse_args(["--config", "a.yaml", "--seconds=3", "--loaders", "0", "--data.crop", "random"])
    assert (own.seconds, own.loaders, own.threads) == (3, 0, 2)
    assert rest == ["--config", "a.yaml", "--data.crop", "random"]
