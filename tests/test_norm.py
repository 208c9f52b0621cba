"""BatchNorm and Dropout: torch's own without a batch layout, a function of groups and samples with one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterable

import pytest
import torch
from parity_cases import Case, S, parity
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from anabranch.blocks import ModelError
from anabranch.blocks.batch import BatchLayout, GroupSync, batch_layout
from anabranch.blocks.convert import prepare
from anabranch.blocks.dropout import Dropout
from anabranch.blocks.group_series import GroupSeriesConv
from anabranch.blocks.norm import BatchNorm, StagedStatistics
from anabranch.blocks.random import fold, sample_keys, uniform

CHANNELS = 3


def _pair(**options: object) -> tuple[BatchNorm, nn.BatchNorm2d]:
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(CHANNELS, **options).double()  # type: ignore[arg-type]
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = BatchNorm(CHANNELS, **options).double()  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _x(samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, CHANNELS, 4, 4, generator=generator, dtype=torch.float64)
    return (x * 3 + 1).requires_grad_()


def _equal(ours: nn.Module, theirs: nn.Module, bound: float = 0.0) -> None:
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=bound, msg=name)


def _running(module: BatchNorm) -> tuple[Tensor, Tensor]:
    assert module.running_mean is not None
    assert module.running_var is not None
    return module.running_mean, module.running_var


def _statistics(modules: Iterable[BatchNorm]) -> StagedStatistics:
    return StagedStatistics(modules, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_without_layout_it_is_torchs(momentum: float | None, affine: bool, track: bool) -> None:
    ours, theirs = _pair(momentum=momentum, affine=affine, track_running_stats=track)
    for training in (True, True, False):
        x, same = _x(5), _x(5)
        a, b = ours.train(training)(x), theirs.train(training)(same)
        a.square().sum().backward()
        b.square().sum().backward()
        assert torch.equal(a, b)
        assert x.grad is not None
        assert same.grad is not None
        assert torch.equal(x.grad, same.grad)
        _equal(ours, theirs)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [(6,), (3, 3), (3, 2, 1)])
def test_groups_are_separate_batch_norms(sizes: tuple[int, ...], affine: bool) -> None:
    ours, theirs = _pair(affine=affine)
    x, same = _x(6), _x(6)
    weights = torch.randn(6, CHANNELS, 4, 4, dtype=torch.float64)
    statistics = _statistics([ours])
    with batch_layout(BatchLayout(sizes, 6)):
        y = ours(x)
    (y * weights).sum().backward()
    statistics.commit()
    means, variances = [], []
    for part, weight in zip(same.split(list(sizes)), weights.split(list(sizes)), strict=True):
        alone, _ = _pair(affine=affine, momentum=1.0)
        reference = nn.BatchNorm2d(CHANNELS, affine=affine, momentum=1.0).double()
        reference.load_state_dict(alone.state_dict())
        reference.weight, reference.bias = theirs.weight, theirs.bias
        (reference(part) * weight).sum().backward()
        assert reference.running_mean is not None
        assert reference.running_var is not None
        means.append(reference.running_mean * len(part) / 6)
        variances.append(reference.running_var * len(part) / 6)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, same.grad, rtol=0, atol=1e-13)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)
    zeros, ones = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    torch.testing.assert_close(ours.running_mean, zeros.lerp(sum(means, zeros), 0.1), rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.running_var, ones.lerp(sum(variances, zeros), 0.1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (3, 1)])
def test_gradients_are_the_derivatives(sizes: tuple[int, ...]) -> None:
    ours, _ = _pair()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with batch_layout(BatchLayout(sizes, 4)):
            y: Tensor = torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))
        return y

    x = _x(4)[:, :, :2, :2].detach().requires_grad_()
    inputs = (x, ours.weight.detach().requires_grad_(), ours.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)


def test_statistics_move_once_a_step_whatever_the_groups() -> None:
    """Two micro-batches of unequal groups; the second module is not run at all and stays."""
    ours, _ = _pair()
    idle, _ = _pair()
    statistics = _statistics([ours, idle])
    x = _x(7).detach()
    with batch_layout(BatchLayout((2, 2), 7)):
        ours(x[:4])
    assert torch.equal(_running(ours)[0], torch.zeros(CHANNELS).double()), "staged only"
    with batch_layout(BatchLayout((3,), 7)):
        ours(x[4:])
    statistics.commit()
    parts = [x[:2], x[2:4], x[4:]]
    mean = sum(part.mean((0, 2, 3)) * len(part) / 7 for part in parts)
    variance = sum(part.transpose(0, 1).flatten(1).var(1) * len(part) / 7 for part in parts)
    torch.testing.assert_close(_running(ours)[0], 0.1 * mean)
    torch.testing.assert_close(_running(ours)[1], 0.9 + 0.1 * variance)
    assert [int(m.num_batches_tracked or 0) for m in (ours, idle)] == [1, 0]
    assert torch.equal(_running(idle)[1], torch.ones(CHANNELS).double())
    assert not statistics.buffer.any(), "cleared"


def test_cumulative_average_counts_steps() -> None:
    ours, theirs = _pair(momentum=None)
    statistics = _statistics([ours])
    for seed in range(3):
        with batch_layout(BatchLayout((5,), 5)):
            ours(_x(5, seed))
        statistics.commit()
        theirs(_x(5, seed))
    _equal(ours, theirs, 1e-14)


def test_discarded_statistics_leave_no_trace() -> None:
    ours, theirs = _pair()
    statistics = _statistics([ours])
    with batch_layout(BatchLayout((5,), 5)):
        ours(_x(5))
    statistics.clear()
    statistics.commit()
    _equal(ours, theirs)


def test_a_module_without_channels_counts_its_batches() -> None:
    """A rank without branches of a stacked block: no statistics, the same counter as its copies."""
    for modules in ([BatchNorm(0)], [BatchNorm(0), BatchNorm(2), BatchNorm(0)]):
        StagedStatistics(modules, torch.device("cpu"), torch.float32).commit()
        assert [int(m.num_batches_tracked or 0) for m in modules] == [
            int(not m.num_features) for m in modules
        ]


def test_a_slice_of_the_channels() -> None:
    ours, _ = _pair()
    statistics = _statistics([ours])
    x = _x(6).detach()
    with batch_layout(BatchLayout((4, 2), 6)):
        whole = ours(x)
        staged = statistics.buffer.clone()
        statistics.clear()
        parts = [ours(x[:, rows], rows) for rows in (slice(0, 1), slice(1, 3))]  # not contiguous
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)
    torch.testing.assert_close(statistics.buffer, staged, rtol=0, atol=1e-15)


@pytest.mark.parametrize("view", ["contiguous", "channels_last", "transposed", "expanded", "flat", "sliced"])
def test_any_strides(view: str) -> None:
    """torch's own kernel writes wrong numbers for some of these."""
    ours, _ = _pair()
    wide = torch.randn(6, 2 * CHANNELS, 4, 4, dtype=torch.float64)
    x = {
        "contiguous": wide[:, :CHANNELS].contiguous(),
        "channels_last": wide[:, :CHANNELS].contiguous(memory_format=torch.channels_last),
        "transposed": wide[:, :CHANNELS].contiguous().transpose(2, 3),
        "expanded": wide[:, :1].expand(6, CHANNELS, 4, 4),
        "flat": wide[:, :CHANNELS, 0, 0],
        "sliced": wide[:, CHANNELS:],
    }[view]
    with batch_layout(BatchLayout((4, 2), 6)):
        y = ours(x)
    parts = []
    for part in (x[:4], x[4:]):
        mean = part.transpose(0, 1).flatten(1).mean(1)
        std = (part.transpose(0, 1).flatten(1).var(1, unbiased=False) + ours.eps).sqrt()
        shape = (1, -1, *([1] * (x.dim() - 2)))
        normal = (part - mean.view(shape)) / std.view(shape)
        parts.append(normal * ours.weight.view(shape) + ours.bias.view(shape))
    torch.testing.assert_close(y, torch.cat(parts), rtol=0, atol=1e-12)


