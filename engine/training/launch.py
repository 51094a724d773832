"""Where a training runs: in this process, or on Ray Train's workers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from engine import session
from engine.places import Place
from engine.schema import InputError, Progress, RunError, first_line
from engine.training.checkpoints import told_kept
from engine.training.job import DivergedError, Job
from engine.training.loop import Training, steps_place
from engine.training.seeds import kept

RAYS_OWN = "ray"
"""Folder in OUT that Ray Train keeps its books in while it runs."""
LOOK_EVERY_S = 0.5
PATIENCE_S = 60.0
"""How long an interrupted run waits for Ray Train to end."""


def in_process(job: Job, progress: Progress) -> None:
    """Train in this process, which has its random generators and threads back afterwards."""
    device = torch.device("cuda" if job.gpus and torch.cuda.is_available() else "cpu")
    with kept(), _exact(device):
        torch.set_num_threads(job.threads)
        Training(job, 0, device, None, progress).run()


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Use kernels that give the same bits every time, where there are such: some of a GPU's have no such form."""
    if device.type == "cpu":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


class Board:
    """What workers tell the driver: an actor of no weight, beside it."""

    def __init__(self) -> None:
        self.shown: dict[str, tuple[str, int, int, str]] = {}
        self.workers: list[Any] = []
        self.failed: tuple[str, str] | None = None
        self.over = False

    def start(self, worker: Any) -> bool:
        """Take note of a worker that starts; return whether it shall."""
        self.workers.append(worker)
        return not self.over

    def show(self, stage: str, done: int, total: int, note: str) -> None:
        """Take note of progress."""
        self.shown[stage] = (stage, done, total, note)

    def fail(self, kind: str, message: str) -> None:
        """Take note of an error that another try would not mend: workers that start from now on stop at once."""
        self.failed, self.over = self.failed or (kind, message), True

    def take(self) -> list[tuple[str, int, int, str]]:
        """Return the progress since the last time."""
        shown, self.shown = list(self.shown.values()), {}
        return shown

    def cancel(self) -> list[Any]:
        """Let no worker start any more; return those that did."""
        self.over = True
        return self.workers

    def verdict(self) -> tuple[str, str] | None:
        """Return the error, as the name of its class and its message."""
        return self.failed


def work(config: dict[str, Any]) -> None:
    """Be a worker: what Ray Train calls on each of them."""
    import ray
    import ray.train
    import ray.train.torch

    job, board = config["job"], config["board"]
    rank = ray.train.get_context().get_world_rank()
    if not ray.get(board.start.remote(ray.get_runtime_context().current_actor)):
        return
    torch.set_num_threads(job.threads)
    device = ray.train.torch.get_device() if job.gpus else torch.device("cpu")
    group = torch.distributed.new_group(backend="gloo") if device.type == "cuda" else None

    def show(stage: str, done: int, total: int, note: str) -> None:
        if rank == 0:
            board.show.remote(stage, done, total, note)

    try:
        if not Place(job.out).at("run.json").exists():
            raise InputError(
                f"worker {rank} does not see {Place(job.out).uri}: --out must be where all nodes reach it (s3://, NFS)"
            )
        with _exact(device):
            Training(job, rank, device, group, show).run()
    except DivergedError as error:  # on all workers alike
        ray.get(board.fail.remote("RunError", str(error)))
    except InputError as error:
        ray.get(board.fail.remote("InputError", str(error)))
        raise


def on_ray(job: Job, max_failures: int, progress: Progress) -> None:
    """Train on Ray Train's workers; a group with a dead one starts again from the newest checkpoint.

    Where an autoscaler may bring nodes, workers are waited for. Raises InputError where there can never be so many,
    RunError where workers fail too often.
    """
    import ray

    _check_room(job)
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    failures: list[BaseException] = []
    place = Place(job.out)
    run = threading.Thread(target=_fit, args=(job, max_failures, board, place, failures), daemon=True)
    run.start()
    try:
        with session.waiting() as moved:
            while run.is_alive():
                run.join(LOOK_EVERY_S)
                for shown in ray.get(board.take.remote()):
                    moved()
                    progress(*shown)
        verdict = ray.get(board.verdict.remote())
        ray.kill(board)
    except ray.exceptions.RayError as error:  # the board is beside this process: without it there is no session any more
        raise RunError(f"the Ray session was lost: {first_line(error)}. {_kept(job)}") from error
    except BaseException:
        with contextlib.suppress(ray.exceptions.RayError):
            for worker in ray.get(board.cancel.remote()):
                ray.kill(worker)
        run.join(PATIENCE_S)
        raise
    finally:
        own = place.at(RAYS_OWN)
        if own.exists():
            own.remove()
    if verdict is not None:
        raise {"InputError": InputError, "RunError": RunError}[verdict[0]](verdict[1])
    if failures:
        raise _too_often(job, max_failures, failures[0]) from failures[0]


def _check_room(job: Job) -> None:
    """Raise InputError for more workers than the cluster can ever have room for, where that is known."""
    most = session.most()
    if most is None:
        return
    for flag, each, there, name in (
        ("--cpus-per-worker", job.threads, most.cpus, "CPUs"),
        ("--gpus-per-worker", job.gpus, most.gpus, "GPUs"),
    ):
        needed = job.workers * each
        if needed > there:
            raise InputError(
                f"--workers {job.workers} x {flag} {each:g} need {needed:g} {name}, {session.reach()} {there}: pass fewer, or "
                "join a larger cluster with --address"
            )


def _fit(job: Job, max_failures: int, board: Any, place: Place, failures: list[BaseException]) -> None:
    """Run Ray Train to its end; what it raises is put into `failures`."""
    import ray.train
    from ray.train.torch import TorchTrainer

    try:
        TorchTrainer(
            work,
            train_loop_config={"job": job, "board": board},
            scaling_config=ray.train.ScalingConfig(
                num_workers=job.workers,
                use_gpu=job.gpus > 0,
                resources_per_worker={"CPU": job.threads, **({"GPU": job.gpus} if job.gpus else {})},
            ),
            run_config=ray.train.RunConfig(
                name=RAYS_OWN,
                storage_path=place.path,
                storage_filesystem=place.fs,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                logging_config=ray.train.LoggingConfig(log_level="INFO" if session.verbose else "ERROR"),
            ),
        ).fit()
    except BaseException as error:
        failures.append(error)


def _too_often(job: Job, max_failures: int, failure: BaseException) -> RunError:
    """Return the error of a training whose workers failed once more than they may."""
    by_worker = getattr(failure, "worker_failures", None) or {0: failure}
    cause = next(iter(by_worker.values()))
    return RunError(
        f"the workers failed more than --max-failures {max_failures} times, the last time: {first_line(cause)}. {_kept(job)}"
    )


def _kept(job: Job) -> str:
    return f"In {Place(job.out).uri} {told_kept(steps_place(job.out))}: the same command goes on from there"
