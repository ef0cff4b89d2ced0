"""Helpers to load VAEs and text encoders: find weights, refuse pickles, silence libraries, compute fingerprints."""

import hashlib
import importlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError

from stdit.checkpoint_files import PICKLES, read_json, verify_if_sealed
from stdit.errors import UserError
from stdit.registry import Registry

Component = TypeVar("Component")

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the setting ``dtype``."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What diffusers.pipelines passes to the `from_pretrained` of a model beside `torch_dtype` and `device_map`, and the
# values that change nothing here.
_DIFFUSERS_OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "variant": (None,),
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, True, False),
    "use_flashpack": (False,),
    "disable_mmap": (None, False),
}


def check_options(options: Mapping[str, Any]) -> torch.device:
    """Refuse keyword arguments of `from_pretrained` that would be silently ignored.

    Returns:
        the device of ``device_map``.

    Raises:
        TypeError: an option that diffusers does not pass.
        UserError: an option of diffusers with a value that cannot be honoured.
    """
    place = options.get("device_map")
    for name, value in options.items():
        if name == "device_map":
            continue
        if name == "quantization_config":
            raise UserError(
                "quantization_config: codecs and text encoders of stdit cannot be quantised: name only the other "
                "components in the pipeline's quant_mapping or components_to_quantize."
            )
        if name not in _DIFFUSERS_OPTIONS:
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}")
        if value not in _DIFFUSERS_OPTIONS[name]:
            raise UserError(
                f"{name}={value!r} is not supported for codecs and text encoders, which are read from "
                f"safetensors into memory: leave {name} out"
            )
    if isinstance(place, Mapping) and set(place) == {""}:
        place = place[""]
    try:
        return torch.device("cpu" if place is None else place)
    except (RuntimeError, TypeError):
        raise UserError(
            f"device_map={place!r} is not supported for codecs and text encoders, which are not divided: give one "
            "device, or leave device_map out"
        ) from None


def refuse_to_be_measured(cls: type, *_: object, **__: object) -> NoReturn:
    """Raise UserError; as ``load_config``, which diffusers calls to choose the device of a component."""
    raise UserError(
        f"device_map = balanced: diffusers cannot measure {cls.__name__} of stdit: give one device, or call "
        "enable_model_cpu_offload()."
    )


@dataclass(frozen=True)
class WeightsSource:
    """Location of weights: a local folder, or a repository and subfolder on the hub."""

    location: str
    subfolder: str | None
    local: bool

    def __str__(self) -> str:
        return f"{self.location}/{self.subfolder}" if self.subfolder else self.location

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for a `from_pretrained` of diffusers or transformers."""
        where = {"pretrained_model_name_or_path": self.location, "local_files_only": self.local}
        return where | ({"subfolder": self.subfolder} if self.subfolder else {})


def local_weights(folder: str | Path) -> WeightsSource:
    """Return the source that is a local folder."""
    return WeightsSource(str(folder), None, local=True)


def locate_weights(setting: str, path: str | None, subfolder: str | None) -> WeightsSource:
    """Return a local folder if ``path`` is one, else a hub id if it has that form. Uses no network.

    Args:
        setting: name of the setting, for messages, such as ``codec.path``.

    Raises:
        UserError: ``path`` is neither, or is missing, or the folder has no config.json or only pickled weights.
    """
    if not path:
        raise UserError(f"{setting} is not set, but this needs weights: give a local folder or a hub id")
    folder = Path(path).expanduser()
    if folder.exists():
        folder = folder / subfolder if subfolder else folder
        _check_folder(setting, folder)
        return local_weights(folder)
    if _HUB_ID.fullmatch(path):
        return WeightsSource(path, subfolder, local=False)
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
    verify_if_sealed(folder)
    read_json(folder / "config.json", "a model")
    if any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(file.name for suffix in PICKLES for file in folder.glob(f"*{suffix}")):
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
def explain_load_errors(what: str, source: WeightsSource) -> Iterator[None]:
    """Turn any error while weights are read into a UserError of one line, with the cause attached."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(_failure(what, source, error)) from error
    except Exception as error:
        # A hub can fail with the exceptions of any HTTP library.
        if source.local:
            raise
        raise UserError(_failure(what, source, error)) from error


def _failure(what: str, source: WeightsSource, error: Exception) -> str:
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


def check_complete(what: str, source: WeightsSource, missing: Iterable[str]) -> None:
    """Raise UserError if a file lacks weights, which libraries would fill with random numbers."""
    if names := sorted(missing):
        raise UserError(
            f"{what}: {str(source)!r} lacks {len(names)} of its weights ({names[0]}, ...): it is damaged or "
            f"of another class"
        )


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Turn off progress bars and warnings of diffusers or transformers; errors are still shown."""
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
    """Write an object as indented JSON."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_component(file: Path, name: str, settings: Mapping[str, Any], registry: Registry[Any]) -> None:
    """Write the JSON of a saved codec or text encoder; ``import`` is the module that registers a user's own."""
    module = registry.module(name) if name in registry.names() else None
    write_json(file, {"name": name} | ({"import": module} if module else {}) | dict(settings))


def read_component(
    file: Path, kind: str, registry: Registry[type[Any]], base: type[Component]
) -> tuple[type[Component], dict[str, Any]]:
    """Return the class of a saved codec or text encoder, and its settings with its registered ``name``.

    A module that the file names is not imported.

    Args:
        kind: of the component, for messages.
        base: the class that it must be of.

    Raises:
        UserError: missing, malformed or damaged, or the name is not registered, or is that of another class.
    """
    verify_if_sealed(file.parent)
    settings = read_json(file, f"the folder of a saved {kind}")
    name, module = settings.get("name"), settings.pop("import", None)
    try:
        registry.check(name if isinstance(name, str) else repr(name), [module] if module else [])
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    found = registry.get(settings["name"])
    if not issubclass(found, base):
        raise UserError(
            f"{str(file.parent)!r} holds the {kind} {settings['name']!r}, which is no {base.__name__}"
        )
    return found, settings


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name that `dtype_name` made.

    Raises:
        UserError: not the name of a floating dtype.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"{name!r} is not the name of a floating dtype of torch, such as float32 or bfloat16")
    return dtype


def fingerprint(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Return 32 hex digits that depend on every fact and every bit of the tensors, and not on the device."""
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
