"""The recorder: parts of a step, what lies inside them, what it keeps."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from anabranch.runtime.profile_loop import record_seconds
from anabranch.runtime.recorder import PARTS, Recorder, by_part, marked


class Clock:
    """Goes when it is told to, and a microsecond whenever it is looked at."""

    now = 100.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", CLOCK)


def spend(seconds: float) -> None:
    CLOCK.now += seconds


def one_step(recorder: Recorder) -> dict[str, float]:
    with recorder.span("data"):
        spend(0.002)
    with recorder.span("forward"):
        start = recorder.now()
        spend(0.003)
        recorder.exchanged("all_reduce", 8, start)
        spend(0.004)
    recorder.end_step()
    return dict(zip(PARTS, recorder.times(), strict=True))


def test_an_exchange_is_taken_out_of_its_part() -> None:
    recorder = Recorder()
    recorder.end_step()
    times = one_step(recorder)
    assert times["data"] == pytest.approx(0.002, abs=1e-5)
    assert times["exchange"] == pytest.approx(0.003, abs=1e-5)
    assert times["forward"] == pytest.approx(0.004, abs=1e-5)
    assert sum(seconds for part, seconds in times.items() if part != "step") <= times["step"]
    table = by_part([list(times.values()), list(times.values())])
    assert table["unattributed"][0] == pytest.approx(0.0, abs=1e-5)
    assert len(table["step"]) == 2


def test_what_comes_before_a_step_belongs_to_none() -> None:
    """Building before the first one; after a recovery the step that was broken off too."""
    recorder = Recorder()
    spend(9.0)
    recorder.begin()
    assert recorder.times() == [0.0] * len(PARTS)
    assert one_step(recorder)["step"] == pytest.approx(0.009, abs=1e-5)
    with recorder.span("forward"):
        spend(5.0)
    recorder.begin()
    assert recorder.times() == [0.0] * len(PARTS)
    assert (recorder.spans(), recorder.num_records) == ([], 0)
    assert one_step(recorder)["forward"] == pytest.approx(0.004, abs=1e-5)


def test_a_bucket_of_gradients_stays_in_its_part() -> None:
    recorder = Recorder()
    recorder.detailed = True
    recorder.end_step()
    with recorder.span("reduction"):
        sent = recorder.now()
        spend(0.002)
        recorder.reduced("world_bucket", 100, sent, sent)
    recorder.end_step()
    times = dict(zip(PARTS, recorder.times(), strict=True))
    assert times["reduction"] == pytest.approx(0.002, abs=1e-5)
    assert times["exchange"] == 0.0
    assert [span.part for span in recorder.spans()] == ["sent", "reduction", "reduction"]


def test_the_exchanges_of_an_evaluation_are_no_trainings() -> None:
    recorder = Recorder()
    recorder.begin()
    with recorder.span("idle"):
        start = recorder.now()
        spend(0.002)
        recorder.exchanged("all_reduce", 100, start)
    recorder.end_step()
    times = dict(zip(PARTS, recorder.times(), strict=True))
    assert times["idle"] == pytest.approx(0.002, abs=1e-5)
    assert times["exchange"] == 0.0


def test_elements_forward_and_backward() -> None:
    recorder, layers = Recorder(), {name: nn.Linear(4, 4) for name in ("stem", "a", "head")}
    recorder.detailed = True
    x = torch.ones(2, 4)
    with recorder.span("forward"):
        for name, layer in layers.items():
            recorder.at(name)
            x = marked(layer(x), recorder, name)
    with recorder.span("backward"):
        x.sum().backward()
    recorder.end_step()
    elements = [(span.part, span.element) for span in recorder.spans() if span.element]
    forward = [("forward", name) for name in layers]
    assert elements == forward + [("backward", name) for name in reversed(layers)]
    spans = recorder.spans()
    for part in ("forward", "backward"):
        (whole,) = [span for span in spans if span.part == part and not span.element]
        assert all(whole.start <= s.start <= s.end <= whole.end for s in spans if s.part == part)


def test_nothing_is_recorded_while_off() -> None:
    recorder = Recorder()
    recorder.enabled = False
    times = one_step(recorder)
    assert recorder.num_records == 0
    assert sum(seconds for part, seconds in times.items() if part != "step") == 0.0
    recorder.enabled = True
    one_step(recorder)
    assert recorder.num_records == 3


def test_kept_steps() -> None:
    recorder = Recorder()
    recorder.end_step()
    recorder.keep()
    one_step(recorder)
    one_step(recorder)
    (first, start, end), (_, after, _) = recorder.kept()
    assert [span.part for span in first] == ["data", "forward", "forward"]
    assert start < end == after
    assert all(start <= span.start <= span.end <= end for span in first)
    assert recorder.kept() == []


def test_a_record_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real clock
    assert 0 < record_seconds(torch.device("cpu")) < 1e-4


class Gpu:
    """What torch.cuda is to the recorder: a stream that runs `behind_s` after the host gives it work.

    per_host: how fast its clock goes, by the host's.
    """

    behind_s, per_host = 0.05, 1.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu, self.waits, self.ranges, self.open = self, list[str](), list[str](), list[int]()

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                self.at = CLOCK.now + gpu.behind_s

            def synchronize(self) -> None:
                gpu.waits.append("event")
                CLOCK.now = max(CLOCK.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                assert max(self.at, end.at) <= CLOCK.now, (
                    "the device has not come so far: an error on a real one"
                )
                return float(torch.tensor(1e3 * gpu.per_host * (end.at - self.at), dtype=torch.float32))

        def synchronize(device: object) -> None:
            self.waits.append("device")
            spend(self.behind_s)

        def range_start(name: str) -> int:
            self.ranges.append(name)
            self.open.append(len(self.ranges))
            return len(self.ranges)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda.nvtx, "range_start", range_start)
        monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda number: self.open.remove(number))


def test_on_a_gpu_events_are_read_late_and_nothing_waits_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    recorder = Recorder(torch.device("cuda"))
    assert gpu.waits == []
    recorder.end_step()
    times = one_step(recorder)
    assert gpu.waits == ["event"]  # for the step that has ended, when its times are asked for
    assert times["data"] == pytest.approx(0.002, abs=1e-5)
    assert times["exchange"] == pytest.approx(0.003, abs=1e-5)
    assert times["forward"] == pytest.approx(0.004, abs=1e-5)
    assert sum(seconds for part, seconds in times.items() if part != "step") <= times["step"] + 1e-8
    recorder.align()
    recorder.keep()
    recorder.detailed = True
    for _ in range(2):
        with recorder.span("forward"):
            for name in ("stem", "stage1.block1"):
                recorder.at(name)
                spend(0.001)
        recorder.end_step()
    before = len(gpu.waits)
    (first, _, _), (second, start, end) = recorder.kept()
    assert {*gpu.waits[before:]} == {"device", "event"}  # once all steps are done
    assert [span.element for span in first] == ["stem", "stage1.block1", ""]
    assert [span.end - span.start for span in second] == pytest.approx([0.001, 0.001, 0.002], abs=1e-5)
    assert start <= second[0].start <= second[-1].end <= end <= CLOCK.now + 1e-5
    assert gpu.ranges == ["forward stem", "forward stage1.block1"] * 2
    assert gpu.open == []


def test_the_clock_of_a_gpu_is_tied_before_and_after_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes a thousandth faster than the host's: after 10 s that would be 10 ms."""
    gpu = Gpu(monkeypatch)
    gpu.behind_s, gpu.per_host = 1e-4, 1.001
    recorder = Recorder(torch.device("cuda"))
    recorder.align()
    recorder.end_step()
    recorder.keep()
    started = CLOCK.now
    for _ in range(2):
        spend(5.0)
        one_step(recorder)
    _, (_, _, end) = recorder.kept()
    assert end - started == pytest.approx(10.018, abs=1e-3)
    assert 0 < recorder.clock_error_s < 1e-3


