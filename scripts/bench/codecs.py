"""List the memory that decoding a video takes, for each codec: counted on tensors without values, in seconds.

    python scripts/bench/codecs.py
    python scripts/bench/codecs.py --resolution 480p --num_frames 102 --codecs opensora AutoencoderKLWan

VAEs have the sizes of the released ones, and no weights. Decoding is that of one video, whole; GiB are those of its
peak, without weights.
"""

import argparse
from typing import Any

import diffusers
import torch

from scripts.arguments import positive_int
from stdit.cli import run, script_parser
from stdit.codecs.base import VideoCodec
from stdit.codecs.diffusers_vae import DiffusersCodec
from stdit.codecs.loading import quiet
from stdit.codecs.memory import decoding_bytes
from stdit.codecs.opensora_vae import OpenSoraCodec, OpenSoraVAEConfig
from stdit.codecs.pca import PCACodec
from stdit.codecs.pixel import PixelCodec
from stdit.codecs.tiny import TinyCodec
from stdit.codecs.vaes import VAES
from stdit.data.config import resolve_size
from stdit.errors import UserError
from stdit.models.size import tensor_bytes
from stdit.parallel.sequence.planner import format_gib

RELEASED: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {  # of Stable Diffusion; diffusers' own default is a small one
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    }
}
"""Settings of released VAEs that are not the defaults of their classes."""
OWN = ("pixel", "pca", "tiny", "opensora")
COLUMNS = ("codec", "latents", "weights, fp32", "decoding, fp32", "decoding, bf16")


def main() -> None:
    args = parse_args()
    height, width = resolve_size(args.resolution, args.aspect_ratio)
    print(f"GiB for {args.num_frames} frames of {height} x {width} pixels (height x width)\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for name in args.codecs:
        codec = codec_without_weights(name)
        shape = codec.latent_shape(args.num_frames, height, width)
        with quiet("diffusers"):
            sizes = [decoding_bytes(codec.to(dtype), shape) for dtype in (torch.bfloat16, torch.float32)]
        latents = "x".join(map(str, (codec.channels, *shape)))
        cells = [f"`{name}`", latents, *map(format_gib, [tensor_bytes(codec), *sizes[::-1]])]
        print(f"| {' | '.join(cells)} |", flush=True)


def parse_args() -> argparse.Namespace:
    """Read the flags. Raises UserError for a codec that there is not."""
    parser = script_parser(__doc__)
    every = [*OWN, *VAES]
    parser.add_argument("--resolution", default="720p", help="named size, such as 480p (720p)")
    parser.add_argument("--aspect_ratio", default="16:9", help="width:height (16:9)")
    parser.add_argument("--num_frames", type=positive_int, default=51, help="length in frames (51)")
    parser.add_argument("--codecs", nargs="+", default=every, metavar="NAME", help="default: all of them")
    args = parser.parse_args()
    if unknown := [name for name in args.codecs if name not in every]:
        raise UserError(f"--codecs {unknown[0]}: must be one of {', '.join(every)}")
    return args


def codec_without_weights(name: str) -> VideoCodec:
    """Build a codec of the released size on the meta device."""
    with torch.device("meta"):
        if name in VAES:
            return DiffusersCodec(getattr(diffusers, name)(**RELEASED.get(name, {})))
        if name == "pca":
            codec = PCACodec()
            codec.latent_variance = torch.ones(codec.channels)  # as if it were fitted
            return codec
        return {
            "pixel": PixelCodec,
            "tiny": TinyCodec,
            "opensora": lambda: OpenSoraCodec(OpenSoraVAEConfig()),
        }[name]()


if __name__ == "__main__":
    run(main)
