"""What the saved models are that a recipe names: its encoder, students of another checkpoint, teachers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from hf_mtcompress.errors import ArtifactError, RecipeError, first_line
from hf_mtcompress.formats.folders import stores_few_bits
from hf_mtcompress.formats.graph_settings import read_graph_settings
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.marking import read_mark
from hf_mtcompress.recipe import DistillStep, EncoderConfig, PretrainStep, Recipe, teachers_of
from hf_mtcompress.recipe.lineage import Lineage, Traits, lineage_of, student_in
from hf_mtcompress.recipe.lineage_checks import check_lineage
from hf_mtcompress.recipe.sections import Problems
from hf_mtcompress.records import FORMS, FormName
from hf_mtcompress.steps.run_context import loading_options
from hf_mtcompress.tasks import build_tasks


def lineage_with_saved_models(recipe: Recipe) -> dict[str, Lineage]:
    """The lineage of a recipe with what the saved models are that it names; nothing but their configs is read.

    Raises:
        RecipeError: one line for each that is not there, and for each step that cannot do with one what it says.
    """
    lineage, problems = lineage_of(recipe, _saved_models(recipe)), Problems()
    check_lineage(recipe, lineage, problems)
    if problems.lines:
        raise RecipeError(problems.lines)
    return lineage


def traits_of(place: str, where: str, section: EncoderConfig | DistillStep | PretrainStep) -> Traits:
    """What a saved model is, from its config.

    Args:
        place: folder or Hub id.
        where: the key of the recipe that names it, for messages.
        section: what it is to be: an encoder, or a teacher of this section.

    Raises:
        RecipeError: there is none, or it is of another kind.
    """
    match section:
        case EncoderConfig():
            config = encoder_config(section, where)
        case DistillStep() | PretrainStep():
            form = graph_form(place)
            if form is not None:
                return Traits(layout="graph", tasks=tuple(read_graph_settings(Path(place), form).build_tasks()))
            config = teacher_config(place, where, answers=isinstance(section, DistillStep))
    few_bits = stores_few_bits(config.to_dict()) is not None
    if not isinstance(config, MultiTaskConfig):
        mark = read_mark(config)
        cut = mark is not None and mark.structure is not None
        return Traits(layout="stock", uneven=place if cut else None, few_bits=few_bits)
    tasks = build_tasks(config.tasks or [])
    owned = {name: place["layers"] for name, place in (config.branches or {}).items()}
    return Traits(
        tasks=tuple(tasks),
        uneven=place if config.structure else None,
        adapted=bool(config.adapters),
        branches={**owned, **{name: "all" for name in config.encoders or {} if name != "main"}},
        deep=tuple(name for name, task in tasks.items() if task.layer is not None),
        few_bits=few_bits,
    )


def graph_form(place: str) -> FormName | None:
    """The form of a graph that a folder holds, if it holds one."""
    graphs = [form for form in FORMS.values() if form.layout == "graph"]
    return next((form.name for form in graphs if (Path(place) / form.settings).is_file()), None)


def teacher_config(place: str, where: str, *, answers: bool) -> PreTrainedConfig:
    """The config of a saved teacher in torch.

    Args:
        place: folder or Hub id.
        where: the key of the recipe that names it, for messages.
        answers: whether it is asked for answers, which takes a head.

    Raises:
        RecipeError: there is none, or it has no head.
    """
    config = _config_of(place, where)
    kind = (config.architectures or [""])[0]
    if answers and config.model_type != MultiTaskConfig.model_type and "For" not in kind:
        raise RecipeError(
            f"{where}: expected a model with a head, found a {kind or config.model_type} in '{place}', which answers "
            "nothing; fine-tune it first, or imitate its states in a pretrain step"
        )
    return config


def encoder_config(encoder: EncoderConfig, where: str, changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The config of a pretrained encoder; `where` is the key that names it, `changes` are fields to replace.

    Raises:
        RecipeError: there is none, or it is that of a multi-task model.
    """
    expected = f"{where}: expected a local folder or a Hub id of a pretrained encoder, found '{encoder.path}'"
    try:
        config = AutoConfig.from_pretrained(encoder.path, **loading_options(encoder), **(changes or {}))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{expected} ({first_line(error)}); check the spelling, or download it first where there is no network"
        ) from error
    if isinstance(config, MultiTaskConfig):
        raise RecipeError(
            f"{expected}, a multi-task model with the tasks {', '.join(build_tasks(config.tasks or []))}; export it "
            "({kind: export, formats: [vanilla]}) and name the folder of a task, or name it as a teacher"
        )
    return config


def _saved_models(recipe: Recipe) -> dict[str, Traits]:
    """By place as the recipe writes it."""
    found: dict[str, Traits] = {}
    problems: list[str] = []
    for place, where, section in _named(recipe):
        try:
            found[place] = traits_of(place, where, section)
        except RecipeError as error:
            problems += error.problems
        except ArtifactError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return found


def _named(recipe: Recipe) -> list[tuple[str, str, EncoderConfig | DistillStep | PretrainStep]]:
    """The saved models that a recipe names: place, key, and as what."""
    steps = [step.name for step in recipe.steps]
    found: list[tuple[str, str, EncoderConfig | DistillStep | PretrainStep]] = [
        (recipe.encoder.path, "encoder.path", recipe.encoder)
    ]
    for step in recipe.steps:
        student = student_in(step)
        if student is not None and student.path is not None:
            found.append((student.path, f"steps.{step.name}.student.path", EncoderConfig(path=student.path)))
        recover = getattr(step, "recover", None)
        for section, path in ((step, f"steps.{step.name}"), (recover, f"steps.{step.name}.recover")):
            if isinstance(section, DistillStep | PretrainStep):
                key = "teacher" if section.teacher is not None else "teachers"
                found += [(place, f"{path}.{key}", section) for place in teachers_of(section) if place not in steps]
    return found


def _config_of(place: str, where: str) -> PreTrainedConfig:
    """The config of a saved model.

    Raises:
        RecipeError: there is none.
    """
    folder = Path(place)
    expected = f"{where}: expected a step of this recipe, or the folder or Hub id of a saved model"
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"take one of those in it: {', '.join(inside)}" if inside else "check the path"
        raise RecipeError(f"{expected}, found the folder {place} without a {CONFIG_NAME}; {hint}")
    if not folder.is_dir() and (folder.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1):
        raise RecipeError(f"{expected}, found '{place}', which is no folder; check the path")
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{expected}, found '{place}' ({first_line(error)})") from error
