"""Prediction for a few query tiles is that of the whole call, for these tiles."""

import pytest
import torch

from sparge_kernels.predict import predict
from sparge_kernels.thresholds import PREDICTORS, Thresholds
from workloads import smooth_field


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tiles", [[0], [1, 3], [0, 2, 4]], ids=["first", "inner", "with-ragged-tail"])
def test_a_few_query_tiles_are_predicted_as_in_the_whole_call(predictor, is_causal, tiles):
    q, k, v = (x[:, :, :600] for x in smooth_field((1, 8, 128)))
    q = torch.cat([q, q.flip(1)], dim=1)  # two query heads a kv head
    options = {"is_causal": is_causal, "scale": 0.2, "predictor": predictor}
    whole = predict(q, k, v, **options)
    some = predict(q, k, v, **options, q_tiles=torch.tensor(tiles))
    for name in ("scores", "whole", "partial"):
        torch.testing.assert_close(getattr(some, name), getattr(whole, name)[:, :, tiles], equal_nan=True)
    for threshold in (Thresholds(None, 0.8, 0.3, None), Thresholds(0.4, 1.0, 0.3, None)):
        assert torch.equal(some.keep(3, threshold), whole.keep(3, threshold)[:, tiles])
