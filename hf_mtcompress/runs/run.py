"""A recipe from beginning to end: data, steps, scores, sizes, times, record, card.

load data -> for each step: skip if done, else run and save whole, score on validation
          -> every artefact: fresh-process reload, test scores, size, latency -> record.json, card, picture
"""

import dataclasses
import datetime
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from hf_mtcompress import records
from hf_mtcompress.artifacts import (
    ASSETS,
    CARD,
    GRAPHS,
    RECIPE,
    RECORD,
    STEP_RECORD,
    WEBPAGE,
    WORK,
    sole_use,
    whole_folder,
    write_text,
)
from hf_mtcompress.config import (
    BenchmarkConfig,
    DistillStep,
    ExportStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    Role,
    StepConfig,
    TrimVocabularyStep,
    TrimWeightsStep,
    dropping,
    teachers_of,
)
from hf_mtcompress.config.load import dump_recipe, load_recipe
from hf_mtcompress.config.sections import near
from hf_mtcompress.data.load import content_fingerprint, load_unlabelled
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.errors import ArtifactError, DataError, PublishingError, RecipeError
from hf_mtcompress.evaluation.affinity import held_out_cosines
from hf_mtcompress.evaluation.benchmark import benchmark, measure_size
from hf_mtcompress.evaluation.compare import check_budget, compare
from hf_mtcompress.exporting.webpage import write_webpage
from hf_mtcompress.inference.probes import reload_checks, save_probes
from hf_mtcompress.inference.reload_check import ReloadCheck, check_reload
from hf_mtcompress.inference.runtimes import folder_form, task_folders
from hf_mtcompress.inference.runtimes import load_processor as read_processor
from hf_mtcompress.losses.grouping import Grouping, best_grouping, encoders_within
from hf_mtcompress.planning import describe_plan
from hf_mtcompress.publishing.card import INTERFERENCE_PICTURE, PICTURE, PICTURES, SENSITIVITY_PICTURE, render_card
from hf_mtcompress.publishing.facts import headline_figures, onnx_artefact, tasks_of
from hf_mtcompress.publishing.hub import push_folder
from hf_mtcompress.publishing.picture import draw_comparison, draw_interference
from hf_mtcompress.publishing.portable import portable_recipe
from hf_mtcompress.publishing.sensitivity import draw_sensitivity
from hf_mtcompress.records import Artefact, RunRecord, StepRecord, TaskRecord
from hf_mtcompress.steps.bench import Bench, load_processor, probe_batch, probe_samples, start_of
from hf_mtcompress.steps.gate import pass_gate
from hf_mtcompress.steps.rows import texts_to_keep, validation_rows
from hf_mtcompress.steps.run import check_steps_fit, run_step
from hf_mtcompress.steps.scoring import read_step, score_folder, task_record
from hf_mtcompress.steps.teaching import ask_teacher as steps_ask_teacher
from hf_mtcompress.tasks import Task

logger = logging.getLogger(__name__)

_BENCH_TEXTS = (
    "The ferry left the harbour an hour late, so we had time for a second coffee and a walk along the old pier.",
    "Nobody on the committee could say who had ordered forty boxes of green paint, or what they had been meant for.",
)
"""What `bench` times when it is given nothing but folders."""


def run(recipe: Recipe, output: Path) -> RunRecord:
    """Do every step that is not done yet, measure what came out, write record and card.

    A repeated call skips finished steps; a killed run goes on from its last checkpoint.

    Args:
        recipe: what is wanted.
        output: folder of the run; made when it is not there.

    Raises:
        RecipeError: the recipe does not fit its data or models.
        ArtifactError: the folder cannot be written, another process works in it, or something saved does not reload.
    """
    transformers_logging.set_verbosity_error()
    sources = load_sources(recipe.tasks, recipe.seed)
    check_steps_fit(recipe, sources.tasks)
    bench = Bench(recipe, output, sources, load_processor(recipe))
    prepare_output(output)
    with sole_use(output):
        write_text(output / RECIPE, dump_recipe(recipe))
        done: dict[str, StepRecord] = {}
        for step, source in zip(recipe.steps, step_sources(recipe), strict=True):
            done[str(step.name)] = do_step(step, source, done, bench)
        shutil.rmtree(output / WORK / GRAPHS, ignore_errors=True)
        record = _measure(bench, list(done.values()))
        _write_results(bench, record)
    return record


