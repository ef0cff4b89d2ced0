"""The readers of user input and files that are fuzzed, each called as the program calls it."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import scenedetect  # noqa: F401 - its import looks for ffmpeg by starting it
import yaml
from hypothesis import strategies as st

from scripts import prepare_data
from stdit.codecs.pixel import PixelCodec
from stdit.data.config import resolve_size
from stdit.data.manifest.reading import read_manifest, read_texts
from stdit.data.preparation.expressions import column_types, parse_filter
from stdit.errors import UserError
from stdit.pipelines.conditions import parse_frame_condition
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.opensora_masks import mask_entries_to_conditions, parse_mask_strategy
from stdit.pipelines.prompts import read_prompts
from stdit.pipelines.requests import check_requests, plan_requests
from stdit.pipelines.segments import Segments
from stdit.setting_checks import setting_types
from stdit.settings import parse
from stdit.suggestions import ALIASES, nearest_name
from stdit.training.config import TrainConfig, parse_train
from tests.fuzz import files
from tests.fuzz.files import Reader
from tests.fuzz.inputs import (
    as_bytes,
    as_json,
    changed_bytes,
    changed_text,
    changed_tree,
)

ROOT = Path(__file__).parents[2]
ALIAS_FLAGS = [f"--{alias}" for line in ALIASES.split("\n") for alias in line.partition(": ")[2].split()]
SETTINGS = list(dict(setting_types(TrainConfig)))
CONDITIONS = ("first.png@0", "end.png@-1", "clip.mp4@0:8:0.5", "a@b@-16:16", "clip.mp4@0::0.6")
MASKS = ("0", "0,0,0,0,1,0", "1,0,0,-1,1", "0,0,0,0,1,0;0,1,0,-1,1,0.5", "0,0,2,1,2,1")
PROMPT_ROWS = [
    {"prompt": "a red ball", "seed": 3, "num_frames": 8, "fps": 8.0, "guidance_scale": 2.5},
    {
        "prompt": "b",
        "condition": ["a.png@0", "b.mp4@-4:4:0.5"],
        "segment_prompts": ["c"],
        "segments": 3,
        "overlap": 2,
        "loop": True,
    },
    {
        "prompt": "d",
        "height": 32,
        "width": 64,
        "guidance_schedule": "interval",
        "guidance_interval": [0.2, 0.8],
    },
    {
        "prompt": "e",
        "reference_path": "a.png;b.png",
        "mask_strategy": "0,0,0,0,1,0",
        "extra": {"shape": "cross"},
    },
]
MANIFEST = (
    "path,text,start,end\na.mp4,one,0.5,1\nb.mp4,two,,\n",
    'path,text,num_frames,fps,height,width\na.mp4,"a, b",16,8,32,32\nb.mp4,two,1,24.0,64,48\nc.mp4,x,9,30,8,8\n',
    "text,path,score,num_frames,fps,height,width\none,a.mp4,5,16,8,32,32\n",
)
WHERE = (
    "score > 0.2 and num_frames >= 16",
    "not (text == 'one' or height / width < 1.5)",
    "'ball' in text and 8 <= fps <= 30",
    "path in ('a.mp4', 'b.mp4') or -score + 2 * fps > 3 % 2",
    "len(text) > 3 and score is not None",
)
MANIFEST_ROWS = [
    {"path": "a.mp4", "text": "one", "num_frames": 16, "fps": 8, "height": 32, "width": 32, "score": 0.5},
    {"path": "b.mp4", "text": "two", "start": 0.5, "end": 1.5, "tags": ["x"]},
    {"path": "c.tar", "text": "three", "member": "d.mp4", "offset": 512, "size": 100},
]


def _in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def read_it(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return read_it


def _configs(kind: str) -> list[Any]:
    return [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs").glob(f"{kind}/*.yaml"))]


def _config_texts(kind: str) -> list[str]:
    return [path.read_text() for path in sorted((ROOT / "configs").glob(f"{kind}/*.yaml"))]


def _config_bytes(kind: str) -> st.SearchStrategy[bytes]:
    """Config files with changed text or changed settings."""
    trees = changed_tree(_configs(kind)).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True))
    return as_bytes(st.one_of(changed_text(_config_texts(kind)), trees))


def _train_flags() -> st.SearchStrategy[list[str]]:
    names = [
        "--name",
        "--seed",
        "--model.depth",
        "--data.buckets",
        "--flow.conditioning",
        "--trainer.steps",
        "--config",
    ]
    names += [
        "--validation.prompts",
        "--model.patch_size",
        "--dry_run",
        "--print_config",
        "--checkpoint",
        "-h",
        "--",
    ]
    values = [
        "x",
        "1",
        "[1, 2, 2]",
        "[{num_frames: 4, height: 8, width: 8}]",
        "{first: 0.1}",
        "true",
        "[a, b]",
    ]
    words = st.one_of(st.sampled_from(names), changed_text(values), changed_text(names))
    return st.lists(words, max_size=6)


def _prompts_csv() -> st.SearchStrategy[bytes]:
    def table(rows: list[Any]) -> str:
        file = io.StringIO()
        columns = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
        writer = csv.DictWriter(file, columns or ["prompt"])
        writer.writeheader()
        writer.writerows(row for row in rows if isinstance(row, dict))
        return file.getvalue()

    whole = table(PROMPT_ROWS)
    changed = changed_tree([PROMPT_ROWS]).filter(lambda tree: isinstance(tree, list)).map(table)
    return as_bytes(st.one_of(changed_text([whole, "prompt,seed\na,1\n", "prompt\na\n"]), changed))


def _jsonl(rows: list[Any]) -> st.SearchStrategy[bytes]:
    lines = st.lists(as_json(changed_tree(rows)), max_size=3).map(b"\n".join)
    return st.one_of(lines, as_bytes(changed_text(["\n".join(map(json.dumps, rows))])))


def _size_by_name() -> st.SearchStrategy[tuple[str, str]]:
    return st.tuples(changed_text(["240p", "256", "1080p"]), changed_text(["16:9", "1:1", "2.35:1"]))


def _tar(members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "../../x"
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _tars() -> st.SearchStrategy[bytes]:
    """Tar shards with odd member names and captions, or with odd bytes."""
    names = changed_text(["a.mp4", "a.txt", "b/c.json", "a.json", "../a.mp4"]).map(lambda name: name[:200])
    captions = st.one_of(as_bytes(changed_text(["a ball"])), as_json(changed_tree([MANIFEST_ROWS[0]])))
    odd = st.lists(st.tuples(names, captions), max_size=4).map(_tar)
    plain = [("a.mp4", b"video"), ("a.json", json.dumps(MANIFEST_ROWS[0]).encode())]
    whole = [_tar(plain), _tar([("b.mp4", b""), ("b.txt", b"two")]), _tar([("a.mp4", b"")], tarfile.SYMTYPE)]
    return st.one_of(odd, changed_bytes(whole))


def _parquets() -> st.SearchStrategy[bytes]:
    """Parquet files with odd values in columns, or with odd bytes."""
    import pyarrow
    import pyarrow.parquet

    def table(columns: dict[str, list[Any]]) -> bytes:
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        return file.getvalue()

    cells = [
        st.sampled_from([16, 0, -1, 2**62]),
        st.sampled_from([0.5, float("nan"), 1e308]),
        changed_text(["a.mp4"]),
    ]
    cells += [st.booleans(), st.none(), st.lists(st.integers(0, 3), max_size=2), st.binary(max_size=4)]
    column = st.one_of([st.lists(cell, min_size=2, max_size=2) for cell in cells])
    names = st.sampled_from(
        ["path", "text", "num_frames", "fps", "height", "width", "start", "member", "other"]
    )
    whole = {name: [value, value] for name, value in MANIFEST_ROWS[0].items()}
    odd = st.dictionaries(names, column, max_size=5).map(lambda some: table(whole | some))
    return st.one_of(odd, changed_bytes([table(whole)]))


def _folder_manifest(names: list[tuple[str, str]], folder: Path) -> object:
    """Read a folder of odd files beside one clip with a caption."""
    PIL.Image.new("RGB", (8, 8)).save(folder / "good.png")
    (folder / "good.txt").write_text("a caption")
    for name, text in names:
        try:
            path = folder / name
            if folder.resolve() not in path.resolve().parents:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        except (OSError, ValueError):
            continue  # no file can have that name
    read_texts(folder)
    return read_manifest(folder)


def _masks(text: str, folder: Path) -> object:
    entries = parse_mask_strategy(text, ["a.png", "b.mp4"])
    return mask_entries_to_conditions(entries, PixelCodec(), Segments(count=2, overlap=2), num_frames=8)


def _condition(inputs: tuple[str, list[Any]], folder: Path) -> None:
    """Parse a filter condition of scripts/prepare_data.py, and apply it to rows with columns of any type."""
    text, rows = inputs
    values = [
        {key: str(value) for key, value in row.items()}
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]
    condition = parse_filter(text, column_types(values, list(MANIFEST_ROWS[0])))
    for row in values:
        condition.objection(row)


def _sample_flags() -> st.SearchStrategy[list[str]]:
    flags = [f"--{name}" for name, _ in setting_types(SampleConfig)]
    names = st.one_of(st.sampled_from(flags), changed_text([*ALIAS_FLAGS, "-c", "-p", "fps=8", "--prompt="]))
    values = changed_text(
        ["a red ball", "1", "0.5", "[1, 2]", "true", "16:9", "240p", "a.png@0", "0,0,0,0,1"]
    )
    return st.lists(st.one_of(names, names, values), max_size=6).map(lambda words: ["--prompt", "a", *words])


def _plan(flags: list[str], folder: Path) -> object:
    """Parse flags of sample.py, plan its requests, and check them against what a pipeline records."""
    config = parse(SampleConfig, flags)
    if config.num_samples > 100 or len(config.seeds or ()) > 100:
        return None  # as many requests, each of which takes its time
    requests = plan_requests(config)
    return check_requests(requests, {"num_frames": 16, "fps": 8.0, "guidance_scale": 2.0})


def _prepare_flags() -> st.SearchStrategy[list[str]]:
    steps = ["probe", "split", "score", "filter", "dedupe", "report", "encode", "cache verify", "cache prune"]
    words = [
        "--workers",
        "--timeout",
        "--root",
        "--overwrite",
        "--where",
        "--part",
        "--config",
        "--min_seconds",
    ]
    words += [
        "--distance",
        "--frames",
        "--scores",
        "--thumbnails",
        "--dry_run",
        "--worker",
        "-c",
        "1/2",
        "-1",
        "x > 2",
    ]
    more = st.lists(st.one_of(st.sampled_from(words), changed_text(words)), max_size=4)
    return st.tuples(changed_text(steps), more).map(
        lambda pair: [*pair[0].split(), "absent", "out.csv", *pair[1]]
    )


def _prepare(flags: list[str], folder: Path) -> object:
    """Run prepare_data.py on a source that does not exist; an error of argparse counts as one for users."""
    try:
        return prepare_data.main(flags)
    except SystemExit as end:
        if end.code == 2:
            raise UserError("as argparse prints it") from None
        raise


def readers() -> dict[str, Reader]:
    """Return all readers by name."""
    prompts = ["\n".join(row["prompt"] for row in PROMPT_ROWS), "# c\n\na red ball\n"]
    names = st.lists(
        st.tuples(changed_text(["a.mp4", "b/c.png", "a.txt"]), changed_text(["text"])), max_size=4
    )
    return {
        "train config": Reader(
            _config_bytes("train"),
            _in_file("c.yaml", lambda file: parse_train(["--config", str(file)])),
            cost=10,
        ),
        "sample config": Reader(
            _config_bytes("sample"),
            _in_file("c.yaml", lambda file: parse(SampleConfig, ["--config", str(file)])),
            cost=10,
        ),
        "train flags": Reader(_train_flags(), lambda flags, _: parse_train(flags), cost=10),
        "sample flags": Reader(_sample_flags(), _plan, cost=10),
        "prepare flags": Reader(_prepare_flags(), _prepare, cost=4),
        "wrong names": Reader(
            changed_text([*ALIAS_FLAGS, *dict(setting_types(TrainConfig))]),
            lambda name, _: nearest_name(name, SETTINGS),
            cost=2,
        ),
        "media": files.media_reader(),
        "pipeline folder": files.pipeline_folder_reader(),
        "cache": files.cache_reader(),
        "prompts txt": Reader(as_bytes(changed_text(prompts)), _in_file("p.txt", read_prompts)),
        "prompts csv": Reader(_prompts_csv(), _in_file("p.csv", read_prompts)),
        "prompts jsonl": Reader(_jsonl(PROMPT_ROWS), _in_file("p.jsonl", read_prompts)),
        "manifest csv": Reader(as_bytes(changed_text(MANIFEST)), _in_file("m.csv", read_manifest), cost=2),
        "manifest jsonl": Reader(_jsonl(MANIFEST_ROWS), _in_file("m.jsonl", read_manifest), cost=2),
        "manifest parquet": Reader(_parquets(), _in_file("m.parquet", read_manifest), cost=4),
        "sharding": Reader(_tars(), _in_file("m.tar", read_manifest), cost=4),
        "captions csv": Reader(as_bytes(changed_text(MANIFEST)), _in_file("m.csv", read_texts)),
        "manifest folder": Reader(names, _folder_manifest, cost=3),
        "condition": Reader(changed_text(CONDITIONS), lambda text, _: parse_frame_condition(text).span(16)),
        "mask_strategy": Reader(changed_text(MASKS), _masks),
        "where": Reader(
            st.tuples(changed_text(WHERE), changed_tree([MANIFEST_ROWS, [*MANIFEST_ROWS, {}]])), _condition
        ),
        "resolution": Reader(_size_by_name(), lambda names, _: resolve_size(*names)),
        "checkpoint meta": files.checkpoint_meta_reader(),
        "weights": files.weights_reader(),
        "adapter": files.adapter_reader(),
        "text states": files.text_states_reader(),
    }
