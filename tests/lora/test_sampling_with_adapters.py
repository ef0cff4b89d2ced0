"""`sample.py --lora`: files, weights, prompts files, several adapters, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

import sample
from stdit.errors import UserError
from stdit.lora.config import parse_lora
from stdit.lora.files import base_hash, merge_adapters
from stdit.pipelines.loras import use_loras
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.requests import Request
from stdit.pipelines.runner import sample_videos
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_model, tiny_pipeline


@pytest.fixture
def pipe(tmp_path: Path) -> STDiTPipeline:
    return tiny_pipeline(tmp_path)


def videos(pipe: STDiTPipeline, *loras: tuple[str, ...], batch_size: int = 8) -> list[np.ndarray]:
    requests = [Request("a red circle", 1, loras=tuple(map(parse_lora, of_one))) for of_one in loras]
    return [video.frames for video in sample_videos(pipe, requests, batch_size)]


def test_each_video_has_its_own_adapters(pipe: STDiTPipeline, tmp_path: Path) -> None:
    base = videos(pipe, ())[0]
    files = [
        str(write_random_adapter(tmp_path / f"{targets}.safetensors", pipe.transformer, targets=targets))
        for targets in ("spatial", "temporal")
    ]
    one, two = files
    choices = [(), (one,), (f"{two}:0.5",), (one, two), (f"{one}:0",), ()]
    found = videos(pipe, *choices)
    assert np.array_equal(found[0], base) and np.array_equal(found[5], base)
    assert np.array_equal(found[4], base), "weight 0 is the base"
    assert len({frames.tobytes() for frames in found}) == 4
    for frames, choice in zip(found, choices, strict=True):
        assert np.array_equal(videos(pipe, choice)[0], frames), "alone as among others"


def sample_main(monkeypatch: pytest.MonkeyPatch, *flags: Any) -> None:
    argv = ["sample.py", "--num_inference_steps", "1", *map(str, flags)]
    monkeypatch.setattr("sys.argv", argv)
    sample.main()


def test_on_the_command_line(pipe: STDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    known = base_hash(pipe.transformer)
    write_random_adapter(tmp_path / "prompts" / "a.safetensors", pipe.transformer, known)
    lines = [
        {"prompt": "a", "lora": "a.safetensors:0.5"},
        {"prompt": "b", "lora": ["a.safetensors"]},
        {"prompt": "c"},
    ]
    (tmp_path / "prompts" / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = ["--checkpoint", tmp_path / "saved", "--prompts", tmp_path / "prompts" / "p.jsonl"]
    sample_main(monkeypatch, *prompts, "--output", tmp_path / "out")
    recorded = [
        json.loads(file.read_text()).get("loras") for file in sorted((tmp_path / "out").glob("*.json"))
    ]
    assert [one and one[0]["weight"] for one in recorded] == [0.5, 1.0, None]

    write_random_adapter(tmp_path / "b.safetensors", pipe.transformer, "xxh3:0")
    flags = ["--checkpoint", tmp_path / "saved", "--prompt", "a", "--lora", tmp_path / "b.safetensors"]
    with pytest.raises(UserError, match="was trained on the weights xxh3:0, and the checkpoint has xxh3:"):
        sample_main(monkeypatch, *flags, "--output", tmp_path / "other")
    assert not list((tmp_path / "other").glob("*"))
    sample_main(monkeypatch, *flags, "--lora_other_base", "--output", tmp_path / "other")
    assert len(list((tmp_path / "other").glob("*.mp4"))) == 1
    with pytest.raises(UserError, match="prompt 0: lora none.safetensors: there is no such file or folder"):
        sample_main(monkeypatch, *flags[:-1], "none.safetensors")
    for empty in ("", ":0.5"):
        with pytest.raises(UserError, match=f"prompt 0: lora = '{empty}': names no file"):
            sample_main(monkeypatch, *flags[:-1], empty)


def test_another_architecture_is_refused_before_the_model_loads(
    pipe: STDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    file = write_random_adapter(tmp_path / "a.safetensors", tiny_model(mlp_ratio=2.0))
    monkeypatch.setattr("stdit.pipelines.sampling.load_pipeline", None)
    with pytest.raises(
        UserError, match="is of another architecture: .* do not fit .*fc1: gives 64 channels, not 32"
    ):
        sample_main(monkeypatch, "--checkpoint", tmp_path / "saved", "--prompt", "a", "--lora", file)


@pytest.mark.parametrize("value", ["", ":0.5", [" "], ["a.safetensors", ""]])
def test_an_empty_name_in_a_prompts_file(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stand for the folder, and the one adapter in it."""
    write_random_adapter(tmp_path / "a.safetensors", tiny_model())
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(json.dumps(one) + "\n" for one in ({"prompt": "a"}, {"prompt": "b", "lora": value}))
    )
    with pytest.raises(UserError, match=f"{file}, prompt 2: lora = .*: names no file"):
        sample_main(monkeypatch, "--prompts", file)


