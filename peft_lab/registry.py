"""Registry of methods and kinds of task, by cards read from source.

A method is one Python file with a literal `METHOD = MethodInfo(...)`, a config dataclass, a layer class and one line
`register(METHOD, Config, Layer)`. Files below `peft_lab.adapters` are found by scanning that folder, third parties by
the entry-point group `peft_lab.methods`, peft's own tuners by scanning peft.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_lab.errors import ConfigError, TaskError, check_keys, did_you_mean
from peft_lab.utils import peft_source, source_reader

ENTRY_POINTS = "peft_lab.methods"
TASK_ENTRY_POINTS = "peft_lab.tasks"

#: Capabilities that a method may declare; each one is tested both ways. A property of one method alone is an attribute
#: of its config class (`peft_lab.tuners.AdapterConfig`).
CAPABILITIES = {
    "linear": "adapts nn.Linear",
    "conv1d": "adapts the transposed Conv1D of GPT-2",
    "conv2d": "adapts nn.Conv2d",
    "embedding": "adapts nn.Embedding",
    "norm": "adapts LayerNorm, BatchNorm and RMSNorm",
    "experts": "adapts the stacked weights of a mixture of experts, named in `target_parameters`",
    "merge": "merges exactly into the base weights",
    "mixed_batch": "serves rows of one batch with different adapters",
    "identity_start": "starts bit-exactly at the base model with its default configuration",
    "images": "is made for images alone",
    "texts": "is made for text encoders alone",
}

PLACES = ("weight", "feature", "sequence", "input", "head", "baseline", "peft")

#: Learning rates of peft's own tuners: measured where benchmarks/defaults.md has them, else peft's method_comparison.
_PEFT_LEARNING_RATES = {"ia3": 1e-2, "c3a": 1e-1, "vera": 3e-2, "ln_tuning": 3e-2, "prompt_tuning": 1e-2, "oft": 3e-4}
_DEFAULT_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class MethodInfo:
    """Card of a method.

    Every value is a literal in the method's file, so that it can be read without importing it.

    Attributes:
        name: lower-case name, used on the command line, as peft type (upper case) and as parameter prefix (`name_`).
        title: the method's name as its paper writes it.
        paper: arXiv id or address of the source.
        place: where it acts, one of `PLACES`.
        config: name of the config class in the method's file ("" for baselines, which take no arguments).
        roles: the module roles it adapts by default (`peft_lab.backbones.module_roles`).
        capabilities: names from `CAPABILITIES` that hold for it.
        learning_rate: default learning rate with AdamW; measured for short runs, see `benchmarks/defaults.md`. 0 for a
            method that takes no gradient steps, but is fitted to features that are read once.
        budget: most that a training step with the default config may cost, as (FLOPs, saved activations) relative to
            the frozen floor of a 384 wide ViT at 520 tokens (a BERT of that size, for texts alone); tested for every
            method.
        presets: values of config fields by the name of a relative of the method: `preset=NAME` among its arguments
            stands for them. A field whose value is `...` must be given beside it.
        row_columns: names of the columns, with a number for each row, that an adapter can read beside the inputs.
        module: dotted module that defines it, filled in by the registry; for a tuner of peft, peft's.
        path: its source file, filled in by the registry.
        card_module: dotted module that holds the card, filled in by the registry.
    """

    name: str
    title: str
    paper: str
    place: str
    config: str = ""
    roles: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    learning_rate: float = _DEFAULT_LEARNING_RATE
    budget: tuple[float, float] = (1.1, 1.2)
    # A frozen dataclass hashes its fields, and a mapping has no hash.
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    row_columns: tuple[str, ...] = ()
    module: str = ""
    path: Path | None = None
    card_module: str = ""

    def __post_init__(self) -> None:
        # The name becomes a peft type and the prefix of parameters, so few characters are allowed.
        if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", self.name):
            raise ConfigError(f'Method name "{self.name}" must be lower case letters, digits and inner underscores.')
        if self.place not in PLACES:
            raise ConfigError(f'Place "{self.place}" of method "{self.name}" must be one of {", ".join(PLACES)}.')
        for capability in self.capabilities:
            if capability not in CAPABILITIES:
                hint = did_you_mean(capability, CAPABILITIES)
                raise ConfigError(f'Method "{self.name}" declares an unknown capability "{capability}".{hint}')

    @property
    def takes_steps(self) -> bool:
        """True unless it is fitted to features, without gradient steps."""
        return self.learning_rate > 0

    def can(self, capability: str) -> bool:
        """Test whether the method declares a capability."""
        if capability not in CAPABILITIES:
            raise ConfigError(f'Unknown capability "{capability}".{did_you_mean(capability, CAPABILITIES)}')
        return capability in self.capabilities


@dataclass(frozen=True)
class KindInfo:
    """Card of a kind of task.

    Every value is a literal in the kind's file, so that it can be read without importing it.

    Attributes:
        name: the file's name and the `kind` of a task file.
        title: one line for listings.
        runtime: name of the class in the kind's file that loads, prepares, measures and predicts.
        columns: canonical column name -> whether a task must name it.
        one_of: columns of which a task names exactly one.
        forms: groups of columns, of which a task without a template names all of exactly one.
        several: columns for which a task may name a list of the source's columns; `name[0]`, `name[1]`, ... are then
            the canonical ones.
        answers: columns that hold the answer, which a model must not look at.
        settings: the optional keys of a task file that this kind reads.
        options: further keys of a task file that this kind alone reads -> default value, whose type a value must have;
            the kind checks the values of one whose default is None. `Task.options` holds them.
        problem_type: that of its tasks, as in a config of transformers, unless a task file says otherwise.
        metrics: our metrics that fit, the default first.
        regression_metrics: those for `problem_type: regression`.
        task_type: peft's `TaskType`, None where peft has none.
        pipeline_tag: the Hub's name for what a trained model does.
        default_dtype: dtype of a loaded model unless the caller says otherwise.
        source_head: it answers by the head that the backbone was pretrained with, so that the backbone without an
            adapter has scores that mean something.
        module: dotted module that defines it, filled in by the registry.
    """

    name: str
    title: str
    runtime: str
    columns: Mapping[str, bool] = field(default_factory=dict, hash=False)
    one_of: tuple[str, ...] = ()
    forms: tuple[tuple[str, ...], ...] = ()
    several: tuple[str, ...] = ()
    answers: tuple[str, ...] = ("label",)
    settings: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    problem_type: str = "single_label_classification"
    metrics: tuple[str, ...] = ()
    regression_metrics: tuple[str, ...] = ()
    task_type: str | None = None
    pipeline_tag: str = ""
    default_dtype: str = "float32"
    source_head: bool = False
    module: str = ""

    def metrics_for(self, problem_type: str) -> tuple[str, ...]:
        """Our metrics that fit a problem type, the default first."""
        return self.regression_metrics if problem_type == "regression" else self.metrics


@dataclass(frozen=True)
class RecipeInfo:
    """Card of a training recipe.

    Attributes:
        name: lower-case name.
        title: the name that its paper gives it.
        paper: arXiv id or address of the source.
        module: dotted module that defines it.
    """

    name: str
    title: str
    paper: str
    module: str = ""


def list_methods() -> dict[str, MethodInfo]:
    """Every method by name, without importing torch or peft.

    These are ours, those of third parties, and each tuner of peft.
    """
    found = dict(_peft_methods())
    for info in (*builtin_methods(), *third_party_methods()):
        # one of ours may describe a tuner of peft (LoRA), but no two cards may share a name
        clash = found.get(info.name)
        if clash is not None and clash.place != "peft":
            raise ConfigError(f'Method "{info.name}" is defined by both {clash.module} and {info.module}.')
        found[info.name] = info
    return dict(sorted(found.items(), key=lambda item: (item[1].place == "peft", item[0])))


def method(name: str) -> MethodInfo:
    """Card of one method.

    Raises `ConfigError` if there is none, with the nearest name or the method that has a preset of this name.
    """
    known = list_methods()
    if name not in known:
        ours = ", ".join(n for n, info in known.items() if info.place != "peft")
        owners = [n for n, info in known.items() if name in info.presets]
        hint = f' It is a preset of "{owners[0]}": take that, with preset={name} among its arguments.' if owners else ""
        raise ConfigError(
            f'Unknown method "{name}".{hint or did_you_mean(name, known)} Methods: {ours}, and the tuners of peft.'
        )
    return known[name]


def command_modules() -> list[str]:
    """Modules of the methods' own commands.

    Each is a `cli.py` beside a method's file, with a function `register(app)`.
    """
    found = []
    for info in builtin_methods():
        package = info.module.rpartition(".")[0]
        if info.path is not None and info.path.with_name("cli.py").is_file() and package.count(".") == _FOLDER_DEPTH:
            found.append(f"{package}.cli")
    return sorted(set(found))


#: Dots in the package of a method that has a folder of its own: peft_lab.adapters.<place>.<folder>.
_FOLDER_DEPTH = 3


def list_recipes() -> dict[str, RecipeInfo]:
    """Every training recipe by name.

    Recipes are loops or losses beyond Trainer's own, such as distillation.

    A recipe is one file of `peft_lab.training.recipes` with a literal `RECIPE = RecipeInfo(...)`.
    """
    found = {}
    for file in sorted(Path(__file__).with_name("training").glob("recipes/[!_]*.py")):
        values = source_reader.module_call(file, "RECIPE")
        if values:
            found[values["name"]] = RecipeInfo(**values, module=f"peft_lab.training.recipes.{file.stem}")
    return found


def config_fields(name: str) -> dict[str, source_reader.Field]:
    """Fields of a method's config, read from source; empty without a source."""
    info = method(name)
    if info.path is None or not info.config:
        return {}
    return dict(_fields_in(info.path, info.config))


