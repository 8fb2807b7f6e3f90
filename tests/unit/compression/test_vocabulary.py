"""The vocabulary that is left reads kept texts as before, whatever the tokenizer; everything follows its new ids."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from hf_mtcompress.compression.vocabulary import (
    compare_readings,
    count_tokens,
    trim_tokenizer,
    trim_vocabulary,
)
from hf_mtcompress.errors import DataError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut_vocabulary, is_vanilla
from hf_mtcompress.tasks import SequenceClassification, TokenClassification
from tests.tiny import (
    TEXT_FAMILIES,
    randomize,
    tiny_bpe_tokenizer,
    tiny_config,
    tiny_encoder,
    tiny_image_processor,
    tiny_text_rows,
    tiny_token_rows,
    tiny_tokenizer,
    tiny_unigram_tokenizer,
)

TOKENIZERS = {"wordpiece": tiny_tokenizer, "bpe": tiny_bpe_tokenizer, "unigram": tiny_unigram_tokenizer}
XLM_IDS = {"bos_token_id": 0, "cls_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}

TEXTS = list(tiny_text_rows(400, seed=3)["text"])
"""All words of the tiny sentences."""
FEW = ["the very sad fox waits near the market square", "the golden owl sings near the forest"]
LAST_WORDS = "zebra quartz wagging ox \u00e9t\u00e9 \u6f22"


def tokens(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def matching(kind: str) -> tuple[Any, PreTrainedModel]:
    """A tokenizer with an encoder that reads it; RoBERTa numbers positions from the padding on."""
    tokenizer = TOKENIZERS[kind]()
    ids = XLM_IDS if kind == "unigram" else {}
    family = "bert" if kind == "wordpiece" else "roberta"
    return tokenizer, tiny_encoder(family, vocab_size=len(tokenizer), **ids)


def two_tasks(encoder: PreTrainedModel) -> MultiTaskModel:
    tasks = [
        SequenceClassification("mood", labels=["bad", "good"], text="text"),
        TokenClassification("tags", labels=["O", "B-x", "I-x"], tokens="tokens"),
    ]
    model = MultiTaskModel.from_encoder(encoder, tasks)
    return randomize(model, seed=2)  # type: ignore[return-value]  # the same model


def logits(model: PreTrainedModel, tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        outputs = model(**tokenizer(texts, padding=True, return_tensors="pt"))
    return {key: value for key, value in outputs.items() if key.startswith("logits")}


# ---- the law ----


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(6))
def test_kept_texts_are_read_as_before(kind: str, seed: int) -> None:
    """One merge or piece too few changes tokens in the middle of a word, and only quality tells."""
    tokenizer = TOKENIZERS[kind]()
    generator = random.Random(seed)
    alphabet = sorted(set("".join(TEXTS)) - {" "})
    odd = [" ".join("".join(generator.choices(alphabet, k=generator.randint(1, 9))) for _ in range(5)) for _ in "12345"]
    texts = [*generator.sample(TEXTS, 5), *odd, *([LAST_WORDS] if seed % 2 else [])]
    trimmed = trim_tokenizer(tokenizer, count_tokens(tokenizer, [texts])).tokenizer
    assert len(trimmed) < len(tokenizer)
    for text in texts:
        assert tokens(trimmed, text) == tokens(tokenizer, text)
        assert trimmed.decode(trimmed(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    # What was known stays known, in smaller pieces.
    unknown = tokenizer.unk_token
    for text in [*TEXTS[:100], *odd]:
        assert tokens(trimmed, text).count(unknown) <= tokens(tokenizer, text).count(unknown)
    assert compare_readings(tokenizer, trimmed, [texts]).same == 1  # unknown characters in both included
    reading = compare_readings(tokenizer, trimmed, [TEXTS])
    assert reading.unknown_after == reading.unknown_before
    assert 0 < float(reading.same or 0) < 1
    assert float(reading.tokens_after or 0) > float(reading.tokens_before or 0)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_using_everything_cuts_nothing(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    trimmed = trim_tokenizer(tokenizer, dict.fromkeys(range(len(tokenizer)), 1))
    assert trimmed.rows == list(range(len(tokenizer)))
    assert json.loads(trimmed.tokenizer.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_model_answers_as_before_also_from_a_folder(kind: str, tmp_path: Path) -> None:
    tokenizer, encoder = matching(kind)
    model = two_tasks(encoder)
    before = logits(model, tokenizer, FEW)
    trimmed, report = trim_vocabulary(model, tokenizer, [FEW])
    assert report.tokens_after == len(trimmed) < report.tokens_before == len(tokenizer)
    assert report.embedding_bytes_after * len(tokenizer) == report.embedding_bytes_before * len(trimmed)
    after = logits(model, trimmed, FEW)
    assert all(torch.equal(before[key], after[key]) for key in before)
    model.save_pretrained(tmp_path)
    trimmed.save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.get_vocab() == trimmed.get_vocab()
    assert again.all_special_ids == trimmed.all_special_ids
    assert (again.model_max_length, again.padding_side) == (tokenizer.model_max_length, tokenizer.padding_side)
    found = logits(loaded, again, FEW)
    assert all(torch.equal(before[key], found[key]) for key in before)
    assert is_vanilla(loaded.encoder)
    assert loaded.encoder.config.pad_token_id == loaded.config.pad_token_id == again.pad_token_id


PLAIN = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.inference_mode():
    torch.save(model(**tokenizer(sys.argv[2:], padding=True, return_tensors="pt")).logits, sys.argv[1] + "/logits.pt")
assert "hf_mtcompress" not in sys.modules
"""


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_export_opens_with_transformers_alone(kind: str, tmp_path: Path) -> None:
    tokenizer, encoder = matching(kind)
    model = two_tasks(encoder)
    before = logits(model, tokenizer, FEW)["logits_mood"]
    trimmed, _ = trim_vocabulary(model, tokenizer, [FEW])
    model.export_task("mood", tmp_path, trimmed)
    subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path), *FEW], check=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), before)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.vocab_size == len(trimmed)


