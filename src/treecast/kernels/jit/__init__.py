"""Kernels in Triton's language; `kernels.triton_*` launch them.

They run on CUDA devices, and with TRITON_INTERPRET=1 (set before triton is imported) on CPU.
"""
