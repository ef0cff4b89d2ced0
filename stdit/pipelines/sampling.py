"""From prompts to files: what ``sample.py`` does after parsing. Imports what is heavy only when needed."""

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stdit
from stdit.data.config import resolve_size
from stdit.errors import UserError
from stdit.pipelines.conditions import Condition, check_source, parse_condition, settled
from stdit.pipelines.config import PROMPT_SETTINGS, SETTINGS, PromptSettings, SampleConfig, VideoSettings
from stdit.pipelines.loading import Source, check_text, find_source, load_pipeline, pipeline_settings
from stdit.pipelines.mask_strategy import MaskEntry, parse_mask_strategy, translate_masks
from stdit.pipelines.prompts import PromptLine, read_prompts
from stdit.pipelines.segments import Parts, make_in_parts
from stdit.pipelines.sizes import size_multiple

if TYPE_CHECKING:
    import numpy as np

    from stdit.parallel.processes.mesh import Mesh
    from stdit.pipelines.pipeline import STDiTPipeline

__all__ = ["Request", "Source", "load_pipeline", "plan_requests", "sample_to_files", "sample_videos"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One video to be made."""

    prompt: str
    seed: int
    settings: VideoSettings = field(default_factory=VideoSettings)
    negative_prompt: str | None = None
    image: Any = None
    """First frame: a path, or any picture that the pipeline takes."""
    conditions: tuple[Condition, ...] = ()
    """Frames that are given, counted in the whole video."""
    masks: tuple[MaskEntry, ...] = ()
    """The same as Open-Sora writes them."""
    then: tuple[str, ...] = ()
    """Prompts of the parts after the first."""
    parts: Parts = Parts()
    """How the video is put together."""
    index: int = 0
    """Place of the prompt in its file, for the name."""
    extra: dict[str, str] = field(default_factory=dict)

    def given(self) -> list[Condition]:
        """Its image and conditions."""
        return [*([] if self.image is None else [Condition(self.image, 0, 1)]), *self.conditions]


def plan_requests(config: SampleConfig, multiple: int = 2) -> list[Request]:
    """All videos that a config asks for, prompt by prompt and seed by seed; pictures are checked.

    Args:
        multiple: pixels; height and width by resolution are rounded to it, see `stdit.pipelines.sizes`.

    Raises:
        UserError: for a prompt, a setting or a picture that will not do.
    """
    lines = _prompt_lines(config)
    common = {name: getattr(config, name) for name in PROMPT_SETTINGS} | _named_size(config, multiple)
    requests = []
    for index, line in enumerate(lines):
        own = {
            name: value for name in PROMPT_SETTINGS if (value := getattr(line, name)) not in (None, [], "")
        }
        prompt = PromptSettings(**(common | own))
        settings = VideoSettings(**{name: getattr(prompt, name) for name in SETTINGS})
        settings.check(f"prompt {index}: ")
        if not all(text.strip() for text in prompt.then):
            raise UserError(f"prompt {index}: then has an empty prompt: write one, or leave it out.")
        needed = 1 + len(prompt.then)
        parts = Parts(needed if prompt.parts is None else prompt.parts, prompt.overlap, bool(prompt.close))
        parts.check(f"prompt {index}: ", needed)
        conditions = [parse_condition(text) for text in prompt.condition]
        if settings.num_frames is not None:
            total = parts.total(settings.num_frames)
            for condition in conditions if parts.is_fitted else ():
                condition.span(total)
        references = [path.strip() for path in (prompt.reference_path or "").split(";") if path.strip()]
        masks = parse_mask_strategy(prompt.mask_strategy or "", references)
        if references and not masks:
            raise UserError(
                f"prompt {index}: reference_path without mask_strategy, which says where the frames go: add "
                "mask_strategy = 0 for the first frame, or use condition."
            )
        for path in {prompt.image, *(one.source for one in conditions), *references} - {None}:
            check_source(path)
        requests += [
            Request(
                prompt=line.prompt + config.scores(),
                seed=seed,
                settings=settings,
                negative_prompt=prompt.negative_prompt or None,
                image=prompt.image,
                conditions=tuple(conditions),
                masks=tuple(masks),
                then=tuple(text + config.scores() for text in prompt.then),
                parts=parts,
                index=index,
                extra=line.extra,
            )
            for seed in config.all_seeds(line.seed)
        ]
    return requests


def check_against(requests: Iterable[Request], recorded: Mapping[str, Any]) -> None:
    """Check requests against the settings that a pipeline records, before it is loaded.

    Raises:
        UserError: for given frames that lie outside, or are more than their source has; and for settings that this
            pipeline would not heed.
    """
    for request in {r.index: r for r in requests}.values():
        where = f"prompt {request.index}: "
        settings = dict(recorded) | {name: v for name, v in asdict(request.settings).items() if v is not None}
        schedule = settings.get("guidance_schedule", "constant")
        if request.settings.guidance_interval is not None and schedule != "interval":
            raise UserError(
                f"{where}guidance_interval is for guidance_schedule = interval, not {schedule}: add that, or "
                "leave the interval out."
            )
        num_frames, fps = settings.get("num_frames"), settings.get("fps")
        if num_frames is None or fps is None:
            continue
        total = request.parts.total(num_frames)
        if request.parts.is_fitted:
            given = [settled(condition, total, fps) for condition in request.given()]
            request.parts.check_free(given, num_frames, where)


def sample_videos(
    pipe: "STDiTPipeline", requests: Iterable[Request], batch_size: int = 8, mesh: "Mesh | None" = None
) -> Iterator[tuple[Request, "np.ndarray"]]:
    """Generate videos, those with equal settings together; yields ``(request, uint8 [T H W 3])`` in order.

    What a request leaves open is as the pipeline has it. With a mesh all its ranks work, and the first gets all
    videos; every rank must walk through the iterator.
    """
    from stdit.parallel.processes.mesh import Mesh

    mesh = mesh or Mesh()
    pipe.share(mesh)
    for videos in _rounds(pipe, list(requests), batch_size, mesh):
        yield from videos


def _sample(
    pipe: "STDiTPipeline", batch: Sequence[Request], which: str
) -> list[tuple[Request, "np.ndarray"]]:
    """The videos of requests with equal settings and parts, all together."""
    import torch

    from stdit.pipelines.video_io import to_uint8

    if not batch:
        return []
    settings = batch[0].settings
    num_frames = settings.num_frames or int(pipe.config["num_frames"])
    parts = batch[0].parts.fitted(num_frames, pipe.codec)
    generators = [torch.Generator().manual_seed(r.seed) for r in batch]  # each part draws on
    total, fps = parts.total(num_frames), settings.fps or float(pipe.config["fps"])
    given = []
    for r in batch:
        translated = translate_masks(r.masks, pipe.codec, parts, num_frames)
        given.append([settled(one, total, fps) for one in (*r.given(), *translated)])
        parts.check_free(given[-1], num_frames)

    def make(part: int, conditions: list[list[Condition]]) -> torch.Tensor:
        of_parts = "" if parts.count == 1 else f", part {part + 1} of {parts.count}"
        pipe.set_progress_bar_config(**(bar | {"desc": which + of_parts}))
        (frames,) = pipe(
            [(r.prompt, *r.then)[min(part, len(r.then))] for r in batch],
            negative_prompt=[r.negative_prompt for r in batch],
            conditions=conditions,
            generator=generators,
            output_type="pt",
            return_dict=False,
            **asdict(settings),
        )
        return frames

    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    with _enough_memory(len(batch)):
        videos = make_in_parts(make, parts, given, num_frames)
    pipe.set_progress_bar_config(**bar)
    frames = videos.permute(0, 1, 3, 4, 2).float().cpu().numpy()  # [B T H W 3]
    return [(request, to_uint8(video)) for request, video in zip(batch, frames, strict=True)]


def _rounds(
    pipe: "STDiTPipeline", requests: Sequence[Request], batch_size: int, mesh: "Mesh"
) -> Iterator[list[tuple[Request, "np.ndarray"]]]:
    """As `sample_videos` on all ranks: in each round every part of the mesh makes a batch, and the first gets all.

    The other ranks get empty lists, as many.
    """
    batches = list(_batches(requests, min(batch_size, math.ceil(len(requests) / mesh.dp))))
    for start in range(0, len(batches), mesh.dp):
        now = batches[start : start + mesh.dp]
        before = sum(map(len, batches[:start]))
        which = f"videos {before + 1}-{before + sum(map(len, now))} of {len(requests)}"
        mine = now[mesh.dp_rank] if mesh.dp_rank < len(now) else []
        videos = mesh.on_all_ranks(partial(_sample, pipe, mine, which))
        yield [video for part in mesh.gather_on_main(videos) for video in part]


def sample_to_files(config: SampleConfig) -> list[Path]:
    """Do all that a config asks for; returns the files written. Input is checked before a model is loaded.

    With several processes, each calls this, and the first writes.

    Raises:
        UserError: for input that will not do, and when the disk refuses; no file is left half-written.
    """
    requests = plan_requests(config)
    source = find_source(config.checkpoint, config.ema)
    check_against(requests, pipeline_settings(source))
    texts = [text for r in requests for text in (r.prompt, *r.then, r.negative_prompt or r.prompt)]
    if config.text is not None:
        check_text(config.text, texts, source)
    device = join_processes(config)
    from stdit.parallel.processes.memory import memory_of_process
    from stdit.parallel.processes.mesh import build_mesh, resolve_sp
    from stdit.pipelines.sharing import Videos

    mesh = build_mesh(config.parallel, device)
    mesh.check_same("the configuration or the prompts", f"{config} {requests}")
    folder = mesh.on_main(lambda: writable(_output_folder(config, source)))

    pipe, weights = mesh.on_all_ranks(lambda: load_pipeline(source, config.ema, config.text))
    mesh.on_all_ranks(lambda: pipe.text_encoder.check(texts))
    mesh.check_same("the model", weights)
    pipe.to(device, _dtype(config.dtype))
    if config.resolution is not None:
        requests = plan_requests(config, size_multiple(pipe.codec, pipe.transformer.config.patch_size))
    videos = Videos(pipe, [settings_of(request, pipe) for request in requests], config)
    memory = memory_of_process(device, config.parallel.memory_gib)
    mesh = resolve_sp(mesh, config.parallel, lambda: videos.choice(mesh.world_size, memory))
    pipe.share(mesh)
    if mesh.is_main:
        for warning in videos.warnings(mesh.sp.size, mesh.world_size):
            logger.warning(warning)
        print(f"sampling from {source.path} (weights {weights})", flush=True)
        if (
            any(r.image or r.conditions or r.masks or r.parts.count > 1 for r in requests)
            and not pipe.scheduler.config.conditioning
        ):
            logger.warning(
                "the model never saw given frames in training (flow.conditioning): it may ignore them"
            )
    else:
        pipe.set_progress_bar_config(disable=True)

    writer = _Writer(folder, pipe, source, weights, config)
    for made in _rounds(pipe, requests, config.batch_size, mesh):
        mesh.on_main(partial(writer.write, made))
    return mesh.on_main(writer.finish)


@dataclass
class _Writer:
    """Puts videos into a folder, each whole with its settings beside it, and in the end their sheet."""

    folder: Path
    pipe: "STDiTPipeline"
    source: Source
    weights: str
    config: SampleConfig
    written: list[Path] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)

    def write(self, videos: Iterable[tuple[Request, "np.ndarray"]]) -> None:
        """Raises UserError when the disk refuses."""
        from stdit.pipelines import video_io

        formats, folder = self.config.formats(), self.folder
        for request, frames in videos:
            metadata = describe(request, self.pipe, self.source, self.weights, self.config)
            stem = free_name(folder, f"{request.index:03d}-{slug(request.prompt)}-seed{request.seed}")
            names = [f"{stem}.{kind}" for kind in ("mp4", "gif") if kind in formats]
            with _explained(folder):
                for name in names:
                    write = video_io.write_mp4 if name.endswith(".mp4") else video_io.write_gif
                    write(folder / name, frames, metadata["fps"], metadata)
                video_io.write_json(folder / f"{stem}.json", {**metadata, "files": names})
            for name in (*names, f"{stem}.json"):
                self._tell(folder / name)
            if "png" in formats:
                self.rows.append(video_io.sheet_row(frames, f"{request.prompt}  (seed {request.seed})"))

    def finish(self) -> list[Path]:
        """All files written, the sheet last. Raises UserError when the disk refuses."""
        from stdit.pipelines import video_io

        if self.rows:
            sheet = self.folder / f"{free_name(self.folder, 'sheet')}.png"
            with _explained(self.folder):
                video_io.write_rows(sheet, self.rows)
            self._tell(sheet)
        return self.written

    def _tell(self, path: Path) -> None:
        self.written.append(path)
        print(path, flush=True)


def settings_of(request: Request, pipe: "STDiTPipeline") -> dict[str, Any]:
    """The settings of a video: the request's own, and for the rest the pipeline's."""
    own = {name: value for name, value in asdict(request.settings).items() if value is not None}
    return {name: own.get(name, pipe.config[name]) for name in SETTINGS}


def describe(
    request: Request, pipe: "STDiTPipeline", source: Source, weights: str, config: SampleConfig
) -> dict[str, Any]:
    """All that it takes to make a video again."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        **settings_of(request, pipe),
        "image": None if request.image is None else str(request.image),
        "conditions": [str(condition) for condition in request.conditions],
        "mask_strategy": [asdict(entry) for entry in request.masks],
        "then": list(request.then),
        **{f"parts_{name}": value for name, value in asdict(request.parts).items()},
        "dtype": config.dtype,
        "checkpoint": str(source.path),
        "checkpoint_hash": weights,
        "checkpoint_step": pipe.config["step"],
        "stdit": stdit.__version__,
        **({"extra": request.extra} if request.extra else {}),
    }


