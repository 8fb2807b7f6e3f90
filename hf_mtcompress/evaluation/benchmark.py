"""Size, latency and memory of saved artefacts.

What is timed is the whole multi-task graph: model inputs as arrays in memory -> the logits of all tasks as arrays;
tokenization is not part of it. Every artefact runs in a process of its own and they take turns, because two runtimes in
one process disturb each other and because other work on the machine must hit all of them alike. A quiet moment is
waited for; times that do not hold together (`records.timing.doubtful_times`) are taken again, and in the end not given.
"""

import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_mtcompress.data.readers import padded_length
from hf_mtcompress.environment import available_cores, busy_seconds, ending_of, load_average
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.folders import folder_form, open_reader, task_folders
from hf_mtcompress.formats.graph_settings import graph_bytes, read_graph_settings
from hf_mtcompress.formats.reload.check import child_environment, save_arrays
from hf_mtcompress.formats.vanilla import stock_task
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.marking import read_mark
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sizes import count_parameters, word_table
from hf_mtcompress.model.sparse import MASK, VALUES
from hf_mtcompress.model.surgery import apply_structure
from hf_mtcompress.model.vanilla import stock_class
from hf_mtcompress.recipe import BenchmarkConfig
from hf_mtcompress.records import FORMS, FormName, LatencyRecord, SizeRecord
from hf_mtcompress.records.run import without_doubtful
from hf_mtcompress.records.timing import BUSY, SPARE_CORES, Calls, Cost, Surroundings, cost_of, doubtful_times

logger = logging.getLogger(__name__)

