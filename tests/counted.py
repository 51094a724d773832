"""A stand-in for Ray in one process that counts what RayShards sends: tasks, and the bytes of every value that travels."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import ray.exceptions  # loaded before the stand-in takes its place
from ray import cloudpickle

from engine import session
from engine.shards import RayShards
from engine.store import FeatureStore


@dataclass
class Call:
    """One `map`: its function, the bytes that go down (once a node), those of each shard's result, and those moved by folds.

    `driver` bytes end at the driver; `folds` is the number of messages between shards.
    """

    name: str
    down: int
    up: list[int] = field(default_factory=list)
    moved: int = 0
    folds: int = 0
    driver: int = 0
    folded: bool = False


@dataclass
class Ref:
    """A value in the object store: what it travels as."""

    data: bytes
    buffers: list[bytearray]

    @property
    def size(self) -> int:
        return len(self.data) + sum(map(len, self.buffers))

    def value(self) -> Any:
        return pickle.loads(self.data, buffers=self.buffers)


def stored(value: Any) -> Ref:
    """Serialise a value as Ray does: large arrays apart from the rest, without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return Ref(data, [bytearray(buffer.raw()) for buffer in buffers])


class Method:
    def __init__(self, ray_: CountingRay, actor: Any, name: str) -> None:
        self.ray, self.actor, self.name = ray_, actor, name

    def remote(self, *args: Any) -> Ref:
        values = [arg.value() if isinstance(arg, Ref) else arg for arg in args]
        result = stored(getattr(self.actor, self.name)(*values))
        call = self.ray.calls[-1] if self.ray.calls else None
        if self.name == "run" and call:
            call.up.append(result.size)
        elif self.name == "fold" and call:
            call.folds += 1
            call.moved += args[2].size
        return result


class Handle:
    def __init__(self, ray_: CountingRay, actor: Any) -> None:
        self.ray, self.actor = ray_, actor

    def __getattr__(self, name: str) -> Method:
        return Method(self.ray, self.actor, name)


class Class:
    def __init__(self, ray_: CountingRay, kind: type[Any]) -> None:
        self.ray, self.kind = ray_, kind

    def options(self, **needs: Any) -> Class:
        return self

    def remote(self, *args: Any) -> Handle:
        return Handle(self.ray, self.kind(*args))


class CountingRay(ModuleType):
    """What of Ray RayShards uses."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[Call] = []

    def remote(self, kind: type[Any]) -> Class:
        return Class(self, kind)

    def put(self, value: Any) -> Ref:
        found = stored(value)
        fn = value[0]
        while isinstance(fn, partial):
            fn = fn.func
        self.calls.append(Call(fn.__name__, found.size, folded=value[2] is not None))
        return found

    def get(self, refs: Ref | list[Ref]) -> Any:
        found = refs if isinstance(refs, list) else [refs]
        self.calls[-1].driver += sum(ref.size for ref in found)
        values = [ref.value() for ref in found]
        return values if isinstance(refs, list) else values[0]

    def kill(self, actor: Any) -> None:
        """Nothing is to be ended."""


def counting(monkeypatch: pytest.MonkeyPatch, store: FeatureStore, workers: int, reading: Any) -> tuple[RayShards, list[Call]]:
    """Return RayShards on stand-in actors, and the list that its calls are counted in."""
    stand_in = CountingRay()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setattr(session, "size", lambda: None)  # there is no cluster, and nobody waits for a place in it
    monkeypatch.setattr(RayShards, "_settle", lambda shards: None)
    shards = RayShards(store, workers, workers, reading)
    return shards, stand_in.calls
