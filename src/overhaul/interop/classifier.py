"""Classifiers of transformers: logits, the features below the head, and a head that grows with the classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from overhaul.errors import UserError

INPUTS = ("pixel_values", "input_ids", "inputs_embeds", "attention_mask")
"""What of a batch a classifier reads; labels and tasks are for objectives."""


PENULTIMATE = ""
"""As the name of a layer: what the head reads of each example, `(B, D)`."""


class Classified(NamedTuple):
    """What one pass through a classifier gives.

    Attributes:
        logits: `(B, C)`.
        features: of the layers that were asked for, `(B, ...)` each.
    """

    logits: Tensor
    features: Mapping[str, Tensor]


def classified(model: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[str] = ()) -> Classified:
    """One pass through a classifier.

    Args:
        model: of transformers, with a linear head.
        batch: `{"pixel_values": (B, C, H, W)}` or `{"input_ids": (B, T), "attention_mask": (B, T)}`; of a model from
            which the blocks below were taken, which reads each text at its last token, with what flows into the others
            as `inputs_embeds`, `(B, T, D)`. A classifier of images takes these beside its pixels where it was taught to
            (see `unlearning.below`).
        layers: whose output is kept, by their dotted names; `PENULTIMATE` for what the head reads. Of texts it is the
            mean over their tokens.
    """
    features: dict[str, Tensor] = {}
    given = inputs_of(batch)
    with ExitStack() as hooks:
        for name in layers:
            hook = _keep_output(model, name, given, features) if name else _keep_read(model, given, features)
            hooks.callback(hook.remove)
        called: Any = model
        in_place_of_tokens = "inputs_embeds" in given and "pixel_values" not in given
        logits_BC = _above(model, given) if in_place_of_tokens else called(**given).logits
    return Classified(logits_BC, features)


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a classifier reads; of texts without the places at the end that are padding in all of them."""
    given = {name: batch[name] for name in INPUTS if name in batch}
    if "inputs_embeds" in given:
        given.pop("input_ids", None)
    if "attention_mask" in given:
        width = int(given["attention_mask"].sum(dim=1).max())  # padding is on the right
        given = {name: tensor[:, :width] for name, tensor in given.items()}
    return given


