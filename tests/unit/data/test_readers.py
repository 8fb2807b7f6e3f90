"""Laws of readers: a row becomes what its tokenizer or image processor makes of it, alone and in company."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from PIL import Image
from transformers import AutoImageProcessor
from transformers.utils.import_utils import is_torchvision_available

from hf_mtcompress.data.readers import (
    WORD_IDS,
    Reader,
    are_encoded,
    collate_inputs,
    input_columns,
    lengths_of,
    load_reader,
    max_length_of,
    padded_length,
    positions_of,
    pretrained_reader,
    reader_if_known,
    reader_of,
    saved_reader,
)
from hf_mtcompress.errors import ArtifactError, DataError
from hf_mtcompress.model.inputs import taken_by
from tests.tiny import (
    FAMILIES,
    IMAGE_FAMILIES,
    IMAGE_SIZE,
    MAX_LENGTH,
    TEXT_FAMILIES,
    tiny_bpe_tokenizer,
    tiny_encoder,
    tiny_image_processor,
    tiny_image_rows,
    tiny_text_rows,
    tiny_token_rows,
    tiny_tokenizer,
    tiny_unigram_tokenizer,
)

ROWS = tiny_text_rows(5)
TEXTS = [ROWS["text"][:]]
PAIRS = [ROWS["text"][:], ROWS["pair"][:]]
WORDS = [[text.split() for text in TEXTS[0]]]
IMAGES = [list(tiny_image_rows(4)["image"])]


def reader_for(family: str, max_length: int | None = None) -> Reader:
    return reader_of(tiny_image_processor(family) if family in IMAGE_FAMILIES else tiny_tokenizer(family), max_length)


def columns_for(family: str) -> list[list[Any]]:
    return IMAGES if family in IMAGE_FAMILIES else TEXTS


def rows_of(encoded: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]


def same(one: dict[str, torch.Tensor], other: Any) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], torch.as_tensor(other[name])) for name in one)


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_is_what_its_processor_makes_of_it(family: str) -> None:
    """Another size, normalisation or special token than in pretraining costs quality and raises nothing."""
    reader, columns = reader_for(family), columns_for(family)
    for value in columns[0]:
        batch = reader.collate(rows_of(reader.encode([[value]])))
        assert same(batch, reader.processor(value, return_tensors="pt"))
        assert set(batch) == set(reader.input_names)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_bpe_tokenizer(), tiny_unigram_tokenizer()])
@pytest.mark.parametrize("columns", [TEXTS, PAIRS, WORDS], ids=["texts", "pairs", "words"])
def test_texts_in_a_batch_are_padded_as_by_the_tokenizer(tokenizer: Any, columns: list[list[Any]]) -> None:
    reader = reader_of(tokenizer)
    batch = reader.collate(rows_of(reader.encode(columns)))
    texts = TEXTS if columns is WORDS else columns
    assert same(batch, tokenizer(*texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows_in_any_order(family: str) -> None:
    """Answers must not depend on who stands beside a row."""
    reader = reader_for(family)
    rows = rows_of(reader.encode(columns_for(family)))
    forward, backward = reader.collate(rows), reader.collate(rows[::-1])
    assert same({name: tensor.flip(0) for name, tensor in backward.items()}, forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_reader_is_the_same(family: str, tmp_path: Path) -> None:
    """What opens with other sizes, sides or tokens answers a little worse, and a cache of its answers lies."""
    reader, columns = reader_for(family, 12), columns_for(family)
    reader.save(tmp_path)
    again = load_reader(tmp_path, 12)
    assert type(again) is type(reader)
    assert again.digest() == reader.digest()
    assert again.reads_as(reader)
    assert again.preprocessing == reader.preprocessing
    assert same(again.collate(rows_of(again.encode(columns))), reader.collate(rows_of(reader.encode(columns))))


@pytest.mark.parametrize("family", FAMILIES)
def test_made_up_rows_run_through_the_encoder(family: str) -> None:
    """An export is traced, and checked, with them: of a wrong shape they would be refused, or prove nothing."""
    reader, encoder = reader_for(family), tiny_encoder(family)
    batch = reader.example(3, length=7, padding=2)
    assert set(batch) == set(reader.input_names)
    assert all(len(tensor) == 3 for tensor in batch.values())
    with torch.no_grad():
        assert encoder(**taken_by(encoder, batch)).last_hidden_state.isfinite().all()
    assert same(reader.example(3, length=7, padding=2), batch)
    main = reader.input_names[0]
    assert not torch.equal(reader.example(3, length=7, padding=2, seed=1)[main], batch[main])


@pytest.mark.parametrize("family", FAMILIES)
def test_given_samples_can_be_read(family: str) -> None:
    reader = reader_for(family)
    samples = reader.samples()
    assert reader.collate(rows_of(reader.encode(reader.columns(samples))))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_reading_changes_no_digest(family: str) -> None:
    """A fast tokenizer notes how it cut and padded last: a cache that hung on that would be made again and again."""
    reader = reader_for(family, 6)
    before = reader.digest(), Hasher.hash(reader)
    reader.collate(rows_of(reader.encode(columns_for(family))))
    assert (reader.digest(), Hasher.hash(reader)) == before


def test_what_changes_inputs_changes_the_digest() -> None:
    """A cache of another reader's answers would be taken for this one's."""
    larger = tiny_image_processor()
    larger.size = {"height": 2 * IMAGE_SIZE, "width": 2 * IMAGE_SIZE}
    readers = [
        reader_of(tiny_tokenizer(), 16),
        reader_of(tiny_tokenizer(), 17),
        reader_of(tiny_tokenizer("roberta"), 16),
        reader_of(tiny_bpe_tokenizer(), 16),
        reader_of(tiny_unigram_tokenizer(), 16),
        *(reader_for(family) for family in IMAGE_FAMILIES),
        reader_of(larger),
    ]
    assert len({reader.digest() for reader in readers}) == len(readers)


def test_readers_of_one_vocabulary_read_alike() -> None:
    """A teacher that reads as its student does is asked while it trains, on the student's own inputs."""
    bert, image = reader_of(tiny_tokenizer(), 16), reader_for("vit")
    assert bert.reads_as(reader_of(tiny_tokenizer(), 32))
    assert bert.reads_as(reader_of(tiny_tokenizer("roberta")))
    assert image.reads_as(reader_for("vit"))
    assert not image.reads_as(reader_for("dinov2"))
    assert not bert.reads_as(reader_of(tiny_bpe_tokenizer()))
    assert not bert.reads_as(image)
    assert not image.reads_as(bert)


