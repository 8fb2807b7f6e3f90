"""A record of a run that never took place. Its numbers are invented and exact, so that tests can name them."""

from pathlib import Path

from hf_mtcompress.losses.interference import GradientLog, interference_report
from hf_mtcompress.records import (
    Artefact,
    Comparison,
    FormName,
    LatencyRecord,
    RunRecord,
    SizeRecord,
    SplitScores,
    StepRecord,
    TaskRecord,
    TaskScore,
    to_json,
)

TASKS = {"intent": "accuracy", "mood": "pearson", "slots": "span_f1"}
BASELINES = {"intent": 0.2, "mood": 0.0, "slots": 0.0}
ROWS = {"intent": 700, "mood": 2500, "slots": 120}

RECIPE = """\
# An invented recipe.
format_version: 1
name: artificial
seed: 13
encoder:
  path: /home/someone/models/artificial-encoder
  hub_id: example/artificial-encoder
  max_length: 64
tasks:
  intent:
    kind: sequence-classification
    data: {path: json, data_dir: ../shared/snips}
    text: tokens
    label: intent
steps:
- {kind: finetune, name: teacher, epochs: 3}
"""


def task(name: str, kind: str, problem_type: str, labels: list[str] | None, **changes: object) -> TaskRecord:
    values: dict[str, object] = {
        "name": name,
        "kind": kind,
        "problem_type": problem_type,
        "metric": TASKS[name],
        "role": "main",
        "weight": 1.0,
        "labels": labels,
        "rows": {"train": 13084, "validation": 650, "test": ROWS[name]},
        "baseline": {"validation": BASELINES[name], "test": BASELINES[name]},
        "dataset_id": "example/artificial-data",
        "dataset_revision": "abc1234",
        "license": "cc0-1.0",
    }
    return TaskRecord(**(values | changes))  # pyright: ignore[reportArgumentType] - keywords by name


def scores(split: str, intent: float, mood: float, slots: float) -> SplitScores:
    values = {"intent": intent, "mood": mood, "slots": slots}
    extra = {"intent": {"macro_f1": intent - 0.0105}, "mood": {"mae": 0.4375}, "slots": {}}
    return SplitScores(
        split=split,
        average=sum(values.values()) / 3,
        tasks={
            name: TaskScore(rows=ROWS[name] if split == "test" else 650, metrics={TASKS[name]: value, **extra[name]})
            for name, value in values.items()
        },
    )


def latency(batch_size: int, minimum: float, reference: float) -> LatencyRecord:
    return LatencyRecord(
        batch_size=batch_size,
        tokens=64,
        minimum_ms=minimum,
        median_ms=minimum * 1.25,
        ratio_minimum=minimum / reference,
        ratio_median=minimum / reference * 1.125,
        repetitions=20,
    )


def artefact(
    form: FormName,
    folder: str,
    precision: str,
    megabytes: float,
    parameters: int | None,
    test: tuple[float, float, float] | None,
    times: tuple[float, float] | None,
) -> Artefact:
    return Artefact(
        form=form,
        folder=folder,
        precision=precision,
        size=SizeRecord(
            weights_bytes=int(megabytes * 1e6),
            tokenizer_bytes=712_000,
            embedding_bytes=None if form == "onnx" else 46_900_000,
            parameters=parameters,
            encoder_parameters=None if parameters is None else parameters - 30_000,
            embedding_parameters=None if parameters is None else 11_720_000,
            head_parameters=None if parameters is None else 30_000,
        ),
        scores={}
        if test is None
        else {
            "validation": scores("validation", *(value + 0.0025 for value in test)),
            "test": scores("test", *test),
        },
        latency=[] if times is None else [latency(1, times[0], 20.0), latency(32, times[1], 480.0)],
        reload={"passed": True, "max_difference": 0.0, "tolerance": 0.0, "how": "AutoModel"},
        peak_memory_mb=None,
    )


