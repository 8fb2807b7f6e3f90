"""Real but tiny models, tokenizers, image processors and rows, made on the spot and seeded.

Nothing is downloaded and nothing is mocked: every class here is the one that a user's checkpoint has, three layers deep
and 32 wide. The rows follow rules that a tiny model learns in a few dozen steps.
"""

import random
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PillowImage
from transformers import (
    AutoConfig,
    AutoModel,
    BertTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaTokenizer,
    ViTImageProcessorPil,
    XLMRobertaTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.image_processing_utils import BaseImageProcessor

TEXT_FAMILIES = ["bert", "roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert", "clip_text"]
IMAGE_FAMILIES = ["vit", "dinov2", "clip_vision"]
FAMILIES = TEXT_FAMILIES + IMAGE_FAMILIES

HIDDEN = 32
HEADS = 4
LAYERS = 3
FEED_FORWARD = 64
IMAGE_SIZE = 32
MAX_LENGTH = 64
_VOCABULARY = 160

_MODEL_TYPES = {"clip_text": "clip_text_model", "clip_vision": "clip_vision_model"}
_WITH_TOKEN_TYPES = {"bert", "electra", "deberta-v2"}

_FEELINGS = {
    "bad": ["sad", "angry", "grim", "broken", "bitter"],
    "plain": ["grey", "round", "wooden", "quiet", "flat"],
    "good": ["happy", "bright", "lovely", "kind", "golden"],
}
_FEELING_VALUE = {"bad": -1.0, "plain": 0.0, "good": 1.0}
_STRENGTHS = {"slightly": 1.0, "": 2.0, "very": 3.0}
_ANIMALS = ["fox", "owl", "horse", "beetle", "salmon", "heron"]
_VERBS = ["sleeps", "waits", "runs", "sings"]
_PLACES = [["old", "barn"], ["deep", "river"], ["forest"], ["market", "square"]]
_COLOURS = ["red", "green", "blue"]

FEELING_LABELS = ("bad", "plain", "good")
TAG_LABELS = ("O", "B-animal", "B-place", "I-place")
COLOUR_LABELS = ("red", "green", "blue")


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Configuration of a tiny encoder of `family`, dropout off; `overrides` are fields of that family's config."""
    # Ids as in tiny_tokenizer; MPNet has the padding id 1 built in, so everybody has it.
    text = {
        "vocab_size": len(tiny_tokenizer()),
        "pad_token_id": 1,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    shape = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": FEED_FORWARD,
    }
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    image = {"image_size": IMAGE_SIZE, "patch_size": 8}
    match family:
        case "bert" | "electra":
            settings = {**text, **shape, **no_dropout, "type_vocab_size": 2, "max_position_embeddings": MAX_LENGTH}
            if family == "electra":
                settings["embedding_size"] = 16
        case "roberta" | "mpnet":
            settings = {**text, **shape, **no_dropout, "max_position_embeddings": MAX_LENGTH + 2}
        case "distilbert":
            settings = {
                **text,
                "dim": HIDDEN,
                "n_heads": HEADS,
                "n_layers": LAYERS,
                "hidden_dim": FEED_FORWARD,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "seq_classif_dropout": 0.0,
                "max_position_embeddings": MAX_LENGTH,
            }
        case "deberta-v2":
            settings = {
                **text,
                **shape,
                **no_dropout,
                "type_vocab_size": 2,
                "max_position_embeddings": MAX_LENGTH,
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 8,
                "pooler_hidden_size": HIDDEN,
                "pooler_dropout": 0.0,
            }
        case "modernbert":
            settings = {**text, **shape, "max_position_embeddings": MAX_LENGTH, "local_attention": 8}
        case "clip_text":
            settings = {**text, **shape, "max_position_embeddings": MAX_LENGTH, "projection_dim": HIDDEN}
        case "clip_vision":
            settings = {**shape, **image, "projection_dim": HIDDEN}
        case "vit":
            settings = {**shape, **no_dropout, **image}
        case "dinov2":
            del shape["intermediate_size"]
            settings = {**shape, **no_dropout, **image, "mlp_ratio": FEED_FORWARD // HIDDEN}
        case _:
            raise ValueError(f"expected one of {FAMILIES}, found '{family}'")
    return AutoConfig.for_model(_MODEL_TYPES.get(family, family), **{**settings, **overrides})


def tiny_encoder(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny encoder in eval mode; every parameter is random, biases too, so that a wrong cut cannot hide in zeros."""
    return randomize(AutoModel.from_config(tiny_config(family, **overrides)), seed)


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give every parameter of `model` seeded random values; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Norm weights stay near one, biases near zero.
                parameter.copy_(parameter.mean() + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


@cache
def tiny_tokenizer(family: str = "bert") -> BertTokenizer:
    """A fast WordPiece tokenizer of the sentences below, with the inputs that models of `family` take.

    Its vocabulary is written out, not trained: training breaks ties by chance, and then no two processes agree.
    """
    words = sorted({word for sentence, *_ in _sentences(400, random.Random(0)) for word in sentence})
    letters = sorted(set("".join(words)))
    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    for index, word in enumerate(words):
        # Every third word falls into two pieces.
        pieces += [word[:2], f"##{word[2:]}"] if index % 3 == 0 and len(word) > 3 else [word]
    pieces = list(dict.fromkeys(pieces))
    pieces += [f"[unused{index}]" for index in range(_VOCABULARY - len(pieces))]
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return BertTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        model_max_length=MAX_LENGTH,
        model_input_names=names if family in _WITH_TOKEN_TYPES else [name for name in names if "type" not in name],
    )


@cache
def tiny_bpe_tokenizer(*, add_prefix_space: bool = False) -> RobertaTokenizer:
    """A fast byte-level BPE tokenizer of the same sentences, with ids of special tokens as `tiny_config` has them.

    As published, it puts no space before the first word.

    Merges are written out, too: of each word from the left, then of some words from the right, so that ways to the same
    token compete.
    """
    words = sorted({word for sentence, *_ in _sentences(400, random.Random(0)) for word in sentence})
    merges: dict[tuple[str, str], None] = {}
    for index, word in enumerate(words):
        spaced = f"\u0120{word}"
        merges |= dict.fromkeys((spaced[:end], spaced[end]) for end in range(1, len(spaced) if index % 3 else 3))
    for word in words[::3]:
        merges |= dict.fromkeys((word[start], word[start + 1 :]) for start in range(len(word) - 2, 1, -1))
    pieces = ["<unk>", "<pad>", "<s>", "</s>", "<mask>", *bytes_to_unicode().values()]
    pieces = list(dict.fromkeys([*pieces, *(left + right for left, right in merges)]))
    return RobertaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=list(merges),
        model_max_length=MAX_LENGTH,
        add_prefix_space=add_prefix_space,
    )


@cache
def tiny_unigram_tokenizer() -> XLMRobertaTokenizer:
    """A fast Unigram tokenizer of the same sentences; the class has the unknown token built in at id 3.

    Letters, parts of words and words have scores of their own; some letters stand in no piece by themselves.
    """
    words = sorted({word for sentence, *_ in _sentences(400, random.Random(0)) for word in sentence})
    letters = [letter for letter in sorted(set("".join(words))) if letter not in "gw"]
    parts = [word[start : start + 3] for word in words for start in range(len(word) - 2)]
    pieces = [
        "\u2581",
        *letters,
        *parts,
        *(f"\u2581{word}" for word in words),
        *(f"\u2581{word[:2]}" for word in words),
    ]
    pieces = list(dict.fromkeys(pieces))
    generator = random.Random(1)
    scored = [(piece, round(-9.0 + 0.7 * len(piece) - generator.random(), 3)) for piece in pieces]
    special = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=[*special, *scored, ("<mask>", 0.0)], model_max_length=MAX_LENGTH)


def tiny_image_processor(family: str = "vit") -> BaseImageProcessor:
    """The image processor of `family` for 32 x 32 inputs, on the Pillow backend."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    match family:
        case "vit":
            return ViTImageProcessorPil(size=square)
        case "dinov2":
            return BitImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
        case "clip_vision":
            return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
        case _:
            raise ValueError(f"expected one of {IMAGE_FAMILIES}, found '{family}'")


def tiny_inputs(family: str, batch: int = 3, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs of `family`; texts are of unequal length, padded on the right to `length`."""
    generator = torch.Generator().manual_seed(seed)
    if family in IMAGE_FAMILIES:
        return {"pixel_values": torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    # Ids below 5 are special: 1 padding, 2 start, 3 end.
    input_ids = torch.randint(5, len(tiny_tokenizer()), (batch, length), generator=generator)
    attention_mask = torch.ones(batch, length, dtype=torch.long)
    input_ids[:, 0] = 2
    for row in range(batch):
        # The first row is full; every further one is two tokens shorter, down to three.
        end = max(length - 2 * row, min(3, length))
        input_ids[row, end - 1] = 3
        input_ids[row, end:] = 1
        attention_mask[row, end:] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if family in _WITH_TOKEN_TYPES:
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
    return inputs


def tiny_text_rows(n: int, seed: int = 0) -> Dataset:
    """`n` sentences. `label` is the feeling of the adjective, `intensity` (-3..3) its strength with sign, `topics` what
    is named, and `same` says whether the sentence `pair` is about the same animal."""
    generator = random.Random(seed)
    rows: dict[str, list[Any]] = {key: [] for key in ("text", "pair", "label", "intensity", "topics", "same")}
    for words, _, label, intensity, animal in _sentences(n, generator):
        other = animal if generator.random() < 0.5 else generator.choice([a for a in _ANIMALS if a != animal])
        rows["text"].append(" ".join(words))
        rows["pair"].append(f"the {other} {generator.choice(_VERBS)}")
        rows["label"].append(label)
        rows["intensity"].append(intensity)
        rows["topics"].append([topic for topic in ("fox", "river", "market") if topic in words])
        rows["same"].append("yes" if other == animal else "no")
    return Dataset.from_dict(rows)


def tiny_token_rows(n: int, seed: int = 0) -> Dataset:
    """`n` sentences as `tokens` with BIO `tags` of animals and places, and the `label` of the whole sentence."""
    rows: dict[str, list[Any]] = {"tokens": [], "tags": [], "label": []}
    for words, tags, label, *_ in _sentences(n, random.Random(seed)):
        rows["tokens"].append(words)
        rows["tags"].append(tags)
        rows["label"].append(label)
    features = Features({"tokens": List(Value("string")), "tags": List(Value("string")), "label": Value("string")})
    return Dataset.from_dict(rows, features=features)


def tiny_image_rows(n: int, seed: int = 0, side: int = 40) -> Dataset:
    """`n` noisy pictures of `side` x `side` pixels; `label` is the strongest colour, `intensity` (0..1) how strong."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"image": [], "label": [], "intensity": []}
    for _ in range(n):
        channel = int(generator.integers(3))
        strength = float(generator.uniform(0.3, 1.0))
        pixels = generator.uniform(0, 80, (side, side, 3))
        pixels[:, :, channel] += 170 * strength
        rows["image"].append(PillowImage.fromarray(pixels.astype("uint8")))
        rows["label"].append(channel)
        rows["intensity"].append(strength)
    features = Features({"image": Image(), "label": ClassLabel(names=_COLOURS), "intensity": Value("float64")})
    return Dataset.from_dict(rows, features=features)


def _sentences(n: int, generator: random.Random) -> list[tuple[list[str], list[str], str, float, str]]:
    """Words, tags, feeling, signed strength and animal of `n` sentences."""
    sentences = []
    for _ in range(n):
        feeling = generator.choice(FEELING_LABELS)
        strength = generator.choice(list(_STRENGTHS))
        animal = generator.choice(_ANIMALS)
        place = generator.choice(_PLACES)
        words = ["the", *([strength] if strength else []), generator.choice(_FEELINGS[feeling]), animal]
        tags = ["O"] * (len(words) - 1) + ["B-animal"]
        words += [generator.choice(_VERBS), "near", "the", *place]
        tags += ["O", "O", "O", "B-place", *["I-place"] * (len(place) - 1)]
        sentences.append((words, tags, feeling, _FEELING_VALUE[feeling] * _STRENGTHS[strength], animal))
    return sentences
