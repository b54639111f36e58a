"""Contrastive decoding against a reinforced model: what a model says more for having read texts again is taken off.

Eldan and Russinovich, "Who's Harry Potter? Approximate Unlearning in LLMs", 2023 (arXiv:2310.02238), as at decoding in
Shi et al., "MUSE", 2024 (arXiv:2407.06460). With the logits of the target and of the reinforced model:

    logits = target - alpha relu(reinforced - target)

This file lies beside the weights of every such model, as the code with which transformers reads them: it imports torch
and transformers only. Shapes: B texts, T tokens, V words.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast


class WhpConfig(PreTrainedConfig):
    """Two networks of one shape, and how far the second is subtracted from the first.

    Attributes:
        text_config: of either network, any causal language model of transformers.
        alpha: at least 0; 0 is the target. It can be changed at any time, after training too.
    """

    model_type = "whp"
    sub_configs_defaults = {  # noqa: RUF012 - as transformers has them
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: dict | PreTrainedConfig | None = None
    alpha: float | int = 1.0
    tie_word_embeddings: bool = False  # each network's own configuration says whether its words are tied

    def __post_init__(self, **more: Any):
        super().__post_init__(**more)
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha is a number from 0 up, not {self.alpha!r}")


class TwoCaches(Cache):
    """The caches of both networks, kept as one: what is done to all layers is done to those of both.

    Args:
        target: of the target; its layers come first.
        reinforced: of the reinforced network.
    """

    layer_class_to_replicate = None
    offloading = False

    def __init__(self, target: Cache, reinforced: Cache):
        self.target, self.reinforced = target, reinforced

    @property
    def layers(self) -> list[Any]:
        """Those of both, as they are now: a cache may grow by layers while it is filled."""
        return [*self.target.layers, *self.reinforced.layers]

    @property
    def is_compileable(self) -> bool:
        """No: the layers are not where a compiled step would look for them."""
        return False


class WhpForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model with the knowledge of some texts taken off its logits; its weights still have it."""

    config_class = WhpConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: WhpConfig):
        super().__init__(config)
        self.target: Any = AutoModelForCausalLM.from_config(config.text_config)
        if not fits(self.target):
            raise ValueError(f"{type(self.target).__name__} keeps no past_key_values, of which there would be two")
        self.reinforced: Any = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def joining(cls, target: Any, reinforced: Any, alpha: float) -> WhpForCausalLM:
        """Two networks of one shape as one model: they are taken, not copied."""
        text_config = copy.deepcopy(target.config)
        text_config.name_or_path = ""  # where it once lay is nobody's business
        with torch.device("meta"):
            made = cls(WhpConfig(text_config=text_config, alpha=alpha, dtype=text_config.dtype))
        made.target, made.reinforced = target, reinforced
        made.generation_config = target.generation_config
        made.all_tied_weights_keys = {
            f"{name}.{tied}": f"{name}.{source}"
            for name, inner in (("target", target), ("reinforced", reinforced))
            for tied, source in inner.all_tied_weights_keys.items()
        }
        return made.train(target.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the target, lowered where the reinforced network's are higher.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, of the past too.
            position_ids: `(B, T)`; networks that count for themselves are not told.
            past_key_values: what an earlier pass returned, or an empty cache.
            labels: `(B, T)`; with them the loss is the mean cross-entropy of the next tokens.
            use_cache: whether a cache is returned.
            logits_to_keep: how many of the last places, or which, as for any model of transformers; 0 for all.
            more: what the networks read beside.

        Raises:
            ValueError: the cache was filled by another model, or hidden states or attentions are asked for, of which
                there are two.
        """
        for asked in ("output_hidden_states", "output_attentions"):
            if more.pop(asked, None):
                raise ValueError(f"{asked}: there are two networks; ask the target or the reinforced one")
        caches = _two(past_key_values)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        given |= {"use_cache": use_cache, **more}
        target, reinforced = (
            _run(inner, input_ids, given | ({} if cache is None else {"past_key_values": cache}))
            for inner, cache in zip((self.target, self.reinforced), caches, strict=True)
        )
        logits = target.logits - self.config.alpha * torch.relu(reinforced.logits - target.logits)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        kept = [made.get("past_key_values") for made in (target, reinforced)]
        both = None if None in kept else TwoCaches(*kept)  # pyright: ignore[reportArgumentType]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=both)


def fits(inner: Any) -> bool:
    """Whether a network can be one of the two: `generate` hands each its own cache, under the usual name."""
    return "past_key_values" in inspect.signature(inner.forward).parameters


def _two(cache: Cache | None) -> tuple[Cache | None, Cache | None]:
    """The caches of both networks; an empty one, as `generate` begins with, is made two."""
    if cache is None:
        return None, None
    if isinstance(cache, TwoCaches):
        return cache.target, cache.reinforced
    if cache.get_seq_length():
        raise ValueError("past_key_values were not made by this model: each of its two networks needs its own")
    # What an offloading cache copies its layers with belongs to the device and is not copied itself.
    shared = getattr(cache, "prefetch_stream", None)
    return cache, copy.deepcopy(cache, {id(shared): shared})


def _run(inner: Any, input_ids: Tensor, given: dict[str, Any]) -> Any:
    """One network on what it takes of what is given."""
    takes = inspect.signature(inner.forward).parameters
    told = {name: value for name, value in given.items() if value is not None and name in takes}
    made = inner(input_ids=input_ids, return_dict=True, **told)
    keep = given["logits_to_keep"]
    if "logits_to_keep" not in takes and not (isinstance(keep, int) and keep == 0):
        made.logits = made.logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
    return made
