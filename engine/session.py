"""The Ray session: joined where there is one, started here where there is none, and quiet unless asked.

It also answers what the cluster has, what it can grow to, and what it is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.schema import InputError, RunError, first_line

verbose = False
"""Whether Ray may be heard in this process; the command line's -v sets it."""

say: Callable[[str], None] = logging.getLogger("coresift").warning
"""Takes what is waited for, on a thread of its own; the command line sets it."""

LOCAL = "local"
"""Ray's own word for a session of its own on this machine."""

MAX_CPUS, MAX_GPUS = "coresift.max-cpus", "coresift.max-gpus"
"""Labels of a head node that say how far its autoscaler goes: Ray does not tell its drivers."""

LOOK_EVERY_S = 2.0
PATIENCE_S = 10.0
"""How long nothing moves before it is said what is waited for."""
AGAIN_S = 60.0
"""How long before the same is said again, and before anything is said once something has moved."""

_own = False


def connect(address: str | None) -> None:
    """Join the Ray cluster at `address`, else at RAY_ADDRESS (as in a Ray job), or start a local one.

    A session that is already up is used as it is. A cluster that runs on this machine is not joined unless it is named:
    what Ray remembers of one may be of one that was killed. A local session listens on 127.0.0.1 alone. Ray's own chatter
    (its logs, its workers' output, its bars) is off unless `verbose`.
    """
    global _own
    os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    _own = False
    level = logging.INFO if verbose else logging.ERROR
    settings: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level, "configure_logging": True}
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address == LOCAL:
        settings["include_dashboard"] = False
        here = str(Path(__file__).parents[1])  # the workers of a local session import the code that this process runs
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    try:
        with contextlib.nullcontext() if verbose else _deaf(), _loopback() if address == LOCAL else contextlib.nullcontext():
            ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "this machine" if address == LOCAL else address
        raise RunError(f"no Ray session on {where}: {first_line(error)}") from error
    _own = address == LOCAL
    _quiet_data()


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Have what Ray starts listen on 127.0.0.1, as it does on a Mac, where it would on all of the machine's addresses."""
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    kept, given = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"  # for this process, which read it, and for its children
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept
        del os.environ[name]
        if given is not None:
            os.environ[name] = given


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Keep what Ray's C++ core writes to the process's stderr while it starts from the terminal."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quiet_data() -> None:
    """Switch Ray Data's bars and logs off in this process, unless `verbose`."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    if not verbose:
        for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
            logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Size:
    """CPUs and whole GPUs."""

    cpus: int
    gpus: int


def now() -> Size:
    """Return what is up in the connected cluster: perhaps nothing, where an autoscaler brings nodes."""
    import ray

    up = ray.cluster_resources()
    return Size(int(up.get("CPU", 0)), int(up.get("GPU", 0)))


def most() -> Size | None:
    """Return what the connected cluster can have: a session of our own what it has, another what its head's labels say.

    None where nobody says so. Raises InputError for a label that is no number.
    """
    import ray

    if _own:
        return now()
    labels = [node.get("Labels") or {} for node in ray.nodes() if node["Alive"]]
    told = next((found for found in labels if MAX_CPUS in found or MAX_GPUS in found), None)
    if told is None:
        return None
    limits = [told.get(name, "0") for name in (MAX_CPUS, MAX_GPUS)]
    if not all(limit.isdecimal() for limit in limits):
        raise InputError(f"the head's labels {MAX_CPUS} and {MAX_GPUS} are {limits[0]!r} and {limits[1]!r}: give whole numbers")
    up = now()
    return Size(max(up.cpus, int(limits[0])), max(up.gpus, int(limits[1])))


def size() -> Size:
    """Return what the connected cluster can have where that is known, else what is up."""
    return most() or now()


def reach() -> str:
    """Return the words before what `most` says."""
    return "this machine has" if _own else "the cluster grows to"


def cpus() -> int:
    """Return the CPUs of `size`, at least 1."""
    return max(1, size().cpus)


def nodes() -> list[tuple[int, int, float]]:
    """Return (CPUs, GPUs, bytes of memory) of each live node of the connected cluster that has CPUs or GPUs."""
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    told = [(int(has.get("CPU", 0)), int(has.get("GPU", 0)), float(has.get("memory", 0))) for has in found]
    return [node for node in told if node[0] or node[1]]


def gpus() -> int:
    """Return the whole GPUs of `size`."""
    return size().gpus


def _bundle(needs: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(needs.items()) if amount) + "}"


def _told(found: Size) -> str:
    return _bundle({"CPU": found.cpus, "GPU": found.gpus})


def unmet() -> str | None:
    """Return what the connected cluster is asked for and has no room for now, as a sentence; None where there is nothing."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(ray._private.worker.global_worker.gcs_client)
    asked: dict[str, int] = {}
    for single in state.pending_resource_requests:
        text = _bundle(single.request.resources_bundle)
        asked[text] = asked.get(text, 0) + single.count
    for gang in state.pending_gang_resource_requests:
        for request in gang.requests:
            text = _bundle(request.resources_bundle)
            asked[text] = asked.get(text, 0) + 1
    if not asked:
        return None
    up, limit = now(), most()
    has = "this machine" if _own else "the cluster"
    grows = "" if _own or limit is None else f", and grows to {_told(limit)}"
    wanted = " and ".join(f"{count} x {text}" for text, count in sorted(asked.items()))
    return f"waiting for {wanted}: {has} has {_told(up) if up.cpus or up.gpus else 'none yet'}{grows}"


@contextlib.contextmanager
def waiting() -> Iterator[Callable[[], None]]:
    """While the block runs and nothing moves, say now and then what Ray is waited for; call what it gives when something did.

    So a step that needs more than the cluster has is seen to wait for an autoscaler, or for others to finish.
    """
    import ray

    over, last, patience = threading.Event(), time.monotonic(), PATIENCE_S

    def moved() -> None:
        nonlocal last, patience
        last, patience = time.monotonic(), AGAIN_S

    def watch() -> None:
        told, when = None, -AGAIN_S
        with contextlib.suppress(ray.exceptions.RayError):  # a session that is lost is the caller's to find
            while not over.wait(LOOK_EVERY_S):
                clock = time.monotonic()
                text = unmet() if clock - last >= patience else None
                if text and (text != told or clock - when >= AGAIN_S) and not over.is_set():
                    told, when = text, clock
                    say(text)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield moved
    finally:
        over.set()
        watcher.join(LOOK_EVERY_S)
