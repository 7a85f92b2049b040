"""LSTM, GRU and RNN, computed by torch's own operators.

Shape letters: T steps, B batch, I inputs, H hidden, D directions, G gates.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import GraphError
from .operator import Operator

_NORMAL = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
# The gates of ONNX in the order of torch.
_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}


def _lstm(x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None, outputs: int, **options: Any) -> tuple[Tensor, ...]:
    bias, lengths, hidden, cell, peephole = (*more, None, None, None, None, None)[:5]
    if peephole is not None:
        raise GraphError("an LSTM with peepholes cannot be imported")
    return _run("LSTM", x, (w, r, bias), (hidden, cell), lengths, options)


def _gru(x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None, outputs: int, **options: Any) -> tuple[Tensor, ...]:
    bias, lengths, hidden = (*more, None, None, None)[:3]
    if not options.pop("linear_before_reset", 0):
        raise GraphError("a GRU with linear_before_reset=0 cannot be imported, only with 1, as PyTorch computes it")
    return _run("GRU", x, (w, r, bias), (hidden,), lengths, options)


def _rnn(x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None, outputs: int, **options: Any) -> tuple[Tensor, ...]:
    bias, lengths, hidden = (*more, None, None, None)[:3]
    return _run("RNN", x, (w, r, bias), (hidden,), lengths, options)


def _run(
    kind: str,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None],
    states: Sequence[Tensor | None],
    lengths: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Return outputs `(T, D, B, H)`, or `(B, T, D, H)` with layout 1, and the last states."""
    first, recurrent, bias = weights
    directions, hidden = recurrent.shape[0], recurrent.shape[-1]
    relu = _check(kind, lengths, options, directions)
    layout, direction = options.get("layout", 0), options.get("direction", "forward")
    if layout:
        x = x.transpose(0, 1)
        states = [None if one is None else one.transpose(0, 1) for one in states]
    if direction == "reverse":
        x = x.flip(0)
    begin = [x.new_zeros(directions, x.shape[1], hidden) if one is None else one for one in states]
    flat = []
    for d in range(directions):
        flat += [_ordered(kind, first[d], hidden), _ordered(kind, recurrent[d], hidden)]
        if bias is not None:
            flat += [_ordered(kind, half, hidden) for half in bias[d].chunk(2)]
    settings = (flat, bias is not None, 1, 0.0, False, directions == 2, False)
    if kind == "LSTM":
        y, *last = torch.lstm(x, begin, *settings)
    else:
        function = torch.gru if kind == "GRU" else torch.rnn_relu if relu else torch.rnn_tanh
        y, *last = function(x, begin[0], *settings)
    y = y.flip(0) if direction == "reverse" else y
    y = y.unflatten(-1, (directions, hidden))  # (T, B, D, H)
    if layout:
        return y.transpose(0, 1), *(one.transpose(0, 1) for one in last)
    return y.transpose(1, 2), *last


def _ordered(kind: str, weight: Tensor, hidden: int) -> Tensor:
    blocks = weight.split(hidden)
    return torch.cat([blocks[n] for n in _ORDER[kind]]) if len(blocks) > 1 else weight


def _check(kind: str, lengths: Tensor | None, options: dict[str, Any], directions: int) -> bool:
    """Raise `GraphError` for options that torch does not have; return whether an RNN uses ReLU."""
    if lengths is not None:
        raise GraphError(f"the {kind} reads the length of each sequence; export the network without packed sequences")
    if options.get("clip") or options.get("input_forget"):
        raise GraphError(f"the {kind} has clip or input_forget, which cannot be imported")
    given = [name.lower() for name in options.get("activations", [])] or [*_NORMAL[kind]] * directions
    relu = kind == "RNN" and given == ["relu"] * directions
    if not relu and given != [*_NORMAL[kind]] * directions:
        raise GraphError(f"the {kind} uses the activations {given}; {[*_NORMAL[kind]]} can be imported")
    return relu


RECURRENT: dict[str, Operator] = {
    "GRU": Operator(_gru, weights=(1, 2, 3)),
    "LSTM": Operator(_lstm, weights=(1, 2, 3)),
    "RNN": Operator(_rnn, weights=(1, 2, 3)),
}
