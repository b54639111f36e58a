"""Architectures that transformers does not have: their code lies beside the weights.

Plain transformers reads such a directory with `trust_remote_code=True`. Here it is read by the classes of this
package, whatever code lies in it: what a directory brings along is never run.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

_IMAGES, _TEXT = "AutoModelForImageClassification", "AutoModelForCausalLM"
_CLASSES = {
    "cct": ("CctConfig", "CctForImageClassification", _IMAGES),
    "efficientnet_lite": ("EfficientNetLiteConfig", "EfficientNetLiteForImageClassification", _IMAGES),
    "whp": ("WhpConfig", "WhpForCausalLM", _TEXT),
}

MODEL_TYPES = tuple(_CLASSES)
"""As `model_type` in config.json."""

FILES = tuple(f"{module}.py" for module in _CLASSES)
"""Names of the files with their code, in directories."""


def register(model_type: str) -> None:
    """Makes transformers' automatic classes know an architecture, and write its code beside weights; does so once.

    Args:
        model_type: any; those of transformers itself, and unknown ones, are left alone.
    """
    import transformers

    if model_type not in _CLASSES:
        return
    config, model = classes(model_type)
    automatic = _CLASSES[model_type][-1]
    # `exist_ok`: it may be registered already, and a later transformers may have one of this name.
    transformers.AutoConfig.register(model_type, config, exist_ok=True)
    getattr(transformers, automatic).register(config, model, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class(automatic)


def classes(model_type: str) -> tuple[Any, Any]:
    """The configuration and the model of one of `MODEL_TYPES`."""
    config, model, _ = _CLASSES[model_type]
    loaded = importlib.import_module(f"overhaul.models.{model_type}")
    return getattr(loaded, config), getattr(loaded, model)


def is_own(model: Any) -> bool:
    """Whether a model's code lies beside its weights: transformers then has to be told to trust it."""
    return model.config.model_type in _CLASSES


def beside_weights(directory: Path) -> bytes:
    """What config.json says that can be changed after training as weights can, and that nothing in their files tells.

    It is `alpha` of two networks; of any other model, and where nothing can be read, nothing.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
        return f"alpha {float(config['alpha'])!r}".encode() if config["model_type"] == "whp" else b""
    except (OSError, ValueError, KeyError, TypeError):
        return b""


def is_of_two(model: Any) -> bool:
    """Whether a language model is made of the logits of two networks: it has no hidden states, nor one stack of blocks.

    Args:
        model: any module, or a configuration; what is none of transformers' is not of two.
    """
    return getattr(getattr(model, "config", model), "model_type", None) == "whp"
