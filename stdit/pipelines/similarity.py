"""How alike two videos are, pixel by pixel: PSNR and SSIM.

Letters: N videos, C channels, T frames, H height, W width.
"""

import torch
from torch import Tensor

HIGHEST = 100.0
"""PSNR of equal videos, in dB."""
WINDOW, DEVIATION = 11, 1.5
"""Width of the Gaussian window of SSIM and its standard deviation, in pixels."""


def psnr(videos: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each video, ``[N]``, in dB, at most `HIGHEST`.

    Args:
        videos: in [0, 1], ``[N C T H W]``, as ``others``.
    """
    error = (videos - others).double().square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=HIGHEST)


def ssim(videos: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity of each video, ``[N]``, the mean over channels, frames and pixels.

    Wang et al. 2004 (Image quality assessment: from error visibility to structural similarity), equation 13, with
    constants for the range [0, 1]; only where the window lies inside a frame.

    Args:
        videos: in [0, 1], ``[N C T H W]``, as ``others``; frames are at least 11 pixels high and wide.
    """
    places = torch.arange(WINDOW, dtype=torch.double) - WINDOW // 2
    line = (-(places**2) / (2 * DEVIATION**2)).exp()
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    x, y = (each.double().movedim(2, 1).flatten(0, 2)[:, None] for each in (videos, others))  # [NTC 1 H W]

    def mean(values: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(values, window)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found = alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return found.unflatten(0, (len(videos), -1)).flatten(1).mean(1)
