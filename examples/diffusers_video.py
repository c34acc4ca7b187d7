"""A video pipeline of diffusers: its transformer compiled with the sparge backend, its first steps dense.

    pip install diffusers transformers accelerate  # accelerate: diffusers needs it to load Wan
    python examples/diffusers_video.py [--blocks] [--steps 4 --dense-steps 1] [--frames 33 --height 384 --width 384]
    python examples/diffusers_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --frames 81 --height 480 --width 832 \\
        --steps 50 --dense-steps 10 [--profile wan.json]

--whole compiles the transformer as one graph, --blocks one block that all blocks share: it compiles sooner, and a
profile still gives each block its own thresholds. The text encoder and the VAE are not touched. Without --model all
weights of the pipeline are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from measure import RANDOM_WEIGHTS, compare
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import sparge_compile as sparge


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = (load(options.model, device) if options.model else random_pipeline(options.layers)).to(device)
    pipe.set_progress_bar_config(disable=not options.model)

    def generate(steps: int = options.steps, **arguments: Any) -> Tensor:
        """Latents: [1, frames, numbers] of Wan and its like, [1, tokens, numbers] of LTX."""
        sizes = {"height": options.height, "width": options.width, "num_frames": options.frames}
        noise = torch.Generator().manual_seed(0)
        output = pipe(
            options.prompt, **sizes, num_inference_steps=steps, generator=noise, output_type="latent", **arguments
        )
        return output.frames.movedim(2, 1).flatten(2) if output.frames.dim() == 5 else output.frames

    def dense() -> Tensor:
        with sparge.rewriting(enabled=False):
            return generate()

    def sparse() -> Tensor:
        with sparge.dense_steps(options.dense_steps) as on_step_end:
            return generate(callback_on_step_end=on_step_end)

    calls: list[dict[str, Any]] = []  # what the pipeline calls the transformer with
    watch = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    to_calibrate = options.profile is not None and not options.profile.exists()
    generate(steps=options.steps if to_calibrate else 1)
    watch.remove()
    if to_calibrate:
        sparge.calibrate(pipe.transformer, calls[:: -(-len(calls) // 8)]).save(options.profile)  # 8 calls at most
    if options.profile is not None:
        sparge.attach(pipe.transformer, options.profile)

    if options.blocks:
        pipe.transformer.compile_repeated_blocks(backend="sparge")
    else:
        pipe.transformer.compile(backend="sparge")
    print(f"{options.frames} frames of {options.width} x {options.height} pixels on {device}\n")
    print(f"{sparge.explain(pipe.transformer, **calls[-1])}\n")
    print(f"{options.steps} steps, {options.dense_steps} of them dense in the sparse run")
    print(compare(dense, sparse, options.rounds))
    if not options.model:
        print(RANDOM_WEIGHTS)


def load(model: str, device: str) -> DiffusionPipeline:
    """Any text-to-video pipeline whose transformer is `pipe.transformer`. The VAE stays in fp32, as Wan wants it."""
    dtype = {"default": torch.bfloat16, "vae": torch.float32} if device == "cuda" else torch.float32
    return DiffusionPipeline.from_pretrained(model, dtype=dtype)  # torch_dtype before diffusers 0.41


def random_pipeline(layers: int) -> WanPipeline:
    """Wan's pipeline with every part small: heads and patches as in Wan 2.1, a vocabulary of one word."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = UMT5Config(vocab_size=3, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    video = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 1024, "num_layers": layers}
    return WanPipeline(
        tokenizer,
        UMT5EncoderModel(text).eval(),
        AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        WanTransformer3DModel(text_dim=64, **video).eval(),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a text-to-video pipeline of the hub, or its folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--whole", action="store_true", help="compile the transformer as one graph (the default)")
    how.add_argument("--blocks", action="store_true", help="compile its repeated blocks")
    parser.add_argument(
        "--profile", type=Path, help="thresholds to attach; calibrated and saved here if there are none"
    )
    parser.add_argument("--prompt", default="a cat walks on the grass")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dense-steps", type=int, default=1, help="how many of them stay dense, from the first")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=2, help="of the random transformer")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant is measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
