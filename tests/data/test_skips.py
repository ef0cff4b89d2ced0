import json

import pytest

from stdit.data.manifest.reading import Skipped
from stdit.data.skips import SkipFile, SkipTally
from stdit.errors import UserError

A, B, C = (Skipped(f"{name}.mp4", f"damaged: {name}\nand more ü") for name in "abc")


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_each_clip_is_listed_once_with_reason_and_step_across_resumes(tmp_path):
    file = tmp_path / "skipped.jsonl"
    tally = SkipTally(10, 1.0, SkipFile(file))
    assert not file.exists()
    tally.add([A])
    tally.add([A, B], 7)
    tally.add([B], 8)
    expected = [{**A._asdict(), "step": None}, {**B._asdict(), "step": 7}]
    assert lines(file) == expected
    with file.open("ab") as half:
        half.write('{"path": "c.mp4", "reason": "ü'.encode()[:-1])  # of a killed process
    tally = SkipTally(10, 1.0, SkipFile(file))
    tally.add([A, C], 9)
    assert lines(file) == [*expected, {**C._asdict(), "step": 9}]


def test_a_damaged_line_lists_nothing(tmp_path):
    file = tmp_path / "skipped.jsonl"
    SkipTally(10, 1.0, SkipFile(file)).add([A, B], 1)
    file.write_bytes(file.read_bytes().replace(b'"path": "a', b'"path": #a'))
    SkipTally(10, 1.0, SkipFile(file)).add([A, B], 2)
    last = file.read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last) == {**A._asdict(), "step": 2}


def test_the_clip_that_exceeds_the_limit_is_listed(tmp_path):
    file = tmp_path / "skipped.jsonl"
    tally = SkipTally(10, 0.1, SkipFile(file))
    tally.add([A], 1)
    with pytest.raises(UserError, match="2 of 10 files failed to decode, more than"):
        tally.add([B], 2)
    assert [line["path"] for line in lines(file)] == ["a.mp4", "b.mp4"]


def test_a_file_that_cannot_be_written_is_an_error_for_people(tmp_path):
    with pytest.raises(UserError, match=r"skipped.jsonl cannot be written .*make room"):
        SkipTally(10, 1.0, SkipFile(tmp_path / "nowhere" / "skipped.jsonl")).add([A], 1)
