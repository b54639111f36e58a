"""What is kept in integers, in which blocks, and how it is computed: read without torch, written into `config.json`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from overhaul.method import Positive, Settings

ScaleKind = Literal["shift", "fp16", "fp32"]
Mode = Literal["w8a8", "w4a8", "w8a32", "w4a32"]
Part = Literal["weights", "embedding", "matmul", "activation", "softmax", "norm", "residual", "cache"]
PARTS: tuple[Part, ...] = ("weights", "embedding", "matmul", "activation", "softmax", "norm", "residual", "cache")
STORED: tuple[Part, ...] = ("weights", "embedding")
"""The parts that lie on disk; a mode that ends in a32 has no others."""
LONGEST_INNER = (2**31 - 1) // 127**2
"""Products of two 8-bit integers that an int32 can sum whatever they are."""


class Scheme(Settings):
    """Settings of blockwise compression, as they are stored with the model."""

    mode: Mode = Field(
        "w8a8", description="Bits of weights and of everything computed; a32 stores integers and computes in floats."
    )
    block: str = Field("1x64", description="Block of a weight matrix: ROWSxCOLUMNS, row or tensor.")
    embedding_block: str = Field("1x64", description="Block of the embedding, rows being tokens.")
    activation_block: Positive = Field(16, description="Neighbouring channels of one token that share a shift.")
    cache_block: Positive = Field(64, description="Channels of one key or value of one head that share a shift.")
    scale: ScaleKind = Field("shift", description="Of weights and embedding: a power of two in one byte, or a float.")
    accumulate: Literal["float", "integer"] = Field(
        "float", description="Sum of a product's blocks: in fp32, or shifted to one exponent and summed in int32."
    )
    probabilities: Literal["block", "unit"] = Field(
        "block", description="Attention weights: 8 bits with a shift per block, or 8 bits of 1/255."
    )
    parts: tuple[Part, ...] = Field(PARTS, description="What is compressed; leave some out to measure what each costs.")

    @field_validator("block", "embedding_block")
    @classmethod
    def _a_block(cls, text: str) -> str:
        parse_block(text)
        return text

    @field_validator("parts")
    @classmethod
    def _some_parts(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if not parts:
            raise ValueError(f"nothing would be compressed; give at least one of {' '.join(PARTS)}")
        return tuple(part for part in PARTS if part in parts)

    @model_validator(mode="after")
    def _consistent(self) -> Scheme:
        if self.accumulate == "integer" and self.scale != "shift":
            raise ValueError(f"integers are summed by shifting: accumulate integer needs scale shift, not {self.scale}")
        if not self.computes and not set(self.parts) & set(STORED):
            raise ValueError(f"mode {self.mode} stores {' and '.join(STORED)} only; parts names neither")
        return self

    @property
    def bits(self) -> int:
        """Of a stored weight, where no other width was chosen for its tensor."""
        return int(self.mode[1])

    @property
    def computes(self) -> bool:
        """Whether activations are integers too."""
        return self.mode.endswith("a8")

    def has(self, part: Part) -> bool:
        """Whether a part is compressed in this mode."""
        return part in self.parts and (self.computes or part in STORED)


def parse_block(text: str) -> tuple[int | None, int | None]:
    """`16x64` -> (16, 64); None is as many as the tensor has: `row` -> (1, None), `tensor` -> (None, None).

    Raises:
        ValueError: neither of these, or without elements.
    """
    named: dict[str, tuple[int | None, int | None]] = {"row": (1, None), "tensor": (None, None)}
    if text in named:
        return named[text]
    sizes = re.fullmatch(r"(\d+)x(\d+)", text)
    if not sizes or 0 in (int(sizes[1]), int(sizes[2])):
        raise ValueError(f"{text!r} is no block; allowed: ROWSxCOLUMNS with both from 1, such as 1x64, row, tensor")
    return int(sizes[1]), int(sizes[2])


def block_of(text: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The block that `text` means for a matrix: never larger than the matrix."""
    rows, columns = parse_block(text)
    return min(rows or shape[0], shape[0]), min(columns or shape[1], shape[1])


def is_clamped(text: str, shape: tuple[int, int]) -> bool:
    """Whether a block was asked for that is larger than the matrix."""
    rows, columns = parse_block(text)
    return (rows or 0) > shape[0] or (columns or 0) > shape[1]
