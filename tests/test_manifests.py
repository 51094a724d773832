"""The files that make clusters: valid by the schemas of those who read them, of the versions that are tested, and closed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = ("cluster.yaml", "jobs/kuberay.yaml", "Dockerfile")
SECRET = re.compile(r"AKIA[0-9A-Z]{16}|(secret|password|token)\S*\s*[:=]\s*['\"]?[A-Za-z0-9/+]{20,}|-----BEGIN", re.IGNORECASE)


def pinned(package: str) -> str:
    """Return the version in constraints.txt."""
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def kubernetes() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "jobs" / "kuberay.yaml").read_text()))


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_open_and_nothing_secret(name):
    text = (ROOT / name).read_text()
    assert "0.0.0.0" not in text
    assert not SECRET.search(text), SECRET.search(text)


def test_the_launcher_file_is_valid_by_rays_schema(launcher):
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(launcher)
    validate_config(whole)
    for wrong in ({"max_worker": 3}, {"head_node_type": "heads"}, {"idle_timeout_minutes": "soon"}):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config({**whole, **wrong})


def test_the_head_does_no_work_and_says_how_far_the_cluster_grows(launcher):
    types = launcher["available_node_types"]
    workers = {name: each for name, each in types.items() if name != launcher["head_node_type"]}
    assert types[launcher["head_node_type"]]["resources"] == {"CPU": 0}
    assert all(each["min_workers"] == 0 for each in workers.values())
    assert sum(each["max_workers"] for each in workers.values()) <= launcher["max_workers"]
    total = {
        kind: sum(each["max_workers"] * each["resources"].get(kind, 0) for each in workers.values()) for kind in ("CPU", "GPU")
    }
    assert "MarketType" in str(workers["gpu"]["node_config"])
    words = shlex.split(launcher["head_start_ray_commands"][-1])
    assert f"--labels=coresift.max-cpus={total['CPU']},coresift.max-gpus={total['GPU']}" in words
    assert {"--num-cpus=0", "--dashboard-host=127.0.0.1"} <= set(words)


def test_nodes_get_the_versions_of_constraints(launcher):
    from ray.scripts.scripts import start

    setup = launcher["setup_commands"]
    assert any("make setup" in command for command in setup)
    assert any(f'ray.__version__ == "{pinned("ray")}"' in command for command in setup)
    known = {option for parameter in start.params for option in parameter.opts}
    for command in (launcher["head_start_ray_commands"][-1], launcher["worker_start_ray_commands"][-1]):
        given = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
        assert given <= known
        assert "RAY_AUTH_MODE=token" in command


# Fields of KubeRay's API: of its published types, and what is documented since (labels, authOptions, a group's
# idleTimeoutSeconds). The whole schema is a megabyte of what Kubernetes says of pods.
JOB = "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus entrypointNumGpus "
JOB += "entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML "
JOB += "shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished"
CLUSTER = "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec headServiceAnnotations "
CLUSTER += "managedBy rayVersion suspend upgradeStrategy workerGroupSpecs"
AUTOSCALER = "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode version volumeMounts"
HEAD = "enableIngress headService labels rayStartParams resources serviceType template"
WORKERS = (
    "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams replicas resources scaleStrategy "
)
WORKERS += "suspend template"


def object_of(names: str, required: str = "", **known: Any) -> dict[str, Any]:
    properties = {name: known.get(name, {}) for name in names.split()}
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": required.split()}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
SCHEMA = object_of(
    JOB,
    entrypoint={"type": "string"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=object_of(
        CLUSTER,
        "headGroupSpec",
        rayVersion={"type": "string"},
        enableInTreeAutoscaling={"type": "boolean"},
        authOptions=object_of("mode enableK8sTokenAuth secretName", mode={"enum": ["disabled", "token"]}),
        autoscalerOptions=object_of(
            AUTOSCALER, idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
        ),
        headGroupSpec=object_of(HEAD, "template", rayStartParams=TEXTS, labels=TEXTS),
        workerGroupSpecs={
            "type": "array",
            "items": object_of(
                WORKERS, "groupName template", rayStartParams=TEXTS, minReplicas=COUNT, maxReplicas=COUNT, replicas=COUNT
            ),
        },
    ),
)


def test_the_job_for_kuberay_has_its_fields(kubernetes):
    account, job = kubernetes
    assert (account["kind"], job["apiVersion"], job["kind"]) == ("ServiceAccount", "ray.io/v1", "RayJob")
    jsonschema.validate(job["spec"], SCHEMA)
    for wrong in ({"entryPoint": "x"}, {"ttlSecondsAfterFinished": "soon"}, {"rayClusterSpec": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**job["spec"], **wrong}, SCHEMA)
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")


def test_its_pods_are_bounded_and_grow_as_the_head_says(kubernetes):
    cluster = kubernetes[1]["spec"]["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    total = {"num-cpus": 0, "num-gpus": 0}
    for group in groups:
        assert group["minReplicas"] == group["replicas"] == 0
        for name in total:
            total[name] += group["maxReplicas"] * int(group["rayStartParams"].get(name, 0))
    assert head["labels"] == {"coresift.max-cpus": str(total["num-cpus"]), "coresift.max-gpus": str(total["num-gpus"])}
    for group in (head, *groups):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["serviceAccountName"] == kubernetes[0]["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert set(container["resources"]) == {"requests", "limits"}
        assert all("valueFrom" in entry for entry in container.get("env", ()))
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert gpus == int(group["rayStartParams"].get("num-gpus", 0))


def test_the_image_is_made_of_what_is_there():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == set(sources)
    assert any(line.startswith("USER 1000") for line in lines)
    assert any("-c constraints.txt" in line for line in lines)
    packages = re.search(r"packages = \[(.+)\]", (ROOT / "pyproject.toml").read_text())
    assert packages is not None
    assert {name.split(".")[0] for name in re.findall(r'"([\w.]+)"', packages[1])} <= set(sources)
