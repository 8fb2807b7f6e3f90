"""A text is read alike by all tasks and in every form, whatever tasks stand beside it and however words are cut."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, pipeline

from hf_mtcompress import (
    MultiTaskModel,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    SequenceClassification,
    TokenClassification,
    export_onnx,
    load_predictor,
)
from hf_mtcompress.formats.openvino.export import convert_openvino
from hf_mtcompress.tasks.base import softmax
from tests.tiny import (
    FEELING_LABELS,
    TAG_LABELS,
    randomize,
    tiny_bpe_tokenizer,
    tiny_encoder,
    tiny_token_rows,
    tiny_tokenizer,
    tiny_unigram_tokenizer,
)


def tiny_framed_bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as ModernBERT has it: special tokens by a template, the space counted to its word."""
    parts = json.loads(tiny_bpe_tokenizer().backend_tokenizer.to_str())
    parts["pre_tokenizer"] |= {"trim_offsets": False}
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            name: {"id": name, "ids": [tiny_bpe_tokenizer().convert_tokens_to_ids(name)], "tokens": [name]}
            for name in ("<s>", "</s>")
        },
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        model_max_length=32,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


TOKENIZERS = {
    "wordpiece": tiny_tokenizer,
    "bpe": tiny_bpe_tokenizer,
    "framed bpe": tiny_framed_bpe_tokenizer,
    "unigram": tiny_unigram_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_beside_its_words_scores_alike_everywhere(name: str, tmp_path: Path) -> None:
    """Read word by word in training and as a text by a pipeline, a byte-level BPE makes other tokens of it.

    What was scored is then not what a user gets.
    """
    tokenizer = TOKENIZERS[name]()
    rows = tiny_token_rows(12, seed=5)
    texts = [" ".join(words) for words in rows["tokens"]]
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS, text="tokens", label="label"),
        TokenClassification("tags", labels=TAG_LABELS, tokens="tokens", label="tags"),
    ]
    encoder = tiny_encoder("roberta", vocab_size=len(tokenizer), type_vocab_size=2)
    model = randomize(MultiTaskModel.from_encoder(encoder, tasks, max_length=24), seed=2).eval()
    with torch.no_grad():
        plain = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        wanted = model(**plain, tasks=["mood"]).logits_mood.numpy()

    best = [FEELING_LABELS[place] for place in wanted.argmax(-1)]
    trainer = MultiTaskTrainer(
        model=model,
        args=MultiTaskTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset={"mood": rows, "tags": rows},
        eval_dataset={"mood": rows, "tags": rows},
        processing_class=tokenizer,
    )
    trained_on = [trainer.train_dataset[(0, index)] for index in range(len(rows))]
    assert sorted(list(row["input_ids"]) for row in trained_on) == sorted(tokenizer(texts)["input_ids"])
    score = float(np.mean([found == label for found, label in zip(best, rows["label"], strict=True)]))
    assert trainer.evaluate()["eval_mood_accuracy"] == pytest.approx(score, abs=1e-6)

    trainer.save_model(str(tmp_path / "model"))
    model.export_task("mood", tmp_path / "stock", tokenizer)
    export_onnx(model, tokenizer, tmp_path / "onnx")
    convert_openvino(tmp_path / "onnx", tmp_path / "openvino")
    answers = {}
    for form in ("model", "onnx", "openvino"):
        predictor = load_predictor(tmp_path / form)
        for chosen in (None, ["mood"]):
            for given in (texts, list(rows["tokens"])):
                answers[form] = predictor.predict(given, tasks=chosen)
                assert [answer["mood"]["label"] for answer in answers[form]] == best
                found = [answer["mood"]["score"] for answer in answers[form]]
                np.testing.assert_allclose(found, softmax(wanted).max(-1), atol=2e-6, err_msg=form)
    spoken = pipeline("multi-task", model=str(tmp_path / "model"))
    assert [spoken(text)["mood"]["label"] for text in texts] == best
    assert [spoken(text, tasks=["mood"])["mood"]["label"] for text in texts] == best
    assert [spoken(text)["tags"]["labels"] for text in texts] == [
        answer["tags"]["labels"] for answer in load_predictor(tmp_path / "model").predict(texts)
    ]
    stock = pipeline("text-classification", model=str(tmp_path / "stock"))(texts)
    assert [answer["label"] for answer in stock] == best
    np.testing.assert_allclose([answer["score"] for answer in stock], softmax(wanted).max(-1), atol=2e-6)
