"""`coresift plan`: what each step of a job takes, from measurements of a little of it; nothing is written in OUT."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine import session
from engine.folders import to_json
from engine.masks import masked
from engine.placement import free_bytes
from engine.places import Place
from engine.schema import Progress, no_progress, parse_bytes
from jobs.plan_options import PlanOptions
from jobs.planned import OBJECT_STORE_SHARE, Planned
from jobs.planner import Planner
from jobs.probes import Probes
from jobs.run import open_job
from jobs.work import ACTOR_S, ROUND_TRIP_S, START_S, Cluster, enough, parts_of, worker_seconds

GIB = float(1 << 30)


@dataclass(frozen=True)
class Told:
    """Something of the cluster that is taken for granted, and by whose word."""

    name: str
    value: str
    source: str


def cluster_of(options: PlanOptions) -> tuple[Cluster, list[Told]]:
    """Return a node of the cluster: as the options say, else the smallest one of --address, else this machine."""
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory, source = free_bytes(), "this machine"
    if options.address is not None:
        session.connect(options.address)
        nodes, source = session.nodes(), f"the cluster at {masked(options.address)}"
        cpus, gpus, memory = min(n[0] for n in nodes), min(n[1] for n in nodes), min(n[2] for n in nodes)
    given = {
        "CPUs of a node": (options.cpus_per_node, cpus),
        "GPUs of a node": (options.gpus_per_node, gpus),
        "memory of a node": (parse_bytes(options.memory_per_node), memory),
    }
    told, values = list[Told](), list[float]()
    for name, (asked, there) in given.items():
        value = there if asked is None else asked
        values.append(value)
        shown = f"{value / GIB:,.1f} GiB" if name.startswith("memory") else f"{value:g}"
        told.append(Told(name, shown, source if asked is None else "given"))
    network = None if options.network_gbps is None else options.network_gbps * 1e9 / 8
    told.append(
        Told("network of a node", f"{options.network_gbps:g} Gbit/s" if network else "not known", "given" if network else "")
    )
    return Cluster(int(values[0]), int(values[1]), float(values[2]), network), told


def assumptions(options: PlanOptions, told: list[Told], probes: Probes) -> list[Told]:
    """Return all that the plan takes for granted."""
    found = [*told, Told("workers", "their CPUs, or GPUs, to themselves; nodes are up", "assumed")]
    found.append(Told("start of Ray and its workers", f"{START_S:g} s a step", "assumed"))
    round_trip = f"{1000 * ROUND_TRIP_S:g} ms + {1000 * ACTOR_S:g} ms a worker"
    found.append(Told("a call to all workers", round_trip, "assumed, from four actors of one machine"))
    if options.encode_rate:
        found.append(Told("encoding", f"{options.encode_rate:g} images/s a worker", "given"))
    if options.rows is not None:
        found.append(Told("images", f"{options.rows:,}", "given; the pool is taken for a sample of them"))
    if probes.selected:
        found.append(Told("selection", "every iteration; products at the rate of one CPU thread here, on GPUs too", "assumed"))
    if options.price is not None:
        found.append(Told("a worker for an hour", f"{options.price:g}", "given"))
    return found


def plan(options: PlanOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Plan a job; return its `steps`, `total`, `assumptions` and `warnings`, JSON-ready.

    Raises InputError for a job file, or an option, that can't be, and for a pool that can't be read.
    """
    job = open_job(options)
    cluster, told = cluster_of(options)
    probes = Probes(options.probe_rows, progress)
    if options.probe is not None:
        probes.read(Place(options.probe))
    planner = Planner(options, cluster, probes, job.file.pool)
    planned = []
    for number, step in enumerate(job.steps):
        progress("plan", number, len(job.steps), step.label)
        planned.append(planner.step(step))
    if options.out is not None:
        Place(options.out).write(to_json(probes.to_json()))
    rows = [describe(one, options, cluster) for one in planned]
    works = tuple(work for one in planned for work in one.works)
    total = Planned("job", "", works, "", storage=sum(one.storage for one in planned))
    return {
        "job": job.file.name,
        "out": Place(job.file.out).uri,
        "steps": rows,
        "total": _summed(rows, describe(total, options, cluster)),
        "not_planned": [row["step"] for row in rows if row["why_not"]],
        "assumptions": [vars(one) for one in assumptions(options, told, probes)],
        "warnings": [*planner.warnings, *_limits(planned, job.file.out, options, cluster)],
        "measured_now": probes.made,
    }


def describe(one: Planned, options: PlanOptions, cluster: Cluster) -> dict[str, Any]:
    """Return a step's plan, JSON-ready."""
    facts: dict[str, Any] = {
        "step": one.label,
        "verb": one.verb,
        "basis": one.basis,
        "why_not": one.why_not,
        "images": one.images,
        "storage_bytes": round(one.storage),
        "driver_bytes": round(one.driver),
        "times": [],
    }
    if not one.works:
        return facts
    for workers in options.workers:
        parts = parts_of(one.works, workers, cluster)
        seconds, held = sum(parts.values()), worker_seconds(one.works, workers, cluster)
        line: dict[str, Any] = {"workers": workers, "seconds_s": round(seconds, 3), "worker_bytes": round(one.memory(workers))}
        line["parts_s"] = {name: round(value, 3) for name, value in parts.items()}
        for name, price in (("cost", options.price), ("spot_cost", options.spot_price)):
            if price is not None:
                line[name] = round(held / 3600 * price, 4)
        facts["times"].append(line)
    facts["enough_workers"], facts["bound"] = enough(one.works, cluster)
    return facts


def _summed(rows: Sequence[dict[str, Any]], total: dict[str, Any]) -> dict[str, Any]:
    """Return the whole job's plan, as `total` of all its work says it, with what its steps hold at most."""
    for at, line in enumerate(total["times"]):
        lines = [row["times"][at] for row in rows if row["times"]]
        line["worker_bytes"] = max(one["worker_bytes"] for one in lines)
    total["driver_bytes"] = max((row["driver_bytes"] for row in rows), default=0)
    return total


def _limits(planned: Sequence[Planned], out: str, options: PlanOptions, cluster: Cluster) -> list[str]:
    """Return the limits that the job would hit."""
    found = []
    for one in planned:
        if one.driver > cluster.memory:
            found.append(
                f"{one.label}: the driver would hold {one.driver / GIB:,.1f} GiB, and a node has {cluster.memory / GIB:,.1f}: "
                "a smaller budget, or a larger head"
            )
        if one.message > OBJECT_STORE_SHARE * cluster.memory:
            found.append(
                f"{one.label}: the messages of a step take {one.message / GIB:,.1f} GiB of a node's object store, which is "
                f"{OBJECT_STORE_SHARE * cluster.memory / GIB:,.1f} GiB (Ray's default): a smaller budget, or larger nodes"
            )
        for workers in options.workers if one.works else ():
            beside = min(max(1, workers), max(1, cluster.gpus or cluster.cpus))
            if one.memory(workers) * beside > cluster.memory:
                found.append(
                    f"{one.label}: {beside} workers of a node would take {one.memory(workers) * beside / GIB:,.1f} GiB with "
                    f"{workers} in all, and a node has {cluster.memory / GIB:,.1f}"
                )
                break
    place, storage = Place(out), sum(one.storage for one in planned)
    if not place.remote:
        there = os.path.abspath(place.path)
        while not os.path.exists(there):
            there = os.path.dirname(there)
        free = shutil.disk_usage(there).free
        if storage > free:
            found.append(f"OUT takes {storage / GIB:,.1f} GiB, and {there} has {free / GIB:,.1f} free")
    return found
