"""sparge-compile: `torch.compile(model, backend="sparge")` finds attention calls and rewrites those where it pays.

Importing this package is never needed for the backend string; it brings the rest of the public interface. Each name is
imported when it is first used, because TorchDynamo, which most of them need, takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparge_compile.attaching import Attachment, attach
    from sparge_compile.calibrating import calibrate
    from sparge_compile.context import rewriting
    from sparge_compile.explaining import explain
    from sparge_compile.functional import AttentionStats, attention
    from sparge_compile.policy import Policy
    from sparge_compile.profile import Profile, ProfileError
    from sparge_compile.report import Report, SiteReport, last_report
    from sparge_compile.site import StrictPolicyError
    from sparge_compile.steps import dense_steps

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "AttentionStats",
    "Policy",
    "Profile",
    "ProfileError",
    "Report",
    "SiteReport",
    "StrictPolicyError",
    "attach",
    "attention",
    "calibrate",
    "dense_steps",
    "explain",
    "last_report",
    "rewriting",
]

# No module here has the name of something in it: importing `sparge_compile.explain` would hide the function `explain`.
_MODULES = {
    "Attachment": "attaching",
    "AttentionStats": "functional",
    "Policy": "policy",
    "Profile": "profile",
    "ProfileError": "profile",
    "Report": "report",
    "SiteReport": "report",
    "StrictPolicyError": "site",
    "attach": "attaching",
    "attention": "functional",
    "calibrate": "calibrating",
    "dense_steps": "steps",
    "explain": "explaining",
    "last_report": "report",
    "rewriting": "context",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
