"""Folders of export.py, as transformers loads them: `Exported`, for rows of the table."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import refuse_pickle


def loadable(folder: Path) -> None:
    """Raises ValueError for what transformers cannot load, or would load as something else."""
    refuse_pickle(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--exported {folder}: no folder that export.py has written, which has a config.json")
    quantised = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if (method := quantised.get("quant_method", "compressed-tensors")) != "compressed-tensors":
        raise ValueError(f"{folder} is in the layout of {method}, of which transformers reads the codes as weights")


class Exported(nn.Module):
    """A folder of export.py, as transformers loads it, for `measure`. Raises ValueError without one or without transformers."""

    def __init__(self, folder: Path, T: int):
        super().__init__()
        loadable(folder)
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise ValueError("--exported needs transformers and compressed-tensors, as pyproject.toml pins them") from None
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.norm, self.config = self.model.model.norm, SimpleNamespace(seq_len=T)

    def loss(self, tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = self.model(tokens).logits.to(torch.float32)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction)
