"""What of a run goes into a repository, and where it lies there.

README.md record.json recipe.yaml assets/    what the run says of itself
config.json model.safetensors ...            the float torch model of all tasks, at the root so that AutoModel finds it
onnx/                                        the graph of all tasks, quantized where the run quantized it
openvino/                                    the same for OpenVINO, where the run made one
bitsandbytes/ or torchao/                    the k-bit torch model, where that is what the run was made for
vanilla/TASK/                                one plain transformers folder per task, where the run exported them
"""

from pathlib import Path, PurePosixPath

from hf_mtcompress import artifacts
from hf_mtcompress.errors import PublishingError
from hf_mtcompress.publishing.facts import delivered_artefact, root_artefact, shipped_artefact
from hf_mtcompress.records import FORMS, Artefact, RunRecord, StepRecord

_LEFT_AT_HOME = {
    artifacts.STEP_RECORD,
    artifacts.WORK,
    artifacts.CARD_ASIDE,
    "probes.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    "runs",
    "wandb",
    "__pycache__",
}
"""Leftovers of making and checking: nothing that opens the model needs them (the probes hold rows of the data)."""


def repository_layout(record: RunRecord) -> dict[str, tuple[StepRecord, Artefact]]:
    """Which artefact lies where in the repository, by folder; the empty name is the repository itself."""
    layout = {}
    if (root := root_artefact(record)) is not None:
        layout[""] = root
    delivered = FORMS[delivered_artefact(record).form]
    beside = [form for form in FORMS.values() if form.layout != "model" or (form is delivered and form.in_few_bits)]
    for form in sorted(beside, key=lambda form: ("graph", "model", "tasks").index(form.layout)):
        if (shipped := shipped_artefact(record, form.name)) is not None:
            layout[form.name] = shipped
    return layout


def is_left_at_home(path: str) -> bool:
    """Whether a file, by its path in a folder, is never published."""
    return any(
        part in _LEFT_AT_HOME
        or part.startswith((".", "checkpoint-", "rng_state"))
        or part.endswith((".part", ".old", ".lock"))
        for part in PurePosixPath(path).parts
    )


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below `folder` that is worth publishing, by its path relative to `folder`, in order of name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if not is_left_at_home(relative) and path.is_file():
            found[relative] = path
    return found


def collect_repository(run_folder: Path, record: RunRecord) -> dict[str, Path]:
    """The files of a run that are published, by their path in the repository.

    Args:
        run_folder: the output folder of the run.
        record: its record.

    Raises:
        PublishingError: an artefact of the record is not on disk.
    """
    run_folder = Path(run_folder)
    files: dict[str, Path] = {}
    for place, (step, artefact) in repository_layout(record).items():
        folder = run_folder / artefact.folder
        inside = files_of(folder) if folder.is_dir() else {}
        if not inside:
            raise PublishingError(
                f"expected the files of step '{step.name}' in '{artefact.folder}', found none; run the recipe again"
            )
        files |= {(PurePosixPath(place) / name).as_posix(): path for name, path in inside.items()}
    for name in (artifacts.CARD, artifacts.RECORD, artifacts.RECIPE):
        # A step's own card never stands in for the run's.
        files.pop(name, None)
        if (run_folder / name).is_file():
            files[name] = run_folder / name
    assets = run_folder / artifacts.ASSETS
    if assets.is_dir():
        files |= {f"{artifacts.ASSETS}/{name}": path for name, path in files_of(assets).items()}
    return dict(sorted(files.items()))
