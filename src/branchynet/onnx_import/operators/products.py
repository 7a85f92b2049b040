"""Matrix products and attention. Shape letters: B batch, N heads, L and S positions, D features."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import GraphError
from .operator import Operator


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    a = a.t() if transA else a
    if transB and alpha == 1 and (c is None or (beta == 1 and c.dim() == 1 and len(c) == len(b))):
        return F.linear(a, b, c)
    product = a @ (b.t() if transB else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


def _einsum(*tensors: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *tensors)


@dataclass(frozen=True)
class Heads:
    """The attributes of Attention, as in the ONNX specification."""

    is_causal: int = 0
    kv_num_heads: int = 0
    q_num_heads: int = 0
    qk_matmul_output_mode: int = 0
    scale: float | None = None
    softcap: float = 0.0
    softmax_precision: int = 0


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *past: Tensor | None,
    outputs: int,
    **attributes: Any,
) -> Tensor:
    heads = Heads(**attributes)
    if outputs > 1 or any(one is not None for one in past) or heads.softcap:
        raise GraphError("Attention with earlier keys and values, further outputs or softcap cannot be imported")
    flat = query.dim() == 3
    if flat:  # (B, L, N * D)
        query, key, value = (
            x.unflatten(-1, (n, -1)).transpose(1, 2)
            for x, n in ((query, heads.q_num_heads), (key, heads.kv_num_heads), (value, heads.kv_num_heads))
        )
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if heads.scale is None else heads.scale)
    if heads.is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    y = torch.softmax(scores, -1) @ value
    return y.transpose(1, 2).flatten(2) if flat else y


def _rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    flat = x.dim() == 3
    y = x.unflatten(-1, (num_heads, -1)) if flat else x.transpose(1, 2)  # (B, L, N, D)
    if positions is not None:
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (B, L, 1, D / 2)
    size = rotary_embedding_dim or y.shape[-1]
    turned, rest = y[..., :size], y[..., size:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned[..., : size // 2], turned[..., size // 2 :]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    y = torch.cat([turned, rest], -1) if size != y.shape[-1] else turned
    return y.flatten(2) if flat else y.transpose(1, 2)


PRODUCTS: dict[str, Operator] = {
    "Attention": Operator(_attention),
    "Einsum": Operator(_einsum, weights=(0, 1, 2)),
    "Gemm": Operator(_gemm, weights=(0, 1, 2)),
    "MatMul": Operator(torch.matmul, weights=(0, 1)),
    "RotaryEmbedding": Operator(_rotary, fixed=(1, 2)),
}
