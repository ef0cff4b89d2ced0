"""Settings of ``sample.py``, and the rules for what a video may be asked to be. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from stdit.data.decoding.limits import MAX_DIMENSION
from stdit.data.manifest.caption_scores import CAPTION_SCORES, score_suffix
from stdit.errors import UserError
from stdit.parallel.config import SamplingParallelConfig

Format = Literal["mp4", "gif", "png"]
GuidanceSchedule = Literal["constant", "linear", "interval", "oscillating"]


@dataclass
class VideoSettings:
    """Settings of one call of the pipeline. None: as the pipeline was trained, or as it samples best."""

    num_frames: int | None = None
    """Length in frames."""
    height: int | None = None
    """Height in pixels (with width; or use resolution and aspect_ratio)."""
    width: int | None = None
    """Width in pixels."""
    fps: float | None = None
    """Frames per second."""
    num_inference_steps: int | None = None
    """Euler steps from noise to video."""
    guidance_scale: float | None = None
    """1 follows the prompt as trained; more follows it harder, at twice the cost."""
    guidance_schedule: GuidanceSchedule | None = None
    """How guidance changes from step to step: constant; linear, rising from none; interval, only at noise levels in
    guidance_interval; oscillating, in every second step."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels between which the schedule interval guides, such as [0.2, 0.8]; 1 is noise, 0 the video."""
    guidance_rescale: float | None = None
    """0 to 1: how far guidance may not raise contrast; about 0.7 tames scales above 7."""
    shift: float | None = None
    """Moves the steps towards noise (above 1) or detail (below 1); none: by the size and length."""

    def check(self, where: str = "") -> None:
        """Raise UserError, naming value, rule and way out, for what no model could follow."""
        for name in ("num_frames", "height", "width", "num_inference_steps"):
            value = getattr(self, name)
            whole = value is None or (1 <= value <= MAX_DIMENSION and value == int(value))
            if not whole or isinstance(value, bool):
                raise UserError(f"{where}{name} = {value}: must be a whole number from 1 to {MAX_DIMENSION}.")
        if (self.height is None) != (self.width is None):
            missing = "height" if self.height is None else "width"
            raise UserError(f"{where}{missing} is missing: give both height and width, or neither.")
        if self.fps is not None and not 0.01 <= self.fps <= 1000:
            raise UserError(f"{where}fps = {self.fps}: must be from 0.01 to 1000 frames per second.")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < float("inf"):
            raise UserError(
                f"{where}guidance_scale = {self.guidance_scale}: must be at least 0; 1 is no guidance."
            )
        schedules = get_args(GuidanceSchedule)
        if self.guidance_schedule is not None and self.guidance_schedule not in schedules:
            raise UserError(
                f"{where}guidance_schedule = {self.guidance_schedule}: must be one of {', '.join(schedules)}."
            )
        interval = self.guidance_interval
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1):
            raise UserError(
                f"{where}guidance_interval = {list(interval)}: must be two rising noise levels from 0 to 1."
            )
        if self.guidance_rescale is not None and not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"{where}guidance_rescale = {self.guidance_rescale}: must be from 0 to 1.")
        if self.shift is not None and not 0 < self.shift < float("inf"):
            raise UserError(f"{where}shift = {self.shift}: must be above 0; 1 is no shift.")


SETTINGS = tuple(f.name for f in fields(VideoSettings))


@dataclass
class PromptSettings(VideoSettings):
    """What can be said of one prompt. None, or empty: not set."""

    negative_prompt: str = ""
    """What to lead away from (needs guidance_scale other than 1)."""
    image: str | None = None
    """A picture that becomes the first frame."""
    condition: list[str] = field(default_factory=list)
    """Given frames, FILE@frame[:length][:strength], one flag each: where a picture or video stands in the video
    (frame -1: the last), how many of its frames, and how strictly (below 1 they are partly made anew)."""
    reference_path: str | None = None
    """Files for mask_strategy, with ; between them."""
    mask_strategy: str | None = None
    """Given frames as Open-Sora writes them, counted in latent frames: part,reference,start in it,start,length,edit
    ratio; and so on."""
    then: list[str] = field(default_factory=list)
    """Prompts of the parts that follow the first, one flag each: for a video longer than num_frames."""
    parts: int | None = None
    """Parts of the video, each num_frames long; none: one for each prompt. The last prompt holds for all further
    ones."""
    overlap: int | None = None
    """Frames that a part is given from the one before; none: about a quarter of num_frames,
    in whole latent frames."""
    close: bool | None = None
    """Let the last part lead back to the first frame, for a video that can be played in a loop."""


