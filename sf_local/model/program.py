"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import shortfin as sf

from sf_local.artifact.manifest import COMPILER_VERSION, REPAIR
from sf_local.artifact.open import Artifact
from sf_local.device.device import Device, reason
from sf_local.errors import (
    ArtifactError,
    CorruptFileError,
    DeviceError,
    MismatchError,
    TargetError,
    VersionError,
)

# What the AMD driver says to code for another chip.
OTHER_CHIP = ("hipErrorNoBinaryForGpu", "hipErrorInvalidImage", "hipErrorInvalidKernelFile")


def load_program(artifact: Artifact, device: Device) -> Any:
    try:
        module = sf.ProgramModule.load(device.system, str(artifact.vmfb), mmap=True)
    except Exception as error:
        raise _load_error(artifact, device, error) from error
    parameters = sf.StaticProgramParameters(device.system, parameter_scope="model")
    try:
        for path in artifact.weights:
            parameters.load(str(path), mmap=True)
        return sf.Program(
            [sf.ProgramModule.parameter_provider(device.system, parameters), module],
            devices=device.fiber.raw_devices,
            isolation=sf.ProgramIsolation.PER_FIBER,
        )
    except Exception as error:
        raise _load_error(artifact, device, error) from error


def _load_error(
    artifact: Artifact, device: Device, error: Exception
) -> ArtifactError | DeviceError:
    """What IREE's message means for the user."""
    text = str(error)
    vmfb: Path = artifact.vmfb
    is_of_gpu = "HIP driver error" in text or "semaphore was aborted" in text
    if is_of_gpu and not any(name in text for name in OTHER_CHIP):
        return DeviceError(f"{vmfb} cannot be loaded ({reason(error)})")
    if "RESOURCE_EXHAUSTED" in text:
        return DeviceError(
            f"{vmfb.parent}: the device has no room for the weights ({reason(error)}); free "
            "some of its memory, or use a smaller model"
        )
    if "required module features" in text or "bytecode version" in text:
        return VersionError(
            f"{vmfb}: made by another iree-compile; shortfin runs only what {COMPILER_VERSION} "
            f"made; {REPAIR}"
        )
    if is_of_gpu or "HAL device" in text or "INCOMPATIBLE" in text:
        return TargetError(
            f"{vmfb}: compiled for another device than {device.kind!r}; {REPAIR} --target "
            f"{'cpu' if device.kind == 'cpu' else 'CHIP'}"
        )
    if "parameter" in text.lower():
        return MismatchError(
            f"{', '.join(map(str, artifact.weights))}: these weights do not fit {vmfb} "
            f"({reason(error)}); {REPAIR}"
        )
    return CorruptFileError(f"{vmfb}: cannot be loaded ({reason(error)}); {REPAIR}")
