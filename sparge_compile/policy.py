"""`Policy`: what may be rewritten and how sparse it may become. Also the `options=` keys that set it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparge_compile.profile import Profile
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, PREDICTORS

OPTION_PREFIX = "sparge."
PRECISIONS = ("auto", "int8", "fp8", "none")


@dataclass(frozen=True)
class Policy:
    """What the sparge backend may rewrite, and the thresholds it uses (SpargeAttn, arXiv 2502.18137, section 3).

    Attributes:
        enabled: False leaves every attention call as it is.
        topk: share of the key tiles kept for each query tile, in (0, 1]. None: `cdf_threshold` decides.
        cdf_threshold: tau, the share of its predicted softmax mass that a query keeps, in (0, 1]. None: the rule's
            (rules.py). The predictor `sparge` asks it of the mean query of a tile, `clusters` of every query.
        similarity_threshold: theta. A key tile whose self-similarity (mean cosine between its rows) is below this
            is not predictable and always kept, in [-1, 1]; with `sparge` so is a query tile. None: the rule's.
        pv_threshold: lambda, in nats, negative. A kept tile all of whose scores lie this far below the running
            maximum skips its P V product. None: ln(0.01 / keys), so that no row drops more than 1 % of its mass.
        min_tokens: calls with fewer queries or fewer keys stay dense. None: the measured break-even of the device.
        dense: fnmatch patterns on site names (`blocks.3.attn1`, `blocks.0.*`) that stay dense.
        predictor: how the tiles to compute are found: `clusters` (each query against clusters of keys), `sparge` (the
            paper's means of tiles: cheaper, loses needles), `auto` is the best known.
        precision: `int8` quantizes Q and K, `none` does not, `fp8` has no kernel yet, `auto` is the best
            the device has.
        strict: raise instead of leaving an attention call dense. Sites named in `dense`, and everything under
            `enabled=False`, are dense by request and do not raise.
        profile: a `Profile`, or the path of one: thresholds per site and per head. Sites it does not name use
            the fields above.

    Raises:
        ValueError: a field is out of range; the message names field, value and range.
        TypeError: a field has the wrong type.
        ProfileError: the profile cannot be read.
    """

    enabled: bool = True
    topk: float | None = None
    cdf_threshold: float | None = None
    similarity_threshold: float | None = None
    pv_threshold: float | None = None
    min_tokens: int | None = None
    dense: tuple[str, ...] = ()
    predictor: str = "auto"
    precision: str = "auto"
    strict: bool = False
    profile: Profile | None = None

    def __post_init__(self) -> None:
        self._check_flag("enabled")
        self._check_flag("strict")
        self._check_number("topk", 0.0, 1.0, lower_open=True, optional=True)
        self._check_number("cdf_threshold", 0.0, 1.0, lower_open=True, optional=True)
        self._check_number("similarity_threshold", -1.0, 1.0, optional=True)
        self._check_number("pv_threshold", -math.inf, 0.0, upper_open=True, optional=True)
        self._check_min_tokens()
        for name, allowed in (("precision", PRECISIONS), ("predictor", ("auto", *PREDICTORS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}.")
        object.__setattr__(self, "dense", self._patterns())
        if self.profile is not None and not isinstance(self.profile, Profile):
            object.__setattr__(self, "profile", _load_profile(self.profile))

    @property
    def identity(self) -> str:
        """A text that is equal exactly for equal policies."""
        values = (getattr(self, f.name) for f in fields(self) if f.name != "profile")
        profile = self.profile.digest if self.profile is not None else None
        return repr((*values, profile))

    @property
    def token(self) -> str:
        """A text that is equal for policies that make the same choices: all disabled ones do, for example."""
        if not self.enabled:
            return "disabled"
        return replace(
            self,
            {
                "predictor": DEFAULT_PREDICTOR if self.predictor == "auto" else self.predictor,
                "precision": "int8" if self.precision == "auto" else self.precision,
                "cdf_threshold": None if self.topk is not None else self.cdf_threshold,
            },
        ).identity

    def _check_flag(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be True or False, not {type(value).__name__}.")

    def _check_number(
        self,
        name: str,
        lower: float,
        upper: float,
        *,
        lower_open: bool = False,
        upper_open: bool = False,
        optional: bool = False,
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            kind = "a number or None" if optional else "a number"
            raise TypeError(f"{name}={value!r}: must be {kind}, not {type(value).__name__}.")
        inside = (value > lower if lower_open else value >= lower) and (value < upper if upper_open else value <= upper)
        if not inside or value in (math.inf, -math.inf):  # NaN is inside nothing
            opening = "(" if lower_open or math.isinf(lower) else "["
            closing = ")" if upper_open or math.isinf(upper) else "]"
            raise ValueError(f"{name}={value!r}: must be in {opening}{lower:g}, {upper:g}{closing}.")
        object.__setattr__(self, name, float(value) + 0.0)  # -0.0 is 0.0

    def _check_min_tokens(self) -> None:
        value = self.min_tokens
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"min_tokens={value!r}: must be an integer or None, not {type(value).__name__}.")
        if value < 0:
            raise ValueError(f"min_tokens={value!r}: must be in [0, inf).")

    def _patterns(self) -> tuple[str, ...]:
        patterns: Any = self.dense
        if isinstance(patterns, str):
            raise TypeError(f"dense={patterns!r}: must be a tuple of patterns; write dense=({patterns!r},).")
        try:
            patterns = tuple(patterns)
        except TypeError:
            raise TypeError(f"dense={patterns!r}: must be a tuple of patterns.") from None
        wrong = [p for p in patterns if not isinstance(p, str)]
        if wrong:
            raise TypeError(f"dense={patterns!r}: every pattern must be a string, {wrong[0]!r} is not.")
        return patterns


FIELD_NAMES = tuple(f.name for f in fields(Policy))


def replace(policy: Policy, changes: Mapping[str, Any]) -> Policy:
    """`policy` with these fields changed. Unknown names raise TypeError naming the known ones."""
    for name in changes:
        if name not in FIELD_NAMES:
            raise TypeError(unknown_field_message(name))
    return Policy(**{**{name: getattr(policy, name) for name in FIELD_NAMES}, **changes})


def unknown_field_message(name: str) -> str:
    """What to say about a policy field that does not exist."""
    close = difflib.get_close_matches(name, FIELD_NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{name!r} is not a policy field.{hint} Known fields: {', '.join(FIELD_NAMES)}."


def split_options(options: Mapping[str, Any] | None) -> tuple[Policy, dict[str, Any]]:
    """Splits `torch.compile(options=...)` into the policy of `sparge.*` keys and the rest, which is Inductor's.

    Raises:
        ValueError: a `sparge.` key that names no policy field.
    """
    changes: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if not str(key).startswith(OPTION_PREFIX):
            rest[key] = value
            continue
        name = key.removeprefix(OPTION_PREFIX)
        if name not in FIELD_NAMES:
            raise ValueError(f"options[{key!r}]: {unknown_field_message(name)}")
        changes[name] = tuple(value) if isinstance(value, list) else value
    return Policy(**changes), rest


def _load_profile(value: Any) -> Profile:
    if isinstance(value, (str, Path)):
        return Profile.load(value)
    raise TypeError(f"profile={value!r}: must be a Profile or the path of one, not {type(value).__name__}.")
