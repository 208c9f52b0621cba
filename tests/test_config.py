"""The configuration: layers, types, ranges, files, and what is said when one is wrong."""

import pickle
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.blocks import build
from anabranch.runtime import config as config_module
from anabranch.runtime import gross_config
from anabranch.runtime.config import SECTIONS, Config, DataConfig, ModelConfig
from anabranch.runtime.config_file import line_of, load_config, load_resumed, shipped_configs
from anabranch.runtime.config_rules import RANGES, mesh_axes
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.schema import FieldError, field_docs

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(text)
        return path

    return to_file


def test_every_field_is_documented_and_every_number_has_a_range() -> None:
    docs = field_docs(config_module, gross_config)
    for section, kind in SECTIONS.items():
        for name, hint in get_type_hints(kind).items():
            assert docs[kind.__name__, name], f"{section}.{name} has no text under it"
            numeric = hint in (int, float) or hint in (tuple[int, ...], tuple[float, float])
            assert numeric == (f"{section}.{name}" in RANGES)


def test_the_default_run_is_the_shipped_digits() -> None:
    data = {"augment": "affine", "crop_padding": 1}
    assert load_config("digits") == Config.from_dict(
        {"data": data, "optimizer": {"weight_decay": 2e-3}, "train": {"label_smoothing": 0.1}}
    )
    assert Config().model == ModelConfig("multi_resnet", {"depth": 14, "num_branches": 4})


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations(name: str) -> None:
    config = load_config(name)
    assert config.data.name == name.split("-")[0]
    assert shipped_configs()[name]
    if name == "digits" or config.model.name not in ("multi_resnet", "pre_resnet"):
        return
    network = name.split("-", 1)[1]
    options = config.model.options
    k, width = options.get("num_branches"), options.get("width")
    parts = [config.model.name.replace("_", "-"), str(options["depth"])]
    assert network == "-".join(parts + [f"k{k}"] * bool(k) + [f"w{width}"] * bool(width))
    assert config.mesh.plan == ("even" if config.model.name == "multi_resnet" else "data")
    assert config.train.bn_batch_size in (0, config.train.batch_size)
    assert re.search(r"Tables? (I|II|III|V)\b", shipped_configs()[name])


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("cifar10-pre-resnet-24", 292_954),
        ("cifar10-multi-resnet-8-k4", 297_146),
        ("cifar10-multi-resnet-30-k4", 1_778_362),
        ("cifar10-multi-resnet-14-k10", 1_713_018),
    ],
)
def test_shipped_options_build_the_papers_networks(name: str, num_params: int) -> None:
    model = load_config(name).model
    assert sum(p.numel() for p in build(model.name, **model.options).parameters()) == num_params


@pytest.mark.parametrize("name", shipped_configs())
def test_toml_reads_back_identically(name: str, write: Write) -> None:
    config = load_config(name)
    path = write(config.to_toml())
    assert load_config(str(path)) == config
    assert load_config(str(path)).to_toml() == path.read_text()


@given(
    lr=st.floats(min_value=1e-30, max_value=1e30),
    milestones=st.lists(st.integers(1, 10**6), unique=True).map(sorted),
    text=st.text(),
    option=st.one_of(
        st.integers(-(2**60), 2**60), st.booleans(), st.lists(st.integers(0, 9)), st.text(max_size=5)
    ),
)
def test_any_value_survives_toml(lr: float, milestones: list[int], text: str, option: Any) -> None:
    config = Config.from_dict(
        {
            "optimizer": {"lr": lr},
            "lr_schedule": {"milestones": milestones},
            "data": {"path": text},
            "model": {"options": {"x": option}},
        }
    )
    assert Config.from_dict(tomllib.loads(config.to_toml())) == config


def test_layers_lie_over_each_other() -> None:
    file = {"train": {"epochs": 3, "seed": 1}, "model": {"options": {"depth": 8}}}
    config = Config.from_dict(file, {"train": {"epochs": 4}, "model": {"options": {"width": 2}}})
    assert (config.train.epochs, config.train.seed, config.train.batch_size) == (
        4,
        1,
        Config().train.batch_size,
    )
    assert config.model == ModelConfig("multi_resnet", {"depth": 8, "num_branches": 4, "width": 2})


@pytest.mark.parametrize("name", ["pre_resnet_110", "multi_resnet"])
def test_a_named_model_drops_the_options_below(name: str) -> None:
    assert Config.from_dict({"model": {"name": name}}).model.options == {}
    above = {"model": {"name": name, "options": {"depth": 20}}}
    assert Config.from_dict({"model": {"options": {"width": 2}}}, above).model.options == {"depth": 20}


