"""`Profile`: thresholds per site and per head, as a JSON file that can be read, compared and shared."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparge_kernels.thresholds import K_TILE, Q_TILE, Thresholds

FORMAT_VERSION = 1
_ENTRY_KEYS = ("topk", "cdf_threshold", "similarity_threshold", "pv_threshold")


class ProfileError(ValueError):
    """A profile that is missing, unreadable, or made for something else."""


@dataclass(frozen=True)
class Profile:
    """Thresholds per site: one entry for all heads, or one for each query head.

    Attributes:
        sites: site name -> its thresholds, a tuple of length 1 or of the number of query heads.
        q_tile, k_tile: the tile geometry the thresholds were found for, in tokens.
    """

    sites: Mapping[str, tuple[Thresholds, ...]] = field(default_factory=dict)
    q_tile: int = Q_TILE
    k_tile: int = K_TILE

    @property
    def digest(self) -> str:
        """Equal for profiles with equal content."""
        return hashlib.sha256(self._text().encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.digest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON to a temporary file beside `path`, then renames it: nothing half-written is ever seen."""
        target = Path(path)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            temporary.write_text(self._text(), encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads a profile written by `save`.

        Raises:
            ProfileError: the file is missing, is not JSON, has another format version or another tile geometry,
                or holds a threshold out of range.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ProfileError(f"profile {os.fspath(path)!r} does not exist.") from None
        except OSError as error:
            raise ProfileError(f"profile {os.fspath(path)!r} cannot be read: {error}.") from error
        except ValueError as error:
            raise ProfileError(
                f"profile {os.fspath(path)!r} is not valid JSON ({error}). Write it again with Profile.save()."
            ) from error
        try:
            return cls._parse(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"profile {os.fspath(path)!r}: {_plain(error)}") from error

    @classmethod
    def _parse(cls, content: Any) -> Profile:
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, found {type(content).__name__}.")
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}; this release reads {FORMAT_VERSION}.")
        q_tile, k_tile = content["q_tile"], content["k_tile"]
        if (q_tile, k_tile) != (Q_TILE, K_TILE):
            raise ValueError(
                f"made for tiles of {q_tile} x {k_tile} tokens; the kernels use {Q_TILE} x {K_TILE}, "
                "and thresholds are tied to the tile geometry."
            )
        if not isinstance(content["sites"], dict):
            raise ValueError("'sites' must be an object of site name -> list of thresholds.")
        return cls({name: _entries(name, heads) for name, heads in content["sites"].items()}, q_tile, k_tile)

    def _text(self) -> str:
        sites = {
            name: [dict(zip(_ENTRY_KEYS, (t.topk, t.cdf, t.similarity, t.pv), strict=True)) for t in entries]
            for name, entries in sorted(self.sites.items())
        }
        content = {
            "format_version": FORMAT_VERSION,
            "q_tile": self.q_tile,
            "k_tile": self.k_tile,
            "sites": sites,
        }
        return json.dumps(content, indent=1) + "\n"


def _entries(site: str, heads: Any) -> tuple[Thresholds, ...]:
    if not isinstance(heads, list) or not heads:
        raise ValueError(f"site {site!r} must hold a non-empty list, one object of thresholds per head.")
    entries = []
    for number, head in enumerate(heads):
        if not isinstance(head, dict) or set(head) != set(_ENTRY_KEYS):
            raise ValueError(f"site {site!r}, head {number}: must hold exactly {', '.join(_ENTRY_KEYS)}.")
        wrong = [key for key, value in head.items() if value is not None and type(value) not in (int, float)]
        if wrong:
            raise ValueError(f"site {site!r}, head {number}: {wrong[0]}={head[wrong[0]]!r} is not a number.")
        try:
            entries.append(Thresholds(*(head[key] for key in _ENTRY_KEYS)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"site {site!r}, head {number}: {error}") from error
    return tuple(entries)


def _plain(error: Exception) -> str:
    return f"the key {error} is missing." if isinstance(error, KeyError) else str(error)
