"""The job server of a Ray cluster: opened with a timeout, asked, and followed through lost connections."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from engine import session
from engine.masks import masked
from engine.schema import InputError, RunError, first_line

HERE = "http://127.0.0.1:8265"
OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""What Ray's client prefers to the address that it is given."""
CHATTER = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
CONNECT_S = 10.0
REPLY_S = 60.0
POLL_S = (1.0, 15.0)
"""Between two looks at a log: at first, and at most; the whole log comes each time, so a long one is asked for less often."""
LOG_BYTES_S = 500_000
AGAIN_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between two tries at a job server that is away."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Server:
    """A cluster's job server, and Ray's client of it."""

    address: str
    client: Any

    def look(self, job_id: str) -> str:
        """Return the command that prints a job's log."""
        return f"coresift logs {job_id} --address {masked(self.address)} --follow"


class LostError(Exception):
    """The job server gave no answer: it may later."""


def open_server(address: str | None) -> Server:
    """Return the job server at `address`, http://HOST:PORT, which answers.

    Raises InputError where the address is none, or it wants another token; RunError where nobody answers there.
    """
    url = address or os.environ.get(OVERRIDES[0]) or HERE
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        usual = {"http": 80, "https": 443}[parts.scheme]
        host, port = parts.hostname, parts.port or usual
    except (ValueError, KeyError):
        host = None
    if not host:
        raise InputError(f"--address {url!r} is no job server's: it looks like http://HOST:8265, where Ray's dashboard is")
    away = f"no Ray job server answers at {url}: is the cluster up, and its dashboard's port (8265) reached from here?"
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        raise RunError(f"{away} ({first_line(error)})") from error
    from ray.job_submission import JobSubmissionClient

    if not session.verbose:
        for name in CHATTER:
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _without(OVERRIDES), answers(url):
            client = JobSubmissionClient(url)
    except LostError as error:
        raise RunError(f"{away} ({error})") from error
    client._do_request = partial(client._do_request, timeout=REPLY_S)  # Ray's own waits for ever
    return Server(url, client)


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Take variables out of the environment for a while."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def answers(url: str, job_id: str | None = None) -> Iterator[None]:
    """Turn what Ray's client raises into our errors: LostError where it may pass, InputError where it won't."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise InputError(
            f"{url} wants another token, or any: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds the "
            "cluster's"
        ) from error
    except requests.exceptions.JSONDecodeError as error:
        raise InputError(f"{url} answers, but is no Ray job server: give the address of the cluster's dashboard") from error
    except requests.exceptions.HTTPError as error:
        raise InputError(f"{url} refuses: {first_line(error)}") from error
    except (requests.exceptions.RequestException, OSError) as error:
        raise LostError(first_line(error)) from error
    except RuntimeError as error:
        text = str(error)
        if "Version check returned 404" in text:
            raise InputError(f"{url} answers, but is no Ray job server: give the address of the cluster's dashboard") from error
        if job_id is not None and "status code 404" in text:
            raise InputError(
                f"{url} knows no job {job_id!r}: `coresift status --address {url}` lists those that there are"
            ) from error
        if "status code 5" in text:
            raise LostError(first_line(error)) from error
        raise RunError(f"{url}: {first_line(error)}") from error


def asked(server: Server, work: Callable[[], Any], job_id: str | None = None) -> Any:
    """Return work(), a request to the server; raises InputError or RunError where it can't be had."""
    try:
        with answers(server.address, job_id):
            return work()
    except LostError as error:
        raise RunError(f"{server.address} gives no answer: {error}. What runs there goes on") from error


def job_info(server: Server, job_id: str) -> Any:
    """Return what the server knows of a job: Ray's JobDetails."""
    return asked(server, lambda: server.client.get_job_info(job_id), job_id)


def job_log(server: Server, job_id: str) -> str:
    """Return a job's log so far."""
    text: str = asked(server, lambda: server.client.get_job_logs(job_id), job_id)
    return text


def follow(
    server: Server,
    job_id: str,
    patience_s: float,
    write: Callable[[str], None],
    note: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Clock = time.monotonic,
) -> Any:
    """Write a job's log as it grows, each character once; return Ray's JobDetails once the job has ended.

    A connection that is lost is tried again for `patience_s`; then RunError: the job goes on all the same. The log is polled:
    a request that fails costs nothing, and the next one goes on where the last one ended.
    """
    shown, tries, lost_at = 0, 0, 0.0
    while True:
        try:
            with answers(server.address, job_id):
                info = server.client.get_job_info(job_id)
                text = server.client.get_job_logs(job_id)
        except LostError as error:
            if tries == 0:
                lost_at = clock()
                note(f"connection to {server.address} lost ({error}); the job goes on, trying again for {patience_s:,.0f} s")
            if clock() - lost_at >= patience_s:
                raise RunError(
                    f"{server.address} gave no answer for {patience_s:,.0f} s. The job goes on; look at it again: "
                    f"{server.look(job_id)}"
                ) from error
            sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])
            tries += 1
            continue
        if tries:
            note("connected again")
            tries = 0
        write(text[shown:])
        shown = max(shown, len(text))
        if info.status.is_terminal():
            return info
        sleep(min(max(POLL_S[0], shown / LOG_BYTES_S), POLL_S[1]))