def prepare_output(output: Path) -> None:
    """Make the folder of a run.

    Raises:
        ArtifactError: it cannot be made or written.
    """
    try:
        (output / WORK).mkdir(parents=True, exist_ok=True)
        probe = output / WORK / "writable"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # another process may share the folder
    except OSError as error:
        raise ArtifactError(
            f"expected a folder that can be written at {output}, found that it cannot ({error.strerror}); "
            "choose another with --output"
        ) from error


def step_sources(recipe: Recipe) -> list[str | None]:
    """The step that each step starts from: `from`, else the latest float torch step, else None (the encoder)."""
    sources: list[str | None] = []
    latest: str | None = None
    for step in recipe.steps:
        fresh = isinstance(step, DistillStep | PretrainStep) and step.student is not None
        sources.append(None if fresh else step.source or latest)
        match step:
            case (
                FinetuneStep() | PretrainStep() | DistillStep() | PruneStep() | TrimVocabularyStep() | TrimWeightsStep()
            ):
                latest = step.name
            case QuantizeStep() | ExportStep():
                if latest is None and step.source is None:
                    raise RecipeError(
                        f"steps.{step.name}: expected a finetune, distill or prune step before it, found none; "
                        "begin with {kind: finetune}"
                    )
    return sources


# ---- one step ----


def do_step(step: StepConfig, source: str | None, done: dict[str, StepRecord], bench: Bench) -> StepRecord:
    """Run a step unless its folder holds the result of exactly this step."""
    name = str(step.name)
    fingerprint = step_fingerprint(step, source, done, bench)
    folder = bench.step_folder(name)
    work = bench.output / WORK / f"{name}-{fingerprint[:8]}"
    within, main_alone = bench.for_step(step), name in dropping(bench.recipe)
    found = read_step(folder / STEP_RECORD)
    if found is not None and found.fingerprint == fingerprint:
        logger.warning("%s: done already, skipped", name)
        if isinstance(step, QuantizeStep):
            # The limits of a gate do not change what was made: they are held against it again.
            pass_gate(step, done[str(source)], found, within, work)
            found.settings = _plain(step)
            shutil.rmtree(work, ignore_errors=True)
        return found
    logger.warning("%s: %s%s", name, step.kind, f" from {source}" if source else "")
    work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with whole_folder(folder) as scratch:
        outcome = run_step(step, source, within, scratch, work)
        record = StepRecord(
            name=name,
            kind=step.kind,
            source=source,
            fingerprint=fingerprint,
            settings=_plain(step),
            seconds=0.0,
            tasks=[task.name for task in bench.sources.tasks.values() if task.role == "main" or not main_alone],
            artefacts=[
                dataclasses.replace(artefact, folder=_join(name, artefact.folder)) for artefact in outcome.artefacts
            ],
            structure=outcome.structure,
            training=outcome.training,
            interference=outcome.interference,
            vocabulary=outcome.vocabulary,
            pruning=outcome.pruning,
            sparsity=outcome.sparsity,
            quantization=outcome.quantization,
        )
        for made, artefact in zip(outcome.artefacts, record.artefacts, strict=True):
            artefact.size = measure_size(scratch / made.folder)
            artefact.scores["validation"] = score_folder(bench, scratch / made.folder, "validation")
        if isinstance(step, QuantizeStep):
            pass_gate(step, done[str(source)], record, within, work)
        save_probes(scratch, probe_batch(within, outcome.processor), outcome.probes)
        record.seconds = time.monotonic() - begin
        write_text(scratch / STEP_RECORD, records.to_json(record))
    shutil.rmtree(work, ignore_errors=True)
    logger.warning("%s: done in %.0f s, validation average %s", name, record.seconds, _average(record))
    return record


