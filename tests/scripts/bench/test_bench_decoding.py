"""scripts/bench/decoding.py: its lines, on one and on two processes."""

import pytest

from tests.launch import launch


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_prints_memory_time_and_difference(ranks: int) -> None:
    flags = ["--num_frames", "5", "--height", "200", "--width", "130", "--codec.tile", "128"]
    code, output, errors = launch("scripts/bench/decoding.py", ranks, flags)
    assert code == 0, errors
    tiles, memory, whole, difference = output.splitlines()
    processes = "1 process" if ranks == 1 else "2 processes"
    assert tiles.startswith(f"1 x 3 x 2 tiles of up to 5 x 112 x 104 (frames, rows, columns), {processes}: ")
    assert " GiB stated, " in memory and memory.count(", ") == ranks and memory.endswith(" GiB taken")
    assert whole.startswith("whole: ") and difference.startswith("difference in levels of 255: mean ")
