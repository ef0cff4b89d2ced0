"""diffusers' own `DiffusionPipeline.from_pretrained` loads our pipelines, in fresh processes."""

import subprocess
import sys
from pathlib import Path

import pytest

LOAD = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({folder!r}{more})
assert type(pipe).__name__ == "STDiTPipeline", type(pipe)
video = pipe("a red star", num_inference_steps=1, refine_pairs=0, num_frames=5, output_type="np").frames
assert video.shape == (1, 5, 64, 64, 3)
print("made")
"""
BUNDLED = Path(__file__).parents[1] / "stdit" / "bundled"


@pytest.mark.parametrize(
    "first, more",
    [
        ("import stdit, sys; assert 'diffusers' not in sys.modules and 'torch' not in sys.modules", ""),
        pytest.param(
            "import importlib.util, stdit; importlib.util.find_spec('diffusers')", "", marks=pytest.mark.slow
        ),
        pytest.param("import diffusers, stdit", "", marks=pytest.mark.slow),
        ("", ", custom_pipeline={code!r}, trust_remote_code=True"),
    ],
)
def test_the_generic_class_loads_a_pipeline(first: str, more: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("from stdit import STDiTPipeline\n")
    more = more.format(code=str(tmp_path))
    program = first + LOAD.format(folder=str(BUNDLED), more=more)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "made\n", done.stderr
