"""sparge-compile: `torch.compile(model, backend="sparge")` finds attention calls and rewrites those where it pays.

Importing this package is never needed for the backend string; it brings the rest of the public interface.
"""

from sparge_compile import first_aid  # noqa: F401 - for the doctor, before anything that can fail
from sparge_compile.attach import Attachment, attach
from sparge_compile.calibrate import calibrate
from sparge_compile.context import rewriting
from sparge_compile.explain import explain
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
