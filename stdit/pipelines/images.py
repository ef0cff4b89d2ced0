"""Images as conditioning frames: conversion, scaling and cropping."""

import logging

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stdit.data.decoding.decode import upright_rgb
from stdit.errors import UserError

Image = PIL.Image.Image | np.ndarray | Tensor

logger = logging.getLogger(__name__)


def image_to_frame(image: Image, height: int, width: int) -> Tensor:
    """Convert an image to one frame ``[3 1 H W]`` in [-1, 1], scaled and centre-cropped to height and width.

    Warns if the size differs.

    Args:
        image: a PIL image; an array ``[H W 3]`` or ``[H W]``, uint8 or in [0, 1]; or a tensor ``[3 H W]`` in
            [-1, 1].

    Raises:
        UserError: for anything else.
    """
    return resize_and_crop(_to_tensor(image)[:, None], height, width)


def resize_and_crop(video: Tensor, height: int, width: int) -> Tensor:
    """Scale and centre-crop frames ``[3 T H W]`` in [-1, 1] to height and width; warn if the size differs."""
    rows, columns = video.shape[2:]
    if (rows, columns) == (height, width):
        return video
    warn_if_resized("image", rows, columns, height, width)
    scale = max(height / rows, width / columns)
    size = [max(height, round(rows * scale)), max(width, round(columns * scale))]
    frames = interpolate(video.transpose(0, 1), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames.transpose(0, 1)[:, :, top : top + height, left : left + width]


def warn_if_resized(what: str, rows: int, columns: int, height: int, width: int) -> None:
    """Log a warning if a picture or video has another size than the generated video."""
    if (rows, columns) != (height, width):
        logger.warning("%s: %dx%d pixels, scaled and cropped to %dx%d", what, columns, rows, width, height)


def _to_tensor(image: Image) -> Tensor:
    if isinstance(image, PIL.Image.Image):
        image = np.array(upright_rgb(image))
    if isinstance(image, np.ndarray):
        levels = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
        levels = np.stack([levels] * 3, -1) if levels.ndim == 2 else levels
        image = torch.from_numpy(levels).movedim(-1, 0) * 2 - 1
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise UserError(f"image is {shape}: must be a PIL image, an array [H W 3] or a tensor [3 H W].")
    image = image.float()
    if not (image.min() >= -1.001 and image.max() <= 1.001):
        raise UserError(
            f"image has values from {image.min():.3g} to {image.max():.3g}: a tensor must be in [-1, 1], "
            "an array uint8 or in [0, 1]."
        )
    return image
