"""What ``sample.py --dry_run`` says, and that it makes nothing. The numbers themselves: see test_workload.py."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sample
from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.memory import decoding_bytes
from stdit.errors import UserError
from stdit.models.size import parameter_count, tensor_bytes
from stdit.parallel.processes.mesh import Mesh
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.dry_run import read_workload, sampling_plan
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.requests import Request, plan_requests
from stdit.pipelines.sampling import _plan_decoding
from stdit.pipelines.sources import find_checkpoint_source
from stdit.pipelines.workload import SAMPLING_LIBRARIES
from tests.codecs.tiny import TINY_VAES, save_tiny_vae
from tests.launch import launch
from tests.lora.tiny import write_random_adapter
from tests.pipelines.tiny import tiny_model, tiny_pipeline, write_run
from tests.warm import ROOT

MIB = 2**20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder / "run", tiny_pipeline(folder))


def config(checkpoint: Path, dry_run: bool | int = True, **settings: Any) -> SampleConfig:
    return SampleConfig(checkpoint=str(checkpoint), dry_run=dry_run, device="cpu", **settings)


def test_it_makes_nothing_and_reads_no_text_encoder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stdit.pipelines.loading._load_text_encoder", lambda *_: pytest.fail("it is loaded"))
    monkeypatch.setattr("stdit.pipelines.weights.load_transformer", lambda *_: pytest.fail("it is loaded"))
    before = sorted(run.rglob("*"))
    monkeypatch.setattr("sys.argv", ["sample.py", "--checkpoint", str(run), "--dry_run", "--device", "cpu"])
    sample.main()
    printed = capsys.readouterr().out
    assert "1 video of 4 frames, 8 x 8 pixels" in printed and "it fits" in printed
    assert sorted(run.rglob("*")) == before and not list(tmp_path.iterdir())


def test_videos_are_grouped_by_what_they_ask_for(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,num_frames,solver\na,4,\nb,6,heun\nc,4,\n")
    lines = sampling_plan(config(run, prompts=str(prompts), num_samples=3, batch_size=4)).splitlines()
    videos = [line for line in lines if "latents" in line and "pixels" in line]
    assert [line.split(" frames")[0] for line in videos] == ["6 videos of 4", "3 videos of 6"]
    assert "in 2 batches of at most 3; latents 3x4x8x8, 4 frames of 4 tokens, 16 a segment" in videos[0]
    calls = [line for line in lines if line.startswith("model calls")]
    assert calls == [
        "model calls of a video: 6 (3 steps of RectifiedFlow: 6)",
        "model calls of a video: 10 (3 steps of heun: 10)",
    ]


def test_segments_and_caches_are_counted(run: Path) -> None:
    said = sampling_plan(
        config(run, segments=3, overlap=2, refine_pairs=2, num_inference_steps=9, cache="slow")
    )
    assert "3 segments (8 frames in all)" in said
    assert (
        "model calls of a video: at most 78, at least 48 with cache = slow (9 steps of RectifiedFlow: 18, "
        "refinement: 8 of each segment)" in said
    )
    assert "velocities for the cache" in said and "earlier segments" in said


def test_what_ranks_send_is_said(run: Path) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 12, "num_frames": 8, "pab": [2, 4, 4]}
    settings["pab_timesteps"] = (100.0, 950.0)
    alone = sampling_plan(config(run, **settings))
    assert "a rank sends" not in alone and "attention for later steps" in alone
    assert "pab = [2, 4, 4]: 8 of 12 steps use attention of earlier ones again" in alone
    wanted = config(run, 8, **settings)
    wanted.parallel.sp, wanted.parallel.cfg = 2, 2
    said = sampling_plan(wanted)
    assert "8 processes (dp 2 x cfg 2 x sp 2), each with" in said
    assert re.search(r"a rank sends for a video: [\d.]+ MB \([\d.]+ MB to [\d.]+ MB in a computed step", said)
    assert re.search(r"pab saves [1-9]\d?% of", said)
    assert "one half of guidance on each of two ranks" in said


def test_processes_are_those_of_a_video_or_those_asked_for(run: Path) -> None:
    wanted = config(run)
    wanted.parallel.sp, wanted.parallel.cfg = 2, 2
    assert "4 processes (dp 1 x cfg 2 x sp 2)" in sampling_plan(wanted)
    wanted.dry_run = 6
    with pytest.raises(UserError, match="6 processes were started: start a multiple of 4"):
        sampling_plan(wanted)
    wanted.parallel.sp, wanted.parallel.cfg, wanted.dry_run = "auto", 1, 4
    assert "parallel.sp = auto: 4, the smallest of 4 that fits" in sampling_plan(wanted)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dry_run": 0}, "dry_run = 0: must be true, or a number of processes from 1"),
        ({"dry_run": True, "calibrate": True}, "leave one of them out"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SampleConfig(**settings)


def test_bad_requests_are_refused_as_without_it(run: Path) -> None:
    with pytest.raises(UserError, match="guidance_rescale = 0.7 would have no effect"):
        sampling_plan(config(run, guidance_scale=1.0, guidance_rescale=0.7))
    with pytest.raises(UserError, match="would never be refreshed in the"):
        sampling_plan(config(run, pab=[2, 4, 9], num_inference_steps=12))


QUICK = ("AutoencoderKLLTXVideo", "tiny")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*TINY_VAES, "tiny")],
)
def test_720p_and_51_frames_of_each_vae(name: str, tmp_path: Path) -> None:
    path = None if name == "tiny" else str(save_tiny_vae(name, tmp_path / "vae"))
    codec = build_codec(CodecConfig(name=name, path=path))
    pipe = tiny_pipeline(tmp_path, codec)
    pipe.save_pretrained(tmp_path / "pipeline")
    wanted = config(tmp_path / "pipeline", resolution="720p", aspect_ratio="16:9", num_frames=51)
    wanted.parallel.memory_gib = 500
    workload = read_workload(wanted, find_checkpoint_source(wanted.checkpoint))
    (videos,) = workload.videos
    size = [int(videos.settings[one]) for one in ("num_frames", "height", "width")]
    shape = codec.latent_shape(*size)
    assert abs(size[1] * size[2] / (720 * 1280) - 1) < 0.07 and size[0] == 51
    held = workload.in_decoding(videos, workload.split(1, 1))
    assert held["decoding"] == decoding_bytes(codec, shape)
    said = sampling_plan(wanted)
    wanted.parallel.memory_gib = 2
    assert re.search(r"or decoding them in \d+ x \d+ x \d+ tiles of up to", sampling_plan(wanted))
    assert (
        f"latents {'x'.join(map(str, (codec.channels, *shape)))}" in said and "or decoding them whole" in said
    )


def test_weights_are_those_of_the_components(run: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    write_random_adapter(tmp_path / "adapter.safetensors", pipe.transformer)
    wanted = config(run, lora=[str(tmp_path / "adapter.safetensors")], dtype="bf16")
    weights = read_workload(wanted, find_checkpoint_source(run)).weights()
    assert 2 * parameter_count(pipe.transformer) <= weights["transformer"] < tensor_bytes(pipe.transformer)
    assert weights["text encoder"] == pytest.approx(tensor_bytes(pipe.prompt_encoder), rel=0.2)
    assert weights["adapters"] == (tmp_path / "adapter.safetensors").stat().st_size
    assert weights["libraries"] == SAMPLING_LIBRARIES
    assert f"{parameter_count(pipe.transformer):,} parameters in bf16, codec pixel" in sampling_plan(wanted)


def test_the_way_out_fits(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    pipe.transformer = tiny_model(hidden_size=256, num_heads=4)
    pipe.save_pretrained(tmp_path / "pipeline")
    wanted = config(
        tmp_path / "pipeline", num_samples=4, num_frames=16, height=64, width=64, prompt=["a"], batch_size=4
    )

    def said(gib: float) -> str:
        wanted.parallel.memory_gib = gib
        return sampling_plan(wanted).splitlines()[-1]

    assert said(2).startswith("it fits: about ")
    assert said(0.85).endswith("MiB: use --batch_size 2")
    assert said(0.61).endswith("MiB: use --parallel.sp 2 --batch_size 1")
    assert re.search(
        r"weights and libraries take \d+ MiB: use --dtype bf16, or use processes with", said(0.1)
    )
    wanted = SampleConfig(dry_run=True, device="cpu", num_frames=16, height=1024, width=1024)
    wanted.codec.tile = 1024
    assert "MiB: use --codec.tile auto: " in said(1.45) and "tiles of up to" in said(1.45)
    wanted.codec.tile = "auto"
    assert said(1.45).startswith("it fits")


def test_other_machines_are_planned_for(run: Path) -> None:
    elsewhere = replace(config(run), device="cuda")
    elsewhere.parallel.memory_gib = 80
    assert "each with 80 GiB" in sampling_plan(elsewhere)
    with pytest.raises(UserError, match="device = foo: not available here"):
        sampling_plan(replace(config(run), device="foo"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device = cuda: .* add parallel.memory_gib, such as 80"):
            sampling_plan(replace(config(run), device="cuda"))


def test_one_process_of_several_prints(run: Path) -> None:
    arguments = ["--checkpoint", str(run), "--dry_run", "--parallel.sp", "2", "--device", "cpu"]
    code, output, errors = launch("sample.py", 2, arguments)
    assert code == 0 and output.count("2 processes (dp 1 x cfg 1 x sp 2)") == 1, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--num_samples", "8", "--num_frames", "49", "--height", "256", "--width", "256"],
        ["--num_frames", "97", "--height", "512", "--width", "512"],
        ["--checkpoint", "wide", "--num_samples", "3"],
        [
            "--checkpoint",
            "wide",
            "--num_inference_steps",
            "4",
            "--pab",
            "[2,2,2]",
            "--pab_timesteps",
            "[1,999]",
        ],
        ["--checkpoint", "wide", "--num_samples", "2", "--num_inference_steps", "6", "--cache", "fast"],
    ],
)
def test_the_peak_of_a_process_is_as_stated(flags: list[str], tmp_path: Path) -> None:
    if "wide" in flags:
        pipe = tiny_pipeline(tmp_path)
        pipe.transformer = tiny_model(hidden_size=256, num_heads=4)
        pipe.save_pretrained(tmp_path / "wide")
        size = ["--num_frames", "16", "--height", "128", "--width", "128"]
        flags = [str(tmp_path / flag) if flag == "wide" else flag for flag in flags] + size
    common = ["--prompt", "a", "--num_inference_steps", "2", "--refine_pairs", "0", "--format", "mp4"]
    command = [sys.executable, str(ROOT / "sample.py"), *common, *flags, "--device", "cpu"]
    program = f"""
