"""What a calibration knows of each site while it runs, and how that is kept in a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparge_compile.observe import Observer
from sparge_compile.profile import write_whole
from sparge_compile.search import Call, Sums, ladders, measure
from sparge_compile.verify import Unfit, Verified
from sparge_kernels.thresholds import Q_TILE, Thresholds

CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for: the bounds of `calibrate` and the candidates."""

    max_error: float
    min_row_cosine: float
    predictor: str
    tried: tuple[Thresholds, ...]
    policy: str
    model: str
    inputs: int | None

    @property
    def digest(self) -> str:
        """Equal for calibrations whose partial results can be put together."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass
class Sites:
    """By site name: sums of the first pass, results of the second, or why the site stays dense."""

    sums: dict[str, Sums] = field(default_factory=dict)
    verified: dict[str, Verified] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "sums": {name: sums.to_json() for name, sums in self.sums.items()},
            "verified": {name: verified.to_json() for name, verified in self.verified.items()},
            "dense": self.dense,
            "refused": self.refused,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Sites:
        return cls(
            {name: Sums.from_json(sums) for name, sums in content["sums"].items()},
            {name: Verified(**verified) for name, verified in content["verified"].items()},
            content["dense"],
            content["refused"],
        )


class _Pass(Observer):
    """A pass over the inputs: what stands in the way of a site makes it dense, with that reason."""

    def __init__(self, target: Callable[..., Any], settings: Settings, sites: Sites) -> None:
        super().__init__(target)
        self.settings, self.sites = settings, sites
        self.refused = sites.refused

    def saw(self, site: str, call: Call) -> None:
        if site in self.sites.dense:
            return
        try:
            self.look(site, call)
        except Unfit as unfit:
            self.sites.dense[site] = str(unfit)
        except Exception as error:
            self.sites.dense[site] = f"calibration failed: {_first_line(error)}"

    def look(self, site: str, call: Call) -> None:
        raise NotImplementedError


class Search(_Pass):
    """The first pass: every candidate at a few query tiles."""

    def look(self, site: str, call: Call) -> None:
        _check_finite(call)
        known = self.sites.sums.get(site)
        if known is not None and len(known.total) != call.query.shape[1]:
            raise Unfit(f"it was called with {len(known.total)} and with {call.query.shape[1]} heads")
        found = _measure(call, self.settings)
        if known is None:
            self.sites.sums[site] = found
        else:
            known.add(found)


class Verification(_Pass):
    """The second pass: the chosen candidates on the kernel."""

    def look(self, site: str, call: Call) -> None:
        asked = self.settings
        if site not in self.sites.verified:
            if site not in self.sites.sums:
                raise Unfit("it ran in the second pass over the inputs only; they must be the same every time")
            found = ladders(self.sites.sums[site], asked.max_error, asked.min_row_cosine)
            self.sites.verified[site] = Verified(found)
        bounds = (asked.max_error, asked.min_row_cosine)
        self.sites.verified[site].verify(call, asked.tried, asked.predictor, *bounds)


def _check_finite(call: Call) -> None:
    named = (("dense output", call.dense), ("query", call.query), ("key", call.key), ("value", call.value))
    for name, tensor in named:
        if not bool(tensor.isfinite().all()):
            raise Unfit(f"its {name} holds NaN or inf")


def _measure(call: Call, settings: Settings) -> Sums:
    """In smaller and smaller pieces where memory is short."""
    rows = Q_TILE
    while True:
        try:
            return measure(call, settings.tried, settings.predictor, rows)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or rows == 1:
                raise
        rows //= 4 if rows > 4 else rows


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class Checkpoint:
    """Partial results in a file, written anew after every input."""

    def __init__(self, path: str | os.PathLike[str] | None, settings: Settings) -> None:
        self.path = None if path is None else Path(path)
        self.settings = settings

    def load(self) -> tuple[int, Sites]:
        """(inputs finished, of both passes together; what they gave). Nothing if there is no file.

        Raises:
            ValueError: the file is no checkpoint, or one of another model, other inputs or other settings.
        """
        if self.path is None or not self.path.exists():
            return 0, Sites()
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            version, digest = content["checkpoint_version"], content["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r} is not one of calibrate() ({error}); name another file."
            ) from error
        if (version, digest) != (CHECKPOINT_VERSION, self.settings.digest):
            raise ValueError(
                f"checkpoint {str(self.path)!r} is of another model, number of inputs, policy, bound or version. "
                "Repeat the call that began it, or delete it to begin anew."
            )
        return content["finished"], Sites.from_json(content["sites"])

    def save(self, finished: int, sites: Sites) -> None:
        """Whole or not at all."""
        if self.path is not None:
            content = {
                "checkpoint_version": CHECKPOINT_VERSION,
                "settings": self.settings.digest,
                "finished": finished,
                "sites": sites.to_json(),
            }
            write_whole(self.path, lambda: json.dumps(content))

    def remove(self) -> None:
        """The calibration is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def thresholds_of(verified: Verified, tried: Sequence[Thresholds]) -> tuple[Thresholds, ...]:
    """The entries of a site, one per head."""
    return tuple(tried[verified.chosen(head)] for head in range(len(verified.ladders)))
