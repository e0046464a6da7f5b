"""What the tests of evaluations have in common: a tiny model in a folder."""

from __future__ import annotations

import pytest
from evaluating import MANUAL

import chatty


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("model"), 1024)


@pytest.fixture(scope="module")
def short_manual():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headwise.measure.texts.manual", lambda: MANUAL)
        yield
