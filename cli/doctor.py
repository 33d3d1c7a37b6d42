"""`ie doctor`: what this machine has, what will be used on it, and why."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from .files import check_model
from .options import DEFAULT_MODEL, Debug, Device, Dtype, Json, Quant, Quiet
from .render import reporting

__all__ = ["doctor"]

LIBRARIES = ("instructedit", "torch", "transformers", "bitsandbytes", "safetensors", "accelerate", "peft")


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="M", help="Estimate the memory that this base needs.")
    ] = None,
    quant: Quant = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show device, memory, versions, and what will be used and why."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        from .tables import doctor_view

        if model is not None:
            check_model(model)
        result = _examine(model, quant, dtype, device)
        render.result(result, *doctor_view(result))


def _examine(model: str | None, quant: str, dtype: str, device: str) -> dict[str, Any]:
    import platform

    import torch

    from ie.base.plan import is_here, plan_load
    from ie.base.precision import with_faster_dtype
    from ie.training.memory import estimate_memory

    plan = plan_load(quant, dtype, device)
    if model is not None and dtype == "auto":
        plan = with_faster_dtype(plan, model)
    here, on_gpu = is_here(plan.device), plan.device.type == "cuda"
    gpu = torch.cuda.get_device_properties(plan.device) if here and on_gpu else None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": _n_cores(),
        "memory_bytes": _memory_bytes(),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "bf16": _has_bf16(on_gpu) if here else None,
        "versions": {name: _version(name) for name in LIBRARIES},
        "base": model or DEFAULT_MODEL,
        "device": str(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quant": plan.quant,
        "reason": plan.reason,
        "memory_estimate": None if model is None else estimate_memory(model, plan),
    }


def _has_bf16(on_gpu: bool) -> bool:
    """Say whether bfloat16 runs at its own speed: emulated, it is slower than float32."""
    import torch

    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None
