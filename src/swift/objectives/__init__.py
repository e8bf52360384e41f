"""Losses. Three pure functions are offered here under short names; see docs/decisions/027-functional-face.md."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "advantages": "swift.objectives.policy.estimators",
    "chord_loss": "swift.objectives.policy.chord",
    "kto_loss": "swift.objectives.preference.losses",
    "policy_loss": "swift.objectives.policy.loss",
    "preference_loss": "swift.objectives.preference.losses",
    "reward_loss": "swift.objectives.preference.losses",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'swift.objectives' has no attribute {name!r}")
