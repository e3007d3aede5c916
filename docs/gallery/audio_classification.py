"""Backbone of the gallery's page on sounds: a spectrogram transformer without any training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

FOLDER = Path("gallery/audio_classification/base")
#: Frames of 10 ms and frequencies of a spectrogram.
FRAMES, BINS = 80, 32


def main() -> None:
    """Write a model of 0.4 million parameters, always the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
    patches = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": FRAMES, "num_mel_bins": BINS}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ASTForAudioClassification(ASTConfig(**sizes, **patches, **dropout)).save_pretrained(FOLDER)
    ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=BINS).save_pretrained(FOLDER)
    print(f"a model without any training in {FOLDER}")


if __name__ == "__main__":
    main()
