"""Training on Ray Train's workers: DDP and DeepSpeed beside this process, loaders, workers that die."""

import contextlib
import os
import signal
import threading
import time

import psutil
import pytest
import safetensors.torch
import torch
from trainings import image_set, losses_of, make_job, weights_of

from engine.places import Place
from engine.schema import InputError, RunError, no_progress
from engine.training import launch
from engine.training.checkpoints import newest
from engine.training.launch import in_process, on_ray
from engine.training.loop import steps_place

TRAINING = {"epochs": 3, "batch_size": 8, "lr": 0.02, "crop": "none", "clip_grad": 1.0, "eval_epochs": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """21 images: the last batch of an epoch has 5."""
    return image_set(tmp_path_factory.mktemp("images") / "train", 21)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, images):
    """The training in this process, which all others are compared with."""
    out = tmp_path_factory.mktemp("alone") / "out"
    in_process(make_job(out, images, TRAINING, test=images), no_progress)
    return out


def farthest(a, b):
    return max(abs(x - y) for x, y in zip(losses_of(a), losses_of(b), strict=True))


def test_loaders_give_the_same_bits(alone, images, tmp_path):
    in_process(make_job(tmp_path / "out", images, TRAINING, test=images, loaders=1), no_progress)
    assert weights_of(tmp_path / "out") == weights_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "deepspeed", "accumulate"),
    [(1, None, 1), (2, None, 1), (2, None, 4), (1, "zero2", 1), (2, "zero1", 1), (2, "zero2", 2), (2, "zero3", 1)],
)
def test_loss_curves_agree_at_equal_global_batch(ray_session, alone, images, tmp_path, workers, deepspeed, accumulate):
    """Must-show 3: a tiny ViT; the last batch of an epoch leaves parts smaller, and with eight parts empty."""
    if deepspeed:
        pytest.importorskip("deepspeed", reason="made for Linux on x86-64")
    out, training = tmp_path / "out", {**TRAINING, "accumulate": accumulate}
    on_ray(make_job(out, images, training, test=images, workers=workers, deepspeed=deepspeed), 0, no_progress)
    far = farthest(alone, out)
    print(f"{workers} workers, {deepspeed or 'DDP'}, accumulate {accumulate}: largest difference of a loss {far:.2g}")
    assert far < 2e-5
    saved = newest(steps_place(str(out)))
    ours, theirs = (safetensors.torch.load(weights_of(o)) for o in (out, alone))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-5
    assert saved.facts["last"]["metrics"][0] == newest(steps_place(str(alone))).facts["last"]["metrics"][0]
    assert "ray" not in Place(str(out)).names()
    if (workers, deepspeed) == (1, None):
        assert weights_of(out) == weights_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_shards_go_on_from_their_checkpoint(ray_session, images, tmp_path, deepspeed):
    """Four steps, then six in the same folder: the weights of six at once."""
    pytest.importorskip("deepspeed", reason="made for Linux on x86-64")
    for name, ends in (("whole", (6,)), ("broken", (4, 6))):
        for steps in ends:
            training = {**TRAINING, "optimizer": "adamw", "steps": steps}
            job = make_job(tmp_path / name, images, training, workers=2, deepspeed=deepspeed, checkpoint_steps=4)
            on_ray(job, 0, no_progress)
    assert weights_of(tmp_path / "broken") == weights_of(tmp_path / "whole")


def workers_of_ray():
    """Return the processes of Ray Train's workers below this process: no other session's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
    return found


class StopError(Exception):
    pass


@pytest.mark.slow
def test_interrupted_it_leaves_no_workers(ray_session, images, tmp_path):
    def progress(stage, done, total, note):
        if stage == "train" and done:
            raise StopError

    with pytest.raises(StopError):
        on_ray(make_job(tmp_path / "out", images, {**TRAINING, "epochs": 4000}, workers=2), 3, progress)
    deadline = time.monotonic() + 60
    while workers_of_ray() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert workers_of_ray() == []
    assert "ray" not in Place(str(tmp_path / "out")).names()


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_checkpoint(ray_session, images, tmp_path):
    """Must-show 4: the group starts again, the run ends, the weights are those of the unbroken run."""
    training = {**TRAINING, "epochs": 40}
    whole, killed = (make_job(tmp_path / name, images, training, workers=2, checkpoint_steps=7) for name in ("whole", "killed"))
    on_ray(whole, 0, no_progress)
    steps, victims, over = steps_place(killed.out), [], threading.Event()

    def kill():
        while not over.is_set() and not victims:
            if any(name.startswith("step-") for name in steps.names()):
                for process in workers_of_ray()[-1:]:
                    victims.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)
            over.wait(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        on_ray(killed, 2, no_progress)
    finally:
        over.set()
        killer.join()
    assert victims
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_training_that_diverges_on_workers_is_one_error(ray_session, images, tmp_path):
    job = make_job(tmp_path / "out", images, {**TRAINING, "lr": 1e38, "clip_grad": None}, workers=2)
    with pytest.raises(RunError, match=r"the training diverged. Try a lower lr"):
        on_ray(job, 3, no_progress)


@pytest.mark.slow
def test_workers_that_always_die_end_the_run(ray_session, images, tmp_path, monkeypatch):
    job = make_job(tmp_path / "out", images, {**TRAINING, "epochs": 400}, workers=2, checkpoint_steps=5)
    done = threading.Event()

    def kill():
        while not done.is_set():
            if newest(steps_place(job.out)) is not None:
                for process in workers_of_ray():
                    process.kill()
            time.sleep(0.2)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(RunError, match=r"failed more than --max-failures 0 times.*the checkpoint after step \d+ is kept"):
            on_ray(job, 0, no_progress)
    finally:
        done.set()
        killer.join()


def test_more_workers_than_cpus_are_refused(ray_session, images, tmp_path):
    with pytest.raises(InputError, match=r"--workers 500 x --cpus-per-worker 1 need 500 CPUs, this machine has \d+"):
        on_ray(make_job(tmp_path / "out", images, {**TRAINING, "batch_size": 500}, workers=500), 0, no_progress)


def test_the_board_keeps_the_first_error_and_stops_what_starts():
    board = launch.Board()
    assert board.start("a worker")
    board.show("train", 1, 9, "")
    board.show("train", 2, 9, "loss 1")
    assert board.take() == [("train", 2, 9, "loss 1")]
    assert board.take() == []
    board.fail("RunError", "it diverged")
    board.fail("InputError", "and so did I")
    assert not board.start("another")
    assert board.verdict() == ("RunError", "it diverged")
    assert board.cancel() == ["a worker", "another"]


def test_threads_of_torch_are_those_asked_for(images, tmp_path):
    found = []
    in_process(make_job(tmp_path / "out", images, TRAINING, threads=2), lambda *told: found.append(torch.get_num_threads()))
    assert set(found) == {2}
