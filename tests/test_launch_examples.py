"""The example files for other people's clusters, and the addresses that are answered with a line to type."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # Ray's own dependency
from privileges import may_mount

import anabranch.cluster
from anabranch.runtime.cli import main, parse
from anabranch.runtime.job_line import check_address, job_line, outlive_note

EXAMPLES = Path(next(iter(anabranch.cluster.__path__)), "examples")
SCRIPTS = ["job.sh", "slurm.sbatch"]

# KubeRay's RayJob (ray.io/v1), as far as an example goes: field → type, or the fields below it.
POD: dict[str, Any] = {
    "spec": {
        "containers": [
            {"name": str, "image": str, "resources": {"limits": dict, "requests": dict}, "volumeMounts": list}
        ],
        "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    }
}
RAY_JOB: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "headGroupSpec": {"rayStartParams": dict, "template": POD},
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "rayStartParams": dict,
                    "template": POD,
                }
            ],
        },
    },
}


def unlike(found: Any, schema: Any, at: str = "") -> list[str]:
    """Where a document is not as its schema says."""
    if isinstance(schema, dict):
        if not isinstance(found, dict):
            return [f"{at} is no mapping"]
        strange = [f"{at}.{key} is unknown" for key in found if key not in schema]
        return strange + [
            text for key in found if key in schema for text in unlike(found[key], schema[key], f"{at}.{key}")
        ]
    if isinstance(schema, list):
        return [text for i, item in enumerate(found) for text in unlike(item, schema[0], f"{at}[{i}]")]
    return [] if isinstance(found, schema) else [f"{at} is no {schema.__name__}"]


def test_ray_job() -> None:
    job = yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())
    assert not unlike(job, RAY_JOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    job["spec"]["rayClusterSpec"]["workerGroups"] = []
    job["spec"]["backoffLimit"] = "3"
    assert unlike(job, RAY_JOB) == [
        ".spec.backoffLimit is no int",
        ".spec.rayClusterSpec.workerGroups is unknown",
    ]


def test_virtual_machines() -> None:
    from jsonschema import ValidationError  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((EXAMPLES / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(ValidationError):
        validate_config({**config, "head_node": {}})
    for start in ("head", "worker"):
        assert all(
            "RAY_AUTH_MODE=token" in c for c in config[f"{start}_start_ray_commands"] if "ray start" in c
        )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", EXAMPLES / name], check=True)


@pytest.mark.parametrize("name", [*SCRIPTS, "rayjob.yaml"])
def test_their_commands_are_ours(name: str) -> None:
    text = (EXAMPLES / name).read_text().replace("\\\n", " ")
    commands = re.findall(r"anabranch (?:train|status|stop) .*", re.sub(r"\$\w+", "/shared", text))
    assert commands
    for command in commands:
        assert parse(shlex.split(command)[1:]), command


@pytest.mark.parametrize(
    ("address", "argv", "line"),
    [
        ("ray://head:10001", ["train", "digits", "--address", "ray://head:10001"], "http://head:8265 "),
        ("https://head:443", ["train", "digits", "--launch.address=https://head:443"], "https://head:443 "),
        ("head:6379", ["--address", "head:6379", "train", "digits"], "http://head:8265 "),
        ("auto", ["train", "--address", "auto", "digits"], "auto "),
    ],
)
def test_line_to_type(address: str, argv: list[str], line: str) -> None:
    wanted = f"ray job submit --address {line}--working-dir . -- anabranch train digits --address auto"
    assert job_line(address, argv) == wanted
    submitted = shlex.split(wanted.partition(" -- anabranch ")[2])
    call = parse(submitted)
    assert call is not None
    assert call.arguments["config"].launch.address == "auto"


def test_addresses_from_outside_are_answered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["anabranch", "train", "--address", "ray://head:10001", "--epochs", "2"])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.endswith("http://head:8265 --working-dir . -- anabranch train --epochs 2 --address auto\n")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ValueError, match="http://head:8265 is for clients"):
        check_address("", [])


def test_who_is_told_that_the_run_ends_with_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts one on a cluster that was there before, but for jobs and what Slurm started."""
    for name in ("SLURM_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    dashboards = {
        "auto": "auto",
        "127.0.0.1:6379": "http://127.0.0.1:8265",
        "localhost:6379": "http://localhost:8265",
        "head:6379": "http://head:8265",
    }
    for address, dashboard in dashboards.items():
        assert f"ray job submit --address {dashboard} " in outlive_note(address, ["train"])
    assert not outlive_note("", ["train"]), "a cluster of its own"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "ray job submit --address http://head:8265 " in outlive_note("", ["train"])
    for name in ("SLURM_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "{}")
            assert not any(outlive_note(address, ["train"]) for address in ("", *dashboards))


# ---------------------------------------------------------------------------------------------------------------------
# Really run, in namespaces of their own: symmetric-run begins with a look for other Rays and ends with `ray stop`,
# which stops all that it sees. Ray's ports are free there, too.

TRAIN = "-m anabranch.runtime train --train.max-steps 3 --num-workers 2 --address auto"
SYMMETRIC = (
    "ray symmetric-run --address 127.0.0.1:6379 --num-cpus 2 -- {python} {train} --run-dir {folder}/run"
)
# No node has anabranch: it is in the folder that goes along.
JOB = """
ray start --head --node-ip-address 127.0.0.1 --num-cpus 2 --dashboard-port 8265 >/dev/null
ray job submit --address http://127.0.0.1:8265 --working-dir {folder}/job -- {python} {train} --run-dir {folder}/run
echo "rc $?"
ray job list --address auto
cd {folder}/job
RAY_AUTH_TOKEN={other} {python} -m anabranch.runtime doctor --address 127.0.0.1:6379 --run-dir {folder}/run
{python} -m anabranch.runtime doctor --address 127.0.0.1:6379 --run-dir {folder}/run
"""


def alone(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script where no other process, port or Ray is seen; all that it started ends with it."""
    for package in ("blocks", "cluster", "runtime", "schedulers"):
        source = Path(next(iter(import_module(f"anabranch.{package}").__path__)))
        shutil.copytree(source, folder / "job" / "anabranch" / package)
    temp = Path(f"/tmp/ab{os.getpid()}")
    temp.mkdir()
    values = {"python": sys.executable, "train": TRAIN, "folder": folder, "other": "1" * 64}
    command = f"ip link set lo up\n{script.format(**values)}"
    try:
        return subprocess.run(
            [
                "unshare",
                "--pid",
                "--net",
                "--mount",
                "--fork",
                "--mount-proc",
                "--kill-child",
                "bash",
                "-c",
                command,
            ],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            cwd=folder / ("job" if script == SYMMETRIC else ""),
            env={
                **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "RAY_TMPDIR": str(temp),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": "0" * 64,
                "OMP_NUM_THREADS": "1",
            },
        )
    finally:
        subprocess.run(["rm", "-rf", str(temp)], check=True)


@pytest.mark.optin
@pytest.mark.skipif(not may_mount(), reason="namespaces need root")
@pytest.mark.parametrize("script", [SYMMETRIC, JOB], ids=["symmetric-run", "job"])
def test_really_run(script: str, tmp_path: Path) -> None:
    done = alone(script, tmp_path)
    said = done.stdout + done.stderr
    assert "3 steps in" in said, said
    assert re.search(r"rc 0|Running command on head node", said), said
    assert (tmp_path / "run" / "checkpoints").is_dir()
    if script == JOB:
        assert "SUCCEEDED" in said, "the dashboard is found by Ray"
        assert "this run ends with this terminal" not in said, "a job outlives it"
        assert "cannot be used" in said, "with another token"
        assert re.search(r"all \d+ checks passed", said), said
    assert socket.gethostname() in (tmp_path / "run" / "run.json").read_text()
