"""DeepSpeed's ZeRO as a machine: optimiser state (1), gradients (2), weights (3) sharded over the workers.

Weights are float32 and `bf16` is autocast, as everywhere else, so that the same options mean the same training. The
optimiser is torch's, the accumulation and its weights are ours; DeepSpeed clips, shards and keeps its own checkpoints.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from typing import Any

import torch

from engine.places import Place
from engine.schema import InputError
from engine.tasks import Batch, Task
from engine.training.checkpoints import Saved, write_file
from engine.training.job import Job
from engine.training.machines import Learner, share_buffers
from engine.training.optimizers import build_optimizer, parameter_groups, set_rate
from engine.verbs import TrainingOptions

TAG = "zero"
OF_A_RANK = re.compile(r"zero_pp_rank_(\d+)_")


def check_zero(stage: str, workers: int, training: TrainingOptions) -> None:
    """Raise InputError where DeepSpeed is not there, or can't do what is asked."""
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"--deepspeed {stage}: DeepSpeed is not installed (it is made for Linux on x86-64): leave --deepspeed out"
        )
    if workers < 1:
        raise InputError(f"--deepspeed {stage} shards over Ray Train workers: pass --workers 1 or more")
    if stage == "zero3" and training.ema_decay is not None:
        raise InputError(
            "--deepspeed zero3 keeps no worker a whole model, so ema_decay can't average one: pass --deepspeed zero2, or "
            "leave ema_decay out"
        )


class Shards:
    """A model whose training state is sharded by DeepSpeed."""

    def __init__(self, task: Task, model: torch.nn.Module, job: Job, device: torch.device) -> None:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        if shutil.which("ninja") is None:  # DeepSpeed builds an operator with it; pip puts it beside Python
            os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        training = job.setup.training
        assert job.deepspeed is not None
        self.stage, self.device, self.rank = int(job.deepspeed[-1]), device, torch.distributed.get_rank()
        self.model = model.to(device)
        groups = parameter_groups(model, task.rates(model), training)
        self.spare = copy.deepcopy(model) if self.stage == 3 else None
        self.optimizer = build_optimizer(groups, training)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # only counted with; what a part weighs is said with every part
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": self.stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": training.clip_grad or 0.0,
            "steps_per_print": 1 << 40,
        }
        learner = Learner(task, model, device, training.precision)
        self.engine: Any = deepspeed.initialize(model=learner, optimizer=self.optimizer, config=config)[0]
        self.clip = training.clip_grad

    def learn(self, batch: Batch, weight: float, last: bool) -> torch.Tensor:
        """Add a part's gradient; DeepSpeed divides by the number of workers, so that is multiplied out."""
        self.engine.set_gradient_accumulation_boundary(last)
        loss: torch.Tensor = self.engine(batch)
        self.engine.backward(loss * (weight * self.engine.world_size))
        return loss.detach()

    def step(self, rate: float) -> torch.Tensor | None:
        """Clip and move."""
        set_rate(self.optimizer, rate)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return None if self.clip is None or norm is None else torch.as_tensor(norm, device=self.device)

    def whole(self) -> torch.nn.Module:
        """Return the model with all weights (ZeRO 3: a copy that every worker fills), and the first worker's buffers."""
        whole = self.model
        if self.spare is not None:
            import deepspeed

            whole = self.spare
            with torch.no_grad():
                for mine, sharded in zip(whole.parameters(), self.model.parameters(), strict=True):
                    with deepspeed.zero.GatheredParameters([sharded]):
                        mine.copy_(sharded)
                for buffer, theirs in zip(whole.buffers(), self.model.buffers(), strict=True):
                    buffer.copy_(theirs)
        share_buffers(whole)
        return whole

    def save(self, folder: Place, rank: int) -> dict[str, Any]:
        """Write this worker's shards, as DeepSpeed makes them."""
        files: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="coresift-zero-") as temporary:
            self.engine.save_checkpoint(temporary, tag=TAG, save_latest=False)
            inside = os.path.join(temporary, TAG)
            for name in sorted(os.listdir(inside)):
                with open(os.path.join(inside, name), "rb") as file:
                    files |= write_file(folder, name, file.read())
        return files

    def load(self, saved: Saved) -> None:
        """Take up this worker's shards."""
        with tempfile.TemporaryDirectory(prefix="coresift-zero-") as temporary:
            inside = os.path.join(temporary, TAG)
            os.mkdir(inside)
            for name in saved.names():
                rank = OF_A_RANK.match(name)
                if name.endswith("_states.pt") and (rank is None or int(rank.group(1)) == self.rank):
                    with open(os.path.join(inside, name), "wb") as file:
                        file.write(saved.place.at(name).read())
            path, _ = self.engine.load_checkpoint(temporary, tag=TAG)
        if path is None:
            raise InputError(f"checkpoint {saved.place.uri} is not one that DeepSpeed {self.stage} wrote")
