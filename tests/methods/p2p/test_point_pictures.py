"""A run on point clouds, and the command that writes the pictures of its adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.kind_rows import write_task
from support.tiny_runs import make_image_backbone, options
from typer.testing import CliRunner

from peft_lab.cli.app import app
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import load
from peft_lab.training.evaluate import predict
from peft_lab.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("p2p")
    task = write_task(folder / "data", "point_cloud_classification", up_axis="z")
    values = options(task, make_image_backbone(folder / "base"), folder / "run", method="p2p", max_steps=2)
    arguments = {"save_strategy": "no", "eval_strategy": "no", "method_args": {"num_azimuths": 2}}
    return train({**values, **arguments}).output_dir


def test_a_run_fills_in_axis_and_statistics_and_reads_points(run: Path) -> None:
    loaded = load(run)
    config = loaded.model.peft_config["default"]
    assert config.up_axis == "z"
    assert config.image_size
    assert len(config.image_mean) == len(config.image_std) == 3
    cloud = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    (answer,) = predict(run, [cloud])
    assert answer["label"] in loaded.labels
    with torch.no_grad():
        model = loaded.model.eval()
        (layer,) = [m for m in model.modules() if getattr(m, "is_encoder", False)]
        colours, views = layer.colours("default", torch.from_numpy(cloud)[None])
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        found = model(point_clouds=torch.from_numpy(cloud)[None]).logits
        given = model(pixel_values=(colours - mean) / std).logits.unflatten(0, (1, views)).mean(1)
    torch.testing.assert_close(found, given)


def test_pictures_of_rows_are_written(run: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["point-pictures", str(run), "--output", str(tmp_path / "out"), "--rows", "3"])
    assert found.exit_code == 0, found.output
    assert "6 pictures written" in found.output
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name.rpartition("-")[2] for file in files] == ["1.png", "2.png"] * 3
    assert files[0].name.startswith("001-")
    images = [np.asarray(Image.open(file)) for file in files]
    assert images[0].ndim == 3
    assert all(image.std() > 0 for image in images)
    assert not np.array_equal(images[0], images[1])


def test_a_run_of_another_method_or_a_file_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        CliRunner().invoke(
            app, ["point-pictures", str(run), "--output", str(tmp_path / "file")], catch_exceptions=False
        )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds lora, which draws no point clouds"):
        CliRunner().invoke(app, ["point-pictures", str(tmp_path)], catch_exceptions=False)
