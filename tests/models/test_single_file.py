"""`STDiT.from_single_file` on weights with our own names: settings from their shapes, and what those leave open."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stdit.errors import UserError
from stdit.models.config import STDiTConfig
from stdit.models.stdit import STDiT
from tests.models.test_diffusers_features import sample
from tests.pipelines.tiny import tiny_model

QUICKSTART: dict[str, Any] = dict(cross_attention="spatial", pooled_text=True, mlp_conv=True)


def written(model: STDiT, folder: Path) -> str:
    file = folder / "weights.safetensors"
    save_file(model.state_dict(), file)
    return str(file)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pred_sigma": True, "mlp_ratio": 2.9375, "depth": 1, "num_heads": 4},
        {"cross_attention": "spatial", "blocks": "T S S T"},
        {**QUICKSTART, "blocks": "S T T S"},
        {**QUICKSTART, "blocks": "S S T S"},
    ],
)
def test_settings_come_from_shapes(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**settings)
    loaded = STDiT.from_single_file(written(model, tmp_path))
    assert STDiTConfig.read(loaded.config) == STDiTConfig.read(model.config) and not loaded.training
    assert torch.equal(sample(loaded), sample(model))


def test_a_width_of_the_mlp_whose_ratio_is_rounded_down() -> None:
    model = tiny_model(hidden_size=44, mlp_ratio=2.73)
    assert model.blocks[0].mlp.fc1.out_features == 120 and int(44 * (120 / 44)) == 119
    assert torch.equal(sample(STDiT.from_single_file(model.state_dict())), sample(model))


def test_what_shapes_do_not_tell_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(input_sq_size=32, frame_positions=True, **QUICKSTART)
    file = written(model, tmp_path)
    with caplog.at_level(logging.WARNING):
        STDiT.from_single_file(file)
    assert "input_sq_size = 512, frame_positions = False is assumed" in caplog.text
    caplog.clear()
    given = {"input_sq_size": 32, "frame_positions": True}
    assert torch.equal(sample(STDiT.from_single_file(file, original_config=given)), sample(model))
    model.save_config(tmp_path / "config")
    assert torch.equal(sample(STDiT.from_single_file(file, config=str(tmp_path / "config"))), sample(model))
    assert not caplog.text


@pytest.mark.parametrize(
    "settings, open_setting",
    [
        ({"qk_norm": False}, "num_heads (there is no QK norm)"),
        ({**QUICKSTART, "blocks": "S J"}, "blocks (joint and linear ones have equal shapes)"),
        ({"guidance_range": (1.0, 8.0)}, "guidance_range"),
    ],
)
def test_what_shapes_leave_open_is_refused(
    settings: dict[str, Any], open_setting: str, tmp_path: Path
) -> None:
    model = tiny_model(**settings)
    file = written(model, tmp_path)
    with pytest.raises(UserError) as caught:
        STDiT.from_single_file(file)
    assert f"do not tell {open_setting}: give config=FOLDER" in str(caught.value)
    name = open_setting.partition(" ")[0]
    loaded = STDiT.from_single_file(file, original_config={name: model.config[name]})
    assert loaded.config[name] == model.config[name] and loaded.kinds == model.kinds


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    weights = tiny_model().state_dict()
    del weights["blocks.1.attn.proj.bias"]
    with pytest.raises(UserError, match=r"missing: blocks.1.attn.proj.bias \[16\]"):
        STDiT.from_single_file(weights)
    with pytest.raises(UserError, match="no weights of an STDiT: it lacks x_embedder.proj.weight"):
        STDiT.from_single_file({"blocks.0.weight": torch.zeros(1)})
