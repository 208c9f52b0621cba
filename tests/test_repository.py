"""What the repository promises of itself: its folders, its pinned versions, a command line that starts quickly."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from anabranch.runtime.config_rules import TRACKERS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"benchmarks", "blocks", "cluster", "runtime", "schedulers"}
HELP_LIMIT_S = 0.5
YARDSTICK = "numbers = {i: str(i) for i in range(2_000_000)}"  # about half a second of a quiet core


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that git tracks, relative to the root: what else lies there is its user's."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to it")
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def requirements() -> Iterator[Requirement]:
    """What pyproject.toml asks for itself: to build, to run, and every extra but trackers, whose users have theirs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lists = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *(texts for name, texts in extras.items() if name not in TRACKERS),
    ]
    return (Requirement(text) for texts in lists for text in texts)


def constraints() -> dict[str, Version]:
    """constraints.txt as name -> version; anything in it but `name==version` is an error."""
    pins: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert pin, f"constraints.txt: {line!r} is not name==version"
            pins[canonicalize_name(pin[1])] = Version(pin[2])
    return pins


def test_top_level_folders(files: list[Path]) -> None:
    """No folder but the five packages and tests; dot folders aside."""
    folders = {file.parts[0] for file in files if len(file.parts) > 1}
    assert {name for name in folders if not name.startswith(".")} == PACKAGES | {"tests"}


def test_every_folder_explains_itself(files: list[Path]) -> None:
    """Documentation is the README and a README per folder."""
    assert {Path(folder, "README.md") for folder in ("", *PACKAGES, "tests")} <= set(files)


def test_typing_links_are_the_packages() -> None:
    """The links that make a checkout importable as anabranch.* are the five packages, each a typed one."""
    links = {link.name: link for link in (ROOT / ".typing/anabranch").iterdir()}
    assert links.keys() == PACKAGES
    for name, link in links.items():
        assert link.is_symlink()
        assert link.resolve() == ROOT / name
        assert (link / "py.typed").exists()


def test_blocks_know_no_process_groups() -> None:
    """Nothing in blocks/ names torch.distributed (the import contracts cannot say this of a submodule)."""
    for file in (ROOT / "blocks").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                named = [ast.unparse(node)]
            for name in named:
                assert not f"{name}.".startswith("torch.distributed."), f"{file} uses {name}"


def test_constraints_pin_what_is_asked_for() -> None:
    """Each requirement of ours has a pinned version that meets it."""
    pins = constraints()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} is not met by {name}=={pins[name]}"


def test_constraints_pin_what_is_installed() -> None:
    """Whatever our requirements bring in is installed at its pinned version, unless its parent pins it exactly."""
    pins = constraints()
    queue = list(requirements())
    seen: set[str] = set()
    wrong: dict[str, str] = {}
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        exact = any(specifier.operator == "==" for specifier in requirement.specifier)
        if str(requirement) in seen or (exact and name not in pins):
            continue
        seen.add(str(requirement))
        installed = metadata.distribution(name)
        if pins.get(name) != Version(Version(installed.version).public):
            wrong[name] = f"installed {installed.version}, pinned {pins.get(name)}"
        for child in map(Requirement, installed.requires or []):
            extras = requirement.extras or {""}
            if not child.marker or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(child)
    assert not wrong


def run_python(*arguments: str) -> tuple[set[str], float]:
    """The top-level packages that `-X importtime` reported, and the processor seconds that the program took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    return {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}, took_s


HELP = ("-m", "anabranch.runtime", "--help")


@pytest.mark.parametrize("command", [HELP, ("-m", "anabranch.runtime", "train", "--help")])
def test_help_needs_neither_torch_nor_ray(command: tuple[str, ...]) -> None:
    imported, _ = run_python("-X", "importtime", *command)
    assert "anabranch" in imported
    assert not imported & {"torch", "ray", "numpy"}


def test_the_driver_loads_torch_and_ray_when_it_starts_them() -> None:
    """They load side by side, and wrong input is told before: neither comes with what the driver is made of."""
    imported, _ = run_python(
        "-X", "importtime", "-c", "import anabranch.runtime.commands, anabranch.runtime.driver"
    )
    assert "anabranch" in imported
    assert not imported & {"torch", "ray"}


def test_help_is_quick() -> None:
    """Half a second, of the processor's time: it waits for nothing, so a quiet machine's clock shows the same.

    A busy or slow one takes longer for everything: no longer than for the yardstick, which is timed beside it.
    """
    help_s, yardstick_s = zip(
        *((run_python(*HELP)[1], run_python("-c", YARDSTICK)[1]) for _ in range(5)), strict=True
    )
    assert min(help_s) <= max(HELP_LIMIT_S, min(yardstick_s))


@pytest.mark.parametrize(
    ("found", "status", "said"),
    [
        ("", 0, "no known vulnerability (pypi)"),
        ("requests 2.19.0 CVE-2018-18074", 1, "requests 2.19.0 CVE-2018-18074"),
        ("", 1, "pypi: it was skipped\naudit: osv: it was skipped\naudit: NOTHING was audited"),
    ],
)
def test_audit_says_what_was_looked_up(tmp_path: Path, found: str, status: int, said: str) -> None:
    """Found nothing, found something, could not look: three outcomes."""
    stub = tmp_path / "pip-audit"
    stub.write_text(
        "#!/bin/sh\nset -e\necho \"$@\" | grep -q -- --strict\nwhile [ \"$1\" != --output ]; do shift; done\n"
        f"printf '%s' '{found}' > \"$2\"\necho 'it was skipped' >&2\nexit {status}\n"
    )  # fmt: skip
    stub.chmod(0o755)
    command = ["make", "-s", "-o", ".venv/audit.stamp", "audit", f"BIN={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (status == 0)
