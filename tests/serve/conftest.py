"""The models that the tests serve; exporting them takes seconds, so it is done once."""

import shutil

import pytest

from helpers.serving import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """What `write_models` writes; to be read only."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """A copy, which the tests of a module share."""
    return shutil.copytree(models, tmp_path_factory.mktemp("served") / "models")
