"""What the machine is found to have, and the environment that shows a job its own part of it."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import psutil
import pytest

from swift.core.errors import SwiftError
from swift.experiments import inventory
from swift.experiments.inventory import share_memory, take_inventory, visible_devices
from swift.experiments.isolation import environment_for, free_port
from swift.experiments.types import Device, Placement

GIB = 1 << 30


class Driver(types.ModuleType):
    """NVIDIA's driver library with the devices of a test: (name, total, used, {pid: bytes or None})."""

    class NVMLError(Exception):
        pass

    def __init__(self, devices: list[tuple[str, int, int, dict[int, int | None]] | None]) -> None:
        super().__init__("pynvml")
        self.devices = devices

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.devices:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if self.devices[index] is None:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:  # noqa: N802
        return f"GPU-{handle}abc-def".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.devices[handle][0]  # type: ignore[index]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        _, total, used, _ = self.devices[handle]  # type: ignore[misc]
        return types.SimpleNamespace(total=total, used=used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        held = self.devices[handle][3]  # type: ignore[index]
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        raise self.NVMLError("not supported")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    me, parent = os.getpid(), os.getppid()
    fake = Driver(
        [
            ("A100", 80 * GIB, 30 * GIB, {me: 20 * GIB, parent: 10 * GIB}),
            ("A100", 80 * GIB, 0, {}),
            None,
            ("L4", 24 * GIB, 4 * GIB, {}),
        ]
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_nvidia_devices_with_other_peoples_processes(driver: Driver) -> None:
    found = take_inventory(own_pids={os.getpid()}, env={})
    assert found.devices == (
        Device("cuda", 0, "A100", 80 * GIB, 70 * GIB, ((os.getppid(), 10 * GIB),)),
        Device("cuda", 1, "A100", 80 * GIB, 80 * GIB),
        Device("cuda", 3, "L4", 24 * GIB, 20 * GIB),  # held by somebody whom the driver does not name
    )
    assert found.cores >= 1


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        ("3,0", [0, 3]),
        ("GPU-1abc", [1]),
        ("1,-1,0", [1]),
    ],
)
def test_only_devices_that_the_service_may_use(driver: Driver, value: str, indices: list[int]) -> None:
    found = take_inventory(env={"CUDA_VISIBLE_DEVICES": value})
    assert [device.index for device in found.devices] == indices


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_accelerators_leave_cpu_slots(driver: Driver, value: str) -> None:
    assert {device.kind for device in take_inventory(env={"CUDA_VISIBLE_DEVICES": value}).devices} == {"cpu"}


@pytest.mark.parametrize(
    ("used", "holders", "reserved", "free"),
    [
        (0, {}, 0, 80),
        (30, {}, 0, 50),  # nobody is named: somebody else's
        (30, {}, 40, 80),  # in a container: ours, as far as we gave memory away
        (30, {}, 20, 70),
        (30, {"foreign": 30}, 40, 50),
        (30, {"own": 30}, 40, 80),
        (30, {"own": 10, "foreign": 15}, 12, 62),  # of 5 unknown, 2 may still be ours
        (30, {"elsewhere": 30}, 30, 80),  # a number of another name space
        (30, {"foreign": 0}, 0, 50),  # the driver does not say how much
    ],
)
def test_memory_is_shared_out(used: int, holders: dict[str, int], reserved: int, free: int) -> None:
    assert not psutil.pid_exists(2**22 + 5)
    pids = {"own": os.getpid(), "foreign": os.getppid(), "elsewhere": 2**22 + 5}
    held = {pids[who]: size * GIB for who, size in holders.items()}
    found, foreign = share_memory(80 * GIB, used * GIB, held, {os.getpid()}, reserved * GIB)
    assert found == free * GIB
    assert [pid for pid, _ in foreign] == ([os.getppid()] if "foreign" in holders else [])


@pytest.fixture
def no_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver([]))
    monkeypatch.setattr(inventory, "_HINTS", {})
    monkeypatch.setattr(inventory.sys, "platform", "linux")


def test_cpu_slots_share_cores_and_memory(no_accelerators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "cpu_count", lambda: 6)
    found = take_inventory(env={})
    assert [device.index for device in found.devices] == list(range(6))
    assert {device.kind for device in found.devices} == {"cpu"} and found.cores == 6
    assert found.host_memory_bytes - 6 < 6 * found.devices[0].memory_bytes <= found.host_memory_bytes
    assert 0 < found.devices[0].free_bytes <= found.devices[0].memory_bytes
    assert len(take_inventory(env={}, cpu_slots=2).devices) == 2
    assert len(take_inventory(env={}, cpu_slots=99).devices) == 6


