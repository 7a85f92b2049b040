"""A batch that does not fit into memory is named, with one that does."""

import numpy as np
import pytest

from branchynet import Policy, load
from branchynet.deploy.memory import is_memory_error
from branchynet.deploy.staged_writing import save_stages
from branchynet.errors import InputError, RunError
from helpers.loop import same
from helpers.networks import chain, draw
from helpers.onnx_graphs import flat_of, save

MESSAGES = [
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 21474836480",
    "CUDA failure 2: out of memory ; GPU=0",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
]


@pytest.fixture(scope="module", params=["nested", "stages"])
def engine(request, tmp_path_factory):
    net, _, flat = flat_of(chain)
    policy, folder = Policy(thresholds=(1.0,) * (net.num_exits - 1)), tmp_path_factory.mktemp("memory")
    if request.param == "stages":
        save_stages(folder, flat, policy)
        return load(folder, threads=1)
    return load(save(flat, policy, folder / "m.onnx"), threads=1)


def short(engine, monkeypatch, most, message):
    """Let the runtime of an engine fail with more than `most` rows."""
    run, name = engine._run, engine.inputs[0].name

    def limited(feeds):
        if len(feeds[name]) > most:
            try:
                raise RuntimeError(message)
            except RuntimeError as error:
                raise RunError("ONNX Runtime fails with these inputs") from error
        return run(feeds)

    monkeypatch.setattr(engine, "_run", limited)


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize(("rows", "most", "fits"), [(64, 63, 32), (50, 9, 6), (3, 1, 1)])
def test_the_message_names_a_batch_that_fits(engine, monkeypatch, message, rows, most, fits):
    inputs = [i.numpy() for i in draw(flat_of(chain)[1], rows, 0)]
    expected = engine(*inputs)
    short(engine, monkeypatch, most, message)
    named = rf"for a batch of {rows} \(.*\); a batch of {fits} fits: .*answer_all\(\.\.\., rows={fits}\)"
    for call in (engine, engine.outputs, lambda *given: engine.answer_all(*given, rows=rows)):
        with pytest.raises(InputError, match=named) as caught:
            call(*inputs)
    assert message.splitlines()[0] in str(caught.value)
    answer = engine.answer_all(*inputs, rows=fits)
    assert answer.exit.tolist() == expected.exit.tolist()
    np.testing.assert_allclose(answer.output, expected.output, atol=1e-4)  # kernels of another batch size
    same(engine(*(i[:1] for i in inputs)), engine(*(i[:1] for i in inputs)))


def test_a_single_sample_that_does_not_fit_and_other_errors_are_not_halved(engine, monkeypatch):
    inputs = [i.numpy() for i in draw(flat_of(chain)[1], 4, 0)]
    short(engine, monkeypatch, 0, MESSAGES[0])
    with pytest.raises(InputError, match=r"for a batch of 4 .*, nor for one sample: free memory"):
        engine(*inputs)
    short(engine, monkeypatch, 0, "an index is out of range")
    with pytest.raises(RunError, match="fails with these inputs"):
        engine(*inputs)
    assert is_memory_error(MemoryError()) and not is_memory_error(ValueError("memory of an elephant"))
