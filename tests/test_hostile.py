"""Thousands of mutated files: each is read, or refused by an error of ours; nothing is run, nothing written."""

from __future__ import annotations

import hashlib
import json
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_cases import seeded
from plan_cases import random_request
from test_data import python2_pickle
from test_profile import synthetic_profile

from anabranch.runtime.branch_state import entries
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.config import Config
from anabranch.runtime.config_file import load_config
from anabranch.runtime.data.cifar_pickle import read_pickle
from anabranch.runtime.errors import CheckpointError, ConfigError, DataError
from anabranch.runtime.keyed_state import network_tensors
from anabranch.runtime.manifest import FileRecord, Manifest, versions
from anabranch.runtime.parallel_network import branch_tensors
from anabranch.runtime.pending_save import host_copies
from anabranch.runtime.profile_file import write_profile
from anabranch.runtime.report import write_report
from anabranch.runtime.storage import LocalFolder
from anabranch.schedulers.cluster_file import read_cluster
from anabranch.schedulers.cost_file import read_costs, write_costs
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.plan_reader import read_plan

TOKENS = [
    "NaN", "-Infinity", "inf", "nan", "1e999", "-1", "0", "9" * 5000, "0x" + "f" * 6000, "1000000000000", "1e15",
    "null", "true", "[]", "{}", '""', '"../../etc/passwd"', '"/etc/passwd"', '"\\u0000"', "\x00", "2020-01-01", "'",
    "[" * 3000, '{"a":' * 3000, "a." * 3000 + "b = 1", "[[blocks]]", "\n[mesh]\n", '"', "=", "\\", "\U0001f600",
    '"</script><script>alert(1)</script>"', '{"__class__": "os.system"}',
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 10**12, 10**400, 1e308, float("nan"), float("inf"), -0.5, "", "x", "../../etc/passwd", "\x00",
    [], {}, [[]], [None], {"": None}, [1, 2, 3], "<script>", "9" * 400,
]  # fmt: skip
FORGED = b"cos\nsystem\n(S'touch ran'\ntR."


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to three random changes."""
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(content) + 1), rng.randrange(6)
        end = min(len(content), at + rng.randint(1, 40))
        if kind == 0 and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + content[end:]
        elif kind == 3:
            content = content[:end] + content[at:]
        elif kind == 4:
            content = content[:at] + bytes(rng.randrange(256) for _ in range(8)) + content[end:]
        else:
            content = content[:at] + rng.choice(TOKENS).encode() + content[rng.choice((at, end)) :]
    return content


def mutated_words(content: bytes, rng: random.Random) -> bytes:
    """One value of a TOML or JSON text replaced."""
    words = list(re.finditer(rb'"[^"\n]*"|(?<=[=:,\[ ])\s*-?[\d.]+(?:e-?\d+)?|true|false', content))
    word = rng.choice(words)
    return content[: word.start()] + rng.choice(TOKENS).encode() + content[word.end() :]


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """One node of plain data replaced, removed or added."""
    if (
        (isinstance(tree, dict | list) and not tree)
        or not isinstance(tree, dict | list)
        or rng.random() < 0.05
    ):
        return rng.choice(VALUES)
    copy = tree.copy()
    key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    action = rng.random()
    if action < 0.1:
        del copy[key]
    elif action < 0.2 and isinstance(copy, dict):
        copy[rng.choice(["", "x", "__class__", "../x"])] = copy[key]
    elif action < 0.2 and isinstance(copy, list):
        copy.insert(key, rng.choice(VALUES))
    else:
        copy[key] = mutated_tree(tree[key], rng)
    return copy


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@dataclass
class Kind:
    """A kind of file: where it lies, how it is read, the errors that are ours."""

    path: Path
    read: Callable[[], object]
    errors: tuple[type[Exception], ...]
    rewrite: Callable[[bytes, random.Random], bytes] = mutated_words

    def try_all(self, count: int) -> int:
        """Tries `count` mutations; how many were refused."""
        good, rng, refused = self.path.read_bytes(), random.Random(0), 0
        self.read()
        for number in range(count):
            content = (mutated_bytes if number % 2 else self.rewrite)(good, rng)
            self.path.write_bytes(content)
            try:
                self.read()
            except self.errors as caught:
                refused += 1
                message = str(caught)
                assert 0 < len(message.strip()) < 20_000, (len(message), content[:200])
            except Exception as error:
                (self.path.parent / "failed").write_bytes(content)
                raise AssertionError(
                    f"{type(error).__name__}: {error} at {number}: {content[:300]!r}"
                ) from error
        self.path.write_bytes(good)
        self.read()
        return refused


def trees(make: Callable[[Any], bytes] = as_json) -> Callable[[bytes, random.Random], bytes]:
    return lambda content, rng: make(mutated_tree(json.loads(content), rng))


def signed(tree: Any) -> bytes:
    """A manifest as someone writes it who can compute hashes."""
    if isinstance(tree, dict):
        tree.pop("sha256", None)
        tree["sha256"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    return as_json(tree)


def checkpoint(folder: Path) -> Path:
    network = seeded("tuple")
    store = LocalFolder(folder / "checkpoints/step-000001")
    store.make()
    parts = entries(network_tensors(network), branch_tensors(network))
    tensors = host_copies({f"network/{key}": part for key, part in parts.items()})
    name = "rank-0000.safetensors"
    files = {name: FileRecord(*store.write_tensors(name, tensors))}
    keys = dict.fromkeys(tensors, name)
    Manifest({"step": 1}, Config().to_toml(), "", "SGD", files, keys, versions()).write(store)
    return store.path


def manifests(folder: Path) -> Kind:
    path, network = checkpoint(folder), seeded("tuple")
    return Kind(
        path / "manifest.json",
        lambda: Checkpoint.open(path).load_into(network, None),
        (CheckpointError,),
        trees(signed),
    )


def safetensors(folder: Path) -> Kind:
    """With a manifest that has their right size and hash."""
    path, network = checkpoint(folder), seeded("tuple")
    file, manifest = path / "rank-0000.safetensors", json.loads((path / "manifest.json").read_text())

    def read() -> None:
        content = file.read_bytes()
        record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / "manifest.json").write_bytes(signed({**manifest, "files": {file.name: record}}))
        Checkpoint.open(path).load_into(network, None)

    def header(content: bytes, rng: random.Random) -> bytes:
        size = int.from_bytes(content[:8], "little")
        changed = as_json(mutated_tree(json.loads(content[8 : 8 + size]), rng))
        return len(changed).to_bytes(8, "little") + changed + content[8 + size :]

    return Kind(file, read, (CheckpointError,), header)


def plans(folder: Path) -> Kind:
    path = folder / "plan.toml"
    path.write_text(
        '[mesh]\ndata = 1\nbranch = 2\ndevices = [["a:0", "a:1"]]\nsamples = [1]\nscheduler = "even"\n[[blocks]]\n'
        'match = "stage1.*"\nsplit = "sample"\n[[blocks]]\nmatch = "stage2.*"\nsplit = "branch"\ncounts = [2, 2]\n'
    )
    return Kind(path, lambda: read_plan(path), (PlanError,))


def configs(folder: Path) -> Kind:
    path = folder / "config.toml"
    path.write_text(Config().to_toml())
    return Kind(path, lambda: load_config(str(path)), (ConfigError,))


def profiles(folder: Path) -> Kind:
    path = folder / "profile.json"
    write_profile(synthetic_profile(num_steps=4, num_ranks=2, num_blocks=2), path)
    return Kind(path, lambda: write_report([folder]), (ConfigError,), trees())


def costs(folder: Path) -> Kind:
    path, found = folder / "costs.json", random_request(random.Random(0)).costs
    assert found is not None
    write_costs(found, path)
    return Kind(path, lambda: read_costs(path), (PlanError,), trees())


def clusters(folder: Path) -> Kind:
    path = folder / "cluster.toml"
    path.write_text(
        '[[hosts]]\nname = "a"\nkind = "H200"\ndevices = 8\nmemory_gb = 141\n[[hosts]]\nname = "b"\nkind = "H200"\n'
        'speeds = [1.0, 0.5]\n[links]\nlocal = "300GB/s"\nacross = "200Gbit/s"\n'
        "local_latency_s = 1e-5\noccupancy = 0.0\n"
    )
    return Kind(path, lambda: read_cluster(path), (PlanError,))


def pickles(folder: Path) -> Kind:
    path = folder / "data_batch_1"
    path.write_bytes(python2_pickle(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), [1, 2, 3], "labels"))

    def read() -> None:
        x, labels = read_pickle(path.read_bytes(), "labels", str(path))
        assert x.shape[1:] == (3, 32, 32)
        assert labels.dtype == torch.int64

    def forged(content: bytes, rng: random.Random) -> bytes:
        at = rng.randrange(len(content))
        return content[:at] + FORGED + content[at:]

    return Kind(path, read, (DataError,), forged)


KINDS = {
    "manifests": (manifests, 250), "safetensors": (safetensors, 250), "plans": (plans, 350), "configs": (configs, 250),
    "profiles": (profiles, 150), "costs": (costs, 250), "clusters": (clusters, 300), "pickles": (pickles, 250),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_mutated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    make, count = KINDS[kind]
    folder = tmp_path / "here/inside"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    subject = make(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = subject.try_all(count)
    assert refused > count // 4
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["inside"]
    assert not list(tmp_path.rglob("ran"))
