"""Contact sheets: what is written on them, in every script, and the sheet across training steps."""

import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFont
import pytest

from stdit.pipelines import lettering
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.config import PIPELINE_DEFAULTS
from stdit.pipelines.contact_sheet import read_contents, sheet_row
from stdit.pipelines.requests import Request
from stdit.pipelines.runner import SampledVideo
from stdit.pipelines.segments import Segments
from stdit.pipelines.video_io import write_mp4
from stdit.pipelines.writer import VideoWriter
from tests import warm

CLIP = np.full((4, 16, 16, 3), 90, np.uint8)
SETTINGS = PIPELINE_DEFAULTS | {"num_frames": 4, "height": 16, "width": 16}
CIRCLE = "\u5706"
"""A Chinese character, which neither DejaVu Sans nor the font of Pillow has."""
BDF_OF_CIRCLE = """STARTFONT 2.1
FONT -a-circle-medium-r-normal--14-140-72-72-c-140-iso10646-1
SIZE 14 72 72
FONTBOUNDINGBOX 14 14 0 0
STARTPROPERTIES 6
PIXEL_SIZE 14
DEFAULT_CHAR 0
CHARSET_REGISTRY "ISO10646"
CHARSET_ENCODING "1"
FONT_ASCENT 14
FONT_DESCENT 0
ENDPROPERTIES
CHARS 2
STARTCHAR box
ENCODING 0
SWIDTH 1000 0
DWIDTH 14 0
BBX 8 3 0 0
BITMAP
FF
81
FF
ENDCHAR
STARTCHAR circle
ENCODING 22278
SWIDTH 1000 0
DWIDTH 14 0
BBX 8 8 0 0
BITMAP
3C
42
81
81
81
81
42
3C
ENDCHAR
ENDFONT
"""


