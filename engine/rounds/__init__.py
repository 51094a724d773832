"""The active-learning loop: select, take labels, train, let the new model read the pool, select again.

Every stage of a round is a folder of its own, made by the verb that makes such folders elsewhere, so a run that was killed
anywhere goes on to the same picks. Labels come from an oracle, for the picks alone; they go to the trainer and nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from engine.folders import LET_GO, Claim, begin, digest_of, publish, read_manifest, read_run
from engine.oracles import Waiting, answer, keep_labels, num_unused, open_oracle
from engine.places import Place
from engine.retry import reached
from engine.rounds.heads import Heads
from engine.rounds.networks import Networks
from engine.rounds.plan import (
    LABELED,
    LABELS,
    Learner,
    Plan,
    Read,
    check_conditions,
    check_start,
    check_strategy,
    counts_of,
    discard,
    name_of,
    with_held_out,
)
from engine.schema import InputError, Progress, no_progress, parse_hold_out, result_options
from engine.select import select
from engine.selections import open_selection
from engine.store import FeatureStore, table_bytes
from engine.verbs import RoundsOptions, SelectOptions

KEPT = ". What is finished is kept: the same command goes on from it"
TABLE = pa.schema(
    [
        ("round", pa.int64()),
        ("labeled", pa.int64()),
        ("trained", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
"""Columns of rounds.parquet: a row for each round and metric. `labeled` counts the labels paid for, `trained` the images
trained on; `seconds` are those of the round's stages, whichever runs they were made in."""


def _plan(options: RoundsOptions) -> tuple[Plan, Learner]:
    """Return what is to be done, and what learns; raises InputError for anything in it that can't be."""
    strategy, chosen = check_strategy(options.strategy, options.strategy_option, "--strategy-option")
    options = with_held_out(options, strategy)
    _, start_chosen = check_strategy(options.start_strategy, options.start_option, "--start-option")
    with reached(options.oracle):
        oracle = open_oracle(options.oracle)
    place = Place(options.subject)
    found = read_manifest(place) or read_run(place)
    learner: Learner
    if found is not None and found["kind"] == "features":
        learner = Heads(options, strategy, oracle)
        check_start(options, FeatureStore(options.subject))
    elif found is not None:
        raise InputError(f"{options.subject} is a {found['kind']} folder: give a pool of images, or a feature store")
    else:
        learner = Networks(options, strategy, oracle)
        check_start(options, FeatureStore(options.features) if options.features else None)
    check_conditions(options)
    start, add = counts_of(options, learner.num_rows)
    parse_hold_out(options.hold_out, start)
    learner.check(start)
    return Plan(options, oracle, strategy, chosen, start_chosen, start, add), learner


def _claim(plan: Plan, learner: Learner) -> Claim:
    """Return the claim on OUT. How many rounds there are and what is kept of them is no part of it: they can be more."""
    options = plan.options
    inputs, own = learner.identity()
    kept = {name: value for name, value in result_options(options).items() if name not in learner.unused}
    oracle = plan.oracle.where if plan.oracle.kind == "column" else ""
    identity = {
        **kept,
        **own,
        "strategy_options": result_options(plan.chosen),
        "start_options": result_options(plan.start_chosen),
        "start": plan.start,
        "add": plan.added,
        "hold_out": options.hold_out,
        "oracle": f"{plan.oracle.kind}:{oracle}",
    }
    asked = check_conditions(options)
    identity |= {"constraints": asked.facts()} if asked else {}
    reads = [*learner.reads(), *([options.oracle] if plan.oracle.kind != "column" else [])]
    return Claim.of(plan.out, "rounds", inputs, identity, options.overwrite, reads)


def _check_model(plan: Plan, learner: Learner) -> None:
    """Raise InputError where the next round needs the last one's model, and that was let go."""
    done = [read_manifest(plan.place(number)) is not None for number in range(plan.options.rounds)]
    following = done.index(False) if False in done else 0
    if not following or not learner.needs(plan.strategy) or read_manifest(plan.place(following).at("selection")):
        return
    trained = read_manifest(plan.place(following - 1).at(learner.model))
    if trained is not None and trained.get(LET_GO):
        raise InputError(
            f"{plan.out.uri} can't go on to --rounds {plan.options.rounds}: strategy {plan.options.strategy!r} needs the model "
            f"of round {following - 1}, which --keep-models none let go. Run again with --keep-models last and another --out, "
            "or --overwrite"
        )


def _select(plan: Plan, learner: Learner, number: int, progress: Progress) -> tuple[dict[str, Any], float]:
    """Pick the images of a round; return the selection's manifest, and the seconds that the last model's reading took."""
    options, place = plan.options, plan.place(number)
    labeled = plan.place(number - 1).at(LABELED).address if number else None
    read = learner.read(plan, number, progress) if number else Read(learner.base(plan, progress), None, options.normalize)
    (manifest,) = select(
        SelectOptions(
            features=read.features,
            predictions=read.predictions,
            out=place.at("selection").address,
            strategy=options.strategy if number else options.start_strategy,
            option=options.strategy_option if number else options.start_option,
            budget=str(plan.count(number)),
            labeled=labeled,
            quota=options.quota,
            balance=options.balance,
            cap=options.cap,
            where=options.where,
            seed=options.seed,
            normalize=read.normalize,
            workers=options.embed_workers,
            memory_per_shard=options.memory_per_shard,
            device=options.device,
            address=options.address,
        ),
        progress,
    )
    return manifest, read.seconds


