"""CPUs, memory and GPUs of the machine, by psutil and NVML, and what each run uses of them."""

import os
import socket
import time
from contextlib import suppress
from importlib import import_module
from typing import Any

import psutil
from pydantic import BaseModel

from prunedm.system.running import Entry, Finished, entries, finished

SHOWN_FINISHED = 5
FIRST_LOOK = 0.3  # seconds over which the first CPU shares are measured


class Gpu(BaseModel):
    """One GPU by NVML; None for figures that it does not have."""

    index: int
    name: str
    utilisation: float | None = None  # percent of the last sample period with a kernel running
    memory_used: int | None = None  # bytes
    memory_total: int | None = None
    temperature: float | None = None  # degrees Celsius
    power: float | None = None  # watts


class Machine(BaseModel):
    """The machine at one time."""

    host: str
    cpu: float  # percent of all cores since the last look
    cores: int
    load: float | None  # running or waiting processes, mean over a minute
    memory_used: int  # bytes
    memory_total: int
    gpus: list[Gpu]
    no_gpus: str = ""  # why there are none


class Use(BaseModel):
    """What a process and its children use; shared pages count for each of them."""

    cpu: float  # percent of one core since the last look
    memory: int  # bytes, resident


class RunningStage(BaseModel):
    """A running process and what it uses; times are in seconds."""

    entry: Entry
    use: Use | None  # None for other hosts
    elapsed: float
    silent: float  # since it last wrote its entry
    remaining: float | None  # of the current progress bar


class Snapshot(BaseModel):
    """One look: the machine, the runs, and those that finished lately."""

    now: float
    machine: Machine
    runs: list[RunningStage]
    finished: list[Finished]


class Gpus:
    """NVIDIA's GPUs by NVML; without a driver there are none, and `reason` says why."""

    def __init__(self, nvml: Any = None) -> None:
        """nvml: the module pynvml, or a test double."""
        self._nvml = nvml = nvml or import_module("pynvml")
        self._handles, self.reason = [], ""
        try:
            nvml.nvmlInit()
            self._handles = [
                nvml.nvmlDeviceGetHandleByIndex(k) for k in range(nvml.nvmlDeviceGetCount())
            ]
        except nvml.NVMLError as error:
            self.reason = f"no NVIDIA GPU ({error})"

    def read(self) -> list[Gpu]:
        """The current state of all GPUs."""
        return [self._gpu(index, handle) for index, handle in enumerate(self._handles)]

    def _gpu(self, index: int, handle: Any) -> Gpu:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        name = self._ask(nvml.nvmlDeviceGetName, handle) or "GPU"
        return Gpu(
            index=index,
            name=name.decode() if isinstance(name, bytes) else name,
            utilisation=None if rates is None else rates.gpu,
            memory_used=None if memory is None else memory.used,
            memory_total=None if memory is None else memory.total,
            temperature=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power=None if milliwatts is None else milliwatts / 1000,
        )

    def _ask(self, question: Any, *arguments: Any) -> Any:
        """The answer, or None: not every GPU or MIG instance has every figure."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


class Meter:
    """Measures the machine and runs; CPU shares are since the previous look, so look twice."""

    def __init__(self, gpus: Gpus | None = None) -> None:
        self._gpus = gpus or Gpus()
        self._processes: dict[tuple[int, float], psutil.Process] = {}
        psutil.cpu_percent()

    def machine(self) -> Machine:
        memory = psutil.virtual_memory()
        return Machine(
            host=socket.gethostname(),
            cpu=psutil.cpu_percent(),
            cores=psutil.cpu_count() or 1,
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            gpus=self._gpus.read(),
            no_gpus=self._gpus.reason,
        )

    def use(self, entry: Entry) -> Use | None:
        """What a run on this host uses; None for other hosts, and without permission."""
        process = entry.process()
        if process is None:
            return None
        use = Use(cpu=0, memory=0)
        with suppress(psutil.Error):
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):  # it ended meanwhile
                    known = self._processes.setdefault((one.pid, one.create_time()), one)
                    use.cpu += known.cpu_percent()
                    use.memory += known.memory_info().rss
        return use


def look(meter: Meter, now: float | None = None) -> Snapshot:
    """The current state; a meter's CPU shares are meaningful from its second look on."""
    now = time.time() if now is None else now
    return Snapshot(
        now=now,
        machine=meter.machine(),
        runs=[_run(entry, meter, now) for entry in entries()],
        finished=finished()[:SHOWN_FINISHED],
    )


def first_look(meter: Meter) -> Snapshot:
    """A look with the CPU shares of the `FIRST_LOOK` seconds before it."""
    look(meter)
    time.sleep(FIRST_LOOK)
    return look(meter)


def _run(entry: Entry, meter: Meter, now: float) -> RunningStage:
    silent = max(0.0, now - entry.updated)
    left = (entry.total - entry.done) / entry.rate if entry.rate else None
    return RunningStage(
        entry=entry,
        use=meter.use(entry),
        elapsed=max(0.0, now - entry.started),
        silent=silent,
        remaining=None if left is None else max(0.0, left - silent),
    )
