"""Write the embedded data set: h264 videos, their manifest, and prompt files to evaluate a model with.

    videos/00000.mp4 ...     the clips, of the training combinations only
    manifest.csv             path,text,num_frames,fps,height,width and every clip's `World.attributes`
    prompts_heldout.csv      prompts in training wording, on combinations that no clip shows
    prompts_paraphrase.csv   the same combinations, with held-out words for shape, colour or motion
    prompts_paraphrase_strict.csv   the same, with held-out words for all three
    prompts_seen.csv         prompts on training combinations, other than the captions of clips
    prompts_relations.csv    world 64: prompts in training wording, on held-out combinations of two objects
    prompts_relations_paraphrase.csv   the same combinations, with held-out words for shape, colour or relation
    prompts_sample.csv, prompts.txt   eight varied prompts on held-out combinations
    shapes.json              the settings of the build; written last

Everything is a function of the seed: each clip and each prompt has a random generator of its own.

Letters: T frames, H height, W width.
"""

import csv
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from stdit.data.shapes.captions import (
    PAIR_TEMPLATES,
    SEEN,
    TEMPLATES,
    UNSEEN,
    UNSEEN_PAIR_TEMPLATES,
    UNSEEN_TEMPLATES,
    caption,
    paraphrase,
)
from stdit.data.shapes.render import COLOURS, GRADIENTS, PLAIN, STRIPE_LEVELS, STRIPES, render
from stdit.data.shapes.scenes import Combo, Scene
from stdit.data.shapes.worlds import (
    PAIR_SHARE,
    WORLDS,
    World,
    choose_evenly,
    make_scene,
    sample_scene,
    split_combinations,
)
from stdit.errors import UserError

VERSION = 1
"""Raise it when the same seed gives other files than before."""
INCOMPLETE = 0
"""Version of a folder whose files are being replaced."""
STREAMS = {
    "clips": 0,
    "seen": 1,
    "heldout": 2,
    "paraphrase": 3,
    "sample": 4,
    "paraphrase_strict": 5,
    "relations": 6,
    "relations_paraphrase": 7,
}
"""Each kind of draw has its own stream of random numbers."""
RELATION_PROMPTS = 216
"""Prompts on held-out combinations of two objects, which are too many to use all."""
MAX_SIZE = 4096
"""Largest height and width in pixels."""
_META = "shapes.json"


