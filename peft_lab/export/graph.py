"""Graphs of a trained model, for torch.export and ONNX, compared with the model itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_lab.adapter_files.names import ADAPTER_CONFIG, write_json
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import Loaded, load
from peft_lab.runs.run_folder import read_tuned, refuse_filled, write_labels
from peft_lab.utils.atomic_files import new_folder

#: Files of the two formats, and the record beside them.
ONNX_FILE, TORCH_FILE, RECORD = "model.onnx", "model.pt2", "export.json"
#: Largest difference of the outputs, as a part of the largest output (at least of 1), in float32.
TOLERANCE = 1e-4
#: Rows and tokens with which a graph is made, and others with which it is compared.
_TRACED, _COMPARED = (2, 8), ((3, 5), (1, 11))

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """Graph that was written.

    Attributes:
        file: the graph.
        inputs: names of its inputs, each with the names of its axes; a number stands for a fixed size.
        merged: True if the adapter is merged into the weights, False if the graph has it beside them.
        difference: largest difference from the outputs of the model, as a part of its largest output.
    """

    file: Path
    inputs: dict[str, list[str | int]]
    merged: bool
    difference: float


def to_onnx(
    adapter: str | Path, out: str | Path, model_name_or_path: str | None = None, *, allow_other_base: bool = False
) -> Exported:
    """Write the ONNX graph of a trained model, float32, with config and processor.

    Args:
        adapter: folder of a run, any folder of a peft adapter, or a Hub id.
        out: a folder that is not there yet or empty.
        model_name_or_path: the base to load instead of the one that the adapter names.
        allow_other_base: warn instead of refusing where the base's weights differ from those trained on.

    Raises:
        ConfigError: a library is missing, the model cannot be exported, or the outputs of the graph differ from its
            own; then nothing of `out` is left.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"The export to ONNX needs {', '.join(missing)}; `pip install 'peft-lab[onnx]'`.")
    return _export(adapter, out, model_name_or_path, allow_other_base, ONNX_FILE, _write_onnx)


def to_torch_export(
    adapter: str | Path, out: str | Path, model_name_or_path: str | None = None, *, allow_other_base: bool = False
) -> Exported:
    """Write the graph of a trained model that `torch.export.load` reads, float32, with config and processor.

    Args:
        adapter, out, model_name_or_path, allow_other_base: as for `to_onnx`.

    Raises:
        ConfigError: as of `to_onnx`.
    """
    return _export(adapter, out, model_name_or_path, allow_other_base, TORCH_FILE, _write_torch)


class _Logits(nn.Module):
    """Model whose only output is its logits, without a cache."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

        def forward(**inputs: Tensor) -> Tensor:
            return model(**inputs, **options).logits

        # torch.export reads the names of the inputs here, and takes no dynamic axes of `**inputs`
        named: Any = forward
        named.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in names])
        self.forward = named


def _export(
    adapter: str | Path,
    out: str | Path,
    base: str | None,
    allow_other_base: bool,
    file: str,
    write: Callable[[Any, Inputs, Path], Callable[[Inputs], Tensor]],
) -> Exported:
    out = Path(out).expanduser()
    refuse_filled(out)
    loaded = load(adapter, None, base, "float32", allow_other_base=allow_other_base)
    model, merged = _merged(loaded)
    samples = [_sample(loaded.processor, model, *shape) for shape in (_TRACED, *_COMPARED)]
    whole = _Logits(model, [*samples[0]]).eval()
    axes = {name: _axes(name, value) for name, value in samples[0].items()}
    with torch.no_grad(), new_folder(out) as place:
        run = write(_program(whole, samples[0], axes, adapter), samples[0], place / file)
        found = [_difference(run(sample), whole(**sample), sample) for sample in samples]
        if not max(found) <= TOLERANCE:
            raise ConfigError(
                f'The graph of "{adapter}" gives other outputs than the model: they differ by {max(found):.1e} of the '
                f"largest, more than {TOLERANCE:.0e}; nothing was written."
            )
        model.config.save_pretrained(place)
        loaded.processor.save_pretrained(place)
        if loaded.labels:
            write_labels(place, loaded.labels, read_tuned(loaded.folder))
        record = {"inputs": axes, "outputs": ["logits"], "merged": merged}
        write_json(place / RECORD, record | {"largest_difference": max(found), "tolerance": TOLERANCE})
    return Exported(out / file, axes, merged, max(found))


def _merged(loaded: Loaded) -> tuple[Any, bool]:
    """Model without an adapter where the method merges, else with it."""
    model: Any = loaded.model
    if not (loaded.folder / ADAPTER_CONFIG).is_file():
        return model, True
    try:
        return model.merge_and_unload(safe_merge=True), True
    except (NotImplementedError, AttributeError, ValueError):
        return model, False


def _sample(processor: Any, model: Any, rows: int, tokens: int) -> Inputs:
    """Random inputs of a model, of the form that its processor makes."""
    draw = torch.Generator().manual_seed(rows)
    if not isinstance(processor, PreTrainedTokenizerBase):
        from PIL import Image

        pixels = torch.randint(256, (rows, 48, 64, 3), dtype=torch.uint8, generator=draw).numpy()
        made = processor([Image.fromarray(image) for image in pixels], return_tensors="pt")
        return {"pixel_values": made["pixel_values"]}
    ids = torch.randint(len(processor), (rows, tokens), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, rows):  # rows of different lengths, as a batch has them
        mask[row, tokens - row :] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in processor.model_input_names and "token_type_ids" in _arguments(model):
        made["token_type_ids"] = torch.zeros_like(ids)
    return {name: value for name, value in made.items() if name in _arguments(model)}


def _arguments(model: Any) -> set[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {*signature(base.forward).parameters}


def _axes(name: str, value: Tensor) -> list[str | int]:
    return ["batch", "tokens"] if value.ndim == 2 else ["batch", *value.shape[1:]]


def _dynamic(sizes: Sequence[str | int]) -> dict[int, Any]:
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(sizes) if isinstance(size, str)}


def _program(model: nn.Module, sample: Inputs, axes: dict[str, Any], adapter: str | Path) -> Any:
    """Graph of a model by torch.export, whose named axes take any size."""
    dynamic = {name: _dynamic(sizes) for name, sizes in axes.items()}
    try:
        return torch.export.export(model, (), sample, dynamic_shapes=dynamic, strict=False)
    # torch.export raises errors of many classes, those of its own and of what it runs
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f'"{adapter}" cannot be exported by torch.export: {first}') from error


def _write_torch(program: Any, sample: Inputs, file: Path) -> Callable[[Inputs], Tensor]:
    torch.export.save(program, file)
    # as it will be loaded
    module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


def _write_onnx(program: Any, sample: Inputs, file: Path) -> Callable[[Inputs], Tensor]:
    import onnxruntime

    try:
        torch.onnx.export(
            program, (), str(file), kwargs=sample, input_names=[*sample], output_names=["logits"], verbose=False
        )
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"torch.onnx cannot write this model: {first}") from error
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common one of their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"ONNX Runtime cannot run this model: {first}") from error

    def run(inputs: Inputs) -> Tensor:
        given = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return run


def _difference(found: Tensor, expected: Tensor, inputs: Inputs) -> float:
    """Largest difference of the outputs, as a part of the largest; padding does not count."""
    if found.shape != expected.shape:
        return float("inf")
    mask = inputs.get("attention_mask")
    if mask is not None and expected.shape[:-1] == mask.shape:
        found, expected = found[mask.bool()], expected[mask.bool()]
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
