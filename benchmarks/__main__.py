"""`python -m anabranch.benchmarks CASE`: measures one case and writes its record to benchmarks/results/."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from anabranch.runtime.flags import whole_numbers

if TYPE_CHECKING:
    from rich.console import Console

app = App(name="bench", help="Measure one case; its record goes to benchmarks/results/.")
Count = Annotated[int, Parameter(converter=whole_numbers, validator=Number(gte=1))]
FromZero = Annotated[int, Parameter(converter=whole_numbers, validator=Number(gte=0))]
Positive = Annotated[float, Parameter(validator=Number(gt=0))]
Json = Annotated[
    bool,
    Parameter(help="Print the record as one JSON object on the last line of standard output.", negative=()),
]
Quiet = Annotated[bool, Parameter(help="Print nothing but errors, and the result of --json.", negative=())]
Out = Annotated[
    Path | None,
    Parameter(help="Folder for the record; default: the checkout's benchmarks/results/, else results/."),
]


@app.command
def table5(
    *,
    rows: str = "",
    rounds: Count = 9,
    steps: Count = 1,
    precision: Literal["fp32", "bf16", "both"] = "fp32",
    workers: Count = 2,
    variants: str = "",
    fold: Count = 1,
    plan_budget_s: Positive = 20.0,
    compiled: Annotated[bool, Parameter(name="--compile", negative=())] = False,
    predict: Annotated[bool, Parameter(negative=())] = False,
    resume: Annotated[bool, Parameter(negative=())] = False,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Table V of Multi-Residual Networks: deeper pre-resnets under torch DDP against Multi-ResNets under ours.

    JSON: rows, a list of {batch, num_branches, precision, variant (a-f, d_shared, f_shared), label (measured or
    predicted), samples_s, median_s, speed_up over b with speed_up_interval_95, images_per_s, peak_memory_bytes,
    sent_bytes_per_rank, plan, ...}; environment; path; pictures.

    Parameters
    ----------
    rows
        Batch x branches, as in 32x4,128x2; with a mesh for the split of (e), 32x4:2x2. Default: Table V's six and that.
    rounds
        Interleaved rounds: every variant in each. With fewer than nine an interval of 95 % holds less often.
    steps
        Steps of each variant in a round.
    workers
        Ranks; on fewer GPUs than these (e) and (f) are predicted.
    variants
        As in b,f,f_shared; default: all, with --fold 18 but the shared ones, which are then the others again.
    fold
        Divide the depth of all networks by 1, 2, 3, 6, 9 or 18: quick, and no longer Table V's networks. More of
        their blocks begin a stage, and those have a shared pre-activation, which is faster.
    plan_budget_s
        Seconds for measuring before an automatic plan is searched.
    compiled
        Blocks through torch.compile where that is faster, in (b), (d), (e), (f); plans are made without.
    predict
        Predict (e) and (f) from every rank alone, as on too few GPUs.
    resume
        Keep the rows that the record has already, if it is of the same settings, hardware and commit.
    """
    from anabranch.benchmarks import table5 as case
    from anabranch.benchmarks.record import RESULTS
    from anabranch.benchmarks.table5_report import print_table, write_pictures

    precisions = ["fp32", "bf16"] if precision == "both" else [precision]
    chosen = case.parse_rows(rows or case.ROWS, precisions, workers, fold, compiled=compiled)
    console = _console(json, quiet)
    record = case.run(
        chosen, case.parse_variants(variants, fold), rounds=rounds, steps=steps, plan_budget_s=plan_budget_s,
        predicted=predict, resume=resume, told=not quiet, folder=out or RESULTS,
    )  # fmt: skip
    print_table(record, console)
    record["pictures"] = [str(path) for path in write_pictures(record, Path(record["path"]).with_suffix(""))]
    _end(record, json, console)


