"""Options of `coresift plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import Address
from jobs.options import FileOptions


@dataclass(frozen=True, kw_only=True)
class PlanOptions(FileOptions):
    """Say what a job will take before it is run: time, memory, storage, cost, limits, and how many workers are of use.

    A few hundred images of its pool are embedded, a few steps trained, and its strategies run on a few thousand vectors, here,
    into a temporary folder; nothing is written in OUT. Times are those of workers that have their CPUs, or GPUs, to themselves.
    """

    rows: Annotated[
        int | None,
        Opt(
            "Plan for a pool of so many images: the job's pool is a sample of it, e.g. --set pool=SAMPLE --rows 100000000.",
            min=1,
        ),
    ] = None
    probe_rows: Annotated[int, Opt("Images that are embedded to measure.", min=16, max=100_000)] = 256
    workers: Annotated[tuple[int, ...], Opt("Numbers of Ray workers to plan for; 0 is this process.", min=0)] = (1, 4, 16, 64)
    cpus_per_node: Annotated[int | None, Opt("Default: this machine's, or the smallest node's of --address.", min=1)] = None
    gpus_per_node: Annotated[int | None, Opt("As --cpus-per-node.", min=0)] = None
    memory_per_node: Annotated[str | None, Opt("As --cpus-per-node: 64GiB.")] = None
    network_gbps: Annotated[
        float | None, Opt("Of a node, in Gbit/s. Default: not known, and nothing is said of it.", min=0.001)
    ] = None
    encode_rate: Annotated[
        float | None,
        Opt("Images/s that a worker's network encodes, taken instead of measured: for GPUs that are not here.", min=0.001),
    ] = None
    price: Annotated[float | None, Opt("Of a worker for an hour: without it no cost is said.", min=0)] = None
    spot_price: Annotated[float | None, Opt("The same for one that may be taken away.", min=0)] = None
    out: Annotated[str | None, Opt("Write what was measured to FILE, for --probe.", metavar="FILE.json")] = None
    probe: Annotated[str | None, Opt("What --out wrote: what is in it is not measured again.", metavar="FILE.json")] = None
    address: Address = None
