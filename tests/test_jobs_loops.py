"""Loops whose values bring others along, several tables, merge keys and nulls in job files."""

import json

import pytest

from engine.places import Place
from engine.schema import InputError
from jobs.expand import expand
from jobs.overlay import load
from jobs.results import make_tables
from jobs.step import Step

JOB = """
pool: images
out: out
data: {split: val, size: null}
steps:
  - embed: &encoder {encoder: pixels, batch_size: 8, image_size: $data.size}
    as: features
  - embed:
      <<: *encoder
      batch_size: 4
      split: $data.split
    as: test
  - for:
      way:
        near: {rule: kmeans, extra: {restarts: 1}}
        any: {rule: random, extra: null}
      budget: {10: {number: 0}, 20: {number: 1}}
    steps:
      - select: {features: $features, strategy: $rule, option: $extra, budget: $budget, seed: $number}
        as: picks
  - for: {way: [near], budget: [10, 20]}
    steps:
      - evaluate: {subject: $features, selection: $picks, metrics: coverage}
        as: worth
tables:
  - {title: times, step: picks, metric: seconds, rows: way, columns: budget, published: {near: [1, 2], other: [3, null]}}
  - {step: [worth], metric: emd, rows: way, only: {budget: 20}, scale: 100}
small:
  data: {split: null}
  for: {budget: {5: {number: 7}}}
"""


@pytest.fixture
def write(tmp_path):
    def at(text):
        (tmp_path / "job.yaml").write_text(text)
        return str(tmp_path / "job.yaml")

    return at


def test_values_bring_others_along(write):
    steps = expand(load(write(JOB)))
    picks = [step for step in steps if step.name == "picks"]
    assert [step.out for step in picks] == [f"out/picks/{name}" for name in ("near-10", "near-20", "any-10", "any-20")]
    assert [(s.options.strategy, s.options.option, s.options.budget, s.options.seed) for s in picks] == [
        ("kmeans", ("restarts=1",), "10", 0),
        ("kmeans", ("restarts=1",), "20", 1),
        ("random", (), "10", 0),
        ("random", (), "20", 1),
    ]
    assert picks[0].variables == {"way": "near", "budget": "10"}


def test_merge_keys_and_nulls(write):
    features, test, *_ = expand(load(write(JOB)))
    assert (features.options.batch_size, features.options.split, features.options.image_size) == (8, None, None)
    assert (test.options.encoder, test.options.batch_size, test.options.split) == ("pixels", 4, "val")
    assert "image_size" not in test.given


def test_small_and_set_replace_a_loop(write):
    job = write(JOB)
    small = [step for step in expand(load(job, small=True)) if step.name in ("test", "picks", "worth")]
    assert small[0].options.split is None
    assert [step.label for step in small[1:]] == ["picks/near-5", "picks/any-5", "worth/near-5"]
    assert small[1].options.seed == 7
    given = load(job, sets=("for.way={near: {rule: coreset, extra: null}}", "data.split=null"))
    assert {step.options.strategy for step in expand(given) if step.name == "picks"} == {"coreset"}
    again = load(write(given.as_yaml()))
    assert [step.command for step in expand(again)] == [step.command for step in expand(given)]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "any: {rule: random, extra: null}",
            "any: {rule: random}",
            "way: takes near, any: each must bring the same names along",
        ),
        ("way: [near]", "way: []", "steps[3].for.way: it takes one value or more"),
        ("way: [near]", "way: near", "steps[3].for.way: it takes a list: [A, B]"),
        ("{number: 0}, 20: {number: 1}", "{way: 0}, 20: {way: 1}", "for.budget.10.way: the name is taken"),
        ("<<: *encoder", "<<: text", "<< takes keys and values"),
        ("[1, 2], other", "[1], other", "tables[0].published.near has 1 figures, budget 2 values (10, 20)"),
        ("step: [worth]", "step: [worth, test]", "tables[1].step is 'test', and embed has no metrics"),
        ("only: {budget: 20}", "only: {bugdet: 20}", "tables[1].only is 'bugdet', did you mean 'budget'?"),
        ("title: times, ", "titel: times, ", "unknown key tables[0].titel, did you mean 'title'?"),
    ],
)
def test_what_is_wrong_is_named(write, old, new, told):
    assert old in JOB
    with pytest.raises(InputError) as caught:
        expand(load(write(JOB.replace(old, new, 1))))
    assert told in str(caught.value)


def test_a_set_of_data_that_there_is_not(write):
    with pytest.raises(InputError, match=r"--set data.splt: no data 'splt', did you mean 'split'\? \(data: split, size\)"):
        load(write(JOB), sets=("data.splt=x",))


def test_several_tables(tmp_path, write):
    steps = []
    for step in expand(load(write(JOB.replace("out: out", f"out: {tmp_path}/out")))):
        steps.append(step)
        kind = {"select": "selection", "evaluate": "metrics"}.get(step.verb, "features")
        budget = float(step.variables.get("budget", 0))
        facts = {"time": {"seconds_s": budget / 10}, "metrics": [{"metric": "emd", "value": budget / 100}]}
        Place(step.out).at("manifest.json").write(json.dumps({"kind": kind, "inputs": {}, "options": {}, **facts}).encode())
    times, distances = make_tables(load(write(JOB.replace("out: out", f"out: {tmp_path}/out"))), steps)
    assert times["title"] == "times"
    assert [(c["row"], c["column"], c["mean"], c["published"]) for c in times["cells"]] == [
        *(("near", "10", 1, 1), ("near", "20", 2, 2), ("any", "10", 1, None), ("any", "20", 2, None)),
        ("other", "10", None, 3),
    ]
    assert [(c["row"], c["column"], c["mean"]) for c in distances["cells"]] == [("near", "emd", 20)]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == [times, distances]


def test_labels_saved_are_a_figure_of_curves(tmp_path, write):
    job = write(
        f"out: {tmp_path}/out\nsteps:\n  - for: {{rival: [a, b]}}\n    steps:\n"
        "      - curves: {runs: [x, y], baseline: $rival}\n        as: saved\n"
        "table: {step: saved, metric: saved, rows: rival, only: {strategy: ours}, published: {best: {saved: 12}}}\n"
    )
    steps: list[Step] = expand(load(job))
    for number, step in enumerate(steps):
        saved = [{"strategy": name, "mean": 10.0 * number + i, "std": 1.5, "seeds": 3} for i, name in enumerate(("ours", "c"))]
        facts = {"kind": "curves", "inputs": {}, "options": {}, "saved": saved, "metric": "top1", "table": []}
        Place(step.out).at("manifest.json").write(json.dumps(facts).encode())
    (table,) = make_tables(load(job), steps)
    assert [(c["row"], c["mean"], c["std"], c["passes"], c["published"]) for c in table["cells"]] == [
        *(("a", 0, 1.5, 3, None), ("b", 10, 1.5, 3, None)),
        ("best", None, None, 0, 12),
    ]
