"""One way to run every saved form: arrays of model inputs to logits by task."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_mtcompress.artifacts import ONNX_SETTINGS, OPENVINO_SETTINGS
from hf_mtcompress.environment import package_version, require_extra
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.graph_settings import FILES, GraphForm, check_graph, read_graph_settings
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.modeling import MultiTaskModel, align_weights
from hf_mtcompress.model.registration import register
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, Task, TokenClassification

Form = Literal["torch", "bitsandbytes", "torchao", "vanilla", "onnx", "openvino"]

_CONFIG = "config.json"
_AUTO_CLASSES: dict[str, Any] = {
    SequenceClassification.kind: AutoModelForSequenceClassification,
    TokenClassification.kind: AutoModelForTokenClassification,
    ImageClassification.kind: AutoModelForImageClassification,
}


class Runtime(ABC):
    """A loaded artefact, whatever it runs on.

    Attributes:
        form: what kind of folder it is.
        folder: where it was loaded from.
        tasks: the tasks by name.
        processor: tokenizer or image processor.
        max_length: longest input in tokens, None where nothing says so.
    """

    form: Form
    folder: Path
    tasks: dict[str, Task]
    processor: Any
    max_length: int | None

    @abstractmethod
    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All logits of a batch.

        Args:
            batch: `input_ids`, `attention_mask` (and `token_type_ids` where the encoder takes them) of shape
                (rows, tokens), or `pixel_values` of shape (rows, channels, height, width).

        Returns:
            By task: (rows, labels), or (rows, tokens, labels) for word-level tasks.
        """

    def digest(self) -> str:
        """Digest of the files it was loaded from, for caches of its answers."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.rglob("*")):
            if file.suffix in (".safetensors", ".onnx", ".json", ".xml", ".bin"):
                digest.update(file.relative_to(self.folder).as_posix().encode())
                digest.update(file.read_bytes())
        return digest.hexdigest()


class TorchRuntime(Runtime):
    """A multi-task folder, in float precision or quantized by bitsandbytes or torchao."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        _set_threads(threads)
        self.folder = folder
        config = _load_config(folder)
        assert isinstance(config, MultiTaskConfig)
        form = folder_form(folder)
        if form in ("bitsandbytes", "torchao"):
            require_extra(form)
        self.form = form
        self.model: MultiTaskModel = _load_weights(MultiTaskModel, folder).eval()
        self.tasks = dict(self.model.tasks)
        self.processor = load_processor(folder)
        self.max_length = (config.preprocessing or {}).get("main", {}).get("max_length")

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            output = self.model(**_tensors(batch))
            return {name: _array(output[task.logits_name]) for name, task in self.tasks.items()}


class VanillaRuntime(Runtime):
    """A folder of plain transformers folders, one for each task; every task runs an encoder of its own."""

    form = "vanilla"

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        _set_threads(threads)
        self.folder = folder
        register()
        folders = task_folders(folder)
        self.models: dict[str, PreTrainedModel] = {}
        self.tasks = {}
        for name, path in folders.items():
            config = _load_config(path)
            self.tasks[name] = stock_task(name, config, path)
            model = _load_weights(_AUTO_CLASSES[self.tasks[name].kind], path).eval()
            align_weights(model)
            self.models[name] = model
        first = next(iter(folders.values()))
        self.processor = load_processor(first)
        limit = self.processor.model_max_length if "input_ids" in self.processor.model_input_names else None
        # Tokenizers without a limit of their own say a number far beyond any length.
        self.max_length = limit if limit is not None and limit < 10**6 else None

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers = {}
        with torch.inference_mode():
            for name, model in self.models.items():
                inputs = _tensors(batch)
                if "type_vocab_size" not in model.config.to_dict():
                    inputs.pop("token_type_ids", None)
                answers[name] = _array(model(**inputs).logits)
        return answers


class GraphRuntime(Runtime):
    """A folder with a graph, on ONNX Runtime or OpenVINO."""

    def __init__(self, folder: Path, form: GraphForm, threads: int | None = None) -> None:
        require_extra(form)
        package = "onnxruntime" if form == "onnx" else "openvino"
        if form == "onnx":
            from hf_mtcompress.formats.onnx.session import open_session, run_session
        else:
            from hf_mtcompress.formats.openvino.session import open_session, run_session

        self._run: Any = run_session
        self.form = form
        self.folder = folder
        settings = read_graph_settings(folder, form)
        graph = folder / FILES[form][1]
        check_graph(folder, settings, form)
        try:
            self.session: Any = open_session(graph, threads)
        except Exception as error:  # whatever the runtime raises: there is no class for all of it
            raise ArtifactError(
                f"expected a graph that {package} {package_version(package)} opens in {folder}, found one that it "
                f"refuses ({_first_line(error)}); the graph was made with version "
                f"{settings.versions.get(package) or 'unknown'}: install that or a newer one, or export the model again"
            ) from error
        self.tasks = settings.build_tasks()
        self.processor = load_processor(folder)
        self.max_length = settings.preprocessing.get("max_length")

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._run(self.session, batch)
        return {name: found[task.logits_name] for name, task in self.tasks.items()}


