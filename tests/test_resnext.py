"""ResNeXt: its integers, the three forms and their map, torchvision's names, the parallel form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import resnext_cases
import torch
from ranks import run_ranks
from resnext_cases import FORMS, shaken
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks import ModelError, Network, count
from anabranch.blocks.resnext import READY, preserved_width, resnext, template_params
from anabranch.blocks.resnext_block import BLOCKS, Form, GroupedBlock, SlicedBlock, SplitBlock
from anabranch.blocks.resnext_forms import convert, form_of
from anabranch.blocks.torchvision_names import load_torchvision, to_torchvision
from anabranch.runtime.branch_state import entries
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import branch_tensors
from anabranch.schedulers import BranchPlacement, Plan

# depth, cardinality, base_width, stem, params, MACs
COUNTS = [
    (50, 1, 64, "imagenet", 25_557_032, 4_089_184_256),
    (50, 32, 4, "imagenet", 25_028_904, 4_230_479_872),
    (50, 2, 40, "imagenet", 25_425_000, 4_124_508_160),
    (50, 4, 24, "imagenet", 25_292_968, 4_159_832_064),
    (50, 8, 14, "imagenet", 25_603_016, 4_267_409_408),
    (101, 1, 64, "imagenet", 44_549_160, 7_801_405_440),
    (101, 32, 4, "imagenet", 44_177_704, 7_969_996_800),
    (101, 64, 4, "imagenet", 83_455_272, 15_460_270_080),
    (29, 8, 64, "cifar", 34_426_698, 5_387_266_048),
    (29, 16, 64, "cifar", 68_155_210, 10_688_866_304),
]

# name, blocks per stage, groups, width_per_group, as torchvision's own constructors have them
TORCHVISION = [
    ("resnet50", (3, 4, 6, 3), 1, 64),
    ("resnet101", (3, 4, 23, 3), 1, 64),
    ("resnet152", (3, 8, 36, 3), 1, 64),
    ("resnext50_32x4d", (3, 4, 6, 3), 32, 4),
    ("resnext101_32x8d", (3, 4, 23, 3), 32, 8),
    ("resnext101_64x4d", (3, 4, 23, 3), 64, 4),
]


def ready(name: str, **options: Any) -> Network:
    family, given = READY[name]
    assert family == "resnext"
    return resnext(**{**given, **options})


@pytest.mark.parametrize(("depth", "cardinality", "width", "stem", "params", "macs"), COUNTS)
def test_counts(depth: int, cardinality: int, width: int, stem: Any, params: int, macs: int) -> None:
    with torch.device("meta"):
        counted = count(resnext(depth, cardinality, width, stem=stem))
    assert (counted.params, counted.macs, counted.num_branches) == (params, macs, cardinality)


@pytest.mark.parametrize(("form", "slices"), [("a", 1), ("b", 1), ("c", 8)])
def test_counts_do_not_depend_on_the_form(form: Form, slices: int) -> None:
    options: dict[str, Any] = (
        {"cardinality": 1, "base_width": 64} if slices > 1 else {"cardinality": 8, "base_width": 14}
    )
    with torch.device("meta"):
        counted = count(resnext(**options, blocks_per_stage=(1, 2), form=form, num_slices=slices))
        expected = count(resnext(**options, blocks_per_stage=(1, 2)))
    assert (counted.params, counted.macs, counted.num_branches) == (expected.params, expected.macs, 8)


def test_ready_names_are_the_tables_networks() -> None:
    assert set(READY) == {*(row[0] for row in TORCHVISION), "resnext101_32x4d", "resnext29_8x64d"}
    shapes = {
        (o["depth"], o["cardinality"], o["base_width"], o.get("stem", "imagenet")) for _, o in READY.values()
    }
    assert shapes >= {row[:4] for row in COUNTS if row[1] not in (2, 4, 16) and row[2] != 14}


def test_table_2() -> None:
    """Width of a path, width of the grouped convolution, weights of the template and its multiply-adds."""
    rows = [
        (1, 64, 64, 69_632),
        (2, 40, 80, 69_760),
        (4, 24, 96, 69_888),
        (8, 14, 112, 71_456),
        (32, 4, 128, 70_144),
    ]
    for cardinality, width, grouped, params in rows:
        assert preserved_width(cardinality) == width
        assert (cardinality * width, template_params(cardinality, width)) == (grouped, params)
        with torch.device("meta"):
            block = GroupedBlock(256, cardinality, width, 256)
        convs = [block.conv1, block.conv2, block.conv3]
        assert sum(conv.weight.numel() for conv in convs) == params
        with torch.device("meta"):
            counted = count(block, (256, 56, 56))
        assert counted.macs == params * 56**2
    assert (preserved_width(136), preserved_width(2, 64, 128)) == (1, 42)


def test_initialization_spans_all_paths() -> None:
    """N(0, √(2 / (k²·outputs))), the outputs not divided by groups, in every form."""
    for form in FORMS:
        torch.manual_seed(0)
        block = BLOCKS[form](128, 32, 8, 512)
        state = convert(block.state_dict(), form, "c")
        for name, area, outputs in (("conv1", 1, 256), ("conv2", 9, 256), ("conv3", 1, 512)):
            wanted = (2 / (area * outputs)) ** 0.5
            assert float(state[f"{name}.weight"].std()) == pytest.approx(wanted, rel=0.02), (form, name)


def results(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients (of x too), buffers after one training step's forward and backward."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y, {**grads, "x": x.grad}, dict(module.named_buffers())


# The longest sums: a channel's values in a batch of five images of 6x6.
ROUNDING = 5 * 6 * 6 * torch.finfo(torch.float64).eps


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], bound: float) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        expected = b[name].detach()
        difference = (tensor.detach() - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert float(difference) <= bound, f"{name}: {float(difference)}"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("execution", ["fused", "looped"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_equal(form: Form, execution: Any, stride: int) -> None:
    """Output, every gradient, running statistics: float64 rounding only."""
    grouped = shaken(GroupedBlock(12, 4, 3, 12, stride))
    other = BLOCKS[form](12, 4, 3, 12, stride).double()
    other.load_state_dict(convert(grouped.state_dict(), "c", form))
    other.execution = execution
    x = torch.randn(5, 12, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (y, grads, buffers), (expected, expected_grads, expected_buffers) = results(other, x), results(grouped, x)
    close({"y": y}, {"y": expected}, ROUNDING)
    close(convert(grads, form, "c"), expected_grads, ROUNDING)
    close(convert(buffers, form, "c"), expected_buffers, ROUNDING)


@pytest.mark.parametrize("form", FORMS)
def test_networks_of_every_form_are_equal(form: Form) -> None:
    grouped = shaken(resnext_cases.NETWORKS["c"]())
    other = resnext_cases.NETWORKS[form]().double()
    other.load_state_dict(convert(grouped.state_dict(), "c", form))
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (y, grads, _), (expected, expected_grads, _) = results(other, x), results(grouped, x)
    close({"y": y}, {"y": expected}, 1e-13)
    close(convert(grads, form, "c"), expected_grads, ROUNDING)


def test_norm_before_the_sum_is_another_function() -> None:
    """What SplitBlock would compute with a BN of each path before the aggregation."""
    block = shaken(SplitBlock(12, 4, 3, 12))
    assert isinstance(block, SplitBlock)
    x = torch.randn(5, 12, 6, 6, dtype=torch.float64)
    norm = block.norm3
    terms = [
        F.batch_norm(path(x), None, None, norm.weight, norm.bias, True) for path in block.branch.values()
    ]
    before_sum = F.relu(x + torch.stack(terms).sum(0))
    after_sum = block(x)
    assert float((before_sum - after_sum).detach().abs().max()) > 0.1


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_conversion_there_and_back(source: Form, target: Form) -> None:
    """Bit-equal, with the keys of the other form's network, and nothing shared with the original."""
    network = shaken(resnext_cases.NETWORKS[source]())
    network(torch.randn(4, 2, 8, 8, dtype=torch.float64))
    state = network.state_dict()
    there = convert(state, source, target)
    assert form_of(there) == target
    like = resnext_cases.NETWORKS[target]().state_dict()
    assert {k: t.shape for k, t in there.items()} == {k: t.shape for k, t in like.items()}
    back = convert(there, target, source)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    storages = [t.untyped_storage().data_ptr() for t in (*state.values(), *there.values()) if t.numel()]
    assert len(set(storages)) == len(storages), "safetensors refuses tensors that share memory"


