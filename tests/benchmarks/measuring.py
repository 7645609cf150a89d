"""What the benchmarks share: seconds and memory of a job, and two jobs timed in turns."""

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any


class Peak:
    """Seconds on the clock and of the processor, and the highest resident memory above that at the start, sampled every 10 ms."""

    def __enter__(self) -> "Peak":
        self.start_gb = self.peak_gb = self._resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self._stop.set()
        self._thread.join()

    @property
    def above_gb(self) -> float:
        return self.peak_gb - self.start_gb

    def __str__(self) -> str:
        return f"{self.seconds:6.2f} s (processor {self.cpu:.2f} s), peak {self.above_gb:5.2f} GB above {self.start_gb:.2f} GB"

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak_gb = max(self.peak_gb, self._resident())

    @staticmethod
    def _resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def in_turns(what: str, baseline: Callable[[], Any], jobs: dict[str, Callable[[], Any]], repeats: int) -> None:
    """Runs the baseline and each job in turns and prints medians: machines that share their cores drift, ratios do not."""
    runs: dict[str, list[Peak]] = {name: [] for name in ("", *jobs)}
    for _ in range(repeats):
        for name, job in {"": baseline, **jobs}.items():
            with Peak() as peak:
                job()
            runs[name].append(peak)
    bare = runs.pop("")
    seconds, cpu, memory = median(p.seconds for p in bare), median(p.cpu for p in bare), max(p.above_gb for p in bare)
    print(f"{what}: {seconds:.2f} s (processor {cpu:.2f} s), peak {memory:.2f} GB above the start")
    for name, peaks in runs.items():
        ratios = [peak.seconds / base.seconds for peak, base in zip(peaks, bare, strict=True)]
        cpu = median(peak.cpu / base.cpu for peak, base in zip(peaks, bare, strict=True))
        print(
            f"  {name}: ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), of processor time {cpu:.2f}, "
            f"{median(p.seconds for p in peaks):.2f} s, peak {max(p.above_gb for p in peaks):.2f} GB above the start"
        )
