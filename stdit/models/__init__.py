"""The spatial-temporal diffusion transformer. Importing this package imports no torch."""

from typing import TYPE_CHECKING

from stdit.lazy import lazy_getattr
from stdit.models.config import STDiTConfig

if TYPE_CHECKING:
    from stdit.models.stdit import STDiT

__all__ = ["STDiT", "STDiTConfig"]

__getattr__ = lazy_getattr(__name__, {"STDiT": "stdit.models.stdit"})
