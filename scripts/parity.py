"""Check that training and sampling on several processes give the numbers of one process.

    torchrun --nproc_per_node 4 scripts/parity.py --config configs/train/quickstart.yaml --parallel.sp 2

Takes the settings of train.py. Every rank computes everything alone and then its share, on random latents and weights
without zeros, and compares output, loss, gradients, weights after five steps, and a sample. Differences are relative
to the largest value of a tensor. Exits with 1 if one is above --tolerance (default 1e-5), and names the tensor.

Weights may differ by --step_tolerance (default 1e-3): AdamW divides each gradient by its own size, so a gradient that
is only rounding error (that of the keys' biases, which softmax cancels) moves its weight at full rate, in a random
direction.

Matrix products are computed in full precision (trainer.matmul_precision highest), whatever the settings say: TF32
and bfloat16 round so coarsely that any other order of summation gives other weights after five steps.
"""

import argparse
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stdit.cli import run
from stdit.data.batch import EncodedBatch
from stdit.data.buckets import Bucket
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh, build_mesh
from stdit.parallel.processes.parameters import full_tensor
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.training.config import TrainConfig, parse_train

STEPS = 5


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--step_tolerance", type=float, default=1e-3)
    own, rest = parser.parse_known_args()
    if not rest or "--help" in rest:
        print(__doc__)
        return 0
    config = parse_train(rest)
    config.trainer.matmul_precision = "highest"
    from stdit.training.system import prepare_process

    if config.parallel.sp == "auto":
        raise UserError("parallel.sp = auto: must be a number here: the ranks that share each video")
    accelerator = prepare_process(config.trainer, config.parallel.timeout)
    mesh = build_mesh(config.parallel, accelerator.device)
    mesh.check_batch_sizes([config.data.multiplied_buckets()[0].batch_size])
    ok = True
    for what, name, difference in compare(config, accelerator, mesh):
        allowed = own.step_tolerance if "weights" in what else own.tolerance
        ok = ok and difference <= allowed
        verdict = "" if difference <= allowed else f"  ABOVE {allowed:g}"
        print(f"{what:<24} {difference:.1e}  {name}{verdict}", flush=True)
    print(
        "the numbers are those of one process" if ok else "the numbers are NOT those of one process",
        flush=True,
    )
    return 0 if ok else 1


def compare(config: TrainConfig, accelerator: Any, mesh: Mesh) -> Iterator[tuple[str, str, float]]:
    """Yield what is compared, the name of the worst tensor, and its difference, over all ranks."""
    from stdit.diffusion.draws import draw_batch
    from stdit.training.flow_matching import FlowMatching
    from stdit.training.trainer import Trainer

    model, flow, pipe = build(config)
    batch = random_batch(config, pipe)
    settings = (config.trainer, config.optimizer, config.ema, config.seed)
    one_process = Mesh(device=accelerator.device)
    method = FlowMatching(flow)
    single = Trainer(deepcopy(model), method, accelerator, one_process, *settings)
    parallel = Trainer(
        deepcopy(model), method, accelerator, mesh, *settings, config.parallel.shard_parameters
    )

    x, size = batch.latents.to(accelerator.device), batch.batch_size
    shape = (int(batch.height[0]), int(batch.width[0]))
    draws = draw_batch(flow, config.seed, 0, range(size), tuple(x.shape[1:]), *shape).to(x.device)  # type: ignore[arg-type]
    x_t = flow.scale_model_input(flow.add_noise(x, draws.noise, draws.t), draws.t)
    sharding: TokenSharding = model.token_sharding(mesh.sp, *x.shape[2:], size)
    there = batch.to(x.device)
    condition = {
        "timestep": 1000 * draws.t,
        "encoder_hidden_states": there.text_states,
        "encoder_attention_mask": there.text_mask,
        **{name: getattr(there, name) for name in ("fps", "height", "width")},
    }
    with torch.no_grad():
        expected = sharding.split(single.model(x_t, **condition).sample, dim=2)
        found = parallel.model(sharding.split(x_t, dim=2), **condition, sharding=sharding).sample
    yield "output", *largest(mesh, {"": (found, expected)})

    rows = mesh.sample_range(size)
    runs = ((parallel, batch.rows(rows)), (single, batch))
    losses = [one.mesh.all_reduce_mean(one.accumulate(data)[0])[None] for one, data in runs]
    yield "loss", *largest(mesh, {"": (losses[0], losses[1])})
    names = [name for name, _ in model.named_parameters()]
    gradients = [{name: one.model.get_parameter(name).grad for name in names} for one in (parallel, single)]
    yield "gradients", *largest(mesh, pairs(*gradients))
    for one, data in runs:
        one.optimizer.zero_grad()
        for step in range(STEPS):
            one.step(replace(data, step=step))
    weights = [one.model.state_dict() for one in (parallel, single)]
    yield f"weights after {STEPS} steps", *largest(mesh, pairs(*weights))
    yield "averaged weights", *largest(mesh, pairs(parallel.ema.average, single.ema.average))

    samples = []
    pipe.transformer = single.model.eval()
    for ranks in (mesh, one_process):
        pipe.share(ranks)
        generator = torch.Generator().manual_seed(config.seed)
        samples.append(pipe("a red circle", generator=generator, output_type="latent").frames)
    yield "sample", *largest(mesh, {"": (samples[0], samples[1])})