@pytest.fixture
def fonts(tmp_path, monkeypatch):
    """An empty folder as the only one with fonts."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    monkeypatch.setattr(lettering, "font_folders", lambda: [folder])
    caches = (lettering._font_files, lettering._font_of)
    for cached in caches:
        cached.cache_clear()
    yield folder
    for cached in caches:
        cached.cache_clear()


def drawn(text: str) -> PIL.Image.Image:
    return sheet_row(CLIP, text).convert("L")


@pytest.mark.parametrize(
    "text, letters",
    [
        (f"a {CIRCLE}{CIRCLE}, b", "a Yuan Yuan, b"),
        ("\u7ea2\u8272\u7684\u7403\uff0c\u4e0a\u5347\u3002", "Hong Se De Qiu, Shang Sheng."),
        (f"b {CIRCLE}b {CIRCLE}! {CIRCLE}\u3046", "b Yuan b Yuan! Yuan u"),
        ("\u043c\u044f\u0447", "myach"),
        ("\u0632\u0631\u0642\u0627\u0621", "zrq'"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "hindi"),
        ("ball \U0001f534", "ball :red_circle:"),
        ("t\u00eate \u201cx\u201d", "tete \u201cx\u201d"),
    ],
)
def test_a_script_without_a_font_is_written_in_latin_letters(fonts, text, letters):
    assert lettering.wrap_text(text, 1000) == [letters]
    assert drawn(text).tobytes() == drawn(letters).tobytes()


def test_a_font_of_the_system_is_used_for_what_it_has(fonts):
    (fonts / "circles.otf").write_text(BDF_OF_CIRCLE)
    (fonts / "damaged.ttf").write_text("no font")
    assert lettering.wrap_text(f"a {CIRCLE}", 1000) == [f"a {CIRCLE}"]
    mask = PIL.ImageFont.truetype(str(fonts / "circles.otf"), 14).getmask(CIRCLE)
    glyph = np.array(list(mask)).reshape(8, 14)[:, :8] > 0
    page = np.array(drawn(f"a {CIRCLE}")) < 128
    places = np.lib.stride_tricks.sliding_window_view(page[:22], (8, 8))
    assert (places == glyph).all((2, 3)).any(), "the glyph of the font"


def test_lines_are_no_wider_than_the_sheet():
    for text in (CIRCLE * 300, "word " * 100, "x" * 400, "a\nb"):
        lines = lettering.wrap_text(text, 300)
        assert all(0 < lettering.text_width(line) <= 300 for line in lines)
    assert lines == ["a", "b"]
    assert sheet_row(CLIP, "a\nb\nc").height == sheet_row(CLIP, "a").height + 2 * lettering.LINE_HEIGHT


def test_a_sheet_shows_the_prompts_of_all_segments(tmp_path):
    request = Request(
        "a wave rises", 3, segment_prompts=("it breaks", "a wet beach"), segments=Segments(3, 1)
    )
    writer = VideoWriter(tmp_path, ["png"], SETTINGS)
    writer.write([SampledVideo(request, CLIP)])
    *_, sheet = writer.finish()
    (contents,) = read_contents(sheet)
    assert contents["segment_prompts"] == ["it breaks", "a wet beach"]
    expected = sheet_row(CLIP, "[1] a wave rises  (seed 3)\n[2] it breaks\n[3] a wet beach")
    with PIL.Image.open(sheet) as image:
        assert image.tobytes() == expected.tobytes()


def test_a_sheet_names_the_conditioning_frames(tmp_path):
    frames = (FrameCondition(str(tmp_path / "end.png"), -1), FrameCondition(str(tmp_path / "clip.mp4"), 0, 2))
    write_mp4(tmp_path / "clip.mp4", CLIP, 8)
    writer = VideoWriter(tmp_path / "videos", ["png"], SETTINGS)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "end.png")
    writer.write([SampledVideo(Request("a wave rises", 3, conditions=frames), CLIP)])
    *_, sheet = writer.finish()
    expected = sheet_row(CLIP, "a wave rises  (seed 3, end.png@-1, clip.mp4@0:2)")
    with PIL.Image.open(sheet) as image:
        assert image.tobytes() == expected.tobytes()


def noise_video(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (8, size, size, 3), dtype=np.uint8)


def write_sheet_of(folder: Path, video: np.ndarray) -> Path:
    writer = VideoWriter(folder, ["png"], SETTINGS)
    writer.write([SampledVideo(Request("a red ball", 0), video)])
    *_, sheet = writer.finish()
    return sheet


def test_sheets_side_by_side_show_small_videos_equally_large_and_sharp(tmp_path):
    small, large = noise_video(32), noise_video(64)
    for name, video in (("one", small), ("two", large)):
        write_sheet_of(tmp_path / name, video)
    output = tmp_path / "new" / "both.png"
    for _ in range(2):  # an older sheet is replaced
        result = contact_sheet(tmp_path / "one", tmp_path / "two", "--output", output)
        assert (result.returncode, result.stdout) == (0, f"{output}\n"), result.stderr
    with PIL.Image.open(output) as image:
        picture = np.asarray(image)
    sheet = 8 * 130 + 2
    assert picture.shape[1] == 2 * sheet + 24
    assert (picture[:, sheet : sheet + 24] == 255).all(), "a gap"
    for video, factor, left in ((small, 4, 0), (large, 2, sheet + 24)):
        for column, frame in enumerate(video):
            squares = frame.repeat(factor, axis=0).repeat(factor, axis=1)
            shown = picture[:, left + 130 * column :][:, :128]
            tops = [y for y in range(len(shown)) if np.array_equal(shown[y : y + 128], squares)]
            assert len(tops) == 1 and tops[0] > 30, "below the path and the caption"
    both = read_contents(output)
    assert [Path(one["sheet"]).name for one in both] == ["one", "two"]
    assert both[1]["contents"][0]["prompt"] == "a red ball"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["one", "none", "--output", "both.png"], "none is no contact sheet"),
        (["one", "empty", "--output", "both.png"], "empty/sheet.png is no contact sheet"),
        (["one", "one/sheet.png"], "2 paths: their sheets are put side by side: add --output"),
        (["one", "one", "--output", "both.png", "--columns", "3"], "leave out --columns and --frames"),
        (["one", "one", "--output", "mine.png"], "mine.png exists, and is no contact sheet"),
        (["one", "one", "--output", "mine.png/both.png"], "cannot be written"),
        (["one", "one", "--output", "one/sheet.png"], "one/sheet.png is one of the sheets"),
        (["one", "half.png", "--output", "both.png"], "half.png is damaged"),
    ],
)
def test_sheets_that_cannot_be_put_side_by_side(tmp_path, flags, message):
    write_sheet_of(tmp_path / "one", CLIP)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.png").write_text("mine")
    whole = (tmp_path / "one" / "sheet.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    script = str(warm.ROOT / "scripts" / "contact_sheet.py")
    result = warm.run([script, *flags], {**os.environ, "PYTHONPATH": str(warm.ROOT)}, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"one", "empty", "mine.png", "half.png"}
    assert (tmp_path / "mine.png").read_text() == "mine"
    assert (tmp_path / "one" / "sheet.png").read_bytes() == whole


def write_validation(run: Path, step: int, prompts: dict[str, int]) -> None:
    folder = run / "samples" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for index, (prompt, level) in enumerate(prompts.items()):
        frames = np.full((5, 16, 16, 3), level, np.uint8)
        write_mp4(
            folder / f"{index:02d}.mp4", frames, 8, {"prompt": prompt, "seed": 0, "checkpoint_step": step}
        )


def contact_sheet(*arguments):
    return warm.run([str(warm.ROOT / "scripts" / "contact_sheet.py"), *map(str, arguments)])


def test_a_sheet_across_training_steps(tmp_path):
    run = tmp_path / "run"
    write_validation(run, 100, {"a red ball": 40, "an older prompt": 200})
    for step in (200, 300, 1000):
        write_validation(run, step, {"a red ball": 40 + step // 10, "a square": 200})
    result = contact_sheet(run)
    assert result.returncode == 0, result.stderr
    sheet = run / "samples" / "steps.png"
    assert result.stdout == f"{sheet}\n"
    contents = read_contents(sheet)
    assert [one["prompt"] for one in contents] == ["a red ball", "a square", "an older prompt"]
    assert contents[0]["steps"] == [100, 200, 300, 1000]
    with PIL.Image.open(sheet) as image:
        assert image.width == 4 * 130
        row = image.height // 3
        levels = [[image.getpixel((130 * c + 64, row * r + 80))[0] for c in range(4)] for r in range(3)]
    expected = [[40, 60, 70, 140], [255, 200, 200, 200], [200, 255, 255, 255]]
    assert np.abs(np.array(levels) - expected).max() <= 4
    assert sheet_of(run, "--columns", 2, "--frames", 3).size[0] == 2 * (3 * 128 + 2)
    assert contact_sheet(run).returncode == 0, "an older sheet is replaced"


def sheet_of(run: Path, *flags: object) -> PIL.Image.Image:
    result = contact_sheet(run, "--output", run / "other" / "s.png", *flags)
    assert result.returncode == 0, result.stderr
    with PIL.Image.open(run / "other" / "s.png") as image:
        return image.copy()


@pytest.mark.parametrize(
    "flags, message", [([], "it has no samples/step-"), (["--columns", 0], "--columns 0: must be")]
)
def test_a_run_without_validation_videos(tmp_path, flags, message):
    result = contact_sheet(tmp_path, *flags)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.png").write_text(json.dumps("mine"))
    result = contact_sheet(tmp_path, "--output", tmp_path / "mine.png")
    assert result.returncode == 2 and "mine.png exists, and is no contact sheet" in result.stderr
