"""`sparge.attention` in a model that is exported to an AOTInductor package and runs in a process of its own.

    python examples/export_aoti.py [--tokens 8192] [--min-tokens 1024] [--out model.pt2]

torch.export takes a model as it is written, so the model calls `sparge.attention` where it would call
`F.scaled_dot_product_attention`. The package serves every length; calls of fewer tokens than --min-tokens are
dense in it. Export it on a machine of the kind that will serve it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import RANDOM_WEIGHTS, compare, positive
from torch import Tensor, nn
from torch.export import Dim

import sparge_compile as sparge
from sparge_kernels import ops

WIDTH, HEADS = 512, 8

# The serving process: of this project it needs the operator and nothing else.
SERVE = """
import sys, torch, sparge_kernels.ops
package, inputs, outputs = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
with torch.no_grad():
    torch.save([model(x) for x in torch.load(inputs)], outputs)
"""


class Layer(nn.Module):
    """Causal self-attention over x [batch, tokens, WIDTH], and a perceptron."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + self.out(self.attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.perceptron(x)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = Layer(partial(sparge.attention, min_tokens=options.min_tokens)).to(device, dtype).eval()
    dense_model = Layer(F.scaled_dot_product_attention).to(device, dtype).eval()
    dense_model.load_state_dict(model.state_dict())
    lengths = [options.tokens, options.tokens // 2 + 1, 100]
    inputs = [torch.randn(1, length, WIDTH, device=device, dtype=dtype) for length in lengths]
    print(f"lengths {lengths} on {device}, min_tokens {options.min_tokens}: shorter calls are dense in the package too")

    with tempfile.TemporaryDirectory() as folder:
        path = export(model, inputs[0], options.out or Path(folder) / "sparse.pt2")
        served = serve(path, inputs, Path(folder))
        sparse = torch._inductor.aoti_load_package(path)
        dense = torch._inductor.aoti_load_package(export(dense_model, inputs[0], Path(folder) / "dense.pt2"))
        for x, output in zip(inputs, served, strict=True):
            with ops.record_stats() as records:
                here = sparse(x)
            torch.testing.assert_close(here, model(x), rtol=1e-3, atol=1e-3 if device == "cpu" else 2e-2)
            if not torch.equal(output, here):
                raise AssertionError(f"{x.shape[1]} tokens: the fresh process gave other numbers than this one")
            ran = records[0].ran + (f", density {records[0].density.mean():.3f}" if records[0].ran == "sparse" else "")
            print(f"{x.shape[1]:6} tokens: {ran}; as the model in Python, and in a fresh process the same to the bit")
        print(compare(lambda: dense(inputs[0]), lambda: sparse(inputs[0]), options.rounds))
    print(RANDOM_WEIGHTS)
    if options.out is not None:
        print(f"saved {options.out}: load it with torch._inductor.aoti_load_package after `import sparge_kernels.ops`")


def export(model: nn.Module, x: Tensor, path: Path) -> str:
    """Path of an AOTInductor package that takes x [1, any length, WIDTH]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: Dim("tokens", min=2, max=1 << 20)}})
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def serve(package: str, inputs: list[Tensor], folder: Path) -> list[Tensor]:
    """What the package gives in a process that never imports the compiler."""
    torch.save(inputs, folder / "inputs.pt")
    files = [package, str(folder / "inputs.pt"), str(folder / "outputs.pt")]
    subprocess.run([sys.executable, "-c", SERVE, *files], check=True)
    return torch.load(folder / "outputs.pt")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=positive, default=8192, help="the length to export with; others are served too"
    )
    parser.add_argument(
        "--min-tokens",
        type=positive,
        default=8192,
        help="fewer stay dense (8192; with AVX2 2048, with AVX-512 VNNI 1024 is enough)",
    )
    parser.add_argument("--out", type=Path, help="the package to write, FILE.pt2; default: none is kept")
    parser.add_argument("--rounds", type=positive, default=5, help="how often each package is measured")
    options = parser.parse_args(arguments)
    if options.tokens < options.min_tokens:
        parser.error(
            f"--tokens {options.tokens}: must not be less than --min-tokens {options.min_tokens}, else all is dense"
        )
    if options.out is not None and options.out.suffix != ".pt2":
        parser.error(f"--out {options.out}: the name must end in .pt2")
    return options


if __name__ == "__main__":
    main()