# ------------------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (["the fox sleeps"], "[CLS] the fox sleeps [SEP]"),
        ([{"text": "the fox sleeps"}], "[CLS] the fox sleeps [SEP]"),
        ([["the", "fox", "sleeps"]], "[CLS] the fox sleeps [SEP]"),
        ([("the fox", "the owl sleeps")], "[CLS] the fox [SEP] the owl sleeps [SEP]"),
        ([{"text": "the fox", "text_pair": "the owl sleeps"}], "[CLS] the fox [SEP] the owl sleeps [SEP]"),
        ([(["the", "fox"], ["the", "owl", "sleeps"])], "[CLS] the fox [SEP] the owl sleeps [SEP]"),
    ],
)
def test_texts_words_and_pairs_are_encoded(samples: list[Any], expected: str) -> None:
    reader = reader_of(tiny_tokenizer(), 32)
    encoded = reader.encode(reader.columns(samples))
    assert tiny_tokenizer().decode(encoded["input_ids"][0]) == expected
    assert sum(encoded["token_type_ids"][0]) == (4 if "owl" in expected else 0)


def test_texts_are_cut_at_the_maximal_length() -> None:
    encoded = reader_of(tiny_tokenizer(), 5).encode([["the fox sleeps near the market"]])
    assert tiny_tokenizer().decode(encoded["input_ids"][0]) == "[CLS] the fox sleeps [SEP]"


