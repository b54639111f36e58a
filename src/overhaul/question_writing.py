"""Questions with answers as training text: by rule or by a model that reads pages, sieved, with where each came from.

After Llama-3-SynE (Chen et al., 2024): a model is shown a piece of a page and writes a question with an answer. Which
models wrote theirs, and by what they were filtered, is not published in detail; the filters here are our own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator

from overhaul import disk, question_templates
from overhaul.answers import is_right
from overhaul.corpora import CorpusSpec, every_row, open_corpus
from overhaul.documents import SHAPES, Row, as_plain_text, json_line, read_columns
from overhaul.errors import UserError, did_you_mean
from overhaul.method import Fraction, Natural, Positive, Rate, Settings, Share
from overhaul.on_disk import RowsOnDisk
from overhaul.question_sieve import Forbidden, PairSieve, is_question
from overhaul.question_templates import DEFINITIONS, KINDS, LEAST, Pair, definitions_in
from overhaul.questions import TASKS, questions

TEMPLATES = "templates"
ROUND = 32
"""Pairs that are made before it is looked at how many of them are of use."""
FEWEST_TOKENS = 64
"""Of a page that a model must be able to read beside the examples."""
SHOWN = (
    (
        "Copper is a soft metal. It melts at 1085 degrees Celsius and carries heat and electricity well.",
        "At what temperature does copper melt?",
        "Copper melts at 1085 degrees Celsius.",
    ),
    (
        "The library opened in 1921 with 400 books. By 1930 it had 1000 more, most of them gifts.",
        "How many books did the library have by 1930?",
        "400 + 1000 = 1400. Answer: 1400",
    ),
    (
        "Bees that have found flowers dance on the comb. The dance tells the others direction and distance.",
        "Why do bees dance on the comb?",
        "They tell the other bees where they have found flowers.",
    ),
)
"""Page, question and answer that a model sees before a page: small models follow a pattern sooner than an order."""


class QuestionWriting(Settings):
    """Questions with answers, by rule or by a model, as JSON lines to train on, with a ledger beside."""

    generator: str = Field(TEMPLATES, description=f"{TEMPLATES}, or a model that writes about the pages of --seeds.")
    kinds: tuple[str, ...] = Field(
        ("arithmetic", "units"), description=f"Of the templates: one or more of {', '.join(KINDS)}."
    )
    count: Positive = Field(1000, description="Pairs to write, beside those held out.")
    heldout: Natural = Field(0, description="Pairs for a test file that shares no question with the others.")
    seed: Natural = Field(0, description="Of every random choice.")
    largest: int = Field(
        100,
        ge=LEAST,
        description="Largest number that a template draws; products, sums and numbers in small units are larger.",
    )
    seeds: str | None = Field(None, description="Corpus whose training part is asked about: a name or a path.")
    field: str | None = Field(None, description="Column of --seeds that holds the text.")
    against: tuple[str, ...] = Field((), description="Tests: files, corpora, or tasks of measure choice.")
    run_words: Positive = Field(8, description="Words in a row that no pair may have in common with a test.")
    longest: Positive = Field(600, description="Characters of a question, and of an answer, at most.")
    most_dropped: Share = Field(0.9, description="Share of what was made that may be dropped; beyond it is an error.")
    page_words: Positive = Field(120, description="Of a page that a model sees, at most.")
    examples: str | None = Field(
        None, description="Table with text, question, answer: what a model sees first; none means three of our own."
    )
    tokens: Positive = Field(64, description="Of a question, and of an answer, that a model writes, at most.")
    temperature: Rate = Field(0.7, description="Of a model's samples.")
    top_p: float = Field(
        0.95, gt=0, le=1, description="Of a model's samples: the likeliest tokens of this share are drawn from."
    )
    agree: Natural = Field(0, description="Answers of a model to the question alone that are compared; 0: none.")
    agree_share: Fraction = Field(0.5, description="Share of them that must be the answer that was written.")
    overlap: Fraction = Field(0.0, description="Share of the answer's words that the page must have.")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="Of matrix products.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N.")

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            hint = "".join(f"\n{did_you_mean(kind, KINDS)}" for kind in unknown[:1])
            raise ValueError(f"name at least one kind\nallowed: {', '.join(KINDS)}{hint}")
        return tuple(dict.fromkeys(kinds))

    def shown(self) -> tuple[tuple[str, ...], ...]:
        """Text, question and answer of what a model sees first; `UserError` where --examples has other columns."""
        return SHOWN if self.examples is None else tuple(read_columns(self.examples, ("text", "question", "answer")))

    @property
    def is_by_rule(self) -> bool:
        """Whether no model is asked."""
        return self.generator == TEMPLATES

    def refuse_unread(self) -> None:
        """Raises `UserError` for settings that the generator would not look at, and for pages that are missing."""
        of_models = (
            *("page_words", "examples", "tokens", "temperature", "top_p", "agree", "agree_share", "overlap"),
            *("dtype", "device"),
        )
        unread = of_models if self.is_by_rule else ("kinds", "largest")
        given = self.model_dump(exclude_defaults=True)
        flags = [f"--{name.replace('_', '-')}" for name in unread if name in given]
        if flags:
            raise UserError(f"--generator {self.generator} does not read {', '.join(flags)}", hint="leave it out")
        reads_pages = not self.is_by_rule or DEFINITIONS in self.kinds
        if reads_pages and self.seeds is None:
            what = f"--kinds {DEFINITIONS}" if self.is_by_rule else "a model"
            raise UserError(f"{what} writes about pages, and there are none", hint="--seeds CORPUS")
        if self.seeds is not None and not reads_pages:
            raise UserError(f"nothing reads --seeds {self.seeds}", hint=f"--kinds {DEFINITIONS}, or --generator MODEL")
        if "field" in given and self.seeds is None:
            raise UserError(f"--field {self.field} is of --seeds, and there are none", hint="leave it out")
        if "agree_share" in given and not self.agree:
            raise UserError("--agree-share is of --agree", hint="--agree 5")


@dataclass(frozen=True, slots=True)
class Page:
    """A text to ask about, and where it stands: the id of its row, and the row's number among those for training."""

    text: str
    id: str
    row: int

    def source(self, corpus: str, words: tuple[int, int] | None = None) -> dict[str, Any]:
        """Plain data: the corpus, the page, and which of its words were shown, from 0, without the last."""
        told: dict[str, Any] = {"corpus": corpus, "page": self.id, "row": self.row}
        return told | ({"words": list(words)} if words else {})


