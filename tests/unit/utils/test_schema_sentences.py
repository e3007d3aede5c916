"""The one formatter of schema errors: which error is told, and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field, ValidationError

from peft_lab.errors import ConfigError, TaskError
from peft_lab.utils.schema import Schema, check


def _even(value: int) -> int:
    if value % 2:
        raise ConfigError(f"{value} is odd; take {value + 1}.")
    return value


class Recipe(Schema):
    title: str
    portions: Annotated[int, Field(ge=1, le=100)] = 4
    heat: Literal["low", "medium", "high"] = "low"
    salt: Annotated[float, Field(gt=0)] = 1.0
    vegan: bool = False
    steps: Annotated[tuple[str, ...], Field(strict=False)] = ()
    eggs: Annotated[int, AfterValidator(_even)] = 2
    notes: Mapping[str, str] = {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"potions": 3}, 'unknown key "potions" in a recipe. Did you mean "portions"? Known: title, portions, heat, '),
        ({True: 3}, 'unknown key "True" in a recipe.'),
        ({"title": ...}, 'the key "title" is missing in a recipe.'),
        ({"title": 12}, '"title" in a recipe must be text, not a whole number (\'12\'). Put it in quotes: "12".'),
        ({"title": None}, '"title" in a recipe must be text, not empty.'),
        ({"portions": "four"}, "\"portions\" in a recipe must be a whole number, not text ('four')."),
        ({"portions": True}, "\"portions\" in a recipe must be a whole number, not true or false ('True')."),
        ({"portions": 2.5}, "\"portions\" in a recipe must be a whole number, not a number ('2.5')."),
        ({"portions": 0}, '"portions" in a recipe must be at least 1, not 0.'),
        ({"portions": 101}, '"portions" in a recipe must be at most 100, not 101.'),
        ({"salt": 0}, '"salt" in a recipe must be over 0, not 0.'),
        ({"salt": float("nan")}, '"salt" in a recipe must be over 0, not nan.'),
        ({"heat": "hihg"}, '"heat" in a recipe must be one of low, medium, high, not "hihg". Did you mean "high"?'),
        ({"vegan": "yes"}, "\"vegan\" in a recipe must be true or false, not text ('yes')."),
        ({"steps": "stir"}, "\"steps\" in a recipe must be a list, not text ('stir')."),
        ({"steps": ["stir", 3]}, "\"steps.1\" in a recipe must be text, not a whole number ('3')."),
        ({"notes": ["a"]}, '"notes" in a recipe must be a mapping, not a list.'),
        ({"eggs": 3}, "3 is odd; take 4."),
    ],
)
def test_an_error_is_one_sentence(change: dict[Any, Any], sentence: str) -> None:
    values = {key: value for key, value in ({"title": "soup"} | change).items() if value is not ...}
    with pytest.raises(TaskError) as raised:
        check(Recipe, values, "a recipe", TaskError)
    assert str(raised.value).startswith(sentence)
    assert "\n" not in str(raised.value)


def test_the_first_error_is_told_unknown_keys_before_missing_ones_before_wrong_values() -> None:
    for values, sentence in [
        ({"portions": "x", "herb": 1}, 'unknown key "herb"'),
        ({"portions": "x"}, '"title" is missing'),
        ({"portions": "x", "title": "y", "heat": "z"}, '"portions" in a recipe must be'),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            check(Recipe, values, "a recipe", ConfigError)


@pytest.mark.parametrize("values", [None, "soup", ["soup"], 3])
def test_other_values_than_a_mapping_are_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match="a recipe must be a mapping of keys to values, not "):
        check(Recipe, values, "a recipe", ConfigError)


def test_a_checked_mapping_becomes_an_object_that_cannot_change() -> None:
    found = check(Recipe, {"title": "soup", "salt": 2, "steps": ["stir"]}, "a recipe", ConfigError)
    assert (found.salt, found.steps, found.heat) == (2.0, ("stir",), "low")
    with pytest.raises(ValidationError, match="frozen"):
        found.title = "stew"
