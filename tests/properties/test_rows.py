"""Rows of every kind of task: read as they stand in the file, by training and prediction, or refused by number."""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.cover import cover
from support.task_rows import KINDS, builders, make_rows, write_task

from peft_lab.data.prediction_inputs import input_columns, read_inputs
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind as kind_of
from peft_lab.errors import PeftLabError, TaskError
from peft_lab.loading.load_run import load_base
from peft_lab.registry import list_kinds
from peft_lab.utils.images import open_image

EACH = pytest.mark.parametrize(("kind", "builder"), builders())


def each_way(case: tuple[Any, ...]) -> set[Any]:
    """Every column of a kind with every value, and every builder of a kind."""
    kind, builder, column, value = case
    return {(kind, column, str(value)), (kind, builder)}


#: Texts that a reader could take for numbers, dates, truth values or missing ones.
HARD = [
    *["0100.50", "00", "1e5", "1_000", "+7", "9" * 30, "Infinity", "2024-01-01", "2024-01-01 10:00:00Z", "12:30"],
    *[
        "True",
        "false",
        "NA",
        "N/A",
        "null",
        "None",
        "nan",
        "NaN",
        "-",
        " x ",
        'a "b"',
        "a,b",
        "a;b\tc",
        "x\ny",
        "é\u2028x",
    ],
]


def splits_of(task: Any) -> Any:
    return load_splits(task.model_copy(update={"validation_fraction": 0.25}))


def test_every_kind_of_task_is_tested_here() -> None:
    # sounds, masks and point clouds are no cells of texts, and have tests of their own
    others = {"audio_classification", "image_segmentation", "point_cloud_classification"}
    assert {*KINDS, *others} == set(list_kinds())


@EACH
def test_training_and_prediction_read_what_stands_in_the_file(kind: str, builder: str, tmp_path: Path) -> None:
    rows = make_rows(kind, 2 * len(HARD))
    for index, row in enumerate(rows):
        row |= {name: HARD[(index + shift) % len(HARD)] for shift, name in enumerate(KINDS[kind].texts)}
    task, path = write_task(tmp_path, kind, builder, rows)
    splits = splits_of(task)
    names = {source: name for name, source in task.columns.items()}
    texts = KINDS[kind].texts
    written = sorted(tuple(row[name] for name in texts) for row in rows)
    columns = [[*splits.train[names[name]], *splits.validation[names[name]]] for name in texts]
    assert sorted(zip(*columns, strict=True)) == (written if texts else [])
    assert splits.labels == KINDS[kind].labels
    if not builder.startswith("metadata"):
        inputs = [input_columns(row, task, 1) for row in read_inputs([str(path)])]
        wanted = [tuple(row[name] for name in KINDS[kind].inputs) for row in rows]
        # a single column is the input itself
        read = [{names[KINDS[kind].inputs[0]]: row} if isinstance(row, str) else row for row in inputs]
        assert [tuple(row[names[name]] for name in KINDS[kind].inputs) for row in read] == wanted


def spoils() -> list[tuple[str, str, str, Any]]:
    """Kind, builder, column and value of each way to leave a cell empty."""
    found = []
    for name, builder in builders():
        label = KINDS[name].label
        for column in filter(None, (*KINDS[name].texts, label)):
            values = ["", "  "] if builder.endswith(("csv", "tsv")) else ["", "  ", None]
            if column == label and KINDS[name].blank_answers:
                values = [value for value in values if value is None]
            found += [(name, builder, column, value) for value in values]
            if builder.endswith(("json", "jsonl")):
                found.append((name, builder, column, KeyError))
    return found