def slug(prompt: str, length: int = 40) -> str:
    """A prompt as part of a file name: letters and digits of any alphabet, joined by dashes."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:length].strip("-_") or "video"


def free_name(folder: Path, stem: str) -> str:
    """``stem``, or with the first number that makes it new, so that no sample replaces another."""
    number, name = 1, stem
    while any((folder / f"{name}.{kind}").exists() for kind in ("mp4", "gif", "png", "json")):
        number += 1
        name = f"{stem}-{number}"
    return name


def _prompt_lines(config: SampleConfig) -> list[PromptLine]:
    if config.prompts is not None and config.prompt:
        raise UserError("both prompt and prompts are given: leave one of them out.")
    if config.prompts is not None:
        return read_prompts(config.prompts)
    if not config.prompt.strip():
        raise UserError(
            'no prompt, or an empty one: add --prompt "..." or --prompts FILE (.txt, .csv or .jsonl).'
        )
    return [PromptLine(prompt=config.prompt)]


def _named_size(config: SampleConfig, multiple: int) -> dict[str, int]:
    """Height and width that ``resolution`` and ``aspect_ratio`` (width:height) stand for."""
    if config.resolution is None or config.aspect_ratio is None:
        return {}
    height, width = resolve_size(config.resolution, config.aspect_ratio, multiple)
    return {"height": height, "width": width}


def _batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Runs of requests with equal settings, at most ``batch_size`` long, in order."""
    batch: list[Request] = []
    for request in requests:
        alike = not batch or (request.settings, request.parts) == (batch[0].settings, batch[0].parts)
        if len(batch) == batch_size or not alike:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _output_folder(config: SampleConfig, source: Source) -> Path:
    if config.output is not None:
        return Path(config.output)
    return source.run / "samples" / "prompts" if source.run is not None else Path("outputs/samples")


