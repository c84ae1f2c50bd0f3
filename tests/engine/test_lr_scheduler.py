"""Learning rates, against values recorded from the original and by hand."""

import pytest

from diffnext.engine.lr_scheduler import ConstantLR, CosineLR, MultiStepLR


def rates(scheduler, count):
    values = []
    for _ in range(count):
        values.append(scheduler.get_lr())
        scheduler.step()
    return values


def test_constant_rate_warms_up_linearly():
    values = rates(ConstantLR(lr_max=1, warmup_steps=4), 5)
    assert values == pytest.approx([0.25075, 0.5005, 0.75025, 1, 1])


def test_cosine_holds_its_rate_for_decay_step_steps():
    scheduler = CosineLR(lr_max=1, max_steps=10, lr_min=0.1, decay_step=2, warmup_steps=2)
    expected = [0.5005, 1, 1, 1, 0.8682, 0.8682, 0.55, 0.55, 0.2318, 0.2318, 0.1, 0.1]
    assert rates(scheduler, 12) == pytest.approx(expected, abs=5e-5)


def test_multi_step_multiplies_at_each_milestone():
    values = rates(MultiStepLR(lr_max=0.1, decay_steps=[2, 3], decay_gamma=0.1), 5)
    assert values == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])


@pytest.mark.parametrize(
    "scheduler",
    [
        ConstantLR(lr_max=1, warmup_steps=3),
        CosineLR(lr_max=1, max_steps=20, decay_step=3, warmup_steps=2),
        MultiStepLR(lr_max=1, decay_steps=[4, 9], decay_gamma=0.5),
    ],
)
def test_rate_depends_on_the_step_alone(scheduler):
    walked = rates(scheduler, 15)
    assert [scheduler.lr_at(step) for step in range(15)] == walked


def test_unknown_parameters_are_refused():
    with pytest.raises(TypeError, match="warmup_step"):
        ConstantLR(lr_max=1, warmup_step=3)


def test_cosine_needs_steps_after_the_warm_up():
    with pytest.raises(ValueError, match="max_steps must be larger than warmup_steps"):
        CosineLR(lr_max=1, max_steps=5, warmup_steps=5)
