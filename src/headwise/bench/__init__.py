"""Bench: a model and configurations -> headwise and other caches measured in turn, and what was expected of headwise.

`contenders` the caches that are compared → `plan` what to run → `workload` token ids → `contender_run` each at work in
`rounds` → `record` what came out → `expectations` met or missed → `picture` speed and memory against context length.
Only `models` touches transformers; `kvpress_process` starts another interpreter, which runs `kvpress_worker`.
"""
