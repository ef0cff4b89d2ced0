"""`caption`: captions by a model of transformers, from frames that are spread over the clip.

Letters: T frames, H height, W width.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from stdit.codecs.loading import quiet
from stdit.data.decoding.decode import decode_clip
from stdit.data.preparation.flow import (
    BatchStage,
    ClipRecord,
    RowResult,
    Task,
    process_clips,
    write_results,
)
from stdit.data.preparation.jobs import Outcome
from stdit.data.preparation.models import LoadedModel, ModelConfig, explain_memory, load_model
from stdit.data.preparation.table import REFUSED, Table, TableRow
from stdit.errors import UserError

CHAT_TEMPLATE = "Describe what happens in this video, in one to three sentences."
"""Default prompt of models that chat; other models get none."""
CAPTION_MODELS = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM")
"""Classes of transformers that choose a model by its config; not every version has all of them."""
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class CaptionConfig:
    """What the model sees, and how long its captions may be."""

    model: ModelConfig
    template: str | None = None
    """Prompt; {name} stands for a column of the row. None: CHAT_TEMPLATE for models that chat, else none."""
    frames: int = 8
    """At most, spread evenly over the clip; a model that takes one image gets the middle one."""
    side: int = 448
    """Pixels of the longer side of the frames; a smaller clip is not enlarged."""
    max_new_tokens: int = 128
    replace: bool = False
    """Also replace the captions that rows have."""

    def validate(self, columns: Sequence[str]) -> None:
        """Raise UserError if a setting is out of range, or the template names no column."""
        self.model.validate()
        for name in ("frames", "side", "max_new_tokens"):
            value = getattr(self, name)
            if not 1 <= value <= 4096:
                raise UserError(f"--{name} {value}: must be from 1 to 4096")
        for name in _FIELD.findall(self.template or ""):
            if name not in columns:
                near = difflib.get_close_matches(name, columns, 1)
                hint = f"did you mean {{{near[0]}}}?" if near else f"there are {', '.join(columns)}"
                raise UserError(f"--template: no column {name!r} for {{{name}}}: {hint}")


def caption_clips(task: Task, config: CaptionConfig) -> list[str]:
    """Write captions for the rows without one. Returns a summary; raises UserError."""
    table = task.open()
    config.validate(table.columns)
    wanted = [
        place for place, row in enumerate(table.rows) if config.replace or not row["text"] or row.get(REFUSED)
    ]
    made: list[Outcome] = []
    if wanted:
        made = _write_captions(task, table.with_columns([table.rows[place] for place in wanted], ()), config)
    outcomes = dict(zip(wanted, made, strict=True))
    results = []
    for place, row in enumerate(table.rows):
        outcome = outcomes.get(place, Outcome(row["text"]))
        rows = [] if outcome.reason else [{**row, "text": outcome.value}]
        results.append(RowResult(row, rows, outcome.reason))
    lines = write_results(task, table, results)
    written = sum(outcome.reason is None for outcome in made)
    return [*lines, f"{written} captions written by {config.model.path}, {len(table.rows) - len(made)} kept"]


def _write_captions(task: Task, table: Table, config: CaptionConfig) -> list[Outcome]:
    """Return the outcome of each row: its caption."""
    captioner = Captioner(load_model(config.model, _caption_class), config.max_new_tokens)
    template = config.template
    if template is None:
        template = CHAT_TEMPLATE if captioner.chats else ""

    def prompt(row: TableRow) -> str:
        return _FIELD.sub(lambda match: str(row.get(match[1]) or ""), template)

    def caption(rows: Sequence[TableRow], clips: Sequence[np.ndarray]) -> list[Outcome]:
        return _caption_batch(captioner, clips, [prompt(row) for row in rows], config.model.batch_size)

    settings = (config.model.path, config.model.dtype, config.frames, config.side, config.max_new_tokens)
    work = partial(spread_frames, count=config.frames, side=config.side)
    stage = BatchStage(caption, config.model.batch_size, prompt)
    return process_clips(task, table, work, settings, "caption", stage)


def _caption_batch(
    captioner: "Captioner", clips: Sequence[np.ndarray], prompts: Sequence[str], batch_size: int
) -> list[Outcome]:
    """Return captions; if a batch fails, each clip is tried alone, so that only the cause is lost."""
    try:
        with explain_memory(batch_size):
            captions = captioner.write(clips, prompts)
    except UserError:
        raise
    except Exception as error:
        if len(clips) == 1:
            return [Outcome(reason=f"captioning failed: {type(error).__name__}: {error}", is_final=False)]
        pairs = zip(clips, prompts, strict=True)
        return [
            made for clip, text in pairs for made in _caption_batch(captioner, [clip], [text], batch_size)
        ]
    return [Outcome(text) if text else Outcome(reason="the model's caption is empty") for text in captions]


def spread_frames(record: ClipRecord, count: int, side: int) -> np.ndarray:
    """Decode frames in the middle of `count` equal parts of a clip: uint8 [T H W 3]; fewer if it has fewer.

    Raises DecodeError and ExcludedError.
    """
    span = record.span()
    count = min(count, span.num_frames)
    interval = span.seconds / count
    start = 0.0 if span.is_still else span.start + interval / 2
    video = decode_clip(
        record.media, count, 1 / interval, *span.size(side), start=start, field_order=record.field_order
    )
    return video.permute(0, 2, 3, 1).numpy()


class Captioner:
    """A model that writes captions, greedily, so that the same clip gets the same caption."""

    def __init__(self, loaded: LoadedModel, max_new_tokens: int) -> None:
        self.loaded, self.max_new_tokens = loaded, max_new_tokens
        processor, tokenizer = loaded.processor, loaded.tokenizer
        self.chats = processor is not None and bool(
            getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        )
        """Whether the model takes a conversation, with any number of images, or a video."""
        tokenizer.padding_side = "left"  # so that all prompts of a batch end where the captions begin

    def write(self, clips: Sequence[np.ndarray], prompts: Sequence[str]) -> list[str]:
        """Return the captions of clips, each uint8 [T H W 3], for their prompts."""
        with quiet("transformers"):
            return self._write(clips, prompts)

    def _write(self, clips: Sequence[np.ndarray], prompts: Sequence[str]) -> list[str]:
        if self.chats:
            return self._generate(self._conversations(clips, prompts), prompts)
        captions: dict[int, str] = {}
        for prompt in dict.fromkeys(prompts):  # these models take no padded prompts
            places = [place for place, other in enumerate(prompts) if other == prompt]
            images = [Image.fromarray(clips[place][len(clips[place]) // 2]) for place in places]
            made = self._generate(self._images(images, prompt), [prompt] * len(places))
            captions |= dict(zip(places, made, strict=True))
        return [captions[place] for place in range(len(clips))]

    def _conversations(self, clips: Sequence[np.ndarray], prompts: Sequence[str]) -> Any:
        """Return the inputs of a model that chats: the frames as a video if it takes any, else as images."""
        processor, tokenizer = self.loaded.processor, self.loaded.tokenizer
        takes_video = getattr(processor, "video_processor", None) is not None
        texts = []
        for clip, prompt in zip(clips, prompts, strict=True):
            media = [{"type": "video"}] if takes_video else [{"type": "image"}] * len(clip)
            message = {"role": "user", "content": [*media, {"type": "text", "text": prompt}]}
            texts.append(processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
        # The template writes the first token itself, if it writes one.
        begins = bool(tokenizer.bos_token) and texts[0].startswith(tokenizer.bos_token)
        frames: dict[str, Any] = (
            # Video processors pair frames, and some refuse a single one.
            {"videos": [clip.repeat(2, axis=0) if len(clip) == 1 else clip for clip in clips]}
            | {"do_sample_frames": False}
            if takes_video
            else {"images": [[Image.fromarray(frame) for frame in clip] for clip in clips]}
        )
        return processor(
            text=texts, padding=True, add_special_tokens=not begins, return_tensors="pt", **frames
        )

    def _images(self, images: list[Image.Image], prompt: str) -> Any:
        """Return the inputs of a model that takes one image, and a prompt that may be empty."""
        if self.loaded.processor is not None:
            text = [prompt] * len(images) if prompt else None
            return self.loaded.processor(images=images, text=text, return_tensors="pt")
        inputs = self.loaded.image_processor(images=images, return_tensors="pt")
        if prompt:
            inputs.update(self.loaded.tokenizer([prompt] * len(images), return_tensors="pt"))
        return inputs

    @torch.no_grad()
    def _generate(self, inputs: Any, prompts: Sequence[str]) -> list[str]:
        moved: Mapping[str, Any] = self.loaded.moved(inputs)
        asked = moved.get("input_ids")
        given = None if asked is None else asked.clone()  # BLIP changes it
        tokens = self.loaded.model.generate(
            **moved, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
        )
        if given is not None and torch.equal(tokens[:, : given.shape[1]], given):
            tokens = tokens[:, given.shape[1] :]  # models with a decoder alone repeat the prompt
        texts = self.loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [_without_prompt(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]


def _without_prompt(text: str, prompt: str) -> str:
    """Return a caption on one line, without the prompt that some models begin it with."""
    text, prompt = " ".join(text.split()), " ".join(prompt.split())
    return text[len(prompt) :].strip() if prompt and text.lower().startswith(prompt.lower()) else text


def _caption_class(config: Any) -> Any:
    """Return the class of a model that writes text about images or videos. Raises UserError."""
    import transformers

    for name in CAPTION_MODELS:
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            return auto
    raise UserError(
        f"--model: a model of type {config.model_type} writes no captions: name one that transformers lists as "
        "image-text-to-text, image-to-text or video-to-text, such as BLIP, LLaVA or Qwen2.5-VL"
    )
