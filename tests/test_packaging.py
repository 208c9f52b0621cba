"""The wheel: everything in it that should be, and a training run from it in an otherwise empty environment.

An editable install hides a file that the wheel lacks, so nothing here looks at the checkout after the build.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "blocks", "cluster", "runtime", "schedulers")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(command: list[str | Path], cwd: Path) -> str:
    """The command's standard output. It sees no checkout: another folder, no PYTHONPATH."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: a build leaves folders behind that would leak into the next."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source], cwd=target)
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    """Every module, and every data file in a folder meant for them, whatever sub-folder it is in."""
    wanted = {
        f"anabranch/{file.relative_to(ROOT).as_posix()}"
        for name in PACKAGES
        for file in (ROOT / name).rglob("*")
        if file.is_file()
        and (
            file.suffix == ".py"
            or file.name == "py.typed"
            or (file.parent.name == "configs" and file.suffix == ".toml")
            or file.parent.name in {"files", "templates", "examples"}
        )
    }
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert "anabranch/runtime/data/files/optdigits.bin.gz" in wanted
    assert wanted - inside == set()
    assert {f"anabranch/{name}/py.typed" for name in PACKAGES} <= inside
    assert {name.split("/")[0] for name in inside if ".dist-info/" not in name} == {"anabranch"}


def link_requirements(wheel: Path, site: Path) -> None:
    """What the wheel requires, what that requires, and nothing else: links to what the tests run with."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        wanted = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    asked = [(Requirement(line), "") for line in wanted]
    seen: set[tuple[str, str]] = set()
    while asked:
        requirement, extra = asked.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        found = distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), requirement
        for entry in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(Path(str(found.locate_file(entry))))
        for extra in {"", *requirement.extras} - {e for name, e in seen if name == requirement.name}:
            seen.add((requirement.name, extra))
            asked += [(Requirement(line), extra) for line in found.requires or ()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "dependencies",
    [
        "linked",
        # a minute from local files, longer over a network; `make test` itself begins with their installation
        pytest.param("installed", marks=[pytest.mark.slow, pytest.mark.optin]),
    ],
)
def test_wheel_trains_in_an_empty_environment(wheel: Path, tmp_path: Path, dependencies: str) -> None:
    """A new environment, the wheel with its dependencies, no checkout in sight: the default network trains."""
    environment = tmp_path / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", environment], cwd=tmp_path)
    python = environment / "bin/python"
    options: list[str | Path] = ["-c", ROOT / "constraints.txt"]
    if dependencies == "linked":
        (site,) = environment.glob("lib/python*/site-packages")
        link_requirements(wheel, site)
        options = ["--no-deps"]
    run([*PIP, "--python", python, "install", "--no-compile", *options, wheel], cwd=tmp_path)
    run([*PIP, "--python", python, "check"], cwd=tmp_path)
    where = run([python, "-c", "import anabranch.runtime as r; print(r.__file__)"], cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)

    output = run(
        [
            environment / "bin/anabranch",
            "train",
            "--train.epochs",
            "1",
            "--launch.launcher",
            "none",
            "--json",
        ],
        cwd=tmp_path,
    )
    result = json.loads(output.splitlines()[-1])
    assert result["test_accuracy"] > 0.1  # better than chance
    assert (tmp_path / result["run_dir"] / "config.toml").exists()
