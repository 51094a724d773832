"""Every command that the README shows is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from cli.main import VERBS, app
from cli.options import OUTPUT_FLAGS
from engine.recipes import recipe_names
from engine.schema import build_options
from engine.verbs import EmbedOptions, RoundsOptions, SelectOptions
from jobs.jobfile import shipped

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = typer.main.get_command(app)


def lines():
    """Yield each command: of the fenced blocks, whose lines may go on after a backslash, and those in the text."""
    for block in re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if part.strip().startswith("coresift "):
                    yield shlex.split(part, comments=True)
    for text in re.findall(r"`(coresift [^`]+)`", TEXT):
        if "\n" not in text:
            yield shlex.split(text)


def options_of(words):
    """Return a command's options as it would get them."""
    name, *arguments = words[1:]
    assert name in VERBS, f"no verb {name!r}"
    context = COMMANDS.commands[name].make_context(name, arguments)
    given = {key: value for key, value in context.params.items() if value is not None and key not in OUTPUT_FLAGS}
    return build_options(VERBS[name][0], given, f"coresift {name}")


@pytest.mark.parametrize("words", list(lines()), ids=lambda words: " ".join(words)[:60])
def test_every_command_is_taken(words):
    if words[-1] in ("--help", "PATH") or len(words) == 2:
        assert words[1].startswith("-") or words[1] in VERBS
        return
    options = options_of(words)
    if isinstance(options, (EmbedOptions, SelectOptions, RoundsOptions)):
        assert options.out
    if getattr(options, "recipe", None):
        assert options.recipe in recipe_names()
    if words[1] in ("run", "submit", "plan"):
        assert options.job in shipped() or options.job.endswith(".yaml")


def test_there_are_as_many_as_are_seen():
    assert len(list(lines())) > 50


@pytest.mark.parametrize("script", ["sampler", "eval_knn", "eval_lincls", "active_sampler", "finetune", "trainer_DP"])
def test_the_scripts_of_the_papers_have_a_line(script):
    assert re.search(rf"^\|[^|]*{script}\.py[^|]*\| `coresift ", TEXT, re.MULTILINE)


def test_every_shipped_job_is_named():
    assert [name for name in shipped() if f"`{name}`" not in TEXT and name != "quickstart"] == []
