"""The pointwise operations of torch that a cell may use, and how each is written in Triton.

Derivatives contain operations that the author of a cell did not write; these are here too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

aten = torch.ops.aten

# The format of each operation, filled with names of values or with numbers. sigmoid, tanh, expm1 and log1p are those of
# `kernels.equations`, as accurate as torch's.
EXPRESSIONS: Mapping[Any, str] = {
    aten.abs.default: "tl.abs({})",
    aten.add.Tensor: "{} + {}",
    aten.add.Scalar: "{} + {}",
    aten.bitwise_and.Tensor: "{} & {}",
    aten.bitwise_not.default: "{} == 0",
    aten.bitwise_or.Tensor: "{} | {}",
    aten.cos.default: "tl.cos({})",
    aten.div.Tensor: "{} / {}",
    aten.div.Scalar: "{} / {}",
    aten.eq.Tensor: "{} == {}",
    aten.eq.Scalar: "{} == {}",
    aten.erf.default: "tl.erf({})",
    aten.exp.default: "tl.exp({})",
    aten.exp2.default: "tl.exp2({})",
    aten.expm1.default: "expm1({})",
    aten.ge.Tensor: "{} >= {}",
    aten.ge.Scalar: "{} >= {}",
    aten.gt.Tensor: "{} > {}",
    aten.gt.Scalar: "{} > {}",
    aten.le.Tensor: "{} <= {}",
    aten.le.Scalar: "{} <= {}",
    aten.log.default: "tl.log({})",
    aten.log1p.default: "log1p({})",
    aten.log2.default: "tl.log2({})",
    aten.logical_and.default: "{} & {}",
    aten.logical_not.default: "{} == 0",
    aten.logical_or.default: "{} | {}",
    aten.lt.Tensor: "{} < {}",
    aten.lt.Scalar: "{} < {}",
    aten.maximum.default: "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    aten.minimum.default: "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    aten.mul.Tensor: "{} * {}",
    aten.mul.Scalar: "{} * {}",
    aten.ne.Tensor: "{} != {}",
    aten.ne.Scalar: "{} != {}",
    aten.neg.default: "-{}",
    aten.reciprocal.default: "1.0 / {}",
    aten.relu.default: "tl.maximum({}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    aten.rsqrt.default: "tl.rsqrt({})",
    aten.sgn.default: "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0 * {0}))",
    aten.sign.default: "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0 * {0}))",
    aten.sigmoid.default: "sigmoid({})",
    aten.sin.default: "tl.sin({})",
    aten.sqrt.default: "tl.sqrt({})",
    aten.sub.Tensor: "{} - {}",
    aten.sub.Scalar: "{} - {}",
    aten.tanh.default: "tanh({})",
    aten.where.self: "tl.where({}, {}, {})",
}

# Operations that return the values of their first argument.
SAME = frozenset(
    {aten.alias.default, aten.clone.default, aten.detach.default, aten.expand.default, aten.view.default}
    | {aten._to_copy.default, aten.lift_fresh_copy.default, aten.positive.default}
)


def _value(node: Any, position: int) -> float:
    return float(node.args[position])


# Operations that make a tensor of one number, and that number.
CONSTANTS: Mapping[Any, Callable[[Any], float]] = {
    aten.empty_permuted.default: lambda node: float("nan"),  # filled by another of these
    aten.full.default: lambda node: _value(node, 1),
    aten.full_like.default: lambda node: _value(node, 1),
    aten.new_full.default: lambda node: _value(node, 2),
    aten.new_ones.default: lambda node: 1.0,
    aten.new_zeros.default: lambda node: 0.0,
    aten.ones.default: lambda node: 1.0,
    aten.ones_like.default: lambda node: 1.0,
    aten.scalar_tensor.default: lambda node: _value(node, 0),
    aten.zeros.default: lambda node: 0.0,
    aten.zeros_like.default: lambda node: 0.0,
}

# Operations that torch decomposes into those above.
_COMPOSED = [
    aten.addcdiv.default,
    aten.addcmul.default,
    aten.celu.default,
    aten.elu.default,
    aten.gelu.default,
    aten.hardshrink.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.lerp.Scalar,
    aten.lerp.Tensor,
    aten.log_sigmoid_forward.default,
    aten.masked_fill.Scalar,
    aten.mish.default,
    aten.relu6.default,
    aten.rsub.Scalar,
    aten.rsub.Tensor,
    aten.silu.default,
    aten.softplus.default,
    aten.softshrink.default,
    aten.square.default,
    aten.threshold.default,
]

DECOMPOSITIONS = {
    **{op: how for op, how in core_aten_decompositions().items() if op not in EXPRESSIONS},
    **{op: how for op, how in get_decompositions(_COMPOSED).items() if op not in EXPRESSIONS},
}

# `derive` writes these out, because they have no single form; clamp may lack one of its bounds.
CLAMP, POWER = aten.clamp.default, aten.pow.Tensor_Scalar
EXPONENTS = frozenset(sign * half / 2 for half in range(1, 9) for sign in (1, -1))

ALLOWED = frozenset(
    {*EXPRESSIONS, *SAME, *CONSTANTS, *_COMPOSED, CLAMP, POWER, aten.clamp_min.default, aten.clamp_max.default}
)
