"""LESS: what a policy evicts is folded into a small state, so that it can still be queried; with its training."""
