"""The recall task: keys and values planted in a long, slowly drifting stream of distractors.

A sequence is a body and a tail. The body is a stream of distractor words in which `pairs` two-token
events (a key, then its value) are planted at random places. The tail asks for `queries` of those keys, in
random order; the answer at each of these positions is the value planted with that key. The queries follow
one another, or (`spread` > 1) stand at random places among further distractors, `spread` tokens a query on
average: the harder case for a method that pools queries, since a lone query hides in a smooth stretch.

The stream resembles a document. Its subject is a point that wanders round a circle of word groups and
jumps to another place every few hundred tokens; each word is drawn near the subject. Each sequence has
a dialect: of every group it uses one member only, so that earlier text on the same subject helps to
predict the next word. Keys and values have token ranges of their own and do not occur otherwise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KEY_COUNT = 512
VALUE_COUNT = 64
GROUP_COUNT = 128
GROUP_SIZE = 4

FIRST_KEY = 0
FIRST_VALUE = FIRST_KEY + KEY_COUNT
FIRST_WORD = FIRST_VALUE + VALUE_COUNT
VOCABULARY_SIZE = FIRST_WORD + GROUP_COUNT * GROUP_SIZE

SUBJECT_SPREAD = 3.0  # standard deviation of a word around the subject, in groups
SUBJECT_DRIFT = 0.1  # standard deviation of the subject's step from token to token, in groups
JUMP_PROBABILITY = 1 / 512  # chance that the stream changes its subject at a token


@dataclass(frozen=True)
class RecallBatch:
    """Sequences with their questions and answers, all int64 on the CPU.

    tokens: [batch, length]. query_positions: [batch, queries], where the planted keys are asked for.
    targets: [batch, queries], the value token that answers each query.
    """

    tokens: Tensor
    query_positions: Tensor
    targets: Tensor


def make_batch(
    batch: int, length: int, pairs: int, queries: int, generator: torch.Generator, spread: int = 1
) -> RecallBatch:
    """Draw `batch` sequences of `length` tokens, `queries * spread` of which are the tail.

    Equal arguments and generator states give equal batches. Query positions ascend.
    Raises ValueError when the pairs and queries do not fit.
    """
    _check_sizes(length, pairs, queries, spread)
    body = length - queries * spread
    keys = _distinct(batch, KEY_COUNT, pairs, generator) + FIRST_KEY  # [batch, pairs]
    values = torch.randint(FIRST_VALUE, FIRST_VALUE + VALUE_COUNT, (batch, pairs), generator=generator)
    asked = _distinct(batch, pairs, queries, generator)  # [batch, queries]

    # Distinct places among body - pairs slots; the i-th pair shifts all later ones by one token.
    places = _distinct(batch, body - pairs, pairs, generator).sort(dim=1).values + torch.arange(pairs)
    positions = _distinct(batch, queries * spread, queries, generator).sort(dim=1).values + body

    tokens = _distractors(batch, length, generator)
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    tokens.scatter_(1, positions, keys.gather(1, asked))
    return RecallBatch(tokens, positions, values.gather(1, asked))


def _check_sizes(length: int, pairs: int, queries: int, spread: int) -> None:
    if not 1 <= queries <= pairs <= KEY_COUNT:
        raise ValueError(f"queries={queries}, pairs={pairs}: need 1 <= queries <= pairs <= {KEY_COUNT}")
    if spread < 1:
        raise ValueError(f"spread={spread}: need at least 1, the tokens a query takes of the tail")
    if length < queries * spread + 2 * pairs:
        raise ValueError(
            f"length={length} is too short for {pairs} pairs and {queries} queries of {spread} tokens each"
        )


def _distinct(batch: int, population: int, count: int, generator: torch.Generator) -> Tensor:
    """[batch, count] integers below `population`, in random order, without repeats in a row."""
    return torch.rand(batch, population, generator=generator).topk(count, dim=1).indices


def _distractors(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[batch, length] words of a stream whose subject drifts slowly and jumps now and then."""
    drift = (torch.randn(batch, length, generator=generator) * SUBJECT_DRIFT).cumsum(dim=1)
    section = (torch.rand(batch, length, generator=generator) < JUMP_PROBABILITY).cumsum(dim=1)
    origins = torch.rand(batch, int(section.max()) + 1, generator=generator) * GROUP_COUNT
    subject = origins.gather(1, section) + drift
    scatter = torch.randn(batch, length, generator=generator) * SUBJECT_SPREAD
    group = (subject + scatter).round().long() % GROUP_COUNT
    dialect = torch.randint(GROUP_SIZE, (batch, GROUP_COUNT), generator=generator)
    return FIRST_WORD + group * GROUP_SIZE + dialect.gather(1, group)
