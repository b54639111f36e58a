"""Distillation: a student learns what a teacher predicts, and what its hidden states are on the way there.

    L = KL(teacher, student) + alpha * states + w * cross-entropy
    states = sum over pairs (l', l) of |W s_l' - t_l|^2 / width        alpha = KL / states: both count alike

Sums are over the tokens that are trained on; s and t are the hidden states of student and teacher, W one learned map
for all pairs (Muralidharan et al., 2024, section 3).

Shapes: B windows, T tokens in a window, N tokens, D hidden width of the student, E of the teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul.divergence import (
    Direction,
    Teacher,
    TeacherLinear,
    TeacherLogits,
    TopWords,
    linear_divergence,
    logits_divergence,
)
from overhaul.interop import hf
from overhaul.objective import Balanced, Batch, CrossEntropy, Forward, Objective, Term, predicting
from overhaul.optim.build import build
from overhaul.schedules import schedule
from overhaul.stream import IGNORED, Map
from overhaul.teacher_cache import TeacherCache
from overhaul.train import Plan
from overhaul.watch import KeepZeros

if TYPE_CHECKING:
    from overhaul.data import Data
    from overhaul.method import Training

FLOOR = 0.1
"""The share of the peak rate at which the decay ends: 1e-4 to 1e-5 in the paper."""

_MAP = "state_map"
"""The learned map is a part of the student while it trains: saved, resumed and shared like its weights."""

_MAP_WINDOWS = 4
"""Windows from whose hidden states the map begins."""

Pairs = tuple[tuple[int, int], ...]
"""Places in the student and in the teacher whose hidden states are compared; 0 is the embedding's output, l the
output of block l."""


class Distill(Term):
    """The divergence from a teacher's predictions, in nats, without ever holding all logits of either model.

    Args:
        teacher: a frozen model with the student's vocabulary, or the cache that has put its likeliest words into the
            micro-batches.
        temperature: both models' logits are divided by it.
        direction: `forward` is KL(teacher || student), `reverse` KL(student || teacher).
        swap: in what the teacher says the likeliest word changes places with the right one, which is logit-swap
            self-distillation (Jiang et al., 2025); not with a cache, which may not have the right one.

    Raises:
        ValueError: a cache is to be swapped.
    """

    def __init__(
        self,
        teacher: nn.Module | TeacherCache,
        *,
        temperature: float = 1.0,
        direction: Direction = "forward",
        swap: bool = False,
    ) -> None:
        if swap and isinstance(teacher, TeacherCache):
            raise ValueError("a cache of likely words may not have the right one to change places with")
        self.teacher, self.temperature, self.direction, self.swap = teacher, temperature, direction, swap
        self.name = "swapped_kl" if swap else "kl"

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        if self.teacher is forward.model:
            raise ValueError("a model that learns from itself as it is now learns nothing: use a frozen copy")
        kept_N = _trained(batch)
        target = self._target(forward, batch, kept_N)
        how: dict[str, Any] = {"temperature": self.temperature, "direction": self.direction}
        head = hf.head(forward.model)
        if head is None:
            return logits_divergence(_rows(forward.outputs().logits, kept_N), target, **how)
        hidden_ND = _rows(forward.outputs().hidden, kept_N)
        return linear_divergence(hidden_ND, head.weight, target, head.bias, **how)

    def _target(self, forward: Forward, batch: Batch, kept_N: Tensor) -> Teacher:
        if isinstance(self.teacher, TeacherCache):
            words = self.teacher.words(batch)
            return TopWords(*(of_N[kept_N] for of_N in words[:-1]), num_words=words.num_words)
        made, head = forward.of(self.teacher).outputs(), hf.head(self.teacher)
        gold_N = batch["labels"][:, 1:].reshape(-1)[kept_N] if self.swap else None
        if head is None:
            return TeacherLogits(_rows(made.logits, kept_N), gold_N)
        return TeacherLinear(_rows(made.hidden, kept_N), head.weight, head.bias, gold_N)


class HiddenStates(Term):
    """The mean square between a teacher's hidden states and the student's through one learned map, summed over pairs.

    Args:
        teacher: a frozen model.
        pairs: which states are compared.
    """

    name = "states"
    reads_states = True

    def __init__(self, teacher: nn.Module, pairs: Pairs) -> None:
        self.teacher, self.pairs = teacher, pairs

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        kept_N, own, theirs = _trained(batch), forward.states(), forward.of(self.teacher).states()
        translate = forward.model.get_submodule(_MAP)
        gaps = [
            translate(_rows(own[place], kept_N)).float() - _rows(theirs[partner], kept_N).float()
            for place, partner in self.pairs
        ]
        return torch.stack([gap_NE.square().mean(-1).sum() for gap_NE in gaps]).sum()


def _trained(batch: Batch) -> Tensor:
    """Which of the places that predict a token have one that is trained on: `(N,)` bool."""
    return (batch["labels"][:, 1:] != IGNORED).reshape(-1)


def _rows(values_BTX: Tensor | None, kept_N: Tensor) -> Tensor:
    values_NX = predicting(values_BTX)
    return values_NX if bool(kept_N.all()) else values_NX[kept_N]


def distillation_plan(
    student: nn.Module,
    teacher: nn.Module | TeacherCache,
    data: Data,
    settings: Training,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    ce_weight: float = 0.0,
    pairs: Pairs = (),
    floor: float = FLOOR,
) -> Plan:
    """All of the student's parameters, to predict what the teacher predicts.

    Args:
        student: changed in place; masks of a pruned one are kept.
        teacher: any model with the same vocabulary, which is frozen and put into evaluation mode; or a cache of its
            likeliest words, which cannot go with `pairs`.
        data: the text, as the student's tokenizer sees it.
        settings: how long, how fast.
        temperature: both models' logits are divided by it.
        direction: `forward` is KL(teacher || student), `reverse` KL(student || teacher).
        ce_weight: weight of the cross-entropy with the text itself.
        pairs: hidden states to compare, see `pairs_by_depth`.
        floor: share of the peak rate at which the decay ends.
    """
    student.requires_grad_(True)
    stream = data.training(settings)
    kl = Distill(teacher, temperature=temperature, direction=direction)
    objective: Objective = kl
    if isinstance(teacher, TeacherCache):
        stream = Map(stream, teacher.with_words, name=f"with the teacher's {teacher.top_k} likeliest words")
    else:
        teacher.requires_grad_(False).eval()
        if pairs:
            objective = Balanced(kl, HiddenStates(teacher, pairs))
            windows_BT = data.windows("train", seq_len=settings.seq_len, limit=_MAP_WINDOWS)
            student.add_module(_MAP, state_map(student, teacher, windows_BT, pairs))
    return Plan(
        model=student,
        objective=objective + ce_weight * CrossEntropy() if ce_weight else objective,
        stream=stream,
        optimizer=build(settings, student.parameters(), model=student),
        schedule=schedule(settings.schedule, settings.warmup, floor),
        watchers=(KeepZeros(),),
        finish=_without_map,
        helpers=(_MAP,) if pairs else (),
    )


def _without_map(student: nn.Module) -> nn.Module:
    """Drops the learned map, if there is one: it is no part of what is written."""
    if _MAP in dict(student.named_children()):
        delattr(student, _MAP)
    return student


def pairs_by_depth(student_depth: int, teacher_depth: int) -> Pairs:
    """The embeddings, and blocks a quarter, half and three quarters through the student, each with its partner.

    The last block is left out: what comes from it is what the logits are made of.
    """
    quarters = {round(quarter * student_depth / 4) for quarter in (1, 2, 3)} & set(range(1, student_depth))
    return ((0, 0), *((place, partner(place, student_depth, teacher_depth)) for place in sorted(quarters)))


def partner(place: int, student_depth: int, teacher_depth: int) -> int:
    """The teacher's block that is as far through its depth as the student's block `place` is through its own."""
    return min(max(round(place * teacher_depth / student_depth), 1), teacher_depth - 1) if place else 0


@torch.no_grad()
def state_map(student: nn.Module, teacher: nn.Module, windows_BT: Tensor, pairs: Pairs) -> nn.Linear:
    """Where the learned map from the student's hidden states to the teacher's begins.

    That is the identity for equal widths, else the best map in the mean square for the states of some windows: a
    random one would pull the student somewhere for as long as it takes to learn it.
    """
    device = next(student.parameters()).device
    own_width, width = (hf.width(model.config) for model in (student, teacher))
    translate = nn.Linear(own_width, width, bias=False, device=device)
    if own_width == width:
        nn.init.eye_(translate.weight)
        return translate
    batch = {"input_ids": windows_BT.to(device)}
    own, theirs = (hf.outputs(model, batch, states=True).states or () for model in (student, teacher))
    source_ND = torch.cat([own[place].flatten(0, 1) for place, _ in pairs])
    target_NE = torch.cat([theirs[place].flatten(0, 1) for _, place in pairs])
    translate.weight.copy_(least_squares(source_ND, target_NE))
    return translate


def least_squares(source_ND: Tensor, target_NE: Tensor) -> Tensor:
    """W (E, D) with the least |source W^T - target|^2; a thousandth of the mean square is added to the diagonal."""
    source_ND, target_NE = source_ND.double(), target_NE.double()
    gram_DD = source_ND.t() @ source_ND
    gram_DD.diagonal().add_(1e-3 * gram_DD.diagonal().mean())
    return torch.linalg.solve(gram_DD, source_ND.t() @ target_NE).t()
