"""Placement: which devices an engine uses, with what artifact and memory, and a core on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sf_local.artifact.open import Artifact, check_target, open_artifact
from sf_local.device.info import DeviceInfo
from sf_local.engine.kv_budget import num_kv_pages
from sf_local.engine.memory import memory_left
from sf_local.engine.replicas import Replica, Replicas, RunnerFactory
from sf_local.model.runner import ModelRunner


@dataclass(frozen=True)
class Place:
    """A device with what was compiled for it, and how many KV pages it gets, page 0 included."""

    device: DeviceInfo
    artifact: Artifact
    num_pages: int

    @classmethod
    def of(
        cls, device: DeviceInfo, vmfb: str | Path, kv_pages: int | None,
        kv_memory: int | str | None, **files: Any,
    ) -> Place:  # fmt: skip
        """Checked as far as it goes without the device."""
        artifact = open_artifact(vmfb, targets=[device.chip], **files)
        if artifact.manifest:
            check_target(artifact.manifest, device.chip)
        num_bytes = artifact.num_weight_bytes
        available = memory_left(device, num_bytes)
        pages = num_kv_pages(
            artifact.config, device.kind, available, kv_pages, kv_memory, num_bytes
        )
        return cls(device, artifact, 1 + pages)

    @property
    def max_tokens(self) -> int:
        artifact = self.artifact
        return min(artifact.max_tokens, (self.num_pages - 1) * artifact.config.page_size)


def open_places(
    places: Sequence[Place], make_runner: RunnerFactory = ModelRunner
) -> Replica | Replicas:
    """All of them, or none if one raises."""
    replicas: list[Replica] = []
    try:
        for place in places:
            args = place.artifact, place.device.name, place.num_pages
            replicas.append(Replica(*args, make_runner))
    except BaseException:
        for replica in replicas:
            replica.close()
        raise
    return replicas[0] if len(replicas) == 1 else Replicas(replicas)