@dataclass(frozen=True)
class ShapesConfig:
    """Settings of the data set. The defaults of clips are those of world 32; `of` takes those of any world."""

    num_clips: int = 10000
    seed: int = 0
    num_frames: int = 16
    fps: int = 8
    size: int = 32
    """Height and width in pixels; even."""
    crf: int = 12
    """Quality of h264: 0 is lossless, 51 the worst."""
    world: str = "32"
    """What the clips may show: a name of `worlds.WORLDS`."""

    @classmethod
    def of(cls, world: str, **settings: int | None) -> "ShapesConfig":
        """Return the settings of a world, with those replaced that are not None."""
        if world not in WORLDS:
            raise UserError(f"world = {world}: must be one of {', '.join(WORLDS)}")
        own = {name: getattr(WORLDS[world], name) for name in ("num_clips", "num_frames", "fps", "size")}
        return cls(world=world, **own | {name: v for name, v in settings.items() if v is not None})

    @property
    def facts(self) -> World:
        return WORLDS[self.world]

    def __post_init__(self) -> None:
        for name, least in (("num_clips", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {least}")
        for name, most in (("num_frames", 10_000), ("fps", 1000)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} = {getattr(self, name)}: must be from 1 to {most:,}")
        least = self.facts.size
        if not least <= self.size <= MAX_SIZE or self.size % 2:
            raise UserError(
                f"size = {self.size}: must be even, and from {least} pixels, below which shapes look alike, to "
                f"{MAX_SIZE:,}"
            )


def build(output: Path, config: ShapesConfig | None = None, workers: int = 2) -> str:
    """Build the data set in the folder `output`, unless it already exists with the same settings.

    The files are written to a temporary folder, and moved when they are complete. Those of other settings are
    replaced; whatever else lies in `output` stays.

    Returns:
        What was done, for people; an empty string if all files were there.

    Raises:
        UserError: if `output` holds anything else, or cannot be written, or there are no workers.
    """
    config = config or ShapesConfig()
    if workers < 1:
        raise UserError(f"workers = {workers}: must be at least 1 process")
    output = Path(output).absolute()
    meta = {"version": VERSION, "vocabulary": _fingerprint(config.facts), **asdict(config)}
    if config.world == "32":
        del meta["world"]  # as in the folders that were written before there were others
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
    before = {"world": "32", **found}
    others = ", ".join(
        f"{name} {before[name]}" for name, value in asdict(config).items() if before.get(name, value) != value
    )
    if found["version"] == INCOMPLETE:
        others = "an interrupted build"
    return f"written in place of those of {others or 'another version'}; other files in the folder stay"


def _replace_files(output: Path, made: Path) -> None:
    """Move the files of a build into the folder of another one, the settings last."""
    (output / _META).write_text(json.dumps({"version": INCOMPLETE}) + "\n")  # until the real one is there
    for name in STREAMS:  # another world may have others
        (output / f"prompts_{name}.csv").unlink(missing_ok=True)
    for name in sorted(path.name for path in made.iterdir() if path.name != _META):
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        os.replace(made / name, output / name)
    os.replace(made / _META, output / _META)


def draw_clip(index: int, config: ShapesConfig) -> tuple[Scene, list[str]]:
    """Return scene and captions of one clip, a function of (seed, index) and, in a world with something new, of
    the number of clips."""
    rng = np.random.default_rng([config.seed, STREAMS["clips"], index])
    world = config.facts
    pairs = bool(world.relations) and rng.random() < PAIR_SHARE
    combos = split_combinations(config.seed, world, pairs)[0]
    if world.new:
        combo, background = choose_evenly(combos, world.backgrounds, config.num_clips, config.seed)[index]
        combos, world = (combo,), replace(world, backgrounds=(background,))
    scene = sample_scene(rng, combos, world)
    texts: list[str] = []
    while len(texts) < world.num_captions:
        text = caption(scene, rng)
        if text not in texts:
            texts.append(text)
    return scene, texts


def draw_prompts(
    kind: str,
    combos: Iterable[Combo],
    backgrounds: int,
    seed: int,
    avoid: frozenset[str] = frozenset(),
    world: World = WORLDS["32"],
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
        "relations_paraphrase": paraphrase,
    }
    describe = wordings.get(kind, caption)
    rows: list[dict[str, Any]] = []
    used = set(avoid)
    for i, combo in enumerate(combos):
        for k in range(backgrounds):
            rng = np.random.default_rng([seed, STREAMS[kind], i, k])
            scene = make_scene(combo, world.backgrounds[(i + k) % len(world.backgrounds)])
            text = describe(scene, rng)
            while text in used:
                text = describe(scene, rng)
            used.add(text)
            rows.append({"prompt": text, **_described(scene, world)})
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


def _write_clip(index: int, config: ShapesConfig, folder: Path) -> list[dict[str, Any]]:
    """Write one clip and return its rows of the manifest, one for each caption."""
    scene, texts = draw_clip(index, config)
    path = f"videos/{index:05d}.mp4"
    write_video(folder / path, render(scene, config.num_frames, config.size), config.fps, config.crf)
    size = {"num_frames": config.num_frames, "fps": config.fps, "height": config.size, "width": config.size}
    return [{"path": path, "text": text, **size, **_described(scene, config.facts)} for text in texts]


def _described(scene: Scene, world: World) -> dict[str, str]:
    """Return the columns that describe a scene."""
    return {name: scene.attributes[name] for name in world.attributes}


def _write_files(folder: Path, config: ShapesConfig, workers: int) -> None:
    """Write clips, manifest and prompt files."""
    rows = list(itertools.chain(*_write_clips(folder, config, workers)))
    _write_csv(folder / "manifest.csv", rows)
    sets = draw_prompt_sets(config, frozenset(row["text"] for row in rows))
    for name, drawn in sets.items():
        _write_csv(folder / f"prompts_{name}.csv", drawn)
    (folder / "prompts.txt").write_text("".join(f"{row['prompt']}\n" for row in sets["sample"]))


def draw_prompt_sets(
    config: ShapesConfig, captions: frozenset[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return the prompts of each prompt file, by the name of its set.

    Args:
        captions: of the clips, which are no prompts; None: draw them.
    """
    world, seed = config.facts, config.seed
    texts = captions
    if texts is None:
        indices = tqdm(range(config.num_clips), desc="drawing captions", unit="caption", disable=None)
        texts = frozenset(text for index in indices for text in draw_clip(index, config)[1])
    prompts = partial(draw_prompts, seed=seed, avoid=texts, world=world)
    train, held_out = split_combinations(seed, world)
    sets = {"heldout": prompts("heldout", held_out, 3), "seen": prompts("seen", train, 1)}
    if not world.new:  # too few clips to teach it with many words
        sets["paraphrase"] = prompts("paraphrase", held_out, 3)
        sets["paraphrase_strict"] = prompts("paraphrase_strict", held_out, 3)
    sample = _varied(held_out, min(8, len(held_out)))
    if world.relations:
        pairs = _spread(split_combinations(seed, world, pairs=True)[1], RELATION_PROMPTS, seed)
        sets["relations"] = prompts("relations", pairs, 1)
        sets["relations_paraphrase"] = prompts("relations_paraphrase", pairs, 1)
        sample = _varied(held_out, 5) + _varied(pairs, 3)
    sets["sample"] = prompts("sample", sample, 1)
    return sets


def _spread(combos: Sequence[Combo], count: int, seed: int) -> list[Combo]:
    """Choose `count` combinations of two objects at random, as many of each relation."""
    order = np.random.default_rng([seed, 2]).permutation(len(combos))
    groups: dict[str, list[Combo]] = {}
    for combo in (combos[i] for i in order):
        groups.setdefault(combo[2], []).append(combo)
    return list(itertools.chain(*zip(*groups.values(), strict=False)))[:count]


def _write_clips(folder: Path, config: ShapesConfig, workers: int) -> Iterator[list[dict[str, Any]]]:
    """Write the clips with `workers` processes, and yield the rows of each in order."""
    job = partial(_write_clip, config=config, folder=folder)
    progress = partial(tqdm, total=config.num_clips, desc="rendering clips", unit="clip", disable=None)
    if workers < 2:
        yield from progress(map(job, range(config.num_clips)))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from progress(pool.map(job, range(config.num_clips), chunksize=16))


def _varied(combos: Sequence[Combo], count: int) -> list[Combo]:
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


def _fingerprint(world: World) -> str:
    """Return a hash of all words and colours of a world, to detect files that were made with others.

    Those of other worlds than 32 have their lengths as well, which only `VERSION` counts for it.
    """
    values = {**world.attributes, "relation": world.relations}

    def own(words: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            name: {value: options[value] for value in options if value in values[name]}
            for name, options in words.items()
            if values[name]
        }

    colours = {name: COLOURS[name] for name in world.colours}
    plain = {name: PLAIN[name] for name in world.backgrounds if name in PLAIN}
    vocabulary: list[Any] = [own(SEEN), own(UNSEEN), TEMPLATES, UNSEEN_TEMPLATES, colours, plain]
    if world.relations:
        vocabulary += [PAIR_TEMPLATES, UNSEEN_PAIR_TEMPLATES, GRADIENTS, STRIPES, STRIPE_LEVELS]
    if world.name != "32":
        vocabulary.append(asdict(world))
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
