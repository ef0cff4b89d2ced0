"""What a server offers: the bundled model, that of --checkpoint, those of runs, and adapters. Imports no torch."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from stdit.checkpoint_files import META, read_meta
from stdit.data.config import ASPECT_RATIOS, LENGTHS, RESOLUTIONS, resolve_size
from stdit.errors import UserError
from stdit.lora.config import ADAPTER_FILE
from stdit.lora.header import read_header
from stdit.pipelines.bundled import BUNDLED
from stdit.pipelines.config import PIPELINE_DEFAULTS, VIDEO_SETTINGS
from stdit.pipelines.loading import load_codec, model_settings, pipeline_settings, weights_hash
from stdit.pipelines.sizes import size_multiple
from stdit.pipelines.sources import (
    MODEL_INDEX,
    WEIGHTS,
    CheckpointSource,
    find_checkpoint_source,
    finished_checkpoints,
)
from stdit.serve.errors import RequestError

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec

BUNDLED_MODEL = "bundled"
"""Name of the model that comes with stdit."""
DAMAGED_FOR = 10.0
"""Seconds after which a model that is damaged is read again."""
LISTED_FOR = 2.0
"""Seconds for which the list of a folder is used again."""
_MORE_LENGTHS = (0.25, 0.5, 2.0, 4.0)
"""Lengths that are offered besides those of the training, as parts of it."""


@dataclass
class OfferedModel:
    """A model that can be sampled from, as far as requests are checked against it."""

    name: str
    """By which requests ask for it: bundled, RUN or RUN/step-00001000."""
    folder: Path | None
    """Of its run, checkpoint or pipeline; None: the bundled model."""
    source: CheckpointSource
    """Its newest files, which are verified when it is loaded."""
    settings: dict[str, Any]
    """Those of its pipeline, all of them."""
    transformer: dict[str, Any]
    codec: "VideoCodec"
    _skeletons: dict[str, Any] = field(default_factory=dict)

    def skeleton(self, dtype: str) -> Any:
        """Return its pipeline without weights but the codec's, made once, with a transformer of a dtype."""
        from stdit.pipelines.loading import load_skeleton
        from stdit.pipelines.precision import cast

        if dtype not in self._skeletons:
            pipe = load_skeleton(self.source)
            cast(pipe.transformer, dtype)
            self._skeletons[dtype] = pipe
        return self._skeletons[dtype]

    @property
    def multiple(self) -> int:
        """Pixels of which height and width are multiples."""
        return size_multiple(self.codec, self.transformer["patch_size"])

    @property
    def trained_sizes(self) -> list[dict[str, Any]]:
        """Sizes that it was trained on, if it is known."""
        return self.settings.get("trained_sizes") or []

    @property
    def conditioning(self) -> bool:
        """Whether it was trained with conditioning frames."""
        return bool((self.settings.get("flow") or {}).get("conditioning"))

    def natural_frames(self, num_frames: int) -> int:
        """Return the largest number of frames with the latents of ``num_frames``: its codec makes no others."""
        codec, multiple = self.codec, self.multiple
        latents = codec.latent_shape(num_frames, multiple, multiple)
        frames: int = codec.pixel_shape(*latents)[0]
        return frames

    def facts(self) -> dict[str, Any]:
        """Return what the page says of it."""
        trained = {(one["height"], one["width"]) for one in self.trained_sizes}
        lengths = {one["num_frames"] for one in self.trained_sizes}
        return {
            "step": self.settings.get("step"),
            "defaults": {name: self.settings[name] for name in VIDEO_SETTINGS},
            "trained_sizes": self.trained_sizes,
            "trained_steps": self.settings.get("trained_steps"),
            "guidance_range": self.transformer.get("guidance_range"),
            "trigger": self.settings.get("trigger"),
            "conditioning": self.conditioning,
            "multiple": self.multiple,
            "resolutions": list(self._resolutions(trained)),
            "lengths": list(self._lengths(lengths)),
        }

    def _resolutions(self, trained: set[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        for height, width in sorted(trained):
            yield {
                "resolution": None,
                "aspect_ratio": None,
                "height": height,
                "width": width,
                "trained": True,
            }
        for resolution in RESOLUTIONS:
            for ratio in ASPECT_RATIOS:
                height, width = resolve_size(resolution, ratio, self.multiple)
                if (height, width) not in trained:
                    named = {"resolution": resolution, "aspect_ratio": ratio}
                    yield {**named, "height": height, "width": width, "trained": False}

    def _lengths(self, trained: set[int]) -> Iterator[dict[str, Any]]:
        own = int(self.settings["num_frames"])
        parts = {self.natural_frames(max(1, round(own * part))) for part in _MORE_LENGTHS}
        fps = float(self.settings["fps"])
        for frames in sorted({1, own, *parts, *trained, *(LENGTHS.values() if own > 32 else ())}):
            yield {"num_frames": frames, "seconds": round(frames / fps, 2), "trained": frames in trained}


@dataclass
class Catalog:
    """The models and adapters that requests may name.

    Args:
        runs: folder of runs.
        checkpoint: the default model, as ``--checkpoint`` has it; None: the bundled one.
        loras: folder of further adapters.
        ema: use averaged weights.
    """

    runs: Path
    checkpoint: str | None = None
    loras: Path | None = None
    ema: bool = True
    _models: dict[str, tuple[Any, float, OfferedModel | UserError | None]] = field(default_factory=dict)
    _hashes: dict[str, tuple[Any, str]] = field(default_factory=dict)
    _codecs: dict[str, "VideoCodec"] = field(default_factory=dict)
    _listed: tuple[float, dict[str, Path | None]] = field(default_factory=lambda: (0.0, {}))
    _lock: Lock = field(default_factory=Lock)

    @property
    def default(self) -> str:
        """Name of the default model."""
        return BUNDLED_MODEL if self.checkpoint is None else self._name_of(Path(self.checkpoint))

    def _name_of(self, path: Path) -> str:
        try:
            inside = path.resolve().relative_to(self.runs.resolve())
        except ValueError:
            return path.name if path.name != BUNDLED_MODEL else "checkpoint"
        return "/".join(part for part in inside.parts if part != "checkpoints") or path.name

    def folders(self) -> dict[str, Path | None]:
        """Return the folder of each model by its name, the default one first; None: the bundled model."""
        moment, known = self._listed
        if time.monotonic() - moment > LISTED_FOR:
            known = {}
            for model, folder in self._find():
                known.setdefault(model, folder)
            self._listed = (time.monotonic(), known)
        return known

    def _find(self) -> Iterator[tuple[str, Path | None]]:
        if self.checkpoint is not None:
            yield self.default, Path(self.checkpoint)
        yield BUNDLED_MODEL, None
        runs = sorted(self.runs.iterdir()) if self.runs.is_dir() else []
        for run in runs:
            if run.name.startswith(".") or run.is_symlink() or run.name == BUNDLED_MODEL:
                continue
            steps = finished_checkpoints(run)
            if steps or (run / "pipeline" / MODEL_INDEX).is_file():
                yield run.name, run
            elif (run / MODEL_INDEX).is_file():
                yield run.name, run
            for step in steps:
                yield f"{run.name}/{step.name}", step

    def model(self, name: str | None) -> OfferedModel:
        """Return a model by its name; None: the default one.

        Raises:
            RequestError: if there is none of that name, or it is damaged.
        """
        name = self.default if name is None else name
        folders = self.folders()
        if name not in folders:
            near = [one for one in folders if "/" not in one]
            raise RequestError(
                f"model = {name:.80}: there is no such model, or no longer: choose one of {', '.join(near[:10])}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        state, now = state_of_files(folders[name]), time.monotonic()
        with self._lock:
            known, until, found = self._models.get(name, (None, 0.0, None))
            if found is None or known != state or now > until:
                try:
                    found, until = self._read(name, folders[name]), inf
                except UserError as error:  # it may be mended where `state_of_files` does not look
                    found, until = error, now + DAMAGED_FOR
                self._models[name] = (state, until, found)
        if isinstance(found, UserError):
            raise RequestError(str(found), param="model", code="model_damaged")
        return found

    def _read(self, name: str, folder: Path | None) -> OfferedModel:
        source = find_checkpoint_source(folder, self.ema, verified=False)
        settings = PIPELINE_DEFAULTS | pipeline_settings(source)
        return OfferedModel(name, folder, source, settings, model_settings(source), self._codec(source))

    def _codec(self, source: CheckpointSource) -> "VideoCodec":
        """Return the codec of a model; the checkpoints of a run share one."""
        own = source.path / "vae" if source.is_pipeline else (source.run or source.path) / "codec"
        key = f"{own} {own.stat().st_mtime_ns}" if own.is_dir() else str(source.run)
        if key not in self._codecs:
            self._codecs[key] = load_codec(source)
        return self._codecs[key]

    def list_models(self) -> list[dict[str, Any]]:
        """Return what the page says of each model; of one that is damaged, why."""
        return [self._entry(name, folder) for name, folder in self.folders().items()]

    def _entry(self, name: str, folder: Path | None) -> dict[str, Any]:
        place = BUNDLED if folder is None else folder
        entry = {
            "id": name,
            "object": "model",
            "created": int(place.stat().st_mtime) if place.exists() else 0,
            "owned_by": "stdit",
            "name": name,
            "default": name == self.default,
            "error": None,
        }
        try:
            return entry | self.model(name).facts()
        except RequestError as error:
            return entry | {"error": str(error)}

    def find_weights(self, wanted: str) -> str | None:
        """Return the name of a model with the weights of a hash; None if it is not here."""
        for name in self.folders():
            try:
                model = self.model(name)
            except RequestError:
                continue
            if self._hash(model) == wanted:
                return name
        return None

    def _hash(self, model: OfferedModel) -> str:
        """Return the hash of a model's weights, as the metadata of videos has it."""
        source = model.source
        state = state_of_files(source.path)
        known = self._hashes.get(model.name)
        if known is None or known[0] != state:
            known = (state, self._read_hash(source))
            self._hashes[model.name] = known
        return known[1]

    def _read_hash(self, source: CheckpointSource) -> str:
        if source.is_pipeline:
            folder = source.path / "transformer"
            if not (folder / META).is_file():
                return ""
            files = {f"transformer/{name}": entry for name, entry in read_meta(folder)["files"].items()}
            return weights_hash({"files": files}, "transformer")
        meta = read_meta(source.path)
        parts = [part for part in (("ema", "model") if self.ema else ("model",)) if _has_weights(meta, part)]
        return weights_hash(meta, parts[0]) if parts else ""

    def adapters(self) -> dict[str, Path]:
        """Return the file of each adapter by its name."""
        found = dict[str, Path]()
        for run in _children(self.runs):
            if (file := run / "lora" / ADAPTER_FILE).is_file():
                found[run.name] = file
        for file in _children(self.loras) if self.loras is not None else ():
            if file.suffix == WEIGHTS and file.is_file():
                found[file.stem] = file
        return found

    def list_adapters(self) -> list[dict[str, Any]]:
        """Return what the page says of each adapter."""
        entries = []
        for name, file in self.adapters().items():
            try:
                header = read_header(file)
            except UserError:
                continue  # no adapter, or a damaged one: not offered
            entries.append({"id": name, "name": name, "trigger": header.trigger})
        return entries

    def adapter(self, name: str, param: str = "loras") -> Path:
        """Return the file of an adapter. Raises RequestError, of the field ``param``, if there is none of it."""
        adapters = self.adapters()
        if name not in adapters:
            raise RequestError(
                f"loras: there is no adapter {name!r:.80}: choose one of those that GET /v1/loras lists.",
                param=param,
                code="not_found",
            )
        return adapters[name]


def _has_weights(meta: Mapping[str, Any], part: str) -> bool:
    return any(name.startswith(f"{part}/") and name.endswith(WEIGHTS) for name in meta["files"])


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(
            one for one in folder.iterdir() if not one.name.startswith(".") and not one.is_symlink()
        )
    except OSError:
        return []


def state_of_files(folder: Path | None) -> tuple[int, ...]:
    """Return what changes when the files of a run, checkpoint or pipeline change; None: of the bundled model."""
    place = BUNDLED if folder is None else folder
    found = []
    for part in (
        ".",
        META,
        MODEL_INDEX,
        "checkpoints",
        "transformer",
        f"transformer/{META}",
        *(f"pipeline/{name}" for name in (META, MODEL_INDEX)),
    ):
        try:
            found.append((place / part).stat().st_mtime_ns)
        except OSError:
            found.append(0)
    return tuple(found)
