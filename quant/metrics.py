"""Error measures of one quantised operand, as 0-dim tensors: nothing here waits for the device.

    sqnr_db = 10 log10( sum y^2 / sum (y - q)^2 )        relative_error = mean |y - q| / |y| over y != 0
    underflow = share of y != 0 with q = 0               saturated = share with |y| above the largest q of its block
    scale_min, scale_max = smallest and largest nonzero block scale times the global scale

y is the operand as the quantiser saw it, after any Hadamard transform.
"""

import torch
from torch import Tensor

from quant.qtensor import QTensor
from quant.scaling import spread

STATS = ("sqnr_db", "relative_error", "underflow", "saturated", "scale_min", "scale_max", "nonfinite")


def operand_stats(y: Tensor, q: QTensor) -> Tensor:
    """y [R, K], its QTensor -> fp32 [len(STATS)], in the order of STATS; `nonfinite` counts elements of y."""
    y, spec = y.to(torch.float32), q.spec
    value = q.dequantize().reshape(y.shape)
    nonzero = y != 0
    count = nonzero.sum().clamp(min=1)
    noise = (y - value).square().sum()
    scale = torch.ones((), device=y.device)
    for part in q.scales():
        scale = scale * spread(part, *y.shape)
    saturated = y.abs() > scale * spec.element.max
    return torch.stack(
        [
            10 * torch.log10(y.square().sum() / noise),
            torch.where(nonzero, (y - value).abs() / y.abs(), 0.0).sum() / count,
            ((value == 0) & nonzero).sum() / count,
            saturated.float().mean(),
            torch.where(scale > 0, scale, torch.inf).amin(),
            scale.amax(),
            (~y.isfinite()).sum().float(),
        ]
    )
