"""Measure time, memory and utilisation of a pass through the model.

    python scripts/bench/step.py
    python scripts/bench/step.py --sizes reference S --compile true --threads 2 --output step.json
    python scripts/bench/step.py --device cuda --precision bf16 --sizes XL-2
    python scripts/bench/step.py --sizes reference --threads 2 --beside other.py

For each size: forward alone; forward and backward; the same with the first frame as a conditioning frame, and with
activation checkpointing. Each runs in a process of its own, on a CPU in several ways: "kept" keeps freed memory, as
train.py does; "flash" does that, too, but computes short attention by PyTorch's flash kernel; "medium" is "kept" with
trainer.matmul_precision = medium. "GiB" is the peak above the built model and its inputs; "of matmul" is the model's
arithmetic (matrix products and attention, without recomputation) per second, as a share of that of a large matrix
product in the same precision.

--beside measures another model in the same run, and the ratio of the times. Its Python file defines
build(size, conditioning, device) -> (module, keyword arguments of a pass), as `build` does here; the module returns a
tensor. A case whose build raises NotImplementedError is skipped, and so is checkpointing where the module has no
enable_gradient_checkpointing().
"""

import importlib.util
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.parallel.processes.device import find_device
from stdit.training.system import keep_freed_memory


@dataclass(frozen=True)
class Size:
    """A model and a batch; the text has ``tokens`` tokens of width ``text_width``."""

    hidden_size: int
    depth: int
    num_heads: int
    frames: int
    """Latent frames."""
    side: int
    """Rows and columns of latents; patches are 2 x 2."""
    tokens: int
    text_width: int
    batch: int = 1


SIZES = {
    "reference": Size(384, 4, 6, 16, 32, 64, 512),
    "small": Size(128, 4, 4, 8, 16, 16, 384, batch=4),
    "quickstart": Size(128, 2, 4, 4, 4, 24, 1152, batch=64),  # of about its shapes, without its options
    "shapes64": Size(160, 3, 5, 7, 8, 40, 1152, batch=64),  # likewise
    "S": Size(384, 12, 6, 8, 32, 120, 4096),
    "B": Size(768, 12, 12, 8, 32, 120, 4096),
    "XL-2": Size(1152, 28, 16, 15, 32, 300, 4096),
}
CASES: dict[str, dict[str, bool]] = {
    "forward": {"backward": False},
    "forward + backward": {},
    "with a conditioning frame": {"conditioning": True},
    "checkpointing": {"checkpointing": True},
}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "reference"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", choices=["true", "false"], default="false", help="measure compiled, too")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--steps", type=int, default=5, help="passes, of which the median is printed")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="another model, eager; see above")
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    args = parser.parse_args()
    for name in ("steps", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"{name} = {value}: must be at least 1")
    if args.beside and not args.beside.is_file():
        raise UserError(f"beside = {args.beside}: there is no such file")
    if args.device != "cpu":  # else torch's memory here would count as that of the processes that measure
        find_device(args.device)

    sides: dict[str, dict[str, Any]] = {"eager": {}}
    if args.device == "cpu":
        sides["kept"] = {"kept": True}
        sides["flash"] = {"kept": True, "flash": True}
        sides["medium"] = {"kept": True, "matmul_precision": "medium"}
    if args.compile == "true":
        sides["compiled"] = {"compiled": True}
    if args.beside:
        sides["beside"] = {"beside": args.beside}
    results = []
    for name in args.sizes:
        print(f"{name}: {SIZES[name]}")
        for case, options in CASES.items():
            eager = None
            for side, chosen in sides.items():
                settings = {**options, **chosen, "device": args.device, "steps": args.steps}
                figures = alone(measure, SIZES[name], args.precision, args.threads, **settings)
                if figures is None:
                    continue
                eager = eager or figures["seconds"]
                results.append({"size": name, "side": side, "case": case, **options, **figures})
                print(
                    f"  {case:<20} {side:<10} {figures['seconds']:8.3f} s ({figures['seconds'] / eager:5.2f}x)"
                    f"  {figures['gib']:6.2f} GiB"
                    f"  {100 * figures['of_matmul']:5.1f}% of matmul ({figures['matmul_gflops']:.0f} GFLOP/s)",
                    flush=True,
                )
    if args.output:
        args.output.write_text(
            json.dumps({"sizes": {n: asdict(SIZES[n]) for n in args.sizes}, "results": results}, indent=1)
        )


