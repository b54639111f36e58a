"""Watchers change something on a timetable while the loop runs; observing is the loop's own business."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.journal import note_table
from overhaul.layers.masked import MaskedLinear
from overhaul.progress import say
from overhaul.sharding import like, whole


class Watcher:
    """A hook into the loop that does nothing yet."""

    def start(self, model: nn.Module) -> None:
        """Before the first step."""

    def step(self, model: nn.Module, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""

    def is_over(self) -> bool:
        """Whether nothing more is to be trained, before the last step."""
        return False

    def put_back(self, model: nn.Module, step: int) -> int | None:
        """The earlier step whose weights it put back, as a loss or gradient is not finite in step `step`.

        Then the run is over; None where it keeps no weights that are good: then training `Diverged`.
        """
        return None

    def end(self, model: nn.Module) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""


class InEvaluation(Watcher):
    """Keeps some modules as they are in evaluation: normalisations whose statistics are not to follow the data.

    Args:
        modules: whose running statistics stay.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)

    def start(self, model: nn.Module) -> None:
        for module in self.modules:
            module.eval()


class KeepBest(Watcher):
    """Leaves a model as it was after the best of several passes, the first of those that are equally good.

    Args:
        score: of the model as it is, in evaluation mode; the larger the better.
        trained: what of it training changes, by name; tensors that share their numbers with the model's.
        every: steps of a pass.
        steps: of the whole run; after the last one the model is looked at too, should it end no pass.
        patience: passes without a better one after which it is over; None for as many as there are.

    Attributes:
        scores: after each pass so far.
    """

    def __init__(
        self,
        score: Callable[[nn.Module], float],
        trained: Callable[[nn.Module], Mapping[str, Tensor]],
        *,
        every: int,
        steps: int,
        patience: int | None = None,
    ) -> None:
        self.score, self.trained, self.every, self.steps, self.patience = score, trained, every, steps, patience
        self.scores: list[float] = []
        self.best: dict[str, Tensor] = {}

    @property
    def place(self) -> int:
        """The best pass, counted from 0."""
        return self.scores.index(max(self.scores))

    def step(self, model: nn.Module, step: int) -> None:
        if step % self.every and step != self.steps:
            return
        still = [module for module in model.modules() if not module.training]
        found = self.score(model.eval())
        model.train()
        for module in still:
            module.eval()
        if found > max(self.scores, default=-math.inf):
            self.best = {name: tensor.clone() for name, tensor in self.trained(model).items()}
        self.scores.append(found)

    def is_over(self) -> bool:
        if self.patience is None or not self.scores:
            return False
        return len(self.scores) - 1 - self.place >= self.patience

    @torch.no_grad()
    def end(self, model: nn.Module) -> None:
        for name, tensor in self.trained(model).items() if self.best else ():
            tensor.copy_(self.best[name])
        self.best = {}  # it is in the model now, and in a checkpoint once

    def state_dict(self) -> dict[str, Any]:
        return {"scores": list(self.scores), "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.best = state["scores"], state["best"]


class LastGood(Watcher):
    """Keeps what is trained as it was after the last pass, for a run that diverges one day.

    Args:
        trained: what training changes, by name; tensors that share their numbers with the model's.
        ends_pass: whether a step ends a pass.

    Attributes:
        lost: the step that diverged, and that whose weights were put back.
    """

    def __init__(
        self, trained: Callable[[nn.Module], Mapping[str, Tensor]], *, ends_pass: Callable[[int], bool]
    ) -> None:
        self.trained, self.ends_pass = trained, ends_pass
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.lost: tuple[int, int] | None = None
        self.last = 0

    def step(self, model: nn.Module, step: int) -> None:
        self.last = step
        # The loss of this step was finite, and so the weights before it were good: older ones are of no use.
        newest = max(self.kept, default=0)
        self.kept = {number: kept for number, kept in self.kept.items() if number == newest}
        if self.ends_pass(step):
            self.kept[step] = {name: tensor.clone() for name, tensor in self.trained(model).items()}

    @torch.no_grad()
    def put_back(self, model: nn.Module, step: int) -> int | None:
        # With the weights of the step before the loss is no number.
        good = max((number for number in self.kept if number < step - 1), default=None)
        if good is not None:
            for name, tensor in self.trained(model).items():
                tensor.copy_(like(self.kept[good][name], tensor))
            self.lost = (step, good)
        return good

    def end(self, model: nn.Module) -> None:
        if not all(tensor.isfinite().all() for tensor in self.trained(model).values()):
            self.put_back(model, self.last + 1)  # the last update was too much, and no loss came after it
        if self.lost:
            step, good = self.lost
            told = f"Training diverged at step {step}, where a number was not finite"
            told = f"{told}; the weights are those of step {good}."
            say(told)
            note_table(told, ("diverged at step", "weights of step"), [(str(step), str(good))])
        self.kept = {}

    def state_dict(self) -> dict[str, Any]:
        return {"kept": whole(self.kept), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.last = state["kept"], state["last"]


class Moments(Watcher):
    """Keeps what optimizers know of parameters that rest, for the optimizer that trains them next."""

    def __init__(self) -> None:
        self.resting: dict[str, dict[str, Any]] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.names: dict[Tensor, str] = {}

    def hand_over(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimizer, which has done nothing yet, what is known of its parameters."""
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        self.optimizer, self.names = optimizer, {p: name for name, p in model.named_parameters() if p in trained}
        for parameter, name in self.names.items():
            if name in self.resting:
                optimizer.state[parameter] = _beside(parameter, self.resting.pop(name))

    def end(self, model: nn.Module) -> None:
        assert self.optimizer
        self.resting |= {name: self.optimizer.state[p] for p, name in self.names.items() if self.optimizer.state.get(p)}

    def state_dict(self) -> dict[str, Any]:
        return {"resting": self.resting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resting = state["resting"]


def _beside(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state on the parameter's device: a checkpoint is read to the CPU. A low-rank optimizer counts steps there."""
    at = {"step": torch.device("cpu")} if "basis" in state else {}
    return {
        name: value.to(at.get(name, parameter.device)) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


class KeepZeros(Watcher):
    """Sets the pruned weights of every `MaskedLinear` back to zero after each step."""

    def __init__(self) -> None:
        self.removed: list[tuple[Tensor, Tensor]] = []

    def start(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, MaskedLinear)]
        self.removed = [(layer.weight, like(~layer.mask, layer.weight)) for layer in layers]

    @torch.no_grad()
    def step(self, model: nn.Module, step: int) -> None:
        for weight, removed in self.removed:
            weight.masked_fill_(removed, 0.0)
