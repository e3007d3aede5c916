"""Mutated adapter folders: each loads right or ends in one of our own errors, and nothing of it is ever run.

`PEFT_LAB_FUZZ` sets the number of folders (2,000 by default; 10,000 before a release). The folders are written into a
scratch directory; an audit hook fails the test where anything else is written, imported, executed or connected to.
"""

from __future__ import annotations

import copy
import json
import math
import os
import struct
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load, load_file
from support.backbones import TINY, tiny_inputs
from support.properties import EVERY, KEEPS_HEAD, ON_FIXED, adapt, config, move, output, text_or_image
from torch import nn

from peft_lab.errors import PeftLabError
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.loading.foreign_adapters import write_record
from peft_lab.loading.load_adapter import load_adapter
from peft_lab.runs import run_folder
from peft_lab.runs.trained_task import trained_task

CASES = int(os.environ.get("PEFT_LAB_FUZZ", "2000"))
FUZZED = [*EVERY, *KEEPS_HEAD]
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json"


# What must not happen -------------------------------------------------------------------------------------------------

_watch: dict[str, Any] = {"scratch": None, "seen": []}
_NEVER = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "ctypes.dlopen", "marshal.loads"),
    *("os.remove", "os.rename", "os.link", "os.symlink", "shutil.rmtree", "os.chmod", "os.mkdir"),
)
_WRITES = {"os.remove", "os.rename", "os.link", "os.symlink", "shutil.rmtree", "os.chmod", "os.mkdir"}
_IMPORTABLE = {"peft", "peft_lab", "torch", "transformers", "safetensors", "numpy", "huggingface_hub", "accelerate"}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    scratch = _watch["scratch"]
    if scratch is None:
        return
    if event == "open":
        path, mode, flags = args
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        bad = (writes and name and not name.startswith((scratch, "/dev/null"))) or "secret" in name
    elif event == "import":
        name = str(args[0]).partition(".")[0]
        bad = args[0] not in sys.modules and name not in _IMPORTABLE
    elif event in ("exec", "compile"):
        bad = scratch in str(getattr(args[0], "co_filename", args[-1]))
    else:
        # Temporary folders are cleared by names relative to an open folder.
        inside = (
            str(args[0]).startswith(scratch) or (event == "os.remove" and args[1] >= 0) if event in _WRITES else False
        )
        bad = event in _NEVER and not inside
    if bad:
        _watch["seen"].append((event, [repr(a)[:200] for a in args]))


@contextmanager
def _watched(scratch: Path) -> Iterator[None]:
    _watch.update(scratch=str(scratch), seen=[])
    try:
        yield
    finally:
        _watch["scratch"] = None
    assert _watch["seen"] == []


# Folders --------------------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.second(torch.relu(self.norm(self.first(x)))))


def _adapted(method: str) -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    """A base as small as the method allows, what it is asked, and the method's adapter on a copy of it."""
    torch.manual_seed(0)
    if method in (*ON_FIXED, *KEEPS_HEAD):
        base = TINY["resnet" if method in KEEPS_HEAD else text_or_image(method)]()
        return base, tiny_inputs(base), move(adapt(method, base))
    base = _Net()
    wanted = config(method, target_modules=["first", "second"], modules_to_save=["classifier"])
    return base, {"x": torch.randn(5, 6)}, move(get_peft_model(copy.deepcopy(base), wanted))


class _Case:
    """An untouched folder of one method as bytes, and what its adapter answers."""

    def __init__(self, method: str, folder: Path) -> None:
        self.base, self.asked, model = _adapted(method)
        model.save_pretrained(folder)
        write_record(model, folder)
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "labels.json").write_text('{"id2label": {"0": "a", "1": "b"}}')
        (folder / "metrics.json").write_text('{"run": {"task": "task.yaml", "model_name_or_path": "base"}}')
        (folder / "task.yaml").write_text(
            "name: mine\nkind: text_classification\ndata: {files: {train: train.csv}}\ncolumns: {text: t, label: l}\n"
        )
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.output = self.answer(load_adapter(copy.deepcopy(self.base), folder))
        assert torch.equal(self.output, self.answer(model))

    def answer(self, model: Any) -> torch.Tensor:
        return output(model, self.asked)


