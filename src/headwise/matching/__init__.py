"""Matching: rows that stay, and queries that tell what they are for -> values that stand for what was dropped."""
