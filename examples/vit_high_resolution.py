"""A vision transformer far above the resolution that it was trained at, compiled with the sparge backend.

    pip install transformers pillow  # pillow: for --image
    python examples/vit_high_resolution.py [--size 1274] [--model facebook/dinov2-small] [--image photo.jpg]

Patches grow with the square of the side: 518 pixels are 1369 patches of DINOv2, 1274 pixels 8281, 2072 pixels 21904.
Without --model the weights are random, without --image the picture is a few waves of colour.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

import torch
from measure import RANDOM_WEIGHTS, compare, positive, stop_if_all_dense
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, PreTrainedModel

import sparge_compile as sparge

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load(options, dtype).to(device).eval()
    pixels = (photo(options) if options.image else picture(options.size)).to(device, dtype)
    # DINOv2 interpolates its position encoding by itself; ViT, DeiT, CLIP and SigLIP are asked to.
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    inputs = {"pixel_values": pixels, **({"interpolate_pos_encoding": True} if interpolates else {})}

    compiled = torch.compile(model, backend="sparge", options={"sparge.min_tokens": options.min_tokens})
    report = sparge.explain(compiled, **inputs)
    print(f"{options.size} x {options.size} pixels on {device}\n\n{report}\n")
    stop_if_all_dense(report)

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
        model = getattr(model, "vision_model", model)  # CLIP and SigLIP bring a text model too
    else:
        torch.manual_seed(0)
        size = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": options.layers}
        model = AutoModel.from_config(Dinov2Config(image_size=518, patch_size=14, **size), dtype=dtype)
    takes = getattr(model, "main_input_name", "pixel_values")
    if takes != "pixel_values":
        raise SystemExit(f"--model {options.model}: takes {takes}, no pictures.")
    patch = getattr(model.config, "patch_size", 1)
    if isinstance(patch, int) and options.size % patch:
        raise SystemExit(f"--size {options.size}: must be a multiple of the model's patch, {patch} pixels a side.")
    return model


def photo(options: argparse.Namespace) -> Tensor:
    """[1, 3, size, size], normalized as the model says, or with the numbers of ImageNet, which most models want."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(options.image).convert("RGB").resize((options.size, options.size)))
    try:
        processor = AutoImageProcessor.from_pretrained(options.model) if options.model else None
    except OSError:  # the model has none
        processor = None
    mean = torch.tensor(getattr(processor, "image_mean", None) or IMAGENET_MEAN)
    deviation = torch.tensor(getattr(processor, "image_std", None) or IMAGENET_DEVIATION)
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
    parser.add_argument("--size", type=positive, default=1274, help="pixels of a side, a multiple of the patch")
    parser.add_argument("--layers", type=positive, default=2, help="of the random model")
    parser.add_argument("--min-tokens", type=positive, help="rewrite from this length on; default: the device's")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each variant is measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
