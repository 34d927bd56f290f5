"""Quantisation as data: formats, specs, recipes, and the reference semantics in plain torch.

Modules import in one direction:
fuse < rounding, random < codebooks < formats < spec < choice < recipe, scaling, transform < qtensor < encode, mixed < metrics,
launch < kernel < choose < quantize, memory, native < gemm < context < linear < decisions, site, update, moments < policy.
"""

import warnings

from quant.choice import Bound, Choice, Memory
from quant.context import Context
from quant.formats import FORMATS
from quant.fuse import fuse
from quant.gemm import gemm
from quant.linear import Linear
from quant.policy import assign, assign_sites
from quant.qtensor import QTensor
from quant.quantize import quantize
from quant.recipe import Moments, Recipe, Rule, Sites, Weights
from quant.site import Site, attach
from quant.spec import QuantSpec, Scale
from quant.update import WeightStore

__all__ = [
    "FORMATS",
    "Bound",
    "Choice",
    "Context",
    "Linear",
    "Memory",
    "Moments",
    "QTensor",
    "QuantSpec",
    "Recipe",
    "Rule",
    "Scale",
    "Site",
    "Sites",
    "WeightStore",
    "Weights",
    "assign",
    "assign_sites",
    "attach",
    "fuse",
    "gemm",
    "quantize",
]

# `python -m quant.formats` prints the table of formats; that this package has imported that module before does no harm.
warnings.filterwarnings("ignore", "'quant.formats' found in sys.modules", RuntimeWarning)