PROMPT_SETTINGS = tuple(f.name for f in fields(PromptSettings))


@dataclass
class SampleConfig(PromptSettings):
    """Generate videos from prompts."""

    checkpoint: str = ""
    """A run folder (outputs/NAME), one of its checkpoints, or an exported pipeline."""
    prompt: str = ""
    """What to show, taken as it stands; several prompts go into a file."""
    prompts: str | None = None
    """A file of prompts: .txt (one a line), or .csv or .jsonl (prompt, and settings of its own)."""
    aesthetic: float | None = None
    """Adds "aesthetic score: 6.5." to the prompts, for models that were trained with such captions."""
    motion: float | None = None
    """Adds "motion score: 5."."""
    camera: str | None = None
    """Adds "camera motion: pan left."."""
    resolution: str | None = None
    """Size by name, such as 240p, with aspect_ratio."""
    aspect_ratio: str | None = None
    """Width to height, such as 16:9."""
    seed: int = 0
    """Seed of the first sample of every prompt; the same seed gives the same video."""
    num_samples: int = 1
    """Videos a prompt, with seeds seed, seed + 1, ..."""
    seeds: list[int] | None = None
    """The seeds themselves, instead of seed and num_samples."""
    output: str | None = None
    """Folder for the videos; none: samples/prompts in the run folder, or outputs/samples."""
    format: Format | list[Format] = field(default_factory=lambda: ["mp4", "png"])
    """mp4 and gif: one a video; png: one contact sheet of all."""
    batch_size: int = 8
    """Most videos at once."""
    text: str | None = None
    """Folder of text states of all prompts (scripts/encode_text.py), so that no text encoder is loaded."""
    ema: bool = True
    """Use the averaged weights of a checkpoint."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the transformer."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""
    parallel: SamplingParallelConfig = field(default_factory=SamplingParallelConfig)
    """Several processes."""
    list_sizes: bool = False
    """Only print which sizes and lengths have a name, and what they are for this checkpoint."""

    def __post_init__(self) -> None:
        self.check()
        for name in ("batch_size", "num_samples"):
            if not 1 <= getattr(self, name) <= MAX_DIMENSION:
                raise UserError(f"{name} = {getattr(self, name)}: must be from 1 to {MAX_DIMENSION}.")
        if self.seeds is not None and not self.seeds:
            raise UserError("seeds = []: give at least one, or leave it out.")
        if self.resolution is not None and self.height is not None:
            raise UserError("both resolution and height/width are given: leave one of them out.")
        if self.aspect_ratio is not None and self.resolution is None:
            raise UserError(
                f"aspect_ratio = {self.aspect_ratio} without a resolution: add --resolution, such as 240p."
            )
        if self.resolution is not None and self.aspect_ratio is None:
            raise UserError(
                f"resolution = {self.resolution} without an aspect_ratio: add --aspect_ratio (width:height), such "
                "as 16:9 or 1:1."
            )
        if not self.formats():
            raise UserError("format = []: name at least one of mp4, gif and png.")
        for seed in self.all_seeds(None):
            check_seed(seed)

    def scores(self) -> str:
        """What is added to the prompts, with a space before it."""
        return score_suffix({name: getattr(self, name) for name in CAPTION_SCORES})

    def formats(self) -> list[Format]:
        return [self.format] if isinstance(self.format, str) else list(self.format)

    def all_seeds(self, line_seed: int | None) -> list[int]:
        """Seeds of one prompt, whose own line may set the first."""
        if line_seed is None and self.seeds is not None:
            return list(self.seeds)
        first = self.seed if line_seed is None else line_seed
        return list(range(first, first + self.num_samples))


def check_seed(seed: int, where: str = "") -> None:
    """Raise UserError for a seed that torch would refuse."""
    if not 0 <= seed < 2**63:
        raise UserError(f"{where}seed = {seed}: must be from 0 to 2^63 - 1.")
