from pathlib import Path

import pytest
import torch

from stdit.codecs import build_text_encoder
from stdit.codecs.cached_text import CachedTextEncoder
from stdit.codecs.config import TextEncoderConfig
from stdit.codecs.padding import pad_states, unpad_states
from stdit.codecs.text import TextEncoder
from stdit.errors import UserError
from stdit.models.size import tensor_bytes
from tests.codecs.tiny import save_tiny_bert

TEXTS = ["a red square", "blue"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return build(save_tiny_bert(tmp_path_factory.mktemp("bert")))


def build(path: Path) -> TextEncoder:
    return build_text_encoder(TextEncoderConfig(name="auto", path=str(path), max_length=8))


def test_cached_texts_need_no_encoder(encoder: TextEncoder, tmp_path: Path) -> None:
    read: list[int] = []
    held = CachedTextEncoder(encoder, [*TEXTS, TEXTS[0]], lambda: read.append(1) or encoder)  # type: ignore[func-returns-value]
    assert tensor_bytes(held) == 0 and held.fingerprint() == encoder.fingerprint()
    assert (held.channels, held.max_length) == (encoder.channels, encoder.max_length)
    for texts in (TEXTS, TEXTS[::-1], TEXTS[1:]):
        for one, other in zip(held.encode(texts), encoder.encode(texts), strict=True):
            torch.testing.assert_close(one, other)
    assert not read
    held.save_pretrained(tmp_path)
    assert TextEncoder.from_pretrained(tmp_path).fingerprint() == encoder.fingerprint() and len(read) == 1
    for _ in range(2):  # read again for others, and kept
        assert torch.equal(held.encode(["a star", "blue"])[0], encoder.encode(["a star", "blue"])[0])
    assert len(read) == 2


def test_an_empty_cache_encodes_every_text(encoder: TextEncoder) -> None:
    held = CachedTextEncoder(encoder, [], lambda: encoder)
    assert torch.equal(held.encode(TEXTS)[0], encoder.encode(TEXTS)[0])
    with pytest.raises(ValueError, match="at least one"):
        held.encode([])


def test_reloading_a_different_encoder_is_an_error(encoder: TextEncoder, tmp_path: Path) -> None:
    other = save_tiny_bert(tmp_path / "other", seed=1)
    held = CachedTextEncoder(encoder, TEXTS, lambda: build(other))
    with pytest.raises(UserError, match="text_encoder.path holds other weights than when the run began"):
        held.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_padding_and_its_inverse() -> None:
    states = [torch.randn(length, 3) for length in (2, 5, 1)]
    together, mask = pad_states(states)
    assert together.shape == (3, 5, 3) and mask.sum(1).tolist() == [2, 5, 1] and not together[~mask].any()
    assert all(torch.equal(*pair) for pair in zip(unpad_states(together, mask), states, strict=True))
