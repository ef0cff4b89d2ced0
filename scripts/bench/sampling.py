"""Compare ways to sample faster: model calls, time, bytes sent, and what the videos lose.

    python scripts/bench/sampling.py
    python scripts/bench/sampling.py --checkpoint outputs/quickstart --student outputs/distill-guidance \
        --few_step_student outputs/distill-steps
    python scripts/bench/sampling.py --videos 36 --methods "euler 30" "unipc 12" "cache fast"
    python scripts/bench/sampling.py --output sampling.json --plot sampling.png
    torchrun --nproc_per_node 2 scripts/bench/sampling.py --sp 2 --videos 8

All methods make the same videos, one seed a prompt. Time is that of the sampling loop alone, after a batch to warm
up: prompts are encoded before it, and videos decoded after it; a ratio is the time of the first method divided by it.
PSNR and SSIM (Wang et al. 2004) compare frames before they are written, with those of the first method and with those
of --exact Euler steps. Scores are those of scripts/evaluate_adherence.py. Bytes are what the first rank sends for a
video, as counted at the collectives.

A method is a solver and its steps, such as "unipc 12" (else --steps Euler steps); "cache" with slow, fast or a
threshold; "pab" with the steps for which attention is used; "student" or "few-step", the models of --student and
--few_step_student; or several of these.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from scripts.arguments import output_file, positive_int
from scripts.plots import empty_figure
from stdit.atomic_files import write_json_atomic
from stdit.cli import run, script_parser
from stdit.data.shapes.prompt_files import Expected, read_expected
from stdit.data.shapes.worlds import World
from stdit.errors import UserError
from stdit.evaluation.prompts import default_prompts
from stdit.evaluation.scores import judge, mean_scores
from stdit.evaluation.videos import as_mp4
from stdit.parallel.config import SamplingParallelConfig
from stdit.parallel.processes.device import join_processes
from stdit.parallel.processes.mesh import Mesh, build_mesh
from stdit.pipelines.config import Solver
from stdit.pipelines.loading import load_pipeline, pipeline_settings
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.similarity import psnr, ssim
from stdit.pipelines.sources import find_checkpoint_source
from stdit.pipelines.video_io import to_uint8

STEPS = 30
METHODS = (
    *("euler 20", "euler 15", "euler 12", "euler 8"),
    *(f"{solver} {steps}" for solver in ("heun", "dpm++", "unipc") for steps in (15, 12, 8)),
    *("cache slow", "cache fast", "pab 2,4,6", "pab 5,7,9"),
)
SCORES = ("lenient", "strict", "positions", "sizes")
COLUMNS = {
    "calls": ".1f",
    "seconds": ".2f",
    "ratio": ".2f",
    "psnr": ".1f",
    "psnr_lowest": ".1f",
    "ssim": ".4f",
    "psnr_exact": ".1f",
    "lenient": ".1%",
    "strict": ".1%",
    "positions": ".2f",
    "sizes": ".2f",
    "sent_mb": ".3f",
}


def main() -> None:
    args = parse_args()
    mesh = build_mesh(SamplingParallelConfig(sp=args.sp, cfg=args.cfg), join_processes("auto", 600))
    source = find_checkpoint_source(args.checkpoint)
    recorded = pipeline_settings(source)
    world, expected = (
        read_expected(args.prompts)
        if args.prompts
        else default_prompts(False, int(recorded.get("height", 0)))
    )
    expected = expected[: args.videos]
    if mesh.dp > 1:
        raise UserError(
            f"{mesh.world_size} processes for --sp {args.sp} --cfg {args.cfg}: start {args.sp * args.cfg}, which "
            "share each video"
        )
    pipe, weights = load_pipeline(source)
    pipe.to(mesh.device)
    pipes = {"": pipe}
    for word, run_folder in students(args).items():
        pipes[word] = load_pipeline(find_checkpoint_source(run_folder))[0].to(mesh.device)
    rows = list(Bench(args, mesh, expected).rows(pipes, world))
    for row in rows:
        row["ratio"] = rows[0]["seconds"] / row["seconds"]
    if mesh.is_main:
        print_table(rows)
        figures = {"weights": weights, "videos": len(expected), "batch_size": args.batch_size, "rows": rows}
        if args.output:
            write_json_atomic(args.output, figures)
        if args.plot:
            plot(rows, args.plot)


def parse_args() -> argparse.Namespace:
    """Read the flags. Raises UserError for a method that there is not."""
    parser = script_parser(__doc__)
    parser.add_argument("--checkpoint", help="run, checkpoint or pipeline (the model that comes with stdit)")
    parser.add_argument("--student", help="a run of configs/train/distill-guidance.yaml")
    parser.add_argument("--few_step_student", help="a run of configs/train/distill-steps.yaml")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="see above; the first is compared with"
    )
    parser.add_argument("--prompts", type=Path, nargs="+", metavar="CSV", help="as for evaluate_adherence.py")
    parser.add_argument("--videos", type=positive_int, default=108, help="number of videos (108)")
    parser.add_argument("--batch_size", type=positive_int, default=36, help="videos at once (36)")
    parser.add_argument(
        "--steps", type=positive_int, default=STEPS, help=f"steps of a method without ({STEPS})"
    )
    parser.add_argument("--exact", type=positive_int, default=200, help="Euler steps of exact videos (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first video (0)")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--refine_pairs", type=int, default=0, help="pairs of the refinement, timed, too (0)")
    parser.add_argument("--sp", type=positive_int, default=1, help="ranks that share a video (1)")
    parser.add_argument("--cfg", type=positive_int, default=1, help="2: a rank for each half of guidance (1)")
    parser.add_argument("--output", type=output_file, help="JSON file for all figures")
    parser.add_argument("--plot", type=output_file, help="picture of quality against time; needs matplotlib")
    args = parser.parse_args()
    if args.methods is None:
        with_student = ["student", "student cache fast", "student unipc 8"] if args.student else []
        few = [f"few-step euler {steps}" for steps in trained_steps(args.few_step_student)]
        args.methods = [f"euler {args.steps}", *METHODS, *with_student, *few]
    for method in args.methods:
        settings_of(method, args.steps)
        if (word := student_of(method)) not in ("", *students(args)):
            flag = {"student": "--student", "few-step": "--few_step_student"}[word]
            raise UserError(f"--methods {word}: which one: add {flag} RUN")
    return args


def students(args: argparse.Namespace) -> dict[str, str]:
    """Return the runs of students, by the word of their methods."""
    given = {"student": args.student, "few-step": args.few_step_student}
    return {word: folder for word, folder in given.items() if folder is not None}


def student_of(method: str) -> str:
    """Return the word of the student that a method samples from, or an empty text."""
    word = method.split(maxsplit=1)[0]
    return word if word in ("student", "few-step") else ""


def trained_steps(folder: str | None) -> list[int]:
    """Return the numbers of steps in which the student of a run learned to make a video."""
    if folder is None:
        return []
    found: list[int] | None = pipeline_settings(find_checkpoint_source(folder)).get("trained_steps")
    if not found:
        raise UserError(f"--few_step_student {folder}: is no run with distill.steps: use --student")
    return found


def settings_of(method: str, steps: int) -> dict[str, Any]:
    """Return the settings of a pipeline call. Raises UserError for a method that there is not."""
    settings: dict[str, Any] = {"num_inference_steps": steps, "solver": "euler"}
    words = iter(method.removeprefix(student_of(method)).split())
    try:
        for name in words:
            value = next(words)
            if name in get_args(Solver):
                settings |= {"num_inference_steps": int(value), "solver": name}
            elif name == "cache":
                settings["cache"] = value if value in ("slow", "fast") else float(value)
            elif name == "pab":
                settings["pab"] = [int(one) for one in value.split(",")]
            else:
                raise ValueError(name)
    except (ValueError, StopIteration):
        raise UserError(
            f"--methods {method!r}: must be a solver and its steps, such as 'unipc 12' ("
            f"{', '.join(get_args(Solver))}); 'cache slow', 'cache fast' or 'cache 0.03'; 'pab 2,4,6'; student or "
            "few-step; or several of these"
        ) from None
    return settings


class Bench:
    """The videos that all methods make."""

    def __init__(self, args: argparse.Namespace, mesh: Mesh, expected: Sequence[Expected]) -> None:
        self.args, self.mesh, self.expected = args, mesh, expected
        self.shared: dict[str, Any] = {"refine_pairs": args.refine_pairs, "output_type": "latent"}
        if args.guidance_scale is not None:
            self.shared["guidance_scale"] = args.guidance_scale

    def rows(self, pipes: Mapping[str, STDiTPipeline], world: World) -> Iterator[dict[str, Any]]:
        """Yield the figures of each method.

        Args:
            pipes: the model, and students by the word of their methods.
        """
        exact, first, pipe = None, None, pipes[""]
        if self.args.exact:
            exact, _ = self.sample(pipe, settings_of(f"euler {self.args.exact}", STEPS))
        patch = tuple(
            stride * token
            for stride, token in zip(
                pipe.codec.stride[1:], pipe.transformer.config.patch_size[1:], strict=True
            )
        )
        for method in self.args.methods:
            settings = settings_of(method, self.args.steps)
            frames, row = self.sample(pipes[student_of(method)], settings)
            first = frames if first is None else first
            values = psnr(frames, first)
            row |= {"psnr": values.mean().item(), "psnr_lowest": values.min().item()}
            row["ssim"] = ssim(frames, first).mean().item()
            if exact is not None:
                row["psnr_exact"] = psnr(frames, exact).mean().item()
            pixels = to_uint8(frames.permute(0, 2, 3, 4, 1).numpy())
            judged = [
                {**judge(of_prompt, method, as_mp4(video, world.fps), world, patch), "set": "all"}
                for of_prompt, video in zip(self.expected, pixels, strict=True)
            ]
            scores = mean_scores(judged)["all"]
            row |= {name: scores[name] for name in SCORES if name in scores}
            yield {"method": method, **row}

    def sample(self, pipe: STDiTPipeline, settings: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the frames ``[N 3 T H W]`` in [0, 1] of all videos, and the calls, seconds and bytes of each."""
        pipe.set_progress_bar_config(disable=True)
        pipe.share(self.mesh)
        videos, calls, seconds = [], [], 0.0
        size = self.args.batch_size
        traffic = self.mesh.sp.traffic
        for start in range(-size, len(self.expected), size):
            begin = max(0, start)
            rows = self.expected[begin : begin + size]
            states, mask, *_ = pipe.encode_prompt([row["prompt"] for row in rows], None, False)
            generators = [torch.Generator().manual_seed(self.args.seed + begin + i) for i in range(len(rows))]
            if start < 0:
                traffic.clear()
            begun = time.perf_counter()
            result = pipe(
                prompt_embeds=states,
                prompt_attention_mask=mask,
                generator=generators,
                **self.shared,
                **settings,
            )
            if self.mesh.device.type == "cuda":
                torch.cuda.synchronize()
            if start < 0:  # to warm up
                traffic.clear()
                continue
            seconds += time.perf_counter() - begun
            calls += [one.run for one in result.calls]
            decoded = [pipe.codec.decode(one[None]) for one in result.frames]
            videos.append(((torch.cat(decoded).float() + 1) / 2).clamp(0, 1).cpu())
        count = len(self.expected)
        return torch.cat(videos), {
            "calls": sum(calls) / count,
            "seconds": seconds,
            "sent_mb": sum(traffic.bytes.values()) / 1e6 / count,
        }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the figures, a method in each line; the ratio is that of the first one's time."""
    shown = [name for name in COLUMNS if name == "ratio" or any(row.get(name) for row in rows)]
    print("method".ljust(22) + "".join(name.rjust(12) for name in shown))
    for row in rows:
        cells = [(f"{row[name]:{COLUMNS[name]}}" if name in row else "").rjust(12) for name in shown]
        print(row["method"].ljust(22) + "".join(cells), flush=True)


def kind_of(method: str) -> str:
    """Return what the methods of one line of the plot share: the words that are no values."""
    return " ".join(word for word in method.split() if word[0].isalpha() and word not in ("slow", "fast"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot PSNR against time, a line for each kind of method."""
    if (figure := empty_figure(10, 4.5)) is None:
        return
    panels = figure.subplots(1, 2)
    for panel, name, label in zip(
        panels, ("psnr", "psnr_exact"), (rows[0]["method"], "exact videos"), strict=True
    ):
        for kind in dict.fromkeys(kind_of(row["method"]) for row in rows):
            chosen = [row for row in rows[1:] if kind_of(row["method"]) == kind and name in row]
            if chosen:
                chosen.sort(key=lambda row: row["seconds"])
                seconds = [row["seconds"] for row in chosen]
                panel.plot(seconds, [row[name] for row in chosen], "o-", label=kind)
        panel.set(xlabel="seconds of the sampling loop", ylabel="PSNR in dB", title=f"against {label}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside center right")
    figure.savefig(path)


if __name__ == "__main__":
    run(main)
