"""From a manifest to clips: what is there, what it says about itself, and what has to be left out and why."""

import csv
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from stdit.data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeError, probe
from stdit.data.media import Media, MediaError, inside
from stdit.errors import UserError

REQUIRED = ("path", "text")
METADATA = ("num_frames", "fps", "height", "width")


@dataclass(frozen=True, slots=True)
class Clip:
    """One video (or image, a video of one frame), or a part of it, with its caption."""

    media: Media
    text: str
    num_frames: int
    """Of the part."""
    fps: float
    """Mean frames per second: num_frames / fps is the duration in seconds."""
    height: int
    """Pixels as shown, after rotation."""
    width: int
    start: float = 0.0
    """Seconds after the first frame of the file at which the part begins."""
    extra: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Further columns of the manifest."""

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps


class Skipped(NamedTuple):
    """Something left out. `reason` is "kind" or "kind: detail"; reports count by kind."""

    path: str
    reason: str


class _Row(NamedTuple):
    path: str
    text: str
    fields: dict[str, str]


def read_manifest(manifest: Path, root: Path | None = None) -> tuple[list[Clip], list[Skipped]]:
    """Clips in the order of the manifest, and what was left out.

    Args:
        manifest: a CSV in UTF-8 with the columns path,text and any of num_frames,fps,height,width (what is
        not
            given is probed from the file) and others (kept in `Clip.extra`); or a folder that holds videos
            and images, each with its caption in a .txt of the same name beside it.
        root: paths are relative to it, and a file outside it is never opened; default: the manifest's folder.

    Raises UserError when the manifest itself is unusable or nothing is left.
    """
    manifest = Path(manifest)
    if not manifest.exists():
        raise UserError(f"manifest {manifest} does not exist: check data.manifest")
    if root is None:
        root = manifest if manifest.is_dir() else manifest.parent
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder: check data.root")
    rows = list(_folder_rows(manifest, root) if manifest.is_dir() else _csv_rows(manifest))
    if not rows:
        raise UserError(
            f"manifest {manifest} lists no clips: add rows below the header, or videos to the folder"
        )

    resolved_root = root.resolve()
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda row: _read_row(row, resolved_root), rows)
        bar = tqdm(results, total=len(rows), desc="reading clips", unit="clip", delay=3, disable=None)
        outcomes = list(bar)
    clips = [outcome for outcome in outcomes if isinstance(outcome, Clip)]
    skipped = [outcome for outcome in outcomes if isinstance(outcome, Skipped)]
    if not clips:
        raise UserError("\n".join([f"manifest {manifest}: no clip can be used", *summarise(skipped)]))
    return clips, skipped


def read_texts(manifest: Path) -> list[str]:
    """The captions of a manifest, whose files are not opened. Raises UserError."""
    rows = _folder_rows(manifest, manifest) if manifest.is_dir() else _csv_rows(manifest)
    return [row.text for row in rows if row.text]


def summarise(skipped: Iterable[Skipped], examples: int = 2) -> list[str]:
    """One line for each kind of reason, most frequent first, with a count and the first examples."""
    kinds: dict[str, list[str]] = {}
    for path, reason in skipped:
        kind, _, detail = reason.partition(": ")
        kinds.setdefault(kind, []).append(f"{path} ({detail})" if detail else path)
    lines = []
    for kind, cases in sorted(kinds.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(cases) > examples else ""
        lines.append(f"  {len(cases)} x {kind}: {', '.join(cases[:examples])}{more}")
    return lines


def _csv_rows(manifest: Path) -> Iterator[_Row]:
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames is None:
                raise UserError(
                    f"manifest {manifest} is empty: its first line must name the columns path,text"
                )
            reader.fieldnames = [name.strip() for name in reader.fieldnames]
            for column in REQUIRED:
                if column not in reader.fieldnames:
                    raise UserError(
                        f"manifest {manifest} has no column {column!r}; it has "
                        f"{', '.join(reader.fieldnames)}: its first line must name at least path,text"
                    )
            for row in reader:
                overflow = row.pop(None, None)  # type: ignore[call-overload]
                fields = {name: (value or "").strip() for name, value in row.items()}
                if overflow:
                    fields["overflow"] = f"line {reader.line_num} has more fields than the header"
                yield _Row(fields.pop("path"), fields.pop("text"), fields)
    except UnicodeDecodeError as error:
        raise UserError(f"manifest {manifest} is not UTF-8 ({error}): save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"manifest {manifest}, line {reader.line_num}: {error}: check its quotes") from error
    except OSError as error:
        raise UserError(f"manifest {manifest} cannot be read: {error.strerror}") from error


def _folder_rows(folder: Path, root: Path) -> Iterator[_Row]:
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    for path in sorted(p for p in folder.absolute().rglob("*") if p.suffix.lower() in suffixes):
        caption = path.with_suffix(".txt")
        inside = caption.resolve().is_relative_to(root.resolve())
        try:
            text = caption.read_text(encoding="utf-8-sig").strip() if inside and caption.is_file() else ""
        except (OSError, UnicodeDecodeError):
            text = ""
        yield _Row(str(path), text, {})


def _read_row(row: _Row, root: Path) -> Clip | Skipped:
    """The clip of one row, or why it has to be left out. `root` is resolved."""
    if "overflow" in row.fields:
        return Skipped(row.path, f"malformed row: {row.fields['overflow']}; quote captions that hold commas")
    if not row.path:
        return Skipped("(no path)", "path missing")
    if not row.text:
        return Skipped(row.path, "caption missing")
    try:
        media = _media(row.path, str(root))
        media.local_path()
    except MediaError as error:
        return Skipped(row.path, str(error))

    given: dict[str, float] = {}
    for name in METADATA:
        if value := row.fields.get(name):
            number = _number(value)
            if number is None or (name != "fps" and number != int(number)):
                return Skipped(row.path, f"{name} is not a number above 0: {value!r}")
            given[name] = number
    if len(given) < len(METADATA):
        try:
            given = probe(media)._asdict() | given
        except DecodeError as error:
            return Skipped(row.path, f"cannot be read: {error.reason}")
    return Clip(
        media=media,
        text=row.text,
        num_frames=int(given["num_frames"]),
        fps=given["fps"],
        height=int(given["height"]),
        width=int(given["width"]),
        extra={name: value for name, value in row.fields.items() if name not in METADATA},
    )


def _media(path: str, root: str) -> Media:
    """The file of a row, at which nothing is looked unless its name lies outside the root.

    Raises MediaError.
    """
    location = os.path.normpath(os.path.join(root, path))
    if not inside(location, root):  # by its name; a link on the way may lead to the root all the same
        location = Media(location, root=root).local_path()
    return Media(location, root=root)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number > 0 and math.isfinite(number) else None
