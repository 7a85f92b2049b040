"""Operators that compute every element alone, after broadcasting."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dtypes import dtype_of
from ..numbers import Numbers, elementwise
from .operator import Operator


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: functools.reduce(function, tensors)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _divide_numbers(a: Any, b: Any) -> Any:
    if isinstance(a, (float, torch.SymFloat)) or isinstance(b, (float, torch.SymFloat)):
        return a / b
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b  # sizes are not negative


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _mod_numbers(a: Numbers, b: Numbers, *, fmod: int = 0) -> Any:
    if fmod and not (a.fixed() and b.fixed()):
        return NotImplemented
    return elementwise(math.fmod if fmod else operator.mod)(a, b)


def _power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def _clip(x: Tensor, least: list[Any] | None = None, most: list[Any] | None = None, **old: Any) -> Tensor:
    low, high = least[0] if least else old.get("min"), most[0] if most else old.get("max")
    return x if low is None and high is None else torch.clamp(x, low, high)


def _infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    found = torch.isinf(x)
    if not detect_negative:
        found = found & (x > 0)
    return found if detect_positive else found & (x < 0)


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(dtype_of(to))


def _cast_numbers(x: Numbers, *, to: int, **_: Any) -> Numbers:
    dtype = dtype_of(to)
    if dtype.is_floating_point:
        return x.made(np.frompyfunc(lambda one: one * 1.0, 1, 1)(x.array), dtype)
    if dtype == torch.bool:
        return x.made(np.frompyfunc(lambda one: one != 0, 1, 1)(x.array), dtype)
    return x.made(np.frompyfunc(_truncated, 1, 1)(x.array), dtype)


def _truncated(one: Any) -> Any:
    if isinstance(one, torch.SymFloat):
        return torch.sym_int(one)
    return one if isinstance(one, torch.SymInt) else int(one)


def _where_numbers(condition: Numbers, a: Numbers, b: Numbers) -> Numbers:
    return a.made(np.frompyfunc(lambda c, x, y: x if c else y, 3, 1)(condition.array, a.array, b.array))


def _mean(*tensors: Tensor) -> Tensor:
    return functools.reduce(torch.add, tensors) / len(tensors)


def _compare(function: Callable[[Tensor, Tensor], Tensor], of_numbers: Callable[[Any, Any], Any]) -> Operator:
    return Operator(function, elementwise(of_numbers, torch.bool))


def _like(x: Tensor, target: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(target.dtype)


ELEMENTWISE: dict[str, Operator] = {
    "Abs": Operator(torch.abs, elementwise(abs)),
    "Acos": Operator(torch.acos),
    "Acosh": Operator(torch.acosh),
    "Add": Operator(torch.add, elementwise(operator.add)),
    "And": Operator(torch.logical_and, elementwise(lambda a, b: a and b, torch.bool)),
    "Asin": Operator(torch.asin),
    "Asinh": Operator(torch.asinh),
    "Atan": Operator(torch.atan),
    "Atanh": Operator(torch.atanh),
    "BitwiseAnd": Operator(torch.bitwise_and),
    "BitwiseNot": Operator(torch.bitwise_not),
    "BitwiseOr": Operator(torch.bitwise_or),
    "BitwiseXor": Operator(torch.bitwise_xor),
    "Cast": Operator(_cast, _cast_numbers),
    "CastLike": Operator(_like),
    "Ceil": Operator(torch.ceil, elementwise(lambda x: torch.sym_int(-((-x) // 1)) * 1.0)),
    "Clip": Operator(_clip, numbers=(1, 2)),
    "Cos": Operator(torch.cos),
    "Cosh": Operator(torch.cosh),
    "Div": Operator(_divide, elementwise(_divide_numbers)),
    "Equal": _compare(torch.eq, operator.eq),
    "Erf": Operator(torch.erf),
    "Exp": Operator(torch.exp),
    "Floor": Operator(torch.floor, elementwise(lambda x: x // 1)),
    "Greater": _compare(torch.gt, operator.gt),
    "GreaterOrEqual": _compare(torch.ge, operator.ge),
    "Identity": Operator(lambda x: x, lambda x: x),
    "IsInf": Operator(_infinite),
    "IsNaN": Operator(torch.isnan),
    "Less": _compare(torch.lt, operator.lt),
    "LessOrEqual": _compare(torch.le, operator.le),
    "Log": Operator(torch.log),
    "Max": Operator(_variadic(torch.maximum), elementwise(torch.sym_max)),
    "Mean": Operator(_mean),
    "Min": Operator(_variadic(torch.minimum), elementwise(torch.sym_min)),
    "Mod": Operator(_mod, _mod_numbers),
    "Mul": Operator(torch.mul, elementwise(operator.mul)),
    "Neg": Operator(torch.neg, elementwise(operator.neg)),
    "Not": Operator(torch.logical_not, elementwise(lambda x: not x, torch.bool)),
    "Or": Operator(torch.logical_or, elementwise(lambda a, b: a or b, torch.bool)),
    "Pow": Operator(_power, fixed=(1,)),
    "Reciprocal": Operator(torch.reciprocal, elementwise(lambda x: 1.0 / x)),
    "Round": Operator(torch.round),
    "Sign": Operator(torch.sign),
    "Sin": Operator(torch.sin),
    "Sinh": Operator(torch.sinh),
    "Sqrt": Operator(torch.sqrt, elementwise(lambda x: x**0.5)),
    "Sub": Operator(torch.sub, elementwise(operator.sub)),
    "Sum": Operator(_variadic(torch.add), elementwise(operator.add)),
    "Tan": Operator(torch.tan),
    "Where": Operator(torch.where, _where_numbers),
    "Xor": Operator(torch.logical_xor),
}
