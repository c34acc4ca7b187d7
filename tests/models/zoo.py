"""Models of transformers, diffusers and torch.nn, small and with random weights, and what is found in each.

A tile is 128 queries x 64 keys: 150 to 400 tokens are several tiles and end in a ragged one.
"""

from __future__ import annotations

from zoo_diffusion import DIFFUSION
from zoo_encoders import ENCODERS
from zoo_language import LANGUAGE
from zoo_speech import SPEECH
from zoo_torch import TORCH
from zoo_video import VIDEO
from zoo_vision import VISION

KINDS = {
    "language": LANGUAGE,
    "text encoder": ENCODERS,
    "vision": VISION,
    "speech": SPEECH,
    "image": DIFFUSION,
    "video, audio": VIDEO,
    "torch.nn": TORCH,
}
ZOO = [entry for entries in KINDS.values() for entry in entries]
