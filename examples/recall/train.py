"""Train the recall model on short sequences and measure it on long ones: `python train.py`."""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from data import RecallBatch, make_batch
from model import WEIGHTS_PATH, RecallModel, load_pretrained, save_weights
from torch import Tensor

EVALUATION_SEED = 1_000_003


@dataclass(frozen=True)
class Stage:
    """Part of the curriculum, up to the share `until` of all steps: lengths shortest .. longest."""

    until: float
    shortest: int
    longest: int


CURRICULUM = (Stage(0.4, 128, 256), Stage(0.7, 256, 1024), Stage(1.0, 512, 2048))
FEWEST_PAIRS, MOST_PAIRS = 4, 128


def accuracy(model: RecallModel, length: int, sequences: int, spread: int = 1, pairs: int = 32) -> float:
    """Share of queries answered right, one sequence at a time, every planted key being asked for."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    right = 0
    with torch.no_grad():
        for _ in range(sequences):
            batch = make_batch(1, length, pairs, pairs, generator, spread)
            answers = model(batch.tokens, batch.query_positions).argmax(dim=-1)
            right += int((answers == batch.targets).sum())
    return right / (sequences * pairs)


def log_uniform(low: int, high: int, generator: torch.Generator) -> int:
    """An integer from low to high whose logarithm is uniform."""
    return int(low * (high / low) ** torch.rand((), generator=generator).item())


def draw_training_batch(progress: float, tokens_per_step: int, generator: torch.Generator) -> RecallBatch:
    """A batch of the stage that `progress` (0 .. 1) falls in.

    With few pairs, copying any planted value is already better than chance: the first step of learning.
    """
    stage = next(stage for stage in CURRICULUM if progress <= stage.until)
    length = log_uniform(stage.shortest, stage.longest, generator)
    pairs = log_uniform(FEWEST_PAIRS, min(MOST_PAIRS, length // 4), generator)
    spread = int(torch.randint(1, 3, (), generator=generator))
    return make_batch(max(1, tokens_per_step // length), length, pairs, pairs, generator, spread)


def losses(model: RecallModel, batch: RecallBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers, and of the next token at random places of the stream."""
    rows, queries = batch.targets.shape
    body = batch.tokens.shape[1] - queries
    sampled = torch.randint(body - 1, (rows, min(128, body - 1)), generator=generator)
    logits = model(batch.tokens, torch.cat([batch.query_positions, sampled], dim=1))
    recall = F.cross_entropy(logits[:, :queries].flatten(0, 1), batch.targets.flatten())
    following = batch.tokens.gather(1, sampled + 1)
    return recall, F.cross_entropy(logits[:, queries:].flatten(0, 1), following.flatten())


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, then a cosine down to 2 %."""
    warm_up = min(1.0, (step + 1) / 50)
    return warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(arguments: argparse.Namespace) -> RecallModel:
    """Train from scratch with the curriculum; prints a line every 50 steps."""
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    model = RecallModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, arguments.steps))
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        batch = draw_training_batch(step / arguments.steps, arguments.tokens_per_step, generator)
        recall, stream = losses(model, batch, generator)
        optimizer.zero_grad()
        (recall + arguments.stream_weight * stream).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(
                f"step {step:5d}  length {batch.tokens.shape[1]:5d}  recall loss {recall.item():.4f}  "
                f"stream loss {stream.item():.4f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return model


def evaluate(model: RecallModel, lengths: list[int], sequences: int) -> None:
    """Print the accuracy at each length, with the queries in a row and with 16 tokens a query."""
    for length in lengths:
        start = time.perf_counter()
        in_a_row = accuracy(model, length, sequences)
        seconds = (time.perf_counter() - start) / sequences
        scattered = accuracy(model, length, sequences, spread=16)
        print(
            f"length {length:6d}  accuracy {in_a_row:.4f} in a row, {scattered:.4f} scattered  "
            f"{seconds:.2f} s a sequence",
            flush=True,
        )


def main() -> None:
    """Train unless asked only to evaluate, save, load again, and print the accuracy at each length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--stream-weight", type=float, default=0.3, help="weight of the next-token loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_PATH)
    parser.add_argument("--evaluate-only", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--sequences", type=int, default=8, help="sequences per length in the evaluation")
    arguments = parser.parse_args()
    if not arguments.evaluate_only:
        save_weights(train(arguments), arguments.weights)
    evaluate(load_pretrained(arguments.weights), arguments.lengths, arguments.sequences)


if __name__ == "__main__":
    main()
