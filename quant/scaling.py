"""Scales: from the amax of a block to the code of its scale, in a stated order of fp32 operations.

NVFP4 (arXiv:2509.25149 section 2; the order of operations is that of TransformerEngine), element max 6, scale max 448:

    S_enc = min(fl(2688 / amax), FLT_MAX), 1 where amax = 0          S_dec = fl(1 / S_enc)      the global (decode) scale
    s     = fl(bmax * fl(S_enc * fl(1/6)))        order g2           s     = fl(fl(bmax / 6) * S_enc)        order g1
    s8    = e4m3(min(s, FLT_MAX))                 nearest even, saturating, may be 0: no floor, no epsilon
    enc   = min(fl(1 / fl(s8 * S_dec)), FLT_MAX)  from the ROUNDED scale, so that code * s8 * S_dec is near x

Each fl is one IEEE rounding to nearest even; divisions are correctly rounded. A block whose s8 is 0 gets enc = FLT_MAX:
its elements saturate, and decode to 0 through the scale. A non-finite amax makes S_enc NaN, hence every scale and the
global scale NaN, hence every value NaN: nothing is laundered (TransformerEngine keeps a finite value).
"""

import torch
from torch import Tensor

from quant.formats import FORMATS
from quant.spec import Scale

FLT_MAX = torch.finfo(torch.float32).max


def tensor_scale(amax: Tensor, format: str, scale: Scale) -> tuple[Tensor, Tensor]:
    """amax [] (fp32, of the whole operand) -> (S_enc [], S_dec []), encode and decode scale of the tensor."""
    target = FORMATS[format].max * FORMATS[scale.format].max
    # (`2688 / amax` would be torch's reciprocal times 2688: two roundings.)
    s_enc = (torch.full_like(amax, target) / amax).clamp(max=FLT_MAX)
    s_enc = torch.where(amax == 0, 1.0, s_enc)
    s_enc = torch.where(amax.isfinite(), s_enc, torch.nan)
    return s_enc, torch.ones_like(s_enc) / s_enc


def block_scale(bmax: Tensor, s_enc: Tensor, s_dec: Tensor, format: str, scale: Scale) -> tuple[Tensor, Tensor]:
    """bmax [...] (fp32, amax of each block) -> (int32 codes of the block scale, fp32 encode factor), same shape."""
    element, fmt = FORMATS[format], FORMATS[scale.format]
    if scale.order == "g2":
        s = bmax * (s_enc * (1.0 / element.max))
    else:
        s = (bmax / torch.full_like(bmax, element.max)) * s_enc
    code = fmt.encode(torch.where(s_enc.isfinite(), s.clamp(max=FLT_MAX), torch.nan))
    decoded = fmt.decode(code) * s_dec
    return code, (torch.ones_like(decoded) / decoded).clamp(max=FLT_MAX)