_PROCESSOR_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
)
_SAFETENSORS_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm")
"""Instruction sets that decide how fast 8-bit and bfloat16 kernels are."""
_PAUSE_SECONDS = 0.01
"""Threads of the last artefact may spin this long after its call."""
_SETTLE_BELOW_MS = 50.0
"""Calls shorter than this get one untimed call first, since another process has just emptied the caches; where no
artefact takes longer, there are several timed ones a turn."""
_SHORT_CALLS = 5
"""As many: short calls vary more, and cost little."""
_LOOK_SECONDS = 0.5
"""So long is looked at once at what other processes use."""


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured, by the label of the artefact.

    Attributes:
        latency: one row for each batch size; times that do not hold together are None, with the reason.
        peak_memory_mb: largest resident memory of the artefact's process, interpreter and libraries included.
        conditions: how it was measured; `not_measured` lists the times that are not given, with what shows that the
            machine was busy.
        minimum_ms: smallest times by batch size, those that do not hold among them: to choose by, not to be claimed.
        busy: what other processes did while all were timed; None where they left enough of the machine.
    """

    latency: dict[str, list[LatencyRecord]]
    peak_memory_mb: dict[str, float | None]
    conditions: dict[str, Any]
    minimum_ms: dict[str, dict[int, float]]
    busy: str | None


def benchmark(
    folders: Mapping[str, Path],
    *,
    reference: str,
    config: BenchmarkConfig,
    samples: Sequence[Any],
    timeout: float = 300.0,
) -> BenchmarkResult:
    """Time saved artefacts in turns.

    Args:
        folders: artefacts by label.
        reference: label of the one that ratios refer to; a torch folder in float32.
        config: tokens, batch sizes, repetitions, threads, how long to wait for a quiet machine.
        samples: texts, lists of words, pairs of texts or images. Texts are repeated and cut to exactly
            `config.tokens` tokens (fewer where the model's `max_length` is shorter); no padding is timed.
        timeout: seconds that one answer of a process may take.

    Raises:
        ArtifactError: the reference is no float torch folder, or an artefact does not load or run.
    """
    if reference not in folders:
        raise ArtifactError(f"expected the reference among {list(folders)}, found '{reference}'; add it to the folders")
    forms: dict[str, FormName] = {label: folder_form(folder) for label, folder in folders.items()}
    if forms[reference] != "torch":
        raise ArtifactError(
            f"expected a torch folder in float32 as reference, found '{reference}' of form {forms[reference]}; "
            "name the step that everything is compared with"
        )
    load = load_average()
    begin = time.monotonic()
    free = _wait_for_quiet(config.threads or available_cores(), config.wait)
    left = config.wait - (time.monotonic() - begin)
    threads = config.threads or max(free, 1)
    if config.threads is None and threads < available_cores():
        logger.warning("timed with threads: %d, since other processes use the other cores", threads)
    costs = {label: _cost(folder, forms[label]) for label, folder in folders.items()}
    times: dict[str, dict[int, list[list[float]]]] = {label: {} for label in folders}
    around: dict[int, Surroundings] = {}
    doubts: dict[str, dict[int, str]] = {}
    tokens: dict[str, int] = {}
    calls: dict[int, int] = {}
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        workers: dict[str, _Worker] = {}
        for index, (label, folder) in enumerate(folders.items()):
            place = Path(scratch) / str(index)
            place.mkdir()
            inputs = real_inputs(folder, samples, config.tokens, max(config.batch_sizes))
            tokens[label] = padded_length(inputs) or 0
            batches = {}
            for size in config.batch_sizes:
                batches[str(size)] = str(place / f"{size}.npz")
                save_arrays(Path(batches[str(size)]), {name: array[:size] for name, array in inputs.items()})
            worker = _Worker(label, folder, forms[label], threads, batches, place, timeout)
            workers[label] = stack.enter_context(worker)
        for worker in workers.values():
            worker.wait_until_ready()
        todo, until = list(config.batch_sizes), 0.0
        while todo:
            for size in todo:
                slowest = max(min(worker.time(size, max(config.warmup, 1))) for worker in workers.values())
                # As many calls for all, since a minimum over more calls is smaller.
                calls[size] = _SHORT_CALLS if slowest < _SETTLE_BELOW_MS else 1
                look = _Look(workers.values())
                for label, turns in _take_turns(workers, size, config.repetitions, calls[size]).items():
                    times[label][size] = turns
                around[size] = Surroundings(cores=available_cores(), threads=threads, others=look.others(), load=load)
            doubts = doubtful_times({label: _calls(rows) for label, rows in times.items()}, costs, around)
            todo = [size for size in config.batch_sizes if any(size in rows for rows in doubts.values())]
            # What does not hold is taken again, at least once, while there is time to wait for a better moment.
            now = time.monotonic()
            if config.wait == 0 or (until and now > until):
                break
            until = until or now + max(left, _LOOK_SECONDS)
            if todo and _wait_for_quiet(threads, until - now, workers.values()) < threads:
                break
        peaks = {label: worker.peak_mb() for label, worker in workers.items()}
    latency = {
        label: without_doubtful(
            [_row(times[label][size], times[reference][size], size, tokens[label]) for size in config.batch_sizes],
            doubts.get(label, {}),
            doubts.get(reference, {}),
        )
        for label in folders
    }
    not_measured = [
        f"{label}, batch {size}: {why}" for label, rows in doubts.items() for size, why in sorted(rows.items())
    ]
    for line in not_measured:
        logger.warning("not measured, %s: %s", BUSY, line)
    return BenchmarkResult(
        latency=latency,
        peak_memory_mb=peaks,
        conditions={
            "reference": reference,
            "tokens": max(tokens.values()),
            "batch_sizes": list(config.batch_sizes),
            "repetitions": config.repetitions,
            "warmup": config.warmup,
            "threads": threads,
            "cores": available_cores(),
            "instructions": processor_instructions(),
            "load_before": load,
            "load_after": load_average(),
            "other_processes": {
                str(size): None if seen.others is None else round(seen.others, 2) for size, seen in around.items()
            },
            "order": "one process for each artefact, taking turns; timed calls a turn: "
            + ", ".join(f"{calls[size]} with batches of {size}" for size in config.batch_sizes),
            "timed": "model inputs in memory to the logits of all tasks in memory; tokenization is not included",
            "not_measured": not_measured,
        },
        busy=next((why for seen in around.values() if (why := seen.busy()) is not None), None),
        minimum_ms={
            label: {size: row.minimum_ms for size, row in _calls(rows).items()} for label, rows in times.items()
        },
    )


def real_inputs(folder: Path, samples: Sequence[Any], tokens: int, rows: int) -> dict[str, np.ndarray]:
    """Model inputs made of real data, without padding, as this artefact's own reader makes them.

    Args:
        folder: a saved artefact.
        samples: texts, lists of words, pairs of texts or images.
        tokens: wanted length, where inputs have tokens.
        rows: wanted rows; samples are used again when there are fewer.
    """
    chosen = [samples[index % len(samples)] for index in range(rows)]
    return open_reader(folder).unpadded(chosen, tokens)


def processor_instructions() -> list[str]:
    """Instruction sets of this processor that matter for speed; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next(
        (line.split(":", 1)[1].split() for line in text.splitlines() if line.lower().startswith(("flags", "features"))),
        [],
    )
    return [name for name in _INSTRUCTIONS if name in flags]


# ---- size ----


def measure_size(folder: Path) -> SizeRecord:
    """Bytes on disk and parameters of a saved artefact of any form.

    Weights and graph are counted apart from the tokenizer (or image processor); configs and cards are not counted. A
    folder of plain folders is counted whole: every task holds an encoder of its own.

    Raises:
        ArtifactError: the folder holds no artefact.
    """
    form = folder_form(folder)
    if FORMS[form].graph:
        settings = read_graph_settings(folder, form)
        parts, embedding_bytes = [settings.parameters], settings.embedding_bytes
        weights = graph_bytes(folder, form)
        places = [folder]
    else:
        places = list(task_folders(folder).values()) if FORMS[form].layout == "tasks" else [folder]
        models = [_empty_model(place) for place in places]
        parts = [count_parameters(model) for model in models]
        tables = [_table_bytes(place, model) for place, model in zip(places, models, strict=True)]
        known = [size for size in tables if size is not None]
        embedding_bytes = sum(known) if known and len(known) == len(tables) else None
        weights = sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))
    processor = {file for place in places for pattern in _PROCESSOR_FILES for file in place.glob(pattern)}
    encoder, embedding, head = (sum(part[name] for part in parts) for name in ("encoder", "embedding", "head"))
    return SizeRecord(
        weights_bytes=weights,
        tokenizer_bytes=sum(file.stat().st_size for file in processor),
        embedding_bytes=embedding_bytes,
        parameters=encoder + head,
        encoder_parameters=encoder,
        embedding_parameters=embedding or None,
        head_parameters=head,
    )


