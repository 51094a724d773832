"""The verbs that only list what there is: strategies, encoders, recipes."""

from __future__ import annotations

from typing import Any

from cli import output
from engine.schema import fields_of
from engine.verbs import PreprocessingOptions

INPUTS = [field.name for field in fields_of(PreprocessingOptions)]
"""How a network's images are prepared."""


def strategies(options: Any, flags: dict[str, bool]) -> None:
    """List the strategies, what they read, and their options."""
    from engine.select import describe_strategies

    found = describe_strategies()
    if flags["json"]:
        output.print_json({"strategies": found})
        return
    for strategy in found:
        nested = "; nested: smaller budgets are prefixes" if strategy["nested"] else ""
        output.say(f"{strategy['name']}: {strategy['summary']} (reads {', '.join(strategy['reads']) or 'nothing'}{nested})")
        for option in strategy["options"]:
            output.say(f"    --option {option['name']}={option['default']}  {option['help']}")


def recipes(options: Any, flags: dict[str, bool]) -> None:
    """List the training recipes, where they come from, and all training options."""
    from engine.recipes import describe_options, describe_recipes, option_text

    recipes, options_of = describe_recipes(), describe_options()
    if flags["json"]:
        output.print_json({"recipes": recipes, "training_options": options_of})
        return
    for recipe in recipes:
        output.say(f"{recipe['name']}: {recipe['summary']} ({recipe['task']}: {recipe['model']}, weights {recipe['weights']})")
        inputs = [f"{name} {option_text(recipe[name])}" for name in INPUTS if name in recipe]
        told = [recipe["source"], *recipe["notes"], "inputs: " + ", ".join(inputs)]
        told += [" ".join(f"{name}={option_text(value)}" for name, value in recipe["options"].items())]
        for line in told:
            output.say(f"    {line}")
    for task, declared in options_of.items():
        output.say("\ntraining options of every task" if task == "all" else f"\n{task} only")
        for option in declared:
            choices = f" ({', '.join(option['choices'])})" if option["choices"] else ""
            output.say(f"    --option {option['name']}={option_text(option['default'])}  {option['help']}{choices}")


def encoders(options: Any, flags: dict[str, bool]) -> None:
    """List the encoders."""
    from engine.encoders import encoder_help, encoder_options
    from engine.recipes import option_text

    options_of = encoder_options()
    if flags["json"]:
        output.print_json({"encoders": encoder_help(), "encoder_options": options_of})
        return
    for name, text in encoder_help().items():
        output.say(f"{name}: {text}")
        for option in options_of.get(name, ()):
            choices = f" ({', '.join(option['choices'])})" if option["choices"] else ""
            output.say(f"    --encoder-option {option['name']}={option_text(option['default'])}  {option['help']}{choices}")
