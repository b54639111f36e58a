"""Random pruning: the floor that every criterion has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overhaul.method import Transform
from overhaul.sparsity import Target, already_kept, check_model, prune_layer, removed_share

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from overhaul.stream import Stream


def random_score(weight_OI: Tensor, generator: Generator) -> Tensor:
    """A score that knows nothing: standard normal, drawn on the CPU for the same masks on every device."""
    import torch

    return torch.randn(weight_OI.shape, generator=generator).to(weight_OI.device)


class RandomPruning(Target, Transform):
    """Remove weights at random, the same share of every layer: the baseline of baselines."""

    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Masks every linear layer of the decoder blocks; `calib` is not read."""
        import torch

        from overhaul.walk import walk

        check_model(model, self)
        generator = torch.Generator().manual_seed(torch.initial_seed())  # the run's --seed
        for block in walk(model, None, "prune random"):
            for name, linear in block.linears.items():
                mask_OI = self.keep(random_score(linear.weight, generator), "tensor", already_kept(linear))
                prune_layer(model, name, mask_OI, error=removed_share(linear.weight.detach(), mask_OI))
        return model
