"""A cluster on this machine whose nodes come and go: Ray's autoscaler on its fake provider, all of it on 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
STORE_BYTES = 100_000_000
"""Object store of each node."""
UP_S = 60.0


def free_port() -> int:
    """Return a port that nobody listens on; Ray gives those from 10,002 to 19,999 to its workers."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
        if port >= 20000:
            return port


def autoscaling_config(address: str, nodes: int, cpus: int, idle_s: float) -> dict[str, Any]:
    """Return a launcher file for a head that does no work and up to `nodes` nodes of `cpus` CPUs."""
    empty_lists = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands")
    empty_lists += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return {
        "cluster_name": "fake",
        "max_workers": nodes,
        "upscaling_speed": 100,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "auth": {},
        "docker": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": cpus, "object_store_memory": STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": nodes,
            },
        },
        "file_mounts": {},
        **{key: [] for key in empty_lists},
    }


def kill_with_all_below(head: subprocess.Popen[bytes]) -> None:
    """Kill a head and what it started, which is everything: the autoscaler's nodes are its grandchildren."""
    with contextlib.suppress(psutil.NoSuchProcess):
        ours = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ours[1:], timeout=10)
    head.wait()


@contextlib.contextmanager
def autoscaling_cluster(nodes: int = 3, cpus: int = 1, idle_s: float = 6.0, labelled: bool = True) -> Iterator[str]:
    """Start a head without CPUs, and give its address; drivers in this process may join it, and use its token."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # sockets have short names
        token, config = Path(folder, "token"), Path(folder, "cluster.yaml")
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        config.write_text(yaml.safe_dump(autoscaling_config(address, nodes, cpus, idle_s)))
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # this machine's address is 127.0.0.1
            "PYTHONPATH": str(ROOT),
        }
        of_head = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        ray = str(Path(sys.executable).with_name("ray"))
        words = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=0", f"--object-store-memory={STORE_BYTES}"]
        words += ["--include-dashboard=false", f"--autoscaling-config={config}", f"--temp-dir={folder}"]
        words += [f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        words += ["--dashboard-agent-listen-port=0"]
        if labelled:
            words.append(f"--labels=coresift.max-cpus={nodes * cpus},coresift.max-gpus=0")
        log = Path(folder, "head.log")
        with log.open("w") as out, given(environment):
            head = subprocess.Popen(words, env={**os.environ, **of_head}, stdout=out, stderr=out)
            try:
                deadline = time.monotonic() + UP_S
                while "Ray runtime started" not in log.read_text():
                    if head.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"no head: {log.read_text()}")
                    time.sleep(0.2)
                yield address
            finally:
                kill_with_all_below(head)


@contextlib.contextmanager
def given(environment: Mapping[str, str]) -> Iterator[None]:
    """Have these variables in the environment."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@dataclass
class Counts:
    """The nodes that work over time: [seconds, nodes beside the head, how many of those have work], and whatever else was said.

    Taken twice a second while it is entered; a row is added where something changed.
    """

    rows: list[tuple[float, int, int]] = field(default_factory=list)
    worked: set[str] = field(default_factory=set)
    """Ids of the nodes that were seen with work."""

    def __enter__(self) -> Counts:
        self.began, self.over = time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._take, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _take(self) -> None:
        import ray
        from ray._private.state import available_resources_per_node

        while not self.over.wait(0.5):
            workers = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]}
            workers = {node: cpus for node, cpus in workers.items() if cpus}
            free = available_resources_per_node()
            busy = {node for node, cpus in workers.items() if free.get(node, {}).get("CPU", 0) < cpus and node in free}
            self.worked |= busy
            if not self.rows or self.rows[-1][1:] != (len(workers), len(busy)):
                self.rows.append((round(time.monotonic() - self.began, 1), len(workers), len(busy)))

    def wait_for(self, nodes: int, timeout_s: float = 90.0) -> None:
        """Wait until there are so many nodes beside the head; raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not self.rows or self.rows[-1][1] != nodes:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not {nodes} nodes after {timeout_s:g} s: {self.rows}")
            time.sleep(0.2)
