"""Which Ray a command works with."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from engine import session
from engine.schema import InputError

ROOT = Path(__file__).parents[1]
NOWHERE = "127.0.0.1:9"


class Nothing:
    pass


@pytest.mark.parametrize(
    ("given", "environment", "joined"),
    [(None, None, "local"), (None, NOWHERE, NOWHERE), ("10.0.0.1:6379", None, "10.0.0.1:6379")],
)
def test_the_address_given_or_that_of_the_environment_or_one_of_its_own(monkeypatch, given, environment, joined):
    import ray

    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **settings: asked.append((address, "include_dashboard" in settings)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setattr(session, "_own", False)
    session.connect(given)
    assert asked == [(joined, joined == "local")]


def stand_in(monkeypatch, own, up, *labels):
    import ray

    monkeypatch.setattr(session, "_own", own)
    monkeypatch.setattr(ray, "cluster_resources", lambda: up)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Labels": found} for found in labels])


HEAD = {"coresift.max-cpus": "64", "coresift.max-gpus": "8"}


@pytest.mark.parametrize(
    ("own", "up", "labels", "most", "size"),
    [
        (True, {"CPU": 2.0}, [{}], (2, 0), (2, 0)),
        (False, {"CPU": 2.0}, [{}], None, (2, 0)),
        (False, {}, [{}], None, (0, 0)),
        (False, {}, [HEAD], (64, 8), (64, 8)),
        (False, {"CPU": 4.0, "GPU": 1.0}, [{}, HEAD], (64, 8), (64, 8)),
        (False, {"CPU": 4.0}, [{"coresift.max-cpus": "2"}], (4, 0), (4, 0)),
    ],
)
def test_what_a_cluster_can_have(monkeypatch, own, up, labels, most, size):
    stand_in(monkeypatch, own, up, *labels)
    assert session.most() == (most and session.Size(*most))
    assert session.size() == session.Size(*size)


def test_a_label_that_is_no_number(monkeypatch):
    stand_in(monkeypatch, False, {}, {"coresift.max-gpus": "many"})
    with pytest.raises(InputError, match=r"coresift.max-gpus are '0' and 'many': give whole numbers"):
        session.most()


def test_it_is_said_what_is_waited_for(ray_session, monkeypatch):
    """An actor that this machine has no room for: said once, and no more once it is gone."""
    import ray

    said = []
    monkeypatch.setattr(session, "say", said.append)
    monkeypatch.setattr(session, "PATIENCE_S", 0.2)
    monkeypatch.setattr(session, "LOOK_EVERY_S", 0.2)
    lacking = [ray.remote(Nothing).options(num_cpus=1000, num_gpus=2).remote() for _ in range(2)]
    with session.waiting():
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
    for actor in lacking:
        ray.kill(actor)
    assert said[0].startswith("waiting for 2 x {CPU: 1000, GPU: 2}: this machine has {CPU: ")
    assert len(said) == 1


def test_a_local_session_listens_on_loopback_alone(ray_session):
    """All that it started, this process included."""
    import ipaddress

    import psutil

    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    bound = {}
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = process.name()
            for found in process.net_connections(kind="inet"):
                if found.status == psutil.CONN_LISTEN:
                    address = ipaddress.ip_address(found.laddr.ip)
                    bound[name, found.laddr.port] = getattr(address, "ipv4_mapped", None) or address
    assert {name for name, _ in bound} >= {"gcs_server", "raylet"}
    assert all(address.is_loopback for address in bound.values()), bound


@pytest.mark.slow
def test_what_ray_remembers_of_a_dead_cluster_is_not_joined():
    words = [sys.executable, "-c", "from engine import session; session.connect(None); print(session.cpus() > 0)"]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # sockets have short names
        (Path(short) / "ray").mkdir()
        (Path(short) / "ray" / "ray_current_cluster").write_text(NOWHERE)
        environment = {**os.environ, "RAY_TMPDIR": short}
        done = subprocess.run(words, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
