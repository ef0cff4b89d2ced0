"""Suggest the setting that was meant by a wrong name: first by meaning, then by letters."""

import difflib
from collections.abc import Iterator, Sequence

REPLACED = {"model.block_order": "model.blocks replaces it: 'S T' for alternate, 'S T T S' for paired."}
"""What to write instead of settings that there were before."""

ALIASES = """
optimizer.lr: learning_rate base_lr
optimizer.name: optimizer_type optim
optimizer.schedule: lr_scheduler lr_scheduler_type
optimizer.warmup_steps: lr_warmup_steps warmup num_warmup_steps
optimizer.betas: adam_beta1 adam_beta2 beta1 beta2 adam_betas
optimizer.eps: adam_epsilon adam_eps epsilon
optimizer.weight_decay: adam_weight_decay wd
trainer.steps: steps max_train_steps max_steps train_steps total_steps iterations epochs num_epochs num_train_epochs
trainer.micro_batch_size: gradient_accumulation_steps accumulation_steps micro_batch_size_per_gpu
trainer.precision: mixed_precision dtype torch_dtype weight_dtype bf16 fp16
trainer.matmul_precision: allow_tf32
trainer.max_grad_norm: gradient_clipping grad_clip clip_grad_norm
memory.activations: gradient_checkpointing grad_checkpoint activation_checkpointing activation_offload
memory.optimizer_state: use_8bit_adam optimizer_bits
lora.base_dtype: quantization quantize load_in_8bit load_in_4bit base_weight_dtype
lora.rank: network_dim lora_rank lora_r
lora.alpha: network_alpha lora_alpha
data.buckets: train_batch_size batch_size bs resolution num_frames height width fps bucket_config
data.manifest: dataset dataset_config data_path data_dir train_data_dir instance_data_dir
data.regularisation.manifest: reg_data_dir class_data_dir regularization
data.regularisation.share: prior_loss_weight
data.trigger: trigger_word instance_prompt caption_prefix trigger_phrase
data.root: data_root video_root
data.workers: num_workers dataloader_num_workers max_data_loader_n_workers
data.cache: cache_latents precompute_conditions
data.flip: random_flip
checkpoint.every: checkpointing_steps save_steps save_every save_every_n_steps ckpt_every
checkpoint.keep_last: checkpoints_total_limit checkpointing_limit save_total_limit
resume: resume_from_checkpoint resume_from
init_from: pretrained_model_name_or_path pretrained load_from ckpt ckpt_path model_path
tracker.name: report_to log_with wandb tensorboard
tracker.project: tracker_project_name wandb_project log_tracker_name
validation.prompts: validation_prompt validation_prompts sample_prompts
validation.patience: early_stopping_patience early_stopping
validation.every: validation_steps validation_epochs sample_every_n_steps eval_every
ema.decay: ema_decay
flow.conditioning: mask_ratios
flow.timestep_sampling: weighting_scheme sample_method
flow.shift: discrete_flow_shift flow_shift
parallel.sp: sp_size sequence_parallel_size ulysses_degree ulysses_size context_parallel_size cp_degree ring_degree
parallel.shard_parameters: fsdp zero_stage
parallel.cfg: cfg_parallel use_cfg_parallel
parallel.grid: usp_degree ring_size
checkpoint: pretrained_model_name_or_path ckpt ckpt_path ckpt_dir model model_path load_from
num_inference_steps: steps num_steps infer_steps num_sampling_steps sampling_steps sample_steps
guidance_scale: cfg_scale cfg guidance embedded_cfg_scale
negative_prompt: n_prompt neg_prompt neg negative
num_frames: video_length frames frame_num
height: video_size image_size size
fps: frame_rate save_fps
shift: flow_shift discrete_flow_shift
num_samples: num_videos num_videos_per_prompt num_sample
prompts: prompt_file prompt_path prompts_file from_file
image: image_path input_image init_image
reference_path: ref
dtype: mixed_precision precision torch_dtype weight_dtype bf16 fp16
output: output_dir output_path save_path save_dir out o
output_dir: output save_dir out outdir logging_dir o
config: c config_file
prompt: p
workers: num_workers processes num_proc jobs j
overwrite: force f
"""
"""A setting of ours, and what accelerate, diffusers, finetrainers, musubi-tuner, kohya, diffusion-pipe and Open-Sora
call it, or a part of it. Of the settings that a command has, the one that stands first wins."""


def nearest_name(name: str, names: Sequence[str]) -> str | None:
    """Return the name that was probably meant: by meaning, else by its last part, else by letters.

    Args:
        name: without dashes in front; its groups, if any, are joined by dots.
        names: those that exist; earlier ones win.
    """
    return same_meaning(name, names) or similar_name(name, names)


def same_meaning(name: str, names: Sequence[str]) -> str | None:
    """Return the name that other trainers' ``name`` stands for; None if it is unknown, or there is no such name."""
    name = name.replace("-", "_")
    if name in names:
        return name
    last = name.rpartition(".")[2].lower()
    return next((ours for alias, ours in _aliases() if alias == last and ours in names), None)


def similar_name(name: str, names: Sequence[str]) -> str | None:
    """Return the name with the same last part as ``name``, or with similar letters; None if there is none."""
    last = name.rpartition(".")[2]
    lasts = {other.rpartition(".")[2]: other for other in reversed(names)}
    close = difflib.get_close_matches(name, names, 1, 0.75)
    close_lasts = difflib.get_close_matches(last, list(lasts), 1, 0.6)
    for candidate in (*close, lasts.get(last), *(lasts[one] for one in close_lasts)):
        if candidate:
            return candidate
    return next(iter(difflib.get_close_matches(name, names, 1, 0.5)), None)


def _aliases() -> Iterator[tuple[str, str]]:
    for line in ALIASES.strip().splitlines():
        ours, _, theirs = line.partition(":")
        yield from ((alias, ours) for alias in theirs.split())
