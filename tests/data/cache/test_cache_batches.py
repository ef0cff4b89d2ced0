import random
from dataclasses import replace
from functools import partial

import av
import pytest
import torch

import stdit.data.cache.keys as keys_module
from stdit.data.cache.batches import DiskBatches, MemoryBatches, MemoryCache
from stdit.data.cache.encode import encode_view
from stdit.data.cache.store import CacheStore
from stdit.data.clip_tensors import to_video
from stdit.data.dataset import video_loader
from stdit.data.skips import SkipTally
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from tests.data.cache.tiny import TinyCodec, shards

KEYS = ("latents", "text_states", "text_mask", "fps", "height", "width", "clip_indices")


def from_memory(work, mesh=Mesh()):  # noqa: B008
    work.encode(check=True)
    return MemoryBatches(work.reader, MemoryCache.read(work.reader), mesh)


def from_disk(work, mesh=Mesh(), share=1.0):  # noqa: B008
    tally = SkipTally(work.plan.assignment.files, share)

    def encode_text(caption):
        states, mask = work.text.encode([caption])
        return states[0][mask[0].bool()]

    return DiskBatches(
        work.reader, partial(encode_view, work.codec, device="cpu"), encode_text, tally, mesh=mesh
    )


def alike(one, other):
    assert all(torch.equal(getattr(one, key), getattr(other, key)) for key in KEYS)
    return all(
        getattr(one, key) == getattr(other, key) for key in ("captions", "step", "batch_size", "replaced")
    )


def test_batches_equal_those_from_video(work):
    done = work()
    compared = 0
    for batch, raw in zip(from_memory(done)(0, 8), video_loader(done.plan)(0, 8), strict=True):
        info = raw.info
        for key in ("fps", "height", "width", "clip_indices"):
            assert torch.equal(getattr(batch, key), getattr(info, key))
        assert (batch.captions, batch.step, batch.replaced) == (info.captions, info.step, 0)
        if done.plan.batch(batch.step).bucket_index == 0:  # clips of the other one are longer than its window
            assert torch.equal(batch.latents, TinyCodec().encode(to_video(raw.content)))
            compared += 1
        lengths = [len(caption.split()) for caption in batch.captions]
        assert batch.text_mask.sum(dim=1).tolist() == lengths
        assert batch.text_states.shape == (len(lengths), max(lengths), 2)
        for states, mask, caption in zip(batch.text_states, batch.text_mask, batch.captions, strict=True):
            assert states[mask].tolist() == [[len(word), place] for place, word in enumerate(caption.split())]
            assert not states[~mask].any()
    assert compared > 2


VIEWS = {"augmented_views": 3, "crop": "random", "flip": True}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_disk_and_memory_are_equal(work, config, workers):
    expected = list(from_memory(work(**VIEWS))(0, 12))
    fresh = work(**VIEWS, cache_dir=str(config.cache_folder()) + "-fresh", workers=workers)
    cached = work(**VIEWS, workers=workers)
    for made in (fresh, cached):
        assert all(alike(*pair) for pair in zip(from_disk(made)(0, 12), expected, strict=True))
    assert fresh.codec.clips > 5 and cached.codec.clips == 0 and not cached.text.captions
    views = {(int(batch.clip_indices[0]), batch.latents[0].sum().item()) for batch in expected}
    assert len(views) > len({clip for clip, _ in views})  # a clip is not always seen alike


def test_entries_encoded_during_training_are_added_to_the_cache(work, config):
    expected = list(from_memory(work(cache_dir=str(config.cache_folder()) + "-memory"))(0, 8))
    half = work()
    half.encode(part=(0, 2))
    stored = half.codec.clips
    assert all(alike(*pair) for pair in zip(from_disk(half)(0, 8), expected, strict=True))
    assert half.codec.clips == 7 and 0 < stored < 7  # each once
    again = work()
    assert all(alike(*pair) for pair in zip(from_disk(again)(0, 8), expected, strict=True))
    assert again.codec.clips == 0 and not again.text.captions


