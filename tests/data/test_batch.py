"""The dataclasses of a batch: rows, devices and page-locked memory."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.data.batch import MODEL_INPUTS, BatchInfo, RawBatch, Timings
from stdit.data.cache.reader import CachedContent
from tests.training.tiny import tiny_batch


@pytest.mark.parametrize("rows", [slice(1, 3), range(1, 3), [1, 2]])
def test_rows_are_some_of_the_samples(rows: Any) -> None:
    batch = tiny_batch(3)
    batch.captions = list("abcd")
    part = batch.rows(rows)
    assert (part.captions, part.clip_indices.tolist(), part.step, part.batch_size) == (
        ["b", "c"],
        [1, 2],
        3,
        4,
    )
    assert all(torch.equal(getattr(part, name), getattr(batch, name)[1:3]) for name in MODEL_INPUTS)


def test_non_blocking_copies_cover_every_model_input(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, original = [], Tensor.to

    def copy(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        waits.append(not non_blocking)
        return original(tensor, device, non_blocking=non_blocking)

    monkeypatch.setattr(Tensor, "to", copy)
    batch = tiny_batch(0).to(torch.device("meta"), non_blocking=True)
    assert waits == [False] * len(MODEL_INPUTS)
    assert (
        all(getattr(batch, name).is_meta for name in MODEL_INPUTS) and batch.clip_indices.device.type == "cpu"
    )


def test_everything_that_is_copied_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    batch = tiny_batch(0)
    batch.pin_memory()
    assert [id(tensor) for tensor in pinned] == [id(getattr(batch, name)) for name in MODEL_INPUTS]
    states, frames = (torch.zeros(2, 3, 4), torch.zeros(2, 3)), torch.zeros(1, 1, 3, 2, 2)
    content = CachedContent(torch.zeros(1, 3), [0], [b"key"], frames, states, [], [])
    raw = RawBatch(batch, content, timings=Timings(reading=2.0))
    pinned.clear()
    again = raw.pin_memory()
    wanted = {
        id(tensor) for tensor in (content.latents, frames, *states, batch.fps, batch.height, batch.width)
    }
    assert {id(tensor) for tensor in pinned} == wanted
    assert (
        again.timings.reading == 2 and again.content is not None and again.content.keys_to_encode == [b"key"]
    )


def test_an_encoded_batch_keeps_the_info_of_the_raw_batch() -> None:
    batch = tiny_batch(5)
    info = BatchInfo(**{field.name: getattr(batch, field.name) for field in fields(BatchInfo)})
    raw = RawBatch(info, torch.zeros(1), replaced=2, timings=Timings(reading=1.0))
    found = raw.encoded(batch.latents, batch.text_states, batch.text_mask)
    assert all(getattr(found, field.name) is getattr(batch, field.name) for field in fields(BatchInfo))
    assert found.latents is batch.latents and (found.replaced, found.timings.reading) == (2, 1.0)
