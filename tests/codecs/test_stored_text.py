"""Stored text states against the encoder that computed them."""

from pathlib import Path

import pytest
import torch

from stdit.codecs import build_text_encoder, stored_text
from stdit.codecs.config import TextEncoderConfig
from stdit.codecs.stored_text import StoredTextEncoder, store_text
from stdit.codecs.text import TextEncoder
from stdit.codecs.transformers_text import TransformersTextEncoder, clean_caption
from stdit.errors import UserError
from tests.codecs.tiny import save_tiny_bert, save_tiny_t5

CAPTIONS = ["a red circle", "", "blue", "a red circle moves to the left", "圆 star"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    path = save_tiny_t5(tmp_path_factory.mktemp("t5"))
    return build_text_encoder(TextEncoderConfig(name="t5", path=str(path), max_length=12))


def stored(
    encoder: TextEncoder, folder: Path, captions: list[str] = CAPTIONS, **options: object
) -> StoredTextEncoder:
    list(store_text(encoder, captions, folder, torch.float32, **options))  # type: ignore[arg-type]
    return StoredTextEncoder(folder)


def test_stored_states_equal_those_of_the_encoder(encoder: TextEncoder, tmp_path: Path) -> None:
    found = stored(encoder, tmp_path)
    for texts in (CAPTIONS, CAPTIONS[::-1], ["blue", "blue"]):
        for one, other in zip(found.encode(texts), encoder.encode(texts), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (found.channels, found.max_length) == (encoder.channels, encoder.max_length)
    assert found.fingerprint() == encoder.fingerprint()


def test_only_new_captions_are_added(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_text, "CAPTIONS_PER_FILE", 2)
    assert list(store_text(encoder, CAPTIONS[:3], tmp_path)) == [2, 1]
    assert list(store_text(encoder, CAPTIONS, tmp_path)) == [2]
    assert list(store_text(encoder, CAPTIONS, tmp_path)) == []
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    files[0].unlink()  # as one does with a damaged one
    assert list(store_text(encoder, CAPTIONS, tmp_path)) == [2]
    assert sorted(tmp_path.glob("*.safetensors")) == files
    states, _ = StoredTextEncoder(tmp_path).encode(CAPTIONS)
    torch.testing.assert_close(states, encoder.encode(CAPTIONS)[0], atol=0.02, rtol=0.01)  # bf16 on disk


def test_saving_records_the_folder_of_the_states(encoder: TextEncoder, tmp_path: Path) -> None:
    found = stored(encoder, tmp_path / "text")
    found.save_pretrained(tmp_path / "pipeline")
    loaded = TextEncoder.from_pretrained(tmp_path / "pipeline")
    assert isinstance(loaded, StoredTextEncoder)
    assert torch.equal(loaded.encode(CAPTIONS)[0], found.encode(CAPTIONS)[0])
    again = build_text_encoder(TextEncoderConfig(name="stored", path=str(tmp_path / "text")))
    assert again.fingerprint() == encoder.fingerprint()


def test_missing_and_damaged_states_are_named(encoder: TextEncoder, tmp_path: Path) -> None:
    found = stored(encoder, tmp_path / "text")
    with pytest.raises(UserError, match="no states of 1 captions, such as 'green'"):
        found.encode(["blue", "green"])
    bert = save_tiny_bert(tmp_path / "bert")
    other = build_text_encoder(TextEncoderConfig(name="auto", path=str(bert)))
    with pytest.raises(UserError, match="states of another encoder"):
        list(store_text(other, CAPTIONS, tmp_path / "text"))
    with pytest.raises(UserError, match="text_states.json"):
        StoredTextEncoder(tmp_path)
    with pytest.raises(UserError, match="text_encoder.path is not set"):
        TextEncoderConfig(name="stored")
    (file,) = (tmp_path / "text").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be read"):
        StoredTextEncoder(tmp_path / "text")


def test_a_full_disk_is_a_user_error(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        list(store_text(encoder, CAPTIONS, tmp_path / "file"))


def test_captions_are_cleaned_for_t5(encoder: TextEncoder) -> None:
    assert clean_caption("A DOG on https://a.com &amp; its <person>!!") == clean_caption(
        "a dog on & its person!!"
    )
    clean = TransformersTextEncoder("t5", encoder.tokenizer, encoder.model, 12, clean_captions=True)
    assert clean.fingerprint() != encoder.fingerprint()
    states, _ = clean.encode(["A   RED circle"])
    assert torch.equal(states, encoder.encode(["a red circle"])[0])
