"""Encode captions and prompts once, so that training and sampling need not load the text encoder.

    python scripts/encode_text.py --output text --text_encoder.name t5 --text_encoder.path T5_FOLDER \
        --captions clips/manifest.csv --captions prompts.txt
    python scripts/encode_text.py --output text --text_encoder.name t5 --text_encoder.path T5_FOLDER \
        --training mine.yaml
    python train.py --config mine.yaml --text_encoder.name stored --text_encoder.path text
    python sample.py --checkpoint ... --prompts prompts.txt --text_states text

--captions takes manifests (all that data.manifest takes) and files of prompts, with their negative prompts and
segment prompts. --training takes config files and settings of train.py, such as data.manifest=clips/manifest.csv, and
encodes all texts that the training reads: the captions of its clips (with data.trigger and data.caption_scores), of
data.regularisation and of validation.loss_manifest, and validation.prompts. Captions that the folder already has are
not encoded again.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stdit.cli import run
from stdit.codecs.config import TextEncoderConfig
from stdit.errors import UserError
from stdit.settings import parse


@dataclass
class EncodeConfig:
    """The captions to encode, and the encoder."""

    imports: list[str] = field(default_factory=list)
    """Module of your own to import, which registers the text encoder; may be repeated."""
    output: str = ""
    """Folder of the states; new ones are added to those that it has."""
    captions: list[str] = field(default_factory=list)
    """Manifests and files of prompts, one flag each."""
    caption_scores: list[Literal["aesthetic", "motion", "camera"]] = field(default_factory=list)
    """data.caption_scores of the training that will read the states, for the manifests among captions."""
    trigger: str | None = None
    """data.trigger of that training, likewise."""
    training: list[str] = field(default_factory=list)
    """Config files of a training, and settings NAME=VALUE, repeatable (later ones win): encode all texts that it
    reads."""
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The text encoder."""
    store: Literal["fp32", "bf16"] = "bf16"
    """Precision of the states on disk."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.text_encoder.name == "stored":
            raise UserError("text_encoder.name = stored: name an encoder that computes states, such as t5.")
        for name in ("caption_scores", "trigger"):
            if getattr(self, name) and not self.captions:
                raise UserError(
                    f"{name} = {getattr(self, name)}: is for captions; that of --training is in its config."
                )


def main() -> None:
    config = parse(EncodeConfig, doc=__doc__)
    if not config.output or not (config.captions or config.training):
        raise UserError("--output FOLDER, and --captions FILE or --training CONFIG are needed: see --help.")
    texts = [
        text
        for file in config.captions
        for text in read_captions(file, config.caption_scores, config.trigger)
    ]
    if config.training:
        texts += training_texts(config.training)
    texts = list(dict.fromkeys(texts))

    from tqdm import tqdm

    from stdit.codecs import build_text_encoder
    from stdit.codecs.loading import DTYPES
    from stdit.codecs.stored_text import store_text
    from stdit.parallel.processes.device import find_device
    from stdit.pipelines.writer import check_writable

    check_writable(Path(config.output))
    encoder = build_text_encoder(config.text_encoder).to(find_device(config.device))
    done = 0
    with tqdm(total=len(texts), unit="caption", disable=None) as bar:
        for count in store_text(encoder, texts, Path(config.output), DTYPES[config.store]):
            done += count
            bar.update(count)
    print(f"{config.output}: {done} captions encoded, {len(texts) - done} existed already")


def training_texts(given: Sequence[str]) -> list[str]:
    """Return all texts that a training reads, with these config files and settings NAME=VALUE. Raises UserError."""
    from stdit.training.config import parse_train

    argv = []
    for one in given:
        name, is_setting, value = one.partition("=")
        argv += [f"--{name}", value] if is_setting else ["--config", one]
    config = parse_train(argv)
    data, found = config.data, list(config.validation.prompts)
    manifests = [source.manifest for source in data.all_sources()]
    if config.validation.loss_manifest is not None:
        manifests.append(config.validation.loss_manifest)
    for manifest in manifests:
        found += read_captions(manifest, data.caption_scores, data.trigger)
    if data.regularisation.manifest is not None:
        found += read_captions(data.regularisation.manifest, data.caption_scores)
    return found


def read_captions(
    file: str | Path, caption_scores: Sequence[str] = (), trigger: str | None = None
) -> list[str]:
    """Return all texts of a manifest, as in training, or of a file of prompts. Raises UserError."""
    from stdit.data.manifest.archives import is_archive
    from stdit.data.manifest.reading import read_texts
    from stdit.data.manifest.triggers import with_trigger
    from stdit.pipelines.prompts import read_prompts

    path = Path(file)
    if not path.exists() and not is_archive(str(file)):
        raise UserError(f"captions {path}: there is no such file or folder.")
    if (
        is_archive(str(file))
        or path.is_dir()
        or path.suffix.lower() == ".parquet"
        or "text" in _columns(path)
    ):
        return list(with_trigger(read_texts(file, caption_scores), trigger))
    lines = read_prompts(path)
    return [
        text for line in lines for text in (line.prompt, line.negative_prompt, *line.segment_prompts) if text
    ]


def _columns(path: Path) -> list[str]:
    """Return the header of a csv, or the keys of the first line of a jsonl; empty for other and unreadable files, for
    which their reader raises the error."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if suffix == ".csv":
                return [name.strip() for name in next(csv.reader(file), [])]
            row = json.loads(next((line for line in file if not line.isspace()), "{}"))
            return list(row) if isinstance(row, dict) else []
    except (OSError, ValueError, RecursionError, csv.Error):
        return []


if __name__ == "__main__":
    run(main)
