"""A recipe: encoder, tasks and the ordered steps, as one frozen object."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from hf_mtcompress.recipe.search import SearchConfig
from hf_mtcompress.recipe.steps import StepConfig
from hf_mtcompress.recipe.tasks import TaskConfig
from hf_mtcompress.recipe.training import EncoderConfig, FusionConfig, MixingConfig, TrainingConfig

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """What the device allows; checked against the last artefact, and reported."""

    latency_b1_ratio: float | None = None
    """Batch-1 latency as a fraction of the reference in torch float32."""
    latency_b32_ratio: float | None = None
    """The same for batches of 32."""
    size_mb: float | None = None
    """10**6 bytes of weights and graph, tokenizer apart."""
    retention: float | None = None
    """Lowest allowed mean over tasks of score / reference score."""
    worst_task_retention: float | None = None
    """Lowest allowed score / reference score of any main task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """How latency is measured at the end of a run."""

    tokens: int = 64
    """Real tokens in every row."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Rows in a call."""
    repetitions: int = 20
    """Turns of each artefact at each batch size: a timed call, or five where none takes 50 ms."""
    warmup: int = 3
    """Calls before the timed ones."""
    threads: int | None = None
    """Threads of each runtime; default: all cores this process may use, less those that other processes keep busy."""
    wait: float = 30.0
    """Seconds to wait for a moment in which no other process needs the cores. What cannot be measured then is said to
    be not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishConfig:
    """Where and how the result is pushed by `hf-mtcompress push`."""

    repo_id: str
    """Repository of the Hub, `owner/name`."""
    private: bool = True
    """Whether only its owner sees it."""
    license: str | None = None
    """Licence of the model, as the Hub names it, such as `apache-2.0`."""
    language: tuple[str, ...] = ()
    """Languages of the texts, as codes such as `en`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that is wanted. Made by `hf_mtcompress.recipe.load.load_recipe`."""

    format_version: int = FORMAT_VERSION
    """Format of the recipe; a newer one is refused with the version that it needs."""
    name: str
    """Name of the run and, where `--output` is not given, of its folder below `runs/`."""
    seed: int = 42
    """Everything random is drawn from it."""
    encoder: EncoderConfig
    """The pretrained encoder that all tasks share; `encoders: {main: ...}` is read too."""
    tasks: dict[str, TaskConfig]
    """Tasks by name: lower-case letters, digits and underscores. The name joins data, head, metrics and logs."""
    branches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Tasks that read a branch of their own, by name of the branch; the others read the encoder itself."""
    branch_layers: int | Literal["all"] = 2
    """Top layers that each branch has for itself, while the lower ones are shared and run once; `all`: an encoder."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    """How often each source of rows is drawn."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How the losses of the tasks become one."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Settings of every step that trains; a step's own go first."""
    steps: tuple[StepConfig, ...]
    """What is done, in order."""
    reference: str | None = None
    """The step that everything is compared with; default: the first one."""
    budget: BudgetConfig | None = None
    """What the device allows; the last artefact is checked against it."""
    search: SearchConfig | None = None
    """What `hf-mtcompress search` tries to stay within the budget; no other command looks at it."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    """How latency is measured at the end."""
    publish: PublishConfig | None = None
    """Where the result is pushed, on request."""


def restricted(recipe: Recipe, names: Collection[str]) -> Recipe:
    """A recipe whose branches, mixing and fusion say nothing of other tasks than these; its tasks are as they were."""
    branches = {branch: tuple(task for task in tasks if task in names) for branch, tasks in recipe.branches.items()}
    weights, targets = (
        None if named is None else {name: value for name, value in named.items() if name in names}
        for named in (recipe.mixing.weights, recipe.mixing.targets)
    )
    mixing = dataclasses.replace(recipe.mixing, weights=weights, targets=targets)
    if mixing.strategy == "weights" and not any((weights or {}).values()):
        mixing = dataclasses.replace(mixing, strategy="proportional", weights=None)
    fusion = recipe.fusion if len(names) > 1 else FusionConfig(normalize=recipe.fusion.normalize)
    branches = {branch: tasks for branch, tasks in branches.items() if tasks}
    return dataclasses.replace(recipe, branches=branches, mixing=mixing, fusion=fusion)
