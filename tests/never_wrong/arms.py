"""Every kernel through every entry behind one signature: the arms of the never-wrong suite.

The specification has no entry: it is called as it is (`itself`). The others run behind `sparge.attention` (`direct`)
and in place of a compiled `F.scaled_dot_product_attention` (`compiled`, on a backend without Inductor).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import KEEP_ALL, KERNELS, SHARING, dense, kernel_error, on_gpu
from light import LightBackend
from torch import Tensor

import sparge_compile as sparge
from sparge_compile import Policy, Profile, StrictPolicyError
from sparge_kernels import ops
from sparge_kernels.cpu import KERNEL_VARIABLE
from sparge_kernels.thresholds import Thresholds

VARIABLE = {"native": "native", "blocked": "blocked", "triton": "interpreted", "gpu": "native"}
SPECIFICATIONS = ("reference", "reference-shared")


@dataclass(frozen=True)
class Outcome:
    """output; density fp32 [B, Hq]; ran: "sparse" or "dense"; reason: why it stayed dense, where an entry says so."""

    output: Tensor
    density: Tensor
    ran: str
    reason: str = ""


@dataclass(frozen=True)
class Arm:
    """One kernel through one entry. Calling it must run sparsely: dense instead is an error."""

    kernel: str
    entry: str

    def __str__(self) -> str:
        return self.kernel if self.entry == "itself" else f"{self.kernel}-{self.entry}"

    @property
    def is_slow(self) -> bool:
        """A call takes tenths of a second: tests may ask less of it."""
        return self.kernel == "triton"

    @property
    def shares_a_centre(self) -> bool:
        """All K tiles of a head are centred by one vector."""
        return KERNELS["triton" if self.kernel == "gpu" else self.kernel] in SHARING

    def error(self, dtype: torch.dtype, precision: str = "int8") -> float:
        """Most an output may err before its last rounding, as a share of the same attention over |V|."""
        return kernel_error(KERNELS["triton" if self.kernel == "gpu" else self.kernel], dtype, precision)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        thresholds: Thresholds | Sequence[Thresholds] = KEEP_ALL,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        precision: str = "int8",
    ) -> Outcome:
        """One threshold entry for all heads, or one per query head (which `sparge.attention` does not take)."""
        entries = [thresholds] if isinstance(thresholds, Thresholds) else list(thresholds)
        if self.entry == "itself":
            call = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "precision": precision}
            result = KERNELS[self.kernel](q, k, v, entries, **call)
            return Outcome(result.output, result.density, "sparse")
        outcome = self.run(q, k, v, policy_of(entries, precision), attn_mask, is_causal, scale)
        assert outcome.ran == "sparse", outcome.reason
        return outcome

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        policy: Policy,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        keep_device: bool = False,
    ) -> Outcome:
        """The same under a policy, dense or not. What an entry says it did is what happened."""
        self.skip_if_unavailable()
        if self.kernel == "gpu" and not keep_device:
            q, k, v = (on_gpu(x) for x in (q, k, v))
            attn_mask = None if attn_mask is None else on_gpu(attn_mask)
        call = {"is_causal": is_causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
        entry = _direct if self.entry == "direct" else _compiled
        with mock.patch.dict(os.environ, {KERNEL_VARIABLE: VARIABLE[self.kernel]}), torch.no_grad():
            output, records, reason = entry(q, k, v, attn_mask, policy, call)
        ran = [record.ran for record in records]
        assert ran in (["sparse"], []), "an entry that runs the operator runs it once, and sparsely"
        assert bool(ran) == (not reason), "what the entry says and what ran do not agree"
        density = records[0].density if records else torch.ones(q.shape[:2])
        if not keep_device:
            output, density = output.cpu(), density.cpu()
        return Outcome(output, density, "sparse" if ran else "dense", reason)

    def skip_if_unavailable(self) -> None:
        on_cuda = torch.cuda.is_available()
        if self.kernel == "gpu" and not on_cuda:
            pytest.skip("needs a CUDA device")
        if self.kernel == "triton" and on_cuda:
            pytest.skip("the GPU runs these kernels: the arms `gpu`")
        if self.kernel == "triton":
            with mock.patch.dict(os.environ, {KERNEL_VARIABLE: "interpreted"}):
                if reason := ops.unavailable(torch.device("cpu")):
                    pytest.skip(reason)


Ran = tuple[Tensor, list[ops.StatsRecord], str]  # output, what the operator did, why it did not run


def _direct(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, policy: Policy, call: dict[str, Any]) -> Ran:
    with ops.record_stats() as records:
        output = sparge.attention(q, k, v, attn_mask, policy=policy, **call)
    if records:
        return output, records, ""
    with pytest.raises(StrictPolicyError) as error:
        sparge.attention(q, k, v, attn_mask, policy=policy, strict=True, **call)
    return output, records, str(error.value)


def _compiled(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, policy: Policy, call: dict[str, Any]) -> Ran:
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **call)

    torch._dynamo.reset()
    backend = LightBackend(policy)
    compiled = torch.compile(attention, backend=backend, dynamic=False)
    with warnings.catch_warnings(), ops.record_stats() as records:
        warnings.simplefilter("ignore", UserWarning)  # that nothing was rewritten
        output = compiled(q, k, v, attn_mask)
    (site,) = backend.sites
    assert site.rewritten == bool(backend.operators()), "the report and the graph do not agree"
    return output, records, "" if site.rewritten else str(site.reason)


def policy_of(entries: Sequence[Thresholds], precision: str) -> Policy:
    """The policy that brings these thresholds to every call, of any length."""
    if len(entries) > 1:
        return Policy(min_tokens=0, precision=precision, profile=Profile({"attention": tuple(entries)}))
    (one,) = entries
    return Policy(
        topk=one.topk,
        cdf_threshold=one.cdf,
        similarity_threshold=one.similarity,
        pv_threshold=one.pv,
        min_tokens=0,
        precision=precision,
    )


ARMS = [Arm(name, "itself") for name in SPECIFICATIONS] + [
    Arm(kernel, entry) for kernel in VARIABLE for entry in ("direct", "compiled")
]


def _arms(chosen: Callable[[Arm], bool]) -> pytest.MarkDecorator:
    """The argument `arm`."""
    marks = {"triton": [pytest.mark.interpreted], "gpu": [pytest.mark.gpu]}
    cases = [pytest.param(arm, id=str(arm), marks=marks.get(arm.kernel, [])) for arm in ARMS if chosen(arm)]
    return pytest.mark.parametrize("arm", cases)


every_arm = _arms(lambda arm: True)
masking_arms = _arms(lambda arm: arm.kernel != "blocked")
maskless_arms = _arms(lambda arm: arm.kernel == "blocked")
per_head_arms = _arms(lambda arm: arm.entry != "direct")  # `sparge.attention` has one entry for all heads
item = pytest.mark.never_wrong

__all__ = [
    "ARMS",
    "Arm",
    "Outcome",
    "dense",
    "every_arm",
    "item",
    "masking_arms",
    "maskless_arms",
    "per_head_arms",
    "policy_of",
]