@dataclass(frozen=True, slots=True)
class Pages:
    """The training part of a corpus: what is held out to measure stays unseen."""

    corpus: str
    fingerprint: str
    items: tuple[Page, ...]

    @classmethod
    def of(cls, choice: QuestionWriting) -> Pages:
        """Those of `choice.seeds`; of a corpus on disk the first ones.

        Raises:
            UserError: there is no such corpus.
        """
        corpus = open_corpus(CorpusSpec(path=str(choice.seeds), field=choice.field))
        rows = corpus.train.at_hand() if isinstance(corpus.train, RowsOnDisk) else corpus.train
        items = tuple(Page(as_plain_text(row)["text"], row.id, number) for number, row in enumerate(rows))
        return cls(corpus.name, corpus.fingerprint, items)

    def to_json(self) -> dict[str, Any]:
        """Which corpus it is, and how many pages there are."""
        return {"corpus": self.corpus, "fingerprint": self.fingerprint, "pages": len(self.items)}


class Generator(Protocol):
    """What makes pairs: `name` and `sha256` say what it was."""

    name: str
    sha256: str

    def rounds(self) -> Iterator[list[Pair]]:
        """Pairs in rounds; an empty question or answer for what could not be read as one."""
        ...

    def confirmed(self, pairs: Sequence[Pair]) -> list[bool]:
        """Which of those that passed the sieve the generator stands by."""
        ...


class Templates:
    """Problems by rule; its hash is that of the code with the rules."""

    def __init__(self, choice: QuestionWriting, pages: Pages | None) -> None:
        self.name, self._choice = TEMPLATES, choice
        self.sha256 = hashlib.sha256(Path(question_templates.__file__).read_bytes()).hexdigest()
        self._definitions = _definitions_of(pages) if pages else []

    def rounds(self) -> Iterator[list[Pair]]:
        """Without end, unless there are definitions only."""
        choice = self._choice
        made = question_templates.pairs(
            choice.kinds, seed=choice.seed, largest=choice.largest, definitions=self._definitions
        )
        return iter(lambda: list(itertools.islice(made, ROUND)), [])

    def confirmed(self, pairs: Sequence[Pair]) -> list[bool]:
        """Rules make no mistakes."""
        return [True] * len(pairs)


def _definitions_of(pages: Pages) -> list[Pair]:
    return [
        replace(pair, source=page.source(pages.corpus)) for page in pages.items for pair in definitions_in(page.text)
    ]