@pytest.fixture(scope="module", params=FUZZED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Case:
    return _Case(request.param, tmp_path_factory.mktemp("adapter"))


# Mutations ------------------------------------------------------------------------------------------------------------

HOSTILE = [
    *(
        "",
        ".",
        "..",
        "../../secret",
        "/tmp/secret",
        "/etc/passwd",
        "~/secret",
        "file:///tmp/secret",
        "\0",
        "a\0b",
        "\ud800",
    ),
    *("os.system", "antigravity", "__import__('os').system('true')", "this", "peft_lab.cli.app", "CON", "a" * 5000),
    *("(a+)+$", "(", ".*" * 40, "(.|.)*x", r"\1", "(?<=a)b", "a{1,65000}{1,65000}", ".*", "first|second", "all-linear"),
    *(
        "__class__",
        "__init__",
        "first.base_layer",
        "base_model.model.first",
        "classifier",
        "first",
        "LORA",
        "SVFIT",
        "XLORA",
    ),
    *("default", "full", "energy:0.5", "energy:nan", "gaussian", "pissa", "eva", "bfloat16", "CAUSAL_LM", "SEQ_CLS"),
]
NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 64, 10**6, 10**9, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e-320, 1e308]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(HOSTILE), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*HOSTILE, "q"]), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.one_of(st.sampled_from([*HOSTILE, "trust_remote_code", "auto_map", "runtime_config", "megatron_config"]))
PLACE = st.floats(0, 1, exclude_max=True, width=16)
TEXTS = st.sampled_from([CONFIG, RECORD, "labels.json", "metrics.json"])

YAML = [
    *("!!python/object/apply:os.system ['true']", "metrics: [x.py]", "name: ../x", "kind: os", "[" * 3000),
    "name: mine\nkind: text_classification\ndata: {files: {train: /tmp/secret}}\n",
]

MUTATIONS = st.one_of(
    st.tuples(st.just("set"), TEXTS, PLACE, VALUES),
    st.tuples(st.just("set"), st.just(CONFIG), PLACE, VALUES),
    st.tuples(st.just("remove"), TEXTS, PLACE),
    st.tuples(st.just("rename"), TEXTS, PLACE, NAMES),
    st.tuples(st.just("add"), TEXTS, NAMES, VALUES),
    st.tuples(st.just("twice"), TEXTS, PLACE),
    st.tuples(st.just("nest"), TEXTS, PLACE, st.sampled_from([1, 30, 40, 3000, 200_000])),
    st.tuples(st.just("flip"), st.sampled_from([CONFIG, WEIGHTS, WEIGHTS, "task.yaml"]), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), st.sampled_from([CONFIG, WEIGHTS, WEIGHTS, RECORD]), PLACE),
    st.tuples(st.just("append"), st.sampled_from([CONFIG, WEIGHTS]), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("length"), st.sampled_from([0, 1, 7, 2**20, 2**32, 2**63, 2**64 - 1])),
    st.tuples(
        st.just("header"),
        PLACE,
        st.sampled_from(["dtype", "shape", "data_offsets", "name", "drop", "copy"]),
        st.one_of(
            st.sampled_from(
                ["F64", "F16", "I32", "BOOL", "F4", "F32", [0, 10**15], [0, 0], [8, 4], [1, 8], [8, 1], [-1]]
            ),
            VALUES,
        ),
    ),
    st.tuples(st.just("delete"), st.sampled_from([CONFIG, WEIGHTS, RECORD, "labels.json"])),
    st.tuples(st.just("extra"), st.sampled_from(["adapter_model.bin", "x.py", "config.json", "pytorch_model.bin"])),
    st.tuples(st.just("pickle")),
    st.tuples(st.just("link"), st.sampled_from([CONFIG, WEIGHTS, "labels.json", "note.txt"])),
    st.tuples(st.just("folder"), st.sampled_from([CONFIG, WEIGHTS, "labels.json"])),
    st.tuples(st.just("yaml"), st.sampled_from(YAML)),
)


def _mutate(folder: Path, mutation: tuple[Any, ...]) -> None:
    kind, *rest = mutation
    if kind in ("set", "remove", "rename", "add", "twice", "nest"):
        _mutate_json(folder / rest[0], kind, rest[1:])
    elif kind in ("flip", "cut", "append"):
        _mutate_bytes(folder / rest[0], kind, rest[1:])
    elif kind == "length":
        _write(folder / WEIGHTS, struct.pack("<Q", rest[0]) + _read(folder / WEIGHTS)[8:])
    elif kind == "header":
        _mutate_header(folder / WEIGHTS, *rest)
    elif kind == "delete" and (folder / rest[0]).is_file():
        (folder / rest[0]).unlink()
    elif kind == "extra":
        _write(folder / rest[0], b"cos\nsystem\n(S'true'\ntR.")
    elif kind == "pickle" and (folder / WEIGHTS).is_file():
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    elif kind == "link":
        (folder / rest[0]).unlink(missing_ok=True) if not (folder / rest[0]).is_dir() else None
        if not (folder / rest[0]).exists():
            (folder / rest[0]).symlink_to("/tmp/secret" if rest[0] != CONFIG else "/etc/hostname")
    elif kind == "folder" and (folder / rest[0]).is_file():
        (folder / rest[0]).unlink()
        (folder / rest[0]).mkdir()
    elif kind == "yaml":
        _write(folder / "task.yaml", rest[0].encode())


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _write(path: Path, data: bytes) -> None:
    if not path.is_dir() and not path.is_symlink():
        path.write_bytes(data)


