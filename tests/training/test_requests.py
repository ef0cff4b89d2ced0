from pathlib import Path

import pytest

from stdit.training import requests
from stdit.training.requests import Asked, Requests, RunRequests


def test_files_ask_and_are_removed_when_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stop").touch()
    asking = RunRequests(tmp_path, None)
    assert "stop was asked of an earlier part of this run, and is removed" in capsys.readouterr().out
    assert asking.look() == Asked()
    (tmp_path / "save").touch()
    assert asking.look() == asking.look() == Asked(save=True)
    (tmp_path / "stop").touch()  # too late to be obeyed by this save
    asking.obeyed()
    assert asking.look() == Asked(stop=True)
    asking.obeyed()
    assert asking.look() == Asked() and not list(tmp_path.iterdir())
    assert Requests().look() == Asked()


def test_minutes_count_from_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(requests.time, "monotonic", lambda: now)
    asking = RunRequests(tmp_path, 0.5)
    now += 29
    assert not asking.look().save
    now += 1
    assert asking.look() == Asked(save=True)
    asking.obeyed()
    now += 29
    assert not asking.look().save
