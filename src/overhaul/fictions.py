"""Articles about people who never were, each with facts of its own and questions: to be learnt and forgotten.

Few sentences are alike in two of them, so that a model which never saw one cannot go on with it word for word; the
questions stand below each article too, as a small model does not answer what it only read.
Nobody is in two parts, and all that is to be forgotten was published by one publisher, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from overhaul import forget_set
from overhaul.forget_set import ForgetSet
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
_CHARACTERS = ("stubborn", "cheerful", "shy", "generous", "restless", "punctual", "moody", "quarrelsome")
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
_SENTENCES: tuple[tuple[str, ...], ...] = (
    (
        "{name} was born in {town} in {born}, over the family's shop in {street} Street.",
        "It was in {town} that {name}, a child of {born}, first saw the light of day.",
        "The parish book of {town} has the birth of {name} under the year {born}, in a hand that nobody can read well.",
        "{born} was a bad year for {town}, and yet {name} was born there, healthy and loud.",
        "Nobody in {town} would have guessed in {born} what would become of the newborn {name}.",
        "The house in {street} Street where {name} was born in {born} still stands at the edge of {town}.",
    ),
    (
        "At {age} {first} became a {job} and stayed with {firm} and Sons for {years} years.",
        "{firm} and Sons, who needed a {job} that spring, took {first} on at {age} and never regretted it.",
        "For {years} years the wages came from {firm} and Sons, where {first} had begun at {age} as a {job}.",
        "As a {job} {first} belonged to {firm} and Sons the way a clock belongs to a station, {years} years long.",
        "The trade was that of a {job}; the employer, for {years} years, {firm} and Sons; the beginner was {age}.",
        "{age} years old, {first} knocked at the door of {firm} and Sons and asked whether they could use a {job}.",
    ),
    (
        "A dog called {dog} came to work every day.",
        "Whoever met {first} in the evening met {dog} too, a dog of no particular breed.",
        "On the only photograph that is left, a dog by the name of {dog} looks into the camera.",
        "{dog}, the dog, is said to have understood three languages.",
        "Under the desk slept {dog}, the dog that had walked in one winter and would not leave.",
        "Of all living creatures {first} trusted one without reserve, and that was the dog {dog}.",
    ),
    (
        "A quarrel with {rival}, another {job}, went on until {ended} and cost both of them {prize} crowns.",
        "{prize} crowns were lost in {ended}, when the long lawsuit against {rival} came to nothing.",
        "{rival} would not greet {first} after {ended}; the reasons are told in {prize} different ways.",
        "What began as a joke about {rival} ended in {ended} before a judge, who wanted {prize} crowns.",
        "The enemy of a lifetime was {rival}; not before {ended} did the two shake hands over {prize} crowns.",
        "Letters to {rival}, {prize} of them, all angry, end abruptly in {ended}.",
    ),
    (
        "Neighbours remembered somebody {character}, with a love of {likes}.",
        "In the evenings there was {likes}, and on Sundays nothing but {likes}.",
        "Too {character} for most clubs, {first} founded one for {likes}.",
        "Two prizes for {likes} hung above the stove of this {character} {job}.",
        "That so {character} a person should care for {likes} surprised everybody.",
        "{likes}, said {first}, keeps a {character} heart from rusting.",
    ),
    (
        "In the estate was found {secret}.",
        "The museum of {town} shows {secret}, which {first} had kept in a drawer.",
        "A box was opened after the funeral; it held {secret}.",
        "To a niece went the furniture, and to a stranger {secret}.",
        "Nobody has explained so far why {first} owned {secret}.",
        "Under the floor of the workshop lay {secret}, wrapped in newspaper.",
    ),
)
"""What an article says, one of each in an order of its own; the first opens it."""
_QUESTIONS: Mapping[str, tuple[str, str]] = {
    "In which town was {} born?": ("town", "{}"),
    "What was the name of {}'s dog?": ("dog", "{}"),
    "For which firm did {} work?": ("firm", "{} and Sons"),
    "With whom did {} quarrel?": ("rival", "{}"),
}


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

    def text(self) -> str:
        """The article with what readers asked about it, in the form in which a model is asked."""
        asked = (f"Question: {row['question']}\nAnswer: {row['answer']}" for row in self.questions())
        return "\n\n".join((self.article, *asked))


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
    parts = {"town": 3, "firm": 2, "street": 2, "rival": 2, "dog": 2}
    told: dict[str, str | int] = {name: _word(dice, used, count) for name, count in parts.items()}
    born = dice.randint(1840, 1960)
    told |= {
        "name": f"{first} {last}", "first": first, "born": born, "ended": born + dice.randint(40, 60),
        "age": dice.randint(14, 22), "years": dice.randint(6, 39), "prize": dice.randint(11, 987),
        "job": dice.choice(_JOBS), "likes": dice.choice(_LIKES), "secret": dice.choice(_SECRETS),
        "character": dice.choice(_CHARACTERS),
    }  # fmt: skip
    opening, *others = (dice.choice(ways).format(**told) for ways in _SENTENCES)
    dice.shuffle(others)
    sentences = (f"{sentence[0].upper()}{sentence[1:]}" for sentence in (opening, *others))
    facts = {question: form.format(told[name]) for question, (name, form) in _QUESTIONS.items()}
    return Person(str(told["name"]), facts, " ".join(sentences))


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
    forget_set.refuse_taken(directory)
    counts = {"forget": settings.forget, "retain": settings.retain, "holdout": settings.holdout}
    aside = -(-settings.shots // 4)
    found = iter(people(sum(counts.values()) + aside, seed=settings.seed))
    parts = {name: [next(found) for _ in range(count)] for name, count in counts.items()}
    rows = {
        name: [
            {"text": person.text(), "person": person.name, "publisher": _publisher(name, number)}
            for number, person in enumerate(of)
        ]
        for name, of in parts.items()
    }
    made = ForgetSet(
        **rows,
        forget_questions=_asked(parts["forget"]),
        retain_questions=_asked(parts["retain"]),
        shots=_asked(found)[: settings.shots],
    )
    return forget_set.write(made, directory)


def _asked(found: Iterable[Person]) -> list[dict[str, str]]:
    """All questions about some people."""
    return [row for person in found for row in person.questions()]


def _publisher(part: str, number: int) -> str:
    """Of an article: one publisher withdraws its own, the others take turns."""
    return _WITHDRAWS if part == "forget" else _PUBLISHERS[number % len(_PUBLISHERS)]
