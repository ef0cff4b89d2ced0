"""STDiT: a diffusion transformer whose blocks attend over space, over time or over both, in any pattern.

The architecture is that of Open-Sora v1.2's STDiT3 (Zheng et al. 2024, arXiv:2412.20404) with adaLN-single
(PixArt-alpha, Chen et al. 2023, arXiv:2310.00426, section 2.3). Modules have Open-Sora's names, but all blocks are in
one list, in the order in which they run, on which diffusers' caches count.

Letters: B batch, C channels, T frames, H height, W width, S = H*W spatial patches, D width, L text tokens,
E width of the text states, F frames of the modulation (T, or 1 where all frames share one timestep).
"""

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from stdit.checkpoint_files import Sealed, verify_if_sealed
from stdit.errors import UserError
from stdit.models import opensora
from stdit.models.activations import offloaded
from stdit.models.blocks import BLOCK_CLASSES, FinalLayer, STDiTBlock, TokenGrid
from stdit.models.broadcast import BroadcastCall, Output
from stdit.models.config import (
    BLOCK_KINDS,
    Activations,
    SettingValue,
    STDiTConfig,
    token_grid,
    with_current_names,
)
from stdit.models.embeddings import (
    CaptionEmbedder,
    Mlp,
    PatchEmbed3D,
    ScalarEmbedder,
    joint_angles,
    rotary_angles,
    sincos,
    spatial_positions,
)
from stdit.models.lora_scale import scale_loras
from stdit.models.low_bit import low_bit_layers, make_low_bit
from stdit.models.own_shapes import has_own_names, infer_own_settings
from stdit.parallel.sequence.group import ONE_RANK, Group
from stdit.parallel.sequence.layouts import Layout, Span
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.parallel.sequence.stages import Costs, Stage, choose_grid, first_layout


