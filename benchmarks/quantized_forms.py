"""Quality, size and time of every form with fewer bits, of the multi-task model and of a pruned student.

Command: python benchmarks/quantized_forms.py --data FOLDER --encoder FOLDER_OR_HUB_ID [--size small] [--peers]
         [--times] [--threads 1]

The model is the teacher of `distillation.py` in seed 1 (eleven tasks), which is taken from `--work` where it is done.
The student has three of its six layers, half of the heads and of the feed-forward neurons, chosen by Fisher importance
with repair, and learns from the teacher. Scores are of the test split, on the saved files.

--peers scores other tools on the same models: torch in bfloat16, optimum-quanto, torchao, and NNCF's compression of
weights alone; they are no dependency of this project and must be importable.
--times measures all forms that are done in turns, on a quiet machine; peers in torch against torch, in one process.

Resumable: what is scored keeps its small JSON below benchmarks/results/quantized_forms.
"""

import argparse
import dataclasses
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from distillation import Benchmark
from transformers.utils import logging as transformers_logging

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.evaluation.benchmark import benchmark, measure_size, real_inputs
from hf_mtcompress.evaluation.evaluate import evaluate_predictor
from hf_mtcompress.formats.graph_settings import read_graph_settings, write_graph_settings
from hf_mtcompress.formats.openvino.export import convert_openvino
from hf_mtcompress.formats.predictor import Predictor
from hf_mtcompress.formats.torch import TorchRuntime
from hf_mtcompress.recipe import BenchmarkConfig
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import SplitScores, StepRecord
from hf_mtcompress.records.forms import OPENVINO_MODEL
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps.quantizing import float_graph
from hf_mtcompress.steps.run_context import RunContext, probe_samples
from hf_mtcompress.steps.scoring import score_folder

RESULTS = Path(__file__).parent / "results" / "quantized_forms"
MODELS = ("teacher", "student")
STUDENT: dict[str, Any] = {
    "kind": "prune",
    "name": "student",
    "from": "teacher",
    "layers": 3,
    "heads": 0.5,
    "feed_forward": 0.5,
    "importance": "fisher",
    "combine": "max_min",
    "repair": True,
    "multiple_of": 32,
    "recover": {
        "kind": "distill",
        "teacher": "teacher",
        "criteria": ["logits"],
        "every_task": True,
        "learning_rate": 3e-4,
    },
}
BITSANDBYTES = {"backend": "bitsandbytes"}
RUNTIME = {"backend": "onnxruntime"}
FORMS: dict[str, dict[str, Any]] = {
    "bitsandbytes int8": {**BITSANDBYTES, "bits": 8},
    "bitsandbytes int8, embeddings": {**BITSANDBYTES, "bits": 8, "embeddings": True},
    "bitsandbytes nf4": {**BITSANDBYTES, "bits": 4},
    "bitsandbytes nf4, embeddings": {**BITSANDBYTES, "bits": 4, "embeddings": True},
    "torchao int8": {"backend": "torchao", "bits": 8},
    "onnx float16": {**RUNTIME, "bits": 16},
    "onnx int8": {**RUNTIME, "bits": 8},
    "onnx int8, embeddings int4": {**RUNTIME, "bits": 8, "embedding_bits": 4},
    "onnx int8, static": {**RUNTIME, "bits": 8, "calibration": {"method": "percentile", "rows": 256}},
    "onnx int4": {**RUNTIME, "bits": 4},
    "onnx int4, blocks of 32": {**RUNTIME, "bits": 4, "block_size": 32},
    "onnx mixed, 6.5 times smaller": {**RUNTIME, "bits": "mixed", "mixed": {"size_mb": None}},
    "openvino int8": {"backend": "openvino", "bits": 8, "calibration": {"rows": 256}},
}
"""Steps by form. The size of mixed bits is that of the float graph over 6.5, set when that is known."""


