"""Sounds as the inputs of a model: one channel at its rate, read and turned into features when they are used."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from peft_lab.data.file_column import as_files
from peft_lab.data.model_inputs import ModelInputs
from peft_lab.data.row_checks import RowFault, check_inputs, warn_of_cut
from peft_lab.errors import ConfigError
from peft_lab.utils.audio import SOUND_ENDINGS, Sound, open_sound
from peft_lab.utils.mappings import without

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

logger = logging.getLogger("peft_lab")

#: Key of a task file, and its default; the example script of transformers has the same.
LENGTH_KEY, MAX_SECONDS = "max_length_seconds", 20.0
_CUT = "are longer than the limit and lose their end"


class AudioInputs(ModelInputs):
    """Column `audio`; a feature extractor.

    A kind that has such inputs names `max_length_seconds` in the `options` of its card.
    """

    columns = ("audio",)
    files = SOUND_ENDINGS

    def auto_class(self) -> Any:
        from transformers import AutoModelForAudioClassification

        return AutoModelForAudioClassification

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return as_files(dataset, task, "audio", "sounds", "audiofolder")

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        from peft_lab.data.audio_column import sound_faults, sound_traits

        return sound_faults(sound_traits(dataset))

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        from transformers import AutoFeatureExtractor

        return AutoFeatureExtractor.from_pretrained(model_name_or_path, trust_remote_code=False, **hub_kwargs)

    def check_processor(self, processor: Any, model: Any) -> None:
        if not getattr(processor, "sampling_rate", None):
            raise ConfigError(
                f"{type(processor).__name__} of the backbone names no sampling rate, so it is no feature extractor of "
                "sounds; choose a backbone that was trained on sounds, such as Wav2Vec2, HuBERT, Whisper or AST."
            )
        name = processor.model_input_names[0]
        if name != model.main_input_name:
            raise ConfigError(f'The feature extractor makes "{name}", and the model reads "{model.main_input_name}".')

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        from peft_lab.data.audio_column import sound_traits, stored_sound

        traits = sound_traits(dataset)
        _say(task, traits, processor, model, dataset)
        limit, least = _limit(task, processor), _least_samples(model)
        # a name of the model's forward, so that Trainer leaves the column in place for the transform
        name = processor.model_input_names[0]
        dataset = dataset.rename_column("audio", name)

        def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
            # a read of the labels alone comes through here without sounds
            if name in batch:
                sounds = [stored_sound(value) for value in batch[name]]
                batch[name] = [_features(sound, processor, limit, least) for sound in sounds]
            return batch

        # map would store the features of every sound, which for Whisper are those of 30 seconds
        return dataset.with_transform(transform)

    def data_collator(self, processor: Any, model: Any) -> Any:
        name = processor.model_input_names[0]

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            from transformers import default_data_collator

            batch = _padded([row[name] for row in rows], processor)
            others = [without(row, name) for row in rows]
            return {**batch, **(default_data_collator(others) if others[0] else {})}

        return collate

    def encoder(self, inputs: Sequence[Any], processor: Any, task: Task, model: Any) -> Callable[[Sequence[int]], Any]:
        """Check paths, open files, arrays at the model's rate, or mappings of `array` and `sampling_rate`."""
        sounds = [open_sound(value, processor.sampling_rate) for value in inputs]
        traits = [_traits_of(sound) for sound in sounds]
        from peft_lab.data.audio_column import sound_faults

        check_inputs(task, sound_faults(traits))
        _say(task, traits, processor, model)
        limit, least = _limit(task, processor), _least_samples(model)

        def encode(rows: Sequence[int]) -> Any:
            return _padded([_features(sounds[row], processor, limit, least) for row in rows], processor)

        return encode


def _traits_of(sound: Sound) -> dict[str, Any]:
    import numpy as np

    frames, channels = sound.samples.shape
    peak, finite = float(np.abs(sound.samples).max(initial=0.0)), bool(np.isfinite(sound.samples).all())
    return {"error": "", "rate": sound.rate, "frames": frames, "channels": channels, "peak": peak, "finite": finite}


