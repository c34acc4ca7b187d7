"""Test scenes restored with attention limited to tokens nearby, and with all of it: `python locality.py`."""

import argparse
from unittest import mock

import torch
import torch.nn.functional as F
from model import TOKEN_BLOCK, load_pretrained
from scenes import FIRST_TEST_SEED, add_noise, scene
from torch import Tensor
from train import psnr

SIDE = 64  # tokens; pictures of 256 x 256 pixels


def within(radius: int) -> Tensor:
    """Bool [tokens, tokens]: at most `radius` rows and columns apart, in the model's order of tokens."""
    row, column = torch.arange(SIDE)[:, None].expand(SIDE, SIDE), torch.arange(SIDE).expand(SIDE, SIDE)
    blocks = (SIDE // TOKEN_BLOCK, TOKEN_BLOCK)
    row, column = (x.unflatten(1, blocks).unflatten(0, blocks).transpose(1, 2).flatten() for x in (row, column))
    return torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) <= radius


@torch.no_grad()
def main() -> None:
    """Print a line for each radius."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    model, dense = load_pretrained(), F.scaled_dot_product_attention
    for radius in (SIDE, 12, 6, 3):
        mask, found = within(radius), []
        with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, m=mask: dense(q, k, v, attn_mask=m)):
            for seed in (FIRST_TEST_SEED, FIRST_TEST_SEED + 1):
                clean = scene(seed, 4 * SIDE)
                found.append(psnr(model(add_noise(clean, seed)[None])[0], clean))
        name = "whole picture" if radius == SIDE else f"radius {radius}"
        print(f"{name:14}" + "".join(f"{value:8.2f} dB" for value in found), flush=True)


if __name__ == "__main__":
    main()