def comparison(step: str, one: Artefact, reference: tuple[float, float, float]) -> Comparison:
    found = one.scores["test"].tasks
    tasks: dict[str, dict[str, float | None]] = {}
    for (name, metric), expected in zip(TASKS.items(), reference, strict=True):
        value = found[name].metrics[metric]
        tasks[name] = {
            "score": value,
            "reference": expected,
            "difference": value - expected,
            "retention": value / expected,
            "retention_above_chance": (value - BASELINES[name]) / (expected - BASELINES[name]),
        }
    kept = {name: row["retention"] or 0.0 for name, row in tasks.items()}
    worst = min(kept, key=kept.__getitem__)
    return Comparison(
        step=step,
        folder=one.folder,
        split="test",
        retention=sum(kept.values()) / 3,
        retention_above_chance=sum(row["retention_above_chance"] or 0.0 for row in tasks.values()) / 3,
        worst_task_retention=kept[worst],
        worst_task=worst,
        tasks=tasks,
    )


def layers(count: int, heads: list[int], width: list[int]) -> dict[str, object]:
    return {
        "main": {
            "layers": [
                {"heads": heads[layer % len(heads)], "feed_forward": width[layer % len(width)]}
                for layer in range(count)
            ],
            "vocabulary": None,
        }
    }


def interference() -> dict[str, object]:
    """Intent and slots agree; mood is large and against both in three of four steps."""
    log = GradientLog(list(TASKS))
    for step in range(40):
        mood = (-30.0 if step % 4 else 30.0, 0.0, 40.0)
        rows = [(2.0, 0.0, 0.0), mood, (1.5, 2.0, 0.0)]
        log.add(step, list(TASKS), [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows])
    return interference_report(log, "the last layer of the encoder")