def test_a_wrong_adapter_in_a_prompts_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "lora": "a.safetensors"}\n')
    with pytest.raises(UserError, match=f"prompt 1: lora {tmp_path / 'a.safetensors'}: cannot be read"):
        sample_main(monkeypatch, "--prompts", tmp_path / "p.jsonl")


def test_a_video_is_finished_whatever_folder_its_adapter_lies_in(
    pipe: STDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    file = write_random_adapter(tmp_path / "a.safetensors", pipe.transformer)
    flags = ["--checkpoint", tmp_path / "saved", "--prompt", "a", "--output", tmp_path / "out", "--lora"]
    sample_main(monkeypatch, *flags, file)
    moved = file.rename(tmp_path / "b.safetensors")
    sample_main(monkeypatch, *flags, moved)
    assert "the video is finished already" in capsys.readouterr().out
    sample_main(monkeypatch, *flags, f"{moved}:0.5")
    other = write_random_adapter(tmp_path / "c.safetensors", pipe.transformer, targets="spatial")
    sample_main(monkeypatch, *flags, other)
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3


def test_a_scale_of_0_leaves_the_weights_as_they_were(pipe: STDiTPipeline, tmp_path: Path) -> None:
    def latents(**more: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        return pipe("a", generator=generator, output_type="latent", **more).frames

    base = latents()
    pipe.load_lora_weights(str(write_random_adapter(tmp_path / "a", pipe.transformer)), adapter_name="a")
    pipe.set_adapters("a", 0.3)
    expected = latents()
    assert torch.equal(latents(attention_kwargs={"scale": 0}), base)
    assert torch.equal(latents(), expected)
    assert not torch.equal(latents(attention_kwargs={"scale": 0.7}), expected)
    assert torch.equal(latents(), expected)


def test_an_adapter_that_is_given_twice_counts_twice(pipe: STDiTPipeline, tmp_path: Path) -> None:
    file = write_random_adapter(tmp_path / "a", pipe.transformer)
    for twice in ((f"{file}", f"{file}:0.5"), (f"{file}:0.5", f"{file}")):
        ((found,), (expected,)) = (videos(pipe, one) for one in (twice, (f"{file}:1.5",)))
        assert np.array_equal(found, expected)


def test_merged_adapters_of_several_kinds_equal_unmerged_ones(pipe: STDiTPipeline, tmp_path: Path) -> None:
    plain = write_random_adapter(tmp_path / "a", pipe.transformer)
    dora = write_random_adapter(tmp_path / "b", pipe.transformer, dora=True)
    specs = [parse_lora(f"{plain}:0.5"), parse_lora(str(dora))]
    use_loras(pipe, specs)
    expected = latents_of(pipe)
    pipe.unload_lora_weights()
    with pytest.raises(UserError, match=r"both change blocks\.\d.* by DoRA"):
        merge_adapters(pipe.transformer, [specs[1], parse_lora(f"{dora}:0.3")])
    merge_adapters(pipe.transformer, specs)
    torch.testing.assert_close(latents_of(pipe), expected, atol=1e-5, rtol=1e-5)


def latents_of(pipe: STDiTPipeline) -> torch.Tensor:
    found: torch.Tensor = pipe("a", generator=torch.Generator().manual_seed(1), output_type="latent").frames
    return found


def test_python_checks_local_files_too(pipe: STDiTPipeline, tmp_path: Path) -> None:
    other = write_random_adapter(tmp_path / "other", tiny_model(hidden_size=64))
    with pytest.raises(UserError, match="is of another architecture"):
        pipe.load_lora_weights(other)
    foreign = write_random_adapter(tmp_path / "foreign", pipe.transformer, base_hash="sha256:1")
    with pytest.raises(UserError, match="was trained on the weights sha256:1, .* add other_base=True"):
        pipe.load_lora_weights(foreign)
    assert not getattr(pipe.transformer, "peft_config", {})
    pipe.load_lora_weights(foreign, other_base=True)
    pipe.unload_lora_weights()
    pipe.transformer.to(torch.bfloat16)  # of these weights nothing is known
    pipe.load_lora_weights(foreign.parent, weight_name=foreign.name)


def test_the_file_of_a_model_alone_is_loaded_into_a_pipeline(pipe: STDiTPipeline, tmp_path: Path) -> None:
    file = write_random_adapter(tmp_path / "a", pipe.transformer)
    pipe.load_lora_weights(file)
    expected = latents_of(pipe)
    pipe.transformer.save_lora_adapter(tmp_path / "b", adapter_name="default_0")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "b")
    assert torch.equal(latents_of(pipe), expected)


def test_a_loaded_adapter_leaves_the_model_in_its_mode(pipe: STDiTPipeline, tmp_path: Path) -> None:
    """Its own layers too: those of peft begin in training mode, with the dropout of its settings."""
    file = write_random_adapter(tmp_path / "a", pipe.transformer)
    pipe.load_lora_weights(file)
    modes = {module.training for module in pipe.transformer.modules()}
    assert modes == {False}


@pytest.mark.parametrize("recorded", [True, False])
def test_an_adapter_with_biases(recorded: bool, pipe: STDiTPipeline, tmp_path: Path) -> None:
    """From a file as from memory, with peft's settings in it and without, and merged."""
    layers = ["attn.proj", "mlp.fc1"]
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers, lora_bias=True), "a")
    weights = {}
    generator = torch.Generator().manual_seed(2)
    for name, tensor in get_peft_model_state_dict(pipe.transformer, adapter_name="a").items():
        weights[f"transformer.{name}"] = 0.2 * torch.randn(tensor.shape, generator=generator)
    metadata = pipe.transformer.peft_config["a"].to_dict() if recorded else None
    pipe.unload_lora_weights()
    pipe.load_lora_weights(weights, adapter_name="b")
    expected = latents_of(pipe)
    pipe.unload_lora_weights()
    assert not torch.allclose(latents_of(pipe), expected, atol=1e-3)
    own = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    pipe.save_lora_weights(tmp_path, own, transformer_lora_adapter_metadata=metadata)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(latents_of(pipe), expected)
    pipe.unload_lora_weights()
    merge_adapters(pipe.transformer, [parse_lora(str(tmp_path))])
    torch.testing.assert_close(latents_of(pipe), expected, atol=1e-5, rtol=1e-5)


