"""DER++ and EWC by avalanche-lib's own strategies, one task a turn.

Its wheel of torchvision has operators that are compiled for CUDA and are not loaded with a torch for processors; the
schemas of two are declared, since torchvision asks for them when it is imported. Nothing here calls an operator of it.
"""

import warnings
from typing import Any

import numpy as np
import torch
import turn

declared = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from avalanche.benchmarks.scenarios.deprecated.generic_benchmark_creation import (
        create_generic_benchmark_from_tensor_lists,
    )
    from avalanche.training.supervised import EWC
    from avalanche.training.supervised.der import DER
    from transformers import AutoModelForImageClassification


class Logits(torch.nn.Module):
    """What avalanche calls: a model that returns its logits."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.inner = AutoModelForImageClassification.from_pretrained(path)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.inner(pixel_values=pixels_BCHW).logits


given = turn.settings()
torch.set_num_threads(1)
turn.wait()
turn.tell()  # everything is imported, nothing loaded

turn.wait()
arrays = np.load(given["tasks"])
train, heldout = (
    [
        (torch.from_numpy(arrays[f"{part}/{number}/pixels"]), torch.from_numpy(arrays[f"{part}/{number}/labels"]))
        for number in range(given["num_tasks"])
    ]
    for part in ("train", "heldout")
)
benchmark = create_generic_benchmark_from_tensor_lists(train, heldout, task_labels=[0] * given["num_tasks"])
torch.manual_seed(0)
model = Logits(given["model"])
how: dict[str, Any] = {
    "model": model,
    "optimizer": torch.optim.SGD(model.parameters(), lr=given["lr"]),
    "criterion": torch.nn.CrossEntropyLoss(),
    "train_mb_size": given["batch_size"],
    "train_epochs": 1,
    "evaluator": None,
}
if given["method"] == "der++":
    strategy = DER(**how, mem_size=given["memory"], alpha=given["alpha"], beta=given["label_weight"])
else:
    # Its penalty is lambda sum F d^2, without a half.
    strategy = EWC(**how, ewc_lambda=given["beta"] / 2, mode="online", decay_factor=1.0)
turn.tell()

for number, experience in enumerate(benchmark.train_stream):
    turn.wait()
    strategy.train(experience)
    turn.tell(images=len(train[number][0]))

turn.wait()
model.eval()
with torch.no_grad():
    right = [(model(pixels).argmax(dim=1) == labels).double().mean() for pixels, labels in heldout]
turn.tell(accuracy=float(sum(right)) / len(right))
turn.wait()