def step_fingerprint(step: StepConfig, source: str | None, done: dict[str, StepRecord], bench: Bench) -> str:
    """Digest of everything a step's result depends on: its settings, its inputs, the data and the encoder."""
    recipe = bench.recipe
    # Mixed bits without a size are chosen by these limits.
    judged = isinstance(step, QuantizeStep) and (step.bits != "mixed" or (step.mixed and step.mixed.size_mb))
    limits = _LIMITS_OF_A_GATE if judged else _KEEP if isinstance(step, QuantizeStep) else ()
    parts = {
        "format": records.FORMAT_VERSION,
        "step": {
            "kind": step.kind,
            **{key: value for key, value in _chosen(step).items() if key not in limits},
        },
        "source": done[source].fingerprint if source is not None else None,
        "teachers": [done[name].fingerprint if name in done else _saved(name) for name in teachers_of(step)],
        **_other_inputs(step, bench),
        "seed": recipe.seed,
        "encoder": _chosen(recipe.encoder),
        "encoder_files": _folder_digest(Path(recipe.encoder.path)),
        "tasks": {name: {"kind": task.kind, **_chosen(task)} for name, task in bench.sources.tasks.items()},
        "data": bench.sources.fingerprints,
        "mixing": _chosen(recipe.mixing),
        "fusion": _chosen(recipe.fusion),
        "training": _chosen(recipe.training),
        **({"branches": [recipe.branches, recipe.branch_layers]} if recipe.branches else {}),
        **({"corpus": _corpus_digest(step, bench)} if isinstance(step, TrimVocabularyStep) and step.corpus else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


_KEEP = ("keep",)
_LIMITS_OF_A_GATE = ("retention", "worst_task_retention", *_KEEP)
"""Keys of a quantize step that judge what it made, and do not change it."""


_MODEL_FILES = (".safetensors", ".json", ".onnx", ".xml", ".bin")


def _saved(place: str) -> Any:
    """A saved model by its content where it lies here, else by its name."""
    folder = Path(place)
    if not folder.is_dir():
        return place
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _MODEL_FILES):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _other_inputs(step: StepConfig, bench: Bench) -> dict[str, Any]:
    """What a step reads beside its source, its teachers and the tasks' rows."""
    student = getattr(step, "student", None)
    parts: dict[str, Any] = {}
    if student is not None and student.path is not None and Path(student.path).is_dir():
        parts["student_files"] = _saved(student.path)
    if isinstance(step, PretrainStep) and step.data is not None:
        rows = load_unlabelled(step.data, [step.column], Path.cwd(), bench.recipe.seed, f"steps.{step.name}.data")
        parts["own_data"] = content_fingerprint({"train": rows})
    return parts


def _chosen(section: Any) -> dict[str, Any]:
    """What differs from its default: a key that a later version adds does not undo what is done."""
    chosen = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        if value != default:
            chosen[item.name] = _plain(value)
            if item.name == "recover":
                # Not a key of a recovery, and later than some that are done.
                chosen[item.name].pop("drop_auxiliary", None)
    return chosen


def _corpus_digest(step: TrimVocabularyStep, bench: Bench) -> str:
    """Digest of the texts whose tokens a step keeps, where they are not the tasks' own."""
    return hashlib.sha256(repr(texts_to_keep(step, bench)).encode("utf-8", "surrogatepass")).hexdigest()


def _folder_digest(folder: Path) -> str | None:
    """Digest of names and sizes of a local encoder's files; None for a Hub id."""
    if not folder.is_dir():
        return None
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()


# ---- measuring ----


def _measure(bench: Bench, steps: list[StepRecord]) -> RunRecord:
    """Reload, test scores and times of every artefact; results that stand in the last record are kept."""
    recipe = bench.recipe
    reference = recipe.reference or steps[0].name
    record = RunRecord(
        name=recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=recipe.seed,
        environment=environment_facts(),
        encoder=_encoder_facts(bench),
        tasks={name: task_record(name, bench) for name in bench.sources.tasks},
        reference=reference,
        steps=steps,
    )
    last = _last_record(bench.output)
    known = _keep_measured(steps, last)
    fresh = [step for step in steps if step.name not in known]
    if fresh:
        _check_reloads(bench.output, fresh, probe_samples(bench))
    if bench.sources.role("test"):
        for artefact in (artefact for step in fresh for artefact in step.artefacts):
            artefact.scores["test"] = score_folder(bench, bench.output / artefact.folder, "test")
    if last is not None and not fresh and _same_conditions(last, steps, reference, recipe.benchmark):
        record.created, record.benchmark = last.created, last.benchmark
    else:
        # Times are only comparable within one run, so all are taken again.
        _time_artefacts(bench, record, recipe.benchmark)
    _compare(record, recipe)
    return record


def _last_record(output: Path) -> RunRecord | None:
    """What an earlier call measured, if it came that far."""
    try:
        return load_record(output)
    except ArtifactError:
        return None


def _keep_measured(steps: Sequence[StepRecord], last: RunRecord | None) -> set[str]:
    """Put what an earlier call measured on exactly these artefacts back in place; the names of steps it holds."""
    earlier = {step.fingerprint: step for step in last.steps} if last is not None else {}
    known = set()
    for step in steps:
        if (old := earlier.get(step.fingerprint)) is not None and old.name == step.name:
            step.artefacts = old.artefacts
            known.add(step.name)
    return known


def _same_conditions(last: RunRecord, steps: Sequence[StepRecord], reference: str, config: BenchmarkConfig) -> bool:
    """Whether the times in the last record are of these artefacts, taken as wanted now."""
    found = last.benchmark or {}
    wanted = {
        "tokens": config.tokens,
        "batch_sizes": list(config.batch_sizes),
        "repetitions": config.repetitions,
        "warmup": config.warmup,
        "threads": config.threads or found.get("threads"),
    }
    same_steps = [step.fingerprint for step in last.steps] == [step.fingerprint for step in steps]
    return same_steps and last.reference == reference and all(found.get(key) == wanted[key] for key in wanted)


def _check_reloads(output: Path, steps: Sequence[StepRecord], samples: Sequence[Any] | None = None) -> None:
    """Load every artefact in a fresh process and hold its logits against those of the model before it was saved."""
    checks: dict[str, ReloadCheck] = {}
    for step in steps:
        forms = {_within(step, artefact): artefact.form for artefact in step.artefacts}
        found = reload_checks(output / step.name, forms, samples)
        checks |= {_join(step.name, folder): check for folder, check in found.items()}
    results = dict(zip(checks, check_reload(list(checks.values())), strict=True))
    for artefact in (artefact for step in steps for artefact in step.artefacts):
        artefact.reload = results.get(artefact.folder)
        if artefact.reload is not None and not artefact.reload["passed"]:
            logger.warning("%s does not reload as it was saved: %s", artefact.folder, artefact.reload["problems"])


def _time_artefacts(bench: Bench, record: RunRecord, config: BenchmarkConfig) -> None:
    artefacts = {artefact.folder: artefact for step in record.steps for artefact in step.artefacts}
    reference = next(step for step in record.steps if step.name == record.reference).artefacts[0].folder
    samples = probe_samples(bench)
    result = benchmark(
        {label: bench.output / label for label in artefacts}, reference=reference, config=config, samples=samples
    )
    for label, rows in result.latency.items():
        artefacts[label].latency = rows
        artefacts[label].peak_memory_mb = result.peak_memory_mb.get(label)
    record.benchmark = result.conditions


def _compare(record: RunRecord, recipe: Recipe) -> None:
    reference = next(step for step in record.steps if step.name == record.reference).artefacts[0]
    record.comparisons = [
        compare(record.tasks, reference, artefact, step=step.name)
        for step in record.steps
        for artefact in step.artefacts
    ]
    if recipe.budget is not None:
        last = record.steps[-1].artefacts[0]
        comparison = next(item for item in record.comparisons if item.folder == last.folder)
        record.budget = check_budget(recipe.budget, last, comparison)


def _write_results(bench: Bench, record: RunRecord) -> None:
    assets = bench.output / ASSETS
    assets.mkdir(exist_ok=True)
    if bench.recipe.publish is not None:
        record.publish = _plain(bench.recipe.publish)
    for name in PICTURES:
        (assets / name).unlink(missing_ok=True)  # where there is nothing to draw now, an older one would be shown
    draw_comparison(record, assets / PICTURE)
    draw_interference(record, assets / INTERFERENCE_PICTURE)
    draw_sensitivity(record, assets / SENSITIVITY_PICTURE)
    write_text(bench.output / RECORD, records.to_json(record))
    recipe = dump_recipe(bench.recipe, portable=True)
    pictures = [name for name in PICTURES if (assets / name).is_file()]
    write_text(bench.output / CARD, render_card(record, recipe, pictures=pictures))


def _encoder_facts(bench: Bench) -> dict[str, Any]:
    encoder = bench.recipe.encoder
    path = Path(encoder.path)
    saved = json.loads((bench.output / str(bench.recipe.steps[0].name) / "config.json").read_text(encoding="utf-8"))
    return {
        "path_or_id": path.name if path.is_absolute() or path.exists() else encoder.path,
        "hub_id": encoder.hub_id or (None if path.is_absolute() or path.exists() else encoder.path),
        "revision": encoder.revision,
        "max_length": bench.max_length,
        "image_size": encoder.image_size,
        "model_type": saved["encoders"]["main"]["model_type"],
    }


# ---- the other commands ----


def validate(recipe: Recipe) -> None:
    """Check a recipe against its data and its encoder, without training.

    Raises:
        RecipeError: it cannot be run.
    """
    step_sources(recipe)
    sources = load_sources(recipe.tasks, recipe.seed)
    check_steps_fit(recipe, sources.tasks)
    load_processor(recipe)


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `run` would do, without doing it; see `describe_plan`."""
    return describe_plan(recipe, step_sources(recipe))


def group_tasks_of(
    folder: Path, *, encoders: int | None = None, parameters: int | None = None, rows: int = 200
) -> Grouping:
    """The grouping of a run's tasks into encoders, from gradients on validation rows.

    Looks that the run took in training (`fusion.measure_every` with `measure_on: validation`) are what it goes by;
    without any, one look at its trained model is taken, which is mostly chance.

    Args:
        folder: of the run. Of its finetune and distill steps, the one with the most tasks is asked; among those, the
            one with the most looks, else the last.
        encoders: at most so many; default 2.
        parameters: at most so many in all encoders together, instead of `encoders`.
        rows: of a look at the trained model: at most so many of each source of rows.

    Raises:
        ArtifactError: there is no run, or no such step in it.
        RecipeError: both limits, or one that allows no encoder.
        DataError: a task has no validation rows.
        UnsupportedEncoderError: tasks do not share a whole encoder.
    """
    record = load_record(folder)
    trained = [step for step in reversed(record.steps) if step.kind in ("finetune", "distill")]
    step = max(trained, key=lambda step: (len(tasks_of(record, step)), _looks(step)), default=None)
    if step is None:
        raise ArtifactError(f"expected a run with a finetune or distill step, found none in {folder.name}; run one")
    if encoders is not None and parameters is not None:
        raise RecipeError("expected --encoders or --parameters, found both; give one")
    if rows < 1:
        raise RecipeError(f"--rows: expected at least 1 validation row of each source, found {rows}")
    try:
        if parameters is not None:
            size = step.artefacts[0].size
            if size is None or not size.encoder_parameters:
                raise ArtifactError(
                    f"expected the number of parameters of the step '{step.name}' in the record, found none; say "
                    "--encoders instead"
                )
            encoders = encoders_within(parameters, size.encoder_parameters)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    encoders = 2 if encoders is None else encoders
    if encoders < 1:
        raise RecipeError(f"--encoders: expected at least 1, found {encoders}")
    if _looks(step):
        return _grouped_by_looks(step, tasks_of(record, step), encoders)
    recipe = load_recipe(folder / RECIPE)
    bench = Bench(recipe, folder, load_sources(recipe.tasks, recipe.seed), load_processor(recipe))
    start = start_of(step.name, bench)
    if torch.accelerator.is_available():
        torch.nn.Module.to(start.model, torch.accelerator.current_accelerator())
    chosen = validation_rows(bench, rows)
    cosines = held_out_cosines(start.model, chosen, start.processor, max_length=recipe.encoder.max_length)
    return _grouped(start.model.tasks, list(start.model.tasks), cosines.tolist(), encoders)


def _looks(step: StepRecord) -> int:
    """How often a step compared gradients on validation rows."""
    report = step.interference or {}
    return int(report["steps"]) if report.get("rows") == "validation" else 0


def _grouped_by_looks(step: StepRecord, tasks: Mapping[str, TaskRecord], encoders: int) -> Grouping:
    """From the mean cosines in a step's record, of the tasks that its model answers."""
    report = step.interference or {}
    unseen = [name for name in tasks if report["norms"].get(name) is None]
    if unseen:
        raise DataError(
            f"step '{step.name}': expected validation rows with a label of every task, found none of "
            f"{', '.join(unseen)} in {report['steps']} looks; add rows, or leave the task out"
        )
    return _grouped(tasks, report["tasks"], report["cosine"], encoders, report["steps"])


def _grouped(
    tasks: Mapping[str, Task | TaskRecord],
    names: Sequence[str],
    cosines: Sequence[Sequence[float | None]],
    encoders: int,
    looks: int = 1,
) -> Grouping:
    """Main tasks by their part of a matrix of `names`; auxiliary ones help in every group, as in `compare-tasks`."""
    main = [name for name, task in tasks.items() if task.role == "main"]
    places = [names.index(name) for name in main]
    matrix = [[cosines[row][column] for column in places] for row in places]
    helpers = tuple(name for name in tasks if name not in main)
    return dataclasses.replace(best_grouping(main, matrix, encoders, looks), helpers=helpers)


def ask_teacher(recipe: Recipe, output: Path, name: str, part: tuple[int, int] = (0, 1)) -> tuple[int, int]:
    """Fill the cache of a step's teacher, or a part of it, before the step is run; on several machines if need be.

    Args:
        recipe: what is wanted.
        output: folder of the run, with the steps before this one done.
        name: of a distill or pretrain step with `teacher_cache`.
        part: (number, of), counted from 0.

    Returns:
        Files of answers that are there, and files that there must be.

    Raises:
        RecipeError: there is no such step, or it keeps no cache.
        ArtifactError: the folder cannot be written, or a step that is needed is not done.
    """
    steps = dict(zip([str(step.name) for step in recipe.steps], recipe.steps, strict=True))
    step = steps.get(name)
    if not isinstance(step, DistillStep | PretrainStep):
        usable = [known for known, other in steps.items() if isinstance(other, DistillStep | PretrainStep)]
        raise RecipeError(f"expected a distill or pretrain step, found '{name}'; {near(name, usable)}")
    source = dict(zip(steps, step_sources(recipe), strict=True))[name]
    bench = Bench(recipe, output, load_sources(recipe.tasks, recipe.seed), load_processor(recipe))
    prepare_output(output)
    return steps_ask_teacher(step, source, bench.for_step(step), part)


def evaluate(folder: Path, recipe: Recipe, role: Role) -> records.SplitScores:
    """Scores of a saved folder of any form on one split of a recipe's data."""
    sources = load_sources(recipe.tasks, recipe.seed)
    return score_folder(Bench(recipe, folder.parent, sources, None), folder, role)


def bench(folders: Sequence[Path], config: BenchmarkConfig) -> dict[str, Any]:
    """Times of saved folders of any form, side by side; the first is the reference."""
    form = folder_form(folders[0])
    place = next(iter(task_folders(folders[0]).values())) if form == "vanilla" else folders[0]
    text = "pixel_values" not in read_processor(place).model_input_names
    labels = {str(folder): folder.absolute() for folder in folders}
    samples = _BENCH_TEXTS if text else [Image.effect_noise((256, 256), 64)]
    result = benchmark(labels, reference=str(folders[0]), config=config, samples=samples)
    return dataclasses.asdict(result)


def card(folder: Path) -> str:
    """The model card of a run, rendered again from its record."""
    recipe = folder / RECIPE
    text = portable_recipe(recipe.read_text(encoding="utf-8")) if recipe.exists() else None
    return render_card(load_record(folder), text)


def push(folder: Path, repo_id: str | None, *, public: bool = False, dry_run: bool = False) -> list[str]:
    """Upload a run after it proved that it reloads; what was uploaded, one line a file.

    Raises:
        PublishingError: something does not reload, the card is wrong, or the Hub refused.
    """
    record = load_record(folder)
    wanted = repo_id or (record.publish or {}).get("repo_id")
    if wanted is None:
        raise PublishingError("expected a repository, found none; give --repo-id OWNER/NAME or publish.repo_id")
    private = not public and bool((record.publish or {}).get("private", True))
    result = push_folder(folder, wanted, check=_reload_problems(folder, record), private=private, dry_run=dry_run)
    lines = [f"{file.bytes:>12,}  {file.path}" for file in result.files]
    total = f"{result.total_bytes:>12,}  bytes in {len(result.files)} files"
    return [*lines, total, f"dry run: nothing was sent to {wanted}" if dry_run else f"pushed: {result.commit_url}"]


def webpage(
    folder: Path,
    output: Path | None = None,
    *,
    step: str | None = None,
    title: str | None = None,
    examples: Sequence[str] = (),
    libraries: Path | None = None,
) -> Path:
    """A page on which a model of a run, or of an ONNX folder, answers inside the browser; see `write_webpage`.

    Args:
        folder: a run or an ONNX folder.
        output: default: `webpage` inside the run, or beside the ONNX folder.
        step: of a run, the step whose ONNX graph is shown; default: the one that a repository would get.
        title: default: the name of the run or folder.
        examples: texts to try.
        libraries: see `write_webpage`.

    Raises:
        PublishingError: no ONNX graph is there.
        ArtifactError, UnsupportedEncoderError, MissingExtraError: see `write_webpage`.
    """
    folder = folder.absolute().resolve()
    if not (folder / RECORD).is_file():
        if step is not None:
            raise PublishingError(f"expected a run to choose step '{step}' from, found no {RECORD} in {folder}")
        place = output or folder.parent / f"{folder.name}-webpage"
        return write_webpage(folder, place, title=title or folder.name, examples=examples, libraries=libraries)
    record = load_record(folder)
    artefact = onnx_artefact(record, step)
    return write_webpage(
        folder / artefact.folder,
        output or folder / WEBPAGE,
        title=title or record.name,
        facts=headline_figures(record, artefact),
        examples=examples,
        libraries=libraries,
    )


def _reload_problems(folder: Path, record: RunRecord) -> Callable[[list[Path]], list[str]]:
    """A check for `push_folder`: what is wrong with the artefacts among some folders when they are loaded afresh."""

    def check(places: list[Path]) -> list[str]:
        wanted = {place.resolve() for place in places}
        chosen = []
        for step in record.steps:
            kept = [item for item in step.artefacts if (folder / item.folder).resolve() in wanted]
            if kept:
                chosen.append(dataclasses.replace(step, artefacts=kept))
        _check_reloads(folder, chosen)
        return [
            f"{artefact.folder}: {'; '.join(artefact.reload['problems'])}"
            for step in chosen
            for artefact in step.artefacts
            if artefact.reload is not None and not artefact.reload["passed"]
        ]

    return check


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, without what is left open."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: _plain(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if getattr(value, item.name) is not None
        }
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _within(step: StepRecord, artefact: Artefact) -> str:
    """An artefact's folder relative to its step."""
    return artefact.folder.removeprefix(step.name).strip("/") or "."


def _join(step: str, folder: str) -> str:
    return step if folder == "." else f"{step}/{folder}"


def _average(record: StepRecord) -> str:
    average = record.artefacts[0].scores["validation"].average
    return "not defined" if average is None else f"{average:.4f}"


def load_record(folder: Path) -> RunRecord:
    """The record of a run.

    Raises:
        ArtifactError: there is none, or it is of a newer format.
    """
    path = folder / RECORD
    try:
        return records.run_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArtifactError(
            f"expected the folder of a run with {RECORD}, found none in {folder}; run a recipe first"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"expected a readable {path.name} in {folder}, found: {error}") from error
