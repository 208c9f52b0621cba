"""`python -m anabranch.benchmarks CASE`: measures one case and writes its record to benchmarks/results/."""

from __future__ import annotations

from typing import Annotated

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


if __name__ == "__main__":
    app()
