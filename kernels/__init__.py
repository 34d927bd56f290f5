"""Triton kernels: plain tensors and integers in, plain tensors out; nothing here imports anything of ours.

There are none yet: on every device the quantiser is fused by torch.compile (quant/fuse.py), which writes Triton on a GPU.
Hand-written kernels are worth their lines once they are measured against that, on the hardware they are for.

The name shadows a PyPI package called `kernels`, which loaders of FlashAttention builds import: run such a loader from
another working directory.
"""
