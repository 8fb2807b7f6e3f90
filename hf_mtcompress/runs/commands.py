"""What the command line does beside running: validate, plan, evaluate, time, render, push, show."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_mtcompress import records
from hf_mtcompress.artifacts import (
    CARD,
    RECIPE,
    RECORD,
    STEP_RECORD,
    WEBPAGE,
    WORK,
    write_text,
)
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.errors import PublishingError, RecipeError
from hf_mtcompress.evaluation.benchmark import benchmark
from hf_mtcompress.evaluation.evaluate import evaluate_folder
from hf_mtcompress.formats.folders import open_reader
from hf_mtcompress.formats.web.page import write_webpage
from hf_mtcompress.publishing.facts import headline_figures, onnx_artefact
from hf_mtcompress.publishing.hub import push_folder
from hf_mtcompress.publishing.portable import portable_recipe
from hf_mtcompress.recipe import (
    BenchmarkConfig,
    DistillStep,
    PretrainStep,
    Recipe,
    Role,
)
from hf_mtcompress.recipe.sections import near
from hf_mtcompress.records import RunRecord
from hf_mtcompress.runs.fingerprint import changes_of
from hf_mtcompress.runs.measure import check_reloads
from hf_mtcompress.runs.plan import describe_plan
from hf_mtcompress.runs.rehearsal import check_run
from hf_mtcompress.runs.results import load_record, told_from, write_card
from hf_mtcompress.runs.run import prepare_output
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from hf_mtcompress.steps.scoring import read_step
from hf_mtcompress.steps.teaching import ask_teacher as steps_ask_teacher

logger = logging.getLogger(__name__)


def validate(recipe: Recipe) -> None:
    """Check a recipe against its data and its encoder, without training; see `check_run`.

    Raises:
        RecipeError: it cannot be run.
    """
    check_run(recipe, load_sources(recipe.tasks, recipe.seed))


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `run` would do, without doing it; see `describe_plan`.

    Raises:
        RecipeError: it cannot be run.
    """
    sources = load_sources(recipe.tasks, recipe.seed)
    check_run(recipe, sources)
    return describe_plan(recipe, sources)


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
    context = RunContext(recipe, output, load_sources(recipe.tasks, recipe.seed), recipe_reader(recipe))
    prepare_output(output)
    return steps_ask_teacher(step, context.lineage[name].parent, context.for_step(step), part)


def evaluate(folder: Path, recipe: Recipe, role: Role) -> records.SplitScores:
    """Scores of a saved folder of any form on one split of a recipe's data."""
    sources = load_sources(recipe.tasks, recipe.seed)
    for place in (folder, folder.parent):
        if (step := read_step(place / STEP_RECORD)) is not None and (changed := changes_of(place, step)):
            logger.warning("%s: %s; the scores are of what lies there now", place, ", ".join(changed))
    batch_size = recipe.training.eval_batch_size or 64
    return evaluate_folder(folder, sources.tasks, sources.role(role), split=role, batch_size=batch_size)


def bench(folders: Sequence[Path], config: BenchmarkConfig) -> dict[str, Any]:
    """Times of saved folders of any form, side by side; the first is the reference."""
    labels = {str(folder): folder.absolute() for folder in folders}
    samples = open_reader(folders[0]).samples()
    result = benchmark(labels, reference=str(folders[0]), config=config, samples=samples)
    return dataclasses.asdict(result)


def card(folder: Path) -> Path:
    """Write the model card of a run again from its record; see `write_card`."""
    recipe, record = folder / RECIPE, load_record(folder)
    with told_from(folder):
        text = portable_recipe(recipe.read_text(encoding="utf-8")) if recipe.exists() else None
        return write_card(folder, record, text)


def push(folder: Path, repo_id: str | None, *, public: bool = False, dry_run: bool = False) -> list[str]:
    """Upload a run after it proved that it reloads; what was uploaded, one line a file, and what else became of it.

    A dry run puts what readers would see otherwise than it lies in the folder (card, recipe, record) into `.work/push`.

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
    lines.append(f"{result.total_bytes:>12,}  bytes in {len(result.files)} files")
    for label, paths in (
        ("removed, of an earlier push", result.removed),
        ("stays, from somebody else", result.kept),
        ("replaced, somebody else's is in the history", result.replaced),
    ):
        lines += [f"{label}: {path}" for path in paths]
    if result.other_card is not None:
        lines.append(
            f"not pushed: {folder / result.other_card}, a newer card beside the one that was changed by hand; move it "
            f"over {CARD} or delete it"
        )
    if not dry_run:
        return [*lines, f"pushed: {result.commit_url}"]
    return [
        *lines,
        *_show(folder, result.made),
        "files of earlier pushes that are not listed here would be removed, those of others stay",
        f"dry run: nothing was sent to {wanted}",
    ]


def _show(folder: Path, made: Mapping[str, bytes]) -> list[str]:
    """Write what a push would make for readers, to be looked at; where it lies, a line each."""
    place = folder / WORK / "push"
    if place.is_dir():
        shutil.rmtree(place)
    lines = [] if CARD in made else [f"the card, as it is: {folder / CARD}"]
    for name, content in made.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(place / name, content.decode())
        lines.append(f"{'the card' if name == CARD else name}, as readers would see it: {place / name}")
    return lines


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
        if changed := [f"{step.name}/{line}" for step in chosen for line in changes_of(folder / step.name, step)]:
            return [f"{line}; run the recipe again" for line in changed]
        check_reloads(folder, chosen)
        return [
            f"{artefact.folder}: {'; '.join(artefact.reload['problems'])}"
            for step in chosen
            for artefact in step.artefacts
            if artefact.reload is not None and not artefact.reload["passed"]
        ]

    return check
