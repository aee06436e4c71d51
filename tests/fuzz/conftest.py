"""How long to look: the same few examples every time, or with HYPOTHESIS_PROFILE=long many new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# Models are built while examples are drawn, and a folder is written over by each example: both are meant.
_WANTED = {"deadline": None, "suppress_health_check": list(HealthCheck)}
_QUICK = {"derandomize": True, "database": None, "phases": (Phase.explicit, Phase.generate)}
settings.register_profile("ci", max_examples=12, **_QUICK, **_WANTED)
settings.register_profile("long", max_examples=1000, **_WANTED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
