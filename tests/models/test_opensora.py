"""Open-Sora's checkpoints: every format, and the errors for unusable ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stdit.errors import UserError
from stdit.models.config import STDiTConfig
from stdit.models.opensora import infer_settings, opensora_names, stdit_names, to_opensora
from stdit.models.stdit import STDiT
from tests.models.golden import GOLDEN, golden, settings, weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return weights(golden("plain"))


def save_in_shards(state: State, folder: Path, kind: str) -> None:
    """Write three files and their index, as transformers and Open-Sora's trainer do."""
    names = sorted(state)
    weight_map = {}
    for part in range(3):
        file = f"part-{part}.{kind}"
        shard = {name: state[name] for name in names[part::3]}
        save_file(shard, folder / file) if kind == "safetensors" else torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"model.{kind}.index.json").write_text(json.dumps(index))


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("case", GOLDEN)
def test_settings_are_inferred_from_shapes(case: str) -> None:
    expected = settings(case)
    model = STDiT.from_opensora(weights(golden(case)))
    for name in expected.keys() - {"class_dropout_prob"}:
        value = expected[name]
        assert model.config[name] == (tuple(value) if isinstance(value, list) else value), name


def test_heads_without_their_norm(state: State) -> None:
    bare = {name: tensor for name, tensor in state.items() if "_norm" not in name}
    assert STDiT.from_opensora(bare).config.num_heads == 4
    del bare["rope.freqs"]
    assert "num_heads" not in infer_settings(bare)
    model = STDiT.from_opensora(bare, num_heads=2, input_sq_size=256)
    assert (model.config.num_heads, model.config.qk_norm, model.config.input_sq_size) == (2, False, 256)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "shards.safetensors", "shards.bin", "file", "index"])
