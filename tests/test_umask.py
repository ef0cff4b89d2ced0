"""The mode of files that libraries make readable by their owner only."""

import os
import stat
import threading

import pytest

from stdit import umask
from stdit.umask import apply_umask


@pytest.mark.parametrize("procfs", [True, False])
def test_files_get_the_mode_of_new_files_while_other_threads_write(tmp_path, monkeypatch, procfs):
    if not procfs:
        monkeypatch.setattr(umask.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"")
    weights.chmod(0o600)
    stop = threading.Event()

    def save():
        while not stop.is_set():
            apply_umask(tmp_path)

    before = os.umask(0o027)
    threads = [threading.Thread(target=save) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for index in range(2000):
            (tmp_path / f"{index}.txt").touch()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        after = os.umask(before)
    assert after == 0o027
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}