@pytest.mark.parametrize(("kind", "builder", "column", "value"), cover(spoils(), each_way))
def test_empty_cells_are_refused_or_dropped_by_number(
    kind: str, builder: str, column: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(kind)
    for index in (2, 7):
        rows[index][column] = value
        if value is KeyError:
            del rows[index][column]
    task, path = write_task(tmp_path, kind, builder, rows)
    with pytest.raises(TaskError, match=r"2 train rows have .*\(rows 3, 8 of 40\).*empty_rows: drop") as raised:
        splits_of(task)
    assert "\n" not in str(raised.value)
    dropping = task.model_copy(update={"empty_rows": "drop"})
    splits = splits_of(dropping)
    assert len(splits.train) + len(splits.validation) == 38
    assert "2 rows are left out" in caplog.text
    if column in KINDS[kind].inputs:
        processor, model = backbone(kind, tmp_path)
        read = read_inputs([str(path)])
        with pytest.raises(PeftLabError, match=r"rows 3, 8|Row 3|input 3"):
            kind_of(kind).predict(
                model, processor, [input_columns(row, task, i + 1) for i, row in enumerate(read)], task
            )
    keeping = task.model_copy(update={"empty_rows": "keep"})
    can_keep = column != KINDS[kind].label and (kind == "causal_lm" or value in ("", "  "))
    can_keep = can_keep and KINDS[kind].keeps_blank
    if can_keep:
        assert len(splits_of(keeping).train) == 30
        assert "they are kept" in caplog.text
    else:
        with pytest.raises(TaskError, match="rows 3, 8"):
            splits_of(keeping)


@lru_cache
def _saved(kind: str, folder: Path) -> Path:
    return KINDS[kind].backbone(folder / "backbone")


_MODELS: dict[str, Any] = {}


def backbone(kind: str, folder: Path) -> Any:
    """Processor and model of a kind, made once."""
    if kind not in _MODELS:
        task, _ = write_task(folder / "unused", kind, KINDS[kind].builders[0], make_rows(kind))
        _MODELS[kind] = load_base(kind_of(kind), task, KINDS[kind].labels, str(_saved(kind, folder)))
    return _MODELS[kind]


def long_texts() -> list[tuple[str, str]]:
    """Kind and column of each text that loses its end over the limit."""
    cutting = {name: rows for name, rows in KINDS.items() if rows.cuts and "max_length" in list_kinds()[name].settings}
    return [(name, column) for name, rows in cutting.items() for column in rows.texts]


@pytest.mark.parametrize(("kind", "column"), long_texts())
def test_rows_over_the_limit_are_counted_by_their_number_in_the_file(
    kind: str, column: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(kind)
    rows[6][column] = "rain " * 200
    rows[31][column] = "snow " * 300
    processor, model = backbone(kind, tmp_path)
    task, _ = write_task(tmp_path, kind, "csv", rows, max_length=24, **KINDS[kind].limits)
    task = task.model_copy(update={"max_new_tokens": 2})
    splits = splits_of(task)
    for part in (splits.train, splits.validation):
        held = [row for row in (6, 31) if rows[row]["sentence"] in part[_name(task, "sentence")][:]]
        caplog.clear()
        ready = kind_of(kind).preprocess(part, processor, task, model)
        longest = max(len(ids) for ids in _tokens(ready))
        assert longest == 24 if held else longest < 24
        for row in held:
            assert str(row + 1) in caplog.text.partition("(row")[2].partition(")")[0]
        assert (': raise "max_' in caplog.text) == bool(held)
    if column in KINDS[kind].inputs:
        caplog.clear()
        # a prediction of masks needs one in each text
        for row in rows:
            row[column] = f"[MASK] {row[column]}"
        inputs = [input_columns(row, task, 1) for row in rows[:10]]
        kind_of(kind).predict(model, processor, inputs, task, batch_size=10)
        assert re.search(r"1 inputs \w+ .*longer than the limit", caplog.text)
        assert "(row 7" in caplog.text


def _tokens(rows: Any) -> list[list[int]]:
    """Tokens of all rows, those of each choice, and those of answers that stand apart."""
    columns = [rows[name][:] for name in ("input_ids", "labels") if name in rows.column_names]
    found: list[list[int]] = []
    for ids in (ids for column in columns for ids in column if isinstance(ids, list)):
        found += ids if isinstance(ids[0], list) else [ids]
    return found


def _name(task: Any, source: str) -> str:
    return next(name for name, other in task.columns.items() if other == source)


def test_a_prompt_is_cut_alike_in_training_and_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token and the end of the prompt stay, the answer keeps its end token."""
    rows = make_rows("causal_lm")
    rows[0] |= {"sentence": "the song " * 50, "other": "rain"}
    processor, model = backbone("causal_lm", tmp_path)
    processor = copy.deepcopy(processor)
    processor.bos_token = "[CLS]"
    task, _ = write_task(tmp_path, "causal_lm", "csv", rows, max_length=20)
    ready = kind_of("causal_lm").preprocess(load_splits(task).train, processor, task, model)
    row = next(row for row in ready if len(row["input_ids"]) == 20)
    answer = [label for label in row["labels"] if label != -100]
    assert answer[-1] == processor.eos_token_id
    assert row["input_ids"][0] == processor.bos_token_id
    seen: dict[str, Any] = {}
    monkeypatch.setattr(model, "generate", lambda **batch: seen.update(batch) or batch["input_ids"])
    kind_of("causal_lm").predict(model, processor, [rows[0]], task.model_copy(update={"max_new_tokens": 2}))
    first, *prompt = row["input_ids"][: -len(answer)]
    predicted = seen["input_ids"][0].tolist()
    assert len(predicted) == 20
    assert predicted[0] == first
    assert predicted[-len(prompt) :] == prompt


RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
EVEN = ((RAMP.astype(np.int64) + 128) // 257).astype(np.uint8)


def picture(form: str) -> tuple[Image.Image, str, np.ndarray | None]:
    """Image of a form, its ending, and its right grey values; None where it is refused."""
    grey = Image.fromarray(EVEN)
    if form == "F":
        return Image.fromarray(RAMP.astype(np.float32)), "tiff", None
    if form == "I":
        return Image.fromarray(RAMP.astype(np.int32)), "tiff", None
    if form.startswith("I;16"):
        big_endian = form.endswith("B")
        values = RAMP.astype(">u2") if big_endian else RAMP
        return Image.frombytes(form, (32, 32), values.tobytes()), "tiff" if big_endian else "png", EVEN
    if form == "turned":
        return grey.transpose(Image.Transpose.ROTATE_90), "turned.png", EVEN
    return grey.convert(form), "tiff" if form == "CMYK" else "png", np.asarray(grey.convert(form).convert("L"))


@pytest.mark.parametrize("form", ["I;16", "I;16B", "I", "F", "L", "1", "P", "RGBA", "LA", "CMYK", "turned"])
def test_training_and_prediction_see_the_same_pixels(form: str, tmp_path: Path) -> None:
    image, ending, wanted = picture(form)
    rows = make_rows("image_classification")
    task, _ = write_task(tmp_path, "image_classification", "metadata.jsonl", rows)
    options: dict[str, Any] = {}
    if form == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    for index in range(40):
        (tmp_path / f"{index}.png").unlink()
        image.save(tmp_path / f"{index}.{ending}", **options)
    for line in (path := tmp_path / "metadata.jsonl").read_text().splitlines()[:1]:
        path.write_text(path.read_text().replace(".png", f".{ending}") if line else "")
    if wanted is None:
        with pytest.raises(TaskError, match=r"40 train rows have an image that is not to be used: .*0\.tiff"):
            load_splits(task)
        with pytest.raises(TaskError, match="cannot be read as an image"):
            open_image(image)
        return
    trained = np.asarray(load_splits(task).train[0]["image"])
    predicted = np.asarray(open_image(tmp_path / f"0.{ending}"))
    assert (trained == predicted).all()
    assert abs(trained.mean(-1) - wanted).max() <= 1


def test_unreadable_images_and_those_that_lose_something_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows("image_classification")
    task, _ = write_task(tmp_path, "image_classification", "metadata.csv", rows)
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(tmp_path / "4.png")
    frames = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in (0, 99)]
    frames[0].save(tmp_path / "5.png", save_all=True, append_images=frames[1:])
    load_splits(task)
    assert "1 train rows have a transparent image" in caplog.text
    assert "1 train rows have an image of several frames, of which the first is taken (row 6 of 40)" in caplog.text
    whole = (tmp_path / "7.png").read_bytes()
    (tmp_path / "7.png").write_bytes(b"no image")
    with pytest.raises(
        TaskError, match=r"1 train rows have an image that is not to be used: .*7\.png.*\(row 8 of 40\)"
    ):
        load_splits(task)
    (tmp_path / "7.png").write_bytes(whole[:60])
    for part in (splits := splits_of(task)).train, splits.validation:
        place = [row for row, path in enumerate(paths(part)) if path.endswith("/7.png")]
        for row in place:
            with pytest.raises(TaskError, match=r'7\.png" cannot be read as an image'):
                part[row]["image"]
    (tmp_path / "7.png").unlink()
    with pytest.raises(
        TaskError, match=r"1 of 40 rows name no image file beside it \(row 8; the first has \"7\.png\"\)"
    ):
        load_splits(task)


def paths(dataset: Any) -> list[str]:
    from datasets import Image as Feature

    return [value["path"] for value in dataset.cast_column("image", Feature(decode=False))["image"]]
