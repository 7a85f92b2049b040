"""One or more uses of every ONNX operator that can be imported."""

import numpy as np

from helpers.onnx_nodes import Case

RNG = np.random.default_rng(0)


def floats(*shape, low=-2.0, high=2.0):
    return RNG.uniform(low, high, shape).astype(np.float32)


def whole(*shape, low=-5, high=6):
    return RNG.integers(low, high, shape)


def bits(*shape):
    return RNG.random(shape) < 0.5


def ints(*numbers):
    return np.array(numbers, np.int64)


X = floats(3, 4, 5)
IMAGES = floats(2, 6, 9, 8)


def unary(names, x=X, **attributes):
    return [Case(name, (x,), (), attributes) for name in names.split()]


def binary(names, a=X, b=None, **attributes):
    return [Case(name, (a, floats(4, 1) if b is None else b), (1,), attributes) for name in names.split()]


ELEMENTWISE = [
    *unary("Abs Atan Asinh Ceil Cos Cosh Erf Exp Floor Identity IsNaN Neg Reciprocal Round Sign Sin Sinh Tan"),
    *unary("Acos Asin Atanh", floats(3, 4, low=-0.9, high=0.9)),
    *unary("Acosh Log Sqrt", floats(3, 4, low=1.1)),
    *unary("Not", bits(3, 4)),
    *unary("BitwiseNot", whole(3, 4)),
    *binary("Add Div Mul Sub Equal Greater GreaterOrEqual Less LessOrEqual Max Min Sum Mean"),
    *binary("And Or Xor", bits(3, 4), bits(4)),
    *binary("BitwiseAnd BitwiseOr BitwiseXor Add Sub Mul", whole(3, 4), whole(4)),
    *binary("Div Mod", whole(3, 4), ints(1, -2, 3, -4)),
    *binary("Mod", fmod=1),
    *binary("Pow", floats(3, 4, low=0.1), np.float32(2.5)),
    Case("Pow", (whole(3, 4), ints(2)), (1,), note="integers"),
    Case("Max", (X, floats(5), floats(1, 4, 1)), note="three"),
    Case("Round", (np.array([0.5, 1.5, -2.5, 2.4], np.float32),), note="halves"),
    Case("IsInf", (np.array([1, np.inf, -np.inf], np.float32),), (), {"detect_negative": 0}),
    Case("Clip", (X, np.float32(-1), np.float32(0.5)), (1, 2)),
    Case("Clip", (X, None, np.float32(0.5)), (2,), note="above"),
    Case("Clip", (X,), (), {"min": -1.0, "max": 0.25}, opset=10),
    Case("Cast", (X * 10,), (), {"to": 7}, note="to integers"),
    Case("Cast", (whole(3, 4),), (), {"to": 1}, note="to floats"),
    Case("Cast", (whole(3, 4),), (), {"to": 9}, note="to booleans"),
    Case("CastLike", (whole(3, 4), floats(1))),
    Case("Where", (bits(3, 1, 5), X, floats(1)), (2,)),
]

ACTIVATIONS = [
    *unary("Celu Elu Gelu HardSigmoid HardSwish LeakyRelu LogSoftmax Mish Relu Selu Shrink Sigmoid Softmax Softplus"),
    *unary("Softsign Tanh ThresholdedRelu Hardmax"),
    Case("Swish", (X,), (), {"alpha": 1.5}, opset=24),
    *unary("Celu Elu LeakyRelu ThresholdedRelu", alpha=0.3),
    *unary("Softmax LogSoftmax Hardmax", axis=1),
    Case("HardSigmoid", (X,), (), {"alpha": 0.3, "beta": 0.4}, note="options"),
    Case("Gelu", (X,), (), {"approximate": "tanh"}, note="tanh"),
    Case("Selu", (X,), (), {"alpha": 1.5, "gamma": 1.2}, note="options"),
    Case("Shrink", (X,), (), {"lambd": 1.0, "bias": 0.5}, note="options"),
    Case("PRelu", (X, floats(4, 1)), (1,)),
    Case("Softmax", (X,), (), {"axis": 1}, opset=11),
    Case("LogSoftmax", (X,), (), {}, opset=12),
    Case("Hardmax", (X,), (), {"axis": 2}, opset=11),
    Case("Dropout", (X, np.float32(0.4)), (1,)),
    Case("Dropout", (X,), outputs=2, note="mask"),
    Case("Dropout", (X,), (), {"ratio": 0.4}, opset=11),
]


