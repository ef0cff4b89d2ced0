"""Which videos to make: requests, planned from the settings and checked before a model is loaded.

Imports no torch at module level.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.data.config import resolve_size
from stdit.errors import UserError
from stdit.lora.config import LoRASpec, parse_lora
from stdit.pipelines.conditions import (
    FrameCondition,
    check_frame_source,
    check_strengths,
    find_overlaps,
    find_unused_frames,
    parse_frame_condition,
)
from stdit.pipelines.config import (
    PIPELINE_DEFAULTS,
    PROMPT_SETTINGS,
    VIDEO_SETTINGS,
    PromptSettings,
    SampleConfig,
    VideoSettings,
)
from stdit.pipelines.opensora_masks import MaskEntry, parse_mask_strategy
from stdit.pipelines.prompts import PromptLine, read_prompts
from stdit.pipelines.segments import Segments

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec


@dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    seed: int
    settings: VideoSettings = field(default_factory=VideoSettings)
    """What is None here takes the pipeline's own setting."""
    negative_prompt: str | None = None
    image: Any = None
    """First frame: a path, or any image that the pipeline takes."""
    conditions: tuple[FrameCondition, ...] = ()
    """Conditioning frames, with indices in the whole video."""
    loras: tuple[LoRASpec, ...] = ()
    """Adapters to use, and no others."""
    mask_entries: tuple[MaskEntry, ...] = ()
    """Further conditioning frames, in Open-Sora's notation."""
    segment_prompts: tuple[str, ...] = ()
    """Prompts of the segments after the first."""
    segments: Segments = Segments()
    index: int = 0
    """Position of the prompt in its file, used in file names and messages."""
    extra: dict[str, str] = field(default_factory=dict)
    """Columns of the prompts file that are no settings; written to the metadata."""

    def shared(self) -> tuple[object, ...]:
        """Return what the requests of a batch have in common."""
        return self.settings, self.segments, self.loras

    def texts(self) -> tuple[str, ...]:
        """Return the texts that are encoded."""
        return self.prompt, *self.segment_prompts, self.negative_prompt or self.prompt

    def all_conditions(self) -> list[FrameCondition]:
        """Return the image, as a condition on frame 0, and the conditions."""
        return [*([] if self.image is None else [FrameCondition(self.image, 0, 1)]), *self.conditions]


def plan_requests(config: SampleConfig, size_multiple: int = 2) -> list[Request]:
    """Return a request for each prompt and seed, in this order; prompts, settings and pictures are checked.

    Args:
        size_multiple: pixels to which a size given by resolution is rounded, see `stdit.pipelines.sizes`.

    Raises:
        UserError: for a prompt, a setting or a picture that cannot be used.
    """
    lines = _read_prompt_lines(config)
    common = {name: getattr(config, name) for name in PROMPT_SETTINGS}
    if config.resolution is not None and config.aspect_ratio is not None:
        height, width = resolve_size(config.resolution, config.aspect_ratio, size_multiple)
        common |= {"height": height, "width": width}
    return [
        request for index, line in enumerate(lines) for request in _plan_line(config, common, index, line)
    ]