def test_other_makers_are_asked_once_in_a_process_of_their_own(
    no_accelerators: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hint = tmp_path / "kfd"
    hint.touch()
    asked = []

    def answer(argv: list[str], **options: Any) -> Any:
        asked.append((options["timeout"], options["env"].get("HIP_VISIBLE_DEVICES")))
        text = '[{"kind": "cuda", "index": 0, "name": "MI300X", "memory_bytes": 1000}]'
        return types.SimpleNamespace(stdout=f"a warning\n{text}\n")

    monkeypatch.setattr(inventory, "_HINTS", {"rocm": (str(hint),)})
    monkeypatch.setattr(inventory.subprocess, "run", answer)
    monkeypatch.setattr(inventory, "_rocm_used", lambda index: 300)
    inventory._ask_torch.cache_clear()
    for _ in range(2):
        found = take_inventory(env={"HIP_VISIBLE_DEVICES": "5"}, reserved={("rocm", 5): 100})
        assert found.devices == (Device("rocm", 5, "MI300X", 1000, 800),)
    assert asked == [(inventory.PROBE_SECONDS, "5")]
    inventory._ask_torch.cache_clear()


def test_a_probe_that_hangs_counts_as_none(
    no_accelerators: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hang(argv: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(argv, options["timeout"])

    monkeypatch.setattr(inventory, "_HINTS", {"npu": (str(tmp_path),)})
    monkeypatch.setattr(inventory.subprocess, "run", hang)
    inventory._ask_torch.cache_clear()
    assert {device.kind for device in take_inventory(env={}).devices} == {"cpu"}
    inventory._ask_torch.cache_clear()


def test_importing_and_asking_loads_no_torch() -> None:
    code = (
        "import sys; from swift.experiments.inventory import take_inventory;"
        "import swift.experiments.isolation, swift.experiments.demand, swift.experiments.store;"
        "take_inventory(); print('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert answer.stdout.strip() == "False"


def test_a_job_sees_its_devices_only(tmp_path: Path) -> None:
    placement = Placement("cuda", (2, 5), GIB, 3)
    base = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "2,5,7", "RANK": "3", "WORLD_SIZE": "4", "TMPDIR": "/old"}
    env = environment_for(placement, base, tmp_path)
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"], env["PATH"]) == (
        "2,5",
        "PCI_BUS_ID",
        "/bin",
    )
    assert {env[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}
    assert not {"RANK", "WORLD_SIZE"} & set(env)
    folders = {
        env[name]
        for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
    }
    assert len(folders) == 4
    assert all(Path(folder).is_dir() and tmp_path in Path(folder).parents for folder in folders)
    assert base["CUDA_VISIBLE_DEVICES"] == "2,5,7"


def test_devices_hidden_by_the_parent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SwiftError, match=r"CUDA_VISIBLE_DEVICES=0,1: cuda:2 is hidden"):
        environment_for(Placement("cuda", (1, 2), GIB, 1), {"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path)
    named = environment_for(Placement("cuda", (1,), GIB, 1), {"CUDA_VISIBLE_DEVICES": "GPU-1abc"}, tmp_path)
    assert named["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    ("kind", "variable"),
    [("rocm", "HIP_VISIBLE_DEVICES"), ("npu", "ASCEND_RT_VISIBLE_DEVICES"), ("xpu", "ZE_AFFINITY_MASK")],
)
def test_other_makers_have_their_own_variable(tmp_path: Path, kind: str, variable: str) -> None:
    env = environment_for(Placement(kind, (1,), GIB, 1), {}, tmp_path)
    assert env[variable] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_a_job_on_the_cpu_sees_no_accelerator(tmp_path: Path) -> None:
    env = environment_for(Placement("cpu", (0,), GIB, 1), {"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path)
    assert (env["CUDA_VISIBLE_DEVICES"], env["HIP_VISIBLE_DEVICES"]) == ("", "-1")
    assert visible_devices("cuda", env) == [] and visible_devices("cuda", {}) is None


def test_ports_are_free_and_differ(tmp_path: Path) -> None:
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 1 and all(1024 <= port < 65536 for port in ports)
    env = environment_for(Placement("cpu", (), GIB, 1), {}, tmp_path)
    assert int(env["MASTER_PORT"]) >= 1024 and env["MASTER_ADDR"] == "127.0.0.1"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(SwiftError, match=r"cannot be made(.|\n)*SWIFT_HOME"):
        environment_for(Placement("cpu", (), GIB, 1), {}, tmp_path)