def build(config: TrainConfig) -> tuple[Any, Any, Any]:
    """Build a model in which no weight is zero, the objective, and a pipeline of both."""
    from stdit.codecs import build_codec, build_text_encoder
    from stdit.diffusion.scheduler import RectifiedFlow
    from stdit.pipelines.pipeline import STDiTPipeline
    from stdit.training.build import build_model, resolved_config

    codec, text_encoder = build_codec(config.codec), build_text_encoder(config.text_encoder)
    if codec.latent_variance is None and config.flow.prediction == "residual":  # not fitted
        codec.latent_variance = torch.linspace(2, 0.1, codec.channels)
    model = build_model(resolved_config(config, codec, text_encoder))
    torch.manual_seed(config.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.where(parameter == 0, 0.02 * torch.randn_like(parameter), 0.0))
    bucket = Bucket.from_config(config.data.multiplied_buckets()[0])
    pipe = STDiTPipeline(
        model,
        codec,
        text_encoder,
        None,
        RectifiedFlow(),
        flow=config.flow,
        num_frames=bucket.num_frames,
        height=bucket.height,
        width=bucket.width,
        fps=bucket.fps,
        num_inference_steps=STEPS,
    )
    pipe.set_progress_bar_config(disable=True)
    return model, pipe.flow, pipe


def random_batch(config: TrainConfig, pipe: Any) -> EncodedBatch:
    """Make a random global batch of the first bucket, the same on every rank."""
    bucket = Bucket.from_config(config.data.multiplied_buckets()[0])
    size, generator = bucket.batch_size, torch.Generator().manual_seed(config.seed)
    shape = pipe.codec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    length = min(12, pipe.prompt_encoder.max_length)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (size, 1), generator=generator)
    return EncodedBatch(
        step=0,
        batch_size=size,
        captions=[""] * size,
        clip_indices=torch.arange(size),
        fps=torch.full((size,), float(bucket.fps)),
        height=torch.full((size,), float(bucket.height)),
        width=torch.full((size,), float(bucket.width)),
        latents=torch.randn(size, pipe.codec.channels, *shape, generator=generator),
        text_states=torch.randn(size, length, pipe.prompt_encoder.channels, generator=generator),
        text_mask=mask,
    )


def pairs(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair tensors by name; found ones may be sharded."""
    return {name: (full_tensor(found[name]), expected[name]) for name in expected}


def largest(mesh: Mesh, compared: dict[str, tuple[Tensor, Tensor]]) -> tuple[str, float]:
    """Return name and size of the largest relative difference over all tensors and ranks; nan counts as infinite."""
    differences = [("", 0.0)]
    for name, (found, expected) in compared.items():
        if expected.numel():
            gap = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
            differences.append((name, float(gap.nan_to_num(nan=float("inf")))))
    every = [worst for rank in mesh.all_gather_objects(differences) for worst in rank]
    return max(every, key=lambda one: one[1])


if __name__ == "__main__":
    run(main)
