"""An int8 directory by the library, in the precision that the command line takes on this machine."""

import decoding
import torch
import turn

from overhaul import artifact, int8_products, machine
from overhaul.layers.int8 import Int8Linear

given = turn.settings()
turn.wait()
dtype = machine.compute_dtype("auto", torch.device("cpu"))
model = artifact.load(given["model"], dtype=dtype).model
turn.tell(dtype=str(dtype))
layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
shapes = sorted({tuple(layer.weight.shape) for layer in layers})


def facts() -> dict[str, object]:
    kernels = {
        f"{rows}x{inputs}->{outputs}": int8_products.fastest(
            rows, outputs, inputs, torch.device("cpu"), torch.get_num_threads()
        )
        for rows in int8_products.MEASURED_ROWS
        for outputs, inputs in shapes
    }
    linear_bytes = sum(tensor.nbytes for layer in layers for tensor in (*layer.buffers(), *layer.kept()))
    return {
        "kernels": kernels,
        "linear_bytes": linear_bytes,
        "num_weights": sum(layer.num_weights for layer in layers),
    }


decoding.take_turns(model, given, facts)
