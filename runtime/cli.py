"""The command line: `anabranch VERB`. It parses, calls `anabranch.runtime.commands`, and turns the outcome into output.

Every field of the configuration is a flag (`--train.batch-size 64`) and an environment variable (its name in capitals
after ANABRANCH_, "_" for every "." and "-": ANABRANCH_TRAIN_BATCH_SIZE=64). Flags win over the environment, that over
the file, that over the defaults. What needs torch is imported when a command runs.

Standard output is for the result: with `--json` its last line is one object, and the words for people go to standard
error. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Env

from anabranch.runtime.config_file import require_section, shipped_configs
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.flags import (
    ENV_PREFIX,
    config_from_flags,
    whole_numbers,
    with_config_flags,
    with_gross_flags,
)
from anabranch.runtime.interrupts import Interrupted, Stopped, Terminated
from anabranch.runtime.numerics import is_exact, tolerance_of
from anabranch.runtime.plain_json import plain_json
from anabranch.runtime.redact import redacted, shielded

if TYPE_CHECKING:
    from rich.console import Console


def version() -> str:
    """The installed version, or the checkout's."""
    from importlib import metadata

    try:
        return metadata.version("anabranch")
    except metadata.PackageNotFoundError:
        return "0.1.0+checkout"


app = App(
    name="anabranch",
    help="Train networks whose blocks are sums of branches, on several devices.",
    help_epilogue=(
        "Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted, 143 terminated.\n\n"
        "Every flag is also an environment variable: --train.batch-size 64 is ANABRANCH_TRAIN_BATCH_SIZE=64."
    ),
    version=version,
    config=Env(ENV_PREFIX, command=False, show=False),
    help_format="plaintext",
)


# By name: runtime may not import what builds on it, and help need not load it.
app.command(
    "anabranch.benchmarks.__main__:app",
    name="bench",
    help="Measure one case on this machine: table5 (the paper's), scaling, collectives, ...",
)


