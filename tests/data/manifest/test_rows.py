import json

import pyarrow
import pyarrow.parquet
import pytest

from stdit.data.manifest.rows import near_misses, read_rows
from stdit.errors import UserError

ROWS = [
    {"path": "a.mp4", "text": 'a "red" ball,\nrolling', "num_frames": 16, "fps": 29.97},
    {"path": "猫.mp4", "text": "кошка", "num_frames": "8", "fps": None},
]


def read(manifest):
    """All rows of a small manifest, without what is empty, and what is refused."""
    (rows,) = read_rows(manifest, manifest.parent)
    return [{k: v for k, v in rows.fields(i).items() if v} for i in range(len(rows))], rows.refused


def write_json(path, rows=ROWS, encoding="utf-8", newline="\n"):
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode(encoding))
    return path


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-8", "\n\n")])
def test_json_lines(tmp_path, encoding, newline):
    rows, refused = read(write_json(tmp_path / "m.jsonl", encoding=encoding, newline=newline))
    assert rows[0] == {"path": "a.mp4", "text": 'a "red" ball,\nrolling', "num_frames": "16", "fps": "29.97"}
    assert rows[1] == {"path": "猫.mp4", "text": "кошка", "num_frames": "8"} and not refused


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    columns = {
        "path": ["a.mp4", "b.mp4"],
        "text": pyarrow.array(["a ball", None]),
        "num_frames": pyarrow.array([16, None], pyarrow.int16()),
        "fps": [29.97, float("nan")],
        "height": ["240", " 480 "],
        "bytes": [b"\x00" * 9, b""],
        "tags": [["x", "y"], []],
    }
    rows, refused = read(write_parquet(tmp_path / "m.parquet", columns))
    assert rows[0] == dict(
        path="a.mp4", text="a ball", num_frames="16", fps="29.97", height="240", tags='["x", "y"]'
    )
    assert rows[1] == dict(path="b.mp4", height="480", tags="[]") and not refused


def test_a_bad_line_is_refused_and_the_others_are_read(tmp_path):
    good = json.dumps(ROWS[0])
    lines = [good, "{'path': 'a.mp4'}", '["a.mp4", "b"]', good[:20], "[" * 100_000, '{"path": "b.mp4"}']
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(lines))
    rows, refused = read(manifest)
    assert len(rows) == 6 and rows[5] == {"path": "b.mp4"}
    assert sorted(refused) == [1, 2, 3, 4]
    for place, reason in refused.items():
        assert reason.startswith(f"malformed row: line {place + 1} is no")


def test_rows_come_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("stdit.data.manifest.rows.ROWS_PER_CHUNK", 2)
    write_parquet(tmp_path / "m.parquet", {"path": list("abcde"), "text": list("vwxyz")})
    write_json(tmp_path / "m.jsonl", [dict(path=p, text="t") for p in "abcde"])
    (tmp_path / "m.csv").write_text("path,text\n" + "".join(f"{p},t\n" for p in "abcde") + "f,t,more\n")
    for name in ("m.parquet", "m.jsonl", "m.csv"):
        parts = list(read_rows(tmp_path / name, tmp_path))
        assert "".join("".join(part.columns["path"]) for part in parts)[:5] == "abcde"
        assert [len(part) for part in parts[:2]] == [2, 2]
    assert list(parts[2].refused) == [1] and "line 7" in parts[2].refused[1]


def test_the_content_decides_where_the_name_does_not(tmp_path):
    for name in ("m.csv", "m.txt"):
        assert read(write_json(tmp_path / name))[0][1]["text"] == "кошка"
        assert read(write_parquet(tmp_path / name, {"path": ["a"], "text": ["b"]}))[0] == [
            {"path": "a", "text": "b"}
        ]


def test_manifests_that_cannot_be_read_say_why(tmp_path):
    def message(name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        return str(caught.value)

    whole = write_parquet(tmp_path / "m.parquet", {"path": ["a"], "text": ["b"]}).read_bytes()
    assert "is not a complete Parquet file" in message("m.parquet", b"<html>no such page</html>")
    assert "is not a complete Parquet file" in message("m.parquet", b"")
    assert "is not a complete Parquet file" in message("m.parquet", whole[:-20])
    assert "not UTF-8" in message("m.jsonl", '{"path": "a", "text": "ß"}'.encode("latin-1"))
    assert "no column 'text'; it has path, caption (rename 'caption'?)" in message(
        "m.jsonl", b'{"path": "a", "caption": "b"}'
    )
    assert "no column 'path'; it has Path, text (rename 'Path'?)" in message("m.csv", b"Path,text\na,b\n")
    assert "m.csv separates its columns by ';': save it with commas" in message("m.csv", b"path;text\na;b\n")
    assert "m.csv separates its columns by '\\t': save it" in message("m.csv", b"path\ttext\na\tb\n")
    assert "no column 'path'; it has pth, text (rename 'pth'?)" in message("m.csv", b"pth,text\na,b\n")
    assert "two columns 'text'" in message("m.csv", b"path,text,text\na,b,c\n")
    assert len(message("m.csv", b"x," * 10_000)) < 500


def test_a_missing_parquet_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install -e '\.\[parquet\]'"):
        read(tmp_path / "m.parquet")


def test_columns_that_look_misspelt():
    assert near_misses(["path", "text", "num_frame", "heigth", "fps", "source"]) == [
        ("num_frame", "num_frames"),
        ("heigth", "height"),
    ]
    assert near_misses(["num_frame", "num_frames"]) == []


def test_lines_are_counted_as_an_editor_does(tmp_path):
    (tmp_path / "m.csv").write_text('path,text\na,"two\nlines"\n\nb,short\nc\nd,too,many\n')
    rows, refused = read(tmp_path / "m.csv")
    assert [row["path"] for row in rows] == list("abcd") and rows[2] == {"path": "c"}
    assert list(refused) == [3] and refused[3].startswith("malformed row: line 7 has more fields")
