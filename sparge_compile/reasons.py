"""Every reason for which a call stays dense: why it is one, in plain words, and what a user can change.

A reason is written where it is found, with the facts of the call. Here each is recognised by a part of its text, the
first that fits; a test collects the texts from the code, so that none is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparge_compile.reasons_written_out import WRITTEN_OUT


@dataclass(frozen=True)
class Kind:
    """One kind of reason.

    Attributes:
        text: what all its texts hold; | stands between parts of which they hold one.
        label: two or three words for it.
        why: why such a call is not rewritten.
        change: what to do to have it rewritten, or where that does not go, what to know.
    """

    text: str
    label: str
    why: str
    change: str


KINDS = (
    # What the user asked for.
    Kind(
        "the policy keeps it dense", "as asked", "A pattern of Policy.dense names it.", "Nothing, if it is to stay so."
    ),
    Kind("rewriting is off", "as asked", "The policy has enabled=False.", "Nothing, if it is to stay so."),
    Kind(
        "profile keeps it dense",
        "as asked",
        "Calibration found no thresholds within its error for this call.",
        "Calibrate with a larger max_error, or leave it dense.",
    ),
    Kind(
        "torch.nn.attention.sdpa_kernel or torch.backends.cuda",
        "kernel chosen",
        "Around the call one of torch's own kernels is asked for.",
        "Call the model outside the sdpa_kernel region, with all kernels switched on.",
    ),
    Kind(
        "attention kernel itself|attention kernels itself",
        "kernel chosen",
        "The model asks for one of torch's own kernels.",
        "Take sdpa_kernel, or the switch, out of the model's forward.",
    ),
    # Length.
    Kind(
        "not measured|set min_tokens to",
        "not measured",
        "Nobody has measured from which length such calls pay on such a machine.",
        "Set Policy(min_tokens=...) to a length from which it pays here: explain() measures it.",
    ),
    Kind(
        "min_tokens",
        "too short",
        "On calls of few queries or keys choosing tiles costs more than skipping them saves.",
        "Nothing, if the call is short in real use; Policy(min_tokens=...) sets the limit.",
    ),
    # Gradients, dropout and transforms.
    Kind("a gradient is needed", "gradient", "The kernel has no backward.", "Run it under torch.no_grad()."),
    Kind(
        "dropout is active",
        "dropout",
        "The kernel drops no weights at random.",
        "Call model.eval() or set it to 0.",
    ),
    Kind(
        "forward-mode differentiation|inside torch.vmap|with torch.func",
        "transform",
        "The kernel has no derivative and no rule for vmap.",
        "Call the model outside these transforms.",
    ),
    # What the compiler does not see.
    Kind(
        "outside every compiled graph",
        "not compiled",
        "Only compiled graphs are rewritten, and this call ran eagerly.",
        "Remove the graph break, or compile the part that runs alone.",
    ),
    Kind(
        "torch.compiler.config.recompile_limit allows",
        "not compiled",
        "Torch compiles a piece of code only so often, and then runs it eagerly.",
        "Fewer lengths and policies, dynamic=True, no attributes that differ from layer to layer, or a larger limit.",
    ),
    Kind(
        "cuts the call off from its module",
        "not compiled",
        "After a graph break inside a module it is not known whose call this is.",
        "Remove the graph break (TORCH_LOGS=graph_breaks shows it).",
    ),
    Kind(
        "higher-order operator",
        "nested graph",
        "Calls inside the graph of checkpoint, cond or a nested compile region are left alone.",
        "Call the module without checkpointing or the region; for inference neither is needed.",
    ),
    # Attached profiles, and profiles of other models.
    Kind(
        "but the call does not see it",
        "profile",
        "The thresholds attached to the module do not reach the call.",
        "Remove the graph break, or detach and attach again.",
    ),
    Kind(
        "attached to the layer's self_attn",
        "profile",
        "The layer's fast path does not call the module that has the thresholds.",
        "Make the profile from the model as it runs here, or torch.backends.mha.set_fastpath_enabled(False).",
    ),
    Kind(
        "the profile attached to the module names",
        "profile",
        "The profile was made for another number of calls of this module.",
        "Make the profile from the model as it runs here, and attach it again.",
    ),
    Kind(
        "the attached thresholds",
        "profile",
        "The attached thresholds were moved or converted.",
        "Move the whole module to one device; or detach, and attach the profile again.",
    ),
    Kind(
        "heads for this site, the call has",
        "profile",
        "The profile was made for another number of heads.",
        "Calibrate this model.",
    ),
    # Kernels and devices.
    Kind(
        "the native CPU kernel is not available",
        "no kernel",
        "The kernel is C++, built at its first use, and that failed.",
        "Install a C++ compiler, or do what the text says; python -m sparge_kernels.cpu.build builds it.",
    ),
    Kind(
        "takes no attn_mask",
        "no kernel",
        "The kernel in plain torch has no masks.",
        "Unset SPARGE_CPU_KERNEL for the native kernel.",
    ),
    Kind(
        "there is no kernel for device",
        "no kernel",
        "Kernels exist for CPUs, and for GPUs of NVIDIA and AMD.",
        "Move the model to one of these.",
    ),
    Kind("the GPU is sm", "no kernel", "The GPU kernels do not compile for it.", "Do what the text says, or leave it."),
    Kind("Triton", "no kernel", "The GPU kernels are written in Triton.", "Install the Triton of your torch build."),
    Kind(
        "keys are more than",
        "too long",
        "The tiles of a row lie in registers while they are chosen.",
        "Split the keys, or leave it dense.",
    ),
    Kind(
        "precision='fp8'",
        "no kernel",
        "No kernel multiplies in fp8 yet.",
        "Use precision='auto' or 'int8'.",
    ),
    # Masks.
    Kind(
        "attn_mask and is_causal=True are given together",
        "mask",
        "Torch versions differ in what that means.",
        "Put causality into the mask, and drop is_causal.",
    ),
    Kind(
        "it would lose digits",
        "dtype",
        "The kernel would read a tensor in a narrower type than the call does.",
        "Convert it to the type of the output first.",
    ),
    Kind(
        "bool and the query's",
        "mask",
        "The kernel adds masks in the query's type.",
        "Convert the mask to bool or to the query's type.",
    ),
    Kind(
        "the sizes of attn_mask are not known",
        "mask",
        "The mask might need another kind of broadcasting than the kernel's.",
        "Give it the sizes of the scores, or 1, without mark_dynamic bounds on them.",
    ),
    Kind(
        "a mask with",
        "mask",
        "The fused layer knows masks of other kinds than these.",
        "Pass a mask of torch's documented shapes: [L, L], [B, L] or [B, heads, L, L].",
    ),
    # Sizes, types and arguments.
    Kind(
        "is not supported; allowed",
        "not supported",
        "The kernel is built for head_dim 1 to 256 and fp32, bf16 and fp16.",
        "Convert the call to an allowed one.",
    ),
    Kind(
        "is supported",
        "not supported",
        "The call has more dimensions than batch, heads, tokens and head_dim.",
        "Flatten the leading dimensions to one before the call.",
    ),
    Kind(
        "plain strided tensor",
        "not supported",
        "Nested and sparse tensors and subclasses hold their numbers otherwise.",
        "Convert it to a dense tensor before the call.",
    ),
    Kind(", the output on", "devices", "One call lies on two devices.", "Move them to one device."),
    Kind(
        "query heads over",
        "heads",
        "Query heads share key heads only in equal groups, and if asked to.",
        "Pass enable_gqa=True, with a multiple of the key heads.",
    ),
    Kind(
        "the numbers of heads are not fixed",
        "heads",
        "Thresholds are per head, so their number must be known, and keys and values must have the same.",
        "Do not mark the dimension of heads as dynamic.",
    ),
    Kind("head_dim is not fixed", "sizes", "Kernels are built for one head_dim.", "Do not mark it as dynamic."),
    Kind(
        "are not known to be equal",
        "sizes",
        "The dense call would broadcast one batch over another; the kernel does not.",
        "Expand the batch before the call, and do not mark it as dynamic with bounds.",
    ),
    Kind(" differ (", "sizes", "The call itself is in error.", "Give tensors that fit."),
    Kind(
        "is not a constant",
        "not constant",
        "The kernel is told once, when the call is compiled.",
        "Pass a number or a bool of Python's instead of a tensor.",
    ),
    Kind("the scale is ", "not finite", "Scores with it are not finite.", "Give a finite scale."),
    Kind(
        "this release does not know|positional arguments",
        "arguments",
        "This release was written before the argument.",
        "Update sparge-compile, or call it without.",
    ),
    Kind(
        "tensor in the graph|tensor of the graph",
        "arguments",
        "The call's tensors are made where the compiler does not see them.",
        "Pass plain tensors to the call.",
    ),
    Kind(
        "query, key and value could not be read",
        "arguments",
        "It is not clear what the call computes.",
        "Write it as F.scaled_dot_product_attention if that says the same, or leave it dense.",
    ),
    # Writes in place.
    Kind(
        "changes its shape or strides in place",
        "in place",
        "What a tensor looks like depends on when it is read.",
        "Use transpose(), squeeze(), ... instead of transpose_(), squeeze_().",
    ),
    Kind(
        "may be written in place after",
        "in place",
        "The kernel reads everything at one time, and the call does not.",
        "Write to a copy, or after the attention.",
    ),
    Kind(
        "may write in place to a tensor",
        "in place",
        "It is not known what the tensor holds when the call reads it.",
        "Use the form of the operation that returns a new tensor.",
    ),
    # Opaque calls.
    Kind(
        "returns the attention weights|weights are returned or used|scores are returned or used",
        "weights used",
        "The kernel never forms them.",
        "Do not ask for the weights: need_weights=False, output_attentions=False.",
    ),
    Kind(
        "the opaque call",
        "not read",
        "The call could not be taken apart into plain operations.",
        "Report it; until then, leave it dense.",
    ),
    Kind(
        "fused operator could not be proven equal",
        "not read",
        "This torch computes the fused layer otherwise than is known.",
        "torch.backends.mha.set_fastpath_enabled(False) takes the layer's other path.",
    ),
    *(Kind(*row) for row in WRITTEN_OUT),
)


def kind_of(reason: str) -> Kind | None:
    """What kind of reason this is; None if it is not known."""
    return next((kind for kind in KINDS if any(part in reason for part in kind.text.split("|"))), None)


def what_to_change(reason: str) -> str | None:
    """What to do about it, in one sentence; None if the reason says so itself, or nothing is known."""
    kind = kind_of(reason)
    return None if kind is None or kind.change.rstrip(".").lower() in reason.lower() else kind.change
