"""Sends a job to a Ray cluster: its file and the code that runs it, as a Ray job of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine
from engine.folders import digest_of
from engine.masks import masked
from engine.schema import InputError, RunError
from jobs.cluster import AGAIN_S, LostError, Server, answers, asked
from jobs.options import SubmitOptions
from jobs.run import Job

PACKAGES = ("engine", "cli", "jobs")
FILE = "job.yaml"
PLACES = (
    "pool",
    "file",
    "features",
    "subject",
    "selection",
    "checkpoint",
    "predictions",
    "runs",
    "test",
    "images",
    "weights",
    "reference",
    "labeled",
    "exclude",
    "labels",
    "test_labels",
    "reference_labels",
    "oracle",
    "recipe",
)
"""Options that name a file or folder."""
NO_PLACES = {
    "weights": r"hub|random",
    "selection": r"all",
    "labeled": r"column:.*",
    "exclude": r"column:.*",
    "oracle": r"column(:.*)?",
    "recipe": r"[\w-]+",
}
"""What they may be instead."""
UNREADY = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_START_FAILURE")
"""How a cluster that has only just come up fails a job before it begins."""
TRIES = 3


def check_reach(job: Job) -> None:
    """Raise InputError where a job names places by paths that mean nothing elsewhere, or by URIs with keys in them."""
    wrong: list[str] = []
    for path, value in _places(job):
        if masked(value) != value:
            raise InputError(
                f"{path} is {masked(value)!r}, with keys in it, which would stay on the cluster with the job: give the cluster "
                "a role, or leave the keys out and name their environment variables with --env"
            )
        if "://" not in value and not value.startswith("/"):
            wrong.append(f"{path} is {value!r}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise InputError(
            f"{'; '.join(wrong[:4])}{more}: the cluster does not see this folder. Give URIs, or absolute paths of storage that "
            "every node has"
        )


def _places(job: Job) -> Iterator[tuple[str, str]]:
    """Yield what a job reads or writes, with the path of its key: each value once, but for the folders of its own steps."""
    yield "out", job.file.out
    ours = {step.out for step in job.all_steps}
    seen: set[str] = set()
    for step in job.all_steps:
        for name in PLACES:
            given = getattr(step.options, name, None)
            for text in given if isinstance(given, tuple) else [given] if given else []:
                value = str(text).partition("=")[2] if name == "runs" and "=" in text else str(text)
                own = value in ours or any(value.startswith(f"{out}/") for out in ours)
                if own or value in seen or re.fullmatch(NO_PLACES.get(name, "$^"), value):
                    continue
                seen.add(value)
                yield f"{step.path}.{name}", value


def job_ids(job: Job, options: SubmitOptions) -> Iterator[str]:
    """Yield the ids of a job: NAME-<8 hex digits of all that it does>, then the same with -2, -3 ... for later runs."""
    what = {"file": job.file.as_yaml(), "only": options.only, "env": sorted(options.env), "python": options.python}
    first = f"{job.file.name}-{digest_of(what)[:8]}"
    yield first
    number = 2
    while True:
        yield f"{first}-{number}"
        number += 1


@contextmanager
def staged(job: Job) -> Iterator[str]:
    """Give a folder that holds the code, from wherever it is installed, and the job file with all that lies over it."""
    source = Path(engine.__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="coresift-") as folder:
        for package in PACKAGES:
            shutil.copytree(
                source / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
            )
        (Path(folder) / FILE).write_text(job.file.as_yaml())
        yield folder


def entrypoint(options: SubmitOptions) -> str:
    """Return the command that the cluster runs."""
    only = ["--only", ",".join(options.only)] if options.only else []
    return shlex.join([*shlex.split(options.python), "-m", "cli", "run", FILE, "--address", "auto", *only])


def environment(options: SubmitOptions) -> dict[str, str]:
    """Return the variables that --env names; raises InputError for one that is not set."""
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise InputError(f"--env {missing[0]}: this shell has no such variable; set it, or leave --env out")
    return {name: os.environ[name] for name in options.env}


def submit(server: Server, job: Job, options: SubmitOptions, sleep: Callable[[float], None] = time.sleep) -> tuple[str, bool]:
    """Send a job; return its id, and whether it is new: one that runs already is not sent again."""
    variables = environment(options)
    known = {info.submission_id: info for info in asked(server, server.client.list_jobs)}
    job_id = next(one for one in job_ids(job, options) if one not in known or not known[one].status.is_terminal())
    if job_id in known:
        return job_id, False
    with staged(job) as folder:
        request = {
            "entrypoint": entrypoint(options),
            "submission_id": job_id,
            "runtime_env": {"working_dir": folder, **({"env_vars": variables} if variables else {})},
            "metadata": {"coresift": engine.__version__, "job": job.file.name, "out": job.file.out},
        }
        for wait_s in (*AGAIN_S, None):  # a head that has only just come up has nobody who takes jobs yet
            try:
                with answers(server.address):
                    server.client.submit_job(**request)
                break
            except LostError as error:
                if wait_s is None:
                    raise RunError(f"{server.address} takes no jobs: {error}. Run the same command again") from error
                sleep(wait_s)
            except RunError as error:
                if "already exists" not in str(error):  # what a lost answer was about
                    raise
                break
    return job_id, True


def exit_code(info: Any, server: Server) -> int:
    """Return the exit code of a job that has ended, its own; raises RunError where it has none, or was stopped."""
    if info.driver_exit_code is not None and str(info.status) != "STOPPED":
        return int(info.driver_exit_code)
    if str(info.status) == "SUCCEEDED":
        return 0
    why = " ".join((info.message or "no reason was given").split())
    state = "was stopped" if str(info.status) == "STOPPED" else f"ended without an exit code of its own: {why[:600]}"
    raise RunError(f"job {info.submission_id} {state}; submitted again it goes on")


def run_to_end(
    server: Server, job: Job, options: SubmitOptions, begun: Callable[[str, bool], None], wait: Callable[[str], Any]
) -> Any:
    """Submit a job and `wait` for its end, again where a cluster that has only just come up lost it; return JobDetails."""
    for _ in range(TRIES):
        job_id, new = submit(server, job, options)
        begun(job_id, new)
        info = wait(job_id)
        if info.error_type not in UNREADY:
            break
    return info
