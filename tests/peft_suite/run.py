"""Run the tests of the installed peft with peft-lab's methods: `python tests/peft_suite/run.py [pytest's options]`.

The tests come from peft's source distribution, and the models that they load are made here: nothing of peft is
committed, and nothing is fetched from the Hub.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from peft_suite.hub_models import fill_cache  # noqa: E402

#: Files of peft with cases for LoRA that run on a CPU and suit another method. test_torch_compile.py, which takes a
#: minute for each case, is run when it is named.
FILES = (
    "config",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "initialization",
    "low_level_api",
    "other",
    "seq_classifier",
    "stablediffusion",
    "token_classification_qa",
    "vision_models",
)


def main(options: list[str]) -> int:
    """Fetch and unpack the tests, make the models, run pytest; its exit status."""
    named = [option for option in options if option.partition("::")[0].endswith(".py")]
    if "--record" in options and (named or {"-k", "-m", "--methods"} & {*options}):
        print("--record writes the counts of the whole run: leave out -k, -m, --methods and names of files.")
        return 2
    folder = Path(sys.prefix) / "peft-suite"
    source = unpacked(folder)
    fill_cache(folder / "hub")
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Without it peft leaves out the tests of torch.compile.
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "PYTHONPATH": os.pathsep.join((str(TESTS), str(source))),
    }
    options = [option for option in options if option not in named]
    named = named or [f"test_{name}.py" for name in FILES]
    settings = ["-c", str(TESTS / "peft_suite" / "pytest.ini"), "--rootdir", str(source), "-p", "peft_suite.plugin"]
    files = [str(source / "tests" / name) for name in named]
    command = [sys.executable, "-m", "pytest", *settings, "-q", "--no-header", "--tb=no", "-rN", *options, *files]
    return subprocess.run(command, env=environment, check=False).returncode


def unpacked(folder: Path) -> Path:
    """Root of the installed peft's source distribution, downloaded and unpacked once."""
    name = f"peft-{version('peft')}"
    source, marker = folder / name, folder / name / "tests" / "__init__.py"
    if marker.is_file():
        return source
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"peft=={version('peft')}"], check=True
    )
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    # The tests import each other as a package, whose file the distribution lacks.
    marker.write_text("")
    return source


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
