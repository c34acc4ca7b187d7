"""A profile as JSON: one head a line, sorted, so that two files can be compared line by line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparge_compile.profile_data import Measurement, ModelFacts, Origin
from sparge_kernels.thresholds import K_TILE, PREDICTORS, Q_TILE, Thresholds

FORMAT_VERSION = 2
_THRESHOLDS = ("topk", "cdf_threshold", "similarity_threshold", "pv_threshold")
_MEASURED = ("error", "worst_row", "density")
_RANGES = {"error": (0.0, math.inf), "worst_row": (-1.0, 1.0), "density": (0.0, 1.0)}
_TEXTS = ("device", "sparge_compile", "torch")
_NUMBERS = ("max_error", "min_row_cosine")
_TABLES = ("dense", "not_calibrated", "sites")
_KEYS = ("format_version", "q_tile", "k_tile", "predictor", "model", *_TEXTS, *_NUMBERS, *_TABLES)


def write(
    sites: Mapping[str, Sequence[Thresholds]],
    measured: Mapping[str, Sequence[Measurement]],
    reasons: Mapping[str, Mapping[str, str]],
    predictor: str,
    tiles: tuple[int, int],
    origin: Origin,
) -> str:
    """The text of a profile; the arguments are `Profile`'s fields, `reasons` its `dense` and `not_calibrated`."""
    model = origin.model
    head = {
        "format_version": FORMAT_VERSION,
        "q_tile": tiles[0],
        "k_tile": tiles[1],
        "predictor": predictor,
        "model": None if model is None else {"name": model.name, "parameters": model.parameters},
        **{name: getattr(origin, name) for name in _TEXTS},
        **{name: _written(getattr(origin, name)) for name in _NUMBERS},
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, texts in reasons.items():
        entries = [f"  {json.dumps(name)}: {json.dumps(texts[name])}" for name in sorted(texts)]
        lines.append(f" {json.dumps(key)}: " + _braces("{}", entries, 1))
    entries = [f"  {json.dumps(name)}: " + _site(sites[name], measured.get(name)) for name in sorted(sites)]
    lines.append(' "sites": ' + _braces("{}", entries, 1))
    return _braces("{}", lines, 0) + "\n"


def _site(heads: Sequence[Thresholds], measured: Sequence[Measurement] | None) -> str:
    lines = []
    for number, entry in enumerate(heads):
        values = dict(zip(_THRESHOLDS, (entry.topk, entry.cdf, entry.similarity, entry.pv), strict=True))
        if measured is not None:
            values |= {key: getattr(measured[number], key) for key in _MEASURED}
        lines.append("   " + json.dumps({key: _written(value) for key, value in values.items()}))
    return _braces("[]", lines, 2)


def _written(number: float | None) -> float | None:
    """Equal numbers (1 and 1.0, 0.0 and -0.0) as one text, so that equal profiles have one digest."""
    return None if number is None else float(number) + 0.0


def _braces(pair: str, lines: Sequence[str], indent: int) -> str:
    return pair[0] + "\n" + ",\n".join(lines) + "\n" + " " * indent + pair[1] if lines else pair


def other_tiles(q_tile: Any, k_tile: Any) -> str:
    """Why a profile of another geometry is refused."""
    return (
        f"made for tiles of {q_tile} x {k_tile} tokens; the kernels use {Q_TILE} x {K_TILE}, "
        "and thresholds are tied to the tile geometry. Calibrate again."
    )


def parse(text: str) -> Any:
    """Strict JSON: ValueError for a key that stands twice in an object, NaN or Infinity too."""
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else ()
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def read(content: Any) -> dict[str, Any]:
    """`Profile`'s fields from parsed JSON.

    Raises:
        KeyError, TypeError, ValueError: what is missing or wrong, where, and what is allowed.
    """
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}.")
    _check_version(content["format_version"])
    unknown = sorted(set(content) - set(_KEYS))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; these are known: {', '.join(_KEYS)}.")
    tiles = (content["q_tile"], content["k_tile"])
    if tiles != (Q_TILE, K_TILE):
        raise ValueError(other_tiles(*tiles))
    predictor = content["predictor"]
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor={predictor!r}: must be one of {', '.join(PREDICTORS)}.")
    sites = _mapping(content, "sites", "lists of thresholds, one per head")
    heads = {name: _heads(name, entries) for name, entries in sites.items()}
    return {
        "sites": {name: tuple(thresholds for thresholds, _ in entries) for name, entries in heads.items()},
        "measured": {name: found for name, entries in heads.items() if (found := _all_measured(name, entries))},
        "dense": _reasons(content, "dense"),
        "not_calibrated": _reasons(content, "not_calibrated"),
        "predictor": predictor,
        "origin": _origin(content),
    }


