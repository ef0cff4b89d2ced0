import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stdit.data.cache as cache_module
from stdit.data.cache import EncodedBatches, precompute
from stdit.data.dataset import BucketConfig, DataConfig, VideoBatches, build_plan
from stdit.errors import UserError
from stdit.parallel.mesh import Mesh


class TinyCodec:
    """Keeps every second frame, row and column; counts the clips that it encoded."""

    channels = 3

    def __init__(self, name="tiny"):
        self.name, self.clips = name, 0

    def latent_shape(self, num_frames, height, width):
        return num_frames // 2, height // 2, width // 2

    def encode(self, video):
        self.clips += len(video)
        return video[:, :, ::2, ::2, ::2]

    def fingerprint(self):
        return self.name


class TinyEncoder:
    """One token a word, its state the number of letters and the place."""

    def __init__(self):
        self.captions = []

    def encode(self, captions):
        self.captions += captions
        words = [caption.split() for caption in captions]
        length = max(map(len, words))
        states, mask = torch.full((len(words), length, 2), 99.0), torch.zeros(len(words), length)
        for b, row in enumerate(words):
            mask[b, : len(row)] = 1
            for place, word in enumerate(row):
                states[b, place] = torch.tensor([float(len(word)), float(place)])
        return states, mask

    def fingerprint(self):
        return "text"


CAPTIONS = ["a", "two words", "a b c", "a", "two words", "six", "a"]


@pytest.fixture
def plan(tmp_path, write_video):
    rng = np.random.default_rng(0)
    rows = ["path,text"]
    for i, caption in enumerate(CAPTIONS):
        size, length = (32, 8) if i < 5 else (48, 12)
        coarse = rng.integers(0, 255, (length, size // 8, size // 8, 3), np.uint8)
        write_video(tmp_path / f"{i}.mp4", frames=coarse.repeat(8, axis=1).repeat(8, axis=2))
        rows.append(f"{i}.mp4,{caption}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    return make_plan(tmp_path)


def make_plan(folder, seed=0):
    buckets = [BucketConfig(num_frames=8, fps=8, height=size, width=size, batch_size=2) for size in (32, 48)]
    return build_plan(DataConfig(manifest=str(folder / "manifest.csv"), buckets=buckets), seed)


def compute(plan, file, codec=None, encoder=None, **options):
    return precompute(
        plan, codec or TinyCodec(), encoder or TinyEncoder(), Path(file), progress=False, **options
    )


def test_batches_equal_those_from_video(plan, tmp_path):
    batches = EncodedBatches(plan, compute(plan, tmp_path / "cache.safetensors"))
    compared = 0
    for batch, video in zip(batches(0, 8), VideoBatches(plan)(0, 8), strict=True):
        for key in ("fps", "height", "width", "clip_indices"):
            assert torch.equal(batch[key], video[key])
        assert (batch["text"], batch["step"], batch["replaced"]) == (video["text"], video["step"], 0)
        if plan.batch(batch["step"]).bucket_index == 0:  # the other bucket's clips are longer than its window
            assert torch.equal(batch["latents"], TinyCodec().encode(video["video"]))
            compared += 1
        lengths = [len(caption.split()) for caption in batch["text"]]
        assert batch["text_mask"].sum(dim=1).tolist() == lengths
        assert batch["text_states"].shape == (len(lengths), max(lengths), 2)
        for states, mask, caption in zip(
            batch["text_states"], batch["text_mask"], batch["text"], strict=True
        ):
            assert states[mask].tolist() == [[len(word), place] for place, word in enumerate(caption.split())]
            assert not states[~mask].any()
    assert compared > 2


def test_each_rank_gets_its_part_of_a_batch(plan, tmp_path):
    cache = compute(plan, tmp_path / "cache.safetensors")
    for step in range(plan.steps_per_epoch):
        whole = EncodedBatches(plan, cache).batch(step)
        parts = [EncodedBatches(plan, cache, Mesh(rank, 2)).batch(step) for rank in (0, 1)]
        assert torch.equal(torch.cat([part["latents"] for part in parts]), whole["latents"])
        assert [caption for part in parts for caption in part["text"]] == whole["text"]
        assert [part["size"] for part in parts] == [whole["size"]] * 2 == [2, 2]


def test_each_clip_and_each_caption_is_encoded_once(plan, tmp_path):
    codec, encoder = TinyCodec(), TinyEncoder()
    cache = compute(plan, tmp_path / "cache.safetensors", codec, encoder)
    assert codec.clips == 7 and sorted(encoder.captions) == sorted(set(CAPTIONS))
    assert [list(latents.shape) for latents in cache.latents] == [[5, 3, 4, 16, 16], [2, 3, 4, 24, 24]]
    assert len(cache.text_states) == sum(len(caption.split()) for caption in set(CAPTIONS))


def test_the_file_is_used_again_whatever_the_seed(plan, tmp_path):
    file = tmp_path / "sub" / "cache.safetensors"
    first = compute(plan, file)
    codec, encoder = TinyCodec(), TinyEncoder()
    second = compute(make_plan(tmp_path, seed=7), file, codec, encoder)
    assert codec.clips == 0 and not encoder.captions
    assert all(torch.equal(a, b) for a, b in zip(first.latents, second.latents, strict=True))
    assert torch.equal(first.text_states, second.text_states) and first.captions == second.captions
    assert os.listdir(file.parent) == [file.name]


def test_a_change_of_codec_caption_or_clip_makes_it_anew(plan, tmp_path, write_video):
    file = tmp_path / "cache.safetensors"

    def encoded(plan, codec):
        compute(plan, file, codec)
        return codec.clips

    assert encoded(plan, TinyCodec()) == 7 and encoded(plan, TinyCodec()) == 0
    assert encoded(plan, TinyCodec("other weights")) == 7
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("six", "seven"))
    assert encoded(make_plan(tmp_path), TinyCodec("other weights")) == 7
    write_video(tmp_path / "0.mp4", num_frames=9)
    assert encoded(make_plan(tmp_path), TinyCodec("other weights")) == 7


def test_a_damaged_file_is_made_anew(plan, tmp_path):
    file = tmp_path / "cache.safetensors"
    whole = compute(plan, file)
    for data in (b"", b"hello", file.read_bytes()[:-100]):
        file.write_bytes(data)
        codec = TinyCodec()
        cache = compute(plan, file, codec)
        assert codec.clips == 7 and torch.equal(cache.latents[0], whole.latents[0])
    assert load_file(file)


def test_a_clip_that_fails_gives_way_and_is_remembered(plan, tmp_path):
    (tmp_path / "2.mp4").write_bytes(b"damaged")
    file = tmp_path / "cache.safetensors"
    with pytest.raises(UserError, match=r"1 of 7 clips failed to decode, more than data.max_skipped_share"):
        compute(plan, file, max_skipped_share=0.1)
    assert not file.exists()
    for _ in range(2):
        cache = compute(plan, file)
        assert [path for path, _ in cache.skipped] == [str(tmp_path / "2.mp4")]
        replaced = 0
        for batch in EncodedBatches(plan, cache)(0, 2 * plan.steps_per_epoch):
            planned = plan.batch(batch["step"]).indices
            assert 2 not in batch["clip_indices"] and batch["replaced"] == planned.count(2)
            replaced += batch["replaced"]
        assert replaced >= 2


def test_a_full_disk_leaves_nothing_half_written(plan, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"cannot write the cache .*No space left.*make room"):
        compute(plan, tmp_path / "out" / "cache.safetensors")
    assert not os.listdir(tmp_path / "out")
