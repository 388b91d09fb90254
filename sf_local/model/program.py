"""Program: the compiled functions of an artifact, loaded on a device together with its weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import shortfin as sf

from sf_local.artifact.manifest import COMPILER_VERSION, REPAIR
from sf_local.artifact.open import Artifact, check_target
from sf_local.device.device import Device, allow_tiles, reason
from sf_local.errors import (
    ArtifactError,
    CorruptFileError,
    DeviceError,
    MismatchError,
    TargetError,
    VersionError,
)
from sf_local.model.huge_weights import HugeWeights

# What HIP reports for code that was compiled for another chip.
OTHER_CHIP = ("hipErrorNoBinaryForGpu", "hipErrorInvalidImage", "hipErrorInvalidKernelFile")


class Program:
    """Loads an artifact on a device and looks its functions up.

    functions: by name, such as "decode_bs4"; each is awaited with the arguments' device arrays and
    the device's fiber. A name with "_next" is that of a function which also sums its logits up (see
    `sampling.logits.ModelOutput`). Only artifacts of our own compiler have those.

    huge_weights: what can move the weights to larger pages of memory, on a CPU.

    Raises ArtifactError where the artifact is not for this device, is corrupt, or its files do not
    fit each other, and DeviceError where the device fails.
    """

    def __init__(self, artifact: Artifact, device: Device) -> None:
        _check_device(artifact, device)
        self._artifact = artifact
        self.huge_weights = HugeWeights()
        self._program = _load(artifact, device, self.huge_weights)
        self.functions = self._look_up_functions()

    def close(self) -> None:
        """Unload the program and the weights."""
        self.huge_weights.close()
        self.functions.clear()
        del self._program

    def _look_up_functions(self) -> dict[str, Any]:
        """All functions that config.json names, and the "_next" ones that exist."""
        config, manifest = self._artifact.config, self._artifact.manifest
        required = [f"prefill_bs{n}" for n in config.prefill_batch_sizes]
        required += [f"decode_bs{n}" for n in config.decode_batch_sizes]
        if manifest and (image_sizes := manifest.image_batch_sizes):
            required += [f"encode_image_bs{n}" for n in image_sizes]
            required += [f"prefill_embeds_bs{n}" for n in config.prefill_batch_sizes]
        optional = [name.replace("_bs", "_next_bs") for name in required]
        found = {name: self._look_up(name) for name in [*required, *optional]}
        missing = [name for name in required if found[name] is None]
        if missing:
            raise MismatchError(
                f"{self._artifact.vmfb} lacks {', '.join(missing)}, which config.json names; "
                f"{REPAIR}"
            )
        for name in required:
            if name.startswith(("prefill_bs", "decode_bs")):
                self._check_signature(name, found[name].calling_convention)
        return {name: function for name, function in found.items() if function is not None}

    def _look_up(self, name: str) -> Any:
        try:
            return self._program.lookup_function(f"{self._artifact.config.module_name}.{name}")
        except ValueError:  # "Function ... not found in program"
            return None

    def _check_signature(self, name: str, convention: str) -> None:
        """Raise MismatchError unless a function takes and returns what config.json says.

        The convention is such as "0rrrrrrr_r": a version, one letter an argument, and one a result.
        Two of the arguments may be fences.
        """
        config = self._artifact.config
        arguments, results = (len(part) for part in convention.removeprefix("0").split("_"))
        expected = 5 if config.has_prefill_position or name.startswith("decode") else 4
        if arguments not in (expected, expected + 2) or results != 1 + (config.top_k is not None):
            raise MismatchError(
                f"{self._artifact.vmfb}: {name} is not what config.json says, which has "
                f"has_prefill_position={config.has_prefill_position} and top_k={config.top_k}; "
                "use the config.json that was exported with it"
            )


def _check_device(artifact: Artifact, device: Device) -> None:
    """Raise TargetError unless the device can run the artifact's code, as far as it says."""
    if artifact.manifest is None:
        return
    check_target(artifact.manifest, device.chip)
    if "amx_tile" in artifact.manifest.cpu_features and not allow_tiles():
        raise TargetError(
            f"{artifact.vmfb}: compiled for AMX, which this system forbids; compile it "
            "with sf-compile --cpu x86-64-v4"
        )


def _load(artifact: Artifact, device: Device, huge_weights: HugeWeights) -> Any:
    try:
        module = sf.ProgramModule.load(device.system, str(artifact.vmfb), mmap=True)
    except Exception as error:
        raise _load_error(artifact, device, error) from error
    parameters = sf.StaticProgramParameters(device.system, parameter_scope="model")
    try:
        for path in artifact.weights:
            huge_weights.note(path, partial(parameters.load, str(path), mmap=True))
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
    """The error to raise for an exception of IREE's, by its message."""
    text = str(error)
    vmfb = artifact.vmfb
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
