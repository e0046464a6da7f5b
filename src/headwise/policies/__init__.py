"""Policies: one small file per rule or policy, found by the registry; a new one is one new file here."""

from headwise.policies.adakv import AdaKV
from headwise.policies.auto import Auto
from headwise.policies.base import Policy, Rule, Union
from headwise.policies.expected_attention import ExpectedAttention
from headwise.policies.fastgen import FastGen
from headwise.policies.full import Full
from headwise.policies.h2o import H2O
from headwise.policies.keydiff import KeyDiff
from headwise.policies.keynorm import KeyNorm
from headwise.policies.kvzip import KVzip
from headwise.policies.pyramidkv import PyramidKV
from headwise.policies.random import Random
from headwise.policies.recite import Recite
from headwise.policies.registry import create_policy, list_policies, register
from headwise.policies.scissorhands import Scissorhands
from headwise.policies.scored import Evidence, Scored
from headwise.policies.snapkv import SnapKV
from headwise.policies.streamingllm import StreamingLLM
from headwise.policies.tova import TOVA
from headwise.policies.window import Window

__all__ = [
    "H2O",
    "TOVA",
    "AdaKV",
    "Auto",
    "Evidence",
    "ExpectedAttention",
    "FastGen",
    "Full",
    "KVzip",
    "KeyDiff",
    "KeyNorm",
    "Policy",
    "PyramidKV",
    "Random",
    "Recite",
    "Rule",
    "Scissorhands",
    "Scored",
    "SnapKV",
    "StreamingLLM",
    "Union",
    "Window",
    "create_policy",
    "list_policies",
    "register",
]
