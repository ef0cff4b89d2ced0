"""STDiT: a diffusion transformer that attends over space and over time in turn.

The architecture is that of Open-Sora v1.2's STDiT3 (Zheng et al. 2024, arXiv:2412.20404) with adaLN-single
(PixArt-alpha, Chen et al. 2023, arXiv:2310.00426, section 2.3). Modules have Open-Sora's names, but all blocks are in
one list, in the order in which they run, on which diffusers' caches count.

Letters: B batch, C channels, T frames, H height, W width, S = H*W spatial patches, D width, L text tokens,
E width of the text states, F frames of the modulation (T, or 1 where all frames share one timestep).
"""

import copy
import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad
from torch.utils.checkpoint import checkpoint

from stdit.checkpoint_files import Sealed, verify_if_sealed
from stdit.errors import UserError
from stdit.models import opensora
from stdit.models.activations import offloaded
from stdit.models.attention import CrossAttention, SelfAttention
from stdit.models.config import Activations, SettingValue, STDiTConfig, token_grid
from stdit.models.embeddings import (
    CaptionEmbedder,
    Mlp,
    PatchEmbed3D,
    ScalarEmbedder,
    rotary_angles,
    sincos,
    spatial_positions,
)
from stdit.models.lora_scale import scale_loras
from stdit.models.low_bit import low_bit_layers, make_low_bit
from stdit.parallel.sequence.group import ONE_RANK, Group
from stdit.parallel.sequence.sharding import ShardAxis, TokenSharding, block_shard_axes


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then ``x * (1 + scale) + shift`` (Peebles & Xie 2023, arXiv:2212.09748)."""
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class TokenGrid(NamedTuple):
    """Positions of the tokens."""

    columns: int
    """Patches in a row of a frame."""
    angles: Tensor
    """Rotary angles of all frames, ``[T dim/2]``."""


class STDiTBlock(nn.Module):
    """Self-attention, cross-attention and MLP on ``[B T S D]``.

    A subclass defines which tokens attend to each other; everything else acts on each token by itself, so a block
    also runs on a part of the tensor along the axis ``shard``. Each has a ``forward`` of its own, since torch.compile
    counts how often the same code is compiled again.
    """

    shard: ClassVar[ShardAxis]
    activations: Activations = "keep"

    def __init__(self, config: STDiTConfig, cross_attention: bool, conv: type[nn.Conv1d | nn.Conv2d]) -> None:
        super().__init__()
        dim = config.hidden_size
        self.attn = SelfAttention(dim, config.num_heads, config.qk_norm)
        self.cross_attn = CrossAttention(dim, config.num_heads) if cross_attention else None
        self.mlp_conv = conv(dim, dim, 3, padding=1, groups=dim, bias=False) if config.mlp_conv else None
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dim)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def self_attention(self, x: Tensor, grid: TokenGrid) -> Tensor:
        raise NotImplementedError

    def convolve_neighbours(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Add a depthwise convolution over the neighbours of each token, if the model has one."""
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, y: Tensor, y_mask: Tensor | None, modulation: Tensor, grid: TokenGrid
    ) -> Tensor:
        """One block (PixArt-alpha, figure 4) on tokens ``[B T S D]``.

        Args:
            y: caption ``[B L D]``.
            modulation: ``[B F 6 D]``.
        """
        x = hidden_states
        table = (self.scale_shift_table + modulation).to(x.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table[:, :, :, None].unbind(2)  # each [B F 1 D]
        x = torch.addcmul(x, gate_a, self.self_attention(modulate(x, shift_a, scale_a), grid))
        if self.cross_attn is not None:
            x = x + self.cross_attn(x.flatten(1, 2), y, y_mask).view_as(x)
        return torch.addcmul(
            x, gate_m, self.mlp(self.convolve_neighbours(modulate(x, shift_m, scale_m), grid))
        )


class SpatialBlock(STDiTBlock):
    """Attention among the patches of each frame."""

    shard = "time"

    def __init__(self, config: STDiTConfig, cross_attention: bool = True) -> None:
        super().__init__(config, cross_attention, nn.Conv2d)

    def forward(
        self, hidden_states: Tensor, y: Tensor, y_mask: Tensor | None, modulation: Tensor, grid: TokenGrid
    ) -> Tensor:
        return super().forward(hidden_states, y, y_mask, modulation, grid)

    def self_attention(self, x: Tensor, grid: TokenGrid) -> Tensor:
        rows = rearrange(x, "B T S D -> (B T) S D")
        attended: Tensor = self.attn(rows)
        return rearrange(attended, "(B T) S D -> B T S D", B=x.shape[0])

    def convolve_neighbours(self, x: Tensor, grid: TokenGrid) -> Tensor:
        if self.mlp_conv is None:
            return x
        frames = rearrange(x, "B T (H W) D -> (B T) D H W", W=grid.columns)
        mixed: Tensor = self.mlp_conv(frames)
        return x + rearrange(mixed, "(B T) D H W -> B T (H W) D", B=x.shape[0])


class TemporalBlock(STDiTBlock):
    """Attention among the frames of each patch, with rotary positions."""

    shard = "space"

    def __init__(self, config: STDiTConfig, cross_attention: bool = True) -> None:
        super().__init__(config, cross_attention, nn.Conv1d)

    def forward(
        self, hidden_states: Tensor, y: Tensor, y_mask: Tensor | None, modulation: Tensor, grid: TokenGrid
    ) -> Tensor:
        return super().forward(hidden_states, y, y_mask, modulation, grid)

    def self_attention(self, x: Tensor, grid: TokenGrid) -> Tensor:
        # Contiguous: else PyTorch multiplies by a copy of each weight for every row, if the weight is frozen.
        rows = rearrange(x, "B T S D -> (B S) T D").contiguous()
        attended: Tensor = self.attn(rows, grid.angles)
        return rearrange(attended, "(B S) T D -> B T S D", B=x.shape[0])

    def convolve_neighbours(self, x: Tensor, grid: TokenGrid) -> Tensor:
        if self.mlp_conv is None:
            return x
        lines = rearrange(x, "B T S D -> (B S) D T")
        mixed: Tensor = self.mlp_conv(lines)
        return x + rearrange(mixed, "(B S) D T -> B T S D", B=x.shape[0])


for block_class in (SpatialBlock, TemporalBlock):  # not by register(), which imports all models of diffusers
    TransformerBlockRegistry._registry[block_class] = TransformerBlockMetadata(
        return_hidden_states_index=0, _cls=block_class
    )


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to the values of their patch; ``t [B F D]``."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_features)
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, :, None]).to(x.dtype)[:, :, :, None].unbind(2)
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out


