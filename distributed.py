"""What several processes need and one process does too: start, sharding, gathered tensors.

The same code serves `python train_ganpo.py` and `torchrun`, one process and many, CPU and GPU: one
process is then the only rank. A rank is one of the processes that work together.
"""

import cpu

import gc
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from data import InputError, input_error_for, reason_of

# ---------------------------------------------------------------------- start and end


# Variables by which launchers other than torchrun say how many processes they have started.
OTHER_LAUNCHERS = "WORLD_SIZE SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE PMI_SIZE".split()


def check_launch():
    """Raises InputError if several processes were started, but were not told how to meet.

    Each of them would train by itself, all in one folder.
    """
    advice = "start several processes by torchrun --nproc_per_node N PROGRAM"
    if "RANK" in os.environ:
        needed = "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
        if missing := [name for name in needed if name not in os.environ]:
            raise InputError(f"RANK is set, but not {', '.join(missing)}: {advice}, or unset RANK")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            if not os.environ.get(name, "1").isdigit():
                raise InputError(f"{name} is {os.environ[name]!r}, which is no number: {advice}")
        if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
            ranks = f"RANK {os.environ['RANK']} is not below WORLD_SIZE"
            raise InputError(f"{ranks} {os.environ['WORLD_SIZE']}: {advice}")
        return
    for name in OTHER_LAUNCHERS:
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise InputError(f"{name} is {os.environ[name]}, but RANK is not set: {advice}")


def start(timeout: float, miniature: bool = False) -> torch.device:
    """Joins the process group and returns the device of this process.

    Under torchrun its environment variables say how the ranks meet. Without it the process is the
    only rank and needs no port. On a CPU the number of threads and the allocator are set
    (cpu.py). A rank that waits for the others longer than timeout seconds ends with an error.
    miniature says whether the run is one of the miniature, which has its own number of threads
    (cpu.py). Raises InputError as check_launch does.
    """
    check_launch()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # It would build a graph for every shape, and there are open reports of wrong results.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        cpu.keep_freed_memory()
        cpu.begin_vector_mathematics()
        if threads := cpu.chosen_threads(miniature):
            torch.set_num_threads(threads)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    limit = timedelta(seconds=timeout)
    where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    with input_error_for(f"this process could not meet the other ranks at {where}"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit, **alone)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def stop():
    """Leaves the process group once all ranks are here: one that leaves early can abort others."""
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def session(timeout: float, miniature: bool = False):
    """Opens the process group for a `with` block and gives the device; arguments as in start().

    If the block raises, the group stays open; flags.refuse closes it.
    """
    yield start(timeout, miniature)
    stop()