def test_wrong_number_of_rows_is_an_error() -> None:
    """Such as of (samples · tokens, channels)."""
    ours, _ = _pair()
    for layer, name in ((ours, "a BatchNorm of 3 channels"), (Dropout(0.5, layer="2.1"), "the dropout 2.1")):
        layout = BatchLayout((2, 2), 4, torch.arange(4))
        with (
            batch_layout(layout),
            pytest.raises(ModelError, match=f"{name} got 5 rows for a batch of 4 samples"),
        ):
            layer(_x(5))


def test_evaluation_ignores_the_layout() -> None:
    ours, theirs = _pair()
    with batch_layout(BatchLayout((1, 1), 2)):
        assert torch.equal(ours.eval()(_x(5)), theirs.eval()(_x(5)))


# ---- groups whose samples lie in several processes: here in several threads, each with its own copy


class _Sum:
    """Adds up tensors of several threads."""

    def __init__(self, parts: int) -> None:
        self.slots: list[Tensor | None] = [None] * parts
        self.barrier = threading.Barrier(parts)

    def of(self, part: int) -> Callable[[Tensor], Tensor]:
        def all_reduce(x: Tensor) -> Tensor:
            self.slots[part] = x.clone()
            self.barrier.wait()
            total = torch.stack([slot for slot in self.slots if slot is not None]).sum(0)
            self.barrier.wait()
            return x.copy_(total)

        return all_reduce


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "shares",  # by part: (first group, group sizes)
    [
        [(0, (3,)), (0, (3,))],
        [(0, (4, 1)), (1, (1,)), (2, ())],
        [(0, ()), (0, (2, 4))],
        [(0, (1,)), (0, (5,))],
    ],
)
def test_synced_groups_equal_one_process(shares: list[tuple[int, tuple[int, ...]]], affine: bool) -> None:
    groups = [0] * max(first + len(sizes) for first, sizes in shares)
    for first, sizes in shares:
        for index, size in enumerate(sizes):
            groups[first + index] += size
    whole, _ = _pair(affine=affine)
    x = _x(6)
    weights = torch.randn(6, CHANNELS, 4, 4, dtype=torch.float64)
    reference = _statistics([whole])
    with batch_layout(BatchLayout(tuple(groups), 6)):
        y = whole(x)
    (y * weights).sum().backward()

    rows = [sum(sizes) for _, sizes in shares]
    copies = [_pair(affine=affine)[0] for _ in shares]
    staged = [_statistics([copy]) for copy in copies]
    xs = [part.detach().clone().requires_grad_() for part in x.split(rows)]
    ys: dict[int, Tensor] = {}
    total = _Sum(len(shares))

    def run(part: int) -> None:
        first, sizes = shares[part]
        sync = GroupSync(first, tuple(groups), part, len(shares), total.of(part))
        with batch_layout(BatchLayout(sizes, 6, sync=sync)):
            ys[part] = copies[part](xs[part])
        (ys[part] * weights.split(rows)[part]).sum().backward()

    threads = [threading.Thread(target=run, args=(part,)) for part in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    def close(a: Tensor | None, b: Tensor | None) -> None:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)

    close(torch.cat([ys[part] for part in range(len(shares))]), y)
    close(torch.cat([part.grad for part in xs if part.grad is not None]), x.grad)
    for name, parameter in whole.named_parameters():
        grads = [copy.get_parameter(name).grad for copy in copies]
        close(torch.stack([grad for grad in grads if grad is not None]).sum(0), parameter.grad)
    close(torch.stack([s.buffer for s in staged]).sum(0), reference.buffer)


