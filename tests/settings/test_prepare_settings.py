"""Every flag of prepare_data.py changes what comes out, is recorded by a call, or is refused."""

import shutil
from argparse import Action, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from scripts import prepare_data
from tests.data.conftest import _write_video
from tests.data.preparation.conftest import pattern
from tests.data.preparation.tiny_models import save_llava
from tests.settings.observe import Change, Outcome, check_observed, differences, outcome_of_call, recorded
from tests.training.tiny import tiny_settings

CHANGES = {
    "source": Change(["other"]),
    "output": Change(["other.csv"]),
    "--root": Change(["--root", "absent"]),
    "--workers": Change(["--workers", "3"]),
    "--timeout": Change(["--timeout", "7"]),
    "--overwrite": Change(["--overwrite"]),
    "probe --quick": Change(["--quick"]),
    "--model": Change(["--model", "absent"]),
    "--batch_size": Change(["--batch_size", "0"]),
    "--device": Change(["--device", "cuda:77"]),
    "--dtype": Change(["--dtype", "fp3"]),
    "caption --template": Change(["--template", "describe {path}"]),
    "caption --frames": Change(["--frames", "1"]),
    "caption --side": Change(["--side", "8"]),
    "caption --max_new_tokens": Change(["--max_new_tokens", "2"]),
    "caption --replace": Change(["--replace"]),
    "split --detector": Change(["--detector", "content"], ["--threshold", "1", "--min_seconds", "0.1"]),
    "split --threshold": Change(["--threshold", "1000"]),
    "split --min_seconds": Change(["--min_seconds", "1.5"]),
    "split --max_seconds": Change(["--max_seconds", "2"]),
    "split --cut": Change(["--cut", "scenes"]),
    "score --scores": Change(["--scores", "brightness"]),
    "score --import": Change(["--import", "no_such_module"]),
    "score --frames": Change(["--frames", "2"]),
    "score --fps": Change(["--fps", "4"]),
    "score --side": Change(["--side", "16"]),
    "filter --where": Change(["--where", "text == 'a'"]),
    "dedupe --distance": Change(["--distance", "16"], ["--distance", "0"]),
    "report --config": Change(["--config", "train.yaml"]),
    "report --import": Change(
        ["--config", "train.yaml", "--import", "no_such_module"], ["--config", "train.yaml"]
    ),
    "report --thumbnails": Change(["--thumbnails", "1"]),
    "encode --part": Change(["--part", "2/1"]),
    "cache verify folder": Change(["absent"]),
    "cache prune folder": Change(["absent"]),
    "cache prune --config": Change(["--config", "other.yaml"]),
    "cache prune --import": Change(["--import", "no_such_module"], ["--config", "other.yaml"]),
    "cache prune --dry_run": Change(["--dry_run"], ["--config", "other.yaml"]),
}
"""By step and flag, or by the flag alone if many steps have it."""
NEEDED = {
    "filter": ["--where", "text != 'c'"],
    "caption": ["--model", "model"],
    "encode": ["--data.manifest", "absent"],
}
"""Flags without which a step does not run."""
OUTPUTS = {"report": "out.html"}
CALLS: dict[str, Callable[..., Any] | None] = {"stdit.data.preparation.flow.run_all": None}


def steps(parser: ArgumentParser, name: str = "") -> Iterator[tuple[str, list[Action]]]:
    """Yield the name of each step, such as "cache prune", and its flags."""
    chosen = [action for action in parser._actions if isinstance(action.choices, dict)]
    if not chosen:
        yield name, [action for action in parser._actions if action.dest != "help"]
    for action in chosen:
        for one, step in action.choices.items():  # type: ignore[union-attr]
            yield from steps(step, f"{name} {one}".strip())


