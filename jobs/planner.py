"""Plans one step after the other: what it takes, and what it leaves for the steps that read its folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from engine.places import Place
from engine.recipes import resolve
from engine.rounds.plan import counts_of
from engine.schema import InputError, parse_budgets, parse_bytes, parse_hold_out, parse_pairs
from engine.select import STRATEGIES
from engine.selections import open_selection
from engine.store import FeatureStore, part_rows
from engine.verbs import (
    CompareOptions,
    EmbedOptions,
    FinetuneOptions,
    ModelOptions,
    PredictOptions,
    RoundsOptions,
    SelectOptions,
)
from jobs import embedding, finetuning, selecting
from jobs.embedding import Embedded
from jobs.plan_options import PlanOptions
from jobs.planned import LIBRARIES, Features, Planned, basis, not_planned, room_of, shard_memory
from jobs.probes import Probes, some_vectors
from jobs.run import is_done
from jobs.step import Step
from jobs.traffic import LEGS, Size, driver_bytes
from jobs.work import Cluster

PICK_BYTES = 100.0
"""What a pick takes in picks.parquet, ids.txt, indices.json."""
PART_ENTRY_BYTES = 330
"""What a part takes in manifest.json."""
LARGE_MANIFEST = 64 << 20


class Planner:
    """Knows what the steps planned so far will have written."""

    def __init__(self, options: PlanOptions, cluster: Cluster, probes: Probes, pool: str | None) -> None:
        self.options, self.cluster, self.probes, self.pool = options, cluster, probes, pool
        self.features: dict[str, Features] = {}
        self.picks: dict[str, int] = {}
        self.setups: dict[str, FinetuneOptions] = {}
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        """Note a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def step(self, step: Step) -> Planned:
        """Plan a step; one whose folder is published takes nothing."""
        kinds: dict[str, Callable[[Step], Planned]] = {
            "embed": self._embed,
            "predict": self._predict,
            "select": self._select,
            "compare": self._compare,
            "finetune": self._finetune,
            "rounds": self._rounds,
        }
        if is_done(step):
            return Planned(step.label, step.verb, (), "", why_not="done before")
        if step.verb not in kinds:
            return not_planned(step, f"nothing is known of what {step.verb} takes")
        return kinds[step.verb](step)

    def _rows(self, pool: str, found: Embedded) -> int:
        return self.options.rows if self.options.rows is not None and pool == self.pool else found.pool_rows

    def _embed(self, step: Step) -> Planned:
        options: EmbedOptions = step.options
        if options.checkpoint is not None and options.checkpoint in self.setups:
            options = _with_network(options, self.setups[options.checkpoint])
        return self._embedding(step, options)

    def _predict(self, step: Step) -> Planned:
        options: PredictOptions = step.options
        if options.checkpoint not in self.setups:
            if not Place(options.checkpoint).at("manifest.json").exists():
                return not_planned(
                    step, f"checkpoint {Place(options.checkpoint).uri} is neither there nor trained by a step above"
                )
            names = {name: getattr(options, name) for name in EmbedOptions.__dataclass_fields__ if hasattr(options, name)}
            return self._embedding(step, EmbedOptions(**names, encoder="probs"))
        trained = self.setups[options.checkpoint]
        if resolve(trained).task != "classify":
            return not_planned(step, "a detector that is not trained yet predicts no boxes to measure with")
        shared = {name: getattr(options, name) for name in EmbedOptions.__dataclass_fields__ if hasattr(options, name)}
        return self._embedding(step, _with_network(EmbedOptions(**{**shared, "checkpoint": None}), trained))

    def _embedding(self, step: Step, options: EmbedOptions) -> Planned:
        why_not = embedding.can_probe(options)
        if why_not:
            return not_planned(step, why_not)
        found = self.probes.embed(options)
        rows = self._rows(options.pool, found)
        gpus = self.cluster.gpus
        work, known = embedding.work_of(found, rows, options, gpus, self.cluster.cpus, self.options.encode_rate)
        if gpus and not self.options.encode_rate and found.device == "cpu":
            self.warn(f"{step.label}: measured on a CPU, and the cluster has GPUs: --encode-rate says what they encode")
        if found.rejected:
            self.warn(f"{step.label}: {found.rejected} of {found.rows} images that were tried are bad")
        several = len(found.stored) > 1
        storage = 0.0
        for name, stored in found.stored.items():
            place = f"{step.out}/{name}" if several else step.out
            vectors = self.probes.vectors_of(options, name)
            self.features[place] = Features(rows, stored.dim, stored.vectors, vectors)
            storage += stored.row_bytes * rows
        self._parts(step, rows)
        return Planned(
            step.label,
            step.verb,
            (work,),
            known,
            images=rows,
            storage=storage,
            memory=lambda workers: found.memory,
            driver=LIBRARIES + 2000.0 * work.pieces,
        )

    def _parts(self, step: Step, rows: int) -> None:
        """Warn of what grows with the number of parts."""
        size = PART_ENTRY_BYTES * -(-rows // part_rows(rows))
        if size > LARGE_MANIFEST:
            self.warn(f"{step.label}: manifest.json will have {size / 2**20:,.0f} MiB, which every worker reads when it starts")

    def _store(self, uri: str) -> Features | None:
        """Return the features that a step reads: those of a step above, or of a folder that is there."""
        if uri in self.features:
            return self.features[uri]
        if not Place(uri).at("manifest.json").exists():
            return None
        store = FeatureStore(uri)
        x = some_vectors(store) if store.holds_vectors and store.manifest["parts"] else None
        found = Features(store.num_vectors, store.dim, store.num_patterns / max(1, store.num_vectors), x)
        self.features[uri] = found
        return found

    def _select(self, step: Step) -> Planned:
        options: SelectOptions = step.options
        store = self._store(options.features)
        if store is None:
            return not_planned(step, f"features {Place(options.features).uri} are neither there nor written by a step above")
        if options.budget is None:
            return not_planned(step, "how many images a sum pays for is not known before their costs are read")
        counts = sorted(parse_budgets(options.budget, store.rows, store.rows))
        for count in counts:
            self.picks[f"{step.out}/{count}" if len(counts) > 1 else step.out] = count
        given: dict[str, Any] = dict(parse_pairs(options.option, "--option"))
        runs = counts[-1:] if STRATEGIES[options.strategy].nested else counts
        return self._selection(step, options.strategy, given, store, runs, sum(counts), 1, options.memory_per_shard)

    def _compare(self, step: Step) -> Planned:
        options: CompareOptions = step.options
        store = self._store(options.features)
        if store is None:
            return not_planned(step, f"features {Place(options.features).uri} are neither there nor written by a step above")
        counts = sorted(parse_budgets(options.budget, store.rows, store.rows))
        found = []
        for spec in options.strategies:
            name, *pairs = spec.strip().split(":")
            given: dict[str, Any] = dict(parse_pairs(pairs, "strategy option"))
            runs = counts[-1:] if STRATEGIES[name].nested else counts
            planned = self._selection(step, name, given, store, runs, sum(counts), options.seeds, options.memory_per_shard)
            found.append(planned)
        works = tuple(work for one in found for work in one.works)
        known = "modelled, the selections alone: what measuring them takes is left out"
        most = max(found, key=lambda one: one.driver)
        return replace(most, works=works, basis=known, storage=sum(one.storage for one in found))

    def _selection(
        self,
        step: Step,
        strategy: str,
        given: dict[str, Any],
        store: Features,
        runs: list[int],
        picks: int,
        times: int,
        memory_per_shard: str | None,
    ) -> Planned:
        reads = STRATEGIES[strategy]
        d, each = (store.dim, round(max(1.0, store.each))) if reads.vectors else (1, 1)
        n = max(1, round(store.rows * (store.each if reads.vectors else 1)))
        most = Size(n, runs[-1], d)
        found = self.probes.select(strategy, given, d, most, each, store.x if reads.vectors else None)
        shards = max(self.options.workers)
        sizes = [Size(n, b, d, max(1, shards), found.options) for b in runs]
        works = [selecting.work_of(found, n, b, max(1, shards)) for b in runs] * times
        limit = parse_bytes(memory_per_shard)
        legs = [leg for size in sizes for leg in LEGS[strategy](size)]
        memory = shard_memory(strategy, sizes[-1], limit, self.cluster, reads.vectors)
        if reads.vectors:
            self._streamed(step, sizes[-1], limit, works[-1].rounds)
        return Planned(
            step.label,
            step.verb,
            tuple(works),
            basis(found),
            images=n,
            storage=PICK_BYTES * picks * times,
            driver=LIBRARIES + max(driver_bytes(strategy, size) for size in sizes),
            message=max(leg.down + 2 * leg.up for leg in legs),
            memory=memory,
        )

    def _streamed(self, step: Step, size: Size, limit: int | None, rounds: float) -> None:
        """Warn where a shard does not hold its vectors at the largest number of workers."""
        share = 4.0 * size.n * size.d / size.shards
        room = limit or room_of(self.cluster, size.shards)
        if share > room:
            self.warn(
                f"{step.label}: a shard of {size.shards} has {share / 2**30:,.1f} GiB of vectors and room for "
                f"{room / 2**30:,.1f}: they are read again at each of about {rounds:,.0f} calls, which is not in the time; "
                f"{int(np.ceil(share * size.shards / room)):,} such shards hold them"
            )

    def _finetune(self, step: Step) -> Planned:
        options: FinetuneOptions = step.options
        self.setups[step.out] = options
        why_not = finetuning.can_probe(options)
        count = self._chosen(options)
        if why_not or count is None:
            return not_planned(step, why_not or f"how many images {Place(options.selection).uri} names is not known")
        try:
            found = self.probes.train(options)
        except InputError as error:
            return not_planned(step, str(error))
        training = finetuning.work_of(found, options, count - parse_hold_out(options.hold_out, count))
        if self.cluster.gpus and found.device == "cpu":
            self.warn(f"{step.label}: measured on a CPU, and the cluster has GPUs: it will take less there")
        known = f"measured on {finetuning.STEPS} steps of {found.batch} images, without evaluations; {training.steps:,} steps"
        return Planned(
            step.label,
            step.verb,
            (training.work,),
            known,
            images=count,
            storage=training.storage,
            memory=lambda workers: LIBRARIES + training.memory,
        )

    def _rounds(self, step: Step) -> Planned:
        """The trainings of all rounds, the pool read and selected from between them; measuring on --test is left out."""
        options: RoundsOptions = step.options
        strategy = STRATEGIES[options.strategy]
        if Place(options.subject).at("manifest.json").exists() or options.subject in self.features:
            return not_planned(step, "a linear head on stored vectors: it takes seconds a round")
        if strategy.encoder is not None:
            return not_planned(step, f"what strategy {options.strategy} reads of every round's model takes is not known")
        shared = {name: getattr(options, name) for name in ModelOptions.__dataclass_fields__}
        given = FinetuneOptions(**shared, pool=options.subject, out=step.out, selection="all", seed=options.seed)
        if resolve(given).task != "classify":
            return not_planned(step, "a detector that is not trained yet predicts no boxes to measure with")
        why_not = finetuning.can_probe(given)
        if why_not:
            return not_planned(step, why_not)
        reading = self._embedding(step, _with_network(EmbedOptions(pool=options.subject, out=step.out), given))
        found, (start, add) = self.probes.train(given), counts_of(options, reading.images)
        later = add * (options.rounds - 1) if len(add) == 1 else add
        counts = list(itertools.accumulate((start, *later)))
        trainings = [finetuning.work_of(found, given, count - parse_hold_out(options.hold_out, count)) for count in counts]
        works = tuple(training.work for training in trainings)
        between = len(later) if options.strategy not in ("random", "uniform") else 0
        if between:
            store = self.features[step.out]
            pairs: dict[str, Any] = dict(parse_pairs(options.strategy_option, "--strategy-option"))
            for count in later:
                picking = self._selection(step, options.strategy, pairs, store, [count], count, 1, None)
                works += (*reading.works, *picking.works)
        known = f"measured as a training and an embedding: {options.rounds} of the one, {between} of the other, no evaluation"
        kept = trainings if options.keep_models == "all" else trainings[-1:]
        storage = sum(training.storage for training in kept) + (reading.storage if between else 0.0)
        return replace(reading, works=works, basis=known, storage=storage)

    def _chosen(self, options: FinetuneOptions) -> int | None:
        """Return how many images a training is given; None where that is not known."""
        if options.selection in self.picks:
            return self.picks[options.selection]
        place = Place(options.selection)
        if options.selection != "all" and place.at("manifest.json").exists():
            selection = open_selection(options.selection)
            return len(selection.picks) + len(selection.labeled)
        if options.selection == "all":
            from engine.sources import columns_of, open_pool

            return open_pool(options.pool, columns_of(options)).num_rows
        return None


def _with_network(options: EmbedOptions, trained: FinetuneOptions) -> EmbedOptions:
    """Return an embedding by the network that a step above trains, before it is: random weights take the same time."""
    setup = resolve(trained)
    names = ("model_option", "image_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    told = {name: getattr(setup, name) for name in names}
    return replace(options, checkpoint=None, encoder="embedding", backbone=setup.model, weights="random", **told)
