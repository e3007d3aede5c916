"""Building blocks of a method: config, layers, tuner, registration.

Method authors import from here.
"""

from __future__ import annotations

from peft_lab.backbones.module_roles import modules_by_role
from peft_lab.registry import MethodInfo
from peft_lab.tuners.bottleneck import ACTIVATIONS, bias_start, bottleneck_output, linear_start, quick_gelu
from peft_lab.tuners.config import AdapterConfig, shorten
from peft_lab.tuners.dtypes import WIDE_DTYPES, sum_dtype
from peft_lab.tuners.forward_context import ForwardContext, before_forward, wrap_forward
from peft_lab.tuners.head_layer import HeadConfig, HeadInput, HeadLayer, HeadTuner, register_head
from peft_lab.tuners.image_views import shifted
from peft_lab.tuners.layer import AdapterLayer, FeatureLayer, WeightLayer
from peft_lab.tuners.lora_settings import changed_base, lora_rank, lora_scaling, lora_variant
from peft_lab.tuners.loss_terms import LossTerm
from peft_lab.tuners.mixed_batch import BASE, RowAdapters
from peft_lab.tuners.operations import (
    Operation,
    apply_matrix,
    conv2d_rows,
    embed_scale,
    matrix_shape,
    norm_offset,
    operation,
)
from peft_lab.tuners.registration import register
from peft_lab.tuners.residual_layer import (
    BranchSource,
    ResidualBranches,
    ResidualLayer,
    ResidualTuner,
    register_residual,
)
from peft_lab.tuners.row_input import RowInput
from peft_lab.tuners.seeds import module_seed
from peft_lab.tuners.tokens import insert, parameter_names, split
from peft_lab.tuners.tuner import AdapterTuner

__all__ = [
    "ACTIVATIONS",
    "BASE",
    "WIDE_DTYPES",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterTuner",
    "BranchSource",
    "FeatureLayer",
    "ForwardContext",
    "HeadConfig",
    "HeadInput",
    "HeadLayer",
    "HeadTuner",
    "LossTerm",
    "MethodInfo",
    "Operation",
    "ResidualBranches",
    "ResidualLayer",
    "ResidualTuner",
    "RowAdapters",
    "RowInput",
    "WeightLayer",
    "apply_matrix",
    "before_forward",
    "bias_start",
    "bottleneck_output",
    "changed_base",
    "conv2d_rows",
    "embed_scale",
    "insert",
    "linear_start",
    "lora_rank",
    "lora_scaling",
    "lora_variant",
    "matrix_shape",
    "module_seed",
    "modules_by_role",
    "norm_offset",
    "operation",
    "parameter_names",
    "quick_gelu",
    "register",
    "register_head",
    "register_residual",
    "shifted",
    "shorten",
    "split",
    "sum_dtype",
    "wrap_forward",
]
