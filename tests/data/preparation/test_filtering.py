from pathlib import Path

import pytest

from stdit.data.preparation.filtering import filter_clips
from stdit.errors import UserError
from tests.data.preparation.conftest import read_csv, task


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A manifest whose clips do not exist: filter opens none."""
    path = tmp_path / "scored.csv"
    path.write_text('path,text,motion,camera\na.mp4,"a, b",3,pan\nb.mp4,"c\nd",1,pan\nc.mp4,e,,tilt\n')
    return path


def test_rows_are_kept_with_all_columns_and_the_others_listed(source: Path, tmp_path: Path) -> None:
    lines = filter_clips(task(source, tmp_path / "good.csv"), "motion > 2 and camera == 'pan'")
    assert read_csv(tmp_path / "good.csv") == read_csv(source)[:1]
    assert [
        (row["path"], row["text"], row["reason"]) for row in read_csv(tmp_path / "good.excluded.csv")
    ] == [
        ("b.mp4", "c\nd", "not motion > 2: motion = 1"),
        ("c.mp4", "e", "no value of motion"),
    ]
    assert "1 of 3 clips" in lines[0] and "1 x not motion > 2: b.mp4 (motion = 1)" in lines[2]


def test_a_bad_condition_writes_nothing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "good.csv"
    with pytest.raises(UserError, match="no column 'motoin': did you mean motion?"):
        filter_clips(task(source, output), "motoin > 2")
    with pytest.raises(UserError, match="no clip is left\n3 excluded"):
        filter_clips(task(source, output), "motion > 20")
    assert not output.exists()
