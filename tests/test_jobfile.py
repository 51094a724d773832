"""The job file: what it means, what is refused and how, and the steps that come of it."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from cli.options import verb
from engine.schema import InputError, build_options, fields_of
from engine.verbs import JOB_VERBS, VERBS
from jobs.expand import expand
from jobs.overlay import load
from jobs.yamltext import parse_yaml, to_yaml

JOB = """
pool: pools/train.parquet
out: results
data: {test: pools/test.parquet, ks: [1, 5], below: "${pool}.d"}
resources: {workers: 2:64, memory-per-shard: 1GiB}
steps:
  - embed: {encoder: pixels, max-rejected: 0.5%}
    as: features
  - embed: {pool: $data.test, encoder: pixels}
    as: test-features
  - for: {strategy: [random, kmeans], budget: [0.5%, 1e3], seed: [0, 1]}
    steps:
      - select: {features: $features, strategy: $strategy, budget: $budget}
        as: picks
      - evaluate: {subject: $features, selection: $picks, test: "${test-features}", neighbors: $data.ks, metrics: [knn]}
        as: worth
table:
  step: worth
  metric: knn_1
  rows: strategy
  columns: budget
  published: {random: [77.3, 82.2], kmeans: [83.0, null]}
small:
  pool: pools/tiny
  for: {budget: ["10"], seed: [0]}
  steps: {features: {max_rejected: 1%, pixels-size: 4}}
"""


@pytest.fixture
def write(tmp_path):
    def job(text):
        (tmp_path / "my job.yaml").write_text(text)
        return str(tmp_path / "my job.yaml")

    return job


def steps_of(job, small=False, sets=()):
    return {step.label: step for step in expand(load(job, small, sets))}


def changed(old, new):
    assert JOB.count(old) == 1, old
    return JOB.replace(old, new)


# --- YAML


def test_words_stay_what_they_are():
    text = "a: 2:64\nb: 1e3\nc: no\nd: 0.5%\ne: 007\nf: ~\ng:\nh: 'null'\ni: [on, 1_000, 2024-01-01, .5, 0x10]\n"
    found = {"a": "2:64", "b": "1e3", "c": "no", "d": "0.5%", "e": "007", "f": None, "g": None, "h": "null"}
    found["i"] = ["on", "1_000", "2024-01-01", ".5", "0x10"]
    assert parse_yaml(text, "f") == found
    assert parse_yaml(to_yaml(found), "f") == found
    assert parse_yaml("x: &a {k: 1}\ny: *a", "f") == {"x": {"k": "1"}, "y": {"k": "1"}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pool: a\npool: b", "f, line 2, column 1: 'pool' is given twice"),
        ("steps:\n  - embed: {seed: 1, seed: 2}", "f, line 2, column 22: 'seed' is given twice"),
        ("a: [1, 2", "f, line 1, column 9: "),
        ("a: b: c", "f, line 1, column 5: mapping values are not allowed here"),
        ("a: !!python/object/apply:os.system [ls]", "f, line 1, column 4: tag"),
        ("a: &x [*x]", "f, line 1, column 4: an alias to what it is part of"),
        ("? [1]\n: 2", "f, line 1, column 3: a key must be a word"),
        ("a: 1\n---\nb: 2", "f, line 2, column 1: "),
    ],
)
def test_what_is_no_job_is_refused_by_line_and_column(text, told):
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "f")
    assert str(caught.value).startswith(told)


# --- steps


def test_loops_references_and_defaults(write):
    steps = steps_of(write(JOB))
    passes = [f"{s}-{b}-{n}" for s in ("random", "kmeans") for b in ("0.5pct", "1e3") for n in (0, 1)]
    assert list(steps) == ["features", "test-features", *(f"{name}/{p}" for p in passes for name in ("picks", "worth"))]
    features, test, picks = steps["features"], steps["test-features"], steps["picks/kmeans-0.5pct-1"]
    assert (features.options.pool, features.options.out) == ("pools/train.parquet", "results/features")
    assert (features.options.workers, features.options.seed, test.options.pool) == ("2:64", 0, "pools/test.parquet")
    assert (picks.options.features, picks.options.budget, picks.options.seed) == ("results/features", "0.5%", 1)
    assert (picks.options.workers, picks.options.memory_per_shard) == (None, "1GiB")
    worth = steps["worth/kmeans-0.5pct-1"]
    assert worth.options.selection == picks.out == "results/picks/kmeans-0.5pct-1"
    assert (worth.options.neighbors, worth.options.metrics) == ((1, 5), ("knn",))
    assert worth.reads == ("features", "picks/kmeans-0.5pct-1", "test-features")
    assert load(write(JOB)).name == "my-job"


def test_a_step_is_the_command_that_it_says(write):
    """Every option comes back from its words through the command line's own parser."""
    import click
    import typer

    text = changed("neighbors: $data.ks", "neighbors: $data.ks, linear-epochs: 3").replace(
        "budget: $budget}", "budget: $budget, option: {tau: 0.5, x: [1, 2]}, normalize: false}"
    )
    for step in expand(load(write(text)), "10.0.0.1:6379"):
        parsed = []
        app = typer.Typer()
        app.command()(verb(VERBS[step.verb].options, lambda options, flags, parsed=parsed: parsed.append(options), step.verb))
        with contextlib.suppress(click.exceptions.Exit):
            app(step.words[2:], standalone_mode=False)
        assert parsed == [step.options]
    assert "--option tau=0.5 --option x=1,2 --no-normalize" in steps_of(write(text))["picks/random-1e3-0"].command