@pytest.mark.parametrize("text", ["the  salmon waits", ["the", "salmon", "waits"]])
def test_words_of_texts_know_their_tokens(text: Any) -> None:
    """Labels of words stand at their first piece; counted otherwise they would all slip."""
    reader = reader_of(tiny_tokenizer())
    found = reader.encode(reader.columns([text]), words=True)
    pieces = tiny_tokenizer().convert_ids_to_tokens(found["input_ids"][0])
    assert pieces == ["[CLS]", "the", "sa", "##lmon", "waits", "[SEP]"]
    assert found[WORD_IDS] == [[None, 0, 1, 1, 2, None]]


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_bpe_tokenizer, tiny_unigram_tokenizer])
def test_a_text_is_read_alike_whoever_reads_it(make: Any) -> None:
    """As transformers' own pipelines read it; a byte-level BPE takes the space before a word for a part of it."""
    tokenizer = make()
    reader = reader_of(tokenizer)
    for words in tiny_token_rows(20)["tokens"]:
        text = " ".join(words)
        plain = tokenizer(text)["input_ids"]
        for given in (text, words, tuple(words), np.array(words)):
            for asked in (False, True):
                found = reader.encode([[given]], words=asked)
                assert found["input_ids"][0] == plain
        owners = reader.encode([[words]], words=True)[WORD_IDS][0]
        assert owners[0] is owners[-1] is None
        for number, word in enumerate(words):
            own = [token for token, owner in zip(plain, owners, strict=True) if owner == number]
            if tokenizer.unk_token_id not in own:
                assert tokenizer.decode(own).strip() == word


def test_a_saved_tokenizer_tells_nothing_of_what_it_read(tmp_path: Path) -> None:
    """Files of an interrupted run would differ from those of another."""
    reader = reader_of(copy.deepcopy(tiny_tokenizer()), 8)
    for number in range(3):
        reader.save(tmp_path / str(number))
        reader.collate(rows_of(reader.encode([["the fox", "the salmon waits near the market"]])), 8 * number or None)
    files = sorted(path.name for path in (tmp_path / "0").iterdir())
    for name in files:
        assert len({(tmp_path / str(number) / name).read_bytes() for number in range(3)}) == 1


def test_words_that_become_no_token_keep_their_place() -> None:
    """Later labels would shift by one."""
    reader = reader_of(tiny_tokenizer())
    found = reader.encode([[["the", "", "salmon", "\u200b", "waits", "\ufe0f"]]], words=True)
    assert found[WORD_IDS] == [[None, 0, 2, 2, 4, None]]


@pytest.mark.parametrize(
    ("row", "found"), [(None, "None"), (3, "3"), (["the", None], "None among its words"), ({"text": "a"}, "{'text'")]
)
def test_what_is_no_text_is_refused(row: Any, found: str) -> None:
    """A tokenizer reads the keys of a record as words."""
    with pytest.raises(DataError, match=re.escape(f"expected a text or a list of words, found {found}")):
        reader_of(tiny_tokenizer()).encode([["the fox", row]])


def test_tokens_say_where_they_begin() -> None:
    encoded, starts = reader_of(tiny_tokenizer()).encode_with_starts([["the salmon"]])
    assert encoded["input_ids"] == reader_of(tiny_tokenizer()).encode([["the salmon"]])["input_ids"]
    assert starts == [[None, (0, 0), (0, 4), (0, 6), None]]
    assert reader_for("vit").encode_with_starts(IMAGES)[1] is None