def test_a_named_dataset_drops_the_options_and_path_below() -> None:
    """What a dataset does not own stays: how it is augmented."""
    below = {
        "data": {"name": "a:b", "path": "/b", "options": {"x": 1}, "augment": "flip_crop", "eval_crops": 10}
    }
    data = Config.from_dict(below, {"data": {"name": "cifar100"}}).data
    assert (data.name, data.path, data.options, data.augment) == ("cifar100", "", {}, "flip_crop")
    assert data.eval_crops == 10
    assert Config.from_dict({"data": {"name": "cifar100"}}).data == DataConfig("cifar100")


def test_types_are_checked_and_widened() -> None:
    config = Config.from_dict({"optimizer": {"lr": 1, "betas": [0, 1]}, "lr_schedule": {"milestones": [1]}})
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.betas == (0.0, 1.0)
    assert config.lr_schedule.milestones == (1,)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            "[train]\nseed = 1\nbatchsize = 3\n",
            3,
            "unknown key train.batchsize; did you mean train.batch_size?",
        ),
        ("epochs = 3\n", 1, "unknown key epochs; did you mean train.epochs?"),
        ("[optimizer]\nepochs = 3\n", 2, "unknown key optimizer.epochs; did you mean train.epochs?"),
        ("\n[trian]\nepochs = 3\n", 2, "unknown key trian; did you mean train?"),
        ("[train]\n# epochs = 1\n\nepochs = 1.5\n", 4, "train.epochs is 1.5: it must be a whole number"),
        ("train = { seed = 1, epochs = true }\n", 1, "train.epochs is True: it must be a whole number"),
        ("train.seed = 1\ntrain.loss = 3\n", 2, "train.loss is 3: it must be text in quotes"),
        ("[optimizer]\nlr = '0.1'\n", 2, "optimizer.lr is '0.1': it must be a number"),
        ("[optimizer]\nlr = true\n", 2, "optimizer.lr is True: it must be a number"),
        ("[optimizer]\nnesterov = 1\n", 2, "optimizer.nesterov is 1: it must be true or false"),
        ("[optimizer]\nbetas = [0.9]\n", 2, "optimizer.betas is [0.9]: it must be a list of 2 numbers"),
        (
            "[lr_schedule]\nmilestones = 3\n",
            2,
            "lr_schedule.milestones is 3: it must be a list of whole numbers",
        ),
        ("[train]\nprecision = 'fp23'\n", 2, "must be one of fp32, tf32, bf16, fp64; did you mean fp32?"),
        ("model = 'resnet'\n", 1, "model is 'resnet': it must be a table, [model]"),
        ("[model]\noptions = 3\n", 2, "model.options is 3: it must be a table"),
        ("[train]\nepochs = 0\n", 2, "train.epochs is 0: it must lie in [1, inf)"),
        ("[train]\n\nepochs = \n", 3, "not valid TOML: Invalid value"),
        ("[train]\nepochs = ", 2, "not valid TOML: Invalid value"),
        ("[train\n", 1, "not valid TOML"),
    ],
)
def test_a_wrong_file_is_told_by_file_and_line(text: str, line: int, message: str, write: Write) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)


def test_a_flag_that_is_wrong_is_not_blamed_on_the_file(write: Write) -> None:
    path = write("[train]\nbatch_size = 32\nepochs = 2\n")
    with pytest.raises(ConfigError, match=r"^train\.epochs is 0"):
        load_config(str(path), {"train": {"epochs": 0}})
    assert load_config(str(path), {"train": {"epochs": 5}}).train.epochs == 5


