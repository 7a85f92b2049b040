"""Training in several processes: which loaders they share, and the errors for other loaders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from branchynet import BranchyNetError
from branchynet.data import ProgressiveLoader
from branchynet.errors import InputError
from helpers.training_runs import Pictures, equal, make, quiet, state


class Wrapper:
    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


class Stream(IterableDataset):
    def __len__(self):
        return 60

    def __iter__(self):
        return iter(Pictures())


def seeded():
    return DataLoader(Pictures(), 10, shuffle=True, generator=torch.Generator().manual_seed(7))


def shuffled():
    return DataLoader(Pictures(), 10, shuffle=True)


SHARED = {
    "shuffled": shuffled,
    "grown": lambda: ProgressiveLoader(shuffled(), (8,)),
    "seeded": seeded,
    "grown seeded": lambda: ProgressiveLoader(seeded(), (8,)),
    "sampled": lambda: DataLoader(Pictures(), batch_sampler=BatchSampler(SequentialSampler(range(60)), 7, True)),
    "streamed": lambda: DataLoader(Stream(), 10),
}
SAME = [("shuffled", "grown"), ("seeded", "grown seeded")]  # images of 8 x 8 that grow to 8 x 8
REFUSED = {
    "list": lambda: list(shuffled()),
    "wrapper": lambda: Wrapper(shuffled()),
    "wrapper of a list": lambda: ProgressiveLoader.__new__(ProgressiveLoader),
    "wrapper of a wrapper": lambda: ProgressiveLoader(ProgressiveLoader(shuffled(), (8,)), (8,)),
    "whole batches": lambda: DataLoader([next(iter(shuffled()))] * 4, batch_size=None),
}


def trained(loader, val=None):
    net = make()
    quiet(net, loader, val, epochs=2)
    return net


def main(folder, rank):
    """Run one of two processes, and return the sums of the trained weights, or the error, for each loader."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=2)
    results = {}
    for name, loader in {**SHARED, **REFUSED}.items():
        if name == "wrapper of a list":
            train = loader()
            train.batches, train.sides, train.side = list(shuffled()), (8,), 8
        else:
            train = loader()
        try:
            results[name] = [float(value.double().sum()) for value in trained(train).state_dict().values()]
        except BranchyNetError as error:
            results[name] = f"{type(error).__name__}: {error}"
    try:
        results["validation"] = trained(shuffled(), list(shuffled())) and "taken"
    except BranchyNetError as error:
        results["validation"] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    paths = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank in "01":
        env = {
            **os.environ,
            "PYTHONPATH": paths,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        command = [sys.executable, "-c", f"import test_processes; test_processes.main({str(folder)!r}, {rank!r})"]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in "01"]


pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")


@pytest.mark.parametrize("name", SHARED)
def test_loaders_are_shared(results, name):
    assert isinstance(results[0][name], list)
    assert results[0][name][:2] == results[1][name][:2]  # weights; each process has its own running statistics


@pytest.mark.parametrize(("plain", "grown"), SAME)
def test_growing_batches_equal_those_of_the_loader(results, plain, grown):
    assert [each[plain] for each in results] == [each[grown] for each in results]
    assert equal(state(trained(SHARED[plain]())), state(trained(SHARED[grown]())))  # in one process too


@pytest.mark.parametrize("name", [*REFUSED, "validation"])
def test_loaders_that_cannot_be_shared_are_refused_in_every_process(results, name):
    for each in results:
        assert each[name].startswith("InputError: ") and "train in one process" in each[name]
    assert ("val_loader is a list" if name == "validation" else "train_loader") in results[0][name]


@pytest.mark.parametrize("name", ["list", "wrapper", "whole batches", "wrapper of a wrapper"])
def test_one_process_takes_any_loader(name):
    trained(REFUSED[name]())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("joined", [True, False])
def test_accelerate_reports_each_failed_start_and_then_starts(precision, joined, monkeypatch):
    """As if a user started several processes without the address of the first."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: joined)
        patch.setattr(PartialState, "_shared_state", {})  # as in a new process
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", "1")
        patch.delenv("MASTER_ADDR", raising=False)
        for _ in range(3):
            with pytest.raises(InputError, match=r"does not work on this machine.*MASTER_ADDR"):
                quiet(make(), shuffled(), epochs=1, mixed_precision=precision)
    trained(shuffled())
