"""Keep what `torch.onnx.export` builds again in every call: a third of the time of exporting a small network."""

import copy
import functools

import torch._export.utils as operators
from torch.onnx._internal.exporter import _registration


def keep_tables():
    """Build PyTorch's table of ONNX functions once per process, and its lists of operators once per namespace.

    The tables depend on the versions installed alone. The names are private: in a version of PyTorch without them,
    tests are slower.
    """
    registry = getattr(_registration, "ONNXRegistry", None)
    if hasattr(registry, "from_torchlib"):
        whole = functools.cache(registry.from_torchlib)
        registry.from_torchlib = staticmethod(lambda *args, **options: _own_lists(whole(*args, **options)))
    name = "_collect_all_valid_cia_ops_for_namespace"
    if hasattr(operators, name):
        setattr(operators, name, functools.cache(getattr(operators, name)))


def _own_lists(registry):
    """Copy the registry, so that functions which one export adds are not in the next."""
    copied = copy.copy(registry)
    copied.functions = {target: list(functions) for target, functions in registry.functions.items()}
    return copied
