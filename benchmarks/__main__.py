"""`python -m anabranch.benchmarks CASE`: measures one case and writes its record to benchmarks/results/."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import App, Parameter

app = App(name="anabranch.benchmarks", help="Measure one case; records go to benchmarks/results/.")


@app.command
def data_parallel(
    *,
    rounds: Annotated[int, Parameter(help="Interleaved rounds of both sides.")] = 40,
    steps: Annotated[int, Parameter(help="Steps of each side in a round.")] = 3,
    batch_size: Annotated[int, Parameter(help="Samples a step over both workers.")] = 32,
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
    epochs: Annotated[int, Parameter(help="Passes over the digits.")] = 20,
    seeds: Annotated[int, Parameter(help="Pairs of runs.")] = 3,
) -> None:
    """Shared bases with and without the orthogonality regularizer: ‖B·Bᵀ − I‖ in the end."""
    from anabranch.benchmarks import shared_basis as case

    record = case.run(epochs=epochs, seeds=seeds)
    ratios = ", ".join(f"{ratio:.1f}" for ratio in record["ratio_by_seed"])
    print(f"‖BBᵀ−I‖ without ÷ with the regularizer, by seed: {ratios}; {record['path']}")


@app.command
def gross_rank(
    *,
    seeds: Annotated[int, Parameter(help="Searches.")] = 3,
    repeats: Annotated[int, Parameter(help="Times each configuration is tuned alone.")] = 2,
) -> None:
    """GroSS: rank correlation between the series' accuracy and that of configurations tuned alone."""
    from anabranch.benchmarks import gross_rank as case

    record = case.run(seeds=seeds, repeats=repeats)
    correlations = ", ".join(f"{value:.2f}" for value in record["rank_correlations"])
    print(f"rank correlation, by seed: {correlations}; {record['path']}")


Workers = Annotated[int, Parameter(help="Worker processes.")]
Rounds = Annotated[int, Parameter(help="Interleaved rounds of what is compared.")]


@app.command
def digits(*, seeds: Annotated[int, Parameter(help="Runs.")] = 3) -> None:
    """The default run: test accuracy, seconds of training, start to first step."""
    from anabranch.benchmarks import digits as case

    record = case.run(seeds=seeds)
    print(
        f"median test accuracy {100 * record['median_test_accuracy']:.2f} %, "
        f"at most {record['most_train_seconds']:.0f} s of training, "
        f"first step after {record['median_start_to_first_step_s']:.1f} s; {record['path']}"
    )


@app.command
def prediction(*, workers: Workers = 2, rounds: Rounds = 16) -> None:
    """Predicted against measured step times of plans that no trial of the measurement ran."""
    from anabranch.benchmarks import plans

    record = plans.prediction(workers=workers, rounds=rounds)
    print(
        f"{record['num_plans']} plans: mean error {100 * record['mean_absolute_error']:.1f} %; "
        f"of {record['pairs_apart']} pairs more than 10 % apart {100 * (record['pairs_in_order'] or 0):.1f} % "
        f"in order; {record['path']}"
    )


@app.command
def regret(*, workers: Workers = 2, rounds: Rounds = 24) -> None:
    """The automatic plan against the best of all plans, re-timed."""
    from anabranch.benchmarks import plans

    _print_ratios(plans.regret(workers=workers, rounds=rounds))


@app.command
def never_slower(*, workers: Workers = 2, rounds: Rounds = 24) -> None:
    """The automatic plan against plain data parallelism, ten networks and batches."""
    from anabranch.benchmarks import plans

    _print_ratios(plans.never_slower(workers=workers, rounds=rounds))


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
    kills: Annotated[int, Parameter(help="SIGKILLs of one run.")] = 30,
    mean_gap_s: Annotated[float, Parameter(help="Mean of the exponential gaps between them.")] = 6.0,
    steps: Annotated[int, Parameter(help="Of the run; they must last for all kills.")] = 1500,
    spares: Annotated[int, Parameter(help="Warm spares.")] = 0,
    seed: Annotated[int, Parameter(help="Of moments and ranks.")] = 0,
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
    *, mbit_per_s: Annotated[float, Parameter(help="Rate of the wire.")] = 100.0, rounds: Rounds = 8
) -> None:
    """Two hosts behind a slow wire (namespaces; root): the automatic plan against all-data and all-branch."""
    from anabranch.benchmarks import mixing as case

    record = case.run(mbit_per_s=mbit_per_s, rounds=rounds)
    low, high = record["speed_up_interval_95"]
    print(
        f"{record['speed_up_median']:.2f} times as fast as {record['better_of_the_others']} "
        f"(95 % interval {low:.2f} to {high:.2f}); {record['path']}"
    )


def _print_ratios(record: dict[str, Any]) -> None:
    for row in record["cases"]:
        low, high = row["ratio_interval_95"]
        print(f"{row['ratio_median']:.3f} ({low:.3f} to {high:.3f})  {row['case']}")
    print(record["path"])


if __name__ == "__main__":
    app()
