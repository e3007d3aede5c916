"""Options of one run. Imports nothing heavy.

They come from flags, a YAML or JSON file, or Python.

The names are those of the Hugging Face example scripts. Every flag of `transformers.TrainingArguments` is accepted too:
their names and types are read from the installed source text, so a misspelt one is found before torch is imported.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from peft_lab import registry
from peft_lab.backbones.quantized_loading import FORMS, check_form, spell_out
from peft_lab.errors import ConfigError, check_keys, did_you_mean
from peft_lab.runs.data_flags import with_task
from peft_lab.runs.optimization import OptimizationOptions, check_optimization
from peft_lab.utils import source_reader

DTYPES = ("auto", "float32", "bfloat16", "float16")

#: Flags of TrainingArguments that cannot mean anything here, with what to do instead.
REFUSED = {
    "do_train": "training is what this command does; use `peft-lab evaluate` to only evaluate",
    "label_names": "the kind of task knows its label columns",
    "local_rank": "accelerate sets the rank",
}


@dataclass(frozen=True)
class RunConfig(OptimizationOptions):
    """One training run: task + backbone + method + training arguments.

    Values are read as the types of their fields when it is made, so `"1e-3"` and `1e-3` are the same learning rate.

    Raises:
        ConfigError: a value of the wrong type, or an unknown flag in `training_arguments`.
    """

    task: str = field(metadata={"help": "Name of a built-in task, or the path of your own task YAML."})
    model_name_or_path: str = field(
        metadata={"help": "Backbone: a Hub id, a local folder (${PEFT_LAB_DATA} is replaced), or a short name."}
    )
    method: str = field(metadata={"help": "Name of the method; `peft-lab methods` lists them."})
    output_dir: str = field(metadata={"help": "Folder for the adapter, its metrics and its checkpoints."})
    method_args: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Fields of the method's config: --method_args rank=full layers_to_transform=[0,1]"},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the backbone on the Hub."}
    )
    dtype: str | None = field(default=None, metadata={"help": f"Dtype of the backbone: {', '.join(DTYPES)}."})
    quantization: str | None = field(
        default=None,
        metadata={"help": f"Load the linear layers of the backbone quantised: {', '.join(FORMS)}."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Short for --quantization nf4."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Short for --quantization int8."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many examples, drawn with a fixed seed."}
    )
    examples_per_class: int | None = field(
        default=None,
        metadata={"help": "Train on this many examples of each class, drawn with the run's seed (classification)."},
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for the validation split."})
    max_test_samples: int | None = field(default=None, metadata={"help": "The same for the test split."})
    max_seconds: float | None = field(
        default=None,
        metadata={"help": "Train for this time of steps; without max_steps or num_train_epochs, for all of it."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better one, and keep the best (off by default)."},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Join the training rows of a decoder to sequences of max_length tokens without padding."},
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Compute the loss of a decoder for this many tokens at a time, so that the logits of a batch, "
            "which take most of the memory where the vocabulary is large, are never there at once."
        },
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "`cached`: compute what the frozen backbone gives the head once, and train and evaluate on that; "
            "for methods whose gradient ends before the backbone."
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the rows before the training; one by default."}
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Tokenise the rows anew instead of taking what an earlier run has kept."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that stands in output_dir. Without it nothing is replaced."}
    )
    training_arguments: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Flags of transformers.TrainingArguments."}
    )

    def __post_init__(self) -> None:
        read: dict[str, Any] = {name: read_pairs(name, getattr(self, name)) for name in PAIRS}
        for spec in fields(self):
            if spec.name not in (*PAIRS, "training_arguments"):
                read[spec.name] = convert(spec.name, str(spec.type), getattr(self, spec.name))
        known = training_argument_fields()
        check_keys(self.training_arguments, known, "training_arguments")
        read["training_arguments"] = {
            name: convert(name, known[name].annotation, value) for name, value in self.training_arguments.items()
        }
        spell_out(read)
        for name, value in read.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "the run") -> RunConfig:
        """Build from flat values, as in a file or from flags.

        `where` names their source in errors.

        Raises:
            ConfigError: an unknown key, a missing one, or a value of the wrong type.
        """
        own, arguments = [spec.name for spec in fields(cls)], training_argument_fields()
        # flags may stand among the options, as on the command line, or nested, as `RunConfig` keeps them
        nested = values.get("training_arguments") or {}
        if not isinstance(nested, Mapping):
            raise ConfigError(f"training_arguments of {where} must be a mapping of flags, not {nested!r}.")
        flat = {**{k: v for k, v in values.items() if k != "training_arguments"}, **nested}
        for name in flat:
            if name not in own and name not in arguments:
                raise ConfigError(f'Unknown option "{name}" in {where}.{did_you_mean(name, [*own, *arguments])}')
        needed = ("task", "model_name_or_path", "method", "output_dir")
        missing = [name for name in needed if flat.get(name) in (None, "")]
        if missing:
            raise ConfigError(f"Missing in {where}: {', '.join(missing)}.")
        plain = {name: value for name, value in flat.items() if name in own}
        return cls(**plain, training_arguments={name: value for name, value in flat.items() if name not in own})

    def check(self) -> registry.MethodInfo:
        """Check names, arguments and values without torch; return the method's card.

        The options cannot change, so a second call does not check again.

        Raises:
            ConfigError: what is wrong, with the nearest known name.
        """
        return self._checked

    @cached_property
    def _checked(self) -> registry.MethodInfo:
        info = registry.method(self.method)
        if self.method_args and not info.config:
            raise ConfigError(f'Method "{info.name}" takes no method_args, got {", ".join(self.method_args)}.')
        registry.check_method_args(self.method, self.method_args)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(
                f'dtype "{self.dtype}" must be one of {", ".join(DTYPES)}.{did_you_mean(self.dtype, DTYPES)}'
            )
        self._check_quantization(info)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}; leave it out for no limit.")
        self._check_time()
        check_optimization(self, self.training_arguments, info, vars(self))
        self._check_chunks()
        if self.examples_per_class is not None and self.max_train_samples is not None:
            raise ConfigError("examples_per_class and max_train_samples both choose the examples; give one of them.")
        for name, mend in REFUSED.items():
            if self.training_arguments.get(name) not in (None, True):
                raise ConfigError(f"{name}={self.training_arguments[name]} has no meaning here: {mend}.")
        if Path(self.output_dir).expanduser().is_file():
            raise ConfigError(f'output_dir "{self.output_dir}" is a file; name a folder.')
        return info

    def _check_quantization(self, info: registry.MethodInfo) -> None:
        if self.quantization is None:
            return
        check_form(self.quantization)
        if info.place == "baseline" and "head" not in info.roles:
            raise ConfigError(
                f'Baseline "{info.name}" trains all weights, and quantised ones cannot be trained; leave '
                f'quantization="{self.quantization}" out, or choose a method with an adapter.'
            )

    def _check_time(self) -> None:
        if self.max_seconds is None:
            return
        if self.max_seconds <= 0:
            raise ConfigError(f"max_seconds must be positive, got {self.max_seconds}; leave it out for no limit.")
        # the learning rate falls with time then, and these two schedules need no number of steps
        schedule = str(self.training_arguments.get("lr_scheduler_type", "linear"))
        if schedule not in ("linear", "constant"):
            raise ConfigError(f'lr_scheduler_type "{schedule}" counts steps; with max_seconds use linear or constant.')
        if (self.training_arguments.get("warmup_steps") or 0) >= 1:
            raise ConfigError("warmup_steps must be a part of the time, such as 0.1, if max_seconds is given.")

    def _check_chunks(self) -> None:
        if self.loss_chunk_size is None:
            return
        for name in ("label_smoothing_factor", "torch_compile", "use_liger_kernel"):
            if self.training_arguments.get(name):
                raise ConfigError(f"loss_chunk_size has no place for {name}; leave one of them out.")

    def to_dict(self) -> dict[str, Any]:
        """Flat plain values that `from_mapping` reads back; unset options are left out."""
        values = asdict(self)
        arguments = values.pop("training_arguments")
        return {k: v for k, v in values.items() if v not in (None, {}, False)} | arguments

    def identity(self) -> dict[str, Any]:
        """Values that decide the result.

        Two runs with the same identity end with the same weights.
        """
        values = self.to_dict()
        return {
            name: value
            for name, value in values.items()
            if name not in _NO_INFLUENCE and not name.startswith(_NO_INFLUENCE_BEGINNINGS)
        }


#: Options that are mappings, given as `key=value` on the command line -> an example.
PAIRS = {"method_args": "rank=8", "learning_rates": "attn.q=1e-3", "prune": "share=0.5"}

_COUNTS = (
    *("max_train_samples", "max_eval_samples", "max_test_samples", "examples_per_class"),
    "early_stopping_patience",
    "loss_chunk_size",
    "preprocessing_num_workers",
)

#: Options that change where or how a run is written, not what it computes; and the beginnings of such names.
_NO_INFLUENCE = (
    *("output_dir", "overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers"),
    *("resume_from_checkpoint", "save_total_limit", "report_to"),
)
_NO_INFLUENCE_BEGINNINGS = (
    "do_",
    "log_",
    "logging_",
    "disable_tqdm",
    "run_name",
    "project",
    "push_",
    "hub_",
    "trackio_",
)


def load_run(
    file: str | Path | None = None, overrides: Mapping[str, Any] | None = None, where: str = "the command line"
) -> RunConfig:
    """Read a run from an optional file, with `overrides` on top.

    `method_args` are merged key by key. For options that name data (`data_flags`) a task file is written.

    Raises:
        ConfigError: an unreadable file, an unknown key or a wrong value.
    """
    values = read_run_file(file) if file is not None else {}
    if file is not None:
        where = f'"{file}"'
    overrides = dict(overrides or {})
    # a flag `--method_args rank=8` changes that argument and leaves the others of the file
    for name in PAIRS:
        if name in overrides:
            overrides[name] = {**read_pairs(name, values.get(name)), **read_pairs(name, overrides[name])}
    nested = values.pop("training_arguments", None) or {}
    # flattened first, so that a flag also wins over one that the file nests
    return RunConfig.from_mapping(with_task({**values, **nested, **overrides}), where)


def read_run_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ConfigError: there is no such file, it cannot be parsed, gives a key twice, or is not a mapping.
    """
    path = Path(path).expanduser()
    if not path.exists():
        near = did_you_mean(path.name, [f.name for f in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise ConfigError(f'There is no run file "{path}".{near}')
    from peft_lab.utils import plain_yaml

    # JSON is read by the same parser, because YAML includes it but for rare cases
    values = plain_yaml.read_file(path)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f'"{path}" must hold a mapping of option names to values.')
    return values


def method_args(value: Any) -> dict[str, Any]:
    """Read `method_args`, as `read_pairs` does."""
    return read_pairs("method_args", value)


def read_pairs(name: str, value: Any) -> dict[str, Any]:
    """Read an option that is a mapping, or `key=value` texts.

    Raises:
        ConfigError: a text without "=".
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {name: _plain(given) for name, given in value.items()}
    pairs = [value] if isinstance(value, str) else list(value)
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = str(pair).partition("=")
        if not equals or not key:
            raise ConfigError(f'{name} takes key=value, got "{pair}"; for example {PAIRS[name]}.')
        found[key.strip()] = _plain(text.strip())
    return found


def _plain(text: Any) -> Any:
    """Read a text as YAML does, and `1e-3` as a number.

    YAML 1.1 would want `1.0e-3`. What is no text stays as it is.
    """
    import yaml

    from peft_lab.utils import plain_yaml

    if not isinstance(text, str):
        return text
    try:
        return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else plain_yaml.read(text)
    except yaml.YAMLError:
        return text


@lru_cache(maxsize=1)
def training_argument_fields() -> dict[str, source_reader.Field]:
    """Fields of the installed `transformers.TrainingArguments`, read from its source."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ConfigError("transformers is not installed; `pip install transformers`.")
    return source_reader.dataclass_fields(Path(spec.origin).with_name("training_args.py"), "TrainingArguments")


#: Texts that a boolean option may be given as.
TRUE, FALSE = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "off", "0", "f", "n")


