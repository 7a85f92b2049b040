"""ONNX files of plain networks, as their users have them."""

import contextlib

import torch

from branchynet.graph.torch_program import quiet_export


def write(net, example, path, exporter="dynamo", free=True, opset=None):
    """Write a network with an exporter of PyTorch; `example` is a tuple of inputs named x1, x2, ..."""
    names = [f"x{n}" for n in range(1, len(example) + 1)]
    options = {"input_names": names, "opset_version": opset}
    with quiet_export(), torch.no_grad(), contextlib.redirect_stderr(None):
        if exporter == "dynamo":
            shapes = tuple({0: torch.export.Dim("batch")} for _ in example) if free else None
            options |= {"dynamo": True, "verbose": False, "external_data": False}
            torch.onnx.export(net.eval(), example, path, dynamic_shapes=shapes, **options)
        else:
            axes = {name: {0: "batch"} for name in names} if free else None
            torch.onnx.export(net.eval(), example, path, dynamo=False, dynamic_axes=axes, **options)
    return path
