"""Sets of operators for questions that reach beyond the entries of the table.

A property of a registered operator is a trait of its entry (``spec.Trait``). The sets here also hold operators that
have no entry, or answer a question that only one pass asks.
"""

from __future__ import annotations

# ------------------------------------------------------------------------------------------------ loading and running

CONSTANT = frozenset({"Constant"})
"""Nodes that hold a tensor as an attribute."""
SHAPE = frozenset({"Shape"})
"""Reads lengths at run time."""
SPLIT = frozenset({"Split"})
"""Divides a tensor into several along an axis."""
CONCATENATION = frozenset({"Concat"})
"""Joins tensors along an axis."""
FILL = frozenset({"ConstantOfShape"})
"""Makes a tensor of equal values, whose shape is its input."""
EXPANSION = frozenset({"Expand"})
"""Repeats a tensor to a shape that is its second input."""
EQUATION = frozenset({"Einsum"})
"""Products that an equation of letters describes."""
WINDOWED = frozenset({"AveragePool", "Conv", "LpPool", "MaxPool"})
"""Move a window over an input that must not be shorter."""
LOOP = frozenset({"Loop"})
"""May run for ever: the runtime needs watching."""
RANDOM = ("Random", "Bernoulli", "Multinomial")
"""Beginnings of the names of operators that draw random numbers."""
NOT_FOLDED = (
    "DequantizeLinear",
    "QuantizeLinear",
    "Sequence",
    "SplitToSequence",
    "Optional",
    *RANDOM,
)
"""Beginnings of the names of operators that are kept although all they read is constant.

Quantised weights stay codes, random numbers are drawn at every run, and an initialiser cannot hold a sequence.
"""
INDICES = {"Gather": 1, "GatherBlockQuantized": 1, "OneHot": 0}
"""Operators that read an input as indices, and its slot. A first input in another slot is the table of the values."""
PICKS = frozenset({"Gather", "Slice", "Split"})
"""Take some places of their first input."""
INTEGER_PRODUCTS = {"ConvInteger": 4, "MatMulInteger": 4, "QLinearConv": 8, "QLinearMatMul": 8}
"""Products of codes, with the number of inputs up to the last zero point."""
CONVOLUTION = "Conv"
"""Part of the name of every convolution, quantised and fused ones among them."""
DEQUANTISATION = b"DequantizeLinear"
"""The name as it stands in a serialised graph."""
PACKED_ATTENTION = ("com.microsoft", "Attention")
"""Attention with packed weights, of ONNX Runtime's own domain."""
LINEAR_KERNELS = ("Conv", "Gemm", "MatMul", "Attention", "Einsum", "LSTM", "GRU", "RNN")
"""A kernel whose operator contains one of these does the arithmetic of a linear node, whatever was fused into it."""
LINEAR_MODELS = frozenset({"LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor"})
"""Operators of ``ai.onnx.ml`` that multiply by coefficients which are attributes."""
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
"""Names of ONNX's own domain."""
DESCRIBED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Domains whose operators are known by their names, those without an entry among them."""
BLOCKED_LAYOUT = "com.microsoft.nchwc"
"""Domain of convolutions whose weights ONNX Runtime has laid out in blocks for one processor."""
GROWING = frozenset(
    {
        "BlackmanWindow",
        "CenterCropPad",
        "Col2Im",
        "ConstantOfShape",
        "ConvTranspose",
        "DFT",
        "Expand",
        "EyeLike",
        "HammingWindow",
        "HannWindow",
        "Loop",
        "MaxUnpool",
        "MelWeightMatrix",
        "OneHot",
        "Pad",
        "Range",
        "Resize",
        "Scan",
        "TfIdfVectorizer",
        "Tile",
        "Upsample",
    }
)
"""Operators whose output can be far larger than their inputs: a value or an attribute is its size."""

# ----------------------------------------------------------------------------------------------------- axes of channels

CHANNELS_ON_AXIS_1 = (
    "Conv",
    "ConvTranspose",
    "ConvInteger",
    "Pool",
    "BatchNormalization",
    "InstanceNormalization",
    "Resize",
)
"""Ends of the names of operators on images."""
CHANNELS_LAST = frozenset({"LayerNormalization"})
"""Operators without multiply-accumulates whose channels are on the last axis."""

# --------------------------------------------------------------------------------------------- behind the last layer

COMPARISONS = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
CLASS_DECISIONS = {"ArgMax": 0, "ArgMin": 0, "TopK": -1}
"""Operators that choose among classes by their scores, and the default of their attribute ``axis``."""
DECISIONS = (
    COMPARISONS
    | frozenset(CLASS_DECISIONS)
    | {
        "Binarizer",
        "Ceil",
        "Compress",
        "Equal",
        "Floor",
        "Hardmax",
        "NonMaxSuppression",
        "NonZero",
        "OneHot",
        "Round",
        "Sign",
        "Unique",
    }
)
"""Operators whose results jump where their inputs change a little."""
POSTPROCESSING = DECISIONS | {
    "Abs",
    "Add",
    "And",
    "ArrayFeatureExtractor",
    "BitShift",
    "Cast",
    "CastLike",
    "Clip",
    "Concat",
    "CumSum",
    "DequantizeLinear",
    "Div",
    "Exp",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "GatherND",
    "HardSigmoid",
    "Identity",
    "IsNaN",
    "LabelEncoder",
    "Log",
    "LogSoftmax",
    "Max",
    "MaxPool",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Pad",
    "Pow",
    "QuantizeLinear",
    "Reciprocal",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "Reshape",
    "ReverseSequence",
    "ScatterElements",
    "ScatterND",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Sum",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "Where",
    "Xor",
}
"""Operators without weights that may follow the last layer."""
LENGTHS = frozenset({"ConstantOfShape", "EyeLike", "Range", "Shape", "Size"})
"""Operators that read lengths, not values."""
COUNTS = frozenset({"Shape", "Size"})
"""Operators that give the lengths of their input."""
SIGN = frozenset({"Sign"})
"""Compares with zero."""
REDUCTIONS = frozenset(
    {
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
    }
)
"""Give one number for all entries along some axes."""
LOGARITHMS = frozenset({"Log", "LogSoftmax"})
COMPOSED = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "LpNormalization"})
"""Operators that exporters also write out in elementary ones (``compositions``)."""
KEEP_PROBABILITIES = frozenset(
    {
        "Clip",
        "Max",
        "MaxPool",
        "Mean",
        "Min",
        "Mul",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "Sqrt",
    }
)
"""Operators that make probabilities of probabilities."""
NOT_SCORES = frozenset(
    {
        "Clip",
        "Cos",
        "Erf",
        "GRU",
        "GroupNormalization",
        "InstanceNormalization",
        "LSTM",
        "LayerNormalization",
        "RMSNormalization",
        "RNN",
        "SimplifiedLayerNormalization",
        "Sin",
        "Softplus",
        "Tanh",
    }
)
"""Operators that do not end in class scores."""
