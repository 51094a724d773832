"""Small checkpoint folders as finetune publishes them, with random weights."""

import dataclasses

import torch
from safetensors.torch import save

from engine.folders import begin, publish
from engine.places import Place
from engine.tasks import Setup, build_task
from engine.verbs import ClassifyOptions, DetectOptions

CLASSES = ("cat", "dog", "owl")
FIELDS = {field.name for field in dataclasses.fields(Setup)}


def setup_of(model="test_resnet", task="classify", class_names=CLASSES, **given):
    """Return a setup at 32 px; training options and the setup's own fields by name."""
    options = {"classify": ClassifyOptions, "detect": DetectOptions}[task]
    own = {name: given.pop(name) for name in [*given] if name in FIELDS}
    return Setup(task, model, tuple(class_names), options(**given), **{"weights": "random", "image_size": 32, **own})


def make_checkpoint(folder, setup=None, seed=0, best_seed=None, finished=True):
    """Publish a checkpoint with the weights that a seed gives, and others as the best; return its path."""
    setup = setup or setup_of()
    place, task = Place(str(folder)), build_task(setup)
    begin(place, "checkpoint", {"seed": seed}, {}, False)
    for name, given in (("model", seed), ("best", best_seed)):
        if given is not None:
            torch.manual_seed(given)
            state = task.build(pretrained=False).state_dict()
            place.at(f"{name}.safetensors").write(save({key: value.contiguous() for key, value in state.items()}))
    if finished:
        metrics = [{"metric": "top1", "value": 50.0, "note": ""}]
        best = None if best_seed is None else {"step": 1, "epoch": 1.0, "metrics": metrics}
        facts = {"steps": 2, "epochs": 2.0, "num_images": 6, "metrics": metrics, "best": best, "time": {}}
        publish(place, {"model": setup.to_json(), **facts})
    return str(folder)
