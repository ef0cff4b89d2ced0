"""The model with classifier-free guidance: the velocity of noisy latents, in one call or on two ranks.

Letters: B videos, C channels, T latent frames, H height, W width, L text tokens, E width of the text states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stdit.diffusion.flow import FlowObjective
from stdit.diffusion.guidance import rescale_guidance, sample_moments, standard_deviation
from stdit.errors import UserError
from stdit.models.broadcast import AttentionBroadcast
from stdit.models.stdit import STDiT
from stdit.parallel.sequence.collectives import all_gather
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.pipelines.model_calls import ModelCalls


def rows_name(halves: int) -> str:
    """Return the name of model calls with these halves of guidance: `AttentionBroadcast` keeps each for itself."""
    return "cond" if halves == 1 else "uncond_cond"


@dataclass
class GuidedModel:
    """A model and the inputs that it has in all steps of a call."""

    transformer: STDiT
    flow: FlowObjective
    sharding: TokenSharding
    cfg: Group
    """The ranks that share the two halves of guidance; one rank: both are computed in one batch."""
    text: dict[str, Tensor]
    """Text states ``[B L E]``, mask, dropped captions: with guidance first negative prompts, ``[2B L E]``."""
    shared: dict[str, Any]
    """fps, height, width ``[1]``, attention_kwargs: the same for all videos."""
    guided: bool
    """Whether ``text`` has negative prompts."""
    guidance_rescale: float = 0.0
    broadcast: AttentionBroadcast | None = None
    """Attention that steps use again."""
    calls: list[ModelCalls] = field(init=False)
    """So far, of each video."""

    def __post_init__(self) -> None:
        rows = len(self.text["encoder_hidden_states"])
        self.calls = [ModelCalls()] * (rows // 2 if self.guided else rows)

    def embeds(self) -> dict[str, Tensor]:
        """Return the text states of prompts and negative prompts, by the names of the pipeline's arguments."""
        names = ("negative_prompt_embeds", "prompt_embeds") if self.guided else ("prompt_embeds",)
        return dict(zip(names, self.text["encoder_hidden_states"].chunk(len(names)), strict=True))

    def set_embeds(self, changed: Mapping[str, Tensor]) -> None:
        """Replace some of the text states, by the names in `embeds`, by other ones of the same shape.

        Raises:
            UserError: for negative prompts of which one is the null caption, which has no states.
        """
        if "negative_prompt_embeds" in changed and "drop_caption" in self.text:
            raise UserError(
                "callback_on_step_end returned negative_prompt_embeds, but a negative prompt of this call is the "
                "null caption, which they would not replace: call with negative_prompt (such as an empty text) or "
                "negative_prompt_embeds for all prompts."
            )
        self.text["encoder_hidden_states"] = torch.cat(
            [changed.get(name, own) for name, own in self.embeds().items()]
        )

    @property
    def takes_scale(self) -> bool:
        """Whether the model takes the guidance scale as an input, and needs no second half."""
        return self.transformer.config.guidance_range is not None

    def weights(self, scale: float) -> dict[str, float]:
        """Return the halves of guidance that a scale g needs, with the factors of their velocities."""
        return {"cond": 1.0} if scale == 1 or not self.guided else {"uncond": 1 - scale, "cond": scale}

    def velocity(self, x_t: Tensor, t: Tensor, scale: float) -> Tensor:
        """Return ``v_uncond + g (v_cond - v_uncond)`` (Ho & Salimans 2022, arXiv:2207.12598, equation 6).

        Both are computed in one batch, or on two ranks; at g = 1 only the conditional one.

        Args:
            x_t: this rank's frames ``[B C T_n H W]``.
            t: the noise levels of all frames, ``[B T]`` or ``[B 1]``.
            scale: g.
        """
        return self.guide(self.velocities(x_t, t, scale), scale)

    def velocities(self, x_t: Tensor, t: Tensor, scale: float, videos: Sequence[int] | None = None) -> Tensor:
        """Return the velocities of the halves in `weights`, ``[n B C T_n H W]``.

        Args:
            videos: the places of those in ``x_t`` and ``t`` among the videos of the call; None: all.
        """
        count, halves = len(self.calls), len(self.weights(scale))
        text, videos = self.text, range(count) if videos is None else videos
        self._count(videos, ModelCalls(run=halves))
        if halves == 1:
            text = {name: rows[-count:] for name, rows in text.items()}
        elif self.cfg.size > 1:
            text = {name: rows.chunk(2)[self.cfg.rank] for name, rows in text.items()}
        times = len(text["encoder_hidden_states"]) // count
        if len(videos) < count:
            places = [count * half + video for half in range(times) for video in videos]
            text = {name: rows[places] for name, rows in text.items()}
        if self.takes_scale:
            self.shared["guidance"] = torch.full((1,), scale, device=x_t.device)
        found = self.predict(x_t.repeat(times, 1, 1, 1, 1), t.repeat(times, 1), text, rows_name(halves))
        if times < halves:
            found = all_gather(found, self.cfg, 0, [len(x_t)] * 2)
        return found.unflatten(0, (halves, -1))

    def count_skipped(self, videos: Sequence[int], scale: float) -> None:
        """Count a step that some videos skip."""
        self._count(videos, ModelCalls(skipped=len(self.weights(scale)), skipped_steps=1))

    def _count(self, videos: Sequence[int], more: ModelCalls) -> None:
        for video in videos:
            self.calls[video] += more

    def guide(self, velocities: Tensor, scale: float) -> Tensor:
        """Return the velocity ``[B C T_n H W]`` of the halves in `weights`, ``[n B C T_n H W]``."""
        if len(velocities) == 1:
            return velocities[0]
        unconditional, conditional = velocities
        velocity = unconditional + scale * (conditional - unconditional)
        if not self.guidance_rescale:
            return velocity
        of_rank = torch.stack([sample_moments(conditional), sample_moments(velocity)])[None]
        ranks = self.sharding.column_group
        sums = all_gather(of_rank, ranks, 0, [1] * ranks.size).sum(0)  # over all frames
        before, after = (standard_deviation(one) for one in sums)
        return rescale_guidance(velocity, before, after, self.guidance_rescale)

    def predict(self, x_t: Tensor, t: Tensor, text: Mapping[str, Tensor], cache: str) -> Tensor:
        """Call the model with rows of text; return the velocity of ``x_t``.

        Args:
            cache: name of the calls with these rows, for `AttentionBroadcast` and diffusers' caches.
        """
        level = self.sharding.split(t, dim=1)
        model_input = self.flow.scale_model_input(x_t, level).to(self.transformer.dtype)
        with self.transformer.cache_context(cache):
            output = self.transformer(
                hidden_states=model_input,
                timestep=1000 * t,
                **text,
                **self.shared,
                sharding=self.sharding,
                **({"broadcast": self.broadcast.call(cache)} if self.broadcast else {}),
            ).sample
        return self.flow.velocity(output.float(), x_t, level)
