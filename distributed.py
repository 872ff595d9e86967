"""What several processes need and one does too: a start, a printer, sharding, gathered scores.

The same path for `python train_ganpo.py` and `torchrun`, one process and many, CPU and GPU: a world
of one is a world.
"""

import gc
import math
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from data import InputError, first_line


def cores() -> int:
    """The cores that this process may use; a container's share can be less than it sees."""
    visible = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:  # no such limit here
        return visible
    return visible if quota == "max" else min(visible, math.ceil(int(quota) / int(period)))


def start(timeout: float) -> torch.device:
    """Joins torchrun's rendezvous, or without torchrun a world of one that needs no port -> device.
    A rank that waits for the others longer than timeout seconds ends with an error."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:  # torchrun would leave one thread to each of several processes
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit, **alone)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


@contextmanager
def session(timeout: float):
    """The process group for one run -> device. An error leaves it to flags.refuse."""
    yield start(timeout)
    stop()


def free_memory():
    """Of models that nobody holds any more: FSDP2's refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class StopSignals:
    """SIGTERM and SIGINT within a `with`: the first asks for an orderly end, for which the program
    polls; the second ends the process at once."""

    def __enter__(self):
        self.received = False
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.received = True
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def anywhere(self, device: torch.device) -> bool:
        """Whether any rank has received one. Collective, so that all ranks decide alike."""
        flag = torch.tensor(float(self.received), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def stop():
    dist.barrier()  # a rank that leaves early can abort the others
    dist.destroy_process_group()


def from_rank_0(function: Callable, blame: str):
    """What function() returns on rank 0, on every rank. Its InputError or OSError is raised as an
    InputError on every rank, `blame` first."""
    result, refusal = None, None
    if dist.get_rank() == 0:
        try:
            result = function()
        except (InputError, OSError) as error:
            refusal = f"{blame} {error}"
    both = [result, refusal]
    if dist.get_world_size() > 1:  # see share_out
        dist.broadcast_object_list(both)
    if both[1]:
        raise InputError(both[1])
    return both[0]


def share_out(items: list, function: Callable) -> list:
    """function(part of items) -> a list as long. Each rank does its part -> all of it, in the order
    of items, on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:  # a large object makes gloo's thread start workers of its own: with more threads
        return function(items)  # than cores OpenMP's sleep between tasks, and all is twice as slow
    parts = [None] * ranks
    dist.all_gather_object(parts, function(items[rank::ranks]))
    return [parts[i % ranks][i // ranks] for i in range(len(items))]


def print0(*values):
    if dist.get_rank() == 0:
        print(*values, flush=True)


def check_batch_size(batch_size: int):
    """InputError if the ranks cannot have as many pairs each."""
    ranks = dist.get_world_size()
    if batch_size % ranks:
        raise InputError(f"--batch_size {batch_size} is not divisible by {ranks} ranks")


def sharing_ranks() -> int:
    """How many ranks share one copy of the weights: those of a node. With several nodes each has a
    sharded copy of its own, and only gradients travel between them (HSDP); nodes of one rank each
    share."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world % local:
        raise InputError(f"{world} ranks on nodes of {local}: every node needs as many")
    return world if local == 1 else local


def make_mesh(device: torch.device) -> DeviceMesh:
    sharing, world = sharing_ranks(), dist.get_world_size()
    if sharing == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    shape = (world // sharing, sharing)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(lm: torch.nn.Module, mesh: DeviceMesh, dtype: torch.dtype):
    """FSDP2: a group per layer, the rest in the root's, embedding and head (which may be tied)
    among it. bfloat16 is the precision of compute; weights stay as they are, sums are fp32."""
    mixed = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in lm.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    return fully_shard(lm, mesh=mesh, mp_policy=mixed)


@torch.no_grad()
def load_sharded(
    load: Callable, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, blame: str
):
    """load() -> a policy.PackedLM, and load(shell="meta") the same without its weights. Rank 0
    alone reads them and hands every rank its part, one parameter at a time, so that no other rank
    ever holds the whole model, and none holds it twice. InputError, blame first, on all ranks."""
    weights = {}

    def read():
        try:
            whole = load()
        except Exception as error:  # transformers and safetensors raise what they like
            raise InputError(first_line(error)) from None
        weights.update([*whole.named_parameters(), *whole.named_buffers()])

    lm = shard(load(shell="meta"), mesh, dtype).to_empty(device=device)
    from_rank_0(read, blame)
    for name, x in [*lm.named_parameters(), *lm.named_buffers()]:
        value = (
            weights.pop(name).to(device)
            if dist.get_rank() == 0
            else torch.empty(x.shape, dtype=x.dtype, device=device)
        )
        if isinstance(x, DTensor):
            x.copy_(distribute_tensor(value, x.device_mesh, x.placements))
        else:  # buffers, such as the rotary frequencies, are in no checkpoint
            dist.broadcast(value, 0)
            x.copy_(value)
    return lm


def all_ranks(local: Tensor) -> Tensor:
    """(..., b) of this rank -> (..., B) of all, in rank order; this rank's part keeps its graph."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    parts[dist.get_rank()] = local
    return torch.cat(parts, dim=-1)


def sum_gradients(parameters: Iterable) -> Tensor:
    """Replaces replicated parameters' gradients by their sum over ranks, in one all-reduce -> the
    norm."""
    parameters = [p for p in parameters if p.grad is not None]  # the same ones on every rank
    grads = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(total.view_as(g))
    return flat.norm()


def assert_equal_on_ranks(module: torch.nn.Module):
    """For replicated modules: every rank must have built the same one."""
    sums = torch.stack([p.detach().double().sum() for p in module.parameters()])
    everywhere = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, sums)
    assert all(torch.equal(sums, other) for other in everywhere), "replicas differ between ranks"
