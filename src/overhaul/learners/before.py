"""What is kept of a model at the end of a task, for later tasks to be held to."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from overhaul.continual import Pulled
from overhaul.fisher import joined


class Before:
    """The model as it was, its weights, and how much they matter: each only where a method keeps it.

    Attributes:
        model: a frozen copy.
        weights: by name.
        information: the diagonal of the Fisher information of the tasks so far, by name.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.weights: dict[str, Tensor] = {}
        self.information: dict[str, Tensor] | None = None

    def keep_model(self, model: nn.Module) -> None:
        """Takes a copy of a model as it is now."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def keep_weights(self, model: nn.Module, names: Collection[str]) -> None:
        """Takes a copy of some of a model's parameters as they are now."""
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}

    def add_information(self, found: Mapping[str, Tensor], *, keep: float) -> None:
        """Adds that of a task.

        Args:
            found: by name.
            keep: what is left of that of earlier tasks.
        """
        self.information = joined(self.information, found, keep=keep)

    def pull(self, *, by_information: bool) -> Pulled | None:
        """The term that holds a model to the weights; None where none are kept.

        Args:
            by_information: whether those are held more that matter more.
        """
        if not self.weights:
            return None
        return Pulled(self.weights, self.information if by_information else None)

    def kept_bytes(self) -> dict[str, int]:
        """By what it is; nothing of what is not kept."""
        held = {
            "weights before": self.weights.values(),
            "Fisher information": (self.information or {}).values(),
            "old model": self.model.state_dict().values() if self.model is not None else (),
        }
        sizes = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in held.items()}
        return {name: size for name, size in sizes.items() if size}
