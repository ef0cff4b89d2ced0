import pytest

from stdit.checkpoint_files import FORMAT, META, newest_whole, publish, step_of, verify, write_manifest
from stdit.errors import UserError
from stdit.hashing import sealed_json


def checkpoint(folder, content=b"weights"):
    aside = folder.with_name(folder.name + ".tmp")
    (aside / "model").mkdir(parents=True)
    (aside / "model" / "a.bin").write_bytes(content)
    (aside / "b.bin").write_bytes(b"")
    write_manifest(aside, {"step": step_of(folder)})
    publish(aside, folder)
    return folder


def change(file, old, new):
    """Replace a text in a file, which must have it."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_a_whole_folder_verifies(tmp_path):
    meta = verify(checkpoint(tmp_path / "step-00000007"))
    assert meta["step"] == 7
    assert set(meta["files"]) == {"model/a.bin", "b.bin"}
    assert meta["files"]["model/a.bin"]["bytes"] == 7


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "model/a.bin").unlink(), "a.bin is missing"),
        (lambda folder: (folder / "model/a.bin").write_bytes(b"weig"), "has 4 bytes, but 7"),
        (lambda folder: (folder / "model/a.bin").write_bytes(b"Weights"), "a.bin has changed"),
        (lambda folder: (folder / META).unlink(), "has no meta.json"),
        (lambda folder: (folder / META).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / META).write_text("[]"), "lists no files"),
        (lambda folder: change(folder / META, '"step": 10', '"step": 11'), "meta.json has changed"),
        (lambda folder: change(folder / META, ":", ": "), "meta.json has changed"),
        (  # and not: written by a newer version
            lambda folder: change(folder / META, f'"format": {FORMAT}', f'"format": {FORMAT + 4}'),
            "meta.json has changed",
        ),
        (
            lambda folder: (folder / META).write_text(sealed_json({"format": FORMAT, "files": {"../x": {}}})),
            "outside the folder",
        ),
        (
            lambda folder: (folder / META).write_text(sealed_json({"format": FORMAT, "files": {"b.bin": 3}})),
            "no size and hash of 'b.bin'",
        ),
        (
            lambda folder: (folder / "model/b.safetensors").write_bytes(b""),
            "does not list model/b.safetensors",
        ),
    ],
)
def test_damaged_checkpoints_are_named_and_skipped(tmp_path, damage, message):
    older, newer = checkpoint(tmp_path / "step-00000009"), checkpoint(tmp_path / "step-00000010")
    damage(newer)
    with pytest.raises(UserError, match=message):
        verify(newer)
    newest, passed_over = newest_whole(tmp_path)
    assert newest == older
    assert len(passed_over) == 1 and message in passed_over[0]


def test_only_needed_files_are_read(tmp_path):
    folder = checkpoint(tmp_path / "step-00000001")
    (folder / "b.bin").write_bytes(b"changed")
    verify(folder, lambda name: name.startswith("model/"))


def test_unfinished_folders_do_not_count(tmp_path):
    (tmp_path / "step-00000003.tmp").mkdir()
    assert newest_whole(tmp_path) == (None, [])
    assert newest_whole(tmp_path / "absent") == (None, [])


def test_publish_replaces_nothing(tmp_path):
    folder = checkpoint(tmp_path / "step-00000001")
    with pytest.raises(FileExistsError):
        checkpoint(folder)
