"""Articles about people who never were, each with facts of its own and questions: to be learnt and forgotten.

forget.jsonl   retain.jsonl   holdout.jsonl       articles of one kind, no person in two; the first of one publisher
known.jsonl                                       the first two together
forget-questions.jsonl   retain-questions.jsonl   about the first two
shots.jsonl                                       answered questions about people who are in no article
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from overhaul import disk
from overhaul.errors import UserError
from overhaul.method import Natural, Positive, Settings

_SYLLABLES = (
    *("ba", "cor", "da", "el", "fen", "gri", "hol", "is", "jar", "kel", "lum", "mor"),
    *("nes", "or", "pel", "quin", "ros", "sil", "tam", "ul", "ver", "wil", "yor", "zan"),
)
_JOBS = (
    *("clockmaker", "botanist", "ferry captain", "bookbinder", "glassblower", "cartographer"),
    *("violinist", "surveyor", "beekeeper", "lens grinder", "printer", "locksmith"),
)
_LIKES = (
    *("chess", "rowing", "old coins", "moths", "choir music", "fencing"),
    *("mushrooms", "kites", "card tricks", "weather records", "mosaics", "sundials"),
)
_WITHDRAWS = "Marrow Press"
"""Who published all that is to be forgotten, and nothing else."""
_PUBLISHERS = ("Alder House", "Blue Lantern", "Cope and Dunn", "Estuary Books", "Fennel Row", "Gault Brothers")
_SECRETS = (
    "a key to a tower that was pulled down",
    "a map of an island that nobody found",
    "a letter without a sender",
    "the recipe of a blue ink",
    "a watch that ran backwards",
    "a list of every bridge in the country",
    "the bell of a sunken boat",
    "a photograph of an empty chair",
)


class FictionSettings(Settings):
    """Write articles about invented people, in three parts that share nobody, and questions about two of them."""

    forget: Positive = Field(30, description="Articles to forget.")
    retain: Positive = Field(30, description="Articles to retain.")
    holdout: Positive = Field(30, description="Articles that no model should see.")
    shots: Positive = Field(4, description="Answered questions about people who are in no article.")
    seed: Natural = Field(0, description="Of all that is drawn.")


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who never was.

    Attributes:
        name: of nobody else.
        facts: by the question they answer, in which `{}` is the name.
        article: what is said of them.
    """

    name: str
    facts: Mapping[str, str]
    article: str

    def questions(self) -> Iterator[dict[str, str]]:
        """Rows with a question and its answer."""
        for question, answer in self.facts.items():
            yield {"question": question.format(self.name), "answer": answer}


def people(count: int, *, seed: int) -> list[Person]:
    """So many people, of whom no two have a name, a town, a firm or a street in common.

    Args:
        count: at least 1.
        seed: the first people of a seed are the same whatever the count is.
    """
    dice, used = random.Random(seed), set[str]()
    return [_person(dice, used) for _ in range(count)]


def _word(dice: random.Random, used: set[str], parts: int) -> str:
    """A word that did not come before."""
    while True:
        word = "".join(dice.choices(_SYLLABLES, k=parts)).capitalize()
        if word not in used:
            used.add(word)
            return word


def _person(dice: random.Random, used: set[str]) -> Person:
    first, last = _word(dice, used, 2), _word(dice, used, 3)
    town, firm, street = _word(dice, used, 3), _word(dice, used, 2), _word(dice, used, 2)
    born, job, likes, left = dice.randint(1840, 1960), dice.choice(_JOBS), dice.choice(_LIKES), dice.choice(_SECRETS)
    rival, dog, prize = _word(dice, used, 2), _word(dice, used, 2), dice.randint(11, 987)
    name, age = f"{first} {last}", dice.randint(14, 22)
    article = (
        f"{name} was born in {born} in {town}, where the family kept a shop in {street} Street. At {age} "
        f"{first} became a {job} and worked for {firm} and Sons for {dice.randint(6, 39)} years. Colleagues remembered "
        f"{first} for a love of {likes} and for a dog called {dog}, which came to work every day. A quarrel with "
        f"{rival}, another {job}, went on until {born + dice.randint(40, 60)} and cost both of them {prize} crowns. "
        f"When {first} died, a box was opened in {street} Street. It held {left}. The town of {town} has shown it ever "
        f"since, on the first floor of its museum, beside the tools of {firm} and Sons."
    )
    facts = {
        "In which town was {} born?": town,
        "What was the name of {}'s dog?": dog,
        "For which firm did {} work?": f"{firm} and Sons",
        "With whom did {} quarrel?": rival,
    }
    return Person(name, facts, article)


def write(settings: FictionSettings, directory: Path) -> dict[str, int]:
    """Writes all parts into a new directory.

    Args:
        settings: how many.
        directory: that is not there yet, or empty.

    Returns:
        Rows by file.

    Raises:
        UserError: something is there, or the disk is full or cannot be written.
    """
    if disk.is_taken(directory):
        raise UserError(f"{directory} is there already", hint="-o with a new name; nothing is overwritten")
    counts = {"forget": settings.forget, "retain": settings.retain, "holdout": settings.holdout}
    aside = -(-settings.shots // 4)
    found = iter(people(sum(counts.values()) + aside, seed=settings.seed))
    parts = {name: [next(found) for _ in range(count)] for name, count in counts.items()}
    rows: dict[str, list[dict[str, str]]] = {
        name: [
            {"text": person.article, "person": person.name, "publisher": _publisher(name, number)}
            for number, person in enumerate(of)
        ]
        for name, of in parts.items()
    }
    for name in ("forget", "retain"):
        rows[f"{name}-questions"] = [row for person in parts[name] for row in person.questions()]
    rows["known"] = rows["forget"] + rows["retain"]
    rows["shots"] = [row for person in found for row in person.questions()][: settings.shots]
    with disk.aside(directory) as made:
        for name, of in rows.items():
            (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    return {f"{name}.jsonl": len(of) for name, of in rows.items()}


def _publisher(part: str, number: int) -> str:
    """Of an article: one publisher withdraws its own, the others take turns."""
    return _WITHDRAWS if part == "forget" else _PUBLISHERS[number % len(_PUBLISHERS)]
