"""Read manifests: return the clips, and the rows that are skipped with the reason.

Rows are read by column, in chunks. A row with complete metadata needs no access to its file, since a million of them
would take minutes; the file is checked when it is opened.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from stdit.data.decoding.colors import SDR
from stdit.data.decoding.decode import DecodeError, probe_kind
from stdit.data.decoding.interlacing import find_field_order
from stdit.data.decoding.media import Media, MediaError, is_url, locate
from stdit.data.manifest.archives import archive_rows, find_shards, is_archive, shard_root
from stdit.data.manifest.clips import Clip, Clips
from stdit.data.manifest.config import SourceConfig
from stdit.data.manifest.fields import FIELD_ORDER_WORDS, LIMITS, clip_span, is_allowed, read_number
from stdit.data.manifest.index import load_scan, manifest_key, save_scan
from stdit.data.manifest.rows import COLOR, FIELD_ORDER, METADATA, SPAN_COLUMNS, Rows, near_misses, read_rows
from stdit.data.manifest.scan import KNOWN_COLUMNS, add_scores, scan_rows
from stdit.errors import UserError

__all__ = [
    "Clip",
    "Clips",
    "Skipped",
    "read_manifest",
    "read_sources",
    "read_texts",
    "clip_warnings",
    "summarise",
]

MAX_EXAMPLES = 2
"""Examples that a summary names for each reason."""


class Skipped(NamedTuple):
    """A skipped row or file. `reason` is "kind" or "kind: detail"; reports count by kind."""

    path: str
    reason: str


class RowError(ValueError):
    """An unusable row; the message is "kind" or "kind: detail"."""


class ReasonCount(NamedTuple):
    """How many cases have one kind of reason, and examples."""

    total: int
    examples: list[Skipped]


def read_sources(
    sources: Sequence[SourceConfig], caption_scores: Sequence[str] = (), index: Path | None = None
) -> tuple[Clips, list[Skipped]]:
    """Return the clips of all sources, one source after the other, and the skipped rows. Raises UserError.

    Args:
        index: folder in which the rows of large manifests are cached.
    """
    parts, skipped = [], []
    for number, source in enumerate(sources):
        clips, excluded = read_manifest(
            source.manifest,
            source.root,
            caption_scores,
            source.weight,
            index and index / f"source-{number}.safetensors",
        )
        parts.append(clips)
        skipped += excluded
    return Clips.concatenate(parts), skipped


def read_manifest(
    manifest: Path | str,
    root: Path | str | None = None,
    caption_scores: Sequence[str] = (),
    weight: float = 1.0,
    index: Path | None = None,
) -> tuple[Clips, list[Skipped]]:
    """Return the clips in the order of the manifest, and the skipped rows.

    Args:
        manifest: a .csv, .jsonl or .parquet whose rows have path,text and any of num_frames,fps,height,width (of the
            whole file; probed if missing), start,end (seconds; the clip is that part of the file), member,offset,size
            (of a file in the archive `path`, so that its shard need not be scanned) and others (kept in
            `Clip.extra`); or a folder of videos and images, each with its caption in a .txt of the same name; or tar
            shards, each clip with a .txt or .json of the same name.
        root: folder or URL; paths are relative to it, and a file outside it is never opened; default: the folder of
            the manifest.
        caption_scores: columns whose values follow the captions (`stdit.data.manifest.caption_scores`).
        weight: how often each clip is drawn per epoch.
        index: file in which the rows are cached, keyed by the content of the manifest (`index.py`).

    Raises UserError if the manifest itself is unusable or no clip is left.
    """
    chunks, data_root = open_rows(str(manifest), None if root is None else str(root))
    worth_it = index and not is_archive(str(manifest))  # hashing a shard takes longer than scanning it
    key = manifest_key(str(manifest), data_root, caption_scores, weight) if worth_it else None
    scan = load_scan(index, key) if index and key else None
    if scan is None:
        scan = scan_rows(chunks, data_root, caption_scores, weight)
        if index and key:
            save_scan(index, key, scan)
    clips, places, unread = scan
    if not scan.total:
        raise UserError(f"manifest {manifest} lists no clips: {_what_to_add(str(manifest))}")

    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda row: _read_row(row[0], row[1], data_root, weight), unread.values())
        bar = tqdm(results, total=len(unread), desc="reading clips", unit="clip", delay=3, disable=None)
        outcomes = dict(zip(unread, bar, strict=True))
    skipped = [outcome for outcome in outcomes.values() if isinstance(outcome, Skipped)]
    read = {place: outcome for place, outcome in outcomes.items() if isinstance(outcome, Clip)}
    if read:
        places = np.concatenate([places, np.array(list(read))])
        clips = Clips.concatenate([clips, Clips.of(read.values())]).take(places.argsort())
    clips = replace(clips, row=np.sort(places) + 1)
    if not len(clips):
        lines = [f"manifest {manifest}: no clip can be used", *summarise(skipped)]
        if any(reason.startswith(("file missing", "outside the data root")) for _, reason in skipped):
            lines.append(
                f"paths are relative to {data_root}: if the files lie elsewhere, set --data.root FOLDER"
            )
        raise UserError("\n".join(lines))
    return clips, skipped


def read_texts(manifest: Path | str, caption_scores: Sequence[str] = ()) -> list[str]:
    """Return the captions of a manifest without opening its videos. Raises UserError."""
    texts: list[str] = []
    for rows in open_rows(str(manifest), None)[0]:
        add_scores(rows, caption_scores)
        texts += filter(None, rows.columns["text"])
    return texts


def clip_warnings(clips: Clips) -> list[str]:
    """Return warnings about usable clips: repeated captions, clips listed twice, misspelt columns."""
    lines = []
    if repeated := len(clips) - len(np.unique(clips.texts.digests())):
        lines.append(f"{repeated} of {len(clips)} clips repeat the caption of an earlier one")
    parts = clips.files ^ (np.ascontiguousarray(clips.start) + 0.0).view(np.uint64)
    if len(first := np.unique(parts, return_index=True)[1]) < len(parts):
        again = np.setdiff1d(np.arange(len(parts)), first).tolist()
        shown = [str(clips[place].media) for place in again[:MAX_EXAMPLES]]
        clips_are = "clip is" if len(again) == 1 else "clips are"
        dots = ", ..." * (len(again) > MAX_EXAMPLES)
        lines.append(f"{len(again)} {clips_are} listed again: {', '.join(shown)}{dots}")
    for name, meant in near_misses(clips.extra):
        lines.append(f"column {name!r} is not read: is it meant to be {meant!r}?")
    return lines


def summarise(skipped: Iterable[Skipped]) -> list[str]:
    """Return one line per kind of reason, most frequent first, with a count and the first examples."""
    kinds: dict[str, ReasonCount] = {}
    for case in skipped:
        name = case.reason.partition(": ")[0]
        total, examples = kinds.get(name, ReasonCount(0, []))
        kinds[name] = ReasonCount(total + 1, examples if len(examples) == MAX_EXAMPLES else [*examples, case])
    return summary_lines(kinds)


def summary_lines(kinds: dict[str, ReasonCount]) -> list[str]:
    """Return the lines of `summarise` for cases that are already counted."""
    lines = []
    for kind, (count, examples) in sorted(kinds.items(), key=lambda item: -item[1].total):
        details = [(path, reason.partition(": ")[2]) for path, reason in examples]
        cases = ", ".join(f"{path} ({detail})" if detail else path for path, detail in details)
        lines.append(f"  {count} x {kind}: {cases}{', ...' if count > len(examples) else ''}")
    return lines


def open_rows(manifest: str, root: str | None) -> tuple[Iterator[Rows], str]:
    """Return the rows of a manifest of any kind, and its data root. Raises UserError."""
    if root is not None and not is_url(root):
        if not os.path.isdir(root):
            raise UserError(
                f"data root {root} is not a folder: correct the path (--root, or data.root in training)"
            )
        root = os.path.realpath(root)
    if is_archive(manifest):
        root = root or shard_root(manifest)
        return archive_rows(find_shards(manifest), root), root
    if is_url(manifest):
        raise UserError(
            f"manifest {manifest}: only tar shards are read from a URL: copy the manifest to a disk, and give "
            "the folder of its videos as data.root"
        )
    path = Path(manifest)
    if not path.exists():
        raise UserError(
            f"manifest {manifest} does not exist: correct the path (a setting of data or validation in training)"
        )
    root = root or os.path.realpath(path if path.is_dir() else path.parent)
    return read_rows(path, Path(root)), root


def _what_to_add(manifest: str) -> str:
    if os.path.isdir(manifest) and any(Path(manifest).glob("*.tar")):
        return f"to train on its tar shards, name them: {manifest.rstrip('/')}/*.tar"
    return "add rows below the header, or videos to the folder"


def row_name(fields: Mapping[str, str]) -> str:
    """Return the name of a row's file for messages."""
    return "/".join(filter(None, (fields["path"], fields.get("member")))) or "(no path)"


