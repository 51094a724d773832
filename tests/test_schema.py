"""Options, budgets, and the words of their errors."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from engine.schema import (
    InputError,
    Opt,
    build_options,
    fields_of,
    lookup,
    nearest,
    parse_budgets,
    parse_decode_workers,
    parse_pairs,
    parse_workers,
    result_options,
)

# --- budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", [1]),
        ("1000", [1000]),
        (" 7 ", [7]),
        ("1_000", [1000]),
        ("10.0", [10]),
        ("100,500,1%", [100, 500, 10]),
        ("500,100", [500, 100]),
        ("10, 10,1%", [10]),
        ("2%", [20]),
        ("0.25%", [3]),
        ("0.1%", [1]),
        ("0.05%", [1]),
        ("33.3 %", [333]),
        ("100%", [1000]),
    ],
)
def test_budgets(text, expected):
    assert parse_budgets(text, 1000, 1000) == expected


def test_a_percentage_is_of_the_pool_and_a_count_may_not_exceed_what_is_left():
    assert parse_budgets("10%,600", 1000, 600) == [100, 600]
    with pytest.raises(InputError, match=r"budget '601' is more than the 600 eligible images \(of 1000\) to pick from"):
        parse_budgets("601", 1000, 600)
    with pytest.raises(InputError, match=r"budget '61%' is more than the 600 eligible images \(of 1000\)"):
        parse_budgets("61%", 1000, 600)


def test_percentages_are_exact():
    assert parse_budgets("0.29%", 10_000, 10_000) == [29]  # 0.29 * 100 is 28.999... in binary
    assert parse_budgets("1.15%", 10_000, 10_000) == [115]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "'0' must be positive"),
        ("0%", "'0%' must be positive"),
        ("-5", "'-5' must be positive"),
        ("-1%", "'-1%' must be positive"),
        ("abc", "'abc' is neither a count (1000) nor a percentage (2%)"),
        ("1.5", "'1.5' is neither a count"),
        ("", "'' is neither a count"),
        ("10,,20", "'' is neither a count"),
        ("nan", "'nan' is neither a count"),
        ("inf%", "'inf%' is neither a count"),
        ("10 %%", "'10 %%' is neither a count"),
        ("1001", "'1001' is more than the 1000 images to pick from"),
        ("100,2000", "'2000' is more than the 1000 images"),
        ("1e30", "'1e30' is more than the 1000 images"),
        ("101%", "'101%' is more than 100%"),
        ("0.04%", "'0.04%' of 1000 images is less than one image"),
    ],
)
def test_budgets_that_are_none(text, words):
    with pytest.raises(InputError) as caught:
        parse_budgets(text, 1000, 1000)
    assert words in str(caught.value)


# --- options


@dataclass(frozen=True, kw_only=True)
class Options:
    name: Annotated[str, Opt("Required.", positional=True)]
    steps: Annotated[int, Opt("Whole number.", min=0, max=10)] = 5
    rate: Annotated[float, Opt("Number.", min=0.5)] = 1.0
    mode: Annotated[str, Opt("One of.", choices=("fast", "exact"))] = "fast"
    exact: Annotated[bool, Opt("Flag.")] = False
    size: Annotated[int | None, Opt("Perhaps.", max=64)] = None
    means: Annotated[tuple[float, ...] | None, Opt("Several.")] = None
    kinds: Annotated[tuple[str, ...], Opt("Several of.", choices=("a", "b"))] = ("a",)
    quiet_mode: Annotated[bool, Opt("Not part of the result.", result=False)] = False


def build(**given):
    return build_options(Options, {"name": "x", **given}, "test")


def test_defaults_stand():
    assert build() == Options(name="x")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", "7", 7),
        ("steps", 10, 10),
        ("rate", "0.5", 0.5),
        ("rate", 2, 2.0),
        ("mode", "exact", "exact"),
        ("exact", "true", True),
        ("exact", "No", False),
        ("exact", True, True),
        ("size", "64", 64),
        ("size", None, None),
        ("means", "0.5", (0.5,)),
        ("means", "0.1,0.2,0.3", (0.1, 0.2, 0.3)),
        ("means", [1, 2], (1.0, 2.0)),
        ("kinds", "b,a", ("b", "a")),
        ("kinds", ["b"], ("b",)),
        ("quiet-mode", "1", True),
    ],
)
def test_values_are_converted(name, value, expected):
    found = getattr(build(**{name: value}), name.replace("-", "_"))
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("steps", "many", "option steps is 'many': it takes a whole number"),
        ("steps", "2.5", "option steps is '2.5': it takes a whole number"),
        ("steps", 2.5, "option steps is 2.5: it takes a whole number"),
        ("steps", None, "option steps is None: it takes a whole number"),
        ("steps", "11", "option steps is 11: it must be 0 to 10"),
        ("steps", -1, "option steps is -1: it must be 0 to 10"),
        ("rate", "fast", "option rate is 'fast': it takes a number"),
        ("rate", "0.4", "option rate is 0.4: it must be at least 0.5"),
        ("rate", "nan", "option rate is nan: it must be at least 0.5"),
        ("size", "65", "option size is 65: it must be at most 64"),
        ("mode", "exakt", "option mode is 'exakt', did you mean 'exact'? (one of: fast, exact)"),
        ("exact", "perhaps", "option exact is 'perhaps': it takes true or false"),
        ("means", "0.1,x", "option means is 'x': it takes a number"),
        ("means", "", "option means is '': it takes a number"),
        ("kinds", "a,z", "option kinds is 'z' (one of: a, b)"),
        ("step", "1", "unknown option 'step' for test, did you mean 'steps'? (its options: name, steps, rate"),
        ("zzzzzz", "1", "unknown option 'zzzzzz' for test (its options: name"),
    ],
)
def test_values_that_do_not_fit(name, value, words):
    with pytest.raises(InputError) as caught:
        build(**{name: value})
    assert words in str(caught.value)


def test_one_bare_value_where_several_may_stand_is_taken_or_refused():
    """A job file or a caller in Python may give 0.5 for (0.5,)."""
    try:
        outcome = build(means=0.5).means
    except InputError as error:
        outcome = str(error)
    assert outcome == (0.5,) or "means is 0.5" in outcome


def test_missing_options_are_named():
    with pytest.raises(InputError, match="test needs name"):
        build_options(Options, {}, "test")


def test_an_owner_without_options_says_so():
    @dataclass(frozen=True)
    class Nothing:
        """No options."""

    with pytest.raises(InputError, match=r"unknown option 'a' for it \(its options: none\)"):
        build_options(Nothing, {"a": "1"}, "it")


def test_fields_in_order_with_their_opts():
    fields = fields_of(Options)
    assert [f.name for f in fields][:3] == ["name", "steps", "rate"]
    assert [f.required for f in fields] == [True] + [False] * 8
    assert (fields[1].type, fields[1].default, fields[1].opt.max) == (int, 5, 10)


def test_options_that_make_the_result():
    assert result_options(build(means="0.5,1")) == {
        "steps": 5,
        "rate": 1.0,
        "mode": "fast",
        "exact": False,
        "size": None,
        "means": (0.5, 1.0),
        "kinds": ("a",),
    }


# --- names


def test_lookup():
    table = {"kmeans": 1, "coreset": 2, "random": 3}
    assert lookup("coreset", table, "strategy") == 2
    with pytest.raises(InputError) as caught:
        lookup("kmean", table, "strategy")
    assert str(caught.value) == "unknown strategy 'kmean', did you mean 'kmeans'? (one of: coreset, kmeans, random)"
    with pytest.raises(InputError) as caught:
        lookup("zzz", table, "strategy")
    assert str(caught.value) == "unknown strategy 'zzz' (one of: coreset, kmeans, random)"


def test_nearest():
    assert nearest("selct", ["embed", "select"]) == ", did you mean 'select'?"
    assert nearest("x", ["embed", "select"]) == ""


def test_pairs():
    assert parse_pairs(["a=1", "b=x=y", "c="], "--option") == {"a": "1", "b": "x=y", "c": ""}


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["a"], "--option 'a' is not of the form name=value"),
        (["=1"], "--option '=1' is not of the form name=value"),
        (["a=1", "a=2"], "--option 'a' is given twice: '1' and '2'"),
    ],
)
def test_pairs_that_are_none(pairs, words):
    with pytest.raises(InputError) as caught:
        parse_pairs(pairs, "--option")
    assert str(caught.value) == words


# --- workers


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (0, (0, 0)), ("0", (0, 0)), (3, (3, 3)), ("4", (4, 4)), ("2:9", (2, 9)), ("5:5", (5, 5))],
)
def test_workers(given, expected):
    assert parse_workers(given) == expected


@pytest.mark.parametrize("given", ["-1", "0:3", "5:2", "two", "", ":", "1:", ":2", "1:2:3", "1.5"])
def test_workers_that_are_none(given):
    with pytest.raises(InputError) as caught:
        parse_workers(given)
    assert f"option workers is {given}: it must be at least 0 (a number of actors, 0 for this process)" in str(caught.value)
    assert "MIN:MAX with 1 <= MIN <= MAX" in str(caught.value)


@pytest.mark.parametrize(("given", "expected"), [("auto", None), (0, 0), ("3", 3)])
def test_decode_workers(given, expected):
    assert parse_decode_workers(given) == expected


@pytest.mark.parametrize("given", ["-1", "some", "1:2", ""])
def test_decode_workers_that_are_none(given):
    with pytest.raises(InputError, match=f"option decode_workers is {given}: it must be at least 0, or auto"):
        parse_decode_workers(given)
