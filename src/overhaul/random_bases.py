"""Frozen random matrices that all adapters of a model share, drawn again from a key instead of stored.

Letters of shapes: R rank, N bases, d the smaller and D the larger side of the largest layer, M = R N.

They are drawn as the package peft draws them, number for number, so that adapters go from one to the other without
their bases. torch does not promise the same numbers in every build, hence the checksum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from overhaul.errors import UserError

Kind = Literal["dense", "sparse", "very_sparse"]


class RandLoRABases(nn.Module):
    """The two banks of RandLoRA (Albert et al., 2025), from which every layer takes the part that fits its shape.

    Attributes:
        rank: R, of one base.
        key: what they are drawn from.
        kind: how: uniform numbers, or -1, 0, 1 with two thirds zeros, or with all but 1 / sqrt(d) zeros.
        saved: whether they are written with an adapter, for readers whose torch draws other numbers.
    """

    A_Rd: Tensor
    B_DNR: Tensor

    def __init__(self, A_Rd: Tensor, B_DNR: Tensor, *, key: int, kind: Kind, saved: bool = False) -> None:
        super().__init__()
        self.rank, self.key, self.kind, self.saved = A_Rd.shape[0], key, kind, saved
        self.register_buffer("A_Rd", A_Rd.float().contiguous(), persistent=False)
        self.register_buffer("B_DNR", B_DNR.float().contiguous(), persistent=False)
        self._cut: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @classmethod
    def draw(
        cls, shapes: Iterable[tuple[int, int]], rank: int, *, key: int = 0, kind: Kind = "dense", saved: bool = False
    ) -> RandLoRABases:
        """Bases that are large enough for layers of these shapes (O, I).

        Both sides are maxima of their own, as in peft: the entries depend on all layers that share the bases.
        """
        outs, ins = zip(*shapes, strict=True)
        small, large = sorted((max(outs), max(ins)))
        num_bases = math.ceil(small / rank)
        generator = torch.Generator().manual_seed(key)
        if kind == "dense":
            A_R1d = _uniform((rank, 1, small), generator)
            B_DNR = torch.cat([_uniform((large, 1, rank), generator) for _ in range(num_bases)], dim=1)
        else:
            zeros = 3.0 if kind == "sparse" else math.sqrt(small)
            A_R1d = _ternary(torch.rand(rank, 1, small, generator=generator), zeros)
            B_DNR = _ternary(torch.rand(large, num_bases, rank, generator=generator), zeros)
        A_R1d, B_DNR = A_R1d / A_R1d.std(), B_DNR / B_DNR.std()
        return cls(A_R1d[:, 0], B_DNR, key=key, kind=kind, saved=saved)

    def part(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """A (R, d), fp32, and B (D, M) of a layer; the columns of B are those of its bases, one base after the other.

        Layers of one shape get the same B: it is cut out and converted once, which in each pass of each layer would
        take as long as a product.

        Args:
            out_features, in_features: of the layer.
            dtype: of B.

        Raises:
            UserError: the layer is larger than those that the bases were drawn for.
        """
        small, large = sorted((out_features, in_features))
        num_bases = math.ceil(small / self.rank)
        if small > self.A_Rd.shape[1] or large > self.B_DNR.shape[0] or num_bases > self.B_DNR.shape[1]:
            raise UserError(
                f"a layer of {out_features} x {in_features} needs {num_bases} bases of {large} x {self.rank}; the "
                f"shared ones are {self.B_DNR.shape[1]} of {self.B_DNR.shape[0]} x {self.rank}",
                hint="bases drawn for the largest layers first",
            )
        made = self._cut.get((small, large, dtype))
        if made is None or made.device != self.B_DNR.device:
            with torch.inference_mode(False):  # it is used in training too
                made = self.B_DNR[:large, :num_bases].flatten(1).to(dtype)
            self._cut[small, large, dtype] = made
        return self.A_Rd[:, :small], made

    def checksum(self) -> str:
        """SHA-256 of both banks."""
        return _sha256(self.A_Rd, self.B_DNR)


class VeRABases(nn.Module):
    """The two random factors of VeRA (Kopiczko et al., 2024), A (R, I) and B (O, R) of the largest layer, fp32."""

    A_RI: Tensor
    B_OR: Tensor

    def __init__(self, A_RI: Tensor, B_OR: Tensor, *, key: int) -> None:
        super().__init__()
        self.rank, self.key = len(A_RI), key
        self.register_buffer("A_RI", A_RI.float(), persistent=False)
        self.register_buffer("B_OR", B_OR.float(), persistent=False)

    @classmethod
    def draw(cls, shapes: Iterable[tuple[int, int]], rank: int, *, key: int = 0) -> VeRABases:
        """Factors that are large enough for layers of these shapes (O, I)."""
        outs, ins = zip(*shapes, strict=True)
        generator = torch.Generator().manual_seed(key)
        A_RI = nn.init.kaiming_uniform_(torch.empty(rank, max(ins)), generator=generator)
        return cls(A_RI, nn.init.kaiming_uniform_(torch.empty(max(outs), rank), generator=generator), key=key)

    def checksum(self) -> str:
        """SHA-256 of both factors."""
        return _sha256(self.A_RI, self.B_OR)


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _uniform(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Uniform numbers, drawn in bfloat16 as peft draws them where there is bfloat16."""
    drawn = torch.empty(shape, dtype=torch.bfloat16)
    return nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)


def _ternary(uniform: Tensor, zeros: float) -> Tensor:
    """-1 and 1 with probability 1 / (2 zeros) each, else 0."""
    share = 1 / (2 * zeros)
    return (uniform > 1 - share).float() - (uniform < share).float()
