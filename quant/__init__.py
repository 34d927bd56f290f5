"""Quantisation as data: formats, specs, recipes, and the reference semantics in plain torch.

Modules import in one direction:
rounding, random, fuse < codebooks < formats < spec < recipe, scaling, transform < qtensor < quantize < metrics < gemm
< linear < policy.
"""

import warnings

from quant.formats import FORMATS
from quant.fuse import fuse
from quant.gemm import gemm
from quant.linear import Context, Linear, attach
from quant.policy import assign
from quant.qtensor import QTensor
from quant.quantize import quantize
from quant.recipe import Recipe, Rule
from quant.spec import Choice, QuantSpec, Scale

__all__ = [
    "FORMATS",
    "Choice",
    "Context",
    "Linear",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "Rule",
    "Scale",
    "assign",
    "attach",
    "fuse",
    "gemm",
    "quantize",
]

# `python -m quant.formats` prints the table of formats; that this package has imported that module before does no harm.
warnings.filterwarnings("ignore", "'quant.formats' found in sys.modules", RuntimeWarning)
