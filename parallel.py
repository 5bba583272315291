"""Many GPUs: one process for each, started by `torchrun --nproc_per_node=N train.py …`; one alone runs the same code.

The global batch stays what was asked for: every process draws the same random numbers and takes its own rows. What is
trained in full is sharded block by block by FSDP2. What is small (adapters, compensators, heads) every process has
whole, and its gradients are averaged. States are written by torch.distributed.checkpoint as safetensors, each process
its part; any number of processes can read them.
"""

import os
import shutil
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import weights


def start(device):
    """Join the other processes, if torchrun started this one. Returns its own device."""
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=timedelta(hours=1))  # gloo for what is on the CPU, nccl for what is on a GPU
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def wait():
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------------ batch and gradients

def micro_batches(batch, at_once):
    """This process's rows of the global batch, `at_once` at a time (0: all): a list of index tensors.

    Raises UserError if the batch cannot be divided so.
    """
    own = torch.arange(batch)[rank()::processes()]
    if batch % processes() or len(own) % (at_once or 1):
        raise weights.UserError(f"a batch of {batch} cannot be divided among {processes()} processes"
                                + (f", {at_once} samples at once" if at_once else ""))
    return own.split(at_once or len(own))


def average(tensors):
    """Replace each tensor by its mean over all processes, in one message."""
    tensors = list(tensors)
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / processes()
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def clip_gradients(parameters, max_norm):
    """Average the gradients that FSDP2 has not averaged; then clip the norm of all together. Returns it unclipped."""
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
    """Share the weights of an MMDiT out among the processes, block by block (FSDP2); one alone leaves it as it is.

    A block's weights are gathered, in `dtype`, while it runs; gradients are reduced in fp32.
    """
    if not dist.is_initialized():
        return network
    mesh = dist.device_mesh.init_device_mesh(device.type, (processes(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in network.joint_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of outputs that are views
    return fully_shard(network, mesh=mesh, mp_policy=policy)


def full(tensor):
    """All of a tensor, sharded or not. If it is sharded, all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(network, sharded):
    """Copy the weights of a sharded network to a plain one, on the CPU of the first process. All must call this."""
    target = network.state_dict() if is_first() else None
    for name, tensor in sharded.state_dict().items():
        tensor = full(tensor.detach())
        if is_first():
            target[name].copy_(tensor)
    return network


# ------------------------------------------------------------------------------------------------- states of runs

def save(folder, networks, optimizers, header):
    """Write networks and optimisers, {name: …}, and a header (JSON with a `step`): whole or not at all.

    `folder`/state.json holds the header and the name of the subfolder with the tensors. It is replaced once these are
    written, and only then the state before is deleted.
    """
    part = folder / f"state-{header['step']:06}"
    tensors = network_tensors(networks)
    for place, (optimizer, parameter) in optimizer_places(optimizers).items():
        tensors.update({place + name: value for name, value in optimizer.state[parameter].items()})
    if is_first():
        shutil.rmtree(part, ignore_errors=True)  # left by a run that ended while it wrote
    wait()
    with checkpoint_errors(part, "be written as the state of the run"):
        checkpoint.save(tensors, storage_writer=checkpoint.HuggingFaceStorageWriter(str(part), save_distributed=True))
    if is_first():
        weights.write_json(folder / "state.json", {**header, "tensors": part.name})
        for old in folder.glob("state-*"):
            if old != part:
                shutil.rmtree(old)
    wait()


def read_header(folder):
    """What `save` was given as header, or None."""
    file = folder / "state.json"
    return weights.read_json(file) if file.exists() else None


def load(folder, networks, optimizers):
    """Fill networks and optimisers as `save` was given them."""
    part = folder / str(read_header(folder).get("tensors"))
    reader = checkpoint.HuggingFaceStorageReader(str(part))
    with checkpoint_errors(part, "be read as the state of a run"):
        saved = reader.read_metadata().state_dict_metadata
    tensors = network_tensors(networks)
    for place, (optimizer, parameter) in optimizer_places(optimizers).items():  # what has not moved yet has no state
        for name in (key.removeprefix(place) for key in saved if key.startswith(place)):
            empty = torch.zeros((), device=parameter.device) if name == "step" else torch.zeros_like(parameter).detach()
            optimizer.state[parameter][name] = tensors[place + name] = empty
    with checkpoint_errors(part, "be read as the state of this run"):
        checkpoint.load(tensors, storage_reader=reader)


def network_tensors(networks):
    """{name: tensor}; one that a network holds under two names (T5's embedding) stands there once."""
    tensors = {}
    for key, network in networks.items():
        names = {tensor: name for name, tensor in network.state_dict(keep_vars=True).items()}
        tensors.update({f"{key}/{name}": tensor.detach() for tensor, name in names.items()})
    return tensors


def optimizer_places(optimizers):
    """{place in the state: (optimiser, parameter)}."""
    return {f"{key}/{i}/": (optimizer, parameter) for key, optimizer in optimizers.items()
            for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])}


@contextmanager
def checkpoint_errors(part, action):
    """One clear line for what torch.distributed.checkpoint raises over a disk or a file; silence for its warnings."""
    with weights.library_errors(part, action), warnings.catch_warnings(action="ignore", category=UserWarning):
        try:
            yield
        except checkpoint.CheckpointException as error:  # of one process or more; the first speaks for all
            raise next(iter(error.failures.values()))[0] from error