class Forms:
    """The two models, their forms and what is known of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        suite = Benchmark(options)
        self.output = suite.work / "seed-1"
        student = {**STUDENT, "recover": {**STUDENT["recover"], "epochs": suite.epochs}}
        student["recover"]["teacher_cache"] = str(suite.work / "cache")
        self.made = [{"kind": "finetune", "name": "teacher", "epochs": suite.epochs}, student]
        self.suite = suite
        self.results = RESULTS / options.size
        prepare_output(self.output)
        self.context = self._context([])
        self.records: dict[str, StepRecord] = {}
        self._do([])

    def _context(self, steps: list[dict[str, Any]]) -> RunContext:
        overrides = [*self.suite.overrides, f"steps={json.dumps([*self.made, *steps])}"]
        recipe = dataclasses.replace(load_recipe(self.suite.recipe, overrides), seed=1)
        return RunContext(recipe, self.output, self.suite.sources, self.suite.reader)

    def _do(self, steps: list[dict[str, Any]]) -> None:
        context = self._context(steps)
        for step in context.recipe.steps:
            self.records[str(step.name)] = do_step(step, self.records, context)

    def folders(self, model: str) -> Iterator[tuple[str, Path, Callable[[], Path]]]:
        """Name, place and maker of every form of a model."""
        place = self.output / model
        yield "torch float32", place, lambda: place
        graph = self._graph(model)
        yield "onnx float32", graph, lambda: graph
        vino = self.output / f"{model}-openvino"
        yield "openvino float32", vino, lambda: vino if vino.exists() else convert_openvino(graph, vino)
        size_mb = round((graph / "model.onnx").stat().st_size / 6.5 / 1e6, 2)
        for form, settings in FORMS.items():
            name = f"{model}-{form.replace(', ', '-').replace(' ', '-').replace('.', '-')}"
            step = {"kind": "quantize", "name": name, "from": model, **settings}
            if step["bits"] == "mixed":
                step["mixed"] = {"size_mb": size_mb}

            def make(step: dict[str, Any] = step, name: str = name) -> Path:
                self._do([step])
                return self.output / name

            yield form, self.output / name, make

    def _graph(self, model: str) -> Path:
        return float_graph(model, self.context, self.context.load(model).eval(), self.context.reader_of_step(model))

    def score(self) -> None:
        """Make and score what is not done."""
        for model in MODELS:
            for form, _, make in self.folders(model):
                target = self.results / model / f"{form}.json"
                if not target.exists():
                    folder = make()
                    size = measure_size(folder)
                    facts = {"bytes": size.weights_bytes, **self._facts(score_folder(self.context, folder, "test"))}
                    record = self.records.get(folder.name)
                    if record is not None and record.quantization and "parts" in record.quantization:
                        keys = ("parts", "sensitivity", "estimated", "divergence", "front")
                        facts |= {key: record.quantization[key] for key in keys}
                    self._write(target, facts)

    def peers(self) -> None:
        """Score what other tools make of the same models."""
        for model in MODELS:
            for name, change in PEERS.items():
                target = self.results / model / f"peer {name}.json"
                if not target.exists():
                    runtime = TorchRuntime(self.output / model)
                    change(runtime.model)
                    rows = self.context.sources.role("test")
                    scores = evaluate_predictor(Predictor(runtime), self.context.sources.tasks, rows, split="test")
                    self._write(target, {"bytes": _stored(runtime.model), **self._facts(scores)})
            target = self.results / model / "peer nncf, weights alone.json"
            if not target.exists():
                folder = _compress_weights(self.output / f"{model}-openvino", self.output / f"{model}-nncf")
                scores = score_folder(self.context, folder, "test")
                self._write(target, {"bytes": measure_size(folder).weights_bytes, **self._facts(scores)})

    def times(self) -> None:
        """Time all forms in turns, and peers in torch in turns."""
        folders = {
            f"{model} {form}": place
            for model in MODELS
            for form, place, _ in self.folders(model)
            if place.exists() and (self.results / model / f"{form}.json").exists()
        }
        config = BenchmarkConfig(threads=self.options.threads, repetitions=self.options.repetitions)
        samples = probe_samples(self.context)
        found = benchmark(folders, reference="teacher torch float32", config=config, samples=samples)
        target = times_of(self.results, self.options.threads)
        before = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        # Peers are timed against torch in their own turns: what is known of them stays known.
        peers = self._time_peers(config, samples) if self.options.peers else before.get("peers_in_torch", {})
        result = {
            "conditions": found.conditions,
            "environment": environment_facts(),
            "latency": {
                label: {
                    str(row.batch_size): {
                        "minimum_ms": row.minimum_ms,
                        "median_ms": row.median_ms,
                        "ratio_minimum": row.ratio_minimum,
                        "ratio_median": row.ratio_median,
                    }
                    for row in rows
                }
                for label, rows in found.latency.items()
            },
            "peers_in_torch": peers,
        }
        write_text(target, json.dumps(result, indent=2) + "\n")

    def _time_peers(self, config: BenchmarkConfig, samples: list[Any]) -> dict[str, Any]:
        """Milliseconds of peers, and of torch float32 in the same turns."""
        torch.set_num_threads(config.threads or 1)
        runtimes = {}
        for model in MODELS:
            runtimes[f"{model} torch float32"] = TorchRuntime(self.output / model)
            for name, change in PEERS.items():
                runtimes[f"{model} {name}"] = runtime = TorchRuntime(self.output / model)
                change(runtime.model)
        measured: dict[str, dict[str, Any]] = {label: {} for label in runtimes}
        for size in config.batch_sizes:
            batch = real_inputs(self.output / "teacher", samples, config.tokens, size)
            taken: dict[str, list[float]] = {label: [] for label in runtimes}
            for round_ in range(-2, config.repetitions):
                for label, runtime in runtimes.items():
                    begin = time.perf_counter()
                    runtime.logits(batch)
                    if round_ >= 0:
                        taken[label].append(1000 * (time.perf_counter() - begin))
            for label, values in taken.items():
                measured[label][str(size)] = {"minimum_ms": min(values), "median_ms": median(values)}
        return measured

    def _facts(self, scores: SplitScores) -> dict[str, Any]:
        return {
            "average": scores.average,
            "scores": {
                name: found.metrics[str(self.suite.sources.tasks[name].metric)] for name, found in scores.tasks.items()
            },
        }

    def _write(self, target: Path, facts: dict[str, Any]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(facts, indent=2) + "\n")
        print(f"{target.parent.name} {target.stem}: {facts['average']:.4f}, {facts['bytes'] / 1e6:.1f} MB", flush=True)


# ---- peers ----


def _bfloat16(model: torch.nn.Module) -> None:
    model.to(torch.bfloat16)


def _quanto(model: torch.nn.Module) -> None:
    # Its 4 bits do not run in torch's inference mode (0.2.7).
    from optimum.quanto import freeze, qint8, quantize  # pyright: ignore[reportMissingImports] -- a peer

    quantize(model, weights=qint8, exclude=["heads.*"])
    freeze(model)


def _torchao(kind: str) -> Callable[[torch.nn.Module], None]:
    def change(model: torch.nn.Module) -> None:
        from torchao import quantization

        settings = getattr(quantization, kind)()
        linear = torch.nn.Linear
        quantization.quantize_(
            model, settings, filter_fn=lambda part, name: isinstance(part, linear) and not name.startswith("heads")
        )

    return change


PEERS: dict[str, Callable[[torch.nn.Module], None]] = {
    "torch bfloat16": _bfloat16,
    "optimum-quanto int8": _quanto,
    "torchao int8 weights": _torchao("Int8WeightOnlyConfig"),
    "torchao int8": _torchao("Int8DynamicActivationInt8WeightConfig"),
}


def _compress_weights(source: Path, folder: Path) -> Path:
    """NNCF's compression of weights to 8 bits, which needs no rows; activations stay in float."""
    import nncf
    import openvino

    if not folder.exists():
        shutil.copytree(source, folder)
        graph = openvino.Core().read_model(source / OPENVINO_MODEL)
        openvino.save_model(
            nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM),
            folder / OPENVINO_MODEL,
            compress_to_fp16=False,
        )
        write_graph_settings(folder, read_graph_settings(source, "openvino"), "openvino")
    return folder


