"""Train the codec "tiny", the small autoencoder whose weights come with the package.

    python scripts/make_shapes.py --output data/shapes
    python scripts/make_shapes.py --world 64 --output data/shapes64
    python scripts/train_codec.py --config configs/codecs/tiny.yaml
    python train.py --config train/shapes64 --codec.path outputs/tiny

Run the same command again to resume an interrupted run. Clips are read as train.py reads them without a cache, and
what a step does follows from its number and the seed. The loss is that of the pixels, decoded from latents to which
noise was added.
"""

import math
from pathlib import Path

from stdit.cli import run
from stdit.errors import UserError
from stdit.settings import parse
from stdit.training.codec_config import CodecTraining

STATE_FILE = "training.state"
"""In the format of safetensors, but not a part of the codec."""


def main() -> None:
    config = parse(CodecTraining, doc=__doc__)
    folder = Path(config.output)
    unfinished = (folder / STATE_FILE).exists()  # it is deleted after the codec is saved
    if (folder / "codec.json").exists() and not unfinished:
        raise UserError(f"output = {folder}: holds a codec already: choose another folder, or delete it")
    train(config, folder)


def train(config: CodecTraining, folder: Path) -> None:
    """Do the steps that are left, and save the codec.

    Raises:
        UserError: if the folder cannot be written, its state is of other settings, or the loss is not finite.
    """
    from tqdm import tqdm

    from stdit.data.build import build_plan
    from stdit.data.clip_tensors import to_video
    from stdit.data.dataset import video_loader
    from stdit.pipelines.writer import check_writable
    from stdit.training.codec_trainer import CodecTrainer

    data = config.data
    data.validate()
    check_writable(folder)
    plan = build_plan(data, config.seed)
    print(plan.report())
    trainer = CodecTrainer(config)
    start = trainer.resume(folder / STATE_FILE)
    workers = 0 if data.workers == "auto" else data.workers
    loader = video_loader(plan, workers, data.crop, data.max_skipped_share, flip=data.flip)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=config.steps, initial=start, unit="step") as bar:
        for batch in loader(start, config.steps):
            assert batch.content is not None, "the plan has no empty bucket"
            loss = trainer.step(batch.info.step, to_video(batch.content))
            done = batch.info.step + 1
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of step {batch.info.step} is {loss}: lower optimizer.muon_lr and optimizer.lr, and "
                    "choose another output"
                )
            if done % config.save_every == 0:
                trainer.save(folder / STATE_FILE, done)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
    trainer.export(folder)
    (folder / STATE_FILE).unlink(missing_ok=True)
    print(f"codec: {folder}")


if __name__ == "__main__":
    run(main)
