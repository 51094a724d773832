"""Checkpoints that are torn, pruned, read back; the log that is cut where they are."""

import json

import pytest
from trainings import image_set, make_job, with_colours

from engine.places import Place
from engine.training.checkpoints import folder_of, newest, publish_step, write_file
from engine.training.log import Log


def save(steps, step, best=None):
    files = write_file(folder_of(steps, step), "model.safetensors", f"weights {step}".encode())
    files |= write_file(folder_of(steps, step), "optimizer.pt", b"state")
    publish_step(steps, step, files, {"best": best})


@pytest.fixture
def steps(tmp_path):
    return Place(str(tmp_path / "steps"))


def test_nothing_was_saved(steps):
    assert newest(steps) is None


def test_the_newest_two_are_kept(steps):
    for step in (5, 10, 15):
        save(steps, step)
    assert steps.names() == ["step-000000010", "step-000000015"]
    found = newest(steps)
    assert (found.step, found.names()) == (15, ["model.safetensors", "optimizer.pt"])


def without_end(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_bytes(file):
    file.write_bytes(b"x" * len(file.read_bytes()))


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), without_end, other_bytes])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "step.json"])
def test_a_torn_one_is_passed_over_and_then_replaced(steps, tmp_path, name, harm):
    save(steps, 5)
    save(steps, 10)
    harm(tmp_path / "steps" / "step-000000010" / name)
    assert newest(steps).step == 5
    save(steps, 7)
    assert newest(steps).step == 7
    assert steps.names() == ["step-000000005", "step-000000007"]


def test_best_weights_stay_as_long_as_a_checkpoint_names_them(steps):
    for step in (5, 10, 15, 20):
        name = f"best-{step // 10 * 10:09d}.safetensors"
        steps.at(name).write(b"weights")
        save(steps, step, {"weights": name})
    assert [name for name in steps.names() if name.startswith("best")] == [
        "best-000000010.safetensors",
        "best-000000020.safetensors",
    ]


def line(step):
    return {"step": step, "epoch": step / 10, "kind": "train", "loss": 1.0 / step, "lr": 0.1}


def test_the_log_is_cut_after_the_checkpoint(tmp_path):
    out = Place(str(tmp_path))
    first = Log(out, 0)
    for step in (1, 2, 3):
        first.write(line(step))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "ep')
    second = Log(out, 2)
    second.write(line(3))
    second.close()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [line(1), line(2), line(3)]
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    assert scalars(events[0], "train/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def scalars(file, name):
    """Return (step, value) of a scalar in an event file: records of length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == name]
        at += size + 16
    return found


def test_a_training_on_an_object_store(tmp_path, monkeypatch):
    """Checkpoints, the best weights, log and events all lie there; nothing stays on the disk."""
    pytest.importorskip("moto", reason="needs the dev extra")
    import tempfile

    from test_s3 import Bucket

    from engine.schema import no_progress
    from engine.training.launch import in_process

    with_colours(monkeypatch)
    bucket = Bucket()
    try:
        images = image_set(tmp_path / "images", 12)
        temporary = tmp_path / "temporary"  # of its own: other runs on this machine use the usual one
        temporary.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        job = make_job(bucket.uri("out"), images, {"epochs": 2, "batch_size": 6, "ema_decay": 0.5}, test=images)
        in_process(job, no_progress)
        steps = Place(job.out).at("steps")
        saved = newest(steps)
        assert saved.step == 4
        assert saved.names() == ["average.safetensors", "model.safetensors", "optimizer.pt"]
        assert steps.at(saved.facts["best"]["weights"]).exists()
        assert [json.loads(text)["step"] for text in Place(job.out).at("metrics.jsonl").read().splitlines()] == [1, 2, 3, 4, 4]
        again = Log(Place(job.out), 3)
        again.close()
        assert [json.loads(text)["step"] for text in Place(job.out).at("metrics.jsonl").read().splitlines()] == [1, 2, 3]
        assert len(Place(job.out).at("tensorboard").names()) == 1
        assert list(temporary.iterdir()) == []
    finally:
        bucket.stop()
