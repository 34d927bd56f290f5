"""Error measures of one quantised operand, as 0-dim tensors: nothing here waits for the device.

    sqnr_db = 10 log10( sum y^2 / sum (y - q)^2 )        relative_error = mean |y - q| / |y| over y != 0
    underflow = share of y != 0 with q = 0               saturated = share with |y| above the largest q of its block
    scale_min, scale_max = smallest and largest nonzero block scale times the global scale
    dynamic_range = log2( max |y| / min |y| ) over y != 0

y is the operand as the quantiser saw it, after any Hadamard transform.
"""

import torch
from torch import Tensor

from quant.mixed import Mixed
from quant.qtensor import QTensor

STATS = ("sqnr_db", "relative_error", "underflow", "saturated", "scale_min", "scale_max", "dynamic_range", "nonfinite")


def operand_stats(y: Tensor, q: QTensor | Mixed) -> Tensor:
    """y [R, K], what it was quantised to -> fp32 [len(STATS)], in the order of STATS; `nonfinite` counts elements of y."""
    y = y.to(torch.float32)
    value = q.dequantize().reshape(y.shape)
    nonzero = y != 0
    count = nonzero.sum().clamp(min=1)
    noise = (y - value).square().sum()
    parts = q.parts.values() if isinstance(q, Mixed) else [q]
    scales = torch.cat([part.block_scale().flatten() for part in parts])
    saturated = y.abs() > q.largest()
    return torch.stack(
        [
            10 * torch.log10(y.square().sum() / noise),
            torch.where(nonzero, (y - value).abs() / y.abs(), 0.0).sum() / count,
            ((value == 0) & nonzero).sum() / count,
            saturated.float().mean(),
            torch.where(scales > 0, scales, torch.inf).amin(),
            scales.amax(),
            torch.log2(y.abs().amax() / torch.where(nonzero, y.abs(), torch.inf).amin()),
            (~y.isfinite()).sum().float(),
        ]
    )
