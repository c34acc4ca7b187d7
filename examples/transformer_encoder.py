"""A plain nn.TransformerEncoder over a long sequence, compiled with the sparge backend.

    python examples/transformer_encoder.py [--tokens 8192] [--causal]

Nothing in the model is edited: in eval mode torch runs its fused layer, and that is what gets rewritten.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from measure import RANDOM_WEIGHTS, compare, multiple_of, positive, stop_if_all_dense
from torch import nn

import sparge_compile as sparge


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(options.width, options.width // 64, 4 * options.width, batch_first=True)
    encoder = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False).to(device, dtype).eval()
    x = torch.randn(1, options.tokens, options.width, device=device, dtype=dtype)
    inputs = {}
    if options.causal:  # the mask and is_causal: with the mask alone, torch looks at its values and breaks the graph
        mask = nn.Transformer.generate_square_subsequent_mask(options.tokens, device=device, dtype=dtype)
        inputs = {"mask": mask, "is_causal": True}

    compiled = torch.compile(encoder, backend="sparge", options={"sparge.min_tokens": options.min_tokens})
    report = sparge.explain(compiled, x, **inputs)
    print(f"{options.tokens} tokens on {device}\n\n{report}\n")
    stop_if_all_dense(report)

    def dense() -> torch.Tensor:
        with sparge.rewriting(enabled=False):
            return compiled(x, **inputs)

    def sparse() -> torch.Tensor:
        return compiled(x, **inputs)

    print(compare(dense, sparse, options.rounds))
    print(RANDOM_WEIGHTS)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument(
        "--width", type=multiple_of(64), default=512, help="d_model, a multiple of 64: heads have 64 dimensions"
    )
    parser.add_argument("--causal", action="store_true", help="each token sees itself and what lies before it")
    parser.add_argument("--min-tokens", type=positive, help="rewrite from this length on; default: the device's")
    parser.add_argument("--rounds", type=positive, default=5, help="how often each variant is measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