# ---- every family ----


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_family_follows_its_new_ids(family: str) -> None:
    """A stale padding id moves every position of RoBERTa, a stale end token the pooling of CLIP."""
    tokenizer = tiny_tokenizer(family)
    encoder = tiny_encoder(family)
    inputs = tokenizer(FEW, padding=True, return_tensors="pt")
    with torch.no_grad():
        before = encoder(**inputs)
        trimmed, _ = trim_vocabulary(encoder, tokenizer, [FEW])
        after = encoder(**trimmed(FEW, padding=True, return_tensors="pt"))
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    table = find_anatomy(encoder).word_embedding
    assert encoder.config.vocab_size == len(trimmed) == table.num_embeddings == len(table.weight)
    if table.padding_idx is not None:
        assert table.padding_idx == encoder.config.pad_token_id == trimmed.pad_token_id


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "clip_text"])
def test_special_tokens_may_move_where_nothing_hangs_on_them(family: str) -> None:
    """With ids in the middle of a vocabulary or at its end (ModernBERT, CLIP)."""
    encoder = tiny_encoder(
        family, pad_token_id=150, bos_token_id=151, cls_token_id=151, eos_token_id=152, sep_token_id=152
    )
    rows = [*range(20, 60), 150, 151, 152]
    old = torch.tensor([[151, 25, 30, 152], [151, 59, 152, 150]])
    new = torch.tensor([[rows.index(token) for token in row] for row in old.tolist()])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        before = encoder(input_ids=old, attention_mask=mask)
        cut_vocabulary(encoder, rows)
        after = encoder(input_ids=new, attention_mask=mask)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert (encoder.config.pad_token_id, encoder.config.eos_token_id) == (40, 42)


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_padding_that_positions_are_counted_from_keeps_its_id(family: str) -> None:
    encoder = tiny_encoder(family)
    with pytest.raises(UnsupportedEncoderError, match="expected the padding to keep its id 1"):
        cut_vocabulary(encoder, [1, 2, 3, 9])
    assert encoder.config.vocab_size == 160  # refused before anything was cut
    cut_vocabulary(encoder, [0, 1, 2, 3, 9])


