"""Tiny rows, task and backbone of each kind of task, for the properties over the kinds.

A kind is one function that gives its rows, and one entry of `KINDS`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from support.properties import DRAWS, FITTED, HEADS, IMAGE_LOGITS, IMAGES, KEEPS_HEAD, SEQUENCE, TEXTS
from support.tiny_runs import (
    FILLERS,
    WORDS,
    make_backbone,
    make_decoder,
    make_encoder_decoder,
    make_image_backbone,
    make_masked_lm,
)

Row = dict[str, Any]

#: Methods that models without a task head refuse; `bayes_prompt` trains a head alone.
WITHOUT_HEAD = (*IMAGES, *KEEPS_HEAD, *DRAWS, *HEADS, "head", "bayes_prompt")
#: Methods that a head over the tokens of a text, the choices of a question or sounds refuses.
OF_OTHER_PARTS = (*IMAGES, *KEEPS_HEAD, *DRAWS, *HEADS)
#: Methods that texts with answers that are no single class refuse.
NOT_BY_CLASS = (*IMAGES, *KEEPS_HEAD, *DRAWS, *FITTED)

#: Rows of each split.
SPLITS = {"train": 16, "validation": 8, "test": 12}


@dataclass(frozen=True)
class KindRows:
    """How a kind of task is tried.

    Attributes:
        keys: its keys of a task file, without name, kind, data and metrics.
        rows: makes some rows by a seed; texts are of different lengths.
        answer: source column of the answer, whose absence is refused.
        inputs: source columns that a prediction is given; alone, its value is the input.
        backbone: writes a tiny backbone to a folder.
        features: makes the types of the columns, where those of the values would be others, such as images.
        refuses: methods that do not go with its inputs or its head, and are refused.
        metrics: metrics to take; None for all of the kind.
        reads_padding: the loss of transformers' head takes padding for possible answers.
        refuses_batches: methods that refuse its first batch, when the run has begun.
    """

    keys: dict[str, Any]
    rows: Callable[[int, int], list[Row]]
    answer: str
    inputs: tuple[str, ...]
    backbone: Callable[[Path], Path]
    features: Callable[[], Any] | None = None
    refuses: tuple[str, ...] = field(default=(*IMAGES, *KEEPS_HEAD, *DRAWS))
    metrics: tuple[str, ...] | None = None
    reads_padding: bool = False
    refuses_batches: tuple[str, ...] = ()


def write_task(folder: Path, name: str, blank: Sequence[int] = (), **changes: Any) -> Path:
    """Task file of a kind with parquet files of its rows beside it.

    Args:
        folder: where to write.
        name: of the entry of `KINDS`.
        blank: numbers of train rows that get no answer.
        changes: further keys of the task.
    """
    from datasets import Dataset

    from peft_lab.registry import kind_info

    folder.mkdir(parents=True, exist_ok=True)
    kind = KINDS[name]
    card = kind_info(kind_of(name))
    for seed, (split, count) in enumerate(SPLITS.items()):
        rows = kind.rows(count, seed)
        for number in blank if split == "train" else ():
            rows[number][kind.answer] = None
        features = kind.features() if kind.features else None
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    values = {
        **{"name": name.replace(" ", "-"), "kind": kind_of(name), **kind.keys},
        "data": {"builder": "parquet", "files": {split: f"{split}.parquet" for split in SPLITS}},
        "metrics": list(kind.metrics or card.metrics_for(kind.keys.get("problem_type", card.problem_type))),
    }
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def kind_of(name: str) -> str:
    """Kind of an entry of `KINDS`, which may have words behind it."""
    return name.partition(" ")[0]


def inputs_of(name: str, rows: Sequence[Row]) -> list[Any]:
    """Inputs of a prediction of rows, by the source's columns or as plain values."""
    chosen = [{column: row[column] for column in KINDS[name].inputs} for row in rows]
    # a file that a row holds is one of its column
    plain = [len(row) == 1 and not isinstance(next(iter(row.values())), dict) for row in chosen]
    return [next(iter(row.values())) if alone else row for row, alone in zip(chosen, plain, strict=True)]


