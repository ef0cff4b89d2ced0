"""Files of adapters that cannot be used are refused by their header; peft's own files are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from stdit.errors import UserError
from stdit.lora.adapters import adapter_settings, adapter_weights, load_adapter
from stdit.lora.config import parse_lora
from stdit.lora.files import check_fits, read_adapter, write_adapter
from stdit.lora.header import SETTINGS
from stdit.lora.names import of_layer, to_other_names
from tests.lora.test_adapters import adapted, base_model, output

QKV = "transformer.blocks.0.attn.qkv"
DOWN, UP, LENGTHS = f"{QKV}.lora_A.weight", f"{QKV}.lora_B.weight", f"{QKV}.lora_magnitude_vector"
KOHYA = "lora_unet_blocks_0_attn_qkv"

Tensors = dict[str, Tensor]


def content(dora: bool = False) -> tuple[Tensors, dict[str, Any]]:
    """Weights, with the prefix, and peft's settings."""
    model = adapted(targets="attention", dora=dora)
    weights = {f"transformer.{name}": tensor for name, tensor in adapter_weights(model).items()}
    return weights, adapter_settings(model)


def write(folder: Path, weights: Tensors, settings: Any = None) -> str:
    header = (
        {}
        if settings is None
        else {SETTINGS: settings if isinstance(settings, str) else json.dumps(settings)}
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "a.safetensors", header
    )
    return str(folder / "a.safetensors")


def test_the_key_of_the_settings_is_diffusers_own() -> None:
    assert SETTINGS == LORA_ADAPTER_METADATA_KEY


def without(name: str) -> Callable[[Tensors], object]:
    return lambda weights: weights.pop(name)


def with_(name: str, tensor: Tensor) -> Callable[[Tensors], object]:
    return lambda weights: weights.update({name: tensor})


@pytest.mark.parametrize(
    "dora, change, message",
    [
        (
            False,
            with_(DOWN, torch.zeros(3, 16)),
            r"lora_A.weight \[3, 16\] has the rank 3, and .* 4: must have the same",
        ),
        (
            False,
            without(UP),
            "blocks.0.attn.qkv has .*lora_A.weight, but no lora_B.weight, and a layer needs both",
        ),
        (False, without(DOWN), "blocks.0.attn.qkv has .*lora_B.weight, but no lora_A.weight"),
        (
            False,
            with_(DOWN, torch.zeros(4, 16, 1, 1)),
            r"\[4, 16, 1, 1\]: must be a matrix \[r d_in\], of a linear",
        ),
        (
            False,
            with_(DOWN, torch.zeros(4, 16, dtype=torch.int8)),
            "lora_A.weight has the dtype I8: must be one of F64",
        ),
        (
            False,
            with_("blocks.0.attn.qkv.lora_A.weight", torch.zeros(4, 16)),
            "are the same weight of blocks.0.attn.qkv",
        ),
        (
            False,
            with_(f"{QKV}.lora_B.bias", torch.zeros(48)),
            "lora_bias = False: there are lora_B.bias among the weights",
        ),
        (False, with_(f"{QKV}.lora_B.bias", torch.zeros(4)), r"\[4\]: must have one value .* \[48\]"),
        (False, with_(f"{QKV}.lora_A.bias", torch.zeros(4)), "lora_A.bias: is no weight of an adapter in"),
        (
            True,
            without(LENGTHS),
            "DoRA has a lora_magnitude_vector .* but 1 of .* layers lack it .blocks.0.attn.qkv",
        ),
        (True, with_(LENGTHS, torch.ones(5)), r"\[5\]: DoRA has a length for each of the 48 rows"),
    ],
)
def test_tensors_that_are_no_adapter(dora: bool, change: Any, message: str, tmp_path: Path) -> None:
    weights, settings = content(dora)
    change(weights)
    with pytest.raises(UserError, match=f"lora {tmp_path}/a.safetensors: .*{message}"):
        parse_lora(write(tmp_path, weights, settings))


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", "lora_adapter_metadata in its header cannot be read as JSON"),
        ([1], r"is \[1\]: must be an object of peft's settings"),
        ({"r": 8}, "say that blocks.0.attn.proj has the rank 8, but its weights have 4"),
        ({"r": None}, "r = None: must be the rank"),
        ({"lora_alpha": "8"}, "lora_alpha = '8': must be a finite number"),
        ({"rank_pattern": {"attn.qkv": 2}}, "has the rank 2, but its weights have 4"),
        (
            {"rank_pattern": [1]},
            r"rank_pattern = \[1\]: must be an object of regular expressions and numbers",
        ),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern = {'\\(': 1}: must be an object of regular"),
        ({"use_dora": True}, "use_dora = True: there is no lora_magnitude_vector"),
        ({"use_rslora": 1}, "use_rslora = 1: must be true or false"),
        ({"target_modules": ["attn.proj"]}, "must name blocks.0.attn.qkv, of which there are weights"),
        ({"target_modules": 3}, "target_modules = 3: must be names of layers"),
        ({"lora_bias": True}, "lora_bias = True: there is no lora_B.bias among the weights"),
        ({"of_the_future": 1}, "of_the_future = 1: this kind of adapter is not supported"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights = 'pissa': it begins with a change of the model itself",
        ),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA': must be LORA"),
    ],
)
def test_settings_that_are_not_of_the_tensors(change: Any, message: str, tmp_path: Path) -> None:
    weights, settings = content()
    odd = {**settings, **change} if isinstance(change, dict) else change
    with pytest.raises(UserError, match=message):
        parse_lora(write(tmp_path, weights, odd))


