import os
import shutil
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

import stdit.data.cache.encode as encode_module
import stdit.data.cache.keys as keys_module
import stdit.data.cache.shards as shards_module
from stdit.data.cache.encode import wanted_keys
from stdit.data.cache.store import CacheStore
from stdit.data.clip_tensors import read_view, to_video
from stdit.data.skips import SkipTally
from stdit.data.views import AugmentedView
from stdit.errors import UserError
from tests.data.cache.tiny import TinyCodec, Work, same, shards


def test_every_clip_and_caption_is_encoded_once(work):
    first = work()
    summary = first.encode()
    assert (summary.clips, summary.encoded, summary.stored, summary.captions_encoded) == (7, 7, 0, 5)
    assert summary.bytes == sum(file.stat().st_size for file in first.reader.store.folder.iterdir())
    assert first.codec.clips == 7 and sorted(first.text.captions) == sorted(set(first.text.captions))
    latents = first.latents()
    for (index, _), value in latents.items():
        bucket = first.plan.assignment.buckets[index >= 5]
        start = 0.0 if index < 5 else 0.25  # the middle 8 of 12 frames, at 8 a second
        frames = read_view(first.plan.assignment.clips[index], bucket, AugmentedView(start))
        assert torch.equal(value, TinyCodec().encode(to_video(frames[None]))[0])
    again = work(seed=7)
    summary = again.encode()
    assert (summary.encoded, summary.stored, summary.captions_encoded) == (0, 7, 0)
    assert again.codec.clips == 0 and not again.text.captions and same(again.latents(), latents)


def test_a_change_of_codec_text_encoder_caption_size_or_content_is_another_entry(work, config, write_video):
    work().encode()
    other = work(codec="other weights")
    assert not any(value is not None for value in other.latents().values())
    assert other.encode().encoded == 7 and other.encode().captions_encoded == 0
    assert work(text="another").encode().captions_encoded == 5
    manifest = config.manifest
    text = open(manifest).read()
    open(manifest, "w").write(text.replace("six", "seven"))
    summary = work().encode()
    assert (summary.encoded, summary.captions_encoded) == (0, 1)
    buckets = [replace(config.buckets[0], height=24, width=24), config.buckets[1]]
    assert work(buckets=buckets).encode().encoded == 5
    write_video(config.cache_folder().parent / "0.mp4", num_frames=8)
    summary = work().encode()
    assert (summary.encoded, summary.stored) == (1, 6)
    assert work(codec="other weights").encode().encoded == 1


def test_files_are_hashed_once_and_known_by_their_content(work, config, tmp_path, monkeypatch):
    hashed = []
    original = keys_module.hash_media
    monkeypatch.setattr(keys_module, "hash_media", lambda media: hashed.append(media.name) or original(media))
    first = work()
    first.encode()
    assert len(hashed) == 7
    hashed.clear()
    assert work().encode().encoded == 0 and not hashed
    os.utime(tmp_path / "3.mp4", (1, 1))  # touched, not changed
    assert work().encode().encoded == 0 and hashed == ["3.mp4"]
    hashed.clear()
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    shutil.move(tmp_path, moved)
    summary = Work(replace(config, manifest=str(moved / "manifest.csv"))).encode()
    assert summary.encoded == 0 and not hashed


def test_an_interrupted_encoding_resumes_from_complete_shards(work, monkeypatch, config):
    straight = work(cache_dir=str(config.cache_folder()) + "-straight")
    straight.encode()
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 1)
    monkeypatch.setattr(
        encode_module, "ShardWriter", lambda folder: shards_module.ShardWriter(folder, shard_bytes=1)
    )
    work_done = work()
    original = work_done.codec.encode

    def encode(video):
        if work_done.codec.clips == 4:
            raise KeyboardInterrupt
        return original(video)

    work_done.codec.encode = encode
    with pytest.raises(KeyboardInterrupt):
        work_done.encode()
    resumed = work()
    summary = resumed.encode()
    assert (summary.encoded, summary.stored, summary.captions_encoded) == (3, 4, 0)
    assert same(resumed.latents(), straight.latents())


