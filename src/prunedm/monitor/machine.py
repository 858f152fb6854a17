"""CPUs, memory and GPUs: of the machine by psutil and NVML, of a run by its process tree."""

import os
import socket
from contextlib import suppress
from importlib import import_module
from typing import Any

import psutil
from pydantic import BaseModel

from prunedm.system.running import Entry


class Gpu(BaseModel):
    """What NVML says of one GPU; None is what it does not tell of this one."""

    index: int
    name: str
    utilisation: float | None = None  # percent of the last sample in which a kernel ran
    memory_used: int | None = None  # bytes
    memory_total: int | None = None
    temperature: float | None = None  # degrees Celsius
    power: float | None = None  # watts


class Machine(BaseModel):
    """The machine at one time."""

    host: str
    cpu: float  # percent of all cores, since the last look
    cores: int
    load: float | None  # processes that run or wait, over a minute
    memory_used: int  # bytes
    memory_total: int
    gpus: list[Gpu]
    no_gpus: str = ""  # why there are none


class Use(BaseModel):
    """What a process and its children use; pages that they share count for each of them."""

    cpu: float  # percent of one core, since the last look
    memory: int  # bytes, resident


class Gpus:
    """NVIDIA's GPUs by NVML; without a driver there are none, and `reason` says so."""

    def __init__(self, nvml: Any = None) -> None:
        """nvml: the module pynvml, or what stands in for it in a test."""
        if nvml is None:
            nvml = import_module("pynvml")
        self._nvml, self._handles, self.reason = nvml, [], ""
        try:
            nvml.nvmlInit()
            self._handles = [
                nvml.nvmlDeviceGetHandleByIndex(k) for k in range(nvml.nvmlDeviceGetCount())
            ]
        except nvml.NVMLError as error:
            self.reason = f"no NVIDIA GPU ({error})"

    def read(self) -> list[Gpu]:
        """All GPUs as they are now."""
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
        """The answer, or None: some GPUs, and parts of GPUs, do not have every figure."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


class Meter:
    """Looks at the machine and at runs; CPU shares are since the look before, so look twice."""

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
        """What a run of this host uses; None for others, and where it may not be asked."""
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
