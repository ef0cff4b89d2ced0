"""Pictures given as first frames."""

import logging
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stdit.errors import UserError

Image = PIL.Image.Image | np.ndarray | Tensor

logger = logging.getLogger(__name__)


def open_image(path: str | Path) -> PIL.Image.Image:
    """Read a picture from a file, upright and RGB. Raises UserError if it is not one."""
    if not Path(path).is_file():
        raise UserError(f"image {path}: there is no such file.")
    try:
        with PIL.Image.open(path) as image:
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UserError(
            f"image {path} cannot be read ({error}): give a whole PNG, JPEG or WebP picture."
        ) from None


def first_frames(image: Image, height: int, width: int) -> Tensor:
    """A picture as one frame ``[3 1 H W]`` in [-1, 1], scaled and centre-cropped to that many pixels.

    Takes a PIL image; an array ``[H W 3]`` or ``[H W]``, uint8 or in [0, 1]; or a tensor ``[3 H W]`` in
    [-1, 1]. Says so when the size differs. Raises UserError for anything else.
    """
    picture = _to_tensor(image)  # [3 H W]
    if picture.shape[1:] != (height, width):
        logger.warning(
            "image is %dx%d pixels: scaled and cropped to %dx%d",
            picture.shape[2],
            picture.shape[1],
            width,
            height,
        )
        scale = max(height / picture.shape[1], width / picture.shape[2])
        size = [max(height, round(picture.shape[1] * scale)), max(width, round(picture.shape[2] * scale))]
        picture = interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        picture = picture[:, top : top + height, left : left + width]
    return picture[:, None]


def _to_tensor(image: Image) -> Tensor:
    if isinstance(image, PIL.Image.Image):
        image = np.array(image.convert("RGB"))
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
