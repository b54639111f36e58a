"""VeRA (Kopiczko et al., 2024): a low-rank increment of which only two vectors are trained.

dW = diag(b) B diag(d) A          section 3.1; A (R, I) and B (O, R) random, shared by all layers
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overhaul.layers import Adapter, to_linear
from overhaul.layers.lora import incremented, lora_linear
from overhaul.random_bases import VeRABases


class VeRALinear(Adapter):
    """A frozen linear layer with an increment of O + R trained numbers, fp32.

    Attributes:
        vera_lambda_b: (O,), begins at zero.
        vera_lambda_d: (R,).
        bases: the random factors.
        weight, bias: the base's own parameters; the weight is frozen.
    """

    def __init__(self, base: nn.Linear, bases: VeRABases, lambda_b: Tensor, lambda_d: Tensor) -> None:
        super().__init__(base)
        device = base.weight.device
        self.bases = bases.to(device)
        self.vera_lambda_b = nn.Parameter(lambda_b.to(device, torch.float32))
        self.vera_lambda_d = nn.Parameter(lambda_d.to(device, torch.float32))
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias

    @classmethod
    def from_linear(cls, base: nn.Linear, bases: VeRABases, d_initial: float) -> VeRALinear:
        """Takes over the parameters of `base` (no copy), freezes its weight and starts at an increment of zero."""
        rank = bases.rank
        return cls(base, bases, torch.zeros(base.out_features), torch.full((rank,), d_initial))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`."""
        if not self.enabled:
            return nn.functional.linear(x, self.weight, self.bias)
        return lora_linear(x, self.weight, self.bias, *self._factors(), 1.0)

    def dense(self) -> Tensor:
        """W + dW, fp32."""
        return incremented(self.weight, *self._factors(), 1.0, torch.float32)

    def merge(self) -> nn.Linear:
        """A plain linear layer of the base's dtype."""
        return to_linear(self.dense().to(self.weight.dtype), self.bias, training=self.training)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """diag(d) A (R, I) and diag(b) B (O, R)."""
        A_RI, B_OR = self.bases.A_RI[:, : self.in_features], self.bases.B_OR[: self.out_features]
        return self.vera_lambda_d[:, None] * A_RI, self.vera_lambda_b[:, None] * B_OR
