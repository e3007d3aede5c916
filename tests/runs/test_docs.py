"""The pages of docs/: examples that run as printed, generated pages that are up to date, names that exist."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from support.tiny_runs import command, environment, flags, make_backbone, make_image_backbone, make_task, options

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Pages that people read: the committed ones of docs/, and those beside the code.
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "SECURITY.md", "tasks/README.md", "benchmarks/README.md")),
]
BLOCK = re.compile(r"^```(\w+)(?: title=\"(\S+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def titled(page: str) -> dict[str, str]:
    """The code blocks of a page that have a title, by their title."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return {title: code for _, title, code in BLOCK.findall(text) if title}


def write_all(page: str, folder: Path) -> None:
    """Write each titled block of a page to a file of that name."""
    for title, code in titled(page).items():
        (folder / title).write_text(code, encoding="utf-8")


def installed(folder: Path, group: str, module: str) -> dict[str, str]:
    """Environment in which the modules of a folder are those of an installed package, without running pip."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n")
    return {"PYTHONPATH": str(folder)}


def run(script: str, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(env), cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("docs") / "bert")


@pytest.fixture(scope="module")
def image_backbone(tmp_path_factory):
    return make_image_backbone(tmp_path_factory.mktemp("docs") / "vit")


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The generator of docs/."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("generate")
    finally:
        sys.path.remove(str(DOCS))


# The guides ---------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_method_of_the_guide_is_found_trained_saved_loaded_and_merged(backbone, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    write_all("add_a_method.md", site)
    assert titled("add_a_method.md")["add_a_method.py"] == (ROOT / "examples" / "add_a_method.py").read_text()
    env, task = installed(site, "peft_lab.methods", "add_a_method"), make_task(tmp_path / "data")
    assert "rankone" in command("methods", env=env).stdout
    assert "rankone" not in command("methods").stdout
    wrong = options(task, backbone, tmp_path / "out", method="rankone", method_args={"scal": 2})
    assert '"scale"' in command("train", *flags(wrong), env=env).stderr

    good = options(task, backbone, tmp_path / "out", method="rankone", method_args={"scale": 2.0}, max_steps=40)
    script = (
        "import torch, peft_lab\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification\n"
        f"peft_lab.train({good!r})\n"
        f"base = AutoModelForSequenceClassification.from_pretrained({str(backbone)!r}, num_labels=3)\n"
        f"model = PeftModel.from_pretrained(base, {good['output_dir']!r}).eval()\n"
        "x = {'input_ids': torch.tensor([[2, 4, 14, 3]])}\n"
        "with torch.no_grad():\n"
        "    adapted = model(**x).logits\n"
        "    with model.disable_adapter(): base = model(**x).logits\n"
        "    merged = model.merge_and_unload()(**x).logits\n"
        "print((adapted - base).abs().max().item(), (adapted - merged).abs().max().item())\n"
    )
    effect, difference = map(float, run(script, env, tmp_path).split()[-2:])
    assert effect > 1e-3
    assert difference < 1e-5


@pytest.mark.full
def test_the_task_of_the_guide_is_checked_and_trained_on(backbone, tmp_path):
    import peft_lab

    write_all("add_a_task.md", tmp_path)
    for title in titled("add_a_task.md"):
        if title.endswith(".yaml"):
            assert command("validate", title, cwd=tmp_path).returncode == 0
    done = peft_lab.train(options(tmp_path / "tickets.yaml", backbone, tmp_path / "out", max_steps=2))
    assert done.metrics["data"]["rows"] == {"train": 7, "validation": 2, "test": 3}
    assert set(done.metrics["metrics"]["test"]) >= {"accuracy", "f1"}


@pytest.mark.full
def test_the_kind_of_the_guide_is_found_trained_and_asked(backbone, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    write_all("add_a_kind.md", site)
    env = installed(site, "peft_lab.tasks", "ordinal")
    assert "ordinal" in command("tasks", env=env).stdout  # meals.yaml beside the module is a task of the package
    values = options(site / "meals.yaml", backbone, tmp_path / "out", max_steps=3)
    script = (
        "import peft_lab\n"
        f"found = peft_lab.train({values!r}).metrics['metrics']['validation']\n"
        "assert {'mae', 'accuracy'} <= found.keys(), found\n"
        f"answers = peft_lab.predict({values['output_dir']!r}, ['the rice', 'a song now'])\n"
        "assert len(answers) == 2 and set(answers) <= {'poor', 'good', 'great'}, answers\n"
    )
    run(script, env, tmp_path)
    unknown = (site / "meals.csv").read_text().replace("a fine soup,good", "a fine soup,god")
    (site / "meals.csv").write_text(unknown)
    refused = command("train", *flags(values | {"output_dir": tmp_path / "other"}), env=env)
    assert '"god" is not one of poor, good, great' in refused.stderr


@pytest.mark.full
def test_the_backbone_of_the_guide_gets_its_defaults(tmp_path, monkeypatch):
    from peft import get_peft_model
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from peft_lab.adapters import SSFConfig, SVFitConfig
    from peft_lab.backbones import family_table, module_roles, text_families

    config = GPTNeoXConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    # As if the lines stood in the file: they fill a table of their own, and the entry is put into the real one.
    pasted = {**vars(text_families), "TEXT": {}}
    exec(titled("add_a_backbone.md")["text_families.py"], pasted)
    monkeypatch.setitem(family_table.FAMILIES, "gpt_neox", pasted["TEXT"]["gpt_neox"])
    model = GPTNeoXForCausalLM(config)
    assert module_roles.modules_by_role(model, "attn.qkv") == [
        f"gpt_neox.layers.{block}.attention.query_key_value" for block in range(2)
    ]
    for role in pasted["TEXT"]["gpt_neox"].roles:
        assert module_roles.modules_by_role(model, role), role
    for connection in pasted["TEXT"]["gpt_neox"].residual:
        for name in (connection.norm_before, connection.output):
            assert isinstance(model.gpt_neox.layers[0].get_submodule(name), torch.nn.Module)
    adapted = get_peft_model(model, SVFitConfig())
    assert sum(name.endswith("svfit_delta.default") for name, _ in adapted.named_parameters()) == 2
    scaled = get_peft_model(GPTNeoXForCausalLM(config), SSFConfig())
    scaled(input_ids=torch.tensor([[1, 2, 3]]))
    run(titled("add_a_backbone.md")["look.py"], {}, tmp_path)


# Generated pages ----------------------------------------------------------------------------------------------------


def test_generated_pages_are_up_to_date(made):
    current = made.pages()
    pinned = re.search(r"^peft==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    # These two list what the installed peft has, so they are right for one version of it.
    of_peft = {"docs/methods/index.md", "docs/methods/lora.md"} if version("peft") != pinned[1] else set()
    for name, text in current.items():
        if name in of_peft:
            continue
        path = ROOT / name
        assert path.is_file(), f"{name} is missing; run `make docs`"
        assert path.read_text(encoding="utf-8") == text, f"{name} is out of date; run `make docs`"
    assert made.stale_pages(current) == []


def test_generated_pages_say_what_the_studies_found():
    svfit = (DOCS / "methods" / "svfit.md").read_text()
    assert "| svfit | snips, minilm | accuracy | 0.878 [0.845, 0.911] | 5 of 8 | cannot be told from full |" in svfit
    assert "worse than full" in svfit
    assert "No study of ours has compared it yet" in (DOCS / "methods" / "metadata_prompt.md").read_text()
    dvpt = (DOCS / "methods" / "dvpt.md").read_text()
    assert "| DVPT, 50 prompts | 202,836 | 1.283 | 1.639 | 1.289 | 1.500 |" in dvpt


@pytest.mark.parametrize("page", sorted(path.name for path in (DOCS / "methods").glob("*.md")))
def test_the_lines_of_each_method_run(page, backbone, image_backbone, capsys):
    for language, _, code in BLOCK.findall((DOCS / "methods" / page).read_text(encoding="utf-8")):
        if language == "python":
            tiny = image_backbone if "AutoModelForImageClassification" in code else backbone
            code, replaced = re.subn(r"^name = .*$", f"name = {str(tiny)!r}", code, flags=re.MULTILINE)
            assert replaced == 1
            exec(code, {})
            assert "trainable params" in capsys.readouterr().out


def test_every_method_has_a_page_with_its_paper():
    from peft_lab import registry

    for info in registry.builtin_methods():
        text = (DOCS / "methods" / f"{info.name}.md").read_text()
        assert not info.paper or f"arxiv.org/abs/{info.paper}" in text


def test_the_tree_names_every_package_and_nothing_else():
    text = (DOCS / "architecture.md").read_text()
    tree = text.split("<!-- tree -->")[1].split("<!-- /tree -->")[0].strip().strip("`").splitlines()[1:]
    named, above = set(), []
    for line in filter(str.strip, tree):
        depth, (name, _, words) = (len(line) - len(line.lstrip())) // 2, line.strip().partition(" ")
        above = [*above[:depth], name.rstrip("/")]
        named.add("/".join(above))
        assert len(words.split()) <= 8, line
    there = set()
    for top in ("adapters", "tasks", "peft_lab"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.relative_to(ROOT).parts
            there |= {"/".join(parts[:count]) for count in range(1, len(parts))}
            there |= {file.relative_to(ROOT).as_posix()} if file.name != "__init__.py" else set()
    assert named == there
    described = yaml.safe_load((DOCS / "tree.yaml").read_text())
    assert sorted(set(described) - there) == [], "docs/tree.yaml describes what is gone"


def test_equations_are_of_methods_that_exist():
    from peft_lab import registry

    known = {info.name for info in registry.builtin_methods()}
    assert set(yaml.safe_load((DOCS / "equations.yaml").read_text())) <= known


# Names --------------------------------------------------------------------------------------------------------------


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for dotted in sorted(set(re.findall(r"\bpeft_lab(?:\.\w+)+", text))):
        if dotted not in ("peft_lab.methods", "peft_lab.tasks"):  # groups of entry points
            assert found(dotted), f"{name_of(page)} names {dotted}"
    imports = re.findall(r"^\s*from (peft_lab[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
    for module, names in imports:
        for name in names.split(", "):
            if name != "RankOneConfig":
                assert found(f"{module}.{name}"), f"{name_of(page)} imports {name} from {module}"


def found(dotted: str) -> bool:
    """True if a dotted name is a module, or can be reached from one."""
    value, parts = importlib.import_module("peft_lab"), dotted.split(".")[1:]
    for count, part in enumerate(parts, 1):
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(".".join(("peft_lab", *parts[:count])))
            except ImportError:
                return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    from typer.main import get_command

    from peft_lab.cli.app import app

    commands = set(get_command(app).commands)
    text = page.read_text(encoding="utf-8")
    in_blocks = "\n".join(re.findall(r"^```\w*.*?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    pattern = r"(?:^|-m )peft[-_]lab ([a-z][a-z-]+)"
    named = {*re.findall(pattern, in_blocks, re.MULTILINE), *re.findall(r"`peft-lab ([a-z][a-z-]+)", text)}
    assert named <= commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    tops = "|".join(("adapters", "benchmarks", "docs", "examples", "peft_lab", "tasks", "tests"))
    for path in set(re.findall(rf"`((?:{tops})/[\w./-]*)`", text)):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_files_of_the_pictures_exist(made):
    steps = (*made.diagrams.GET_PEFT_MODEL, *made.diagrams.TRAIN)
    named = {name for step in steps for name in step.files}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def make_files(data: dict) -> None:
    """Make the files and folders, empty, that a shown task reads."""
    for names in data.get("files", {}).values():
        for name in [names] if isinstance(names, str) else names:
            path = Path(name.replace("*", "1"))
            folder = path if data["builder"].endswith("folder") else path.parent
            folder.mkdir(parents=True, exist_ok=True)
            if folder != path:
                path.touch()


# the gallery's pages make their data themselves, and are run as a whole
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "add_a_kind.md" and p.parent.name != "gallery"], ids=name_of
)
def test_files_that_pages_show_are_valid(page, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from peft_lab.cli.app import app

    monkeypatch.chdir(tmp_path)
    for _, title, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title.endswith(".yaml"):
            Path(title).write_text(code)
            make_files(yaml.safe_load(code).get("data", {}))
            result = CliRunner().invoke(app, ["validate", title])
            assert result.exit_code == 0, result.exception or result.output
