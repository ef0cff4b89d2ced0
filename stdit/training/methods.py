"""Build the trainer of a run, with the training method that its settings ask for."""

from dataclasses import replace
from typing import TYPE_CHECKING

from stdit.models.stdit import STDiT
from stdit.parallel.processes.mesh import Mesh
from stdit.training.build import RunComponents
from stdit.training.config import EMAConfig, SpikeConfig, TrainConfig
from stdit.training.distillation import GuidanceDistillation
from stdit.training.few_steps import DistributionMatching, ScoreMatching, score_seed
from stdit.training.flow_matching import FlowMatching
from stdit.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_trainer(components: RunComponents, accelerator: "Accelerator", mesh: Mesh) -> Trainer:
    """Return the trainer of a run's model. It moves the model to the device, and shards or replicates it."""

    def trainer(model: STDiT, method: FlowMatching, config: TrainConfig) -> Trainer:
        return Trainer(
            model,
            method,
            accelerator,
            mesh,
            config.trainer,
            config.optimizer,
            config.ema,
            config.seed,
            config.parallel.shard_parameters,
            config.memory,
        )

    config, flow, teacher = components.config, components.flow, components.teacher
    model, score = components.model, components.score
    if teacher is None:
        return trainer(model, FlowMatching(flow), config)
    if score is None:
        return trainer(model, GuidanceDistillation(flow, teacher), config)
    steps, updates = config.distill.steps, config.distill.score_updates
    of_score = trainer(score, ScoreMatching(flow, teacher, steps, model), score_config(config))
    return trainer(model, DistributionMatching(flow, teacher, steps, model, of_score, updates), config)


def score_config(config: TrainConfig) -> TrainConfig:
    """Return the settings with which a run trains the score of a few-step student.

    Its steps are the updates of the score; no samples are made with it, so that it needs no average.
    """
    rates, updates = config.distill.score_lr, config.distill.score_updates
    optimizer = config.optimizer
    return replace(
        config,
        seed=score_seed(config.seed),
        trainer=replace(
            config.trainer,
            steps=config.trainer.steps * updates,
            spike=SpikeConfig(),
            block_norms_every=None,
        ),
        optimizer=replace(
            optimizer,
            lr=rates * optimizer.lr,
            muon_lr=rates * optimizer.muon_lr,
            warmup_steps=optimizer.warmup_steps * updates,
        ),
        ema=EMAConfig(decay=0.0),
    )
