"""A folder of awkward media, through probe, report, dry run and a training step, by their commands."""

import html
import json
from pathlib import Path

import pytest

from tests import warm
from tests.codecs.tiny import save_tiny_bert
from tests.data.awkward import CASES, Excluded, Expected, write_folder
from tests.data.preparation.conftest import read_csv

BUCKETS = (
    "[{num_frames: 6, fps: 6, height: 16, width: 16, batch_size: 64},"
    " {num_frames: 1, fps: 6, height: 16, width: 16, batch_size: 8}]"
)
GOOD = {name: expected for name, (_, expected) in CASES.items() if isinstance(expected, Expected)}
BAD = {name: expected for name, (_, expected) in CASES.items() if isinstance(expected, Excluded)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("awkward") / "clips")


@pytest.fixture(scope="module")
def probed(folder: Path) -> Path:
    done = warm.run(
        ["scripts/prepare_data.py", "probe", str(folder), str(folder / "probed.csv"), "--workers", "0"]
    )
    assert done.returncode == 0, done.stderr
    assert "clips are tone-mapped to SDR of BT.709: " in done.stdout
    assert "clips are interlaced, and deinterlaced by bwdif: 2 tff, 1 bff" in done.stdout
    assert "2 files are damaged; what is readable before the damage is kept:" in done.stdout
    return folder / "probed.csv"


@pytest.fixture(scope="module")
def settings(folder: Path) -> list[str]:
    save_tiny_bert(folder.parent / "bert")
    config = folder.parent / "tiny.yaml"
    config.write_text(f"""
name: awkward
output_dir: {folder.parent / "outputs"}
data: {{buckets: {BUCKETS}}}
codec: {{name: pixel}}
text_encoder: {{name: auto, path: {folder.parent / "bert"}, max_length: 12}}
model: {{depth: 1, hidden_size: 32, num_heads: 2, patch_size: [1, 4, 4], input_sq_size: 8}}
trainer: {{steps: 2, device: cpu}}
checkpoint: {{every: 2}}
""")
    return ["--config", str(config)]


@pytest.mark.parametrize("name", CASES)
def test_probe_says_what_is_expected(probed: Path, name: str) -> None:
    rows = {row["path"]: row for row in read_csv(probed)}
    reasons = {row["path"]: row["reason"] for row in read_csv(probed.with_suffix(".excluded.csv"))}
    expected = CASES[name][1]
    if isinstance(expected, Excluded):
        assert name not in rows and expected.reason in reasons[name]
        return
    assert name not in reasons
    row = rows[name]
    assert (row["color_space"], row["field_order"], bool(row["damage"])) == expected[4:]
    assert (int(row["height"]), int(row["width"])) == expected[2:4]
    assert float(row["fps"]) == pytest.approx(expected.fps, rel=0.01)
    if name != "truncated.mp4":  # how many frames remain depends on the encoder
        assert int(row["num_frames"]) == expected.num_frames
    assert float(row["readable_seconds"]) == pytest.approx(
        int(row["num_frames"]) / float(row["fps"]), abs=1e-3
    )


def test_the_report_shows_a_picture_of_each_and_counts_them(probed: Path) -> None:
    page = probed.parent.parent / "report.html"
    command = [
        "report",
        str(probed),
        str(page),
        "--workers",
        "0",
        "--overwrite",
        "--root",
        str(probed.parent),
    ]
    done = warm.run(["scripts/prepare_data.py", *command])
    assert done.returncode == 0, done.stderr
    assert "could not be made" not in done.stdout
    text = html.unescape(page.read_text())
    assert text.count("data:image/jpeg") == len(GOOD)
    for line in ("3 clips are tone-mapped to SDR", "3 clips are interlaced", "2 clips are damaged"):
        assert line in text


@pytest.mark.parametrize("kind", ["probed", "folder"])
def test_the_dry_run_counts_them(probed: Path, folder: Path, settings: list[str], kind: str) -> None:
    source = probed if kind == "probed" else folder
    done = warm.run(["train.py", *settings, "--data.manifest", str(source), "--dry_run", "true"])
    assert done.returncode == 0, done.stderr
    assert "3 clips are tone-mapped to SDR of BT.709: 1 BT.2020, 1 HLG, 1 PQ" in done.stdout
    assert "3 clips are interlaced, and deinterlaced by bwdif: 2 tff, 1 bff" in done.stdout
    if kind == "probed":
        assert "2 clips are damaged: what comes before the damage is used" in done.stdout
        assert "entries of the manifest skipped" not in done.stdout
    else:
        assert f"{len(BAD)} entries of the manifest skipped" in done.stdout


@pytest.mark.parametrize("kind", ["probed", "folder"])
def test_a_training_step_reads_them_all(probed: Path, folder: Path, settings: list[str], kind: str) -> None:
    """Batches of more clips than there are: every clip is read in the two steps of an epoch."""
    source = probed if kind == "probed" else folder
    done = warm.run(["train.py", *settings, "--name", kind, "--data.manifest", str(source)])
    assert done.returncode == 0, done.stderr
    run = folder.parent / "outputs" / kind
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["loss"] < 100 for line in lines)
    skipped = (run / "skipped.jsonl").read_text() if (run / "skipped.jsonl").exists() else ""
    if kind == "probed":
        assert not skipped
    else:  # windows that reach into the damage
        names = {Path(json.loads(line)["path"]).name for line in skipped.splitlines()}
        assert names and names <= {"truncated.mp4", "bit rot.mp4"}
