"""A vision transformer far above the resolution that it was trained at, compiled with the sparge backend.

    pip install transformers pillow  # pillow: for --image
    python examples/vit_high_resolution.py [--size 1036] [--model facebook/dinov2-small] [--image photo.jpg]

Patches grow with the square of the side: 518 pixels are 1369 patches of DINOv2, 1036 pixels 5476, 2072 pixels 21904.
Without --model the weights are random, without --image the picture is a few waves of colour.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

import torch
from measure import RANDOM_WEIGHTS, compare
from torch import Tensor
from transformers import AutoModel, Dinov2Config, PreTrainedModel

import sparge_compile as sparge


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load(options, dtype).to(device).eval()
    pixels = (picture(options.size) if options.image is None else photo(options.image, options.size)).to(device, dtype)
    # DINOv2 interpolates its position encoding by itself; ViT, DeiT, CLIP and SigLIP are asked to.
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    inputs = {"pixel_values": pixels, **({"interpolate_pos_encoding": True} if interpolates else {})}

    compiled = torch.compile(model, backend="sparge")
    print(f"{options.size} x {options.size} pixels on {device}\n\n{sparge.explain(compiled, **inputs)}\n")

    def dense() -> Tensor:
        with sparge.rewriting(enabled=False):
            return compiled(**inputs).last_hidden_state

    def sparse() -> Tensor:
        return compiled(**inputs).last_hidden_state  # [1, patches (and a class token), width]

    print(compare(dense, sparse, options.rounds))
    if not options.model:
        print(RANDOM_WEIGHTS)


def load(options: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    if options.model:
        model = AutoModel.from_pretrained(options.model, dtype=dtype)
        return getattr(model, "vision_model", model)  # CLIP and SigLIP bring a text model too
    torch.manual_seed(0)
    size = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": options.layers}
    return AutoModel.from_config(Dinov2Config(image_size=518, patch_size=14, **size), dtype=dtype)


def photo(path: str, size: int) -> Tensor:
    """[1, 3, size, size], normalized as DINOv2 and most vision transformers want it."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGB").resize((size, size)))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(pixels / 255).float() - mean) / deviation).permute(2, 0, 1)[None]


def picture(size: int) -> Tensor:
    """[1, 3, size, size]: three slow waves in each colour, and some noise."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.meshgrid(*[torch.linspace(0, 6.28, size)] * 2, indexing="ij")
    waves = torch.rand(3, 3, 3, generator=generator) * 6
    colours = [sum(torch.sin(a * row + b * column + c) for a, b, c in colour.tolist()) for colour in waves]
    return torch.stack(colours)[None] + 0.1 * torch.randn(1, 3, size, size, generator=generator)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a vision transformer of the hub, or its folder")
    parser.add_argument("--image", help="a picture; it is scaled to a square")
    parser.add_argument("--size", type=int, default=1036, help="pixels of a side, a multiple of the patch")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant is measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
