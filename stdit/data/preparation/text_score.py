"""The score `text`: how well a caption fits its clip, by a CLIP-like model of transformers.

The cosine similarity of caption and frame, times 100, mean over frames (CLIPScore without its factor 2.5: Hessel et
al. 2021, https://arxiv.org/abs/2104.08718, equation 1). Letters: T frames, H height, W width, B clips, C features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stdit.data.preparation.jobs import Outcome
from stdit.data.preparation.models import LoadedModel, ModelConfig, explain_memory, load_model
from stdit.data.preparation.table import TableRow
from stdit.errors import UserError

TEXT = "text"
"""Name of the score; the name of a column that has the caption."""
TEXT_COLUMN = "clip_score"
SEEN_FRAMES = 4
"""Frames of a clip that the model sees."""


def choose_frames(frames: np.ndarray) -> np.ndarray:
    """Return a few frames of uint8 [T H W 3], evenly spaced."""
    places = np.linspace(0, len(frames) - 1, min(SEEN_FRAMES, len(frames))).round().astype(int)
    return frames[places]


class TextScorer:
    """Computes the score of clips in batches."""

    def __init__(self, config: ModelConfig) -> None:
        """Load the model. Raises UserError."""
        self.config, self.loaded = config, load_model(config, _clip_class)

    def score(self, rows: Sequence[TableRow], values: Sequence[dict[str, Any]]) -> list[Outcome]:
        """Add the score to the other scores of clips; None for a row without a caption.

        Args:
            values: of each clip, its scores, and its frames uint8 [T H W 3] under `TEXT`.
        """
        captioned = [place for place, row in enumerate(rows) if row["text"]]
        scores: dict[int, float] = {}
        if captioned:
            clips = [values[place][TEXT] for place in captioned]
            with explain_memory(self.config.batch_size):
                made = self._similarities([rows[place]["text"] for place in captioned], clips)
            scores = dict(zip(captioned, made, strict=True))
        others = [{name: number for name, number in value.items() if name != TEXT} for value in values]
        return [Outcome({**other, TEXT_COLUMN: scores.get(place)}) for place, other in enumerate(others)]

    @torch.no_grad()
    def _similarities(self, texts: list[str], clips: Sequence[np.ndarray]) -> list[float]:
        """Return 100 x cosine of each caption with its clip, mean over frames."""
        loaded = self.loaded
        # SigLIP was trained on captions padded to its full length.
        padding = "max_length" if "siglip" in loaded.model.config.model_type else True
        tokens = loaded.tokenizer(
            texts, padding=padding, truncation=True, max_length=_positions(loaded), return_tensors="pt"
        )
        known = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
        tokens = type(tokens)(known).to(loaded.model.device)
        images = [Image.fromarray(frame) for clip in clips for frame in clip]
        pixels = loaded.moved(loaded.image_processor(images=images, return_tensors="pt"))
        text = _features(loaded.model.get_text_features(**tokens))  # [B C]
        image = _features(loaded.model.get_image_features(**pixels))  # [frames of all clips, C]
        counts = [len(clip) for clip in clips]
        parts = zip(text, image.split(counts), strict=True)
        return [float(f"{100 * float((frames @ caption).mean()):.6g}") for caption, frames in parts]


def _features(output: Any) -> Tensor:
    """Return features float32 [N C] of length 1; newer versions of transformers give them inside an output."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _positions(loaded: LoadedModel) -> int:
    """Return the longest caption that the model reads, in tokens; longer ones are cut."""
    config = loaded.model.config
    text = getattr(config, "text_config", config)
    return min(getattr(text, "max_position_embeddings", 512), loaded.tokenizer.model_max_length)


def _clip_class(config: Any) -> Any:
    """Return the class of a CLIP-like model. Raises UserError if it does not compare images with texts."""
    from transformers import AutoModel

    found = AutoModel._model_mapping[type(config)] if type(config) in AutoModel._model_mapping else None
    if not all(hasattr(found, name) for name in ("get_text_features", "get_image_features")):
        raise UserError(
            f"--model: a model of type {config.model_type} does not compare images with texts: name one such as "
            "CLIP or SigLIP, with get_text_features and get_image_features"
        )
    return AutoModel
