"""Mistakes that no single value shows: names that nothing has, settings that exclude each other."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_mtcompress.recipe.data import DataConfig
from hf_mtcompress.recipe.lineage import parent_of
from hf_mtcompress.recipe.recipe import (
    BenchmarkConfig,
    BudgetConfig,
    PublishConfig,
    Recipe,
)
from hf_mtcompress.recipe.schedules import GradualSchedule, OneShotSchedule
from hf_mtcompress.recipe.search import SEARCH_FORMS, SearchConfig
from hf_mtcompress.recipe.sections import WRITTEN_AS, Problems, join, near
from hf_mtcompress.recipe.steps import (
    FLOAT_STEPS,
    CalibrationConfig,
    DistillStep,
    ExportStep,
    FinetuneStep,
    MixedConfig,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    StepConfig,
    StudentConfig,
    TrimVocabularyStep,
    TrimWeightsStep,
    teachers_of,
)
from hf_mtcompress.recipe.tasks import (
    PRIMARY_METRICS,
    RESERVED_TASK_NAMES,
    ImageClassificationConfig,
    SequenceClassificationConfig,
    TaskConfig,
    TokenClassificationConfig,
    WeightSchedule,
)
from hf_mtcompress.recipe.timing import TimingConfig
from hf_mtcompress.recipe.training import FusionConfig, MixingConfig

TASK_NAME = re.compile(r"[a-z][a-z0-9_]*")
PATTERN = re.compile(r"([0-9]+):([0-9]+)")
STEP_NAME = re.compile(r"[a-z][a-z0-9_-]*")
RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]+")
RESERVED_STEP_NAMES = frozenset({"assets", "webpage"})
"""Folders of a run that are not steps (see `hf_mtcompress.artifacts`)."""


def check_recipe_name(name: str, problems: Problems) -> None:
    """The name becomes a folder below `runs/`."""
    if not RECIPE_NAME.fullmatch(name):
        problems.add("name", f"expected letters, digits, '.', '_' and '-', as the name of a folder, found '{name}'")


def check_task_name(name: str, problems: Problems) -> None:
    """The name becomes part of metric keys, module names and arguments of `forward`."""
    path = f"tasks.{name}"
    if not TASK_NAME.fullmatch(name):
        problems.add(
            path,
            "expected a task name of lower-case letters, digits and underscores that starts with a letter, "
            f"found '{name}'; rename the task",
        )
    elif name in RESERVED_TASK_NAMES:
        problems.add(path, f"'{name}' is a reserved name; rename the task, for example '{name}_task'")


def check_task(name: str, task: TaskConfig, names: Sequence[str], problems: Problems) -> None:
    """Look at one task; `names` are those of all tasks."""
    path = f"tasks.{name}"
    if isinstance(task.data, str) and (task.data not in names or task.data == name):
        others = [other for other in names if other != name]
        found = "itself" if task.data == name else f"'{task.data}', which is none"
        hint = near(task.data, others) if others else "give it data of its own"
        problems.add(join(path, "data"), f"expected a section or the name of another task, found {found}; {hint}")
    if task.unlabelled is not None and isinstance(task.data, str):
        problems.add(
            join(path, "unlabelled"), f"expected it beside the rows it belongs to; say it in tasks.{task.data}"
        )
    problem = problem_of(task)
    labels = task.labels
    if labels is not None:
        if problem == "regression":
            problems.add(join(path, "labels"), "a regression has no labels; remove the key")
        elif len(set(labels)) < len(labels):
            double = next(label for label in labels if labels.count(label) > 1)
            problems.add(join(path, "labels"), f"expected different labels, found '{double}' twice")
        elif len(labels) < 2:
            problems.add(join(path, "labels"), f"expected at least 2 labels, found {len(labels)}")
    if task.metric is not None and task.metric not in PRIMARY_METRICS[problem]:
        problems.add(
            join(path, "metric"),
            f"a {problem.replace('_', ' ')} task has no primary metric '{task.metric}', "
            f"{near(task.metric, list(PRIMARY_METRICS[problem]))}",
        )
    if task.head == "stock" and task.pooling is not None:
        problems.add(join(path, "pooling"), "a stock head has its own pooling; say head: linear or head: mlp with it")
    if problem not in ("single_label_classification", "token_classification"):
        if task.class_weights is not None:
            problems.add(join(path, "class_weights"), f"a {problem.replace('_', ' ')} task has none; remove the key")
        if task.label_smoothing:
            problems.add(join(path, "label_smoothing"), f"a {problem.replace('_', ' ')} task has none; remove the key")
    if task.class_weights is not None and labels is not None and len(task.class_weights) != len(labels):
        problems.add(
            join(path, "class_weights"),
            f"expected one weight for each of the {len(labels)} labels, found {len(task.class_weights)}",
        )


def problem_of(task: TaskConfig) -> str:
    """What kind of answer the task has: the key of `PRIMARY_METRICS`."""
    match task:
        case TokenClassificationConfig():
            return "token_classification"
        case SequenceClassificationConfig() | ImageClassificationConfig():
            return task.problem_type


def check_shared_data(tasks: Mapping[str, TaskConfig], problems: Problems) -> None:
    """A task may borrow rows only from one that has its own, so that nobody has to follow a chain."""
    for name, task in tasks.items():
        owner = tasks.get(task.data) if isinstance(task.data, str) else None
        if owner is not None and owner is not task and not isinstance(owner.data, DataConfig):
            problems.add(
                f"tasks.{name}.data",
                f"expected a task with data of its own, but '{task.data}' takes its rows from '{owner.data}'; "
                f"say data: {owner.data}",
            )


def check_step_names(names: Sequence[str], paths: Sequence[str], problems: Problems) -> None:
    """The name of a step becomes a folder of the run."""
    for index, (name, path) in enumerate(zip(names, paths, strict=True)):
        if name in names[:index]:
            problems.add(join(path, "name"), f"'{name}' is taken by steps.{names.index(name)}; choose another name")
        elif not STEP_NAME.fullmatch(name):
            problems.add(
                join(path, "name"),
                f"expected lower-case letters, digits, '_' and '-' after a first letter, found '{name}'",
            )
        elif name in RESERVED_STEP_NAMES:
            problems.add(join(path, "name"), f"'{name}' is a reserved name; choose another")


def check_steps(
    steps: Sequence[StepConfig | None],
    names: Sequence[str],
    kinds: Sequence[Any],
    paths: Sequence[str],
    problems: Problems,
) -> None:
    """Look at each step that could be built, with the names and kinds of all as they were written."""
    for index, (step, path) in enumerate(zip(steps, paths, strict=True)):
        if step is None:
            continue
        earlier = dict(zip(names[:index], kinds[:index], strict=True))
        parent = parent_of(step, earlier)
        if step.source is not None:
            _check_earlier(step.source, join(path, "from"), earlier, names, problems)
        match step:
            case FinetuneStep():
                pass
            case DistillStep() | PretrainStep():
                _check_distill(step, path, earlier, names, problems)
                if step.source is None and step.teacher is not None and step.teacher == parent:
                    problems.add(
                        join(path, "student"),
                        f"expected a student, since '{parent}' would be both teacher and student; "
                        "say student: {layers: N}, or name another step in 'from'",
                    )
            case PruneStep():
                _check_prune(step, path, earlier, names, problems)
            case TrimVocabularyStep():
                if step.corpus is None and step.column != "text":
                    problems.add(join(path, "column"), "names a column of 'corpus', which is not there; remove the key")
            case TrimWeightsStep():
                _check_trimming(step, path, problems)
                _check_recover(step.recover, path, earlier, names, problems)
            case QuantizeStep():
                _check_quantize(step, path, problems)
                _check_recover(step.recover, path, earlier, names, problems)
            case ExportStep():
                _check_words(step.formats, join(path, "formats"), problems)
                if step.per_task and "onnx" not in step.formats:
                    problems.add(join(path, "per_task"), "expected onnx among the formats beside it; remove the key")
                if "transformers_js" in step.formats and "onnx" not in step.formats:
                    problems.add(
                        join(path, "formats"), "expected onnx beside transformers_js, which is made from it; add it"
                    )
        if parent is None and isinstance(step, PruneStep | TrimWeightsStep | QuantizeStep | ExportStep):
            problems.add(path, "expected a finetune or distill step before it, whose model it can start from")


def _check_quantize(step: QuantizeStep, path: str, problems: Problems) -> None:
    onnx = step.backend == "onnxruntime"
    if step.bits in (16, "mixed") and step.backend == "bitsandbytes":
        problems.add(join(path, "bits"), "backend bitsandbytes has 8 and 4 bits; others need backend: onnxruntime")
    if step.bits != 8 and step.backend in ("openvino", "torchao"):
        problems.add(join(path, "bits"), f"backend {step.backend} has 8 bits; others need backend: onnxruntime")
    _check_mixed(step, path, problems)
    for key, given, bits in (
        ("block_size", step.block_size != 64, (8, 4, "mixed") if step.embedding_bits == 4 else (4, "mixed")),
        ("embedding_bits", step.embedding_bits is not None, (8, 4)),
        ("float_layers", bool(step.float_layers), (8, 4)),
        ("calibration", step.calibration is not None, (8,)),
        ("mixed", step.mixed is not None, ("mixed",)),
        ("recover", step.recover is not None, (8, 4)),
    ):
        if key == "calibration" and step.backend == "openvino":
            continue
        if given and not (onnx and step.bits in bits):
            wanted = " or ".join(map(str, bits))
            problems.add(
                join(path, key),
                f"expected backend onnxruntime with bits {wanted} beside it, found {step.backend} with {step.bits}; "
                "remove the key",
            )
    for key in ("quant_type", "double_quantization", "embeddings"):
        if getattr(step, key) != getattr(QuantizeStep(backend="bitsandbytes"), key):
            if step.backend != "bitsandbytes":
                problems.add(join(path, key), f"is for backend: bitsandbytes, found {step.backend}; remove it")
            elif step.bits == 8 and key != "embeddings":
                problems.add(join(path, key), "is about 4 bits; say bits: 4, or remove the key")
    calibration = step.calibration
    if calibration is not None and step.embedding_bits is not None:
        problems.add(
            join(path, "embedding_bits"), "static 8 bits have tables in 8 bits; remove this key or calibration"
        )
    if calibration is not None and step.recover is not None:
        problems.add(join(path, "calibration"), "training rounds as dynamic 8 bits do; remove this key, or 'recover'")
    if calibration is None:
        pass
    elif step.backend == "openvino":
        if calibration != CalibrationConfig(rows=calibration.rows):
            problems.add(
                join(path, "calibration"), "expected 'rows' alone with backend openvino; remove the other keys"
            )
    elif calibration.method != "percentile" and calibration.percentile != 99.99:
        problems.add(join(path, "calibration.percentile"), "belongs to method: percentile; remove the key")
    if step.keep and step.retention is None and step.worst_task_retention is None:
        problems.add(join(path, "keep"), "expected 'retention' or 'worst_task_retention' beside it; remove the key")


def _check_mixed(step: QuantizeStep, path: str, problems: Problems) -> None:
    mixed = step.mixed or MixedConfig()
    if not mixed.choices or len(set(mixed.choices)) < len(mixed.choices):
        problems.add(
            join(path, "mixed.choices"),
            f"expected at least one number of bits, each once, found {list(mixed.choices)}; choose among 4, 8, 16, 32",
        )
    limits = (mixed.size_mb, step.retention, step.worst_task_retention)
    if step.bits == "mixed" and step.backend == "onnxruntime" and limits == (None, None, None):
        problems.add(
            path,
            "expected something to choose the bits by: 'mixed: {size_mb: ...}', 'retention' or 'worst_task_retention'",
        )


def _check_earlier(name: str, path: str, earlier: Mapping[str, Any], names: Sequence[str], problems: Problems) -> None:
    usable = [step for step, kind in earlier.items() if kind in FLOAT_STEPS]
    if name in usable:
        return
    if name in earlier:
        problems.add(
            path,
            f"a {earlier[name]} step is a leaf, nothing can start from '{name}'; "
            f"expected a finetune, distill or prune step: {', '.join(usable) or 'none comes before'}",
        )
    elif name in names:
        problems.add(path, f"'{name}' comes later; expected one of the steps before: {', '.join(usable) or 'none'}")
    else:
        hint = near(name, usable) if usable else "no step comes before"
        problems.add(path, f"no step makes '{name}', {hint}")


def _check_distill(
    step: DistillStep | PretrainStep, path: str, earlier: Mapping[str, Any], names: Sequence[str], problems: Problems
) -> None:
    several = isinstance(step, DistillStep) and step.teachers is not None
    if several == (step.teacher is not None):
        found = "both" if several else "neither"
        problems.add(join(path, "teacher"), f"expected 'teacher' or 'teachers', found {found}; keep one")
    for teacher in teachers_of(step):
        key = join(path, "teachers" if several else "teacher")
        if teacher in names:
            _check_earlier(teacher, key, earlier, names, problems)
        elif not os.path.isabs(teacher) and "/" not in teacher:
            usable = [name for name, kind in earlier.items() if kind in FLOAT_STEPS]
            hint = f", {near(teacher, usable)}" if usable else ""
            problems.add(
                key, f"no step makes '{teacher}'{hint} (a saved model is named by its folder or its Hub id, org/name)"
            )
    if isinstance(step, DistillStep) and isinstance(step.teachers, tuple):
        for number, item in enumerate(step.teachers):
            if item.weight <= 0:
                problems.add(f"{join(path, 'teachers')}[{number}].weight", f"expected more than 0, found {item.weight}")
    if step.student is not None:
        if step.source is not None:
            problems.add(path, "expected 'from' or 'student', found both: 'from' is trained on, 'student' is made anew")
        _check_student(step.student, join(path, "student"), problems)
    _check_words([item.kind for item in step.criteria], join(path, "criteria"), problems)
    if isinstance(step, DistillStep) and isinstance(step.label_weight, WeightSchedule):
        for key, share in (("from", step.label_weight.source), ("to", step.label_weight.to)):
            if not 0 <= share <= 1:
                problems.add(join(join(path, "label_weight"), key), f"expected a share between 0 and 1, found {share}")


def _check_student(student: StudentConfig, path: str, problems: Problems) -> None:
    ways = {"layers": student.layers, "path": student.path, "config": student.config}
    given = [key for key, value in ways.items() if value is not None]
    if len(given) != 1:
        problems.add(
            path,
            "expected layers (of the teacher), path (of another checkpoint) or config (of fresh weights), found "
            f"{' and '.join(given) or 'none of them'}",
        )
    if "layers" not in given and (student.heads or student.feed_forward or student.choose != "spaced"):
        problems.add(path, "expected choose, heads and feed_forward with layers: they say what of the teacher is taken")
    match student.layers:
        case None:
            pass
        case tuple() if student.choose != "spaced":
            problems.add(join(path, "choose"), "expected a number of layers to choose, found which ones; keep one")
        case int() if student.layers < 1:
            problems.add(join(path, "layers"), f"expected at least 1 layer, found {student.layers}")
        case tuple() if not student.layers or len(set(student.layers)) < len(student.layers):
            problems.add(join(path, "layers"), f"expected different layers, at least 1, found {list(student.layers)}")
        case _:
            pass


def _check_prune(
    step: PruneStep, path: str, earlier: Mapping[str, Any], names: Sequence[str], problems: Problems
) -> None:
    if not (step.heads or step.feed_forward or step.layers or step.width or step.compute or step.latency):
        problems.add(path, "removes nothing; expected heads, feed_forward, layers, width, compute or latency above 0")
    _check_width(step, path, problems)
    for key in ("compute", "latency"):
        if getattr(step, key) and (step.heads or step.feed_forward):
            problems.add(join(path, key), "chooses heads and neurons; expected no heads and feed_forward beside it")
    if step.compute and step.latency:
        problems.add(join(path, "latency"), "chooses by the clock what compute chooses by counting; keep one of both")
    if step.timing != TimingConfig() and not step.latency:
        problems.add(join(path, "timing"), "is what latency is measured on; expected latency above 0 beside it")
    if not step.timing.batch_sizes:
        problems.add(join(path, "timing.batch_sizes"), "expected at least one number of rows, found none")
    if step.length is not None and not step.compute:
        problems.add(join(path, "length"), "is what compute is counted at; expected compute above 0 beside it")
    if step.rearrange and step.importance != "fisher":
        problems.add(
            join(path, "rearrange"), f"needs the derivatives of importance: fisher, found importance: {step.importance}"
        )
    if step.combine != "mean" and step.importance in ("magnitude", "random"):
        problems.add(
            join(path, "combine"),
            f"is about importance that is measured for each task, found importance: {step.importance}; remove the key",
        )
    if step.candidates > 1 and step.importance != "random":
        problems.add(
            join(path, "candidates"),
            f"tries random cuts; expected importance: random beside it, found importance: {step.importance}",
        )
    if step.shape == "vanilla" and step.heads:
        problems.add(join(path, "heads"), "plain transformers knows no width of heads; remove the key, or shape")
    if step.shape == "vanilla" and isinstance(step.schedule, GradualSchedule):
        problems.add(join(path, "shape"), "gradual cuts layers unevenly; expected shape: free, or another schedule")
    if step.latency and not isinstance(step.schedule, OneShotSchedule):
        problems.add(
            join(path, "schedule"),
            f"latency chooses all at once; expected schedule: {{kind: one_shot}} with it, found {step.schedule.kind}; "
            "write several prune steps one after the other instead",
        )
    elif isinstance(step.schedule, GradualSchedule):
        _check_gradual(step, step.schedule, path, problems)
    _check_recover(step.recover, path, earlier, names, problems)


def _check_width(step: PruneStep, path: str, problems: Problems) -> None:
    if not step.width:
        return
    used = ("kind", "name", "source", "width", "rows", "shape", "recover")
    others = [
        key.name
        for key in dataclasses.fields(step)
        if key.name not in used and getattr(step, key.name) != getattr(PruneStep(), key.name)
    ]
    if others:
        problems.add(
            join(path, "width"), f"stands alone in its step, found {', '.join(others)} too; write two prune steps"
        )


def _check_trimming(step: TrimWeightsStep, path: str, problems: Problems) -> None:
    ways = {"sparsity": step.sparsity, "threshold": step.threshold, "pattern": step.pattern}
    given = [key for key, value in ways.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        problems.add(path, f"expected one of sparsity, threshold and pattern, found {found}; keep one")
    if step.sparsity == 0:
        problems.add(join(path, "sparsity"), "trims nothing; expected a fraction above 0 and below 1")
    if step.pattern is not None:
        found = PATTERN.fullmatch(step.pattern)
        if found is None or not 1 <= int(found[1]) < int(found[2]):
            problems.add(
                join(path, "pattern"),
                "expected N:M in quotes, of every M weights N stay and N is from 1 to M - 1, such as '2:4', "
                f"found '{step.pattern}'",
            )
        if step.scope != "global":
            problems.add(join(path, "scope"), "a pattern holds in every group of every row; remove the key")


def _check_recover(
    section: FinetuneStep | DistillStep | None,
    path: str,
    earlier: Mapping[str, Any],
    names: Sequence[str],
    problems: Problems,
) -> None:
    """The training after a cut belongs to the step that cuts."""
    if section is None:
        return
    recover = join(path, "recover")
    for key, value in (("name", section.name), ("from", section.source)):
        if value is not None:
            problems.add(join(recover, key), "recovery belongs to its step; remove the key")
    if section.drop_auxiliary:
        problems.add(join(recover, "drop_auxiliary"), "recovery trains the cut model itself; remove the key")
    if isinstance(section, DistillStep):
        if section.student is not None:
            problems.add(join(recover, "student"), "recovery trains the cut model itself; remove the key")
        else:
            _check_distill(section, recover, earlier, names, problems)


def _check_gradual(step: PruneStep, schedule: GradualSchedule, path: str, problems: Problems) -> None:
    """What a training that prunes on its way cannot do is said before it."""
    place = join(path, "schedule")
    if schedule.begin >= schedule.end:
        problems.add(
            join(place, "end"), f"expected a fraction above begin, found {schedule.end} with begin {schedule.begin}"
        )
    if step.recover is None:
        problems.add(place, "gradual prunes during the recovery; expected recover beside it, or kind: one_shot")
    if not (step.heads or step.feed_forward or step.compute):
        problems.add(place, "gradual removes heads and neurons; expected heads, feed_forward or compute above 0")
    if step.layers and step.compute:
        problems.add(
            join(path, "layers"),
            "whole layers go before the recovery and do not count towards compute with schedule: gradual; remove "
            "them in a prune step before this one",
        )
    if step.importance not in ("first_order", "magnitude"):
        problems.add(
            join(path, "importance"),
            f"expected first_order or magnitude with schedule: gradual, which training knows at every step, found "
            f"{step.importance}",
        )
    if step.combine != "mean":
        problems.add(
            join(path, "combine"), "with schedule: gradual the loss that is trained on decides; remove the key"
        )
    if step.repair:
        problems.add(join(path, "repair"), "with schedule: gradual the training repairs; remove the key")


def _check_words(words: Sequence[str], path: str, problems: Problems) -> None:
    if not words or len(set(words)) < len(words):
        problems.add(path, f"expected at least one word and none twice, found {list(words)}")


def check_reference(reference: str | None, names: Sequence[str], kinds: Sequence[Any], problems: Problems) -> None:
    """The reference is what everything is compared with, so it must be a float model of this run."""
    if reference is not None:
        _check_earlier(reference, "reference", dict(zip(names, kinds, strict=True)), names, problems)


FUSION_OPTIONS = {"uncertainty": ("rate",), "famo": ("rate",), "dwa": ("temperature",), "gradient_norm": ("share",)}


def check_mixing(mixing: MixingConfig, fusion: FusionConfig, tasks: Sequence[str], problems: Problems) -> None:
    """Weights and targets name tasks; options belong to the chosen strategy and fusion."""
    for key, owner in (("weights", "weights"), ("targets", "score_gap")):
        named = getattr(mixing, key)
        for name in named or ():
            if name not in tasks:
                problems.add(f"mixing.{key}.{name}", f"there is no such task, {near(name, list(tasks))}")
        if named is not None and mixing.strategy != owner:
            problems.add(f"mixing.{key}", f"used by strategy: {owner} only, found strategy: {mixing.strategy}")
    if mixing.strategy == "weights" and not any((mixing.weights or {}).values()):
        problems.add("mixing.weights", "strategy: weights needs a weight above 0 for at least one task")
    elif mixing.strategy == "weights" and (left := [name for name in tasks if name not in (mixing.weights or {})]):
        problems.add("mixing.weights", f"expected one for each task, found none for {', '.join(left)}; 0 leaves it out")
    if mixing.batches == "mixed" and mixing.strategy == "round_robin":
        problems.add("mixing.batches", "round_robin takes turns batch by batch; say batches: one_source with it")
    for key in ("rate", "temperature", "share"):
        if getattr(fusion, key) is not None and key not in FUSION_OPTIONS.get(fusion.kind, ()):
            owners = " and ".join(kind for kind, options in FUSION_OPTIONS.items() if key in options)
            problems.add(f"fusion.{key}", f"used by {owners} only, found kind: {fusion.kind}")
    if fusion.measure_on == "validation" and fusion.measure_every is None:
        problems.add(
            "fusion.measure_on", "says where to look, found no measure_every; say after how many steps, as in 25"
        )


def check_search(
    search: SearchConfig,
    budget: BudgetConfig | None,
    names: Sequence[str],
    kinds: Sequence[Any],
    reference: str,
    problems: Problems,
) -> None:
    """A search starts from a float step, has a budget, and decides itself how much goes."""
    if budget is None or not any(value is not None for value in dataclasses.asdict(budget).values()):
        problems.add("budget", "expected at least one limit for the search to stay within, such as size_mb, found none")
    named = {} if search.source is None else {"search.from": search.source}
    named |= {f"search.members.{index}": member for index, member in enumerate(search.members)}
    for place, name in named.items():
        _check_earlier(name, place, dict(zip(names, kinds, strict=True)), names, problems)
        if name in names and reference in names and names.index(name) < names.index(reference):
            problems.add(place, f"expected the reference '{reference}' or a step after it")
    for index, member in enumerate(search.members):
        if member == (search.source or reference) or member in search.members[:index]:
            problems.add(f"search.members.{index}", f"'{member}' is in the family already; remove it")
    stored = {f"{name}-{form}" for name in (search.source or reference, *search.members) for form in SEARCH_FORMS}
    for index, name in enumerate(names):
        if name == "vocabulary" or name.startswith(("vocabulary-", "cut-")) or name in stored:
            problems.add(f"steps.{index}.name", f"'{name}' is a name that the search gives; choose another")
    if search.shares is not None and (
        not search.shares or list(search.shares) != sorted(set(search.shares), reverse=True)
    ):
        problems.add("search.shares", f"expected at least one share and each below the last, found {search.shares}")
    if not search.timing.batch_sizes:
        problems.add("search.timing.batch_sizes", "expected at least one number of rows, found none")
    for section, default, keys in (
        (
            search.prune,
            PruneStep(),
            ("name", "source", "heads", "feed_forward", "width", "compute", "latency", "timing"),
        ),
        (search.vocabulary, TrimVocabularyStep(), ("name", "source")),
    ):
        if section is None:
            continue
        part = "prune" if isinstance(section, PruneStep) else "vocabulary"
        for key in keys:
            if getattr(section, key) != getattr(default, key):
                written = WRITTEN_AS.get(key, key)
                problems.add(f"search.{part}.{written}", "is chosen by the search itself; remove the key")
    if search.prune is not None:
        whole = dataclasses.replace(search.prune, name=None, source=None, latency=0.5, timing=search.timing)
        earlier = dict(zip(names, kinds, strict=True))
        _check_prune(
            dataclasses.replace(whole, heads=0.0, feed_forward=0.0, compute=0.0),
            "search.prune",
            earlier,
            names,
            problems,
        )


def check_branches(recipe: Recipe, problems: Problems) -> None:
    """Branches have names and different tasks, whose gradients are not compared."""
    taken: dict[str, str] = {}
    for name, tasks in recipe.branches.items():
        path = f"branches.{name}"
        if not TASK_NAME.fullmatch(name) or name == "main":
            problems.add(
                path, "expected lower-case letters, digits and underscores other than 'main'; rename the branch"
            )
        if not tasks:
            problems.add(path, "expected at least one task, found none")
        for task in tasks:
            if task not in recipe.tasks:
                problems.add(path, f"there is no task '{task}', {near(task, list(recipe.tasks))}")
            elif task in taken:
                problems.add(path, f"expected every task in one branch, found '{task}' in '{taken[task]}' too")
            elif recipe.tasks[task].layer is not None:
                problems.add(path, f"task '{task}' has a layer; a branch is read at its end, remove one of both")
            taken.setdefault(task, name)
    deep = [name for name, task in recipe.tasks.items() if task.layer is not None]
    if not recipe.branches and not deep:
        return
    found = f"branches {', '.join(recipe.branches)}" if recipe.branches else f"tasks with a layer: {', '.join(deep)}"
    for key in gradient_settings(recipe):
        problems.add(
            f"fusion.{key.partition(':')[0]}",
            f"compares the tasks' gradients where all of them read the encoder, found {found}; compare them in a "
            "recipe without these",
        )


def check_kinds_and_roles(recipe: Recipe, problems: Problems) -> None:
    """Something is learned for its own sake, and one tokenizer or image processor reads the rows of all tasks."""
    tasks = recipe.tasks
    if tasks and all(task.role == "auxiliary" for task in tasks.values()):
        problems.add("tasks", "expected a task of role main, found auxiliary ones only; their scores do not count")
    ends = [
        (weight.source, weight.to) if isinstance(weight, WeightSchedule) else (weight,)
        for weight in (task.weight for task in tasks.values())
    ]
    if tasks and not any(map(any, ends)):
        problems.add("tasks", "expected a weight above 0, found 0 for all tasks; nothing would be trained")
    readers: dict[str, list[str]] = {}
    for name, task in tasks.items():
        readers.setdefault(" and ".join(f"{kind}s" for kind in task.reads), []).append(name)
    if len(readers) > 1:
        found = " and ".join(f"{kind} in {', '.join(readers[kind])}" for kind in sorted(readers))
        problems.add(
            "tasks",
            f"expected tasks that all read images or all read texts, found {found}; one tokenizer or image processor "
            "reads the rows of all tasks: make two recipes",
        )


def gradient_settings(recipe: Recipe) -> list[str]:
    """What a recipe sets that compares the tasks' gradients."""
    fusion = recipe.fusion
    settings = {
        "combination": fusion.combination is not None,
        "measure_every": fusion.measure_every is not None,
        "kind: gradient_norm": fusion.kind == "gradient_norm",
    }
    return [key for key, used in settings.items() if used]


def check_vocabulary(recipe: Recipe, problems: Problems) -> None:
    """A vocabulary is cut where there is one."""
    if not any("text" in task.reads for task in recipe.tasks.values()):
        for step in recipe.steps:
            if isinstance(step, TrimVocabularyStep):
                problems.add(
                    f"steps.{step.name}",
                    "expected a task with texts, whose tokens are kept, found images only; remove it",
                )


def check_benchmark(benchmark: BenchmarkConfig, problems: Problems) -> None:
    """At least one batch size, none twice."""
    sizes = benchmark.batch_sizes
    if not sizes or len(set(sizes)) < len(sizes):
        problems.add("benchmark.batch_sizes", f"expected at least one size and none twice, found {list(sizes)}")


def check_publish(publish: PublishConfig, problems: Problems) -> None:
    """A repository of the Hub is `owner/name`."""
    if not REPO_ID.fullmatch(publish.repo_id):
        problems.add("publish.repo_id", f"expected owner/name, found '{publish.repo_id}'")
