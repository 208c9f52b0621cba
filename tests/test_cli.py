"""The command line: flags, environment, output and exit codes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import anabranch.runtime
from anabranch.blocks.errors import ModelError
from anabranch.cluster.errors import ClusterError, WorkerError
from anabranch.runtime.cli import Call, main, parse
from anabranch.runtime.config import Config
from anabranch.runtime.config_file import load_config, shipped_configs
from anabranch.runtime.interrupts import Interrupted, Terminated
from anabranch.schedulers.errors import PlanError

MODULE = [sys.executable, "-m", "anabranch.runtime"]


def run(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    return subprocess.run([*MODULE, *argv], capture_output=True, text=True, env=os.environ | env, check=False)


def config_of(*argv: str) -> Config:
    call = parse(["train", *argv])
    assert call is not None
    config = call.arguments["config"]
    assert isinstance(config, Config)
    return config


@pytest.mark.parametrize("verb", [[], ["train"], ["verify"], ["eval"], ["models"], ["export"]])
def test_help(verb: list[str]) -> None:
    outcome = run(*verb, "--help")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "Usage: anabranch" in outcome.stdout


def test_wrong_input_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys; from anabranch.runtime.cli import main; assert main(['train', '--epochs', '0']) == 2;"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def test_help_shows_sections_units_and_defaults() -> None:
    text = run("train", "--help", COLUMNS="200").stdout
    for part in ("─ optimizer ─", "--train.epochs --epochs INT", "Seconds after which", "[default: 600.0]"):
        assert part in text


def test_version() -> None:
    outcome = run("--version")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("0.")


def test_list() -> None:
    lines = run("train", "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_configs())
    outcome = run("train", "--list", "--json")
    assert outcome.stdout.count("\n") == 1
    assert {c["name"]: c["description"] for c in json.loads(outcome.stdout)["configs"]} == shipped_configs()
    assert "digits" in outcome.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["train", "--epoch", "3"], "Unknown option: --epoch. Did you mean --epochs?"),
        (["eval", "r", "--crops", "9.6"], 'Invalid value for --crops: "9.6" is not a whole number'),
        (["verify", "--steps", "1.5"], 'Invalid value for --steps: "1.5" is not a whole number'),
        (["train", "--epochs", "1.5"], 'Invalid value for --epochs: "1.5" is not a whole number'),
        (
            ["train", "--lr-schedule.milestones", "1", "x"],
            '--lr-schedule.milestones: "x" is not a whole number',
        ),
        (["train", "--optimizer.lr", "fast"], 'unable to convert "fast" into float'),
        (["train", "--launcher", "rai"], 'Did you mean "ray"?'),
        (["train", "--epochs"], "requires an argument"),
        (["train", "--epochs", "1", "--epochs", "2"], "--epochs"),
        (["train", "--epochs", "0"], "train.epochs is 0: it must lie in [1, inf)"),
        (["train", "--model.options", "depth"], "--model.options"),
        (["train", "digitz"], "did you mean digits?"),
        (["train", "digits", "more"], "more"),
        (["eval"], "RUN"),
    ],
)
def test_wrong_input_ends_in_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert main([*argv[:1], "--json", *argv[1:]]) == 2
    out, _ = capsys.readouterr()
    assert json.loads(out)["error"] in err


def test_wrong_input_in_a_process(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[train]\nepoch = 3\n")
    outcome = run("train", str(path))
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr == f"error: {path}:2: unknown key train.epoch; did you mean train.epochs?\n"


def test_defaults() -> None:
    assert config_of() == load_config("digits")
    assert config_of("cifar10-multi-resnet-20-k4") == load_config("cifar10-multi-resnet-20-k4")
    assert config_of("--data", "digits") == load_config("digits")
    # digits is a recipe for the digits: with another dataset it is what --help says
    assert config_of("--data", "mine:data") == Config.from_dict({"data": {"name": "mine:data"}})
    assert config_of("cifar10-multi-resnet-20-k4", "--data", "cifar100").data.augment == "flip_crop"


def test_short_flags_are_the_fields() -> None:
    short = config_of(
        *["--num-workers", "4", "--mesh", "2x2", "--plan", "p.toml", "--launcher", "env", "--run-dir", "r"],
        *[
            "--resume",
            "auto",
            "--epochs",
            "3",
            "--seed",
            "5",
            "--model",
            "pre_resnet_110",
            "--data",
            "cifar10",
        ],
        *["--loss", "my.mod:fn"],
    )
    long = config_of(
        *[
            "--mesh.num-workers",
            "4",
            "--mesh.shape",
            "2x2",
            "--mesh.plan",
            "p.toml",
            "--launch.launcher",
            "env",
        ],
        *["--launch.run-dir", "r", "--checkpoint.resume", "auto", "--train.epochs", "3", "--train.seed", "5"],
        *["--model.name", "pre_resnet_110", "--data.name", "cifar10", "--train.loss", "my.mod:fn"],
    )
    assert short == long
    assert (short.mesh.shape, short.checkpoint.resume, short.model.options) == ("2x2", "auto", {})


def test_options_are_read_as_toml() -> None:
    config = config_of(
        *["--model", "multi_resnet", "--model.options.depth", "20", "--model.options.num-branches=3"],
        *["--model.options.blocks_per_stage", "[5, 4, 5]", "--model.options.preact", "shared"],
        *["--data.options.noise", "0.5", "--data.options.flag", "true"],
    )
    assert config.model.options == {
        "depth": 20,
        "num_branches": 3,
        "blocks_per_stage": [5, 4, 5],
        "preact": "shared",
    }
    assert config.data.options == {"noise": 0.5, "flag": True}
    assert config_of("--model.options.depth", "20").model.options == {"depth": 20, "num_branches": 4}


def test_lists_and_switches() -> None:
    config = config_of(
        *[
            "--lr-schedule.milestones",
            "81",
            "122",
            "--optimizer.betas",
            "0.8",
            "0.9",
            "--optimizer.no-nesterov",
        ]
    )
    assert config.lr_schedule.milestones == (81, 122)
    assert (config.optimizer.betas, config.optimizer.nesterov) == ((0.8, 0.9), False)


def test_flags_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[train]\nepochs = 2\nseed = 2\nbatch_size = 32\n")
    monkeypatch.setenv("ANABRANCH_TRAIN_EPOCHS", "3")
    monkeypatch.setenv("ANABRANCH_TRAIN_SEED", "3")
    monkeypatch.setenv("ANABRANCH_LR_SCHEDULE_MILESTONES", "1 2")
    monkeypatch.setenv("ANABRANCH_MODEL_OPTIONS_NUM_BRANCHES", "6")
    config = config_of(str(path), "--epochs", "4")
    assert (config.train.epochs, config.train.seed, config.train.batch_size) == (4, 3, 32)
    assert config.lr_schedule.milestones == (1, 2)
    assert config.model.options == {"depth": 14, "num_branches": 6}
    assert config.mesh == Config().mesh


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "ANABRANCH_TRAIN_EPOCHS",
            "x",
            'Invalid value for ANABRANCH_TRAIN_EPOCHS: "x" is not a whole number',
        ),
        ("ANABRANCH_TRAIN_BATCHSIZE", "3", "did you mean ANABRANCH_TRAIN_BATCH_SIZE?"),
    ],
)
def test_a_wrong_environment(
    variable: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["train"]) == 2
    assert message in capsys.readouterr().err


def test_verbs() -> None:
    assert parse(["eval", "runs/a", "--json"]) == Call(
        "evaluate", {"run": Path("runs/a"), "checkpoint": "", "crops": 0, "data_path": ""}, json=True
    )
    assert parse(["models", "--quiet"]) == Call("models", {}, quiet=True)
    exported = {"run": Path("r"), "output": Path("r/model.safetensors"), "checkpoint": "", "data_path": ""}
    assert parse(["export", "r"]) == Call("export", exported)
    assert parse(["export", "r", "--output", "x"]) == Call("export", exported | {"output": Path("x")})
    verify = parse(["verify", "--float64", "--steps", "2", "--plan", "data"])
    assert verify is not None
    assert verify.function == "verify"
    assert (verify.arguments["steps"], verify.arguments["float64"]) == (2, True)
    assert verify.arguments["config"].mesh.plan == "data"
    assert verify.arguments["tolerance"] == 1e-9
    loose = parse(["verify", "--tolerance", "0.5"])
    assert loose is not None
    assert loose.arguments["tolerance"] == 0.5
    for flags, steps, tolerance in (
        ([], 1, 0.25),
        (["--mesh.wire", "bf16"], 1, 0.8),
        (["--train.precision", "bf16"], 1, 0.8),
        (["--train.precision", "tf32"], 1, 0.8),
        (["--float64"], 3, 1e-9),
        (["--float64", "--train.precision", "bf16"], 3, 1e-9),
        (["--float64", "--mesh.wire", "bf16"], 1, 0.8),
    ):
        call = parse(["verify", *flags])
        assert call is not None
        assert (call.arguments["steps"], call.arguments["tolerance"]) == (steps, tolerance), flags


def commands_that(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    """Put commands in place of the real ones that say a word to people and end as told."""

    def command(*, console: Console, **arguments: Any) -> Any:
        console.print("for people")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    verbs = ("train", "verify", "evaluate", "models", "export", "status", "stop")
    stub = SimpleNamespace(**dict.fromkeys(verbs, command))
    monkeypatch.setattr(anabranch.runtime, "commands", stub, raising=False)


def test_output_for_people_and_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands_that(monkeypatch, {"test_accuracy": 0.5, "run_dir": Path("runs/a")})
    assert main(["train"]) == 0
    assert tuple(capsys.readouterr()) == ("for people\n", "")
    assert main(["train", "--quiet"]) == 0
    assert tuple(capsys.readouterr()) == ("", "")
    assert main(["train", "--json"]) == 0
    assert tuple(capsys.readouterr()) == ('{"test_accuracy": 0.5, "run_dir": "runs/a"}\n', "for people\n")
    commands_that(monkeypatch, None)
    assert main(["train", "--json", "--quiet"]) == 0
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize(("difference", "exit_code"), [(1e-10, 0), (0.25, 0), (0.26, 1), (float("nan"), 1)])
def test_verify_fails_above_its_tolerance(
    difference: float, exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands_that(monkeypatch, {"max_relative_difference": difference, "worst": "stage1.block1"})
    assert main(["verify", "--json"]) == exit_code
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # JSON has no NaN
    assert told["max_relative_difference"] == (difference if math.isfinite(difference) else None)


@pytest.mark.parametrize("verb", [["status"], ["stop", "--wait"]])
def test_a_run_that_failed_ends_in_1(verb: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for state, exit_code in {"failed": 1, "dead": 1, "stopped": 0, "finished": 0, "running": 0}.items():
        commands_that(monkeypatch, {"state": state})
        assert main([*verb, "runs/a"]) == exit_code


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (PlanError("a plan"), 2),
        (ModelError("a model"), 2),
        (ClusterError("a cluster"), 2),
        (WorkerError("rank 1 on a: out of memory", {1: "out of memory"}), 1),
        (Interrupted("interrupted at step 3: go on with --resume runs/a", "runs/a"), 130),
        (Terminated("terminated at step 3", "runs/a"), 143),
        (KeyboardInterrupt(), 130),
        (RuntimeError("our own mistake"), 1),
    ],
)
def test_exit_codes(
    error: BaseException, exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands_that(monkeypatch, error)
    assert main(["train", "--json"]) == exit_code
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert str(error) in said["error"]
    assert f"error: {said['error']}" in err
    assert ("Traceback" in err) == (type(error) is RuntimeError)
    assert said.get("run_dir") == getattr(error, "run_dir", None)


def test_package_names_are_lazy() -> None:
    code = "import sys, anabranch.runtime as r; r.Config(); assert not {'torch', 'ray', 'cyclopts'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute nothing"):
        anabranch.runtime.nothing  # noqa: B018
