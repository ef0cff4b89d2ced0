from pathlib import Path

import pytest

from stdit.training import requests
from stdit.training.requests import NoRequests, Requested, RequestFiles


def test_request_files_are_removed_when_fulfilled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stop").touch()
    files = RequestFiles(tmp_path, None)
    assert "stop was a request to an earlier part of this run: removed" in capsys.readouterr().out
    assert files.poll() == Requested()
    (tmp_path / "save").touch()
    assert files.poll() == files.poll() == Requested(save=True)
    (tmp_path / "stop").touch()  # too late to be obeyed by this save
    files.fulfilled()
    assert files.poll() == Requested(stop=True)
    files.fulfilled()
    assert files.poll() == Requested() and not list(tmp_path.iterdir())
    assert NoRequests().poll() == Requested()


def test_minutes_count_from_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(requests.time, "monotonic", lambda: now)
    files = RequestFiles(tmp_path, 0.5)
    now += 29
    assert not files.poll().save
    now += 1
    assert files.poll() == Requested(save=True)
    files.fulfilled()
    now += 29
    assert not files.poll().save