def test_a_step_outside_of_a_loop_reads_all_of_its_passes(write):
    text = """
out: s3://bucket/out?endpoint_override=host:1
steps:
  - for: {seed: [0, 1]}
    steps: [rounds: {subject: x, strategy: random, oracle: column, test: y}]
  - curves: {runs: $rounds}
    as: all
  - curves: {runs: [a=elsewhere, $rounds]}
    as: more
  - for: {seed: [1, 2]}
    steps:
      - curves: {runs: $rounds, metric: $seed}
        as: own
  - select: {features: $all/x/y, strategy: random, budget: [5, 1%]}
"""
    with pytest.raises(InputError, match=r"steps\[3\].steps\[0\].curves.runs is '\$rounds', and there is no 'rounds'"):
        steps_of(write(text))
    steps = steps_of(write(text.replace("seed: [1, 2]", "seed: [1]")))
    runs = tuple(f"s3://bucket/out/rounds/{seed}?endpoint_override=host:1" for seed in (0, 1))
    assert steps["all"].options.runs == runs
    assert steps["more"].options.runs == ("a=elsewhere", *runs)
    assert steps["own/1"].options.runs == runs[1:]
    assert [steps[f"rounds/{seed}"].options.seed for seed in (0, 1)] == [0, 1]
    assert steps["select"].options.features == "s3://bucket/out/all/x/y?endpoint_override=host:1"
    assert steps["select"].options.budget == "5,1%"
    with pytest.raises(InputError, match=r"select.features is '\$rounds': rounds stands for 2 values here, and this takes one"):
        steps_of(write(text.replace("$all/x/y", "$rounds").replace("seed: [1, 2]", "seed: [1]")))


def test_workers_of_the_job_train_nothing(write):
    text = "pool: p\nout: o\nresources: {workers: 3, gpus_per_worker: 1}\nsteps:\n  - embed:\n  - finetune: {selection: all}\n"
    steps = steps_of(write(text + "  - select: {features: $embed, strategy: random, budget: 5}\n"))
    assert [steps[name].options.workers for name in ("embed", "finetune", "select")] == ["3", 0, 3]
    assert steps["finetune"].options.gpus_per_worker == 1


# --- what lies over the file


