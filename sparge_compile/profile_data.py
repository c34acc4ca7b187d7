"""Plain data of a profile: what was measured of a head, and where the profile comes from."""

from __future__ import annotations

from dataclasses import dataclass


class ProfileError(ValueError):
    """A profile that is missing, unreadable, or made for something else."""


@dataclass(frozen=True)
class Measurement:
    """One query head on the kernel, over all rows of all inputs.

    A head that went over the budget stepped back to denser thresholds at that input and had them from there on. What
    earlier inputs lost under the sparser ones still counts, so `error` may be overstated and `worst_row` understated;
    `density` is that of the thresholds in the profile.

    Attributes:
        error: relative L1, sum|o - o_dense| / sum|o_dense| (arXiv 2502.18137, section 4), over all inputs.
        worst_row: least cosine between a row of o and that of o_dense, over all inputs.
        density: computed / visible tiles, from the input on at which the head last stepped back; of all if it never
            did.
    """

    error: float
    worst_row: float
    density: float


@dataclass(frozen=True)
class ModelFacts:
    """What makes two modules the same model to a profile.

    Attributes:
        name: the class, with its module.
        parameters: hash of the names and shapes of the parameters, sorted.
    """

    name: str
    parameters: str


@dataclass(frozen=True)
class Origin:
    """How a profile was made; every fact is None in one made by hand.

    Attributes:
        model: the model it is for.
        device: names of the devices, `, ` between several: "cpu AVX512", "NVIDIA H200".
        sparge_compile, torch: versions.
        max_error: the budget, relative L1 of each head.
        min_row_cosine: what the cosine of each row had to reach.
    """

    model: ModelFacts | None = None
    device: str | None = None
    sparge_compile: str | None = None
    torch: str | None = None
    max_error: float | None = None
    min_row_cosine: float | None = None
