"""Datasets, their loading and the way of their samples: real files in the official formats, real worker processes."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anabranch.blocks import build
from anabranch.runtime import Config, Trainer
from anabranch.runtime.data.augment import normalise
from anabranch.runtime.data.batches import Batch, Wanted, batches, epoch_order
from anabranch.runtime.data.cifar import CIFAR10, CIFAR100, Archive, Cifar, load_cifar
from anabranch.runtime.data.cifar_pickle import read_pickle
from anabranch.runtime.data.load import load_data
from anabranch.runtime.data.sources import BatchSource, ImageSet
from anabranch.runtime.data.user import import_object
from anabranch.runtime.errors import ConfigError, DataError


def everything(source: BatchSource, epoch: int = 0) -> tuple[Tensor, Tensor]:
    return source.fetch(torch.arange(len(source)), epoch)


# ---------------------------------------------------------------------------------------------- digits, synthetic


def test_digits_are_the_real_ones() -> None:
    """The file is the one its note describes; 1,437 + 360 images in file order, normalised by the training part."""
    file = resources.files("anabranch.runtime.data") / "files" / "optdigits.bin.gz"
    assert len(file.read_bytes()) < 50_000
    raw = gzip.decompress(file.read_bytes())
    assert hashlib.md5(raw, usedforsecurity=False).hexdigest() == "be583856edd1e11d1a2507250e220b5b"
    bundle = load_data("digits")
    x, labels = everything(bundle.train)
    x_test, labels_test = everything(bundle.test)
    assert x.shape == (1437, 1, 8, 8)
    assert x_test.shape == (360, 1, 8, 8)
    assert x[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]  # a 0, as the UCI file begins
    assert labels[:10].tolist() == list(range(10))
    assert x.max() == 16
    assert torch.bincount(torch.cat([labels, labels_test])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    ]  # fmt: skip
    z = normalise(x, bundle.normalisation, torch.float64)
    assert abs(z.mean()) < 1e-5
    assert abs(z.std(correction=0) - 1) < 1e-5
    assert str(bundle) == "digits: 1,437 + 360 images 1x8x8, 10 classes"


def test_synthetic_is_labelled_learnable_and_a_function_of_the_seed() -> None:
    """It says SYNTHETIC; another seed is another dataset; the nearest class mean of the training set tells classes."""
    options = {"num_classes": 5, "num_samples": 101, "image_size": 6, "in_channels": 2}
    bundle = load_data("synthetic", options=options, seed=3)
    assert bundle.synthetic
    assert str(bundle) == (
        "synthetic (SYNTHETIC: made-up patterns, no real data): 101 + 21 images 2x6x6, 5 classes"
    )
    x, labels = everything(bundle.train)
    x_test, labels_test = everything(bundle.test)
    again, other = (load_data("synthetic", options=options, seed=seed) for seed in (3, 4))
    assert torch.equal(everything(again.train)[0], x)
    assert torch.equal(everything(again.test)[0], x_test)
    assert not torch.equal(everything(other.train)[0], x)
    means = torch.stack([x[labels == k].double().mean(0) for k in range(5)]).flatten(1)
    assert torch.equal(torch.cdist(x_test.double().flatten(1), means).argmin(1), labels_test)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar11"}, "did you mean cifar1"),
        ({"name": "imagenet"}, "use digits, cifar10, cifar100, synthetic or package.module:factory"),
        ({"name": "synthetic", "options": {"num_class": 3}}, "did you mean num_classes?"),
        (
            {"name": "synthetic", "options": {"num_classes": 0}},
            "num_classes = 0: give a whole number above 0",
        ),
        (
            {"name": "digits", "options": {"seed": 1}},
            "digits has no option seed (data.options): it takes none",
        ),
        ({"name": "digits", "path": "/tmp"}, "leave it out"),
        (
            {"name": "cifar10"},
            "cifar10 needs data.path: a local copy of cifar-10-binary.tar.gz (md5 c32a1d4a",
        ),
        ({"name": "cifar100", "path": "/no/such"}, "data.path /no/such does not exist"),
        ({"name": "a.b:c", "path": "x"}, "give a.b:c its path in data.options"),
    ],
)
def test_wrong_requests_name_the_remedy(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------- CIFAR


def python2_pickle(x: Tensor, labels: list[int], key: str, fortran: bool = False) -> bytes:
    """A batch file as Python 2's cPickle wrote them: protocol 2, byte strings, numpy's reconstruction."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    rows = x.flatten(1)
    raw = bytes((rows.T if fortran else rows).contiguous().flatten().tolist())
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + text("b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R" + b"(K\x03" + text("|") + b"NNN"
    dtype += number(-1) * 2 + b"K\x00tb"
    array += b"(K\x01" + number(rows.shape[0]) + number(rows.shape[1]) + b"\x86" + dtype
    array += (b"\x88" if fortran else b"\x89") + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    numbers = b"](" + b"".join(map(number, labels)) + b"e"
    items = text("batch_label") + text("batch 1") + text("data") + array + text(key) + numbers
    return b"\x80\x02}(" + items + b"u."


def small(cifar: Cifar, version: str, folder: Path) -> tuple[Cifar, Path, list[Tensor], list[Tensor]]:
    """An archive of the official form with 7 images a file, and the table that describes it."""
    archive = next(archive for archive in cifar.archives if archive.version == version)
    generator = torch.Generator().manual_seed(len(cifar.name))
    images, labels, files = [], [], {}
    for member in archive.members:
        x = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=generator)
        fine = torch.randint(0, cifar.num_classes, (7,), generator=generator)
        images.append(x)
        labels.append(fine)
        if version == "python":
            files[member.name] = python2_pickle(x, fine.tolist(), cifar.label_key)
        else:
            coarse = [torch.full((7, 1), 19, dtype=torch.uint8)] * (cifar.num_labels - 1)
            records = torch.cat([*coarse, fine[:, None].to(torch.uint8), x.flatten(1)], 1)
            files[member.name] = bytes(records.flatten().tolist())
    path = folder / archive.file
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"batches.meta": b"not read", **files}.items():
            info = tarfile.TarInfo(f"{archive.folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    members = [
        replace(member, num_images=7, md5=member.md5 and md5_of(files[member.name]))
        for member in archive.members
    ]
    archive = replace(archive, md5=md5_of(path.read_bytes()), train=tuple(members[:-1]), test=members[-1])
    return replace(cifar, archives=(archive,)), path, images, labels


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def unpack(path: Path) -> Path:
    with tarfile.open(path) as tar:
        tar.extractall(path.parent, filter="data")
        return path.parent / tar.getnames()[0].partition("/")[0]