FLAGS = [
    (name, action.option_strings[0] if action.option_strings else action.dest)
    for name, actions in steps(prepare_data.build_parser())
    for action in actions
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, a scene change in the first, and what the changes name."""
    folder = tmp_path_factory.mktemp("settings")
    frames = np.concatenate([pattern(1, 12), pattern(4, 20)])
    like_c = np.clip(
        pattern(2, 16, speed=3) + np.random.default_rng(0).normal(0, 60, (16, 48, 64, 1)), 0, 255
    )
    clips = {
        "a": frames,
        "b": pattern(2, 8, speed=3),
        "c": pattern(2, 16, speed=3),
        "d": like_c.astype(np.uint8),
    }
    for name, pixels in clips.items():
        _write_video(folder / "clips" / f"{name}.mp4", frames=pixels)
        (folder / "clips" / f"{name}.txt").write_text(name)
    (folder / "clips" / "d.txt").unlink()  # for caption
    damaged = bytearray((folder / "clips" / "a.mp4").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 400] = bytes(400)
    (folder / "clips" / "damaged.mp4").write_bytes(damaged)
    save_llava(folder / "model")
    shutil.copytree(folder / "clips", folder / "other")
    (folder / "other" / "b.mp4").unlink()
    (folder / "train.yaml").write_text("data: {buckets: [{num_frames: 4, height: 16, width: 16}]}\n")
    settings = tiny_settings(tmp_path_factory.mktemp("training"))
    prepare_data.main(["encode", *settings, "--data.cache_dir", str(folder / "cache")])
    other = Path(settings[1]).read_text().replace("num_frames: 4", "num_frames: 2")
    (folder / "other.yaml").write_text(other)
    return folder


@pytest.fixture
def outcome_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, Sequence[str]], Outcome]:
    """Return a function of a step, the flag that is changed, and flags: what the step does with them."""

    def outcome(step: str, flag: str, flags: Sequence[str]) -> Outcome:
        work = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, work)
        monkeypatch.chdir(work)
        places = (
            ["source", "output"]
            if not step.startswith(("cache", "encode"))
            else ["folder"] * step.startswith("cache")
        )
        given = {"source": "clips", "output": OUTPUTS.get(step, "out.csv"), "folder": "cache"}
        rest = list(flags)
        if flag in given and flags:
            given[flag], rest = flags[0], []
        argv = [*step.split(), *(given[place] for place in places), *rest]
        argv += [] if any(one in flags for one in NEEDED.get(step, ())) else NEEDED.get(step, [])
        if flag == "--overwrite":
            (work / given["output"]).write_text("")
        in_workers = flag in ("--workers", "--timeout")
        if (step, "--workers") in FLAGS and not in_workers:
            argv += ["--workers", "0"]
        calls: list[str] = []
        targets = {name: Mock(side_effect=SystemExit(0)) if in_workers else None for name in CALLS}
        with recorded(targets, calls):
            found = outcome_of_call(lambda: {"code": str(prepare_data.main(argv))})
        printed = capsys.readouterr().out.replace(str(work), "WORK")
        files = {
            str(path.relative_to(work)): path.read_bytes().hex()[:100_000]
            for path in sorted(work.rglob("*"))
            if path.is_file() and path.suffix in (".csv", ".html", ".mp4", ".safetensors")
        }
        error = str(found.get("error", "")).replace(str(work), "WORK")
        return {**found, "error": error, "printed": printed, "calls": "\n".join(calls), **files}

    return outcome


def marks(step: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if step == "caption" else []


@pytest.mark.parametrize(("step", "flag"), [pytest.param(*one, marks=marks(one[0])) for one in FLAGS])
def test_every_flag_changes_something(
    step: str, flag: str, outcome_of: Callable[[str, str, Sequence[str]], Outcome]
) -> None:
    change = CHANGES.get(f"{step} {flag}") or CHANGES.get(flag)
    assert change is not None, f"add a change for {step} {flag} to the table"
    check_observed(f"prepare_data.py {step} {flag}", change, partial(outcome_of, step, flag))


@pytest.mark.parametrize(
    "step", [pytest.param(one, marks=marks(one)) for one in dict.fromkeys(s for s, _ in FLAGS)]
)
def test_the_same_command_gives_the_same_outcome(
    step: str, outcome_of: Callable[[str, str, Sequence[str]], Outcome]
) -> None:
    """Otherwise any flag would seem to change it."""
    assert differences(outcome_of(step, "", ()), outcome_of(step, "", ())) == []