def test_small_and_set(write):
    job = write(JOB)
    sets = ("steps.picks.option.iterations=3", "for.strategy=[kmeans]", "data.test=t", "resources.workers=null", "out=o")
    steps = steps_of(job, True, sets)
    assert list(steps) == ["features", "test-features", "picks/kmeans-10-0", "worth/kmeans-10-0"]
    features = steps["features"].options
    assert (features.pool, features.max_rejected, features.pixels_size, features.workers) == ("pools/tiny", "1%", 4, None)
    assert steps["picks/kmeans-10-0"].options.option == ("iterations=3",)
    assert steps["test-features"].options.pool == "t"
    assert steps["features"].out == "o/features"
    table = load(job, True).table
    assert table is not None
    assert table.published["random"] == {"0.5%": 77.3, "1e3": 82.2}  # of the file's own budgets, not of small's
    again = load(write(load(job, True, sets).as_yaml()))
    assert expand(again) == list(steps.values())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("pol=x", "--set unknown key pol, did you mean 'pool'? (one of: name, pool, out"),
        ("pool", "--set 'pool' is not of the form KEY=VALUE"),
        ("steps.feature.seed=1", "--set steps.feature.seed: no step 'feature', did you mean 'features'? (steps: features, "),
        ("for.budgets=[1]", "no loop over 'budgets', did you mean 'budget'? (variables: strategy, budget, seed)"),
        ("for.budget=1", "--set for.budget: it takes a list: [A, B]"),
        ("seed=x", "--set seed is 'x': it takes a whole number"),
        ("steps.picks.budgit=1", "unknown key steps[2].steps[0].select.budgit, did you mean 'budget'?"),
        ("out=null", "out is missing"),
    ],
)
def test_a_bad_set_is_named(write, given, told):
    with pytest.raises(InputError) as caught:
        steps_of(write(JOB), sets=(given,))
    assert told in str(caught.value)


