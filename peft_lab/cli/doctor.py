"""Command `doctor`, which checks an installation and says how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from peft_lab import registry
from peft_lab.cli.output import Json, print_json, print_out
from peft_lab.utils.cache import cache_dir
from peft_lab.utils.data_root import DATA_VARIABLE
from peft_lab.utils.terminal import shown
from peft_lab.utils.text import one_line

DISTRIBUTION = "peft-lab"
#: Entry points that `import torch` calls, and PyTorch's and our switch for them.
BACKENDS = "torch.backends"
TORCH_SWITCH, OUR_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD", "PEFT_LAB_AUTOLOAD"
#: Extras whose packages are tools of this project's developers.
_FOR_DEVELOPERS = ("test", "dev", "integrations", "peft-suite")
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}
#: Prints the names of all types of adapter that peft knows in a program that does not import peft_lab.
_TYPES_WITHOUT_US = "import json; from peft import PeftType; print(json.dumps([str(t.value) for t in PeftType]))"


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        status: "ok"; "warning" for what some uses alone are concerned by; "failed".
        what: what was checked, and what was found.
        mend: what to do; "" if nothing.
    """

    status: Literal["ok", "warning", "failed"]
    what: str
    mend: str = ""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(doctor)


def doctor(as_json: Json = False) -> None:
    """Check the installation: one line for each check, with the mend. Exit status 1 if one has failed."""
    found = []
    for finding in findings():
        found.append(finding)
        if not as_json:
            mend = f" Mend: {finding.mend}" if finding.mend else ""
            print_out(f"[{_COLOURS[finding.status]}]{finding.status}[/] {shown(one_line(finding.what + mend))}")
    if as_json:
        print_json([asdict(finding) for finding in found])
    raise typer.Exit(1 if any(finding.status == "failed" for finding in found) else 0)


def findings() -> Iterator[Finding]:
    """Findings of all checks, each made when it is asked for; an error in a check is a finding too."""
    for check in (_packages, _backends, _cache, _data):
        yield from _attempted(check)
    found = list(_attempted(_torch))
    yield from found
    if found[0].status == "failed":
        # a second import of what is half imported can end the interpreter
        without = "methods, plug-ins, autoload, accelerators: not checked, because torch cannot be imported"
        yield Finding("failed", without, "mend the lines above first")
        return
    for check in (_methods, _plug_ins, _autoload, _accelerators):
        yield from _attempted(check)