def _take_labels(plan: Plan, learner: Learner, number: int) -> Waiting | None:
    """Write what is labelled after a round's picks, and its labels; those once taken stay as they are.

    Returns that they are awaited, where they are.
    """
    place, picks = plan.place(number), open_selection(plan.place(number).at("selection").address).picks
    before = plan.place(number - 1) if number else None
    rows = np.array(json.loads(before.at(LABELED).read()) if before else [], dtype=np.int64)
    place.at(LABELED).write(json.dumps(np.union1d(rows, picks).tolist()).encode())
    if place.at(LABELS).exists():
        return None
    labels = answer(plan.oracle, learner.subject, number, picks)
    if isinstance(labels, Waiting):
        return labels
    earlier = before.at(LABELS) if before else None
    subject = learner.subject
    keep_labels(place.at(LABELS), earlier, labels, subject.names(picks), subject.boxes, learner.least_classes)
    return None


def _let_go(plan: Plan, learner: Learner, number: int) -> list[str]:
    """Return what nobody needs once a round is done, as paths below OUT: the last round's, and the end's if none is kept."""
    keep, numbers = plan.options.keep_models, list[int]()
    if keep != "all" and number:
        numbers.append(number - 1)
    if keep == "none" and number == plan.options.rounds - 1:
        numbers.append(number)
    paths = [f"{name_of(one)}/{path}" for one in numbers for path in learner.heavy]
    return [path for path in paths if plan.out.at(*path.split("/")).exists()]


def _round(plan: Plan, learner: Learner, number: int, run: str, progress: Progress) -> dict[str, Any] | Waiting:
    """Do what is missing of a round; return its manifest, or that its labels are awaited."""
    place = plan.place(number)
    manifest = begin(place, "round", {"run": run}, {"round": number}, overwrite=False)
    if manifest is None:
        selection, spent = _select(plan, learner, number, progress)
        waiting = _take_labels(plan, learner, number)
        if waiting is not None:
            return waiting
        trained = learner.train(plan, number, progress)
        facts = {
            "round": number,
            "labeled": len(json.loads(place.at(LABELED).read())),
            "trained": trained.num_images,
            "num_labels_unused": num_unused(place.at(LABELS)),
            "metrics": trained.metrics,
            "seconds": round(spent + selection["time"]["seconds_s"] + trained.seconds, 3),
            LET_GO: _let_go(plan, learner, number),
        }
        manifest = publish(place, facts)
    discard(plan, manifest[LET_GO], learner.model)
    return manifest


def _table(done: list[dict[str, Any]]) -> pa.Table:
    rows = [
        {**{name: found[name] for name in ("round", "labeled", "trained", "seconds")}, **{k: m[k] for k in ("metric", "value")}}
        for found in done
        for m in found["metrics"]
    ]
    return pa.Table.from_pylist(rows, schema=TABLE)


def _value(metrics: list[dict[str, Any]], criterion: str) -> str:
    found = next((entry["value"] for entry in metrics if entry["metric"] == criterion), None)
    return f"{criterion} {'undefined' if found is None else f'{found:.4g}'}"


def rounds(options: RoundsOptions, progress: Progress = no_progress) -> dict[str, Any] | Waiting:
    """Run the active-learning loop; return the manifest of OUT, whose `table` has a row a round, or that labels are awaited.

    Run again it goes on where it stopped; with more --rounds it goes on from its end. Also writes rounds.parquet (`TABLE`),
    after every round. Raises InputError for unusable input, before anything is computed, and for labels that lack some of
    the picks; RunError where a stage fails.
    """
    plan, learner = _plan(options)
    with reached(options.out, KEPT):
        claim = _claim(plan, learner)
        published = claim.published()
        if published is not None and published["rounds"] >= options.rounds:
            return published
        if not options.overwrite:
            _check_model(plan, learner)
        claim.take()
        if published is not None:  # it is made longer, and unfinished until then
            plan.out.fs.delete_file(plan.out.at("manifest.json").path)
        plan = replace(plan, options=replace(options, overwrite=False))
        run, done = digest_of(claim.identity), list[dict[str, Any]]()
        for number in range(options.rounds):
            found = _round(plan, learner, number, run, progress)
            if isinstance(found, Waiting):
                return found
            done.append(found)
            plan.out.at("rounds.parquet").write(table_bytes(_table(done)))
            told = f"{found['labeled']:,} labels, {_value(found['metrics'], learner.criterion)}"
            progress("rounds", number + 1, options.rounds, told)
        return publish(plan.out, _facts(plan, learner, done))


def _facts(plan: Plan, learner: Learner, done: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the manifest of a run says."""
    subject, test = learner.digests()
    names = ("round", "labeled", "trained", "metrics", "seconds")
    return {
        "strategy": plan.options.strategy,
        "seed": plan.options.seed,
        "start": plan.start,
        "add": plan.added,
        "rounds": plan.options.rounds,
        "criterion": learner.criterion,
        "subject_digest": subject,
        "test_digest": test,
        "table": [{name: found[name] for name in names} for found in done],
    }
