"""The stand-in for AMD's driver does what it is for."""

from __future__ import annotations

import signal

import pytest

from compile.target import HIP_CHIPS
from tests.hip.driver import Driver

START = """
    import json, sys, time
    from ctypes import memset, string_at
    from tests.hip.control import *
"""


# Devices


def test_devices_are_as_their_chips_are(hip_driver: Driver) -> None:
    outcome = hip_driver.run(
        START
        + """
    import shortfin as sf

    WARP_SIZE, SHARED_MEMORY, MAJOR = 87, 74, 23
    found = []
    for i, name in enumerate(sf.amdgpu.SystemBuilder().available_devices):
        call("hipSetDevice", i)
        chip = [attribute(which, i) for which in (WARP_SIZE, SHARED_MEMORY, MAJOR)]
        found.append([name, *chip, *memory()])
    print(json.dumps(found))
""",
        devices=",".join(HIP_CHIPS),
    )
    found = outcome.value
    assert len({name for name, *_ in found}) == len(HIP_CHIPS)
    assert all(name.startswith("GPU-") for name, *_ in found)
    for chip, (_, warp_size, shared_memory, major, free, total) in zip(
        HIP_CHIPS, found, strict=True
    ):
        assert warp_size == (64 if chip.startswith("gfx9") else 32)
        assert major == int(chip[3:-2])
        assert shared_memory == (160 if chip == "gfx950" else 64) << 10
        assert free == total >= 16 << 30


@pytest.mark.parametrize(
    ("function", "size", "warp_at", "arch_at"),
    [
        ("hipGetDevicePropertiesR0600", 1472, 308, 1160),
        ("hipGetDeviceProperties", 792, 276, 396),
    ],
)
def test_properties(
    hip_driver: Driver, function: str, size: int, warp_at: int, arch_at: int
) -> None:
    """At the offsets of ROCm's two layouts."""
    outcome = hip_driver.run(
        START
        + f"""
    from ctypes import create_string_buffer

    buffer = create_string_buffer({size})
    call({function!r}, buffer, 0)
    raw = buffer.raw
    text = lambda at: raw[at : raw.index(0, at)].decode()
    print(json.dumps([text(0), int.from_bytes(raw[{warp_at}:{warp_at} + 4], "little"),
                      text({arch_at})]))
""",
        devices="gfx942",
    )
    assert outcome.value == ["AMD Instinct MI300X", 64, "gfx942:sramecc+:xnack-"]


def test_no_device(hip_driver: Driver) -> None:
    outcome = hip_driver.run(
        """
    from sf_local.device.device import Device
    from sf_local.errors import DeviceError

    try:
        Device("hip")
    except DeviceError as error:
        print('"hipErrorNoDevice"' if "hipErrorNoDevice" in str(error) else error)
""",
        devices="",
    )
    assert outcome.value == "hipErrorNoDevice"


def test_memory_runs_out_and_comes_back(hip_driver: Driver) -> None:
    outcome = hip_driver.run(
        START
        + """
    MiB = 1 << 20
    first = malloc(10 * MiB)
    try:
        malloc(7 * MiB)
    except HipError as error:
        print(error)
    before = memory()
    call("hipFree", first)
    malloc(16 * MiB)
    print(json.dumps([before, memory()]))
""",
        devices="gfx1100:16MiB",
    )
    assert outcome.value == [[6 << 20, 16 << 20], [0, 16 << 20]]
    assert outcome.stdout.startswith("hipErrorOutOfMemory\n")


# Memory


@pytest.mark.parametrize("is_freed", [False, True])
@pytest.mark.parametrize("access", ["string_at(address, 1)", "memset(address, 0, 1)"])
def test_the_host_cannot_touch_device_memory(
    hip_driver: Driver, access: str, is_freed: bool
) -> None:
    free = 'call("hipFree", address)' if is_freed else ""
    code = f"""
    address = malloc(4096)
    {free}
    print("so far", flush=True)
    {access}
    print("touched")
"""
    outcome = hip_driver.run(START + code)
    assert outcome.exit_code == -signal.SIGSEGV
    assert outcome.stdout == "so far\n"


def test_new_memory_is_poisoned_and_freed_memory_is_none(hip_driver: Driver) -> None:
    outcome = hip_driver.run(
        START
        + """
    address = malloc(100)
    new = read(address, 100)
    call("hipFree", address)
    again = malloc(100)
    try:
        read(address, 1)
    except HipError as error:
        print(json.dumps([set(new) == {255}, again.value != address.value, str(error)]))
"""
    )
    assert outcome.value == [True, True, "hipErrorInvalidValue"]


