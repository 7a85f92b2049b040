"""One thread a process: the networks are small, and two threads on a busy machine wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of children too, whose sums must be taken in the same order

import pytest

from branchynet.data import archives


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """No test sees the machine's data sets or downloads, unless it says so."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(archives, "_cache", lambda name: cache / name)
    monkeypatch.delenv(archives.VARIABLE, raising=False)
