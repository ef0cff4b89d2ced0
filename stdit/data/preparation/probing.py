"""`probe`: frames, rate and size of every file."""

from stdit.data.decoding.decode import probe
from stdit.data.manifest.rows import METADATA
from stdit.data.preparation.flow import ClipRecord, Task, add_columns, process_clips, write_results


def probe_clips(task: Task) -> list[str]:
    """Fill in num_frames, fps, height and width, whatever the manifest says. Returns a summary; raises UserError."""
    table = task.open()
    outcomes = process_clips(task, table, _probe, (), "probe")
    return write_results(task, table, add_columns(table, outcomes), METADATA)


def _probe(record: ClipRecord) -> dict[str, float]:
    """Read the columns of a file. Raises DecodeError, and ExcludedError if the clip is an empty span of it."""
    info = probe(record.media)
    record.span(info)
    return info._asdict()
