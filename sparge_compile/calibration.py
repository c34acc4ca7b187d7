"""What a calibration knows of each site while it runs, and how that is kept in a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparge_compile import fingerprint
from sparge_compile.observe import Observer
from sparge_compile.profile import write_whole
from sparge_compile.search import Call, Sums, ladders, measure
from sparge_compile.verify import Unfit, Verified
from sparge_kernels.records import is_out_of_memory
from sparge_kernels.thresholds import Q_TILE, Thresholds

CHECKPOINT_VERSION = 2


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
        except Exception as error:  # whatever a kernel may raise: the other sites are worth their minutes all the same
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
        except RuntimeError as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        rows //= 4 if rows > 4 else rows


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class Checkpoint:
    """Partial results in a file, written anew after every input, with fingerprints of the weights and of each input."""

    def __init__(self, path: str | os.PathLike[str] | None, settings: Settings, model: Any = None) -> None:
        self.path = None if path is None else Path(path)
        self.settings = settings
        self._weights = "" if path is None else fingerprint.of_weights(model)
        self._seen: list[str] = []  # of each input of both passes, in the order they ran

    def load(self) -> tuple[int, Sites]:
        """(inputs finished, of both passes together; what they gave). Nothing if there is no file.

        Raises:
            ValueError: the file is no checkpoint, damaged, or one of another model, other weights or other settings;
                or nothing can be written there.
        """
        if self.path is None:
            return 0, Sites()
        _check_writable(self.path)
        if not self.path.exists():
            return 0, Sites()
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            version, digest = content["checkpoint_version"], content["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r} is not one of calibrate() ({error}); name another file."
            ) from error
        if (version, digest) != (CHECKPOINT_VERSION, self.settings.digest):
            raise ValueError(
                f"checkpoint {str(self.path)!r} is of another model, number of inputs, policy, bound or version. "
                "Repeat the call that began it, or delete it to begin anew."
            )
        return self._read(content)

    def _read(self, content: dict[str, Any]) -> tuple[int, Sites]:
        """The body of a file of these settings."""
        try:
            finished, weights, seen = content["finished"], content["weights"], content["inputs"]
            sites = Sites.from_json(content["sites"])
            _check_body(finished, seen, sites, self.settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r} is damaged ({type(error).__name__}: {error}). Delete it to begin anew."
            ) from error
        if weights != self._weights:
            raise ValueError(
                f"checkpoint {str(self.path)!r} was begun with other weights than the model has now. Load those, or "
                "delete it to begin anew."
            )
        self._seen = seen
        return finished, sites

    def next_input(self, number: int, batch: Any) -> None:
        """Input `number`, from 1 over both passes, is next: to run, or to be skipped since it was finished before.

        Raises:
            ValueError: it was finished before, and was another one then.
        """
        if self.path is None:
            return
        found = fingerprint.of_batch(batch)
        if number > len(self._seen):
            self._seen.append(found)
        elif found != self._seen[number - 1]:
            count = "" if self.settings.inputs is None else f" of {self.settings.inputs}"
            place = number if self.settings.inputs is None else (number - 1) % self.settings.inputs + 1
            raise ValueError(
                f"checkpoint {str(self.path)!r} was begun with other inputs: number {place}{count} differs from the "
                "one that was finished. Give the same inputs in the same order, or delete it to begin anew."
            )

    def save(self, finished: int, sites: Sites) -> None:
        """Whole or not at all."""
        if self.path is not None:
            content = {
                "checkpoint_version": CHECKPOINT_VERSION,
                "settings": self.settings.digest,
                "weights": self._weights,
                "finished": finished,
                "inputs": self._seen[:finished],
                "sites": sites.to_json(),
            }
            write_whole(self.path, lambda: json.dumps(content))

    def remove(self) -> None:
        """The calibration is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _check_writable(path: Path) -> None:
    """Noticed before hours of work: files are written beside the checkpoint and renamed to it."""
    reason = "it is a directory" if path.is_dir() else None
    try:
        if reason is None:
            with tempfile.TemporaryFile(dir=path.parent):
                return
    except OSError as error:
        reason = error.strerror or str(error)
    raise ValueError(f"checkpoint {str(path)!r} cannot be written: {reason}. Name a file in a directory that can.")


def _check_body(finished: Any, seen: Any, sites: Sites, settings: Settings) -> None:
    """ValueError, or what a wrong type raises, unless these can have come from a calibration of these settings."""
    if type(finished) is not int or finished < 0:
        raise ValueError(f"finished={finished!r} is no number of inputs")
    if settings.inputs is not None and finished > 2 * settings.inputs:
        raise ValueError(f"finished={finished} is more than two passes over {settings.inputs} inputs")
    if not isinstance(seen, list) or len(seen) != finished:
        raise ValueError("it does not hold a fingerprint of each finished input")
    for name, sums in sites.sums.items():
        _check_sums(name, sums, len(settings.tried))
    for name, verified in sites.verified.items():
        _check_verified(name, verified, len(settings.tried))
    for reasons in (sites.dense, sites.refused):
        if not all(isinstance(reason, str) for reason in reasons.values()):
            raise ValueError("a reason is no text")


def _check_sums(name: str, sums: Sums, count: int) -> None:
    heads = len(sums.total)
    shapes = [tuple(one.shape) for one in (sums.total, sums.visible, sums.error, sums.worst, sums.kept)]
    if shapes != [(heads,)] * 2 + [(heads, count)] * 3:
        raise ValueError(f"the sums of {name!r} are not of {count} candidates for each head")


def _check_verified(name: str, verified: Verified, count: int) -> None:
    numbers = (verified.error, verified.total, verified.worst_row, verified.computed, verified.visible)
    if any(len(one) != len(verified.ladders) for one in (verified.step, *numbers)):
        raise ValueError(f"the results of {name!r} are not one for each head")
    steps = zip(verified.ladders, verified.step, strict=True)
    if not all(0 <= step < len(ladder) and all(0 <= one < count for one in ladder) for ladder, step in steps):
        raise ValueError(f"the results of {name!r} name candidates that there are not")
    if not all(type(number) in (int, float) for one in numbers for number in one):
        raise ValueError(f"a result of {name!r} is no number")


def thresholds_of(verified: Verified, tried: Sequence[Thresholds]) -> tuple[Thresholds, ...]:
    """The entries of a site, one per head."""
    return tuple(tried[verified.chosen(head)] for head in range(len(verified.ladders)))
