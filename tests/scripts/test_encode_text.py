"""Captions encoded in a step of their own; training and sampling without the encoder."""

import subprocess
from pathlib import Path

import pytest

from scripts.encode_text import read_captions
from stdit.errors import UserError
from tests import warm
from tests.training.tiny import tiny_settings


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
        *("scripts/encode_text.py", "--output", text, "--encoder.name", "auto", "--store", "fp32"),
        *("--encoder.path", str(tmp_path / "bert"), "--encoder.max_length", "12"),
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
    other = [*encode[:-1], str(prompts), "--encoder.max_length", "9", "--output", str(tmp_path / "other")]
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
