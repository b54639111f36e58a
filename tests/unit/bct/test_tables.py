from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from overhaul.bct.blocks import fitting_exponent, integers, snap
from overhaul.bct.tables import FUNCTIONS, table_of
from overhaul.errors import UserError

EXACT = {
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0,
    "tanh": math.tanh,
}


@pytest.mark.parametrize("shift", [-3, 0, 2, 4, 6, 9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_255_inputs_give_the_rounded_function(name, shift):
    results = [EXACT[name](q * 2.0**-shift) for q in range(-127, 128)]
    fitting, _ = fitting_exponent(torch.tensor([max(map(abs, results))]), 127)
    entries = table_of(name).entries(shift, int(fitting))

    wanted = [round(result * 2.0 ** int(fitting)) for result in results]
    assert entries[1:].tolist() == wanted


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_is_looked_up_block_by_block(name):
    generator = torch.Generator().manual_seed(0)
    x = snap(torch.randn(6, 24, generator=generator) * torch.tensor([[0.1], [1.0], [3.0], [9.0], [0.01], [0.0]]), 8)

    y = table_of(name)(x, 8)

    value, shift = integers(x, 8)
    found, found_shift = integers(y, 8)
    for block in range(18):
        row, column = divmod(block, 3)
        if found[row, column].any():
            entries = table_of(name).entries(int(shift[row, column]), int(found_shift[row, column]))
            assert torch.equal(found[row, column], entries[value[row, column].long() + 128])


@pytest.mark.parametrize(
    ("name", "function"),
    [("swish", F.silu), ("gelu", F.gelu), ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh"))],
)
def test_names_of_configurations_mean_torchs_functions(name, function):
    x = snap(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 3, 32)

    # Half a step of a block whose largest result is below 16.
    torch.testing.assert_close(table_of(name)(x, 32), function(x), atol=2**-4, rtol=0)
    torch.testing.assert_close(FUNCTIONS[table_of(name).name](x.double()), function(x.double()))


def test_a_ragged_last_block_keeps_its_length():
    x = snap(torch.linspace(-3, 3, 21), 8)

    assert table_of("silu")(x, 8).shape == (21,)


def test_a_function_without_a_table_is_refused():
    with pytest.raises(UserError, match="quick_gelu"):
        table_of("quick_gelu")