def _plan_line(
    config: SampleConfig, common: Mapping[str, Any], index: int, line: PromptLine
) -> list[Request]:
    """Return the requests of one prompt, whose own settings win over the ``common`` ones."""
    where = f"prompt {index}: "
    given = {name: getattr(line, name) for name in PROMPT_SETTINGS}
    own = {name: value for name, value in given.items() if value or (value not in (None, "") and value != [])}
    own |= {"pab": line.pab} if line.pab is not None else {}  # an empty list is one, too
    prompt = PromptSettings(**{**common, **own})
    settings = VideoSettings(**{name: getattr(prompt, name) for name in VIDEO_SETTINGS})
    settings.check(where)
    if config.seeds is not None and line.seed is not None:
        raise UserError(
            f"{where}its own seed = {line.seed} beside seeds = {config.seeds}: remove one of them."
        )
    if not all(text.strip() for text in prompt.segment_prompts):
        raise UserError(f"{where}segment_prompts has an empty prompt: write it, or remove it.")
    prompts = 1 + len(prompt.segment_prompts)
    count = prompts if prompt.segments is None else prompt.segments
    segments = Segments(count, prompt.overlap, bool(prompt.loop))
    segments.check(where, prompts)
    conditions = [parse_frame_condition(text) for text in prompt.condition]
    loras = tuple(parse_lora(text, where) for text in prompt.lora)
    if settings.num_frames is not None and segments.has_known_length:
        total = segments.total_frames(settings.num_frames)
        for condition in conditions:
            condition.span(total)
    references = [path.strip() for path in (prompt.reference_path or "").split(";") if path.strip()]
    mask_entries = parse_mask_strategy(prompt.mask_strategy or "", references)
    if references and not mask_entries:
        raise UserError(
            f"{where}reference_path without mask_strategy, which says where the frames go: add mask_strategy = 0 "
            "for the first frame, or use condition."
        )
    for path in {prompt.image, *(one.source for one in conditions), *references} - {None}:
        check_frame_source(path)
    return [
        Request(
            prompt=line.prompt + config.scores(),
            seed=seed,
            settings=settings,
            negative_prompt=prompt.negative_prompt or None,
            image=prompt.image,
            conditions=tuple(conditions),
            loras=loras,
            mask_entries=tuple(mask_entries),
            segment_prompts=tuple(text + config.scores() for text in prompt.segment_prompts),
            segments=segments,
            index=index,
            extra=line.extra,
        )
        for seed in config.all_seeds(line.seed)
    ]


def check_requests(
    requests: Iterable[Request],
    recorded: Mapping[str, Any],
    codec: "VideoCodec | None" = None,
    guidance_range: Sequence[float] | None = None,
) -> list[str]:
    """Check requests against the settings that a pipeline records, before it is loaded.

    Args:
        codec: of the pipeline; needed if a request has several segments.
        guidance_range: of the model.

    Returns:
        warnings of conditioning frames that are not used.

    Raises:
        UserError: for conditioning frames outside the video or missing in their source, and for settings that this
            pipeline would ignore.
    """
    warnings = list[str]()
    for request in {r.index: r for r in requests}.values():
        where = f"prompt {request.index}: "
        settings = dict(recorded) | {name: v for name, v in asdict(request.settings).items() if v is not None}
        request.settings.check_used(PIPELINE_DEFAULTS | settings, request.negative_prompt, where)
        request.settings.check_saving(PIPELINE_DEFAULTS | settings, where)
        if settings.get("pab"):
            check_strengths(request.conditions, where)
        request.settings.check_guidance(
            PIPELINE_DEFAULTS | settings, guidance_range, request.negative_prompt, where
        )
        if isinstance(request.image, str | Path):
            warnings += find_unused_frames(request.image)
        num_frames, fps = settings.get("num_frames"), settings.get("fps")
        if codec is not None and num_frames is not None:
            request.segments.check_latents_left(num_frames, codec, where)
        if num_frames is None or fps is None or not request.segments.has_known_length:
            continue
        total = request.segments.total_frames(num_frames)
        conditions = [condition.resolved(total, fps) for condition in request.all_conditions()]
        request.segments.check_frames_left(conditions, num_frames, where)
        warnings += find_overlaps(conditions, total)
    return list(dict.fromkeys(warnings))


def _read_prompt_lines(config: SampleConfig) -> list[PromptLine]:
    if config.prompts is not None and config.prompt:
        raise UserError("both prompt and prompts are set: remove one of them.")
    if config.prompts is not None:
        return read_prompts(config.prompts)
    if config.dry_run is not False and not config.prompt:
        return [PromptLine(prompt="any")]
    if not config.prompt or not all(text.strip() for text in config.prompt):
        raise UserError(
            'no prompt, or an empty one: add --prompt "..." or --prompts FILE (.txt, .csv or .jsonl).'
        )
    return [PromptLine(prompt=text) for text in config.prompt]
