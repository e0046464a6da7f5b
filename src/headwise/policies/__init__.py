"""Policies: one small file per rule or policy, found by the registry; a new one is one new file here."""

from headwise.policies.base import Policy, Rule, Union
from headwise.policies.fastgen import FastGen
from headwise.policies.full import Full
from headwise.policies.h2o import H2O
from headwise.policies.random import Random
from headwise.policies.registry import create_policy, list_policies, register
from headwise.policies.streamingllm import StreamingLLM
from headwise.policies.window import Window

__all__ = [
    "H2O",
    "FastGen",
    "Full",
    "Policy",
    "Random",
    "Rule",
    "StreamingLLM",
    "Union",
    "Window",
    "create_policy",
    "list_policies",
    "register",
]