import resource, subprocess
subprocess.run({command!r}, check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=True).stdout
    stated = re.search(r"it fits: about ([\d,]+) of", planned)
    assert stated is not None, planned
    peak = int(done.stdout) * 1024
    assert int(stated[1].replace(",", "")) * MIB == pytest.approx(peak, rel=0.15)


def test_sampling_keeps_memory_for_the_videos_of_the_same_batch_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small videos a batch has four, of the large one that does not fit beside three others of its size one."""
    pipe, (small, *others), wanted = load_pipeline(find_checkpoint_source(str(run)))[0], *planned(run, 4)
    large = replace(small, settings=replace(small.settings, num_frames=16, height=512, width=512))
    needed = pipe.codec.decoding_bytes(pipe.codec.latent_shape(16, 512, 512))
    monkeypatch.setattr("stdit.parallel.processes.memory.free_memory", lambda *_: needed + MIB)
    assert _plan_decoding(pipe, [large, small, *others], wanted, Mesh()) == []
    with pytest.raises(UserError, match="beside the other videos of a batch, .* use a smaller batch_size"):
        _plan_decoding(pipe, [large] * 4, wanted, Mesh())


def planned(run: Path, count: int) -> tuple[list[Request], SampleConfig]:
    wanted = replace(config(run), dry_run=False, prompt=["a"], num_samples=count, batch_size=count)
    wanted.codec.tile = (32, 512, 512)
    return plan_requests(wanted), wanted
