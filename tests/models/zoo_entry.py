"""What an entry of the zoo is: a model that depends on its attention, an input, and the calls to be found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """`module(*args, **kwargs)`."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, function: Callable[..., Any] | None = None) -> list[Tensor]:
        """The floating-point tensors the module returns, without caches; `function` runs in the module's place."""
        self.empty_caches()
        result = (self.module if function is None else function)(*self.args, **self.kwargs)
        if isinstance(result, Tensor):
            return [result]
        values = result.values() if isinstance(result, Mapping) else result
        return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]

    def empty_caches(self) -> None:
        """Each call is a first one."""
        for value in self.kwargs.values():
            if hasattr(value, "reset"):
                value.reset()


SMALL = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}


def from_transformers(model: str, config: Mapping[str, Any], **inputs: Any) -> Call:
    """A model of transformers by the name of its class, with a configuration of its own kind."""
    import transformers

    kind = getattr(transformers, model)
    return Call(kind(kind.config_class(**config)), (), inputs)


def from_diffusers(model: str, config: Mapping[str, Any], **inputs: Any) -> Call:
    """A model of diffusers by the name of its class."""
    import diffusers

    return Call(getattr(diffusers, model)(**config), (), {**inputs, "return_dict": False})


def tokens(batch: int, length: int, vocabulary: int = 256) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length))


def padding(*lengths: int, to: int) -> Tensor:
    """An attention_mask of transformers: 1 for a token, 0 for padding behind it."""
    return (torch.arange(to) < torch.tensor(lengths)[:, None]).long()


class Rewritten(NamedTuple):
    """Sites that run `sparge::attention`: an fnmatch pattern on their names, how many there are, which mask they have.

    `mask` is `causal`, `given` (to the kernel, as it is) or empty.
    """

    sites: str
    count: int
    mask: str = ""
    pattern: str = "sdpa"


class Dense(NamedTuple):
    """Sites that keep their call: an fnmatch pattern on their names, how many there are, a piece of the reason."""

    sites: str
    count: int
    reason: str
    pattern: str = "sdpa"


@dataclass(frozen=True)
class Entry:
    """One model, one input, and every attention call in it.

    Attributes:
        name: of the test.
        build: makes the model and its input; `call` fixes the seed.
        found: the calls; each belongs to exactly one pattern.
        gain: of the queries and the keys. 1.5 gives scores a standard deviation of about 2: a row of the softmax is
            neither uniform nor one-hot.
    """

    name: str
    build: Callable[[], Call]
    found: tuple[Rewritten | Dense, ...]
    gain: float = 1.5

    def call(self) -> Call:
        """The model in eval mode with random weights, and its input. The same every time."""
        torch.manual_seed(0)
        call = self.build()
        _make_attention_matter(call.module, self.gain)
        call.module.eval()
        return call


def _make_attention_matter(module: nn.Module, gain: float) -> None:
    """With the libraries' own random weights the output hardly depends on what attention does."""
    with torch.no_grad():
        for name, part in module.named_modules():
            kind = name.rsplit(".", 1)[-1]
            if isinstance(part, nn.Embedding):
                part.weight.normal_(std=part.embedding_dim**-0.5)
            elif isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                size = gain if kind in _QUERIES_AND_KEYS else 1.0
                part.weight.normal_(std=size * part.weight[0].numel() ** -0.5)
            elif kind in _NORMS_OF_QUERIES_AND_KEYS:
                part.weight.fill_(gain)
            elif type(part).__name__ == "Conv1D":  # transformers' own: [in, out]
                size = gain if kind in _QUERIES_AND_KEYS else 1.0
                part.weight.normal_(std=size * part.weight.shape[0] ** -0.5)
            else:
                _fill_parameters(part, gain)


def _fill_parameters(part: nn.Module, gain: float) -> None:
    """Weights that a module of attention holds itself, and tables of positions, which start from zero."""
    for name, weight in part.named_parameters(recurse=False):
        if name == "in_proj_weight":  # [out, in]
            weight.normal_(std=gain * weight.shape[1] ** -0.5)
        elif name in _XLNET:  # [in, heads, head_dim]
            weight.normal_(std=(gain if name in _QUERIES_AND_KEYS else 1.0) * weight.shape[0] ** -0.5)
        elif name in _POSITIONS:
            weight.normal_()


_QUERIES_AND_KEYS = (
    *("q_proj", "k_proj", "add_q_proj", "add_k_proj", "to_q", "to_k", "linear_q", "linear_k", "query", "key", "q", "k"),
    *("query_key_value", "c_attn", "qkv", "Wqkv"),  # the values with them
)
_NORMS_OF_QUERIES_AND_KEYS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_XLNET = ("q", "k", "v", "o", "r")
_POSITIONS = (
    "relative_position_bias_table",
    "rel_pos_h",
    "rel_pos_w",
    "pos_bias_u",
    "pos_bias_v",
    "r_w_bias",
    "r_r_bias",
)
