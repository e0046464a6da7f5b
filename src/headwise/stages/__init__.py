"""Stages 1/7 to 6/7: the way of a prompt through one layer, from its queries and keys to the rows that are kept."""
