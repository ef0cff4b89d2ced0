"""Text in any script on a picture: by a font of the system that has its characters, otherwise in Latin letters.

A character that no font has is transliterated, so that nothing is drawn as an empty box.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import PIL.features
import PIL.ImageDraw
import PIL.ImageFont
from anyascii import anyascii

LINE_HEIGHT = 20
"""Pixels from one line to the next."""
_SIZE = 14
_ASCENT = 15
"""Pixels from the top of a line to its baseline."""
_PREFERRED = "DejaVuSans.ttf"
"""Has Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew and Arabic letters; common on Linux."""
_STYLED = re.compile(
    r"bold|italic|oblique|light|thin|black|condensed|mono|serif(?!-regular)|lastresort", re.I
)
_FONTS = (".ttf", ".otf", ".ttc")
_NO_CHARACTER = "\U0010ffff"
_NO_SPACES = "\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef"
"""Chinese, Japanese and Korean characters, between which a line may be broken."""
_PIECES = re.compile(rf"[{_NO_SPACES}]|\s+|[^\s{_NO_SPACES}]+")


def wrap_text(text: str, width: float) -> list[str]:
    """Return the lines of a text, none wider than ``width`` pixels; a character without a font is transliterated."""
    lines = []
    for paragraph in _displayable(text).split("\n"):
        line = ""
        for piece in _pieces(paragraph, width):
            if line and text_width((line + piece).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += piece if line or not piece.isspace() else ""
        lines.append(line.rstrip())
    return lines


def text_width(text: str) -> float:
    """Return the width of a line in pixels."""
    return sum(font.getlength(run) for font, run in _runs(text))


def draw_lines(draw: PIL.ImageDraw.ImageDraw, left: float, top: float, lines: list[str]) -> None:
    """Draw lines made by `wrap_text` in black, `LINE_HEIGHT` below each other."""
    for number, line in enumerate(lines):
        x = left
        for font, run in _runs(line):
            draw.text((x, top + number * LINE_HEIGHT + _ASCENT), run, fill="black", font=font, anchor="ls")
            x += font.getlength(run)


def font_folders() -> list[Path]:
    """Return the folders in which systems keep fonts."""
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    folders = [
        *(f"{folder}/fonts" for folder in (own, *shared.split(":"))),
        *("~/.fonts", "~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts"),
        *(f"{os.environ.get('WINDIR', 'C:/Windows')}/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"),
    ]
    return [path for folder in dict.fromkeys(folders) if (path := Path(folder).expanduser()).is_dir()]


def _pieces(text: str, width: float) -> Iterator[str]:
    """Yield words, spaces, and single characters of scripts without spaces and of words wider than a line."""
    for piece in _PIECES.findall(text):
        yield from piece if text_width(piece) > width else [piece]


def _characters(text: str) -> list[str]:
    """Return the characters of a text, each with its marks (accents, vowel signs, joiners)."""
    found: list[str] = []
    for one in text:
        if found and unicodedata.category(one) in ("Mn", "Mc", "Me", "Cf"):
            found[-1] += one
        else:
            found.append(one)
    return found


def _displayable(text: str) -> str:
    """Return a text, in Latin letters where it cannot be drawn; a Chinese character is then a word of its own."""
    drawn, after_word = "", False
    for one in _characters(text):
        own = one.isspace() or _font_of(one) is not None
        letters = one if own else anyascii(one)
        is_word = not own and "CJK UNIFIED" in unicodedata.name(one[0], "")
        between = (is_word or after_word) and drawn[-1:].isalnum() and letters[:1].isalnum()
        is_mark = not own and unicodedata.category(one[0])[0] == "P"  # as wide as a letter and a space
        drawn += (" " if between else "") + letters + (" " if is_mark else "")
        after_word = is_word
    return drawn


def _runs(line: str) -> Iterator[tuple[Any, str]]:
    """Yield the parts of a line, each with its font; a space has that of what is before it."""
    fonts: list[Any] = []
    characters = _characters(line)
    for character in characters:
        after = fonts[-1] if fonts and character.isspace() else None
        fonts.append(after or _font_of(character) or next(_fonts()))
    for font, part in groupby(zip(fonts, characters, strict=True), lambda pair: pair[0]):
        yield font, "".join(character for _, character in part)


@cache
def _font_of(character: str) -> Any:
    """Return the first font that has a character and its marks; None if there is none, or none that can be set."""
    if _needs_shaping(character) and not PIL.features.check("raqm"):
        return None
    visible = [one for one in character if unicodedata.category(one) != "Cf"]
    return next((font for font in _fonts() if visible and all(_has(font, one) for one in visible)), None)


def _needs_shaping(character: str) -> bool:
    """Return whether letters of this script change their order or form, as in Arabic and Devanagari."""
    right_to_left = unicodedata.bidirectional(character[0]) in ("R", "AL")
    return right_to_left or "\u0900" <= character[0] <= "\u0dff" or "\u1000" <= character[0] <= "\u109f"


def _has(font: Any, character: str) -> bool:
    """Return whether a font draws a character as something of its own, neither blank nor as its box."""
    mask, lacking = (_unshaped(font).getmask(one) for one in (character, _NO_CHARACTER))
    drawn = bytes(mask)
    return any(drawn) and (mask.size, drawn) != (lacking.size, bytes(lacking))


@cache
def _unshaped(font: Any) -> Any:
    """Return a font that draws a mark alone, not on a dotted circle."""
    return font.font_variant(layout_engine=PIL.ImageFont.Layout.BASIC)


def _fonts() -> Iterator[Any]:
    """Yield the fonts of the system, opened when a character needs them, and Pillow's own, of Latin letters."""
    files = _font_files()
    preferred = [file for file in files if file.name == _PREFERRED][:1]
    for font in map(_open, preferred):
        if font is not None:
            yield font
    yield _own_font()
    for font in map(_open, files):
        if font is not None:
            yield font


@cache
def _own_font() -> Any:
    return PIL.ImageFont.load_default(_SIZE)


@cache
def _font_files() -> list[Path]:
    """Return the files of fonts: plain ones before bold and narrow ones, those without serifs first."""
    files = {file for folder in font_folders() for file in folder.rglob("*") if file.suffix.lower() in _FONTS}
    return sorted(
        files, key=lambda file: (bool(_STYLED.search(file.stem)), "sans" not in file.stem.lower(), str(file))
    )


@cache
def _open(file: Path) -> Any:
    """Open a font; None if it is damaged, or has only pictures of another size, as fonts of emoji do."""
    try:
        return PIL.ImageFont.truetype(str(file), _SIZE)
    except OSError:
        return None
