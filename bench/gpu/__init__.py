"""Kernels and steps on a GPU against its measured floors: `python -m treecast.bench.gpu`."""