def sentence(draw: random.Random, *topics: str) -> str:
    """Text of a few words, with one of each topic in it."""
    words = [*draw.sample(FILLERS, draw.randint(1, 6)), *(draw.choice(WORDS[topic]) for topic in topics)]
    draw.shuffle(words)
    return " ".join(words)


def picture(draw: random.Random, level: int) -> Any:
    """Image of 24 x 24 pixels of about one level of grey."""
    from PIL import Image

    pixels = bytes(min(max(level + draw.randint(-20, 20), 0), 255) for _ in range(24 * 24 * 3))
    return Image.frombytes("RGB", (24, 24), pixels)


def tone(draw: random.Random, pitch: float) -> bytes:
    """Wave file of a tone with noise, of 40 to 120 ms at 16 kHz."""
    import io

    import numpy as np
    import soundfile

    noise, time = np.random.default_rng(draw.randrange(2**32)), np.arange(draw.randint(640, 1920)) / 16_000
    samples = 0.4 * np.sin(2 * np.pi * pitch * time) + 0.02 * noise.standard_normal(len(time))
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), 16_000, format="WAV")
    return file.getvalue()


def make_audio_backbone(folder: Path) -> Path:
    """Tiny Wav2Vec2 of the form that masks padding."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    from support.backbones import WAVEFORM

    torch.manual_seed(0)
    config = Wav2Vec2Config(**WAVEFORM, feat_extract_norm="layer", do_stable_layer_norm=True, num_labels=5)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


# The kinds ------------------------------------------------------------------------------------------------------------


def text_classification(count: int, seed: int) -> list[Row]:
    draw, topics = random.Random(seed), list(WORDS)
    return [{"sentence": sentence(draw, topics[i % 3]), "topic": topics[i % 3]} for i in range(count)]


def image_classification(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [{"image": picture(draw, (40, 120, 200)[i % 3]), "shade": ("a", "b", "c")[i % 3]} for i in range(count)]


def image_features() -> Any:
    from datasets import Features, Image, Value

    return Features(image=Image(), shade=Value("string"))


def causal_lm(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [{"prompt": sentence(draw, "weather"), "answer": sentence(draw, "music")} for _ in range(count)]


def multi_label(count: int, seed: int) -> list[Row]:
    draw, topics = random.Random(seed), list(WORDS)
    chosen = [draw.sample(topics, i % 3) for i in range(count)]
    return [{"sentence": sentence(draw, *names), "topics": names} for names in chosen]


def image_multi_label(count: int, seed: int) -> list[Row]:
    draw, found = random.Random(seed), []
    for _ in range(count):
        level = draw.randint(20, 230)
        traits = [name for name, holds in (("bright", level > 90), ("grey", 60 < level < 180)) if holds]
        found.append({"image": picture(draw, level), "traits": ",".join(traits)})
    return found


def image_multi_label_features() -> Any:
    from datasets import Features, Image, Value

    return Features(image=Image(), traits=Value("string"))


def chats(count: int, seed: int) -> list[Row]:
    draw, found = random.Random(seed), []
    for number in range(count):
        roles = ("user", "assistant") * (1 + number % 2)
        turns = [{"role": role, "content": sentence(draw, "music")} for role in roles]
        found.append({"messages": turns})
    return found


def pairs(count: int, seed: int) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row["answer"]} for row in causal_lm(count, seed)]


def texts(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [{"sentence": sentence(draw, "weather", "music")} for _ in range(count)]


def masked_texts(count: int, seed: int) -> list[Row]:
    return [{"sentence": f"{row['sentence']} [MASK] today"} for row in texts(count, seed)]


def multiple_choice(count: int, seed: int) -> list[Row]:
    draw, found = random.Random(seed), []
    for index in range(count):
        endings = [sentence(draw, topic) for topic in draw.choices(list(WORDS), k=2 + index % 3)]
        found.append({"question": sentence(draw, "food"), "endings": endings, "right": index % len(endings)})
    return found


def choices_in_columns(count: int, seed: int) -> list[Row]:
    found = []
    for index, row in enumerate(multiple_choice(count, seed)):
        cells = dict(zip("abc", [*row["endings"], "", ""], strict=False))
        found.append({"story": f"the rain {row['question']}", "question": "some", **cells, "right": "AB"[index % 2]})
    return found


def regression(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [{"sentence": sentence(draw, list(WORDS)[i % 3]), "score": i % 3 + draw.random()} for i in range(count)]


def image_regression(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    levels = [draw.randint(20, 230) for _ in range(count)]
    return [{"image": picture(draw, level), "brightness": level / 255} for level in levels]


def image_regression_features() -> Any:
    from datasets import Features, Image, Value

    return Features(image=Image(), brightness=Value("float64"))


def token_classification(count: int, seed: int) -> list[Row]:
    """Words with the topics of some; neighbours of one topic are one entity."""
    draw, topics = random.Random(seed), {word: topic for topic, group in WORDS.items() for word in group}
    found = []
    for number in range(count):
        words = sentence(draw, *draw.sample(list(WORDS), 1 + number % 2)).split()
        tags = [f"B-{topics[word]}" if word in topics else "O" for word in words]
        found.append({"words": words, "ner_tags": tags})
    return found


def spans(count: int, seed: int) -> list[Row]:
    found = []
    for row in token_classification(count, seed):
        text, marked = "", []
        for word, tag in zip(row["words"], row["ner_tags"], strict=True):
            start = len(text)
            text += f"{word}, " if tag != "O" else f"{word} "
            if tag != "O":
                marked.append({"start": start, "end": start + len(word), "label": tag[2:]})
        found.append({"sentence": text.strip(), "entities": marked})
    return found


def question_answering(count: int, seed: int) -> list[Row]:
    """Contexts of up to some forty words, which give several windows."""
    draw, found = random.Random(seed), []
    for number in range(count):
        topic = list(WORDS)[number % 3]
        parts = [sentence(draw) for _ in range(draw.randint(0, 7))]
        parts.insert(draw.randint(0, len(parts)), answer := draw.choice(WORDS[topic]))
        start = len(" ".join([*parts[: parts.index(answer)], ""]))
        answers = {"text": [answer], "answer_start": [start]}
        found.append({"question": f"some {topic}", "context": " ".join(parts), "answers": answers})
    return found


def plain_answers(count: int, seed: int) -> list[Row]:
    found = []
    for row in question_answering(count, seed):
        answers = row.pop("answers")
        found.append({**row, "answer": answers["text"][0], "start": answers["answer_start"][0]})
    return found


def audio_classification(count: int, seed: int) -> list[Row]:
    draw, names = random.Random(seed), ("low", "middle", "high")
    sounds = [tone(draw, 300.0 * 2 ** (i % 3)) for i in range(count)]
    return [{"audio": {"bytes": data, "path": None}, "pitch": names[i % 3]} for i, data in enumerate(sounds)]


def audio_features() -> Any:
    from datasets import Features, Value

    return Features(audio={"bytes": Value("binary"), "path": Value("string")}, pitch=Value("string"))


def image_segmentation(count: int, seed: int) -> list[Row]:
    """A bright and a dark square on grey; a border of pixels does not count."""
    import numpy as np
    from PIL import Image

    draw, rows = np.random.default_rng(seed), []
    for _ in range(count):
        grey, mask = draw.integers(100, 150, (30, 40)), np.zeros((30, 40), dtype=np.uint8)
        for value, level in ((1, 230), (2, 20)):
            top, left = draw.integers(1, 20), draw.integers(1, 30)
            mask[top : top + 9, left : left + 9] = value
            grey[mask == value] = level
        mask[0] = 255
        rows.append({"photo": Image.fromarray(grey.astype(np.uint8)), "classes": Image.fromarray(mask)})
    return rows


def segmentation_features() -> Any:
    from datasets import Features, Image

    return Features(photo=Image(), classes=Image())


def make_segmenter(folder: Path) -> Path:
    """Tiny SegFormer for images of 32 x 32 pixels."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    from support.backbones import SEGFORMER

    torch.manual_seed(0)
    SegformerForSemanticSegmentation(SegformerConfig(**SEGFORMER, num_labels=5)).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def cloud(draw: random.Random, name: str) -> list[list[float]]:
    """Points of a noisy ball, bar or plate, 60 to 90 of them."""
    import numpy as np

    noise = np.random.default_rng(draw.randrange(2**32))
    points = (
        noise.normal(size=(draw.randint(60, 90), 3)) * {"ball": (1, 1, 1), "bar": (9, 1, 1), "plate": (9, 1, 9)}[name]
    )
    return points.astype(np.float32).tolist()