def read_fields(fields: Mapping[str, str], root: str) -> tuple[Media, dict[str, float]]:
    """Return the location of a row's file, without accessing it, and the numbers that the row gives.

    Raises RowError, or MediaError if the file lies outside the root.
    """
    member, given = fields.get("member") or "", {}
    for column, (least, _, whole) in LIMITS.items():
        if text := fields.get(column):
            number = read_number(text)
            if not is_allowed(column, number):
                above = "of 0 or more" if least == 0 else "above 0"
                raise RowError(f"{column} is not a {'whole ' if whole else ''}number {above}: {text!r}")
            given[column] = number
    if (order := fields.get(FIELD_ORDER) or "") not in FIELD_ORDER_WORDS:
        raise RowError(f"field_order is not progressive, tff or bff: {order!r}")
    if bool(member) != ("offset" in given) or bool(member) != ("size" in given):
        raise RowError("member, offset and size: give all of them or none")
    size = int(given["size"]) if member else None
    return Media(locate(fields["path"], root), member, int(given.get("offset", 0)), size, root), given


def _read_row(fields: dict[str, str], refused: str, root: str, weight: float) -> Clip | Skipped:
    """Return the clip of a row, or the reason why it is skipped."""
    name, kinds = row_name(fields), dict[str, str]()
    if refused:
        return Skipped(name, refused)
    if not fields["path"]:
        return Skipped(name, "path missing")
    if not fields["text"]:
        return Skipped(name, "caption missing")
    try:
        media, given = read_fields(fields, root)
        if not all(column in given for column in METADATA):
            if not media.is_remote:
                media.local_path()
            info, color, suspicious = probe_kind(media)
            given = info._asdict() | given
            kinds = {COLOR: color} if color != SDR else {}
            if suspicious and not fields.get(FIELD_ORDER):
                kinds[FIELD_ORDER] = find_field_order(media)
    except (RowError, MediaError) as error:
        return Skipped(name, str(error))
    except DecodeError as error:
        return Skipped(name, f"cannot be read: {error.reason}")
    window = (given.get(column, math.nan) for column in SPAN_COLUMNS)
    start, end, num_frames = map(float, clip_span(given["num_frames"], given["fps"], *window))
    if num_frames == 0:
        seconds = given["num_frames"] / given["fps"]
        if start >= seconds:
            return Skipped(name, f"start is after the end of the file: {start:g} s of {seconds:g} s")
        return Skipped(name, f"end is not after start: {given['end']:g} s and {start:g} s")
    return Clip(
        media=media,
        text=fields["text"],
        num_frames=int(num_frames),
        fps=given["fps"],
        height=int(given["height"]),
        width=int(given["width"]),
        start=start,
        end=None if math.isnan(end) else end,
        weight=weight,
        extra={column: value for column, value in fields.items() if column not in KNOWN_COLUMNS} | kinds,
    )