@pytest.mark.parametrize(("limit", "wanted", "expected"), [(64, 16, 16), (64, None, 64), (10**30, None, 512)])
def test_maximal_length(limit: int, wanted: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.model_max_length == MAX_LENGTH
    monkeypatch.setattr(tokenizer, "model_max_length", limit)
    assert max_length_of(tokenizer, wanted) == expected
    reader = reader_of(tokenizer, wanted)
    assert (reader.max_length, reader.own_limit) == (expected, limit if limit < 10**6 else None)
    assert reader.preprocessing == {"max_length": expected}
    assert reader.limited(9).max_length == 9
    assert reader.limited(9).limited(None).max_length == min(limit, 512)


def test_nothing_is_padded_where_that_is_asked_for() -> None:
    """Padding is skipped by some runtimes, and would be timed as if it were text."""
    found = reader_of(tiny_tokenizer(), 20).unpadded(["the fox", ["the", "owl"], ("a fox", "an owl"), ""], 11)
    assert {name: array.shape for name, array in found.items()} == dict.fromkeys(found, (4, 11))
    assert found["attention_mask"].all()
    assert (found["input_ids"] != tiny_tokenizer().pad_token_id).all()
    assert reader_of(tiny_tokenizer(), 7).unpadded(["the fox"], 11)["input_ids"].shape == (1, 7)


def test_the_last_made_up_row_is_shorter() -> None:
    batch = reader_of(tiny_tokenizer()).example(2, length=5, padding=2)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert ((batch["input_ids"] == tiny_tokenizer().pad_token_id) == (batch["attention_mask"] == 0)).all()
    assert reader_of(tiny_tokenizer()).example(2)["attention_mask"].all()


# ----------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_every_mode_become_three_channels(mode: str) -> None:
    image = IMAGES[0][0].convert(mode)
    encoded = reader_for("vit").encode([[image, image.convert("RGB")]])["pixel_values"]
    assert encoded[0].shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert np.array_equal(encoded[0], encoded[1])


def test_red_is_the_first_channel() -> None:
    encoded = reader_for("vit").encode([[Image.new("RGB", (40, 40), (255, 0, 0))]])
    assert encoded["pixel_values"][0].mean(axis=(1, 2)).tolist() == [1.0, -1.0, -1.0]


def test_the_side_of_the_input_is_noted_where_there_is_one() -> None:
    assert reader_for("vit").preprocessing == {"image_size": IMAGE_SIZE}
    assert reader_for("dinov2").preprocessing == {}
    assert reader_for("vit").max_length is None
    assert reader_for("vit").limited(5).max_length is None


# --------------------------------------------------------------------------------------------------------- choosing


def test_a_saved_folder_notes_what_makes_its_pixels(tmp_path: Path) -> None:
    """Where another library is installed too, transformers takes that one: pixels differ by a step here and there."""
    processor = tiny_image_processor()
    reader = reader_of(processor)
    processor.save_pretrained(tmp_path)  # as a Trainer does
    config = tmp_path / "preprocessor_config.json"
    assert json.loads(config.read_text())["image_backend"] == "pil"
    again = load_reader(tmp_path)
    assert again.processor.backend == "pil"
    assert again.digest() == reader.digest()


@pytest.mark.skipif(is_torchvision_available(), reason="what is not installed cannot be missed")
@pytest.mark.filterwarnings("ignore:.*requires the Torchvision")
def test_pixels_of_a_library_that_is_missing_are_refused(tmp_path: Path) -> None:
    """transformers says a word in the log, and reads other pixels."""
    reader_of(tiny_image_processor()).save(tmp_path)
    config = tmp_path / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"pil"', '"torchvision"'))
    with pytest.raises(ArtifactError, match=r"expected torchvision, .* found pil, .*; install torchvision, or change"):
        load_reader(tmp_path)
    with pytest.raises(ArtifactError, match="expected torchvision"):
        saved_reader(AutoImageProcessor.from_pretrained(tmp_path))


def test_an_encoder_with_both_is_read_as_its_tasks_want(tmp_path: Path) -> None:
    """The towers of CLIP come with a tokenizer and an image processor."""
    tiny_tokenizer("clip_text").save_pretrained(tmp_path)
    tiny_image_processor("clip_vision").save_pretrained(tmp_path)
    text = pretrained_reader(str(tmp_path), ["text", "text"], max_length=9)
    image = pretrained_reader(str(tmp_path), ["image"], image_size=16)
    assert (text.max_length, text.input_names) == (9, ("input_ids", "attention_mask"))
    assert image.encode(IMAGES)["pixel_values"][0].shape == (3, 16, 16)
    assert image.preprocessing == {"image_size": 16}


# ----------------------------------------------------------------------------------------------------- encoded rows


@pytest.mark.parametrize("family", TEXT_FAMILIES[:1] + IMAGE_FAMILIES[:1])
def test_encoded_rows_are_known_without_a_reader(family: str) -> None:
    """Rows that a user encoded, whose tokenizer was never given."""
    reader = reader_for(family)
    encoded = reader.encode([columns_for(family)[0][:1] * 2])
    rows = rows_of(encoded)
    assert are_encoded(list(encoded))
    assert not are_encoded(["text", "image", "label"])
    assert input_columns([*encoded, "labels", "text"]) == list(encoded)
    assert same(collate_inputs(rows), collate_inputs(rows, reader))
    assert lengths_of(encoded) == lengths_of(Dataset.from_list(rows))
    assert (lengths_of(encoded) is None) == (family in IMAGE_FAMILIES)


def test_inputs_that_a_reader_does_not_know_are_stacked_beside_its_own() -> None:
    """Rows of a joint encoder that somebody encoded, with a tokenizer to pad their texts."""
    rows = [{"input_ids": [2, 3], "pixel_values": np.zeros((3, 2, 2))}, {"input_ids": [2], "pixel_values": [[[1.0]]]}]
    rows[1]["pixel_values"] = np.ones((3, 2, 2))
    batch = collate_inputs(rows, reader_of(tiny_tokenizer()))
    assert batch["input_ids"].tolist() == [[2, 3], [2, 1]]
    assert batch["pixel_values"].sum((1, 2, 3)).tolist() == [0.0, 12.0]


def test_positions_that_count() -> None:
    ids, mask = torch.tensor([[2, 3], [2, 1]]), torch.tensor([[1, 1], [1, 0]])
    assert positions_of({"labels": ids, "input_ids": ids, "attention_mask": mask}) is mask
    assert positions_of({"labels": ids, "input_ids": ids}).tolist() == [[1, 1], [1, 1]]
    assert positions_of({"pixel_values": torch.zeros(2, 3, 4, 4)}).tolist() == [1, 1]
    assert padded_length({"input_ids": ids}) == 2
    assert padded_length({"pixel_values": torch.zeros(2, 3, 4, 4)}) is None


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("family", "samples", "message"),
    [
        ("bert", ["the fox", ["the", "owl"]], r"all of one kind, found \['list', 'str'\]"),
        ("bert", [3], r"found \['int'\]; convert the inputs"),
        ("bert", [("the fox",)], r"found \['tuple'\]"),
        ("bert", [IMAGES[0][0]], "expected texts, lists of words"),
        ("bert", [{"sentence": "the fox"}], r"expected the keys text and perhaps text_pair, found \['sentence'\]"),
        ("vit", ["the fox"], "expected a picture at 'the fox', found no file"),
        ("vit", [*IMAGES[0][:1], None], r"expected a picture \(a path, bytes, .*\), found NoneType"),
    ],
)
def test_samples_of_another_kind_are_refused(family: str, samples: list[Any], message: str) -> None:
    reader = reader_for(family)
    with pytest.raises(DataError, match=message):
        reader.encode(reader.columns(samples))


