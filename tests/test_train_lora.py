"""train.py with an adapter: what is trained, saved, resumed, exported and sampled, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stdit.errors import UserError
from stdit.lora.config import parse_lora
from stdit.lora.files import base_hash, read_adapter
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.requests import Request
from stdit.pipelines.runner import sample_videos
from tests.test_resume_changed import kill_in
from tests.test_train import do, same_state
from tests.training.tiny import tiny_settings

LORA = ["--name", "lora", "--lora.rank", "2", "--lora.alpha", "4", "--optimizer.name", "adamw"]
LORA += ["--trainer.steps", "4", "--optimizer.lr", "0.01"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, a run of two steps, and one of an adapter on it of four."""
    folder = tmp_path_factory.mktemp("trained")
    assert do([*tiny_settings(folder), "--trainer.steps", "2"]) == 0
    base = str(folder / "outputs" / "tiny")
    assert (
        do([*tiny_settings(folder), *LORA, "--init_from", base, "--validation.prompts", "[a red square]"])
        == 0
    )
    return folder


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Settings of another run like it, in a folder of its own."""
    shutil.copytree(trained / "clips", tmp_path / "clips")
    shutil.copytree(trained / "bert", tmp_path / "bert")
    base = str(trained / "outputs" / "tiny")
    return lambda *flags: [*tiny_settings(tmp_path), *LORA, "--init_from", base, *flags]


def test_checkpoints_hold_the_adapter_alone(trained: Path) -> None:
    run = trained / "outputs" / "lora"
    checkpoint = run / "checkpoints" / "step-00000004"
    for part in ("model", "ema", "optimizer"):
        names = load_file(next((checkpoint / part).glob("*.safetensors"))).keys()
        assert names and all(".lora_" in name for name in names), part
    assert not (run / "pipeline").exists()
    adapter = read_adapter(run / "lora")
    base, _ = load_pipeline(trained / "outputs" / "tiny")
    assert adapter.base_hash == base_hash(base.transformer)
    assert adapter.settings is not None and (adapter.settings["r"], adapter.settings["lora_alpha"]) == (
        2,
        4.0,
    )
    assert all(tensor.abs().max() > 0 for tensor in adapter.weights.values())
    assert list((run / "samples").rglob("*.mp4"))


def test_the_run_samples_as_its_base_with_the_file(trained: Path) -> None:
    run = trained / "outputs" / "lora"
    whole, weights = load_pipeline(run)
    base, of_base = load_pipeline(trained / "outputs" / "tiny")
    assert weights != of_base
    request = Request("a red square", 1)
    plain, expected = (next(iter(sample_videos(pipe, [request])))[1] for pipe in (base, whole))
    adapted = Request("a red square", 1, loras=(parse_lora(str(run / "lora")),))
    found = next(iter(sample_videos(base, [adapted])))[1]
    assert np.abs(found.astype(int) - expected).max() <= 1 and not np.array_equal(found, plain)


def test_a_killed_run_is_the_same(
    again: Callable[..., list[str]], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = again("--validation.prompts", "[a red square]")
    with monkeypatch.context() as patch:
        kill_in(patch, 3)
        with pytest.raises(RuntimeError, match="killed"):
            do(flags)
    assert do(flags) == 0
    runs = [folder / "outputs" / "lora" / "checkpoints" / "step-00000004" for folder in (trained, tmp_path)]
    assert same_state(*runs)


def test_an_adapter_goes_on_and_lies_on_top_of_others(
    again: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    file = str(trained / "outputs" / "lora" / "lora")
    flags = again("--lora.init_from", file, "--lora.merge", f"['{file}:0.5']", "--trainer.steps", "1")
    assert do(flags) == 0
    found = read_adapter(tmp_path / "outputs" / "lora" / "lora")
    assert found.base_hash != read_adapter(Path(file)).base_hash
    assert load_pipeline(tmp_path / "outputs" / "lora")[0].transformer.config.depth == 1
    with pytest.raises(UserError, match="is another kind of adapter: .* differ"):
        do(again("--name", "other", "--lora.init_from", file, "--lora.rank", "3"))


def test_the_codec_of_the_base_is_not_fitted_again(tmp_path: Path) -> None:
    codec = ["--codec.name", "pca", "--codec.stride", "[2, 4, 4]", "--codec.channels", "8"]
    base = str(tmp_path / "outputs" / "tiny")
    assert do([*tiny_settings(tmp_path), *codec, "--trainer.steps", "1"]) == 0
    manifest = tmp_path / "clips" / "manifest.csv"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:2]))
    assert do([*tiny_settings(tmp_path), *codec, *LORA, "--init_from", base, "--trainer.steps", "1"]) == 0
    fitted = [next((tmp_path / "outputs" / run / "codec").glob("*.safetensors")) for run in ("tiny", "lora")]
    assert fitted[0].read_bytes() == fitted[1].read_bytes()


def test_a_changed_base_is_refused(again: Callable[..., list[str]], trained: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    pipe, _ = load_pipeline(trained / "outputs" / "tiny")
    pipe.transformer.save_pretrained(base)
    assert do(again("--init_from", str(base), "--trainer.steps", "2")) == 0
    with torch.no_grad():
        pipe.transformer.t_block[1].bias += 1
    shutil.rmtree(base)
    pipe.transformer.save_pretrained(base)
    with pytest.raises(UserError, match="base's weights"):
        do(again("--init_from", str(base)))
    with pytest.raises(UserError, match="its adapter was trained on the weights xxh3:"):
        load_pipeline(tmp_path / "outputs" / "lora")
    shutil.rmtree(base)
    with pytest.raises(UserError, match="whose weights it was trained on, is no more"):
        load_pipeline(tmp_path / "outputs" / "lora")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--init_from", "null"], "lora.rank = 2: an adapter needs the model that it is for: add init_from"),
        (["--lora.rank", "99"], "lora.rank = 99: is above 32"),
        (["--lora.targets", "to_q"], "no linear layer has such a name"),
        (["--flow.prediction", "sample"], "was trained with velocity, and an adapter cannot change that"),
        (["--text_encoder.max_length", "13"], "reads at most 12 tokens"),
        (["--codec", "{name: pca, stride: [1, 2, 2], channels: 4}"], "codec gives latents of 4 channels"),
        (["--lora.merge", "[none.safetensors]"], "there is no such file or folder"),
    ],
)
def test_what_is_refused(again: Callable[..., list[str]], flags: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        do(again(*flags))
