"""Adapters in a model, their files, and other programs' names."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stdit.errors import UserError
from stdit.lora.adapters import (
    adapter_settings,
    adapter_weights,
    add_adapter,
    linear_layers,
    load_adapter,
    merge_adapter,
    target_layers,
)
from stdit.lora.config import LoRAConfig
from stdit.lora.files import base_hash, check_fits, read_adapter, write_adapter
from stdit.lora.names import AdapterFormat, from_other_names, to_other_names
from stdit.models.stdit import STDiT
from tests.lora.tiny import add_random_adapter
from tests.pipelines.tiny import tiny_model, tiny_pipeline


def base_model(**settings: Any) -> STDiT:
    """The same model each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_model(**settings)


def output(model: STDiT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(1)
    with torch.no_grad():
        return model(  # type: ignore[no-any-return]
            hidden_states=torch.randn(2, 3, 4, 8, 8, generator=generator),
            timestep=torch.tensor([300.0, 700.0]),
            encoder_hidden_states=torch.randn(2, 5, 16, generator=generator),
            fps=8 * one,
            height=8 * one,
            width=8 * one,
        ).sample


def adapted(**settings: Any) -> STDiT:
    """A model with an adapter, of which no weight is zero."""
    model = base_model()
    add_random_adapter(model, **settings)
    return model


KINDS: list[dict[str, Any]] = [{}, {"dora": True}, {"rslora": True}, {"targets": "temporal"}]


@pytest.mark.parametrize("settings", KINDS)
def test_merged_equals_unmerged_and_weight_0_is_the_base(settings: dict[str, Any]) -> None:
    base, model = output(base_model()), adapted(**settings)
    expected = output(model)
    assert not torch.allclose(expected, base, atol=1e-2)
    if "dora" not in settings:  # its lengths are no sum that a weight of 0 would remove
        model.set_adapters(["default"], [0.0])
        assert torch.equal(output(model), base)
        model.set_adapters(["default"], [1.0])
    merge_adapter(model)
    assert not any("lora_" in name for name in model.state_dict())
    torch.testing.assert_close(output(model), expected, atol=1e-6, rtol=1e-6)


def test_a_new_adapter_changes_nothing_and_alone_is_trained() -> None:
    model = base_model()
    state = torch.get_rng_state()
    add_adapter(model, LoRAConfig(rank=2), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(model), output(base_model()))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    again = base_model()
    add_adapter(again, LoRAConfig(rank=2), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_targets() -> None:
    model = base_model()
    blocks = set(target_layers(model, "blocks"))
    assert set(target_layers(model, "attention")) | set(target_layers(model, "mlp")) == blocks
    spatial, temporal = (set(target_layers(model, kind)) for kind in ("spatial", "temporal"))
    assert spatial | temporal == blocks and not spatial & temporal
    assert "blocks.0.attn.qkv" in spatial and "blocks.1.attn.qkv" in temporal
    assert target_layers(model, r"blocks\.\d+\.mlp\.fc1") == [f"blocks.{i}.mlp.fc1" for i in range(4)]
    assert {"final_layer.linear", "t_block.1"} <= linear_layers(model).keys()
    with pytest.raises(UserError, match="'to_q': no linear layer has such a name. There are: .*attn.qkv"):
        target_layers(model, "to_q")


def test_several_named_targets_and_what_is_none() -> None:
    model = base_model()
    both = target_layers(model, "attention|temporal")
    assert set(both) == {*target_layers(model, "attention"), *target_layers(model, "temporal")}
    for wrong in ("", '["attention","mlp"]', "attention, mlp", "attention|to_q"):
        with pytest.raises(
            UserError, match="lora.targets = .*: must be of the names attention, .* joined by"
        ):
            LoRAConfig(rank=2, targets=wrong)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rank=17), "lora.rank = 17: is above 16, the rank of blocks.0.attn.qkv itself"),
        (dict(rank=0), "lora.rank = 0: must be at least 1"),
        (dict(alpha=-1.0), "lora.alpha = -1.0: must be positive"),
        (dict(dropout=1.0), "lora.dropout = 1.0"),
        (
            dict(dropout=0.1, targets="final_layer"),
            "lora.dropout = 0.1: is for layers in the blocks, and lora.targets",
        ),
        (dict(targets="("), "lora.targets = '\\('.* nor a regular expression"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(**settings)


@pytest.mark.parametrize("settings", KINDS)
def test_diffusers_loads_the_file(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**settings)
    known = base_hash(model)
    file = write_adapter(tmp_path, adapter_weights(model), adapter_settings(model), known)
    found = read_adapter(tmp_path)
    assert found.base_hash == known and found.settings is not None and found.settings["lora_alpha"] == 6.0
    assert all(torch.equal(found.weights[name], value) for name, value in adapter_weights(model).items())
    pipe = tiny_pipeline(tmp_path)
    pipe.transformer = base_model()
    pipe.load_lora_weights(str(tmp_path), adapter_name="a")
    torch.testing.assert_close(output(pipe.transformer), output(model), atol=1e-6, rtol=1e-6)
    assert file.name == "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("target", ["kohya", "comfyui"])
@pytest.mark.parametrize("settings", [*KINDS, {"targets": "."}])
def test_names_of_other_programs(target: AdapterFormat, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**settings)
    weights = adapter_weights(model)
    renamed = to_other_names(weights, adapter_settings(model), target)
    prefix = {"kohya": "lora_unet_blocks_1_attn_qkv", "comfyui": "diffusion_model.blocks.1.attn.qkv"}[target]
    assert torch.equal(renamed[f"{prefix}.lora_down.weight"], weights["blocks.1.attn.qkv.lora_A.weight"])
    assert float(renamed[f"{prefix}.alpha"]) == (12.0 if settings.get("rslora") else 6.0)
    save_file(renamed, tmp_path / "other.safetensors")
    found = read_adapter(tmp_path / "other.safetensors")
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in weights.items())
    assert found.settings is not None
    again = to_other_names(found.weights, found.settings, target)
    assert again.keys() == renamed.keys() and all(torch.equal(again[name], renamed[name]) for name in again)


