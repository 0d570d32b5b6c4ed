"""Devices, processes, precision and seeds, on Lightning Fabric."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vouch.errors import ConfigError
from vouch.training.run import Run


def make_fabric(run: Run) -> Any:
    """A launched Fabric for `run`: one process, or the processes that `torchrun` started (gloo on CPU, nccl on GPU).

    Raises:
        ConfigError: the device or the precision is unknown or not there.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

    accelerator, index = parse_device(run.device)
    if run.precision not in ("auto", "32", "bf16"):
        raise ConfigError(f"precision is {run.precision!r}", hint="use auto, 32 or bf16")
    for name in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # it announces itself otherwise
    settings: dict[str, Any] = {"devices": 1 if index is None else [index]}
    environment: Any = LightningEnvironment()  # named, so that no cluster's variables are taken for an order
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        environment = TorchElasticEnvironment()
        strategy = DDPStrategy(find_unused_parameters=True)
        settings = {"devices": local, "num_nodes": world // local, "strategy": strategy}
    precision: Any = "bf16-mixed" if use_bf16(run.precision, accelerator) else "32-true"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*available but not used.*")
        fabric = Fabric(accelerator=accelerator, precision=precision, plugins=[environment], **settings)
        fabric.launch()
    if fabric.world_size > 1:
        atexit.unregister(_leave_group)  # once, however many trainings there are
        atexit.register(_leave_group)
    return fabric


def _leave_group() -> None:
    """Leave the process group in order: its threads, still running at exit, would abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parse_device(name: str) -> tuple[str, int | None]:
    """The Fabric accelerator and the index of a device name.

    Raises:
        ConfigError: the name is unknown, or the device is not there.
    """
    kind, colon, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise ConfigError(f"there is no device {name!r}", hint="use auto, cpu, cuda, cuda:1 or mps")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} is not there: {torch.cuda.device_count()} GPUs found", hint="use --device cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not there", hint="use --device cpu")
    return kind, int(number) if number else None


def use_bf16(precision: str, accelerator: str) -> bool:
    """Whether to train in bfloat16 with float32 master weights.

    `auto` says yes on a GPU that multiplies in it. On a CPU it says no even where there are matrix units: training is
    then up to three times faster and as good on large logs, but small models were seen to lose by it.
    """
    if precision != "auto":
        return precision == "bf16"
    return accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`: tensors in tuples, named tuples, lists, dicts and dataclasses."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {field.name: to_device(getattr(batch, field.name), device) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **moved)
    return batch


def share_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, fabric: Any) -> None:
    """Make `optimizer.step` average all gradients over the processes first, and start from the first one's weights.

    For steps of any shape: DDP, which does it within the backward pass, must see each forward pass followed by one
    backward pass through all that it returned. Does nothing in a single process.
    """
    if fabric.world_size == 1:
        return
    for tensor in model.state_dict().values():
        torch.distributed.broadcast(tensor, 0)

    def average(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # A process without targets in its share may lack gradients that others have.
        there = torch.tensor([parameter.grad is not None for parameter in parameters], device=fabric.device).float()
        there = fabric.all_reduce(there, reduce_op="sum")
        for parameter, count in zip(parameters, there.tolist(), strict=True):
            if count:
                found = parameter.grad
                grad = torch.zeros_like(parameter) if found is None else found.to_dense()
                parameter.grad = fabric.all_reduce(grad, reduce_op="mean")

    optimizer.register_step_pre_hook(average)


def seed_of(*numbers: int) -> int:
    """One well-mixed seed from several numbers, such as the run's seed, the epoch and the process."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and give the outer random state back afterwards.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must not be negative")
    # Asking for a GPU's state would start every GPU: only one that is in use has a state worth keeping.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
