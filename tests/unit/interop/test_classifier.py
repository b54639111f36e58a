"""Classifiers: which directories hold one, logits and features, a head that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip

from overhaul import artifact
from overhaul.errors import UserError
from overhaul.interop.classifier import PENULTIMATE, classes_of, classified, draw_head, head_of, set_classes, with_head
from overhaul.kinds import Kind, is_classifier, kind_of

SHAPES = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
        ),
    ),
    "llama": lambda: LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            num_labels=3,
            pad_token_id=0,
        ),
    ),
}


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return SHAPES[request.param]().eval()


def batch(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(5, 1, 8, 8), "labels": torch.arange(5) % 3}
    mask_BT = (torch.arange(7) < torch.tensor([7, 4, 6, 5, 2])[:, None]).long()
    return {"input_ids": torch.randint(1, 50, (5, 7)) * mask_BT, "attention_mask": mask_BT}


def test_logits_are_the_models_and_the_head_makes_them_of_the_features(model: Any):
    found = classified(model, given := batch(model), (PENULTIMATE,))

    inputs = {name: tensor for name, tensor in given.items() if name != "labels"}
    assert torch.equal(found.logits, model(**inputs).logits)
    _, head = head_of(model)
    assert torch.allclose(head(found.features[PENULTIMATE]), found.logits, atol=1e-6)
    assert found.features[PENULTIMATE].shape == (5, head.in_features)


def test_the_output_of_a_layer_is_kept_where_it_is_asked_for(model: Any):
    where = next(
        name for name, module in model.named_modules() if "norm" in name.lower() and not list(module.children())
    )
    seen = []
    hook = model.get_submodule(where).register_forward_hook(lambda _m, _given, made: seen.append(made))
    found = classified(model, batch(model), (where,))
    hook.remove()

    mask_BT = batch(model).get("attention_mask")
    of_tokens = mask_BT is not None and seen[0].shape[:2] == mask_BT.shape
    expected = [row[: int(mask.sum())].mean(0) for row, mask in zip(seen[0], mask_BT, strict=True)] if of_tokens else []
    torch.testing.assert_close(found.features[where], torch.stack(expected) if expected else seen[0])
    assert classified(model, batch(model)).features == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_head_grows_behind_the_classes_that_are_known(model: Any):
    before = classified(model, given := batch(model)).logits

    assert set_classes(model, (*classes_of(model), "new", "newer")) == ()

    after = classified(model, given).logits
    assert after.shape == (5, 5)
    assert torch.allclose(after[:, :3], before, atol=1e-6)
    assert classes_of(model)[3:] == ("new", "newer")
    assert model.config.label2id["newer"] == 4


def test_classes_are_known_by_name_wherever_they_stand(model: Any):
    before = classified(model, given := batch(model)).logits

    assert set_classes(model, ("LABEL_2", "new", "LABEL_0")) == ("LABEL_1",)

    after = classified(model, given).logits
    assert torch.allclose(after[:, [0, 2]], before[:, [2, 0]], atol=1e-6)
    assert classes_of(model) == ("LABEL_2", "new", "LABEL_0")


def test_a_model_without_a_linear_head_is_refused(model: Any):
    model.config.id2label = dict(enumerate("abcdefghijk"))

    with pytest.raises(UserError, match="has a row for each of its 11 classes: the last is"):
        head_of(model)


def test_kinds_are_read_from_the_configuration(model: Any, tmp_path: Path):
    model.save_pretrained(tmp_path)

    assert is_classifier(model)
    kind = kind_of(type(model.config).from_pretrained(tmp_path))
    assert kind is (Kind.IMAGE_CLASSIFIER if "pixel_values" in batch(model) else Kind.TEXT_CLASSIFIER)
    assert kind_of({}) is kind_of({"architectures": ["LlamaForCausalLM"]}) is Kind.CAUSAL_LM
    with pytest.raises(UserError) as refused:
        artifact.load(tmp_path)
    assert refused.value.given.endswith(f"is a model of another kind: {kind.value}")


def test_a_head_keeps_its_type_and_place():
    model = SHAPES["resnet"]().to(torch.bfloat16)
    set_classes(model, (*classes_of(model), "new"))

    name, head = head_of(model)
    assert name == "classifier.1"
    assert head.weight.dtype == torch.bfloat16
    assert isinstance(model.get_submodule(name), nn.Linear)


DECODERS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50,
            is_decoder=True,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
            vocab_size=50,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_head_for_texts_goes_on_any_decoder_and_reads_its_last_token(architecture: str):
    torch.manual_seed(0)
    decoder = DECODERS[architecture]().eval()
    model: Any = with_head(decoder)
    model.config.pad_token_id = 0
    assert set_classes(model, ("a", "b")) == ()

    ids_BT = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    found = classified(model, {"input_ids": ids_BT, "attention_mask": (ids_BT != 0).long()}, (PENULTIMATE,))

    assert is_classifier(model)
    states_TD = decoder.base_model(input_ids=ids_BT[:1, :3]).last_hidden_state[0]
    torch.testing.assert_close(found.features[PENULTIMATE][0], states_TD[-1], rtol=1e-4, atol=1e-5)
    head = head_of(model)[1]
    torch.testing.assert_close(found.logits, head(found.features[PENULTIMATE]))


def test_states_in_place_of_tokens_are_read_at_the_last_one():
    torch.manual_seed(0)
    model: Any = with_head(DECODERS["qwen2"]().eval())
    model.config.pad_token_id = 0
    set_classes(model, ("a", "b", "c"))
    ids_BT = torch.tensor([[5, 6, 7, 0, 0, 0], [8, 9, 10, 11, 12, 0]])
    words = {"input_ids": ids_BT, "attention_mask": (ids_BT != 0).long()}

    by_states = classified(model, {**words, "inputs_embeds": model.get_input_embeddings()(ids_BT)}, (PENULTIMATE,))
    by_words = classified(model, words, (PENULTIMATE,))

    torch.testing.assert_close(by_states.logits, by_words.logits)
    torch.testing.assert_close(by_states.features[PENULTIMATE], by_words.features[PENULTIMATE])


def test_an_encoder_gets_a_head():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    encoder = BertModel(BertConfig(num_hidden_layers=1, **sizes)).eval()
    model: Any = with_head(encoder)
    set_classes(model, ("a", "b", "c"))

    ids_BT = torch.tensor([[5, 6, 7]])
    logits_BC = classified(model, {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}).logits
    torch.testing.assert_close(logits_BC, head_of(model)[1](encoder(ids_BT).pooler_output))


def test_a_head_is_drawn_by_its_dice_alone():
    heads = [nn.Linear(16, 3), nn.Linear(16, 3)]
    for head in heads:
        draw_head(head, torch.Generator().manual_seed(4))
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert torch.equal(heads[0].bias, heads[1].bias)
    assert 0 < heads[0].weight.abs().max() <= 0.25


def test_an_architecture_without_a_classifier_of_texts_is_refused():
    with pytest.raises(UserError, match="no classifier of texts for the architecture 'codegen'"):
        with_head(CodeGenForCausalLM(CodeGenConfig(n_embd=16, n_layer=1, n_head=4, rotary_dim=2, vocab_size=50)))


def test_an_encoder_that_classifies_texts_is_not_changed_by_padding():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    model = BertForSequenceClassification(config).eval()
    ids_BT = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    layers = ("bert.encoder.layer.0", PENULTIMATE)

    together = classified(model, {"input_ids": ids_BT, "attention_mask": (ids_BT != 0).long()}, layers)

    alone = classified(model, {"input_ids": ids_BT[:1, :3], "attention_mask": torch.ones(1, 3).long()}, layers)
    torch.testing.assert_close(together.logits[:1], alone.logits, rtol=1e-4, atol=1e-5)
    for name in layers:
        assert together.features[name].shape == (2, 16)
        torch.testing.assert_close(together.features[name][:1], alone.features[name], rtol=1e-4, atol=1e-5)
