"""The steps of stdit-prepare: each reads its flags and calls `stdit.data.preparation` or the cache."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from stdit.cli import import_modules, run
from stdit.commands.prepare_flags import build_parser
from stdit.errors import UserError


def prepare_command() -> NoReturn:
    """Run the command stdit-prepare."""
    run(main)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args, settings = parser.parse_known_args(argv)
    args.settings = settings
    if settings and args.command != "encode":  # its other arguments are settings of a training
        parser.refuse(args, settings)
    for line in COMMANDS[args.command](args):
        print(line)


def _build_model(args: Namespace) -> Any:
    """Return the ModelConfig of the flags of `add_model`; None if there is no --model."""
    from stdit.data.preparation.models import ModelConfig

    given = {name: getattr(args, name) for name in ("batch_size", "device", "dtype")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.model is None:
        if given:
            raise UserError(
                f"--{next(iter(given))} is of the model of --scores text: add --model, or leave it out"
            )
        return None
    return ModelConfig(args.model, **given)


def _build_task(args: Namespace) -> Any:
    """Return the Task of a step."""
    from stdit.data.preparation.flow import Task
    from stdit.data.workers import usable_cores

    task = Task(args.source, args.output, args.root, overwrite=args.overwrite)
    if not hasattr(args, "workers"):
        return task
    workers = usable_cores() if args.workers is None else args.workers
    if args.timeout and not workers:
        raise UserError(
            f"--timeout {args.timeout:g} and --workers 0: only a process of its own can be ended: "
            "use --workers 1, or leave --timeout out"
        )
    timeout = args.usual_timeout if args.timeout is None else args.timeout
    return replace(task, workers=workers, timeout=timeout)


def _probe(args: Namespace) -> list[str]:
    from stdit.data.preparation.probing import probe_clips

    return probe_clips(_build_task(args), args.quick)


def _split(args: Namespace) -> list[str]:
    from stdit.data.preparation.scenes import SceneConfig, split_clips

    config = SceneConfig(args.detector, args.threshold, args.min_seconds, args.max_seconds)
    return split_clips(_build_task(args), config, args.cut)


def _score(args: Namespace) -> list[str]:
    from stdit.data.preparation.scoring import ScoringWindow, score_clips

    import_modules(args.imports)
    window = ScoringWindow(args.frames, args.fps, args.side)
    return score_clips(_build_task(args), args.scores, window, _build_model(args))


def _filter_rows(args: Namespace) -> list[str]:
    from stdit.data.preparation.filtering import filter_clips

    return filter_clips(_build_task(args), args.where)


def _dedupe(args: Namespace) -> list[str]:
    from stdit.data.preparation.duplicates import dedupe_clips

    return dedupe_clips(_build_task(args), args.distance)


def _caption(args: Namespace) -> list[str]:
    from stdit.data.preparation.captioning import CaptionConfig, caption_clips

    limits = args.frames, args.side, args.max_new_tokens
    config = CaptionConfig(_build_model(args), args.template, *limits, args.replace)
    return caption_clips(_build_task(args), config)


def _report(args: Namespace) -> list[str]:
    from stdit.data.preparation.report import report_clips

    data, seed = None, 0
    if args.config:
        from stdit.training.config import parse_train

        files = [flag for name in args.config for flag in ("--config", name)]
        train = parse_train(
            [*files, *_import_flags(args), "--data.sources=[]", "--data.manifest", args.source]
        )
        data, seed = train.data, train.seed
    return report_clips(_build_task(args), data, seed, args.thumbnails)


def _encode(args: Namespace) -> list[str]:
    from stdit.training.config import parse_train

    part = _parse_part(args.part)
    config = parse_train(args.settings)

    from stdit.parallel.processes.device import find_device
    from stdit.training.caching import fill_cache

    summary = fill_cache(config, find_device(config.trainer.device), part)
    hint = ["train with --data.cache disk (or memory) to read it"] if config.data.cache == "none" else []
    return [str(summary), *hint]


def _import_flags(args: Namespace) -> list[str]:
    return [flag for name in args.imports for flag in ("--import", name)]


def _parse_part(text: str) -> tuple[int, int]:
    """Parse "K/N" to (K - 1, N). Raises UserError."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--part {text}: must be K/N, such as 1/4 to 4/4 for four commands")
    return int(number) - 1, int(count)


def _cache(args: Namespace) -> list[str]:
    if args.action == "verify":
        from stdit.data.cache.maintenance import verify_cache

        found = verify_cache(args.folder)
        if found.broken:
            raise UserError(f"{found}\nprune removes what is broken; encode, or training, encodes it again")
        return [str(found)]

    from stdit.training.config import parse_train

    configs = [parse_train(["--config", name, *_import_flags(args)]) for name in args.config]

    from stdit.training.caching import prune_unused

    return [str(prune_unused(args.folder, configs, args.dry_run))]


COMMANDS: dict[str, Callable[[Namespace], list[str]]] = {
    "probe": _probe,
    "split": _split,
    "score": _score,
    "filter": _filter_rows,
    "dedupe": _dedupe,
    "caption": _caption,
    "report": _report,
    "encode": _encode,
    "cache": _cache,
}
