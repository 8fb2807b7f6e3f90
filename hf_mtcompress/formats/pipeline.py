"""`pipeline("multi-task", model=folder)`: one call, the answers of all tasks."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import Pipeline
from transformers.utils.generic import ModelOutput

from hf_mtcompress.data.alignment import words_of
from hf_mtcompress.data.preprocessing import columns_for
from hf_mtcompress.data.readers import WORD_IDS, Reader, saved_reader
from hf_mtcompress.errors import ArtifactError, TaskError
from hf_mtcompress.formats.registration import PIPELINE
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import Task


class MultiTaskPipeline(Pipeline):
    """Answers all tasks of a multi-task folder for a text, a list of words, `{"text", "text_pair"}` or a picture.

    A picture is a path, an address, bytes, a PIL image, an array or a tensor (`picture_of`). A list of strings is
    several texts, as everywhere in transformers; give words as `{"text": [...]}`.

    ```python
    answer = pipeline("multi-task", model="runs/nlu/student")("wake me at seven")
    answer["intent"]  # {"label": "alarm", "score": 0.98}
    ```
    """

    _load_processor = False
    _load_image_processor = None
    _load_feature_extractor = False
    _load_tokenizer = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._choose(None)
        if all(part is None for part in (self.processor, self.tokenizer, self.image_processor)):
            place = f" in {self.model.name_or_path}" if self.model.name_or_path else ""
            raise ArtifactError(
                f"expected a tokenizer or image processor beside the model{place}, found none; "
                "save it there with processor.save_pretrained(folder), or pass tokenizer= or image_processor="
            )

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = sorted(set(kwargs) - {"tasks"})
        if unknown:
            raise TypeError(f"expected tasks=[...] as the only argument of the call, found {unknown}")
        return dict(kwargs), dict(kwargs), dict(kwargs)

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> dict[str, Any]:
        chosen = self._choose(preprocess_parameters.get("tasks"))
        reader = self._reader
        columns = columns_for([input_], chosen.values(), reader)
        encoded = reader.encode(columns, words=any(task.reads_words for task in chosen.values()))
        word_ids = encoded.pop(WORD_IDS, None)
        encoding = {} if word_ids is None else {"word_ids": word_ids[0], "words": words_of(columns[0][0])}
        return {**reader.collate([{name: values[0] for name, values in encoded.items()}]), "encoding": encoding}

    @cached_property
    def _reader(self) -> Reader:
        settings = (self.model.config.preprocessing or {}).get("main", {})
        given = (self.processor, self.tokenizer, self.image_processor)
        return saved_reader(next((part for part in given if part is not None), None), settings.get("max_length"))

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> ModelOutput:
        encoding = input_tensors.pop("encoding")
        chosen = self._choose(forward_parameters.get("tasks"))
        model: Any = self.model
        output = model(**model.inputs_in(input_tensors), tasks=list(chosen))
        logits = {task.logits_name: output[task.logits_name] for task in chosen.values()}
        return ModelOutput({**logits, "encoding": encoding})

    def postprocess(self, model_outputs: ModelOutput, **postprocess_parameters: Any) -> dict[str, Any]:
        return {
            name: task.decode(model_outputs[task.logits_name][0].float().cpu().numpy(), model_outputs["encoding"])
            for name, task in self._choose(postprocess_parameters.get("tasks")).items()
        }

    def _choose(self, names: Sequence[str] | str | None) -> dict[str, Task]:
        model = self.model
        if not isinstance(model, MultiTaskModel):
            raise ArtifactError(
                f"expected a multi-task model for pipeline('{PIPELINE}'), found {type(model).__name__}; "
                "use the pipeline of its own task"
            )
        names = [names] if isinstance(names, str) else names
        unknown = [name for name in names or () if name not in model.tasks]
        if unknown:
            raise TaskError(f"expected tasks among {list(model.tasks)}, found {unknown}; check the spelling")
        return model.tasks if names is None else {name: model.tasks[name] for name in names}