def test_path_i_is_the_papers_slice() -> None:
    """Channel j = i·d + m: what a plan moves as branch i is path i of form (a)."""
    block = shaken(GroupedBlock(8, 4, 3, 12))
    state = block.state_dict()
    split = convert(state, "c", "a")
    for name in ("conv1", "conv2", "norm1", "norm2"):
        rows = slice(2 * 3, 3 * 3)
        assert torch.equal(split[f"branch.2.{name}.weight"], state[f"{name}.weight"][rows])
    assert torch.equal(split["branch.2.norm1.running_var"], state["norm1.running_var"][6:9])
    assert torch.equal(split["branch.2.conv3.weight"], state["conv3.weight"][:, 6:9])
    network = resnext_cases.NETWORKS["c"]()
    whole = dict(network.named_parameters())
    moved = entries(whole, branch_tensors(network))
    paths = convert(whole, "c", "a")
    keyed = {key.split("branch.")[0] + ".".join(key.split("branch.")[-1].split(".")[1:]) + "@" +
             key.split("branch.")[1].split(".")[0]: t for key, t in paths.items() if "branch." in key}  # fmt: skip
    assert len(keyed) == 3 * 8 * 7
    assert all(torch.equal(moved[key], tensor) for key, tensor in keyed.items())


@pytest.mark.parametrize("execution", ["fused", "looped"])
@pytest.mark.parametrize("stride", [1, 2])
def test_slices_of_a_plain_bottleneck(stride: int, execution: Any) -> None:
    """The same parameters, names and function as the one-path block."""
    plain = shaken(GroupedBlock(8, 1, 12, 8, stride))
    sliced = SlicedBlock(8, 3, 12, 8, stride).double()
    sliced.load_state_dict(plain.state_dict())
    sliced.execution = execution
    x = torch.randn(5, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (y, grads, buffers), (expected, expected_grads, expected_buffers) = results(sliced, x), results(plain, x)
    close({"y": y}, {"y": expected}, ROUNDING)
    close(grads, expected_grads, ROUNDING)
    close(buffers, expected_buffers, ROUNDING)


def torchvision_shapes(
    blocks: tuple[int, ...], groups: int, width_per_group: int
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's state_dict, from the structure of its `ResNet(Bottleneck, …)`."""

    def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
        values = {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}
        return {**values, f"{name}.num_batches_tracked": ()}

    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    inplanes = 64
    for layer, num_blocks in enumerate(blocks):
        planes = 64 * 2**layer
        width = int(planes * (width_per_group / 64.0)) * groups
        for block in range(num_blocks):
            at = f"layer{layer + 1}.{block}"
            shapes |= {f"{at}.conv1.weight": (width, inplanes, 1, 1), **norm(f"{at}.bn1", width)}
            shapes |= {f"{at}.conv2.weight": (width, width // groups, 3, 3), **norm(f"{at}.bn2", width)}
            shapes |= {f"{at}.conv3.weight": (planes * 4, width, 1, 1), **norm(f"{at}.bn3", planes * 4)}
            if block == 0:
                shapes[f"{at}.downsample.0.weight"] = (planes * 4, inplanes, 1, 1)
                shapes |= norm(f"{at}.downsample.1", planes * 4)
            inplanes = planes * 4
    return {**shapes, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


@pytest.mark.parametrize(("name", "blocks", "groups", "width"), TORCHVISION)
def test_torchvision_names_and_shapes(name: str, blocks: tuple[int, ...], groups: int, width: int) -> None:
    """Both ways, by the ready name and by what the shapes describe."""
    expected = torchvision_shapes(blocks, groups, width)
    with torch.device("meta"):
        network = ready(name)
        theirs = to_torchvision(network.state_dict())
        assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == expected
        state = {key: torch.empty(shape) for key, shape in expected.items()}
        found = load_torchvision(state)
    shapes = [{key: t.shape for key, t in net.state_dict().items()} for net in (found, network)]
    assert shapes[0] == shapes[1]


def random_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every tensor different, positive where a variance must be."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for index, (key, shape) in enumerate(shapes.items()):
        state[key] = torch.randn(shape, generator=generator) * 0.1
        if "running_var" in key:
            state[key] = state[key].abs() + 0.5
        if "num_batches" in key:
            state[key] = torch.tensor(index)
    return state


def test_torchvision_there_and_back_is_bit_equal() -> None:
    """resnext50_32x4d at full size: every key used, none changed."""
    state = random_state(torchvision_shapes((3, 4, 6, 3), 32, 4))
    network = load_torchvision(state)
    back = to_torchvision(network.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    assert torch.equal(
        network.get_parameter("blocks.stage3.block2.conv2.weight"), state["layer3.1.conv2.weight"]
    )


def as_torchvision_computes(state: Mapping[str, Tensor], x: Tensor, groups: int, training: bool) -> Tensor:
    """torchvision's ResNet(Bottleneck) from its state_dict, in functional torch."""

    def norm(name: str, a: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"].clone(), state[f"{name}.running_var"].clone()
        return F.batch_norm(a, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], training)

    a = F.relu(norm("bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3)))
    a = F.max_pool2d(a, 3, 2, 1)
    for at in dict.fromkeys(key.rsplit(".", 2)[0] for key in state if key.endswith(".conv1.weight")):
        stride = 2 if at.endswith(".0") and at != "layer1.0" else 1
        skip = a
        if f"{at}.downsample.0.weight" in state:
            weight = state[f"{at}.downsample.0.weight"]
            skip = norm(f"{at}.downsample.1", F.conv2d(a, weight, stride=stride))
        b = F.relu(norm(f"{at}.bn1", F.conv2d(a, state[f"{at}.conv1.weight"])))
        b = F.conv2d(b, state[f"{at}.conv2.weight"], stride=stride, padding=1, groups=groups)
        b = F.conv2d(F.relu(norm(f"{at}.bn2", b)), state[f"{at}.conv3.weight"])
        a = F.relu(norm(f"{at}.bn3", b) + skip)
    return F.linear(a.mean((2, 3)), state["fc.weight"], state["fc.bias"])


_THIN: dict[str, Any] = {"channels": 16, "blocks_per_stage": (2, 1, 1, 1), "num_classes": 5}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("cardinality", "options"), [(1, {}), (4, {}), (4, {"form": "a"}), (1, {"num_slices": 2})]
)
def test_loaded_weights_compute_torchvisions_function(
    cardinality: int, options: dict[str, Any], training: bool
) -> None:
    torch.manual_seed(0)
    thin = resnext(cardinality=cardinality, base_width=2, **_THIN)
    shapes = {key: tuple(t.shape) for key, t in to_torchvision(thin.state_dict()).items()}
    state = {k: t.double() if t.is_floating_point() else t for k, t in random_state(shapes).items()}
    target = resnext(cardinality=cardinality, base_width=2, **_THIN, **options).double() if options else None
    network = load_torchvision(state, target).train(training)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(
        network(x), as_torchvision_computes(state, x, cardinality, training), rtol=1e-10, atol=1e-10
    )


def test_torchvision_errors_list_the_keys() -> None:
    thin = resnext(cardinality=4, base_width=2, **_THIN)
    state = to_torchvision(thin.state_dict())
    kept = {key: tensor.clone() for key, tensor in thin.state_dict().items()}
    broken = {key: tensor for key, tensor in state.items() if key not in ("layer2.0.bn3.weight", "bn1.bias")}
    broken |= {"layer2.0.se.weight": torch.zeros(3), "fc.weight": torch.zeros(7, 128)}
    with pytest.raises(
        ModelError, match=r"2 missing: bn1\.bias, layer2\.0\.bn3\.weight; 1 unexpected: layer2\.0\.se\.weight"
    ) as raised:
        load_torchvision(broken, thin)
    assert "1 of another shape: fc.weight (7, 128), not (5, 128)" in str(raised.value)
    assert all(torch.equal(kept[key], tensor) for key, tensor in thin.state_dict().items()), (
        "nothing is loaded"
    )
    with pytest.raises(
        ModelError, match=r"1 missing: layer1\.1\.norm|1 missing: layer1\.1\.bn2\.running_var"
    ):
        load_torchvision({k: t for k, t in state.items() if k != "layer1.1.bn2.running_var"})
    with pytest.raises(ModelError, match=r"fc\.weight, layer1\.0\.conv3\.weight missing"):
        load_torchvision({k: t for k, t in state.items() if "conv3" not in k and "fc" not in k})
    with pytest.raises(ModelError, match="10 channels in groups of 4, which does not divide 10"):
        load_torchvision({**state, "layer1.0.conv2.weight": torch.zeros(10, 4, 3, 3)})
    with pytest.raises(ModelError, match=r"torchvision's ResNets have no stem\.other\.weight"):
        to_torchvision({"stem.other.weight": torch.zeros(1)})


def test_old_files_without_counters_load() -> None:
    thin = resnext(cardinality=4, base_width=2, **_THIN)
    state = {k: t for k, t in to_torchvision(thin.state_dict()).items() if "num_batches" not in k}
    loaded = load_torchvision(state).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in thin.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnext(51), r"no ImageNet ResNeXt of depth 51: use one of \[50, 101, 152\]"),
        (lambda: resnext(30, stem="cifar"), "has depth 9n\\+2, got 30: use 29 or 38"),
        (lambda: resnext(1, stem="cifar"), "use 11 or 20"),
        (lambda: resnext(blocks_per_stage=(3, 0)), "blocks_per_stage"),
        (lambda: resnext(stem="mnist"), "stem is"),  # type: ignore[arg-type]
        (lambda: resnext(form="d"), r"form is one of \['a', 'b', 'c'\], got 'd'"),  # type: ignore[arg-type]
        (lambda: resnext(cardinality=0), "cardinality is at least 1, got 0"),
        (lambda: resnext(base_width=0), "base_width is at least 1, got 0"),
        (lambda: resnext(channels=10), "channels 10 must be a multiple of 4"),
        (lambda: resnext(cardinality=1, base_width=64, num_slices=12), "num_slices 12 does not divide the 64 channels"),
        (lambda: resnext(num_slices=2), "num_slices 2 is for networks of one path in form 'c', this has 32"),
        (lambda: preserved_width(300), "300 paths of width 1 have 156300 weights, one of width 64 has 69632"),
        (lambda: preserved_width(0), "cardinality is at least 1, got 0"),
        (lambda: convert({}, "c", "d"), "a form is one of"),  # type: ignore[arg-type]
        (
            lambda: convert(GroupedBlock(8, 2, 3, 8).state_dict(), "a", "b"),
            r"conv1\.weight is no name of form \(a\): the state seems to be of form \(c\)",
        ),
        (
            lambda: convert({"branch.0.conv1.weight": torch.zeros(1), "branch.2.norm1.bias": torch.zeros(1)}, "b", "c"),
            r"conv1\.weight lacks paths \[1, 2\] of 3",
        ),
        (
            lambda: convert({"branch.0.conv1.weight": torch.zeros(1), "conv3.weight": torch.zeros(1)}, "a", "c"),
            r"conv3\.weight is no name of form \(a\): the state seems to be of form \(b\)",
        ),
        (
            lambda: convert({"block1.norm1.bias": torch.zeros(8)}, "c", "a"),
            r"block1\.norm1\.bias needs block1\.conv2\.weight beside it",
        ),
        (
            lambda: convert({"conv2.weight": torch.zeros(10, 4, 3, 3)}, "c", "a"),
            "conv2.weight has 10 channels in groups of 4, which does not divide 10",
        ),
        (
            lambda: convert({"conv2.weight": torch.zeros(8, 4, 3, 3), "norm1.bias": torch.zeros(9)}, "c", "b"),
            "norm1.bias has 9 channels, which are no 2 equal paths",
        ),
    ],
)  # fmt: skip
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        make()


def plan_of(network: str, data: int, *placed: tuple[int, ...] | None) -> Plan:
    """Counts of branches by branch rank for each block; None: split by sample."""
    names = [spec.name for spec in spec_of(resnext_cases.NETWORKS[network]()).blocks]
    blocks = {
        name: BranchPlacement("sample") if counts is None else BranchPlacement.from_counts(counts)
        for name, counts in zip(names, placed, strict=True)
    }
    return Plan(data, 2, blocks, "sample", "sample")


UNEVEN = (20, 12)


@pytest.mark.parametrize("data", [1, 2])
def test_parity(data: int) -> None:
    """32 paths as 20 + 12, blocks by sample between them, a rank without paths; forms (a), (b); a sliced ResNet."""
    wide = "32 paths"
    cases: list[tuple[str, Plan, dict[str, Any]]] = [
        (wide, plan_of(wide, data, UNEVEN, UNEVEN, UNEVEN), {}),
        (wide, plan_of(wide, data, UNEVEN, None, (0, 32)), {"bn_batch_size": 8}),
        (wide, plan_of(wide, data, None, UNEVEN, (12, 20)), {"execution": "looped", "steps": 1}),
        ("sliced", plan_of("sliced", data, (3, 1), None, (0, 4)), {}),
    ]
    if data == 1:
        cases += [(form, plan_of(form, 1, (5, 3), None, (8, 0)), {}) for form in ("a", "b")]
        cases.append(("sliced", plan_of("sliced", 1, (1, 3), (2, 2), None), {"execution": "looped"}))
    reports = run_ranks(2 * data, resnext_cases.parity, cases)[0]
    for (network, plan, options), report in zip(cases, reports, strict=True):
        where = f"{network} {plan.blocks} {options}: {report.worst}"
        assert report.max_relative_difference <= 1e-9, where
        assert set(report.by_kind) == {"loss", "gradient", "change", "statistic"}, where
        assert report.num_compared > 100, where


def test_parity_sees_a_norm_before_the_sum() -> None:
    case: tuple[str, Plan, dict[str, Any]] = ("c", plan_of("c", 1, (5, 3), (5, 3), (5, 3)), {"steps": 1})
    assert run_ranks(2, resnext_cases.normed_too_early, case)[0].max_relative_difference > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_share_of_paths_holds_their_share_of_parameters(form: Form) -> None:
    block = BLOCKS[form](12, 8, 3, 12, 2)
    mine = block.shard(range(5))
    assert (block.num_branches, mine.held) == (8, (0, 1, 2, 3, 4))
    sizes = [
        sum(p.numel() for name, p in part.named_parameters() if name in part.branch_tensors())
        for part in (block, mine)
    ]
    assert sizes == [8 * 3 * (12 + 2 + 27 + 2 + 12), 5 * 3 * (12 + 2 + 27 + 2 + 12)]