def _mutate_json(path: Path, kind: str, rest: list[Any]) -> None:
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError):
        return
    owner, key = _pick(values, rest[0]) if kind not in ("add",) else (values, rest[0])
    if not isinstance(owner, dict):
        return
    if kind in ("set", "add"):
        owner[key] = rest[1]
    elif kind == "remove":
        owner.pop(key)
    elif kind == "rename":
        owner[rest[1]] = owner.pop(key)
    text = json.dumps(values)
    if kind == "twice":
        text = text.replace(json.dumps(key) + ":", f"{json.dumps(key)}: 1, {json.dumps(key)}:", 1)
    elif kind == "nest":
        text = text[:-1] + f', "deep": {"[" * rest[1]}{"]" * rest[1]}' + "}"
    _write(path, text.encode("utf-8", "surrogatepass"))


def _pick(values: Any, place: float) -> tuple[Any, Any]:
    """One of all keys at any depth."""
    found: list[tuple[Any, Any]] = []
    queue = [values]
    while queue:
        part = queue.pop()
        if isinstance(part, dict):
            found += [(part, key) for key in part]
            queue += part.values()
    return found[int(place * len(found))] if found else (None, None)


def _mutate_bytes(path: Path, kind: str, rest: list[Any]) -> None:
    data = bytearray(_read(path))
    if kind == "append":
        data += rest[0]
    elif data and kind == "flip":
        # Half of the flips hit the first bytes, where headers are.
        size = min(len(data), 400) if rest[1] % 2 else len(data)
        data[int(rest[0] * size)] ^= 1 << rest[1]
    elif data:
        data = data[: int(rest[0] * len(data))]
    _write(path, bytes(data))


def _mutate_header(path: Path, place: float, what: str, value: Any) -> None:
    data = _read(path)
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        name = names[int(place * len(names))]
        if what == "name":
            header[str(value)] = header.pop(name)
        elif what == "drop":
            del header[name]
        elif what == "copy":
            header[f"{name}.copy"] = header[name]
        else:
            header[name][what] = value
    except (struct.error, ValueError, IndexError, TypeError, KeyError, AttributeError):
        return
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    _write(path, struct.pack("<Q", len(text)) + text + data[8 + length :])


# The test -------------------------------------------------------------------------------------------------------------


def _restore(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.is_symlink() or files.get(path.name) != path.read_bytes():
            path.unlink()
    for name, data in files.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(data)


counts: dict[str, int] = {"loaded": 0, "refused": 0}


def _try(case: _Case, folder: Path) -> None:
    """Load a mutated folder; whatever comes back must be what the files say."""
    with suppress(PeftLabError):
        run_folder.read_labels(folder)
    with suppress(PeftLabError):
        AdapterFolder(folder, is_download=True).base_name()
    with suppress(PeftLabError):
        trained_task(folder, run_folder.read_origin(folder))
    try:
        model = load_adapter(copy.deepcopy(case.base), folder)
    except PeftLabError:
        counts["refused"] += 1
        return
    counts["loaded"] += 1
    answer = case.answer(model)
    stored, loaded = load_file(folder / WEIGHTS), get_peft_model_state_dict(model, save_embedding_layers=False)
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[key].to(loaded[key].dtype), loaded[key]) for key in stored)
    values = json.loads((folder / CONFIG).read_bytes())
    original = load(case.files[WEIGHTS])
    if values == json.loads(case.files[CONFIG]) and all(torch.equal(stored[k], original[k]) for k in original):
        assert torch.equal(answer, case.output)
    numbers = [v for v in values.values() if isinstance(v, int | float)]
    if all(v.abs().max() < 1e6 for v in stored.values() if v.numel()) and all(abs(n) < 1e6 for n in numbers):
        assert answer.isfinite().all()


def test_mutated_folders(case: _Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = tmp_path / "adapter", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    if not _watch.get("installed"):
        sys.addaudithook(_audit)
        _watch["installed"] = True

    @settings(
        max_examples=math.ceil(CASES / len(FUZZED)),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.lists(MUTATIONS, min_size=1, max_size=3))
    def run(mutations: list[tuple[Any, ...]]) -> None:
        _restore(folder, case.files)
        for mutation in mutations:
            _mutate(folder, mutation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _watched(tmp_path):
                _try(case, folder)

    _restore(folder, case.files)
    _try(case, folder)
    counts.update(loaded=0, refused=0)
    run()
    print(counts)
    assert min(counts.values()) > 0.1 * sum(counts.values())
