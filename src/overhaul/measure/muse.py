"""MUSE: what is left of texts that a model was to forget, what was lost beside, and whether it comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from overhaul.method import Measure, Names, Positive
from overhaul.progress import say
from overhaul.returning import Relearn, Way

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from overhaul.data import Data
    from overhaul.muse import Asking, Findings, Material
    from overhaul.table import Row, Table

VERBATIM, FORGOTTEN, UTILITY = "verbatim memory", "knowledge to forget", "utility"
FILE = "findings.json"
"""Of what a model said, in its directory of the cache."""
LEAK, AUC = "PrivLeak", "AUC forget/holdout"


class Muse(Measure):
    """What is left of texts that a model was to forget, and what was lost beside, against one retrained without.

    The model that is named first knows the texts; `--unlearned` ones were made of it, and `--retrain` never saw them.
    """

    paper: ClassVar[str] = (
        "Shi, Lee, Huang, Malladi, Zhao, Holtzman, Liu, Zettlemoyer, Smith, Zhang: MUSE: Machine Unlearning Six-Way "
        "Evaluation for Language Models, ICLR 2025, arXiv:2407.06460"
    )
    needs_corpus: ClassVar[bool] = False
    reads_logits_alone: ClassVar[bool] = True

    retrain: str = Field(min_length=1, description="Model that was trained alike, without the texts to forget.")
    unlearned: Names = Field((), description="Models that were to forget them.")
    forget: str = Field(min_length=1, description="Texts to forget: a corpus name, a file or a directory.")
    retain: str = Field(min_length=1, description="Texts that the models were trained on and still know.")
    holdout: str = Field(min_length=1, description="Texts of the same kind that none of them saw.")
    forget_questions: str = Field(min_length=1, description="Table of question and answer about the texts to forget.")
    retain_questions: str = Field(min_length=1, description="The same about the texts to retain.")
    shots: str | None = Field(None, description="Table of answered questions that stand before each; about neither.")
    num_shots: Positive = Field(10, description="Of these, at most.")
    limit: Positive = Field(100, description="Texts and questions of each kind, the first ones.")
    prompt_tokens: Positive = Field(32, description="Tokens of a text that are given, to be gone on with.")
    tokens: Positive = Field(128, description="Tokens that a model goes on with.")
    answer_tokens: Positive = Field(32, description="Tokens of an answer, at most.")
    batch_size: Positive = Field(16, description="Texts at once.")
    returns: tuple[Way, ...] = Field(
        (),
        description="Whether it comes back: unlearned and retrained models are asked once more with int8 weights, with "
        "int4 ones, or after a little training on other text.",
    )
    relearn: Relearn = Field(Relearn.model_validate({}), description="How that training goes.")

    @model_validator(mode="after")
    def _training_is_asked_for(self) -> Self:
        told = [name for name, field in Relearn.model_fields.items() if getattr(self.relearn, name) != field.default]
        if told and "relearn" not in self.returns:
            raise ValueError(f"relearn.{told[0]} is read where returns has relearn; add it there")
        return self

    def measure(self, model: nn.Module, data: Data) -> Table:
        """Rows of the model, the retrained one and the unlearned ones; percent, with 95% intervals over texts.

        Raises:
            UserError: a file cannot be read, kinds of text overlap, or the retrained model tells nothing.
        """
        from overhaul import pretrained
        from overhaul.membership import CHOSEN, auc, bounds
        from overhaul.table import Table

        material, others = self.material(), tuple(dict.fromkeys((self.retrain, *self.unlearned)))
        for name in others:
            pretrained.resolve(name)  # one that is not there is told before any is asked
        if "relearn" in self.returns:
            data.on(self.relearn.data)  # and so is text
        found = {data.model: self._asked(model, data, material, data.model, keep=True)}
        for name in others:
            if name != data.model:
                found[name] = self._asked(model, data, material, name, keep=name == self.retrain)
        chosen = f"min-{CHOSEN:.0%}"
        reference = found[self.retrain]
        retrained = auc(reference.scores["forget"][chosen], reference.scores["holdout"][chosen])
        low, high = bounds(retrained)
        rows = [row for name, one in found.items() for row in self._rows(name, one, reference, data.seed)]
        notes: list[str] = []
        for name in others if self.returns else ():
            rows += self._returned(model, data, material, name, notes)
        note = (
            f"PrivLeak can be from {low:.1f} to {high:.1f} here, as the retrained model's AUC is {retrained:.4f}: near "
            f"{high:.1f} the texts to forget are less likely than texts never seen, which gives them away as well"
        )
        return Table(tuple(rows), details=tuple(_aucs(found)), notes=(note, *notes))

    def material(self) -> Material:
        """What models are asked about.

        Raises:
            UserError: it cannot be read, or held-out texts are among those to forget.
        """
        from overhaul.documents import read_columns
        from overhaul.muse import Material, refuse_overlap

        texts = {name: self._texts(getattr(self, name)) for name in ("forget", "retain", "holdout")}
        refuse_overlap(texts["forget"], texts["holdout"])

        def table(path: str, count: int) -> tuple[tuple[str, str], ...]:
            return tuple((question, answer) for question, answer in read_columns(path, ("question", "answer"))[:count])

        return Material(
            **texts,
            forget_questions=table(self.forget_questions, self.limit),
            retain_questions=table(self.retain_questions, self.limit),
            shots=table(self.shots, self.num_shots) if self.shots else (),
        )

    def _texts(self, path: str) -> tuple[str, ...]:
        from itertools import islice

        from overhaul.corpora import every_row
        from overhaul.documents import row_text

        return tuple("".join(part for part, _ in row_text(row)) for row in islice(every_row(path), self.limit))

    def _asking(self) -> Asking:
        from overhaul.muse import Asking

        return Asking(
            prompt_tokens=self.prompt_tokens,
            tokens=self.tokens,
            answer_tokens=self.answer_tokens,
            batch_size=self.batch_size,
        )

    def _asked(self, target: nn.Module, data: Data, material: Material, name: str, *, keep: bool) -> Findings:
        """What a model says, the target or one that is read beside it; kept ones from the cache if asked before."""
        import json
        from dataclasses import asdict

        from overhaul import disk, pretrained
        from overhaul.muse import Findings, examine
        from overhaul.muse import kept as place_of

        how = self._asking()
        place = place_of(pretrained.resolve(name), material, how, data.dtype)
        if keep and (place / FILE).is_file():
            say(f"{name}: asked before, from {place}")
            return Findings.from_json(json.loads((place / FILE).read_text()))
        model = target if name == data.model else self._beside(target, data, name)
        found = examine(model, data.tokenizer, material, how, dtype=data.dtype, title=name)

        def write(made: Path) -> None:
            (made / FILE).write_text(json.dumps(asdict(found)))

        if keep:
            disk.made_once(place, FILE, write)
        return found

    def _beside(self, target: nn.Module, data: Data, name: str) -> nn.Module:
        """Another model, where the target is; `UserError` where it has another tokenizer."""
        from overhaul import artifact, machine
        from overhaul.errors import UserError

        device = next(target.parameters()).device
        made = artifact.load(name, dtype=machine.weights_dtype(data.dtype), device=device, with_library=True)
        if made.processor.get_vocab() != data.tokenizer.get_vocab():
            raise UserError(f"{name} has another tokenizer than {data.model}: what they say cannot be compared")
        return made.model

    def _returned(
        self, target: nn.Module, data: Data, material: Material, name: str, notes: list[str]
    ) -> Iterator[Row]:
        """What a model knows of the texts to forget after each way of bringing it back; one that fits not is noted."""
        from overhaul import pretrained
        from overhaul.errors import UserError
        from overhaul.muse import knowledge, verbatim_memory
        from overhaul.returning import after, refuse_beside

        for way in self.returns:
            try:
                refuse_beside(pretrained.resolve(name), name)
                model = after(way, self._beside(target, data, name), data, self.relearn)
            except UserError as error:
                notes.append(f"{name} was not asked after {way}: {error}")
                continue
            how: dict[str, Any] = {"dtype": data.dtype, "title": f"{name} {way}"}
            asked = (model, data.tokenizer)
            written = verbatim_memory(*asked, material.forget, self._asking(), **how)
            answers = knowledge(*asked, material.forget_questions, material.shots, self._asking(), **how)
            yield _mean(name, f"{VERBATIM} after {way}", written, data.seed)
            yield _mean(name, f"{FORGOTTEN} after {way}", answers, data.seed)

    def _rows(self, name: str, found: Findings, reference: Findings, seed: int) -> list[Row]:
        import numpy as np

        from overhaul.membership import CHOSEN, auc, priv_leak, resampled_auc
        from overhaul.table import Row

        chosen = f"min-{CHOSEN:.0%}"
        kinds = [one.scores[kind][chosen] for one in (found, reference) for kind in ("forget", "holdout")]
        own, theirs = auc(*kinds[:2]), auc(*kinds[2:])
        # The same texts are drawn of both models.
        owns, others = resampled_auc(*kinds[:2], seed=seed), resampled_auc(*kinds[2:], seed=seed)
        leaks = 100 * (owns - others) / np.maximum(others, 1e-12)
        count = len(kinds[0]) + len(kinds[1])

        def interval(metric: str, value: float, drawn: np.ndarray) -> Row:
            low, high = (float(one) for one in np.quantile(drawn, [0.025, 0.975]))
            return Row(model=name, metric=metric, value=value, low=low, high=high, count=count)

        return [
            _mean(name, VERBATIM, found.verbatim, seed),
            _mean(name, FORGOTTEN, found.forgotten, seed),
            interval(LEAK, priv_leak(own, theirs), leaks),
            _mean(name, UTILITY, found.retained, seed),
            interval(AUC, own, owns),
        ]


def _mean(name: str, metric: str, values: Sequence[float], seed: int) -> Row:
    """With its interval over texts or questions."""
    import numpy as np

    from overhaul.evaluate import bootstrap_interval
    from overhaul.table import Row

    low, high = bootstrap_interval(np.array(values), seed=seed)
    return Row(model=name, metric=metric, value=float(np.mean(values)), low=low, high=high, count=len(values))


def _aucs(found: dict[str, Findings]) -> list[dict[str, object]]:
    """Of each model, score and pair of kinds of text, the AUC."""
    from itertools import combinations

    from overhaul.membership import auc

    return [
        {
            "model": name,
            "score": score,
            "pair": f"{one}/{other}",
            "auc": auc(of.scores[one][score], of.scores[other][score]),
        }
        for name, of in found.items()
        for one, other in combinations(of.scores, 2)
        for score in of.scores[one]
    ]
