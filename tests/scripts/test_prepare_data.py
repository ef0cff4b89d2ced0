"""The commands of prepare_data.py, as a user runs them."""

import html
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from scripts.prepare_data import COMMANDS, build_parser, main
from stdit.errors import UserError
from tests.data.conftest import write_video  # noqa: F401 (a fixture)
from tests.data.preparation.conftest import clips, read_csv  # noqa: F401 (a fixture)
from tests.launch import ROOT
from tests.training.tiny import tiny_settings

HERE = ["--workers", "0"]


def test_all_steps_in_order(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    def step(name: str, source: str, output: str, *flags: str) -> str:
        here = [] if name == "filter" else HERE
        main([name, str(clips / source), str(clips / output), *here, *flags])
        return capsys.readouterr().out

    assert "3 of 6 clips" in step("probe", "", "probed.csv")
    assert "4 clips" in step("split", "probed.csv", "scenes.csv", "--max_seconds", "2")
    assert "4 of 4 clips" in step("score", "scenes.csv", "scored.csv", "--scores", "brightness", "difference")
    assert "3 of 4 clips" in step(
        "filter", "scored.csv", "good.csv", "--where", "num_frames >= 9 and brightness > 1"
    )
    assert "3 of 3 clips" in step("dedupe", "good.csv", "manifest.csv")
    rows = read_csv(clips / "manifest.csv")
    assert [(row["path"], row["start"], row["end"]) for row in rows] == [
        ("a.mp4", "0.0", "2.0"), ("c.mp4", "0.0", "1.5"), ("c.mp4", "1.5", "3.0"),
    ]  # fmt: skip
    config = clips / "train.yaml"
    buckets = "[{num_frames: 16, fps: 8, height: 32, width: 32}]"
    config.write_text(f"data: {{buckets: {buckets}, sources: [{{manifest: others.csv}}]}}\n")
    step("report", "manifest.csv", "report.html", "--config", str(config), "--thumbnails", "2")
    assert re.search(r"16x32x32 at 8 fps +1 +1 +1\n", (clips / "report.html").read_text())


def test_the_report_shows_what_is_cut_and_what_max_crop_drops(clips: Path) -> None:  # noqa: F811
    config, page = clips / "train.yaml", clips / "report.html"
    buckets = "[{num_frames: 8, fps: 8, height: 36, width: 64}]"
    for limit, line in (
        ("1", r"8x36x64 at 8 fps: 25% of the picture on average, at most 25% \(\S*\.mp4, 64x48 pixels\)"),
        ("0.2", r"too much would be cut: .* \(25% of 64x48 pixels \(width x height\) to fill 8x36x64"),
    ):
        config.write_text(f"data: {{buckets: {buckets}, max_crop: {limit}}}\n")
        flags = ["--config", str(config), "--thumbnails", "0", "--overwrite"]
        main(["report", str(clips), str(page), *HERE, *flags])
        assert re.search(line, html.unescape(page.read_text())), limit


def test_root_is_the_folder_that_paths_are_relative_to(
    clips: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = tmp_path / "elsewhere" / "manifest.csv", tmp_path / "elsewhere" / "probed.csv"
    source.parent.mkdir()
    source.write_text("path,text\na.mp4,a red ball\n")
    with pytest.raises(
        UserError, match=r"no clip is left\n(?s:.*)if the files lie elsewhere, add --root FOLDER"
    ):
        main(["probe", str(source), str(output), *HERE])
    main(["probe", str(source), str(output), "--root", str(clips), "--overwrite", *HERE])
    assert f"add --root {os.path.realpath(clips)}" in capsys.readouterr().out
    assert [row["path"] for row in read_csv(output)] == ["a.mp4"]


def test_bad_arguments_are_errors(clips: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="no column 'motion'"):
        main(["filter", str(clips), str(clips / "good.csv"), "--where", "motion > 2"])
    config = clips / "train.yaml"
    config.write_text("data:\n  bukets: []\n")
    with pytest.raises(UserError, match="bukets is not a setting: did you mean"):
        main(["report", str(clips), str(clips / "report.html"), "--config", str(config)])
    for flags in (
        ["prob"],
        ["probe", str(clips)],
        ["probe", "a", "b", "--over"],
        ["score", "a", "b", "--frames", "x"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(flags)
        assert caught.value.code == 2


def write_song(path: Path) -> Path:
    """Write a file with sound and a cover picture, but no video."""
    with av.open(path, "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", width=16, height=16, pix_fmt="yuvj420p")
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        for stream, frames in ((cover, []), (sound, [samples]), (sound, [])):
            container.mux(stream.encode(*frames))
    return path


def test_messages_name_what_was_given(clips: Path) -> None:  # noqa: F811
    def refusal(source: Path | str) -> str:
        with pytest.raises(UserError) as error:
            main(["probe", str(source), str(clips / "probed.csv"), "--overwrite", *HERE])
        return str(error.value)

    assert f"manifest {clips / 'a.mp4'} is a single video or picture: name its folder" in refusal(
        clips / "a.mp4"
    )
    assert refusal("nofolder") == "source nofolder: there is no such folder or manifest: correct the path"
    os.mkfifo(clips / "rows.csv")
    assert "rows.csv is a pipe or a device" in refusal(clips / "rows.csv")
    other = clips / "other"
    other.mkdir()
    os.mkfifo(other / "fifo.mp4")
    assert "1 x not a regular file, but a pipe, socket or device: fifo.mp4" in refusal(other)
    (other / "fifo.mp4").unlink()
    write_song(other / "song.mp4")
    assert "song.mp4" in refusal(other) and "only audio and a cover picture" in refusal(other)
    (other / "clips.list").write_bytes(b"\xff\xfe\x00")
    assert "or name a folder of videos" in refusal(other / "clips.list")
    for action in (["cache", "verify"],):
        with pytest.raises(UserError, match=r"clips holds no cache, .*: name the folder of a cache"):
            main([*action, str(clips)])


def test_the_cache_of_a_training_is_filled_verified_and_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(tmp_path)
    folder = tmp_path / "clips" / "stdit-cache"

    def output_of(*arguments: str) -> str:
        main([*arguments])
        return capsys.readouterr().out

    assert "3 views encoded, 0 were in the cache" in output_of("encode", *settings, "--part", "1/2")
    out = output_of("encode", *settings)
    assert "5 clips, 2 views encoded, 3 were in the cache" in out and "train with --data.cache disk" in out
    assert "0 views encoded, 5 were in the cache" in output_of("encode", *settings, "--data.cache", "disk")
    assert "entries" in output_of("cache", "verify", str(folder))
    assert "0 entries and" in output_of("cache", "prune", str(folder), *settings)

    video = ["--data.buckets", "[{num_frames: 2, height: 8, width: 8, fps: 8}]"]
    assert "5 views encoded" in output_of("encode", *settings, *video)
    assert "5 entries and" in output_of("cache", "prune", str(folder), *settings, "--dry_run")
    assert "5 entries and" in output_of("cache", "prune", str(folder), *settings)

    for channels in (2, 3):
        codec = f"codec: {{name: pca, stride: [1, 2, 2], channels: {channels}, fit_clips: 2}}"
        (tmp_path / f"pca-{channels}.yaml").write_text(
            (tmp_path / "tiny.yaml").read_text().replace("codec: {name: pixel}", codec)
        )
        output_of("encode", "--config", str(tmp_path / f"pca-{channels}.yaml"))
    assert len(list((folder / "codecs").iterdir())) == 2
    pruned = ["cache", "prune", str(folder), *settings, "--config", str(tmp_path / "pca-3.yaml")]
    assert "5 entries and 1 fitted codecs" in output_of(*pruned, "--dry_run")
    assert "5 entries and 1 fitted codecs" in output_of(*pruned)
    assert len(list((folder / "codecs").iterdir())) == 1
    assert "0 entries and 0 fitted codecs" in output_of(*pruned)

    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"broken: {shard.name}: .*\nprune removes what is broken"):
        main(["cache", "verify", str(folder)])
    assert "broken" in output_of("cache", "prune", str(folder)) and not shard.exists()
    assert "entries" in output_of("cache", "verify", str(folder))
    with pytest.raises(UserError, match="data.bukets is not a setting"):
        main(["encode", *settings, "--data.bukets", "[]"])
    for part in ("0/2", "3/2", "1", "a/b", "-1/2"):
        with pytest.raises(UserError, match="must be K/N"):
            main(["encode", *settings, f"--part={part}"])


def test_a_score_of_a_users_own_module(
    clips: Path,  # noqa: F811
) -> None:
    """The recipe of stdit/data/README.md."""
    (clips / "my_scores.py").write_text(
        "from stdit.data.preparation.scoring import register_scorer\n\n\n"
        "def redness(frames, fps):\n    return frames[..., 0].mean() - frames[..., 1:].mean()\n\n\n"
        'register_scorer("redness", redness)\n'
    )
    command = ["scripts/prepare_data.py", "score", str(clips), str(clips / "scored.csv"), "--workers", "1"]
    command = [sys.executable, str(ROOT / command[0]), *command[1:], "--scores", "brightness", "redness"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def score(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *flags], cwd=clips, env=environment, capture_output=True, text=True)

    missing = score()
    assert missing.returncode == 2 and "redness" in missing.stderr and "--import MODULE" in missing.stderr
    done = score("--import", "my_scores")
    assert done.returncode == 0, done.stderr
    rows = read_csv(clips / "scored.csv")
    assert len(rows) == 3 and all(abs(float(row["redness"])) < 256 for row in rows)


def test_help_imports_neither_torch_nor_av() -> None:
    code = "import sys, scripts.prepare_data as s; s.build_parser(); print(*{'av', 'torch'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "\n", result.stderr
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args([name, "--help"])
        assert caught.value.code == 0


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_leaves_no_process(
    tmp_path: Path,
    write_video: Callable[..., Path],  # noqa: F811
) -> None:
    first = write_video(tmp_path / "clips" / "0.mp4", num_frames=100, height=64, width=64)
    for k in range(1, 60):
        (tmp_path / "clips" / f"{k}.mp4").write_bytes(first.read_bytes())
    output = tmp_path / "manifest.csv"
    command = [
        sys.executable,
        "scripts/prepare_data.py",
        "split",
        str(first.parent),
        str(output),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    partial = tmp_path / "manifest.csv.partial"
    while not (partial.exists() and partial.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in printed and "Traceback" not in printed
    assert "of 60 are done and kept: the same command resumes" in printed and not output.exists()
    with pytest.raises(
        ProcessLookupError
    ):  # soon: the server of processes ends when it sees that this one has
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    done = partial.read_text().count("\n")
    assert 3 < done < 60
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and len({row["path"] for row in read_csv(output)}) == 60