def _limit(task: Task, processor: Any) -> float:
    """Seconds of a sound that are read: those of the task, but at most what the feature extractor takes."""
    return min(float(task.options.get(LENGTH_KEY, MAX_SECONDS)), _most_seconds(processor))


def _most_seconds(processor: Any) -> float:
    """Seconds that a feature extractor takes; infinite for one of waveforms."""
    # Whisper's reads pieces of 30 seconds, and the spectrogram transformer's a number of frames of 10 ms
    if getattr(processor, "chunk_length", None):
        return float(processor.chunk_length)
    frames = getattr(processor, "max_length", None)
    return frames / 100 if frames and hasattr(processor, "num_mel_bins") else float("inf")


def _least_samples(model: Any) -> int:
    """Samples that a model of waveforms needs for one frame, or for a mask of SpecAugment in training; else 1."""
    config: Any = getattr(model, "config", None)
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not isinstance(kernels, list | tuple) or not isinstance(strides, list | tuple):
        return 1
    masks = getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0) > 0
    frames = config.mask_time_length if masks else 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames


def _features(sound: Sound, processor: Any, limit: float, least: int) -> np.ndarray:
    """Features of a sound: a waveform (samples,), or a spectrogram of two dimensions."""
    import numpy as np

    rate = processor.sampling_rate
    samples = sound.mono(rate)
    if limit * rate < len(samples):
        samples = samples[: ceil(limit * rate)]
    # silence at the end, as a longer sound in the batch would bring about
    samples = np.pad(samples, (0, max(least - len(samples), 0)))
    name = processor.model_input_names[0]
    return processor(samples, sampling_rate=rate, return_tensors="np")[name][0]


def _padded(features: Sequence[np.ndarray], processor: Any) -> Any:
    """Batch of features of different lengths, with a mask where the feature extractor gives one."""
    name = processor.model_input_names[0]
    return processor.pad({name: list(features)}, padding=True, return_tensors="pt")


def _say(
    task: Task, traits: Sequence[Mapping[str, Any]], processor: Any, model: Any, dataset: Dataset | None = None
) -> None:
    """Say what becomes of sounds on their way to a model: other rates, several channels, cut or lengthened ones."""
    rate, limit, called = processor.sampling_rate, _limit(task, processor), "rows" if dataset is not None else "inputs"
    others = Counter(found["rate"] for found in traits if found["rate"] > 0 and found["rate"] != rate)
    if others:
        rates = ", ".join(f"{count} of {other} Hz" for other, count in sorted(others.items()))
        logger.warning('Task "%s": %s %s are resampled to %d Hz.', task.name, rates, called, rate)
    several = sum(found["channels"] > 1 for found in traits)
    if several:
        logger.warning('Task "%s": of %d %s the mean of their channels is taken.', task.name, several, called)
    seconds = [found["frames"] / found["rate"] if found["rate"] > 0 else 0.0 for found in traits]
    mend = f'the limit is {limit:g} seconds: raise "{LENGTH_KEY}" in the task file'
    if limit >= _most_seconds(processor):
        mend = f"the model takes no more than {limit:g} seconds: cut them into pieces"
    warn_of_cut(task, dataset, {_CUT: [row for row, length in enumerate(seconds) if length > limit]}, mend)
    least = _least_samples(model) / rate
    short = [length for length in seconds if length < least]
    if short:
        logger.warning(
            'Task "%s": %d %s are shorter than the %.3g seconds that the model needs, and get silence at their end.',
            *(task.name, len(short), called, least),
        )
    if least > 1 / rate and not getattr(processor, "return_attention_mask", True):
        logger.warning(
            'The feature extractor of "%s" gives no attention mask, so that an answer depends a little on the longest '
            "sound of its batch.",
            getattr(model, "name_or_path", "the backbone"),
        )