def _above(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """Logits from states in place of tokens, by which transformers' own classifier would find where texts end."""
    inner: Any = model
    states_BTD = inner.base_model(**given, use_cache=False).last_hidden_state
    return head_of(model)[1](_of_last_tokens(states_BTD, given))


def _keep_output(model: nn.Module, name: str, batch: Mapping[str, Tensor], into: dict[str, Tensor]) -> RemovableHandle:
    def keep(_module: nn.Module, _given: Any, made: Any) -> None:
        output = made if isinstance(made, Tensor) else made[0]
        mask_BT = batch.get("attention_mask")
        if mask_BT is not None and output.shape[:2] == mask_BT.shape:
            output = _of_all_tokens(output, mask_BT)
        into[name] = output

    return model.get_submodule(name).register_forward_hook(keep)


def _of_all_tokens(states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Their mean over the tokens of each text, so that padding says nothing."""
    weights_BT1 = (mask_BT / mask_BT.sum(dim=1, keepdim=True)).to(states_BTD.dtype)[..., None]
    return (states_BTD * weights_BT1).sum(dim=1)


def _keep_read(model: nn.Module, batch: Mapping[str, Tensor], into: dict[str, Tensor]) -> RemovableHandle:
    def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        # The head of a text classifier reads every token, and the last one of each text counts.
        into[PENULTIMATE] = given[0] if given[0].ndim == 2 else _of_last_tokens(given[0], batch)

    return head_of(model)[1].register_forward_pre_hook(keep)


def _of_last_tokens(states_BTD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    mask_BT = batch.get("attention_mask")
    if mask_BT is None:
        return states_BTD[:, -1]
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (places_T * mask_BT).argmax(dim=1)
    return states_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """The head's dotted name and the head: the last linear layer, with a row for each class.

    Raises:
        UserError: the model's last linear layer has not as many rows as the model has classes.
    """
    inner: Any = model
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fitting = [(name, module) for name, module in linears if module.out_features == inner.config.num_labels]
    if not fitting:
        count = inner.config.num_labels
        last = f"the last is {linears[-1][0]} with {linears[-1][1].out_features}" if linears else "it has none"
        raise UserError(
            f"no linear layer of {type(model).__name__} has a row for each of its {count} classes: {last}",
            allowed="classifiers that end in one linear layer",
        )
    return fitting[-1]


def draw_head(head: nn.Linear, dice: torch.Generator) -> None:
    """A head as it is before anything is learnt, drawn as PyTorch draws a linear layer, in place."""
    bound = head.in_features**-0.5
    for parameter in head.parameters():
        parameter.data = torch.empty(parameter.shape).uniform_(-bound, bound, generator=dice).to(parameter)


def with_head(model: nn.Module) -> nn.Module:
    """The body of a language model or an encoder, not copied, under a head for classes of which it has none yet.

    Args:
        model: of an architecture of which transformers has a classifier of texts.

    Raises:
        UserError: it has none.
    """
    from transformers import AutoModelForSequenceClassification

    inner: Any = model
    config = copy.deepcopy(inner.config)
    config.id2label, config.label2id = {0: ""}, {"": 0}
    try:
        with torch.device("meta"):
            made: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(
            f"transformers has no classifier of texts for the architecture {config.model_type!r}",
            allowed="Llama, Mistral, Qwen, GPT-2 and others",
        ) from error
    where, head = head_of(made)
    setattr(made, made.base_model_prefix, inner.base_model)
    body = next(inner.base_model.parameters())
    how: dict[str, Any] = {"bias": head.bias is not None, "device": body.device, "dtype": body.dtype}
    empty = nn.Linear(head.in_features, 1, **how)
    for name, parameter in list(empty.named_parameters()):
        setattr(empty, name, nn.Parameter(parameter.detach()[:0]))
    empty.out_features = 0
    parent, _, child = where.rpartition(".")
    setattr(made.get_submodule(parent), child, empty)
    left = [name for name, tensor in (*made.named_parameters(), *made.named_buffers()) if tensor.is_meta]
    if left:
        raise UserError(
            f"the classifier of {config.model_type!r} has more than a head beside the model, such as {left[0]}",
            allowed="architectures whose classifier is the model and one linear layer",
        )
    name_classes(made, ())
    made.num_labels = 0
    return made.train(model.training)


def can_pad(model: nn.Module, tokenizer: Any) -> None:
    """Gives tokenizer and configuration one padding token, the tokenizer's or its end of text, where they have none.

    Raises:
        UserError: the tokenizer has neither.
    """
    config: Any = model.config
    if tokenizer.pad_token_id is None:
        if config.pad_token_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        elif tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        else:
            raise UserError("the tokenizer has no token for padding, and none for the end of a text")
    # A classifier finds the end of a text by it.
    config.pad_token_id = tokenizer.pad_token_id


def channels_of(model: nn.Module) -> int:
    """Of the images that a classifier reads: those of its first convolution, or of its patches."""
    inner: Any = model
    return inner.config.num_channels


def classes_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's classes, in the order of its logits."""
    inner: Any = model
    return tuple(inner.config.id2label[number] for number in range(inner.config.num_labels))


def set_classes(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Gives the head a row for each class, in place: those of classes that it knows by name stay, others begin anew.

    Args:
        model: a classifier.
        names: of the classes, each once, in the order of the logits to come.

    Returns:
        The classes that the model had and has no longer.
    """
    known = {name: place for place, name in enumerate(classes_of(model))}
    where, head = head_of(model)
    made = nn.Linear(head.in_features, len(names), bias=head.bias is not None)
    made.to(head.weight.device, head.weight.dtype)
    with torch.no_grad():
        for place, name in enumerate(names):
            if name in known:
                made.weight[place] = head.weight[known[name]]
                if head.bias is not None:
                    made.bias[place] = head.bias[known[name]]
    name_classes(model, names)
    parent, _, child = where.rpartition(".")
    setattr(model.get_submodule(parent), child, made)
    inner: Any = model
    inner.num_labels = len(names)
    return tuple(name for name in known if name not in names)


def name_classes(model: nn.Module, names: tuple[str, ...]) -> None:
    """Writes the names of the classes, and how many there are, into the model's configuration."""
    inner: Any = model
    inner.config.id2label = dict(enumerate(names))
    inner.config.label2id = {name: number for number, name in enumerate(names)}