def test_training_from_the_cache_opens_no_video(work, monkeypatch):
    work().encode()

    def fail(*args, **options):
        raise AssertionError("opened")

    monkeypatch.setattr(av, "open", fail)
    monkeypatch.setattr(keys_module, "hash_media", fail)
    for make in (from_memory, from_disk):
        assert len(list(make(work())(0, 8))) == 8  # which also builds the plan
    with pytest.raises(AssertionError, match="opened"):
        work(cache="none")


def test_each_rank_gets_its_part_of_a_batch(work):
    done = work(**VIEWS)
    one, *ranks = (from_memory(done, mesh) for mesh in (Mesh(), Mesh(0, 2), Mesh(1, 2)))
    for step in range(6):
        whole, parts = one.batch(step), [rank.batch(step) for rank in ranks]
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
        assert [caption for part in parts for caption in part.captions] == whole.captions
        assert [part.batch_size for part in parts] == [whole.batch_size] * 2 == [2, 2]


def test_an_unreadable_clip_is_replaced(work, tmp_path):
    ready = work()
    (tmp_path / "2.mp4").write_bytes(b"damaged")
    (tmp_path / "4.mp4").unlink()
    for make in (from_memory, from_disk):
        done = replace_store(ready)
        replaced = 0
        for batch in make(done)(0, 2 * done.plan.steps_per_epoch):
            planned = done.plan.batch(batch.step).indices
            assert not {2, 4} & set(batch.clip_indices.tolist())
            assert batch.replaced == planned.count(2) + planned.count(4)
            replaced += batch.replaced
        assert replaced >= 4
    with pytest.raises(UserError, match="of 7 files failed to decode, more than"):
        list(from_disk(replace_store(ready), share=0.1)(0, 8))
    for number in range(5):
        (tmp_path / f"{number}.mp4").unlink(missing_ok=True)
    with pytest.raises(UserError, match="none of bucket 8x32x32 at 8 fps is left"):
        list(from_disk(replace_store(ready))(0, 8))
    with pytest.raises(UserError, match="bucket 8x32x32 at 8 fps: none of its clips can be read"):
        list(from_memory(ready)(0, 8))


def replace_store(work):
    """As another process would have it."""
    work.reader = replace(work.reader, store=CacheStore(work.config.cache_folder()))
    return work


def test_cached_clips_may_be_deleted_during_training(work, tmp_path):
    work().encode()
    batches = from_disk(work())(0, 16)
    seen = [next(batches) for _ in range(8)]
    for file in tmp_path.glob("*.mp4"):
        file.unlink()
    assert {2, 4} < {clip for batch in seen for clip in batch.clip_indices.tolist()}
    assert sum(batch.replaced for batch in batches) == 0


def test_a_shard_damaged_during_training_is_encoded_again(work, config, caplog):
    work().encode()
    running = work()
    batches = from_disk(running)(0, 8)
    first = next(batches)
    for file in shards(config.cache_folder()):
        file.write_bytes(file.read_bytes()[:-50])
    expected = list(from_memory(work(cache_dir=str(config.cache_folder()) + "-memory"))(0, 8))
    assert all(alike(*pair) for pair in zip([first, *batches], expected, strict=True))
    again = work()
    assert "is damaged" in caplog.text
    assert all(alike(*pair) for pair in zip(from_disk(again)(0, 8), expected, strict=True))


def test_training_continues_when_the_cache_disk_is_full(work, monkeypatch, caplog):
    running = work()
    batches = from_disk(running)
    expected = list(from_memory(work(cache_dir=str(running.config.cache_folder()) + "-memory"))(0, 8))

    def full():
        raise UserError("cannot write to the cache: make room.")

    monkeypatch.setattr(batches.writer, "flush", full)
    monkeypatch.setattr(batches.writer, "seconds", -1.0)
    assert all(alike(*pair) for pair in zip(batches(0, 8), expected, strict=True))
    assert caplog.text.count("This run adds no more to it") == 1


def test_the_global_random_state_is_left_alone(work):
    torch.manual_seed(5)
    before, other = torch.get_rng_state(), random.getstate()
    list(from_disk(work(**VIEWS))(0, 3))
    list(from_memory(work(**VIEWS))(0, 3))
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == other
