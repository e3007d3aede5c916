"""Point clouds of the kind that reads them: what a model gets, how points are chosen, and what is refused."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.tiny_runs import make_image_backbone

from peft_lab.data.prediction_inputs import read_inputs
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import TaskError
from peft_lab.utils.point_clouds import depth_picture, farthest_points, open_cloud, turned

CLOUD = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def saved(cloud: np.ndarray, write: Any = np.save, **names: Any) -> bytes:
    file = io.BytesIO()
    write(file, *([] if names else [cloud]), **names)
    return file.getvalue()


def lines(points: np.ndarray, separator: str = " ") -> str:
    return "# x y z\n" + "\n".join(separator.join(map(repr, row)) for row in points.tolist())


def task(folder: Path, clouds: list[Any], **changes: Any) -> Any:
    rows = [{"scan": cloud, "shape": ("a", "b")[number % 2]} for number, cloud in enumerate(clouds)]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    values = {
        "name": "shapes",
        "kind": "point_cloud_classification",
        "data": {"builder": "parquet", "files": {"train": "train.parquet", "validation": "train.parquet"}},
        "columns": {"points": "scan", "label": "shape"},
        "num_points": 32,
    }
    return parse_task({**values, **changes}, folder / "shapes.yaml")


def preprocessed(found: Any, model: Any = None) -> Any:
    rule = kind("point_cloud_classification")
    return rule, rule.preprocess(load_splits(found).train, None, found, model)


class Reader(torch.nn.Module):
    """Model whose forward takes points."""

    def forward(self, point_clouds: torch.Tensor) -> torch.Tensor:
        return point_clouds


@pytest.mark.parametrize("form", ["npy", "columns", "npz", "points", "text", "commas", "list"])
def test_every_form_gives_the_same_points(form: str, tmp_path: Path) -> None:
    forms: dict[str, Any] = {
        "npy": saved(CLOUD),
        "columns": saved(np.asfortranarray(CLOUD)),
        "npz": saved(CLOUD, np.savez_compressed),
        "points": saved(CLOUD, np.savez, normals=CLOUD[:, :2], points=CLOUD),
        "text": lines(CLOUD).encode(),
        "commas": lines(CLOUD, ", "),
        "list": CLOUD.tolist(),
    }
    value = forms[form]
    if isinstance(value, bytes):
        (tmp_path / "a.npz").write_bytes(value)
        assert (open_cloud(tmp_path / "a.npz") == CLOUD).all()
        value = {"bytes": value, "path": None}
    found = open_cloud(value)
    assert found.dtype == np.float32
    assert (found == CLOUD).all()
    _, rows = preprocessed(task(tmp_path, [value] * 4), Reader())
    assert np.asarray(rows[0]["point_clouds"]).shape == (38, 3)


def test_names_of_files_stand_beside_the_table(tmp_path: Path) -> None:
    for name in ("a.xyz", "b.txt"):
        (tmp_path / name).write_text(lines(CLOUD))
    found = task(tmp_path, ["a.xyz", "b.txt"] * 2)
    _, rows = preprocessed(found, Reader())
    assert np.asarray(rows[1]["point_clouds"]).shape == (38, 3)
    # a text file is a cloud here, and no file of texts
    assert read_inputs([tmp_path / "b.txt"], kind(found.kind).input_files(found)) == [tmp_path / "b.txt"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, "have no point cloud"),
        (saved(CLOUD)[:200], "is not to be used: .* cannot be read as a point cloud"),
        (saved(CLOUD, np.savez)[:300], "is not to be used: .* cannot be read as a point cloud"),
        (saved(CLOUD, np.savez, faces=CLOUD, edges=CLOUD), "it holds faces, edges, and one of points"),
        (saved(np.array([{}], dtype=object)), "it holds object .1., and"),
        (saved(np.zeros((40, 6), np.float32)), r"it holds float32 \[40, 6\], and \(points, 3\)"),
        (b"0 1 2\n3 4\n", "line 2 has 2 values, and x y z was expected"),
        (b"zero one two\n", "could not convert"),
        (saved(CLOUD[:31]), 'have fewer points than the 32 of "num_points"'),
        (saved(np.where(CLOUD > 2, math.nan, CLOUD)), "have points that are no finite numbers"),
        (saved(np.ones((40, 3), np.float32)), "have all points at one place"),
    ],
    ids=range(11),
)
def test_faults_are_named_by_row(fault: bytes | None, said: str, tmp_path: Path) -> None:
    files = [{"bytes": data, "path": None} for data in (saved(CLOUD), fault, saved(CLOUD), saved(CLOUD))]
    files[1] = None if fault is None else files[1]
    found = task(tmp_path, files)
    with pytest.raises(TaskError, match=r"1 train rows have .*\(row 2 of 4\)") as raised:
        load_splits(found)
    assert re.search(said, str(raised.value))
    assert "\n" not in str(raised.value)
    assert len(load_splits(found.model_copy(update={"empty_rows": "drop"})).train) == 3


def test_a_damaged_file_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(saved(CLOUD, np.savez)[:90])
    with pytest.raises(TaskError, match=r'broken\.npz" cannot be read as a point cloud'):
        open_cloud(tmp_path / "broken.npz")
    with pytest.raises(TaskError, match=r'missing\.npz" cannot be read as a point cloud'):
        open_cloud("missing.npz")


def test_a_header_that_announces_too_much_takes_no_memory() -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)})
    with pytest.raises(TaskError, match="1000000000000, 3"):
        open_cloud(io.BytesIO(file.getvalue()))


def test_farthest_points_are_those_of_a_plain_loop() -> None:
    chosen = [0]
    while len(chosen) < 12:
        nearest = [min(sum((a - b) ** 2 for a, b in zip(p, CLOUD[c], strict=True)) for c in chosen) for p in CLOUD]
        chosen.append(nearest.index(max(nearest)))
    assert farthest_points(CLOUD, 12).tolist() == chosen
    assert sorted(farthest_points(CLOUD, 99).tolist()) == list(range(40))


def test_training_draws_points_and_evaluation_takes_the_same(tmp_path: Path) -> None:
    found = task(tmp_path, [CLOUD.tolist()] * 4, random_rotation=90.0)
    rule, rows = preprocessed(found, Reader())
    fixed = rule.evaluation_rows(rows, None, found)
    centred = CLOUD - CLOUD.mean(0)
    expected = (centred / np.linalg.norm(centred, axis=1).max())[farthest_points(CLOUD - CLOUD.mean(0), 32)]
    for _ in range(2):
        np.testing.assert_allclose(fixed[0]["point_clouds"], expected, atol=1e-6)
    torch.manual_seed(0)
    collate = rule.data_collator(None, found, None)
    first, again = (collate([rows[0], rows[1]])["point_clouds"][0].numpy() for _ in range(2))
    assert first.shape == (32, 3)
    assert np.array_equal(first, again)
    collate.set_epoch(1)
    assert not np.allclose(first, collate([rows[0]])["point_clouds"][0])
    batch = collate([fixed[0], fixed[1]])
    np.testing.assert_allclose(batch["point_clouds"][0], expected, atol=1e-6)
    assert batch["labels"].tolist() == [0, 1]
    # turned about the axis that points upwards, so heights stay
    heights = np.unique(np.round(centred[:, 1] / np.linalg.norm(centred, axis=1).max(), 5))
    assert np.isin(np.round(first[:, 1], 5), heights).mean() > 0.9


@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_a_turn_keeps_distances_and_the_axis(up: str) -> None:
    view = turned(CLOUD, up, 0.7)
    np.testing.assert_allclose(view[:, 1], CLOUD[:, "xyz".index(up)], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(view, axis=1), np.linalg.norm(CLOUD, axis=1), rtol=1e-5)
    assert np.linalg.det(np.linalg.lstsq(CLOUD, view, rcond=None)[0]) == pytest.approx(1, abs=1e-4)


def test_a_plain_picture_shows_near_points_bright(tmp_path: Path) -> None:
    points = np.array([[0, 0, 0], [1, 1, 1], [1, 1, 0], [0, 1, 0.5]], dtype=np.float32)
    picture = depth_picture(points, 8)
    assert picture.nonzero()[0].tolist() == [0, 0, 7]
    assert (picture[0, 0], picture[0, 7], picture[7, 0]) == (159, 255, 64)
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(make_image_backbone(tmp_path / "base"), backend="pil")
    found = task(tmp_path, [CLOUD.tolist()] * 4)
    rule = kind(found.kind)
    rows = rule.preprocess(load_splits(found).train, processor, found, SimpleNamespace())
    assert "point_clouds" not in rows.column_names
    batch = rule.data_collator(processor, found, None)([rows[0], rows[1]])
    assert batch["pixel_values"].shape[:2] == (2, 3)


@pytest.mark.parametrize("changes", [{"num_points": 0}, {"random_rotation": 181.0}, {"up_axis": "w"}])
def test_options_out_of_range_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=next(iter(changes))):
        task(tmp_path, [CLOUD.tolist()] * 4, **changes)
