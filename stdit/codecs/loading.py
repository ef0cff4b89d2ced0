"""What VAEs and text encoders share: finding weights, refusing pickles, quiet libraries, fingerprints."""

import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from stdit.checkpoint_files import read_json
from stdit.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# What diffusers.pipelines passes to the `from_pretrained` of a model beside `torch_dtype`, and the values
# that ask for nothing that we do not do anyway.
DIFFUSERS_OPTIONS: dict[str, tuple[Any, ...]] = {
    "device_map": (None,),
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "variant": (None,),
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, True, False),
    "use_flashpack": (False,),
    "disable_mmap": (None, False),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Let through what diffusers passes to every component, and nothing that would be silently ignored.

    Raises:
        TypeError: an option that diffusers does not pass.
        UserError: an option of diffusers with a value that cannot be honoured.
    """
    for name, value in options.items():
        if name not in DIFFUSERS_OPTIONS:
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}")
        if value not in DIFFUSERS_OPTIONS[name]:
            raise UserError(
                f"{name}={value!r} is not supported for codecs and text encoders, which are read from "
                f"safetensors into memory: leave {name} out"
            )


@dataclass(frozen=True)
class Source:
    """Where weights lie: a local folder, or a repository and subfolder on the hub."""

    location: str
    subfolder: str | None
    local: bool

    def __str__(self) -> str:
        return f"{self.location}/{self.subfolder}" if self.subfolder else self.location

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for a `from_pretrained` of diffusers or transformers."""
        where = {"pretrained_model_name_or_path": self.location, "local_files_only": self.local}
        return where | ({"subfolder": self.subfolder} if self.subfolder else {})


def find_source(setting: str, path: str | None, subfolder: str | None) -> Source:
    """A local folder if `path` is one, else a hub id if it looks like one. Touches no network.

    Args:
        setting: name of the setting, for messages, such as ``codec.path``.

    Raises:
        UserError: `path` is neither, or is missing, or the folder has no config.json or only pickled weights.
    """
    if not path:
        raise UserError(f"{setting} is not set, but this needs weights: give a local folder or a hub id")
    folder = Path(path).expanduser()
    if folder.exists():
        folder = folder / subfolder if subfolder else folder
        _check_folder(setting, folder)
        return Source(str(folder), None, local=True)
    if HUB_ID.fullmatch(path):
        return Source(path, subfolder, local=False)
    raise UserError(
        f"{setting} is {path!r}, but there is no such local folder, and it is not a hub id of the form "
        f"organisation/name: give a local folder or a hub id"
    )


def _check_folder(setting: str, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{setting}: {str(folder)!r} is not a folder: give the folder of the weights, or a hub id"
        )
    if not (folder / "config.json").is_file():
        raise UserError(_no_config(setting, folder))
    read_json(folder / "config.json", "a model")
    if any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        raise UserError(
            f"{setting}: {str(folder)!r} holds only pickled weights ({pickles[0]}), and reading a pickle can "
            f"run anything: use a copy in safetensors, or, if you trust it, load it with diffusers or "
            f"transformers once and save it again"
        )
    raise UserError(f"{setting}: {str(folder)!r} holds no *.safetensors file: is the download complete?")


def _no_config(setting: str, folder: Path) -> str:
    message = f"{setting}: {str(folder)!r} has no config.json"
    inner = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if inner:
        option = setting.split(".")[0] + ".subfolder"
        return f"{message}, but its folders {', '.join(inner)} have: choose one by {option}"
    return f"{message}: give the folder of one diffusers or transformers model"


@contextmanager
def loading(what: str, source: Source) -> Iterator[None]:
    """Turn what goes wrong while weights are read into one line; the cause stays attached."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(_failure(what, source, error)) from error
    except Exception as error:
        # Away from the disk anything can fail, each HTTP library with exceptions of its own.
        if source.local:
            raise
        raise UserError(_failure(what, source, error)) from error


def _failure(what: str, source: Source, error: Exception) -> str:
    cause = _first_line(error)
    if source.local:
        return f"{what} could not be read from the folder {str(source)!r}: {cause}"
    return (
        f"{what}: there is no local folder {source.location!r}, and the hub did not give {str(source)!r}: "
        f"{cause} (at bottom: {_first_line(_root(error))}); check spelling, network and access, or "
        f"download it and give the local folder"
    )


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else line[:197] + "..."


def _root(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def check_complete(what: str, source: Source, missing: Iterable[str]) -> None:
    """Libraries fill weights that a file lacks with random numbers; that is an error here.

    Raises:
        UserError: naming how many weights are missing.
    """
    if names := sorted(missing):
        raise UserError(
            f"{what}: {str(source)!r} lacks {len(names)} of its weights ({names[0]}, ...): it is damaged or "
            f"of another class"
        )


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Progress bars and warnings of diffusers or transformers off while loading; errors stay."""
    logging = importlib.import_module(f"{library}.utils.logging")
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, readable by people."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """The dtype behind a name that `dtype_name` made.

    Raises:
        UserError: not the name of a floating dtype.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"{name!r} is not the name of a floating dtype of torch, such as float32 or bfloat16")
    return dtype


def fingerprint(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits that change with any fact and any bit of any tensor, and not with the device."""
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
