"""sample.py, in processes of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.pipelines.tiny import tiny_pipeline, write_run

ROOT = Path(__file__).parents[1]


def sample(*arguments, folder):
    return warm.run([str(ROOT / "sample.py"), *map(str, arguments)], cwd=folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return write_run(folder / "outputs" / "tiny", tiny_pipeline(folder))


def test_prompt_to_video(run, tmp_path):
    (tmp_path / "c.yaml").write_text(f"checkpoint: {run}\nnum_inference_steps: 2\nfps: 4\nformat: mp4\n")
    result = sample(
        "--config",
        "c.yaml",
        "--prompt",
        "a red circle",
        "--fps",
        6,
        "--output",
        tmp_path / "out",
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000-a-red-circle-seed0.json", "000-a-red-circle-seed0.mp4"]
    values = json.loads((tmp_path / "out" / names[0]).read_text())
    assert (values["num_inference_steps"], values["fps"]) == (2, 6.0)
    assert str(tmp_path / "out" / names[1]) in result.stdout
    assert "Traceback" not in result.stderr


def test_list_sizes(run, tmp_path):
    result = sample("--checkpoint", run, "--list_sizes", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "428x240" in result.stdout and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "a", "--guidance_scal", "2"], "guidance_scale"),
        (["--prompt", "a", "--num_frames", "many"], "num_frames"),
        (["--prompt", "a", "--num_frames", "0"], "num_frames = 0"),
        (["--prompts", "absent.txt"], "absent.txt"),
        (["--prompt", "a", "--checkpoint", "absent"], "absent"),
        (["--prompt", "a", "--image", "absent.png"], "absent.png"),
        (["--prompt", "a", "--condition", "absent.png@0"], "absent.png"),
        (["--prompt", "a", "--condition", "a.png"], "FILE@frame"),
        (
            ["--prompt", "a", "--num_frames", "8", "--condition", "a.png@0", "--condition", "a.png@8"],
            "a.png@8",
        ),
        (["--prompt", "a", "--format", "avi"], "format"),
        (["--prompt", "a"], "no checkpoint"),
        (["--list_sizes"], "no checkpoint"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, arguments, message):
    result = sample(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_every_setting_and_imports_no_torch(tmp_path):
    program = (
        "import sys, runpy\n"
        "sys.argv = ['sample.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    assert exit.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    for flag in (
        "--checkpoint",
        "--prompts",
        "--num_frames",
        "--guidance_scale",
        "--image",
        "--aspect_ratio",
    ):
        assert flag in result.stdout
