"""Links, commands, settings, flags, files and tests named by a page (.md), a script's docstring or a config exist.

Commands are read by the parsers of train.py, sample.py and the scripts, which stop before anything is loaded.
"""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import jsonargparse
import pytest

from stdit.errors import UserError
from stdit.serve.config import SampleCommand
from stdit.setting_checks import OWN_FLAGS
from stdit.settings import parse
from stdit.training.config import TrainConfig, parse_train

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "configs", "scripts", "stdit", "tests")
FILES = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.*", *(f"{folder}/**/*.*" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
}
PAGES = sorted(name for name in FILES if name.endswith(".md"))
SCRIPTS = sorted(
    name
    for name in FILES
    if re.match(r"scripts/.*\.py$", name) and "__main__" in (ROOT / name).read_text(encoding="utf-8")
)
WITHOUT_FLAGS = ("scripts/bench/long_rank.py", "scripts/bench/sequence_rank.py")
"""Take JSON, from the scripts that start them."""
CONFIGS = sorted(name for name in FILES if re.match(r"configs/.*\.yaml$", name))
CONFIG_FOLDERS = tuple({f"{name.split('/')[1]}/" for name in CONFIGS})
"""How the names of configs begin."""
COMMAND_FILES = sorted(name for name in FILES if re.match(r"stdit/commands/\w+\.py$", name))

INSTALLED = {
    "stdit-train": "train.py",
    "stdit-sample": "sample.py",
    "stdit-prepare": "scripts/prepare_data.py",
}
"""Command of an installed package to the script that it stands for."""
LAUNCHERS = ("python", "torchrun", "accelerate", "bash", "sbatch", "srun", "pytest", *INSTALLED)
PLACEHOLDERS = ("NAME", "FILE", "FOLDER", "PATH", "X")
"""Names that stand for a reader's own."""
OTHERS_FLAGS = {
    *("nproc_per_node", "nnodes", "max_restarts", "no-python"),  # torchrun
    "no-deps",  # pip
    *("multi_gpu", "num_processes"),  # accelerate
    *("nodes", "time"),  # sbatch
    *("hypothesis-profile", "durations", "numprocesses"),  # pytest
}
READERS_OWN = ("my_module.py", "other.py")
"""Python files that a page may name although they do not exist."""


# Commands


class ParsedError(Exception):
    """Raised by `run_script` once a script has read its flags."""

    def __init__(self, parser: Any, rest: list[str], command: str = "") -> None:
        self.parser, self.rest, self.command = parser, rest, command