def test_special_tokens_keep_their_ids_where_there_is_room() -> None:
    """BERT's stand at 100 to 103, those of XLM-R at 0 to 3 and at the end."""
    letters = [chr(ord("a") + number) for number in range(26)]
    pieces = [left + right for left in letters for right in letters[:6]]
    for place, name in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}.items():
        pieces[place] = name
    pieces += [*letters, *(f"##{letter}" for letter in letters), "owl"]
    tokenizer = type(tiny_tokenizer())(vocab={piece: place for place, piece in enumerate(pieces)})
    large = trim_tokenizer(tokenizer, dict.fromkeys(range(70), 1)).tokenizer
    assert [large.unk_token_id, large.cls_token_id, large.sep_token_id, large.mask_token_id] == [100, 101, 102, 103]
    assert tokens(large, "owl") == ["[CLS]", "o", "##w", "##l", "[SEP]"]
    small = trim_tokenizer(tokenizer, count_tokens(tokenizer, [["owl"]])).tokenizer
    assert small.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(small) == 5 + 52 + 1


# ---- what stays ----


def test_limits_on_count_and_size() -> None:
    tokenizer = tiny_tokenizer()
    counts = count_tokens(tokenizer, [TEXTS])
    least = len(trim_tokenizer(tokenizer, {}).rows)
    (common, times), *_, (_, fewest) = Counter(counts).most_common()
    assert len(trim_tokenizer(tokenizer, counts, minimum_count=times).rows) in (least, least + 1)
    one_more = trim_tokenizer(tokenizer, counts, size=least + 1)
    assert common in one_more.rows or len(tokenizer.convert_ids_to_tokens(common)) == 1
    assert len(one_more.rows) == least + 1
    assert len(trim_tokenizer(tokenizer, counts, minimum_count=fewest).rows) > least
    with pytest.raises(DataError, match=f"size: expected at least {least} tokens"):
        trim_tokenizer(tokenizer, counts, size=least - 1)


def test_size_counts_what_byte_pairs_are_made_of() -> None:
    tokenizer = tiny_bpe_tokenizer()
    counts = count_tokens(tokenizer, [TEXTS])
    least = len(trim_tokenizer(tokenizer, {}).rows)
    for size in (least, least + 3, least + 20):
        trimmed = trim_tokenizer(tokenizer, counts, size=size).tokenizer
        assert len(trimmed) <= size
        for text in TEXTS[:20]:
            assert trimmed.decode(trimmed(text, add_special_tokens=False)["input_ids"]) == tokenizer.decode(
                tokenizer(text, add_special_tokens=False)["input_ids"]
            )


def test_added_tokens_stay_and_get_new_ids() -> None:
    """They stand behind the model's own tokens, which are fewer now."""
    tokenizer = type(tiny_tokenizer())(vocab=tiny_tokenizer().get_vocab())
    tokenizer.add_tokens(["<name>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[START]"]})
    encoder = tiny_encoder("bert", vocab_size=len(tokenizer) + 6)  # rows that no token has
    texts = ["the <name> fox [START] waits"]
    with torch.no_grad():
        before = encoder(**tokenizer(texts, return_tensors="pt")).last_hidden_state
        trimmed, _ = trim_vocabulary(encoder, tokenizer, [["the fox waits"]])
        after = encoder(**trimmed(texts, return_tensors="pt")).last_hidden_state
    assert torch.equal(after, before)
    assert trimmed.convert_tokens_to_ids(["<name>", "[START]"]) == [len(trimmed) - 2, len(trimmed) - 1]
    assert encoder.config.vocab_size == len(trimmed)


def test_words_and_pairs_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    words = list(tiny_token_rows(5)["tokens"])
    joined = [" ".join(row) for row in words]
    assert count_tokens(tokenizer, [words]) == count_tokens(tokenizer, [joined])
    assert count_tokens(tokenizer, [joined, FEW]) == count_tokens(tokenizer, [joined]) + count_tokens(tokenizer, [FEW])


