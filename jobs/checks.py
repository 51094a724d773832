"""What the engine says of a step's options before anything is read: a misspelt strategy ends a job before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from engine.schema import InputError, parse_bytes, parse_decode_workers, parse_pairs, parse_workers
from jobs.step import Step


def _embed(options: Any) -> None:
    from engine.encoders import encoder_names
    from engine.scoring import check_options

    check_options(options, encoder_names(options.encoder))
    _actors(options)


def _actors(options: Any) -> None:
    parse_workers(options.workers)
    parse_decode_workers(options.decode_workers)


def _select(options: Any) -> None:
    from engine.select import strategy_options

    strategy_options(options.strategy, parse_pairs(options.option, "--option"))
    _shards(options)


def _shards(options: Any) -> None:
    parse_bytes(options.memory_per_shard)


def _compare(options: Any) -> None:
    from engine.compare import entrant_of, specs

    for spec in specs(options.strategies):
        entrant_of(spec)
    _shards(options)


def _finetune(options: Any) -> None:
    from engine.recipes import resolve

    if options.recipe is None or not options.recipe.endswith(".toml"):  # a file may be where only the cluster sees it
        resolve(options)


def _rounds(options: Any) -> None:
    from engine.rounds.plan import check_strategy

    check_strategy(options.strategy, options.strategy_option, "--strategy-option")
    check_strategy(options.start_strategy, options.start_option, "--start-option")
    parse_decode_workers(options.decode_workers)
    _shards(options)


CHECKS: dict[str, Callable[[Any], None]] = {
    "embed": _embed,
    "predict": _actors,
    "select": _select,
    "dedup": _shards,
    "evaluate": _shards,
    "compare": _compare,
    "finetune": _finetune,
    "rounds": _rounds,
}
"""By verb."""


def check_steps(steps: Iterable[Step]) -> None:
    """Raise InputError that lists the steps whose options can't be, each by its path."""
    problems: dict[str, None] = {}
    for step in steps:
        try:
            CHECKS.get(step.verb, lambda options: None)(step.options)
        except InputError as error:
            problems[f"{step.path}: {error}"] = None
    if problems:
        raise InputError("; ".join(problems))