@lru_cache(maxsize=256)
def _fields_in(path: Path, config: str) -> dict[str, source_reader.Field]:
    """Fields of a config class that a method's file defines or imports."""
    elsewhere = {**_config_bases(path), **peft_source.config_files()}
    file = path if config in source_reader.classes(path) else elsewhere.get(config)
    fields = source_reader.dataclass_fields(file, config, elsewhere) if file else {}
    return {name: field for name, field in fields.items() if name not in _MACHINE_FIELDS}


@lru_cache(maxsize=256)
def _config_bases(path: Path) -> dict[str, Path]:
    """Files of the config classes that a method may inherit from.

    They stand in `peft_lab.tuners` and in the method's own folder.
    """
    tuners = Path(__file__).with_name("tuners")
    own_folder = [] if path.parent.name in PLACES else sorted(path.parent.glob("*.py"))
    found: dict[str, Path] = {}
    for file in (*sorted(tuners.rglob("*.py")), *own_folder):
        # parsing every file would take longer than all the rest of a listing
        if not re.search(r"^class \w+Config\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            continue
        for name in source_reader.classes(file):
            if name.endswith("Config"):
                found[name] = file
    return found


#: Fields that peft or peft-lab fills in; a user never sets them as method arguments.
_MACHINE_FIELDS = frozenset(
    (
        *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("fingerprints", "requires", "runtime_config"),
    )
)


def check_method_args(name: str, args: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an argument that the method's config lacks."""
    fields = config_fields(name)
    # a plug-in whose source cannot be found is checked by its config class, when that is imported
    if fields or not method(name).config:
        check_keys(with_preset(name, args), fields, f'method "{name}"', lists=f"peft-lab methods {name}")


def learns_activation(info: MethodInfo) -> bool:
    """Test whether a method's source names parameters of a learned activation."""
    return info.path is not None and source_reader.sets_attribute(info.path, "activation_names")


def with_preset(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Method arguments, with those that a `preset` among them stands for.

    Arguments given beside it go first.

    Raises:
        ConfigError: the method has no such preset, or the preset needs an argument that is not given.
    """
    given = dict(args)
    info = method(name)
    # a tuner of peft may have a field of its own that is called so
    if "preset" not in given or info.place == "peft":
        return given
    preset, presets = given.pop("preset"), info.presets
    if preset not in presets:
        known = f"Presets: {', '.join(presets)}." if presets else "It has none; give its arguments themselves."
        raise ConfigError(f'Method "{name}" has no preset "{preset}".{did_you_mean(str(preset), presets)} {known}')
    values = {**presets[preset], **given}
    missing = next((key for key, value in values.items() if value is ...), None)
    if missing is not None:
        raise ConfigError(f'Preset "{preset}" of method "{name}" needs {missing}; give it beside preset={preset}.')
    return values


def _card(path: Path, module: str) -> MethodInfo | None:
    values = source_reader.module_call(path, "METHOD")
    return MethodInfo(**values, module=module, path=path, card_module=module) if values else None


@lru_cache(maxsize=1)
def builtin_methods() -> tuple[MethodInfo, ...]:
    """Cards of the methods below `peft_lab.adapters`: `<place>/<method>.py` or files of `<place>/<folder>/`."""
    spec = importlib.util.find_spec("peft_lab.adapters")
    found = []
    for root in (spec.submodule_search_locations if spec else None) or []:
        for file in sorted(Path(root).rglob("*.py")):
            steps = file.relative_to(root).with_suffix("").parts
            # a look at the text first: parsing every file would cost more than the whole listing
            if file.name.startswith("_") or "METHOD = MethodInfo(" not in file.read_text(encoding="utf-8"):
                continue
            card = _card(file, ".".join(("peft_lab.adapters", *steps)))
            if card is not None:
                found.append(_with_peft_module(card))
    return tuple(found)


def _with_peft_module(info: MethodInfo) -> MethodInfo:
    """Card that points to peft's files if it describes peft's tuner."""
    tuner = peft_source.tuners().get(info.name)
    return replace(info, module=tuner.module, path=tuner.path) if tuner and info.place != "baseline" else info


@lru_cache(maxsize=1)
def list_kinds() -> dict[str, KindInfo]:
    """Every kind of task by name, without importing torch or the kinds.

    These are ours and those of third parties.
    """
    spec = importlib.util.find_spec("peft_lab.tasks")
    found: dict[str, KindInfo] = {}
    for entry in importlib.metadata.entry_points(group=TASK_ENTRY_POINTS):
        path = _module_file(entry)
        card = _kind_card(path, entry.module) if path else None
        if card is not None:
            found[card.name] = card
    # Our kinds come last, so they win over a plug-in of the same name.
    for root in (spec.submodule_search_locations if spec else None) or []:
        for file in sorted(Path(root).glob("kinds/[!_]*.py")):
            card = _kind_card(file, f"peft_lab.tasks.kinds.{file.stem}")
            if card is not None:
                found[card.name] = card
    return found


def kind_info(name: str) -> KindInfo:
    """Card of one kind of task.

    Raises `TaskError` with the nearest name if there is none.
    """
    known = list_kinds()
    if name not in known:
        names = sorted(known)
        raise TaskError(f'Unknown kind of task "{name}".{did_you_mean(name, names)} Kinds: {", ".join(names)}.')
    return known[name]


def _kind_card(path: Path, module: str) -> KindInfo | None:
    values = source_reader.module_call(path, "KIND")
    return KindInfo(**values, module=module) if values else None


@lru_cache(maxsize=1)
def third_party_methods() -> tuple[MethodInfo, ...]:
    found = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        path = _module_file(entry)
        problem = "no readable module-level METHOD = MethodInfo(...) with literal values"
        try:
            card = _card(path, entry.module) if path else None
        except (TypeError, ValueError) as error:  # a broken plug-in must not take peft down with it
            card, problem = None, f"a METHOD card that cannot be read ({error})"
        if card is None:
            warnings.warn(
                f'Entry point "{entry.name}" of group {ENTRY_POINTS} is left out: {entry.module} has {problem}.',
                stacklevel=2,
            )
            continue
        found.append(card)
    return tuple(found)


def _module_file(entry: importlib.metadata.EntryPoint) -> Path | None:
    # `find_spec` of a dotted name imports the parent package; the files of the distribution are looked at first
    if entry.dist is not None:
        for suffix in (".py", "/__init__.py"):
            path = Path(str(entry.dist.locate_file(entry.module.replace(".", "/") + suffix)))
            if path.is_file():
                return path
    try:
        spec = importlib.util.find_spec(entry.module)
    except (ImportError, ValueError):  # a parent package that is gone
        return None
    return Path(spec.origin) if spec and spec.origin else None


@lru_cache(maxsize=1)
def _peft_methods() -> dict[str, MethodInfo]:
    """Cards of peft's own tuners, which have none themselves."""
    found = {}
    for tuner in peft_source.tuners().values():
        rate = _PEFT_LEARNING_RATES.get(tuner.name, _DEFAULT_LEARNING_RATE)
        found[tuner.name] = MethodInfo(
            name=tuner.name,
            title=tuner.folder,
            paper="",
            place="peft",
            config=tuner.config,
            learning_rate=rate,
            module=tuner.module,
            path=tuner.path,
        )
    return found