def convert(name: str, annotation: str, value: Any) -> Any:
    """`value` as the type that a dataclass field's annotation text asks for.

    Raises:
        ConfigError: it cannot be read as that type.
    """
    # "int | None" -> {"int", "None"}; the parameters of generic types are not checked
    types = {part.strip().split("[")[0] for part in annotation.split("|")}
    text = value.strip().lower() if isinstance(value, str) else None
    # where text is allowed too, none may be a name: report_to takes it so
    if value is None or (text in ("none", "null") and "None" in types and "str" not in types):
        if "None" in types:
            return None
        raise ConfigError(f"{name} must be {_spoken(types)}, not empty.")
    # before numbers, because a bool is an int to Python
    if "bool" in types and (isinstance(value, bool) or text in (*TRUE, *FALSE)):
        return value if isinstance(value, bool) else text in TRUE
    if isinstance(value, bool) and types & {"int", "float"}:
        raise ConfigError(f"{name} must be {_spoken(types)}, got {value!r}.")
    for wanted, read in (("int", _integer), ("float", float)):
        if wanted in types:
            try:
                return read(value)
            except (TypeError, ValueError):
                continue
    # the command line gives a list for every option that may be one
    if "list" in types and isinstance(value, list | tuple):
        return value[0] if len(value) == 1 and "str" in types else list(value)
    if types <= {"bool", "int", "float", "None"}:
        raise ConfigError(f"{name} must be {_spoken(types)}, got {value!r}.")
    if types <= {"str", "None"} and not isinstance(value, str | int | float):
        raise ConfigError(f"{name} must be {_spoken(types)}, got {value!r}.")
    if types <= {"list", "None"}:
        return [value]
    return str(value) if types <= {"str", "None"} else value


def _integer(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value)


def _spoken(types: set[str]) -> str:
    words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list"}
    return " or ".join(word for name, word in words.items() if name in types) or "a value"


def dump_yaml(values: Mapping[str, Any]) -> str:
    """`values` as YAML that `read_run_file` reads back."""
    import yaml

    # safe_dump refuses paths and enums, which JSON turns into texts
    return yaml.safe_dump(json.loads(json.dumps(dict(values), default=str)), sort_keys=False, allow_unicode=True)
