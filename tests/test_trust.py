"""A run folder from elsewhere runs no function unless it is trusted."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from branchynet import trust
from branchynet.cli import app
from branchynet.errors import InputError
from branchynet.runs import Settings, configure, create_run, open_run

CALLED = []


def network():
    CALLED.append("network")
    raise AssertionError("called")


NAME = f"{__name__}:network"


@pytest.fixture(autouse=True)
def own_secret(tmp_path, monkeypatch):
    CALLED.clear()
    monkeypatch.setattr(trust, "_place", lambda: tmp_path / "cache" / "secret")


def start(path, settings):
    """What `train` does first."""
    configure(create_run(path, settings))


def stranger(monkeypatch, tmp_path):
    """From here on, another user."""
    monkeypatch.setattr(trust, "_place", lambda: tmp_path / "other" / "secret")


def test_what_one_made_oneself_is_opened_also_after_a_move(tmp_path):
    start(tmp_path / "run", Settings(network=NAME))
    assert open_run(tmp_path / "run").settings.network == NAME
    start(tmp_path / "run", Settings(network=NAME))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert open_run(tmp_path / "moved").settings.network == NAME
    assert trust._place().stat().st_mode & 0o077 == 0


def test_what_a_stranger_made_needs_trust(tmp_path, monkeypatch):
    start(tmp_path / "run", Settings(network=NAME))
    stranger(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=rf"{NAME}.*--trust.*trust=True"):
        open_run(tmp_path / "run")
    assert open_run(tmp_path / "run", trust=True).settings.network == NAME
    assert not CALLED


@pytest.mark.parametrize("change", ["network", "none", "number", "text"])
def test_a_signature_is_of_one_function(tmp_path, change):
    start(tmp_path / "run", Settings(network=NAME))
    config = tmp_path / "run" / "config.json"
    stored = json.loads(config.read_text())
    if change == "network":
        stored["settings"]["network"] = "os:getcwd"
    else:
        stored["signature"] = {"none": None, "number": 1, "text": "é"}[change]
    config.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="--trust"):
        open_run(tmp_path / "run")


def test_networks_of_the_zoo_need_no_trust(tmp_path, monkeypatch):
    start(tmp_path / "run", Settings())
    assert not trust._place().exists()
    stranger(monkeypatch, tmp_path)
    assert open_run(tmp_path / "run").settings == Settings()


def test_without_a_place_for_secrets_one_trusts_by_hand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(trust, "_place", lambda: tmp_path / "file" / "secret")
    start(tmp_path / "run", Settings(network=NAME))
    with pytest.raises(InputError, match="--trust"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("verb", ["choose", "export", "bench", "report", "design"])
def test_every_verb_asks_for_trust(tmp_path, monkeypatch, verb):
    start(tmp_path / "run", Settings(network=NAME))
    stranger(monkeypatch, tmp_path)
    refused = CliRunner().invoke(app, [verb, str(tmp_path / "run")])
    assert isinstance(refused.exception, InputError) and "--trust" in str(refused.exception)
    trusted = CliRunner().invoke(app, [verb, str(tmp_path / "run"), "--trust"])
    assert "--trust" not in str(trusted.exception)  # it is not trained, which is the next thing to say
    assert not CALLED
