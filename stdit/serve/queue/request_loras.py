"""Adapters of a request: found among those that are offered, and checked against the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from stdit.errors import UserError
from stdit.lora.config import LoRASpec
from stdit.serve.errors import RequestError
from stdit.serve.queue.catalog import Catalog, OfferedModel

MAX_LORAS = 8


def read_loras(entries: Any, catalog: Catalog) -> list[str]:
    """Return the adapters of a request as ``--lora`` has them, FILE:weight.

    Raises:
        RequestError: if one is not offered, or an entry has another form.
    """
    if not isinstance(entries, list) or not all(isinstance(one, Mapping) for one in entries):
        raise RequestError('loras: must be a list such as [{"id": "NAME", "weight": 1.0}].', param="loras")
    if len(entries) > MAX_LORAS:
        raise RequestError(
            f"loras: has {len(entries)} adapters: at most {MAX_LORAS} are used.", param="loras"
        )
    found = []
    for place, entry in enumerate(entries):
        name, weight = entry.get("id"), entry.get("weight", 1.0)
        if set(entry) - {"id", "weight"} or not isinstance(name, str):
            raise RequestError(
                'loras: each must have an id, and may have a weight: {"id": "NAME"}.',
                param=f"loras[{place}].id",
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= 100:
            raise RequestError(
                f"loras: weight = {weight!r:.80}: must be a number from -100 to 100.",
                param=f"loras[{place}].weight",
            )
        found.append(f"{catalog.adapter(name, f'loras[{place}].id')}:{weight}")
    return found


def check_architecture(
    loras: Sequence[LoRASpec], entries: Sequence[Mapping[str, Any]], model: OfferedModel
) -> None:
    """Raise RequestError for an adapter of another architecture."""
    from stdit.pipelines.loras import check_loras

    for place, (lora, entry) in enumerate(zip(loras, entries, strict=True)):
        try:
            check_loras([lora], model.transformer)
        except UserError as error:
            message = str(error).replace(str(lora.file), str(entry["id"]))
            raise RequestError(message, param=f"loras[{place}].id") from None
