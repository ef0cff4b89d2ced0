"""Measure what it costs to round the weights of a model: its output, and videos of the same seeds.

    python scripts/bench/rounding.py
    python scripts/bench/rounding.py --checkpoint outputs/quickstart --videos 24 --output rounding.json

Weights and arithmetic in bf16, and linear layers in 8 or 4 bits as `lora.base_dtype` has them, are compared with
fp32. Outputs are those for noise at three noise levels: the root mean square of the difference, as a share of the
output that is compared with. Videos have the sampling settings of the checkpoint; PSNR is that of pixels in [0, 1].
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.arguments import positive_int
from stdit.cli import run, script_parser
from stdit.lora.config import BaseDtype
from stdit.pipelines.bundled import bundled_folder
from stdit.pipelines.inputs import draw_noise
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.weights import read_base

DTYPES: tuple[BaseDtype, ...] = ("fp32", "bf16", "int8", "nf4")
TIMESTEPS = (100.0, 500.0, 900.0)
PROMPTS = [
    "a red circle moving to the right on a black background",
    "a blue square growing on a white background",
    "a green star rises on a white background",
    "a yellow triangle bounces on a black background",
]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--checkpoint", help="run, checkpoint or pipeline (the model that comes with stdit)")
    parser.add_argument("--prompt", action="append", help="repeatable: prompts that take turns (shapes)")
    parser.add_argument(
        "--videos", type=positive_int, default=12, help="number of videos, with seeds 0, 1, ..."
    )
    parser.add_argument("--steps", type=positive_int, help="sampling steps (those of the checkpoint)")
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    args = parser.parse_args()
    figures = measure(args.checkpoint, args.prompt or PROMPTS, args.videos, args.steps)
    print("weights   rms from fp32   rms from bf16   PSNR: median, lowest, of all videos")
    for dtype, found in figures.items():
        print(
            f"{dtype:7s} {100 * found['rms_fp32']:14.2f}% {100 * found['rms_bf16']:14.2f}%   "
            f"{found['psnr_median']:.1f}, {found['psnr_lowest']:.1f}, {found['psnr_all']:.1f} dB"
        )
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measure(
    checkpoint: str | None, prompts: Sequence[str], count: int, steps: int | None
) -> dict[str, dict[str, float]]:
    """Return the figures of each dtype but fp32."""
    pipe, _ = load_pipeline(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    outputs, videos = {}, {}
    for dtype in DTYPES:
        pipe.transformer = read_base(checkpoint or str(bundled_folder()), [], dtype=dtype)[0]
        outputs[dtype] = model_outputs(pipe, prompts[0])
        videos[dtype] = torch.cat(
            [
                pipe(
                    prompts[seed % len(prompts)],
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="pt",
                ).frames
                for seed in range(count)
            ]
        )
    figures: dict[str, dict[str, float]] = {}
    for dtype in DTYPES[1:]:
        errors = (videos[dtype] - videos["fp32"]).square().flatten(1).mean(1)  # of each video
        figures[dtype] = {
            "rms_fp32": relative_rms(outputs[dtype], outputs["fp32"]),
            "rms_bf16": relative_rms(outputs[dtype], outputs["bf16"]),
            "psnr_median": psnr(errors.median()),
            "psnr_lowest": psnr(errors.max()),
            "psnr_all": psnr(errors.mean()),
        }
    return figures


@torch.no_grad()
def model_outputs(pipe: Any, prompt: str) -> Tensor:
    """Return the model's outputs for noise ``[1 C T H W]`` of each timestep, one after the other."""
    model, config = pipe.transformer, pipe.config
    shape = pipe.codec.latent_shape(*(int(config[name]) for name in ("num_frames", "height", "width")))
    noise = draw_noise((pipe.codec.channels, *shape), torch.Generator().manual_seed(0))[None].to(model.dtype)
    states, mask, *_ = pipe.encode_prompt(prompt)
    size = {name: torch.tensor([float(config[name])]) for name in ("fps", "height", "width")}
    found = [
        model(noise, torch.tensor([timestep]), states, mask, **size).sample.float() for timestep in TIMESTEPS
    ]
    return torch.cat(found)


def relative_rms(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def psnr(error: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean square error of pixels in [0, 1]."""
    return float(-10 * error.log10())


if __name__ == "__main__":
    run(main)
