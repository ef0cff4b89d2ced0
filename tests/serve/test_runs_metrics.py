import json
import os
from pathlib import Path

import numpy as np
import pytest

from stdit.serve.runs import metrics_reader
from stdit.serve.runs.metrics_reader import MOST_BUCKETS, Curve, LastLines, MetricsReader, read_last_lines
from tests.serve.run_folders import write_metrics


@pytest.mark.parametrize("count", [1, 7, 2000, 2001, 4000, 4001, 50_000])
@pytest.mark.parametrize("most", [1, 3, 400, 2000])
def test_a_curve_has_bounded_buckets_with_mean_least_and_largest(count: int, most: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    curve = Curve()
    for step, value in enumerate(values):
        curve.add(step, float(value))
    assert len(curve.steps) <= MOST_BUCKETS
    points = curve.points(most)
    assert len(points) <= most and points[-1][0] == count - 1
    start = 0
    for step, mean, low, high in points:
        part = values[start : step + 1]
        assert np.allclose([mean, low, high], [part.mean(), part.min(), part.max()])
        start = step + 1


def test_a_curve_gives_what_comes_after_a_step() -> None:
    curve = Curve()
    for step in range(10):
        curve.add(step, step)
    assert curve.points(400, after=7) == [(8, 8, 8, 8), (9, 9, 9, 9)]
    assert curve.points(1, after=7) == [(9, 8.5, 8, 9)]
    assert curve.points(400, after=9) == [] and Curve().points(400) == []


def test_huge_values_leave_no_number_that_json_lacks() -> None:
    curve = Curve()
    for step in range(3 * MOST_BUCKETS):
        curve.add(step, 1.7e308 if step % 2 else -1.7e308)
    assert all(np.isfinite(point).all() for point in curve.points(7))
    assert len(curve.points(7)) == 7


def test_a_reader_follows_a_growing_file_without_reading_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[bytes] = []
    parse = metrics_reader.parse_line
    monkeypatch.setattr(metrics_reader, "parse_line", lambda line: lines.append(line) or parse(line))
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    reader.update()
    assert (reader.last_step, reader.points(None, 9, -1)) == (-1, {})
    for start in range(0, 30, 10):
        write_metrics(tmp_path, range(start, start + 10))
        reader.update()
        assert reader.last_step == start + 9 and len(lines) == start + 10
    reader.update()
    assert len(lines) == 30
    points = reader.points(["loss", "skipped", "none"], 3, -1)
    assert [point[0] for point in points["loss"]] == [9, 19, 29]
    assert points["skipped"][0] == (9, 0, 0, 0) and points["none"] == []
    assert "matmul_precision" not in reader.curves and "step" not in reader.curves


def test_an_incomplete_last_line_waits_for_its_end(tmp_path: Path) -> None:
    file, reader = tmp_path / "metrics.jsonl", MetricsReader(tmp_path / "metrics.jsonl")
    whole = b'{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 2.5}\n'
    for end in range(len(whole) + 1):
        file.write_bytes(whole[:end])
        reader.update()
        assert reader.last_step == whole[:end].count(b"\n") - 1 and reader.damaged == 0
    assert reader.points(None, 5, -1) == {"loss": [(0, 1.5, 1.5, 1.5), (1, 2.5, 2.5, 2.5)]}


def test_a_file_that_is_replaced_or_cut_is_read_again(tmp_path: Path) -> None:
    """As when a run resumes or rolls back; also if the system gives the new file the number of the old one."""
    file, reader = tmp_path / "metrics.jsonl", MetricsReader(tmp_path / "metrics.jsonl")
    write_metrics(tmp_path, range(50))
    reader.update()
    aside = tmp_path / "aside"
    aside.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:20]))
    os.replace(aside, file)
    write_metrics(tmp_path, range(20, 80))
    reader.update()
    assert reader.last_step == 79 and len(reader.curves["loss"].steps) == 80
    os.truncate(file, len(b"".join(file.read_bytes().splitlines(keepends=True)[:10])))
    reader.update()
    assert reader.last_step == 9
    file.write_bytes(b'{"step": 5, "loss": 7}\n' * 400)
    reader.update()
    assert reader.points(["loss"], 5, -1)["loss"] == [(5, 7, 7, 7)]
    file.unlink()
    reader.update()
    assert reader.last_step == -1 and reader.curves == {}


