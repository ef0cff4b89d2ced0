"""`probe`: frames, rate and size of every file."""

from stdit.data.decoding.decode import probe
from stdit.data.manifest.rows import METADATA
from stdit.data.preparation.flow import Result, Section, Task, each_clip, finish


def probe_clips(task: Task) -> list[str]:
    """Fill in num_frames, fps, height and width, whatever the manifest says. Returns a summary; raises UserError."""
    table = task.open()
    outcomes = each_clip(task, table, probed, (), "probe")
    results = [
        Result(row, [] if outcome.reason else [{**row, **outcome.value}], outcome.reason)
        for row, outcome in zip(table.rows, outcomes, strict=True)
    ]
    return finish(task, table, results, METADATA)


def probed(section: Section) -> dict[str, float]:
    """Raises DecodeError, and LeftOut for a part that is empty."""
    whole = probe(section.media)
    section.part(whole)
    return whole._asdict()
