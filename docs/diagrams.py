"""Pictures of the architecture page, written as SVG by hand: the same input gives the same bytes, without a library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _MARGIN, _BOX, _GAP = 880, 16, 62, 22
_SANS = "font-family='Helvetica, Arial, sans-serif'"
_MONO = "font-family='DejaVu Sans Mono, Menlo, Consolas, monospace'"


@dataclass(frozen=True)
class Step:
    """One box of a picture: what happens, a sentence on it, and the files where it happens."""

    title: str
    detail: str
    files: tuple[str, ...]


GET_PEFT_MODEL = (
    Step(
        "import peft_lab",
        "Methods register with peft as soon as peft is imported.",
        ("peft_lab/_register_on_import.py", "peft_lab/tuners/registration.py"),
    ),
    Step(
        "SVFitConfig()",
        "Types and values are checked; unknown fields are errors.",
        ("peft_lab/tuners/config.py", "adapters/weight/svfit/method.py"),
    ),
    Step(
        "get_peft_model(model, config)",
        "peft makes the method's tuner, a subclass of AdapterTuner.",
        ("peft_lab/tuners/tuner.py",),
    ),
    Step(
        "roles to modules",
        "attn.q and attn.v become paths in this model; so does its head.",
        ("peft_lab/backbones/target_modules.py", "peft_lab/backbones/family_table.py"),
    ),
    Step(
        "wrap each module",
        "SVFitLayer(base) computes U, s, Vh and holds delta = 0.",
        ("peft_lab/tuners/layer.py", "peft_lab/tuners/spectral/svd.py"),
    ),
    Step(
        "record the base",
        "Hashes of the adapted weights go into the config.",
        ("peft_lab/adapter_files/base_fingerprint.py",),
    ),
    Step(
        "model(**batch)",
        "base(x) + U diag(delta) Vh x: at first the base, bit for bit.",
        ("peft_lab/tuners/layer.py", "peft_lab/tuners/spectral/kernels.py"),
    ),
)

TRAIN = (
    Step(
        "peft-lab train run.yaml",
        "Options, method and arguments are checked without torch.",
        ("peft_lab/cli/runs.py", "peft_lab/runs/run_config.py", "peft_lab/registry.py"),
    ),
    Step(
        "the task",
        "One YAML file with a closed schema; its kind says the rest.",
        ("peft_lab/data/task_registry.py", "peft_lab/data/task_schema.py"),
    ),
    Step(
        "the rows",
        "Read, split once with a fixed seed, fingerprinted.",
        ("peft_lab/data/splits.py",),
    ),
    Step(
        "the backbone",
        "The kind loads tokenizer or image processor, and the model.",
        ("tasks/kinds", "peft_lab/loading/load_run.py"),
    ),
    Step(
        "the adapter",
        "Put on by get_peft_model, as in the picture above.",
        ("peft_lab/loading/load_run.py", "peft_lab/tuners"),
    ),
    Step(
        "training",
        "transformers.Trainer, continued from the last checkpoint.",
        ("peft_lab/training/run.py", "peft_lab/training/trainer.py"),
    ),
    Step(
        "scores",
        "Validation rows, then the test rows: once.",
        ("peft_lab/training/run.py", "peft_lab/metrics"),
    ),
    Step(
        "the folder",
        "Adapter, processor, labels, metrics.json and a filled card.",
        ("peft_lab/runs/run_folder.py", "peft_lab/hub/model_card.py"),
    ),
)


def pictures() -> dict[str, str]:
    """The text of each SVG file by its name."""
    return {
        "get_peft_model": flow("From get_peft_model(model, SVFitConfig()) to the first forward", GET_PEFT_MODEL),
        "train": flow("A run: peft-lab train", TRAIN),
    }


def flow(title: str, steps: Sequence[Step]) -> str:
    """Steps from top to bottom as SVG: a box with title and detail, and its files beside it."""
    height = 2 * _MARGIN + 30 + len(steps) * (_BOX + _GAP) - _GAP
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' height='{height}' "
        f"role='img'>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{_WIDTH}' height='{height}' fill='#ffffff'/>",
        _text(_MARGIN, _MARGIN + 16, title, f"{_SANS} font-size='16' font-weight='bold' fill='#1d2733'"),
    ]
    top = _MARGIN + 34
    for index, step in enumerate(steps):
        if index:
            lines.append(_arrow(top - _GAP))
        lines += _box(step, top)
        top += _BOX + _GAP
    return "\n".join([*lines, "</svg>"]) + "\n"


def _box(step: Step, top: int) -> list[str]:
    left, width = _MARGIN, 470
    found = [
        f"<rect x='{left}' y='{top}' width='{width}' height='{_BOX}' rx='6' fill='#eef4fb' stroke='#1f5fa8'/>",
        _text(left + 14, top + 25, step.title, f"{_MONO} font-size='14' font-weight='bold' fill='#1f5fa8'"),
        _text(left + 14, top + 47, step.detail, f"{_SANS} font-size='14' fill='#1d2733'"),
    ]
    start = top + _BOX // 2 + 4 - 9 * (len(step.files) - 1)
    for number, name in enumerate(step.files):
        style = f"{_MONO} font-size='12' fill='#566573'"
        found.append(_text(left + width + 18, start + 18 * number, name, style))
    return found


def _arrow(top: int) -> str:
    x, end = _MARGIN + 235, top + _GAP - 1
    path = f"M{x} {top + 2} V{end} M{x - 5} {end - 6} L{x} {end} L{x + 5} {end - 6}"
    return f"<path d='{path}' fill='none' stroke='#566573'/>"


def _text(x: int, y: int, text: str, style: str) -> str:
    return f"<text x='{x}' y='{y}' {style}>{escape(text)}</text>"
