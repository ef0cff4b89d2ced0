"""Captions encoded in a step of their own; training and sampling without the encoder."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.encode_text import read_captions, training_texts
from stdit.codecs.transformers_text import TransformersTextEncoder
from stdit.errors import UserError
from stdit.training.build import STDiT
from tests import warm
from tests.test_train import do
from tests.training.tiny import save_clips, tiny_settings


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run([script, *arguments])


def test_train_and_sample_without_the_encoder(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "a blue star", "negative_prompt": "grey", "segment_prompts": ["it stops"]}\n'
    )
    text = str(tmp_path / "text")
    encode = [
        *("scripts/encode_text.py", "--output", text, "--text_encoder.name", "auto", "--store", "fp32"),
        *("--text_encoder.path", str(tmp_path / "bert"), "--text_encoder.max_length", "12"),
        *("--captions", str(tmp_path / "clips" / "manifest.csv")),
    ]
    result = call(*encode)
    assert result.returncode == 0, result.stderr
    assert "2 captions encoded, 0 existed already" in result.stdout

    stored = ["--text_encoder.name", "stored", "--text_encoder.path", text, "--name"]
    for flags in (["--name", "with"], [*stored, "without"]):
        result = call("train.py", *settings, *flags, "--trainer.steps", "2")
        assert result.returncode == 0, result.stderr
    runs = tmp_path / "outputs"
    lines = [(runs / name / "metrics.jsonl").read_text().splitlines() for name in ("with", "without")]
    losses = [[line.split('"loss": ')[1].split(",")[0][:7] for line in some] for some in lines]
    assert losses[0] == losses[1]

    sample = ["sample.py", "--checkpoint", str(runs / "with"), "--prompts", str(prompts), "--num_frames", "4"]
    result = call(*sample, "--text_states", text, "--output", str(tmp_path / "videos"))
    assert result.returncode == 2 and "no states of 3 captions, such as 'a blue star'" in result.stderr
    result = call(*encode, "--captions", str(prompts))
    assert "3 captions encoded, 2 existed already" in result.stdout, result.stderr
    result = call(*sample, "--text_states", text, "--output", str(tmp_path / "videos"))
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    result = call(
        "sample.py", "--checkpoint", str(runs / "without"), "--prompt", "grey", "--output", str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    other = [
        *encode[:-1],
        str(prompts),
        "--text_encoder.max_length",
        "9",
        "--output",
        str(tmp_path / "other"),
    ]
    assert call(*other).returncode == 0
    checkpoint = ["--checkpoint", str(runs / "with" / "checkpoints" / "step-00000002")]
    result = call(
        "sample.py", *checkpoint, "--prompts", str(prompts), "--text_states", str(tmp_path / "other")
    )
    assert result.returncode == 2 and "not of the encoder that" in result.stderr


def test_captions_are_those_of_training_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for name, text in {"a.mp4": "", "a.txt": " a red star\n", "notes.txt": "no caption"}.items():
        (clips / name).write_text(text)
    assert read_captions(clips) == ["a red star"]
    table = tmp_path / "manifest.csv"
    table.write_text("\ufeffpath, text\na.mp4,a blue star\nb.mp4\nc.mp4,\n")
    assert read_captions(table) == ["a blue star"]
    lines = tmp_path / "manifest.jsonl"
    lines.write_text(
        '\n{"path": "a.mp4", "text": "a star", "motion": 5}\n{"path": "b.mp4", "text": "a ball"}\n'
    )
    assert read_captions(lines, ["motion"]) == ["a star motion score: 5.", "a ball"]
    table.write_bytes(b"path,text\na.mp4,\xff\n")
    with pytest.raises(UserError, match="manifest.csv is not UTF-8"):
        read_captions(table)
    table.write_text('path,text\na.mp4,"a"b\n')
    with pytest.raises(UserError, match="manifest.csv, line .*check its quotes"):
        read_captions(table)
    with pytest.raises(UserError, match="absent.csv: there is no such file"):
        read_captions(tmp_path / "absent.csv")


@pytest.mark.slow
def test_training_never_has_the_encoder_with_all_texts_of_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With videos, losses, a trigger word, regularisation clips, and an adapter."""
    settings, text = tiny_settings(tmp_path), str(tmp_path / "text")
    for name, caption in (("others", "a blue ball"), ("held_out", "a {trigger} ball")):
        clips = save_clips(tmp_path / name, 2)
        clips.write_text(f"path,text\nclip-0.mp4,{caption}\nclip-1.mp4,{caption}\n")
    training = {
        "data.trigger": "sks",
        "data.regularisation.manifest": str(tmp_path / "others" / "manifest.csv"),
        "validation.prompts": "[sks waits]",
        "validation.loss_manifest": str(tmp_path / "held_out" / "manifest.csv"),
        "validation.loss_every": "2",
    }
    given = [f"--training={name}={value}" for name, value in training.items()]
    encoder = [
        "--text_encoder.name",
        "auto",
        "--text_encoder.path",
        str(tmp_path / "bert"),
        "--text_encoder.max_length",
        "12",
    ]
    result = call("scripts/encode_text.py", "--output", text, *encoder, "--training", settings[1], *given)
    assert result.returncode == 0, result.stderr
    assert "5 captions encoded" in result.stdout

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the text encoder is loaded")

    flags = [*settings, "--text_encoder", f"{{name: stored, path: {text}}}", "--trainer.steps", "2"]
    flags += [part for name, value in training.items() for part in (f"--{name}", value)]
    flags += ["--validation.num_inference_steps", "1", "--validation.guidance_scale", "2"]
    adapter = [
        "--name",
        "lora",
        "--lora.rank",
        "2",
        "--optimizer.name",
        "adamw",
        "--init_from",
        str(tmp_path / "outputs" / "tiny"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(TransformersTextEncoder, "__init__", fail)
        patch.setattr(TransformersTextEncoder, "from_config", fail)
        assert do(flags) == 0
        assert do([*flags, *adapter, "--data.cache", "disk"]) == 0
        assert len(list((tmp_path / "outputs" / "lora" / "samples").rglob("*.mp4"))) == 2
        patch.setattr(STDiT, "__init__", fail)
        with pytest.raises(
            UserError, match="no states of 1 captions, such as 'sks runs'.*--training with its"
        ):
            do([*flags, "--name", "other", "--validation.prompts", "[sks runs]"])


def test_settings_and_files_of_a_training_win_in_their_order(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)[1]
    (tmp_path / "more.yaml").write_text("validation: {prompts: [a]}\ndata: {trigger: one}\n")
    found = training_texts(
        [settings, str(tmp_path / "more.yaml"), "data.trigger=two", "validation.prompts=[b]"]
    )
    assert {*found} == {"b", "two the red square moves left", "two the red square moves right"}
    with pytest.raises(UserError, match="data.triggr"):
        training_texts([settings, "data.triggr=two"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "text"], "--captions FILE or --training CONFIG are needed"),
        (["--output", "text", "--training", "a.yaml", "--trigger", "sks"], "trigger = sks: is for captions"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str, tmp_path: Path) -> None:
    result = call("scripts/encode_text.py", *flags)
    assert result.returncode == 2 and message in result.stderr
