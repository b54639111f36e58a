"""Where ConTraCon's banks go: how many numbers, which heads, what is refused, and what is merged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, LlamaConfig, LlamaForSequenceClassification

from images import write_cnn, write_vit
from overhaul import artifact, banks
from overhaul.banks import Banked, fingerprint
from overhaul.errors import UserError
from overhaul.kinds import Kind
from overhaul.layers.masked import MaskedLinear
from overhaul.layers.reweighted import Reweighted
from overhaul.sockets.reprogramming import Reprogramming
from overhaul.sockets.reweighting import Reweighting, projections


def vit(directory: Path, **how: Any) -> Any:
    return artifact.load(write_vit(directory, **how), kinds=(Kind.IMAGE_CLASSIFIER,)).model


def moved(banked: Banked, by: int) -> None:
    """Fills what is a task's own with other numbers, as training would."""
    torch.manual_seed(by)
    for parameter in banked.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)


def pixels(count: int = 4) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))}


class Encoder(nn.Module):
    """A compact convolutional transformer as far as a bank sees it: six blocks of four heads, 256 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=4, num_labels=10)
        self.tokenizer = nn.Conv2d(3, 256, 3)
        self.blocks = nn.ModuleList([nn.ModuleDict(self._block()) for _ in range(6)])
        self.norm, self.pool, self.classifier = nn.LayerNorm(256), nn.Linear(256, 1), nn.Linear(256, 10)

    def _block(self) -> dict[str, nn.Module]:
        names = ("q_proj", "k_proj", "v_proj")
        attention = nn.ModuleDict({name: nn.Linear(256, 256, bias=False) for name in names})
        attention["out_proj"] = nn.Linear(256, 256)
        return {"attention_norm": nn.LayerNorm(256), "attention": attention, "mlp_norm": nn.LayerNorm(256),
                "up": nn.Linear(256, 512), "down": nn.Linear(512, 256)}  # fmt: skip


def test_a_bank_is_as_small_as_in_the_paper():
    """Of CCT-6/3 with kernels of 15 x 15 and ten classes; the paper's own network has no norm behind its blocks."""
    with torch.device("meta"):
        model: Any = Encoder()
    sockets = Reweighting()
    sockets.fit(model)
    sizes = {name: banks._tensor(model, name).numel() for name in sockets.names(model)}
    last = sum(size for name, size in sizes.items() if name.startswith("norm."))
    kernels = sum(size for name, size in sizes.items() if name.endswith(("kernel", "shift", "gate")))
    head = sum(p.numel() for p in model.classifier.parameters())

    assert (kernels, last, head) == (16_344, 512, 2_570)
    assert sum(sizes.values()) - last + head == 25_315
    assert {name.partition(".")[0] for name in sizes} == {"blocks", "norm", "pool"}, "and nothing of the head twice"


def test_until_there_is_a_bank_the_model_computes_what_it_did(tmp_path: Path):
    model = vit(tmp_path / "vit")
    logits, before, tensors = model(**pixels()).logits, fingerprint(model), list(model.state_dict())

    banked = Banked(model, Reweighting())

    assert sum(isinstance(module, Reweighted) for module in model.modules()) == 6
    assert torch.equal(model(**pixels()).logits, logits)
    banked.begin(("a", "b", "c"))
    assert model(**pixels()).logits.shape == (4, 3)
    moved(banked, 0)
    banked.keep("task")
    assert banked.restore() is model
    assert list(model.state_dict()) == tensors
    assert fingerprint(model) == before
    assert torch.equal(model(**pixels()).logits, logits)


@pytest.mark.parametrize("form", ["both", "kernels", "gates", "none"])
@torch.no_grad()
def test_a_bank_that_is_used_again_says_the_same_bits(tmp_path: Path, form: Any):
    """Without gradients weights are kept from one pass to the next, and must follow the bank."""
    model = vit(tmp_path / "vit")
    banked, said = Banked(model, Reweighting(form=form)), []
    for number, classes in enumerate((("a", "b"), ("c", "d", "e"), ("f",))):
        banked.begin(classes)
        moved(banked, number)
        banked.keep(f"task {number}")
        said.append(model(**pixels()).logits)

    for number in (1, 0, 2, 0):
        banked.use(number)
        assert torch.equal(model(**pixels()).logits, said[number])


