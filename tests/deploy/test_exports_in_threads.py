"""Exports in several threads take turns."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from branchynet import TorchEngine, export, load
from helpers.verified_files import TWO, images, network


def test_threads_export_and_compile_at_once(tmp_path):
    nets = [network() for _ in range(2)]
    nets.append(nets[0])

    def work(n):
        if n == 3:
            return TorchEngine(nets[1], TWO, example=images())(images())
        return load(export(nets[n], tmp_path / f"{n}.onnx", policy=TWO, example=images()), threads=1)(images())

    before = sys.stdout, sys.stderr, warnings.filters[:]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(work, range(4)))
    assert (sys.stdout, sys.stderr, warnings.filters[:]) == before
    want = torch.stack(network()(images())).detach().numpy()
    for answer in answers:
        np.testing.assert_allclose(answer.output, want[answer.exit - 1, np.arange(8)], atol=1e-4)