def test_synced_groups_have_no_second_derivative() -> None:
    """Said, where autograd would leave terms out."""
    x, sync = _x(3), GroupSync(0, (3,), 0, 1, lambda values: values)
    with batch_layout(BatchLayout((3,), 3, sync=sync)):
        y = _pair()[0](x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_a_group_of_one_value_a_channel_is_refused() -> None:
    """As torch's BatchNorm refuses it, whoever computes the statistics: its variance is 0 ÷ 0."""
    sync = GroupSync(1, (2, 1), 0, 1, lambda x: x)
    for sizes, over in (((2, 1), None), ((1,), None), ((1,), sync)):
        norm, x = BatchNorm(3), torch.randn(sum(sizes), 3, 1, 1)
        place = "BN group 2 of 2" if over is not None or len(sizes) > 1 else "BN group 1 of 1"
        with batch_layout(BatchLayout(sizes, 3, sync=over)), pytest.raises(ModelError, match=place):
            norm(x)
        with batch_layout(BatchLayout(sizes, 3, sync=over)):
            norm(x.expand(-1, -1, 2, 1))


# ---- conversion


def test_prepare_keeps_names_and_tensors() -> None:
    shared = nn.BatchNorm2d(4)
    inner = nn.Sequential(shared, nn.Dropout2d(0.2))
    network = nn.Sequential(nn.Conv2d(3, 4, 1), shared, inner, nn.Dropout(0.1))
    before = {name: id(t) for name, t in [*network.named_parameters(), *network.named_buffers()]}
    keys = list(network.state_dict())
    network[1].eval()
    assert prepare(network) is network
    after = {name: id(t) for name, t in [*network.named_parameters(), *network.named_buffers()]}
    assert after == before
    assert list(network.state_dict()) == keys
    assert isinstance(network[1], BatchNorm)
    assert network[1] is inner[0], "a module used twice stays one"
    assert not network[1].training
    layers = {m.layer: (m.p, m.per_channel) for m in network.modules() if isinstance(m, Dropout)}
    assert layers == {"2.1": (0.2, True), "3": (0.1, False)}
    converted = list(network.modules())
    assert list(prepare(network).modules()) == converted, "a second time changes nothing"


def test_prepare_converts_every_name_of_a_module() -> None:
    """One twice in a parent too: a BatchNorm stays one, a dropout draws at each place, as torch's does."""
    norm, drop, again = nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))
    network = nn.Sequential(drop, norm, drop, norm, nn.Sequential(drop), again, again)
    prepare(prepare(network))
    assert isinstance(network[1], BatchNorm)
    assert network[1] is network[3]
    drops = [network[0], network[2], network[4][0], again[0]]  # type: ignore[index]
    assert [m.layer for m in drops if isinstance(m, Dropout)] == ["0", "2", "4.0", "5.0"]
    with batch_layout(BatchLayout((4,), 4, sample_ids=torch.arange(4), random_key=7)):
        first, second = (drops[i](torch.ones(4, 20)) for i in (0, 1))
        assert torch.equal(first, drops[0](torch.ones(4, 20)))
    assert not torch.equal(first, second)


