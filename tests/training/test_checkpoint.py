import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from branchynet.errors import FileError
from branchynet.nn.weights import load_weights, save_weights
from branchynet.training.checkpoint import RunFolder
from branchynet.training.history import EpochRow, History
from helpers.training_runs import equal, loader, make, quiet, state

# Weights on disk


def test_weights_are_loaded_bit_for_bit(tmp_path):
    net = make()
    quiet(net, loader(), epochs=1)
    save_weights(net, tmp_path / "w.safetensors")
    other = make(seed=9)
    load_weights(other, tmp_path / "w.safetensors")
    assert equal(state(net), state(other))
    assert equal(safetensors.torch.load_file(tmp_path / "w.safetensors"), state(net))


def test_equal_states_are_equal_files(tmp_path):
    """Files do not depend on the order of hash maps in Rust, which differs between processes and between maps."""
    net = make()
    optimizer = torch.optim.Adam(net.parameters())
    contents = set()
    for _ in range(12):
        RunFolder(tmp_path, {"epochs": 1, "name": "ä"}).save(net, optimizer, [], {"steps": 0})
        contents.add(tuple((tmp_path / f"{name}.safetensors").read_bytes() for name in ("checkpoint", "training")))
    assert len(contents) == 1
    assert equal(safetensors.torch.load_file(tmp_path / "checkpoint.safetensors"), state(net))
    with safetensors.safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as stored:
        assert stored.metadata()["format"] == "pt" and len(stored.metadata()["sha256"]) == 64


def test_tied_strided_and_low_precision_weights_are_loaded(tmp_path):
    def network():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last))
        net[1].weight = net[0].weight
        return net.to(torch.bfloat16)

    net, other = network(), network()
    save_weights(net, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert equal(state(net), state(other)) and other[1].weight is other[0].weight


def test_a_file_of_the_backbone_loads_into_the_backbone(tmp_path):
    backbone, net = make(seed=3).backbone, make()
    save_weights(backbone, tmp_path / "backbone.safetensors")
    save_weights(net, tmp_path / "net.safetensors")
    load_weights(net.backbone, tmp_path / "backbone.safetensors")
    assert equal(state(net.backbone), state(backbone))
    with pytest.raises(FileError, match=r"'backbone.0.weight' is missing .*load it into net.backbone"):
        load_weights(net, tmp_path / "backbone.safetensors")
    with pytest.raises(FileError, match=r"'0.weight' is missing .*BranchyNet around"):
        load_weights(backbone, tmp_path / "net.safetensors")


def test_weights_of_another_architecture_name_the_first_tensor_that_differs(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(make(width=5), path)
    net = make()
    before = state(net)
    with pytest.raises(
        FileError, match=r"'backbone.0.weight' is of shape \(5, 2, 3, 3\) in the file .* \(4, 2, 3, 3\)"
    ):
        load_weights(net, path)
    save_weights(nn.Sequential(*make().backbone, nn.Linear(4, 4)), path)
    with pytest.raises(FileError, match=r"'6.(weight|bias)' is of shape \(4,.* in the file and missing in the network"):
        load_weights(net.backbone, path)
    assert equal(before, state(net))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_never_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "w.safetensors"
    save_weights(make(), path)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    net = make(seed=9)
    before = state(net)
    with pytest.raises(FileError, match=r"w\.safetensors"):
        load_weights(net, path)
    assert equal(before, state(net))


def test_missing_files_and_pickles_are_file_errors(tmp_path):
    with pytest.raises(FileError, match="none"):
        load_weights(make(), tmp_path / "none.safetensors")
    with pytest.raises(FileError):
        load_weights(make(), tmp_path)
    torch.save(make().state_dict(), tmp_path / "pickled.pt")
    with pytest.raises(FileError, match="pickled"):
        load_weights(make(), tmp_path / "pickled.pt")
    with pytest.raises(FileError, match="cannot write"):
        save_weights(make(), tmp_path / "pickled.pt" / "w.safetensors")


# The history on disk

floats = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), exits=st.integers(0, 12), validated=st.booleans())
def test_a_history_is_loaded_from_csv(tmp_path_factory, data, exits, validated):
    accuracies = st.tuples(*[floats] * exits)
    row = st.builds(
        EpochRow,
        epoch=st.integers(1, 1000),
        seconds=st.integers(0, 10**6).map(lambda ms: ms / 1000),
        lr=floats,
        train_loss=floats,
        train_accuracy=accuracies,
        val_loss=floats if validated else st.none(),
        val_accuracy=accuracies if validated else st.just(()),
    )
    history = History(tuple(data.draw(st.lists(row, max_size=3))))
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    history.save(path)
    assert History.load(path) == history


def test_another_csv_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("name,age\nx,3\n")
    for path in (tmp_path / "a.csv", tmp_path / "none.csv"):
        with pytest.raises(FileError, match=path.name):
            History.load(path)


def test_the_same_weights_are_the_same_bytes(tmp_path):
    """The metadata of safetensors has no fixed order."""
    net = make()
    for n in range(8):
        save_weights(net, tmp_path / f"{n}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    load_weights(make(seed=1), tmp_path / "0.safetensors")
