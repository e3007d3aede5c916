"""Streamed rows in whole runs: tar files, every method, worker processes, two processes, a broken run."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import socket
import tarfile
from pathlib import Path

import pytest
import yaml
from support.compare_helpers import tiny_study
from support.method_runs import TRAINABLE, interrupt, options_for
from support.properties import KEEPS_HEAD, UNTRAINED
from support.tiny_runs import (
    COLOURS,
    make_backbone,
    make_decoder,
    make_image_backbone,
    make_task,
    make_writing_task,
    options,
    same_weights,
    train_as_rank,
)

from peft_lab import compare
from peft_lab.errors import ConfigError, TaskError
from peft_lab.training.evaluate import evaluate
from peft_lab.training.run import train

SCHEDULE = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4}


def streamed(task: Path, files: int = 4) -> Path:
    """The same task with its training rows read as a stream, texts from several files."""
    values = yaml.safe_load(task.read_text())
    values |= {"streaming": True, "validation_rows": 8, "shuffle_buffer_size": 16}
    path = task.with_name(f"{task.stem}-stream.yaml")
    if values["kind"] in ("image_classification", "point_cloud_classification"):
        values["data"]["files"].pop("validation", None)
        if values["kind"] == "point_cloud_classification":
            values["labels"] = ["ball", "bar", "plate"]
        path.write_text(yaml.safe_dump(values))
        return path
    header, *lines = (task.parent / "train.csv").read_text().splitlines()
    for index in range(files):
        (task.parent / f"part{index}.csv").write_text("\n".join([header, *lines[index::files]]) + "\n")
    values["data"]["files"] = {"train": "part*.csv", "test": "test.csv"}
    values["labels"] = ["food", "music", "weather"]
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    return {"task": streamed(make_task(folder / "data")), "backbone": make_backbone(folder / "bert")}


@pytest.mark.integration(library="datasets", use="`streaming: true`: train, save, evaluate")
@pytest.mark.parametrize("method", TRAINABLE)
def test_every_method_trains_on_a_stream(method, tmp_path, refused):
    values = options_for(method, tmp_path, tmp_path / "out", **SCHEDULE)
    values["task"] = str(streamed(Path(values["task"])))
    if method in (*UNTRAINED, *KEEPS_HEAD):
        with pytest.raises(ConfigError, match="a stream of rows has no epochs"):
            train(values)
        refused("reads the training data between epochs")
        return
    result = train(values)
    assert result.metrics["data"]["streaming"]
    assert "train" not in result.metrics["data"]["rows"]
    assert evaluate(tmp_path / "out")["rows"] == result.metrics["data"]["rows"]["test"]
    with pytest.raises(ConfigError, match="are a stream without end"):
        evaluate(tmp_path / "out", split="train")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_run_goes_on_at_the_row_where_it_stopped(place, tmp_path, workers):
    """In the second pass over the rows: 88 of them, 6 steps of 20."""
    more = SCHEDULE | {"per_device_train_batch_size": 20, "dataloader_num_workers": workers}
    whole = train(options(place["task"], place["backbone"], tmp_path / "whole", **more))
    interrupt(tmp_path / "whole", tmp_path / "broken", 4)
    again = train(options(place["task"], place["backbone"], tmp_path / "broken", **more))
    assert again.metrics["resumed_from"] == "checkpoint-4"
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    assert whole.metrics["metrics"] == again.metrics["metrics"]
    other = train(options(place["task"], place["backbone"], tmp_path / "other", **more, data_seed=5))
    assert not same_weights(tmp_path / "whole", other.output_dir)


def test_other_files_are_no_continuation(place, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(place["task"].parent, folder)
    values = options(folder / place["task"].name, place["backbone"], tmp_path / "out", **SCHEDULE)
    train(values)
    interrupt(tmp_path / "out", tmp_path / "again", 4)
    part = folder / "part3.csv"
    part.write_text(part.read_text() + "one more,food\n")
    with pytest.raises(ConfigError, match="the train rows differ"):
        train(values | {"output_dir": str(tmp_path / "again")})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_ends_the_run_with_the_sentence_of_its_row(place, tmp_path, workers):
    folder = tmp_path / "data"
    shutil.copytree(place["task"].parent, folder)
    part = folder / "part2.csv"
    part.write_text(part.read_text() + "a sentence,\n")
    values = options(folder / place["task"].name, place["backbone"], tmp_path / "out", **SCHEDULE)
    with pytest.raises(TaskError) as error:
        train(values | {"dataloader_num_workers": workers})
    assert str(error.value).startswith('Task "topics": 1 train rows have no label in column "topic" (row 25 of part2')
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_two_processes_read_a_part_each(place, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    values = options(place["task"], place["backbone"], tmp_path / "two", **SCHEDULE)
    ranks = [context.Process(target=train_as_rank, args=(values, rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert metrics["global_step"] == 6


def tars(folder: Path, per_file: int = 24) -> Path:
    """A task of coloured images in tar files, with the class as a number beside each image."""
    from PIL import Image

    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for index in range(per_file):
                buffer = io.BytesIO()
                Image.new("RGB", (20, 20), [*COLOURS.values()][index % 3]).save(buffer, "PNG")
                for ending, content in (
                    (f"{index:03}.png", buffer.getvalue()),
                    (f"{index:03}.cls", b"%d" % (index % 3)),
                ):
                    member = tarfile.TarInfo(ending)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    values = {
        "name": "colours",
        "kind": "image_classification",
        "data": {"builder": "webdataset", "files": {"train": "*.tar"}},
        "columns": {"image": "png", "label": "cls"},
        "labels": list(COLOURS),
        "streaming": True,
        "validation_rows": 6,
        "test_rows": 6,
        "metrics": ["accuracy"],
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(values))
    return folder / "task.yaml"


@pytest.mark.integration(library="webdataset", use="images in tar files, streamed")
@pytest.mark.parametrize("method", ["lora", "svfit", "ssf", "vpt"])
def test_images_in_tar_files(method, tmp_path):
    values = options(tars(tmp_path / "tars"), make_image_backbone(tmp_path / "vit"), tmp_path / "out", method=method)
    result = train(values | {"max_steps": 40, "learning_rate": 3e-2})
    assert result.metrics["metrics"]["test"]["accuracy"] == 1.0


def test_tar_files_of_the_library_webdataset(tmp_path):
    """Written by webdataset's own writer, and read whole and as a stream."""
    webdataset = pytest.importorskip("webdataset")
    from peft_lab.data.splits import load_splits
    from peft_lab.data.task_registry import load_task

    path = tars(tmp_path / "tars")
    with webdataset.TarWriter(str(path.parent / "2.tar")) as writer:
        from PIL import Image

        writer.write({"__key__": "last", "png": Image.new("RGB", (20, 20)), "cls": 2})
    task = load_task(path)
    drawn = iter(load_splits(task).train)
    labels = [next(drawn)["label"] for _ in range(37)]
    assert labels[-1] == 2
    whole = task.model_copy(update={"streaming": False, "validation_rows": None, "test_rows": None})
    splits = load_splits(whole)
    assert len(splits.train) + len(splits.validation) == 49


