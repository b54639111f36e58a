from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from overhaul.errors import UserError, UserErrors, did_you_mean, from_pydantic
from overhaul.method import Settings, Share


class Lamp(Settings):
    """A lamp."""

    watts: int = Field(gt=0)
    colour: str = "white"


def mistakes(**fields: object) -> list[UserError]:
    with pytest.raises(ValidationError) as caught:
        Lamp(**fields)  # pyright: ignore[reportArgumentType]
    return from_pydantic(caught.value, where="lamp", fields=Lamp.model_fields)


def test_an_error_says_what_was_given_what_is_allowed_and_what_to_type():
    error = UserError("sparsity 1.7", allowed="between 0 and 1", hint="--sparsity 0.5")

    assert str(error) == "sparsity 1.7\nallowed: between 0 and 1\ntry: --sparsity 0.5"
    assert str(UserError("no")) == "no"


def test_several_errors_are_one_with_all_texts():
    several = UserErrors([UserError("one", hint="a"), UserError("two")])

    assert str(several) == "one\ntry: a\n\ntwo"
    assert isinstance(several, UserError)


@pytest.mark.parametrize(("word", "said"), [("wand", "did you mean 'wanda'?"), ("zzz", "")])
def test_did_you_mean(word: str, said: str):
    assert did_you_mean(word, ["wanda", "magnitude"]) == said


def test_pydantic_mistakes_are_told_in_this_projects_words():
    unknown, missing = sorted(mistakes(color="red"), key=str)

    assert str(unknown) == "lamp has no field 'color'\nallowed: colour, watts\ntry: did you mean 'colour'?"
    assert missing.given == "lamp needs 'watts'"
    assert [error.given for error in mistakes(watts=-1)] == ["lamp: watts = -1: input should be greater than 0"]


@pytest.mark.parametrize(("given", "hint"), [(50, "share 0.5, if percent was meant"), (1.7, ""), (-1, "")])
def test_a_share_in_percent_gets_the_share_as_a_hint(given: float, hint: str):
    class Part(Settings):
        share: Share

    with pytest.raises(ValidationError) as caught:
        Part(share=given)

    [error] = from_pydantic(caught.value, where="part", fields=Part.model_fields)
    assert error.hint == hint


def test_every_mistake_is_told():
    assert len(mistakes(watts="bright", colour=3, size=2)) == 3
