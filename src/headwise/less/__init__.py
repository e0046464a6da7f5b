"""LESS: rows that a policy evicts -> a small state, which can still be queried."""