def _stored(model: torch.nn.Module) -> int:
    """Bytes of what a model would save."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    def size(tensor: Any) -> int:
        if is_traceable_wrapper_subclass(tensor):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    return sum(size(tensor) for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor))


# ---- table ----


def times_of(results: Path, threads: int) -> Path:
    """Where the times with so many threads stand."""
    return results / f"times_{threads}_threads.json"


def table(results: Path, threads: int) -> str:
    """Everything that is known, against the float teacher and the float form of each model."""
    times_file = times_of(results, threads)
    times = json.loads(times_file.read_text(encoding="utf-8")) if times_file.exists() else {"latency": {}}
    reference = json.loads((results / "teacher" / "torch float32.json").read_text(encoding="utf-8"))
    lines = [
        "| model | form | MB | times smaller | average | against its float | kept, worst task | batch 1 | batch 32 |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for model in MODELS:
        own = json.loads((results / model / "torch float32.json").read_text(encoding="utf-8"))
        for file in sorted(
            (results / model).glob("*.json"), key=lambda file: (file.stem.startswith("peer"), file.stem)
        ):
            facts = json.loads(file.read_text(encoding="utf-8"))
            kept = min(facts["scores"][task] / own["scores"][task] for task in own["scores"])
            rows = times["latency"].get(f"{model} {file.stem}", {})
            ratios = [rows.get(size, {}).get("ratio_minimum") for size in ("1", "32")]
            faster = ["-" if ratio is None else f"{1 / ratio:.1f}x" for ratio in ratios]
            lines.append(
                f"| {model} | {file.stem} | {facts['bytes'] / 1e6:.1f} | {reference['bytes'] / facts['bytes']:.1f} | "
                f"{facts['average']:.4f} | {100 * (facts['average'] - own['average']):+.2f} | {100 * kept:.1f} % | "
                f"{faster[0]} | {faster[1]} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Do what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for the models (default: runs)")
    parser.add_argument("--peers", action="store_true", help="score (and time) other tools, too")
    parser.add_argument("--times", action="store_true", help="measure latency; the machine should be quiet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("overrides", metavar="a.b.c=value", nargs="*", help="change a value of the recipe")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    forms = Forms(options)
    forms.score()
    if options.peers:
        forms.peers()
    if options.times:
        forms.times()
    print(table(forms.results, options.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
