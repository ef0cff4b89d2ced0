"""train.py with an adapter: what is trained, saved, resumed, exported and sampled, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from stdit.checkpoint_files import read_meta
from stdit.data.batch import EncodedBatch
from stdit.errors import UserError
from stdit.lora.config import parse_lora
from stdit.lora.files import base_hash, read_adapter
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.contact_sheet import read_contents
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.requests import Request
from stdit.pipelines.runner import sample_videos
from stdit.pipelines.sampling import sample_to_files
from stdit.pipelines.video_io import read_frames, write_mp4
from stdit.training.sampler import Sampler
from stdit.training.step_sheet import write_step_sheet
from stdit.training.trainer import Trainer
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_model
from tests.test_resume_changed import kill_in
from tests.test_train import do, same_state, settings_like, train_two
from tests.training.tiny import tiny_settings

LORA = ["--name", "lora", "--lora.rank", "2", "--lora.alpha", "4", "--optimizer.name", "adamw"]
LORA += ["--trainer.steps", "4", "--optimizer.lr", "0.01"]

ADD = "add it for what that was trained on"
LAST = "step-00000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, a run of two steps, and one of an adapter on it of four."""
    return train_two(tmp_path_factory.mktemp("trained"), LORA)


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Settings of another run like it, in a folder of its own."""
    return settings_like(trained, tmp_path, LORA)


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


def video_of(run: Path, where: str) -> np.ndarray:
    return read_frames(run / "samples" / where / "00-a-red-square.mp4")


def test_validation_shows_videos_with_and_without_the_adapter(trained: Path, tmp_path: Path) -> None:
    run, sources = trained / "outputs" / "lora", {"base": "tiny", "step-00000004": "lora"}
    for where, source in sources.items():
        pipe, _ = load_pipeline(trained / "outputs" / source)
        ((_, frames, _),) = sample_videos(pipe, [Request("a red square", 0)])
        write_mp4(tmp_path / "sampled.mp4", frames, 8)
        difference = video_of(run, where).astype(int) - read_frames(tmp_path / "sampled.mp4")
        assert np.abs(difference).max() <= 2, where
    assert not np.array_equal(video_of(run, "base"), video_of(run, "step-00000004"))
    with PIL.Image.open(run / "samples" / "step-00000004" / "sheet.png") as sheet:
        with PIL.Image.open(run / "samples" / "base" / "sheet.png") as base:
            assert sheet.width == 2 * base.width + 24
    contents = read_contents(write_step_sheet(run, tmp_path / "steps.png"))
    assert contents == [{"prompt": "a red square", "seed": 0, "steps": [4]}]
    with PIL.Image.open(tmp_path / "steps.png") as sheet:
        assert sheet.width == 2 * 130, "the base, and the step"


@pytest.mark.slow
def test_videos_without_the_adapter_are_made_once(
    again: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = Sampler._sample

    def sample(self: Sampler, pipe: Any) -> list[Any]:
        made.append(1)
        return original(self, pipe)

    monkeypatch.setattr(Sampler, "_sample", sample)
    flags = again("--validation.prompts", "[a red square]", "--validation.every", "2")
    counts = []
    for more in (["--trainer.steps", "2"], [], ["--trainer.steps", "5", "--validation.seed", "1"]):
        assert do([*flags, *more]) == 0
        counts.append(len(made))
    assert counts == [2, 3, 5], "the first and the last time, when the seed is another"
    assert (
        do(again("--name", "alone", "--validation.prompts", "[a]", "--validation.compare_base", "false")) == 0
    )
    assert len(made) == 6 and not (tmp_path / "outputs" / "alone" / "samples" / "base").exists()


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


def test_a_killed_run_with_dropout_is_the_same(
    again: Callable[..., list[str]], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--lora.dropout", "0.5", "--validation.loss_every", "2")
    assert do(again("--name", "whole", *flags)) == 0
    with monkeypatch.context() as patch:
        kill_in(patch, 3)
        with pytest.raises(RuntimeError, match="killed"):
            do(again("--name", "killed", *flags))
    assert do(again("--name", "killed", *flags)) == 0
    whole, killed, without = (
        folder / "outputs" / name / "checkpoints" / "step-00000004"
        for folder, name in ((tmp_path, "whole"), (tmp_path, "killed"), (trained, "lora"))
    )
    assert same_state(whole, killed) and not same_state(whole, without)
    assert read_meta(whole)["adapter"]["lora_dropout"] == 0, "what is made of it drops nothing"


def test_an_adapter_goes_on_and_lies_on_top_of_others(
    again: Callable[..., list[str]], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    file = "outputs/lora/lora"
    flags = again("--lora.init_from", file, "--lora.merge", f"['{file}:0.5']", "--trainer.steps", "1")
    with pytest.raises(
        UserError, match="was trained on the weights .* or add --lora.other_base to use it here"
    ):
        do(flags)
    assert do([*flags, "--lora.other_base"]) == 0
    found = read_adapter(tmp_path / "outputs" / "lora" / "lora")
    assert found.base_hash != read_adapter(Path(file)).base_hash
    with pytest.raises(UserError, match="is another kind of adapter: .* differ"):
        do(again("--name", "other", "--lora.init_from", file, "--lora.rank", "3"))
    monkeypatch.chdir(tmp_path)  # what it is trained on is recorded with absolute paths
    assert load_pipeline(tmp_path / "outputs" / "lora")[0].transformer.config.depth == 1


def test_what_it_began_with_is_not_needed_to_resume(
    again: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    file = shutil.copytree(trained / "outputs" / "lora" / "lora", tmp_path / "first")
    flags = again("--lora.init_from", str(file))
    assert do([*flags, "--trainer.steps", "2"]) == 0
    shutil.rmtree(file)
    assert do(flags) == 0


def test_the_base_is_the_checkpoint_and_its_run_may_train_on(
    again: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(trained / "outputs" / "tiny", tmp_path / "outputs" / "tiny")
    shutil.rmtree(base / "pipeline")  # as while it trains
    flags = again("--init_from", str(base))
    assert do([*flags, "--trainer.steps", "2"]) == 0
    assert do([*tiny_settings(tmp_path), "--trainer.steps", "4"]) == 0
    shutil.rmtree(base / "pipeline")
    assert do(flags) == 0
    meta = read_meta(tmp_path / "outputs" / "lora" / "checkpoints" / "step-00000004")
    assert meta["base"]["path"] == str(base / "checkpoints" / "step-00000002")
    assert load_pipeline(tmp_path / "outputs" / "lora")[1] != load_pipeline(base)[1]


def test_a_run_resumes_whatever_its_settings_say_of_the_base(
    again: Callable[..., list[str]], tmp_path: Path
) -> None:
    flags = again("--model.depth", "7", "--trainer.precision", "bf16", "--lora.base_dtype")
    assert do([*flags, "bf16", "--trainer.steps", "2"]) == 0
    assert do([*flags, "fp32"]) == 0
    assert load_pipeline(tmp_path / "outputs" / "lora")[0].transformer.config.depth == 1


def test_adapters_cannot_be_switched_on_or_off_in_a_run(
    again: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    with pytest.raises(
        UserError, match="step-00000004 holds an adapter, but lora.rank is not set: go back to"
    ):
        do([*tiny_settings(tmp_path), "--name", "lora", "--resume_changed"])
    with pytest.raises(UserError, match="step-00000002 holds no adapter, but lora.rank is set: go back to"):
        do(again("--name", "tiny", "--resume_changed"))


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
        (["--flow.prediction", "sample"], "was trained with velocity, and that stays"),
        (["--text_encoder.max_length", "13"], "reads at most 12 tokens"),
        (["--text_encoder.max_length", "11"], "was trained with another text encoder, or other settings"),
        (["--codec", "{name: pca, stride: [1, 2, 2], channels: 4}"], "codec gives latents of 4 channels"),
        (["--lora.merge", "[none.safetensors]"], "there is no such file or folder"),
        (["--lora.init_from", "none.safetensors"], "there is no such file or folder"),
        (
            ["--lora.init_from", "none.safetensors:0.5"],
            "lora.init_from = none.safetensors:0.5: cannot have a weight",
        ),
        (
            ["--optimizer.name", "muon"],
            "optimizer.name = muon: is for the matrices of a whole model, .* adamw",
        ),
        (
            ["--parallel.memory_gib", "1e-6"],
            "the model in init_from = .* parameters, of which a process holds .* GiB",
        ),
    ],
)
def test_what_is_refused(again: Callable[..., list[str]], flags: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        do(again(*flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora.rank", "99"], "lora.rank = 99: is above 32"),
        (["--lora.targets", "to_q"], "no linear layer has such a name"),
        (["--lora.merge", "[other.safetensors]"], "lora other.safetensors: is of another architecture"),
        (["--lora.init_from", "other.safetensors"], "lora.init_from = other.safetensors: is another kind"),
        (
            ["--validation.loss_every", "2", "--validation.loss_manifest", "none.csv"],
            "validation.loss_manifest = none.csv: there is no such file",
        ),
    ],
)
def test_a_dry_run_refuses_it_too(
    again: Callable[..., list[str]],
    flags: list[Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_random_adapter(tmp_path / "other.safetensors", tiny_model())
    with pytest.raises(UserError, match=message):
        do(again(*flags, "--dry_run", "true"))


def test_a_trigger_word_is_in_the_captions_and_missed_in_prompts(
    again: Callable[..., list[str]],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: set[str] = set()
    original = Trainer.step

    def step(self: Trainer, batch: EncodedBatch) -> dict[str, Any]:
        seen.update(batch.captions)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", step)
    flags = again("--data.trigger", "sks", "--validation.prompts", "[a red square, a sks square]")
    assert do(flags) == 0
    assert seen == {f"sks the red square moves {side}" for side in ("left", "right")}
    run = tmp_path / "outputs" / "lora"
    assert read_adapter(run / "lora").trigger == "sks"
    assert f'--checkpoint {run} --prompt "sks ..."' in capsys.readouterr().out
    hint = 'prompt "a red square": it lacks "sks", the trigger word of'
    assert [line for line in caplog.messages if "lacks" in line] == [f"{hint} data.trigger: {ADD}"]

    base, file = trained / "outputs" / "tiny", run / "lora" / "pytorch_lora_weights.safetensors"
    for source, lora, whose in ((base, f"{run / 'lora'}:0.5", file), (run, None, run / "checkpoints" / LAST)):
        for prompt in ("a red square", "a sks square"):
            caplog.clear()
            config = SampleConfig(
                checkpoint=str(source),
                prompt=[prompt],
                lora=[lora] if lora else [],
                num_inference_steps=1,
                output=str(tmp_path / "videos"),
            )
            sample_to_files(config)
            hints = [line for line in caplog.messages if "lacks" in line]
            assert hints == ([] if "sks" in prompt else [f"{hint} {whose}: {ADD}"])

    with pytest.raises(
        UserError, match='"sks the red square moves right" -> "the red .*data.trigger sks -> null'
    ):
        do([*flags[:-4], *flags[-2:]])
