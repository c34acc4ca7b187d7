"""A video pipeline of diffusers: its transformer compiled with the sparge backend, its first steps dense.

    pip install diffusers transformers accelerate  # accelerate: diffusers needs it to load Wan
    python examples/diffusers_video.py [--blocks] [--steps 3 --dense-steps 1] [--frames 29 --height 512 --width 512]
    python examples/diffusers_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --frames 81 --height 480 --width 832 \\
        --steps 50 --dense-steps 10 [--profile wan.json]

--whole compiles the transformer as one graph, --blocks one block that all blocks share: it compiles sooner, and a
profile still gives each block its own thresholds. The text encoder and the VAE are not touched. Without --model all
weights of the pipeline are random. Tested with small random pipelines of Wan 2.1 and LTX; those with two transformers,
as Wan 2.2's, are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from measure import RANDOM_WEIGHTS, compare, multiple_of, positive, stop_if_all_dense
from packaging.version import Version
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
    with sparge.rewriting(min_tokens=options.min_tokens):
        run(pipe, options)
    if not options.model:
        print(RANDOM_WEIGHTS)


def run(pipe: DiffusionPipeline, options: argparse.Namespace) -> None:
    """Compiles the transformer, says what is rewritten in it, and compares the pipeline dense and sparse."""

    def generate(on_step_end: Callable[..., dict[str, Any]] | None = None) -> Tensor:
        """Latents: [1, frames, numbers] of Wan and its like, [1, tokens, numbers] of LTX."""
        sizes = {"height": options.height, "width": options.width, "num_frames": options.frames}
        noise = torch.Generator().manual_seed(0)
        output = pipe(
            options.prompt,
            **sizes,
            num_inference_steps=options.steps,
            generator=noise,
            output_type="latent",
            callback_on_step_end=on_step_end,
        )
        return output.frames.movedim(2, 1).flatten(2) if output.frames.dim() == 5 else output.frames

    def dense() -> Tensor:
        with sparge.rewriting(enabled=False):
            return generate()

    def sparse() -> Tensor:
        with sparge.dense_steps(options.dense_steps) as on_step_end:
            return generate(on_step_end)

    to_calibrate = options.profile is not None and not options.profile.exists()
    calls = sparse_calls(pipe, generate, options.dense_steps, first_step_only=not to_calibrate)
    if to_calibrate:
        options.profile.parent.mkdir(parents=True, exist_ok=True)
        stride = -(-len(calls) // 8) | 1  # for 8 calls at most; odd, since calls with and without the prompt alternate
        profile = sparge.calibrate(pipe.transformer, calls[::stride], checkpoint=f"{options.profile}.partial")
        profile.save(options.profile)
    if options.profile is not None:
        sparge.attach(pipe.transformer, options.profile)

    if options.blocks:
        pipe.transformer.compile_repeated_blocks(backend="sparge")
    else:
        pipe.transformer.compile(backend="sparge")
    report = sparge.explain(pipe.transformer, **calls[0])
    print(f"{options.frames} frames of {options.width} x {options.height} pixels on {pipe.device}\n")
    print(f"a call of the first sparse step: {report}\n")
    stop_if_all_dense(report)
    print(f"{options.steps} steps, {options.dense_steps} of them dense in the sparse run")
    print(compare(dense, sparse, options.rounds, whole="pipeline"))


def sparse_calls(
    pipe: DiffusionPipeline, generate: Callable[..., Tensor], dense_steps: int, first_step_only: bool
) -> list[dict[str, Any]]:
    """What the pipeline calls its transformer with after the dense steps."""
    calls: list[dict[str, Any]] = []

    def on_step_end(pipe: DiffusionPipeline, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == dense_steps:
            calls.clear()
        pipe._interrupt = first_step_only and step == dense_steps  # diffusers' way to end a run early
        return tensors

    watch = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    generate(on_step_end)
    watch.remove()
    return calls


def load(model: str, device: str) -> DiffusionPipeline:
    """A text-to-video pipeline with one transformer. The VAE stays in fp32, as Wan wants it."""
    dtype = {"default": torch.bfloat16, "vae": torch.float32} if device == "cuda" else torch.float32
    keyword = "dtype" if Version(diffusers.__version__) >= Version("0.41") else "torch_dtype"
    pipe = DiffusionPipeline.from_pretrained(model, **{keyword: dtype})
    if getattr(pipe, "transformer", None) is None or getattr(pipe, "transformer_2", None) is not None:
        raise SystemExit(f"--model {model}: {type(pipe).__name__} has no transformer or two; this example takes one.")
    return pipe


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
    parser.add_argument("--steps", type=positive, default=3)
    parser.add_argument("--dense-steps", type=int, default=1, help="how many of them stay dense, from the first")
    parser.add_argument("--frames", type=positive, default=29)
    parser.add_argument("--height", type=multiple_of(16), default=512, help="pixels; of LTX a multiple of 32")
    parser.add_argument("--width", type=multiple_of(16), default=512, help="likewise")
    parser.add_argument("--layers", type=positive, default=2, help="of the random transformer")
    parser.add_argument("--min-tokens", type=positive, help="rewrite from this length on; default: the device's")
    parser.add_argument("--rounds", type=positive, default=2, help="how often each variant is measured")
    options = parser.parse_args(arguments)
    if not 0 <= options.dense_steps < options.steps:
        parser.error(f"--dense-steps {options.dense_steps}: must be 0 or more and less than --steps {options.steps}")
    return options


if __name__ == "__main__":
    main()
