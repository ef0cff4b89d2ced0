"""Pad the text states of captions to one tensor, and undo it. Imports torch only.

Letters: B captions, L text tokens, E width of the text states.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad_states(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad states [L E] of B captions: float32 [B L E], zero where there is no token, and mask bool [B L]."""
    device = states[0].device
    lengths = torch.tensor([len(tokens) for tokens in states], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    return pad_sequence([tokens.float() for tokens in states], batch_first=True), mask


def unpad_states(states: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Yield the states float32 [L E] of each caption, on the CPU."""
    for tokens, present in zip(states.float().cpu(), mask.bool().cpu(), strict=True):
        yield tokens[present].contiguous()
