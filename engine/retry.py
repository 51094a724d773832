"""Patience with object stores: what may pass is tried again; what will not is an error for the person.

Local disks are never waited for: what they refuse once they refuse again.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from engine.schema import InputError, RunError, first_line

T = TypeVar("T")

WEB = ("http", "https")
"""Schemes whose every address may be another host: one that is away speaks for its own images only."""

WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between the tries. A try at a store that does not answer takes seconds itself, in the store's own client."""

WEB_TRIES = 2
"""Waits for an address of the web, at most: a list of millions may name many that are gone."""

REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|EXPIRED|UNRECOGNIZED_CLIENT|"
    r"MISSING_AUTHENTICATION|INVALID_CLIENT_TOKEN|NOT_AUTHORIZED|NO_SUCH_BUCKET|PERMISSION_DENIED|UNAUTHENTICATED|"
    r"\b40[13]\b|forbidden|anonymous caller|permission denied|bucket does not exist",
    re.IGNORECASE,
)
"""How stores say that the credentials, or the bucket, are wrong: another try gives the same."""

SILENT = re.compile(
    r"NETWORK_CONNECTION|SERVICE_UNAVAILABLE|SLOW_DOWN|REQUEST_TIMEOUT|INTERNAL_FAILURE|curlCode|connection|could not connect|"
    r"timed? ?out|unavailable|could not resolve|\b50[0234]\b",
    re.IGNORECASE,
)
"""How they say that the store itself, not this object, is out of reach."""


def is_final(error: OSError) -> bool:
    """Return whether another try would end in the same way: nothing there, no permission, no such bucket."""
    gone = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, gone) or REFUSED.search(str(error)) is not None


def patiently(work: Callable[[], T], uri: str, remote: bool) -> T:
    """Return work(); on an object store (`remote`) an OSError that may pass is followed by another try, WAITS_S apart.

    Raises the OSError that is final, or still there after the last try; RunError where the store gave no answer at all (a
    bucket). A list may name files of many web hosts, some of them gone for good: those get fewer tries, and an OSError.
    """
    on_web = uri.split("://")[0] in WEB
    for wait_s in WAITS_S[: WEB_TRIES if on_web else None] if remote else ():
        try:
            return work()
        except OSError as error:
            if is_final(error):
                raise
            time.sleep(wait_s)
    try:
        return work()
    except OSError as error:
        if remote and not on_web and SILENT.search(str(error)) and not is_final(error):
            raise RunError(
                f"{uri} gave no answer in {len(WAITS_S) + 1} tries: {first_line(error)}. What is finished is kept: run the "
                "same command again once the store is back"
            ) from error
        raise


@contextlib.contextmanager
def reached(uri: str, kept: str = "") -> Iterator[None]:
    """Turn an OSError about a place that the user named into one sentence.

    Raises InputError where credentials or permissions are refused, else RunError; `kept` says what the next run finds.
    """
    try:
        yield
    except OSError as error:
        if is_final(error) and not isinstance(error, FileNotFoundError):
            raise InputError(f"{uri} is refused: {first_line(error)}. Check the credentials, and what they allow") from error
        raise RunError(f"{uri} failed: {first_line(error)}{kept}") from error
