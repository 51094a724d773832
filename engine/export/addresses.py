"""Where images are, as another tool may read it: no keys, and the prefix that it knows them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from engine.masks import masked
from engine.retry import WEB
from engine.schema import InputError, parse_pairs

MASK = "***"


def shared(uri: str) -> str:
    """Return an address without keys and without what only we need to open it: s3://bucket/name, whatever was in between.

    A web address keeps its query, its keys masked; a local path stays as it is.
    """
    scheme, mark, rest = masked(uri).partition("://")
    if not mark or scheme in WEB:
        return masked(uri)
    host, slash, name = rest.partition("?")[0].partition("/")
    path = unquote(f"{host.rpartition('@')[2]}{slash}{name}")
    return path if scheme == "file" else f"{scheme}://{path}"


@dataclass
class Addresses:
    """Rewrites addresses by `prefixes` (FROM, TO), the longest that fits.

    `keys` counts those that had keys, `local` paths of files that are left as they are.
    """

    prefixes: list[tuple[str, str]]
    keys: int = 0
    local: int = 0
    rewritten: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, pairs: Sequence[str], usual: str | None = None) -> Addresses:
        """Return what --uri-prefix says; `usual` is a prefix that is taken away unless something else is said."""
        given = list(parse_pairs(pairs, "--uri-prefix").items()) if pairs else [(f"{usual}", "")] if usual else []
        return cls(sorted(given, key=lambda pair: -len(pair[0])))

    def of_image(self, uri: str) -> str:
        """Return where the tool finds an image."""
        self.keys += MASK in masked(uri)
        plain = shared(uri)
        for start, instead in self.prefixes:
            if plain.startswith(start):
                self.rewritten.add(start)
                rest = plain[len(start) :]
                return instead + (quote(rest) if "?" in instead else rest)
        self.local += plain.startswith("/")
        return plain

    def check(self) -> None:
        """Raise InputError for a prefix that no image has."""
        for start, _ in self.prefixes:
            if start not in self.rewritten:
                raise InputError(f"--uri-prefix {start!r} is where no image of the selection is")