@dataclass(frozen=True)
class Call:
    """A command line, parsed: which function of `anabranch.runtime.commands`, with what."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    json: bool = False
    quiet: bool = False


WHOLE = Parameter(converter=whole_numbers)
ConfigName = Annotated[
    str,
    Parameter(
        name="CONFIG",
        help="TOML file, or the name of a shipped configuration (`anabranch train --list`). Without it: digits, or "
        "with another --data the defaults below, or the configuration of the run that --resume names.",
    ),
]
RunFolder = Annotated[Path, Parameter(name="RUN", help="The run's folder.")]
DataPath = Annotated[
    str,
    Parameter(name="--data.path", help="Folder of the dataset's files here; empty: where the run had it."),
]
Checkpoint = Annotated[str, Parameter(help="Name of a checkpoint in RUN/checkpoints; empty: the newest.")]
ListConfigs = Annotated[bool, Parameter(help="Show the shipped configurations and end.", negative=())]
Explain = Annotated[bool, Parameter(help="Say for each stage when which split pays.", negative=())]
Float64 = Annotated[bool, Parameter(help="Compute in float64.", negative=())]
Json = Annotated[
    bool,
    Parameter(help="Print the result as one JSON object on the last line of standard output.", negative=()),
]
Png = Annotated[bool, Parameter(help="Also write the pictures as PNG (matplotlib).", negative=())]
Quiet = Annotated[bool, Parameter(help="Print nothing but errors, and the result of --json.", negative=())]


@app.command
@with_config_flags
def train(
    config: ConfigName = "",
    /,
    *,
    list: ListConfigs = False,
    json: Json = False,
    quiet: Quiet = False,
    **given: Any,
) -> Call:
    """Train a network; without CONFIG, a Multi-ResNet on the built-in digits with two local workers.

    JSON: test_accuracy, train_seconds, median_step_s, run_dir, unreadable, failures, mesh_changes.
    """
    if list:
        return Call("list_configs", {}, json, quiet)
    return Call("train", {"config": config_from_flags(config, given)}, json, quiet)


@app.command
@with_config_flags
def verify(
    config: ConfigName = "",
    /,
    *,
    steps: Annotated[int | None, WHOLE] = None,
    float64: Float64 = False,
    tolerance: float | None = None,
    json: Json = False,
    quiet: Quiet = False,
    **given: Any,
) -> Call:
    """Compare this plan with the one-device network; exit code 1 and the worst block where they differ.

    JSON: max_relative_difference, worst.

    Parameters
    ----------
    steps
        Training steps to compare; default 3 with --float64, else 1: what is rounded grows from step to step.
    tolerance
        Largest relative difference that passes; default 1e-9 with --float64, 0.8 in bf16 (--train.precision or
        --mesh.wire) and tf32, else 0.25. A gradient counted twice is 1 off; what is less shows with --float64.
    """
    made = config_from_flags(config, given)
    numbers = "fp64" if float64 else made.train.precision, made.mesh.wire
    if tolerance is None:
        tolerance = tolerance_of(*numbers)
    if steps is None:
        steps = 3 if is_exact(*numbers) else 1
    arguments = {"config": made, "steps": steps, "float64": float64, "tolerance": tolerance}
    return Call("verify", arguments, json, quiet)


@app.command
@with_config_flags
def profile(
    config: ConfigName = "",
    /,
    *,
    steps: Annotated[int, WHOLE] = 20,
    json: Json = False,
    quiet: Quiet = False,
    **given: Any,
) -> Call:
    """Measure what each step spends, per block and rank: tables, and profile.json, trace.json.gz (Perfetto) and
    report.html in the run's folder.

    JSON: step_s, stragglers, suggestion, unattributed, overhead, run_dir, profile, trace, report.

    Parameters
    ----------
    steps
        Training steps to measure, after some to warm up.
    """
    return Call("profile", {"config": config_from_flags(config, given), "steps": steps}, json, quiet)


@app.command
def report(
    *runs: RunFolder, output: Path | None = None, png: Png = False, json: Json = False, quiet: Quiet = False
) -> Call:
    """Make one self-contained HTML page of a run's metrics and profile, or compare several runs.

    JSON: output, runs, notes, pictures.

    Parameters
    ----------
    output
        File to write; default report.html in the first RUN.
    """
    if not runs:
        raise ConfigError("report needs a run's folder: anabranch report RUN [RUN …]")
    return Call("report", {"runs": [*runs], "output": output, "png": png}, json, quiet)


@app.command
@with_gross_flags
def gross(config: ConfigName = "", /, *, json: Json = False, quiet: Quiet = False, **given: Any) -> Call:
    """Train a network (or take a run's: --gross.full RUN), decompose it, train all group sizes at once, evaluate every
    choice of them, and tune the best ones alone (GroSS); without CONFIG, digits-gross.

    A run that was stopped or killed goes on: give the same CONFIG and --run-dir, or --resume RUN.

    JSON: full (macs, test_accuracy), configurations (a list of {sizes, macs, validation_accuracy}, cheapest first),
    limits ({baseline, macs, winners}), tuned ({sizes, test_accuracies}), gross (the settings), num_validation,
    num_test, table (Markdown), plot (PNG; empty without matplotlib), run_dir.
    """
    if config and not any(key.startswith("gross__") for key in given):
        require_section(config, "gross")
    return Call(
        "gross",
        {"config": config_from_flags(config, given, default="digits-gross", made_plan=False)},
        json,
        quiet,
    )


@app.command
@with_config_flags
def plan(
    config: ConfigName = "",
    /,
    *,
    devices: str = "",
    interconnect: str = "",
    cluster: str = "",
    explain: Explain = False,
    output: Path | None = None,
    json: Json = False,
    quiet: Quiet = False,
    **given: Any,
) -> Call:
    """Find the best placement of the network's branches: measured on this cluster, or predicted for another one.

    Without --devices or --cluster the workers are started, blocks and links measured (once: costs are kept), and the
    best plans timed against plain data parallelism. `train --plan auto` does that before training.

    JSON: plan (TOML), predicted_step_s, measured_step_s, data_parallel_step_s, search_s, memory_bytes (by rank), label,
    gap, plans (each with its prediction and measurement), costs (the file of what was measured), traffic, explain.

    Parameters
    ----------
    devices
        Plan for hosts x devices x kind, as in 4x8xH200 (or 8xA100: one host); from data sheets.
    interconnect
        Bandwidth out of a host, as in 200Gbit/s.
    cluster
        TOML file of hosts and links to plan for.
    output
        Plan file to write, replaced if it is there. Default: plan.toml, which is not replaced.
    """
    arguments = {
        "config": config_from_flags(config, given),
        "devices": devices,
        "interconnect": interconnect,
        "cluster": cluster,
        "explain": explain,
        "output": output,
    }
    return Call("plan", arguments, json, quiet)


@app.command(name="eval")
def evaluate(
    run: RunFolder,
    /,
    *,
    checkpoint: Checkpoint = "",
    crops: Annotated[int, WHOLE] = 0,
    data_path: DataPath = "",
    json: Json = False,
    quiet: Quiet = False,
) -> Call:
    """Measure the accuracy of a run's checkpoint on its test samples.

    JSON: test_accuracy, test_loss, checkpoint, crops, unreadable.

    Parameters
    ----------
    crops
        Crops of each sample whose predictions are averaged, 1 or 10; 0: as the run was configured.
    """
    arguments = {"run": run, "checkpoint": checkpoint, "crops": crops, "data_path": data_path}
    return Call("evaluate", arguments, json, quiet)


@app.command
@with_config_flags
def doctor(config: ConfigName = "", /, *, json: Json = False, quiet: Quiet = False, **given: Any) -> Call:
    """Say what would stop a run on this cluster: versions, GPUs, network, clocks, the run's folder; exit code 1 where
    something would.

    JSON: ok, checks (a list of {name, host, ok, found, remedy}).
    """
    return Call("doctor", {"config": config_from_flags(config, given)}, json, quiet)


@app.command
def status(run: RunFolder, /, *, json: Json = False, quiet: Quiet = False) -> Call:
    """Say where a run stands, from any terminal that sees its folder; exit code 1 where it failed or died.

    JSON: state (running, finished, stopped, failed, dead), alive, what, phase, step, num_steps, left_s, metrics,
    workers, pid, host, address, started_at, heard_at, silent_s, checkpoint, error, run_dir.
    """
    return Call("status", {"run": run}, json, quiet)


@app.command
def stop(
    run: RunFolder,
    /,
    *,
    wait: Annotated[bool, Parameter(help="Until it has ended.", negative=())] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> Call:
    """Ask a run to write a checkpoint and end (its exit code is then 143), from any terminal that sees its folder; exit
    code 1 where, with --wait, it failed or died instead.

    JSON: as `anabranch status`.
    """
    return Call("stop", {"run": run, "wait": wait}, json, quiet)


@app.command
def models(*, json: Json = False, quiet: Quiet = False) -> Call:
    """List the ready networks with their parameters, multiply-adds and branches.

    JSON: models, a list of {name, params, macs, num_branches}.
    """
    return Call("models", {}, json, quiet)


@app.command
def export(
    run: RunFolder,
    /,
    *,
    output: Path | None = None,
    checkpoint: Checkpoint = "",
    data_path: DataPath = "",
    json: Json = False,
    quiet: Quiet = False,
) -> Call:
    """Write a checkpoint as a plain state_dict for one-device PyTorch (safetensors). The dataset is asked for the
    images' channels and classes.

    JSON: output.

    Parameters
    ----------
    output
        File to write; default RUN/model.safetensors.
    """
    output = output or run / "model.safetensors"
    arguments = {"run": run, "output": output, "checkpoint": checkpoint, "data_path": data_path}
    return Call("export", arguments, json, quiet)


def parse(argv: Sequence[str]) -> Call | None:
    """The call that the arguments ask for; None where help or the version was asked for, and printed.

    Raises CycloptsError (an unknown flag, a value of another type) or ConfigError.
    """
    command, bound, _ = app.parse_args(argv, exit_on_error=False, print_error=False)
    call = command(*bound.args, **bound.kwargs)
    return call if isinstance(call, Call) else None


def list_configs(console: Console) -> dict[str, Any]:
    """Print the shipped configurations, one a line."""
    configs = shipped_configs()
    width = max(map(len, configs))
    for name, description in configs.items():
        console.print(f"{name:{width}}  {description}", highlight=False, soft_wrap=True, markup=False)
    return {"configs": [{"name": name, "description": text} for name, text in configs.items()]}


def run(call: Call) -> tuple[dict[str, Any] | None, int]:
    """Do what was asked: the result (None on all ranks but the first) and the exit code."""
    from rich.console import Console

    console = Console(stderr=call.json, quiet=call.quiet)
    if call.function == "list_configs":
        return list_configs(console), 0
    from anabranch.runtime import commands

    result: dict[str, Any] | None = getattr(commands, call.function)(**call.arguments, console=console)
    if call.function == "verify" and result is not None:
        # Written so that a difference of NaN fails.
        return result, 0 if result["max_relative_difference"] <= call.arguments["tolerance"] else 1
    if call.function == "doctor" and result is not None:
        return result, 0 if result["ok"] else 1
    if call.function in ("status", "stop") and result is not None:
        return result, 1 if result["state"] in ("failed", "dead") else 0
    return result, 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code; no secret is printed."""
    with shielded():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    as_json = "--json" in argv
    try:
        call = parse(argv)
        if call is None:
            return 0
        result, exit_code = run(call)
        if call.json and result is not None:
            _print_json(result)
        return exit_code
    except (Exception, KeyboardInterrupt) as error:
        failure, exit_code = _failure(error)
    print(f"error: {failure['error']}", file=sys.stderr)
    if as_json:
        _print_json(failure)
    return exit_code


def _failure(error: BaseException) -> tuple[dict[str, Any], int]:
    """What to print of an error, and its exit code; an unforeseen one has its traceback printed."""
    if isinstance(error, CycloptsError | ConfigError):
        return {"error": str(error)}, 2
    if isinstance(error, Stopped):
        return {"error": str(error), "run_dir": error.run_dir}, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return {"error": "interrupted"}, 130
    # Not at the top: these packages import torch, and wrong input is told before that.
    from anabranch.blocks.errors import ModelError
    from anabranch.cluster.errors import ClusterError, StoppedError, WorkerError
    from anabranch.schedulers.errors import PlanError

    if isinstance(error, StoppedError):
        return {"error": str(error)}, (Interrupted if error.reason == "interrupt" else Terminated).exit_code
    wrong_input = (ConfigError, ModelError, ClusterError, PlanError)
    if isinstance(error, wrong_input):
        return {"error": str(error)}, 2
    if isinstance(error, WorkerError) and isinstance(error.__cause__, wrong_input):
        return {"error": str(error.__cause__)}, 2
    if isinstance(error, WorkerError):
        return {"error": str(error)}, 1
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {error}"}, 1


def _print_json(result: dict[str, Any]) -> None:
    sys.stdout.flush()
    print(plain_json(redacted(result), default=str), flush=True)
