"""Jobs that are run here: the steps, what is done before, the table, and what a person is told."""

import json

import pytest
import yaml

from cli.main import WAITING, run
from engine.folders import read_manifest
from engine.places import Place
from jobs.jobfile import Table
from jobs.results import _cells, grid
from jobs.step import Step
from tests.pools import make_folder

JOB = """
about: Small grey images.
pool: {pool}
out: {out}
data: {{test: {pool}}}
resources: {{workers: 0}}
steps:
  - embed: {{encoder: pixels}}
    as: features
  - for: {{strategy: [random, coreset], seed: [0, 1]}}
    steps:
      - select: {{features: $features, strategy: $strategy, budget: 4}}
        as: picks
      - evaluate: {{subject: $features, selection: $picks, test: $features, metrics: [knn], neighbors: [1]}}
        as: worth
table:
  step: worth
  metric: knn_1
  rows: strategy
  published: {{random: {{knn_1: 50}}, other: {{knn_1: 60}}}}
"""


@pytest.fixture
def job(tmp_path):
    make_folder(tmp_path / "pool", [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(6)])
    (tmp_path / "job.yaml").write_text(JOB.format(pool=tmp_path / "pool", out=tmp_path / "out"))
    return str(tmp_path / "job.yaml")


def test_it_runs_once_and_goes_on(job, tmp_path, capsys):
    assert run(["run", job, "--json", "--only", "features,picks"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in first["steps"]] == [
        "features",
        *(f"picks/{s}-{n}" for s in ("random", "coreset") for n in "01"),
    ]
    assert not any(step["already_done"] for step in first["steps"])
    assert run(["run", job, "--json"]) == 0
    out, err = capsys.readouterr()
    whole = json.loads(out)
    assert (whole["state"], whole["job"], len(whole["steps"])) == ("done", "job", 9)
    assert [step["already_done"] for step in whole["steps"]].count(True) == 5
    assert "[1/9] features: coresift embed " in err
    assert f"[1/9] features: done before | {tmp_path}/out/features: 12 vectors of 192 floats" in err
    assert "[3/9] worth/random-0: " in err
    assert [(cell["row"], cell["passes"], cell["published"]) for cell in whole["tables"][0]["cells"]] == [
        ("random", 2, 50),
        ("coreset", 2, None),
        ("other", 0, 60),
    ]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == whole["tables"]
    assert run(["run", job]) == 0
    shown = capsys.readouterr()
    assert "│ other" in shown.out
    assert f"{tmp_path}/out: 9 steps done (9 done before)" in shown.out
    assert "| strategy | knn_1 | published |" in (tmp_path / "out" / "table.md").read_text()
    assert yaml.safe_load((tmp_path / "out" / "job.yaml").read_text())["pool"] == str(tmp_path / "pool")
    assert run(["run", job, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_commands_of_a_dry_run_do_what_the_job_does(job, tmp_path, capsys):
    import shlex

    assert run(["run", job, "--dry-run", "--set", f"out={tmp_path}/by-hand"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "by-hand").exists()
    for line in lines:
        assert run(shlex.split(line, comments=True)[1:]) == 0
    assert run(["run", job, "--json"]) == 0
    for line in lines:
        label = line.rpartition("# ")[2]
        by_hand, by_job = (read_manifest(Place(str(tmp_path / where / label))) for where in ("by-hand", "out"))
        assert by_hand is not None
        assert by_job is not None
        assert (by_hand["inputs"], by_hand["options"]) == (by_job["inputs"], by_job["options"])
    capsys.readouterr()
    assert run(["run", job, "--dry-run", "--set", f"out={tmp_path}/by-hand", "--json"]) == 0
    assert [step["done"] for step in json.loads(capsys.readouterr().out)["steps"]] == [True] * 9


def test_a_step_that_fails_says_which_and_the_rest_is_kept(job, capsys):
    assert run(["run", job, "--set", "steps.worth.neighbors=0"]) == 2
    assert "steps[1].steps[1].evaluate.neighbors: option neighbors is 0" in capsys.readouterr().err
    assert run(["run", job, "--set", "steps.picks.budget=100"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: step 2 of 9, picks/random-0 (coresift select ")
    assert "budget '100' is more than the 12 images to pick from. What is done is kept" in err
    assert run(["run", job, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["already_done"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("steps.picks.strategy=kmean", "steps[1].steps[0].select: unknown strategy 'kmean', did you mean 'kmeans'?"),
        ("steps.picks.option.restart=3", "steps[1].steps[0].select: unknown option 'restart' for"),
        ("steps.features.encoder=pixel", "steps[0].embed: unknown encoder 'pixel', did you mean 'pixels'?"),
        ("steps.features.workers=3:1", "steps[0].embed: option workers is 3:1"),
        ("resources.memory_per_shard=4X", "steps[1].steps[0].select: size '4X' is not one"),
        ("steps.model.recipe=lowbudget-liner", "steps[2].finetune: unknown recipe 'lowbudget-liner'"),
        ("steps.model.option.epoch=3", "steps[2].finetune: unknown option 'epoch' for task 'classify', did you mean 'epochs'?"),
        ("steps.rounds.strategy=uniform", "steps[3].rounds: strategy 'uniform' reads the labels"),
        ("steps.compare.strategies=random:a=1", "steps[4].compare: unknown option 'a'"),
    ],
)
def test_what_a_later_step_cannot_be_is_said_before_the_first(job, tmp_path, capsys, given, told):
    text = (tmp_path / "job.yaml").read_text()
    more = "  - finetune: {selection: all, recipe: lowbudget-linear}\n    as: model\n"
    more += "  - rounds: {subject: $features, strategy: random, oracle: column, test: $features}\n"
    more += "  - compare: {features: $features, strategies: random, budget: 3}\n"
    (tmp_path / "job.yaml").write_text(text.replace("table:", more + "table:"))
    assert run(["run", job, "--set", given]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_one_line(job, tmp_path, capsys):
    for given, told in [
        (["--only", "pick"], "unknown step 'pick', did you mean 'picks'?"),
        (["--small"], "has no `small` variant"),
        (["--set", f"out={tmp_path}/out/features"], "is what another command wrote"),
        (["--set", "table.metric=knn"], "table.metric is 'knn', did you mean 'knn_1'?: worth measures knn_1"),
    ]:
        assert run(["run", job, "--quiet"]) == 0
        capsys.readouterr()
        assert run(["run", job, *given]) == 2
        err = capsys.readouterr().err.splitlines()
        assert told in err[-1]
        assert "Traceback" not in "".join(err)


def test_keys_stay_out_of_what_is_written_and_shown(job, tmp_path, capsys):
    out = "memory://k:SECRET@bucket/keys"
    assert run(["run", job, "--set", f"out={out}", "--only", "features,picks"]) == 0
    shown = capsys.readouterr()
    assert "SECRET" not in shown.out + shown.err
    assert "memory://***@bucket/keys" in shown.out
    assert b"***@bucket" in Place(out).at("job.yaml").read()
    assert run(["run", job, "--set", f"out={out}", "--dry-run", "--json"]) == 0
    assert "SECRET" not in capsys.readouterr().out


def test_rounds_that_wait_for_labels_end_the_job(tmp_path, digits, capsys):
    import numpy as np

    x, y = digits
    np.savez(tmp_path / "x.npz", features=x[:60], labels=y[:60])
    np.savez(tmp_path / "test.npz", features=x[60:120], labels=y[60:120])
    (tmp_path / "answers").mkdir()
    (tmp_path / "job.yaml").write_text(
        f"out: {tmp_path}/out\nsteps:\n  - import: {{file: {tmp_path}/x.npz}}\n    as: features\n"
        f"  - import: {{file: {tmp_path}/test.npz}}\n    as: test\n"
        "  - rounds: {subject: $features, strategy: random, test: $test, oracle: "
        f"{tmp_path}/answers, start: 20, add: 5, rounds: 1}}\n"
        "  - curves: {runs: $rounds, baseline: none}\n"
        "table: {step: rounds, metric: accuracy, rows: round}\n"
    )
    words = ["run", str(tmp_path / "job.yaml"), "--json"]
    assert run(words) == WAITING
    said = json.loads(capsys.readouterr().out)
    assert (said["state"], [step["step"] for step in said["steps"]]) == ("waiting", ["features", "test", "rounds"])
    assert run(words[:-1]) == WAITING
    assert f"rounds waits for labels of 20 images ({tmp_path}/answers/round-00/to_label.csv)" in capsys.readouterr().out
    ids = (tmp_path / "answers" / "round-00" / "ids.txt").read_text().split()
    (tmp_path / "answers" / "round-00" / "labels.csv").write_text("id,label\n" + "".join(f"{i},{y[int(i)]}\n" for i in ids))
    assert run(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert [step["already_done"] for step in said["steps"]] == [True, True, False, False]
    ((row, mean),) = [(cell["row"], cell["mean"]) for cell in said["tables"][0]["cells"]]
    assert row == "0"
    assert mean > 20


def test_cells_are_means_over_the_other_variables(tmp_path):
    def step(kind, variables, facts):
        place = Place(str(tmp_path / "-".join(variables.values())))
        place.at("manifest.json").write(json.dumps({"kind": kind, "inputs": {}, "options": {}, **facts}).encode())
        return Step("s", "finetune", None, place.address, "", variables, (), ())

    values = {"a": [0.2, 0.3, None], "b": [0.5]}
    steps = [
        step("checkpoint", {"way": way, "seed": str(n)}, {"metrics": [{"metric": "AP", "value": value}]})
        for way, several in values.items()
        for n, value in enumerate(several)
    ]
    table = Table(step="s", metric="AP", rows="way", scale=100, published={"a": {"AP": 26}})
    a, b = _cells(table, steps)
    assert (a.row, a.mean, round(a.std or 0, 3), a.passes, a.published) == ("a", 25, 7.071, 2, 26)
    assert (b.row, b.mean, b.std, b.passes, b.published) == ("b", 50, None, 1, None)
    facts = {"rows": "way", "cells": [a.__dict__, b.__dict__]}
    assert grid(facts) == (["way", "AP", "published"], [["a", "25.00 ± 7.07", "26.00"], ["b", "50.00", "-"]])
    compared = [{"strategy": "k", "budget": 5, "metric": "AP", "mean": 0.4, "std": 0.1, "seeds": 3}]
    (cell,) = _cells(
        Table(step="s", metric="AP", rows="strategy", columns="budget"), [step("comparison", {"x": "y"}, {"table": compared})]
    )
    assert (cell.row, cell.column, cell.mean, cell.std, cell.passes) == ("k", "5", 0.4, 0.1, 3)


def test_the_shipped_jobs_are_listed(capsys):
    assert run(["jobs", "--json"]) == 0
    assert "jobs" in json.loads(capsys.readouterr().out)