def test_the_file_of_a_model_alone_keeps_its_scale_and_no_dropout(tmp_path: Path) -> None:
    model = adapted(dropout=0.5).eval()
    expected = output(model)
    model.save_lora_adapter(tmp_path)
    found = read_adapter(tmp_path)
    assert found.settings is not None and found.settings["lora_alpha"] == 6.0
    again = base_model()
    load_adapter(again, found.weights, found.settings, "again")
    torch.testing.assert_close(output(again), expected, atol=1e-6, rtol=1e-6)
    assert adapter_settings(model)["lora_dropout"] == 0.0


def test_a_model_with_adapters_is_saved_without_them_or_merged(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(UserError, match="the model has the adapters default: save them by save_lora_adapter"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    expected = output(model)
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(STDiT.from_pretrained(tmp_path)), expected, atol=1e-6, rtol=1e-6)


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    model = adapted()
    file = write_adapter(tmp_path, adapter_weights(model), adapter_settings(model), None)
    other = base_model(depth=1, mlp_ratio=2.0)
    with pytest.raises(
        UserError, match=r"another architecture: .* layers do not fit \(.*fc1: gives 32 channels"
    ):
        check_fits(file, other)
    check_fits(file, base_model())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps({}))
    (tmp_path / "b.safetensors").write_bytes(b"damaged")
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    (tmp_path / "none").mkdir()
    for name, message in (
        ("a.bin", "is a pickle, and reading one can run anything"),
        ("b.safetensors", "cannot be read"),
        ("c.safetensors", "has no weights of an adapter, but 1 tensors such as x"),
        ("d.safetensors", "there is no such file"),
        ("none", "has no .safetensors file"),
        (".", "has 2 .safetensors files: name one"),
    ):
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path / name)
    with pytest.raises(UserError, match="is no weight of an adapter in the format"):
        from_other_names({"lora_unet_blocks_0_attn_qkv.hada_w1_a": torch.zeros(1)})
    assert load_file(tmp_path / "c.safetensors")
