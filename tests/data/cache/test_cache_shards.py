import json
import pickle
import struct
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stdit.data.cache.maintenance import prune_cache, verify_cache
from stdit.data.cache.shards import (
    SHARD_FORMAT,
    CacheEntry,
    DamagedShardError,
    ShardWriter,
    header_hash,
    read_shard,
)
from stdit.data.cache.store import CacheStore
from stdit.errors import UserError
from stdit.hashing import hash_tensor


def entry(number, *shape, kind="latents", maker="codec"):
    generator = torch.Generator().manual_seed(number)
    return CacheEntry(kind, maker, bytes([number] * 16), torch.randn(*shape or (3, 2), generator=generator))


def write(folder, entries, **options):
    with ShardWriter(folder, **options) as writer:
        for one in entries:
            writer.add(one)
    return writer


def test_written_entries_are_found_by_key(tmp_path):
    entries = [entry(n, n % 3 + 1, 2) for n in range(1, 9)] + [entry(9, 3, 4, 5), entry(10, kind="texts")]
    writer = write(tmp_path / "cache", entries)
    assert len(writer.written) == 3  # one for each kind and shape
    store = CacheStore(tmp_path / "cache")
    for one in entries:
        assert torch.equal(store.get(one.kind, one.key), one.value) and store.has(one.kind, one.key)
    assert store.get("texts", bytes([1] * 16)) is None and not store.has("latents", bytes([77] * 16))
    assert store.count("latents") == {"codec": 9}
    with safe_open(writer.written[0], "pt") as stored:  # a plain safetensors file
        assert sorted(stored.keys()) == ["hashes", "keys", "offsets", "values"]


def test_keys_that_share_a_half_are_distinct(tmp_path):
    keys = [bytes([1] * 8 + [n] * 8) for n in (3, 1, 2)]
    write(
        tmp_path, [CacheEntry("latents", "", key, torch.full((1,), float(n))) for n, key in enumerate(keys)]
    )
    store = CacheStore(tmp_path)
    assert [store.get("latents", key).item() for key in keys] == [0, 1, 2]
    assert store.get("latents", bytes([1] * 8 + [9] * 8)) is None


def test_shards_have_a_bounded_size_and_age(tmp_path):
    assert len(write(tmp_path / "small", map(entry, range(10)), shard_bytes=3 * 24).written) == 4
    assert len(write(tmp_path / "large", [entry(1, 100), entry(2)], shard_bytes=30).written) == 2
    assert len(write(tmp_path / "old", map(entry, range(3)), seconds=-1).written) == 3
    twice = write(tmp_path / "twice", [entry(1), entry(1)])
    assert len(read_shard(twice.written[0]).keys) == 1


def test_waiting_entries_are_written_on_an_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path) as writer:
        writer.add(entry(1))
        raise KeyboardInterrupt
    assert CacheStore(tmp_path).has("latents", entry(1).key)


def test_a_store_finds_shards_that_others_add_and_remove(tmp_path):
    store = CacheStore(tmp_path / "cache")
    assert store.get("latents", entry(1).key) is None
    writer = write(tmp_path / "cache", [entry(1)])
    assert torch.equal(store.get("latents", entry(1).key), entry(1).value)
    writer.written[0].unlink()
    assert store.get("latents", entry(1).key) is None


