"""Open parts of a network as ONNX files, in ONNX Runtime or OpenVINO."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..deploy.assembly import assemble
from ..deploy.loading import load
from ..deploy.model_file import save_model
from ..errors import as_graph_errors
from ..graph.macs import exit_macs
from ..graph.onnx_flat import FlatGraph, flatten
from ..graph.precision import converted
from ..graph.quantize import calibration_batches
from ..nn.network import plain_network
from ..policy.scores import Score
from ..policy.values import Policy
from .parts import PLAIN, Call, Macs
from .target import Target


@dataclass(frozen=True, eq=False)
class OnnxParts:
    """A network as flat ONNX graphs; see `Parts`.

    Attributes:
        flat: the network's graph, with scores.
        plain: the plain network's graph if the last exit reads branches (averaged exits).
        macs: see `Parts`.
    """

    flat: FlatGraph
    plain: FlatGraph | None = None
    macs: Macs = ((), ())

    @property
    def num_exits(self) -> int:
        """See `Parts`."""
        return self.flat.num_exits

    @property
    def averaged(self) -> bool:
        """See `Parts`."""
        return self.plain is not None

    @contextmanager
    def opened(self, graphs: Mapping[str, Policy | Sequence[str]], target: Target) -> Iterator[dict[str, Call]]:
        """See `Parts`."""
        calls: dict[str, Call] = {}
        with tempfile.TemporaryDirectory() as folder, as_graph_errors():
            for name, what in graphs.items():
                flat, policy, outputs = self._graph(what)
                path = Path(folder) / f"{name}.onnx"
                save_model(assemble(flat, policy, outputs=outputs), path)
                engine = load(path, threads=target.threads, runtime=cast(Any, target.runtime))
                calls[name] = engine if policy is not None else engine.outputs
            yield calls

    @contextmanager
    def deployed(self, path: Any, policy: Policy, target: Target) -> Iterator[Call]:
        """See `Parts`."""
        yield load(path, threads=target.threads, runtime=cast(Any, target.runtime))

    def check_cut(self, policy: Policy) -> None:
        """See `Parts`."""
        assemble(self.flat, policy)

    def _graph(self, what: Policy | Sequence[str]) -> tuple[FlatGraph, Policy | None, list[str]]:
        if isinstance(what, Policy):
            return self.flat, what, []
        flat = (self.plain or self.flat) if PLAIN in what else self.flat
        return flat, None, [f"output_{flat.num_exits}" if name == PLAIN else name for name in what]


def onnx_parts(
    net: nn.Module, example: Any, score: Score, precision: str, calibration: Any, dynamic: bool = True
) -> OnnxParts:
    """Return a network as flat graphs. They are converted as by `export`; the work is counted before that."""
    graphs = [flatten(net, example, score=score, dynamic=dynamic)]
    macs = exit_macs(graphs[0])
    if (alone := plain_network(net)) is not net:
        graphs.append(flatten(alone, example, dynamic=dynamic))
    batches = [[] if calibration is None else calibration_batches(calibration, graph) for graph in graphs]
    graphs = [converted(graph, precision, given) for graph, given in zip(graphs, batches, strict=True)]
    return OnnxParts(graphs[0], graphs[1] if len(graphs) > 1 else None, macs)
