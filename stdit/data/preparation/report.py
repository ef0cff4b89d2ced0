"""`report`: an HTML page of a manifest: distributions, thumbnails, and what each bucket of a training would keep."""

import base64
import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from stdit.cli import as_started
from stdit.data.build import build_assignment
from stdit.data.config import DataConfig
from stdit.data.manifest.media_kinds import media_lines
from stdit.data.manifest.reading import row_name
from stdit.data.manifest.rows import BYTE_RANGE_COLUMNS, MEDIA_COLUMNS, METADATA, SPAN_COLUMNS
from stdit.data.preparation import page
from stdit.data.preparation.expressions import as_number, column_types
from stdit.data.preparation.flow import ClipRecord, Task, captionless, process_clips
from stdit.data.preparation.scoring import ScoringWindow, middle_frames
from stdit.data.preparation.table import Table, TableRow, staged_output
from stdit.errors import UserError

THUMBNAIL_SIDE = 200
"""Pixels of the longer side."""
EXTREMES = 4
"""Clips shown of the lowest and of the highest values of a score."""
LONGEST_CAPTION = 300
STANDARD_COLUMNS = {
    *("path", "text", "member", "reason", "readable_seconds", "damage"),
    *(*METADATA, *SPAN_COLUMNS, *BYTE_RANGE_COLUMNS),
}


def report_clips(
    task: Task, data: DataConfig | None = None, seed: int = 0, thumbnails: int = 48
) -> list[str]:
    """Write the page. Returns a summary; raises UserError.

    Args:
        data: settings of a training, to show how this source fills its buckets.
        seed: of that training.
        thumbnails: clips to show, evenly spaced over the manifest; 0 shows no pictures at all.
    """
    if thumbnails < 0:
        raise UserError(f"--thumbnails {thumbnails}: must be 0 or more")
    source = task.open((".html",))
    types = column_types(source.rows, source.columns)
    scores = [name for name in source.columns if name not in STANDARD_COLUMNS and types[name] == "number"]
    groups = {"Clips": _evenly_spaced(len(source.rows), thumbnails)}
    if thumbnails:
        groups |= {f"{end} {name}": places for name in scores for end, places in _extremes(source.rows, name)}
    chosen = sorted({place for places in groups.values() for place in places})
    shown_rows = source.with_columns([source.rows[place] for place in chosen], ())
    pictures = process_clips(task, shown_rows, _thumbnail, (), "report")
    shown = dict(zip(chosen, pictures, strict=True))

    def figure(place: int) -> str:
        lines = _caption_lines(source.rows[place], scores)
        return page.figure(shown[place].value, [*lines, *filter(None, [shown[place].reason])])

    sections = [
        _overview(source),
        "<h2>Distributions</h2>",
        f'<div class="charts">{"".join(_charts(source, types))}</div>',
        *([] if data is None else ["<h2>Buckets</h2>", _buckets(task, source, data, seed)]),
    ]
    for title, places in groups.items():
        if places:
            figures = "".join(map(figure, places))
            sections += [f"<h2>{page.escaped(title)}</h2>", f'<div class="clips">{figures}</div>']
    with staged_output(task.output) as staging:
        staging.write_text(page.page(f"{task.source}: {len(source.rows)} clips", sections), encoding="utf-8")
    task.journal.remove()
    failed = sum(outcome.reason is not None for outcome in pictures)
    note = f", {failed} of {len(pictures)} pictures could not be made" if failed else ""
    return [f"{task.output}: {len(source.rows)} clips{note}{captionless(source.rows)}"]


def _overview(source: Table) -> str:
    """Return a table of totals."""
    seconds = [value for row in source.rows if (value := _duration(row)) is not None]
    captions = sum(bool(row.get("text")) for row in source.rows)
    rows = [
        ("clips", len(source.rows)),
        ("files", len({row_name(row) for row in source.rows})),
        ("hours", f"{sum(seconds) / 3600:.3f}"),
        ("with a caption", captions),
    ]
    if len(seconds) < len(source.rows):
        rows.append(("without num_frames or fps (probe fills them in)", len(source.rows) - len(seconds)))
    kinds = {name: [str(row.get(name) or "") for row in source.rows] for name in MEDIA_COLUMNS}
    lines = "".join(f"<p>{page.escaped(line)}</p>" for line in media_lines(kinds))
    return page.table(("what", "how much"), rows) + lines


