"""What a process does that `multiprocessing` starts afresh. Imports nothing at the top, so that its arguments do."""

from typing import Any


def mood_logits(_task: Any, folder: str, inputs: dict[str, Any]) -> list[list[float]]:
    """Logits of the task `mood` by the model in `folder`."""
    import torch
    from transformers import AutoModel

    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(**inputs)["logits_mood"].tolist()
