"""The template of the jobs in Kubernetes, deployments/kubernetes/work-pool.json."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from uuid import uuid4

from kubernetes_validate import validate
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

TEMPLATE = Path(__file__).parents[2] / "deployments" / "kubernetes" / "work-pool.json"
VERSION = "1.31"


def test_prefect_makes_jobs_of_it_that_kubernetes_takes(prefect_server: str) -> None:
    """Filled in as Prefect's own worker does, it is a job, with a GPU where one is asked for."""
    assert prefect_server  # is asked for variables and blocks in the template
    template = json.loads((TEMPLATE).read_text())
    given = {
        "name": "retrain",
        "command": "prefect flow-run execute",
        "gpus": "1",
        "env": {"A": "b"},
    }
    made = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, given))
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="retrain"))
    manifest = made.job_manifest
    validate(manifest, VERSION, strict=True)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "A", "value": "b"} in container["env"]
    assert "{{" not in json.dumps(manifest)
