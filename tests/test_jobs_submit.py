"""Jobs on a cluster: what is sent, what is refused, and a log that is followed through lost connections."""

import http.server
import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from cli.main import run
from engine.schema import InputError, RunError
from jobs.cluster import Server, follow, open_server
from jobs.options import SubmitOptions
from jobs.run import open_job
from jobs.submit import check_reach, entrypoint, exit_code, job_ids, staged, submit
from tests.clusters import HOST, LocalCluster, Proxy, free_port, interrupt, short_folder
from tests.pools import make_folder

ROOT = Path(__file__).parents[1]
JOB = """
name: small
pool: {pool}
out: {out}
resources: {{workers: 2}}
steps:
  - embed: {{encoder: pixels}}
    as: features
  - for: {{strategy: [kmeans, coreset]}}
    steps:
      - select: {{features: $features, strategy: $strategy, budget: 9}}
        as: picks
"""


@pytest.fixture
def job(tmp_path):
    def write(text=JOB, **places):
        given = {"pool": str(tmp_path / "pool"), "out": str(tmp_path / "out"), **places}
        (tmp_path / "job.yaml").write_text(text.format(**given))
        return SubmitOptions(job=str(tmp_path / "job.yaml"))

    return write


class State(str):
    def is_terminal(self):
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


def details(job_id, state, code=None, message=None):
    return SimpleNamespace(
        submission_id=job_id, status=State(state), driver_exit_code=code, message=message, error_type=None, metadata={}
    )


# --- what is sent


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (JOB.replace("{pool}", "pools/x"), "steps[0].embed.pool is 'pools/x': the cluster does not see this folder"),
        (JOB.replace("{out}", "~/out"), "out is '~/out'"),
        (JOB.replace("{pool}", "s3://k:SECRET@b/x"), "steps[0].embed.pool is 's3://***@b/x', with keys in it"),
        (JOB.replace("{out}", "s3://b/x?secret_key=SECRET"), "out is 's3://b/x?secret_key=***', with keys in it"),
        (JOB.replace("budget: 9", "budget: 9, labeled: ids.txt"), "steps[1].steps[0].select.labeled is 'ids.txt'"),
        (JOB.replace("encoder: pixels", "weights: mine.pth"), "steps[0].embed.weights is 'mine.pth'"),
        (JOB + "  - curves: {{runs: [a=runs/0, b=/x]}}", "steps[2].curves.runs is 'runs/0'"),
    ],
)
def test_what_the_cluster_cannot_reach_is_refused_here(job, text, told):
    with pytest.raises(InputError) as caught:
        check_reach(open_job(job(text)))
    assert told in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_what_is_no_path_of_this_machine_passes(job):
    text = JOB.replace("budget: 9", "budget: 9, labeled: column:done").replace("{pool}", "hf://owner/name")
    text += "  - finetune: {{selection: all, recipe: lowbudget-linear, weights: hub, labels: s3://b/l.csv, test: /shared/t}}\n"
    text += "  - rounds: {{subject: $features, oracle: column, test: $features, strategy: random}}\n"
    text += "  - curves: {{runs: [a=$rounds, $rounds]}}\n"
    check_reach(open_job(job(text)))


