"""The Ray session: joined where there is one, started here where there is none, and quiet unless asked."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.schema import RunError, first_line

verbose = False
"""Whether Ray may be heard in this process; the command line's -v sets it."""

LOCAL = "local"
"""Ray's own word for a session of its own on this machine."""


def connect(address: str | None) -> None:
    """Join the Ray cluster at `address`, else at RAY_ADDRESS (as in a Ray job), or start a local one.

    A session that is already up is used as it is. A cluster that runs on this machine is not joined unless it is named:
    what Ray remembers of one may be of one that was killed. Ray's own chatter (its logs, its workers' output, its bars) is
    off unless `verbose`.
    """
    os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    settings: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level, "configure_logging": True}
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address == LOCAL:
        settings["include_dashboard"] = False
        here = str(Path(__file__).parents[1])  # the workers of a local session import the code that this process runs
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    try:
        with contextlib.nullcontext() if verbose else _deaf():
            ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "this machine" if address == LOCAL else address
        raise RunError(f"no Ray session on {where}: {first_line(error)}") from error
    _quiet_data()


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


def cpus() -> int:
    """Return the CPUs of the connected cluster."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def gpus() -> int:
    """Return the whole GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))