class _Rectified(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class _Late(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().mean()) > 0 else x


class _Wider(nn.BatchNorm2d):
    """Computes what torch's computes."""

    def __init__(self) -> None:
        super().__init__(2 * CHANNELS)


def test_prepare_keeps_hooks() -> None:
    network, called = nn.Sequential(_Wider(), nn.Dropout(0.5)), list[str]()
    for layer in list(network):
        layer.register_forward_hook(lambda module, args, y: called.append(type(module).__name__))
    prepare(network)(torch.ones(2, 2 * CHANNELS, 2, 2))
    assert called == ["BatchNorm", "Dropout"]


def test_prepare_takes_layers_that_draw_nothing() -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, dropout=0.0)
    prepare(nn.Sequential(nn.InstanceNorm2d(4), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4), encoder))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.SyncBatchNorm(4), "0.1 is a SyncBatchNorm"),
        (nn.AlphaDropout(0.5), "0.1 is a AlphaDropout"),
        (nn.FeatureAlphaDropout(0.5), "FeatureAlphaDropout"),
        (nn.RReLU(), "RReLU"),
        (nn.FractionalMaxPool2d(2, 3), "FractionalMaxPool2d"),
        (
            nn.InstanceNorm2d(4, track_running_stats=True),
            "InstanceNorm2d with track_running_stats=True: .* set it to False",
        ),
        (
            nn.TransformerEncoderLayer(4, 2),
            "0.1.self_attn is a MultiheadAttention with dropout=0.1: .* set it to 0",
        ),
        (nn.GRU(4, 4, 2, dropout=0.5), "GRU with dropout=0.5"),
        (nn.LazyBatchNorm2d(), "0.1 is lazy"),
        (
            _Rectified(4),
            "0.1 is a _Rectified, which does something else than nn.BatchNorm2d: .* holds a plain",
        ),
        (
            parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Softplus()),
            "ParametrizedBatchNorm2d",
        ),
        (_Late(0.5), "0.1 is a _Late, which does something else than nn.Dropout"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_prepare_refuses_layers_whose_result_depends_on_the_plan(layer: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        prepare(nn.Sequential(nn.Sequential(nn.Identity(), layer)))


# ---- dropout and its numbers


def _dropped(layer: Dropout, x: Tensor, ids: list[int], key: int = 5) -> Tensor:
    layout = BatchLayout((len(ids),), len(ids), torch.tensor(ids, dtype=torch.long), key)
    with batch_layout(layout):
        y: Tensor = layer(x)
    return y


@pytest.mark.parametrize("per_channel", [False, True])
def test_masks_depend_on_key_layer_and_sample_alone(per_channel: bool) -> None:
    layer = Dropout(0.4, per_channel=per_channel, layer="a")
    x = torch.ones(4, 16, 3, 3)
    y = _dropped(layer, x, [7, 3, 9, 2**40])
    assert torch.equal(_dropped(layer, x[:2], [9, 3]), y[[2, 1]])
    assert torch.equal(_dropped(layer, x[:0], []), y[:0])
    for other, key in ((Dropout(0.4, per_channel=per_channel, layer="b"), 5), (layer, 6)):
        assert not torch.equal(_dropped(other, x, [7, 3, 9, 2**40], key), y)
    assert not torch.equal(y[0], y[1])
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.6))}
    if per_channel:
        assert torch.equal(y, y[:, :, :1, :1].expand_as(y))


