"""Settings of sources of clips. Imports no torch and no decoder."""

from dataclasses import dataclass

from stdit.errors import UserError


@dataclass
class SourceConfig:
    """One of several sets of clips."""

    manifest: str = ""
    """Same as data.manifest."""
    root: str | None = None
    """Same as data.root."""
    weight: float = 1.0
    """How often each clip is drawn per epoch: 2 is twice, 0.5 is every other epoch on average."""

    def validate(self) -> None:
        """Raise UserError for an impossible value."""
        if not self.manifest:
            raise UserError("data.sources: manifest is empty; each source needs one")
        if not 0.001 <= self.weight <= 1000:
            raise UserError(
                f"data.sources: weight is {self.weight} for {self.manifest}; it must be from 0.001 to 1000 "
                "(remove the source to take none)"
            )


@dataclass
class RegularisationConfig:
    """Clips of what the model knows already, so that it does not forget them (Ruiz et al. 2023, arXiv:2208.12242,
    section 3.2)."""

    manifest: str | None = None
    """Clips that are mixed in without data.trigger, such as videos of the base model; same as data.manifest."""
    root: str | None = None
    """Same as data.root."""
    share: float = 0.5
    """Share of these clips among those of an epoch."""

    def validate(self) -> None:
        """Raise UserError for an impossible value."""
        if not 0 < self.share < 1:
            raise UserError(
                f"data.regularisation.share is {self.share}; it must be above 0 and below 1 (remove "
                "data.regularisation.manifest to take none)"
            )
