"""What the gallery reads of a folder: which videos there are, and the metadata inside. Imports no torch."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stdit.serve.json_values import finite_number, whole_number, whole_text
from stdit.serve.metadata_reader import read_hostile_metadata

MOST_PROMPT = 4000
"""Characters of a prompt that the index keeps."""
_VALIDATION = re.compile(r"step-\d+|base")
"""Folders of validation videos, in the folder ``samples`` of a run."""


@dataclass(frozen=True)
class VideoFacts:
    """What the gallery shows of a video's metadata; None: the metadata does not say."""

    prompt: str
    seed: int | None
    checkpoint: str | None
    """Name of the run, or of the folder of a pipeline."""
    checkpoint_step: int | None
    width: int | None
    """Pixels."""
    height: int | None
    """Pixels."""
    num_frames: int | None
    num_inference_steps: int | None
    fps: float | None


def scan_folders(
    root: Path, validation: bool = False
) -> Iterator[tuple[str, dict[str, tuple[int, int]] | None]]:
    """Yield each folder below ``root`` with its mp4 files, by name: time of the last change (ns), and size (bytes).

    Folders are relative, with a slash at the end, and "" for ``root`` itself; None instead of the files of one that
    cannot be read. Links, hidden folders and files, and folders that are being written (``.tmp``) are left out.

    Args:
        validation: also yield the validation videos of runs.
    """
    pending = [""]
    while pending:
        folder = pending.pop()
        files: dict[str, tuple[int, int]] | None = {}
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.is_symlink() or not _is_text(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if not _is_left_out(folder, entry.name, validation):
                            pending.append(f"{folder}{entry.name}/")
                    elif entry.name.endswith(".mp4") and entry.is_file(follow_symlinks=False):
                        _add(files, entry)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it has just vanished
        except OSError:
            files = None
        yield folder, files


def read_facts(video: Path) -> VideoFacts | None:
    """Return the facts of a video's metadata; None if it is none of ours, or damaged. Decodes no frame."""
    metadata = read_hostile_metadata(video)
    if metadata is None or not isinstance(prompt := metadata.get("prompt"), str):
        return None
    fps = finite_number(metadata.get("fps"))
    checkpoint = metadata.get("checkpoint")
    return VideoFacts(
        prompt=whole_text(prompt[:MOST_PROMPT]),
        seed=whole_number(metadata.get("seed")),
        checkpoint=checkpoint_name(checkpoint) if isinstance(checkpoint, str) else None,
        checkpoint_step=whole_number(metadata.get("checkpoint_step")),
        **{
            name: whole_number(metadata.get(name))
            for name in ("width", "height", "num_frames", "num_inference_steps")
        },
        fps=fps if fps and fps > 0 else None,
    )


def checkpoint_name(checkpoint: str) -> str:
    """Return the name of the run, or of the folder of a pipeline, that a video's metadata names."""
    parts = [part for part in re.split(r"[/\\]", checkpoint) if part not in ("", ".")]
    if len(parts) > 1 and parts[-1] == "pipeline":
        parts.pop()
    if len(parts) > 2 and parts[-2] == "checkpoints":
        parts = parts[:-2]
    return whole_text(parts[-1][:200]) if parts else "?"


def _add(files: dict[str, tuple[int, int]] | None, entry: os.DirEntry[str]) -> None:
    assert files is not None
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return
    files[entry.name] = (status.st_mtime_ns, status.st_size)


def _is_left_out(parent: str, name: str, validation: bool) -> bool:
    of_validation = parent.endswith("samples/") and _VALIDATION.fullmatch(name) is not None
    return name.endswith((".tmp", ".old")) or (of_validation and not validation)


def _is_text(name: str) -> bool:
    """Return whether a name is UTF-8, which the index and JSON need."""
    return whole_text(name) == name
