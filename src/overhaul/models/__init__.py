"""Architectures of image classifiers that transformers does not have: their code lies beside the weights.

Plain transformers reads such a directory with `trust_remote_code=True`. Here it is read by the classes of this
package, whatever code lies in it: what a directory brings along is never run.
"""

from __future__ import annotations

import importlib
from typing import Any

_CLASSES = {
    "cct": ("cct", "CctConfig", "CctForImageClassification"),
    "efficientnet_lite": (
        "efficientnet_lite",
        "EfficientNetLiteConfig",
        "EfficientNetLiteForImageClassification",
    ),
}

MODEL_TYPES = tuple(_CLASSES)
"""As `model_type` in config.json."""

FILES = tuple(f"{module}.py" for module, _, _ in _CLASSES.values())
"""Names of the files with their code, in directories."""


def register(model_type: str) -> None:
    """Makes transformers' automatic classes know an architecture, and write its code beside weights; does so once.

    Args:
        model_type: any; those of transformers itself, and unknown ones, are left alone.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    if model_type not in _CLASSES:
        return
    config, model = classes(model_type)
    # `exist_ok`: it may be registered already, and a later transformers may have one of this name.
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModelForImageClassification.register(config, model, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForImageClassification")


def classes(model_type: str) -> tuple[Any, Any]:
    """The configuration and the classifier of one of `MODEL_TYPES`."""
    module, config, model = _CLASSES[model_type]
    loaded = importlib.import_module(f"overhaul.models.{module}")
    return getattr(loaded, config), getattr(loaded, model)


def is_own(model: Any) -> bool:
    """Whether a model's code lies beside its weights: transformers then has to be told to trust it."""
    return model.config.model_type in _CLASSES
