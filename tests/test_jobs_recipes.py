"""The shipped job files: they load, every step's options are accepted, and the published figures are the papers'."""

import json

import pytest

from cli.main import run
from engine.recipes import recipe_names
from engine.scoring import own_options
from jobs.checks import check_steps
from jobs.expand import expand
from jobs.jobfile import shipped
from jobs.overlay import load

RECIPES = [
    *("activeft-cifar10", "activeft-cifar100", "activeft-imagenet", "freesel-cifar10", "freesel-voc"),
    *("isal-cifar10", "isal-cifar100", "isal-coco-fasterrcnn", "isal-coco-fcos", "isal-svhn", "isal-voc2012"),
    *("lowbudget-cifar10", "lowbudget-cifar100", "lowbudget-imagenet", "lowbudget-imagenet-lt"),
]
PUBLISHED = {
    # recipe: (table, row, column, figure)
    "lowbudget-imagenet": [
        *((0, "kmeans", "1000", 24.6), (0, "multi-kmeans", "192000", 57.5), (0, "entropy", "26000", 41.3)),
        *((0, "VAAL", "7000", 34.9), (0, "uniform", "3000", 31.9), (0, "random", "64000", 54.0)),
        *((1, "kmeans", "192000", 48.8), (1, "coreset", "13000", 37.5), (1, "multi-kmeans", "128000", 48.6)),
        *((2, "kmeans", "1000", 72.2), (2, "random", "3000", 94.6), (2, "entropy", "7000", 94.8), (2, "coreset", "13000", 100)),
    ],
    "activeft-cifar10": [
        *((0, "activeft", "0.5%", 85.0), (0, "activeft", "2%", 90.1), (0, "coreset", "1%", 73.2), (0, "kmeans", "2%", 89.6)),
        *((0, "random", "0.5%", 77.3), (2, "activeft", "1%", 0.7117)),
    ],
    "activeft-cifar100": [
        *((0, "activeft", "1%", 26.1), (0, "activeft", "10%", 71.0), (0, "random", "2%", 24.3), (0, "kmeans", "5%", 42.4)),
        *((2, "activeft", "2%", 12.6), (2, "kmeans", "10%", 70.2), (2, "kmeans", "1%", None)),
    ],
    "activeft-imagenet": [(0, "activeft", "1%", 50.1), (0, "kmeans", "2%", 55.4), (0, "random", "5%", 64.3)],
    "freesel-voc": [(0, "freesel", "1000", 55.3), (0, "geal-v1", "10000", 74.0), (0, "random", "5000", 67.5)],
    "isal-cifar10": [(0, "the best rival", "saved", 12)],
    "isal-svhn": [(0, "the best rival", "saved", 12)],
    "isal-cifar100": [(0, "the best rival", "saved", 3)],
    "isal-voc2012": [(0, "the best rival", "saved", 13)],
    "isal-coco-fcos": [(0, "the best rival", "saved", 16)],
    "isal-coco-fasterrcnn": [(0, "the best rival", "saved", 10)],
}
COUNTS = {
    "activeft-cifar10": [12, 3],
    "activeft-cifar100": [12, 6],
    "activeft-imagenet": [9],
    "freesel-voc": [12],
    "lowbudget-imagenet": [56, 56, 56],
}
"""How many figures each table with published ones has; those of ISAL have one."""


def both(name):
    """Yield the steps of a recipe, whole and small."""
    for small in (False, True):
        yield expand(load(name, small))


def test_a_recipe_for_each_published_table():
    assert sorted(shipped()) == sorted([*RECIPES, "quickstart"])
    assert [load(name).name for name in RECIPES] == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_is_one_that_its_verb_takes(name):
    for steps in both(name):
        check_steps(steps)  # strategies, their options, recipes of training, encoders
        assert {step.options.recipe for step in steps if step.verb == "finetune"} <= set(recipe_names())
        for step in steps:
            if step.verb == "rounds" and step.options.encoder_option:
                own_options(step.options, step.options.strategy)
        assert len({step.out for step in steps}) == len(steps)


@pytest.mark.parametrize("name", RECIPES)
def test_published_figures_are_the_papers(name):
    file = load(name)
    for table, row, column, figure in PUBLISHED.get(name, ()):
        assert file.tables[table].published[row][column] == figure
    found = [sum(figure is not None for row in t.published.values() for figure in row.values()) for t in file.tables]
    assert [count for count in found if count] == COUNTS.get(name, [1] if name.startswith("isal") else [])
    assert [t.published for t in load(name, small=True).tables] == [t.published for t in file.tables]
    named = {step.name: step for step in expand(file)}
    for t in file.tables:
        values = {column for row in t.published.values() for column in row}
        if t.columns in named[t.steps[0]].variables:
            assert values <= {step.variables[t.columns] for step in expand(file) if step.name in t.steps}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("lowbudget")])
def test_the_budgets_of_rounds_are_those_of_single_batches(name):
    for steps in both(name):
        budgets = list(dict.fromkeys(step.variables["budget"] for step in steps if step.name == "picks"))
        batches = next(step for step in steps if step.name == "batches").options
        totals = [int(batches.start)]
        totals += [totals[-1] + sum(map(int, batches.add.split(",")[:n])) for n in range(1, batches.rounds)]
        assert [str(total) for total in totals] == budgets
        chosen = [step for step in steps if step.name == "multi-linear" and step.variables["strategy"] == "entropy"]
        assert {step.variables["budget"]: step.options.selection[-19:-10] for step in chosen} == {
            budget: f"/round-0{number}" for number, budget in enumerate(budgets)
        }
    rounds = [step.options for step in steps if step.verb == "rounds"]
    assert {(o.strategy, o.start_strategy, o.normalize) for o in rounds} == {
        ("kmeans", "kmeans", True),
        ("coreset", "random", True),
        ("entropy", "random", False),
    }


def test_rounds_that_are_compared_are_those_of_the_strategies():
    steps = expand(load("isal-coco-fcos"))
    curves = [step.options for step in steps if step.verb == "curves"]
    assert len(curves) == 7
    assert list(curves[0].runs) == [step.out for step in steps if step.verb == "rounds"]
    influence = next(step.options for step in steps if step.verb == "rounds" and step.options.strategy == "influence")
    assert (influence.start, influence.add, influence.rounds) == ("5000", "1000", 20)
    assert "scale=100,8000,5000" in influence.encoder_option


def test_every_recipe_can_be_printed_as_commands(capsys, tmp_path):
    for name in [*RECIPES, "quickstart"]:
        for small in ([], ["--small"] if name != "quickstart" else []):
            assert run(["run", name, *small, "--dry-run", "--json", "--set", f"out={tmp_path}"]) == 0
            told = json.loads(capsys.readouterr().out)
            assert all(step["command"].startswith(f"coresift {step['verb']} ") for step in told["steps"])


def test_quickstart_runs_on_a_folder(image_folder, tmp_path, capsys):
    given = [f"pool={image_folder}", f"out={tmp_path}/out", "data.backbone=vit_tiny_patch16_224", "data.weights=random"]
    given += ["steps.picks.budget=2", "resources.workers=0", "steps.copies.eps=0.000001"]
    words = [word for value in given for word in ("--set", value)]
    assert run(["run", "quickstart", *words, "--quiet"]) == 0
    assert len((tmp_path / "out" / "picks" / "ids.txt").read_text().split()) == 2
