"""The nodes of a cluster while they are asked what would stop a run there; one light actor a node."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.cluster import checks, environment, node_probe
from anabranch.cluster.checks import Check, NodeReport
from anabranch.cluster.errors import ClusterError
from anabranch.cluster.node_probe import NodeProbe
from anabranch.cluster.placement import Host
from anabranch.cluster.ray_calls import counted

START_S = 20.0
REACH_S = 4.0
REDUCE_S = 10.0


class Ward:
    """The nodes' probes while they are asked; a node that does not answer is asked nothing more."""

    def __init__(self, found: tuple[Host, ...]) -> None:
        import ray
        from ray import cloudpickle
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # By value: a node that lacks this package can say so.
        for module in (node_probe, environment):
            cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
        self._found = found
        self._driver = NodeProbe()
        try:
            self._probes: list[Any] = [
                counted(
                    "doctor_actor",
                    ray.remote(NodeProbe)
                    .options(
                        num_cpus=0,
                        max_concurrency=4,
                        scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False),
                    )
                    .remote,
                )
                for host in found
            ]
        finally:
            for module in (node_probe, environment):
                cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]
        addresses = _addresses()
        self._nodes = [
            NodeReport(host.name, addresses[host.node_id], host.gpus, host.free_gpus) for host in found
        ]

    def __enter__(self) -> Ward:
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for probe in self._probes:
            counted("doctor_kill", ray.kill, probe)

    def glance(self, folder: Path | None) -> list[Check]:
        """What `train` checks by itself."""
        driver = self._look(folder, deep=False)
        result = checks.check_answers(self._nodes) + checks.check_versions(driver, self._answering)
        result += self._check_token()
        return result + (self._share(folder) if folder and len(self._found) > 1 else [])

    def examine(self, folder: Path | None, port: int) -> list[Check]:
        """Everything."""
        driver = self._look(folder, deep=True)
        result = checks.check_answers(self._nodes) + checks.check_versions(driver, self._answering)
        result += checks.check_gpus(self._answering)
        result += self._network(port)
        result += checks.check_clocks(self._answering)
        if folder:
            result += self._share(folder) + checks.check_disk(str(folder), self._answering)
        result += self._check_token()
        return result + checks.check_pairs(self._reduce_pairs())

    @property
    def _answering(self) -> list[NodeReport]:
        return [node for node in self._nodes if not node.error]

    def _look(self, folder: Path | None, deep: bool) -> dict[str, str]:
        """Fill the reports; the driver's versions."""
        where = str(folder or Path.cwd())
        refs = [probe.look.remote(where, deep) for probe in self._probes]
        own = self._driver.look(where, deep)
        self._fill(
            refs,
            2 * START_S if deep else START_S,
            lambda node, told: replace(
                node,
                versions=told["versions"],
                missing_interfaces=told["missing_interfaces"],
                gpu_memory_used=told["gpu_memory_used"],
                auth_mode=told["auth_mode"],
                free_bytes=told["free_bytes"],
            ),
        )
        self._each(lambda probe, node: probe.interface.remote(node.address), _set("interface"))
        if deep:
            self._ask_clocks()
        return dict(own["versions"])

    def _check_token(self) -> list[Check]:
        return checks.check_token(self._answering, os.environ.get("RAY_AUTH_MODE", ""))

    def _ask_clocks(self) -> None:
        for index, probe in enumerate(self._probes):
            begin = time.time()

            def skew(node: NodeReport, told: float, begin: float = begin) -> NodeReport:
                end = time.time()  # it was asked between the two
                return replace(node, skew_s=told - end if told > end else min(0.0, told - begin))

            if not self._nodes[index].error:
                self._fill_one(index, probe.clock.remote(), REACH_S, skew)

    def _network(self, port: int) -> list[Check]:
        nodes = self._answering
        result = checks.check_interfaces(nodes)
        if not nodes:
            return result
        first = nodes[0]
        index = self._nodes.index(first)
        try:
            given = self._get(self._probes[index].listen.remote(port))
            result += checks.check_port(first, port, given)
            given = given or self._get(self._probes[index].listen.remote(0))
        except ClusterError as error:
            self._nodes[index] = replace(first, error=str(error))
            return result + checks.check_answers([self._nodes[index]])
        self._each(lambda probe, node: probe.reach.remote(first.address, given, REACH_S), _set("reach_error"))
        nodes = self._answering
        return result + checks.check_reach(nodes[0], nodes)

    def _share(self, folder: Path) -> list[Check]:
        """Everyone leaves a file in a folder made for it, then everyone looks."""
        base = folder
        while not base.exists():
            base = base.parent
        nonce = secrets.token_hex(8)
        common = base / f".anabranch-doctor-{nonce}"
        try:
            common.mkdir()
            error = self._driver.write(str(common), "driver", nonce)
            if not error:
                self._each(
                    lambda probe, node: probe.write.remote(str(common), node.name, nonce),
                    _set("folder_error"),
                )
                wrote = {node.name for node in self._answering if not node.folder_error} | {"driver"}
                self._each(
                    lambda probe, node: probe.read.remote(str(common), nonce),
                    lambda node, seen: replace(node, unseen=sorted(wrote - set(seen))),
                )
        except OSError as raised:
            error = raised.strerror or str(raised)
        finally:
            with suppress(OSError):
                shutil.rmtree(common)
        return checks.check_folder(str(folder), error, self._answering)

    def _reduce_pairs(self) -> dict[tuple[str, str], str]:
        """Each pair once, as many at a time as there are hosts for: a round-robin tournament."""
        pairs: dict[tuple[str, str], str] = {}
        for games in rounds([i for i, node in enumerate(self._nodes) if not node.error]):
            running = {}
            for a, b in games:
                with suppress(ClusterError):
                    here = self._get(self._probes[a].hold.remote())
                    running[a, b] = [
                        self._probes[index].reduce.remote(
                            rank, self._nodes[index].address, self._nodes[a].address, here, REDUCE_S
                        )
                        for rank, index in enumerate((a, b))
                    ]
            for a, b in games:
                try:
                    told = [self._get(ref, 3 * REDUCE_S) for ref in running[a, b]]
                    error = next((text for text in told if text), "")
                except (ClusterError, KeyError):
                    error = f"no answer in {3 * REDUCE_S:g} s"
                pairs[self._nodes[a].name, self._nodes[b].name] = error
        return pairs

    def _each(
        self, ask: Callable[[Any, NodeReport], Any], fill: Callable[[NodeReport, Any], NodeReport]
    ) -> None:
        """Ask the nodes that answer, all at once."""
        refs = [
            None if node.error else ask(probe, node)
            for probe, node in zip(self._probes, self._nodes, strict=True)
        ]
        self._fill(refs, 2 * REACH_S, fill)

    def _fill(
        self, refs: Sequence[Any], timeout_s: float, fill: Callable[[NodeReport, Any], NodeReport]
    ) -> None:
        deadline = time.monotonic() + timeout_s
        for index, ref in enumerate(refs):
            if ref is not None:
                self._fill_one(index, ref, max(0.0, deadline - time.monotonic()), fill)

    def _fill_one(
        self, index: int, ref: Any, timeout_s: float, fill: Callable[[NodeReport, Any], NodeReport]
    ) -> None:
        try:
            self._nodes[index] = fill(self._nodes[index], self._get(ref, timeout_s))
        except ClusterError as error:
            self._nodes[index] = replace(self._nodes[index], error=str(error))

    def _get(self, ref: Any, timeout_s: float = REACH_S) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayError

        try:
            return counted("doctor_result", ray.get, ref, timeout=timeout_s)
        except GetTimeoutError as error:
            raise ClusterError(f"no answer in {timeout_s:.0f} s") from error
        except RayActorError as error:
            # Ray has noticed first, and calls a host that it lost a cancelled actor
            raise ClusterError(f"no answer, Ray has lost the worker there: {_last_line(error)}") from error
        except RayError as error:
            raise ClusterError(_last_line(error)) from error


def _set(name: str) -> Callable[[NodeReport, Any], NodeReport]:
    def fill(node: NodeReport, told: Any) -> NodeReport:
        return replace(node, **{name: told})

    return fill


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _addresses() -> dict[str, str]:
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in counted("doctor_nodes", ray.nodes)}


def rounds(players: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair of players exactly once, nobody twice in a round."""
    seats: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    result = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[i], seats[-1 - i]) for i in range(len(seats) // 2)]
        result.append([(a, b) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return result