def test_dropout_is_torchs_without_a_layout_and_off_in_evaluation() -> None:
    x = torch.ones(4, 8, 3, 3)
    for layer, theirs in (
        (Dropout(0.3), nn.Dropout(0.3)),
        (Dropout(0.3, per_channel=True), nn.Dropout2d(0.3)),
    ):
        torch.manual_seed(1)
        y = layer(x)
        torch.manual_seed(1)
        assert torch.equal(y, theirs(x))
        assert torch.equal(_dropped(layer.eval(), x, [0, 1, 2, 3]), x)


def test_the_share_kept_is_right() -> None:
    y = _dropped(Dropout(0.25, layer="a"), torch.ones(64, 1024), list(range(64)))
    assert abs(float((y > 0).float().mean()) - 0.75) < 0.01
    assert abs(float(y.mean()) - 1.0) < 0.02
    assert torch.equal(_dropped(Dropout(1.0, layer="a"), torch.ones(2, 8), [0, 1]), torch.zeros(2, 8))


def test_random_numbers_are_stable_and_even() -> None:
    """Values that a later version, or another machine, must give too: runs are resumed there."""
    assert fold("a", 1) == 8390313410132574505
    keys = sample_keys(fold("a", 1), torch.tensor([0, 1, 2**40]))
    assert keys.tolist() == [3767955941, 151192494, 3997178129]
    assert (uniform(keys, 2) * 2**24).tolist() == [
        [10460493, 4910796],
        [1021550, 13526681],
        [10040028, 13195930],
    ]
    assert len({fold("a", 1), fold("a", "1"), fold("a1"), fold(1, "a"), fold("a", 2)}) == 5
    keys = sample_keys(fold("x"), torch.arange(2000))
    assert len(keys.unique()) == 2000
    numbers = uniform(keys, 500)
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    counts = torch.histc(numbers, 20, 0, 1) / numbers.numel()
    assert float((counts - 0.05).abs().max()) < 1e-3
    correlation = torch.corrcoef(numbers[:50])
    assert float((correlation - torch.eye(50)).abs().max()) < 0.25