# --- what is refused


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: []\nout: o", ["steps is empty: it takes one or more"]),
        ("steps:\n  - embed:\n", ["out is missing"]),
        ("[1]", ["is no job file"]),
        (
            changed("out: results", "outt: x\nout: results\nseeds: 1"),
            ["unknown key outt, did you mean 'out'?", "unknown key seeds"],
        ),
        (
            changed("embed: {encoder", "embd: {encoder"),
            ["steps[0]: unknown verb 'embd', did you mean 'embed'? (one of: embed, "],
        ),
        (changed("    as: features", "    import: {file: x}"), ["steps[0]: a step is one verb"]),
        (
            changed("encoder: pixels, max", "encodr: pixels, max"),
            ["unknown key steps[0].embed.encodr, did you mean 'encoder'?"],
        ),
        (
            changed("max-rejected", "pixels-size"),
            ["steps[0].embed.pixels-size: option pixels_size is '0.5%': it takes a whole number"],
        ),
        (
            changed("max-rejected: 0.5%", "pooling: top"),
            ["steps[0].embed.pooling: option pooling is 'top'", "model, cls, mean"],
        ),
        (changed("max-rejected: 0.5%", "out: x"), ["steps[0].embed.out: a step's folder is OUT/<its name>"]),
        (changed("max-rejected: 0.5%", "address: x"), ["steps[0].embed.address: give --address to the command"]),
        (changed("max-rejected: 0.5%", "batch_size: 2, batch-size: 3"), ["steps[0].embed.batch-size is given twice"]),
        (changed("max-rejected: 0.5%", "split: {a: 1}"), ["steps[0].embed.split takes no keys and values"]),
        (changed("as: test-features", "as: features"), ["steps[0] and steps[1] are both called 'features'"]),
        (changed("as: test-features", "as: pool"), ["steps[1] is called 'pool', as something else is"]),
        (changed("as: test-features", "as: ../up"), ["steps[1].as is '../up': a name has letters"]),
        (changed("seed: [0, 1]", "seed: [0, 0]"), ["steps[2].for.seed: takes ['0', '0']: give one value or more, each once"]),
        (changed("seed: [0, 1]", "seed: [a b, a_b]"), ["two passes would write picks/random-0.5pct-a_b"]),
        (changed("seed: [0, 1]", "out: [0, 1]"), ["steps[2].for.out: the name is taken"]),
        (changed("features: $features", "features: $picks"), ["select.features is '$picks', and there is no 'picks' above it"]),
        (
            changed("selection: $picks", "selection: $pics"),
            ["evaluate.selection is '$pics'", "did you mean 'picks'? (one of: out, "],
        ),
        (changed("selection: $picks", "selection: $"), ["evaluate.selection is '$': a reference is $name or ${name}"]),
        (changed("$data.test", "$data.tset"), ["steps[1].embed.pool is '$data.tset'", "did you mean 'data.test'?"]),
        (changed("${pool}.d", "${pol}.d"), ["data.below is '${pol}.d'", "did you mean 'pool'?"]),
        (changed("workers: 2:64", "workrs: 2"), ["unknown key resources.workrs, did you mean 'workers'?"]),
        (
            changed("pool: pools/train.parquet\n", "").replace("${pool}", ""),
            ["steps[0].embed needs pool (the job has no pool)"],
        ),
        (changed("strategy: $strategy, ", ""), ["steps[2].steps[0].select needs strategy"]),
        (changed("step: worth", "step: wroth"), ["table.step is 'wroth', did you mean 'worth'?"]),
        (changed("step: worth", "step: features"), ["table.step is 'features', and embed has no metrics"]),
        (changed("rows: strategy", "rows: strategie"), ["table.rows is 'strategie', did you mean 'strategy'?"]),
        (changed("[77.3, 82.2]", "[77.3]"), ["table.published.random has 1 figures, budget 2 values"]),
        (changed("[77.3, 82.2]", "[77.3, a]"), ["table.published.random.1e3 is 'a': it takes a number"]),
        (changed("[77.3, 82.2]", "5"), ["table.published.random is '5': it takes keys and values"]),
        (
            changed("metric: knn_1", "metrik: knn_1"),
            ["unknown key table.metrik, did you mean 'metric'?", "table.metric is missing"],
        ),
        (changed("  pool: pools/tiny", "  pol: x"), ["unknown key small.pol, did you mean 'pool'?"]),
    ],
)
def test_each_problem_is_named_by_its_key(write, text, told):
    job = write(text)
    with pytest.raises(InputError) as caught:
        steps_of(job)
    for words in told:
        assert words in str(caught.value)


def test_all_problems_are_told_at_once(write):
    text = JOB.replace("encoder: pixels, max", "encodr: pixels, max").replace(
        "$strategy, budget: $budget", "$strtegy, seed: -1"
    )
    with pytest.raises(InputError) as caught:
        steps_of(write(text))
    for words in ("encodr", "select.strategy is '$strtegy'", "select.seed: option seed is -1: it must be at least 0"):
        assert words in str(caught.value)
    assert "$features" not in str(caught.value)  # a step that is wrong is there all the same


def test_which_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"job file none.yaml does not exist"):
        load("none.yaml")
    with pytest.raises(InputError, match=r"unknown job 'nonesuch'"):
        load("nonesuch")
    (tmp_path / "job").write_text(JOB)
    with pytest.raises(InputError, match=r"job is not called .yaml"):
        load("job")


# --- the table of verbs


def test_every_verb_of_the_table_is_there():
    for name, entry in VERBS.items():
        assert callable(entry.load())
        if name in JOB_VERBS:
            assert "out" in {field.name for field in fields_of(entry.options)}
    assert build_options(VERBS["demo"].options, {}, "demo").out == "coresift-demo"


def test_the_command_line_loads_no_yaml():
    code = "import sys, cli.main; sys.exit(bool({'yaml', 'pydantic', 'ray', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
