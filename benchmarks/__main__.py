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


if __name__ == "__main__":
    app()
