import base64
import html
import re
from pathlib import Path

import pytest

from stdit.data.build import build_assignment
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.preparation.page import Bar, count_texts, histogram, round_step
from stdit.data.preparation.report import report_clips
from stdit.errors import UserError
from tests.data.preparation.conftest import task

HOSTILE = "</figcaption><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""


@pytest.fixture
def source(clips: Path) -> Path:
    path = clips / "scored.csv"
    quoted = '"' + HOSTILE.replace('"', '""') + '"'
    header = "path,text,num_frames,fps,height,width,motion,camera"
    rows = [f"a.mp4,{quoted},16,8,48,64,2.5,pan", "b.mp4,a cat,8,8,48,64,0.5,<b>tilt</b>"]
    rows += ["c.mp4,a dog,24,8,48,64,,pan", "broken.mp4,,,,,,7,"]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def bars(page: str, title: str) -> dict[str, int]:
    """Read the numbers of a chart off the page."""
    chart = re.search(rf"<h3>{re.escape(title)}</h3><table>(.*?)</table>", page)
    assert chart, title
    return {
        html.unescape(label): int(count)
        for label, count in re.findall(r"<tr><td>(.*?)</td>.*?<td>(\d+)</td></tr>", chart[1])
    }


def test_the_page_has_the_numbers_and_is_self_contained(source: Path, tmp_path: Path) -> None:
    data = DataConfig(buckets=[BucketConfig(8, 8, 32, 32, batch_size=2), BucketConfig(16, 8, 48, 64)])
    (line,) = report_clips(task(source, tmp_path / "report.html"), data)
    assert "4 clips, 1 of 4 pictures could not be made" in line
    page = (tmp_path / "report.html").read_text()
    assert bars(page, "duration, seconds") == {"1": 1, "2": 1, "3": 1}
    assert bars(page, "frames of the file") == {"8": 1, "16": 1, "24": 1}
    assert bars(page, "frames per second") == {"8": 3}
    assert bars(page, "aspect ratio, width / height") == {"1.333": 3}
    assert bars(page, "size, width x height") == {"64x48": 3}
    assert bars(page, "caption length, characters") == {"0": 1, "5": 2, str(len(HOSTILE)): 1}
    assert bars(page, "motion") == {"0.5": 1, "2.5": 1, "7": 1}
    assert bars(page, "camera") == {"pan": 2, "<b>tilt</b>": 1, "": 1}
    assert "<td>without num_frames or fps (probe fills them in)</td><td>1</td>" in page

    assignment = build_assignment(DataConfig(str(source), buckets=data.buckets))
    assert assignment.table() in html.unescape(page)
    assert [len(members) for members in assignment.members] == [1, 2] and "caption missing" in page

    pictures = re.findall(r'src="([^"]*)"', page)
    assert len(pictures) >= 3 and all(url.startswith("data:image/jpeg;base64,") for url in pictures)
    assert base64.b64decode(pictures[0].partition(",")[2]).startswith(b"\xff\xd8\xff")
    for forbidden in ("<script", "<img src=x", "<b>", "http:", "https:", "url(", "@import", "<link"):
        assert forbidden not in page
    assert (
        "&lt;script&gt;" in page
        and "default-src &#x27;none&#x27;" not in page
        and "default-src 'none'" in page
    )


def test_errors_of_training_are_on_the_page(source: Path, tmp_path: Path) -> None:
    data = DataConfig(buckets=[BucketConfig(999, 8, 32, 32)])
    report_clips(task(source, tmp_path / "report.html"), data, thumbnails=0)
    page = (tmp_path / "report.html").read_text()
    assert "no clip is left to train on" in page and "the shortest bucket needs 999" in page
    assert "<figure" not in page
    with pytest.raises(UserError, match="must end in .html"):
        report_clips(task(source, tmp_path / "report.csv"))
    with pytest.raises(UserError, match="report.html exists"):
        report_clips(task(source, tmp_path / "report.html"))
    with pytest.raises(UserError, match="--thumbnails -1"):
        report_clips(task(source, tmp_path / "other.html"), thumbnails=-1)


def test_histograms_count_every_value_once() -> None:
    values = [k / 7 for k in range(1000)] + [1e6, 2e6]
    found = histogram(values)
    assert sum(bar.clips for bar in found) == len(values) and 10 <= len(found) <= 21
    assert found[0] == Bar("0 to 10", 70) and found[-1].label == "140 and more" and found[-1].clips == 22
    assert histogram([3.0]) == [Bar("3", 1)] and histogram([]) == []
    spread = histogram([1.0] * 5000 + [float(k) for k in range(30)])
    assert sum(bar.clips for bar in spread) == 5030
    assert histogram([-5.0, 5.0, 5.0]) == [Bar("-5", 1), Bar("5", 2)]
    assert [round_step(step) for step in (0.011, 0.3, 1, 4.2, 70)] == pytest.approx([0.02, 0.5, 1, 5, 100])
    many = count_texts([str(k) for k in range(30)] + ["7"])
    assert many[0] == Bar("7", 2) and many[-1] == Bar("10 others", 10)
