"""The recall example: its data are what they claim to be, and its committed weights recall."""

import pytest
import torch

from workloads.recall import modules


@pytest.fixture(scope="module")
def recall():
    """The example's `data` and `model` modules."""
    return modules()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_batch_has_the_promised_shapes(recall):
    data, _ = recall
    batch = data.make_batch(3, 1000, 32, 20, seeded())
    assert batch.tokens.shape == (3, 1000)
    assert batch.query_positions.shape == batch.targets.shape == (3, 20)
    assert batch.tokens.dtype == batch.query_positions.dtype == batch.targets.dtype == torch.int64
    assert int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < data.VOCABULARY_SIZE


def test_equal_seeds_give_equal_batches_and_other_seeds_do_not(recall):
    data, _ = recall
    first, again, other = (data.make_batch(2, 500, 16, 16, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize(
    ("length", "pairs", "queries", "spread"),
    [(2048, 32, 16, 1), (2048, 32, 16, 16), (63, 21, 21, 1), (300, 100, 100, 1)],
    ids=["sparse", "scattered", "packed", "packed-long"],
)
def test_targets_are_the_values_planted_with_the_queried_keys(recall, length, pairs, queries, spread):
    data, _ = recall
    batch = data.make_batch(2, length, pairs, queries, seeded(1), spread)
    for tokens, positions, targets in zip(batch.tokens, batch.query_positions, batch.targets, strict=True):
        body = tokens[: length - queries * spread]
        assert int(positions.min()) >= len(body)
        is_value = (body >= data.FIRST_VALUE) & (body < data.FIRST_WORD)
        assert int((body < data.FIRST_VALUE).sum()) == int(is_value.sum()) == pairs
        for position, target in zip(positions, targets, strict=True):
            (place,) = torch.nonzero(body == tokens[position], as_tuple=True)
            assert place.numel() == 1
            assert body[place + 1] == target


def test_every_query_asks_for_another_key(recall):
    data, _ = recall
    batch = data.make_batch(4, 512, 64, 64, seeded(2))
    asked = batch.tokens.gather(1, batch.query_positions)
    assert all(row.unique().numel() == 64 for row in asked)


@pytest.mark.parametrize(("length", "pairs", "queries"), [(50, 20, 20), (500, 8, 9), (5000, 600, 1)])
def test_sizes_that_do_not_fit_are_refused(recall, length, pairs, queries):
    data, _ = recall
    with pytest.raises(ValueError, match=r"need|too short"):
        data.make_batch(1, length, pairs, queries, seeded())


def test_default_config_fits_the_task(recall):
    data, model = recall
    assert model.RecallConfig().vocabulary == data.VOCABULARY_SIZE


def test_logits_at_positions_equal_the_full_logits(recall):
    data, model = recall
    batch = data.make_batch(2, 100, 8, 8, seeded(3))
    network = model.load_pretrained()
    logits = network(batch.tokens)
    assert logits.shape == (2, 100, data.VOCABULARY_SIZE)
    expected = logits.gather(1, batch.query_positions[..., None].expand(-1, -1, data.VOCABULARY_SIZE))
    torch.testing.assert_close(network(batch.tokens, batch.query_positions), expected)


def test_the_future_does_not_change_the_past(recall):
    data, model = recall
    tokens = data.make_batch(1, 200, 8, 8, seeded(4)).tokens
    changed = tokens.clone()
    changed[:, 150:] = data.FIRST_WORD
    network = model.load_pretrained()
    torch.testing.assert_close(network(tokens)[:, :150], network(changed)[:, :150])


def test_weights_are_under_two_megabytes(recall):
    _, model = recall
    assert model.WEIGHTS_PATH.stat().st_size < 2_000_000


@pytest.mark.parametrize("length", [2048, 4096])
def test_pretrained_model_recalls(recall, length):
    data, model = recall
    network = model.load_pretrained()
    generator = seeded(7)
    right = []
    for spread in (1, 1, 1, 16, 16, 16):
        batch = data.make_batch(1, length, 32, 32, generator, spread)
        answers = network(batch.tokens, batch.query_positions).argmax(dim=-1)
        right.append((answers == batch.targets).float().mean())
    assert torch.stack(right).mean() > 0.95