def point_clouds(count: int, seed: int) -> list[Row]:
    draw, names = random.Random(seed), ("ball", "bar", "plate")
    return [{"points": cloud(draw, names[i % 3]), "shape": names[i % 3]} for i in range(count)]


def inline_clouds(count: int, seed: int) -> list[Row]:
    found = []
    for row in point_clouds(count, seed):
        found.append({**row, "points": "\n".join(" ".join(map(repr, point)) for point in row["points"])})
    return found


_SEGMENTATION = {"columns": {"image": "photo", "mask": "classes"}, "labels": ["ground", "bright", "dark"]}

#: A kind that is registered and stands not here fails the tests. Words behind its name tell several entries apart.
KINDS = {
    "text_classification": KindRows(
        {"columns": {"text": "sentence", "label": "topic"}},
        *(text_classification, "topic", ("sentence",), make_backbone),
    ),
    "text_classification of numbers": KindRows(
        {"columns": {"text": "sentence", "label": "score"}, "problem_type": "regression"},
        *(regression, "score", ("sentence",), make_backbone),
        refuses=NOT_BY_CLASS,
    ),
    "image_classification": KindRows(
        {"columns": {"image": "image", "label": "shade"}},
        *(image_classification, "shade", ("image",), make_image_backbone, image_features),
        refuses=(*KEEPS_HEAD, *DRAWS, *TEXTS),
    ),
    "audio_classification": KindRows(
        {"columns": {"audio": "audio", "label": "pitch"}},
        *(audio_classification, "pitch", ("audio",), make_audio_backbone, audio_features),
        refuses=(*OF_OTHER_PARTS, *SEQUENCE, *TEXTS),
    ),
    "point_cloud_classification": KindRows(
        {"columns": {"points": "points", "label": "shape"}, "num_points": 48},
        *(point_clouds, "shape", ("points",), make_image_backbone),
        refuses=(*KEEPS_HEAD, *TEXTS),
    ),
    "point_cloud_classification of lines": KindRows(
        {"columns": {"points": "points", "label": "shape"}, "num_points": 48, "random_rotation": 90.0},
        *(inline_clouds, "shape", ("points",), make_image_backbone),
        refuses=(*KEEPS_HEAD, *TEXTS),
    ),
    "image_segmentation": KindRows(
        _SEGMENTATION,
        *(image_segmentation, "classes", ("photo",), make_segmenter, segmentation_features),
        refuses=(*OF_OTHER_PARTS, *SEQUENCE, *TEXTS),
    ),
    "image_segmentation of patches": KindRows(
        _SEGMENTATION,
        *(image_segmentation, "classes", ("photo",), make_image_backbone, segmentation_features),
        refuses=(*IMAGE_LOGITS, *KEEPS_HEAD, *DRAWS, *HEADS, *TEXTS),
    ),
    "causal_lm": KindRows(
        {"template": {"prompt": "{prompt}", "answer": "{answer}"}, "max_new_tokens": 4},
        *(causal_lm, "answer", ("prompt",), make_decoder),
        metrics=("perplexity", "token_accuracy", "exact_match"),
        refuses=(*WITHOUT_HEAD, *TEXTS),
    ),
    "causal_lm of chats": KindRows(
        {"columns": {"messages": "messages"}, "chat_template": "plain", "max_new_tokens": 4},
        *(chats, "messages", ("messages",), make_decoder),
        metrics=("perplexity", "token_accuracy", "exact_match"),
        refuses=(*WITHOUT_HEAD, *TEXTS),
    ),
    "causal_lm of pairs": KindRows(
        {"columns": {"prompt": "prompt", "completion": "completion"}, "max_new_tokens": 4},
        *(pairs, "completion", ("prompt",), make_decoder),
        metrics=("perplexity", "token_accuracy", "exact_match"),
        refuses=(*WITHOUT_HEAD, *TEXTS),
    ),
    "causal_lm of texts": KindRows(
        {"columns": {"text": "sentence"}, "max_new_tokens": 4},
        *(texts, "sentence", ("sentence",), make_decoder),
        metrics=("perplexity", "token_accuracy"),
        refuses=(*WITHOUT_HEAD, *TEXTS),
        refuses_batches=("iapt",),
    ),
    "seq2seq_lm": KindRows(
        {"columns": {"source": "prompt", "target": "completion"}, "max_new_tokens": 4},
        *(pairs, "completion", ("prompt",), make_encoder_decoder),
        metrics=("perplexity", "token_accuracy", "exact_match"),
        refuses=WITHOUT_HEAD,
    ),
    "masked_lm": KindRows(
        {"columns": {"text": "sentence"}, "line_by_line": True},
        *(masked_texts, "sentence", ("sentence",), make_masked_lm),
        refuses=WITHOUT_HEAD,
    ),
    "multi_label": KindRows(
        {"columns": {"text": "sentence", "labels": "topics"}, "thresholds": "tune"},
        *(multi_label, "topics", ("sentence",), make_backbone),
        refuses=NOT_BY_CLASS,
    ),
    "multi_label of images": KindRows(
        {"columns": {"image": "image", "labels": "traits"}, "thresholds": {"bright": 0.4}, "label_separator": ","},
        *(image_multi_label, "traits", ("image",), make_image_backbone, image_multi_label_features),
        refuses=(*KEEPS_HEAD, *DRAWS, *TEXTS, *FITTED),
    ),
    "multiple_choice": KindRows(
        {"columns": {"question": "question", "choices": "endings", "answer": "right"}},
        *(multiple_choice, "right", ("question", "endings"), make_backbone),
        refuses=OF_OTHER_PARTS,
    ),
    "multiple_choice of columns": KindRows(
        {"columns": {"context": "story", "question": "question", "choices": ["a", "b", "c"], "answer": "right"}},
        *(choices_in_columns, "right", ("story", "question", "a", "b", "c"), make_backbone),
        refuses=OF_OTHER_PARTS,
    ),
    "regression": KindRows(
        {"columns": {"text": "sentence", "label": "score"}},
        *(regression, "score", ("sentence",), make_backbone),
        refuses=NOT_BY_CLASS,
    ),
    "regression of images": KindRows(
        {"columns": {"image": "image", "label": "brightness"}},
        *(image_regression, "brightness", ("image",), make_image_backbone, image_regression_features),
        refuses=(*KEEPS_HEAD, *DRAWS, *TEXTS, *FITTED),
    ),
    "token_classification": KindRows(
        {"columns": {"tokens": "words", "tags": "ner_tags"}},
        *(token_classification, "ner_tags", ("words",), make_backbone),
        refuses=OF_OTHER_PARTS,
    ),
    "token_classification of spans": KindRows(
        {"columns": {"text": "sentence", "spans": "entities"}},
        *(spans, "entities", ("sentence",), make_backbone),
        refuses=OF_OTHER_PARTS,
    ),
    "question_answering": KindRows(
        {
            "columns": {"question": "question", "context": "context", "answers": "answers"},
            **{"max_length": 16, "doc_stride": 4},
        },
        *(question_answering, "answers", ("question", "context"), make_backbone),
        refuses=OF_OTHER_PARTS,
        reads_padding=True,
    ),
    "question_answering of plain answers": KindRows(
        {
            "columns": {"question": "question", "context": "context", "answer": "answer", "answer_start": "start"},
            **{"max_length": 16, "doc_stride": 4},
        },
        *(plain_answers, "answer", ("question", "context"), make_backbone),
        refuses=OF_OTHER_PARTS,
        reads_padding=True,
    ),
}