def _empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder without weights, in the shapes that it has in float precision."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        if isinstance(config, MultiTaskConfig):
            return MultiTaskModel(config)
        stock = stock_class(stock_task("task", config, folder), config)
        if stock is None:
            raise ArtifactError(f"expected a stock model in {folder}, found model type '{config.model_type}'")
        mark = read_mark(config)
        model = stock._from_config(config)
        if mark is not None and mark.structure is not None:
            encoder = model.base_model
            assert isinstance(encoder, PreTrainedModel)
            apply_structure(encoder, mark.structure)
        return model


def _table_bytes(folder: Path, model: PreTrainedModel) -> int | None:
    """Bytes of the word embeddings in the weight files, None where there are none or they cannot be told."""
    encoders = list(model.encoders.values()) if isinstance(model, MultiTaskModel) else [model.base_model]
    tables = [table for part in encoders if (table := word_table(part)) is not None]
    names = {name for name, value in model.named_parameters() for table in tables if value is table.weight}
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            # An embedding without its zeros is two tensors.
            stored = {name + end for name in names for end in ("", VALUES, MASK)}
            for name in stored & set(tensors.keys()):
                part = tensors.get_slice(name)
                total += int(np.prod(part.get_shape())) * _SAFETENSORS_BYTES[part.get_dtype()]
    return total or None


# ---- time ----


