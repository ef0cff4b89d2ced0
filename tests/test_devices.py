"""No tensor is on the wrong device: everything that a GPU computes, on devices that need none."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from stdit.codecs import CodecConfig, TextEncoderConfig, build_codec, build_text_encoder
from stdit.codecs.stored_text import StoredTextEncoder, store_text
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.draws import TrainingDraws, draw_batch
from stdit.diffusion.flow import FlowObjective
from stdit.lora.adapters import add_adapter, target_layers
from stdit.lora.config import LoRAConfig
from stdit.models.low_bit import make_low_bit, round_weight
from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.sequence.group import Group
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.segments import Segments, generate_segments
from stdit.training.checkpoint_writer import CheckpointWriter
from stdit.training.config import CheckpointConfig, OptimizerConfig
from stdit.training.memory_config import MemoryConfig
from stdit.training.trainer import Trainer
from stdit.training.validation_loss import losses_by_level, validation_rows
from tests.codecs.tiny import TINY_VAES, save_tiny_bert, save_tiny_t5, save_tiny_vae, tiny_opensora_vae
from tests.devices import NEEDS_CUDA_BUILD, PAPER, on_device, real, register_paper
from tests.diffusion.test_scheduler import SOLVERS, solver
from tests.lora.tiny import add_random_adapter
from tests.parallel.ranks import run_on_ranks
from tests.pipelines.test_pipeline import fitted_pca
from tests.pipelines.tiny import tiny_model, tiny_pipeline
from tests.training.tiny import tiny_batch, tiny_trainer

CPU = torch.device("cpu")

PREDICTIONS = ("velocity", "sample", "residual")

no_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason=NEEDS_CUDA_BUILD)


def agree(found: Any, expected: Any, atol: float = 1e-4) -> None:
    torch.testing.assert_close(real(found), real(expected), atol=atol, rtol=1e-3)


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "paired": dict(blocks="S T T S"),
    "cross-attention in spatial blocks": dict(cross_attention="spatial"),
    "joint": dict(blocks="S T J", mlp_conv=True),
    "linear": dict(blocks="S L", mlp_conv=True),
    "linear, causal": dict(blocks="L", linear_causal=True),
    "pooled_text": dict(pooled_text=True),
    "frame_positions": dict(frame_positions=True),
    "mlp_conv": dict(mlp_conv=True),
    "no qk_norm, pred_sigma": dict(qk_norm=False, pred_sigma=True),
    "patches of two frames": dict(patch_size=(2, 2, 2)),
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": dict(encoder_attention_mask=torch.arange(5) < torch.tensor([[3], [0]])),
    "mask of numbers": dict(encoder_attention_mask=(torch.arange(5) < torch.tensor([[3], [5]])).float()),
    "dropped caption": dict(drop_caption=torch.tensor([True, False])),
}


def run(model: STDiT, device: torch.device, **changed: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = dict(
        hidden_states=torch.randn(2, 3, 3, 7, 9, generator=generator),
        timestep=torch.tensor([300.0, 700.0]),
        encoder_hidden_states=torch.randn(2, 5, 16, generator=generator),
        fps=torch.tensor([8.0]),
        height=torch.tensor([7.0, 14.0]),
        width=torch.tensor([9.0, 18.0]),
        **changed,
    )
    if model.config.patch_size[0] == 1:
        inputs["timestep"] = torch.tensor([[0.0, 300.0, 300.0], [700.0, 700.0, 0.0]])
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    out: Tensor = model(**moved).sample
    assert out.device.type == device.type
    return out


@torch.no_grad()
def check_model(name: str, settings: str, folder: Path) -> None:
    model = tiny_model(**MODELS[settings])
    expected = [run(model, CPU, **call) for call in CALLS.values()]
    with on_device(name) as device:
        model.to(device)
        for call, one in zip(CALLS.values(), expected, strict=True):
            agree(run(model, device, **call), one)


@torch.no_grad()
def check_adapters(name: str, kind: str, folder: Path) -> None:
    """On a base of full weights, or of low-bit ones."""
    model = tiny_model(hidden_size=64)
    if kind in ("int8", "nf4"):
        weights = {layer: model.get_submodule(layer).weight for layer in target_layers(model, "blocks")}
        make_low_bit(model, weights)
        for layer, weight in weights.items():
            low = model.get_submodule(layer)
            low.weight = nn.Parameter(round_weight(weight, kind), requires_grad=False)
            low.bias = nn.Parameter(torch.randn(low.out_features), requires_grad=False)
    add_random_adapter(model, dora=kind == "dora")
    expected = run(model, CPU, attention_kwargs={"scale": 0.5})
    with on_device(name) as device:
        agree(run(model.to(device), device, attention_kwargs={"scale": 0.5}), expected)


CLIP = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1
EMBEDS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(8))


def change_everything(
    pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A callback."""
    return {name: 0.9 * value for name, value in tensors.items()}


SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "pixels": dict(output_type="pt"),
    "no guidance": dict(guidance_scale=1.0),
    "linear": dict(guidance_schedule="linear"),
    "interval": dict(guidance_schedule="interval", guidance_interval=(0.2, 0.9)),
    "oscillating": dict(guidance_schedule="oscillating"),
    "rescaled": dict(guidance_rescale=0.7),
    "shift": dict(shift=3.0),
    "refined": dict(refine_pairs=2),
    "negative prompts": dict(prompt=["a red circle", "blue"], negative_prompt=["a square", None]),
    "two videos of a prompt": dict(num_videos_per_prompt=2, max_sequence_length=4),
    "first frame": dict(image=CLIP[:, 0]),
    "conditioning frames": dict(
        conditions=[FrameCondition(CLIP[:, :1], 0), FrameCondition(CLIP, 2, 1, 0.5)], refine_pairs=1
    ),
    "given noise": dict(latents=torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(9))),
    "given text states": dict(
        prompt=None,
        prompt_embeds=EMBEDS,
        prompt_attention_mask=torch.arange(5) < torch.tensor([[3], [5]]),
        negative_prompt_embeds=EMBEDS.flip(0),
    ),
    "callback": dict(
        negative_prompt="blue",
        callback_on_step_end=change_everything,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"],
    ),
}


def sample(pipe: Any, **settings: Any) -> Tensor:
    call = {"prompt": "a red circle", "output_type": "latent", **settings}
    frames: Tensor = pipe(generator=torch.Generator().manual_seed(1), **call).frames
    return frames


def check_sampling(name: str, option: str, folder: Path) -> None:
    pipe = tiny_pipeline(folder)
    expected = sample(pipe, **SAMPLING[option])
    with on_device(name) as device:
        found = sample(pipe.to(device), **SAMPLING[option])
        assert found.device.type == device.type
        agree(found, expected)


def check_scheduler(name: str, option: str, folder: Path) -> None:
    scheduler, prediction = option.split()
    pipe = tiny_pipeline(folder, fitted_pca(), FlowConfig(prediction=prediction))
    pipe.scheduler = solver(scheduler)
    expected = sample(pipe, image=CLIP[:, 0])
    with on_device(name) as device:
        pipe.scheduler = solver(scheduler)
        agree(sample(pipe.to(device), image=CLIP[:, 0]), expected)


def check_segments(name: str, option: str, folder: Path) -> None:
    pipe = tiny_pipeline(folder)

    def whole() -> Tensor:
        def one(segment: int, conditions: list[list[FrameCondition]]) -> Tensor:
            return sample(pipe, conditions=conditions, output_type="pt")

        return generate_segments(one, Segments(3, overlap=1, loop=True), [[]], 4)

    expected = whole()
    with on_device(name) as device:
        pipe.to(device)
        agree(whole(), expected)


