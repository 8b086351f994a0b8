"""A model with a thin network for other processes, which import this module to unpickle it."""

from __future__ import annotations

import pytest
from thin_network import make_thin

from kglmatch.batch import Model
from kglmatch.matcher import Matcher


class ThinModel(Model):
    """`save_thin_model`'s folder, wherever it is loaded."""

    def load(self) -> Matcher:
        make_thin(pytest.MonkeyPatch())
        return super().load()
