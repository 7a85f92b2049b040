"""Write an exported model. Weights beyond 2 GB, which one ONNX file cannot hold, go to a second file beside it.

The second file is named after the model and its own content, as ``model.onnx.0123456789abcdef.weights``. An export to
the same path therefore never changes the weights of the model that is there: that pair is valid until the new model
takes its name.
"""

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..files import WEIGHTS
from .checksum import seal, sha256
from .engine import METADATA_KEY

LIMIT = (1 << 31) - (1 << 24)  # bytes of weights: protobuf allows 2 GiB in total, and the graph needs space too
_INLINE = 1024  # bytes up to which a tensor stays in the model


def is_large(model: ir.Model) -> bool:
    """Whether the weights of a model need a second file."""
    return sum(v.const_value.nbytes for v in _initializers(model) if v.const_value is not None) > LIMIT


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model with the metadata of an export, and its checksum. A large model then refers to its second file."""
    if is_large(model):
        about = json.loads(model.metadata_props[METADATA_KEY])
        model.metadata_props[METADATA_KEY] = json.dumps({**about, "weights": _save_weights(model, path)})
    ir.save(model, path)
    seal(path)


def _save_weights(model: ir.Model, path: Path) -> dict[str, Any]:
    """Write the weights beside the model, and return their description for the metadata."""
    written = path.with_name(f"{path.name}{WEIGHTS}")
    ir.external_data.unload_from_model(model, path.parent, written.name, size_threshold_bytes=_INLINE)
    digest, size = sha256(written), written.stat().st_size
    final = written.replace(path.with_name(f"{path.name}.{digest[:16]}{WEIGHTS}"))
    for value in _initializers(model):
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                final.name, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name or "",
                base_dir=path.parent,
            )  # fmt: skip
    return {"file": final.name, "bytes": size, "sha256": digest}


def _initializers(model: ir.Model) -> list[ir.Value]:
    return [value for graph in model.graphs() for value in graph.initializers.values()]