def check_codec(name: str, codec: str, folder: Path) -> None:
    """Both ways, and from the middle of a video."""
    special: dict[str, Callable[[], Any]] = {"pca": fitted_pca, "opensora": tiny_opensora_vae}
    path = str(save_tiny_vae(codec, folder)) if codec in TINY_VAES else None
    one = special[codec]() if codec in special else build_codec(CodecConfig(name=codec, path=path))
    video = torch.rand(2, 3, 21, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def both_ways(device: torch.device) -> list[Tensor]:
        latents = one.encode(video)
        found = [
            latents,
            one.decode(latents, 20, 30, 39),
            one.encode_span(video[:, :, :6].to(device), 9, 21)[1],
        ]
        assert all(tensor.device.type == device.type for tensor in found)
        return found

    expected = both_ways(CPU)
    with on_device(name) as device:
        one.to(device)
        for found, wanted in zip(both_ways(device), expected, strict=True):
            agree(found, wanted)


def check_text_encoder(name: str, kind: str, folder: Path) -> None:
    texts = ["a red circle moves left", "", "blue"]
    model = (save_tiny_t5 if kind == "t5" else save_tiny_bert)(folder / "model")
    encoder = build_text_encoder(
        TextEncoderConfig(name="auto", path=str(model), layers=[0, 2] if kind == "layers" else None)
    )
    expected = encoder.encode(texts)
    if kind == "stored":
        list(store_text(encoder, texts, folder / "states", torch.float32))
        encoder = StoredTextEncoder(folder / "states")
    with on_device(name) as device:
        encoder.to(device)
        for found, wanted in zip(encoder.encode(texts), expected, strict=True):
            assert found.device.type == device.type
            agree(found, wanted)


def trainer(device: torch.device, prediction: str = "velocity", lora: bool = False, **memory: Any) -> Trainer:
    """A trainer; accelerate alone would choose the CPU for it."""
    torch.manual_seed(0)
    model = tiny_model(hidden_size=64, patch_size=(1, 2, 2)).train()
    if lora:
        add_adapter(model, LoRAConfig(rank=2, dropout=0.5), seed=1)
    settings = MemoryConfig(**memory)
    model.set_activations(settings.block_activations(len(model.blocks)))
    mesh, optimizer = (
        Mesh(device=device),
        OptimizerConfig(name="muon" if memory == {} and not lora else "adamw", lr=1e-3),
    )
    one = tiny_trainer(model, optimizer, mesh, memory=settings, block_norms_every=1 if memory == {} else None)
    one.accelerator = SimpleNamespace(device=device, autocast=nullcontext)  # type: ignore[assignment]
    one.matmul_rate = 1.0  # is not measured
    flow = FlowConfig(conditioning={"first": 0.5}, prediction=prediction, caption_dropout=0.5)
    one.flow = FlowObjective(flow, torch.tensor([0.5, 1.0, 1.5]))
    return one


def check_loss(name: str, prediction: str, folder: Path) -> None:
    """In training, with conditioning frames and dropped captions, and in validation."""
    batch, rows = tiny_batch(0), next(validation_rows(2, 2, 4))

    def losses(device: torch.device) -> list[Tensor]:
        one = trainer(device, prediction)
        draws = draws_of(one)
        return [one.sample_losses(batch, draws), torch.tensor(losses_by_level(one, [(rows, batch)], 2))]

    expected = losses(CPU)
    with on_device(name) as device:
        for found, wanted in zip(losses(device), expected, strict=True):
            agree(found, wanted)


def draws_of(one: Trainer) -> TrainingDraws:
    """Draws for a `tiny_batch`."""
    return draw_batch(one.flow, 1, 0, range(4), (3, 2, 4, 4), 4, 4)


@pytest.mark.slow
@no_cuda_build
def test_loss_in_bf16() -> None:
    batch = tiny_batch(0)
    with (
        on_device("cuda") as device,
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda: True),
    ):
        one = trainer(device)
        draws = draws_of(one)
        plain = one.sample_losses(batch, draws)
        one.accelerator.autocast = lambda: torch.autocast("cuda", torch.bfloat16)  # type: ignore[assignment]
        found = one.sample_losses(batch, draws)
    agree(found, plain, atol=0.1)
    assert not torch.equal(real(found), real(plain))