@app.command
def scaling(
    *,
    depth: Count = 20,
    num_branches: Count = 4,
    batch_size: Count = 32,
    most: Count = 8,
    rounds: Count = 16,
    plan_budget_s: Positive = 20.0,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """1, 2, 4, 8 workers, weak and strong scaling: measured where there are devices, predicted beyond.

    JSON: rows, a list of {mode, plan, workers, batch, label, median_s, samples_s, alone_s, images_per_s, efficiency,
    efficiency_interval_95}; path. alone_s: one worker's step in the same rounds, which efficiency is against.

    Parameters
    ----------
    depth
        Of the Multi-ResNet, 6n + 2.
    num_branches
        Of each block.
    batch_size
        Samples of a worker (weak), of all workers (strong).
    most
        Workers to predict for.
    rounds
        Interleaved rounds of data parallelism and the automatic plan.
    plan_budget_s
        Seconds for measuring before an automatic plan is searched.
    """
    from anabranch.benchmarks import scaling as case
    from anabranch.benchmarks.record import RESULTS

    console = _console(json, quiet)
    record = case.run(
        depth=depth, num_branches=num_branches, batch_size=batch_size, most=most, rounds=rounds,
        plan_budget_s=plan_budget_s, folder=out or RESULTS,
    )  # fmt: skip
    case.print_table(record, console)
    _end(record, json, console)


@app.command
def collectives(
    *,
    workers: Annotated[Count, Parameter(validator=Number(gte=2))] = 2,
    rounds: Count = 20,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Our four collectives and the library's by message size and group: latency and bandwidth.

    JSON: rows, a list of {collective, group, num_bytes, samples_s, median_s, bandwidth_bytes_per_s}; summary; path.

    Parameters
    ----------
    workers
        Ranks; groups of 2, 4, … and all of them.
    rounds
        Interleaved rounds.
    """
    from anabranch.benchmarks import collectives as case
    from anabranch.benchmarks.record import RESULTS

    console = _console(json, quiet)
    record = case.run(workers=workers, rounds=rounds, folder=out or RESULTS)
    case.print_table(record, console)
    _end(record, json, console)


def _console(json: bool, quiet: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=json, quiet=quiet)
    return console if console.is_terminal else Console(stderr=json, quiet=quiet, width=130)


def _end(record: dict[str, Any], json: bool, console: Console) -> None:
    console.print(f"record: {record['path']}", highlight=False, soft_wrap=True)
    if json:
        print(json_module.dumps(record), flush=True)


@app.command
def data_parallel(
    *,
    rounds: Annotated[Count, Parameter(help="Interleaved rounds of both sides.")] = 40,
    steps: Annotated[Count, Parameter(help="Steps of each side in a round.")] = 3,
    batch_size: Annotated[Count, Parameter(help="Samples a step over both workers.")] = 32,
) -> None:
    """Our step against torch DDP of the same network, all blocks split by samples, two CPU workers."""
    from anabranch.benchmarks import data_parallel as case

    record = case.run(rounds=rounds, steps=steps, batch_size=batch_size)
    low, high = record["ratio_interval_95"]
    print(
        f"ours / DDP: {record['ratio_median']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
        f"{1e3 * record['ours_median_s']:.1f} and {1e3 * record['ddp_median_s']:.1f} ms a step; {record['path']}"
    )


@app.command
def shared_basis(
    *,
    epochs: Annotated[Count, Parameter(help="Passes over the digits.")] = 20,
    seeds: Annotated[Count, Parameter(help="Pairs of runs.")] = 3,
) -> None:
    """Shared bases with and without the orthogonality regularizer: ‖B·Bᵀ − I‖ in the end."""
    from anabranch.benchmarks import shared_basis as case

    record = case.run(epochs=epochs, seeds=seeds)
    ratios = ", ".join(f"{ratio:.1f}" for ratio in record["ratio_by_seed"])
    print(f"‖BBᵀ−I‖ without ÷ with the regularizer, by seed: {ratios}; {record['path']}")


@app.command
def gross_rank(
    *,
    seeds: Annotated[Count, Parameter(help="Searches.")] = 3,
    repeats: Annotated[Count, Parameter(help="Times each configuration is tuned alone.")] = 2,
) -> None:
    """GroSS: rank correlation between the series' accuracy and that of configurations tuned alone."""
    from anabranch.benchmarks import gross_rank as case

    record = case.run(seeds=seeds, repeats=repeats)
    correlations = ", ".join(f"{value:.2f}" for value in record["rank_correlations"])
    print(f"rank correlation, by seed: {correlations}; {record['path']}")


Resume = Annotated[bool, Parameter(help="Leave out cases that the record has.", negative=())]
Workers = Annotated[Count, Parameter(help="Worker processes.")]
Rounds = Annotated[Count, Parameter(help="Interleaved rounds of what is compared.")]


@app.command
def digits(*, seeds: Annotated[Count, Parameter(help="Runs.")] = 3) -> None:
    """The default run: test accuracy, seconds of training, start to first step."""
    from anabranch.benchmarks import digits as case

    record = case.run(seeds=seeds)
    print(
        f"median test accuracy {100 * record['median_test_accuracy']:.2f} %, "
        f"at most {record['most_train_seconds']:.0f} s of training, "
        f"first step after {record['median_start_to_first_step_s']:.1f} s; {record['path']}"
    )


@app.command
def data_wait(*, steps: Annotated[Count, Parameter(help="Of the run.")] = 200) -> None:
    """The default run: what part of a step its workers wait for the batch."""
    from anabranch.benchmarks import data_wait as case

    record = case.run(steps=steps)
    for index, rank in enumerate(record["ranks"]):
        print(
            f"rank {index}: data wait {100 * rank['median']:.2f} % of a step (median; 90th percentile "
            f"{100 * rank['p90']:.2f} %), {1e3 * rank['median_step_s']:.0f} ms a step"
        )
    print(f"as asked (medians below 1 %): {'yes' if record['met'] else 'no'}; {record['path']}")


@app.command
def prediction(*, workers: Workers = 2, rounds: Rounds = 16, resume: Resume = False) -> None:
    """Predicted against measured step times of plans that no trial of the measurement ran."""
    from anabranch.benchmarks import prediction as case

    record = case.run(workers=workers, rounds=rounds, resume=resume)
    print(
        f"{record['num_plans']} plans: mean error {100 * record['mean_absolute_error']:.1f} %; "
        f"of {record['pairs_apart']} pairs more than 10 % apart {100 * (record['pairs_in_order'] or 0):.1f} % "
        f"in order; as asked: {'yes' if record.get('met') else 'no'}; {record['path']}"
    )


@app.command
def search_growth(*, rounds: Annotated[Count, Parameter(help="Searches of each size.")] = 3) -> None:
    """Seconds of the search over numbers of blocks and of devices, with and without memory that binds."""
    from anabranch.benchmarks import search_growth as case

    record = case.run(rounds=rounds)
    for one in record["asked"]:
        print(
            f"{one['blocks']} blocks, {one['devices']} devices: {one['measured_s']:.2f} s "
            f"(asked for: {one['at_most_s']:.0f} s, {'met' if one['met'] else 'missed'})"
        )
    print(f"{record['path']}, {record['picture'] or 'no picture: pip install matplotlib'}")


@app.command
def regret(*, workers: Workers = 2, rounds: Rounds = 60, resume: Resume = False) -> None:
    """The automatic plan against the best of all others, re-timed; half the cases behind a slow wire (root)."""
    from anabranch.benchmarks import regret as case

    _print_ratios(case.run(workers=workers, rounds=rounds, resume=resume))


@app.command
def never_slower(*, workers: Workers = 2, rounds: Rounds = 60, resume: Resume = False) -> None:
    """The automatic plan against plain data parallelism, ten networks and batches."""
    from anabranch.benchmarks import regret as case

    _print_ratios(case.never_slower(workers=workers, rounds=rounds, resume=resume))


@app.command
def faults(
    *,
    cells: Annotated[
        tuple[str, ...],
        Parameter(help="Names, or patterns like kill-*; default: all.", consume_multiple=True),
    ] = (),
    resume: Annotated[bool, Parameter(help="Leave out cells that the record has.", negative=())] = False,
) -> None:
    """Faults at exact moments of real runs: did each go on by itself, or resume, and end bit-equal?"""
    from rich.console import Console

    from anabranch.benchmarks import faults as case

    record = case.run(only=cells, resume=resume)
    Console().print(case.table(record["cells"]))
    broken = [name for name, cell in record["cells"].items() if not cell.get("kept", True)]
    kept = f", their folders in {record['kept']}" if broken else ""
    print(f"{len(broken)} of {len(record['cells'])} cells broke their promise{kept}; {record['path']}")
    if broken:
        raise SystemExit(1)


@app.command
def random_faults(
    *,
    kills: Annotated[Count, Parameter(help="SIGKILLs of one run.")] = 30,
    mean_gap_s: Annotated[Positive, Parameter(help="Mean of the exponential gaps between them.")] = 6.0,
    steps: Annotated[Count, Parameter(help="Of the run; they must last for all kills.")] = 1500,
    spares: Annotated[FromZero, Parameter(help="Warm spares.")] = 0,
    seed: Annotated[FromZero, Parameter(help="Of moments and ranks.")] = 0,
) -> None:
    """Kills at random moments of one run: weights at the end, steps a second kept."""
    from anabranch.benchmarks import random_faults as case

    record = case.run_random(kills=kills, mean_gap_s=mean_gap_s, steps=steps, seed=seed, spares=spares)
    print(
        f"{record['outcome']} after {len(record['kills'])} kills; at {record['failures_per_minute']:.1f} a minute "
        f"{100 * record['steps_per_s_kept']:.0f} % of the steps/s kept, {record['seconds_per_failure']:.1f} s each: "
        f"predicted {100 * record['kept_at_one_a_minute_predicted']:.0f} % at one a minute (torchft: "
        f"{100 * record['torchft_kept_at_one_a_minute']:.0f} %); {record['path']}"
    )
    if record["outcome"] != "recovered":
        raise SystemExit(1)


@app.command
def mixing(
    *, mbit_per_s: Annotated[Positive, Parameter(help="Rate of the wire.")] = 40.0, rounds: Rounds = 8
) -> None:
    """Two hosts behind a slow wire (namespaces; root): the automatic plan against all-data and all-branch."""
    from anabranch.benchmarks import mixing as case

    record = case.run(mbit_per_s=mbit_per_s, rounds=rounds)
    low, high = record["speed_up_interval_95"]
    print(
        f"{record['speed_up_median']:.2f} times as fast as {record['better_of_the_others']} "
        f"(95 % interval {low:.2f} to {high:.2f}); {record['path']}"
    )


@app.command
def slow_worker(*, rounds: Rounds = 48, resume: Resume = False) -> None:
    """Two workers, one at half the speed: the plan's branches, and its step time against the predicted optimum."""
    from anabranch.benchmarks import slow_worker as case

    record = case.run(rounds=rounds, resume=resume)
    for row in record["cases"]:
        print(
            f"{row['case']}: {row['branches_by_rank']} branches by rank, {100 * row['error']:+.1f} % off what was "
            f"predicted, the even plan takes {row['even_over_auto']:.2f} times as long"
        )
    print(f"as asked: {'yes' if record['met'] else 'no'}; {record['path']}")


@app.command
def hosts() -> None:
    """Two hosts (namespaces; root): doctor, planted network faults, profile over a fast and a slow wire."""
    from anabranch.benchmarks import hosts as case

    record = case.run()
    print(f"doctor: {', '.join(f'{seconds:.1f}' for seconds in record['doctor']['seconds'])} s")
    for fault in record["faults"]:
        print(f"{fault['fault']}: {'named' if fault['named'] else 'NOT NAMED'} in {fault['seconds']:.1f} s")
    for profile in record["profiles"]:
        places = ", ".join(rank["host"] for rank in profile["ranks"])
        print(
            f"{profile['mbit_per_s']:g} Mbit/s: step {1e3 * profile['step_s']['p50']:.0f} ms, transfer "
            f"{1e3 * profile['transfer_s']:.0f} ms, ranks on {places}"
        )
    print(record["path"])
    if not all([*record["doctor"]["passed"], *(fault["named"] for fault in record["faults"])]):
        raise SystemExit(1)


@app.command
def save_stall(
    *,
    rounds: Rounds = 12,
    width: Annotated[
        Count, Parameter(help="Of 12 square layers, a multiple of 1,024; 2,048: 50 M parameters.")
    ] = 2048,
) -> None:
    """What a step pays for a checkpoint begun at it, against the copy to the host's memory alone; 1 and 2 workers."""
    from anabranch.benchmarks import save_stall as case

    record = case.run(rounds=rounds, width=width)
    for row in record["rows"]:
        low, high = row["stall_less_copy_interval_95_s"]
        parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in row["parts_median_s"].items())
        print(
            f"{row['workers']} workers: stall {1e3 * row['stall_median_s']:.0f} ms, copy alone "
            f"{1e3 * row['copy_median_s']:.0f} ms, {1e3 * row['stall_less_copy_median_s']:.0f} ms more "
            f"(95 % interval {1e3 * low:.0f} to {1e3 * high:.0f}); the call in ms: {parts}; "
            f"the step beside the writing {1e3 * row['beside_median_s']:.0f} ms longer, "
            f"written after {row['written_median_s']:.1f} s"
        )
    print(record["path"])


@app.command
def fused(*, rounds: Rounds = 24) -> None:
    """Local branches fused, mixed and one after another, all stages, batch 32 and 128: what the choice made costs."""
    from anabranch.benchmarks import step_parts

    record = step_parts.fused(rounds=rounds)
    for row in record["rows"]:
        over = ", ".join(
            f"{ratio:.3f} ({low:.3f} to {high:.3f}) of {way}"
            for (way, ratio), (low, high) in zip(
                row["chosen_over"].items(), row["interval_95"].values(), strict=True
            )
        )
        print(f"batch {row['batch']}, stage {row['stage']}: {row['chosen']}, {row['memory_format']}: {over}")
    print(f"the choice is at worst {record['worst_chosen_over_best']:.3f} times the better; {record['path']}")


@app.command
def launches(
    *,
    batch: Annotated[Count, Parameter(help="Samples a step.")] = 32,
    branches: Annotated[Count, Parameter(help="Of each block.")] = 4,
    precision: Annotated[Literal["fp32", "bf16"], Parameter(help="Of the step.")] = "fp32",
    fold: Annotated[Literal[1, 2, 3, 6, 9, 18], Parameter(help="Divide the depth by it.")] = 1,
    rounds: Rounds = 9,
    compiled: Annotated[
        bool, Parameter(name="--compile", help="Also: blocks through torch.compile.", negative=())
    ] = False,
) -> None:
    """Kernels of a step and the gaps between them, branches one after another and as chosen, from torch's profiler."""
    from anabranch.benchmarks import launches as case

    record = case.run(
        batch=batch, branches=branches, precision=precision, fold=fold, rounds=rounds, compiled=compiled
    )
    case.print_table(record, _console(json=False, quiet=False))
    print(record["path"])


@app.command
def exchange(*, rounds: Rounds = 12) -> None:
    """All branches split over two workers: the step against compute alone plus the same collectives alone."""
    from anabranch.benchmarks import step_parts

    record = step_parts.exchange(rounds=rounds)
    low, high = record["interval_95"]
    for name, seconds in record["exposed_s_by_block"].items():
        print(f"{name}: {1e3 * seconds:.2f} ms exposed")
    print(
        f"step / (compute + collectives): {record['step_over_parts']:.3f} ({low:.3f} to {high:.3f}); {record['path']}"
    )


@app.command
def recompute(*, rounds: Rounds = 8) -> None:
    """Peak memory and step time of a rank with activations kept and made again."""
    from anabranch.benchmarks import step_parts

    record = step_parts.recompute(rounds=rounds)
    kept, again = (max(record["peak_bytes_by_rank"][name]) / 2**20 for name in ("kept", "again"))
    low, high = record["interval_95"]
    print(
        f"peak of a rank {kept:.0f} MiB kept, {again:.0f} MiB made again; time {record['time_ratio']:.3f} "
        f"({low:.3f} to {high:.3f}); {record['path']}"
    )


@app.command
def profile_overhead(*, rounds: Rounds = 100) -> None:
    """Steps with what is always recorded, and detailed as in a profile, against steps with nothing recorded."""
    from anabranch.benchmarks import profile_overhead as case

    record = case.run(rounds=rounds)
    for kind, row in record["kinds"].items():
        low, high = row["ratio_interval_95"]
        print(
            f"{kind}: {row['records']} records, by count x cost {100 * row['share']:.2f} % of the step (asked "
            f"{100 * row['asked']:.0f}); measured {row['ratio_median']:.4f} ({low:.4f} to {high:.4f})"
        )
    print(record["path"])


def _print_ratios(record: dict[str, Any]) -> None:
    for row in record["cases"]:
        low, high = row["ratio_interval_95"]
        print(f"{row['ratio_median']:.3f} ({low:.3f} to {high:.3f})  {row['case']}")
    print(
        f"as asked (upper ends of the intervals at most 1.02): {'yes' if record['met'] else 'no'}; {record['path']}"
    )


if __name__ == "__main__":
    from anabranch.runtime.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
