"""Text states as rows of a batch: repeated for several videos, and with those of guidance in front.

Letters: B prompts, V videos of a prompt, L text tokens, E width of the text states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stdit.codecs.text import TextEncoder


def encode_texts(encoder: TextEncoder, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Encode each distinct text once: states ``[B L E]`` and mask ``[B L]`` of all."""
    distinct = list(dict.fromkeys(texts))
    states, mask = encoder.encode(distinct)
    rows = [distinct.index(text) for text in texts]
    return states[rows], mask[rows]


def repeated(values: Sequence[Any], times: int) -> list[Any]:
    """Return each value several times, beside each other."""
    return [value for value in values for _ in range(times)]


def repeated_states(states: Tensor, mask: Tensor | None, times: int) -> tuple[Tensor, Tensor]:
    """Return states ``[B V, L, E]`` and mask ``[B V, L]``; without a mask all are tokens."""
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return states.repeat_interleave(times, 0), mask.to(states.device, torch.bool).repeat_interleave(times, 0)


def text_rows(
    states: Tensor,
    mask: Tensor,
    negative_states: Tensor | None,
    negative_mask: Tensor | None,
    dropped: Sequence[bool] | None,
) -> dict[str, Tensor]:
    """Return the text arguments of the model: with guidance the rows of negative prompts, then those of prompts.

    Args:
        states: of the prompts, ``[B L E]``.
        mask: likewise, ``[B L]``.
        negative_states, negative_mask: likewise; None: the null caption everywhere.
        dropped: for each negative prompt, whether it is the null caption. Its row then has the prompt's own states,
            which the model replaces, and its mask. None: no guidance.
    """
    if dropped is None:
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    if negative_states is None or negative_mask is None:
        negative_states, negative_mask = states, mask
    length = max(states.shape[1], negative_states.shape[1])
    states, negative_states = (
        pad(one, (0, 0, 0, length - one.shape[1])) for one in (states, negative_states)
    )
    mask, negative_mask = (pad(one, (0, length - one.shape[1])) for one in (mask, negative_mask))
    drop = torch.tensor(dropped, device=states.device)
    rows = {
        "encoder_hidden_states": torch.cat(
            [torch.where(drop[:, None, None], states, negative_states), states]
        ),
        "encoder_attention_mask": torch.cat([torch.where(drop[:, None], mask, negative_mask), mask]),
    }
    if any(dropped):
        rows["drop_caption"] = torch.cat([drop, torch.zeros_like(drop)])
    return rows
