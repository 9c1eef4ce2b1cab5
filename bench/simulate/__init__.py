"""A mesh in simulated time: the routers' own decisions over verifiers that are a step curve."""
