"""What a measurement must say about the GPU it was made on. Nothing here sets anything."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess

import torch

QUERIES = {
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "SM clock, most": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "power": "power.draw",
    "power limit": "power.limit",
    "temperature": "temperature.gpu",
}


def describe(device: torch.device) -> dict[str, str]:
    """Facts for the head of a table and for JSON, in words."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "date": datetime.date.today().isoformat(),
        "GPU": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Triton": version("triton"),
        "CUDA": str(torch.version.cuda or torch.version.hip),
        "cuDNN": str(torch.backends.cudnn.version()),
        "sageattention": version("sageattention"),
        **state(device),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def state(device: torch.device, command: str = "nvidia-smi") -> dict[str, str]:
    """Driver, clocks, power and temperature at this moment; empty where nvidia-smi cannot say."""
    # By its identity: nvidia-smi's numbers know nothing of CUDA_VISIBLE_DEVICES.
    identity = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    for chosen in ([identity], []):
        query = [command, *chosen, f"--query-gpu={','.join(QUERIES.values())}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return parse(answer)
    return {}


def parse(answer: str) -> dict[str, str]:
    """nvidia-smi's first line in words."""
    values = answer.strip().split("\n")[0].split(",")
    return dict(zip(QUERIES, (value.strip() for value in values), strict=False))
