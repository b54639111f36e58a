"""What is believed of a model's weights, from task to task: independent normal distributions (Nguyen et al., 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from overhaul.layers.variational import Distribution, distributions, make_plain, make_variational, trained_as_means


class Posterior:
    """The distributions of the weights after the tasks so far; the prior, before any.

    Args:
        prior_std: standard deviation of the prior.
        first_std: that weights begin with, where no task has been learnt.
        from_given: whether the prior is around the weights that the model has; around zero otherwise.
    """

    def __init__(self, *, prior_std: float, first_std: float, from_given: bool) -> None:
        self.prior_std, self.first_std, self.from_given = prior_std, first_std, from_given
        self.known: dict[str, Distribution] = {}

    def begin(self, model: nn.Module) -> dict[str, Distribution]:
        """Gives the model's weights their distributions, in place, and returns those that they are held to.

        Parameters that have grown, as those of a head, have the prior where they are new.
        """
        held, start = {}, {}
        for name, parameter in trained_as_means(model).items():
            given = parameter.detach().float()
            mean = given.clone() if self.from_given else torch.zeros_like(given)
            held[name] = mean, torch.full_like(given, math.log(self.prior_std))
            start[name] = torch.full_like(given, math.log(self.first_std))
            if name in self.known:
                old_mean, old_log_std = self.known[name]
                before = tuple(slice(size) for size in old_mean.shape)
                for now, old in zip((*held[name], start[name]), (old_mean, old_log_std, old_log_std), strict=True):
                    now[before] = old
        make_variational(model, start)
        return held

    def end(self, model: nn.Module) -> nn.Module:
        """Keeps the distributions, and leaves the means in plain layers."""
        found = distributions(model)
        self.known = {name: (mean.detach().clone(), std.detach().clone()) for name, (mean, std) in found.items()}
        return make_plain(model)

    def stds(self) -> Mapping[str, Tensor]:
        """Standard deviations by the names of the means."""
        return {name: log_std.exp().contiguous() for name, (_, log_std) in self.known.items()}
