"""The step loop in this process: what a step is worth, resuming, evaluations, the best weights, what goes wrong."""

import random

import numpy as np
import pytest
import safetensors.torch
import torch
from trainings import ColourTask, image_set, lines_of, losses_of, make_job, weights_of, with_colours

from engine.places import Place
from engine.schema import InputError, no_progress
from engine.training.checkpoints import newest
from engine.training.job import DivergedError
from engine.training.launch import in_process
from engine.training.loop import steps_place

TRAINING = {"epochs": 3, "batch_size": 8, "lr": 0.1}


@pytest.fixture
def task(monkeypatch):
    """The trainer's task, as it is built for every training."""
    return with_colours(monkeypatch)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("images") / "train", 21)


@pytest.fixture(scope="module")
def test_images(tmp_path_factory):
    return image_set(tmp_path_factory.mktemp("images") / "test", 10, seed=1)


class StopError(Exception):
    pass


def stop_at(step):
    def progress(stage, done, total, note):
        if stage == "train" and done == step:
            raise StopError

    return progress


def state_of(out, name="model.safetensors"):
    return safetensors.torch.load(newest(steps_place(str(out))).place.at(name).read())


@pytest.mark.parametrize("stop", [1, 2, 5, 8, 9])
@pytest.mark.parametrize(
    "more", [{}, {"optimizer": "adamw", "ema_decay": 0.9, "clip_grad": 0.5, "accumulate": 2, "repeats": 3}]
)
def test_a_resumed_training_is_the_unbroken_one(task, images, test_images, tmp_path, more, stop):
    training = {**TRAINING, **more, "eval_epochs": 1}
    whole, broken = (make_job(tmp_path / name, images, training, test=test_images) for name in ("whole", "broken"))
    in_process(whole, no_progress)
    with pytest.raises(StopError):
        in_process(broken, stop_at(stop))
    in_process(broken, no_progress)
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "broken")
    saved = [newest(steps_place(str(tmp_path / name))) for name in ("whole", "broken")]
    assert saved[0].facts["files"] == saved[1].facts["files"]
    assert saved[0].facts["best"] == saved[1].facts["best"]
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "broken")
    assert [line["step"] for line in lines_of(tmp_path / "broken")] == list(range(1, 10))
    assert [line["step"] for line in lines_of(tmp_path / "broken", "test")] == [3, 6, 9]


def test_a_finished_training_does_nothing_more(task, images, tmp_path):
    job = make_job(tmp_path / "out", images, TRAINING)
    in_process(job, no_progress)
    in_process(job, no_progress)
    assert [len(built.seen) for built in task] == [63, 0]


def test_every_epoch_sees_every_image_once(task, images, tmp_path):
    in_process(make_job(tmp_path / "out", images, TRAINING), no_progress)
    seen = task[0].seen
    assert [sorted(seen[start : start + 21]) for start in (0, 21, 42)] == [list(range(21))] * 3


def without_chance(monkeypatch):
    """Make the task's model one without dropout and batch norm: then parts of a batch add up to it."""
    monkeypatch.setattr(ColourTask, "build", lambda self, pretrained: torch.nn.Linear(12, 3))


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_parts_add_up_to_the_whole_batch(task, images, tmp_path, monkeypatch, accumulate):
    """Also where the last batch, of 5, leaves some parts smaller or empty."""
    without_chance(monkeypatch)
    in_process(make_job(tmp_path / "one", images, TRAINING), no_progress)
    in_process(make_job(tmp_path / "many", images, {**TRAINING, "accumulate": accumulate}), no_progress)
    assert losses_of(tmp_path / "many") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    one, many = state_of(tmp_path / "one"), state_of(tmp_path / "many")
    assert all(torch.allclose(one[name], many[name], rtol=1e-5, atol=1e-6) for name in one)


