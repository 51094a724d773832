"""Which images a step takes: permutations, repeats, parts."""

import numpy as np
import pytest

from engine.schema import InputError
from engine.training.order import Order, check_split, epoch_draws, order_of
from engine.verbs import ClassifyOptions


def pairs(draws):
    return list(zip(draws.images.tolist(), draws.copies.tolist(), strict=True))


def test_an_epoch_is_a_permutation_of_its_own():
    epochs = [epoch_draws(50, 1, 3, epoch) for epoch in range(4)]
    assert all(sorted(draws.images.tolist()) == list(range(50)) for draws in epochs)
    assert not any(draws.copies.any() for draws in epochs)
    assert len({tuple(draws.images.tolist()) for draws in epochs}) == 4
    assert epoch_draws(50, 1, 4, 0).images.tolist() != epochs[0].images.tolist()


def test_the_order_is_what_it_was():
    """Resuming a training relies on it, from one version to the next."""
    assert epoch_draws(8, 1, 0, 0).images.tolist() == [7, 4, 2, 1, 3, 6, 5, 0]


def test_repeats_take_the_first_images_of_the_permutation():
    plain, repeated = epoch_draws(10, 1, 0, 5), epoch_draws(10, 3, 0, 5)
    assert len(repeated) == 10
    a, b, c, d = plain.images[:4].tolist()
    assert repeated.images.tolist() == [a, a, a, b, b, b, c, c, c, d]
    assert repeated.copies.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_batches_are_consecutive_and_the_last_is_what_is_left():
    order = Order(num_images=10, batch_size=4, repeats=1, seed=0, total_steps=6)
    assert order.steps_per_epoch == 3
    whole = epoch_draws(10, 1, 0, 1).images.tolist()
    assert [order.batch(step).images.tolist() for step in (3, 4, 5)] == [whole[:4], whole[4:8], whole[8:]]
    assert [order.epoch_of(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 12])
def test_parts_are_the_batch_whatever_their_number(parts, repeats):
    order = Order(num_images=31, batch_size=12, repeats=repeats, seed=1, total_steps=6)
    for step in range(6):
        found = [order.part(step, part, parts) for part in range(parts)]
        sizes = [len(part) for part in found]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(pair for part in found for pair in pairs(part)) == sorted(pairs(order.batch(step)))


def test_copies_of_an_image_go_to_different_parts():
    order = Order(num_images=12, batch_size=12, repeats=3, seed=0, total_steps=1)
    for part in range(3):
        images = order.part(0, part, 3).images
        assert len(np.unique(images)) == len(images) == 4


def test_steps_rule_where_they_are_given():
    assert order_of(ClassifyOptions(epochs=3, batch_size=4), 10, 0).total_steps == 9
    assert order_of(ClassifyOptions(epochs=3, batch_size=4, steps=5), 10, 0).total_steps == 5
    with pytest.raises(InputError, match="no images"):
        order_of(ClassifyOptions(), 0, 0)


def test_a_batch_that_cannot_be_split_is_refused_with_the_nearest():
    check_split(128, 0, 1)
    check_split(12, 2, 3)
    with pytest.raises(InputError, match=r"batch_size 128 .* 3 workers x accumulate 2 .* 126 or 132"):
        check_split(128, 3, 2)
    with pytest.raises(InputError, match=r"the nearest that can is 8$"):
        check_split(4, 8, 1)
