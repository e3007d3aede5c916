"""What the tests of training share: a tiny backbone, a tiny task and the options of a run of a few seconds."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from support.processor_time import cpu_seconds

WORDS = {
    "weather": ["rain", "sun", "snow", "cloud"],
    "music": ["song", "band", "tune", "drum"],
    "food": ["soup", "rice"],
}
FILLERS = ["the", "a", "please", "now", "today", "some", "with", "and", "more"]


def make_tokenizer() -> Any:
    """A tokenizer that knows the words of `make_task`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *(word for group in WORDS.values() for word in group)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names)


def make_backbone(folder: Path, dropout: float = 0.0, seed: int = 0, width: int = 32) -> Path:
    """A random BERT of about 20,000 parameters with the tokenizer of `make_tokenizer`."""
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_masked_lm(folder: Path) -> Path:
    """A random BERT with the head of a masked language model, and a tokenizer with a mask token."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.2, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_encoder_decoder(folder: Path) -> Path:
    """A random T5 with the tokenizer of `make_tokenizer`, whose `[SEP]` ends a text."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_task(folder: Path, rows: int = 96, name: str = "topics") -> Path:
    """A task of three topics that a word gives away, with train, validation and test files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, count in (("train", rows), ("validation", 24), ("test", 24)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "topic"])
            for index in range(count):
                topic = list(WORDS)[index % len(WORDS)]
                words = [*draw.sample(FILLERS, draw.randint(1, 5)), draw.choice(WORDS[topic])]
                draw.shuffle(words)
                writer.writerow([" ".join(words), topic])
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": name,
                "kind": "text_classification",
                "data": {"builder": "csv", "files": {s: f"{s}.csv" for s in ("train", "validation", "test")}},
                "columns": {"text": "sentence", "label": "topic"},
                "metrics": ["accuracy"],
                "version": "1",
                "licence": "CC0-1.0",
            }
        )
    )
    return path


def options(task: Path, backbone: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Options of a LoRA run of a few steps on the CPU."""
    return {
        "task": str(task),
        "model_name_or_path": str(backbone),
        "method": "lora",
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }


def flags(values: dict[str, Any]) -> list[str]:
    """Options as the command line writes them."""
    found = []
    for name, value in values.items():
        if name == "method_args":
            found += ["--method_args", *(f"{k}={v}" for k, v in value.items())]
        else:
            found += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return found