class STDiT(Sealed, ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin, FromOriginalModelMixin):  # type: ignore[misc]  # fmt: skip
    """A text-to-video diffusion transformer of any latent size; its settings are those of :class:`STDiTConfig`."""

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["SpatialBlock", "TemporalBlock"]
    _repeated_blocks = ["SpatialBlock", "TemporalBlock"]
    _keep_in_fp32_modules = ["scale_shift_table"]

    blocks: Sequence[STDiTBlock]
    """In the order in which they run."""

    def __init__(self, **settings: SettingValue) -> None:
        super().__init__()
        config = STDiTConfig(**settings)  # type: ignore[arg-type]  # checked there
        self.register_to_config(**asdict(config))
        dim = config.hidden_size
        self.out_channels = config.out_channels
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.t_embedder = ScalarEmbedder(dim)
        self.fps_embedder = ScalarEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        self.pooled_embedder = Mlp(config.caption_channels, dim, dim) if config.pooled_text else None
        everywhere = config.cross_attention == "all"
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            SpatialBlock(config) if axis == "time" else TemporalBlock(config, everywhere)
            for axis in block_shard_axes(config.depth, config.block_order)
        )
        self.final_layer = FinalLayer(dim, prod(config.patch_size) * self.out_channels)
        self.initialize_weights()

    @classmethod
    def from_opensora(
        cls, source: str | PathLike[str] | Mapping[str, Tensor], **config: SettingValue
    ) -> Self:
        """Load a checkpoint of Open-Sora v1.2's STDiT3, in the checkpoint's precision.

        Args:
            source: folder or file (see `stdit.models.opensora.read_checkpoint`), or a state dict, whose tensors the
                model then shares.
            config: settings that replace those of the source's config.json or of its shapes.

        Raises:
            UserError: if it cannot be read, or its keys and shapes are not exactly the model's, which are listed.
        """
        state, recorded = (
            (source, {}) if isinstance(source, Mapping) else opensora.read_checkpoint(Path(source))
        )
        settings = opensora.infer_settings(state) | recorded | config
        with torch.device("meta"):  # weights that are replaced are not allocated
            model: Self = cls(**settings)
        weights = opensora.to_stdit(state, model.config)
        opensora.check_keys(weights, model.state_dict(), opensora.opensora_names(model.config))
        model.load_state_dict(weights, assign=True)
        model.eval()
        return model

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: Any, **options: Any) -> Any:
        """Load a file of Open-Sora v1.2's STDiT3; ``options`` are those of diffusers, such as ``torch_dtype``.

        Settings are read off the shapes of its weights, but for what ``original_config`` (a dictionary) has.

        Raises:
            UserError: if its keys and shapes are not exactly the model's, which are listed.
        """
        if options.get("config") is None:
            options.setdefault("original_config", {})
        return super().from_single_file(pretrained_model_link_or_path_or_dict, **options)

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **options: Any) -> None:
        """Write config, weights and a manifest into a folder; ``options`` are those of diffusers.

        Raises:
            UserError: as `check_has_no_adapters`.
        """
        self.check_has_no_adapters()
        super().save_pretrained(save_directory, *args, **options)
        self._seal(Path(save_directory))

    def check_has_no_adapters(self) -> None:
        """Raise UserError if the model has adapters: its weights then have names that could not be read again."""
        if adapters := list(getattr(self, "peft_config", {})):
            raise UserError(
                f"save_pretrained: the model has the adapters {', '.join(adapters)}: save them by save_lora_adapter "
                "(a pipeline: save_lora_weights), merge them by fuse_lora() or leave them out, then unload_lora()."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **options: Any) -> Any:
        """Load what `save_pretrained` wrote, or a model on the hub; ``options`` are those of diffusers.

        Raises:
            UserError: a file of the folder is not as its manifest says, or its weights are not exactly the model's
                and ``output_loading_info`` does not ask for the difference.
        """
        verify_if_sealed(Path(pretrained_model_name_or_path) / (options.get("subfolder") or ""))
        if options.pop("output_loading_info", False):
            return super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **options)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **options
        )
        if odd := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
            raise UserError(
                f"{pretrained_model_name_or_path}: {len(odd)} of its weights are missing or not of this model "
                f"({odd[0]}, ...): it is damaged, or of another class."
            )
        return model

    def initialize_weights(self) -> None:
        """Initialise all weights: Xavier-uniform maps, zero biases, small normal modulation, zero output.

        Temporal blocks start with zero output projections, so that training can start from an image model; not with
        ``gate_init``, which is for short runs from scratch, where every branch contributes from the first step.
        """
        dim = self.config.hidden_size
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for small in (self.t_embedder.mlp, self.fps_embedder.mlp, self.t_block):
            for parameter in small.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.y_embedder.y_embedding, std=self.config.caption_channels**-0.5)
        nn.init.normal_(self.final_layer.scale_shift_table, std=dim**-0.5)
        nn.init.zeros_(self.final_layer.linear.weight)
        for block in self.blocks:
            nn.init.normal_(block.scale_shift_table, std=dim**-0.5)
            with torch.no_grad():
                block.scale_shift_table[[2, 5]] += self.config.gate_init
            if block.mlp_conv is not None:
                nn.init.normal_(block.mlp_conv.weight, std=0.1)
            if self.config.gate_init == 0 and isinstance(block, TemporalBlock):
                for name, parameter in block.named_parameters():
                    if name.endswith(("proj.weight", "mlp.fc2.weight")):
                        nn.init.zeros_(parameter)

    def _fix_state_dict_keys_on_load(self, state_dict: MutableMapping[str, Tensor]) -> None:
        """Give weights that were saved with Open-Sora's names of the blocks their own; diffusers calls it."""
        rename = opensora.stdit_names(self.config)
        for name in list(state_dict):
            state_dict[rename(name)] = state_dict.pop(name)

    def block_patterns(self, kind: Literal["spatial", "temporal"]) -> list[str]:
        """Return a regular expression for each block of a kind, found in the names of its modules and weights."""
        wanted = SpatialBlock if kind == "spatial" else TemporalBlock
        return [rf"\bblocks\.{i}\." for i, block in enumerate(self.blocks) if isinstance(block, wanted)]

    def with_weights(self, tensors: dict[str, Tensor]) -> "STDiT":
        """Return a model with the same settings and adapters that uses ``tensors``, without a copy."""
        with torch.device("meta"):
            model: STDiT = STDiT.from_config(self.config)
            make_low_bit(model, low_bit_layers(self))
            for name, settings in getattr(self, "peft_config", {}).items():
                model.add_adapter(copy.deepcopy(settings), name)
        model.load_state_dict(tensors, assign=True)
        return model

    def set_activations(self, activations: Sequence[Activations]) -> None:
        """Choose what each block, in running order, keeps of its activations for the backward pass."""
        for block, kept in zip(self.blocks, activations, strict=True):
            block.activations = kept

    def compile_blocks(self, **options: object) -> None:
        """Compile every block in place by ``torch.compile``, which takes the ``options``."""
        for block in self.blocks:
            block.compile(**options)

    @scale_loras
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        drop_caption: Tensor | None = None,
        sharding: TokenSharding | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the target of the diffusion objective (such as the velocity) from noisy latents.

        Args:
            hidden_states: noisy latents ``[B C T H W]``, of any size; with ``sharding``, this rank's frames of them.
            timestep: 1000 times the noise level t, ``[B]``, ``[B 1]``, or one for each latent frame ``[B T]`` (0: a
                conditioning frame).
            encoder_hidden_states: text states ``[B L E]``, L at most ``model_max_length``.
            encoder_attention_mask: true or 1 where there is a text token, ``[B L]``; None: everywhere.
            fps: frames per second of the video, ``[B]``, or ``[1]`` for all.
            height: height of the video in pixels, likewise.
            width: width of the video in pixels, likewise.
            drop_caption: true where the learned null caption replaces the text, ``[B]``; None: nowhere.
            sharding: which tokens each rank of a group has, from :meth:`token_sharding`; None: not sharded.
            attention_kwargs: ``scale`` of all LoRAs.
            return_dict: if False, return a tuple of the sample.

        Returns:
            diffusers' output class, whose ``sample`` is ``[B C_out T H W]``, C_out being ``out_channels``, of the
            frames in ``hidden_states``.

        Raises:
            ValueError: if a shape does not fit the model.
        """
        if fps is None or height is None or width is None:
            raise ValueError("STDiT needs fps, height and width [B] (frames per second, pixels)")
        C, T, H, W = hidden_states.shape[1:]
        sharding = sharding or self.token_sharding(ONE_RANK, T, H, W)
        self._check(hidden_states, timestep, encoder_hidden_states, sharding)
        pt, ph, pw = self.config.patch_size
        frames_here, rows, columns = -(-T // pt), -(-H // ph), -(-W // pw)
        padded = pad(hidden_states, (0, columns * pw - W, 0, rows * ph - H, 0, frames_here * pt - T))

        x = self.x_embedder(padded)  # [B T S D], of this rank's frames
        dtype = x.dtype
        x = (
            x
            + spatial_positions(rows, columns, x.shape[-1], height * width, self.config.input_sq_size).to(
                dtype
            )[:, None]
        )
        if self.config.frame_positions:
            positions = sincos(torch.arange(sharding.frames, device=x.device), x.shape[-1])[
                None, :, None
            ]  # [1 T 1 D]
            x = x + sharding.per_frame(positions, "time").to(dtype)
        grid = TokenGrid(
            columns, rotary_angles(sharding.frames, x.shape[-1] // self.config.num_heads, x.device)
        )

        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        states = encoder_hidden_states.to(dtype)
        y, null = self.y_embedder(states, drop_caption)  # [B L D], [L E]

        frames = timestep[:, None] if timestep.ndim == 1 else timestep  # [B F]
        own = hidden_states.dtype
        t = (self.t_embedder(frames, own) + self.fps_embedder(fps, own)[:, None]).to(dtype)  # [B F D]
        if self.pooled_embedder is not None:
            pooled = masked_mean(states, mask)  # [B E]
            if drop_caption is not None and null is not None:
                pooled = torch.where(drop_caption[:, None], masked_mean(null, mask), pooled)
            t = t + self.pooled_embedder(pooled)[:, None]
        modulation = self.t_block(t).unflatten(-1, (6, -1))  # [B F 6 D]

        shard_axes = [block.shard for block in self.blocks]
        x = sharding.switch(x, "time", shard_axes[0])
        for block, following in zip(self.blocks, [*shard_axes[1:], shard_axes[-1]], strict=True):
            stage = partial(self._run_block, block, y, mask, grid)
            x = sharding.run_then_switch(stage, x, modulation, block.shard, following)
        x = sharding.run_then_switch(self.final_layer, x, t, shard_axes[-1], "time")
        x = rearrange(
            x, "B T (H W) (pt ph pw C) -> B C (T pt) (H ph) (W pw)", H=rows, W=columns, pt=pt, ph=ph, pw=pw
        )
        sample = x[:, :, :T, :H, :W]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run_block(
        self,
        block: STDiTBlock,
        y: Tensor,
        mask: Tensor | None,
        grid: TokenGrid,
        x: Tensor,
        modulation: Tensor,
    ) -> Tensor:
        out: Tensor
        if not torch.is_grad_enabled():
            out = block(x, y, mask, modulation, grid)
        elif self.gradient_checkpointing:
            out = self._gradient_checkpointing_func(block, x, y, mask, modulation, grid)
        elif block.activations == "recompute":
            out = checkpoint(block, x, y, mask, modulation, grid, use_reentrant=False)
        else:
            with offloaded(block) if block.activations == "offload" else nullcontext():
                out = block(x, y, mask, modulation, grid)
        return out

    def token_sharding(self, group: Group, latent_frames: int, height: int, width: int) -> TokenSharding:
        """Return how a group shards latents of ``latent_frames``, and height and width in latents."""
        patch = self.config.patch_size
        return TokenSharding(group, *token_grid((latent_frames, height, width), patch), patch[0])

    def _check(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, sharding: TokenSharding
    ) -> None:
        B, C = hidden_states.shape[:2]
        T = sharding.frames
        if C != self.config.in_channels:
            raise ValueError(f"latents have {C} channels, but this model takes {self.config.in_channels}")
        L, E = encoder_hidden_states.shape[1:]
        if E != self.config.caption_channels or L > self.config.model_max_length:
            raise ValueError(
                f"text states have {L} tokens of width {E}, but this model was made for at most "
                f"{self.config.model_max_length} tokens of width {self.config.caption_channels}"
            )
        per_frame = self.config.patch_size[0] == 1
        if timestep.shape not in ((B,), (B, 1)) and not (per_frame and timestep.shape == (B, T)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}: must be [B] or [B 1], or [B T] where patches are one "
                f"frame long (here B = {B}, T = {T}, patch_size = {tuple(self.config.patch_size)})"
            )


def masked_mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Average the states of visible text tokens: ``[B L E] -> [B E]``; zeros where ``mask [B L]`` shows none.

    States ``[L E]``, the same for all, give ``[B E]``, too, or without a mask ``[E]``.
    """
    if mask is None:
        return states.mean(-2)
    weight = mask.to(states.dtype)
    return (weight[:, None] @ states)[:, 0] / weight.sum(1, keepdim=True).clamp(min=1)


def _settings_of_single_file(
    original_config: Mapping[str, Any], checkpoint: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the settings of a file of Open-Sora's, as `from_single_file` asks for them."""
    return asdict(STDiTConfig(**{**opensora.infer_settings(checkpoint), **original_config}))


def _weights_of_single_file(config: dict[str, Any], checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a file of Open-Sora's, as `from_single_file` asks for them."""
    with torch.device("meta"):
        model = STDiT(**asdict(STDiTConfig.read(config)))
    weights = opensora.to_stdit(checkpoint, model.config)
    opensora.check_keys(weights, model.state_dict(), opensora.opensora_names(model.config))
    return weights


SINGLE_FILE_LOADABLE_CLASSES["STDiT"] = {
    "config_mapping_fn": _settings_of_single_file,
    "checkpoint_mapping_fn": _weights_of_single_file,
}
STDiT.save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)  # type: ignore[attr-defined]
# diffusers reads a model's settings from the signature of its __init__, which is made from the dataclass.
STDiT.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    + [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
        for f in fields(STDiTConfig)
    ]
)
