"""The installed commands are those of the scripts, and name themselves in help texts and hints."""

import importlib
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import sample
import train
from scripts import prepare_data
from stdit.cli import as_started

ROOT = Path(__file__).parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
SCRIPTS = {"stdit-train": train, "stdit-sample": sample, "stdit-prepare": prepare_data}
NAMES = {
    "python train.py": "stdit-train",
    "python sample.py": "stdit-sample",
    "python scripts/prepare_data.py": "stdit-prepare",
}


def entry_point(command: str) -> Callable[[], object]:
    """The function that an installed command calls."""
    return EntryPoint(command, COMMANDS[command], "console_scripts").load()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_the_main_of_its_script(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(COMMANDS[command].partition(":")[0])
    assert SCRIPTS[command].main is module.main
    monkeypatch.setattr(module, "main", lambda: 7)
    with pytest.raises(SystemExit) as stop:
        entry_point(command)()
    assert stop.value.code == 7


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_installed_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}", "--help"])
    with pytest.raises(SystemExit) as stop:
        entry_point(command)()
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.startswith(f"usage: {command} ") and f"\n    {command} " in shown
    assert not [script for script in ("train.py", "sample.py", "prepare_data.py") if script in shown]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_flag_ends_an_installed_command_with_2(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = ["probe", "a", "b.csv"] if command == "stdit-prepare" else []
    monkeypatch.setattr(sys, "argv", [command, *step, "--nothing"])
    with pytest.raises(SystemExit) as stop:
        entry_point(command)()
    assert stop.value.code == 2 and "--nothing" in capsys.readouterr().err


def test_every_script_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(NAMES.values()) == set(COMMANDS) == set(SCRIPTS)
    text = f"{'; '.join(NAMES)}; train.py; scripts/prepare_data.py; my_train.py"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert as_started(text) == text
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", [f"bin/{command}"])
        assert as_started(text) == f"{'; '.join(COMMANDS)}; stdit-train; stdit-prepare; my_train.py"
