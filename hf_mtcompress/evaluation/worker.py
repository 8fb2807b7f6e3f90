"""One artefact in a process of its own, timed on request. Run as a script, by its path; started by `benchmark`.

    python worker.py settings.json

`settings.json` holds `folder`, `form`, `threads` and `batches` (name -> .npz file of model inputs). Requests and
answers are JSON, one a line, on standard input and output:

    {"do": "time", "batch": "1", "calls": 1}  ->  {"ms": [12.5]}
    {"do": "peak"}                            ->  {"mb": 310.2}
    {"do": "used"}                            ->  {"seconds": 3.5}

A first line `{"ready": true}` says that the artefact is loaded. A graph is run without importing torch, so
that its peak memory is that of its runtime.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def load(folder: Path, form: str, graph: str | None, threads: int) -> Call:
    """The artefact as a function from arrays of model inputs to arrays of logits."""
    if graph is not None:
        module = importlib.import_module(f"hf_mtcompress.formats.{form}.session")
        session = module.open_session(folder / graph, threads)
        return lambda batch: module.run_session(session, batch)
    import torch  # here, since a graph runs without it

    from hf_mtcompress.formats.runtimes import open_runtime

    torch.set_num_interop_threads(1)
    return open_runtime(folder, threads).logits


def peak_mb() -> float | None:
    """Largest resident memory of this process so far, in 10**6 bytes; None where the system does not tell."""
    try:
        # Not getrusage: on Linux that starts with the memory of the process that started this one.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    if sys.platform == "darwin":
        import resource  # Unix alone has it

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return None


def main(settings_path: str) -> None:
    """Serve requests until standard input ends."""
    # Libraries may print; the answers keep a channel of their own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        channel.write(json.dumps(values) + "\n")

    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    batches = {name: dict(np.load(path)) for name, path in settings["batches"].items()}
    call = load(Path(settings["folder"]), settings["form"], settings["graph"], settings["threads"])
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "time":
            times = []
            for _ in range(request["calls"]):
                begin = time.perf_counter()
                call(batches[request["batch"]])
                times.append((time.perf_counter() - begin) * 1000)
            answer({"ms": times})
        elif request["do"] == "peak":
            answer({"mb": peak_mb()})
        elif request["do"] == "used":
            # Of all threads, those that spin while they wait for work among them.
            answer({"seconds": time.process_time()})


if __name__ == "__main__":
    main(sys.argv[1])
