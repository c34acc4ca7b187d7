"""A text-to-image pipeline in one process: only the transformer is ours, everything else is the same to the bit."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from light import CLOSE, EXACT_OPTIONS
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import sparge_compile as sparge
from sparge_kernels import ops


def autoencoder():
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def clip():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig(vocab_size=50, bos_token_id=0, eos_token_id=1, **sizes))


def t5():
    return T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))


def transformer():
    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )


class Pipeline:
    """What a diffusion pipeline holds, with random weights; two of the parts beside the transformer are compiled."""

    def __init__(self) -> None:
        self.vae, self.clip, self.t5, self.transformer = (
            build().eval() for build in (autoencoder, clip, t5, transformer)
        )
        self.compiled_clip = torch.compile(self.clip, backend="inductor")
        self.vae_attention = torch.compile(self.vae.decoder.mid_block.attentions[0], backend="inductor")
        self.tokens, self.latents = torch.randint(2, 50, (1, 12)), torch.randn(1, 4, 16, 16)
        self.channels = torch.randn(1, 16, 16, 16)

    def encode(self) -> dict[str, torch.Tensor]:
        both = self.clip(self.tokens)
        return {"hidden": both.last_hidden_state, "pooled": both.pooler_output, "text": self.t5(self.tokens)[0]}

    def denoise(self, text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return self.transformer(self.latents, text, pooled, torch.tensor([500.0]))[0]

    def beside(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Everything but the transformer, on fixed inputs."""
        return {
            **self.encode(),
            "image": self.vae.decode(latents)[0],
            "encoded": self.vae.encode(torch.ones(1, 3, 32, 32)).latent_dist.mean,
            "compiled clip": self.compiled_clip(self.tokens).last_hidden_state,
            "compiled vae attention": self.vae_attention(self.channels),
        }


@pytest.fixture
def pipeline():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield Pipeline()


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_text_encoders_and_vae_are_the_same_before_during_and_after(pipeline):
    functions = F.scaled_dot_product_attention, F.softmax, torch.matmul, nn.Module.__call__, nn.Module.forward
    processors = [type(p) for p in pipeline.transformer.attn_processors.values()]
    before = pipeline.beside(pipeline.latents)
    text, pooled = before["text"], before["pooled"]
    dense = pipeline.denoise(text, pooled)
    for block in pipeline.transformer.transformer_blocks:
        block.compile(backend="sparge", options=EXACT_OPTIONS)
    with sparge.rewriting(topk=0.5):
        same(pipeline.beside(pipeline.latents), before)
        with ops.record_stats() as records:
            pipeline.denoise(text, pooled)
            assert len(records) == 1
            same(pipeline.beside(pipeline.latents), before)
        assert len(records) == 1  # nobody else's attention came to our operator
    torch.testing.assert_close(pipeline.denoise(text, pooled), dense, **CLOSE)
    same(pipeline.beside(pipeline.latents), before)
    torch._dynamo.reset()
    same(pipeline.beside(pipeline.latents), before)  # compiled anew, in a process that has rewritten
    assert functions == (
        F.scaled_dot_product_attention, F.softmax, torch.matmul, nn.Module.__call__, nn.Module.forward,
    )  # fmt: skip
    assert processors == [type(p) for p in pipeline.transformer.attn_processors.values()]


def test_explaining_and_calibrating_the_transformer_leaves_the_others_alone(pipeline):
    before = {**pipeline.encode(), "image": pipeline.vae.decode(pipeline.latents)[0]}

    def check():
        same({**pipeline.encode(), "image": pipeline.vae.decode(pipeline.latents)[0]}, before)

    arguments = (pipeline.latents, before["text"], before["pooled"], torch.tensor([500.0]))
    with sparge.rewriting(min_tokens=0):
        report = sparge.explain(pipeline.transformer, *arguments)
        check()
        sparge.calibrate(pipeline.transformer, [arguments], progress=False)
        check()
    assert [site.rewritten for site in report.sites] == [True]
    check()
