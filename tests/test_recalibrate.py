"""Fresh BatchNorm statistics: those of the model as it is used, over the whole loader."""

from __future__ import annotations

import pytest
import torch
from model_helpers import images, tiny_vit
from torch import nn

from repavit_ops.nn import recalibrate_bn


def test_statistics_are_those_of_the_data_in_evaluation():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(6)).eval()
    x = 3 * torch.randn(512, 6) + 1
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)
    assert recalibrate_bn(model, x.split(64)) == 1
    torch.testing.assert_close(model[1].running_mean, x.mean(0), rtol=1e-5, atol=1e-5)
    expected = torch.stack([part.var(0) for part in x.split(64)]).mean(0)
    torch.testing.assert_close(model[1].running_var, expected, rtol=1e-5, atol=1e-5)


def test_stale_statistics_of_a_repavit_are_repaired():
    model = tiny_vit()
    batches = [(images(seed=seed), "labels") for seed in range(3)]
    recalibrate_bn(model, batches)
    wanted = model(images())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
    assert not torch.allclose(model(images()), wanted, rtol=1e-3, atol=1e-3)
    assert recalibrate_bn(model, batches) == len(norms) == 4
    torch.testing.assert_close(model(images()), wanted)


def test_modes_momentum_and_weights_are_left_as_they_were():
    model = tiny_vit().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    recalibrate_bn(model, [images()])
    assert [module.training for module in model.modules()] == modes
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_an_empty_loader_raises_and_changes_nothing():
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="loader: got no batches"):
        recalibrate_bn(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_batchnorm_is_left_alone():
    assert recalibrate_bn(nn.Linear(3, 3), []) == 0
