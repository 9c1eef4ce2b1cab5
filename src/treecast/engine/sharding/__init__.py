"""One model divided among processes: a verifier group.

Tensor parallelism divides every layer's heads and features, pipeline parallelism the layers. Rank 0
does the accounts and speaks to the world; it tells the others what to copy and what to compute, so
they keep none, and each has its own part of the KV pool.
"""