def test_damaged_lines_and_numbers_are_left_out(tmp_path: Path) -> None:
    lines = [
        b'{"step": 0, "loss": 1.0, "nan": NaN, "inf": -Infinity, "big": 1e999, "text": "a", "none": null}',
        b"\xff\xfe\0", b"[1]", b"{" * 3000, b"[" * 100_000, b"", b"3", b'{"loss": 4}', b'{"step": true, "loss": 4}',
        b'{"step": "1", "loss": 4}', b'{"step": 1e3, "loss": 4}', b'{"step": 0, "loss": 4}', b'{"step": -5}',
        b'{"step": 99999999999999999999, "loss": 4}', b'{"step": 2, "loss": ' + b"1" * 5000 + b"}",
        b'{"step": 3, "loss": 2.0, "validation": {"16x32": {"0.5": 0.25}}, "deep": {"a":{"b":{"c":{"d":{"e":1}}}}}}',
        b'{"step": 4, "huge": 1' + b"0" * 400 + b"}",
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    reader.update()
    found = reader.points(None, 100, -1)
    assert found == {
        "loss": [(0, 1, 1, 1), (3, 2, 2, 2)],
        "validation/16x32/0.5": [(3, 0.25, 0.25, 0.25)],
    }
    assert reader.last_step == 4 and reader.damaged == 13
    json.dumps(found, allow_nan=False)


def test_a_line_that_never_ends_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_reader, "_CHUNK", 1000)
    long = b'{"step": 0, "x": "' + b"y" * 10_000 + b'"}\n'
    (tmp_path / "metrics.jsonl").write_bytes(long + b'{"step": 1, "loss": 3}\n' + long[:-1])
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    reader.update()
    assert reader.last_step == 1 and len(reader._rest) <= 1000
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\n{"step": 2, "loss": 3}\n')
    reader.update()
    assert reader.last_step == 2


def test_a_large_file_is_read_in_several_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_reader, "_CHUNK", 1000)
    monkeypatch.setattr(metrics_reader, "_MOST_AT_ONCE", 2000)
    write_metrics(tmp_path, range(100))
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    reader.update()
    assert not reader.complete and 0 < reader.last_step < 99
    for _ in range(20):
        reader.update()
    assert reader.complete and reader.last_step == 99


def test_fields_are_limited(tmp_path: Path) -> None:
    line = {"step": 0} | {f"field{number}": number for number in range(1000)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    reader.update()
    assert len(reader.curves) == metrics_reader.MOST_FIELDS


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "metrics.jsonl"
    if kind == "folder":
        file.mkdir()
    if kind == "link":
        write_metrics(tmp_path, range(3))
        os.rename(file, tmp_path / "other")
        file.symlink_to(tmp_path / "other")
    if kind == "pipe":
        os.mkfifo(file)
    reader = MetricsReader(file)
    reader.update()
    assert reader.last_step == -1 and reader.problem is not None and "cannot be read" in reader.problem
    assert read_last_lines(file) == LastLines()


def test_the_last_lines_say_how_a_run_goes(tmp_path: Path) -> None:
    write_metrics(tmp_path, range(1000))
    last = read_last_lines(tmp_path / "metrics.jsonl")
    assert last.step == 999
    assert last.loss == pytest.approx(np.mean(range(980, 1000)) / 10)
    assert last.seconds_per_step == pytest.approx(0.4) and last.clips_per_second == pytest.approx(20)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1000, "norms": "' + "x" * 100_000 + '"}\n{"step": 10')
    assert read_last_lines(tmp_path / "metrics.jsonl").step == 1000
