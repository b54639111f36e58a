"""Images of bars and networks with random weights that read them: written once a worker, to be left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from images import write_bars, write_cnn, write_vit


@pytest.fixture(scope="session")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image set of four classes."""
    return write_bars(tmp_path_factory.mktemp("bars") / "bars.npz")


@pytest.fixture(scope="session")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional classifier."""
    return write_cnn(tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer."""
    return write_vit(tmp_path_factory.mktemp("vit"))
