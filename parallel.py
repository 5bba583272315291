"""Many GPUs: one process for each, started by `torchrun --nproc_per_node=N train.py …`; one alone runs the same code.

The global batch stays what was asked for. Every process draws all of its random numbers and takes its own rows, so that
a decision which all must take alike (who runs how many passes?) needs no message. What is trained in full is sharded
block by block by FSDP2; what is small (adapters, compensators, heads) every process has whole, and its gradients are
averaged. States are written by torch.distributed.checkpoint as safetensors, each process its part; any number of
processes reads them.
"""

import os
import shutil
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import weights

quiet = partial(warnings.catch_warnings, action="ignore", category=UserWarning)  # "torch.distributed is disabled", …
TIMEOUT = timedelta(hours=1)  # of one process waiting for another; torchrun itself ends them all when one dies


def start(device):
    """Join the other processes, if torchrun started this one. Returns its own device."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=TIMEOUT)  # gloo for what is on the CPU, nccl for what is on a GPU
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this process is the one that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text):
    if is_first():
        print(text)


def wait():
    if dist.is_initialized():
        dist.barrier()


def any_of(flags):
    """Whether any flag of any process is set, so that all decide alike."""
    found = torch.tensor(float(any(flags)))
    if dist.is_initialized():
        dist.all_reduce(found)
    return found.item() > 0


def loading_device(device):
    """Where a network is loaded: on the CPU if it is to be shared out."""
    return device if processes() == 1 else torch.device("cpu")


def to_device(tensor, device):
    """Noise and the like, without waiting; vectors (step indices, noise levels) stay on the CPU."""
    return tensor.to(device, non_blocking=True) if tensor.ndim > 1 else tensor


def share(things):
    """This process's part of a list."""
    return things[dist.get_rank()::processes()] if dist.is_initialized() else things


# ------------------------------------------------------------------------------------------------ batch and gradients

def micro_batches(batch, at_once=None):
    """The rows of the global batch that each pass works on: `at_once` samples in each process.

    Returns [(the rows of this process, the rows of all processes)]; a sorted batch stays sorted, and the rows of one
    pass lie close together in it. Raises UserError where the batch cannot be divided so.
    """
    if batch % processes() or batch // processes() % (at_once or 1):
        raise weights.UserError(f"a batch of {batch} cannot be shared out among {processes()} processes"
                                + (f", {at_once} samples at once" if at_once else ""))
    rows = torch.arange(batch).view(-1, at_once or batch // processes(), processes())
    own = dist.get_rank() if dist.is_initialized() else 0
    return [(part[:, own], part.flatten()) for part in rows]


def average(tensors):
    """Replace each tensor by its mean over all processes, in one message."""
    tensors = list(tensors)
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / processes()
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def clip_gradients(parameters, max_norm):
    """Average the gradients that FSDP2 does not, and clip their norm, that of all together. Returns it as it was."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded, whole = ([g for g in gradients if isinstance(g, DTensor) == kind] for kind in (True, False))
    average(whole)
    norms = [torch.nn.utils.get_total_norm(part) for part in (sharded, whole) if part]
    norm = torch.stack([full(norm) for norm in norms]).norm()
    for part in (sharded, whole):
        if part:
            torch._foreach_mul_(part, (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


# ------------------------------------------------------------------------------------------------------ FSDP2

def shard(network, dtype, device):
    """Share the weights of an MMDiT out among the processes, block by block (FSDP2); alone, leave it as it is.

    A block's weights are gathered, in `dtype`, while it runs; gradients are reduced in fp32.
    """
    if not dist.is_initialized():
        return network
    mesh = dist.device_mesh.init_device_mesh(device.type, (processes(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in network.joint_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # its warning of outputs that are views: nothing here writes into one
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    return fully_shard(network, mesh=mesh, mp_policy=policy)


def full(tensor):
    """All of a tensor, sharded or not. If sharded, all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(network):
    return any(isinstance(p, DTensor) for p in network.parameters())


def gather(network, sharded):
    """Copy the weights of a sharded network to a plain one of the same shape, on the CPU. All processes must ask."""
    target = network.state_dict()
    for name, tensor in sharded.state_dict().items():
        target[name].copy_(full(tensor.detach()))
    return network


# ------------------------------------------------------------------------------------------------- states of runs

def save(folder, networks, optimizers, header):
    """Write networks and optimisers, {name: …}, sharded or not, and a header (JSON with a `step`): whole or not at all.

    `folder`/state.json holds the header and the name of the subfolder with the tensors. It changes once these are on
    the disk, and the state before goes once the change is.
    """
    part = folder / f"state-{header['step']:06}"
    tensors = network_tensors(networks)
    for place, (optimizer, parameter) in optimizer_places(optimizers).items():
        tensors.update({place + name: value for name, value in optimizer.state[parameter].items()})
    if is_first():
        shutil.rmtree(part, ignore_errors=True)  # of a run that ended while it wrote
    wait()
    with checkpoint_errors(part, "be written as the state of the run"):
        checkpoint.save(tensors, storage_writer=checkpoint.HuggingFaceStorageWriter(str(part), save_distributed=True))
    if is_first():
        with weights.disk_errors(part):
            for path in (*part.iterdir(), part, folder):
                weights.flush(path)
        weights.write_json(folder / "state.json", {**header, "tensors": part.name})
        weights.flush(folder)
        for old in folder.glob("state-*"):
            if old != part:
                shutil.rmtree(old)
    wait()


def read_header(folder):
    """What `save` was given as header, or None."""
    file = folder / "state.json"
    return weights.read_json(file) if file.exists() else None


def load(folder, networks, optimizers, offload):
    """Fill networks and optimisers as `save` was given them. offload: the latter's states in the CPU's memory."""
    part = folder / str(read_header(folder).get("tensors"))
    reader = checkpoint.HuggingFaceStorageReader(str(part))
    with checkpoint_errors(part, "be read as the state of a run"):
        saved = reader.read_metadata().state_dict_metadata
    tensors, held = network_tensors(networks), {}
    for name in saved:
        place, _, name = name.rpartition("/")
        held.setdefault(place + "/", []).append(name)
    for place, (optimizer, parameter) in optimizer_places(optimizers).items():
        if place in held:  # a parameter that was at rest has no state
            empty = {name: torch.zeros((), device=parameter.device) if name == "step" else
                     torch.zeros_like(parameter).detach() for name in held[place]}
            optimizer.state[parameter] = {name: tensor.cpu() if offload else tensor for name, tensor in empty.items()}
            tensors.update({place + name: tensor for name, tensor in optimizer.state[parameter].items()})
    with checkpoint_errors(part, "be read as the state of this run"):
        checkpoint.load(tensors, storage_reader=reader)


def network_tensors(networks):
    """{name: tensor}; one that a network holds under two names (T5's embedding) stands there once."""
    tensors = {}
    for key, network in networks.items():
        names = {tensor: name for name, tensor in network.state_dict(keep_vars=True).items()}
        tensors.update({f"{key}/{name}": tensor.detach() for tensor, name in names.items()})
    return tensors


@contextmanager
def checkpoint_errors(part, action):
    """One clear line for what torch.distributed.checkpoint raises over a disk or a file."""
    with weights.library_errors(part, action), quiet():
        try:
            yield
        except checkpoint.CheckpointException as error:  # of one process or more; the first speaks for all
            raise next(iter(error.failures.values()))[0] from error


def optimizer_places(optimizers):
    """{place in the state: (optimiser, parameter)}."""
    return {f"{key}/{i}/": (optimizer, parameter) for key, optimizer in optimizers.items()
            for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])}