def run_script(name: str, arguments: list[str] | None) -> ParsedError:
    """Run ``main`` of a script until it has parsed its arguments; None: until it has built its parser."""
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    outermost: list[Any] = []

    def stopping(parse_arguments: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            if outermost or isinstance(parser, jsonargparse.ArgumentParser):
                return parse_arguments(parser, *args, **kwargs)
            outermost.append(parser)
            if arguments is None:
                raise ParsedError(parser, [])
            result = parse_arguments(parser, *args, **kwargs)
            namespace, rest = result if isinstance(result, tuple) else (result, [])
            raise ParsedError(parser, rest, getattr(namespace, "command", ""))

        return parse_and_stop

    def parse_settings_and_stop(config_class: Any, *_: Any, **__: Any) -> None:
        if arguments is not None:
            parse(config_class, arguments)
        raise ParsedError(config_class, [])

    methods = {
        method: stopping(getattr(argparse.ArgumentParser, method))
        for method in ("parse_args", "parse_known_args")
    }
    with (
        patch.multiple(argparse.ArgumentParser, **methods),
        patch.object(module, "parse", parse_settings_and_stop, create=True),
        patch.object(
            module, "parse_train", create=True, side_effect=AssertionError(f"{name} parses no flags")
        ),
        patch.object(sys, "argv", [name, *(arguments or [])]),
        patch.object(signal, "signal"),
        pytest.raises(ParsedError) as stopped,
    ):
        module.main()
    return stopped.value


def parse_command(command: str) -> None:
    """Parse a shell command as the program that it starts does. Raises ValueError, UserError or SystemExit."""
    words = shlex.split(command, comments=True)
    own = {module: ModuleType(module) for flag, module in pairwise(words) if flag == "--import"}
    # Not by patch.dict, which would also drop what is imported meanwhile, such as NumPy.
    sys.modules.update(own)
    try:
        parse_words(words)
    finally:
        for module in own:
            sys.modules.pop(module, None)


def parse_words(words: list[str]) -> None:
    for word in words:
        check_path(word.partition("::")[0])
    words = [INSTALLED.get(word, word) for word in words]
    place = next((i for i, word in enumerate(words) if re.search(r"\.(py|sh|sbatch)$", word)), None)
    if place is None or words[0] == "pytest":
        if words[0] in ("python", "torchrun", "bash") and words[1:2] not in (["-c"], ["-m"]):
            raise ValueError("starts no script")
        return
    script, arguments = words[place], words[place + 1 :]
    stand_in = f"configs/{'sample' if script == 'sample.py' else 'train'}/quickstart.yaml"
    for i in range(1, len(arguments)):
        named = arguments[i].startswith(CONFIG_FOLDERS) or arguments[i] in FILES
        if arguments[i - 1] == "--config" and (not named or is_placeholder(arguments[i])):
            arguments[i] = stand_in  # a reader's own; check_path has looked at those of the repository
    if script in ("train.py", "scripts/launch_node.sh", "scripts/slurm.sbatch"):
        if "--import" in arguments:  # what a reader's module registers is not known
            parse(TrainConfig, arguments)
        else:
            parse_train(arguments)
    elif script == "sample.py":
        parse(SampleCommand, arguments)
    elif script in SCRIPTS:
        parsed = run_script(script, arguments)
        if parsed.rest and parsed.command not in ("", "encode"):
            raise ValueError(f"{' '.join(parsed.rest)}: not a flag of {script} {parsed.command}")
        if parsed.rest:
            parse(TrainConfig, parsed.rest)
    elif script not in FILES:
        raise ValueError(f"there is no {script}")


def check_command(command: str) -> Iterator[str]:
    """Return the errors of a shell command."""
    try:
        parse_command(command)
    except SystemExit as error:
        if error.code not in (0, None):
            yield f"{command}: the parser refuses it"
    except (UserError, ValueError) as error:
        yield f"{command}: {error}"


def commands_in(lines: str) -> Iterator[str]:
    """Commands among the lines of a code block, which a backslash continues."""
    for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
        command = re.sub(r"^(\$ |sudo |[A-Z_]+=\S+ )*", "", line.strip())
        if command.split(" ")[0] in LAUNCHERS:
            yield command


# Names


@cache
def settings() -> dict[str, Any]:
    """Dotted settings of train.py and sample.py with their types."""
    return dict([*settings_of(TrainConfig), *settings_of(SampleCommand)])


def settings_of(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        yield prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            yield from settings_of(hints[field.name], f"{prefix}{field.name}.")


@cache
def flags() -> set[str]:
    """All flags, without their dashes."""
    found = {*settings(), *OWN_FLAGS, *OTHERS_FLAGS}
    for name in SCRIPTS:
        if name not in WITHOUT_FLAGS:
            parser = run_script(name, None).parser
            if dataclasses.is_dataclass(parser):
                found |= {key for key, _ in settings_of(parser)}
            else:
                found |= options_of(parser)
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = {text.lstrip("-") for action in parser._actions for text in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for inner in action.choices.values() for flag in options_of(inner)}
    return found


def is_setting(key: str) -> bool:
    """Whether a dotted key is a setting, or an entry of a setting that is a mapping."""
    group = key.rpartition(".")[0]
    return key in settings() or typing.get_origin(settings().get(group)) is dict


def is_placeholder(path: str) -> bool:
    return Path(path).stem in PLACEHOLDERS


def check_path(word: str) -> None:
    """Raise ValueError for a path of the repository that does not exist; it may have ``*``."""
    if re.match(r"(stdit|scripts|configs|tests|\.github)/[\w./*-]*$", word) and not is_placeholder(word):
        if not any(ROOT.glob(word.rstrip("/"))):
            raise ValueError(f"there is no {word}")


def check_test(name: str) -> Iterator[str]:
    """What is wrong with ``path::test``; the path may be the end of one."""
    path, *inside = name.split("::")
    found = [file for file in FILES if f"/{file}".endswith(f"/{path}")]
    function = inside[-1].partition("[")[0]
    if not any(re.search(rf"\b(def|class) {function}\b", (ROOT / file).read_text()) for file in found):
        yield f"{name}: there is no such test"


def check_code(span: str) -> Iterator[str]:
    """What is wrong with the words of a text that are set as code."""
    if span.split(" ")[0] in LAUNCHERS and " " in span:
        yield from check_command(span)
        return
    for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*)", span):
        if flag.rstrip(".") not in flags() and not is_setting(flag):
            yield f"`{span}`: there is no flag --{flag}"
    groups = "|".join(key for key, hint in settings().items() if dataclasses.is_dataclass(hint))
    if (key := re.match(rf"(?:{groups})\.[\w.]*\w\b(?!/)", span)) and not span.endswith((".py", ".yaml")):
        if not is_setting(key[0]):
            yield f"`{span}`: there is no setting {key[0]}"
    for name in re.findall(r"[\w/]+\.py::[\w:]+", span):
        yield from check_test(name)
    for word in re.split(r"[\s,;()\[\]]+", span):
        path = word.partition("::")[0]
        try:
            check_path(path)
        except ValueError as error:
            yield f"`{span}`: {error}"
        elsewhere = path not in READERS_OWN and path.partition("/")[0] not in FOLDERS
        if elsewhere and re.fullmatch(r"[\w/-]+\.(py|sh|sbatch)", path):
            if not any(f"/{file}".endswith(f"/{path}") for file in FILES):
                yield f"`{span}`: there is no {path}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def check_link(page: Path, target: str) -> Iterator[str]:
    """What is wrong with a link of a page to a file, or to a heading of this or another page."""
    if re.match(r"[a-z]+:", target):
        return
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or not file.is_relative_to(page.parent if ROOT not in page.parents else ROOT):
        yield f"link {target}: there is no such file"
    elif anchor and anchor not in anchors(file):
        yield f"link {target}: there is no such heading"


def anchors(page: Path) -> set[str]:
    if page.suffix != ".md" or not page.is_file():
        return set()
    paragraphs, _ = take_apart(page.read_text(encoding="utf-8"))
    return {slug(text.lstrip("#")) for text in paragraphs if text.startswith("#")}


def take_apart(text: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Paragraphs (each on one line) and code blocks (language and lines) of a page."""
    paragraphs, blocks, paragraph = [], [], []  # type: ignore[var-annotated]
    lines = [*text.splitlines(), ""]
    while lines:
        line = lines.pop(0)
        fence = re.match(r" *```(\w*)", line)
        if paragraph and (fence or not line.strip() or line.startswith("#") or paragraph[0].startswith("#")):
            paragraphs.append(" ".join(paragraph))
            paragraph = []
        if fence:
            end = next((i for i, inner in enumerate(lines) if inner.strip() == "```"), len(lines))
            blocks.append((fence[1], "\n".join(lines[:end])))
            del lines[: end + 1]
        elif line.startswith("    ") and not paragraph:
            end = next(
                (i for i, inner in enumerate(lines) if inner.strip() and inner[:4].strip()), len(lines)
            )
            blocks.append(("", "\n".join([line, *lines[:end]])))
            del lines[:end]
        elif line.strip():
            paragraph.append(line.strip())
    return paragraphs, blocks


def check_block(language: str, lines: str, folder: Path) -> Iterator[str]:
    """What is wrong with a block of commands, of settings, or of Python that imports from stdit."""
    if language in ("", "bash", "sh"):
        for command in commands_in(lines):
            yield from check_command(command)
    elif language == "yaml":
        file = folder / "block.yaml"
        file.write_text(lines, encoding="utf-8")
        try:
            parse(TrainConfig, ["--config", str(file)])
        except UserError as error:
            yield str(error)
    elif language == "python":
        for node in ast.walk(ast.parse(lines)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "stdit":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        yield f"there is no {alias.name} in {node.module}"


def check_page(page: Path, folder: Path) -> list[str]:
    """All that is wrong with a page; writes files to a folder."""
    paragraphs, blocks = take_apart(page.read_text(encoding="utf-8"))
    wrong = [problem for block in blocks for problem in check_block(*block, folder)]
    for text in paragraphs:
        wrong += [problem for span in re.findall(r"`([^`]+)`", text) for problem in check_code(span)]
        plain = re.sub(r"`[^`]+`", "", text)
        targets = re.findall(r"\]\(([^)\s]+)\)", plain) + re.findall(r'(?:src|href)="([^"]+)"', plain)
        wrong += [problem for target in targets for problem in check_link(page, target)]
    return wrong


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name: str, tmp_path: Path) -> None:
    assert check_page(ROOT / name, tmp_path) == []


@pytest.mark.parametrize("name", ["train.py", "sample.py", *SCRIPTS, *COMMAND_FILES])
def test_commands_in_docstrings_parse(name: str) -> None:
    doc = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or ""
    if name not in WITHOUT_FLAGS:
        assert [problem for command in commands_in(doc) for problem in check_command(command)] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_commands_in_configs_parse(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    comment = "\n".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    assert [problem for command in commands_in(comment) for problem in check_command(command)] == []


def test_the_indexes_are_complete() -> None:
    """Every script stands in scripts/README.md, every config in configs/README.md."""
    scripts = {name for name in FILES if re.match(r"scripts/.*\.(py|sh|sbatch)$", name)}
    index = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    assert sorted(name for name in scripts if name.removeprefix("scripts/") not in index) == []
    index = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert sorted(name for name in CONFIGS if name.removeprefix("configs/") not in index) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "bad",
    [
        "[a page](nowhere.md)",
        "[a heading](#nowhere)",
        "[outside](../outside.md)",
        '<img src="nowhere.png">',
        "`--trainer.stepz 3`",
        "`--no_such_flag`",
        "`trainer.stepz`",
        "`tests/test_pages.py::test_nothing`",
        "`tests/test_nothing.py::test_pages`",
        "`stdit/nothing.py`",
        "`configs/train/nothing.yaml`",
        "`nothing.py`",
        "`python train.py --seeed 1`",
        "```bash\npython train.py --config configs/train/nothing.yaml\n```",
        "```bash\npython train.py --config configs/train/quickstart.yaml \\\n    --trainer.stepz 3\n```",
        "```bash\nPORT=1 torchrun --nproc_per_node 2 train.py --seeed 1\n```",
        "```bash\npython sample.py --checkpoint outputs/a --prompts a.csv --parallel.cgf 2\n```",
        "```bash\npython scripts/make_shapes.py --clips 10\n```",
        "```bash\npython scripts/prepare_data.py filter a.csv b.csv --were 'motion > 2'\n```",
        "```bash\npython scripts/prepare_data.py probe a b.csv --seed 2\n```",
        "```bash\npython scripts/prepare_data.py encode --data.manifset a.csv\n```",
        "```bash\npython scripts/nothing.py\n```",
        "```bash\nstdit-train --config train/nothing\n```",
        "`stdit-train --seeed 1`",
        "```bash\ntorchrun --nproc_per_node 2 --no-python stdit-sample --checkpoint outputs/a --seeed 1\n```",
        "```bash\nstdit-prepare probe a b.csv --seed 2\n```",
        "```bash\nbash scripts/nothing.sh\n```",
        "    python scripts/parity.py --config configs/train/quickstart.yaml --parallel.ps 2",
        "```yaml\ndata: {buckets: [{num_frames: 8, fps: 8, heigth: 32}]}\n```",
        "```python\nfrom stdit.cli import nothing\n```",
    ],
)
def test_what_is_wrong_is_found(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "bad.md"
    page.write_text(f"# Bad\n\nText before.\n\n{bad}\n\nText after: `stdit/cli.py`.\n", encoding="utf-8")
    assert check_page(page, tmp_path)


def test_what_is_right_passes(tmp_path: Path) -> None:
    page = tmp_path / "good.md"
    text = """
        # Good: a page
        [Here](#good-a-page), [elsewhere](https://example.org/nothing) and `outputs/NAME/config.yaml`.

        ```bash
        OMP_NUM_THREADS=1 python train.py --config configs/train/quickstart.yaml --config outputs/NAME/config.yaml \\
            --trainer.steps 3  # three steps
        torchrun --nproc_per_node 2 sample.py --config FILE --checkpoint outputs/NAME --prompt "a \\"ball\\" rises"
        python scripts/prepare_data.py encode --part 1/4 --data.manifest clips/manifest.csv
        python train.py --import my_module --optimizer.lr 1e-3
        stdit-train --config train/quickstart --config models/S.yaml --trainer.steps 3
        stdit-prepare encode --part 1/4 --data.manifest clips/manifest.csv
        torchrun --nproc_per_node 2 --no-python stdit-sample --checkpoint outputs/a --prompt a
        python -c "import stdit"
        ls nothing.py
        ```

            pytest tests/test_pages.py

        `--flow.conditioning.first 0.1`, `--import MODULE`, `flow.conditioning`.
        `tests/test_pages.py::test_what_is_right_passes`, `cli.py`
        """
    page.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()), encoding="utf-8")
    assert check_page(page, tmp_path) == []
