"""Every flag of every command of prepare_data.py, given on the command line of a call that succeeds."""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.prepare_data import build_parser, main
from tests.data.conftest import write_video  # noqa: F401 (a fixture)
from tests.data.preparation import tiny_models
from tests.data.preparation.conftest import pattern, read_csv
from tests.training.tiny import tiny_settings

ALL = "--root {root} --workers 1 --timeout 90 --overwrite"
RUNS = {
    "probe": f"{ALL} --quick",
    "split": f"{ALL} --detector content --threshold 20 --min_seconds 0.5 --max_seconds 2 --cut {{work}}/cut",
    "score": f"{ALL} --scores text brightness redness --import my_scores --frames 4 --fps 4 --side 32 "
    "--model {clip} --batch_size 2 --device cpu --dtype fp32",
    "filter": "--root {root} --overwrite --where brightness>1",
    "dedupe": f"{ALL} --distance 2",
    "caption": f"{ALL} --model {{blip}} --batch_size 2 --device cpu --dtype fp32 --template a --frames 2 "
    "--side 32 --max_new_tokens 3 --replace",
    "report": f"{ALL} --config {{tiny}} --import my_scores --thumbnails 2",
    "encode": "--part 1/1",
    "cache verify": "",
    "cache prune": "--config {tiny} --import my_scores --dry_run",
}
"""The flags of the one call of each command, in the order in which they run."""


def flags(parser: ArgumentParser, name: str = "") -> Iterator[tuple[str, set[str]]]:
    """Yield each command, such as "cache prune", and its flags."""
    inner = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for choices in inner:
        for one, step in choices.items():
            yield from flags(step, f"{name} {one}".strip())
    if not inner:
        yield name, {action.option_strings[0] for action in parser._actions if action.option_strings} - {"-h"}


def test_every_flag_is_in_the_table() -> None:
    missing = {
        command: sorted(known - {word for word in RUNS.get(command, "").split() if word.startswith("--")})
        for command, known in flags(build_parser())
    }
    assert not any(missing.values()), f"give these flags in RUNS: {missing}"
    assert RUNS.keys() == missing.keys()


def test_all_commands_with_all_flags(
    tmp_path: Path,
    write_video: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The manifests lie beside the folder of the clips, so that only --root tells where these are."""
    root, work = tmp_path / "clips", tmp_path / "work"
    for k in range(3):
        write_video(root / f"{k}.mp4", frames=pattern(k, 24))
        (root / f"{k}.txt").write_text("a ball")
    work.mkdir()
    (work / "source.csv").write_text("path,text\n0.mp4,a red ball\n1.mp4,\n2.mp4,a cat\n")
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(work)
    (work / "my_scores.py").write_text(
        "from stdit.data.preparation.scoring import register_scorer\n\n"
        "def redness(frames, fps):\n    return frames[..., 0].mean()\n\nregister_scorer('redness', redness)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(work), prepend=":")
    settings = tiny_settings(tmp_path / "training")
    places = {"root": root, "work": root, "tiny": settings[1]}
    places |= {name: getattr(tiny_models, f"save_{name}")(tmp_path / name) for name in ("clip", "blip")}

    source = "source.csv"
    for command in RUNS:
        output = "report.html" if command == "report" else f"{command}.csv"
        given = [word.format(**places) for word in RUNS[command].split()]
        if command == "encode":
            main(["encode", *settings, *given])
        elif command.startswith("cache"):
            main([*command.split(), str(tmp_path / "training" / "clips" / "stdit-cache"), *given])
        else:
            if command == "split":
                output = str(root / output)
            Path(output).write_text("replaced")
            main([command, source, output, *given])
            assert Path(output).read_text() != "replaced"
            source = output
        assert capsys.readouterr().out
        if output.endswith(".csv") and command in ("probe", "score", "dedupe", "caption"):
            assert len({Path(row["path"]).name for row in read_csv(Path(output))}) > 1
    scored = read_csv(work / "score.csv")
    assert {bool(row["text"]) == bool(row["clip_score"]) for row in scored} == {True}
    assert all(row["text"] not in ("", "a red ball", "a cat") for row in read_csv(work / "caption.csv"))