def test_every_form_of_a_checkpoint(state: State, kind: str, tmp_path: Path) -> None:
    source = tmp_path
    if kind.startswith("shards") or kind == "index":
        save_in_shards(state, tmp_path, kind.partition(".")[2] or "bin")
        source = tmp_path / "model.bin.index.json" if kind == "index" else tmp_path
    elif kind == "pth":
        torch.save(state, tmp_path / "ema.pth")
    else:
        save_file(state, tmp_path / "model.safetensors")
        source = tmp_path / "model.safetensors" if kind == "file" else tmp_path
    (tmp_path / "config.json").write_text(json.dumps(settings("plain") | {"input_sq_size": 256}))
    model = STDiT.from_opensora(str(source))
    assert model.config.input_sq_size == 256 and not model.training
    names = opensora_names(model.config)
    found = {names(name): tensor for name, tensor in model.state_dict().items()}
    assert same(found, {name: tensor for name, tensor in state.items() if name != "rope.freqs"})


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converting_to_opensora_and_back_is_exact(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in weights(golden(case)).items()}
    model = STDiT.from_opensora(state)
    assert model.dtype == dtype
    again, config = to_opensora(model.state_dict(), model.config)
    assert same(again, state)
    assert all(again[name].dtype == dtype for name in again)
    save_file(again, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dict(STDiT.from_opensora(tmp_path).config) == dict(model.config)


@pytest.mark.parametrize(
    "settings, there",
    [
        ({"blocks": "S T"}, "temporal_blocks.1"),
        ({"blocks": "S T T S"}, "spatial_blocks.1"),
        ({"block_order": "paired"}, "spatial_blocks.1"),  # as older checkpoints have it
    ],
)
def test_names_of_blocks(settings: dict[str, Any], there: str) -> None:
    settings = {"depth": 3, **settings}
    assert opensora_names(settings)("blocks.3.attn.qkv.weight") == f"{there}.attn.qkv.weight"
    assert stdit_names(settings)(f"{there}.attn.qkv.weight.exp_avg") == "blocks.3.attn.qkv.weight.exp_avg"
    for name in ("t_block.1.bias", "blocks.0.attn.qkv.weight", "spatial_blocks.3.mlp.fc1.bias"):
        assert stdit_names(settings)(name) == name


def test_a_model_folder_with_opensoras_names_of_blocks(state: State, tmp_path: Path) -> None:
    model = STDiT.from_opensora(state)
    model.save_config(tmp_path)
    names = opensora_names(model.config)
    old = {names(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert same(STDiT.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_single_file(state: State, dtype: torch.dtype | None, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    model = STDiT.from_single_file(str(tmp_path / "w.safetensors"), torch_dtype=dtype)
    expected = STDiT.from_opensora(state)
    assert STDiTConfig.read(model.config) == STDiTConfig.read(expected.config) and not model.training
    assert same(model.state_dict(), {n: t.to(dtype or t.dtype) for n, t in expected.state_dict().items()})
    save_file(
        {name: tensor for name, tensor in state.items() if name != "t_block.1.bias"},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(UserError, match=r"missing: t_block.1.bias \[288\]"):
        STDiT.from_single_file(str(tmp_path / "w.safetensors"))


def test_a_model_with_options_that_opensora_lacks_is_refused(state: State) -> None:
    model = STDiT.from_opensora(state, blocks="S T T S", gate_init=0.5)
    with pytest.raises(UserError, match="this model has blocks = S T T S, which Open-Sora"):
        to_opensora(model.state_dict(), model.config)


def test_every_key_that_does_not_fit_is_listed(state: State) -> None:
    odd = {name: tensor for name, tensor in state.items() if name not in ("t_block.1.bias", "rope.freqs")}
    odd |= {"pos_embed": torch.zeros(1, 3), "spatial_blocks.1.attn.proj.bias": torch.zeros(7)}
    with pytest.raises(UserError) as caught:
        STDiT.from_opensora(odd)
    for line in (
        "missing: t_block.1.bias [288]",
        "surplus: pos_embed [1, 3]",
        "of another shape: spatial_blocks.1.attn.proj.bias [7], not [48]",
    ):
        assert f"\n  {line}\n" in str(caught.value)
    with pytest.raises(UserError, match=r"(?s)missing: spatial_blocks\.2\..*\.\.\. and \d+ more"):
        STDiT.from_opensora(state, depth=3)


def test_other_rotary_frequencies(state: State) -> None:
    with pytest.raises(UserError, match="other frequencies than 10000"):
        STDiT.from_opensora(state | {"rope.freqs": 2 * state["rope.freqs"]})


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("never",)


def broken(kind: str, state: State, folder: Path) -> Path:
    """Return a source with one fault."""
    file = folder / ("w.safetensors" if kind in ("cut short", "pointer", "two") else "w.pth")
    if kind == "code":
        torch.save({"x": Code()}, file)
    elif kind == "nested":
        torch.save({"state_dict": state, "step": 3}, file)
    elif kind == "tensor":
        torch.save(torch.zeros(2), file)
    elif kind == "text":
        file.write_text("weights to follow")
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "empty dict":
        torch.save({}, file)
    elif kind in ("cut short", "pickle cut short", "two"):
        save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
        if kind == "two":
            save_file(state, folder / "v.safetensors")
        else:
            file.write_bytes(file.read_bytes()[:-999])
    elif kind == "other model":
        (folder / "config.json").write_text('{"model_type": "STDiT2"}')
    elif kind in ("lost shard", "shard elsewhere"):
        save_in_shards(state, folder, "safetensors")
        if kind == "lost shard":
            (folder / "part-1.safetensors").unlink()
        else:
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')
    elif kind == "empty index":
        (folder / "model.bin.index.json").write_text('{"weight_map": []}')
    elif kind == "torn config":
        (folder / "config.json").write_text("{")
    return folder / "absent" if kind == "absent" else folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "absent: there is no such file or folder"),
        ("nothing", "holds no .safetensors, .pth, .pt or .bin"),
        ("two", "holds v.safetensors, w.safetensors, and no index that joins them"),
        ("code", "w.pth is a pickle of more than tensors, and reading one can run anything"),
        ("nested", "holds a dict with the keys state_dict, step, not a plain state dict"),
        ("tensor", "w.pth holds no dict of tensors"),
        ("empty index", "names no files"),
        ("text", "w.pth is no checkpoint of PyTorch, or damaged"),
        ("pointer", "w.safetensors is only a pointer of Git LFS"),
        ("empty dict", "it lacks x_embedder.proj.weight, .* and has 0 tensors such as none"),
        ("cut short", "w.safetensors cannot be read .* cut short"),
        ("pickle cut short", "w.pth cannot be read .* cut short"),
        ("other model", "config.json is that of a STDiT2, not of Open-Sora's STDiT3"),
        ("lost shard", "names part-1.safetensors, which is not beside it"),
        ("shard elsewhere", "names ../x.safetensors, which is not beside it"),
        ("torn config", "config.json' is not JSON"),
    ],
)
def test_unusable_checkpoints_are_refused(
    state: State, kind: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(UserError, match=message):
        STDiT.from_opensora(broken(kind, state, tmp_path))
    assert "never" not in capsys.readouterr().out


def test_a_checkpoint_of_another_architecture_is_refused() -> None:
    with pytest.raises(UserError, match="lacks .* has 1 tensors such as blocks.0.attn.qkv.weight"):
        STDiT.from_opensora({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)})
