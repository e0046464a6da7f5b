"""Kernels: `reference` defines every kernel in plain torch; faster ones have its signatures."""
