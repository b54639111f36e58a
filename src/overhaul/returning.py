"""What may bring back what a model was to forget: weights in fewer bits, or a little training on other text.

Unlearning that moves weights less than a step between two integers is undone by rounding (Zhang et al.: Catastrophic
Failure of LLM Unlearning via Quantization, ICLR 2025), and what was only covered comes up again when a model is trained
on something else (Hu et al.: Unlearning or Obfuscating? Jogging the Memory of Unlearned LLMs via Benign Relearning,
ICLR 2025).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from overhaul.errors import UserError
from overhaul.method import PeakRate, Positive, SeqLen, Settings

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data

Way = Literal["int8", "int4", "relearn"]


class Relearn(Settings):
    """Training on text that says nothing of what was forgotten."""

    data: str = Field(
        "sample", min_length=1, description="Text that is trained on, which says nothing of what was forgotten."
    )
    steps: Positive = Field(20, description="Steps on it.")
    lr: PeakRate = Field(2e-5, description="Peak learning rate.")
    batch_size: Positive = Field(4, description="Windows a step.")
    seq_len: SeqLen = Field(256, description="Tokens of a window.")


def refuse_beside(directory: Path, name: str) -> None:
    """`UserError` where something beside the weights answers too: it fits no others than these."""
    from overhaul import banks
    from overhaul.deletion import ensemble

    if ensemble.is_there(directory) or banks.files(directory):
        raise UserError(f"{name} answers with what lies beside its weights, which would fit them no more")


def after(way: Way, model: nn.Module, data: Data, relearn: Relearn) -> nn.Module:
    """The model with int8 weights and products (`quantize int8`), int4 weights (`quantize bct`), or trained on.

    Args:
        way: which of them.
        model: changed in place.
        data: of the model, whose tokenizer, seed and precision are used.
        relearn: how it is trained.

    Raises:
        UserError: the model is quantized already, there is no such text, or training diverges.
    """
    if way == "relearn":
        return _trained(model, data, relearn)
    if way == "int8":
        from overhaul.quantize.int8 import Int8

        return Int8.model_validate({}).apply(model, None)
    from overhaul.quantize.bct import Bct

    rounding = Bct.model_validate({"mode": "w4a32", "store": "dense"})
    rounding.check(model, None)
    return rounding.apply(model, None)


def _trained(model: nn.Module, data: Data, relearn: Relearn) -> nn.Module:
    from overhaul import machine
    from overhaul.adapt.full import Full
    from overhaul.train import train
    from overhaul.workspace import finish

    how = Full.model_validate({**relearn.model_dump(exclude={"data"}), "save_every": 0})
    other = data.on(relearn.data)
    how.check(model, other)
    machine.seed_everything(data.seed)
    plan = how.plan(model, other)
    train(plan, how, seed=data.seed, dtype=data.dtype, quiet=True)
    return finish(plan).eval()