def test_a_flag_can_mend_what_the_file_alone_has_wrong(write: Write) -> None:
    path = write("[train]\nbn_batch_size = 128\n")
    with pytest.raises(
        ConfigError, match=r"my.toml:2: train.bn_batch_size is 128, more than train.batch_size, 64"
    ):
        load_config(str(path))
    assert load_config(str(path), {"train": {"batch_size": 256}}).train.bn_batch_size == 128


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"batch_size": 0}, "train.batch_size is 0: it must lie in [1, inf)"),
        ("optimizer", {"lr": 0.0}, "optimizer.lr is 0.0: it must lie in (0, inf)"),
        ("optimizer", {"lr": float("nan")}, "optimizer.lr is nan"),
        ("optimizer", {"lr": float("inf")}, "optimizer.lr is inf"),
        ("optimizer", {"betas": (0.9, 1.0)}, "optimizer.betas is 1.0: it must lie in [0, 1)"),
        ("optimizer", {"momentum": 0.0}, "optimizer.nesterov is true, and optimizer.momentum is 0"),
        ("lr_schedule", {"name": "step"}, "lr_schedule.milestones is empty"),
        ("lr_schedule", {"milestones": (5, 3)}, "lr_schedule.milestones is [5, 3]: the epochs must ascend"),
        ("lr_schedule", {"final_factor": 1.1}, "must lie in [0, 1]"),
        ("train", {"bn_batch_size": 65}, "train.bn_batch_size is 65, more than train.batch_size, 64"),
        ("train", {"accumulation": 65}, "train.accumulation is 65, more than train.batch_size, 64"),
        ("train", {"loss": "mse"}, "your own"),
        ("data", {"name": "cifar"}, "did you mean cifar10?"),
        ("launch", {"run_dir": "s3://bucket/run"}, "it must be a folder; give the URL as checkpoint.url"),
        ("data", {"name": "my.data:make", "augment": "area_crop"}, "data.augment is area_crop, which is for"),
        ("mesh", {"shape": "2x"}, 'mesh.shape is "2x": it must be data x branch'),
        ("mesh", {"shape": "0x2"}, 'mesh.shape is "0x2"'),
        ("mesh", {"shape": "2x2", "num_workers": 3}, "mesh.shape 2x2 has 4 workers, mesh.num_workers is 3"),
    ],
)
def test_values_out_of_range_or_at_odds(section: str, values: dict[str, Any], message: str) -> None:
    config = Config()
    config = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(FieldError, match=re.escape(message)):
        config.check()


def test_one_process_runs_one_worker() -> None:
    Config.from_dict({"launch": {"launcher": "none"}}).check()
    with pytest.raises(
        FieldError, match=r"launch.launcher is none, which runs one worker, and \[mesh\] asks for 2"
    ):
        Config.from_dict({"launch": {"launcher": "none"}, "mesh": {"shape": "1x2"}}).check()


def test_own_factories_pass_the_checks() -> None:
    own = {
        "data": {"name": "my.data:make"},
        "train": {"loss": "my.losses:focal"},
        "model": {"name": "my.nets:Net"},
    }
    Config.from_dict(own).check()


def test_what_is_no_file_and_no_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r'no configuration is called "digit"; did you mean digits\?.*--list'
    ):
        load_config("digit")
    for missing in ("digits.toml", "./digits", str(tmp_path)):
        with pytest.raises(ConfigError, match="no such file"):
            load_config(missing)
    binary = tmp_path / "x.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(str(binary))


def test_a_file_needs_no_suffix_if_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("[train]\nepochs = 7\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("mine").train.epochs == 7


def test_lines_of_keys() -> None:
    text = '[a]\nx = 1\n["b"]\n"x" = 2\n[a.options]\ny = 3\n[c]\nd.e = 4\n'
    assert [line_of(text, key) for key in ("a", "a.x", "b.x", "a.options", "c.d", "a.y")] == [
        1,
        2,
        4,
        5,
        8,
        None,
    ]


def test_mesh_axes() -> None:
    assert mesh_axes("2x16") == (2, 16)
    assert [mesh_axes(shape) for shape in ("", "2", "2x", "x2", "2x2x2", "0x1", "-1x2", "2 x 2")] == [
        None
    ] * 8


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(FieldError("train.epochs is 0", "train.epochs")))
    assert (str(error), error.key) == ("train.epochs is 0", "train.epochs")


def test_a_run_that_goes_on_keeps_how_blocks_run(tmp_path: Path) -> None:
    """A mesh, number of workers or plan that is given replaces all three; other fields of [mesh] replace themselves."""
    own = {"num_workers": 2, "shape": "1x2", "plan": "data", "execution": "looped"}
    (tmp_path / "config.toml").write_text(Config.from_dict({"mesh": own}).to_toml())
    (tmp_path / "plan.toml").write_text("")
    plan = str(tmp_path / "plan.toml")
    for changed, expected in (
        ({}, ("fp32", "looped", "1x2", 2, plan)),
        ({"wire": "bf16"}, ("bf16", "looped", "1x2", 2, plan)),
        ({"shape": "2x1"}, ("fp32", "looped", "2x1", 0, "even")),
        ({"plan": "auto", "execution": "fused"}, ("fp32", "fused", "", 0, "auto")),
    ):
        mesh = load_resumed(tmp_path, {"mesh": changed} if changed else {}).mesh
        assert (mesh.wire, mesh.execution, mesh.shape, mesh.num_workers, mesh.plan) == expected
