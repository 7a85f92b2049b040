"""One thread a process: the networks are small, and two threads on a busy machine wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of children too, whose sums must be taken in the same order

import pytest

from branchynet.data import archives
from networks import FAMILIES


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """No test sees the machine's data sets or downloads, unless it says so."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(archives, "_cache", lambda name: cache / name)
    monkeypatch.delenv(archives.VARIABLE, raising=False)


@pytest.fixture(params=FAMILIES, ids=lambda f: f.__name__)
def family(request):
    """The random networks, one kind after the other."""
    return request.param
