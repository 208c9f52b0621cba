"""Secrets stay out of what a run writes and prints, wherever they come from."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from anabranch.benchmarks.fault_runs import CONFIG, python_path
from anabranch.runtime.redact import redacted, shielded

USER, QUERY = "hunter2-in-user", "hunter2-in-query"
SECRETS = {
    "RAY_AUTH_TOKEN": "hunter2" * 8,
    "AWS_SECRET_ACCESS_KEY": "hunter2/in+an/AWS+key",
    "SHOP_DB_PASSWORD": "hunter2-password",
}
# The third step's exception holds them all; the second one's warning too.
LEAK = """
import os, warnings
import torch

from anabranch.benchmarks.injector import patterns

calls = 0

def data(source):
    return patterns()

def loss(output, target):
    global calls
    calls += 1
    said = f"https://me:hunter2-in-user@host/x?token=hunter2-in-query {dict(os.environ)}"
    if calls == 2:
        warnings.warn(said)
    if calls == 3:
        raise ValueError(said)
    return torch.nn.functional.cross_entropy(output, target)
"""


@pytest.mark.parametrize("launcher", [pytest.param("ray", marks=pytest.mark.optin), "none"])
def test_a_run_that_fails_tells_no_secret(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "leak.py").write_text(LEAK)
    (tmp_path / "run.toml").write_text(CONFIG)
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "anabranch.runtime", "train", "run.toml", "--json", "--run-dir", str(folder),
        "--train.loss", "leak:loss", "--mesh.shape", "1x1", "--launch.launcher", launcher, "--launch.max-failures", "0",
        "--data.name", "leak:data", "--data.options", json.dumps({"source": f"https://me:{USER}@host/x?token={QUERY}"}),
    ]  # fmt: skip
    environ = {
        **os.environ,
        **SECRETS,
        "PYTHONPATH": f"{python_path()}{os.pathsep}{tmp_path}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "https://***@host/x?token=***" in done.stderr
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"config.toml", "run.json", "metrics.jsonl"} <= {Path(name).name for name in files}
    written = {**files, "stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    assert [name for name, content in written.items() if b"hunter2" in content] == []


def test_what_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, "RAY_AUTH_TOKEN_PATH": "/home/me/token", "PASSWORD": "short"}.items():
        monkeypatch.setenv(name, value)
    assert redacted("Authorization: Bearer abcdefgh.ijk") == "Authorization: Bearer ***"
    assert redacted({"a": [f"x{SECRETS['SHOP_DB_PASSWORD']}y"], "b": 1}) == {"a": ["x***y"], "b": 1}
    for plain in ("/home/me/token", "short", "the bearer of it", "RAY_AUTH_TOKEN or ~/.ray/auth_token"):
        assert redacted(plain) == plain


def test_the_shield_is_a_stream() -> None:
    out = io.StringIO()
    with redirect_stdout(out), shielded():
        print("s3://me:secret@bucket")
        sys.stdout.writelines(["a\n", "https://h/?sig=secret\n"])
        assert not sys.stdout.isatty()
    assert out.getvalue() == "s3://***@bucket\na\nhttps://h/?sig=***\n"
