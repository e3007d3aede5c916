"""Sounds of the kinds that read them: what a model gets, what is said of it, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from support.kind_rows import make_audio_backbone
from transformers import ASTFeatureExtractor, WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.loading.load_run import load_base

RATE = 16_000
LABELS = ("low", "high")


def tone(seconds: float, pitch: float = 440.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return np.repeat(0.5 * np.sin(2 * np.pi * pitch * time)[:, None], channels, axis=1).astype(np.float32)


def wave(samples: np.ndarray, rate: int = RATE, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype="FLOAT" if kind == "WAV" else None)
    return file.getvalue()


def task(folder: Path, sounds: list[Any], **changes: Any) -> Any:
    files = [None if data is None else {"bytes": data, "path": None} for data in sounds]
    rows = [{"clip": file, "pitch": LABELS[number % 2]} for number, file in enumerate(files)]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    values = {
        "name": "tones",
        "kind": "audio_classification",
        "data": {"builder": "parquet", "files": {"train": "train.parquet", "validation": "train.parquet"}},
        "columns": {"audio": "clip", "label": "pitch"},
    }
    return parse_task({**values, **changes}, folder / "tones.yaml")


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_audio_backbone(tmp_path_factory.mktemp("wav2vec2") / "base")


def prepared(found: Any, backbone: Path) -> tuple[Any, Any, Any]:
    rule = kind("audio_classification")
    processor, model = load_base(rule, found, LABELS, str(backbone))
    rows = load_splits(found).train
    return rule.preprocess(rows, processor, found, model), processor, model


def test_a_model_reads_one_channel_at_its_rate(
    wav2vec2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sounds = [tone(0.5), tone(0.5, rate=8000), tone(0.5, rate=44_100, channels=2)]
    files = [wave(sounds[0]), wave(sounds[1], 8000, "FLAC"), wave(sounds[2], 44_100)]
    rows, _, _ = prepared(task(tmp_path, [*files, files[0]]), wav2vec2)
    expected = (tone(0.5)[:, 0] - tone(0.5).mean()) / tone(0.5).std()
    for number in range(3):
        found = np.asarray(rows[number]["input_values"])
        assert found.shape == (8000,)
        # filters ring at the edges
        np.testing.assert_allclose(found[400:-400], expected[400:-400], atol=0.02)
    assert "1 of 8000 Hz, 1 of 44100 Hz rows are resampled to 16000 Hz" in caplog.text
    assert "of 1 rows the mean of their channels is taken" in caplog.text


def test_long_sounds_are_cut_and_short_ones_lengthened_with_a_count(
    wav2vec2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [wave(tone(1.0)), wave(tone(0.0005)), wave(tone(0.2)), wave(tone(0.2))]
    rows, processor, model = prepared(task(tmp_path, files, max_length_seconds=0.5), wav2vec2)
    assert len(rows[0]["input_values"]) == 8000
    # kernels of 10 and 4 with strides of 5 and 4
    assert len(rows[1]["input_values"]) == (4 - 1) * 5 + 10
    cut = r'1 of 4 rows are longer than the limit .* \(row 1\).*limit is 0.5 seconds: raise "max_length_seconds"'
    assert re.search(cut, caplog.text)
    assert (
        "1 rows are shorter than the 0.00156 seconds that the model needs, and get silence at their end" in caplog.text
    )
    batch = kind("audio_classification").data_collator(processor, None, model)([rows[0], rows[1]])
    assert batch["attention_mask"].sum(1).tolist() == [8000, 25]
    assert batch["labels"].tolist() == [1, 0]
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, "have no sound"),
        (b"no sound at all", "have a sound that is not to be used: .* cannot be read as a sound"),
        (wave(tone(0.2))[:30], "have a sound that is not to be used: .* cannot be read as a sound"),
        (wave(np.zeros((0, 1), np.float32)), "have a sound without a sample"),
        (wave(np.full((800, 1), math.nan, np.float32)), "have a sound with samples that are no numbers"),
        (wave(np.zeros((800, 1), np.float32)), "have a silent sound"),
    ],
    # the bytes of a file hold the time at which it was written
    ids=["none", "text", "cut", "empty", "nan", "silent"],
)
def test_damaged_sounds_are_refused_by_row(fault: Any, said: str, tmp_path: Path) -> None:
    good = [wave(tone(0.1, pitch)) for pitch in (300, 500, 700, 900)]
    found = task(tmp_path, [*good[:2], fault, *good[2:]])
    with pytest.raises(TaskError, match=rf"1 train rows {said}.*\(row 3 of 5\)"):
        load_splits(found)
    assert len(load_splits(found.model_copy(update={"empty_rows": "drop"})).train) == 4


def test_files_are_named_relative_to_their_table(wav2vec2: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "clips").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "data" / "clips" / f"{number}.flac").write_bytes(wave(tone(0.1, 300 + 100 * number), kind="FLAC"))
    lines = ["file,pitch", *[f"clips/{number}.flac,{LABELS[number % 2]}" for number in range(4)]]
    (tmp_path / "data" / "train.csv").write_text("\n".join(lines))
    values = {
        "name": "tones",
        "kind": "audio_classification",
        "data": {"builder": "csv", "files": {"train": "data/train.csv", "validation": "data/train.csv"}},
        "columns": {"audio": "file", "label": "pitch"},
    }
    rows, _, _ = prepared(parse_task(values, tmp_path / "tones.yaml"), wav2vec2)
    assert [len(rows[number]["input_values"]) for number in range(4)] == [1600] * 4
    (tmp_path / "data" / "clips" / "2.flac").unlink()
    with pytest.raises(TaskError, match=r"2\.flac.*\(row 3 of 4\)"):
        load_splits(parse_task(values, tmp_path / "tones.yaml"))
    foreign = parse_task(values, tmp_path / "tones.yaml").as_foreign()
    (tmp_path / "data" / "train.csv").write_text("file,pitch\n../secret.wav,low\n")
    with pytest.raises(TaskError, match="lies outside of the folder that it came with"):
        load_splits(foreign)


@pytest.mark.parametrize("table", [False, True])
def test_a_folder_of_sounds_by_class_or_with_a_table(table: bool, tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / "clips" if table else tmp_path / "clips" / LABELS[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.wav").write_bytes(wave(tone(0.1, 300 + 100 * number)))
    if table:
        lines = ["file_name,label", *[f"{number}.wav,{LABELS[number % 2]}" for number in range(6)]]
        (tmp_path / "clips" / "metadata.csv").write_text("\n".join(lines))
    values = {
        "name": "tones",
        "kind": "audio_classification",
        "data": {"builder": "audiofolder", "files": {"train": "clips", "validation": "clips"}},
        "columns": {"audio": "audio", "label": "label"},
        "labels": list(LABELS),
    }
    train = load_splits(parse_task(values, tmp_path / "tones.yaml")).train
    names = {Path(row["audio"]["path"]).stem: LABELS[row["label"]] for row in train}
    assert names == {str(number): LABELS[number % 2] for number in range(6)}


def test_a_column_that_datasets_calls_audio_is_read(tmp_path: Path) -> None:
    """Without torchcodec, by which `datasets` would decode and encode it."""
    found = task(tmp_path, [wave(tone(0.1, 300 + 100 * number)) for number in range(4)])
    Dataset.from_parquet(str(tmp_path / "train.parquet")).cast_column("clip", Audio()).to_parquet(
        tmp_path / "other.parquet"
    )
    before = load_splits(found).fingerprints
    (tmp_path / "other.parquet").rename(tmp_path / "train.parquet")
    assert load_splits(found).fingerprints == before


def test_predictions_take_files_arrays_and_decoded_sounds(wav2vec2: Path, tmp_path: Path) -> None:
    rule, found = kind("audio_classification"), task(tmp_path, [wave(tone(0.1))] * 4)
    processor, model = load_base(rule, found, LABELS, str(wav2vec2))
    (tmp_path / "a.wav").write_bytes(wave(tone(0.3)))
    samples = tone(0.3)
    forms = [tmp_path / "a.wav", str(tmp_path / "a.wav"), samples[:, 0], samples, io.BytesIO(wave(samples))]
    forms += [{"array": samples[:, 0], "sampling_rate": RATE}, {"bytes": wave(samples), "path": None}]
    records = rule.predict(model, processor, forms, found)
    assert {record["label"] for record in records} == {records[0]["label"]}
    assert [record["score"] for record in records] == pytest.approx([records[0]["score"]] * len(forms), rel=1e-5)
    slower = rule.predict(model, processor, [{"array": tone(0.3, rate=8000)[:, 0], "sampling_rate": 8000}], found)
    assert slower[0]["score"] == pytest.approx(records[0]["score"], rel=1e-2)
    (tmp_path / "b.wav").write_text("no sound")
    with pytest.raises(TaskError, match=r'b\.wav" cannot be read as a sound'):
        rule.predict(model, processor, [tmp_path / "b.wav"], found)
    with pytest.raises(TaskError, match=r"array of fractional samples between -1 and 1.*not int16"):
        rule.predict(model, processor, [np.zeros(99, np.int16)], found)
    with pytest.raises(TaskError, match=r"1 inputs have a silent sound \(row 2\)"):
        rule.predict(model, processor, [samples, np.zeros(999, np.float32)], found)


def test_spectrogram_models_have_a_limit_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from peft_lab.data.audio_inputs import AudioInputs

    inputs, found = AudioInputs(), task(tmp_path, [wave(tone(0.1))] * 4, max_length_seconds=60)
    ast = ASTFeatureExtractor(max_length=64, num_mel_bins=16)
    encode = inputs.encoder([tone(1.0), tone(0.1)], ast, found, torch.nn.Module())
    assert encode(range(2))["input_values"].shape == (2, 64, 16)
    assert "lose their end (row 1); the model takes no more than 0.64 seconds" in caplog.text
    whisper = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    config = WhisperConfig(
        num_mel_bins=8, max_source_positions=100, d_model=8, encoder_layers=1, encoder_attention_heads=1
    )
    model = WhisperForAudioClassification(config)
    batch = inputs.encoder([tone(1.0), tone(0.1)], whisper, found, model)(range(2))
    assert batch["input_features"].shape == (2, 8, 200)
    assert model(**batch).logits.isfinite().all()


def test_other_backbones_are_refused(wav2vec2: Path, tmp_path: Path) -> None:
    rule, found = kind("audio_classification"), task(tmp_path, [wave(tone(0.1))] * 4)
    _, model = load_base(rule, found, LABELS, str(wav2vec2))
    with pytest.raises(ConfigError, match='makes "input_features", and the model reads "input_values"'):
        rule.check_processor(WhisperFeatureExtractor(), found, model)


def test_a_missing_soundfile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, find = task(tmp_path, [wave(tone(0.1))] * 4), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "soundfile" else find(name, *a))
    with pytest.raises(TaskError, match=r'package soundfile: pip install "peft-lab\[audio\]"'):
        load_splits(found)


def test_a_limit_of_no_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="must be more than 0"):
        task(tmp_path, [wave(tone(0.1))] * 4, max_length_seconds=0)