def _charts(source: Table, types: Mapping[str, str]) -> list[str]:
    """Return charts of the clips' properties, and of all other columns of numbers or of few different texts."""
    rows = source.rows
    measures: dict[str, list[float | None]] = {
        "duration, seconds": [_duration(row) for row in rows],
        "frames of the file": [as_number(row.get("num_frames")) for row in rows],
        "frames per second": [as_number(row.get("fps")) for row in rows],
        "aspect ratio, width / height": [_aspect_ratio(row) for row in rows],
        "caption length, characters": [float(len(row.get("text") or "")) for row in rows],
    }
    further = [name for name in source.columns if name not in STANDARD_COLUMNS]
    measures |= {
        name: [as_number(row.get(name)) for row in rows] for name in further if types[name] == "number"
    }
    made = [
        page.chart(title, page.histogram(known))
        for title, values in measures.items()
        if (known := [value for value in values if value is not None])
    ]
    sizes = [f"{row['width']}x{row['height']}" for row in rows if row.get("width") and row.get("height")]
    texts = {"size, width x height": sizes}
    texts |= {name: [str(row.get(name) or "") for row in rows] for name in further if types[name] != "number"}
    made += [
        page.chart(title, page.count_texts(values))
        for title, values in texts.items()
        if values and (title not in further or len(set(values)) <= page.BINS)
    ]
    return made


def _buckets(task: Task, table: Table, data: DataConfig, seed: int) -> str:
    """Return the table of clips per bucket of a training, and of those that none takes, with the reason."""
    data = data.with_manifest(task.source, table.root)
    try:
        text = build_assignment(data, seed).table()
        if any(bucket.max_tokens for bucket in data.buckets):
            command = as_started("train.py")
            text += (
                f"\nmax_tokens: the batch size depends on codec and model: {command} --dry_run true shows it"
            )
    except UserError as error:
        text = str(error)
    return f"<pre>{page.escaped(text)}</pre>"


def _thumbnail(record: ClipRecord) -> str:
    """Return the middle frame as a JPEG in base64. Raises DecodeError and ExcludedError."""
    frame = middle_frames(record, ScoringWindow(frames=1, side=THUMBNAIL_SIDE))[0]
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def _caption_lines(row: TableRow, scores: Sequence[str]) -> list[str]:
    """Return the lines below a thumbnail."""
    numbers = [f"{name} {row[name]}" for name in scores if row.get(name) not in (None, "")]
    seconds, size = _duration(row), (row.get("width"), row.get("height"))
    window = f" from {row['start']} s" if row.get("start") else ""
    facts = [
        f"{seconds:.2f} s{window}" if seconds is not None else "",
        f"{size[0]}x{size[1]}" if all(size) else "",
    ]
    caption = page.shortened(str(row.get("text") or "(no caption)"), LONGEST_CAPTION)
    return [row_name(row), ", ".join(filter(None, facts)), ", ".join(numbers), caption]


def _evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of `count` places, evenly spaced."""
    wanted = min(count, wanted)
    return [k * count // wanted for k in range(wanted)]


def _extremes(rows: Sequence[TableRow], name: str) -> list[tuple[str, list[int]]]:
    """Return the places of the lowest and of the highest values of a score."""
    known = {
        place: value for place, row in enumerate(rows) if (value := as_number(row.get(name))) is not None
    }
    order = sorted(known, key=lambda place: (known[place], place))
    return [("lowest", order[:EXTREMES]), ("highest", order[EXTREMES:][-EXTREMES:][::-1])]


def _duration(row: TableRow) -> float | None:
    """Return the seconds of a clip; None if the manifest does not say."""
    frames, fps, start, end = (as_number(row.get(name)) for name in ("num_frames", "fps", *SPAN_COLUMNS))
    if not frames or not fps:
        return None
    return max(0.0, min(frames / fps, math.inf if end is None else end) - (start or 0.0))


def _aspect_ratio(row: TableRow) -> float | None:
    height, width = as_number(row.get("height")), as_number(row.get("width"))
    return width / height if height and width else None
