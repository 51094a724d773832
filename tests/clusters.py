"""A Ray cluster on this machine, of processes of its own: a head with a job server, and further nodes; all on 127.0.0.1."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HOST = "127.0.0.1"
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray takes the machine's own address for 127.0.0.1, but on a Mac: this has it do so in everything that reads it."""
RAY = f"""
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True  # `ray start` would start no further nodes
services.get_node_ip_address = lambda address=None: {HOST!r}
from ray.scripts.scripts import main
main()
"""
START_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass
class Node:
    """`ray start --block`, and all that it started."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """Kill everything on the node at once, as a machine that goes away."""
        with contextlib.suppress(psutil.NoSuchProcess):
            ours = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
            for process in ours:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait(timeout=30)


@dataclass
class LocalCluster:
    """Start it with `with LocalCluster(folder) as cluster:`; the folder must have a short name, sockets have."""

    folder: Path
    head_cpus: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        """For ray.init and --address of verbs."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """Of the job server."""
        return f"http://{HOST}:{self.dashboard_port}"

    @property
    def env(self) -> dict[str, str]:
        """What a client needs in its environment, beside the rest: the token, and to find the cluster on 127.0.0.1."""
        return {**LOOPBACK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}

    def __enter__(self) -> "LocalCluster":
        token = self.folder / "token"
        token.write_text(self.token)
        token.chmod(0o600)
        head = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=true"]
        head += [
            f"--dashboard-host={HOST}",
            f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={free_port()}",
        ]
        try:
            self._start(head, self.head_cpus)
            self._wait_for_jobs()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_node(self, cpus: int = 1) -> Node:
        """Start a further node."""
        return self._start([f"--address={self.address}"], cpus)

    def stop(self) -> None:
        """End every node: those that were added first, the head last."""
        for node in reversed(self.nodes):
            node.kill()

    def _start(self, arguments: list[str], cpus: int) -> Node:
        log = self.folder / f"node-{len(self.nodes)}.log"
        words = [
            sys.executable,
            "-c",
            RAY,
            "start",
            "--block",
            "--disable-usage-stats",
            f"--node-ip-address={HOST}",
            f"--num-cpus={cpus}",
        ]
        words += ["--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}", *arguments]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        given = {"PATH": path, "OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}  # others may fill the memory
        environment = {**os.environ, **given, **self.env, **self.environment}
        for name in ("RAY_ADDRESS", "PYTHONPATH"):
            environment.pop(name, None)
        with log.open("wb") as file:
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        node = Node(process, log)
        self.nodes.append(node)
        _wait(lambda: b"Ray runtime started" in log.read_bytes(), node)
        return node

    def _wait_for_jobs(self) -> None:
        def listens() -> bool:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.dashboard_port), timeout=1):
                return True
            return False

        _wait(listens, self.nodes[0])


def _wait(ready, node: Node) -> None:
    end = time.monotonic() + START_S
    while not ready():
        if node.process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"a node did not start: {node.log.read_text()[-2000:]}")
        time.sleep(0.2)


@contextlib.contextmanager
def short_folder():
    """A folder whose name is short enough for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="cs", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


class Proxy:
    """Passes TCP connections on to a port of this machine, until it is cut."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.open = True
        self.links: list[socket.socket] = []
        self.listener = socket.create_server((HOST, 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection, and refuse new ones."""
        self.open = False
        for link in self.links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self.links.clear()

    def mend(self) -> None:
        """Pass connections on again."""
        self.open = True

    def close(self) -> None:
        self.cut()
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            far = socket.create_connection((HOST, self.target))
            self.links += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for link in (source, sink):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
                link.close()


def interrupt(process: subprocess.Popen) -> None:
    """Press Ctrl-C."""
    process.send_signal(signal.SIGINT)
