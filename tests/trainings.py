"""Small folders of images, jobs on them, and a task of a few parameters, for tests of the trainer."""

import io
import json

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from engine.decode import decode
from engine.folders import begin, sha256_of
from engine.images import Record, images_table, publish_images
from engine.inputs import SquareInput
from engine.places import Place
from engine.tasks import Setup
from engine.training import examples
from engine.training.checkpoints import newest
from engine.training.job import Job
from engine.training.loop import steps_place
from engine.verbs import ClassifyOptions

CLASSES = ("red", "green", "blue")
TINY_VIT = ("img_size=32", "patch_size=8", "depth=2", "embed_dim=32", "num_heads=2")


def picture(label, rng):
    pixels = rng.integers(0, 120, (32, 32, 3)).astype(np.uint8)
    pixels[..., label] += 100
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, format="PNG")
    return held.getvalue()


def image_set(place, count, seed=0):
    """Publish an images/ folder of noise that leans to its class's colour; return its path."""
    rng = np.random.default_rng(seed)
    none = {"boxes": np.zeros((0, 4), np.float32), "box_labels": np.zeros(0, np.int64), "crowd": np.zeros(0, bool)}
    records = [Record(row, f"image-{row}", picture(row % 3, rng), row % 3, **none) for row in range(count)]
    return publish_set(place, records, CLASSES)


def publish_set(place, records, class_names):
    """Publish an images/ folder of records; return its path."""
    folder, table, sink = Place(str(place)), images_table(records), pa.BufferOutputStream()
    begin(folder, "images", {}, {}, False)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    part = folder.at("parts", "part.arrow")
    part.write(sink.getvalue())
    entry = {"name": "part.arrow", "num_images": len(records), "sha256": sha256_of(part), "bytes": len(part.read())}
    publish_images(folder, [entry], class_names, {})
    return str(place)


def make_job(out, images, training, test=None, model="vit_tiny_patch16_224", model_option=TINY_VIT, **given):
    setup = Setup("classify", model, CLASSES, ClassifyOptions(**training), "random", model_option, image_size=32)
    values = {"seed": 0, "workers": 0, "threads": 1, "gpus": 0.0, "loaders": 0, "checkpoint_steps": 2, "deepspeed": None}
    Place(str(out)).at("run.json").write(b"{}")
    return Job(setup=setup, out=str(out), images=images, test=test, max_pixels=10**9, **{**values, **given})


def lines_of(out, kind="train"):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses_of(out):
    return [line["loss"] for line in lines_of(out)]


def weights_of(out):
    """Return the bytes of the newest checkpoint's weights."""
    return newest(steps_place(str(out))).place.at("model.safetensors").read()


def with_colours(monkeypatch):
    """Have the trainer build a ColourTask, whatever the setup, in this process; return those it builds."""
    built = []

    def build(setup):
        built.append(ColourTask(setup))
        return built[-1]

    monkeypatch.setattr(examples, "build_task", build)
    return built


class ColourTask:
    """Learns which colour an image leans to, from its mean; with noise, dropout and running statistics to be seeded."""

    column, criterion = "probs", "top1"
    input = SquareInput(2)

    def __init__(self, setup):
        self.setup = setup
        self.seen = []

    def build(self, pretrained):
        return torch.nn.Sequential(
            torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3)
        )

    def rates(self, model):
        return dict.fromkeys(dict(model.named_parameters()), 1.0)

    def train_mode(self, model):
        model.train()

    def check(self, record):
        return None

    def _values(self, pixels):
        return torch.tensor(pixels).float() / 128 - 1

    def example(self, record):
        self.seen.append(record.row)
        image, _ = decode(record.data, 10**9)
        return self._values(self.input.prepare(image)) + 0.1 * float(np.random.randn()) * torch.rand(12), record.label

    def collate(self, examples):
        return torch.stack([values for values, _ in examples]), torch.tensor([label for _, label in examples])

    def loss(self, model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    def predict(self, model, pixels, sizes):
        return list(model(self._values(pixels)).softmax(-1).numpy())

    def measure(self, predictions, records):
        right = [p.argmax() == record.label for p, record in zip(predictions, records, strict=True)]
        return [("top1", 100 * float(np.mean(right)), "%"), ("top5", None, "there are 3 classes")]
