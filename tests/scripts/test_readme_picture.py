"""The picture in the README is what its script makes."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data.shapes.clips import run_script

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_picture_in_the_readme_is_up_to_date(tmp_path: Path) -> None:
    done = run_script("readme_picture", "--output", tmp_path / "made.png")
    assert done.returncode == 0, done.stderr
    made, kept = (
        np.asarray(PIL.Image.open(path).convert("RGB"), dtype=float)
        for path in (tmp_path / "made.png", ROOT / ".github" / "samples.png")
    )
    assert made.shape == kept.shape and abs(made - kept).mean() < 2, "fonts and rounding may differ a little"
