"""CCT: its published sizes, its forward pass written out, positions in closed form, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from overhaul import blank
from overhaul.models.cct import CctConfig, CctForImageClassification, DropPath, sinusoids


def small(**fields: Any) -> CctForImageClassification:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [9, 6]}
    model = CctForImageClassification(CctConfig(**{**shape, "num_channels": 1, "num_labels": 3, **fields})).eval()
    with torch.no_grad():  # norms of one and biases of zero would hide that somebody lost them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.2)
    return model


@pytest.mark.parametrize(
    ("shape", "published", "parameters"),
    [("cct2", 0.284, 275_531), ("cct4", 0.482, 473_931), ("cct6", 3.168, 3_168_267), ("cct7", 3.76, 3_694_603)],
)
def test_the_shapes_are_those_that_were_published(shape: str, published: float, parameters: int):
    """For ten classes of colour images of 32 x 32; the authors' table counts the positions of all but CCT-6."""
    config = blank.SHAPES[shape].config(3, (32, 32), 10)
    model = CctForImageClassification(config)

    positions = model.positions.table_1TD.numel()
    counted = parameters + (0 if shape == "cct6" else positions)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(counted / 1e6, 3) == published
    config.positions = "learnable"
    assert sum(p.numel() for p in CctForImageClassification(config).parameters()) == parameters + positions


def norm(x: np.ndarray, layer: Any) -> np.ndarray:
    spread = np.sqrt(x.var(-1, keepdims=True) + layer.eps)
    return (x - x.mean(-1, keepdims=True)) / spread * array(layer.weight) + array(layer.bias)


def linear(x: np.ndarray, layer: Any) -> np.ndarray:
    return x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def by_hand(model: CctForImageClassification, image_CHW: Tensor) -> np.ndarray:
    """The logits of one image, head by head, in float64."""
    x = image_CHW[None].double()
    for convolution in model.tokenizer.convolutions:
        x = F.max_pool2d(F.conv2d(x, convolution.weight.double(), padding=1).clamp(min=0), 3, 2, 1)
    x = array(x[0]).reshape(x.shape[1], -1).T + array(model.positions.table_1TD[0])
    for block in model.blocks:
        inner, heads = norm(x, block.attention_norm), []
        q, k, v = (
            np.split(linear(inner, one), block.attention.num_heads, axis=1)
            for one in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
        )
        for q_TD, k_TD, v_TD in zip(q, k, v, strict=True):
            heads.append(softmax(q_TD @ k_TD.T / np.sqrt(q_TD.shape[1]), axis=1) @ v_TD)
        x = x + linear(np.concatenate(heads, axis=1), block.attention.out_proj)
        x = norm(x, block.mlp_norm)
        up = linear(x, block.up_proj)
        x = x + linear(up * (1 + erf(up / np.sqrt(2))) / 2, block.down_proj)
    x = norm(x, model.norm)
    return linear(softmax(linear(x, model.pool)[:, 0]) @ x, model.classifier)


@pytest.mark.parametrize("fields", [{}, {"num_conv_layers": 2, "conv_channels": 5}, {"positions": "learnable"}])
def test_the_forward_pass_is_the_one_written_out(fields: dict[str, Any]):
    model = small(**fields)
    images_BCHW = torch.randn(2, 1, 9, 6)

    with torch.no_grad():
        found = model(images_BCHW).logits

    for image, logits in zip(images_BCHW, found, strict=True):
        np.testing.assert_allclose(logits, by_hand(model, image), rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_cross_entropy():
    model, images_BCHW, labels_B = small(), torch.randn(4, 1, 9, 6), torch.tensor([0, 2, 1, 2])

    made = model(images_BCHW, labels=labels_B)

    wanted = -made.logits.log_softmax(-1)[torch.arange(4), labels_B].mean()
    torch.testing.assert_close(made.loss, wanted)


def test_positions_are_waves_of_rising_length():
    table_TD = sinusoids(7, 6)[0]

    assert torch.equal(table_TD[0], torch.tensor([0.0, 1.0] * 3))
    for place in range(7):
        for pair in range(3):
            angle = torch.tensor(place / 10000 ** (2 * pair / 6))
            torch.testing.assert_close(
                table_TD[place, 2 * pair : 2 * pair + 2], torch.stack([angle.sin(), angle.cos()])
            )


def test_what_is_trained_does_not_hold_fixed_positions():
    assert "positions.table_1TD" not in dict(small().named_parameters())
    assert "positions.table_1TD" in dict(small(positions="learnable").named_parameters())


def test_a_branch_is_left_out_of_whole_images_and_its_mean_stays():
    drop, ones = DropPath(0.25), torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    dropped = drop(ones)

    assert torch.equal(dropped.flatten(1).min(1).values, dropped.flatten(1).max(1).values)
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(float(dropped.mean()) - 1) < 0.03
    assert torch.equal(drop.eval()(ones), ones)
    rates = [block.drop_path.probability for block in small(num_hidden_layers=3).blocks]
    assert rates == [0.0, 0.05, 0.1]


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="the images are 8 x 8, and the model reads 9 x 6"):
        small()(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="hidden_size 16 is not divisible by 3 heads"):
        small(num_attention_heads=3)
    with pytest.raises(ValueError, match="sinusoidal or learnable, not 'rotary'"):
        small(positions="rotary")