class PageReader:
    """A model that is shown pieces of pages, one after the other in an order of the seed, and writes a pair about each.

    Question and answer are one line each. The same seed writes the same pairs.
    """

    def __init__(self, choice: QuestionWriting, pages: Pages) -> None:
        from overhaul import artifact, generation, machine

        self.name, self._choice, self._pages = choice.generator, choice, pages
        self.examples, self._rounds_confirmed = choice.shown(), 0
        device = machine.pick_device(choice.device)
        dtype = machine.compute_dtype(choice.dtype, device)
        made = artifact.load(choice.generator, device=device, dtype=machine.weights_dtype(dtype))
        self.sha256 = made.weights_sha256
        self._model, self._tokenizer = made.model, made.processor
        self._how: dict[str, Any] = {"tokens": choice.tokens, "one_line": True, "finished": True, "dtype": dtype}
        # Room for the piece of a page beside the examples and what is written.
        self._room = (
            generation.longest(made.model) - 2 * choice.tokens - self._length(self._asked("", random.Random(0)))
        )
        if self._room < FEWEST_TOKENS:
            raise UserError(
                f"{choice.generator} reads {generation.longest(made.model)} tokens, and the examples with a new pair "
                f"take all but {self._room}",
                allowed="a model that reads more",
                hint=f"--tokens {max(8, choice.tokens // 4)}",
            )

    def rounds(self) -> Iterator[list[Pair]]:
        """Without end: when all pages were read, each is read once more, at another place."""
        order = random.Random(f"pages/{self._choice.seed}")
        endless = (page for _ in itertools.count() for page in order.sample(self._pages.items, len(self._pages.items)))
        for number in itertools.count():
            shown = [self._piece(page, order) for page in itertools.islice(endless, ROUND)]
            asked = [self._asked(text, order) for _, text in shown]
            found = self._written(asked, f"{number}/question")
            # What is no question needs no answer.
            before = {place: f"{asked[place]} {text}\nAnswer:" for place, text in enumerate(found) if is_question(text)}
            answers = dict(zip(before, self._written(list(before.values()), f"{number}/answer"), strict=True))
            yield [
                Pair(question, answers.get(place, ""), "page", source, text)
                for place, ((source, text), question) in enumerate(zip(shown, found, strict=True))
            ]

    def confirmed(self, pairs: Sequence[Pair]) -> list[bool]:
        """Those whose answer the model gives again when it is asked the question alone, often enough."""
        if not self._choice.agree:
            return [True] * len(pairs)
        self._rounds_confirmed += 1
        what = f"{self._rounds_confirmed}/agree"
        order = random.Random(f"{what}/{self._choice.seed}")
        alone = [self._alone(pair.question, order) for pair in pairs]
        times = [0] * len(pairs)
        for number in range(self._choice.agree):
            answers = self._written(alone, f"{what}/{number}")
            times = [n + is_right(a, pair.answer) for n, a, pair in zip(times, answers, pairs, strict=True)]
        return [n >= self._choice.agree_share * self._choice.agree and n > 0 for n in times]

    def _piece(self, page: Page, order: random.Random) -> tuple[dict[str, Any], str]:
        """Some words of a page in a row, so many that they fit, and where they are; of one that is too long a part."""
        words, number = page.text.split(), self._choice.page_words
        start = order.randrange(max(1, len(words) - number + 1))
        while self._length(text := " ".join(words[start : start + number])) > self._room and number > 1:
            number //= 2
        while (length := self._length(text)) > self._room:  # a page without spaces is one word
            kept = len(text) * self._room // (length + 1)
            at = order.randrange(len(text) - kept + 1)
            text = text[at : at + kept]
        return page.source(self._pages.corpus, (start, min(len(words), start + number))), text

    def _written(self, prompts: Sequence[str], what: str) -> list[str]:
        from overhaul.generation import continuations

        choice = self._choice
        # Each call has its own numbers: the same ones would write the same words.
        digest = hashlib.sha256(f"{choice.seed}/{what}".encode()).digest()
        made = continuations(
            self._model, self._tokenizer, prompts, seed=int.from_bytes(digest[:7]), temperature=choice.temperature,
            top_p=choice.top_p, title=f"{self.name}: round {what}", **self._how,
        )  # fmt: skip
        return [text.strip() for text in made]

    def _asked(self, text: str, order: random.Random) -> str:
        """A text whose next line would be a question about `text`."""
        shown = order.sample(self.examples, len(self.examples))
        return "".join(f"Text: {t}\nQuestion: {q}\nAnswer: {a}\n\n" for t, q, a in shown) + f"Text: {text}\nQuestion:"

    def _alone(self, question: str, order: random.Random) -> str:
        """A text whose next line would be the answer to `question`."""
        shown = order.sample(self.examples, len(self.examples))
        return "".join(f"Question: {q}\nAnswer: {a}\n\n" for _, q, a in shown) + f"Question: {question}\nAnswer:"

    def _length(self, text: str) -> int:
        from overhaul.generation import read

        return len(read(self._tokenizer, text))


