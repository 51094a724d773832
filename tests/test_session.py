"""Which Ray a command works with."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine import session

ROOT = Path(__file__).parents[1]
NOWHERE = "127.0.0.1:9"


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
    session.connect(given)
    assert asked == [(joined, joined == "local")]


@pytest.mark.slow
def test_what_ray_remembers_of_a_dead_cluster_is_not_joined():
    words = [sys.executable, "-c", "from engine import session; session.connect(None); print(session.cpus() > 0)"]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # sockets have short names
        (Path(short) / "ray").mkdir()
        (Path(short) / "ray" / "ray_current_cluster").write_text(NOWHERE)
        environment = {**os.environ, "RAY_TMPDIR": short}
        done = subprocess.run(words, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