def writable(folder: Path) -> Path:
    """Make a folder and prove that files can be written there, before minutes are spent on them."""
    probe = folder / ".stdit-write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output {folder} cannot be written ({error.strerror}): choose another with --output."
        ) from None
    return folder


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """A full disk and the like, in a line of its own."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output {folder}: {error.strerror or error}. Free some space or choose another --output; "
            "the files named above are whole."
        ) from error


@contextmanager
def _enough_memory(videos: int) -> Iterator[None]:
    """A request that the memory does not hold, in a line of its own."""
    try:
        yield
    except RuntimeError as error:  # torch has a class for it on GPUs only
        if "memory" not in str(error):
            raise
        raise UserError(
            f"{videos} videos at once need more memory than there is: lower batch_size, num_frames, or height "
            "and width."
        ) from error


def join_processes(config: SampleConfig) -> Any:
    """The device of this process, which meets the others if torchrun or accelerate launch started any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return find_device(config.device)
    from accelerate import PartialState

    from stdit.parallel.processes.mesh import runs_on_cpu

    timeout = timedelta(seconds=config.parallel.timeout)
    return PartialState(cpu=runs_on_cpu(config.device), timeout=timeout).device


def find_device(name: str) -> Any:
    """The device of that name; auto: a GPU if there is one. Raises UserError if it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device = {name}: not there ({reason}): use cpu, or auto.") from None
    return device


def _dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
