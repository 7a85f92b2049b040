"""A run folder from elsewhere runs no function unless it is trusted."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from branchynet.cli.verbs import app
from branchynet.errors import InputError
from branchynet.runs import run, trusted_functions
from branchynet.runs.run import configure, create_run, open_run
from branchynet.runs.settings import Settings
from helpers.strange_network import CALLED

NAME = "helpers.strange_network:network"


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    CALLED.clear()
    monkeypatch.setattr(trusted_functions, "_place", lambda: tmp_path / "cache" / "trusted")


def start(path, settings):
    """The first steps of `train`."""
    configure(create_run(path, settings))


def stranger(monkeypatch, tmp_path):
    """Act as another user from now on."""
    monkeypatch.setattr(trusted_functions, "_place", lambda: tmp_path / "other" / "trusted")


def test_the_users_own_folder_opens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "run", Settings(network=NAME))
    (tmp_path / "link").symlink_to("run")
    for way in (tmp_path / "run", "run", "./run/", "link", tmp_path / "run" / ".." / "run"):
        assert open_run(way).settings.network == NAME


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_folder_needs_trust_once(tmp_path, how):
    start(tmp_path / "run", Settings(network=NAME))
    how(tmp_path / "run", tmp_path / "other")
    with pytest.raises(InputError, match="--trust once"):
        open_run(tmp_path / "other")
    open_run(tmp_path / "other", trust=True)
    assert open_run(tmp_path / "other").settings.network == NAME


@pytest.mark.parametrize("whose", ["config.json", "all"])
def test_the_content_of_a_trusted_folder_proves_nothing(tmp_path, whose):
    """A folder from elsewhere may hold copies of all files of a folder made here."""
    start(tmp_path / "run", Settings(network=NAME))
    (tmp_path / "hostile").mkdir()
    for file in (tmp_path / "run").iterdir() if whose == "all" else [tmp_path / "run" / "config.json"]:
        shutil.copy(file, tmp_path / "hostile")
    with pytest.raises(InputError, match="--trust"):
        open_run(tmp_path / "hostile")


@pytest.mark.parametrize("changed", ["top.py", "pack/__init__.py", "pack/inner.py", "space/part.py"])
@pytest.mark.parametrize("how", ["changed", "gone", "hidden"])
def test_a_module_of_the_current_folder_counts_with_its_content(tmp_path, monkeypatch, changed, how):
    module = {"top.py": "top", "space/part.py": "space.part"}.get(changed, "pack.inner")
    for name in ("top.py", "pack/__init__.py", "pack/inner.py", "space/part.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"raise AssertionError('{name} was run')")
    monkeypatch.chdir(tmp_path)
    start("run", Settings(network=f"{module}:make"))
    assert open_run("run").settings.network == f"{module}:make"
    file = tmp_path / changed
    if how == "changed":
        file.write_text("import os")
    elif how == "gone":
        file.unlink()
    else:  # Python prefers a package to a module
        folder = file.parent if file.name == "__init__.py" else file.with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("import os")
    with pytest.raises(InputError, match="module has changed"):
        open_run("run")
    start("run", Settings(network=f"{module}:make"))  # `train` names the function
    open_run("run")


def test_a_refused_training_trusts_nothing(tmp_path, monkeypatch):
    start(tmp_path / "run", Settings(network="os:getcwd"))
    stranger(monkeypatch, tmp_path)
    monkeypatch.setattr(run, "is_trained", lambda path: True)
    with pytest.raises(InputError, match="was trained with"):
        create_run(tmp_path / "run", Settings(network=NAME))
    with pytest.raises(InputError, match="--trust"):
        open_run(tmp_path / "run")


def test_the_folder_of_another_user_needs_trust(tmp_path, monkeypatch):
    start(tmp_path / "run", Settings(network=NAME))
    stranger(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=rf"{NAME}.*--trust.*trust=True"):
        open_run(tmp_path / "run")
    assert open_run(tmp_path / "run", trust=True).settings.network == NAME
    assert not CALLED


def test_trust_is_for_one_function(tmp_path):
    start(tmp_path / "run", Settings(network=NAME))
    config = tmp_path / "run" / "config.json"
    stored = json.loads(config.read_text())
    for other in ("os:getcwd", f"{NAME}s", f"{__name__}:", f"{__name__}:open_run"):
        stored["settings"]["network"] = other
        config.write_text(json.dumps(stored))
        with pytest.raises(InputError, match="--trust"):
            open_run(tmp_path / "run")


def test_networks_of_the_zoo_need_no_trust(tmp_path, monkeypatch):
    start(tmp_path / "run", Settings())
    assert not trusted_functions._place().exists()
    stranger(monkeypatch, tmp_path)
    assert open_run(tmp_path / "run").settings == Settings()


def test_without_a_cache_folder_trust_must_be_given(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(trusted_functions, "_place", lambda: tmp_path / "file" / "trusted")
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
    assert "--trust" not in str(trusted.exception)  # the next error: it is not trained
    assert not CALLED
