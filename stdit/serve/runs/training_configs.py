"""What the page says of a config for training: its comment, and what it lacks. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.data.decoding.media import is_url
from stdit.serve.runs.run_files import read_run_config


@dataclass(frozen=True)
class TrainingConfigSummary:
    """A config that comes with stdit."""

    name: str
    """Such as ``train/quickstart``."""
    summary: str
    """The comment at its beginning."""
    missing: str | None
    """What is not here that it needs; None: it can be started."""


def summary_of_config(name: str, file: Path) -> TrainingConfigSummary:
    """Return what the page says of a config file."""
    try:
        settings, problem = read_run_config(file)
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return TrainingConfigSummary(name, "", f"{file.name} cannot be read ({error.strerror})")
    return TrainingConfigSummary(name, " ".join(_comment(lines)), problem or _missing(settings))


def _comment(lines: list[str]) -> Iterator[str]:
    """Yield the lines of the first paragraph of a comment, without the commands in it."""
    for line in lines:
        if not line.startswith("#") or line.strip("# ") == "":
            return
        if line.startswith("#  "):  # a command
            return
        yield line[1:].strip()


def _missing(settings: dict[str, Any]) -> str | None:
    data = settings.get("data") if isinstance(settings.get("data"), dict) else {}
    sources = [one for one in data.get("sources") or [] if isinstance(one, dict)]  # type: ignore[union-attr]
    manifests = [one.get("manifest") for one in sources] or [data.get("manifest")]  # type: ignore[union-attr]
    if not all(isinstance(one, str) and one for one in manifests):
        return "it needs clips (data.manifest), or another config beside it: start it on the command line"
    paths = [*manifests, *([settings["init_from"]] if isinstance(settings.get("init_from"), str) else [])]
    gone = [path for path in paths if not is_url(path) and not os.path.exists(path)]
    return f"{gone[0]} is not here: see the comment in its file" if gone else None
