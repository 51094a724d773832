"""Options of the verbs that run job files, here and on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt
from engine.verbs.shared import Address

Follow = Annotated[bool, Opt("Print the log as it grows, until the job ends; the exit code is the job's own.")]
Server = Annotated[
    str | None,
    Opt(
        "The cluster's job server, as http://HOST:8265. Default: $RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265.",
        metavar="URL",
    ),
]
Patience = Annotated[float, Opt("How long a lost connection is tried again while following.", min=0, metavar="SECONDS")]


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Which job file, what lies over it, and which of its steps."""

    job: Annotated[
        str, Opt("A job file (.yaml), or the name of one that comes with coresift: see `coresift jobs`.", positional=True)
    ]
    set: Annotated[
        tuple[str, ...],
        Opt(
            "Change the file: pool=..., out=..., data.NAME=..., resources.NAME=..., steps.STEP.OPTION=..., for.VARIABLE=[...]. "
            "Repeatable.",
            metavar="KEY=VALUE",
            repeat=True,
        ),
    ] = ()
    small: Annotated[bool, Opt("The file's small variant, for a laptop.")] = False
    only: Annotated[tuple[str, ...], Opt("Run these steps, comma-separated, and no others.", metavar="STEP,...")] = ()


@dataclass(frozen=True, kw_only=True)
class JobOptions(FileOptions):
    """The same, and whether they are run."""

    dry_run: Annotated[bool, Opt("Check everything, print the steps as commands, run nothing.")] = False


@dataclass(frozen=True, kw_only=True)
class RunOptions(JobOptions):
    """Run a job file here, step by step; what is done already is not done again."""

    address: Address = None


@dataclass(frozen=True, kw_only=True)
class SubmitOptions(JobOptions):
    """Send a job file to a Ray cluster, and follow it.

    The job goes on whatever becomes of this command; submitted again while it runs, it is followed, not started twice. The
    code goes with it; pools and OUT must be where the cluster reaches them. Keys are never sent in the job file: give the
    cluster a role, or name environment variables with --env. A cluster with token authentication: RAY_AUTH_MODE=token and
    RAY_AUTH_TOKEN_PATH.
    """

    address: Server = None
    follow: Follow = True
    env: Annotated[
        tuple[str, ...],
        Opt(
            "Environment variable of this shell that the job gets, by its name: AWS_SECRET_ACCESS_KEY. Ray keeps its value "
            "with the job, where whoever reaches the cluster's job server or its disks can read it. Repeatable.",
            metavar="NAME",
            repeat=True,
        ),
    ] = ()
    python: Annotated[str, Opt("The Python that runs the job on the cluster's head.")] = "python"
    patience: Patience = 300.0


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Tell what has become of a job on a cluster; without an id, of all of coresift's."""

    id: Annotated[str | None, Opt("What `submit` printed.", positional=True)] = None
    address: Server = None


@dataclass(frozen=True, kw_only=True)
class LogsOptions:
    """Print the log of a job on a cluster."""

    id: Annotated[str, Opt("What `submit` printed.", positional=True)]
    address: Server = None
    follow: Follow = False
    patience: Patience = 300.0


@dataclass(frozen=True, kw_only=True)
class StopOptions:
    """Stop a job on a cluster; submitted again, it goes on where it stopped."""

    id: Annotated[str, Opt("What `submit` printed.", positional=True)]
    address: Server = None