def conv(note, x, weight, bias=None, operator="Conv", **attributes):
    return Case(operator, (x, weight, bias), (1, 2), attributes, note=note)


def pool(operator, note="", x=IMAGES, opset=20, **attributes):
    return Case(operator, (x,), (), attributes, note=note, opset=opset)


CONVOLUTIONS = [
    conv("plain", IMAGES, floats(4, 6, 3, 3), floats(4)),
    conv("one dimension", floats(2, 3, 11), floats(4, 3, 3), floats(4), strides=[2], pads=[1, 2]),
    conv("three dimensions", floats(2, 3, 5, 6, 4), floats(4, 3, 2, 2, 2)),
    conv("groups", IMAGES, floats(6, 1, 3, 3), floats(6), group=6, pads=[1, 1, 1, 1], dilations=[2, 1]),
    conv("uneven", IMAGES, floats(4, 6, 3, 3), pads=[0, 1, 2, 1], strides=[2, 1]),
    *(
        conv(f"{how} {stride}", IMAGES, floats(4, 6, 3, 2), auto_pad=how, strides=[stride, stride])
        for how in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for stride in (1, 2)
    ),
    conv("plain", IMAGES, floats(6, 4, 3, 3), floats(4), "ConvTranspose"),
    conv("strides", IMAGES, floats(6, 2, 3, 3), floats(4), "ConvTranspose", strides=[2, 3], pads=[1, 1, 1, 1], group=2),
    conv("uneven", IMAGES, floats(6, 4, 3, 3), None, "ConvTranspose", strides=[2, 2], pads=[0, 1, 1, 0]),
    conv("extra", IMAGES, floats(6, 4, 3, 3), None, "ConvTranspose", strides=[2, 2], output_padding=[1, 1]),
    conv("shape", IMAGES, floats(6, 4, 3, 3), None, "ConvTranspose", strides=[2, 2], output_shape=[18, 16]),
    conv("same", IMAGES, floats(6, 4, 3, 3), None, "ConvTranspose", strides=[2, 2], auto_pad="SAME_UPPER"),
    pool("GlobalAveragePool"),
    pool("GlobalMaxPool"),
    pool("MaxPool", kernel_shape=[2, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    pool("MaxPool", "ceil", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    pool("MaxPool", "uneven", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    pool("MaxPool", "dilated", kernel_shape=[2, 2], dilations=[2, 3]),
    pool("MaxPool", "same", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    pool("MaxPool", "one dimension", floats(2, 3, 11), kernel_shape=[3], strides=[2]),
    pool("AveragePool", kernel_shape=[2, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    pool("AveragePool", "with padding", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    pool("AveragePool", "uneven", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    pool("AveragePool", "uneven with padding", kernel_shape=[3, 3], pads=[0, 0, 1, 1], count_include_pad=1),
    pool("AveragePool", "same", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER"),
    pool("AveragePool", "ceil", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    pool("LpPool", kernel_shape=[3, 2], strides=[2, 1], p=2),
    pool("LpPool", "ceil", kernel_shape=[3, 3], strides=[2, 2], p=3, ceil_mode=1, pads=[1, 1, 1, 1]),
    *(
        pool(
            operator,
            f"ceil {stride} {pads}",
            opset=opset,
            kernel_shape=[3, 3],
            strides=[stride] * 2,
            **{
                "ceil_mode": 1,
                "pads": [int(digit) for digit in pads],
                **more,
            },
        )
        for operator, opset, more in (
            ("MaxPool", 12, {}),
            ("AveragePool", 12, {}),
            ("AveragePool", 19, {"count_include_pad": 1}),
            ("LpPool", 18, {}),
        )
        for stride in (2, 3, 4)  # some windows start in the padding at the end
        for pads in ("0011", "0110", "2001")
    ),
]

SCALE, BIAS = floats(6), floats(6)
NORMALIZATIONS = [
    Case("BatchNormalization", (IMAGES, SCALE, BIAS, floats(6), floats(6, low=0.5)), (1, 2, 3, 4), {"epsilon": 1e-3}),
    Case("InstanceNormalization", (IMAGES, SCALE, BIAS), (1, 2)),
    Case("LayerNormalization", (X, floats(5), floats(5)), (1, 2)),
    Case("LayerNormalization", (X, floats(4, 5)), (1,), {"axis": 1, "epsilon": 1e-3}, note="two dimensions"),
    Case("GroupNormalization", (IMAGES, SCALE, BIAS), (1, 2), {"num_groups": 3}, opset=21),
    Case("GroupNormalization", (IMAGES, floats(3), floats(3)), (1, 2), {"num_groups": 3}, opset=18),
    Case("LRN", (IMAGES,), (), {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 2.0}),
    Case("LRN", (IMAGES,), (), {"size": 5, "alpha": 0.1}, note="wide"),
    Case("LpNormalization", (X,), (), {"axis": 1, "p": 1}),
    Case("LpNormalization", (X,), (), {}, note="two"),
    Case("MeanVarianceNormalization", (IMAGES,)),
    Case("RMSNormalization", (X, floats(5)), (1,), {"epsilon": 1e-3}, opset=23),
]

HEADS = (floats(2, 4, 5, 6), floats(2, 2, 7, 6), floats(2, 2, 7, 6))
PRODUCTS = [
    Case("Gemm", (floats(3, 5), floats(4, 5), floats(4)), (1, 2), {"transB": 1}),
    Case("Gemm", (floats(5, 3), floats(5, 4), floats(3, 1)), (1, 2), {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", (floats(3, 5), floats(5, 4)), (1,), note="no bias"),
    Case("MatMul", (X, floats(5, 2)), (1,)),
    Case("MatMul", (X, floats(3, 5, 2)), note="batches"),
    Case("Einsum", (X, floats(5, 2)), (1,), {"equation": "bij,jk->bki"}),
    Case("Attention", HEADS, opset=23),
    Case("Attention", HEADS, (), {"is_causal": 1, "scale": 0.3}, opset=23, note="causal"),
    Case("Attention", (*HEADS, bits(5, 7) | np.eye(5, 7, dtype=bool)), (3,), opset=23, note="mask"),
    Case(
        "Attention",
        (floats(2, 5, 12), floats(2, 5, 12), floats(2, 5, 12), floats(5, 5)),
        (3,),
        {"q_num_heads": 3, "kv_num_heads": 3},
        opset=23,
        note="flat",
    ),
    Case("RotaryEmbedding", (floats(2, 3, 4, 6), floats(2, 4, 3), floats(2, 4, 3)), (1, 2), opset=23),
    Case(
        "RotaryEmbedding",
        (floats(2, 4, 18), floats(9, 2), floats(9, 2), whole(2, 4, low=0, high=9)),
        (1, 2),
        {"num_heads": 3, "interleaved": 1, "rotary_embedding_dim": 4},
        opset=23,
        note="positions",
    ),
]

REDUCED = "ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
REDUCTIONS = [
    *(Case(name, (X, ints(1, -1)), (1,)) for name in REDUCED.split()),
    *(Case(name, (X,), (), {"keepdims": 0}, note="all") for name in REDUCED.split()),
    *(Case(name, (X,), (), {"noop_with_empty_axes": 1}, note="none") for name in ("ReduceSum", "ReduceL1")),
    Case("ReduceLogSum", (floats(3, 4, low=0.1), ints(1)), (1,), {"keepdims": 0}),
    Case("ReduceMean", (X,), (), {"axes": [1]}, opset=13),
    Case("ReduceSum", (X,), (), {"axes": [1], "keepdims": 0}, opset=11),
    *(Case(name, (X,), (), {"axis": 1}) for name in ("ArgMax", "ArgMin")),
    Case("ArgMax", (whole(3, 9, low=0, high=2),), (), {"axis": 1, "keepdims": 0}, note="first"),
    Case("ArgMax", (whole(3, 9, low=0, high=2),), (), {"axis": 1, "select_last_index": 1}, note="last"),
    Case("CumSum", (X, ints(1)), (1,)),
    Case("CumSum", (X, np.array(-1)), (1,), {"exclusive": 1, "reverse": 1}, note="reverse"),
    Case("TopK", (X, ints(2)), (1,), {"axis": 1}, outputs=2),
    Case("TopK", (X, ints(3)), (1,), {"largest": 0}, outputs=2, note="smallest"),
]

SHAPES = [
    Case("Concat", (X, floats(3, 2, 5)), (), {"axis": 1}),
    Case("Expand", (floats(3, 1, 5), ints(2, 1, 4, 1)), (1,)),
    Case("Flatten", (IMAGES,)),
    Case("Flatten", (IMAGES,), (), {"axis": 0}, note="0"),
    Case("Flatten", (IMAGES,), (), {"axis": -1}, note="-1"),
    Case("Pad", (IMAGES, ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(1.5)), (1, 2)),
    Case("Pad", (IMAGES, ints(0, 0, 1, 2, 0, 0, 3, 0)), (1,), {"mode": "reflect"}, note="reflect"),
    Case("Pad", (IMAGES, ints(1, 2, 3, 0), None, ints(2, -1)), (1, 3), {"mode": "edge"}, note="axes"),
    Case("Pad", (IMAGES, ints(1, 2, 3, 0), None, ints(2, -1)), (1, 3), {"mode": "wrap"}, note="wrap"),
    Case("Pad", (IMAGES, ints(0, 0, -1, -2, 0, 0, 3, 0)), (1,), note="negative"),
    Case("Reshape", (X, ints(0, -1, 2, 1)), (1,)),
    Case("Shape", (X,)),
    Case("Shape", (X,), (), {"start": 1, "end": -1}, note="part"),
    Case("Size", (X,)),
    Case("Slice", (X, ints(1, 0), ints(2**63 - 1, -1), ints(1, -1)), (1, 2, 3)),
    Case("Slice", (X, ints(-1, 3), ints(-(2**63), 1), ints(0, 2), ints(-1, -1)), (1, 2, 3, 4), note="backwards"),
    Case("Slice", (X, ints(0), ints(5), ints(2), ints(2)), (1, 2, 3, 4), note="steps"),
    Case("Split", (X, ints(1, 3)), (1,), {"axis": 1}, outputs=2),
    Case("Split", (X,), (), {"axis": 2, "num_outputs": 2}, outputs=2, note="uneven"),
    Case("Split", (X,), (), {"axis": 1, "split": [1, 3]}, outputs=2, opset=11),
    Case("Squeeze", (floats(3, 1, 4, 1), ints(1)), (1,)),
    Case("Squeeze", (floats(3, 1, 4, 1),), note="all"),
    Case("Squeeze", (floats(3, 1, 4, 1),), (), {"axes": [-1]}, opset=11),
    Case("Tile", (X, ints(1, 2, 3)), (1,)),
    Case("Transpose", (X,)),
    Case("Transpose", (X,), (), {"perm": [1, 0, 2]}, note="perm"),
    Case("Trilu", (X,)),
    Case("Trilu", (X, np.array(1)), (1,), {"upper": 0}, note="lower"),
    Case("Unsqueeze", (X, ints(0, -1)), (1,)),
    Case("Unsqueeze", (X,), (), {"axes": [1, 3]}, opset=11),
]

INDEXING = [
    Case("Gather", (floats(50, 6), whole(2, 7, low=0, high=50)), (0,), note="embedding"),
    Case("Gather", (X, ints(-1, 0, 2)), (1,), {"axis": 1}, note="constant"),
    Case("Gather", (X, np.array(-1)), (1,), {"axis": 1}, note="one"),
    Case("Gather", (X, whole(2, 3, low=-4, high=4)), (), {"axis": 1}, note="data"),
    Case("GatherElements", (X, whole(3, 2, 5, low=-4, high=4)), (), {"axis": 1}),
    Case("GatherND", (X, whole(6, 2, low=-3, high=3))),
    Case("GatherND", (X, whole(3, 2, 1, low=0, high=4)), (), {"batch_dims": 1}, note="batch"),
    Case("ScatterElements", (X, ints(2, -4).reshape(1, 2, 1), floats(1, 2, 1)), (1,), {"axis": 1}),
    Case("ScatterElements", (X, whole(3, 2, 5, low=0, high=4), floats(3, 2, 5)), (), {"axis": 1, "reduction": "add"}),
    Case("ScatterND", (X, ints(0, -1, 2, 1).reshape(2, 2), floats(2, 5)), (1,)),
    Case("ScatterND", (X, ints(0, 0, 2).reshape(3, 1), floats(3, 4, 5)), (1,), {"reduction": "add"}, note="add"),
    Case("OneHot", (whole(3, 4, low=-6, high=6), ints(6), floats(2)), (1, 2), {"axis": 1}),
    Case("EyeLike", (floats(3, 4),), (), {"k": 1}),
]


def resize(note, x=IMAGES, scales=None, sizes=None, **attributes):
    given = (x, None, None if scales is None else np.array(scales, np.float32), None if sizes is None else ints(*sizes))
    return Case("Resize", given if sizes else given[:3], (2, 3) if sizes else (2,), attributes, note=note)


RESIZING = [
    Case("DepthToSpace", (floats(2, 8, 3, 4),), (), {"blocksize": 2}),
    Case("DepthToSpace", (floats(2, 8, 3, 4),), (), {"blocksize": 2, "mode": "CRD"}, note="CRD"),
    Case("SpaceToDepth", (floats(2, 3, 4, 6),), (), {"blocksize": 2}),
    Case("GridSample", (IMAGES, floats(2, 3, 4, 2, low=-1.2, high=1.2))),
    Case("GridSample", (IMAGES, floats(2, 3, 4, 2, low=-1.0, high=1.0)), (), {"align_corners": 1, "mode": "nearest"}),
    *(
        resize(f"{mode} {how} {factor}", scales=[1, 1, factor, 1.5], mode=mode, coordinate_transformation_mode=how)
        for mode in ("nearest", "linear")
        for how in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
        for factor in (2.0, 0.6)
    ),
    *(
        resize(f"sizes {mode} {how}", sizes=[2, 6, 5, 13], mode=mode, coordinate_transformation_mode=how)
        for mode in ("nearest", "linear", "cubic")
        for how in ("half_pixel", "align_corners")
    ),
    *(resize(f"nearest {how}", scales=[1, 1, 1.4, 0.7], nearest_mode=how) for how in ("floor", "ceil")),
    resize("round", scales=[1, 1, 2, 2], coordinate_transformation_mode="asymmetric", nearest_mode="round_prefer_ceil"),
    *(
        resize(
            f"symmetric {factor}",
            scales=[1, 1, factor, 3],
            coordinate_transformation_mode="half_pixel_symmetric",
            **{
                "nearest_mode": how,
            },
        )
        for factor, how in ((1.7, "round_prefer_floor"), (1.7, "round_prefer_ceil"), (2, "floor"), (2, "ceil"))
    ),
    resize("cubic", scales=[1, 1, 2, 3], mode="cubic"),
    resize("one dimension", floats(2, 3, 8), scales=[1, 1, 2], mode="linear"),
    resize("three dimensions", floats(2, 3, 4, 5, 3), scales=[1, 1, 2, 2, 2], mode="linear"),
]


def recurrent(kind, gates, note="", directions=1, states=0, layout=0, bias=True, **attributes):
    hidden = 4
    x = floats(2, 5, 3) if layout else floats(5, 2, 3)
    weights = floats(directions, gates * hidden, 3), floats(directions, gates * hidden, hidden)
    given = [x, *weights, floats(directions, 2 * gates * hidden) if bias else None]
    shape = (2, directions, hidden) if layout else (directions, 2, hidden)
    if states:
        given += [None, *(floats(*shape) for _ in range(states))]
    if layout:
        attributes["layout"] = 1
    return Case(
        kind,
        tuple(given),
        (1, 2, 3),
        {"hidden_size": hidden, **attributes},
        outputs=3 if kind == "LSTM" else 2,
        note=note,
    )


RECURRENT = [
    recurrent("LSTM", 4),
    recurrent("LSTM", 4, "states", states=2, bias=False),
    recurrent("LSTM", 4, "reverse", direction="reverse"),
    recurrent("LSTM", 4, "both", directions=2, direction="bidirectional"),
    recurrent("GRU", 3, linear_before_reset=1),
    recurrent("GRU", 3, "both", directions=2, states=1, direction="bidirectional", linear_before_reset=1),
    recurrent("RNN", 1),
    recurrent("RNN", 1, "relu", activations=["Relu"]),
]

CASES = (
    *ELEMENTWISE,
    *ACTIVATIONS,
    *CONVOLUTIONS,
    *NORMALIZATIONS,
    *PRODUCTS,
    *REDUCTIONS,
    *SHAPES,
    *INDEXING,
    *RESIZING,
    *RECURRENT,
)