def test_a_module_that_a_file_names_is_not_imported(tmp_path: Path) -> None:
    weights, settings = content()
    odd = {"megatron_config": {}, "megatron_core": "of_a_stranger", "lora_dropout": 0.5}
    found = read_adapter(Path(write(tmp_path, weights, {**settings, **odd})))
    assert found.settings is not None and not found.settings.keys() & odd.keys()
    with pytest.raises(UserError, match="megatron_config = {'a': 1}: this kind of adapter is not supported"):
        read_adapter(Path(write(tmp_path, weights, {**settings, "megatron_config": {"a": 1}})))


def test_what_peft_refuses(tmp_path: Path) -> None:
    weights, settings = content()
    found = read_adapter(Path(write(tmp_path, weights, settings)))
    assert found.settings is not None
    with pytest.raises(UserError, match="lora FILE: peft cannot load it .*of_the_future"):
        load_adapter(base_model(), found.weights, {**found.settings, "of_the_future": 1}, "a", where="FILE")


@pytest.mark.parametrize(
    "change, message",
    [
        (with_(f"{KOHYA}.alpha", torch.ones(2)), r"alpha \[2\]: must be one number"),
        (without(f"{KOHYA}.lora_down.weight"), "has .*, but no lora_A.weight"),
        (
            with_(f"{KOHYA}.dora_scale", torch.ones(1, 16)),
            r"dora_scale \[1, 16\]: DoRA has a length for each of the 48",
        ),
    ],
)
def test_files_of_kohya_that_cannot_be_used(change: Any, message: str, tmp_path: Path) -> None:
    model = adapted(targets="attention")
    weights = to_other_names(adapter_weights(model), adapter_settings(model), "kohya")
    parse_lora(write(tmp_path, weights))
    change(weights)
    with pytest.raises(UserError, match=message):
        parse_lora(write(tmp_path, weights))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    weights, settings = content()
    weights[DOWN][0, 0] = value
    with pytest.raises(
        UserError, match=f"1 of its tensors have values that are NaN or infinite, such as {DOWN}"
    ):
        read_adapter(Path(write(tmp_path, weights, settings)))


def test_lengths_of_another_layer(tmp_path: Path) -> None:
    model = adapted(dora=True, targets="attention")
    weights = adapter_weights(model)
    weights["blocks.0.attn.qkv.lora_B.weight"] = torch.zeros(5, 4)
    weights["blocks.0.attn.qkv.lora_magnitude_vector"] = torch.zeros(5)
    file = write_adapter(tmp_path, weights, adapter_settings(model), None)
    with pytest.raises(UserError, match="blocks.0.attn.qkv: gives 48 channels, not 5"):
        check_fits(file, base_model())


@pytest.mark.parametrize("name", ["a.PT", "a.bin", "a.Pth", "a.CKPT"])
def test_pickles_are_refused_in_any_case(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle"):
        parse_lora(str(tmp_path / name))


@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_itself_writes(dora: bool, tmp_path: Path) -> None:
    """With its prefix, and its settings in a file beside."""
    model = base_model()
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["attn.qkv", "mlp.fc1"],
        rank_pattern={"fc1": 2},
        alpha_pattern={r"blocks\.\d+\.attn\.qkv": 5},
        use_dora=dora,
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, settings)  # type: ignore[arg-type]
    expected = output(model)
    wrapped.save_pretrained(str(tmp_path))
    found = read_adapter(parse_lora(str(tmp_path)).file)
    check_fits(tmp_path / "adapter_model.safetensors", base_model())
    again = base_model()
    load_adapter(again, found.weights, found.settings, "a")
    torch.testing.assert_close(output(again), expected, atol=1e-6, rtol=1e-6)
    assert found.settings is not None
    others = to_other_names(found.weights, found.settings, "comfyui")
    alphas = {name.split(".")[-2]: float(tensor) for name, tensor in others.items() if name.endswith("alpha")}
    assert alphas == {"qkv": 5.0, "fc1": 6.0}


def test_patterns_are_found_as_peft_finds_them() -> None:
    layers = ["blocks.0.attn.qkv", "blocks.10.attn.qkv", "blocks.0.cross_attn.proj", "t_block.1"]
    for pattern in (
        "qkv",
        "attn.qkv",
        "^blocks.0.attn.qkv",
        r"blocks\.\d.attn.qkv",
        "attn.proj",
        "1",
        "blocks",
    ):
        for layer in layers:
            expected = {pattern: 1}.get(get_pattern_key([pattern], layer), 2)
            assert of_layer({pattern: 1}, layer, 2) == expected
