"""Writes the embedded data set: h264 videos, their manifest, and prompt files to evaluate a model with.

    videos/00000.mp4 ...     the clips, of the training combinations only
    manifest.csv             path,text,num_frames,fps,height,width and the attributes of every clip
    prompts_heldout.csv      prompts in training wording, on combinations that no clip shows
    prompts_paraphrase.csv   the same combinations, with held-out words for shape, colour or motion
    prompts_paraphrase_strict.csv   the same, with held-out words for all three
    prompts_seen.csv         prompts on training combinations, other than the captions of clips
    prompts_sample.csv, prompts.txt   eight varied prompts on held-out combinations
    shapes.json              the settings of the build; written last

Everything is a function of the seed: each clip and each prompt has a random generator of its own.

Letters: T frames, H height, W width.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from stdit.data.shapes.captions import SEEN, TEMPLATES, UNSEEN, UNSEEN_TEMPLATES, caption, paraphrase
from stdit.data.shapes.render import (
    BACKGROUNDS,
    COLOURS,
    Combo,
    Scene,
    render,
    sample_scene,
    split_combinations,
)
from stdit.errors import UserError

VERSION = 1
"""Raise it when the same seed gives other files than before."""
STREAMS = {"clips": 0, "seen": 1, "heldout": 2, "paraphrase": 3, "sample": 4, "paraphrase_strict": 5}
"""Each kind of draw has its own stream of random numbers."""
_META = "shapes.json"


@dataclass(frozen=True)
class ShapesConfig:
    """Settings of the data set."""

    num_clips: int = 10000
    seed: int = 0
    num_frames: int = 16
    fps: int = 8
    size: int = 32
    """Height and width in pixels; even."""
    crf: int = 12
    """Quality of h264: 0 is lossless, 51 the worst."""

    def __post_init__(self) -> None:
        for name, least in (("num_clips", 1), ("num_frames", 1), ("fps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.size < 32 or self.size % 2:
            raise UserError(
                f"size {self.size} must be even and at least 32 pixels: smaller shapes look alike"
            )


def build(output: Path, config: ShapesConfig | None = None, workers: int = 2) -> str:
    """Build the data set in the folder `output`, unless it already exists with the same settings.

    The files are written to a temporary folder, and moved when they are complete. Those of other settings are
    replaced; whatever else lies in `output` stays.

    Returns:
        What was done, for people; an empty string if all files were there.

    Raises:
        UserError: if `output` holds anything else, or cannot be written.
    """
    config = config or ShapesConfig()
    output = Path(output).absolute()
    meta = {"version": VERSION, "vocabulary": _fingerprint(), **asdict(config)}
    found = None
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        found = _read_meta(output)
        if found is None:
            raise UserError(f"{output} exists and was not written by this command: choose another --output")
        if found == meta:
            return ""
    staging = output.with_name(output.name + ".tmp")
    try:
        _remove(staging)
        (staging / "videos").mkdir(parents=True)
        _write_files(staging, config, workers)
        (staging / _META).write_text(json.dumps(meta, indent=2) + "\n")
        if found is None:
            os.rename(staging, output)
        else:
            _replace_files(output, staging)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from error
    finally:
        _remove(staging)
    if found is None:
        return "written"
    others = ", ".join(
        f"{name} {found.get(name)}" for name in asdict(config) if found.get(name) != meta[name]
    )
    return f"written in place of those of {others or 'another version'}; other files in the folder stay"


def _replace_files(output: Path, made: Path) -> None:
    """Move the files of a build into the folder of another one, the settings last."""
    (output / _META).write_text('{"version": 0}\n')  # incomplete until the real one is there
    for name in sorted(path.name for path in made.iterdir() if path.name != _META):
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        os.replace(made / name, output / name)
    os.replace(made / _META, output / _META)


def draw_clip(index: int, config: ShapesConfig) -> tuple[Scene, str]:
    """Return scene and caption of one clip, a function of (seed, index)."""
    rng = np.random.default_rng([config.seed, STREAMS["clips"], index])
    scene = sample_scene(rng, split_combinations(config.seed)[0])
    return scene, caption(scene, rng)


def draw_prompts(
    kind: str, combos: Iterable[Combo], backgrounds: int, seed: int, avoid: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """Return prompts with their expected attributes: one per combination and background.

    Args:
        kind: a name of `STREAMS`, which decides the wording.
        backgrounds: prompts per combination, each on another background.
        avoid: texts that must not occur, such as the captions of the clips.
    """
    wordings: dict[str, Callable[[Scene, np.random.Generator], str]] = {
        "paraphrase": paraphrase,
        "paraphrase_strict": partial(paraphrase, strict=True),
    }
    describe = wordings.get(kind, caption)
    rows: list[dict[str, Any]] = []
    used = set(avoid)
    for i, combo in enumerate(combos):
        for k in range(backgrounds):
            rng = np.random.default_rng([seed, STREAMS[kind], i, k])
            scene = Scene(*combo, list(BACKGROUNDS)[(i + k) % len(BACKGROUNDS)])
            text = describe(scene, rng)
            while text in used:
                text = describe(scene, rng)
            used.add(text)
            rows.append({"prompt": text, **scene.attributes})
    return rows


def write_video(path: Path, frames: np.ndarray, fps: int, crf: int) -> None:
    """Write uint8 [T H W 3] as h264 in mp4; the same frames give the same bytes.

    This needs a single thread and no macroblock tree, whose vectorised code in x264 reads uninitialised memory for
    frames as small as these.
    """
    options = {"crf": str(crf), "x264-params": "mbtree=0"}
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_clip(index: int, config: ShapesConfig, folder: Path) -> dict[str, Any]:
    """Write one clip and return its row of the manifest."""
    scene, text = draw_clip(index, config)
    path = f"videos/{index:05d}.mp4"
    write_video(folder / path, render(scene, config.num_frames, config.size), config.fps, config.crf)
    size = {"num_frames": config.num_frames, "fps": config.fps, "height": config.size, "width": config.size}
    return {"path": path, "text": text, **size, **scene.attributes}


def _write_files(folder: Path, config: ShapesConfig, workers: int) -> None:
    """Write clips, manifest and prompt files."""
    rows = list(_write_clips(folder, config, workers))
    _write_csv(folder / "manifest.csv", rows)
    train, held_out = split_combinations(config.seed)
    texts = frozenset(row["text"] for row in rows)
    sets = {
        "heldout": draw_prompts("heldout", held_out, 3, config.seed, texts),
        "paraphrase": draw_prompts("paraphrase", held_out, 3, config.seed, texts),
        "paraphrase_strict": draw_prompts("paraphrase_strict", held_out, 3, config.seed, texts),
        "seen": draw_prompts("seen", train, 1, config.seed, texts),
        "sample": draw_prompts("sample", _varied(held_out, 8), 1, config.seed, texts),
    }
    for name, prompts in sets.items():
        _write_csv(folder / f"prompts_{name}.csv", prompts)
    (folder / "prompts.txt").write_text("".join(f"{row['prompt']}\n" for row in sets["sample"]))


def _write_clips(folder: Path, config: ShapesConfig, workers: int) -> Iterator[dict[str, Any]]:
    """Write the clips with `workers` processes, and yield their rows in order."""
    job = partial(_write_clip, config=config, folder=folder)
    progress = partial(tqdm, total=config.num_clips, desc="rendering clips", unit="clip", disable=None)
    if workers < 2:
        yield from progress(map(job, range(config.num_clips)))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from progress(pool.map(job, range(config.num_clips), chunksize=16))


def _varied(combos: list[Combo], count: int) -> list[Combo]:
    """Choose `count` combinations one by one, each time the one whose values were used least."""
    chosen: list[Combo] = []
    for _ in range(count):
        used = [value for combo in chosen for value in combo]
        left = [combo for combo in combos if combo not in chosen]
        chosen.append(min(left, key=lambda combo: sum(used.count(value) for value in combo)))
    return chosen


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _fingerprint() -> str:
    """Return a hash of all words and colours, to detect files that were made with others."""
    vocabulary = [SEEN, UNSEEN, TEMPLATES, UNSEEN_TEMPLATES, COLOURS, BACKGROUNDS]
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the settings that a folder was built with; None if it was not built by `build`."""
    try:
        meta = json.loads((folder / _META).read_text())
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and "version" in meta else None


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
