"""Finished runs, which several tests resume."""

import pytest

from helpers.training_runs import EPOCHS, loader, make, quiet, resumed, state


@pytest.fixture
def finished(tmp_path, whole):
    resumed(tmp_path, make())
    return tmp_path


@pytest.fixture(scope="module")
def whole():
    """Return weights and history of an uninterrupted training run."""
    net = make()
    history = quiet(net, loader(), epochs=EPOCHS)
    return state(net), history
