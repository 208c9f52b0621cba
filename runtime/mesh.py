"""The mesh: ranks as data × branch, `branch` innermost, and a process group along each axis."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from anabranch.runtime import exchange
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.process_group import group_timeout_s, share_memory


@dataclass(frozen=True)
class Mesh:
    """This rank's place. The *branch group* holds one replica; the *data group* holds the same branches
    elsewhere.

    data, branch: sizes of the axes. data_rank, branch_rank: this rank's coordinates.
    """

    device_mesh: DeviceMesh
    data: int
    branch: int
    data_rank: int
    branch_rank: int
    data_group: dist.ProcessGroup
    branch_group: dist.ProcessGroup
    world_group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return self.data_rank * self.branch + self.branch_rank

    @property
    def world_size(self) -> int:
        return self.data * self.branch


_made: list[Mesh] = []  # over the default process group that stands


def make_mesh(data: int, branch: int, device_type: str = "cpu") -> Mesh:
    """The mesh over the default process group, which must have data·branch ranks (else ConfigError); collective.

    The same again for the same axes while that group stands: whoever plans, trains or trains the next stage uses one.
    Groups of CPU ranks on one host exchange through shared memory. All wait for a rank as long as `process_group` says.
    """
    world, num_ranks = dist.group.WORLD, dist.get_world_size()
    assert world is not None, "in a process group"
    if num_ranks != data * branch:
        raise ConfigError(
            f"a mesh of {data}x{branch} needs {data * branch} ranks, there are {num_ranks}: "
            "change the mesh or the number of workers"
        )
    _made[:] = [mesh for mesh in _made if mesh.world_group is world]
    for mesh in _made:
        if (mesh.data, mesh.branch, mesh.device_mesh.device_type) == (data, branch, device_type):
            return mesh
    rows = torch.arange(num_ranks).view(data, branch)
    data_group, branch_group = _own_group(world, rows.T.tolist()), _own_group(world, rows.tolist())
    device_mesh = DeviceMesh.from_group(
        [data_group, branch_group], device_type, rows, mesh_dim_names=("data", "branch")
    )
    data_rank, branch_rank = divmod(dist.get_rank(), branch)
    mesh = Mesh(device_mesh, data, branch, data_rank, branch_rank, data_group, branch_group, world)
    if device_type == "cpu":
        for group in (world, data_group, branch_group):
            share_memory(group)
    _made.append(mesh)
    return mesh


def leave_meshes(but: Mesh) -> None:
    """Leaves the groups of all other meshes, which on GPUs hold buffers; collective, when nobody needs them."""
    gc.collect()  # what ran over them: a step is a cycle of objects, and keeps its network and groups
    exchange.wait_for(torch.device(but.device_mesh.device_type))
    dist.barrier()  # a rank that is still at its last exchange would take this one for lost
    stay = {but.world_group, but.data_group, but.branch_group}
    for group in [group for mesh in _made for group in (mesh.data_group, mesh.branch_group)]:
        if group not in stay:
            exchange.leave(group)
            dist.destroy_process_group(group)
    _made[:] = [but]


def _own_group(world: dist.ProcessGroup, ranks: list[list[int]]) -> dist.ProcessGroup:
    """This rank's among groups along an axis; `init_device_mesh` would give them a timeout of torch's own."""
    if len(ranks) == 1:
        return world
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timedelta(seconds=group_timeout_s()))
    return group
