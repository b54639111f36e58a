"""Which kind of model a directory holds, by the class that its configuration names; each kind is read by one class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any


class Kind(Enum):
    """What a model does: the value is how users are told."""

    CAUSAL_LM = "causal language model"
    IMAGE_CLASSIFIER = "image classifier"
    TEXT_CLASSIFIER = "text classifier"
    ENCODER = "encoder without a head"


_ENDS = {"ForImageClassification": Kind.IMAGE_CLASSIFIER, "ForSequenceClassification": Kind.TEXT_CLASSIFIER}


def kind_of(config: Any) -> Kind:
    """The kind of the model that a configuration describes; one that names no class is a causal language model.

    Args:
        config: of transformers, or the contents of config.json.
    """
    named = config.get("architectures") if isinstance(config, Mapping) else getattr(config, "architectures", None)
    return _told_by(named or ())


def kind_of_model(model: Any) -> Kind:
    """The kind of a model in memory, by its class: its configuration names one only if it was read from files."""
    return _told_by([type(model).__name__])


def _told_by(names: Iterable[str]) -> Kind:
    for name in names:
        if name.endswith("Model") and not name.endswith("LMHeadModel"):
            return Kind.ENCODER
        if kind := next((kind for end, kind in _ENDS.items() if name.endswith(end)), None):
            return kind
    return Kind.CAUSAL_LM


def is_classifier(model: Any) -> bool:
    """Whether a model gives logits of classes, one row an example."""
    return kind_of_model(model) in _ENDS.values()


def class_of(kind: Kind) -> Any:
    """The class of transformers that reads models of a kind."""
    import transformers

    return {
        Kind.CAUSAL_LM: transformers.AutoModelForCausalLM,
        Kind.IMAGE_CLASSIFIER: transformers.AutoModelForImageClassification,
        Kind.TEXT_CLASSIFIER: transformers.AutoModelForSequenceClassification,
        Kind.ENCODER: transformers.AutoModel,
    }[kind]


def processor_of(kind: Kind) -> Any:
    """The class of transformers that makes inputs of text or images for a kind of model."""
    import transformers

    return transformers.AutoImageProcessor if kind is Kind.IMAGE_CLASSIFIER else transformers.AutoTokenizer
