"""STDiT and its options; test_golden.py compares it with Open-Sora."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from stdit.codecs.tiny import PACKAGED
from stdit.errors import UserError
from stdit.models.blocks import TokenGrid
from stdit.models.config import STDiTConfig
from stdit.models.stdit import STDiT

ROOT = Path(__file__).parents[2]
PARAMETERS = {
    "tiny": 1_546_176,
    "linear": 1_684_416,
    "joint": 1_684_416,
    "S": 61_150_880,
    "B": 236_970_272,
    "XL-2": 1_208_872_736,
    "3B-2": 3_183_440_336,
}
"""As in the table of stdit/models/README.md; the first three with the quickstart's codec and text encoder."""


def small(**settings) -> STDiT:
    """A small model in which no weight is zero."""
    base = {"depth": 3, "hidden_size": 32, "num_heads": 2, "caption_channels": 12, "model_max_length": 7}
    torch.manual_seed(0)
    model = STDiT(**{**base, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(frames: int = 4, rows: int = 5, columns: int = 6, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "hidden_states": torch.randn(batch, 4, frames, rows, columns, generator=generator),
        "timestep": torch.linspace(100, 900, batch),
        "encoder_hidden_states": torch.randn(batch, 7, 12, generator=generator),
        "encoder_attention_mask": mask,
        "fps": torch.full((batch,), 24.0),
        "height": torch.full((batch,), 8.0 * rows),
        "width": torch.full((batch,), 8.0 * columns),
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_presets(name: str) -> None:
    settings = yaml.safe_load((ROOT / "configs" / "models" / f"{name}.yaml").read_text())["model"]
    table = (ROOT / "stdit" / "models" / "README.md").read_text()
    rows = (line for line in table.splitlines() if line.startswith(f"| `{name}`"))
    (row,) = (row for row in rows if f"| {PARAMETERS[name]:,} |" in row)
    if name in ("tiny", "linear", "joint"):
        quickstart = yaml.safe_load((ROOT / "configs" / "train" / "quickstart.yaml").read_text())
        channels = json.loads((PACKAGED / "codec.json").read_text())["channels"]
        assert quickstart["codec"] == {"name": "tiny"}
        width = 384 * len(quickstart["text_encoder"]["layers"])
        own = {"tiny": {}, "linear": {"blocks": "S L"}, "joint": {"blocks": "S J"}}
        assert {**quickstart["model"], **own[name]} == settings
        assert f"{channels} latent channels, text of width {width}" in row or name != "tiny"
        settings |= {"in_channels": channels, "caption_channels": width, "model_max_length": 64}
    with torch.device("meta"):
        model = STDiT(**settings)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "settings", [{}, {"blocks": "S T T S", "cross_attention": "spatial", "pooled_text": True}]
)
def test_equal_timesteps_of_frames_are_one_timestep(settings: dict) -> None:
    model, batch = small(**settings), inputs()
    expected = model(**batch).sample
    batch["timestep"] = batch["timestep"][:, None].expand(-1, 4)
    torch.testing.assert_close(model(**batch).sample, expected)
    batch["timestep"] = batch["timestep"] * torch.tensor([0, 1, 1, 1])
    assert (model(**batch).sample - expected).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"pooled_text": True}])
def test_padding_tokens_are_not_read(settings: dict) -> None:
    model, batch = small(**settings), inputs()
    expected = model(**batch).sample
    batch["encoder_hidden_states"] = batch["encoder_hidden_states"].clone()
    batch["encoder_hidden_states"][0, 3:] = 1e3
    torch.testing.assert_close(model(**batch).sample, expected)
    batch["encoder_hidden_states"][0, 2] += 1
    assert (model(**batch).sample[0] - expected[0]).abs().max() > 1e-4


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 2, 2), (1, 1, 1), (5, 7, 9), (2, 3, 4)])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 1)])
def test_any_size(frames: int, rows: int, columns: int, patch: tuple) -> None:
    batch = inputs(frames, rows, columns)
    out = small(patch_size=patch)(**batch).sample
    assert out.shape == (2, 8, frames, rows, columns)
    assert out.isfinite().all()


def test_samples_of_a_batch_are_independent() -> None:
    model, batch = small(), inputs()
    batch["height"] = torch.tensor([40.0, 80.0])
    batch["fps"] = torch.tensor([8.0, 30.0])
    whole = model(**batch).sample
    for i in range(2):
        torch.testing.assert_close(model(**{k: v[i : i + 1] for k, v in batch.items()}).sample[0], whole[i])
    assert (model(**batch | {"fps": torch.tensor([8.0, 8.0])}).sample[1] - whole[1]).abs().max() > 1e-3
    assert (model(**batch | {"height": torch.tensor([40.0, 40.0])}).sample[1] - whole[1]).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [True, False])
def test_null_caption_replaces_the_text_and_learns(masked: bool) -> None:
    model, batch = small(pooled_text=True), inputs()
    if not masked:
        del batch["encoder_attention_mask"]
    drop = torch.tensor([True, False])
    out = model(**batch, drop_caption=drop).sample
    torch.testing.assert_close(out[1], model(**batch).sample[1])
    other = batch | {"encoder_hidden_states": batch["encoder_hidden_states"] + 1}
    torch.testing.assert_close(model(**other, drop_caption=drop).sample[0], out[0])
    out.square().mean().backward()
    assert model.y_embedder.y_embedding.grad.abs().max() > 0