def test_the_working_directory_is_the_code_and_the_file(job, tmp_path):
    options = SubmitOptions(job=job().job, set=("seed=5",), only=("features",), python="python3.11 -X dev")
    with staged(open_job(options)) as folder:
        assert sorted(os.listdir(folder)) == ["cli", "engine", "job.yaml", "jobs"]
        assert not list(Path(folder).rglob("__pycache__"))
        assert {file.suffix for file in Path(folder).rglob("*") if file.is_file()} <= {
            ".py",
            ".toml",
            ".yaml",
            ".html",
            ".css",
            ".js",
        }
        words = entrypoint(options)
        assert words == "python3.11 -X dev -m cli run job.yaml --address auto --only features"
        here = [sys.executable, *words.split()[3:6], "job.yaml", "--dry-run", "--only", "features"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(here, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert "--seed 5" in done.stdout
    assert not Path(folder).exists()


class Client:
    """Ray's client, as far as it is used, of jobs that are told."""

    def __init__(self, jobs=(), failures=()):
        self.jobs, self.failures, self.sent = list(jobs), list(failures), []

    def list_jobs(self):
        return self.jobs

    def submit_job(self, **request):
        self.sent.append(request)
        if self.failures:
            raise self.failures.pop(0)


def test_a_job_that_runs_is_not_sent_again(job, monkeypatch):
    monkeypatch.setenv("KEY", "SECRET")
    options = SubmitOptions(job=job().job, env=("KEY",))
    opened = open_job(options)
    first, second = itertools.islice(job_ids(opened, options), 2)
    assert first.startswith("small-")
    assert second == f"{first}-2"
    for jobs, expected in [
        ([], (first, True)),
        ([details(first, "RUNNING")], (first, False)),
        ([details(first, "FAILED", 1)], (second, True)),
        ([details(first, "STOPPED"), details(second, "PENDING")], (second, False)),
    ]:
        client = Client(jobs)
        assert submit(Server("http://x", client), opened, options) == expected
        assert len(client.sent) == expected[1]
        for request in client.sent:
            assert request["runtime_env"]["env_vars"] == {"KEY": "SECRET"}
            assert "SECRET" not in json.dumps({key: value for key, value in request.items() if key != "runtime_env"})
    other = SubmitOptions(job=options.job, env=("KEY",), set=("seed=1",))
    assert next(job_ids(open_job(other), other)) != first
    with pytest.raises(InputError, match="--env NONE_SUCH: this shell has no such variable"):
        submit(Server("http://x", Client()), opened, SubmitOptions(job=options.job, env=("NONE_SUCH",)))


def test_a_head_that_has_only_just_come_up_is_waited_for(job):
    options, waited = job(), []
    unready = RuntimeError("Request failed with status code 500: No available agent to submit job")
    there = RuntimeError("Request failed with status code 400: submission_id x already exists.")
    client = Client(failures=[unready, requests.ConnectionError("reset"), there])
    assert submit(Server("http://x", client), open_job(options), options, waited.append)[1]
    assert waited == [0.5, 1.0]
    with pytest.raises(RunError, match="takes no jobs"):
        submit(Server("http://x", Client(failures=[unready] * 9)), open_job(options), options, waited.append)
    with pytest.raises(RunError, match="no such thing"):
        submit(Server("http://x", Client(failures=[RuntimeError("no such thing")])), open_job(options), options)


# --- the log


class Log(Client):
    """A job whose log grows with every look, and which is away now and then."""

    def __init__(self, looks):
        super().__init__()
        self.looks = iter(looks)

    def get_job_info(self, job_id):
        self.now = next(self.looks)
        if isinstance(self.now, Exception):
            raise self.now
        return details(job_id, self.now[1], 0)

    def get_job_logs(self, job_id):
        return self.now[0]


def test_a_log_is_written_once_whatever_is_lost():
    gone, broken = requests.ConnectionError("gone"), RuntimeError("Request failed with status code 503: x")
    looks = [("", "PENDING"), ("one\ntw", "RUNNING"), gone, broken, ("one\ntwo\nthree\n", "RUNNING"), gone]
    looks += [("one\ntwo\nthree\nfour", "SUCCEEDED")]
    written, notes, now = [], [], itertools.count()
    info = follow(Server("http://x", Log(looks)), "j", 5, written.append, notes.append, lambda s: None, lambda: next(now))
    assert "".join(written) == "one\ntwo\nthree\nfour"
    assert str(info.status) == "SUCCEEDED"
    assert [note.split(" (")[0] for note in notes] == ["connection to http://x lost", "connected again"] * 2


def test_patience_ends_and_says_how_to_look_again():
    now = itertools.count()
    client = Log(itertools.repeat(requests.ConnectionError("gone")))
    with pytest.raises(
        RunError, match=r"no answer for 5 s. The job goes on; look at it again: coresift logs j --address http://x"
    ):
        follow(Server("http://x", client), "j", 5, print, lambda note: None, lambda s: None, lambda: next(now))
    assert next(now) < 12
    with pytest.raises(InputError, match=r"http://x knows no job 'j'"):
        follow(
            Server("http://x", Log([RuntimeError("Request failed with status code 404: Job j does not exist")])),
            "j",
            5,
            print,
            print,
        )


def test_exit_codes_are_the_jobs_own():
    server = Server("http://x", None)
    assert [
        exit_code(details("j", state, code), server) for state, code in [("SUCCEEDED", 0), ("FAILED", 3), ("SUCCEEDED", None)]
    ] == [0, 3, 0]
    with pytest.raises(RunError, match="job j ended without an exit code of its own: no space left"):
        exit_code(details("j", "FAILED", None, "no\nspace left"), server)
    with pytest.raises(RunError, match="job j was stopped"):
        exit_code(details("j", "STOPPED", 1), server)


# --- the server


def test_who_is_no_job_server(monkeypatch, capsys, job, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    for address in ("http://", "ftp://x:1", "http://x:port"):
        with pytest.raises(InputError, match="is no job server's"):
            open_server(address)
    with pytest.raises(RunError, match=r"no Ray job server answers at http://127.0.0.1:\d+: is the cluster up"):
        open_server(f"{HOST}:{free_port()}")
    server = http.server.ThreadingHTTPServer((HOST, 0), http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *words: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(InputError, match="is no Ray job server"):
        open_server(f"http://{HOST}:{server.server_port}")
    server.shutdown()
    server.server_close()
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:1"
    make_folder(tmp_path / "pool", ["a/0.png"])
    assert run(["submit", job().job, "--address", f"{HOST}:{free_port()}"]) == 1
    assert "error: no Ray job server answers" in capsys.readouterr().err
    assert run(["submit", job().job, "--address", "nowhere:1", "--dry-run"]) == 0
    assert "coresift embed " in capsys.readouterr().out


# --- a real one


@pytest.fixture(scope="module")
def cluster():
    with short_folder() as folder, LocalCluster(folder) as cluster:
        cluster.add_node()
        cluster.add_node()
        yield cluster


def command(words, cluster, **environment):
    given = {**os.environ, "PYTHONPATH": str(ROOT), **cluster.env, **environment}
    return {"args": [sys.executable, "-m", "cli", *words], "cwd": ROOT, "env": given, "text": True}


def done(words, cluster, **environment):
    return subprocess.run(**command(words, cluster, **environment), capture_output=True, timeout=300, check=False)


def picks(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for name in ("picks.parquet", "ids.txt", "indices.json")
        for file in sorted(folder.rglob(name))
    }


@pytest.mark.slow
def test_the_same_picks_here_and_there(cluster, job, tmp_path):
    make_folder(tmp_path / "pool", [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(60)])
    file = job().job
    assert run(["run", file, "--set", f"out={tmp_path}/here", "--set", "resources.workers=0", "--quiet"]) == 0
    sent = done(["submit", file, "--address", cluster.url], cluster)
    assert sent.returncode == 0, sent.stderr
    assert "[3/3] picks/coreset: " in sent.stdout
    assert len(picks(tmp_path / "here")) == 6
    assert picks(tmp_path / "here") == picks(tmp_path / "out")
    again = done(["submit", file, "--address", cluster.url, "--json"], cluster)
    facts = json.loads(again.stdout)
    assert (facts["state"], facts["exit_code"], facts["out"]) == ("succeeded", 0, str(tmp_path / "out"))
    assert facts["job"].endswith("-2")
    assert "3 steps done (3 done before)" in again.stderr
    listed = json.loads(done(["status", "--address", cluster.url, "--json"], cluster).stdout)
    assert {found["job"]: found["state"] for found in listed["jobs"]}[facts["job"]] == "succeeded"


@pytest.mark.slow
def test_the_connection_is_lost_and_the_job_goes_on(cluster, job, tmp_path):
    make_folder(tmp_path / "pool", [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(60)])
    file, wait, end = job().job, tmp_path / "python.sh", tmp_path / "end"
    proxy = Proxy(cluster.dashboard_port)
    through = f"http://{HOST}:{proxy.port}"
    # a job that goes on until it may end: what follows it is never too late
    until = f"until test -e {shlex.quote(str(end))}; do sleep 0.2; done"
    wait.write_text(f'{shlex.quote(sys.executable)} "$@"; code=$?; {until}; exit $code')
    sent = ["submit", file, "--address", through, "--python", f"sh {shlex.quote(str(wait))}"]
    follower = subprocess.Popen(
        **command([*sent, "--patience", "3"], cluster),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    seen = next(line for line in follower.stdout if "[1/3] features: coresift embed" in line)
    proxy.cut()
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert f"connection to {through} lost" in err
    assert "The job goes on; look at it again: coresift logs small-" in err
    job_id = err.rsplit("coresift logs ", 1)[1].split()[0]
    proxy.mend()
    other = subprocess.Popen(**command(sent, cluster), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert f"{job_id}: runs already" in other.stderr.readline()
    assert seen in iter(other.stdout.readline, "")
    interrupt(other)
    _, err = other.communicate(timeout=60)
    assert other.returncode == 130
    assert f"the job goes on; look at it again: coresift logs {job_id}" in err
    watcher = subprocess.Popen(
        **command(["logs", job_id, "--address", through, "--follow"], cluster), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    time.sleep(8)
    proxy.cut()
    time.sleep(3)
    proxy.mend()
    end.touch()
    out, err = watcher.communicate(timeout=300)
    assert watcher.returncode == 0, err
    assert out.count("[1/3] features: coresift embed") == 1
    assert out.count("[3/3] picks/coreset: ") == 2
    whole = done(["logs", job_id, "--address", cluster.url], cluster).stdout
    assert out == whole + f"{job_id}: done\n"
    assert len(picks(tmp_path / "out")) == 6
    proxy.close()


@pytest.mark.slow
def test_what_goes_wrong_there_is_told_here(cluster, job, tmp_path):
    make_folder(tmp_path / "pool", ["a/0.png", "b/1.png"])
    file = job(JOB.replace("workers: 2", "workers: 0")).job
    failed = done(["submit", file, "--address", cluster.url], cluster)
    assert failed.returncode == 2
    assert "error: step 2 of 3, picks/kmeans (coresift select " in failed.stdout
    assert failed.stdout.splitlines()[-1].endswith(": failed, exit code 2")
    job_id = failed.stdout.splitlines()[-1].split(":")[0]
    followed = done(["logs", job_id, "--follow", "--address", cluster.url, "--json"], cluster)
    assert (followed.returncode, json.loads(followed.stdout)["exit_code"]) == (2, 2)
    log = json.loads(done(["logs", job_id, "--address", cluster.url, "--json"], cluster).stdout)["log"]
    assert log in followed.stderr
    facts = json.loads(done(["status", job_id, "--address", cluster.url, "--json"], cluster).stdout)
    assert (facts["state"], facts["exit_code"]) == ("failed", 2)
    told = done(["status", job_id, "--address", cluster.url], cluster)
    assert told.returncode == 0
    assert f"{job_id}: failed, exit code 2" in told.stdout
    for words in (["status"], ["logs"], ["logs", "--follow"], ["stop"]):
        unknown = done([words[0], "nonesuch", *words[1:], "--address", cluster.url], cluster)
        assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1), unknown.stderr
        assert "knows no job 'nonesuch'" in unknown.stderr
    stop = json.loads(done(["stop", job_id, "--address", cluster.url, "--json"], cluster).stdout)
    assert (stop["job"], stop["stopped"]) == (job_id, False)
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    refused = done(["status", "--address", cluster.url], cluster, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "wants another token" in refused.stderr


@pytest.mark.slow
def test_a_job_is_stopped_and_goes_on_when_it_is_submitted_again(cluster, job, tmp_path):
    make_folder(tmp_path / "pool", [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(60)])
    file = job().job
    begun = json.loads(done(["submit", file, "--address", cluster.url, "--no-follow", "--json"], cluster).stdout)
    assert begun["new"]
    stopped = done(["stop", begun["job"], "--address", cluster.url], cluster)
    assert "stopping; what is done is kept" in stopped.stdout
    followed = done(["logs", begun["job"], "--follow", "--address", cluster.url], cluster)
    assert followed.returncode == 1
    assert "was stopped; submitted again it goes on" in followed.stderr
    again = done(["submit", file, "--address", cluster.url], cluster)
    assert again.returncode == 0, again.stderr
    assert len(picks(tmp_path / "out")) == 6
