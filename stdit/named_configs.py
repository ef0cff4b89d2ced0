"""Config files by name: those of the repository's ``configs/``, which a wheel holds as ``stdit/configs``."""

import difflib
import logging
import os
from pathlib import Path

from stdit.errors import UserError

logger = logging.getLogger(__name__)
RENAMED = {"train/finetune": "train/own-clips"}
"""Former name: name. A former name works for one release (until 0.2)."""


def find_config(name: str) -> Path:
    """Return the file that ``--config NAME`` names: one on disk, else one that comes with stdit.

    ``.yaml`` may be left out, and ``configs/`` too for those that come with stdit: ``train/quickstart``.

    Raises:
        UserError: if there is none, with the nearest names.
    """
    for path in (name, f"{name}.yaml"):
        if os.path.isfile(path):
            return Path(path)
    known = named_configs()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short in RENAMED:
        logger.warning(
            "--config %s: this config is now called %s; the old name ends with 0.2", name, RENAMED[short]
        )
        short = RENAMED[short]
    if short in known:
        return known[short]
    if os.path.exists(name):
        return Path(name)  # a folder or a pipe: who reads it says so
    near = _nearest(short, list(known))
    folders = sorted({f"{other.partition('/')[0]}/" for other in known})
    hint = f"did you mean {' or '.join(near)}?" if near else f"its names begin with {', '.join(folders)}."
    if inside := [other for other in known if other.startswith(f"{short.rstrip('/')}/")]:
        hint = f"choose {' or '.join(inside)}."
    raise UserError(
        f"--config {name}: cannot be read: there is no such file, and no config of this name in stdit: {hint}"
    )


def named_configs() -> dict[str, Path]:
    """Return the configs that come with stdit: name, such as ``train/quickstart``, to file."""
    package = Path(__file__).parent
    folder = package / "configs"  # in a wheel; in a clone configs/ lies beside stdit/
    if not folder.is_dir():
        folder = package.parent / "configs"
    files = sorted(folder.glob("*/*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _nearest(name: str, known: list[str]) -> list[str]:
    """Return the names that are similar to a name as a whole, or in their last part; at most three."""
    lasts = {other: other.rpartition("/")[2] for other in known}
    similar = difflib.get_close_matches(name.rpartition("/")[2], list(lasts.values()), 3)
    near = difflib.get_close_matches(name, known, 3, 0.75) + [one for one in known if lasts[one] in similar]
    return list(dict.fromkeys(near))[:3]
