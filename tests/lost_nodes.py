"""A job on three nodes of one CPU, one of which is killed in each step: the program of test_nodes.py.

    python tests/lost_nodes.py JOB.yaml TEMPORARY

Prints, as JSON, how much of each step was done when its node was killed, and how many nodes were left.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engine.schema import Progress
from jobs.options import RunOptions
from jobs.run import begin, open_job, run_steps
from jobs.step import Step

STAGES = {"embed": "embed", "select": "select", "finetune": "train"}
"""verb -> the stage in which its node is killed."""


class Nodes:
    """Three nodes beside a head without CPUs; an observer of a job that kills one of them in each step."""

    def __init__(self, temporary: str) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": temporary}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(3)]
        self.killed: dict[str, tuple[int, int, int]] = {}

    def begins(self, number: int, total: int, step: Step) -> Progress:
        """Return a progress that kills a node with work once a third of the step's stage is done."""
        from ray._private.state import available_resources_per_node

        def progress(stage: str, done: int, whole: int, note: str) -> None:
            if stage == STAGES[step.verb] and done >= max(1, whole // 3) and step.verb not in self.killed:
                free = available_resources_per_node()
                victim = next(node for node in self.nodes if not free.get(node.node_id, {}).get("CPU"))
                self.nodes.remove(victim)
                self.cluster.remove_node(victim, allow_graceful=False)
                self.killed[step.verb] = (done, whole, len(self.nodes))

        return progress

    def ends(self, number: int, total: int, step: Step, result: Any, seconds: float, done_before: bool) -> bool:
        """Have another node for the one that was killed."""
        print(f"{step.verb}: {seconds:.1f} s, killed at {self.killed.get(step.verb)}", file=sys.stderr)
        if number < total:
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        return True


def main(file: str, temporary: str) -> None:
    import ray

    nodes = Nodes(temporary)
    ray.init(address=nodes.cluster.address, log_to_driver=False)
    job = open_job(RunOptions(job=file))
    begin(job)
    assert run_steps(job, nodes)
    print(json.dumps(nodes.killed))
    ray.shutdown()
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
