import io
import json
import tarfile

import fsspec
import pytest

from stdit.data.manifest.archives import archive_rows, find_shards, is_archive, shard_root
from stdit.errors import UserError


def write_tar(path, members):
    """`members`: (name or TarInfo, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(*shards, root=None):
    """(rows by member, reasons of those refused by member) of shards."""
    used, refused = {}, {}
    for rows in archive_rows([str(s) for s in shards], root or shard_root(str(shards[0]))):
        for i in range(len(rows)):
            fields = rows.fields(i)
            (refused if i in rows.refused else used)[fields["member"]] = rows.refused.get(i, fields)
    return used, refused


def test_a_clip_is_a_range_with_the_fields_of_its_text_and_json(tmp_path):
    facts = {"caption": "from json", "fps": 8.0, "num_frames": "16", "offset": 3, "motion": None}
    shard = write_tar(
        tmp_path / "deep" / "0.tar",
        [
            ("sub/a.mp4", b"video a"),
            ("sub/a.json", json.dumps(facts).encode()),
            ("sub/a.txt", "\ufeffa red ball\n".encode()),
            ("b.v2.MP4", b"video b"),
            ("b.v2.json", json.dumps(facts).encode()),
            ("c.png", b"picture"),
            ("n" * 200 + ".mp4", b"long name"),
            ("notes.md", b"x"),
        ],
    )
    used, refused = read(shard, root=str(tmp_path))
    assert not refused and list(used) == ["sub/a.mp4", "b.v2.MP4", "c.png", "n" * 200 + ".mp4"]
    a, b = used["sub/a.mp4"], used["b.v2.MP4"]
    assert (a["path"], a["text"], a["fps"], a["num_frames"], a["motion"]) == (
        "deep/0.tar",
        "a red ball",
        "8.0",
        "16",
        "",
    )
    assert b["text"] == "from json" and used["c.png"]["text"] == ""
    content = shard.read_bytes()
    for row, expected in ((a, b"video a"), (b, b"video b"), (used["n" * 200 + ".mp4"], b"long name")):
        begin = int(row["offset"])
        assert content[begin : begin + int(row["size"])] == expected


def test_names_that_leave_the_archive_and_links_are_refused(tmp_path):
    shard = write_tar(
        tmp_path / "0.tar",
        [
            ("../up.mp4", b"x"),
            ("a/../../up.mp4", b"x"),
            ("..\\up.mp4", b"x"),
            ("/etc/a.mp4", b"x"),
            ("C:\\a.mp4", b"x"),
            (link("soft.mp4", "/etc/passwd"), b""),
            (link("hard.mp4", "good.mp4", tarfile.LNKTYPE), b""),
            (link("pipe.mp4", "", tarfile.FIFOTYPE), b""),
            (link("folder", "", tarfile.DIRTYPE), b""),
            ("good.mp4", b"x"),
            ("good.txt", b"a ball"),
            ("../good.json", b"{}"),
        ],
    )
    used, refused = read(shard)
    assert list(used) == ["good.mp4"]
    for name in ("../up.mp4", "a/../../up.mp4", "..\\up.mp4", "../good.json"):
        assert refused[name] == "path that leaves its archive"
    assert refused["/etc/a.mp4"] == refused["C:\\a.mp4"] == "absolute path in an archive"
    assert refused["soft.mp4"] == "link in an archive, which is not followed: to /etc/passwd"
    assert refused["hard.mp4"].startswith("link in an archive") and refused["pipe.mp4"].startswith(
        "no plain file"
    )
    assert len(refused) == 9


def test_one_clip_a_key(tmp_path):
    shard = write_tar(
        tmp_path / "0.tar",
        [
            ("a.jpg", b"1"),
            ("a.mp4", b"2"),
            ("a.png", b"3"),
            ("a.mp4", b"4"),
            ("b.txt", b"x"),
            ("a.txt", b"t"),
            ("e.mp4", b""),
        ],
    )
    used, refused = read(shard)
    assert [(row["member"], row["text"]) for row in used.values()] == [("a.mp4", "t")]
    assert refused == {
        "a.jpg": "beside another of its key: a.mp4",
        "a.png": "beside another of its key: a.mp4",
        "a.mp4": "name occurs twice in its archive",
        "e.mp4": "cannot be read: is empty (0 bytes)",
    }


@pytest.mark.parametrize("cut", ["in a member", "in a header", "at a header", "no mark", "bad header"])
def test_a_truncated_shard_gives_its_complete_members_and_a_reason(tmp_path, cut):
    members = [(f"{i}.{kind}", b"x" * 700) for i in range(3) for kind in ("mp4", "txt")]
    shard = write_tar(tmp_path / "0.tar", members)
    content = bytearray(shard.read_bytes())
    each = 512 + 1024
    bad = content.copy()
    bad[4 * each : 4 * each + 512] = b"z" * 512
    shard.write_bytes(
        {
            "in a member": content[: 4 * each + 600],
            "in a header": content[: 4 * each + 100],
            "at a header": content[: 4 * each],
            "no mark": content[: 6 * each],
            "bad header": bad,
        }[cut]
    )
    used, refused = read(shard)
    assert list(used) == (["0.mp4", "1.mp4", "2.mp4"] if cut == "no mark" else ["0.mp4", "1.mp4"])
    assert refused[""].startswith("shard cut short or damaged: ")
    assert refused[""].endswith(f"after {6 if cut == 'no mark' else 4} whole members")


def test_shards_that_cannot_be_read_are_named_and_the_others_read(tmp_path):
    good = write_tar(tmp_path / "data" / "good.tar", [("a.mp4", b"x")])
    page = tmp_path / "data" / "page.tar"
    page.write_text("<html>no such page</html>" * 100)
    empty = tmp_path / "data" / "empty.tar"
    empty.write_bytes(b"")
    outside = write_tar(tmp_path / "outside.tar", [("b.mp4", b"x")])
    (tmp_path / "data" / "link.tar").symlink_to(outside)
    root = str(tmp_path / "data")
    assert list(read(good, page, root=root)[0]) == ["a.mp4"]
    for shard, reason in (
        (page, "shard cannot be read: "),
        (empty, "shard cannot be read: "),
        (tmp_path / "data" / "link.tar", "shard cannot be read: outside the data root"),
        (outside, "shard cannot be read: outside the data root"),
        ("memory://elsewhere/0.tar", "shard cannot be read: outside the data root"),
    ):
        used, refused = read(shard, root=root)
        assert not used and refused[""].startswith(reason)


def test_caption_files_that_cannot_be_read(tmp_path):
    shard = write_tar(
        tmp_path / "0.tar",
        [
            *((f"{i}.mp4", b"x") for i in range(4)),
            ("0.json", b"{not json"),
            ("1.json", b"[1]"),
            ("2.txt", "ß".encode("latin-1")),
            ("3.txt", b"x" * (1 << 21)),
        ],
    )
    used, refused = read(shard)
    assert used["3.mp4"]["text"] == "" and refused["3.txt"].startswith(
        "caption file too large: 2097152 bytes"
    )
    assert [refused[f"{i}.mp4"].split(":")[0] for i in range(3)] == ["caption file malformed"] * 3


def test_remote_shards(tmp_path):
    shard = write_tar(tmp_path / "0.tar", [("a.mp4", b"video"), ("a.txt", b"a ball")])
    memory = fsspec.filesystem("memory")
    for name in ("x/0.tar", "x/1.tar", "y/0.tar"):
        memory.pipe(f"/set/{name}", shard.read_bytes())
    assert find_shards("memory://set/x/*.tar") == ["memory:///set/x/0.tar", "memory:///set/x/1.tar"]
    assert find_shards("memory://set/{x,y}/0.tar") == ["memory://set/x/0.tar", "memory://set/y/0.tar"]
    assert shard_root("memory://set/{x,y}/0.tar") == "memory://set"
    used, refused = read("memory://set/x/0.tar", root="memory://set")
    assert not refused and used["a.mp4"]["path"] == "x/0.tar"
    used, refused = read("memory://set/x/gone.tar", root="memory://set")
    assert not used and refused[""].startswith("shard cannot be read")


def test_patterns_of_many_shards(tmp_path):
    for name in ("a/00.tar", "a/01.tar", "a/10.tar", "b/00.tar", "[odd].tar"):
        write_tar(tmp_path / name, [])
    base = str(tmp_path)

    def found(pattern):
        return [name.removeprefix(f"{base}/") for name in find_shards(f"{base}/{pattern}")]

    assert found("a/{00..01}.tar") == ["a/00.tar", "a/01.tar"]
    assert found("{a,b}/0*.tar") == ["a/00.tar", "a/01.tar", "b/00.tar"]
    assert found("**/*0.tar") == ["a/00.tar", "a/10.tar", "b/00.tar"]
    assert found("[odd].tar") == ["[odd].tar"]
    assert shard_root(f"{base}/a/{{00..01}}.tar") == f"{base}/a" and shard_root(f"{base}/*/0*.tar") == base
    for pattern, message in {
        "a/{00..02}.tar": "a/02.tar does not exist",
        "c/*.tar": "matches no file",
        "a/{01..00}.tar": "write {00..01}",
        "a/{x}.tar": "neither numbers",
        "{0..9999999}*": "matches no file",
    }.items():
        with pytest.raises(UserError, match=message.replace("{", r"\{").replace(".", r"\.")):
            found(pattern)


def test_what_is_an_archive():
    assert (
        is_archive("a/{0..9}.tar")
        and is_archive("https://host/a.tar?signature=x")
        and is_archive("s3://b/*.TAR")
    )
    assert not is_archive("a.csv") and not is_archive("tar") and not is_archive("s3://b/a.csv?x=.tar")
    for name in ("a.tar.gz", "a.tgz", "s3://b/{0..9}.tar.zst"):
        with pytest.raises(UserError, match="unpack it"):
            is_archive(name)
