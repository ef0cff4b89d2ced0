"""A wheel built from the repository works in another environment and folder, without the clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest
import setuptools

import stdit
from tests.training.tiny import tiny_settings

ROOT = Path(__file__).parents[1]
COMMANDS = {"stdit-train", "stdit-sample", "stdit-prepare"}


def run(*command: object, cwd: Path, succeeds: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, with no path to the clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode == 0) is succeeds, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def pip(*arguments: object, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, cwd=cwd)


def build(source: Path, output: Path) -> Path:
    """Build the wheel of a folder or an sdist."""
    pip("wheel", source, "--no-deps", "--no-build-isolation", "-w", output, cwd=output.parent)
    (wheel,) = output.glob("*.whl")
    return wheel


def environment_with(folder: Path, *install: object) -> Path:
    """Make an environment that has stdit and, of all other packages, those of this one; returns its commands."""
    venv.create(folder)
    python = folder / "bin" / "python"
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout[:-1]
    )
    # Python reads no .pth in folders that a .pth names, so that an editable stdit is not found there.
    (packages / "others.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    )
    pip(
        "--python", python, "install", "--no-deps", "--no-index", "--no-build-isolation", *install, cwd=folder
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed, so that nothing is built in the clone."""
    folder = tmp_path_factory.mktemp("source") / "stdit"  # as a clone is called
    folder.mkdir()
    for name in ("stdit", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment with the wheel."""
    return environment_with(tmp_path_factory.mktemp("installed"), wheel)


def names(wheel: Path) -> Sequence[str]:
    return ZipFile(wheel).namelist()


def files_to_pack(folder: Path) -> set[str]:
    """What a wheel of a folder with stdit/ and configs/ must have."""
    files = {path.relative_to(folder).as_posix() for path in folder.glob("stdit/**/[!.]*") if path.is_file()}
    files |= {f"stdit/{path.relative_to(folder)}" for path in folder.glob("configs/**/*.yaml")}
    return {name for name in files if "__pycache__" not in name}


def test_setuptools_packs_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick part of the check, which builds nothing: a new kind of file needs a line in package-data."""
    monkeypatch.chdir(ROOT)
    distribution = setuptools.distutils.core.run_setup("setup.py", stop_after="config")
    distribution.include_package_data = False  # which would write stdit.egg-info
    command = distribution.get_command_obj("build_py")
    command.build_lib = "lib"
    command.ensure_finalized()
    packed = {str(Path(name).relative_to("lib")) for name in command.get_outputs(include_bytecode=False)}
    assert packed == files_to_pack(ROOT)
    assert {"stdit/py.typed", "stdit/configs/train/quickstart.yaml"} <= packed


@pytest.mark.slow
def test_the_wheel_has_all_files_of_the_package_and_the_configs(source: Path, wheel: Path) -> None:
    packed = {name for name in names(wheel) if ".dist-info/" not in name}
    assert packed == files_to_pack(source) and "stdit/bundled/model_index.json" in packed
    assert f"stdit-{stdit.__version__}.dist-info/licenses/LICENSE" in names(wheel)


@pytest.mark.slow
def test_a_wheel_of_the_sdist_is_the_same(source: Path, wheel: Path, tmp_path: Path) -> None:
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", program, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sorted(names(build(sdist, tmp_path / "dist"))) == sorted(names(wheel))


@pytest.mark.slow
def test_stdit_is_imported_from_the_wheel(commands: Path, tmp_path: Path) -> None:
    program = (
        "import json, sys, importlib.metadata as m, stdit, stdit.training.session; "
        "print(json.dumps([stdit.__file__, m.version('stdit'), m.distribution('stdit').read_text('direct_url.json'), "
        "sorted(e.name for e in m.distribution('stdit').entry_points), sys.prefix]))"
    )
    done = run(commands / "python", "-c", program, cwd=tmp_path)
    file, version, url, found, prefix = json.loads(done.stdout)
    assert Path(file).is_relative_to(prefix) and Path(prefix) == commands.parent
    assert version == stdit.__version__ and set(found) == COMMANDS
    assert json.loads(url)["url"].endswith(".whl")


@pytest.mark.slow
def test_the_commands_of_the_wheel_train_prepare_and_sample(commands: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    train, sample = commands / "stdit-train", commands / "stdit-sample"
    printed = run(train, "--config", "train/quickstart", "--print_config", cwd=tmp_path).stdout
    assert "manifest: data/shapes/manifest.csv" in printed and "name: muon" in printed
    wrong = run(train, "--config", "train/quikstart", cwd=tmp_path, succeeds=False)
    assert wrong.returncode == 2 and "did you mean train/quickstart" in wrong.stderr

    flags = [*settings, "--trainer.steps", "2"]
    planned = run(train, *flags, "--dry_run", "true", cwd=tmp_path)
    assert "5 clips" in planned.stdout, planned.stdout
    trained = run(train, *flags, cwd=tmp_path)
    checkpoint = tmp_path / "outputs" / "tiny"
    assert f"Sample: stdit-sample --checkpoint {checkpoint}" in trained.stdout
    run(commands / "stdit-prepare", "probe", "clips", "probed.csv", "--workers", "1", cwd=tmp_path)
    assert (tmp_path / "probed.csv").read_text().count(".mp4") == 5
    prompt = ["--prompt", "a red square", "--num_inference_steps", "2", "--output", "videos"]
    run(sample, "--checkpoint", checkpoint, *prompt, cwd=tmp_path)
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert json.loads(video.with_suffix(".json").read_text())["prompt"] == "a red square"


@pytest.mark.slow
def test_the_wheel_samples_from_the_model_that_comes_with_it(commands: Path, tmp_path: Path) -> None:
    prompts = ["a red star orbits a blue square on a white background", "a green ring bounces"]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = run(commands / "stdit-sample", *flags, cwd=tmp_path)
    assert "its training: " in done.stdout, done.stdout
    videos = sorted((tmp_path / "outputs" / "samples").glob("*.mp4"))
    facts = [json.loads(video.with_suffix(".json").read_text()) for video in videos]
    assert [fact["prompt"] for fact in facts] == prompts
    assert all((fact["height"], fact["width"], fact["num_frames"]) == (64, 64, 25) for fact in facts)


@pytest.mark.slow
def test_two_ranks_train_with_the_command_of_the_wheel(commands: Path, tmp_path: Path) -> None:
    torchrun = [commands / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = [*tiny_settings(tmp_path), "--trainer.steps", "2"]
    run(*torchrun, "--no-python", commands / "stdit-train", *settings, cwd=tmp_path)
    assert (tmp_path / "outputs" / "tiny" / "pipeline" / "model_index.json").is_file()


@pytest.mark.slow
def test_an_editable_install_reads_the_configs_of_the_clone(source: Path, tmp_path: Path) -> None:
    editable = environment_with(tmp_path / "environment", "--editable", source)
    command = editable / "stdit-train", "--config", "train/mine", "--print_config"
    run(*command, cwd=tmp_path, succeeds=False)
    mine = source / "configs" / "train" / "mine.yaml"
    mine.write_text((source / "configs" / "train" / "quickstart.yaml").read_text() + "output_dir: mine\n")
    try:
        assert "output_dir: mine" in run(*command, cwd=tmp_path).stdout
    finally:
        mine.unlink()
    done = run(editable / "python", "-c", "import stdit; print(stdit.__file__)", cwd=source.parent)
    assert done.stdout.strip() == str(
        source / "stdit" / "__init__.py"
    )  # rather than the namespace package stdit/
