"""The benchmark's generated clips, and the process that encodes them."""

import os
from pathlib import Path

import av
import pytest

from scripts.bench.data import GENERATED, generate


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="only Linux has it")
@pytest.mark.parametrize("name", GENERATED)
def test_making_clips_restores_the_scheduling_policy(tmp_path: Path, name: str) -> None:
    if GENERATED[name][0] not in av.codecs_available:
        pytest.skip(f"no encoder {GENERATED[name][0]} here")
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    assert generate(tmp_path, {name: GENERATED[name]}, num_frames=4, height=64, width=64) == [tmp_path / name]
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
