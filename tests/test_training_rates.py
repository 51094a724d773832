"""The learning rate as a function of the step, against the papers' recipes worked by hand and timm's schedulers."""

import math

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler

from engine.schema import InputError
from engine.training.optimizers import build_optimizer, parameter_groups, set_rate
from engine.training.rates import rate_of
from engine.verbs import ClassifyOptions

ACTIVEFT = ClassifyOptions(
    epochs=1000,
    batch_size=256,
    lr=0.01,
    lr_batch_size=512,
    schedule="cosine",
    min_lr=1e-5,
    warmup=5,
    warmup_lr=1e-6,
)


def test_the_activeft_recipe():
    """0.01 x 256 / 512, five epochs of warm-up from 1e-6, cosine to 1e-5 over 1000: minimum and start are absolute."""
    rate = rate_of(ACTIVEFT, 3, 3000)
    assert rate(0) == rate(2) == 1e-6
    assert rate(3) == pytest.approx(1e-6 + (0.005 - 1e-6) / 5)
    assert rate(15) == pytest.approx(1e-5 + 0.5 * (0.005 - 1e-5) * (1 + math.cos(math.pi * 5 / 1000)))
    assert rate(1500) == pytest.approx((0.005 + 1e-5) / 2)
    assert rate(2999) == pytest.approx(1e-5, rel=0.02)


def test_warm_up_and_cosine_are_timms():
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = CosineLRScheduler(
        torch.optim.SGD([parameter], lr=0.005), t_initial=1000, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6
    )
    rate = rate_of(ACTIVEFT, 3, 3000)
    for epoch in range(1000):
        schedule.step(epoch)
        assert rate(3 * epoch) == rate(3 * epoch + 2) == pytest.approx(schedule.optimizer.param_groups[0]["lr"], rel=1e-12)


def test_milestones_fall_with_their_epoch_or_inside_one():
    training = ClassifyOptions(epochs=100, lr=0.1, schedule="step", milestones=(50, 75.5), gamma=0.1)
    rate = rate_of(training, 4, 400)
    assert [rate(step) for step in (0, 199)] == [0.1, 0.1]
    assert [rate(step) for step in (200, 301)] == pytest.approx([0.01, 0.01])
    assert [rate(step) for step in (302, 399)] == pytest.approx([0.001, 0.001])


def test_steps_rule_step_by_step():
    training = ClassifyOptions(steps=100, lr=0.1, schedule="cosine", warmup=10)
    rate = rate_of(training, 7, 100)
    assert [rate(step) for step in (0, 1, 5)] == pytest.approx([0, 0.01, 0.05])
    assert rate(50) == pytest.approx(0.05)
    assert rate(99) == pytest.approx(0.05 * (1 + math.cos(math.pi * 0.99)))
    falling = rate_of(ClassifyOptions(steps=100, lr=0.1, schedule="step", milestones=(60,)), 7, 100)
    assert [falling(59), falling(60)] == pytest.approx([0.1, 0.01])


def test_a_warm_up_inside_an_epoch_rises_with_every_step():
    rate = rate_of(ClassifyOptions(epochs=4, lr=0.1, warmup=0.5), 10, 40)
    assert [rate(step) for step in range(6)] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])


def test_a_warm_up_as_long_as_the_training_is_refused():
    with pytest.raises(InputError, match="warmup 5 is as long as the training, 5 epochs"):
        rate_of(ClassifyOptions(epochs=5, warmup=5), 10, 50)


def network():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def test_groups_by_rate_and_decay_freeze_what_is_left_out():
    model = network()
    scales = {name: 1.0 if name.startswith("2.") else 0.01 for name, _ in model.named_parameters() if name != "0.bias"}
    training = ClassifyOptions(weight_decay=0.1, decay_1d=False)
    groups = parameter_groups(model, scales, training)
    assert not model[0].bias.requires_grad
    found = {(group["lr_scale"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert found == {(0.01, 0.1): 1, (0.01, 0.0): 2, (1.0, 0.1): 1, (1.0, 0.0): 1}
    optimizer = build_optimizer(groups, training)
    set_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.005}
    assert len(parameter_groups(model, scales, ClassifyOptions(weight_decay=0.1))) == 2


def test_nothing_to_train_and_a_momentum_that_is_none_are_refused():
    with pytest.raises(InputError, match="every parameter"):
        parameter_groups(network(), {}, ClassifyOptions())
    model = network()
    groups = parameter_groups(model, dict.fromkeys(dict(model.named_parameters()), 1.0), ClassifyOptions())
    with pytest.raises(InputError, match="nesterov"):
        build_optimizer(groups, ClassifyOptions(nesterov=True, momentum=0.0))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimisers_are_torchs(name, kind):
    model = network()
    training = ClassifyOptions(optimizer=name, momentum=0.8)
    optimizer = build_optimizer(parameter_groups(model, dict.fromkeys(dict(model.named_parameters()), 1.0), training), training)
    assert type(optimizer) is kind
    assert name != "sgd" or optimizer.param_groups[0]["momentum"] == 0.8
