"""Which of several shapes of one size is best: each is cut, trained for a moment to follow the original, and measured.

The ranking right after the cut says little (Minitron, section 3.3 and practice 8): what a cut loses at once is not what
it cannot win back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from overhaul import evaluate, journal
from overhaul.data import Data
from overhaul.distillation import distillation_plan
from overhaul.errors import Diverged, UserError
from overhaul.method import Training
from overhaul.progress import say
from overhaul.shapes import Architecture, Shape
from overhaul.train import Plan
from overhaul.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One shape that was tried.

    Attributes:
        shape: how large it is.
        parameters: how many.
        cut_loss: held-out loss in nats right after the cut.
        trained_loss: that after the short distillation.
    """

    shape: Shape
    parameters: int
    cut_loss: float
    trained_loss: float


class ShortDistillation(Training):
    """What each candidate gets: the original's next words as the target."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    teacher: nn.Module = Field(exclude=True, description="The original; never changed.")

    def plan(self, model: nn.Module, data: Data) -> Plan:
        return distillation_plan(model, self.teacher, data, self, temperature=1.0, direction="forward")


def try_each(
    shapes: Sequence[Shape],
    make: Callable[[Shape], nn.Module],
    work: Workspace,
    short: ShortDistillation,
    architecture: Architecture,
    windows_NT: Tensor,
) -> tuple[nn.Module, list[Candidate]]:
    """Cuts and trains one shape after the other; at most the best so far and the one at work are in memory.

    Args:
        shapes: what to try.
        make: cuts the original to a shape.
        work: the data and the loop.
        short: after whom, how long and how fast each is trained.
        architecture: counts parameters.
        windows_NT: the text that ranks.

    Returns:
        The best candidate's model, trained, and all candidates in the order they were tried.

    Raises:
        UserError: the training of all of them diverged; of one that did the loss is infinite.
    """
    best, least, tried = None, math.inf, []
    stored = next(short.teacher.parameters()).dtype
    for number, shape in enumerate(shapes, 1):
        say(f"candidate {number} of {len(shapes)}: {shape}, {architecture.parameters(shape):,} parameters")
        student = make(shape)
        cut_loss = loss(student, windows_NT, work.dtype)
        try:
            journal.note_tokens(work.train(short.plan(student, work.data), short).tokens)
            student = student.to(stored)  # what is measured is what would be written
            trained_loss = loss(student, windows_NT, work.dtype)
        except Diverged as error:
            say(f"  {error.given}")
            trained_loss = math.inf
        say(f"  held-out loss {cut_loss:.3f} right after the cut, {trained_loss:.3f} after {short.steps} steps")
        parameters = architecture.parameters(shape)
        tried.append(Candidate(shape=shape, parameters=parameters, cut_loss=cut_loss, trained_loss=trained_loss))
        if trained_loss < least:
            best, least = student, trained_loss
    if best is None:
        raise UserError(
            f"the short training of all {len(shapes)} candidates diverged", hint=f"--search-lr {short.lr / 10:g}"
        )
    return best, tried


def loss(model: nn.Module, windows_NT: Tensor, dtype: torch.dtype) -> float:
    """Held-out loss in nats per token; infinite where it is no number."""
    perplexity = evaluate.perplexity(model, windows_NT, dtype=dtype).estimate.value
    return math.log(perplexity) if math.isfinite(perplexity) else math.inf


def note(tried: Sequence[Candidate], steps: int) -> None:
    """The table of candidates, best first, for the report."""
    ranked = sorted(tried, key=lambda one: one.trained_loss)
    at_once = sorted(tried, key=lambda one: one.cut_loss)
    columns = ("rank", "shape", "parameters", "loss after the cut", "rank after the cut", f"loss after {steps} steps")
    rows = [
        (
            str(rank),
            str(one.shape),
            f"{one.parameters:,}",
            f"{one.cut_loss:.3f}",
            str(at_once.index(one) + 1),
            f"{one.trained_loss:.3f}",
        )
        for rank, one in enumerate(ranked, 1)
    ]
    journal.note_table(f"{ranked[0].shape} is the best of {len(tried)} shapes of this size", columns, rows)
