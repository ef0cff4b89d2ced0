import os
import threading
import time
from multiprocessing import get_context

import pytest
import torch

import stdit.data.cache.encode as encode_module
from stdit.data.cache import maintenance
from stdit.data.cache import shards as shards_module
from stdit.data.cache.encode import wanted_keys
from stdit.data.cache.maintenance import prune_cache, verify_cache
from stdit.data.cache.shards import CacheEntry, ShardWriter, write_shard
from stdit.data.cache.store import CacheStore
from stdit.errors import UserError
from tests.data.cache.tiny import same, shards


@pytest.fixture
def folder(work, config, monkeypatch):
    """The entries of two codecs, four clips in a shard."""
    monkeypatch.setattr(
        encode_module, "ShardWriter", lambda folder: ShardWriter(folder, shard_bytes=4 * 12288)
    )
    work().encode()
    work(codec="old").encode()
    return config.cache_folder()


def change(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


def test_verify_names_what_is_broken(folder):
    summary = verify_cache(folder)
    assert not summary.broken and summary.entries == 2 * 7 + 5 + 7  # latents, texts, hashes of files
    assert summary.bytes == sum(file.stat().st_size for file in folder.iterdir())
    one, two, *_ = shards(folder)
    change(one)
    two.write_bytes(two.read_bytes()[:-1])
    broken = verify_cache(folder).broken
    assert broken.keys() == {one.name, two.name} and "entries have changed since" in broken[one.name]
    assert one.name in str(verify_cache(folder))
    with pytest.raises(UserError, match="is not a folder"):
        verify_cache(folder / "nowhere")


def test_prune_removes_what_no_run_reads_and_a_dry_run_nothing(folder, work):
    keep = work()
    latents, wanted = keep.latents(), set(wanted_keys(keep.reader))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    dry = prune_cache(folder, wanted, dry_run=True)
    assert (dry.entries, dry.kept) == (7, 7 + 5 + 7) and "would be removed" in str(dry)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    done = prune_cache(folder, wanted)
    assert (done.entries, done.kept, done.files) == (dry.entries, dry.kept, dry.files)
    assert same(work().latents(), latents) and verify_cache(folder).entries == 19
    assert not any(value is not None for value in work(codec="old").latents().values())
    assert prune_cache(folder, wanted).files == {}


def test_prune_removes_parts_of_shards_broken_ones_and_leftovers(folder, work):
    keep = work()
    latents = keep.latents()
    wanted = set(wanted_keys(keep.reader))
    some = {key for key in wanted if key[0] % 2}
    gone = len(wanted) - len(some)
    assert prune_cache(folder, some).entries == gone + 7
    assert {key.tobytes() for shard in CacheStore(folder).shards.values() for key in shard.keys} == some
    assert keep.encode().encoded > 0 and same(work().latents(), latents)

    one, two, *_ = shards(folder)
    change(one)
    two.write_bytes(b"")
    (folder / ".new.tmp").write_bytes(b"")
    (folder / ".old.tmp").write_bytes(b"")
    os.utime(folder / ".old.tmp", (time.time() - 7200,) * 2)
    summary = prune_cache(folder)
    assert summary.files.keys() == {one.name, two.name, ".old.tmp"}
    assert not verify_cache(folder).broken and (folder / ".new.tmp").exists()
    again = work()
    again.encode()
    assert same(again.latents(), latents)


def test_prune_keeps_files_that_a_living_process_writes(tmp_path, monkeypatch):
    entries = [CacheEntry("latents", "codec", bytes(16), torch.zeros(3, 2))]
    begun, goes_on, fsync = threading.Event(), threading.Event(), os.fsync

    def slow(descriptor):
        begun.set()
        assert goes_on.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(shards_module.os, "fsync", slow)
    alive = threading.Thread(target=write_shard, args=(tmp_path / "latents-alive.safetensors", entries))
    alive.start()
    assert begun.wait(60)
    monkeypatch.setattr(shards_module.os, "fsync", lambda descriptor: os._exit(9))
    dead = get_context("fork").Process(
        target=write_shard, args=(tmp_path / "latents-dead.safetensors", entries)
    )
    dead.start()
    dead.join()
    monkeypatch.setattr(shards_module.os, "fsync", fsync)
    aside = {name: tmp_path / f".latents-{name}.safetensors.tmp" for name in ("alive", "dead")}
    assert dead.exitcode == 9 and all(file.exists() for file in aside.values())
    assert not prune_cache(tmp_path).files, "both have just been written"
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(maintenance.time, "time", lambda: now + 365 * 86400)
        assert prune_cache(tmp_path).files.keys() == {aside["dead"].name}
        patch.setattr(maintenance.time, "time", lambda: now - 3600)
        assert not prune_cache(tmp_path).files
    goes_on.set()
    alive.join(60)
    assert verify_cache(tmp_path).entries == 1 and not verify_cache(tmp_path).broken
    assert [file.name for file in tmp_path.iterdir()] == ["latents-alive.safetensors"]
