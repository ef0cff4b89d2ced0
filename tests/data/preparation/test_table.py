import json
from pathlib import Path

import pytest

from stdit.data.manifest.reading import read_manifest
from stdit.data.preparation import table as module
from stdit.data.preparation.filtering import filter_clips
from stdit.data.preparation.table import Table, read_table, staged_output, typed, write_table
from stdit.errors import UserError
from tests.data.preparation.conftest import read_csv, task

ROWS = [
    {
        "path": "a.mp4",
        "text": '7, "x"\ny',
        "id": "007",
        "motion": "1.5",
        "n": "3",
        "hd": "True",
        "tags": '["a", "é"]',
    },
    {"path": "b.mp4", "text": "", "id": "8", "motion": "", "n": "40", "hd": "", "tags": ""},
]
COLUMNS = ["path", "text", "id", "motion", "n", "hd", "tags"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_all_columns_are_read_back(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"manifest{suffix}"
    write_table(path, Table(COLUMNS, ROWS, str(tmp_path)))
    assert read_table(str(path), None).rows == ROWS
    assert list(tmp_path.iterdir()) == [path]


def test_jsonl_has_numbers_if_nothing_is_lost(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    rows = [
        {
            "path": "a.mp4",
            "text": "5",
            "motion": 1.5,
            "tags": ["a", {"b": 1}],
            "id": "007",
            "hd": True,
            "n": 2,
        },
        {"path": "b.mp4", "text": "true", "motion": 2, "id": "08", "n": 1},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    filter_clips(task(source, tmp_path / "good.jsonl"), "motion > 1")
    assert [json.loads(line) for line in (tmp_path / "good.jsonl").read_text().splitlines()] == rows
    filter_clips(task(source, tmp_path / "good.csv"), "hd == 'True'")
    assert read_csv(tmp_path / "good.csv")[0]["tags"] == '["a", {"b": 1}]'


def test_types_of_fields() -> None:
    assert typed(["1", "2", ""], "a") == [1, 2, None] and typed(["1.5", "2.0"], "a") == [1.5, 2.0]
    for kept in (["1.50"], ["nan"], ["inf"], ["1_0"], ["0x1"], ["true"], ["{}x"], ["[" * 9999], ["1", "x"]):
        assert typed(kept, "a") == kept
    assert typed(["1", ""], "text") == ["1", ""]


def test_a_written_manifest_can_be_trained_on(clips: Path) -> None:
    write_table(
        clips / "m.jsonl", Table(["path", "text", "end"], [{"path": "a.mp4", "text": "x", "end": 1.0}], "")
    )
    found, _ = read_manifest(clips / "m.jsonl")
    assert (found[0].num_frames, found[0].text) == (8, "x")


def test_an_output_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), staged_output(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match="manifest.csv cannot be written: No space left on device"):
        write_table(path, Table(COLUMNS, ROWS, ""))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
