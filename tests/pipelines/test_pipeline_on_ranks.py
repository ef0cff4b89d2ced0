"""Videos made on several ranks against those of one."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stdit.codecs import build_codec
from stdit.codecs.config import CodecConfig
from stdit.data.decoding.decode import decode_clip
from stdit.parallel.config import SamplingParallelConfig
from stdit.parallel.processes.mesh import Mesh, build_mesh
from stdit.parallel.sequence.group import Group
from stdit.pipelines.pipeline import STDiTPipeline
from tests.codecs.tiny import save_tiny_vae
from tests.launch import launch
from tests.parallel.ranks import run_on_ranks
from tests.pipelines.tiny import tiny_pipeline, write_run

PICTURE = np.full((8, 8, 3), 0.8, np.float32)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "a red circle", "num_frames": 5},
    "without guidance": {"prompt": ["a red circle", "a blue square"], "guidance_scale": 1.0},
    "rescaled, not in every step": {
        "prompt": ["a red circle", "a blue square"],
        "num_frames": 5,
        "guidance_scale": 4.0,
        "guidance_schedule": "oscillating",
        "guidance_rescale": 0.7,
    },
    "image": {"prompt": "a red circle", "num_frames": 2, "height": 8, "width": 8},
    "fewer frames than ranks": {"prompt": "a red circle", "num_frames": 1},
    "refined, first frame": {
        "prompt": ["a red circle", "a blue square"],
        "image": [PICTURE, None],
        "num_frames": 5,
        "height": 8,
        "width": 8,
        "guidance_scale": 1.0,
        "refine_pairs": 2,
        "refine_guidance_scale": 2.0,
    },
    "first frame, negative prompt": {
        "prompt": ["a red circle", "a blue square"],
        "negative_prompt": [None, "grey"],
        "image": [PICTURE, None],
        "num_frames": 5,
        "height": 12,
        "width": 8,
    },
}


def compare(group: Group, grid: tuple[int, int], cfg: int, folder: Path) -> None:
    mesh = build_mesh(SamplingParallelConfig(grid=grid, cfg=cfg), torch.device("cpu"))
    pipe = STDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for name, arguments in CALLS.items():
        for output_type in ("pt", "latent"):
            frames = []
            for one in (Mesh(), mesh):
                pipe.share(one)
                generators = [
                    torch.Generator().manual_seed(seed)
                    for seed in range(1 if isinstance(arguments["prompt"], str) else 2)
                ]
                result = pipe(**arguments, generator=generators, output_type=output_type)
                frames.append(result.frames)
            torch.testing.assert_close(
                frames[1], frames[0], atol=1e-5, rtol=1e-4, msg=f"{name} {output_type}"
            )


@pytest.mark.parametrize(
    "grid, cfg, codec",
    [
        ((2, 1), 1, "AutoencoderKLWan"),
        ((1, 1), 2, "pixel"),
        ((2, 1), 2, "pixel"),
        ((3, 1), 1, "pixel"),
        ((1, 2), 2, "pixel"),
        ((2, 2), 1, "pixel"),
    ],
)
def test_equals_one_process(tmp_path: Path, grid: tuple[int, int], cfg: int, codec: str) -> None:
    config = CodecConfig(name=codec)
    if codec != "pixel":
        config = CodecConfig(name=codec, path=str(save_tiny_vae(codec, tmp_path / "vae")))
    tiny_pipeline(tmp_path, build_codec(config)).save_pretrained(tmp_path / "pipeline")
    run_on_ranks(prod(grid) * cfg, compare, grid, cfg, tmp_path / "pipeline")


def compare_tiles(group: Group, cfg: int, folder: Path) -> None:
    """In tiles, all ranks get the video of one process, and each decodes some of the tiles."""
    mesh = build_mesh(SamplingParallelConfig(sp=group.size // cfg, cfg=cfg), torch.device("cpu"))
    pipe = STDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.codec.enable_tiling(128)
    calls, frames, counts = list[int](), [], []
    decode_parts = pipe.codec._decode_parts

    def count(parts: Any, ends: Any) -> Any:
        calls.append(1)
        return decode_parts(parts, ends)

    pipe.codec._decode_parts = count  # type: ignore[method-assign]
    for one in (Mesh(), mesh):
        pipe.share(one)
        result = pipe(
            ["a red circle", "a blue square"],
            num_frames=5,
            height=160,
            width=136,
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
            output_type="pt",
        )
        frames.append(result.frames)
        counts.append(len(calls))
        calls.clear()
    torch.testing.assert_close(frames[1], frames[0], atol=1e-5, rtol=1e-4)
    assert counts == [2 * 4, 2 * 4 // group.size], "of 2 videos of 2 x 2 tiles"


@pytest.mark.parametrize("ranks, cfg", [(2, 1), (4, 2)])
def test_ranks_share_the_tiles(tmp_path: Path, ranks: int, cfg: int) -> None:
    name = "AutoencoderKLWan"
    config = CodecConfig(name=name, path=str(save_tiny_vae(name, tmp_path / "vae")))
    tiny_pipeline(tmp_path, build_codec(config)).save_pretrained(tmp_path / "pipeline")
    run_on_ranks(ranks, compare_tiles, cfg, tmp_path / "pipeline")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    return write_run(folder / "outputs" / "tiny", tiny_pipeline(folder))


def videos(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: decode_clip(path, 4, 8, 8, 8) for path in sorted(folder.glob("*.mp4"))}


@pytest.mark.parametrize(
    "ranks, sp, cfg, launcher",
    [
        (2, 1, 1, "warm"),
        (4, 2, 2, "warm"),
        (4, 1, 2, "warm"),
        pytest.param(2, 1, 1, "torchrun", marks=pytest.mark.slow),
        pytest.param(4, 1, 2, "accelerate", marks=pytest.mark.slow),
    ],
)
def test_command_writes_the_files_of_one_process(
    run: Path, tmp_path: Path, ranks: int, sp: int, cfg: int, launcher: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green cross\n")
    common = ["--checkpoint", str(run), "--prompts", str(prompts), "--guidance_scale", "2"]
    many = ["--parallel.sp", str(sp), "--parallel.cfg", str(cfg), "--output", str(tmp_path / "many")]
    code, output, errors = launch("sample.py", ranks, [*common, *many], launcher)
    assert code == 0, errors
    code, alone, errors = launch("sample.py", 1, [*common, "--output", str(tmp_path / "one")])
    assert code == 0, errors
    lines = output.replace("/many/", "/one/").splitlines()
    grids = [line for line in lines if line.startswith("parallel.grid of 4x8x8: ")]
    assert len(grids) == (sp > 1)
    assert [line for line in lines if line not in grids] == alone.splitlines()
    expected, found = videos(tmp_path / "one"), videos(tmp_path / "many")
    assert len(expected) == 3 and expected.keys() == found.keys()
    for name, video in expected.items():
        assert (found[name].float() - video.float()).abs().max() <= 2, "of 255, after h264"
    assert (tmp_path / "many" / "sheet.png").is_file()


def test_ranks_without_a_prompt_share_the_video(run: Path, tmp_path: Path) -> None:
    flags = [
        "--checkpoint",
        str(run),
        "--prompt",
        "a red circle",
        "--output",
        str(tmp_path),
        "--format",
        "mp4",
    ]
    code, output, errors = launch("sample.py", 2, [*flags, "--parallel.sp", "auto"])
    assert code == 0, errors
    assert output.count("parallel.sp = auto, 2 processes: 2, the smallest") == 1
    assert len(videos(tmp_path)) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompts", "absent.txt"], "absent.txt"),
        (["--prompt", "a", "--output", "/dev/null/x"], "cannot be written"),
        (["--prompt", "a", "--parallel.cfg", "2", "--parallel.sp", "2"], "start a multiple of 4"),
        (["--prompt", "a", "--num_frames", "1", "--image", "absent.png"], "absent.png"),
        (["--prompt", "a", "--codec.tile", "128", "--parallel.memory_gib", "0.01"], "no smaller tile fits"),
    ],
)
def test_all_ranks_end_with_one_message(run: Path, flags: list[str], message: str) -> None:
    code, _, errors = launch("sample.py", 2, ["--checkpoint", str(run), *flags])
    assert code != 0
    assert errors.count("error: ") == 1 and message in errors
