"""The converter of adapters: names there and back, and full weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scripts.convert_lora import main
from stdit.lora.files import base_hash, read_adapter, write_adapter
from stdit.models.stdit import STDiT
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.pipeline import STDiTPipeline
from tests.launch import exit_code
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_pipeline


@pytest.fixture
def pipe(tmp_path: Path) -> STDiTPipeline:
    return tiny_pipeline(tmp_path)


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its exit code."""
    return exit_code(main, monkeypatch, *arguments)


def sample(pipe: STDiTPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found: Tensor = pipe("a red circle", generator=generator, output_type="latent").frames
    return found


@pytest.mark.parametrize("target", ["kohya", "comfyui"])
def test_there_and_back(
    target: str, pipe: STDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_random_adapter(tmp_path / "a.safetensors", pipe.transformer)
    adapter = read_adapter(source)
    write_adapter(source, adapter.weights, adapter.settings, "01ab", "sks")
    there, back = tmp_path / f"{target}.safetensors", tmp_path / "back"
    assert convert(monkeypatch, source, "--to", target, "--output", there) == 0
    assert convert(monkeypatch, there, "--to", "peft", "--output", back) == 0
    found, expected = load_file(back / "pytorch_lora_weights.safetensors"), load_file(source)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for file in (there, back):
        assert (read_adapter(file).trigger, read_adapter(file).base_hash) == ("sks", "01ab")
    pipe.load_lora_weights(str(source), adapter_name="a", other_base=True)
    first = sample(pipe)
    for name, folder, file in (("b", back, None), ("c", tmp_path, there.name), ("d", there, None)):
        pipe.unload_lora_weights()
        assert not torch.equal(sample(pipe), first)
        pipe.load_lora_weights(str(folder), weight_name=file, adapter_name=name, other_base=True)
        assert torch.equal(sample(pipe), first)


@pytest.mark.parametrize("kind", ["pipeline", "model"])
def test_merging_into_full_weights(
    kind: str, pipe: STDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = base_hash(pipe.transformer)
    one = write_random_adapter(tmp_path / "a.safetensors", pipe.transformer, known, targets="spatial")
    two = write_random_adapter(tmp_path / "b.safetensors", pipe.transformer, known, targets="temporal")
    base, merged = tmp_path / "base", tmp_path / "merged"
    (pipe if kind == "pipeline" else pipe.transformer).save_pretrained(base)
    flags = ["--merge_into", base, "--output", merged]
    assert convert(monkeypatch, f"{one}:0.5", two, *flags) == 0
    pipe.load_lora_weights(str(one), adapter_name="a")
    pipe.load_lora_weights(str(two), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    expected = sample(pipe)
    if kind == "pipeline":
        again = load_pipeline(merged)[0]
    else:
        again = tiny_pipeline(tmp_path)
        again.transformer = STDiT.from_pretrained(merged)
    torch.testing.assert_close(sample(again), expected, atol=1e-5, rtol=1e-5)


def test_what_is_refused(
    pipe: STDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = write_random_adapter(tmp_path / "a.safetensors", pipe.transformer, "xxh3:0")
    pipe.transformer.save_pretrained(tmp_path / "base")
    new = ["--output", tmp_path / "new"]
    for arguments, message in (
        ([file, *new], "give --to or --merge_into"),
        ([file, "--to", "kohya", "--output", file], "exists already"),
        ([file, file, "--to", "kohya", *new], "are for --merge_into: give one SRC"),
        ([f"{file}:0.5", "--to", "kohya", *new], "are for --merge_into"),
        ([tmp_path / "none", "--to", "kohya", *new], "there is no such file or folder"),
        ([file, "--merge_into", tmp_path / "base", *new], "was trained on the weights xxh3:0"),
    ):
        assert convert(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert convert(monkeypatch, file, "--merge_into", tmp_path / "base", "--other_base", *new) == 0


@pytest.mark.parametrize("flags", [("--to", "kohya"), ("--merge_into", "base")])
def test_a_place_that_cannot_be_written(
    flags: tuple[str, str],
    pipe: STDiTPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_random_adapter(tmp_path / "a.safetensors", pipe.transformer)
    pipe.transformer.save_pretrained(tmp_path / "base")
    before = sorted(tmp_path.iterdir())
    assert convert(monkeypatch, file, *flags, "--output", file / "new") == 2
    assert f"output {file} cannot be written (" in capsys.readouterr().err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stdit.lora.files.save_file", full)
    monkeypatch.setattr(STDiT, "save_pretrained", full)
    assert convert(monkeypatch, file, *flags, "--output", tmp_path / "new") == 2
    assert "could not be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
