"""Write the tables of docs/recipe.md from the config classes: key, what it may be, default, meaning.

Command: python docs/make_reference.py [--check]
With --check nothing is written; the exit code is 1 when the page is not in step with the classes.
"""

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hf_mtcompress import recipe
from hf_mtcompress.recipe.sections import LIMITS, WRITTEN_AS, expected
from hf_mtcompress.recipe.tasks import TaskSettings

PAGE = Path(__file__).parent / "recipe.md"
TABLES: dict[str, tuple[type, type | None]] = {
    # name of the table: its class, and a base whose keys have a table of their own
    "recipe": (recipe.Recipe, None),
    "encoder": (recipe.EncoderConfig, None),
    "data": (recipe.DataConfig, None),
    "task": (TaskSettings, None),
    "sequence-classification": (recipe.SequenceClassificationConfig, TaskSettings),
    "token-classification": (recipe.TokenClassificationConfig, TaskSettings),
    "image-classification": (recipe.ImageClassificationConfig, TaskSettings),
    "weight": (recipe.WeightSchedule, None),
    "mixing": (recipe.MixingConfig, None),
    "fusion": (recipe.FusionConfig, None),
    "training": (recipe.TrainingConfig, None),
    "finetune": (recipe.FinetuneStep, recipe.TrainingConfig),
    "pretrain": (recipe.PretrainStep, recipe.TrainingConfig),
    "adapters": (recipe.AdapterConfig, None),
    "distill": (recipe.DistillStep, recipe.TrainingConfig),
    "student": (recipe.StudentConfig, None),
    "teachers": (recipe.TeacherConfig, None),
    "logits": (recipe.LogitsCriterionConfig, None),
    "hidden": (recipe.HiddenCriterionConfig, None),
    "relations": (recipe.RelationsCriterionConfig, None),
    "embedding": (recipe.EmbeddingCriterionConfig, None),
    "feature_map": (recipe.FeatureMapCriterionConfig, None),
    "prune": (recipe.PruneStep, None),
    "timing": (recipe.TimingConfig, None),
    "one_shot": (recipe.OneShotSchedule, None),
    "iterative": (recipe.IterativeSchedule, None),
    "gradual": (recipe.GradualSchedule, None),
    "trim_vocabulary": (recipe.TrimVocabularyStep, None),
    "trim_weights": (recipe.TrimWeightsStep, None),
    "quantize": (recipe.QuantizeStep, None),
    "calibration": (recipe.CalibrationConfig, None),
    "mixed": (recipe.MixedConfig, None),
    "export": (recipe.ExportStep, None),
    "budget": (recipe.BudgetConfig, None),
    "search": (recipe.SearchConfig, None),
    "benchmark": (recipe.BenchmarkConfig, None),
    "publish": (recipe.PublishConfig, None),
}


def meanings(cls: type) -> dict[str, str]:
    """The text below each field of a config class, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def table(cls: type, apart_from: type | None = None) -> str:
    """A Markdown table of the keys of a section, without those of the class `apart_from`."""
    known = {field.name for field in dataclasses.fields(apart_from)} if apart_from else set()  # pyright: ignore[reportArgumentType] -- a dataclass
    hints, texts = get_type_hints(cls), meanings(cls)
    fields: list[dataclasses.Field[Any]] = [field for field in dataclasses.fields(cls) if field.name not in known]
    fields.sort(key=lambda field: field.name != "kind")
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields:
        key = WRITTEN_AS.get(field.name, field.name)
        rows.append(f"| `{key}` | {_value(field, hints)} | {_default(field, hints)} | {texts[field.name]} |")
    return "\n".join(rows)


def _value(field: dataclasses.Field[Any], hints: dict[str, Any]) -> str:
    """What the key may be; a lone number with its limits."""
    words = expected(hints[field.name])
    return LIMITS[field.name][0] if words in ("a number", "a whole number") else words


def _default(field: dataclasses.Field[Any], hints: dict[str, Any]) -> str:
    if field.name == "kind" and len(get_args(hints["kind"])) == 1:
        return "required"  # it tells sections apart
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    match value:
        case None | () | {}:
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case tuple():
            return f"`[{', '.join(getattr(item, 'kind', str(item)) for item in value)}]`"
        case int() | float() | str():
            return f"`{value}`"
        case _:
            return ""


def render(page: str) -> str:
    """The page with every table between its marks `<!-- table: NAME -->` and `<!-- end -->` written anew."""
    for name, (cls, apart_from) in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        head, mark, rest = page.partition(start)
        if not mark:
            raise ValueError(f"expected the mark '{start.strip()}' in {PAGE.name}; put it where the table belongs")
        page = head + start + table(cls, apart_from) + end + rest.partition(end)[2]
    return page


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    fresh = render(page)
    if options.check:
        if fresh != page:
            print(f"{PAGE.name} is not in step with the config classes; run: python docs/make_reference.py")
        return int(fresh != page)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
