"""Segmentation: what masks mean, what is refused of them, and that counts of pixels give the metrics."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.kind_rows import make_segmenter
from support.tiny_runs import make_image_backbone
from torch.nn import functional
from transformers import AutoImageProcessor, ConvNextConfig, ConvNextModel

from peft_lab.backbones.token_segmenter import TokenSegmenter
from peft_lab.data.mask_column import read_mask
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.loading.load_run import load_base
from peft_lab.metrics.per_row import jackknife_values
from peft_lab.metrics.predictions import Predictions
from peft_lab.metrics.segmentation import mean_iou, mean_iou_by_row, mean_iou_of, pixel_accuracy, pixel_counts

LABELS = ["ground", "bright", "dark"]
RULE = kind("image_segmentation")


def stored(image: Any, form: str = "PNG", **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, form, **options)
    return {"bytes": file.getvalue(), "path": None}


def mask_of(*values: int, size: tuple[int, int] = (8, 6)) -> np.ndarray:
    """Mask whose rows have the values in turn."""
    width, height = size
    return np.repeat(np.resize(np.array(values, np.uint8), height)[:, None], width, axis=1)


def task(folder: Path, masks: list[Any], **changes: Any) -> Any:
    picture = stored(Image.new("RGB", (8, 6), (90, 90, 90)))
    rows = [{"photo": picture, "classes": mask} for mask in masks]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    values = {
        "name": "squares",
        "kind": "image_segmentation",
        "data": {"builder": "parquet", "files": {"train": "train.parquet", "validation": "train.parquet"}},
        "columns": {"image": "photo", "mask": "classes"},
        "labels": LABELS,
    }
    return parse_task({**values, **changes}, folder / "squares.yaml")


def grey(*values: int) -> dict[str, Any]:
    return stored(Image.fromarray(mask_of(*values)))


# Metrics --------------------------------------------------------------------------------------------------------------


def plain_mean_iou(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> float:
    """By sets of pixels, class by class."""
    found = []
    for value in range(classes):
        right = union = 0
        for predicted, wanted in pairs:
            for p, w in zip(predicted.reshape(-1), wanted.reshape(-1), strict=True):
                if w == 255:
                    continue
                right += p == value and w == value
                union += p == value or w == value
        if union:
            found.append(right / union)
    return sum(found) / len(found)


predicted_values = st.lists(st.integers(0, 4), min_size=6, max_size=6)
true_values = st.lists(st.sampled_from([0, 1, 2, 3, 255]), min_size=6, max_size=6)
masks = st.lists(st.tuples(predicted_values, true_values), min_size=2, max_size=6).filter(
    lambda pairs: all(set(wanted) != {255} for _, wanted in pairs)
)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_mean_iou_is_that_of_a_plain_loop(pairs: list[Any]) -> None:
    arrays = [(np.array(predicted), np.array(wanted)) for predicted, wanted in pairs]
    predictions, references = zip(*arrays, strict=True)
    expected = plain_mean_iou(arrays, 5)
    assert mean_iou(predictions, references) == pytest.approx(expected)
    hits = sum(int(((p == w) & (w != 255)).sum()) for p, w in arrays)
    assert pixel_accuracy(predictions, references) == pytest.approx(
        hits / sum(int((w != 255).sum()) for _, w in arrays)
    )
    counts = np.stack([pixel_counts(p, w, 5) for p, w in arrays])
    assert mean_iou_of(counts.sum(0)) == pytest.approx(expected)
    assert mean_iou_by_row(counts).mean() == pytest.approx(expected)


def test_the_values_of_rows_spread_as_the_jackknife_does() -> None:
    draw = np.random.default_rng(0)
    wanted = draw.integers(0, 4, (60, 400))
    found = np.where(draw.random((60, 400)) < draw.uniform(0.3, 0.9, (60, 1)), wanted, draw.integers(0, 4, (60, 400)))
    counts = np.stack([pixel_counts(p, w, 4) for p, w in zip(found, wanted, strict=True)])
    values = mean_iou_by_row(counts)
    total = counts.sum(0)
    without = np.array([mean_iou_of(total - each) for each in counts])
    jackknife = 60 * mean_iou_of(total) - 59 * without
    assert values.std(ddof=1) == pytest.approx(jackknife.std(ddof=1), rel=0.02)
    assert np.corrcoef(values, jackknife)[0, 1] > 0.999
    columns = {"hits": counts[:, 0].sum(1), "pixels": counts[:, 2].sum(1), "mean_iou": values}
    kept = jackknife_values("pixel_accuracy", Predictions("image_segmentation", columns))
    assert kept is not None
    assert kept[0] == pytest.approx((found == wanted).mean())


def test_logits_are_reduced_to_counts_of_pixels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 12, 10))
    labels[0, :3] = 255
    found = RULE.preprocess_logits_for_metrics((logits, None), labels)
    enlarged = functional.interpolate(logits, size=(12, 10), mode="bilinear").argmax(1).numpy()
    assert found.tolist() == [pixel_counts(p, w, 3).tolist() for p, w in zip(enlarged, labels.numpy(), strict=True)]


# Masks ----------------------------------------------------------------------------------------------------------------


def test_masks_are_grey_values_palette_indices_or_bits() -> None:
    values = mask_of(0, 1, 2, 255)
    palette = Image.fromarray(values)
    palette.putpalette([7, 8, 9] * 256)
    for image in (Image.fromarray(values), palette, Image.fromarray(values.astype(np.uint16))):
        assert read_mask(stored(image)).tolist() == values.tolist()
    assert read_mask(stored(Image.fromarray(values == 1))).tolist() == (values == 1).astype(int).tolist()
    assert read_mask(stored(palette), reduced=True).tolist() == mask_of(255, 0, 1, 255).tolist()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (None, "have no mask"),
        ({"bytes": b"no image", "path": "x.png"}, 'not to be used: "x.png" is no mask'),
        (stored(Image.new("RGB", (8, 6))), r"it has colours \(mode RGB\)"),
        (stored(Image.fromarray(mask_of(0, 1)), "JPEG"), "JPEG changes values"),
        (stored(Image.fromarray(mask_of(0, 1).astype(np.uint16) * 300)), "holds the value 300"),
        (stored(Image.fromarray(mask_of(0, 1, size=(6, 8)))), "has 6 x 8 pixels, its image 8 x 6"),
        (grey(0, 1, 7), "has 7, and there are 3 classes, from 0 on"),
        (grey(255), "without a pixel of any class"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_row(mask: Any, said: str, tmp_path: Path) -> None:
    good = grey(0, 1, 2)
    found = task(tmp_path, [good, good, mask, good])
    with pytest.raises(TaskError, match=rf"1 train rows .*{said}.*\(row 3 of 4\)"):
        load_splits(found)
    assert len(load_splits(found.model_copy(update={"empty_rows": "drop"})).train) == 3


def test_classes_are_named_by_the_task_or_by_the_values_of_the_training_masks(tmp_path: Path) -> None:
    assert load_splits(task(tmp_path, [grey(0, 2)] * 4)).labels == tuple(LABELS)
    free = task(tmp_path, [grey(0, 2)] * 4).model_copy(update={"labels": ()})
    assert load_splits(free).labels == ("0", "1", "2")
    with pytest.raises(TaskError, match="hold no other class than 0; 255 means a pixel that does not count"):
        load_splits(task(tmp_path, [grey(0, 255)] * 4))
    reduced = task(tmp_path, [grey(0, 1, 3)] * 4, reduce_labels=True)
    assert load_splits(reduced).labels == tuple(LABELS)


def test_images_and_masks_of_a_folder_are_pairs_by_name(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / "shots" / part).mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / "shots" / "images" / f"{number}.jpg")
        Image.fromarray(mask_of(0, number % 3)).save(tmp_path / "shots" / "masks" / f"{number}.png")
    files = {"train": "shots", "validation": "shots"}
    columns = {"image": "image", "mask": "mask"}
    found = task(tmp_path, [grey(0)], data={"builder": "maskfolder", "files": files}, columns=columns)
    rows = load_splits(found).train
    assert [Path(row["mask"]["path"]).name for row in rows] == [f"{number}.png" for number in range(4)]
    (tmp_path / "shots" / "images" / "2.jpg").unlink()
    with pytest.raises(TaskError, match=r'1 of 4 files in "masks" have none of the same name in "images".*2\.png'):
        load_splits(found)


def test_images_and_masks_may_be_named_by_a_table(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{number}.jpg")
        Image.fromarray(mask_of(0, 1, 2)).save(tmp_path / f"{number}.png")
    (tmp_path / "rows.csv").write_text("\n".join(["a,b", *[f"{number}.jpg,{number}.png" for number in range(4)]]))
    data = {"builder": "csv", "files": {"train": "rows.csv", "validation": "rows.csv"}}
    found = task(tmp_path, [grey(0)], data=data, columns={"image": "a", "mask": "b"})
    assert load_splits(found).train[0]["image"].size == (8, 6)


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_segmenter(tmp_path_factory.mktemp("segformer") / "base")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_backbone(tmp_path_factory.mktemp("vit") / "base")


def test_masks_lie_on_the_images_that_the_model_sees(segformer: Path, tmp_path: Path) -> None:
    found = task(tmp_path, [grey(0, 1, 2, 255)] * 4)
    processor, model = load_base(RULE, found, LABELS, str(segformer))
    RULE.check_processor(processor, found, model)
    row = RULE.preprocess(load_splits(found).train, processor, found, model)[0]
    assert row["pixel_values"].shape == (3, 32, 32)
    assert row["labels"].dtype == torch.int64
    expected = np.asarray(Image.fromarray(mask_of(0, 1, 2, 255)).resize((32, 32), Image.Resampling.NEAREST))
    assert row["labels"].tolist() == expected.tolist()
    assert model.config.semantic_loss_ignore_index == 255
    assert [*model.config.id2label.values()] == LABELS


def test_a_processor_that_crops_is_set_or_refused(segformer: Path, tmp_path: Path) -> None:
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4)
    ConvNextModel(config).save_pretrained(tmp_path / "convnext")
    processor = AutoImageProcessor.from_pretrained(segformer)
    (tmp_path / "convnext" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875}'
    )
    found = task(tmp_path, [grey(0, 1)] * 4)
    processor, model = load_base(RULE, found, LABELS, str(tmp_path / "convnext"))
    with pytest.raises(ConfigError, match=r'crops or pads images.*set "image_size"'):
        RULE.check_processor(processor, found, model)
    larger = found.model_copy(update={"image_size": 384})
    processor, model = load_base(RULE, larger, LABELS, str(tmp_path / "convnext"))
    RULE.check_processor(processor, larger, model)


def test_predictions_are_masks_of_the_images_size_with_shares(segformer: Path, tmp_path: Path) -> None:
    found = task(tmp_path, [grey(0, 1, 2)] * 4)
    processor, model = load_base(RULE, found, LABELS, str(segformer))
    images = [Image.new("RGB", (50, 30), (200, 10, 10)), Image.new("L", (16, 16), 128)]
    for image, record in zip(images, RULE.predict(model, processor, images, found), strict=True):
        values = np.asarray(record["mask"])
        assert record["mask"].size == image.size
        assert record["shares"] == {LABELS[v]: pytest.approx((values == v).mean()) for v in np.unique(values)}
        assert read_mask(stored(record["mask"])).tolist() == values.tolist(), "a mask can be read as one"


def test_a_linear_head_reads_each_patch_alone(vit: Path) -> None:
    model = TokenSegmenter.from_pretrained(str(vit), num_labels=3)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.backbone(pixels).last_hidden_state[:, 1:]
        expected = functional.linear(tokens, model.classifier.weight[:, :, 0, 0], model.classifier.bias)
        logits = model(pixels).logits
    torch.testing.assert_close(logits.flatten(2).transpose(1, 2), expected)
    assert logits.shape == (2, 3, 4, 4)


def test_backbones_without_patches_are_refused(tmp_path: Path) -> None:
    from support.tiny_runs import make_backbone

    with pytest.raises(ConfigError, match='Model type "bert" has no head for segmentation, and no patches'):
        TokenSegmenter.from_pretrained(str(make_backbone(tmp_path)), num_labels=3)
