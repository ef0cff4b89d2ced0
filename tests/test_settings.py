import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from stdit.errors import UserError
from stdit.settings import parse, to_yaml


@dataclass
class Size:
    depth: int = 2
    """How deep."""
    patch: tuple[int, int] = (1, 2)
    """Two sizes."""
    kind: Literal["small", "large"] = "small"
    """Which kind."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"model.depth = {self.depth}: must be at least 1")


@dataclass
class Entry:
    width: int = 1
    """How wide."""
    height: int = 1
    """How high."""


@dataclass
class Example:
    """Settings of an example."""

    name: str = "x"
    """What to call it."""
    rate: float | None = None
    """How fast."""
    model: Size = field(default_factory=Size)
    """The model."""
    shares: dict[str, float] = field(default_factory=dict)
    """Shares by name."""
    entries: list[Entry] = field(default_factory=list)
    """Several entries."""
    loud: bool = False
    """Whether to say more."""
    slow: bool | None = None
    """Whether to wait."""
    words: list[str] = field(default_factory=list)
    """Several texts."""


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_later_files_win_and_flags_win_over_files(tmp_path: Path) -> None:
    first = write(tmp_path / "1.yaml", "name: é\nmodel: {depth: 3, patch: [4, 5]}\nentries: [{width: 3}]\n")
    second = write(tmp_path / "2.yaml", "model: {depth: 4}\nshares: {a: 0.5}\n")
    config = parse(
        Example, ["--rate", "1e-3", "--model.kind", "large", f"--config={first}", "--config", second]
    )
    assert config == Example("é", 1e-3, Size(4, (4, 5), "large"), {"a": 0.5}, [Entry(3)])
    assert parse(Example, ["--config", first, "--model.depth", "9", "--config", second]).model.depth == 9


@pytest.mark.parametrize(
    ("argv", "loud", "name"),
    [
        (["--loud"], True, "x"),
        (["--loud", "--name", "y"], True, "y"),
        (["--loud", "false", "--name", "y"], False, "y"),
        (["--loud=false"], False, "x"),
        (["--name", "loud", "--rate", "1"], False, "loud"),
    ],
)
def test_a_switch_needs_no_value(argv: list[str], loud: bool, name: str) -> None:
    config = parse(Example, argv)
    assert (config.loud, config.name) == (loud, name)


def test_a_switch_that_may_be_left_open() -> None:
    assert [parse(Example, argv).slow for argv in ([], ["--slow"], ["--slow", "null"])] == [None, True, None]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--words", "a b", "--words=c: d"], ["a b", "c: d"]),
        (["--words", "[a, b]"], ["a", "b"]),
        (["--words", "[a, b]", "--words", "c"], ["a", "b", "c"]),
        (
            ["--words", "[a].png@0", "--words", "{b}", "--words", "1", "--words", ""],
            ["[a].png@0", "{b}", "1", ""],
        ),
    ],
)
def test_a_list_of_texts_takes_them_one_by_one(argv: list[str], words: list[str]) -> None:
    assert parse(Example, argv).words == words


@pytest.mark.parametrize("later", [["--entries", "[{width: 5}]"], ["--config", "later.yaml"]])
def test_a_later_list_of_groups_replaces_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = ["--config", write(Path("first.yaml"), "entries: [{width: 3, height: 4}]\nname: first\n")]
    write(Path("later.yaml"), "entries: [{width: 5}]\n")
    config = parse(Example, [*first, *later])
    assert (config.entries, config.name) == ([Entry(5)], "first")
    assert parse(Example, [*first, "--entries+", "{width: 5}"]).entries == [Entry(3, 4), Entry(5)]


def test_yaml_is_read_back_the_same(tmp_path: Path) -> None:
    config = Example("ü", 2e-5, Size(7, (8, 9)), {"a": 1.0}, [Entry(4)])
    assert parse(Example, ["--config", write(tmp_path / "c.yaml", to_yaml(config))]) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.dept", "3"], "--model.dept is not a setting: did you mean --model.depth?"),
        (["--depth=3"], "did you mean --model.depth?"),
        (["--nam", "y"], "did you mean --name?"),
        (["--zzz", "1"], "--zzz is not a setting: see --help"),
        (["--helium", "1"], "--helium is not a setting: see --help"),
        (["--hepl"], "--hepl is not a setting: did you mean --help?"),
        (["--entries", "wide"], "entries = wide: must be a list, each entry a group of settings: {width"),
        (["--model.depth", "x"], "model.depth = x: must be a whole number"),
        (["--model.depth", "0"], "model.depth = 0: must be at least 1"),
        (["--model.kind", "tiny"], "model.kind = tiny: must be one of small, large"),
        (["--model.patch", "[1]"], "model.patch = [1]: must be a list of 2"),
        (["--rate", "fast"], "rate = fast: must be a number or null"),
        (["--entries", "[{widht: 3}]"], "entries has 'widht', which is not a setting: did you mean width?"),
        (["--name"], "--name needs a value"),
        (["--words"], "--words needs a value"),
        (["--name", "-x"], "one that begins with a dash is joined to it: --name=-x"),
        (["stray"], "unrecognized arguments: stray"),
        ([""], "unrecognized arguments: an empty one"),
        (["--config"], "--config needs a file"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Example, argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {dept: 3}", "model.dept is not a setting: did you mean model.depth?"),
        ("modle: {depth: 3}", "modle is not a setting: did you mean model?"),
        ("entries: [{widht: 3}]", "entries[0].widht is not a setting: did you mean entries[0].width?"),
        ("model: 4", "model = 4: must be a group of settings"),
        ("model: {depth: x}", "model.depth = x: must be a whole number"),
        ("model: {depth: null}", "model.depth = null: must be a whole number"),
        ("entries: [{width: null}]", "entries[0].width = null: must be a whole number"),
        ("name: [", "not valid YAML"),
        ("name: a\nname: b", "line 2 sets name again"),
        ("model:\n  depth: 1\n  kind: tiny\n  depth: 2", "line 4 sets depth again"),
        (
            "fps: 8\nname: a\nseed: 1",
            "seems to be for another command, since this one has no setting fps, seed",
        ),
        ("- 1", "must hold settings"),
        ("", "must hold settings"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(Example, ["--config", write(tmp_path / "c.yaml", text)])
    assert message in str(error.value)


def test_help_shows_the_docstrings_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Example, ["--help"], doc="An example.\n\nDo this.")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(text in shown for text in ("An example.", "How deep.", "What to call it.", "Do this."))


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Example, ["--model.depth", "5", "--print_config"])
    assert stop.value.code == 0
    assert "depth: 5" in capsys.readouterr().out


def test_parsing_imports_nothing_heavy() -> None:
    code = "import sys, stdit.settings; print({'torch', 'diffusers', 'transformers'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
