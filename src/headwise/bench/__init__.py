"""Bench: a model and configurations -> headwise and its rivals measured in turn, and what was expected of headwise.

`rivals` of all `candidates` the caches that compete → `plan` what to run → `workload` token ids → `measure` rounds in
turn → `record` what came out → `expectations` met or missed → `picture` speed and memory against context length.
Only `stock` touches transformers; `kvpress_peer` is run by another interpreter.
"""