def test_concurrent_writers_do_not_clash(tmp_path):
    groups = [[entry(10 * n + i) for i in range(10)] for n in range(6)]
    threads = [
        threading.Thread(target=write, args=(tmp_path, group), kwargs={"shard_bytes": 50}) for group in groups
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = CacheStore(tmp_path)
    assert not store.damaged
    assert all(torch.equal(store.get("latents", one.key), one.value) for group in groups for one in group)


def test_damaged_shards_are_ignored_with_a_warning(tmp_path, caplog):
    good, bad = (write(tmp_path, [entry(n)]).written[0] for n in (1, 2))
    whole = bad.read_bytes()
    for data in (b"", b"hello", whole[:-1], whole[:20], whole + b"x", struct.pack("<Q", 1 << 60) + whole[8:]):
        bad.write_bytes(data)
        with pytest.raises(DamagedShardError):
            read_shard(bad)
        caplog.clear()
        store = CacheStore(tmp_path)
        assert f"{bad} is damaged" in caplog.text and "ignored" in caplog.text
        assert store.get("latents", entry(2).key) is None
        assert torch.equal(store.get("latents", entry(1).key), entry(1).value)
    assert good.exists() and bad.exists()


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_named_like_a_shard_is_never_run(tmp_path, caplog):
    folder, mark = tmp_path / "cache", tmp_path / "mark"
    good, bad = (write(folder, [entry(n)]).written[0] for n in (1, 2))
    as_torch = tmp_path / "planted.pt"
    torch.save({"values": Planted(mark)}, as_torch)
    for planted in (pickle.dumps(Planted(mark)), as_torch.read_bytes()):
        bad.write_bytes(planted)
        with pytest.raises(DamagedShardError):
            read_shard(bad)
        caplog.clear()
        store = CacheStore(folder)
        assert f"{bad} is damaged" in caplog.text and store.get("latents", entry(2).key) is None
        assert torch.equal(store.get("latents", entry(1).key), entry(1).value)
        assert verify_cache(folder).broken.keys() == {bad.name}
        assert prune_cache(folder).files.keys() == {bad.name} and not bad.exists()
    assert good.exists() and not mark.exists()
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists(), "it would have done harm"


def test_shards_whose_tensors_do_not_fit_are_damaged(tmp_path):
    file = tmp_path / "latents-x.safetensors"
    facts = {"format": SHARD_FORMAT, "kind": "latents", "maker": ""}
    right = {
        "values": torch.zeros(4, 2),
        "offsets": torch.tensor([0, 1, 4]),
        "keys": torch.zeros(2, 16, dtype=torch.uint8),
        "hashes": torch.zeros(2, dtype=torch.int64),
    }

    def sealed(tensors):
        parts = [tensors[name].numpy() for name in ("keys", "offsets", "hashes")]
        values = tensors["values"]
        return facts | {"hash": header_hash(facts, values.dtype, values.shape, parts)}

    for change in (
        {"offsets": torch.tensor([0, 1, 5])},
        {"offsets": torch.tensor([0, 6, 4])},
        {"offsets": torch.tensor([0, 4])},
        {"keys": torch.zeros(2, 8, dtype=torch.uint8)},
        {"hashes": torch.zeros(3, dtype=torch.int64)},
    ):
        save_file(right | change, file, sealed(right | change))
        with pytest.raises(DamagedShardError):
            read_shard(file)
    save_file({"values": torch.zeros(4, 2)}, file, facts)
    with pytest.raises(DamagedShardError):
        read_shard(file)
    save_file(right, file, facts | {"format": "stdit-cache-9"})
    with pytest.raises(DamagedShardError, match="format is stdit-cache-9"):
        read_shard(file)
    save_file(right, file, sealed(right))
    assert len(read_shard(file).keys) == 2
    save_file(right, file, sealed(right) | {"kind": "texts"})
    with pytest.raises(DamagedShardError, match="header has changed"):
        read_shard(file)


def test_an_entry_whose_bytes_have_changed_is_ignored(tmp_path, caplog):
    (file,) = write(tmp_path, [entry(1), entry(2)]).written
    data = bytearray(file.read_bytes())
    header = struct.unpack("<Q", data[:8])[0]
    begin = json.loads(data[8 : 8 + header])["values"]["data_offsets"][0]
    data[8 + header + begin + 3] ^= 1
    file.write_bytes(data)
    store = CacheStore(tmp_path)
    assert store.get("latents", entry(1).key) is None and "has changed since" in caplog.text
    assert torch.equal(store.get("latents", entry(2).key), entry(2).value)
    write(tmp_path, [entry(1)])  # written again, beside the old one
    assert torch.equal(CacheStore(tmp_path).get("latents", entry(1).key), entry(1).value)


def test_a_hash_depends_on_all_bytes():
    value = torch.arange(6.0).reshape(2, 3)
    assert hash_tensor(value) == hash_tensor(value.t().contiguous().t()) == hash_tensor(value.clone())
    assert len({hash_tensor(value), hash_tensor(value + 1), hash_tensor(-value), hash_tensor(value[:1])}) == 4


def test_a_full_disk_leaves_complete_shards(tmp_path):
    pytest.importorskip("resource")
    context = get_context("fork")
    said = context.SimpleQueue()
    process = context.Process(target=fill, args=(tmp_path, said))
    process.start()
    process.join()
    assert process.exitcode == 0
    message = said.get()
    assert message.startswith(f"cannot write to the cache {tmp_path}") and "make room" in message
    assert not list(tmp_path.glob(".*"))
    store = CacheStore(tmp_path)
    assert not store.damaged
    assert [store.has("latents", entry(n).key) for n in range(6)] == [True] * 4 + [False] * 2


def fill(folder, said):
    """In a process whose files may have 10,000 bytes: Python ignores SIGXFSZ, so that larger ones fail."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(UserError) as caught, ShardWriter(folder, shard_bytes=3000) as writer:
        for number in range(6):
            writer.add(entry(number, 700 if number < 4 else 7000))
    said.put(str(caught.value))


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the cache .*set data.cache_dir"):
        write(tmp_path / "file" / "cache", [entry(1)])