class STDiT(Sealed, ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin, FromOriginalModelMixin):  # type: ignore[misc]  # fmt: skip
    """A text-to-video diffusion transformer of any latent size; its settings are those of :class:`STDiTConfig`."""

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = [block_class.__name__ for block_class in BLOCK_CLASSES.values()]
    _repeated_blocks = _no_split_modules
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
        self.guidance_embedder = ScalarEmbedder(dim) if config.guidance_range is not None else None
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        self.pooled_embedder = Mlp(config.caption_channels, dim, dim) if config.pooled_text else None
        everywhere = config.cross_attention == "all"
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            BLOCK_CLASSES[kind](config, everywhere or kind != "T")  # type: ignore[call-arg]
            for kind in config.kinds
        )
        self.final_layer = FinalLayer(dim, prod(config.patch_size) * self.out_channels)
        self.initialize_weights()

    def __getattr__(self, name: str) -> Any:
        """Find the module ``blocks`` before the setting of that name, of which diffusers would warn."""
        return nn.Module.__getattr__(self, name) if name == "blocks" else super().__getattr__(name)

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
        """Load a file of weights, with an STDiT's own names or those of Open-Sora v1.2's STDiT3.

        Settings are those of ``config``, a folder with a config.json; without it they are read off the shapes of the
        weights, but for what ``original_config`` (a dictionary) has. ``options`` are those of diffusers, such as
        ``torch_dtype``.

        Raises:
            UserError: if its keys and shapes are not exactly the model's, which are listed, or the shapes leave a
                setting open for which there is no default.
        """
        if options.get("config") is None:
            options.setdefault("original_config", {})
        return super().from_single_file(pretrained_model_link_or_path_or_dict, **options)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> Any:
        """Return the settings in a recorded config, for diffusers."""
        return super().extract_init_dict(with_current_names(config_dict), **options)

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
        if self.guidance_embedder is not None:  # a student begins as its teacher without guidance
            nn.init.zeros_(self.guidance_embedder.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.y_embedding, std=self.config.caption_channels**-0.5)
        nn.init.normal_(self.final_layer.scale_shift_table, std=dim**-0.5)
        nn.init.zeros_(self.final_layer.linear.weight)
        for block in self.blocks:
            nn.init.normal_(block.scale_shift_table, std=dim**-0.5)
            with torch.no_grad():
                block.scale_shift_table[[2, 5]] += self.config.gate_init
            if block.mlp_conv is not None:
                nn.init.normal_(block.mlp_conv.weight, std=0.1)
            if self.config.gate_init == 0 and block.kind != "S":
                for name, parameter in block.named_parameters():
                    if name.endswith(("proj.weight", "mlp.fc2.weight")):
                        nn.init.zeros_(parameter)

    def _fix_state_dict_keys_on_load(self, state_dict: MutableMapping[str, Tensor]) -> None:
        """Give weights that were saved with Open-Sora's names of the blocks their own; diffusers calls it."""
        rename = opensora.stdit_names(self.config)
        for name in list(state_dict):
            state_dict[rename(name)] = state_dict.pop(name)

    @property
    def kinds(self) -> str:
        """Letters of the blocks, in the order in which they run."""
        return "".join(block.kind for block in self.blocks)

    def block_patterns(self, kind: str) -> list[str]:
        """Return a regular expression for each block of a kind, found in the names of its modules and weights.

        Args:
            kind: spatial, temporal, joint or linear.
        """
        return [rf"\bblocks\.{i}\." for i, block in enumerate(self.blocks) if BLOCK_KINDS[block.kind] == kind]

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
        guidance: Tensor | None = None,
        sharding: TokenSharding | None = None,
        broadcast: BroadcastCall | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the target of the diffusion objective (such as the velocity) from noisy latents.

        Args:
            hidden_states: noisy latents ``[B C T H W]``, of any size; with ``sharding``, those of this rank's row.
            timestep: 1000 times the noise level t, ``[B]``, ``[B 1]``, or one for each latent frame ``[B T]`` (0: a
                conditioning frame).
            encoder_hidden_states: text states ``[B L E]``, L at most ``model_max_length``.
            encoder_attention_mask: true or 1 where there is a text token, ``[B L]``; None: everywhere.
            fps: frames per second of the video, ``[B]``, or ``[1]`` for all. Of ``[2B]``, as of the other arguments
                without tokens, the second half counts: diffusers' FasterCache drops the first half of the rest.
            height: height of the video in pixels, likewise.
            width: width of the video in pixels, likewise.
            drop_caption: true where the learned null caption replaces the text, ``[B]``; None: nowhere.
            guidance: guidance scale, ``[B]`` or ``[1]``, of a model with ``guidance_range``.
            sharding: which tokens each rank of a group has, from :meth:`token_sharding`; None: not sharded.
            broadcast: outputs of attention to use again, and where to keep them; None: all are computed.
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
        if (guidance is None) == (self.guidance_embedder is not None):
            needs = "needs" if guidance is None else "takes no"
            raise ValueError(f"this STDiT {needs} guidance (guidance_range = {self.config.guidance_range})")
        B, C, T, H, W = hidden_states.shape
        fps, height, width = (_rows(B, "fps, height and width", values) for values in (fps, height, width))
        drop_caption = None if drop_caption is None else _rows(B, "drop_caption", drop_caption)
        guidance = None if guidance is None else _rows(B, "guidance", guidance)
        sharding = sharding or self.token_sharding(ONE_RANK, T, H, W)
        self._check(hidden_states, timestep, encoder_hidden_states, sharding)
        pt, ph, pw = self.config.patch_size
        frames_here, rows, columns = -(-T // pt), -(-H // ph), -(-W // pw)
        padded = pad(hidden_states, (0, columns * pw - W, 0, rows * ph - H, 0, frames_here * pt - T))

        stages = sharding.stages(self.kinds, keeps_attention=broadcast is not None)
        first = first_layout(stages[0])
        x = self._embed(padded, sharding, first, columns)  # [B T_n S_n D]
        dtype = x.dtype
        place = spatial_positions(rows, columns, x.shape[-1], height * width, self.config.input_sq_size)
        begin, end = sharding.own(first).patches
        x = x + place[:, begin:end].to(dtype)[:, None]
        if self.config.frame_positions:
            positions = sincos(torch.arange(sharding.frames, device=x.device), x.shape[-1])  # [T D]
            x = x + sharding.per_frame(positions[None, :, None], first).to(dtype)
        grids = self._token_grids(stages, sharding, columns, x.device)

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
        if self.guidance_embedder is not None:
            t = t + self.guidance_embedder(guidance, own)[:, None].to(dtype)
        modulation = self.t_block(t).unflatten(-1, (6, -1))  # [B F 6 D]

        x = sharding.switch(x, first, stages[0].layout)
        following_stages = [*stages[1:], stages[-1]]
        for number, (block, stage, following) in enumerate(
            zip(self.blocks, stages, following_stages, strict=True)
        ):
            kept = None if broadcast is None else partial(broadcast.output, number, block.kind)
            run = partial(self._run_block, block, y, mask, grids[stage], kept)
            x = sharding.run_then_switch(run, x, modulation, stage, following)
        x = sharding.run_last(self.final_layer, x, t, stages[-1])
        x = rearrange(
            x, "B T (H W) (pt ph pw C) -> B C (T pt) (H ph) (W pw)", H=rows, W=columns, pt=pt, ph=ph, pw=pw
        )
        sample = x[:, :, :T, :H, :W]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, latents: Tensor, sharding: TokenSharding, layout: Layout, columns: int) -> Tensor:
        """Return this rank's tokens ``[B T_n S_n D]`` of the latents of its row, padded to whole patches."""
        own, row = sharding.own(layout), sharding.row_tokens[sharding.group.rank]
        if sharding.group.size == 1 or own == row:
            embedded: Tensor = self.x_embedder(latents)
            return embedded
        pt, ph, _ = self.config.patch_size
        frames = own.frames.within(row.frames)
        rows = Span(own.patches.begin // columns, -(-own.patches.end // columns))
        part = latents[:, :, frames.start * pt : frames.stop * pt, rows.begin * ph : rows.end * ph]
        embedded = self.x_embedder(part)
        return embedded[:, :, own.patches.within(Span(rows.begin * columns, rows.end * columns))]

    def _token_grids(
        self,
        stages: Sequence[Stage],
        sharding: TokenSharding,
        columns: int,
        device: torch.device,
    ) -> dict[Stage, TokenGrid]:
        """Return the positions of this rank's tokens for each kind of block and layout."""
        head_size = self.config.hidden_size // self.config.num_heads
        along_time = rotary_angles(sharding.frames, head_size, device)
        grids = {}
        for stage in dict.fromkeys(stages):
            angles = along_time
            if stage.kind in "JL":
                angles = joint_angles(*sharding.own(stage.layout), columns, head_size, device)
            grids[stage] = TokenGrid(columns, angles, sharding.shard(stage))
        return grids

    def _run_block(
        self,
        block: STDiTBlock,
        y: Tensor,
        mask: Tensor | None,
        grid: TokenGrid,
        kept: Callable[[], Output] | None,
        x: Tensor,
        modulation: Tensor,
    ) -> Tensor:
        out: Tensor
        if kept is not None:
            grid = grid._replace(output=kept())
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

    def token_sharding(
        self, group: Group, latent_frames: int, height: int, width: int, clips: int = 1
    ) -> TokenSharding:
        """Return how a group shards latents of ``latent_frames``, and height and width in latents.

        Its ranks divide time and space as its ``grid`` says, or as is fastest for batches of ``clips``.
        """
        config = self.config
        frames, patches = token_grid((latent_frames, height, width), config.patch_size)
        halo = -(-width // config.patch_size[2]) + 1 if config.mlp_conv else 0
        costs = Costs.of(
            config.hidden_size, config.num_heads, group.speeds, clips, halo, config.linear_causal
        )
        grid = group.grid or choose_grid(group.size, frames, patches, self.kinds, costs)
        return TokenSharding(group, frames, patches, config.patch_size[0], grid, costs)

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


def _rows(count: int, name: str, values: Tensor) -> Tensor:
    """Return the values of the last ``count`` rows of a batch. Raises ValueError for values of another batch."""
    if len(values) not in (1, count, 2 * count):
        raise ValueError(f"{name} have {len(values)} values: must be [1] or [B] (here B = {count})")
    return values if len(values) == 1 else values[-count:]


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
    """Return the settings of a file, as `from_single_file` asks for them."""
    given = with_current_names(original_config)
    if has_own_names(checkpoint):
        settings = infer_own_settings(checkpoint, given)
    else:
        settings = {**opensora.infer_settings(checkpoint), **given}
    config = STDiTConfig(**settings)  # type: ignore[arg-type]
    return {"_class_name": "STDiT", **asdict(config)}  # as a saved model's config


def _weights_of_single_file(config: dict[str, Any], checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a file that are not yet those of the model, as `from_single_file` asks for them."""
    with torch.device("meta"):
        model = STDiT(**asdict(STDiTConfig.read(config)))
    if has_own_names(checkpoint):
        weights = dict(checkpoint)
        opensora.check_keys(weights, model.state_dict())
    else:
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
