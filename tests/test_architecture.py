"""The house's walls: who may import whom, how long a module may be, and what --help must not load."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
WALL = 400

FLOORS = [
    {"engine", "engine.masks"},
    {"engine.schema", "engine.arrays"},
    {
        "engine.verbs",
        "engine.decode",
        "engine.canonical",
        "engine.draws",
        "engine.products",
        "engine.retry",
        "engine.phash",
        "engine.hamming",
    },
    {
        "engine.nearest",
        "engine.blocks",
        "engine.flows",
        "engine.influence",
        "engine.probe",
        "engine.places",
        "engine.session",
        "engine.pictures",
    },
    {"engine.folders", "engine.ledger", "engine.page"},
    {"engine.store"},
    {"engine.reading", "engine.copies", "engine.infeasible", "engine.where"},
    {"engine.shards", "engine.sources", "engine.weights", "engine.patterns", "engine.inputs", "engine.selections"},
    {"engine.reuse", "engine.former"},
    {"engine.backbones", "engine.checks", "engine.chosen", "engine.chunks", "engine.classes", "engine.images"},
    {"engine.labels"},
    {"engine.records", "engine.tasks"},
    {"engine.checkpoints", "engine.gather"},
    {"engine.models", "engine.reference"},
    {"engine.predictors", "engine.scorers"},
    {"engine.stability", "engine.scoring"},
    {"engine.encoders", "engine.parts", "engine.recipes"},
    {"engine.runner", "engine.placement", "engine.pipeline", "engine.conditions", "engine.whiten"},
    {"engine.embed", "engine.ingest", "engine.select", "engine.training"},
    {"engine.predict", "engine.finetune", "engine.semdedup"},
    {"engine.leaks"},
    {"engine.evaluate_model"},
    {"engine.evaluate", "engine.dedup", "engine.export", "engine.oracles"},
    {"engine.curves"},
    {
        "engine.answers",
        "engine.api",
        "engine.assess",
        "engine.compare",
        "engine.info",
        "engine.rounds",
        "engine.verify",
    },
    {"engine.demo", "engine.report"},
    {"jobs"},
    {"cli"},
]
"""From the ground up: a module imports only from floors below its own."""

IN_SELECT = {
    "engine.arrays",
    "engine.blocks",
    "engine.canonical",
    "engine.draws",
    "engine.ledger",
    "engine.nearest",
    "engine.products",
    "engine.schema",
    "engine.shards",
}
"""What a method may see, beside other methods."""

ROUND_METHODS = {f"engine.select.{name}" for name in ("strategies", "given", "written")}
"""Modules of engine.select that are no methods: what `select` is made of."""

ONLY_THERE = {
    "ray": {
        "jobs.cluster",
        "engine.session",
        "engine.shards",
        "engine.chunks",
        "engine.pipeline",
        "engine.gather",
        "engine.training.launch",
    },
    "timm": {
        "engine.backbones",
        "engine.encoders",
        "engine.inputs",
        "engine.tasks.augment",
        "engine.tasks.classifier",
        "engine.training.loop",
        "engine.training.rates",
    },
    "plotly": {"engine.page"},
    "jinja2": {"engine.page"},
    "pydantic": {"jobs.jobfile", "jobs.overlay", "jobs.references", "jobs.expand", "jobs.yamltext"},
    "yaml": {"jobs.yamltext"},
    "typer": {"cli.main", "cli.options", "cli.jobs"},
    "rich": {"cli.output"},
}
"""Libraries that a few rooms know and no others."""

VERBS = {
    "engine.verbs",
    *(
        f"engine.verbs.{name}"
        for name in (
            "shared",
            "assess",
            "copies",
            "curves",
            "export",
            "features",
            "scoring",
            "table",
            "training",
            "report",
            "rounds",
        )
    ),
}
LIGHT = {"engine", "engine.masks", "engine.schema", "engine.session", *VERBS}
LIGHT |= {
    "cli",
    "cli.main",
    "cli.options",
    "cli.output",
    "cli.conditions",
    "cli.export",
    "cli.listings",
    "cli.report",
    "cli.results",
    "cli.session",
    "cli.jobs",
    "cli.plans",
    "cli.__main__",
}
LIGHT |= {"jobs", "jobs.options", "jobs.plan_options"}
"""What `coresift --help` loads."""


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for package in ("engine", "cli", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@functools.cache
def imports(path: Path, top_level: bool = False) -> set[str]:
    """Return the modules a file imports; our own as modules, not as the names taken from them."""
    tree = ast.parse(path.read_text())
    known = modules()
    names: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            names |= inside or {node.module}
    return names


def room(module: str) -> str:
    """Return the name under which a module stands in FLOORS: a package is one room."""
    for package in (
        "engine.answers",
        "engine.export",
        "engine.select",
        "engine.sources",
        "engine.tasks",
        "engine.training",
        "engine.verbs",
        "engine.rounds",
        "engine.page",
        "engine.report",
        "cli",
        "jobs",
    ):
        if module == package or module.startswith(package + "."):
            return package
    return module


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_every_module_has_its_place() -> None:
    places = set().union(*FLOORS)
    assert {room(name) for name in modules()} == places


def test_imports_only_go_down() -> None:
    wrong = [
        f"{name} -> {other}"
        for name, path in modules().items()
        for other in imports(path)
        if other in modules() and room(other) != room(name) and floor(other) >= floor(name)
        if (name, other) != ("engine", "engine.api")  # names for notebooks, looked up when they are asked for
    ]
    assert not wrong


def test_a_method_sees_arrays_only() -> None:
    for name, path in modules().items():
        if name.startswith("engine.select.") and name not in ROUND_METHODS:
            ours = {other for other in imports(path) if other in modules()}
            assert {o for o in ours if not o.startswith("engine.select.")} <= IN_SELECT, name
            assert "engine.select" not in ours, f"{name} imports the table that names it"


def test_no_cycles_among_methods() -> None:
    known = {name: {o for o in imports(path) if o.startswith("engine.select.")} for name, path in modules().items()}
    state: dict[str, int] = {}

    def visit(name: str) -> None:
        assert state.get(name) != 1, f"a cycle through {name}"
        if name not in state:
            state[name] = 1
            for other in known.get(name, ()):
                visit(other)
            state[name] = 2

    for name in known:
        visit(name)


def test_libraries_stay_in_their_rooms() -> None:
    for library, rooms in ONLY_THERE.items():
        users = {name for name, path in modules().items() if any(i.split(".")[0] == library for i in imports(path))}
        assert users <= rooms, library


def test_help_loads_nothing_heavy() -> None:
    allowed = {"__future__", "cli", "engine", "typer", "rich"}  # of jobs, its options alone
    import sys

    for name in LIGHT:
        for other in imports(modules()[name], top_level=True):
            assert other in LIGHT or other.split(".")[0] in allowed | set(sys.stdlib_module_names), f"{name} imports {other}"


def test_modules_stay_below_the_wall() -> None:
    long = {name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > WALL}
    assert not long


def test_functions_stay_short() -> None:
    long = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{name}.{node.name}: {(node.end_lineno or 0) - node.lineno + 1}")
    assert not long


def test_nothing_reaches_outside_the_checkout() -> None:
    for name, path in modules().items():
        assert "shared/" not in path.read_text(), f"{name} reads test data"