def _check_version(version: Any) -> None:
    if version == 1:
        raise ValueError(
            f"format_version is 1, which does not say for which predictor its thresholds are; this release reads "
            f"{FORMAT_VERSION}. Calibrate again, or write it anew with Profile(...).save()."
        )
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}; this release reads {FORMAT_VERSION}.")


def _origin(content: Mapping[str, Any]) -> Origin:
    model = content.get("model")
    if model is not None:
        texts = isinstance(model, dict) and all(isinstance(text, str) for text in model.values())
        if not texts or set(model) != {"name", "parameters"}:
            raise ValueError("'model' must be null or an object with the texts 'name' and 'parameters'.")
        model = ModelFacts(model["name"], model["parameters"])
    for key in _TEXTS:
        if not isinstance(content.get(key), (str, type(None))):
            raise ValueError(f"{key}={content[key]!r}: must be a text or null.")
    for key in _NUMBERS:
        if content.get(key) is not None:
            _number(content[key], key, "the profile", -math.inf, math.inf)
    return Origin(model, **{key: content.get(key) for key in (*_TEXTS, *_NUMBERS)})


def _reasons(content: Mapping[str, Any], key: str) -> dict[str, str]:
    found = _mapping(content, key, "reasons") if key in content else {}
    wrong = [name for name, reason in found.items() if not isinstance(reason, str)]
    if wrong:
        raise ValueError(f"{key!r}, site {wrong[0]!r}: the reason must be a text.")
    return found


def _mapping(content: Mapping[str, Any], key: str, values: str) -> dict[str, Any]:
    found = content[key]
    if not isinstance(found, dict):
        raise ValueError(f"{key!r} must be an object of site names and {values}.")
    return found


def _heads(site: str, heads: Any) -> list[tuple[Thresholds, Measurement | None]]:
    if not isinstance(heads, list) or not heads:
        raise ValueError(f"site {site!r} must hold a non-empty list, one object of thresholds per head.")
    return [_head(f"site {site!r}, head {number}", head) for number, head in enumerate(heads)]


def _head(place: str, head: Any) -> tuple[Thresholds, Measurement | None]:
    if not isinstance(head, dict) or set(head) not in (set(_THRESHOLDS), {*_THRESHOLDS, *_MEASURED}):
        raise ValueError(
            f"{place}: must hold exactly {', '.join(_THRESHOLDS)}, and all or none of {', '.join(_MEASURED)}."
        )
    for key in _THRESHOLDS:
        if head[key] is not None and type(head[key]) not in (int, float):
            raise ValueError(f"{place}: {key}={head[key]!r} is not a number.")
    try:
        thresholds = Thresholds(*(head[key] for key in _THRESHOLDS))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    if "error" not in head:
        return thresholds, None
    return thresholds, Measurement(*(_number(head[key], key, place, *_RANGES[key]) for key in _MEASURED))


def _number(value: Any, key: str, place: str, lower: float, upper: float) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not lower <= value <= upper:
        raise ValueError(f"{place}: {key}={value!r} must be a finite number in [{lower:g}, {upper:g}].")
    return float(value)


def _all_measured(
    site: str, entries: Sequence[tuple[Thresholds, Measurement | None]]
) -> tuple[Measurement, ...] | None:
    measured = tuple(m for _, m in entries if m is not None)
    if measured and len(measured) != len(entries):
        raise ValueError(f"site {site!r}: {', '.join(_MEASURED)} must stand at every head or at none.")
    return measured or None
