"""Kubernetes: a manifest for JobSet (sigs.k8s.io/jobset, 0.8 or newer) or PyTorchJob (kubeflow training operator v1).

A pod is a machine: it starts its own ranks, with its number from the operator. In a JobSet a stage is a Job of as many
pods, and a pipeline is one JobSet whose Jobs wait for one another. A pod that ends with 75 (evicted, its checkpoint
written) is replaced and not counted; exit code 2, its user's mistake, fails the JobSet; any other failure restarts the
JobSet, in which finished steps find themselves unchanged. PyTorchJob restarts whatever failed, and has no order.
"""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from ...stages.runtime.signals import EXIT_INTERRUPTED
from ..errors import USER_ERROR
from .cluster import ClusterConfig
from .jobs import Job

LONGEST_NAME = 63  # of a DNS label: pods are called JOBSET-STEP-0-NUMBER


def render(jobs: list[Job], cluster: ClusterConfig, *, name: str, max_restarts: int) -> str:
    """Return the manifest of jobs, the reasons for their environment as comments on top."""
    kubernetes = cluster.kubernetes
    if not kubernetes.image:
        raise ValueError("kubernetes.image is not set; give cluster.kubernetes.image=IMAGE, with seedling installed")
    label = _label(name)
    if kubernetes.kind == "pytorchjob":
        if len(jobs) > 1:
            raise ValueError(
                "a PyTorchJob is one stage, and this pipeline has several; use cluster.kubernetes.kind=jobset"
            )
        manifest = _pytorchjob(jobs[0], cluster, name=label, max_restarts=max_restarts)
    else:
        manifest = _jobset(jobs, cluster, name=label, max_restarts=max_restarts)
    variables = {variable.name: variable.why for job in jobs for variable in job.environment}
    reasons = [f"# {variable}: {why}" for variable, why in variables.items()]
    return "\n".join(reasons) + "\n" + yaml.safe_dump(manifest, sort_keys=False, width=120)


def create(manifest: str, file: Path) -> int:
    """Write a manifest and hand it to kubectl; return kubectl's exit code."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(manifest, encoding="utf-8")
    try:
        return subprocess.run(create_command(file)).returncode
    except FileNotFoundError:
        raise ValueError(
            f"no kubectl on PATH; the manifest is {file}: `kubectl create -f` it where kubectl is"
        ) from None


def create_command(file: Path) -> list[str]:
    """Return the command that starts a manifest."""
    return ["kubectl", "create", "-f", str(file)]


def _jobset(jobs: list[Job], cluster: ClusterConfig, *, name: str, max_restarts: int) -> dict[str, Any]:
    replicated = []
    for job in jobs:
        step = _label(job.name)
        if len(f"{name}-{step}-0-{job.nodes}") > LONGEST_NAME:
            raise ValueError(f"{name}-{step}: pods' names would be longer than {LONGEST_NAME} letters; shorten run_dir")
        pod = _pod(job, cluster, container="seedling", rank="JOB_COMPLETION_INDEX", address=f"{name}-{step}-0-0.{name}")
        after = {"dependsOn": [{"name": _label(job.after), "status": "Complete"}]} if job.after else {}
        spec = {
            "parallelism": job.nodes,
            "completions": job.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [_on_exit("FailJob", USER_ERROR), _on_exit("Ignore", EXIT_INTERRUPTED)],
            },
            "template": {"spec": pod},
        }
        replicated.append({"name": step, "replicas": 1, **after, "template": {"spec": spec}})
    fail = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(cluster, name),
        "spec": {"failurePolicy": {"maxRestarts": max_restarts, "rules": [fail]}, "replicatedJobs": replicated},
    }


def _pytorchjob(job: Job, cluster: ClusterConfig, *, name: str, max_restarts: int) -> dict[str, Any]:
    pod = _pod(job, cluster, container="pytorch", rank="RANK", address="$(MASTER_ADDR)")
    del pod["restartPolicy"]  # the replica's
    replica = {"restartPolicy": "OnFailure", "template": {"spec": pod}}
    replicas = {"Master": {"replicas": 1, **replica}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(cluster, name),
        "spec": {
            "runPolicy": {"backoffLimit": max_restarts, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _pod(job: Job, cluster: ClusterConfig, *, container: str, rank: str, address: str) -> dict[str, Any]:
    kubernetes = cluster.kubernetes
    command = ["seedling", *(argument.replace("$(", "$$(") for argument in job.arguments)]  # $(NAME) is Kubernetes' own
    if job.places:
        command += ["--nproc", str(job.nproc), "--nnodes", str(job.nodes), "--node_rank", f"$({rank})"]
        command += ["--master_addr", address, "--master_port", str(cluster.master_port)]
    limits = {"nvidia.com/gpu": job.nproc} if job.gpus else {}
    limits |= {"cpu": cluster.cpus} if cluster.cpus else {}
    limits |= {"memory": kubernetes.memory} if kubernetes.memory else {}
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}}
    ]
    volumes += [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in kubernetes.volumes]
    mounts = {"shared-memory": "/dev/shm", **kubernetes.volumes}
    main: dict[str, Any] = {"name": container, "image": kubernetes.image, "command": command}
    if kubernetes.working_dir:
        main["workingDir"] = kubernetes.working_dir
    main |= {
        "env": [{"name": variable.name, "value": variable.value} for variable in job.environment],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
    }
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": kubernetes.stop_seconds}
    if kubernetes.node_selector:
        pod["nodeSelector"] = dict(kubernetes.node_selector)
    return {**pod, "containers": [main], "volumes": volumes}


def _on_exit(action: str, code: int) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"containerName": "seedling", "operator": "In", "values": [code]}}


def _metadata(cluster: ClusterConfig, name: str) -> dict[str, Any]:
    queue = cluster.kubernetes.queue
    labels = {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    return {"name": name, "namespace": cluster.kubernetes.namespace, **labels}


def _label(name: str) -> str:
    """Return a name as Kubernetes takes it: lower case, digits and dashes."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
