"""`calibrate`: thresholds for each site and head of a model, the sparsest that stay within an error on its inputs.

Two passes over the inputs, each one forward pass of the dense model with an observer at every site. The first looks at
a few query tiles once and knows from that what every candidate would give (search.py); the second runs the kernel with
the chosen ones and compares every row (verify.py). Dense outputs flow on, so no site's error meets another's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sparge_compile import context, dynamo
from sparge_compile.calibration import Checkpoint, Search, Settings, Sites, Verification, thresholds_of
from sparge_compile.observe import observing_backend
from sparge_compile.policy import Policy, replace, split_options
from sparge_compile.profile import Origin, Profile
from sparge_compile.profile_model import device_name, model_facts
from sparge_compile.search import candidates
from sparge_compile.watch import run_aside
from sparge_kernels.thresholds import DEFAULT_PREDICTOR


def calibrate(
    model: Callable[..., Any],
    inputs: Iterable[Any],
    *,
    max_error: float = 0.05,
    min_row_cosine: float = 0.95,
    policy: Policy | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Profile:
    """Finds, per site and head, the sparsest thresholds within `max_error` on these inputs (SpargeAttn, section 3.6).

    Runs the model twice on every input, densely, without gradients and in the mode it is in: call `model.eval()` first,
    since in training mode dropout makes the two runs differ and BatchNorm changes the model's buffers. Otherwise the
    model and its compiles are left as they were. (On torch 2.11 each policy calibrated counts towards torch's limit of
    compiled variants.)
    Precision, min_tokens, dense patterns and pv_threshold are the policy's; its profile, and what is attached to the
    model (`attach`), are ignored.

    Args:
        model: a module or function; compiled or not.
        inputs: batches, the same ones each time they are iterated over (an iterator is made a list): a tensor `x` is
            run as `model(x)`, a tuple or list as `model(*args)`, a mapping as `model(**kwargs)`.
        max_error: largest relative L1, sum|o - o_dense| / sum|o_dense|, of a head over all inputs, in (0, 1).
        min_row_cosine: least cosine between a row of a head's output and the dense one, in [-1, 1).
        policy: None: the one in force here, on top of the `options` of a compiled model.
        checkpoint: a file for partial results, written after every input. A later call with the same arguments goes on
            from there, if the finished inputs and the model's weights (names, shapes and a few elements of each) are
            the same; it is removed at the end.
        progress: show a progress bar.

    Returns:
        A `Profile` for `Policy(profile=...)`. Its numbers were measured with the kernel on every row of every input
        (`Measurement` says what that means for a head that was over the budget at first); a site that has none within
        the budget is dense in it, with the reason.

    Raises:
        ValueError: an argument out of range, no inputs, a disabled policy, a checkpoint that is damaged, cannot be
            written or is of something else, or not one attention call that can be rewritten: the message lists each
            with its reason.
        TypeError: inputs that are no iterable of batches, or a bound that is no number.
    """
    _check_bounds(max_error, min_row_cosine)
    max_error, min_row_cosine = float(max_error), float(min_row_cosine)
    target, options = dynamo.uncompiled(model)
    chosen = context.in_force(split_options(options)[0]) if policy is None else policy
    if not chosen.enabled:
        raise ValueError("the policy is disabled (enabled=False), so nothing would be rewritten; calibrate another.")
    chosen = replace(chosen, {"profile": None, "strict": False})
    batches = _batches(inputs)
    origin = _origin(target, max_error, min_row_cosine)
    predictor = _predictor(chosen)
    settings = Settings(
        max_error,
        min_row_cosine,
        predictor,
        candidates(predictor, chosen.pv_threshold),
        chosen.identity,
        repr(origin),
        len(batches) if isinstance(batches, Sized) else None,
    )
    sites = _Calibration(target, chosen, batches, settings, Checkpoint(checkpoint, settings, target), progress).run()
    return _profile(sites, settings, origin)


@dataclass(frozen=True)
class _Calibration:
    target: Callable[..., Any]
    policy: Policy
    batches: Iterable[Any]
    settings: Settings
    checkpoint: Checkpoint
    progress: bool

    def run(self) -> Sites:
        """Both passes, from where the checkpoint ends."""
        done, sites = self.checkpoint.load()
        finished = 0
        total = None if self.settings.inputs is None else 2 * self.settings.inputs
        with (
            run_aside(self.target, observing_backend, self.policy) as compiled,
            tqdm(total=total, desc="calibrate", unit="input", disable=not self.progress) as bar,
        ):
            for kind in (Search, Verification):
                observer = kind(self.target, self.settings, sites)
                before = finished
                for batch in self.batches:
                    finished += 1
                    self.checkpoint.next_input(finished, batch)
                    if finished > done:
                        with warnings.catch_warnings():
                            warnings.filterwarnings("ignore", "sparge", UserWarning)
                            observer.run(compiled, batch)
                        self.checkpoint.save(finished, sites)
                    bar.update()
                _check_reached(sites, finished - before)
        self.checkpoint.remove()
        return sites


def _check_bounds(max_error: Any, min_row_cosine: Any) -> None:
    for name, value in (("max_error", max_error), ("min_row_cosine", min_row_cosine)):
        if not isinstance(value, Real):
            raise TypeError(f"{name}={value!r}: must be a number, not {type(value).__name__}.")
    if max_error == 0:
        raise ValueError(
            "max_error=0: no sparse or quantized kernel is without error; use 0.05, or leave the model dense "
            "(Policy(enabled=False))."
        )
    if isinstance(max_error, bool) or not 0 < max_error < 1:
        raise ValueError(f"max_error={max_error!r}: must be in (0, 1), a relative L1; 0.05 is usual.")
    if isinstance(min_row_cosine, bool) or not -1 <= min_row_cosine < 1:
        raise ValueError(f"min_row_cosine={min_row_cosine!r}: must be in [-1, 1), a cosine; 0.95 is usual.")


def _predictor(policy: Policy) -> str:
    return DEFAULT_PREDICTOR if policy.predictor == "auto" else policy.predictor


def _batches(inputs: Any) -> Iterable[Any]:
    if isinstance(inputs, (torch.Tensor, Mapping, str)) or not isinstance(inputs, Iterable):
        raise TypeError(
            f"inputs is a {type(inputs).__name__}: it must be an iterable of batches. A single batch is [batch]."
        )
    if isinstance(inputs, Iterator):
        inputs = list(inputs)
    if isinstance(inputs, Sized) and len(inputs) == 0:
        raise ValueError("inputs is empty: thresholds are found on inputs; give one batch or more.")
    return inputs


def _check_reached(sites: Sites, inputs: int) -> None:
    if inputs == 0:
        raise ValueError("inputs is empty: thresholds are found on inputs; give one batch or more.")
    if sites.sums or sites.dense:
        return
    if not sites.refused:
        raise ValueError(
            "these inputs reach no attention call: the model has none that can be found, or it was skipped. "
            "print(sparge_compile.explain(model, ...)) lists what is there."
        )
    lines = "\n".join(f"  {name}: {reason}" for name, reason in sorted(sites.refused.items()))
    raise ValueError(f"no attention call can be rewritten, so there is nothing to calibrate:\n{lines}")


def _origin(target: Callable[..., Any], max_error: float, min_row_cosine: float) -> Origin:
    from sparge_compile import __version__  # the package imports this module

    parameter = next(target.parameters(), None) if isinstance(target, nn.Module) else None
    return Origin(
        model_facts(target) if isinstance(target, nn.Module) else None,
        None if parameter is None else device_name(parameter.device),
        __version__,
        str(torch.__version__),
        max_error,
        min_row_cosine,
    )


def _profile(sites: Sites, settings: Settings, origin: Origin) -> Profile:
    fit = {name: verified for name, verified in sites.verified.items() if name not in sites.dense}
    reasons = {**dict.fromkeys(sites.sums, "it did not run in the second pass over the inputs"), **sites.refused}
    return Profile(
        {name: thresholds_of(verified, settings.tried) for name, verified in fit.items()},
        predictor=settings.predictor,
        measured={name: tuple(map(one.measurement, range(len(one.ladders)))) for name, one in fit.items()},
        dense=dict(sites.dense),
        not_calibrated={n: reason for n, reason in reasons.items() if n not in fit and n not in sites.dense},
        origin=origin,
    )
