"""How many examples properties are tried with.

``HYPOTHESIS_PROFILE=nightly`` tries fifty times as many of those that are cheap, and of those that say
nothing themselves; properties whose examples are dear say how many they take, which holds in every profile.
"""

from __future__ import annotations

import os

from hypothesis import settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")

#: Times as many examples.
_FACTORS = {"ci": 1, "nightly": 50}

# Deadlines of examples are wall time, which a busy machine has less of; pytest's own limit stays.
for _name, _factor in _FACTORS.items():
    settings.register_profile(_name, parent=settings(), deadline=None, max_examples=100 * _factor)
settings.load_profile(PROFILE)

#: Decorates a property of which a thousand examples take a second or two.
many = settings(max_examples=1000 * _FACTORS[PROFILE])
