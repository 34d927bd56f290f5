"""quantize(x, spec) -> QTensor or Mixed: one operand, by whatever stands for it in a recipe.

encode.py has the semantics of a QuantSpec, kernel.py what does the same on a GPU, choose.py how a Choice picks one; here is
what the rest of the house calls."""

from dataclasses import replace

import torch
from torch import Tensor

from quant import kernel
from quant.choice import Choice
from quant.choose import choose, unrotated
from quant.encode import check, encode, rotated, values_of
from quant.mixed import Mixed
from quant.qtensor import QTensor
from quant.random import Key
from quant.spec import QuantSpec


def quantize(
    x: Tensor,
    spec: QuantSpec | Choice,
    key: Key | None = None,
    sign_key: Key | None = None,
    held: Tensor | None = None,
    index: int | Tensor | None = None,
) -> QTensor | Mixed:
    """Quantise x [..., K] along its last axis, the contraction; rows are all other axes flattened.

    x: fp32, BF16 or FP16, any strides. key: where randomness is used, needed by stochastic rounding and fresh signs;
    sign_key: the one both operands of a GEMM share for fresh signs (default: the key with use + 16).
    held: fp32 [], an amax in place of that of x for a scale that spans all of it (0: none yet).
    index: the candidate of a ladder, where that is decided already. A ladder gives the QTensor of the candidate that it picks
      (its `spec` tells which), or, where it picks for blocks, a Mixed; the host waits for the decision.
    A non-finite element makes its block NaN, or all that an outer scale spans; unscaled, only itself.
    `source` and `center` of a spec are about the other operands of a Linear, and nothing to this function.
    Raises ValueError if x cannot be cut into blocks, or a key is missing.
    Source: arXiv:2509.25149 section 2; OCP MX v1.0.
    """
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if kernel.takes(rows, spec):
        return replace(kernel.encode(rows, spec, key, sign_key, held), shape=tuple(x.shape))
    if not spec.ladder:
        return encode(x, spec, key, sign_key, held)
    check(x.shape, spec)
    index = choose(rows, spec, key, sign_key).index if index is None else index
    if spec.per == "tensor":
        return quantize(x, spec.candidates[int(index)], key, sign_key)
    y = rotated(rows, spec, sign_key or (key and key.at(use=key.use + 16)))
    whole = {i: quantize(y, unrotated(spec.candidates[i]), key) for i in index.unique().tolist()}
    return Mixed.gather(index, whole, spec, tuple(x.shape))


def quantized_values(
    x: Tensor, spec: QuantSpec | Choice, key: Key | None = None, sign_key: Key | None = None, held: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `quantize`, for x [R, K]: (code * scale [R, K], what leaves the sum as a factor: fp32 [] or [R, 1], or None).
    BF16 where that is exact, else fp32; bit-equal to decoding what `quantize` gives."""
    if spec.ladder:
        return choose(x, spec, key, sign_key)[:2]
    if kernel.takes(x, spec):
        return kernel.decode(kernel.encode(x, spec, key, sign_key, held))
    return values_of(x, spec, key, sign_key, held)


def decoded_values(q: QTensor | Mixed, spec: QuantSpec | Choice) -> tuple[Tensor, Tensor | None]:
    """`quantized_values` by `spec` of what `quantize` by it has given."""
    if isinstance(q, Mixed):
        values, factor = q.dequantize().view(q.rows_and_k), None
    else:
        values, factor = kernel.decode(q)
    return (values.to(torch.bfloat16 if spec.exact else torch.float32) if spec.ladder else values), factor
