"""Which setting a wrong name is taken to mean: by meaning before letters."""

from collections.abc import Callable
from typing import Any

import pytest

from scripts.prepare_data import build_parser
from scripts.prepare_data import main as prepare_data
from stdit.errors import UserError
from stdit.pipelines.config import PROMPT_SETTINGS, SampleConfig, VideoSettings, video_settings
from stdit.setting_checks import OWN_FLAGS, setting_types
from stdit.settings import parse
from stdit.suggestions import ALIASES, nearest_name
from stdit.training.config import TrainConfig, parse_train

SAMPLE = lambda argv: parse(SampleConfig, argv)  # noqa: E731


@pytest.mark.parametrize(
    ("read", "argument", "meant"),
    [
        (parse_train, "--optimizer.learning_rate", "--optimizer.lr"),
        (parse_train, "--learning_rate", "--optimizer.lr"),
        (parse_train, "--learning-rate", "--optimizer.lr"),
        (parse_train, "--train_batch_size", "--data.buckets"),
        (parse_train, "--max_train_steps", "--trainer.steps"),
        (parse_train, "--num_train_epochs", "--trainer.steps"),
        (parse_train, "--steps", "--trainer.steps"),
        (parse_train, "--num_workers", "--data.workers"),
        (parse_train, "--gradient_accumulation_steps", "--trainer.micro_batch_size"),
        (parse_train, "--mixed_precision", "--trainer.precision"),
        (parse_train, "--gradient_checkpointing", "--memory.activations"),
        (parse_train, "--checkpointing_steps", "--checkpoint.every"),
        (parse_train, "--resume_from_checkpoint", "--resume"),
        (parse_train, "--pretrained_model_name_or_path", "--init_from"),
        (parse_train, "--report_to", "--tracker.name"),
        (parse_train, "--validation_prompt", "--validation.prompts"),
        (parse_train, "--sp_size", "--parallel.sp"),
        (parse_train, "--output", "--output_dir"),
        (parse_train, "--depth", "--model.depth"),
        (parse_train, "--trainer.stepss", "--trainer.steps"),
        (parse_train, "-c", "--config"),
        (parse_train, "dry_run=true", "--dry_run true"),
        (parse_train, "trainer.steps=5", "--trainer.steps 5"),
        (parse_train, "max_train_steps=5", "--trainer.steps 5"),
        (SAMPLE, "--steps", "--num_inference_steps"),
        (SAMPLE, "--num_steps", "--num_inference_steps"),
        (SAMPLE, "--cfg_scale", "--guidance_scale"),
        (SAMPLE, "--output_dir", "--output"),
        (SAMPLE, "--mixed_precision", "--dtype"),
        (SAMPLE, "--video_length", "--num_frames"),
        (SAMPLE, "--ckpt_path", "--checkpoint"),
        (SAMPLE, "-p", "--prompt"),
        (SAMPLE, "-c", "--config"),
        (SAMPLE, "-o", "--output"),
    ],
)
def test_a_name_from_another_trainer_is_understood(
    read: Callable[[list[str]], object], argument: str, meant: str
) -> None:
    with pytest.raises(UserError) as error:
        read([argument] if "=" in argument else [argument, "1"])
    assert str(error.value).endswith(f"did you mean {meant}?") and argument in str(error.value)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["probe", "a", "b.csv", "--worker", "2"], "--workers"),
        (["probe", "a", "b.csv", "--num_workers=2"], "--workers"),
        (["probe", "a", "b.csv", "-f"], "--overwrite"),
        (["score", "a", "b.csv", "--score", "motion"], "--scores"),
        (["split", "a", "b.csv", "--min_second", "2"], "--min_seconds"),
        (["cache", "prune", "a", "--dryrun"], "--dry_run"),
        (["encode", "--learning_rate", "1"], "--optimizer.lr"),
    ],
)
def test_prepare_data_names_the_flag_of_the_step(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        prepare_data(argv)
    except UserError as error:
        assert argv[0] == "encode" and str(error).endswith(f"did you mean {meant}?")
    except SystemExit as end:
        assert end.code == 2 and f"did you mean {meant}?\n" in capsys.readouterr().err


def test_what_has_no_meaning_stays_unrecognized(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["stray"], ["-z"], ["--data.manifest", "a", "b", "c"]):
        with pytest.raises(UserError, match="unrecognized arguments: "):
            parse_train(argv)
    with pytest.raises(SystemExit):
        prepare_data(["probe", "a", "b.csv", "c.csv"])
    assert "unrecognized arguments: c.csv" in capsys.readouterr().err


def test_keywords_and_keys_of_prompts_are_understood(tmp_path: Any) -> None:
    def call(prompt: str, num_inference_steps: int = 1, guidance_scale: float = 1.0) -> None: ...

    for name, meant in (("steps", "num_inference_steps"), ("cfg_scale", "guidance_scale")):
        with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
            video_settings(call, {name: 1})
        assert nearest_name(name, PROMPT_SETTINGS) == meant
    assert isinstance(video_settings(call, {"fps": 8}), VideoSettings)


def test_every_alias_stands_for_a_setting_that_exists() -> None:
    steps = [
        flag[2:]
        for step in build_parser()._subparsers._group_actions[0].choices.values()  # type: ignore[union-attr]
        for flag in step._option_string_actions
    ]
    known = {*dict(setting_types(TrainConfig)), *dict(setting_types(SampleConfig)), *OWN_FLAGS, *steps}
    for line in ALIASES.strip().splitlines():
        ours, _, theirs = line.partition(": ")
        assert ours in known and theirs.split(), line