def open_runtime(folder: Path, threads: int | None = None) -> Runtime:
    """Load a saved folder of any form.

    Args:
        folder: a multi-task folder, a folder of plain transformers folders, or one with a graph.
        threads: threads within an operation, for the whole process where the form runs on torch; None leaves them.

    Raises:
        ArtifactError: the folder is none of these, incomplete, or of a newer format.
        MissingExtraError: the form needs a package that is not installed.
    """
    match folder_form(folder):
        case "torch" | "bitsandbytes" | "torchao":
            return TorchRuntime(folder, threads)
        case "vanilla":
            return VanillaRuntime(folder, threads)
        case "onnx" | "openvino" as form:
            return GraphRuntime(folder, form, threads)


def folder_form(folder: Path) -> Form:
    """What kind of artefact a folder holds.

    Raises:
        ArtifactError: it holds none that is known.
    """
    if not folder.is_dir():
        raise ArtifactError(f"expected a folder with a saved model, found no folder {folder}; check the path")
    for form, (settings, *_) in FILES.items():
        if (folder / settings).is_file():
            return form
    if (folder / _CONFIG).is_file():
        values = read_config(folder)
        if values.get("model_type") == MultiTaskConfig.model_type:
            return stores_few_bits(values) or "torch"
        raise ArtifactError(
            f"expected a multi-task folder, found a model of type '{values.get('model_type')}' in {folder}; a plain "
            "transformers folder opens with transformers' own pipeline, a folder with one for each task opens here"
        )
    if any((path / _CONFIG).is_file() for path in folder.iterdir() if path.is_dir()):
        return "vanilla"
    raise ArtifactError(
        f"expected a multi-task folder ({_CONFIG}), a folder with a graph ({ONNX_SETTINGS} or {OPENVINO_SETTINGS}) or "
        f"a folder with one plain transformers folder for each task, found {_listing(folder)} in {folder}; give the "
        "folder that a step saved"
    )


def task_folders(folder: Path) -> dict[str, Path]:
    """The plain folders inside a vanilla folder, by task name, in alphabetical order."""
    return {path.name: path for path in sorted(folder.iterdir()) if (path / _CONFIG).is_file()}


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's `config.json`.

    Raises:
        ArtifactError: it is not JSON.
    """
    try:
        return json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"expected JSON in {folder / _CONFIG}, found something else ({error}); save it again"
        ) from error


def stores_few_bits(config: Mapping[str, Any]) -> Literal["bitsandbytes", "torchao"] | None:
    """What stored the weights in 8 or 4 bits that the config values of a torch folder speak of; None for float."""
    mark = config.get("quantization_config") or {}
    if mark.get("torchao") or mark.get("quant_method") == "torchao":
        return "torchao"
    few = mark.get("load_in_8bit") or mark.get("load_in_4bit") or mark.get("bitsandbytes")
    return "bitsandbytes" if few else None


def load_processor(folder: Path) -> Any:
    """The tokenizer or image processor saved in a folder.

    Raises:
        ArtifactError: there is none.
    """
    try:
        if (folder / "preprocessor_config.json").is_file():
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"expected a tokenizer or image processor that loads from {folder}, found one that does not ({error}); "
            "save it again with processor.save_pretrained(folder)"
        ) from error
    raise ArtifactError(
        f"expected a tokenizer or image processor in {folder}, found {_listing(folder)}; "
        "save it there with processor.save_pretrained(folder)"
    )


def stock_task(name: str, config: PreTrainedConfig, folder: Path) -> Task:
    """The task that a plain transformers folder answers, as its config tells it.

    Raises:
        ArtifactError: its architecture is none of sequence, token or image classification.
    """
    architecture = (config.architectures or [""])[0]
    names: dict[Any, str] = config.id2label or {}
    count = len(names)
    labels = tuple(names[index] for index in range(count))
    problem = config.problem_type or ("regression" if count == 1 else "single_label_classification")
    if architecture.endswith("ForTokenClassification"):
        return TokenClassification(name, labels=labels)
    known = None if problem == "regression" else labels
    if architecture.endswith("ForSequenceClassification"):
        return SequenceClassification(name, labels=known, problem_type=problem)
    if architecture.endswith("ForImageClassification"):
        return ImageClassification(name, labels=known, problem_type=problem)
    raise ArtifactError(
        f"expected a model for sequence, token or image classification in {folder}, found '{architecture}'; "
        "only folders written by export_task, or like them, open here"
    )


def _load_config(folder: Path) -> PreTrainedConfig:
    register()
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _load_weights(cls: Any, folder: Path) -> Any:
    try:
        return cls.from_pretrained(folder)
    except SafetensorError as error:
        raise ArtifactError(
            f"expected whole weights in {folder}, found a damaged file ({_first_line(error)}); copy or download the "
            "folder again, or save the model again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def _array(logits: torch.Tensor) -> np.ndarray:
    return logits.float().numpy()


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