def test_the_average_is_of_the_weights_of_every_step(task, images, tmp_path, monkeypatch):
    without_chance(monkeypatch)
    in_process(make_job(tmp_path / "out", images, {**TRAINING, "steps": 4, "ema_decay": 0.75}, checkpoint_steps=1), no_progress)
    torch.manual_seed(0)
    average = None
    for step in range(1, 5):
        out = tmp_path / f"to-{step}"
        in_process(make_job(out, images, {**TRAINING, "steps": step}, checkpoint_steps=1), no_progress)
        now = state_of(out)["weight"]
        if average is None:
            start = initial(images, tmp_path)
            average = start
        average = 0.75 * average + 0.25 * now
    assert torch.allclose(state_of(tmp_path / "out", "average.safetensors")["weight"], average, atol=1e-6)


def initial(images, tmp_path):
    """Return the weights before the first step: those of a training at rate 0."""
    in_process(make_job(tmp_path / "still", images, {**TRAINING, "steps": 1, "lr": 0.0}), no_progress)
    return state_of(tmp_path / "still")["weight"]


def test_the_best_weights_are_kept_however_long_ago(task, images, test_images, tmp_path, monkeypatch):
    values = iter([50.0, 80.0, 80.0, 10.0])
    monkeypatch.setattr(ColourTask, "measure", lambda self, predictions, records: [("top1", next(values), "%")])
    training = {"epochs": 4, "batch_size": 8, "lr": 0.1, "eval_epochs": 1}
    in_process(make_job(tmp_path / "out", images, training, test=test_images, checkpoint_steps=1), no_progress)
    saved = newest(steps_place(str(tmp_path / "out")))
    assert (saved.facts["best"]["step"], saved.facts["best"]["epoch"], saved.facts["best"]["value"]) == (6, 2.0, 80.0)
    assert saved.facts["last"]["metrics"][0]["value"] == 10.0
    names = Place(str(tmp_path / "out" / "steps")).names()
    assert names == ["best-000000006.safetensors", "step-000000011", "step-000000012"]
    in_process(make_job(tmp_path / "to-6", images, {**training, "epochs": 2}), no_progress)
    assert (tmp_path / "out" / "steps" / names[0]).read_bytes() == weights_of(tmp_path / "to-6")


def test_a_loss_that_is_not_finite_ends_it_with_the_checkpoint_kept(task, images, tmp_path):
    """At this rate the weights overflow within the first steps."""
    with pytest.raises(DivergedError) as caught:
        in_process(make_job(tmp_path / "out", images, {**TRAINING, "lr": 1e38}, checkpoint_steps=1), no_progress)
    message = str(caught.value)
    assert "at rate 1e+38: the training diverged. Try a lower lr" in message
    saved = newest(steps_place(str(tmp_path / "out")))
    assert saved is None or f"The checkpoint after step {saved.step} is kept" in message
    assert saved is None or all(torch.isfinite(value).all() for value in state_of(tmp_path / "out").values())


def test_a_batch_norm_with_one_image_is_explained(task, images, tmp_path):
    with pytest.raises(InputError, match=r"step 2 has 1 images .* batch norm can't learn from one alone"):
        in_process(make_job(tmp_path / "out", images, {"epochs": 1, "batch_size": 20}), no_progress)


def test_this_processs_generators_and_threads_stay(task, images, tmp_path):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random(), torch.get_num_threads()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    in_process(make_job(tmp_path / "out", images, TRAINING, threads=2), no_progress)
    found = torch.rand(3), np.random.rand(3), random.random(), torch.get_num_threads()
    assert torch.equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    assert found[2:] == expected[2:]


def test_an_image_that_cannot_be_decoded_is_named(task, images, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.images.ImageSet.record", broken_record)
    with pytest.raises(Exception, match="image 'torn' can't be decoded: not an image file"):
        in_process(make_job(tmp_path / "out", images, TRAINING), no_progress)


def broken_record(self, index):
    from engine.images import Record

    return Record(index, "torn", b"no image", 0, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