def check_offloaded_activations(name: str, option: str, folder: Path) -> None:
    """They wait on the CPU, and come back."""
    batch, kept = tiny_batch(0), []

    def checked(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> saved_tensors_hooks:
        def pack_and_check(tensor: Tensor) -> Any:
            packed = pack(tensor)
            back = unpack(packed)
            assert back.device == tensor.device and torch.equal(real(back), real(tensor))
            kept.append(packed[1])
            return packed

        return saved_tensors_hooks(pack_and_check, unpack)

    with on_device(name) as device, patch("stdit.models.activations.saved_tensors_hooks", checked):
        one = trainer(device, activations="offload")
        one.sample_losses(batch, draws_of(one))
        weights = {parameter.untyped_storage().data_ptr() for parameter in one.parameters}
        stayed = [tensor for tensor in kept if tensor.device.type != "cpu"]
        assert len(kept) > 2 * len(stayed) > 0
        assert all(tensor.untyped_storage().data_ptr() in weights for tensor in stayed)


STEPS: dict[str, dict[str, Any]] = {
    "muon": {},
    "lora": dict(lora=True),
    "recomputed activations": dict(activations="recompute"),
    "offloaded activations": dict(activations="offload"),
    "offloaded optimizer": dict(offload_optimizer=True),
    "fused backward": dict(fused_backward=True),
    "8-bit states": dict(optimizer_state="8bit"),
}


def check_steps(name: str, mode: str, folder: Path) -> None:
    """As on the CPU; and what one saves, the other reads."""

    def train(device: torch.device, saved: str, read: str = "") -> list[float]:
        one = trainer(device, **STEPS[mode])
        if read:
            one.read(next((folder / read).glob("step-*")), {"nonfinite_in_a_row": 0, "batch_splits": 1})
        losses = [one.step(tiny_batch(step))["loss"] for step in range(2)]
        with one.ema.applied(one.model), torch.no_grad():
            losses += real(one.sample_losses(tiny_batch(3), draws_of(one))).tolist()
        CheckpointWriter(folder / saved, CheckpointConfig(), Mesh()).save(2, one.state(), {}, at_once=True)
        return losses

    with on_device(name) as device, torch.compiler.set_stance("force_eager"):
        assert train(device, "there") == pytest.approx(train(CPU, "here"), rel=1e-4)
        assert train(device, "b", read="here") == pytest.approx(train(CPU, "a", read="there"), rel=1e-4)


CHECKS: dict[str, tuple[Callable[[str, str, Path], None], list[str]]] = {
    "model": (check_model, list(MODELS)),
    "adapters": (check_adapters, ["lora", "dora", "int8", "nf4"]),
    "sampling": (check_sampling, list(SAMPLING)),
    "schedulers": (check_scheduler, [f"{one} {prediction}" for one in SOLVERS for prediction in PREDICTIONS]),
    "segments": (check_segments, [""]),
    "codecs": (check_codec, ["pixel", "pca", "tiny", "opensora", *TINY_VAES]),
    "text encoders": (check_text_encoder, ["bert", "t5", "layers", "stored"]),
    "loss": (check_loss, list(PREDICTIONS)),
    "offloaded activations": (check_offloaded_activations, [""]),
    "steps": (check_steps, list(STEPS)),
}
FORWARD = [(what, option) for what, (_, options) in CHECKS.items() for option in options if what != "steps"]


def check_all(name: str, what: str, folder: Path) -> None:
    check, options = CHECKS[what]
    for number, option in enumerate(options):
        check(name, option, folder / str(number))


def check_all_on_paper(_: Group, what: str, folder: Path) -> None:
    register_paper()
    check_all(PAPER, what, folder)


@pytest.mark.slow
@no_cuda_build
@pytest.mark.parametrize("what, option", FORWARD)
def test_on_cuda(what: str, option: str, tmp_path: Path) -> None:
    CHECKS[what][0]("cuda", option, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", CHECKS)
def test_on_paper(what: str, tmp_path: Path) -> None:
    """In a process of its own, since a backend stays."""
    run_on_ranks(1, check_all_on_paper, what, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("what", CHECKS)
def test_on_a_gpu(what: str, tmp_path: Path) -> None:
    check_all("gpu", what, tmp_path)


@pytest.mark.gpu
def test_compiled_steps_on_a_gpu() -> None:
    plain, compiled = (trainer(torch.device("cuda", 0)) for _ in range(2))
    compiled.model.compile_blocks()  # type: ignore[operator]
    for step in range(3):
        found, expected = compiled.step(tiny_batch(step)), plain.step(tiny_batch(step))
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
