"""`branchynet export` with the options for other servers."""

import json

from branchynet import load
from helpers.command import call


def test_export_also_writes_what_other_servers_need(run, tmp_path, monkeypatch, capsys):
    places = {name: tmp_path / name for name in ("triton", "openvino-server", "docker", "kserve")}
    options = [word for name, path in places.items() for word in (f"--{name}", path)]
    assert call(monkeypatch, "export", run, "--output", tmp_path / "model.onnx", *options) == 0
    shown = capsys.readouterr().out
    assert all(f"wrote {path}" in shown for path in places.values())
    models = {load(path).metadata["network"] for path in tmp_path.rglob("*.onnx")}
    assert len([*tmp_path.rglob("*.onnx")]) == 4 and models == {load(run / "model.onnx").metadata["network"]}
    assert [path.parent.name for path in tmp_path.rglob("config.pbtxt")] == ["run"]
    assert json.loads((tmp_path / "openvino-server" / "config.json").read_text())["model_config_list"]
    assert "name: run\n" in places["kserve"].read_text() and 'image: "run:latest"' in places["kserve"].read_text()


def test_nothing_is_exported_if_a_place_is_taken(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").mkdir()
    assert call(monkeypatch, "export", run, "--output", tmp_path / "model.onnx", "--triton", tmp_path / "taken") == 1
    assert "taken exists; give another path, or remove it" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()
