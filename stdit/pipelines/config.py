"""Settings of ``sample.py`` and of a pipeline call, and the rules that they follow. Imports no torch."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

from stdit.codecs.config import DecodingConfig
from stdit.data.decoding.limits import MAX_DIMENSION
from stdit.data.manifest.caption_scores import CAPTION_SCORES, score_suffix
from stdit.errors import UserError
from stdit.parallel.config import SamplingParallelConfig
from stdit.suggestions import nearest_name

Format = Literal["mp4", "gif", "png"]
GuidanceSchedule = Literal["constant", "linear", "interval", "oscillating"]
Solver = Literal["euler", "heun", "dpm++", "unipc"]
Cache = Literal["off", "slow", "fast"]
Function = TypeVar("Function", bound=Callable[..., Any])


def _setting(pipeline_default: Any) -> Any:
    """Return a field that is None unless set; ``pipeline_default`` is its value in a new pipeline."""
    return field(default=None, metadata={"pipeline_default": pipeline_default})


@dataclass
class VideoSettings:
    """Settings of one pipeline call. None: the pipeline's own setting (``pipe.config``).

    This is the only list of them: the signatures of `STDiTPipeline` and the settings of a prompt are derived from it.
    """

    num_frames: int | None = _setting(16)
    """Length in frames."""
    height: int | None = _setting(32)
    """Height in pixels (with width; or use resolution and aspect_ratio)."""
    width: int | None = _setting(32)
    """Width in pixels."""
    fps: float | None = _setting(8.0)
    """Frames per second."""
    num_inference_steps: int | None = _setting(30)
    """Steps from noise to video."""
    solver: Solver | None = _setting(None)
    """euler; heun, with two model calls a step; dpm++ or unipc, which need the fewest for the same quality; none: the
    pipeline's own scheduler."""
    cache: Cache | float | None = _setting("off")
    """Skip steps that can be foreseen: off; slow (hardly any difference); fast; or a threshold, the largest error
    that a skipped step may add to the latents, such as 0.02."""
    pab: list[int] | None = _setting([])
    """Pyramid attention broadcast: for how many steps spatial, temporal and cross attention are used, and optionally
    MLPs, such as [2, 4, 6]; []: none is used again."""
    pab_timesteps: tuple[float, float] | None = _setting((450.0, 930.0))
    """The timesteps (0 video, 1000 noise) between which it is used again."""
    guidance_scale: float | None = _setting(1.5)
    """1: no guidance; larger values follow the prompt more closely, at twice the cost."""
    guidance_schedule: GuidanceSchedule | None = _setting("constant")
    """Guidance per step: constant; linear (rising from none); interval (only at noise levels in guidance_interval);
    oscillating (every second step)."""
    guidance_interval: tuple[float, float] | None = _setting((0.0, 1.0))
    """Range of noise levels for guidance_schedule = interval, such as [0.2, 0.8]; 1 is noise, 0 the video."""
    guidance_rescale: float | None = _setting(0.0)
    """From 0 to 1: how much of the contrast that guidance adds is removed; use about 0.7 with scales above 7."""
    shift: float | None = _setting(None)
    """Shift of the steps towards noise (above 1) or detail (below 1); none: from size and length."""
    refine_pairs: int | None = _setting(0)
    """Pairs of opposite noise that refine the finished video one after the other, each two model calls; 0: none."""
    refine_level: float | None = _setting(0.7)
    """Noise level of the refinement; higher: cleaner outlines and backgrounds, further from the video before it."""
    refine_guidance_scale: float | None = _setting(1.5)
    """Guidance in the refinement; 1: none."""

    def check(self, where: str = "") -> None:
        """Raise UserError for a setting that no model can follow; ``where`` begins the message."""
        for name in VIDEO_SETTINGS:
            value = getattr(self, name)
            values = value if name in LISTS and isinstance(value, list | tuple) else [value]
            kind, noun = (str, "a text") if name in ("guidance_schedule", "solver") else (Real, "a number")
            right = all(isinstance(one, kind) and not isinstance(one, bool) for one in values)
            if name == "cache":
                right |= isinstance(value, str)
                noun = "a word or a number"
            if value is not None and not right:
                raise UserError(f"{where}{name} = {value!r:.200}: has a wrong type: must be {noun}.")
        for name in ("num_frames", "height", "width", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and not (1 <= value <= MAX_DIMENSION and value == int(value)):
                raise UserError(f"{where}{name} = {value}: must be a whole number from 1 to {MAX_DIMENSION}.")
        if (self.height is None) != (self.width is None):
            missing = "height" if self.height is None else "width"
            raise UserError(f"{where}{missing} is missing: give both height and width, or neither.")
        if self.fps is not None and not 0.01 <= self.fps <= 1000:
            raise UserError(f"{where}fps = {self.fps}: must be from 0.01 to 1000 frames per second.")
        for name in ("guidance_scale", "refine_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"{where}{name} = {value}: must be at least 0; 1 is no guidance.")
        for name, choices in (
            ("guidance_schedule", get_args(GuidanceSchedule)),
            ("solver", get_args(Solver)),
        ):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserError(f"{where}{name} = {value}: must be one of {', '.join(choices)}.")
        if isinstance(self.cache, str):
            right = self.cache in get_args(Cache)
        else:
            right = self.cache is None or 0 < self.cache < 1
        if not right:
            raise UserError(
                f"{where}cache = {self.cache}: must be {', '.join(get_args(Cache))}, or a threshold between 0 and 1: "
                "larger ones skip more steps, off skips none."
            )
        self._check_pab(where)
        interval = self.guidance_interval
        shown = list(interval) if isinstance(interval, tuple) else interval
        if shown is not None and not (
            isinstance(shown, list) and len(shown) == 2 and 0 <= shown[0] < shown[1] <= 1
        ):
            raise UserError(
                f"{where}guidance_interval = {shown}: must be two rising noise levels from 0 to 1."
            )
        if self.guidance_rescale is not None and not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"{where}guidance_rescale = {self.guidance_rescale}: must be from 0 to 1.")
        if self.shift is not None and not 0 < self.shift < float("inf"):
            raise UserError(f"{where}shift = {self.shift}: must be above 0; 1 is no shift.")
        pairs = self.refine_pairs
        if pairs is not None and not (0 <= pairs <= MAX_DIMENSION and pairs == int(pairs)):
            raise UserError(
                f"{where}refine_pairs = {pairs}: must be a whole number from 0 (none) to {MAX_DIMENSION}."
            )
        if self.refine_level is not None and not 0 < self.refine_level < 1:
            raise UserError(
                f"{where}refine_level = {self.refine_level}: must be between 0 (video) and 1 (noise)."
            )

    def _check_pab(self, where: str) -> None:
        pab, between = self.pab, self.pab_timesteps
        if pab is not None and not (
            isinstance(pab, list | tuple)
            and len(pab) in (0, 3, 4)
            and all(1 <= one <= MAX_DIMENSION and one == int(one) for one in pab)
        ):
            raise UserError(
                f"{where}pab = {pab}: must be for how many steps spatial, temporal and cross attention are used, and "
                "optionally MLPs, each at least 1, such as [2,4,6]; [] for none."
            )
        if between is not None and not (
            isinstance(between, list | tuple) and len(between) == 2 and 0 <= between[0] < between[1] <= 1000
        ):
            shown = list(between) if isinstance(between, tuple) else between
            raise UserError(f"{where}pab_timesteps = {shown}: must be two rising timesteps from 0 to 1000.")

    def check_used(
        self, resolved: Mapping[str, Any], negative_prompt: str | None = None, where: str = ""
    ) -> None:
        """Raise UserError for a setting that has no effect beside the others.

        Args:
            resolved: all settings of the call, see `resolved`.
        """
        schedule, scale = resolved["guidance_schedule"], resolved["guidance_scale"]
        for name in ("refine_level", "refine_guidance_scale"):
            if getattr(self, name) is not None and not resolved["refine_pairs"]:
                raise UserError(
                    f"{where}{name} = {getattr(self, name)} would have no effect: refine_pairs = 0 is no refinement: "
                    "add refine_pairs, such as 3, or leave it out."
                )
        refined = guides_refinement(resolved)
        needs_guidance = {
            "negative_prompt": None if refined else negative_prompt,
            "guidance_schedule": None if self.guidance_schedule == "constant" else self.guidance_schedule,
            "guidance_rescale": None if refined else self.guidance_rescale or None,
        }
        unused = [f"{name} = {value!r}" for name, value in needs_guidance.items() if value is not None]
        if scale == 1 and unused:
            raise UserError(
                f"{where}{' and '.join(unused)} would have no effect: guidance_scale = 1 is no guidance: use another "
                "scale, such as 4, or leave the others out."
            )
        if self.guidance_interval is not None and schedule != "interval":
            raise UserError(
                f"{where}guidance_interval is for guidance_schedule = interval, not {schedule}: add that, or "
                "leave the interval out."
            )

    def check_saving(self, resolved: Mapping[str, Any], where: str = "") -> None:
        """Raise UserError for settings of cache and pab that contradict each other or have no effect.

        Args:
            resolved: all settings of the call.
        """
        pab, cache, steps = resolved["pab"], resolved["cache"], resolved["num_inference_steps"]
        if self.pab_timesteps is not None and not pab:
            raise UserError(
                f"{where}pab_timesteps = {list(self.pab_timesteps)} would have no effect: pab is not set: add it, "
                "such as [2, 4, 6], or leave this out."
            )
        if pab and cache != "off":
            raise UserError(
                f"{where}pab = {pab} and cache = {cache}: videos that skip steps cannot use attention of the same "
                "steps again: set cache to off, or pab to []."
            )
        if pab and max(pab) > steps:
            raise UserError(
                f"{where}pab = {pab}: would never be refreshed in {steps} steps: use smaller numbers."
            )
        if self.cache not in (None, "off") and steps <= 4 and resolved["solver"] != "heun":
            raise UserError(
                f"{where}cache = {self.cache} would have no effect in {steps} steps, since the first three and the "
                "last are computed: leave it out, or use more num_inference_steps."
            )

    def check_guidance(
        self,
        resolved: Mapping[str, Any],
        takes: Sequence[float] | None,
        negative_prompt: Any = None,
        where: str = "",
    ) -> None:
        """Raise UserError for settings of guidance that a model cannot follow which takes the scale as an input.

        Args:
            resolved: all settings of the call.
            takes: the range of scales; None: a model that takes none, and can follow all.
        """
        if takes is None:
            return
        unused = [
            name
            for name, value in (
                ("negative_prompt", negative_prompt),
                ("guidance_rescale", resolved["guidance_rescale"]),
            )
            if value
        ]
        if unused:
            raise UserError(
                f"{where}{' and '.join(unused)} cannot be followed: this model takes the guidance scale as an input, "
                "and computes nothing without the prompt: leave it out, or use the model that it learned from."
            )
        scale, schedule = resolved["guidance_scale"], resolved["guidance_schedule"]
        extremes = {"constant": [scale], "linear": [1, 2 * scale - 1]}.get(schedule, [1, scale])
        what = (
            "guidance_scale"
            if schedule == "constant"
            else f"guidance_schedule = {schedule} has guidance_scale"
        )
        check_scales(extremes, takes, where + what)
        if resolved["refine_pairs"]:
            check_scales([resolved["refine_guidance_scale"]], takes, f"{where}refine_guidance_scale")

    def resolved(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings by name; those that are None here are taken from ``defaults``."""
        own = {name: getattr(self, name) for name in VIDEO_SETTINGS}
        return {name: defaults[name] if value is None else value for name, value in own.items()}


LISTS = ("guidance_interval", "pab", "pab_timesteps")
"""Settings that are several numbers."""
VIDEO_SETTINGS = tuple(f.name for f in fields(VideoSettings))
"""Names of the settings of a pipeline call."""
PIPELINE_DEFAULTS: dict[str, Any] = {f.name: f.metadata["pipeline_default"] for f in fields(VideoSettings)}
"""Settings of a new pipeline for which none are passed."""


def check_scales(scales: Iterable[float], takes: Sequence[float], what: str = "guidance_scale") -> None:
    """Raise UserError for a guidance scale outside of the range that a model takes as an input."""
    low, high = takes
    for scale in scales:
        if not low <= scale <= high:
            raise UserError(
                f"{what} = {scale:g}: this model takes the scale as an input, and learned {low:g} to {high:g}: use "
                "one of these, or the model that it learned from."
            )


_OF_DIFFUSERS = ("cache_dir",)
"""Options of diffusers whose names are almost those of settings."""
_ELSEWHERE = {
    name: "the noise levels are those of num_inference_steps, shift and solver, or of the pipeline's scheduler."
    for name in ("sigmas", "timesteps")
}
"""Arguments of other pipelines of diffusers, and what has their effect here."""


def guides_refinement(resolved: Mapping[str, Any]) -> bool:
    """Return whether a call with these settings, all of them resolved, refines its videos with guidance."""
    return bool(resolved["refine_pairs"]) and resolved["refine_guidance_scale"] != 1


def check_recorded(recorded: Any, where: str) -> None:
    """Raise UserError for a recorded setting of a pipeline that has a wrong type or breaks its rule."""
    if not isinstance(recorded, Mapping):
        raise UserError(f"{where}its settings of the pipeline are no JSON object: {recorded!r:.200}.")
    VideoSettings(**{name: recorded[name] for name in VIDEO_SETTINGS if name in recorded}).check(where)


def check_keywords(function: Callable[..., Any], keywords: Iterable[str]) -> None:
    """Raise TypeError for a keyword that is almost a setting of a pipeline."""
    for name in keywords:
        if name not in (*VIDEO_SETTINGS, *_OF_DIFFUSERS) and (nearest := nearest_name(name, VIDEO_SETTINGS)):
            raise TypeError(f"{function.__qualname__}() has no argument {name!r}: did you mean {nearest!r}?")


def video_settings(function: Callable[..., Any], keywords: Mapping[str, Any]) -> VideoSettings:
    """Return the settings among the ``**settings`` of a function.

    Raises:
        TypeError: for an unknown keyword, naming the nearest argument of the function.
    """
    for name in keywords:
        if name not in VIDEO_SETTINGS:
            arguments = [
                argument for argument in inspect.signature(function).parameters if argument != "self"
            ]
            nearest = nearest_name(name, arguments)
            hint = f"did you mean {nearest!r}?" if nearest else f"use {', '.join(arguments)}."
            hint = _ELSEWHERE.get(name, hint)
            raise TypeError(f"{function.__qualname__}() has no argument {name!r}: {hint}")
    return VideoSettings(**keywords)


def list_settings(defaults: Mapping[str, Any]) -> Callable[[Function], Function]:
    """Decorate a function so that its signature lists the settings instead of ``**settings``.

    diffusers reads the settings of a pipeline off the signature of its ``__init__``, and `help` shows it.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        listed = [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=defaults[f.name], annotation=f.type
            )
            for f in fields(VideoSettings)
        ]
        function.__annotations__ = {
            **function.__annotations__,
            **{f.name: f.type for f in fields(VideoSettings)},
        }
        function.__signature__ = signature.replace(parameters=[*named, *listed])  # type: ignore[attr-defined]
        return function

    return decorate


@dataclass
class PromptSettings(VideoSettings):
    """Settings that one prompt may have of its own. None or empty: not set."""

    negative_prompt: str = ""
    """What the video should not show (needs guidance_scale other than 1)."""
    image: str | None = None
    """Picture for the first frame."""
    condition: list[str] = field(default_factory=list)
    """Conditioning frames, FILE@frame[:length][:strength], repeatable: the frame at which a picture or video begins
    (-1: the last), how many of its frames to use, and how strictly to keep them (below 1 they are partly
    regenerated)."""
    lora: list[str] = field(default_factory=list)
    """Adapters, FILE[:weight], repeatable: a file (of stdit, diffusers, kohya or ComfyUI), and the factor of what it
    adds (1)."""
    reference_path: str | None = None
    """Files that mask_strategy refers to, separated by ;."""
    mask_strategy: str | None = None
    """Conditioning frames in Open-Sora's notation, in latent frames: segment,reference,start in the
    reference,start,length,edit ratio; entries are separated by ;."""
    segment_prompts: list[str] = field(default_factory=list)
    """Prompts of the segments after the first, repeatable: for a video longer than num_frames."""
    segments: int | None = None
    """Segments of the video, each num_frames long; none: one per prompt. Segments without a prompt use the last
    one."""
    overlap: int | None = None
    """Frames that each segment shares with the previous one; none: about a quarter of num_frames, in whole latent
    frames."""
    loop: bool | None = None
    """Make the last segment end where the first begins, so that the video loops."""


PROMPT_SETTINGS = tuple(f.name for f in fields(PromptSettings))


@dataclass
class SampleConfig(PromptSettings):
    """Generate videos from prompts."""

    checkpoint: str | None = None
    """A run folder (outputs/NAME), one of its checkpoints, or an exported pipeline; none: the small model that comes
    with stdit."""
    lora_other_base: bool = False
    """Also use adapters that were trained on other weights than the checkpoint's."""
    imports: list[str] = field(default_factory=list)
    """Module of your own to import, which registers what the checkpoint was made with; may be repeated."""
    prompt: list[str] = field(default_factory=list, metadata={"verbatim": True})
    """What the video shows, used verbatim; repeatable, for a video each. Or use --prompts."""
    prompts: str | None = None
    """File of prompts: .txt (one per line), or .csv or .jsonl (prompts with settings of their own)."""
    aesthetic: float | None = None
    """Append "aesthetic score: 6.5." to the prompts, for models trained with such captions."""
    motion: float | None = None
    """Append "motion score: 5."."""
    camera: str | None = None
    """Append "camera motion: pan left."."""
    resolution: str | None = None
    """Named size, such as 240p; needs aspect_ratio."""
    aspect_ratio: str | None = None
    """Width:height, such as 16:9."""
    seed: int = 0
    """Seed of the first sample of each prompt; the same seed gives the same video."""
    num_samples: int = 1
    """Videos per prompt, with seeds seed, seed + 1, ..."""
    seeds: list[int] | None = None
    """Explicit list of seeds, instead of seed and num_samples."""
    output: str | None = None
    """Output folder; none: samples/prompts in the run folder, or outputs/samples."""
    format: Format | list[Format] = field(default_factory=lambda: ["mp4", "png"])
    """mp4 and gif: one file per video; png: one contact sheet of all videos."""
    batch_size: int = 8
    """Maximum number of videos generated at once."""
    text_states: str | None = None
    """Folder of encoded prompts (scripts/encode_text.py), used instead of loading the text encoder."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the transformer."""
    compile: bool = False
    """Compile the blocks of the model with torch.compile: slow to start, for many videos or steps; what it costs and
    gives is measured and printed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if available."""
    codec: DecodingConfig = field(default_factory=DecodingConfig)
    """How latents become videos."""
    parallel: SamplingParallelConfig = field(default_factory=SamplingParallelConfig)
    """How several processes share the work."""
    calibrate: bool = False
    """Instead of writing videos, make them with several thresholds of cache, and print what each saves and changes; a
    few prompts are enough."""
    dry_run: bool | int = False
    """true: print the model calls, the bytes that processes send and the memory that the videos take, and stop; no
    prompt is needed. A number: as if this many processes were started."""
    list_sizes: bool = False
    """Print the named sizes and lengths for this checkpoint, and exit."""

    def __post_init__(self) -> None:
        self.prompt = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        self.check()
        for name in ("batch_size", "num_samples"):
            if not 1 <= getattr(self, name) <= MAX_DIMENSION:
                raise UserError(f"{name} = {getattr(self, name)}: must be from 1 to {MAX_DIMENSION}.")
        if self.seeds is not None and not self.seeds:
            raise UserError("seeds = []: give at least one, or leave it out.")
        for name, default in (("seed", 0), ("num_samples", 1)):
            if self.seeds is not None and getattr(self, name) != default:
                raise UserError(
                    f"both seeds and {name} are set: remove one of them; seeds lists all of them."
                )
        if self.calibrate and (self.pab or self.cache is not None):
            raise UserError(
                "calibrate tries thresholds of cache one after the other: leave cache and pab out beside it."
            )
        if type(self.dry_run) is int and not 1 <= self.dry_run <= MAX_DIMENSION:
            raise UserError(
                f"dry_run = {self.dry_run}: must be true, or a number of processes from 1 to {MAX_DIMENSION}."
            )
        if self.calibrate and self.dry_run is not False:
            raise UserError("calibrate makes videos and dry_run makes none: leave one of them out.")
        if self.resolution is not None and self.height is not None:
            raise UserError("both resolution and height/width are set: remove one of them.")
        if self.aspect_ratio is not None and self.resolution is None:
            raise UserError(
                f"aspect_ratio = {self.aspect_ratio} without a resolution: add --resolution, such as 240p."
            )
        if self.resolution is not None and self.aspect_ratio is None:
            raise UserError(
                f"resolution = {self.resolution} without an aspect_ratio: add --aspect_ratio (width:height), such "
                "as 16:9 or 1:1."
            )
        chooses_grid = self.parallel.sp != 1 and self.parallel.grid == "auto"
        for name, need, has_it in (
            ("overlap_chunks", "parallel.sp above 1", self.parallel.sp != 1),
            *(
                (name, "parallel.sp above 1 without parallel.grid", chooses_grid)
                for name in ("link_gbit", "latency_us", "tflops")
            ),
        ):
            value = getattr(self.parallel, name)
            if value != getattr(SamplingParallelConfig, name) and not has_it:
                raise UserError(f"parallel.{name} = {value} is for {need}: add that, or leave it out.")
        if not self.formats():
            raise UserError("format = []: name at least one of mp4, gif and png.")
        for seed in self.all_seeds(None):
            check_seed(seed)

    def scores(self) -> str:
        """Return the scores to append to each prompt, with a leading space."""
        return score_suffix({name: getattr(self, name) for name in CAPTION_SCORES})

    def formats(self) -> list[Format]:
        return [self.format] if isinstance(self.format, str) else list(self.format)

    def all_seeds(self, line_seed: int | None) -> list[int]:
        """Return the seeds of one prompt; ``line_seed`` is the first one if its line sets it."""
        if line_seed is None and self.seeds is not None:
            return list(self.seeds)
        first = self.seed if line_seed is None else line_seed
        return list(range(first, first + self.num_samples))


def check_seed(seed: int, where: str = "") -> None:
    """Raise UserError for a seed that torch would reject."""
    if not 0 <= seed < 2**63:
        raise UserError(f"{where}seed = {seed}: must be from 0 to 2^63 - 1.")
