"""The KubeRay manifests: what can be said of them without Kubernetes. Field names are those of the ray.io/v1 definitions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "kuberay"
CLUSTER_FIELDS = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
JOB_FIELDS = {
    "entrypoint",
    "submissionMode",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}
AUTOSCALER_FIELDS = {"upscalingMode", "idleTimeoutSeconds", "resources", "securityContext"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return found


CLUSTER = read("raycluster.yaml")["spec"]
PODS = [CLUSTER["headGroupSpec"]["template"]["spec"]] + [
    group["template"]["spec"] for group in CLUSTER["workerGroupSpecs"]
]


def test_both_kinds_are_of_the_stable_version_and_describe_the_same_cluster() -> None:
    cluster, job = read("raycluster.yaml"), read("rayjob.yaml")
    assert [(one["apiVersion"], one["kind"]) for one in (cluster, job)] == [
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    ]
    assert set(job["spec"]) == JOB_FIELDS
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert set(cluster["spec"]) == CLUSTER_FIELDS


def test_ray_is_the_locked_version_and_asks_for_its_token() -> None:
    locked = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert CLUSTER["rayVersion"] == locked[1]
    assert CLUSTER["authOptions"] == {"mode": "token", "secretName": "rag-ray-token"}


def test_the_head_holds_no_work_and_the_groups_can_grow() -> None:
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert set(CLUSTER["autoscalerOptions"]) == AUTOSCALER_FIELDS
    for group in CLUSTER["workerGroupSpecs"]:
        assert set(group) == GROUP_FIELDS
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_a_stage_always_finds_a_machine_to_begin_with() -> None:
    workers = next(group for group in CLUSTER["workerGroupSpecs"] if group["groupName"] == "workers")
    assert workers["minReplicas"] >= 1, "with 0 workers in a setting, a stage counts the machines that are there"


def test_retrievers_have_their_own_resource_and_no_processor_for_stages() -> None:
    group = next(group for group in CLUSTER["workerGroupSpecs"] if group["groupName"] == "retrievers")
    # A string in a string: KubeRay puts it on a shell's command line as it is.
    assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {"retriever": 1}
    assert group["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("pod", PODS, ids=["head", *(group["groupName"] for group in CLUSTER["workerGroupSpecs"])])
def test_every_pod_runs_as_the_images_user_without_privileges_on_shared_storage(pod: dict[str, Any]) -> None:
    uid = int(re.search(r"--uid (\d+) rag", (ROOT / "infra/Dockerfile").read_text())[1])  # type: ignore[index]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == uid
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    claims = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
    assert mounted["shared"] == "/shared"
    assert claims["shared"] == read("shared.yaml")["metadata"]["name"]
    assert read("shared.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_no_token_is_written_down() -> None:
    for file in FOLDER.glob("*.yaml"):
        assert "auth_token:" not in file.read_text()
        assert "RAY_AUTH_TOKEN" not in file.read_text()
