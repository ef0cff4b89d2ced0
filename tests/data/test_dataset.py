import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stdit.data.build import build_plan
from stdit.data.clip_tensors import to_video
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.dataset import video_loader
from stdit.errors import OtherRankError, UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.step_exchange import StepExchange
from tests.parallel.ranks import run_on_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_video):
    """Nine clips of random frames, so that every window and crop is another tensor."""
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    rows = ["path,text"]
    for i in range(9):
        size, length = (32, 16) if i < 6 else (48, 20)
        coarse = rng.integers(0, 255, (length, size // 8, size // 8, 3), np.uint8)
        write_video(root / f"{i}.mp4", frames=coarse.repeat(8, axis=1).repeat(8, axis=2))
        rows.append(f"{i}.mp4,clip {i}")
    (root / "manifest.csv").write_text("\n".join(rows))
    return root


def config(folder, **values):
    buckets = [
        BucketConfig(num_frames=8, fps=8, height=24, width=32, batch_size=3),
        BucketConfig(num_frames=16, fps=8, height=48, width=48, batch_size=2),
    ]
    return DataConfig(manifest=str(folder / "manifest.csv"), buckets=buckets, **values)


def same(a, b):
    one, other = ({**vars(raw.info), **vars(raw)} for raw in (a, b))
    assert one.keys() == other.keys()
    for key in one.keys() - {"info", "timings"}:
        assert (
            torch.equal(one[key], other[key])
            if isinstance(one[key], torch.Tensor)
            else one[key] == other[key]
        ), key
    return True


def test_batches_are_complete(folder):
    plan = build_plan(config(folder))
    seen = set()
    for step, raw in enumerate(video_loader(plan)(0, plan.steps_per_epoch)):
        bucket, info, video = plan.batch(step).bucket, raw.info, to_video(raw.content)
        shape = (bucket.batch_size, 3, bucket.num_frames, bucket.height, bucket.width)
        assert video.shape == shape and video.dtype == torch.float32
        assert -1 <= video.min() < -0.5 and 0.5 < video.max() <= 1
        assert info.captions == [f"clip {i}" for i in info.clip_indices.tolist()]
        assert info.fps.tolist() == [8.0] * len(info.captions)
        assert info.height.tolist() == [float(bucket.height)] * len(info.captions)
        assert info.width.tolist() == [float(bucket.width)] * len(info.captions)
        assert (info.step, info.batch_size, raw.replaced) == (step, bucket.batch_size, 0)
        seen.update(info.captions)
    assert len(seen) == 9


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_for_any_number_of_workers(folder, workers):
    plan = build_plan(config(folder), seed=5)
    here = list(video_loader(plan, crop="random")(0, 6))
    there = list(video_loader(plan, workers=workers, crop="random")(0, 6))
    assert len(here) == len(there) == 6
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_starting_at_a_step_equals_iterating_to_it(folder):
    walked = list(video_loader(build_plan(config(folder)), crop="random")(0, 9))
    resumed = video_loader(build_plan(config(folder)), crop="random")(7)
    assert same(next(resumed), walked[7]) and same(next(resumed), walked[8])


def test_leaves_the_global_random_state_alone(folder):
    before = torch.get_rng_state()
    list(video_loader(build_plan(config(folder)), crop="random")(0, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def breaking(tmp_path, write_video):
    """Ten clips and a plan; clip 4 is damaged after the plan was made."""
    rows = ["path,text"]
    for i in range(10):
        write_video(tmp_path / f"{i}.mp4")
        rows.append(f"{i}.mp4,clip {i}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    bucket = BucketConfig(num_frames=16, fps=8, height=32, width=32, batch_size=5)
    plan = build_plan(DataConfig(manifest=str(tmp_path / "manifest.csv"), buckets=[bucket]))
    (tmp_path / "4.mp4").write_bytes(b"damaged")
    return plan, tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_clip_is_replaced_by_the_next(breaking, workers, caplog):
    plan, folder = breaking
    loader = video_loader(plan, workers=workers)
    for raw in loader(0, 4):
        planned = plan.batch(raw.info.step).indices
        used = raw.info.clip_indices.tolist()
        if 4 not in planned:
            assert used == planned and raw.replaced == 0
            continue
        index = planned.index(4)
        stand_in = next(plan.replacements(raw.info.step, index))
        expected = [*planned[:index], stand_in, *planned[index + 1 :]]
        assert used == expected and raw.replaced == 1
    ((path, reason),) = loader.tally.failed.items()
    assert path == str(folder / "4.mp4") and "not a readable video" in reason
    assert caplog.text.count(f"skipped: {folder / '4.mp4'} cannot be read") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_failures_stop_the_run(breaking, workers):
    plan, folder = breaking
    (folder / "7.mp4").unlink()
    with pytest.raises(
        UserError, match=r"(?s)^2 of 10 files failed to decode, more than data.max_skipped_share = 0.1"
    ):
        list(video_loader(plan, workers=workers, max_skipped_share=0.1)(0, 2))
    (folder / "manifest.csv").unlink()
    for i in range(10):
        (folder / f"{i}.mp4").unlink(missing_ok=True)
    with pytest.raises(
        UserError, match="10 of 10 files failed to decode, and none of bucket 16x32x32 at 8 fps"
    ):
        list(video_loader(plan, workers=workers)(0, 2))


def test_each_rank_reads_its_part_and_counts_the_failures_of_all(breaking):
    plan, folder = breaking
    run_on_ranks(2, read_parts, plan, list(video_loader(plan, crop="random")(0, 4)))
    (folder / "7.mp4").unlink()
    run_on_ranks(2, fail_together, plan)


def read_parts(group, plan, expected):
    mesh = Mesh(group.rank, group.size)
    loader = video_loader(plan, crop="random", mesh=mesh)
    for part, whole in zip(loader(0, 4), expected, strict=True):
        rows = mesh.sample_range(5)
        assert len(part.content) == len(rows) == (3, 2)[group.rank]
        assert torch.equal(part.content, whole.content[rows.start : rows.stop])
        assert part.info.captions == whole.info.captions[rows.start : rows.stop]
        assert (part.info.batch_size, part.replaced) == (5, whole.replaced)
    assert [Path(path).name for path in loader.tally.failed] == ["4.mp4"]


def fail_together(group, plan):
    """Of two clips that cannot be read each rank may meet one, and both stop at the same step."""
    seen = []
    with pytest.raises((UserError, OtherRankError), match="2 of 10 files failed to decode, more than"):
        for raw in video_loader(plan, max_skipped_share=0.1, mesh=Mesh(group.rank, group.size))(0, 9):
            seen.append(raw.info.step)
    assert seen == [step for step in (0,) if {4, 7} - set(plan.batch(0).indices)]


def test_ranks_that_share_a_video_must_read_the_same_clip(breaking, tmp_path_factory):
    plan, folder = breaking
    whole = tmp_path_factory.mktemp("whole") / "clips"
    shutil.copytree(folder, whole)
    shutil.copy(whole / "3.mp4", whole / "4.mp4")
    buckets = [BucketConfig(num_frames=16, fps=8, height=32, width=32, batch_size=5)]
    other = build_plan(DataConfig(manifest=str(whole / "manifest.csv"), buckets=buckets))
    run_on_ranks(2, read_otherwise, [plan, other])


def test_one_batch_is_read_ahead_and_its_failures_travel_with_the_step(breaking):
    run_on_ranks(2, exchange_failures_with_steps, breaking[0])


def exchange_failures_with_steps(group, plan):
    mesh = Mesh(group.rank, group.size)
    steps, alone = StepExchange(mesh), video_loader(plan, mesh=mesh)(0, 6)
    for raw, other in zip(video_loader(plan, mesh=mesh, exchange=steps)(0, 6), alone, strict=True):
        assert same(raw, other)
        steps.receive(steps.reduce(torch.zeros(1)).tolist()[1:])
        if raw.info.step < 5:
            failed = [4 in plan.batch(raw.info.step + 1).indices]
            assert steps.take("read failures") == failed
            steps.receive(failed)  # as it was


def read_otherwise(group, plans):
    with pytest.raises(
        (UserError, OtherRankError), match="rank 1 and rank 0 share videos, but read them differently"
    ):
        list(video_loader(plans[group.rank], mesh=Mesh(group.rank, group.size, group))(0, 4))


def test_a_bucket_without_a_readable_clip_is_excluded_from_the_plan(folder, tmp_path):
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for name in ("2.mp4", "3.mp4", "4.mp4"):
        (tmp_path / name).write_bytes(b"damaged")
    rows = [f"{i}.mp4,clip {i},16,8,{side},{side}" for i, side in enumerate([32, 32, 48, 48, 32])]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,text,num_frames,fps,height,width", *rows]))
    plan = build_plan(config(tmp_path))
    assert "2 entries of the manifest skipped" in plan.report()
    assert "2 x no clip of bucket 16x48x48 at 8 fps can be read" in plan.report()
    used = {i for raw in video_loader(plan)(0, 6) for i in raw.info.clip_indices.tolist()}
    assert used == {0, 1}  # 4 gives way within its bucket
    with pytest.raises(
        UserError, match=r"2 of 5 files failed to decode, more than data.max_skipped_share = 0.3"
    ):
        build_plan(config(tmp_path, max_skipped_share=0.3))
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"(?s)5 of 5 files failed to decode, and none is left: .*0.mp4"):
        build_plan(config(tmp_path))


def test_every_kind_of_bad_entry_is_reported_and_the_rest_trains(tmp_path, write_video):
    write_video(tmp_path / "good.mp4")
    write_video(tmp_path / "short.mp4", num_frames=5)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello")
    rows = ["good.mp4,a", "short.mp4,b", "empty.mp4,c", "text.mp4,d", "gone.mp4,e", "good.mp4,", "../x.mp4,f"]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,text", *rows]))
    bucket = BucketConfig(num_frames=16, fps=8, height=32, width=32, batch_size=2)
    plan = build_plan(DataConfig(manifest=str(tmp_path / "manifest.csv"), buckets=[bucket]))
    assert next(video_loader(plan)(0)).info.captions == ["a", "a"]
    report = plan.report()
    for words in [
        "too short",
        "0 bytes",
        "not a readable video",
        "file missing",
        "caption missing",
        "outside the data root",
    ]:
        assert words in report
    assert "so every batch repeats clips" in report


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 128)])
def test_real_clips_make_batches(tmp_path, real_clips, height, width):
    root = real_clips[0].parent
    rows = [f"{path.name},{path.stem}" for path in real_clips]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,text", *rows]))
    bucket = BucketConfig(num_frames=9, fps=8, height=height, width=width, batch_size=3)
    plan = build_plan(DataConfig(manifest=str(tmp_path / "manifest.csv"), root=str(root), buckets=[bucket]))
    raw = next(video_loader(plan)(0))
    assert to_video(raw.content).shape == (3, 3, 9, height, width)
    assert sorted(raw.info.captions) == ["bigbuckbunny", "bikes", "carphone_pristine"]


SCRIPT = """
import sys
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.dataset import video_loader
from stdit.data.build import build_plan
bucket = BucketConfig(num_frames=8, fps=8, height=24, width=32, batch_size=3)
batches = video_loader(build_plan(DataConfig(manifest=sys.argv[1], buckets=[bucket])), workers=2)(0)
print(next(batches).info.step)
"""


def test_a_process_ends_with_workers_still_reading(folder):
    command = [sys.executable, "-c", SCRIPT, str(folder / "manifest.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_importing_the_dataset_is_light():
    modules = "stdit.data.cache.batches, stdit.data.cache.maintenance, stdit.data.cache.codec_fitting"
    code = f"import sys, {modules}; print({{'diffusers', 'transformers'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_a_worker_does_not_grow_over_ten_thousand_clips(tmp_path):
    """Runs what `scripts/bench/data.py --memory 10000` runs."""
    output = tmp_path / "memory.json"
    script = Path(__file__).parents[2] / "scripts" / "bench" / "data.py"
    subprocess.run([sys.executable, script, "--memory", "10000", "--output", output], check=True)
    figures = json.loads(output.read_text())
    assert figures["mib_after_10000"] < figures["mib_after_1000"] + 8
