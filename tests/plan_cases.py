"""Random networks, clusters and costs, and every plan there is for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations, product
from random import Random

from anabranch.schedulers import (
    BlockSpec,
    BranchPlacement,
    Cluster,
    Device,
    Link,
    ModelSpec,
    Plan,
    Request,
)
from anabranch.schedulers.costs import (
    Batch,
    Costs,
    Curve,
    ElementCost,
    ModelCosts,
    ParameterBytes,
    Work,
)

SAMPLE = BranchPlacement("sample")


def work(random: Random, scale: float = 1.0) -> Work:
    """Costs that grow with the samples."""

    def line(unit: float) -> Curve:
        return Curve.line(random.choice([0.0, 0.1, 0.5]) * unit, random.uniform(0.02, 0.5) * unit)

    return Work(line(scale), line(2 * scale), line(100), line(50))


def block_cost(random: Random, num_branches: int, unequal: bool) -> ElementCost:
    """Alike branches cost more the more there are; unequal ones each their own."""
    if unequal:
        branches = tuple(work(random, random.choice([0.3, 1.0, 3.0])) for _ in range(num_branches))
    else:
        one = work(random)
        branches = tuple(
            Work(
                *(Curve(tuple((x, y * (j**power)) for x, y in curve.points)) for curve in vars(one).values())
            )
            for power in [random.choice([0.6, 1.0])]
            for j in range(1, num_branches + 1)
        )
    each = random.choice([0, 40, 400])
    owned = [random.choice([0, 40, 400]) if unequal else each for _ in range(num_branches)]
    return ElementCost(
        work(random, 0.3),
        branches,
        unequal,
        random.uniform(0, 30),
        random.uniform(0, 30),
        random.uniform(0, 60),
        ParameterBytes(random.choice([0, 30, 200]), tuple(owned)),
    )


def random_request(random: Random) -> Request:
    """A small one, with unequal devices, hosts, overlap, buckets, accumulation, shared parameters."""
    num = random.choice([2, 2, 2, 3, 3, 4])
    num_blocks, most = {2: (3, 3), 3: (2, 2), 4: (1, 2)}[num]
    kinds = random.choice([["cpu"], ["cpu"], ["cpu", "gpu"]])
    speeds = random.choice([[1.0], [1.0], [1.0, 0.5], [1.0, 0.7, 0.4]])
    devices = tuple(
        Device(random.choice("ab"), i, random.choice(kinds), None, random.choice(speeds)) for i in range(num)
    )
    same = random.choice([None, random.randint(1, most)])
    counts = [same or random.randint(1, most) for _ in range(random.randint(1, num_blocks))]
    shares = [
        frozenset({"p"}) if random.random() < 0.25 else frozenset[str]() for _ in range(len(counts) + 2)
    ]
    blocks = tuple(
        BlockSpec(f"b{i}", k, random.randint(1, 2), shares[i + 1], random.random() < 0.5)
        for i, k in enumerate(counts)
    )
    edges = shares[0], shares[-1] if random.random() < 0.3 else frozenset[str]()
    model = ModelSpec(blocks, *(edge if random.random() < 0.4 else frozenset[str]() for edge in edges))
    unequal = [random.random() < 0.35 for _ in blocks]
    twins = random.random() < 0.3 and same is not None
    models = []
    for kind in kinds:
        seed = random.random()
        found = {
            block.name: block_cost(
                Random(f"{seed}{0 if twins else i}"), block.num_branches, unequal[0 if twins else i]
            )
            for i, block in enumerate(blocks)
        }
        parameters = ParameterBytes(random.choice([0, 60]), ())
        models.append(
            ModelCosts(
                kind,
                {"stem": _edge(random, parameters), **found, "head": _edge(random, parameters)},
                {"p": ParameterBytes(30, (50,) * counts[0] if len({*counts}) == 1 else ())},
                random.choice([0.0, 0.2]),
                random.choice([0.0, 0.001]),
                4.0,
            )
        )
    if len(kinds) == 2:  # the same network on both
        other = models[0].elements
        models[1] = ModelCosts(
            kinds[1],
            {
                name: ElementCost(
                    **{**vars(other[name]), "replicated": cost.replicated, "branches": cost.branches}
                )
                for name, cost in models[1].elements.items()
            },
            models[0].shared,
            models[1].step_s,
            models[1].optimizer_s_per_byte,
        )
    slow = random.choice([10.0, 100.0, 1000.0])
    cluster = Cluster(
        devices,
        Link(random.choice([0.0, 0.02]), 3 * slow, random.choice([0.0, 0.4, 1.0])),
        Link(random.choice([0.0, 0.1]), slow, random.choice([0.0, 0.3])),
    )
    bn = random.choice([1, 2, 2, 3])
    batch = Batch(
        random.choice([6, 8, 12]) if bn > 1 else 4,
        bn,
        random.choice([1, 1, 2]),
        random.choice([1, 300, 10_000]),
        random.choice([1, 200]),
    )
    return Request(model, cluster, costs=Costs(tuple(models)), batch=batch)


def _edge(random: Random, parameters: ParameterBytes) -> ElementCost:
    return ElementCost(work(random, 0.5), input_bytes=random.uniform(0, 60), parameters=parameters)


def every_plan(request: Request) -> Iterator[Plan]:
    """All meshes, device orders, weights, and placements of units; devices all used."""
    assert request.batch is not None
    names, model = request.cluster.names, request.model
    num_groups = -(-request.batch.num_samples // request.batch.bn_batch_size)
    for branch in range(1, len(names) + 1):
        data, rest = divmod(len(names), branch)
        if rest:
            continue
        weights = [None, *_parts(num_groups, data)] if data > 1 else [None]
        placements = list(_placements(model, branch))
        for order in permutations(names):
            devices = tuple(tuple(order[d * branch : (d + 1) * branch]) for d in range(data))
            for samples in weights:
                for placed in placements:
                    blocks = {block.name: placed[block.name] for block in model.blocks}
                    stem, head = (
                        "sample" if placed[edge] == SAMPLE else "replicated" for edge in ("stem", "head")
                    )
                    yield Plan(data, branch, blocks, stem, head, devices, samples)  # type: ignore[arg-type]


def _parts(total: int, num: int) -> Iterator[tuple[int, ...]]:
    for cut in combinations(range(1, total), num - 1):
        yield tuple(b - a for a, b in zip((0, *cut), (*cut, total), strict=True))


def _placements(model: ModelSpec, branch: int) -> Iterator[dict[str, BranchPlacement]]:
    choices = []
    for unit in model.units:
        counts = {model.by_name[name].num_branches for name in unit if name in model.by_name}
        found = [SAMPLE]
        if branch > 1 and len(unit) == 1 and unit[0] in ("stem", "head"):
            found.append(BranchPlacement("branch", ()))  # stands for "replicated"
        elif branch > 1 and len(counts) == 1 and not {"stem", "head"} & {*unit}:
            for ranks in product(range(branch), repeat=counts.pop()):
                held = tuple(tuple(b for b, m in enumerate(ranks) if m == rank) for rank in range(branch))
                found.append(BranchPlacement("branch", held))
        choices.append(found)
    for picked in product(*choices):
        yield {name: choice for unit, choice in zip(model.units, picked, strict=True) for name in unit}
