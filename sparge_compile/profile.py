"""`Profile`: thresholds per site and per head, as a JSON file that can be read, compared and shared."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparge_compile import profile_format, profile_merge, profile_model, profile_view
from sparge_compile.profile_data import Measurement, ModelFacts, Origin, ProfileError
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, K_TILE, PREDICTORS, Q_TILE, Thresholds

__all__ = ["Measurement", "ModelFacts", "Origin", "Profile", "ProfileError", "write_whole"]


@dataclass(frozen=True)
class Profile:
    """Thresholds per site: one entry for all heads, or one for each query head.

    `calibrate` makes one; by hand, `Profile({"blocks.0.attn": (Thresholds(...),)})` is enough.

    Attributes:
        sites: site name -> its thresholds, a tuple of length 1 or of the number of query heads.
        q_tile, k_tile: the tile geometry the thresholds were found for, in tokens.
        predictor: stage 1's, which the thresholds are for: "clusters" or "sparge".
        measured: site name -> what was measured under these thresholds, one entry for each in `sites`.
        dense: site name -> why it stays dense under this profile.
        not_calibrated: site name -> why the profile says nothing about it; the policy decides there.
        origin: the model, device, versions and bounds; empty if made by hand, and then nothing is checked.
    """

    sites: Mapping[str, tuple[Thresholds, ...]] = field(default_factory=dict)
    q_tile: int = Q_TILE
    k_tile: int = K_TILE
    predictor: str = DEFAULT_PREDICTOR
    measured: Mapping[str, tuple[Measurement, ...]] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    not_calibrated: Mapping[str, str] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        """Checks everything, and keeps copies of the mappings.

        Raises:
            ProfileError: another geometry than the kernels', an unknown predictor, or a site that holds something else.
        """
        if (self.q_tile, self.k_tile) != (Q_TILE, K_TILE):
            raise ProfileError(profile_format.other_tiles(self.q_tile, self.k_tile))
        if self.predictor not in PREDICTORS:
            raise ProfileError(f"predictor={self.predictor!r}: must be one of {', '.join(PREDICTORS)}.")
        for name in ("sites", "measured", "dense", "not_calibrated"):
            object.__setattr__(self, name, _copied(name, getattr(self, name)))
        both = sorted(set(self.sites) & set(self.dense))
        if both:
            raise ProfileError(f"site {both[0]!r} has thresholds and is dense; a site may be in one of them only.")
        for name, measured in self.measured.items():
            if len(measured) != len(self.sites.get(name, ())):
                raise ProfileError(
                    f"site {name!r}: {len(measured)} measurements for {len(self.sites.get(name, ()))} entries; "
                    "there must be one for each."
                )

    @property
    def digest(self) -> str:
        """Equal for profiles with equal content."""
        return hashlib.sha256(self._text().encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return profile_view.table(self)

    def thresholds_of(self, site: str) -> tuple[Thresholds, ...] | None:
        """One entry for all heads of the site or one per query head; None if the profile has none for it."""
        entries = self.sites.get(site)
        return None if entries is None else tuple(entries)

    def dense_reason(self, site: str) -> str | None:
        """Why the site stays dense under this profile; None if it does not."""
        return self.dense.get(site)

    def check_model(self, module: nn.Module) -> None:
        """Warns, once, if the module is on another device than the profile was made on.

        Raises:
            ProfileError: the module is of another class, or its parameters have other names or shapes.
        """
        profile_model.check_model(self.origin, module)

    def warn_of_missing_sites(self, module: nn.Module) -> None:
        """Warns, once for each class, if the module lacks modules that the profile names."""
        profile_model.warn_of_missing_sites(self.digest, [*self.sites, *self.dense], module)

    def merge(self, *others: Profile) -> Profile:
        """This profile and others of the same model and predictor, for example of two devices.

        Sites of any of them; where several know a head, the more careful thresholds (`profile_merge.more_careful`) and
        the worse measurement. A site dense in one is dense.

        Raises:
            ProfileError: they are of different models or predictors, or their heads do not fit.
        """
        merged = self
        for other in others:
            merged = merged._merged(other)
        return merged

    def _merged(self, other: Profile) -> Profile:
        if self.predictor != other.predictor:
            raise ProfileError(
                f"cannot merge profiles with predictor {self.predictor!r} and {other.predictor!r}; it must be the same."
            )
        origin = profile_merge.merge_origins(self.origin, other.origin)
        dense = {**other.dense, **self.dense}
        sites = {name: one for name, one in {**other.sites, **self.sites}.items() if name not in dense}
        measured = {name: one for name, one in {**other.measured, **self.measured}.items() if name in sites}
        for name in sorted(set(self.sites) & set(other.sites) & set(sites)):
            sites[name], found = self._merged_site(other, name)
            measured.pop(name, None)
            if found is not None:
                measured[name] = found
        reasons = {**other.not_calibrated, **self.not_calibrated}
        unknown = {name: reason for name, reason in reasons.items() if name not in sites and name not in dense}
        return Profile(sites, self.q_tile, self.k_tile, self.predictor, measured, dense, unknown, origin)

    def _merged_site(self, other: Profile, name: str) -> tuple[tuple[Thresholds, ...], tuple[Measurement, ...] | None]:
        entries = profile_merge.paired(name, self.sites[name], other.sites[name])
        mine, theirs = self.measured.get(name), other.measured.get(name)
        if mine is None or theirs is None:
            return tuple(profile_merge.more_careful(name, *pair, None, None) for pair in entries), None
        found = profile_merge.paired(name, mine, theirs)
        thresholds = tuple(profile_merge.more_careful(name, *e, *m) for e, m in zip(entries, found, strict=True))
        return thresholds, tuple(profile_merge.worse(*pair) for pair in found)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A matplotlib figure of the density and error of every site and head; saved to `path` if given.

        Raises:
            ImportError: matplotlib is not installed (`pip install 'sparge-compile[plot]'`).
            ValueError: nothing in the profile was measured.
        """
        return profile_view.plot(self, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, one head a line. Nothing half-written is ever seen at `path`."""
        write_whole(path, self._text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads a profile written by `save`.

        Raises:
            ProfileError: the file is missing, is not JSON, has another format version or another tile geometry,
                or holds a number out of range, an unknown key or a key twice.
        """
        try:
            content = profile_format.parse(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ProfileError(f"profile {os.fspath(path)!r} does not exist.") from None
        except OSError as error:
            raise ProfileError(f"profile {os.fspath(path)!r} cannot be read: {error}.") from error
        except ValueError as error:
            raise ProfileError(
                f"profile {os.fspath(path)!r} is not valid JSON ({error}). Write it again with Profile.save()."
            ) from error
        try:
            return cls(**profile_format.read(content))
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"profile {os.fspath(path)!r}: {_plain(error)}") from error

    def _text(self) -> str:
        reasons = {"dense": self.dense, "not_calibrated": self.not_calibrated}
        tiles = (self.q_tile, self.k_tile)
        return profile_format.write(self.sites, self.measured, reasons, self.predictor, tiles, self.origin)


def _copied(field: str, given: Any) -> dict[str, Any]:
    """A mapping of a profile as a dict; ProfileError unless it holds, by site name, what the field is for."""
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ProfileError(f"{field}={given!r}: must be a mapping by site name.")
    if field in ("dense", "not_calibrated"):
        for site, reason in given.items():
            if not isinstance(reason, str):
                raise ProfileError(f"{field}, site {site!r}: {reason!r} must be a text, the reason.")
        return dict(given)
    kind = Thresholds if field == "sites" else Measurement
    for site, entries in given.items():
        if not isinstance(entries, (tuple, list)) or not entries or not all(isinstance(x, kind) for x in entries):
            raise ProfileError(
                f"{field}, site {site!r}: {entries!r} must hold one {kind.__name__}, or one for each query head, in a "
                "tuple."
            )
    return {site: tuple(entries) for site, entries in given.items()}


def write_whole(path: str | os.PathLike[str], text: Callable[[], str]) -> None:
    """Writes `text()` to a temporary file beside `path`, then renames it: nothing half-written is ever seen."""
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text(), encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(error: Exception) -> str:
    return f"the key {error} is missing." if isinstance(error, KeyError) else str(error)
