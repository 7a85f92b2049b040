"""The ONNX operators that can be imported, one small function each."""

from .activations import ACTIVATIONS
from .convolutions import CONVOLUTIONS
from .elementwise import ELEMENTWISE
from .indexing import INDEXING
from .normalizations import NORMALIZATIONS
from .operator import Operator
from .products import PRODUCTS
from .recurrent import RECURRENT
from .reductions import REDUCTIONS
from .resizing import RESIZING
from .shapes import SHAPES

OPERATORS: dict[str, Operator] = {
    **ACTIVATIONS,
    **CONVOLUTIONS,
    **ELEMENTWISE,
    **INDEXING,
    **NORMALIZATIONS,
    **PRODUCTS,
    **RECURRENT,
    **REDUCTIONS,
    **RESIZING,
    **SHAPES,
}