def alone(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def measure(
    size: Size,
    precision: str,
    threads: int | None,
    device: str,
    steps: int,
    compiled: bool = False,
    kept: bool = False,
    flash: bool = False,
    matmul_precision: str = "highest",
    backward: bool = True,
    conditioning: bool = False,
    checkpointing: bool = False,
    beside: Path | None = None,
) -> dict[str, float] | None:
    """Measure the median seconds of a pass, its peak GiB, and the share of a matrix product's speed.

    None: the model of the file `beside` has no such case. The arithmetic of stdit's model is taken for it.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from stdit.models import attention
    from stdit.models.matmul_rate import matmul_rate

    torch.set_float32_matmul_precision(matmul_precision)
    if flash:
        attention.FEW_SCORES = 0
    if threads is not None:
        torch.set_num_threads(threads)
    if kept:
        keep_freed_memory()
    build_side = builder(beside) if beside else build
    try:
        model, inputs = build_side(size, conditioning, device)
    except NotImplementedError:
        return None
    if checkpointing and not hasattr(model, "enable_gradient_checkpointing"):
        return None
    if checkpointing:
        model.enable_gradient_checkpointing()
    before = memory(device)
    if compiled:
        model.compile_blocks()
    seconds = [timed(model, inputs, backward, precision) for _ in range(1 + steps)][1:]
    peak = memory(device, peak=True)
    with FlopCounterMode(display=False) as counter:
        one_pass(*build(size, conditioning, "meta"), backward, "fp32")
    rate = matmul_rate(torch.device(device), torch.bfloat16 if precision == "bf16" else torch.float32)
    return {
        "seconds": statistics.median(seconds),
        "gib": (peak - before) / 2**30,
        "flops": counter.get_total_flops(),
        "matmul_gflops": rate / 1e9,
        "of_matmul": counter.get_total_flops() / statistics.median(seconds) / rate,
    }


def builder(file: Path) -> Any:
    """Return the function `build` of a Python file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build


def build(size: Size, conditioning: bool, device: str) -> tuple[Any, dict[str, Any]]:
    """Build a model without zeros, and its inputs, of which the first frame may be a conditioning frame."""
    import torch

    from stdit.models.stdit import STDiT

    torch.manual_seed(0)
    with torch.device(device):
        model = STDiT(
            hidden_size=size.hidden_size,
            depth=size.depth,
            num_heads=size.num_heads,
            caption_channels=size.text_width,
            model_max_length=size.tokens,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        inputs = {
            "hidden_states": torch.randn(size.batch, 4, size.frames, size.side, size.side),
            "timestep": torch.full((size.batch, size.frames if conditioning else 1), 500.0),
            "encoder_hidden_states": torch.randn(size.batch, size.tokens, size.text_width),
            "encoder_attention_mask": torch.ones(size.batch, size.tokens, dtype=torch.bool),
            **{name: torch.full((size.batch,), 24.0) for name in ("fps", "height", "width")},
        }
    if conditioning:
        inputs["timestep"][:, 0] = 0
    return model, inputs


def one_pass(model: Any, inputs: dict[str, Any], backward: bool, precision: str) -> None:
    """Run a forward pass, and a backward pass from a loss if ``backward``."""
    import torch

    kind = next(model.parameters()).device.type
    with (
        torch.set_grad_enabled(backward),
        torch.autocast(kind if kind != "meta" else "cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        output = model(**inputs)
    output = output if isinstance(output, torch.Tensor) else output.sample
    if backward:
        output.float().square().mean().backward()
        model.zero_grad()


def timed(model: Any, inputs: dict[str, Any], backward: bool, precision: str) -> float:
    """Return the seconds of one pass."""
    import torch

    on_gpu = next(model.parameters()).device.type == "cuda"
    begin = time.perf_counter()
    one_pass(model, inputs, backward, precision)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def memory(device: str, peak: bool = False) -> int:
    """Return the bytes in use, or their peak, of the GPU or of this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    import resource

    import psutil  # type: ignore[import-untyped]

    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if peak
        else psutil.Process().memory_info().rss
    )


if __name__ == "__main__":
    run(main)
