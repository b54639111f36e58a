"""A weight convolved head by head: the frozen one at first, then what a loop and SciPy make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.signal import correlate2d
from torch import Tensor, nn

from overhaul.layers.reweighted import Form, Reweighted, convolved

HEADS, ROWS, WIDTH = 3, 7, 9


def layer(
    *, kernel: int = 5, dilation: int = 1, bias: bool = True, dtype: torch.dtype = torch.float64, form: Form = "both"
) -> Reweighted:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, HEADS * ROWS, bias=bias).to(dtype).requires_grad_(False)
    return Reweighted(linear, heads=HEADS, kernel=kernel, dilation=dilation, form=form)


def filled(made: Reweighted, seed: int = 0) -> Reweighted:
    """The same layer with other numbers in place of those that leave the weight alone."""
    torch.manual_seed(seed)
    for name, tensor in made.unchanged().items():
        getattr(made, name).data = torch.randn_like(tensor)
    return made


def by_hand(weight_OI: Tensor, kernel_KK: Tensor, dilation: int) -> Tensor:
    """One slice, number by number."""
    half, made = len(kernel_KK) // 2, torch.zeros_like(weight_OI)
    for o in range(weight_OI.shape[0]):
        for i in range(weight_OI.shape[1]):
            for u in range(-half, half + 1):
                for v in range(-half, half + 1):
                    row, column = o + dilation * u, i + dilation * v
                    if 0 <= row < weight_OI.shape[0] and 0 <= column < weight_OI.shape[1]:
                        made[o, i] += kernel_KK[half + u, half + v] * weight_OI[row, column]
    return made


@pytest.mark.parametrize("form", ["both", "kernels", "gates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_begins_as_the_frozen_layer_to_the_bit(dtype: torch.dtype, form: Form):
    made = layer(dtype=dtype, form=form)
    x = torch.randn(2, 4, WIDTH, dtype=dtype)

    assert torch.equal(made.dense(), made.linear.weight)
    assert torch.equal(made(x), made.linear(x))
    assert torch.equal(made.eval()(x), made.linear(x))


@pytest.mark.parametrize("gate", [-3.0, 0.0, 1.0])
def test_a_kernel_that_adds_up_with_the_gate_to_one_changes_nothing(gate: float):
    made = layer()
    made.gate.data.fill_(gate)
    made.kernel.data[:, 2, 2] = 1 - torch.tensor(gate, dtype=torch.float64).sigmoid()

    assert torch.allclose(made.dense(), made.linear.weight, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (5, 1), (3, 2), (3, 3)])
def test_each_slice_is_convolved_with_the_kernel_of_its_head(kernel: int, dilation: int):
    made = filled(layer(kernel=kernel, dilation=dilation))
    slices = made.linear.weight.reshape(HEADS, ROWS, WIDTH)

    wanted = [
        by_hand(slices[head], made.kernel[head].detach(), dilation)
        + made.shift[head]
        + made.gate[head].sigmoid() * slices[head]
        for head in range(HEADS)
    ]
    assert torch.allclose(made.dense(), torch.cat(wanted), atol=1e-12)


def test_the_parts_add_up_to_the_whole():
    both = filled(layer())
    kernels, gates = layer(form="kernels"), layer(form="gates")
    kernels.kernel.data, kernels.shift.data, gates.gate.data = both.kernel.data, both.shift.data, both.gate.data

    assert torch.equal(kernels.dense() + gates.dense(), both.dense())
    assert [name for name, _ in gates.named_parameters(recurse=False)] == ["gate"]
    assert [name for name, _ in kernels.named_parameters(recurse=False)] == ["kernel", "shift"]


@pytest.mark.parametrize("side", [3, 7, 15])
def test_scipy_says_the_same(side: int):
    slices, kernels = torch.randn(2, 16, 20, dtype=torch.float64), torch.randn(2, side, side, dtype=torch.float64)

    for one, slice_OI, kernel_KK in zip(convolved(slices, kernels), slices, kernels, strict=True):
        assert torch.allclose(one, torch.from_numpy(correlate2d(slice_OI, kernel_KK, mode="same")), atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients_are_those_of_differences_and_of_torch(dilation: int):
    made = filled(layer(kernel=3, dilation=dilation))
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    own = (made.kernel, made.shift, made.gate)

    def called(x: Tensor, *_: Tensor) -> Tensor:
        return made(x)

    assert torch.autograd.gradcheck(called, (x, *own))
    slices = made.linear.weight.reshape(HEADS, ROWS, WIDTH)
    weights = torch.randn_like(slices)
    (ours,) = torch.autograd.grad((convolved(slices, made.kernel, dilation) * weights).sum(), made.kernel)
    how: Any = {"padding": dilation, "dilation": dilation, "groups": HEADS}
    theirs = nn.functional.conv2d(slices[None], made.kernel[:, None], **how)[0]
    assert torch.allclose(ours, torch.autograd.grad((theirs * weights).sum(), made.kernel)[0], atol=1e-12)


def test_the_frozen_layer_gets_no_gradient():
    made = filled(layer())
    made.linear.requires_grad_(True)

    made(torch.randn(2, WIDTH, dtype=torch.float64)).sum().backward()

    assert made.linear.weight.grad is None
    assert made.kernel.grad is not None


def test_merged_kept_and_computed_anew_are_one():
    made, x = filled(layer(dtype=torch.float32)).eval(), torch.randn(5, WIDTH)
    anew = made.train()(x)
    with torch.no_grad():
        kept = made.eval()(x)

    assert torch.equal(kept, anew)
    assert torch.equal(made.merge()(x), anew)
    assert made.merge().bias is made.linear.bias


def exchange(made: Reweighted) -> None:
    made.kernel.data = torch.randn_like(made.kernel)


def write(made: Reweighted) -> None:
    with torch.no_grad():
        made.gate.add_(1.0)


def step(made: Reweighted) -> None:
    """With gradients that were there already: nothing is asked of the layer but its tensors."""
    for parameter in (made.kernel, made.shift, made.gate):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([made.kernel, made.shift, made.gate], lr=0.1, fused=True).step()


def widen(made: Reweighted) -> None:
    for parameter in (made.kernel, made.shift, made.gate):
        parameter.data = 2 * parameter.data.double()


def halve(made: Reweighted) -> None:
    with torch.no_grad():
        made.linear.weight.mul_(0.5)


@pytest.mark.parametrize("change", [exchange, write, step, widen, halve])
@torch.no_grad()
def test_what_is_kept_follows_its_tensors(change: Any):
    made, x = filled(layer(dtype=torch.float32)).eval(), torch.randn(5, WIDTH)
    before, kept = made(x), made._merged

    assert torch.equal(made(x), before)
    assert made._merged is kept, "computed once"
    change(made)
    assert torch.equal(made(x), nn.functional.linear(x, made.dense(), made.linear.bias))
    assert not torch.equal(made(x), before)
    made.train()
    assert made._merged is None


@torch.no_grad()
def test_two_banks_that_take_turns_are_never_taken_for_each_other():
    made, x = filled(layer(dtype=torch.float32)).eval(), torch.randn(5, WIDTH)
    banks = [[torch.randn_like(made.kernel) for _ in range(2)] for _ in range(2)]

    for _ in range(3):
        for bank in banks:
            made.kernel.data = bank[0].clone()  # one that is gone leaves its place to the next
            assert torch.equal(made(x), nn.functional.linear(x, made.dense(), made.linear.bias))


def test_under_autocast_weights_are_made_in_fp32():
    made = filled(layer(dtype=torch.float32))
    exact = made.dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.dense(), exact)
        assert made(torch.randn(2, WIDTH)).dtype == torch.bfloat16


def test_a_task_begins_with_what_torch_draws_for_a_convolution():
    torch.manual_seed(3)
    tensors = layer(kernel=7).drawn()
    torch.manual_seed(0)  # as `layer` does
    nn.Linear(WIDTH, HEADS * ROWS)
    convolution = nn.Conv2d(HEADS, HEADS, 7, groups=HEADS).double()

    assert tensors["kernel"].shape == convolution.weight[:, 0].shape
    assert float(tensors["kernel"].abs().max()) <= 1 / 7 >= float(tensors["shift"].abs().max())
    assert float(tensors["kernel"].std()) == pytest.approx(1 / 7 / 3**0.5, rel=0.15)
    assert torch.equal(tensors["gate"], torch.ones(HEADS, dtype=torch.float64))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"heads": 4}, "4 heads do not divide 21 rows"),
        ({"heads": 3, "kernel": 4}, "4 has no middle; use 3 or 5"),
        ({"heads": 3, "kernel": 9}, "reaches over 9 is larger than a slice of 7"),
        ({"heads": 3, "kernel": 5, "dilation": 2}, "reaches over 9 is larger than a slice of 7"),
    ],
)
def test_what_does_not_fit(how: dict[str, int], told: str):
    with pytest.raises(ValueError, match=told):
        Reweighted(nn.Linear(WIDTH, HEADS * ROWS), **how)
