"""`format: bct`: how blocks lie on disk.

`NAME.weight` holds the integers of a matrix row by row, int8, or uint8 with two to a byte, and `NAME.scale` one shift
(int8) or float per block, also row by row. Shapes are the model's; blocks and everything else stand in `config.json`
under `quantization_config`: the fields of the scheme, and under `bits` the tensors whose width is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from overhaul.bct.model import block_matrices, prepare
from overhaul.bct.scheme import Scheme
from overhaul.errors import UserError

FORMAT, VERSION = "bct", 1


def refuse(settings: Mapping[str, Any]) -> None:
    """Raises `UserError` for a newer version, or settings that are none."""
    if settings.get("version") != VERSION:
        raise UserError(
            f"version {settings.get('version')!r} of the format bct is not known here",
            allowed=f"version {VERSION}",
            hint="a newer overhaul",
        )
    try:
        scheme_of(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"quantization_config in config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            hint="a sound copy of the model",
        ) from error


def scheme_of(settings: Mapping[str, Any]) -> Scheme:
    """The scheme in a `quantization_config`."""
    return Scheme.model_validate({name: settings[name] for name in Scheme.model_fields if name in settings})


def layers(model: nn.Module, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replaces modules of an uninitialised model by empty ones, in place; the settings say which."""
    prepare(model, scheme_of(settings), settings["bits"])


def settings(model: nn.Module) -> dict[str, Any]:
    """What `quantization_config` says of a model with packed layers."""
    inner: Any = model
    return dict(inner.config.quantization_config)


def written_settings(model: nn.Module, scheme: Scheme) -> dict[str, Any]:
    """What `quantization_config` will say of a model that was just converted."""
    others = {name: matrix.bits for name, matrix in block_matrices(model).items() if matrix.bits != scheme.bits}
    return {"format": FORMAT, "version": VERSION, **scheme.model_dump(mode="json"), "bits": others}