def items_of(name: str) -> list[str]:
    """The questions of a task, of a file or of a corpus; of plain text, all of each document.

    Of a task the question alone, without the passage it is about. Of a conversation each turn of the user is an item.

    Raises:
        UserError: there is no such thing.
    """
    if name in TASKS:
        # As the tasks word them, a question may stand between two labels and behind a passage.
        return [one.prompt.rpartition("\nQuestion: ")[2].removeprefix("Question: ").removesuffix("\nAnswer:")
                for one in questions(name)]  # fmt: skip
    try:
        return [text for row in every_row(name) for text in _questions_of(row)]
    except UserError as error:
        if "--field" not in error.hint:
            raise
        # That flag is of --seeds.
        raise UserError(
            f"--against {error.given}",
            allowed=" | ".join("+".join(shape) for shape in SHAPES),
            hint="a file with the column text",
        ) from error


def _questions_of(row: Row) -> list[str]:
    if "messages" in row:
        return [turn.content for turn in row["messages"] if turn.role == "user"]
    return [next(row[name] for name in ("question", "prompt", "text") if name in row)]


def write(choice: QuestionWriting, out: Path) -> dict[str, Any]:
    """Writes `out`, a ledger beside it, and a test file where one is asked for; all of them or none.

    Returns:
        The ledger, as it stands in the file with the suffix `.json`.

    Raises:
        UserError: a file is there already; a corpus or the model cannot be read; too much was dropped; there is not
            enough to ask about.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"-o {out} is not a name of JSON lines", hint=f"-o {out.with_suffix('.jsonl')}")
    choice.refuse_unread()
    # The ledger comes last: where it is, all is there.
    targets = [out, *([out.with_suffix(".heldout.jsonl")] if choice.heldout else []), out.with_suffix(".json")]
    with disk.new_files(*targets) as (*texts, ledger_file):
        sieve = PairSieve(
            longest=choice.longest,
            overlap=choice.overlap,
            run_words=choice.run_words,
            shown=[question for _, question, _ in choice.shown()],
        )
        against = {name: _added(sieve.forbidden, items_of(name)) for name in dict.fromkeys(choice.against)}
        pages = Pages.of(choice) if choice.seeds is not None else None
        generator = Templates(choice, pages) if pages is None or choice.is_by_rule else PageReader(choice, pages)
        test, train = _kept(generator, sieve, choice)
        files = {}
        for place, pairs in zip(texts, (train, test), strict=False):
            place.write_text("".join(_line(pair, generator, choice.seed) for pair in pairs), "utf-8")
            files[place.name] = {"pairs": len(pairs), "sha256": hashlib.sha256(place.read_bytes()).hexdigest()}
        ledger = {
            "files": files,
            "made": sieve.made,
            "dropped": sieve.dropped,
            "not needed": sieve.made - sum(sieve.dropped.values()) - len(test) - len(train),
            "generator": {"name": generator.name, "sha256": generator.sha256},
            "seeds": pages.to_json() if pages else None,
            "against": against,
            "settings": choice.model_dump(mode="json"),
        }
        ledger_file.write_text(json.dumps(ledger, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return ledger


def _added(forbidden: Forbidden, texts: Sequence[str]) -> dict[str, Any]:
    """Adds test items; returns how many, and their hash."""
    forbidden.add(texts)
    return {"items": len(texts), "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()}


def _kept(generator: Generator, sieve: PairSieve, choice: QuestionWriting) -> tuple[list[Pair], list[Pair]]:
    """Pairs for the test, and then those to train on, which ask nothing that the test does."""
    passed = _passed(generator, sieve, choice.most_dropped)
    test = list(itertools.islice(passed, choice.heldout))
    sieve.forbidden.add(pair.question for pair in test)
    train = list(itertools.islice(filter(sieve.is_still_good, passed), choice.count))
    found, wanted = len(test) + len(train), choice.heldout + choice.count
    if found < wanted:
        raise UserError(
            f"{generator.name} has no more: {found} pairs of the {wanted} that are asked for ({sieve.counts()})",
            hint=f"--count {len(train)}" if train else "more pages in --seeds",
        )
    return test, train


def _passed(generator: Generator, sieve: PairSieve, most_dropped: float) -> Iterator[Pair]:
    """The pairs that are of use, one by one; `UserError` after a round where too few are."""
    for made in generator.rounds():
        formed = [pair for pair in made if sieve(pair)]
        stands = generator.confirmed(formed)
        sieve.dropped["not agreed"] += stands.count(False)
        if sieve.dropped_share > most_dropped:
            raise UserError(
                f"{generator.name} wrote too little that is of use: of {sieve.made}, {sieve.counts()}",
                allowed=f"at most {most_dropped:.0%} dropped (--most-dropped)",
                hint="another --seed, more or other --seeds, or another --generator",
            )
        yield from itertools.compress(formed, stands)


def _line(pair: Pair, generator: Generator, seed: int) -> str:
    told: dict[str, Any] = {"question": pair.question, "answer": pair.answer, "kind": pair.kind}
    if pair.source is not None:
        told["source"] = pair.source
    told["generator"] = {"name": generator.name, "sha256": generator.sha256}
    return json_line(told | {"seed": seed})