def _attempted(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # what is broken in an installation can break a check in any way
        yield Finding("failed", f"{check.__name__.strip('_')}: {_named(error)}", "see the other lines")


def _packages() -> Iterator[Finding]:
    """Installed versions against the ranges that this version of peft-lab asks for."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("failed", "packages: peft-lab runs from a folder and is not installed", "pip install -e . there")
        return
    from packaging.requirements import Requirement

    fit = 0
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        optional = marker is not None and not marker.evaluate({"extra": ""})
        if marker is not None and optional and any(marker.evaluate({"extra": extra}) for extra in _FOR_DEVELOPERS):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                yield Finding("failed", f"{requirement.name}: not installed", _install(requirement))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fit += 1
        else:
            wanted = f"{requirement.name} {version}: peft-lab was tried with {requirement.specifier}"
            yield Finding("warning" if optional else "failed", wanted, _install(requirement))
    yield Finding("ok", f"packages: {fit} have versions that peft-lab {_version()} was tried with")


def _install(requirement: object) -> str:
    return f'pip install "{str(requirement).partition(";")[0].strip()}"'


def _version() -> str:
    return importlib.metadata.version(DISTRIBUTION)


def _backends() -> Iterator[Finding]:
    """Targets of the entry points that `import torch` calls; one that is gone makes that import fail."""
    for point in importlib.metadata.entry_points(group=BACKENDS):
        owner = point.dist.name if point.dist is not None else "unknown"
        what = f"entry point {point.name} of {owner} in {BACKENDS}"
        # found without being run, because `import torch` runs it in the next check
        if importlib.util.find_spec(point.module.partition(".")[0]) is None:
            mend = f"pip uninstall {owner}, or install it again; {TORCH_SWITCH}=0 lets torch be imported meanwhile"
            yield Finding("failed", f"{what}: module {point.module} is gone, so `import torch` fails", mend)
        else:
            yield Finding("ok", f"{what}: {point.value}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        cause = f" ({_named(error.__cause__)})" if error.__cause__ is not None else ""
        mend = f"mend the entry points above, or set {TORCH_SWITCH}=0, if it names a backend; else install torch again"
        yield Finding("failed", f"import torch: {_named(error)}{cause}", mend)
        return
    yield Finding("ok", f"import torch: {torch.__version__}")


def _methods() -> Iterator[Finding]:
    """Methods of peft-lab that peft knows."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(getattr(key, "value", key)) for key in PEFT_TYPE_TO_CONFIG_MAPPING}
    missing = sorted(name for name in _own_types() if name not in known)
    if missing:
        yield Finding("failed", f"methods: peft does not know {', '.join(missing)}", "install peft-lab again")
    else:
        yield Finding("ok", f"methods: peft knows all {len(_own_types())} of peft-lab")
    from peft_lab.tuners.registration import newer_peft_needed

    needed = newer_peft_needed()
    if needed:
        what = f"transformers asks for peft {needed} in model.add_adapter and model.load_adapter: both fail for all"
        yield Finding("warning", what, "use get_peft_model and PeftModel.from_pretrained, or an older transformers")


def _own_types() -> list[str]:
    """Names under which peft knows the methods that have a config of their own in this package."""
    infos = registry.builtin_methods()
    return [info.name.upper() for info in infos if info.config and not info.module.startswith("peft.")]


def _plug_ins() -> Iterator[Finding]:
    """Entry points of other packages that bring methods and tasks along."""
    for group in (registry.ENTRY_POINTS, registry.TASK_ENTRY_POINTS):
        for point in importlib.metadata.entry_points(group=group):
            owner = point.dist.name if point.dist is not None else "unknown"
            what = f"entry point {point.name} of {owner} in {group}"
            try:
                point.load()
            except Exception as error:  # a plug-in may fail in any way
                yield Finding("failed", f"{what}: {_named(error)}", f"pip uninstall {owner}, or install it again")
            else:
                yield Finding("ok", f"{what}: {point.value}")


def _autoload() -> Iterator[Finding]:
    """Registration at `import torch`, tried in a program that does not import peft_lab."""
    off = next((name for name in (TORCH_SWITCH, OUR_SWITCH) if os.environ.get(name, "1") != "1"), None)
    without = "programs that load adapters must import peft_lab themselves"
    if off is not None:
        value = os.environ[off]
        yield Finding("warning", f"autoload: switched off by {off}={value}; {without}", f"unset {off}")
        return
    ours = importlib.metadata.entry_points(group=BACKENDS, name="peft_lab")
    if not ours:
        yield Finding("warning", f"autoload: peft-lab was installed without it; {without}", "install peft-lab again")
        return
    done = subprocess.run([sys.executable, "-c", _TYPES_WITHOUT_US], capture_output=True, text=True, timeout=300)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield Finding("failed", f"autoload: import of peft ends in {last}", f"{TORCH_SWITCH}=0 if it names a backend")
        return
    known = json.loads(done.stdout.strip().splitlines()[-1])
    missing = sorted(name for name in _own_types() if name not in known)
    if missing:
        words = next((line for line in done.stderr.splitlines() if "peft-lab" in line), "no message")
        what = f"autoload: without `import peft_lab` peft does not know {', '.join(missing)} ({words})"
        yield Finding("failed", what, "mend what the message names, or install peft-lab again")
    else:
        yield Finding("ok", "autoload: adapters load without `import peft_lab`")


def _cache() -> Iterator[Finding]:
    folder = cache_dir()
    # the nearest folder that is there, because the others are made when something is cached
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        what = f"cache folder {folder}: {error.strerror or error}"
        yield Finding("failed", what, "set PEFT_LAB_CACHE to a folder that you may write to")
        return
    yield Finding("ok", f"cache folder {folder}: can be written to")


def _accelerators() -> Iterator[Finding]:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None:
        yield Finding("ok", f"accelerators: torch sees {torch.accelerator.device_count()} of type {found.type}")
    elif shutil.which("nvidia-smi"):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        what = f"accelerators: none, though nvidia-smi is installed; this torch was built for {built}"
        yield Finding("warning", what, "install the build of torch that goes with the driver")
    else:
        yield Finding("ok", "accelerators: none; training runs on the CPU")


def _data() -> Iterator[Finding]:
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        what = f"data: {DATA_VARIABLE} is not set, so tasks and backbones whose names begin with it cannot be read"
        yield Finding("warning", what, f"set {DATA_VARIABLE} to their folder if you use them")
    elif not Path(root).is_dir():
        yield Finding("failed", f"data: {DATA_VARIABLE}={root} is no folder", f"set {DATA_VARIABLE} to one")
    else:
        yield Finding("ok", f"data: {DATA_VARIABLE}={root}")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