class _Worker:
    """The process of one artefact, seen from here; ended by its own handle, whatever happens."""

    def __init__(
        self,
        label: str,
        folder: Path,
        form: FormName,
        threads: int,
        batches: Mapping[str, str],
        place: Path,
        timeout: float,
    ) -> None:
        self.label = label
        self._timeout = timeout
        self._last_ms: dict[int, float] = {}
        settings = place / "settings.json"
        values = {
            "folder": str(folder.resolve()),
            "form": form,
            "graph": next(iter(FORMS[form].graph), None),
            "threads": threads,
            "batches": dict(batches),
        }
        settings.write_text(json.dumps(values), encoding="utf-8")
        self._errors = (place / "stderr.txt").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            # -P: the folder of the script is not searched for modules.
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=child_environment(threads),
            cwd=place,
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            _close(stream)

    def wait_until_ready(self) -> None:
        self._read()

    def time(self, batch_size: int, calls: int) -> list[float]:
        """Milliseconds of each call."""
        times = self._ask({"do": "time", "batch": str(batch_size), "calls": calls})["ms"]
        self._last_ms[batch_size] = times[-1]
        return times

    def timed_turn(self, batch_size: int, calls: int) -> list[float]:
        """Milliseconds of each call; a short one is called once before, untimed."""
        settle = self._last_ms.get(batch_size, 0.0) < _SETTLE_BELOW_MS
        return self.time(batch_size, calls + settle)[-calls:]

    def peak_mb(self) -> float | None:
        return self._ask({"do": "peak"})["mb"]

    def used_seconds(self) -> float:
        """Of processors, since it was started."""
        return self._ask({"do": "used"})["seconds"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:  # the process has ended
            raise self._failure("ended") from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(self._timeout, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late = not watchdog.is_alive()
            watchdog.cancel()
        if not line:
            raise self._failure(f"gave no answer within {self._timeout:.0f} s" if late else "ended")
        return json.loads(line)

    def _failure(self, what: str) -> ArtifactError:
        code = self._process.wait()
        if what == "ended" and code < 0:
            what = ending_of(code)
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        if lines and (said := re.match(r"hf_mtcompress\.errors\.\w+: (.*)", lines[-1])):
            return ArtifactError(said[1])  # one of ours, which says all
        last = "\n".join(lines[-3:])
        return ArtifactError(f"expected '{self.label}' to load and answer, but its process {what}:\n{last}")


class _Look:
    """What other processes use of the cores, from now on.

    Args:
        workers: whose work is ours, beside that of this process.
    """

    def __init__(self, workers: Iterable[_Worker] = ()) -> None:
        self._workers = list(workers)
        self._begin = time.monotonic()
        self._busy, self._own = busy_seconds(), self._own_seconds()

    def others(self) -> float | None:
        """Cores that they used, on average; None where the system does not tell."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return None
        other = busy - self._busy - (self._own_seconds() - self._own)
        return max(other / (time.monotonic() - self._begin), 0.0)

    def _own_seconds(self) -> float:
        return time.process_time() + sum(worker.used_seconds() for worker in self._workers)


def _wait_for_quiet(threads: int, seconds: float, workers: Iterable[_Worker] = ()) -> int:
    """Wait until other processes leave as many cores as threads are to be timed.

    Args:
        threads: to be timed.
        seconds: to wait, at most.
        workers: see `_Look`.

    Returns:
        Threads that other processes leave room for: those that are asked for, or fewer where it did not get quiet.
    """
    cores, begin, seen = available_cores(), time.monotonic(), []
    while seconds > 0:
        look = _Look(workers)
        time.sleep(_LOOK_SECONDS)
        others = look.others()
        if others is None or Surroundings(cores=cores, threads=threads, others=others).busy() is None:
            return threads
        if not seen:
            logger.warning(
                "timing waits for a quiet machine, up to %.0f s: other processes use %.1f of %d cores",
                seconds,
                others,
                cores,
            )
        seen.append(others)
        if time.monotonic() - begin >= seconds:
            return int(cores - median(seen) + SPARE_CORES)
    return threads


def _take_turns(
    workers: Mapping[str, _Worker], size: int, repetitions: int, calls: int
) -> dict[str, list[list[float]]]:
    """Milliseconds by artefact, of the calls of each turn."""
    labels = list(workers)
    times: dict[str, list[list[float]]] = {label: [] for label in labels}
    for repetition in range(repetitions):
        # Another one begins each time, so that nobody always follows the same neighbour.
        start = repetition % len(labels)
        for label in labels[start:] + labels[:start]:
            time.sleep(_PAUSE_SECONDS)
            times[label].append(workers[label].timed_turn(size, calls))
    return times


def _calls(times: Mapping[int, Sequence[Sequence[float]]]) -> dict[int, Calls]:
    """By batch size, what is known of the times of an artefact; of each turn its calls."""
    found = {}
    for size, turns in times.items():
        every = [ms for turn in turns for ms in turn]
        smallest = [min(turn) for turn in turns]
        half = len(turns) // 2
        halves = (min(smallest[:half]), min(smallest[half:])) if half > 1 else None
        found[size] = Calls(minimum_ms=min(every), median_ms=median(every), halves_ms=halves)
    return found


def _row(
    times: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], size: int, tokens: int
) -> LatencyRecord:
    every, others = ([ms for turn in turns for ms in turn] for turns in (times, reference))
    return LatencyRecord(
        batch_size=size,
        tokens=tokens,
        minimum_ms=min(every),
        median_ms=median(every),
        ratio_minimum=min(every) / min(others),
        ratio_median=median(every) / median(others),
        repetitions=len(every),
    )


def _cost(folder: Path, form: FormName) -> Cost:
    size = measure_size(folder)
    if FORMS[form].graph:
        precision = read_graph_settings(folder, form).precision
        return cost_of(form, precision, size.encoder_parameters, size.embedding_parameters)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False) if FORMS[form].layout == "model" else None
    if getattr(config, "adapters", None):  # the encoder may run once for each task
        return cost_of(form, "", None, None)
    return cost_of(form, "", size.encoder_parameters, size.embedding_parameters)


def _close(stream: IO[str] | None) -> None:
    if stream is None:
        return
    with suppress(OSError):  # a broken pipe: the process has ended
        stream.close()