def test_streamed_rows_are_packed_and_their_loss_is_taken_in_chunks(tmp_path):
    path = make_writing_task(tmp_path / "texts")
    values = yaml.safe_load(path.read_text()) | {"streaming": True, "validation_rows": 8}
    del values["data"]["files"]["validation"]
    path.write_text(yaml.safe_dump(values))
    base = make_decoder(tmp_path / "llama")
    more = SCHEDULE | {"packing": True, "loss_chunk_size": 7, "dataloader_num_workers": 1}
    whole = train(options(path, base, tmp_path / "whole", **more))
    interrupt(tmp_path / "whole", tmp_path / "broken", 4)
    again = train(options(path, base, tmp_path / "broken", **more))
    assert again.metrics["resumed_from"] == "checkpoint-4"
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    assert whole.metrics["metrics"] == again.metrics["metrics"]


def test_a_comparison_on_streamed_rows(place, tmp_path):
    entry = {"task": str(place["task"]), "model_name_or_path": str(place["backbone"])}
    study = tiny_study(tmp_path, tasks=[entry], methods=["lora"], seeds=1)
    compare(study, tmp_path / "study")
    record = json.loads((tmp_path / "study" / "results.jsonl").read_text().splitlines()[-1])
    assert record["status"] == "ok", record
    assert record["metrics"]["data"]["streaming"]
    assert json.dumps(record).count("step_flops")
