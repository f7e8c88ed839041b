"""Which versions these are: for a report of a fault, and for whoever keeps what was computed."""

import hashlib
import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import flexreason

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "tokenizers", "bitsandbytes")


def version_of(package: str) -> str | None:
    """The version of a package that is installed, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def code_hash(*folders: str) -> str:
    """The hash of the package's own code in some of its folders: one version, installed from git, may be many."""
    package = Path(__file__).parents[1]
    code = hashlib.sha256()
    for file in sorted(file for folder in folders for file in (package / folder).glob("*.py")):
        code.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return code.hexdigest()[:16]


def lines() -> Iterator[str]:
    yield f"flexreason {flexreason.__version__}"
    yield f"python {platform.python_version()} ({platform.system()} {platform.machine()})"
    for package in PACKAGES:
        yield f"{package} {version_of(package) or 'not installed'}"
    yield f"device {_device()}"


def _device() -> str:
    try:
        import torch
    except ImportError as error:
        return f"unknown: torch cannot be imported: {error}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda})"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(accelerator) if accelerator is not None else f"cpu, {torch.get_num_threads()} threads"