def test_values_that_overflow_are_not_written_as_a_video(pipe: STDiTPipeline, tmp_path: Path) -> None:
    file = write_random_adapter(tmp_path / "a", pipe.transformer)
    with pytest.raises(UserError, match="NaN or infinite: lower the weights of the adapters"):
        videos(pipe, (f"{file}:1e39",))


@pytest.mark.parametrize("dora", [False, True])
def test_weight_0_is_the_model_without(dora: bool, pipe: STDiTPipeline, tmp_path: Path) -> None:
    file = write_random_adapter(tmp_path / "a", pipe.transformer, dora=dora)

    def latents(*weights: float) -> Any:
        use_loras(pipe, [parse_lora(f"{file}:{weight}") for weight in weights])
        return pipe("a", generator=torch.Generator().manual_seed(1), output_type="latent").frames

    base, one = latents(), latents(1.0)
    assert not torch.equal(one, base)
    assert torch.equal(latents(0.0), base) and torch.equal(latents(1.0), one)
    before = {
        name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items() if "lora_" not in name
    }
    merge_adapters(pipe.transformer, [parse_lora(f"{file}:0")])
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_base_is_known_whatever_file_it_came_from(pipe: STDiTPipeline, tmp_path: Path) -> None:
    known = base_hash(pipe.transformer)
    file = write_random_adapter(tmp_path / "a.safetensors", pipe.transformer, known)
    use_loras(pipe, [parse_lora(str(file))], any_base=False)
    assert base_hash(pipe.transformer) == known
    pipe.transformer = tiny_model()
    with torch.no_grad():
        pipe.transformer.t_block[1].bias += 1
    with pytest.raises(UserError, match="add --lora_other_base to use it here"):
        use_loras(pipe, [parse_lora(str(file))], any_base=False)
