"""The mesh: ranks as data × branch, `branch` innermost, and a process group along each axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from anabranch.runtime.errors import ConfigError
from anabranch.runtime.process_group import share_memory


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


def make_mesh(data: int, branch: int, device_type: str = "cpu", timeout_s: float = 600.0) -> Mesh:
    """The mesh over the default process group, which must have data·branch ranks (else ConfigError).

    Groups of CPU ranks on one host exchange through shared memory, and wait for a rank no longer than `timeout_s`.
    """
    if dist.get_world_size() != data * branch:
        raise ConfigError(
            f"a mesh of {data}x{branch} needs {data * branch} ranks, there are {dist.get_world_size()}: "
            "change the mesh or the number of workers"
        )
    device_mesh = init_device_mesh(device_type, (data, branch), mesh_dim_names=("data", "branch"))
    world = dist.group.WORLD
    assert world is not None, "init_device_mesh needs the default process group"
    mesh = Mesh(
        device_mesh,
        data,
        branch,
        device_mesh.get_local_rank("data"),
        device_mesh.get_local_rank("branch"),
        device_mesh.get_group("data"),
        device_mesh.get_group("branch"),
        world,
    )
    if device_type == "cpu":
        for group in (mesh.world_group, mesh.data_group, mesh.branch_group):
            share_memory(group, timeout_s)
    return mesh
