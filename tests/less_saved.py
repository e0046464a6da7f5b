"""Kernels of LESS in a folder: a tiny model, and what was saved for it."""

from __future__ import annotations

import pytest

import tiny
from headwise.less.checkpoint import save_kernels
from less_oracle import kernels_of, networks_of


@pytest.fixture
def model():
    return tiny.llama()


@pytest.fixture
def saved(model, tmp_path):
    save_kernels(kernels_of(model, networks_of(model)), tmp_path / "deep" / "kernels")
    return tmp_path / "deep" / "kernels"
