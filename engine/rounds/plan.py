"""What the rounds of a run have in common: how much is labelled when, where a round lies, and what learns in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from engine.conditions import Asked, asked_of
from engine.folders import let_go
from engine.oracles import Oracle, Subject
from engine.places import Place
from engine.schema import InputError, Progress, parse_budgets, parse_pairs
from engine.scoring import DIFFERENTIATED
from engine.select import Strategy, strategy_options
from engine.store import FeatureStore
from engine.verbs import SCORING, RoundsOptions
from engine.where import names_in

LABELS, LABELED = "labels.parquet", "labeled.json"
HOLD_OUT = "10%"
"""Of everything labelled, where a strategy needs a reference set."""
FEATURES = "features"
"""Of a round's folder: what its model gave for the pool, a store an encoder."""


@dataclass(frozen=True)
class Plan:
    """A run of rounds: `start` labels in round 0, `add` in each of the others, or in one after the other.

    `chosen` are the strategies' options.
    """

    options: RoundsOptions
    oracle: Oracle
    strategy: Strategy
    chosen: Any
    start_chosen: Any
    start: int
    add: tuple[int, ...]

    def count(self, number: int) -> int:
        """Return how many images a round picks."""
        return self.start if number == 0 else self.add[0 if len(self.add) == 1 else number - 1]

    @property
    def added(self) -> int | list[int]:
        """`add` as manifests have it: one number where all rounds add as many."""
        return self.add[0] if len(self.add) == 1 else list(self.add)

    @property
    def out(self) -> Place:
        """The run's folder."""
        return Place(self.options.out)

    def place(self, number: int) -> Place:
        """Return a round's folder."""
        return self.out.at(name_of(number))


def name_of(number: int) -> str:
    """Return what a round's folder is called."""
    return f"round-{number:02d}"


@dataclass(frozen=True)
class Read:
    """What a round selects from: a feature store, a store of predictions beside it, normalised vectors or not.

    `seconds` were spent on what the last model gave.
    """

    features: str
    predictions: str | None
    normalize: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Trained:
    """What a round's training gave: its metrics, how many images it saw, and the seconds it took."""

    metrics: list[dict[str, Any]]
    num_images: int
    seconds: float


