"""Measurements on a running mesh: the demo's table, and the comparison with transformers."""