def test_what_reads_neither_is_refused() -> None:
    with pytest.raises(DataError, match="expected a tokenizer or image processor, found int; pass one of them"):
        reader_of(3)


def test_folders_without_a_reader_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected a tokenizer or image processor in .*, found nothing"):
        load_reader(tmp_path)
    with pytest.raises(ArtifactError, match="of a pretrained encoder with its tokenizer, found"):
        pretrained_reader(str(tmp_path), ["text"])
    with pytest.raises(ArtifactError, match="of a pretrained encoder with its image processor, found"):
        pretrained_reader(str(tmp_path), ["image"])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"(?s)found one that does not .*; save it again"):
        load_reader(tmp_path)


def test_rows_of_unequal_length_need_a_reader() -> None:
    with pytest.raises(DataError, match=r"one size for 'input_ids', found \[\(1,\), \(2,\)\]; pass processing_class"):
        collate_inputs([{"input_ids": [2, 3]}, {"input_ids": [2]}])


@pytest.mark.parametrize("rows", [[("a", "b"), (["a"], ["b"])], [(("a", "b"), ("c", "d"))]], ids=["mixed", "nested"])
def test_pairs_are_of_one_kind(rows: list[Any]):
    """They would fail inside the tokenizer, with a message about its own arguments."""
    with pytest.raises(DataError, match="all of one kind"):
        reader_of(tiny_tokenizer("bert")).columns(rows)


def test_a_tuple_of_words_under_a_key_is_one_text():
    assert reader_of(tiny_tokenizer("bert")).columns([{"text": ("wake", "me")}]) == [[["wake", "me"]]]


def test_one_row_needs_no_token_that_pads():
    """A pipeline of a model that was never given one answered before."""
    tokenizer = copy.deepcopy(tiny_bpe_tokenizer())  # others use it, too
    tokenizer.pad_token = None
    reader = reader_of(tokenizer)
    (row,) = rows_of(reader.encode([["a fox"]]))
    assert reader.collate([row])["input_ids"].tolist() == [row["input_ids"]]


def test_what_is_no_reader_is_let_through_where_rows_are_encoded():
    """A script may pass its feature extractor or processor on to callbacks and the hub."""
    assert reader_if_known(None) is None
    assert reader_if_known(object()) is None
    assert isinstance(reader_if_known(tiny_tokenizer("bert"), 7), Reader)