def make_record() -> RunRecord:
    """Teacher, student, its plain export, pruned student, and the int8 graph of that."""
    reference = (0.975, 0.75, 0.925)
    teacher = artefact("torch", "teacher", "float32", 90.875, 22_750_000, reference, (20.0, 480.0))
    teacher_graph = artefact(
        "onnx", "teacher-int8", "int8, dynamic, per channel", 23.5, None, (0.9725, 0.7475, 0.92), (6.4, 144.0)
    )
    student = artefact("torch", "student", "float32", 69.25, 17_375_000, (0.97, 0.74, 0.905), (10.0, 250.0))
    vanilla = artefact("vanilla", "student-export/vanilla", "float32", 207.5, 17_375_000, None, None)
    pruned = artefact("torch", "pruned", "float32", 58.25, 14_625_000, (0.9625, 0.735, 0.89), (6.25, 96.0))
    graph = artefact("onnx", "small", "int8, dynamic, per channel", 14.75, None, (0.96, 0.7325, 0.88), (2.0, 50.0))
    training = {"epochs": 3.0, "steps": 1227, "loss": 0.21875, "log": [{"step": 1, "loss": 2.0}]}
    return RunRecord(
        name="artificial",
        created="2026-01-02T03:04:05+00:00",
        seed=13,
        environment={
            "python": "3.11.9",
            "platform": "Linux x86_64",
            "system": "An Operating System 12",
            "processor": "Example CPU 9000 (invented)",
            "cores": 2,
            "memory_gb": 8.25,
            "packages": {"hf_mtcompress": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "bitsandbytes": None},
        },
        encoder={
            "path_or_id": "artificial-encoder",
            "hub_id": "example/artificial-encoder",
            "revision": "0123abc",
            "max_length": 64,
            "model_type": "bert",
            "license": "apache-2.0",
        },
        tasks={
            "intent": task(
                "intent",
                "sequence-classification",
                "single_label_classification",
                ["AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook"],
            ),
            "mood": task(
                "mood",
                "sequence-classification",
                "regression",
                None,
                dataset_id="Invented ratings",
                license="cc-by-nc-4.0",
            ),
            "slots": task("slots", "token-classification", "token_classification", ["O", "B-artist", "I-artist"]),
        },
        reference="teacher",
        steps=[
            StepRecord(
                name="teacher",
                kind="finetune",
                source=None,
                fingerprint="aa11",
                settings={"epochs": 3, "learning_rate": 5e-05},
                seconds=240.0,
                artefacts=[teacher],
                structure=layers(6, [12], [1536]),
                training=training,
                interference=interference(),
            ),
            StepRecord(
                name="teacher-int8",
                kind="quantize",
                source="teacher",
                fingerprint="bb22",
                settings={"backend": "onnxruntime", "bits": 8},
                seconds=12.5,
                artefacts=[teacher_graph],
            ),
            StepRecord(
                name="student",
                kind="distill",
                source=None,
                fingerprint="cc33",
                settings={"teacher": "teacher", "student": {"layers": 3, "path": None}, "temperature": 2.0},
                origin="teacher",
                seconds=300.0,
                artefacts=[student],
                structure=layers(3, [12], [1536]),
                training=training,
            ),
            StepRecord(
                name="student-export",
                kind="export",
                source="student",
                fingerprint="dd44",
                settings={"formats": ["vanilla"]},
                seconds=2.5,
                artefacts=[vanilla],
                structure=layers(3, [12], [1536]),
            ),
            StepRecord(
                name="pruned",
                kind="prune",
                source="student",
                fingerprint="ee55",
                settings={"heads": 0.3, "feed_forward": 0.5, "recover": {"kind": "distill", "epochs": 2}},
                seconds=180.0,
                artefacts=[pruned],
                structure=layers(3, [9, 7, 9], [800, 640, 864]),
                training=training,
            ),
            StepRecord(
                name="small",
                kind="quantize",
                source="pruned",
                fingerprint="ff66",
                settings={"backend": "onnxruntime", "bits": 8},
                seconds=9.5,
                artefacts=[graph],
                structure=layers(3, [9, 7, 9], [800, 640, 864]),
            ),
        ],
        comparisons=[
            comparison("teacher-int8", teacher_graph, reference),
            comparison("student", student, reference),
            comparison("pruned", pruned, reference),
            comparison("small", graph, reference),
        ],
        benchmark={
            "tokens": 64,
            "threads": 2,
            "warmup": 3,
            "order": "taking turns, one timed call a turn",
            "repetitions": 20,
            "suspicious": [],
            "load_before": 0.25,
            "load_after": 1.75,
        },
        budget={
            "artefact": "small",
            "size_mb": {"limit": 16.0, "found": 14.75, "met": True},
            "retention": {"limit": 0.98, "found": 0.9709, "met": False},
        },
        publish={"repo_id": "example/artificial", "private": True, "license": "apache-2.0", "language": ["en"]},
    )


def write_run(folder: Path, record: RunRecord | None = None) -> RunRecord:
    """A run folder on disk whose weights are a few invented bytes."""
    record = record or make_record()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(to_json(record), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for step in record.steps:
        for one in step.artefacts:
            inner = (
                [folder / one.folder / name for name in record.tasks]
                if one.form == "vanilla"
                else [folder / one.folder]
            )
            for place in inner:
                place.mkdir(parents=True)
                (place / "config.json").write_text('{"model_type": "mtcompress"}', encoding="utf-8")
                weights = "model.onnx" if one.form == "onnx" else "model.safetensors"
                (place / weights).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00" + one.folder.encode() * 8)
        (folder / step.name).mkdir(exist_ok=True)
        (folder / step.name / "step.json").write_text("{}", encoding="utf-8")
    (folder / "pruned" / "training_args.bin").write_bytes(b"\x80\x04left over")
    (folder / "pruned" / "probes.safetensors").write_bytes(b"rows of the data")
    (folder / "pruned" / "checkpoint-10").mkdir()
    (folder / "pruned" / "checkpoint-10" / "model.safetensors").write_bytes(b"half way")
    (folder / ".work").mkdir()
    (folder / ".work" / "half.json").write_text("{}", encoding="utf-8")
    (folder / "assets").mkdir()
    (folder / "assets" / "comparison.png").write_bytes(b"\x89PNG invented")
    (folder / "assets" / "interference.png").write_bytes(b"\x89PNG invented")
    return record
