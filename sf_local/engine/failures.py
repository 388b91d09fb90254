"""The errors that callers get when a device, a step, or one of its requests fails."""

from __future__ import annotations

from dataclasses import dataclass

from sf_local.artifact.manifest import REPAIR
from sf_local.device.device import reason
from sf_local.errors import DeviceError, EngineError, SfLocalError
from sf_local.sampling.logits import WrongLogits


@dataclass(frozen=True)
class Failures:
    """The errors of one engine core.

    name: the device as the caller wrote it, such as "device='hip:0'". shares_memory: whether the
    device is a CPU; a GPU that failed is lost to the process.
    """

    name: str
    shares_memory: bool

    def lost(self, what: str, error: BaseException) -> DeviceError:
        """The device is lost: it failed at start, or later; with the remedy."""
        text = reason(error)
        remedy = " with a smaller kv_memory" if "OutOfMemory" in text else ""
        lost = DeviceError(
            f"{self.name} {what}: {text}; it is lost to this process: start the program "
            f"again{remedy}, or make an engine with device='cpu'"
        )
        lost.__cause__ = error
        return lost

    def at_start(self, error: BaseException) -> BaseException:
        """What to raise for an error while the device and the core were opened."""
        if self.is_known(error) or not isinstance(error, Exception):
            return error
        return self.lost("failed at start", error)

    def is_known(self, error: BaseException) -> bool:
        """Whether it says what is wrong, and the device is whole."""
        return isinstance(error, SfLocalError) and not isinstance(error, DeviceError)

    def closed(self, cause: BaseException | None) -> SfLocalError:
        """The engine is closed: by its owner, or because of an error."""
        if isinstance(cause, DeviceError) and cause.__cause__ is not None:
            return self.lost("failed", cause.__cause__)
        why = f": {reason(cause)}" if cause else ""
        return EngineError(f"the engine is closed{why}; make a new one")

    def of_request(self, error: BaseException) -> SfLocalError:
        """The error that a request ends with, when `error` was raised on its behalf."""
        if isinstance(error, SfLocalError):
            return error
        if isinstance(error, WrongLogits):
            return self.returned(str(error))
        failure = EngineError(f"the step failed: {reason(error)}")
        failure.__cause__ = error
        return failure

    def returned(self, what: str) -> SfLocalError:
        """The device returned something for one request that cannot be right."""
        text = (
            f"{self.name} returned {what}; only this request ends. The weights may be damaged "
            "(check them with sf-local inspect ARTIFACT --verify), or the model's numbers too "
            f"large for their type ({REPAIR} --weights bf16)"
        )
        return EngineError(text) if self.shares_memory else DeviceError(text)
