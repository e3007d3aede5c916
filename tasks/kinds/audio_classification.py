"""Audio classification: one sound to one of several labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_lab.data.audio_inputs import AudioInputs
from peft_lab.data.classification_kind import ClassificationKind
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal
from peft_lab.errors import TaskError
from peft_lab.registry import KindInfo
from peft_lab.utils.audio import SOUND_ENDINGS

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task

#: Usual names of the columns.
_SOUNDS = ("audio", "sound", "speech", "recording", "file", "file_name", "path")
_LABELS = ("label", "labels", "class", "category", "intent", "intent_class", "command", "emotion", "digit", "target")

KIND = KindInfo(
    name="audio_classification",
    title="one sound -> label",
    runtime="AudioClassification",
    columns={"audio": True, "label": True},
    settings=("labels",),
    options={"max_length_seconds": 20.0},
    metrics=("accuracy", "f1", "matthews_correlation", "ece"),
    pipeline_tag="audio-classification",
)


class AudioClassification(ClassificationKind):
    """`audio` -> `label`; AutoModelForAudioClassification."""

    info = KIND
    inputs = AudioInputs()

    def check(self, task: Task) -> None:
        if task.options["max_length_seconds"] <= 0:
            raise TaskError('"max_length_seconds" must be more than 0.')

    def propose(self, profile: DataProfile) -> Proposal | None:
        sound = profile.find("audio", _SOUNDS, lambda column: column.type == "audio" or _names_sounds(column))
        label = profile.find("label", _LABELS, lambda column: column.holds_classes)
        if sound is None or label is None or sound.name == label.name:
            return None
        columns = {"audio": sound.name, "label": label.name}
        usual = "label" in profile.given or label.name.lower() in _LABELS
        return Proposal(
            self.name, 0.9 if usual else 0.6, columns, metrics=KIND.metrics[:2], doubts=tuple(label.class_doubts())
        )


def _names_sounds(column: ColumnProfile) -> bool:
    """Test whether a column holds names of sound files."""
    return column.type == "text" and all(str(name).lower().endswith(SOUND_ENDINGS) for name in column.examples)