class StopSignals:
    """Handles SIGTERM, SIGINT, SIGUSR1 and SIGHUP within a `with` block.

    Schedulers send the last two before the time of a job is over. The first signal asks for an
    orderly end; the program asks anywhere() whether one has come. The second signal ends the
    process at once. Where nobody reads the program's output any more, that counts as a signal.
    """

    reader_is_gone = False  # set by print0

    def __enter__(self):
        self.received = False
        signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signals.append(signal.SIGHUP)
        self.before = {s: signal.signal(s, self.handle) for s in signals}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.received = True
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def anywhere(self, device: torch.device) -> bool:
        """Returns whether any rank has received a signal. All ranks call it and get one answer."""
        flag = torch.tensor(float(self.received or self.reader_is_gone), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def free_memory():
    """Frees models that no variable refers to any more; those of FSDP2 refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print0(*values):
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        try:
            print(*values, flush=True)
        except BrokenPipeError:  # with a terminal ends also what the program was piped into
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            StopSignals.reader_is_gone = True


# ---------------------------------------------------------------------- objects between ranks


def from_rank_0(function: Callable, message: str):
    """Calls function() on rank 0 and returns its result on every rank.

    If it raises InputError or OSError there, every rank raises an InputError that begins with
    `message`.
    """
    result, refusal = None, None
    if dist.get_rank() == 0:
        try:
            result = function()
        except (InputError, OSError) as error:
            refusal = f"{message} {error}".lstrip()
    both = [result, refusal]
    if dist.get_world_size() > 1:  # see share_out
        dist.broadcast_object_list(both)
    if both[1]:
        raise InputError(both[1])
    return both[0]


def share_out(items: list, function: Callable) -> list:
    """Divides items among the ranks and returns function's results for all, in order, on all ranks.

    function takes a list and returns one of the same length.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        # A large object through gloo would start threads beside this process's own. With more
        # threads than cores everything that follows took twice as long.
        return function(items)
    parts = [None] * ranks
    dist.all_gather_object(parts, function(items[rank::ranks]))
    return [parts[i % ranks][i // ranks] for i in range(len(items))]


def check_batch_size(batch_size: int):
    """Raises InputError if the ranks cannot have equally many pairs of a step."""
    ranks = dist.get_world_size()
    if batch_size % ranks:
        raise InputError(f"--batch_size {batch_size} is not divisible by {ranks} ranks")


# ---------------------------------------------------------------------- sharded models


class Trained(NamedTuple):
    """What training changes, and what a saved state therefore holds."""

    policy: torch.nn.Module  # sharded
    optimizer: torch.optim.Optimizer
    critics: torch.nn.Module | None  # whole on every rank
    critic_optimizer: torch.optim.Optimizer | None


def sharing_ranks() -> int:
    """Returns how many ranks share one copy of the weights: those of one node.

    With several nodes each holds a sharded copy of its own, and only gradients travel between nodes
    (HSDP). If every node has one rank, all ranks share one copy. Raises InputError if nodes differ
    in their number of ranks.
    """
    ranks, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks % local:
        raise InputError(f"{ranks} ranks on nodes of {local}: all nodes need equally many ranks")
    return ranks if local == 1 else local


def make_mesh(device: torch.device, timeout: float) -> DeviceMesh:
    """Returns the mesh over which weights are sharded and, with several nodes, replicated.

    timeout is that of start(); the mesh's own groups would otherwise wait for torch's default.
    """
    sharing, ranks = sharing_ranks(), dist.get_world_size()
    if sharing == ranks:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    shape = (ranks // sharing, sharing)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():
        _set_pg_timeout(timedelta(seconds=timeout), group)
    return mesh


def shard(lm: torch.nn.Module, mesh: DeviceMesh, dtype: torch.dtype):
    """Shards a policy.PackedLM with FSDP2 and returns it.

    Each layer is a group; the rest, with embedding and head (which may be tied), is in the root's
    group. With bfloat16 as the precision of compute the weights stay as they are, and gradients are
    summed in float32. LoRA's adapters stay whole (clip_gradient sums their gradients). In backward
    each group fetches the weights of the next one while it computes.
    """
    mixed = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:  # what a layer is given stays as it is: OLMo's angles are float32
        mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    layers = lm.model.base_model.layers
    whole = {*lm.adapters.parameters()} if lm.adapters else None
    for module in (*layers, lm):
        fully_shard(module, mesh=mesh, mp_policy=mixed, ignored_params=whole)
    # FSDP2 itself does so only in the first backward after several forwards
    for module, following in zip([*layers[1:], lm], layers, strict=True):
        module.set_modules_to_backward_prefetch([following])
    return lm


@torch.no_grad()
def load_sharded(
    load: Callable, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, message: str
):
    """Returns a sharded policy.PackedLM with its weights.

    load() returns the model; load(shell="meta") returns the same without its weights. Rank 0 alone
    reads the weights. It hands every rank its part, one parameter at a time, so that no other rank
    ever holds the whole model and none holds it twice. All ranks raise an InputError that begins
    with `message` if the weights cannot be read.
    """
    weights = {}

    def read():
        try:
            whole = load()
        except Exception as error:  # transformers and safetensors raise many kinds of errors
            raise InputError(reason_of(error)) from None
        weights.update([*whole.named_parameters(), *whole.named_buffers()])

    with input_error_for(message.rstrip(":")):
        shell = load(shell="meta")
    lm = shard(shell, mesh, dtype).to_empty(device=device)
    from_rank_0(read, message)
    for name, x in [*lm.named_parameters(), *lm.named_buffers()]:
        value = (
            weights.pop(name).to(device)
            if dist.get_rank() == 0
            else torch.empty(x.shape, dtype=x.dtype, device=device)
        )
        if isinstance(x, DTensor):
            x.copy_(distribute_tensor(value, x.device_mesh, x.placements))
        else:  # buffers such as the rotary frequencies are in no checkpoint
            dist.broadcast(value, 0)
            x.copy_(value)
    return lm


# ---------------------------------------------------------------------- tensors between ranks


def all_ranks(local: Tensor) -> Tensor:
    """Returns (..., B), the tensors (..., b) of all ranks in rank order.

    b is the same on all ranks. This rank's own part keeps its graph; the others carry no gradient.
    """
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    parts[dist.get_rank()] = local
    return torch.cat(parts, dim=-1)


def sum_gradients(parameters: Iterable) -> Tensor:
    """Replaces gradients by their sums over ranks, in one all-reduce, and returns the sum's norm.

    For parameters of which every rank has a whole copy.
    """
    parameters = [p for p in parameters if p.grad is not None]  # the same ones on every rank
    grads = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(total.view_as(g))
    return flat.norm()


def clip_gradient(lm: torch.nn.Module, limit: float) -> Tensor:
    """Clips the gradient of a sharded policy.PackedLM, a mean over ranks; returns its norm before.

    FSDP2 has made the mean already, but not of LoRA's adapters.
    """
    if lm.adapters:
        sum_gradients(lm.adapters.parameters())
        for p in lm.adapters.parameters():
            p.grad /= dist.get_world_size()
    norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def assert_equal_on_ranks(module: torch.nn.Module):
    """Raises AssertionError if the sum of any parameter differs between ranks."""
    sums = torch.stack([p.detach().double().sum() for p in module.parameters()])
    everywhere = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, sums)
    assert all(torch.equal(sums, other) for other in everywhere), "replicas differ between ranks"


def available_memory(device: torch.device) -> float:
    """Returns the bytes that one rank may use: its GPU's, or its share of the machine's.

    They are the total, not what is free; infinite where the system does not tell it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    sources = (
        lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        lambda: int(Path("/sys/fs/cgroup/memory.max").read_text()),  # of a container
    )
    limits = []
    for read in sources:
        try:
            limits.append(read())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits, default=math.inf) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