def test_a_damaged_shard_or_entry_is_encoded_again(work, config, monkeypatch):
    monkeypatch.setattr(
        encode_module, "ShardWriter", lambda folder: shards_module.ShardWriter(folder, shard_bytes=1)
    )
    first = work()
    first.encode()
    latents = first.latents()
    files = shards(config.cache_folder())
    data = bytearray(files[0].read_bytes())
    files[0].write_bytes(data[:-100])
    changed = bytearray(files[1].read_bytes())
    changed[len(changed) // 2] ^= 255
    files[1].write_bytes(changed)
    assert work().encode().encoded == 1
    again = work()
    assert again.encode(check=True).encoded == 1
    assert same(again.latents(), latents)


def test_concurrent_processes_share_the_encoding(work, config):
    context = get_context("fork")
    processes = [
        context.Process(target=encode_part, args=(work(), part)) for part in ((0, 2), (1, 2), (0, 1))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    whole = work(cache_dir=str(config.cache_folder()) + "-alone")
    whole.encode()
    together = work()
    assert together.encode().encoded == 0 and same(together.latents(), whole.latents())
    assert not CacheStore(config.cache_folder()).damaged


def encode_part(work, part):
    work.encode(part=part)


def test_clips_that_cannot_be_read_are_excluded_and_counted(work, config, tmp_path):
    ready = work()
    (tmp_path / "2.mp4").write_bytes(b"damaged")
    (tmp_path / "4.mp4").unlink()  # between probing and encoding
    summary = ready.encode()
    assert summary.encoded == 5 and [path for path, _ in summary.failed] == [
        str(tmp_path / "2.mp4"),
        str(tmp_path / "4.mp4"),
    ]
    assert "2 clips excluded" in str(summary) and "file missing" in str(summary)
    with pytest.raises(UserError, match=r"1 of 7 files failed to decode, more than data.max_skipped_share"):
        ready.encode(tally=SkipTally(7, 0.1))


def test_a_full_disk_is_an_error_that_keeps_complete_shards(work, config, monkeypatch):
    original, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # the fourth shard; each flushes its file and its folder
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(shards_module.os, "fsync", fsync)
    monkeypatch.setattr(
        encode_module, "ShardWriter", lambda folder: shards_module.ShardWriter(folder, shard_bytes=1)
    )
    with pytest.raises(UserError, match=r"cannot write to the cache .*No space left.*make room"):
        work().encode()
    store = CacheStore(config.cache_folder())
    assert len(store.shards) >= 3 and not store.damaged and not list(store.folder.glob(".*"))
    summary = work().encode()
    assert summary.captions_encoded < 5 and summary.encoded == 7


def test_workers_encode_the_same(work, config):
    here = work()
    here.encode()
    there = work(cache_dir=str(config.cache_folder()) + "-workers", workers=2)
    there.encode()
    assert same(here.latents(), there.latents())


def test_augmented_views_are_windows_crops_and_mirror_images(work):
    done = work(augmented_views=3, crop="random", flip=True)
    # The first five have no room, and two of them have "words"; the last turns "left".
    assert done.encode().encoded == 3 * 2 + 2 + 3 * 2 + 3
    latents = done.latents()
    assert torch.equal(latents[0, 1], latents[0, 0].flip(-1))
    five = [latents[5, number] for number in range(6)]
    assert all(not torch.equal(five[i], five[j]) for i in range(6) for j in range(i))
    assert torch.equal(latents[5, 0], work().latents()[5, 0])
    assert work(augmented_views=2, crop="random").encode().encoded == 0  # the first views are the same


def test_wanted_keys_are_those_that_were_written(work):
    done = work(augmented_views=2)
    done.encode(extra_texts=["a prompt"])
    store = CacheStore(done.config.cache_folder())
    written = {key.tobytes() for shard in store.shards.values() for key in shard.keys}
    assert set(wanted_keys(done.reader, ["a prompt"])) == written