@pytest.mark.parametrize("axis", ["space", "frames"])
def test_convolution_sees_neighbours_along_the_attended_axis_only(axis: str) -> None:
    model = small(mlp_conv=True)
    block = model.blocks[0 if axis == "space" else 1]
    grid = TokenGrid(5, torch.zeros(4, 8))
    x = torch.zeros(1, 4, 15, 32)
    x[0, 2, 7] = 1  # frame 2, row 1, column 2 of 3 rows and 5 columns
    frames, patches = block.convolve_neighbours(x, grid).abs().sum(-1)[0].nonzero().unbind(1)
    if axis == "space":
        assert set(frames.tolist()) == {2}
        assert set(patches.tolist()) == {1, 2, 3, 6, 7, 8, 11, 12, 13}
    else:
        assert set(frames.tolist()) == {1, 2, 3}
        assert set(patches.tolist()) == {7}


@pytest.mark.parametrize("frame_positions", [False, True])
def test_frame_positions_distinguish_equal_frames(frame_positions: bool) -> None:
    batch = inputs()
    batch["hidden_states"] = batch["hidden_states"][:, :, :1].expand(-1, -1, 4, -1, -1)
    out = small(frame_positions=frame_positions)(**batch).sample
    alike = torch.allclose(out, out[:, :, :1].expand_as(out), atol=1e-5)
    assert alike == (not frame_positions)


def test_block_orders() -> None:
    assert small().kinds == "STSTST"
    assert small(blocks="STTS").kinds == small(blocks="S T T S").kinds == "STTSST"
    assert small(blocks="S T J", depth=2).kinds == "STJS"
    assert small(blocks="S T S T").config.blocks == "S T" and small(blocks="S T S").config.blocks == "S T S"
    model = small(blocks="S L T J", depth=2)
    names = [type(block).__name__ for block in model.blocks]
    assert names == ["SpatialBlock", "LinearBlock", "TemporalBlock", "JointBlock"]
    assert model.block_patterns("joint") == [r"\bblocks\.3\."]
    with pytest.raises(UserError, match=r"model.blocks = 'S X': 'X' is no kind of block: .* L \(linear\)"):
        small(blocks="S X")
    with pytest.raises(UserError, match="model.blocks = ' ': it names no block"):
        small(blocks=" ")


@pytest.mark.parametrize("how", ["checkpointing", "compile"])
def test_same_numbers_and_gradients(how: str) -> None:
    plain, other, batch = (
        small(mlp_conv=True),
        small(mlp_conv=True),
        inputs() | {"drop_caption": torch.tensor([True, False])},
    )
    if how == "checkpointing":
        other.enable_gradient_checkpointing()
    else:
        torch.compiler.reset()
        other.compile_blocks(backend="aot_eager", fullgraph=True)
    for model in (plain, other):
        model(**batch).sample.square().mean().backward()
    torch.testing.assert_close(other(**batch).sample, plain(**batch).sample)
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
        assert a.grad is not None and a.grad.abs().max() > 0, name


@pytest.mark.slow
def test_compiled_by_inductor_is_the_same() -> None:
    model, batch = small(depth=1), inputs()
    expected = model(**batch).sample
    torch.compiler.reset()
    model.compile_blocks()
    torch.testing.assert_close(model(**batch).sample, expected, atol=1e-4, rtol=1e-4)


def test_save_and_load(tmp_path: Path) -> None:
    model, batch = small(pooled_text=True, blocks="S T T S"), inputs()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "meta.json",
    ]
    again = STDiT.from_pretrained(tmp_path)
    assert again.config.blocks == "S T T S"
    torch.testing.assert_close(again(**batch).sample, model(**batch).sample, atol=0, rtol=0)


def test_with_weights_is_another_model_around_them() -> None:
    model = small()
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    other = model.with_weights(weights)
    assert other.config == model.config
    assert all(tensor.data_ptr() == weights[name].data_ptr() for name, tensor in other.state_dict().items())
    assert not torch.equal(other(**inputs()).sample, model(**inputs()).sample)
    model.load_state_dict(weights)
    assert torch.equal(other(**inputs()).sample, model(**inputs()).sample)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = STDiT(depth=2, hidden_size=32, num_heads=2, caption_channels=12, model_max_length=7)
    assert model(**inputs()).sample.abs().max() == 0
    assert all(block.attn.proj.weight.abs().max() == 0 for block in model.blocks[1::2])
    gates = STDiT(depth=2, hidden_size=1024, num_heads=2, caption_channels=12, gate_init=0.5)
    assert abs(float(gates.blocks[0].scale_shift_table[2].mean()) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 100, "num_heads": 3}, "num_heads = 3.*use 2"),
        ({"hidden_size": 6, "num_heads": 1}, "multiple of 4; use 8|multiple of 4"),
        ({"depth": 0}, "depth = 0: must be from 1 to 10,000,000"),
        ({"patch_size": (1, 0, 2)}, "patch_size"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        STDiTConfig(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 3, 4, 5, 6)}, "3 channels"),
        ({"timestep": torch.zeros(2, 3)}, "timestep has shape"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 5)}, "width 5"),
        ({"encoder_hidden_states": torch.zeros(2, 9, 12)}, "9 tokens"),
        ({"fps": None}, "needs fps"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(**inputs() | change)
