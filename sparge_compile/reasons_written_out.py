"""Reasons of attention that is written out by hand, and of what looks like it, as rows of `reasons.Kind`."""

from __future__ import annotations

_NO_SUCH_SUM = "The kernel computes softmax(scale * Q K^T + mask) V and nothing else."
_LEAVE = "Leave it dense."
_AS_SDPA = "Write it as F.scaled_dot_product_attention if that says the same, or leave it dense."

WRITTEN_OUT = (
    ("softcap", "softcap", _NO_SUCH_SUM, _LEAVE),
    ("in place of softmax", "not softmax", _NO_SUCH_SUM, _LEAVE),
    ("a sink beside the keys", "not softmax", _NO_SUCH_SUM, _LEAVE),
    ("is not attention", "not attention", "The softmax is over another dimension than the keys.", "Nothing."),
    (
        "already a call of another attention kernel",
        "other kernel",
        "The model calls a kernel of its own.",
        "Choose attention by F.scaled_dot_product_attention in the model (attn_implementation='sdpa', for example).",
    ),
    (
        "may leave them weight",
        "mask",
        "Positions filled with such a number may still be attended to.",
        "Fill with -inf, or with torch.finfo(dtype).min.",
    ),
    ("filled with two numbers", "mask", "Two fills may leave different weights.", "Fill all masks with -inf."),
    (
        "rows with nothing open could mean anything",
        "mask",
        "A fill and an added mask together give rows that hide everything no one meaning.",
        "Fill with -inf.",
    ),
    (
        "the condition under which|what is added to the scores is not",
        "mask",
        "It is not known what the mask means.",
        "Use a bool mask and a constant fill, or add a mask of floats.",
    ),
    ("something is subtracted", "mask", "Only what is added is read as a mask.", "Add the mask, negated."),
    ("scaled after they were masked", "scale", "The mask would be scaled too.", "Scale the scores before the mask."),
    (
        "the scores are converted to|several masks are added to the scores in",
        "dtype",
        "The conversion loses digits or makes large numbers infinite.",
        "Keep the scores in one type, fp32 or that of the query, from product to softmax.",
    ),
    (
        "broadcasts|are broadcast by|more than four dimensions|more dimensions than the scores|2 to 4 are supported"
        "|more than batch, heads|other numbers than they were merged|rearranges the scores",
        "shape",
        "The dimensions cannot be read as batch, heads, queries and keys.",
        "Use [batch, heads, tokens, head_dim] throughout, as F.scaled_dot_product_attention does.",
    ),
    (
        "not proven equal",
        "not proven",
        "On small random inputs the rewritten form gave other numbers than the model's own operations.",
        _AS_SDPA,
    ),
    ("attention written out", "not read", "A step between the two products is not understood.", _AS_SDPA),
)