VERSIONS = [(cifar, version) for cifar in (CIFAR10, CIFAR100) for version in ("binary", "python")]


@pytest.mark.parametrize(("cifar", "version"), VERSIONS, ids=lambda value: getattr(value, "name", value))
def test_cifar_from_the_archive_or_what_it_unpacks_to(cifar: Cifar, version: str, tmp_path: Path) -> None:
    """The same pixels and fine labels from the archive (renamed too), its folder, and the unpacked folder."""
    table, path, images, labels = small(cifar, version, tmp_path)

    def check(place: Path) -> None:
        bundle = load_cifar(table, str(place))
        x, y = everything(bundle.train)
        assert torch.equal(x, torch.cat(images[:-1]))
        assert torch.equal(y, torch.cat(labels[:-1]))
        assert torch.equal(everything(bundle.test)[0], images[-1])
        assert torch.equal(everything(bundle.test)[1], labels[-1])
        assert (bundle.num_classes, bundle.in_channels, bundle.image_size) == (cifar.num_classes, 3, (32, 32))

    check(path)
    check(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "an archive is read in memory"
    folder = unpack(path)
    path.rename(tmp_path / "renamed.tgz")
    check(tmp_path / "renamed.tgz")
    check(folder)
    check(tmp_path)
    folder.rename(tmp_path / "other_name")
    check(tmp_path / "other_name")


@pytest.mark.parametrize("version", ["binary", "python"])
def test_a_torn_archive_is_refused_with_both_checksums(version: str, tmp_path: Path) -> None:
    table, path, _, _ = small(CIFAR10, version, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    found, expected = md5_of(path.read_bytes()), table.archives[0].md5
    with pytest.raises(
        DataError, match=rf"{path.name} has md5 {found}, expected .*{expected}.*copy it again"
    ):
        load_cifar(table, str(tmp_path))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def spoil(file: Path) -> None:
    file.write_bytes(b"\xff" + file.read_bytes()[1:])


@pytest.mark.parametrize(
    ("version", "harm", "message"),
    [
        ("binary", cut, "has 21,510 bytes, 7 images of 3073 bytes are 21,511: it is torn"),
        ("binary", spoil, "has a label outside 0 to 9"),
        ("binary", Path.unlink, r"cannot read .*test_batch.bin: No such file"),
        ("python", cut, "test_batch has md5 .*, expected .*unpack it again"),
        ("python", Path.unlink, r"cannot read .*test_batch: No such file"),
    ],
)
def test_a_torn_folder_is_refused_and_the_file_named(
    version: str, harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    table, path, _, _ = small(CIFAR10, version, tmp_path)
    folder = unpack(path)
    harm(folder / table.archives[0].test.name)
    with pytest.raises(DataError, match=message):
        load_cifar(table, str(folder))


def test_a_folder_without_cifar_says_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()  # also a file name of cifar100's
    with pytest.raises(
        DataError, match=r"holds neither cifar-100-binary\.tar\.gz .* nor the folder cifar-100-binary"
    ):
        load_cifar(CIFAR100, str(tmp_path))


def test_pickles_run_nothing(tmp_path: Path) -> None:
    """A forged file that would write a file when unpickled is refused by the name of what it would have called."""

    class Forged:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    raw = pickle.dumps({"data": Forged(), "labels": [0]}, protocol=2)
    with pytest.raises(DataError, match=r"data_batch_1 is not a CIFAR file: .*posix\.system"):
        read_pickle(raw, "labels", "data_batch_1")
    pickle.loads(raw)
    assert (tmp_path / "ran").exists(), "the forgery works where nothing is restricted"


def test_pickled_arrays_in_either_order_are_numpys() -> None:
    """Our reading of the records agrees with what numpy makes of the same bytes."""
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for fortran in (False, True):
        raw = python2_pickle(x, [3, 1, 0, 2], "labels", fortran)
        with warnings.catch_warnings(action="ignore"):  # numpy has some about files as old as these
            theirs = pickle.loads(raw, encoding="latin1")["data"]
        assert torch.equal(torch.from_numpy(np.ascontiguousarray(theirs)).view(4, 3, 32, 32), x)
        images, labels = read_pickle(raw, "labels", "here")
        assert torch.equal(images, x)
        assert labels.tolist() == [3, 1, 0, 2]


def test_the_official_table() -> None:
    """50,000 + 10,000 images each; a checksum is 32 hexadecimal digits and no two files share one."""
    archives: list[Archive] = [*CIFAR10.archives, *CIFAR100.archives]
    assert all(sum(member.num_images for member in archive.train) == 50_000 for archive in archives)
    assert all(archive.test.num_images == 10_000 for archive in archives)
    sums = [archive.md5 for archive in archives]
    sums += [member.md5 for archive in archives for member in archive.members if archive.version == "python"]
    assert len(set(sums)) == len(sums) == 12
    assert all(len(bytes.fromhex(md5)) == 16 for md5 in sums)


# --------------------------------------------------------------------------------------------- a user's own data

NOISY = """
    import random
    import numpy as np
    import torch

    class Noisy:
        def __init__(self, num, bad=-1):
            self.num, self.bad, self.offset = num, bad, torch.rand(())

        def __len__(self):
            return self.num

        def __getitem__(self, index):
            if index == self.bad:
                raise KeyError("no such picture")
            noise = random.random() + np.random.rand() + torch.rand(2, 3, 4)
            return self.offset + noise, index % 3

    def make_dataset(num=10, bad=-1):
        return Noisy(num, bad), Noisy(4), 3

    def make_local(num=10):
        class Local(Noisy):
            pass
        return Local(num), Local(num)

    class Dying(Noisy):
        def __getitem__(self, index):
            if index == 5:
                import os
                os._exit(3)
            return super().__getitem__(index)

    def make_dying():
        return Dying(10), Noisy(4)
"""


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module into the working directory; its name, new every time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(source: str) -> str:
        names.append(f"user_module_{time.time_ns()}")
        (tmp_path / f"{names[-1]}.py").write_text(textwrap.dedent(source))
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def noisy(write_module: Callable[[str], str]) -> str:
    return write_module(NOISY)


def test_a_users_samples_depend_on_seed_epoch_and_index_alone(noisy: str) -> None:
    """Whatever is drawn before, in whatever order; the trainer's own generators are left where they were."""
    torch.manual_seed(11)
    bundle = load_data(f"{noisy}:make_dataset", seed=5)
    x, labels = everything(bundle.train, epoch=2)
    assert (bundle.num_classes, bundle.in_channels, bundle.image_size) == (3, 2, (3, 4))
    assert bundle.normalisation is None
    assert labels.tolist() == [index % 3 for index in range(10)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(12)
    before = random.random(), np.random.rand(), torch.rand(())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(12)
    again = load_data(f"{noisy}:make_dataset", seed=5)
    assert torch.equal(again.train.fetch(torch.tensor([7, 0, 3]), 2)[0], x[[7, 0, 3]])
    assert (random.random(), np.random.rand(), torch.rand(())) == before
    assert not torch.equal(everything(again.train, epoch=3)[0], x)
    assert not torch.equal(everything(load_data(f"{noisy}:make_dataset", seed=6).train, epoch=2)[0], x)
    none, no_labels = again.train.fetch(torch.empty(0, dtype=torch.int64), 0)
    assert none.shape == (0, 2, 3, 4)
    assert (none.dtype, no_labels.dtype) == (torch.float32, torch.int64)


def test_loader_workers_make_the_same_samples_in_order(noisy: str) -> None:
    """Processes, kept from epoch to epoch, make what this process makes; their errors arrive whole; they end."""
    here = load_data(f"{noisy}:make_dataset", options={"num": 11, "bad": 9})
    there = load_data(f"{noisy}:make_dataset", options={"num": 11, "bad": 9}, loader_workers=2)
    assert not here.train.in_background
    assert there.train.in_background
    plan = [
        torch.tensor([8, 1, 5]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([0]),
        torch.tensor([10, 2]),
    ]
    for epoch in (0, 1):
        wanted = [Wanted(ids, epoch) for ids in plan]
        for ours, theirs in zip(batches(here.train, wanted), batches(there.train, wanted), strict=True):
            for part, same in zip(ours, theirs, strict=True):
                assert torch.equal(part, same)
    with pytest.raises(DataError) as caught:
        there.train.fetch(torch.tensor([0, 9]), 0)
    assert f"{noisy}:make_dataset, train[9] raised KeyError:" in str(caught.value)
    assert f'{noisy}.py", line 15, in __getitem__\n    raise KeyError("no such picture")' in str(caught.value)
    assert "anabranch" not in str(caught.value)
    there.train.fetch(torch.tensor([0]), 0)  # the workers live on
    there.close()


def test_a_dataset_that_cannot_be_pickled_or_kills_its_worker(noisy: str) -> None:
    local = load_data(f"{noisy}:make_local", loader_workers=1)
    with pytest.raises(
        DataError, match=r"cannot be sent to loader workers: .*or set data.loader_workers = 0"
    ):
        local.train.fetch(torch.tensor([0]), 0)
    local.close()
    dying = load_data(f"{noisy}:make_dying", loader_workers=1)
    with pytest.raises(RuntimeError, match=r"make_dying, train: a loader worker died"):
        list(batches(dying.train, [Wanted(torch.tensor([1])), Wanted(torch.tensor([5]))]))
    dying.close()


def test_workers_end_with_a_trainer_that_is_killed(write_module: Callable[[str], str]) -> None:
    """Nobody closes the pool of a killed process: the worker notices by itself."""
    name = write_module("""
        import os
        import torch

        class Pid(list):
            def __getitem__(self, index):
                return torch.zeros(1, 1, 1), os.getpid()

        def make_dataset():
            return Pid([0]), Pid([0])
    """)
    script = f"""if True:
        import os, signal, torch
        from anabranch.runtime.data.load import load_data
        train = load_data("{name}:make_dataset", loader_workers=1).train
        print(int(train.fetch(torch.tensor([0]), 0)[1]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Path("pid").open("w") as output:  # a pipe would stay open as long as the worker lives
        done = subprocess.run([sys.executable, "-c", script], stdout=output, env=environment)
    assert done.returncode == -signal.SIGKILL
    pid = int(Path("pid").read_text())

    def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(ended)


def test_uint8_images_are_scaled(write_module: Callable[[str], str]) -> None:
    name = write_module("""
        import numpy as np

        class Bytes(list):
            pass

        def make_dataset():
            return Bytes([(np.full((1, 2, 2), 255, np.uint8), np.int64(4))] * 3), [(np.zeros((1, 2, 2), np.uint8), 0)]
    """)
    bundle = load_data(f"{name}:make_dataset")
    x, labels = everything(bundle.train)
    assert labels.tolist() == [4, 4, 4]
    assert bundle.num_classes is None
    assert (normalise(x, bundle.normalisation) == 1).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return 1 / 0",
            "line 4, in make_dataset\n    return 1 / 0\n           ~~^~~\nZeroDivisionError: division by zero",
        ),
        ("return [GOOD]", "returned list: return (train, test) or (train, test, num_classes)"),
        ("return [GOOD], iter([GOOD])", "test is a list_iterator: it needs __len__ and __getitem__"),
        ("return [], [GOOD]", "train is empty"),
        ("return [GOOD], [GOOD], 'ten'", "num_classes = 'ten'"),
        ("return [GOOD], [GOOD], 2", "train[0]: its label is 2: classes are 0 to 1"),
        (
            "return [GOOD], [(torch.zeros(1, 2, 3), 0)]",
            "train has images (1, 2, 2) of torch.float32, test (1, 2, 3)",
        ),
        ("return [7], [GOOD]", "train[0] is of type int: return (image tensor, label)"),
        (
            "return [(torch.zeros(2, 2), 0)], [GOOD]",
            "shape (2, 2) and type torch.float32: return (channels, ",
        ),
        (
            "return [(torch.zeros(1, 2, 2), 0.5)], [GOOD]",
            "its label tensor(0.5000) is no class: return an integer",
        ),
        ("return [(torch.zeros(1, 2, 2), -1)], [GOOD]", "its label is -1: classes are not below 0"),
    ],
)
def test_a_wrong_factory_is_told_so(write_module: Callable[[str], str], body: str, message: str) -> None:
    name = write_module(f"import torch\nGOOD = torch.zeros(1, 2, 2), 2\ndef make_dataset():\n    {body}\n")
    with pytest.raises(DataError) as caught:
        load_data(f"{name}:make_dataset")
    assert message in str(caught.value)
    assert "runtime/data" not in str(caught.value)


def test_samples_of_another_shape_are_named(write_module: Callable[[str], str]) -> None:
    name = write_module("""
        import torch

        def make_dataset():
            return [(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 2), 0)], [(torch.zeros(1, 2, 2), 0)]
    """)
    with pytest.raises(DataError, match=r"train\[1\] has shape \(1, 3, 2\) .* the first sample \(1, 2, 2\)"):
        everything(load_data(f"{name}:make_dataset").train)


def test_import_object_finds_the_working_directory(write_module: Callable[[str], str]) -> None:
    name = write_module("def make_it(): return 7")
    assert import_object(f"{name}:make_it")() == 7


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        ("", "{name}", "write it as package.module:name"),
        ("", "{name}:a b", "write it as package.module:name"),
        ("", "no_such_module.x:f", "there is no module no_such_module, neither in the working directory"),
        ("", "{name}.inner:f", "there is no module {name}.inner"),
        ("def make_model(): pass", "{name}:make_modle", "defines no make_modle: did you mean make_model?"),
        ("size = 3", "{name}:size", "size is of type int: name a function or a class"),
        (
            "\nimport no_such_thing",
            "{name}:f",
            "line 2, in <module>\n    import no_such_thing\nModuleNotFoundError: No ",
        ),
        ("def f(:\n    pass", "{name}:f", '{name}.py", line 1\n    def f(:\n'),
        ("def g():\n    raise ValueError('x')\ng()", "{name}:f", "line 3, in <module>\n    g()\n  File "),
    ],
)
def test_import_object_says_what_is_wrong(
    write_module: Callable[[str], str], source: str, spec: str, message: str
) -> None:
    name = write_module(source)
    with pytest.raises(ConfigError) as caught:
        import_object(spec.format(name=name), "model.name")
    text = str(caught.value)
    assert text.startswith(f'model.name = "{spec.format(name=name)}": ')
    assert message.format(name=name) in text
    assert "importlib" not in text
    assert "runtime/data" not in text


# ----------------------------------------------------------------------------------------- order and prefetching


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    torch.manual_seed(1)
    order = epoch_order(1000, seed=3, epoch=4)
    torch.manual_seed(2)
    assert torch.equal(epoch_order(1000, seed=3, epoch=4), order)
    assert torch.equal(order.sort()[0], torch.arange(1000))
    assert not torch.equal(epoch_order(1000, seed=3, epoch=5), order)
    assert not torch.equal(epoch_order(1000, seed=4, epoch=4), order)


class Recorded:
    """The digits, with a record of what was fetched by which thread; fetching sample `bad` fails."""

    in_background = True

    def __init__(self, bad: int = -1) -> None:
        images = load_data("digits").train
        assert isinstance(images, ImageSet)
        self.images = images
        self.bad, self.fetched, self.threads = bad, [0], {threading.current_thread()}

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        self.fetched.append(int(indices[0]))
        self.threads.add(threading.current_thread())
        if self.bad in indices:
            raise DataError(f"sample {self.bad} is bad")
        return self.images.fetch(indices, epoch)

    def close(self) -> None: ...


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_next_batch_is_made_during_the_step() -> None:
    """One batch ahead in a thread of its own, in order, with the samples' indices; the thread ends with the plan."""
    source = Recorded()
    plan = torch.split(epoch_order(40, 0, 0), 7)
    for step, batch in enumerate(batches(source, map(Wanted, plan))):
        assert torch.equal(batch.sample_ids, plan[step])
        assert torch.equal(batch.x_NCHW, source.images.images_NCHW[plan[step]])
        assert torch.equal(batch.labels, source.images.labels[plan[step]])
        ahead = min(step + 2, len(plan))
        wait_until(lambda ahead=ahead: len(source.fetched) == 1 + ahead)  # type: ignore[misc]
    assert len(source.threads) == 2
    assert not any(thread.name.startswith("anabranch-batches") for thread in threading.enumerate())


def test_batches_are_prepared_ahead_by_a_whole_step() -> None:
    """In the thread that fetches them, as many as a step has micro-batches; with what was prepared as the result."""
    source, threads = Recorded(), list[threading.Thread]()

    def prepare(wanted: Wanted, batch: Batch) -> Batch:
        threads.append(threading.current_thread())
        return batch._replace(labels=batch.labels + 100 * wanted.epoch)

    plan = [Wanted(ids, epoch) for epoch, ids in enumerate(torch.split(epoch_order(40, 0, 0), 7))]
    for index, batch in enumerate(batches(source, plan, prepare=prepare, depth=3)):
        assert torch.equal(batch.labels, source.images.labels[plan[index].sample_ids] + 100 * index)
        ahead = min(index + 4, len(plan))
        wait_until(lambda ahead=ahead: len(threads) == ahead)  # type: ignore[misc]
    assert set(threads) == source.threads - {threading.current_thread()}
    source.in_background = False
    again = list(batches(source, plan, prepare=prepare))
    assert threads[-1] is threading.current_thread()
    assert torch.equal(again[-1].labels, batch.labels)


def test_an_epochs_first_batch_is_made_in_the_step_before_it() -> None:
    """Also where a run goes on within an epoch: every epoch's order is its own, and the next step's batch is ready."""
    source = Recorded()
    config = Config.from_dict({"train": {"batch_size": 512, "epochs": 3, "max_steps": 1}})
    trainer = Trainer(
        build("multi_resnet", depth=8, num_branches=2, in_channels=1),
        replace(load_data("digits"), train=source),
        config,
    )
    trainer.fit()
    source.fetched.clear()
    orders = [torch.split(epoch_order(1437, 0, epoch), 512) for epoch in range(3)]
    wanted = [ids for order in orders for ids in order][2:8]
    steps = trainer.feed.steps(2, 8)
    for index, (step, ids, (micro_batch,)) in enumerate(steps):
        assert step == 2 + index
        assert torch.equal(ids, wanted[index])
        assert torch.equal(micro_batch.target, source.images.labels[ids])
        ahead = min(index + 2, len(wanted))
        wait_until(lambda ahead=ahead: len(source.fetched) == ahead)  # type: ignore[misc]
    assert source.fetched == [int(ids[0]) for ids in wanted]


def test_on_a_gpu_a_stream_of_its_own_prepares_and_the_steps_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams played on the CPU: copies from pinned memory and all preparation in the side stream, then an event that
    the consumer's stream waits for before it gets the batch, whose memory it also holds."""
    told, current = list[str](), threading.local()

    class Stream:
        def __init__(self, device: object = None, name: str = "side") -> None:
            self.name = name

        def record_event(self) -> str:
            told.append(f"event of {self.name}")
            return "ready"

        def wait_event(self, event: str) -> None:
            told.append(f"{self.name} waits until {event}")

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        before, current.stream = here(), stream
        yield
        current.stream = before

    def here(device: object = None) -> Stream:
        return getattr(current, "stream", Stream(name="step"))

    def pin_memory(values: Tensor) -> Tensor:
        told.append("pin")
        return values

    def to(values: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        assert device.type == "cuda"
        assert non_blocking
        told.append(f"copy in {here().name}")
        return values

    def prepare(wanted: Wanted, batch: Batch) -> Batch:
        told.append(f"prepare in {here().name}")
        return batch

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", here)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", lambda values, stream: told.append(f"{stream.name} holds"))
    (batch,) = batches(Recorded(), [Wanted(torch.arange(3))], "cuda", prepare)
    assert batch.sample_ids.tolist() == [0, 1, 2]
    made = ["pin", "copy in side"] * 3 + ["prepare in side", "event of side"]
    assert told == [*made, "step waits until ready", *["step holds"] * 3]


def test_an_error_arrives_at_its_batch() -> None:
    iterator = batches(Recorded(bad=5), map(Wanted, torch.split(torch.arange(9), 2)))
    assert [next(iterator).labels.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="sample 5 is bad"):
        next(iterator)

    def prepare(wanted: Wanted, batch: Batch) -> Batch:
        if 2 in wanted.sample_ids:
            raise DataError("cannot be prepared")
        return batch

    iterator = batches(Recorded(), map(Wanted, torch.split(torch.arange(9), 2)), prepare=prepare)
    assert next(iterator).labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="cannot be prepared"):
        next(iterator)


def test_closing_early_ends_the_thread() -> None:
    source = Recorded()
    iterator = batches(source, map(Wanted, torch.split(torch.arange(100), 1)))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert source.fetched[1:] in ([0], [0, 1])
    assert not any(thread.name.startswith("anabranch-batches") for thread in threading.enumerate())