def command(
    *arguments: str, env: dict[str, str] | None = None, fast: bool = False, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run `python -m peft_lab` with these arguments, in an `environment`."""
    return subprocess.run(
        [sys.executable, "-m", "peft_lab", *arguments],
        capture_output=True,
        text=True,
        env=environment(env, fast),
        timeout=300,
        check=False,
        **kwargs,
    )


def environment(extra: dict[str, str] | None = None, fast: bool = False) -> dict[str, str]:
    """The environment of a subprocess: no Hub, one thread.

    Args:
        extra: further variables.
        fast: use the processor's own products of matrices, as a user does. Those of the tests, whose bits can be
            compared, take up to four times as long with a model of real size.
    """
    return {
        **{key: value for key, value in os.environ.items() if not (fast and key == "MKL_CBWR")},
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(extra or {}),
    }


def train_and_die(values: dict[str, Any], where: str, count: int) -> None:
    """Train, and kill this process the `count`-th time that the Trainer's method `where` is called."""
    import signal

    from peft_lab.training.run import train
    from peft_lab.training.trainer import LabTrainer

    original, calls = getattr(LabTrainer, where), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(LabTrainer, where, dying)
    train(values)


def train_as_rank(values: dict[str, Any], rank: int, port: int, kill: tuple[str, int] | None = None) -> None:
    """Train as one of two processes; with `kill`, this process dies there."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if kill is not None:
        train_and_die(values, *kill)
    from peft_lab.training.run import train

    train(values)


def diverge_as_rank(values: dict[str, Any], rank: int, port: int) -> None:
    """Train as one of two processes, the second of which alone meets an infinite loss; exit with 7 if it is told."""
    from peft_lab.errors import DivergedError
    from peft_lab.training.trainer import LabTrainer

    step, calls = LabTrainer.training_step, 0

    def infinite(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = step(*args, **kwargs)
        if rank and calls == 3:  # told to the guard alone, so no gradient carries it to the other process
            args[0]._guard.add_loss(loss * float("inf"))
        return loss

    LabTrainer.training_step = infinite
    try:
        train_as_rank(values, rank, port)
    except DivergedError as error:
        sys.exit(7 if "step 3 because the loss" in str(error) and "checkpoint-2" in str(error) else 8)


def make_decoder(folder: Path) -> Path:
    """A random Llama of about 20,000 parameters with the tokenizer of `make_backbone` and an end token."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(make_backbone(folder))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.cls_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_writing_task(folder: Path) -> Path:
    """A task of answers of very different lengths on the rows of `make_task`."""
    path = make_task(folder)
    values = yaml.safe_load(path.read_text()) | {"name": "writing", "kind": "causal_lm", "metrics": ["perplexity"]}
    del values["columns"]
    values["template"] = {"prompt": "{topic}", "answer": "{sentence}"}
    path = folder / "writing.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}


def make_image_backbone(folder: Path, family: str = "vit") -> Path:
    """A random ViT or Swin of about 10,000 parameters for 32 x 32 pixels, with its image processor."""
    from transformers import SwinConfig, SwinModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    if family == "swin":
        stages = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
        SwinModel(SwinConfig(image_size=32, patch_size=4, **stages)).save_pretrained(folder)
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        ViTModel(ViTConfig(image_size=32, patch_size=8, initializer_range=0.2, **sizes)).save_pretrained(folder)
    values = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    values |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def make_image_task(folder: Path) -> Path:
    """A task of noisy images of three colours, with train, validation and test files beside it."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    features = Features(image=Image(), label=ClassLabel(names=list(COLOURS)))
    for split, count in (("train", 48), ("validation", 12), ("test", 12)):
        noise = draw.integers(-40, 35, (count, 20, 20, 3))
        pixels = (noise + [[[colour]] for colour in [*COLOURS.values()] * (count // 3)]).astype(np.uint8)
        rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": [0, 1, 2] * (count // 3)}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
        rows["image"][0].save(folder / f"{split}.png")
    path = folder / "colours.yaml"
    values = {"name": "colours", "kind": "image_classification", "metrics": ["accuracy"], "version": "1"}
    values["data"] = {"builder": "parquet", "files": {s: f"{s}.parquet" for s in ("train", "validation", "test")}}
    values["columns"] = {"image": "image", "label": "label"}
    path.write_text(yaml.safe_dump(values | {"licence": "CC0-1.0"}))
    return path


def weights(folder: str | Path) -> dict[str, Tensor]:
    """The saved weights of a run's folder."""
    path = Path(folder) / "adapter_model.safetensors"
    return load_file(path if path.is_file() else Path(folder) / "model.safetensors")


def same_weights(a: str | Path, b: str | Path, tolerance: float = 0.0) -> bool:
    """Whether two run folders hold the same weights, bit for bit or within a tolerance."""
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all((left[k] - right[k]).abs().max() <= tolerance for k in left)


#: Modules that a command must not import before it has checked what it was given.
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "pandas", "sklearn")


def without_torch(arguments: list[str], folder: Path) -> tuple[list[str], float, str]:
    """Run the command line in a fresh interpreter; return the heavy modules it loaded, CPU time and output.

    The time is a multiple of what the imports of the command line's libraries take, which differs less than seconds
    between machines and between idle and busy ones.
    """
    script = (
        "import sys, time, resource\n"
        f"sys.argv = ['peft-lab', *{arguments!r}]\n"
        "from peft_lab.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules], used.ru_utime + used.ru_stime)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), cwd=folder, check=True
    )
    body, _, last = done.stdout.rpartition("LOADED ")
    loaded, _, seconds = last.rpartition("] ")
    libraries = cpu_seconds("import pydantic, rich.console, typer, yaml")
    return [m for m in HEAVY if f"'{m}'" in loaded], float(seconds) / libraries, body + done.stderr
