"""Manifests hold against the operators' own schemas, field by field, and say what the description of the job says.

The schemas of JobSet and of pods are the models that Kubeflow generates from the operators' OpenAPI
(kubeflow-trainer-api). Those drop what they do not know, so a manifest that comes back whole has no unknown field.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_core_v1_pod_template_spec import IoK8sApiCoreV1PodTemplateSpec
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from seedling.launch.launchers import kubernetes
from seedling.launch.launchers.cluster import ClusterConfig, KubernetesConfig
from seedling.launch.launchers.jobs import step_jobs


def cluster(**settings: Any) -> ClusterConfig:
    everything = {
        "image": "registry/seedling:1",
        "queue": "speech",
        "memory": "100Gi",
        "volumes": {"corpus": "/data", "runs": "/runs"},
        "working_dir": "/runs",
        "node_selector": {"gpu": "h100"},
    }
    return ClusterConfig(nodes=3, nproc=8, cpus=16, kubernetes=KubernetesConfig(**{**everything, **settings}))


def manifest(name: str, cluster: ClusterConfig, *, overrides: tuple = ()) -> dict[str, Any]:
    jobs = step_jobs(name, overrides=overrides, cluster=cluster)
    return yaml.safe_load(kubernetes.render(jobs, cluster, name=jobs[0].run_dir.name, max_restarts=4))


def pods(jobset: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pod of each step."""
    return {job["name"]: job["template"]["spec"]["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}


@pytest.mark.parametrize("name", ["toy", "count"])
def test_a_jobset_is_whole_after_a_pass_through_its_schema(folder, name):
    made = manifest(name, cluster())
    assert JobsetV1alpha2JobSet.from_dict(made).to_dict() == made


def test_the_schema_would_notice_an_unknown_field_and_a_wrong_type(folder):
    made = manifest("count", cluster())
    pods(made)["count"]["restartPolcy"] = "Never"
    assert JobsetV1alpha2JobSet.from_dict(made).to_dict() != made
    made = manifest("count", cluster())
    made["spec"]["failurePolicy"]["maxRestarts"] = "four"
    with pytest.raises(ValueError, match="maxRestarts"):
        JobsetV1alpha2JobSet.from_dict(made)


def test_a_pod_is_a_machine_that_starts_its_own_ranks(folder):
    made = manifest("toy", cluster())
    (job,) = [job for job in made["spec"]["replicatedJobs"] if job["name"] == "spread"]
    assert job["replicas"] == 1
    assert (job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (3, 3)
    (container,) = pods(made)["spread"]["containers"]
    assert container["command"] == [
        *("seedling", "pipeline", "toy", "--only", "spread", "--nproc", "8", "--nnodes", "3"),
        *("--node_rank", "$(JOB_COMPLETION_INDEX)", "--master_addr", "toy-spread-0-0.toy", "--master_port", "29500"),
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": 16, "memory": "100Gi"}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/data", "/runs"}
    assert container["workingDir"] == "/runs"
    volumes = {volume["name"] for volume in pods(made)["spread"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}


def test_steps_wait_for_one_another_and_commands_ask_for_no_gpu(folder):
    jobs = manifest("toy", cluster())["spec"]["replicatedJobs"]
    waits = {job["name"]: [each["name"] for each in job.get("dependsOn", [])] for job in jobs}
    assert waits == {"shards": [], "spread": ["shards"], "alone": ["spread"]}
    (container,) = jobs[0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["seedling", "pipeline", "toy", "--only", "shards"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_a_mistake_fails_the_jobset_a_stop_is_not_counted_and_a_crash_restarts_it(folder):
    made = manifest("count", cluster())
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 4
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    rules = [(rule["action"], rule["onExitCodes"]["values"]) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2]), ("Ignore", [75])] and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    # What Kubernetes wants of a job with such rules.
    assert pod["restartPolicy"] == "Never"
    assert {rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"]} == {
        container["name"] for container in pod["containers"]
    }


def test_what_a_user_typed_is_not_expanded_by_kubernetes(folder):
    made = manifest("count", cluster(), overrides=("text='$(HOME)'",))
    assert "text='$$(HOME)'" in pods(made)["count"]["containers"][0]["command"]


def test_a_pytorchjob_has_a_master_and_workers_with_the_operators_own_numbers(folder):
    made = manifest("count", cluster(kind="pytorchjob"))
    assert (made["apiVersion"], made["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = made["spec"]["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    assert set(made["spec"]) == {"runPolicy", "pytorchReplicaSpecs"}
    assert made["spec"]["runPolicy"] == {"backoffLimit": 4, "cleanPodPolicy": "None"}
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"} and replica["restartPolicy"] == "OnFailure"
        template = replica["template"]
        assert IoK8sApiCoreV1PodTemplateSpec.from_dict(template).to_dict() == template
        (container,) = template["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator looks for it
        where = container["command"][container["command"].index("--nproc") :]
        assert where == [
            *("--nproc", "8", "--nnodes", "3", "--node_rank", "$(RANK)"),
            *("--master_addr", "$(MASTER_ADDR)", "--master_port", "29500"),
        ]


@pytest.mark.parametrize(
    "settings, overrides, said",
    [
        ({"image": ""}, (), "kubernetes.image is not set"),
        ({"kind": "pytorchjob"}, (), "cluster.kubernetes.kind=jobset"),
        ({}, (f"run_dir=runs/{'a' * 60}",), "longer than 63"),
    ],
)
def test_what_kubernetes_could_not_run_is_refused(folder, settings, overrides, said):
    with pytest.raises(ValueError, match=said):
        manifest("toy", cluster(**settings), overrides=overrides)


def test_every_variable_has_its_reason_on_top(folder):
    jobs = step_jobs("toy", overrides=(), cluster=cluster())
    text = kubernetes.render(jobs, cluster(), name="toy", max_restarts=1)
    reasons = [line for line in text.splitlines() if line.startswith("# ")]
    assert len(reasons) >= 4 and reasons == text.splitlines()[: len(reasons)]


def test_without_kubectl_the_manifest_is_kept_and_named(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ValueError, match=r"no kubectl on PATH; the manifest is runs/x\.yaml"):
        kubernetes.create("a: 1\n", Path("runs/x.yaml"))
    assert Path("runs/x.yaml").read_text() == "a: 1\n"