def test_the_last_of_many_steps_is_as_exact_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events tell milliseconds as a float32: after 33 minutes in steps of an eighth of a ms, counted from the first."""
    gpu = Gpu(monkeypatch)
    gpu.behind_s = 1e-4
    recorder = Recorder(torch.device("cuda"))
    recorder.align()
    recorder.begin()
    recorder.keep()

    def step() -> None:
        with recorder.span("data"):
            spend(0.00206)
        recorder.end_step()
        spend(5.0)

    for _ in range(400):
        step()
    ((span,), start, _) = recorder.kept()[-1]
    assert span.end - span.start == pytest.approx(0.00206, abs=4e-6)
    assert span.start - start == pytest.approx(5.0, abs=4e-6)
    step()
    (span,) = recorder.spans()
    assert span.end - span.start == pytest.approx(0.00206, abs=4e-6)


def test_exchanges_are_nvtx_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the part that runs, that of a bucket's wait too; closed where they end, and none unless detailed."""
    gpu = Gpu(monkeypatch)
    recorder = Recorder(torch.device("cuda"))
    recorder.exchanged("all_reduce", 8, recorder.started("all_reduce"))
    assert gpu.ranges == []
    recorder.detailed = True
    with recorder.span("forward"):
        start = recorder.started("all_reduce")
        assert len(gpu.open) == 1
        recorder.exchanged("all_reduce", 8, start)
    with recorder.span("reduction"):
        sent = recorder.now()
        recorder.reduced("world_bucket", 100, sent, recorder.started("world_bucket"))
    assert gpu.ranges == ["forward all_reduce", "reduction world_bucket"]
    assert gpu.open == []