@pytest.mark.parametrize("sizes", [(6,), (2, 4)], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_users_checkpoint_changes_nothing(use_reentrant: bool, sizes: tuple[int, ...]) -> None:
    """Run again in backward, where no layout is said: the same groups, masks and sizes, and nothing staged twice."""

    def gradients(keep: bool) -> list[Tensor]:
        torch.manual_seed(0)
        series = GroupSeriesConv(CHANNELS, CHANNELS, (1, 1), (1, 3))
        series.group_size, series.temperature = "sampled", 0.0
        for parameter in series.parameters():
            nn.init.normal_(parameter)
        layers = prepare(
            nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Dropout(0.3), series, nn.Sigmoid())
        ).double()
        staged = _statistics(m for m in layers.modules() if isinstance(m, BatchNorm))
        x, found = _x(6), list[Tensor]()
        for key in (3, 4):  # of which the series draws sizes that differ
            with batch_layout(BatchLayout(sizes, 6, torch.arange(6), key)):
                y = layers(x) if keep else checkpoint(layers, x, use_reentrant=use_reentrant)
            y.square().sum().backward()
            found += [y.detach(), staged.buffer.clone()]
            staged.commit()
        grads = [x.grad, *(parameter.grad for parameter in layers.parameters())]
        return [*found, *(grad for grad in grads if grad is not None), *layers.buffers()]

    for again, kept in zip(gradients(keep=False), gradients(keep=True), strict=True):
        torch.testing.assert_close(again, kept, rtol=0, atol=1e-13)


def test_a_users_checkpoint_under_a_plan() -> None:
    """Of layers in the stem, in one branch and around a block whose sum is split."""
    cases = [
        Case("checkpointed", (1, 2), ((1, 1), (1, 1)), "ss"),
        Case("checkpointed", (1, 2), (S, (2, 0)), "sr", trial={"bn_batch_size": 16, "accumulation": 2}),
        Case(
            "checkpointed",
            (1, 2),
            ((0, 2), (2, 0)),
            "rs",
            trial={"chunks": 2, "overlap": "on", "recompute": True},
        ),
    ]
    for report in run_ranks(2, parity, cases)[0]:
        assert report.max_relative_difference <= 1e-9, report


def test_a_users_checkpoint_around_several_sums_is_refused() -> None:
    """A rank without branches would stop running it again before the others' sums."""
    with pytest.raises(AssertionError, match="checkpoint of your own runs sums of 0 again"):
        run_ranks(2, parity, [Case("checkpointed row", (1, 2), ((2, 0),), "rr")], timeout_s=60)


def test_a_layer_that_has_run_is_copied_and_saved() -> None:
    """The layout that it ran under, which holds connections of a process, goes with neither."""
    ours, _ = _pair()
    sync = GroupSync(0, (3,), 0, 1, lambda values: values)
    with batch_layout(BatchLayout((3,), 3, sync=sync)):
        ours(_x(3))
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again.weight, ours.weight)