def test_copies_stay_inside_an_allocation(hip_driver: Driver) -> None:
    outcome = hip_driver.run(
        START
        + """
    address, other = malloc(100), malloc(100)
    try:
        copy(address, other, 101)
    except HipError as error:
        print(json.dumps(str(error)))
"""
    )
    assert outcome.value == "hipErrorInvalidValue"


# Streams and events


def test_work_is_done_later(hip_driver: Driver) -> None:
    """Who does not wait reads old data; a stream waits for another's event."""
    outcome = hip_driver.run(
        START
        + """
    device, host, done = malloc(4), host_malloc(4), handle("hipEventCreate")
    first, second = (handle("hipStreamCreateWithFlags", 1) for _ in range(2))
    memset(host, 7, 4)
    delay(200_000)
    call("hipMemsetD8Async", device, 1, c_size_t(4), first)
    call("hipEventRecord", done, first)
    call("hipStreamWaitEvent", second, done, 0)
    copy(host, device, 4, second)
    states = [string_at(host, 4).hex()]
    for function, *arguments in ("hipEventQuery", done), ("hipStreamQuery", second):
        try:
            call(function, *arguments)
        except HipError as error:
            states.append(str(error))
    call("hipEventSynchronize", done)
    call("hipEventQuery", done)
    states.append(string_at(host, 4).hex())
    call("hipStreamSynchronize", second)
    print(json.dumps([*states, string_at(host, 4).hex()]))
"""
    )
    old, new = "07" * 4, "01" * 4
    assert outcome.value == [old, "hipErrorNotReady", "hipErrorNotReady", old, new]


def test_the_log_says_what_was_copied(hip_driver: Driver) -> None:
    outcome = hip_driver.run(
        START
        + """
    device, host = malloc(64), host_malloc(64)
    mark("copies")
    copy(device, host, 8)
    copy(host, device, 16)
    copy(device, c_char_p(b"pageable"), 8)
    mark("end")
"""
    )
    notes = [(c.function, *c.notes.values()) for c in outcome.after("copies")]
    assert notes == [
        ("hipMemcpyAsync", 8, "host", "device"),
        ("hipMemcpyAsync", 16, "device", "host"),
        ("hipMemcpyAsync", 8, "pageable", "device"),
    ]


# Faults


def test_the_nth_call_fails(hip_driver: Driver) -> None:
    """As the environment says, and then as the process itself does; lasting, or once."""
    outcome = hip_driver.run(
        START
        + """
    def attempts():
        results = []
        for _ in range(4):
            try:
                malloc(1)
                results.append("")
            except HipError as error:
                results.append(str(error))
        return results

    once = attempts()
    fail("hipMalloc:3+:hipErrorUnknown,hipFree:1:hipErrorUnknown")
    lasting = attempts()
    fail("")
    print(json.dumps([once, lasting, attempts()]))
""",
        fail="hipMalloc:2:hipErrorOutOfMemory",
    )
    once, lasting, none = outcome.value
    assert once == ["", "hipErrorOutOfMemory", "", ""]
    assert lasting == ["", "", "hipErrorUnknown", "hipErrorUnknown"]
    assert none == [""] * 4


def test_queued_work_fails_when_it_runs(hip_driver: Driver) -> None:
    """The call succeeds; the wait fails, as does all that follows on that device, and no other."""
    outcome = hip_driver.run(
        START
        + """
    def result(function, *arguments):
        try:
            call(function, *arguments)
        except HipError as error:
            return str(error)

    device = malloc(4)
    fail("hipMemsetD8Async:1:hipErrorLaunchFailure:async")
    results = [result("hipMemsetD8Async", device, 0, c_size_t(4), None),
               result("hipStreamSynchronize", None)]
    fail("")
    results += [result("hipMemsetD8Async", device, 0, c_size_t(4), None),
                result("hipMalloc", byref(c_void_p()), c_size_t(4))]
    call("hipSetDevice", 1)
    print(json.dumps([*results, result("hipMalloc", byref(c_void_p()), c_size_t(4))]))
""",
        devices="gfx942:16MiB,gfx942:16MiB",
    )
    assert outcome.value == [None, *["hipErrorLaunchFailure"] * 3, None]


@pytest.mark.parametrize("fault", ["hipMalloc", "hipMalloc:0:hipErrorUnknown", "hipMalloc:1:oops"])
def test_malformed_faults(hip_driver: Driver, fault: str) -> None:
    outcome = hip_driver.run(START, fail=fault)
    assert outcome.exit_code == 2
    assert "SF_HIP_FAIL is malformed" in outcome.stderr
