"""Where unlearning is far enough: the stopping rule of MUSE (Shi et al., ICLR 2025, section 4).

Of the states that a method leaves, pass after pass or one for each strength, the first is taken that knows no more of
the texts to forget than a model that never saw them; where none does, the last.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from overhaul import artifact, machine, muse
from overhaul.data import Data
from overhaul.documents import read_columns
from overhaul.errors import UserError
from overhaul.generation import read
from overhaul.journal import note_table
from overhaul.muse import Asking, Pair
from overhaul.progress import say
from overhaul.train import History
from overhaul.watch import Watcher

if TYPE_CHECKING:
    from overhaul.removal import Stop

ANSWER_TOKENS = 32
HISTORY_KEY = "knowledge"
"""In a point of the history, what is known of the texts to forget, in percent."""


class Look(NamedTuple):
    """What was found at one place.

    Attributes:
        place: a step, or a strength.
        knowledge: percent.
    """

    place: float
    knowledge: float


class Knowledge:
    """Asks models about the texts to forget: mean ROUGE-L F1 in percent of greedy answers, see `overhaul.muse`.

    Args:
        stop: what is asked, and where it is enough.
        data: whose tokenizer and precision are used.

    Raises:
        UserError: questions cannot be read, or the model to compare with has another tokenizer.
    """

    def __init__(self, stop: Stop, data: Data) -> None:
        self.stop, self.data = stop, data
        self.questions = _pairs(stop.questions, stop.limit)
        self.shots = _pairs(stop.shots, stop.num_shots)
        vocabulary = data.tokenizer.get_vocab()
        if stop.retrain and artifact.read_tokenizer(stop.retrain).get_vocab() != vocabulary:
            raise UserError(f"{stop.retrain} has another tokenizer: what the two know cannot be compared")

    def of(self, model: nn.Module) -> float:
        """What a model knows; no number where its logits are none. Its modules are left in the modes they were in."""
        training = [module for module in model.modules() if module.training]
        model.eval()
        how = Asking(prompt_tokens=1, tokens=1, answer_tokens=ANSWER_TOKENS, batch_size=16)
        asked = (self.data.tokenizer, self.questions, self.shots, how)
        found = statistics.mean(muse.knowledge(model, *asked, dtype=self.data.dtype)) if self._speaks(model) else None
        for module in training:
            module.training = True
        return float("nan") if found is None else found

    def _speaks(self, model: Any) -> bool:
        """Whether what it says is made of numbers: the likeliest word of none would pass for a wrong answer."""
        device = next(model.parameters()).device
        ids_BT = torch.tensor([read(self.data.tokenizer, self.questions[0][0])], device=device)
        with torch.no_grad(), machine.autocast(device, self.data.dtype):
            return bool(model(input_ids=ids_BT).logits.isfinite().all())

    def bound(self, model: nn.Module) -> float:
        """What is little enough: as given, or as much as the retrained model knows, on the device of another one."""
        if self.stop.retrain is None:
            assert self.stop.at is not None
            return self.stop.at
        device, dtype = next(model.parameters()).device, machine.weights_dtype(self.data.dtype)
        return self.of(artifact.load(self.stop.retrain, dtype=dtype, device=device, with_library=True).model)


def _pairs(path: str | None, count: int) -> tuple[Pair, ...]:
    rows = read_columns(path, ("question", "answer"))[:count] if path else ()
    return tuple((question, answer) for question, answer in rows)


class Stopping(Watcher):
    """Ends a run after the first pass behind which little enough is known.

    Args:
        score: what a model knows.
        bound: how much is little enough, when given the model before the first step.
        ends_pass: whether a step ends a pass.
        steps: of the whole run; after the last one the model is looked at too, should it end no pass.

    Attributes:
        looks: at the model before, and after each pass so far.
    """

    def __init__(
        self,
        score: Callable[[nn.Module], float],
        bound: Callable[[nn.Module], float],
        *,
        ends_pass: Callable[[int], bool],
        steps: int,
    ) -> None:
        self.score, self.find_bound, self.ends_pass, self.steps = score, bound, ends_pass, steps
        self.bound = 0.0
        self.looks: list[Look] = []

    def start(self, model: nn.Module) -> None:
        if not self.looks:
            self.bound = self.find_bound(model)
            self.looks = [Look(0, self.score(model))]

    def step(self, model: nn.Module, step: int) -> None:
        if self.ends_pass(step) or step == self.steps:
            self.looks.append(Look(step, self.score(model)))

    def is_over(self) -> bool:
        return _is_met(self.looks, self.bound)

    def end(self, model: nn.Module) -> None:
        last = f"{self.looks[-1].place:g}"
        where = f"after step {last}, where the run ended" if self.is_over() else ""
        _tell(self.looks, self.bound, "step", where, f"the run went on to step {last}, its end")

    def told(self, history: History) -> None:
        """Puts what was found into the points of a history."""
        found = {look.place: look.knowledge for look in self.looks}
        for point in history.points:
            if point["step"] in found:
                point[HISTORY_KEY] = found[point["step"]]

    def state_dict(self) -> dict[str, Any]:
        return {"looks": [tuple(look) for look in self.looks], "bound": self.bound}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks, self.bound = [Look(*look) for look in state["looks"]], state["bound"]


def first_strength(
    strengths: Iterable[float],
    *,
    apply: Callable[[float], None],
    score: Callable[[], float],
    bound: float,
    before: float,
) -> float:
    """The first of several strengths at which little enough is known, else the last; it is applied, and noted.

    Args:
        strengths: in the order in which they are tried.
        apply: changes the model to one of them.
        score: what the model knows as it is.
        bound: how much is little enough.
        before: what the model knew before; it decides nothing.
    """
    looks = [Look(0, before)]
    for strength in strengths:
        apply(strength)
        looks.append(Look(strength, score()))
        if _is_met(looks, bound):
            break
    chosen = looks[-1].place
    where = f"at alpha {chosen:g}, which is taken" if _is_met(looks, bound) else ""
    _tell(looks, bound, "alpha", where, f"alpha {chosen:g}, the last, is taken")
    return chosen


def _is_met(looks: Sequence[Look], bound: float) -> bool:
    return len(looks) > 1 and looks[-1].knowledge <= bound


def _tell(looks: Sequence[Look], bound: float, place: str, where: str, else_what: str) -> None:
    """Notes what was found: `where` it was little enough, or what came of it where it never was."""
    told = f"Of the texts to forget no more than {bound:.1f}% is known {where}."
    if not where:
        told = f"Of the texts to forget more than {bound:.1f}% is known to the end: {else_what}."
    say(told)
    rows = [
        (f"{number}", f"{look.place:g}", f"{look.knowledge:.1f}", f"{bound:.1f}") for number, look in enumerate(looks)
    ]
    note_table(told, ("look", place, "knowledge, %", "bound, %"), rows)
