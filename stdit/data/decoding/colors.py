"""Convert HDR (PQ, HLG) and wide-gamut (BT.2020) frames to SDR of BT.709, which the models are trained on.

FFmpeg's `tonemap` needs linear light, which only filters outside PyAV's builds give (zscale, libplacebo), and its
scaler maps 10,000 cd/m2 to white, so that pictures come out grey. The formulas are these:

- from code values to light: SMPTE ST 2084 for PQ; for HLG, ITU-R BT.2100, table 5, on a display of 1000 cd/m2; for
  BT.2020 in SDR a power of 2.4 (BT.1886)
- from 1000 cd/m2 to SDR: the curve of ITU-R BT.2390, section 5.4.1, on the largest of R, G, B, which keeps hues; SDR
  white is 203 cd/m2, the white of HDR pages in BT.2408
- to BT.709: the linear matrix between the primaries, clipped (BT.2407, section 2), and the inverse of BT.1886

One curve serves all clips: a light at the camera has the same value in every frame, rank and window.

Letters: H height, W width.
"""

from functools import cache

import av
import numpy as np

from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError

SDR, PQ, HLG, WIDE = "SDR", "PQ", "HLG", "BT.2020"
"""Values of the column `color_space`; WIDE is SDR with the primaries of BT.2020."""

TRANSFERS = {16: PQ, 18: HLG}
"""FFmpeg's numbers of transfer curves (ITU-T H.273)."""
BT709, BT2020, P3 = 1, 9, 12
"""FFmpeg's numbers of primaries."""
UNSUPPORTED = {14: "ICtCp", 15: "Dolby Vision's IPT", 8: "YCgCo", 16: "YCgCo", 17: "YCgCo"}
"""Colour matrices that the scaler does not support, by FFmpeg's numbers."""

PEAK = 1000.0
"""cd/m2 that become white: what most HDR is graded for. Brighter lights are clipped."""
SDR_WHITE = 203.0
"""cd/m2."""
GAMMA = 2.4
LUMA_BT2020 = np.array([0.2627, 0.6780, 0.0593])
"""Shares of R, G, B of BT.2020 in luminance."""

M1, M2 = 2610 / 16384, 2523 / 4096 * 128
C1, C2, C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
"""Constants of ST 2084."""

CHROMATICITIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
"""(x, y) of red, green, blue."""
D65 = (0.3127, 0.3290)

LIMITED_WHITE, FULL_WHITE = 255 << 8, 65535
"""White in 16 bits, as the scaler makes it of YCbCr and of RGB."""


def color_of(frame: av.VideoFrame) -> str:
    """Return a value of the column `color_space`, as the file or its stream states."""
    return TRANSFERS.get(frame.color_trc) or (WIDE if frame.color_primaries == BT2020 else SDR)


def check_colors(media: Media, frame: av.VideoFrame) -> None:
    """Raise DecodeError for HDR in a colour matrix that cannot be converted."""
    if frame.color_trc in TRANSFERS and (matrix := UNSUPPORTED.get(frame.colorspace)):
        raise DecodeError(media, f"its HDR is coded as {matrix}, which cannot be converted to BT.709")


def white_of(frame: av.VideoFrame) -> int:
    """Return the 16-bit value that FFmpeg's scaler gives white."""
    return FULL_WHITE if frame.format.is_rgb else LIMITED_WHITE


def to_sdr(codes: np.ndarray, color: str, primaries: int, white: int) -> np.ndarray:
    """Convert RGB code values uint16 [3 H W] of a `color_space` but SDR to BT.709, uint8 [3 H W].

    Args:
        primaries: FFmpeg's number; unknown ones count as BT.2020.
        white: see `white_of`.
    """
    light = _table(color, white)[codes]
    if color == HLG:
        light *= _hlg_system_gain(light)
    if color != WIDE:
        light *= _tone_gain(light.max(axis=0))
    matrix = _matrix(primaries if primaries in CHROMATICITIES else BT2020)
    light = (matrix @ light.reshape(3, -1)).reshape(light.shape)
    return (255 * np.clip(light, 0, 1) ** np.float32(1 / GAMMA) + 0.5).astype(np.uint8)


def pq_to_light(code: np.ndarray) -> np.ndarray:
    """Return cd/m2 of PQ values from 0 to 1: the EOTF of ST 2084, equation 4.1."""
    root = code ** (1 / M2)
    return 10_000 * (np.maximum(root - C1, 0) / (C2 - C3 * root)) ** (1 / M1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """Return PQ values from 0 to 1 of cd/m2: the inverse EOTF of ST 2084, equation 5.2."""
    power = (light / 10_000) ** M1
    return ((C1 + C2 * power) / (1 + C3 * power)) ** M2


def hlg_to_scene(code: np.ndarray) -> np.ndarray:
    """Return scene light from 0 to 1 of HLG values: the inverse OETF of BT.2100, table 5."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)


def tone_curve(light: np.ndarray) -> np.ndarray:
    """Map 0 to PEAK cd/m2 to 0 to SDR_WHITE: BT.2390, section 5.4.1, with black at 0."""
    peak = light_to_pq(np.array(PEAK))
    top = light_to_pq(np.array(SDR_WHITE)) / peak
    knee = 1.5 * top - 0.5
    code = np.minimum(light_to_pq(light) / peak, 1)
    t = (code - knee) / (1 - knee)
    rolled = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    )
    return pq_to_light(np.where(code < knee, code, rolled) * peak)


@cache
def _table(color: str, white: int) -> np.ndarray:
    """Return the light of every 16-bit code value, float32 [65536]: cd/m2 for PQ, shares of the peak otherwise."""
    code = np.minimum(np.arange(65536) / white, 1)
    curves = {PQ: pq_to_light, HLG: hlg_to_scene, WIDE: lambda value: value**GAMMA}
    return curves[color](code).astype(np.float32)


def _hlg_system_gain(scene: np.ndarray) -> np.ndarray:
    """Return cd/m2 per scene light [H W]: the OOTF of BT.2100, table 5, whose gamma is 1.2 for 1000 cd/m2."""
    luminance = np.tensordot(LUMA_BT2020.astype(np.float32), scene, 1)
    return np.float32(PEAK) * luminance ** np.float32(0.2)


def _tone_gain(light: np.ndarray) -> np.ndarray:
    """Return what to multiply cd/m2 by, so that the largest of R, G, B becomes its SDR value from 0 to 1."""
    return np.interp(light, *_gain_table()).astype(np.float32)


@cache
def _gain_table() -> tuple[np.ndarray, np.ndarray]:
    """Return lights and their gains: 1 / SDR_WHITE up to the knee, then less; finer than a grey level."""
    light = np.concatenate([[0.0], np.geomspace(1.0, 10_000, 4096)])
    gain = tone_curve(light[1:]) / light[1:] / SDR_WHITE
    return light, np.concatenate([gain[:1], gain])


@cache
def _matrix(primaries: int) -> np.ndarray:
    """Return the matrix from linear RGB of some primaries to BT.709, float32 [3 3]."""
    return (np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)).astype(np.float32)


def _to_xyz(primaries: int) -> np.ndarray:
    """Return the matrix from linear RGB to CIE XYZ (SMPTE RP 177)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in CHROMATICITIES[primaries]]).T
    x, y = D65
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])