@pytest.mark.parametrize("form", ["both", "kernels", "gates", "none"])
@torch.no_grad()
def test_a_merged_bank_is_a_stock_model_that_says_the_same(tmp_path: Path, form: Any):
    model = vit(tmp_path / "vit")
    tensors = set(model.state_dict())
    banked = Banked(model, Reweighting(form=form))
    banked.begin(("a", "b", "c"))
    moved(banked, 0)
    banked.keep("task")
    banked.use(0)
    said = model(**pixels()).logits

    merged: Any = banked.merge()
    merged.save_pretrained(tmp_path / "merged")

    assert set(merged.state_dict()) == tensors
    assert torch.equal(merged(**pixels()).logits, said)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(stock(**pixels()).logits, said, atol=1e-6)
    assert stock.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("init", ["drawn", "parent"])
def test_a_task_may_begin_as_an_older_one(tmp_path: Path, init: Any):
    """With its norms; with kernels that are drawn, or those of its parent."""
    banked = Banked(vit(tmp_path / "vit"), Reweighting(kernel=3, init=init))
    banked.begin(("a", "b"))
    moved(banked, 1)
    older = banked.keep("older")
    banked.begin(("c", "d"))
    frozen = banked.keep("of the frozen model")
    banked.begin(("e", "f", "g"), parent=0)
    newer = banked.keep("newer")

    ends = {"kernel": init == "parent", "shift": init == "parent", "gate": init == "parent"}
    for name, tensor in older.tensors.items():
        if not name.startswith("classifier"):
            assert torch.equal(newer.tensors[name], tensor) == ends.get(name.rpartition(".")[2], True), name
            assert not torch.equal(frozen.tensors[name], tensor)
    assert [bank.parent for bank in banked.banks] == [None, None, "older"]


def test_groups_of_query_heads_share_a_kernel_of_their_key_and_value_head():
    config = LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2,
                         intermediate_size=64, vocab_size=32, num_labels=2, pad_token_id=0)  # fmt: skip
    model: Any = LlamaForSequenceClassification(config).eval()
    tokens = torch.arange(12).view(2, 6)
    before = model(tokens).logits

    assert list(projections(model).values()) == [6, 2, 2] * 2
    sockets = Reweighting(kernel=7)
    sockets.fit(model)
    assert torch.equal(model(tokens).logits, before)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.kernel.shape == (6, 7, 7)
    assert attention.k_proj.kernel.shape == (2, 7, 7)
    norms = ("input_layernorm", "post_attention_layernorm")
    assert [name for name in sockets.names(model) if "norm" in name] == [
        *(f"model.layers.{n}.{norm}.weight" for n in range(2) for norm in norms),
        "model.norm.weight",
    ]  # fmt: skip


class Fused(nn.Module):
    """An attention with one matrix for query, key and value."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=2, num_labels=2)
        self.attention = nn.ModuleDict({name: nn.Linear(8, 24), "out": nn.Linear(8, 8)})


@pytest.mark.parametrize("name", ["qkv", "query_key_value", "c_attn"])
def test_fused_projections_are_named(name: str):
    with pytest.raises(UserError, match=rf"attention\.{name} holds query, key and value in one matrix"):
        Reweighting().fit(Fused(name))


def test_where_there_is_no_place_is_said(tmp_path: Path):
    fused = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(UserError, match=r"0\.in_proj_weight holds query, key and value"):
        Reweighting().fit(fused)
    cnn: Any = artifact.load(write_cnn(tmp_path / "cnn"), kinds=(Kind.IMAGE_CLASSIFIER,)).model
    with pytest.raises(UserError, match="has no attention with query, key and value") as told:
        Reweighting().fit(cnn)
    assert "learn clr" in str(told.value.allowed)
    model = vit(tmp_path / "vit")
    with pytest.raises(UserError, match=r"q_proj: a kernel that reaches over 17 is larger than a slice of 16"):
        Reweighting(kernel=17).fit(model)
    with pytest.raises(UserError, match="reaches over 19 is larger"):
        Reweighting(kernel=7, dilation=3).fit(model)
    model.config.num_attention_heads = 5
    with pytest.raises(UserError, match="5 heads do not divide 32 rows"):
        Reweighting(kernel=3).fit(model)
    assert not any(isinstance(module, Reweighted) for module in model.modules()), "left as it was"
    model.config.num_attention_heads = 2
    attention: Any = model.vit.layers[0].attention
    attention.k_proj = MaskedLinear.from_linear(attention.k_proj, torch.ones(32, 32, dtype=torch.bool))
    with pytest.raises(UserError, match="k_proj is a MaskedLinear, whose weight has another form"):
        Reweighting().fit(model)


def test_banks_of_clr_have_no_merged_form(tmp_path: Path):
    model: Any = artifact.load(write_cnn(tmp_path / "cnn"), kinds=(Kind.IMAGE_CLASSIFIER,)).model
    with pytest.raises(UserError, match="banks of clr cannot be put into the weights"):
        Banked(model, Reprogramming()).merge()
