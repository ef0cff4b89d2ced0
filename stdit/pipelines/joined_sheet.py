"""Contact sheets of several folders on one PNG, to compare models."""

from collections.abc import Sequence
from pathlib import Path

from stdit.errors import UserError


def write_joined_sheet(sheets: Sequence[Path], output: Path) -> None:
    """Write contact sheets side by side as one PNG, each below its path; an older one is replaced.

    Args:
        sheets: PNGs, or folders that hold a ``sheet.png``.

    Raises:
        UserError: if one is no contact sheet or damaged, or ``output`` is one of them, or another file.
    """
    import PIL.Image

    from stdit.pipelines.contact_sheet import (
        check_replaceable,
        picture_row,
        read_contents,
        side_by_side,
        write_rows,
    )
    from stdit.pipelines.writer import check_writable, created_folder

    check_replaceable(output)
    check_writable(output.absolute().parent)
    files = [path / "sheet.png" if path.is_dir() else path for path in sheets]
    if output.resolve() in [file.resolve() for file in files]:
        raise UserError(f"{output} is one of the sheets to put side by side: choose another --output.")
    contents, named = [], []
    for path, file in zip(sheets, files, strict=True):
        shown = read_contents(file)
        if not shown:
            raise UserError(
                f"{file} is no contact sheet: give output folders of sample.py, or the sheets in them."
            )
        contents.append({"sheet": str(path), "contents": shown})
        try:
            with PIL.Image.open(file) as image:
                picture = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # as Pillow has it
            raise UserError(f"{file} is damaged ({error}): delete it, and run sample.py again.") from error
        named.append(picture_row([picture], str(path), 1))
    with created_folder(output.absolute().parent):
        write_rows(output, [side_by_side(named)], contents)