def test_class_without_a_family_keeps_its_template() -> None:
    """Ids in a template of special tokens are numbers in the file."""
    merges = [("o", "w"), ("ow", "l"), ("f", "o"), ("fo", "x")]
    vocabulary = ["f", "o", "l", "w", "x", "ow", "owl", "fo", "fox", "<unk>", "<s>", "</s>", "<pad>"]
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 10), ("</s>", 11)]
    )
    backend.enable_padding(pad_id=12, pad_token="<pad>")
    tokenizer = FastTokenizer(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    trimmed = trim_tokenizer(tokenizer, count_tokens(tokenizer, [["owl"]])).tokenizer
    assert set(trimmed.get_vocab()) == set(vocabulary) - {"fo", "fox"}
    assert tokens(trimmed, "owl fox") == ["<s>", "owl", "f", "o", "x", "</s>"]
    ids = trimmed(["owl", "ox"], padding=True)["input_ids"]
    assert [trimmed.convert_ids_to_tokens(row) for row in ids] == [
        ["<s>", "owl", "</s>", "<pad>"],
        ["<s>", "o", "x", "</s>"],
    ]
    assert trimmed.backend_tokenizer.padding["pad_id"] == trimmed.pad_token_id


def test_special_tokens_keep_their_order() -> None:
    """CLIP takes the largest id of a text for its end, where its config is of the older kind."""
    pieces = [*"abcdef", "ab", "cd", "<start>", "<end>"]
    merges = [("a", "b"), ("c", "d")]
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges))
    tokenizer = FastTokenizer(tokenizer_object=backend, bos_token="<start>", eos_token="<end>")
    one_less = trim_tokenizer(tokenizer, {6: 1}).tokenizer
    assert (one_less.bos_token_id, one_less.eos_token_id) == (7, 8)


# ---- models ----


def test_tied_output_layer_stays_tied(tmp_path: Path) -> None:
    model = randomize(AutoModelForMaskedLM.from_config(tiny_config("bert")))
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        before = model(**tokenizer(FEW, padding=True, return_tensors="pt")).logits
        trimmed = trim_tokenizer(tokenizer, count_tokens(tokenizer, [FEW]), always=[2, 3])
        cut_vocabulary(model, trimmed.rows)
        after = model(**trimmed.tokenizer(FEW, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(after, before[..., trimmed.rows], rtol=0, atol=1e-6)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().out_features == len(trimmed.rows)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        found = loaded(**trimmed.tokenizer(FEW, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found, after, rtol=0, atol=1e-6)


def test_stock_model_and_encoders_of_branches() -> None:
    stock = randomize(AutoModelForSequenceClassification.from_config(tiny_config("distilbert")))
    tokenizer = tiny_tokenizer("distilbert")
    before = logits(stock, tokenizer, FEW)
    trimmed, _ = trim_vocabulary(stock, tokenizer, [FEW])
    assert torch.equal(logits(stock, trimmed, FEW)["logits"], before["logits"])
    tasks = [SequenceClassification(name, labels=["a", "b"], text="text") for name in ("one", "two")]
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, branches={"side": ["two"]}, branch_layers=None)
    randomize(model)
    before = logits(model, tiny_tokenizer(), FEW)
    trimmed, _ = trim_vocabulary(model, tiny_tokenizer(), [FEW])
    after = logits(model, trimmed, FEW)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {config["vocab_size"] for config in model.config.encoders.values()} == {len(trimmed)}


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UnsupportedEncoderError, match="from text encoders only"):
        cut_vocabulary(tiny_encoder("vit"), [0, 1])
    with pytest.raises(ValueError, match="1 of them twice"):
        cut_vocabulary(tiny_encoder("bert"), [0, 1, 2, 3, 3])
    with pytest.raises(ValueError, match="special tokens among those to keep"):
        cut_vocabulary(tiny_encoder("bert"), [0, 1, 2])
    with pytest.raises(DataError, match="expected texts"):
        trim_vocabulary(tiny_encoder("bert"), tiny_tokenizer(), [])
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(UnsupportedEncoderError, match="found WordLevel"):
        trim_tokenizer(FastTokenizer(tokenizer_object=backend, unk_token="<unk>"), {0: 1})
    with pytest.raises(UnsupportedEncoderError, match="found no fast tokenizer"):
        trim_tokenizer(tiny_image_processor(), {0: 1})
