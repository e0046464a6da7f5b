"""Eval: a model, policies and tasks -> what compression costs, item by item, in records that tables are made of.

Data path: `task` (items) and `contenders` (policies and other caches) -> `run` (every item with every contender, by an
`executor`) -> `run_folder` (JSON) -> `summary` -> `tables`. It uses the package as any user would: a `HeadwiseCache`
per run of an item, and nothing of its inside.
"""