class Learner(Protocol):
    """What learns in the rounds: a network on a pool of images, or a linear head on stored vectors."""

    subject: Subject
    num_rows: int
    """Images that can be picked, at most."""
    criterion: str
    """The metric that counts."""
    least_classes: int
    """Where classes are numbers: how many there are at least."""
    heavy: tuple[str, ...]
    """What of a round's folder is let go with its model: weights first, which their folder's manifest names."""
    model: str
    """The folder of a round's model."""
    unused: tuple[str, ...]
    """Options that decide nothing here, or of which `identity` says more."""

    def check(self, start: int) -> None:
        """Raise InputError for a model that can't be had, or can't be trained on so many images."""

    def needs(self, strategy: Strategy) -> bool:
        """Return whether a strategy reads what the last round's model gives."""

    def digests(self) -> tuple[str, str]:
        """Return those of the subject and of what every model is tested on."""

    def identity(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the digests of what it reads, and the options of its own that decide what comes out."""

    def reads(self) -> list[str]:
        """Return the places that it reads."""

    def base(self, plan: Plan, progress: Progress) -> str:
        """Return the store that the start is picked from, made where there is none."""

    def read(self, plan: Plan, number: int, progress: Progress) -> Read:
        """Return what round `number`, which is not the first, selects from; what the last model must give for it is made."""

    def train(self, plan: Plan, number: int, progress: Progress) -> Trained:
        """Train on everything labelled in a round's folder, or return what was trained there; publish the model."""


def counts_of(options: RoundsOptions, num_rows: int) -> tuple[int, tuple[int, ...]]:
    """Return how many labels --start and --add are, the latter one number for all later rounds, or one for each.

    Raises InputError where --add has another number of them, and where all rounds want more than there are images.
    """
    start, add, later = _counts("--start", options.start, num_rows), _counts("--add", options.add, num_rows), options.rounds - 1
    if len(start) > 1:
        raise InputError(f"--start {options.start!r} names {len(start)} budgets: it takes one")
    if len(add) not in (1, later):
        raise InputError(
            f"--add {options.add!r} names {len(add)} budgets, and --rounds {options.rounds} has {later} after the start: it "
            "takes one, or one for each of them"
        )
    wanted = start[0] + (add[0] * later if len(add) == 1 else sum(add))
    if wanted > num_rows:
        most = f": at most --rounds {1 + (num_rows - start[0]) // add[0]}" if len(add) == 1 else ""
        added = ", ".join(f"{count:,}" for count in add)
        raise InputError(
            f"--start {start[0]:,}, --add {added} and --rounds {options.rounds} want {wanted:,} labels, and there are "
            f"{num_rows:,} images{most}"
        )
    return start[0], add


def _counts(flag: str, text: str, num_rows: int) -> tuple[int, ...]:
    """Return the count that each part of an option's text is, in order; the same one may come again."""
    try:
        return tuple(count for part in text.split(",") for count in parse_budgets(part, num_rows, num_rows))
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None


def check_strategy(name: str, pairs: Iterable[str], flag: str) -> tuple[Strategy, Any]:
    """Return a strategy and its options; raises InputError for one that is not known, or reads labels not paid for."""
    strategy, _, chosen = strategy_options(name, parse_pairs(pairs, flag))
    if "label" in strategy.columns:
        raise InputError(f"strategy {name!r} reads the labels of the whole pool, which nobody has paid for: use random")
    return strategy, chosen


def check_conditions(options: RoundsOptions) -> Asked | None:
    """Return the conditions that every round's picks must meet; raises InputError for those on labels not paid for."""
    asked = asked_of(options)
    if asked is not None and ("label" in asked.columns or (asked.where and "label" in names_in(asked.where))):
        raise InputError(
            "--quota, --balance, --cap and --where can't ask for `label` in rounds: nobody has paid for the labels"
        )
    return asked


def check_start(options: RoundsOptions, store: FeatureStore | None) -> None:
    """Raise InputError where the start's strategy can't be run, on `store`, or nothing where there are no features yet."""
    strategy, _ = check_strategy(options.start_strategy, options.start_option, "--start-option")
    if strategy.predictions:
        raise InputError(f"--start-strategy {strategy.name!r} reads a model's predictions, and no model is trained yet")
    if strategy.vectors and store is None:
        raise InputError(f"--start-strategy {strategy.name!r} reads vectors: give --features DIR, or start at random")


def with_held_out(options: RoundsOptions, strategy: Strategy) -> RoundsOptions:
    """Return the options with a share of the labels held out, where the strategy needs a reference set and none is given.

    Raises InputError for what means nothing to the strategy: --reference, --reference-labels, --encoder-option.
    """
    differentiated = strategy.encoder in DIFFERENTIATED
    for flag, given in (("--reference", options.reference), ("--reference-labels", options.reference_labels)):
        if given and not differentiated:
            raise InputError(f"{flag} is for --strategy {' and '.join(DIFFERENTIATED)}, not for {strategy.name}")
    if options.encoder_option and strategy.encoder is None:
        raise InputError(f"--encoder-option is for --strategy {', '.join(SCORING)}, not for {strategy.name}")
    if differentiated and options.reference is None and options.hold_out is None:
        return replace(options, hold_out=HOLD_OUT)
    return options


def given_of(options: RoundsOptions, names: Iterable[str]) -> list[str]:
    """Return the flags of those of some options that have another value than their default."""
    defaults = {field.name: field.default for field in fields(options)}
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != defaults[name]]


def discard(plan: Plan, paths: Iterable[str], model: str) -> None:
    """Delete what rounds let go, paths below OUT: weights are first named as let go in their model's manifest."""
    for path in paths:
        place = plan.out.at(*path.split("/"))
        if not place.exists():
            continue
        if place.folder.name == model and place.name.endswith(".safetensors"):
            let_go(place.folder, place.name)
        else:
            place.remove()
