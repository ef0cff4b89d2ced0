"""Writes the embedded data set: h264 videos, their manifest, and files of prompts to score a model by.

    videos/00000.mp4 ...     the clips, of the training combinations only
    manifest.csv             path,text,num_frames,fps,height,width and the attributes of every clip
    prompts_heldout.csv      prompts in training wording on combinations that no clip shows
    prompts_paraphrase.csv   the same combinations, some words used by no caption
    prompts_paraphrase_strict.csv   the same, such words for shape, colour and motion
    prompts_seen.csv         prompts on training combinations, which are no caption of a clip
    prompts_sample.csv, prompts.txt   eight varied prompts on held-out combinations
    shapes.json              what was built; written last

Everything is a function of the seed: each clip and prompt draws from a generator of its own.
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
"""To be raised when the same seed is to give other files."""
META = "shapes.json"
STREAMS = {"clips": 0, "seen": 1, "heldout": 2, "paraphrase": 3, "sample": 4, "paraphrase_strict": 5}
"""Each kind of draw has its own stream of random numbers."""

Row = dict[str, Any]


@dataclass(frozen=True)
class ShapesConfig:
    """What to build."""

    num_clips: int = 10000
    seed: int = 0
    num_frames: int = 16
    fps: int = 8
    size: int = 32
    """Height and width in pixels; even."""
    crf: int = 12
    """Quality of h264: 0 is lossless, 51 the worst."""

    def __post_init__(self) -> None:
        if self.num_clips < 1 or self.num_frames < 1 or self.fps < 1 or self.seed < 0:
            raise UserError(f"{self}: num_clips, num_frames and fps must be at least 1, the seed at least 0")
        if self.size < 32 or self.size % 2:
            raise UserError(f"size {self.size} must be even and at least 32 pixels, or shapes cannot be told")


def build(output: Path, config: ShapesConfig | None = None, workers: int = 2) -> bool:
    """Build the data set in the folder `output`, unless it is there already.

    The files are written to a folder aside, which takes the place of `output` when it is complete.

    Returns:
        whether anything was built.

    Raises:
        UserError: if `output` holds something else, or cannot be written.
    """
    config = config or ShapesConfig()
    output = Path(output).absolute()
    meta = {"version": VERSION, "vocabulary": _fingerprint(), **asdict(config)}
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        found = _read_meta(output)
        if found is None:
            raise UserError(f"{output} exists and was not written by this command: choose another --output")
        if found == meta:
            return False
    aside = output.with_name(output.name + ".tmp")
    try:
        _remove(aside)
        (aside / "videos").mkdir(parents=True)
        _write_all(aside, config, workers)
        (aside / META).write_text(json.dumps(meta, indent=2) + "\n")
        _replace(aside, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from error
    finally:
        _remove(aside)
    return True


def draw_clip(index: int, config: ShapesConfig) -> tuple[Scene, str]:
    """Scene and caption of one clip, a function of (seed, index)."""
    rng = np.random.default_rng([config.seed, STREAMS["clips"], index])
    scene = sample_scene(rng, split_combinations(config.seed)[0])
    return scene, caption(scene, rng)


def draw_prompts(
    kind: str, combos: Iterable[Combo], backgrounds: int, seed: int, avoid: frozenset[str] = frozenset()
) -> list[Row]:
    """Prompts with their expected attributes, each combination on that many backgrounds.

    Args:
        kind: a name of `STREAMS`; it decides the wording.
        avoid: texts that must not come up, such as the captions of the clips.
    """
    wordings: dict[str, Callable[[Scene, np.random.Generator], str]] = {
        "paraphrase": paraphrase,
        "paraphrase_strict": partial(paraphrase, strict=True),
    }
    describe = wordings.get(kind, caption)
    rows: list[Row] = []
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

    That takes one thread, and no macroblock tree: for frames as small as these, x264's vectorised code for it
    reads memory that nobody wrote.
    """
    options = {"crf": str(crf), "x264-params": "mbtree=0"}
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_clip(index: int, config: ShapesConfig, folder: Path) -> Row:
    """Write one clip and return its row of the manifest."""
    scene, text = draw_clip(index, config)
    path = f"videos/{index:05d}.mp4"
    write_video(folder / path, render(scene, config.num_frames, config.size), config.fps, config.crf)
    size = {"num_frames": config.num_frames, "fps": config.fps, "height": config.size, "width": config.size}
    return {"path": path, "text": text, **size, **scene.attributes}


def _write_all(folder: Path, config: ShapesConfig, workers: int) -> None:
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


def _write_clips(folder: Path, config: ShapesConfig, workers: int) -> Iterator[Row]:
    """Rows in order of their index, however many processes write them."""
    job = partial(_write_clip, config=config, folder=folder)
    progress = partial(tqdm, total=config.num_clips, desc="rendering clips", unit="clip", disable=None)
    if workers < 2:
        yield from progress(map(job, range(config.num_clips)))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from progress(pool.map(job, range(config.num_clips), chunksize=16))


def _varied(combos: list[Combo], count: int) -> list[Combo]:
    """Choose combinations one by one, always the one whose values have been used least."""
    chosen: list[Combo] = []
    for _ in range(count):
        used = [value for combo in chosen for value in combo]
        left = [combo for combo in combos if combo not in chosen]
        chosen.append(min(left, key=lambda combo: sum(used.count(value) for value in combo)))
    return chosen


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _fingerprint() -> str:
    """Hash of all words and colours, so that files made of others are not taken for these."""
    vocabulary = [SEEN, UNSEEN, TEMPLATES, UNSEEN_TEMPLATES, COLOURS, BACKGROUNDS]
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _read_meta(folder: Path) -> Row | None:
    """What a folder says was built in it; None if it does not say."""
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and "version" in meta else None


def _replace(aside: Path, output: Path) -> None:
    old = output.with_name(output.name + ".old")
    _remove(old)
    if output.exists():
        os.rename(output, old)
    os.rename(aside, output)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
