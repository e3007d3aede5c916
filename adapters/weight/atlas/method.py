"""aTLAS: learned coefficients of task vectors, one for each vector and weight.

Source: Zhang et al. 2024, Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, arXiv:2407.02880.
Written from the paper.

A task vector tau_i is the difference of a fine-tuned model to its base. Trained are coefficients alone: the weight of
block j becomes W_j + sum_i lambda_ij tau_ij, with lambda = 0, the base, at the start. Vectors of LoRA adapters stay in
factors, so that no matrix of the weight's size is made: y = W x + B diag(lambda) A x, with the factors of all vectors
side by side. Of a fine-tuned checkpoint the differences are kept as they are.

Readings: a block is the weight of one module (biases and norms of a checkpoint are not composed, as in the authors'
partitions). A partition is a run of neighbouring output rows, where the authors draw single entries at random, which
has no factors. The penalty is `l1` or `l2` times the norm over the vectors, averaged over the blocks (theirs is 0.5).
The vectors are stored in the adapter's file, so that it loads without their folders. Training without labels, as at
test time in the paper, is an option of a run: `unsupervised`.

In 60 steps on snips with MiniLM and LoRA vectors (rank 4, 60 steps) of banking77 and SST-2 it has 0.914, 0.902 and
0.894 validation accuracy (seeds 0 to 2), the head alone 0.856, 0.836 and 0.832, the most frequent class 0.154.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.adapters.weight.atlas.objective import CONTROL, UNREAD, choose_blocks, run_with_objective
from peft_lab.adapters.weight.atlas.vectors import TaskVector, read_vectors
from peft_lab.errors import ConfigError
from peft_lab.tuners import (
    AdapterConfig,
    AdapterTuner,
    MethodInfo,
    RowInput,
    WeightLayer,
    apply_matrix,
    embed_scale,
    matrix_shape,
    register,
    shorten,
    wrap_forward,
)

METHOD = MethodInfo(
    name="atlas",
    title="aTLAS",
    paper="2407.02880",
    place="weight",
    config="ATLASConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "conv2d", "embedding", "merge", "mixed_batch", "identity_start"),
    learning_rate=1e-1,
    budget=(1.02, 1.04),
    row_columns=("control",),
)

#: Vectors, and rank of each, where no folders are given.
_RANDOM_VECTORS, _RANDOM_RANK = 4, 4
#: Most vectors of an adapter, and most of them that are checkpoints: the file has at most four times the base's size.
_MOST_VECTORS, _MOST_CHECKPOINTS = 1000, 4


@dataclass
class ATLASConfig(AdapterConfig):
    """Configuration of aTLAS.

    Trainable parameters: vectors x partitions for each adapted weight.

    Raises:
        ConfigError: a number below 1, a negative penalty, or fields of random vectors beside given ones.
    """

    exports_lora = True

    vectors: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders of LoRA adapters or fine-tuned checkpoints of the same base; nothing means random "
            "low-rank vectors, to compare with.",
            "untried": "needs folders",
        },
    )
    partitions: int = field(
        default=1,
        metadata={"help": "Parts of each weight, runs of its rows, with coefficients of their own.", "other": 3},
    )
    blocks: int | None = field(
        default=None,
        metadata={
            "help": "Pairs of a vector and a weight to train: those with the largest gradients on the training data; "
            "nothing means all.",
            "other": 1,
        },
    )
    l1: float = field(
        default=0.0, metadata={"help": "Factor of the coefficients' L1 norm in the loss.", "untried": "in the loss"}
    )
    l2: float = field(
        default=0.0, metadata={"help": "Factor of the coefficients' L2 norm in the loss.", "untried": "in the loss"}
    )
    negate: bool = field(
        default=False,
        metadata={
            "help": "Forget the task: only rows with 1 in the column control keep their loss, the others have theirs "
            "negated.",
            "untried": "in the loss",
        },
    )
    random_vectors: int | None = field(default=None, metadata={"help": "Random vectors; nothing means 4.", "other": 2})
    r: int | None = field(default=None, metadata={"help": "Rank of each random vector; nothing means 4.", "other": 2})
    vector_ranks: list[int] | None = field(
        default=None,
        metadata={"help": "Filled in: rank of each vector, 0 of a checkpoint.", "untried": "filled in"},
    )
    vector_hashes: list[str] | None = field(
        default=None, metadata={"help": "Filled in: sha256 of each vector's weights.", "untried": "filled in"}
    )

    #: The vectors while an adapter is made from them.
    read: ClassVar[list[TaskVector] | None] = None

    def check(self) -> None:
        for name in ("partitions", "blocks", "random_vectors", "r"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        for name in ("l1", "l2"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative.")
        if self.vectors is not None and not 0 < len(self.vectors) <= _MOST_VECTORS:
            raise ConfigError(
                f"vectors names {len(self.vectors)} folders; give at least 1 and at most {_MOST_VECTORS}."
            )
        if self.vectors is not None and (self.random_vectors or self.r):
            raise ConfigError("random_vectors and r have no effect beside vectors; leave one or the other out.")
        ranks = self.vector_ranks
        if ranks is not None and (len(ranks) != len(self.vectors or ()) or min(ranks) < 0):
            raise ConfigError(f"vector_ranks={shorten(ranks)} must have one rank for each of the vectors.")
        self.check_checkpoints()

    def check_checkpoints(self) -> None:
        """Raise `ConfigError` for more checkpoints than an adapter file can hold."""
        if self.ranks.count(0) > _MOST_CHECKPOINTS:
            raise ConfigError(
                f"{self.ranks.count(0)} of the vectors are checkpoints, whose differences are as large as the base, "
                f"and an adapter holds at most {_MOST_CHECKPOINTS}; take LoRA adapters."
            )

    def check_sizes(self, largest: int) -> None:
        super().check_sizes(largest)
        total, most = sum(self.ranks), max(largest, 4096)
        if total > most:
            raise ConfigError(
                f"vectors of {total} ranks together are larger than anything in this base: at most {most}."
            )

    def row_inputs(self) -> tuple[RowInput, ...]:
        return (RowInput(CONTROL, "float32", column=CONTROL),) if self.negate else ()

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        values = super().from_json_file(path_json_file, **kwargs)
        # a saved adapter has its vectors in its own file, so no folder that a file names is ever opened
        if values.get("vectors") and not (values.get("vector_ranks") and values.get("fingerprints")):
            raise ConfigError(
                f'"{path_json_file}" names vectors without their ranks, or no base; give their folders to ATLASConfig.'
            )
        return values

    @property
    def ranks(self) -> list[int]:
        """Rank of each vector, 0 for one of a checkpoint."""
        if self.read is not None:
            return [vector.rank for vector in self.read]
        if self.vector_ranks is not None:
            return self.vector_ranks
        return [self.r or _RANDOM_RANK] * (self.random_vectors or _RANDOM_VECTORS)


class ATLASLayer(WeightLayer):
    """Weight with a trained combination of task vectors.

    `atlas_lambda[adapter]` is float32 (vectors, partitions). Frozen and saved are the factors of all vectors,
    `atlas_B` (out, ranks) and `atlas_A` (ranks, in), the differences of checkpoints, `atlas_dense` (checkpoints, out,
    in), and with `blocks` the vectors that are trained here, `atlas_chosen` (vectors,), 1, 0, or -1 before the choice.
    """

    adapter_layer_names = ("atlas_lambda",)
    other_param_names = ("atlas_A", "atlas_B", "atlas_dense", "atlas_chosen")
    data_param_names = ("atlas_chosen",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.path = name
        for part in self.other_param_names:
            setattr(self, part, BufferDict({}, persistent=True))
        #: Adapters whose vectors are zeros until their state is loaded.
        self.unloaded: set[str] = set()

    @property
    def adds_loss(self) -> bool:
        return any(config.l1 or config.l2 or config.negate for config in self.configs.values())

    def initial_values(self, adapter: str, config: ATLASConfig) -> dict[str, Tensor]:
        self.unloaded.discard(adapter)
        if config.vectors is not None and config.read is None:
            self.unloaded.add(adapter)
        rows, columns = matrix_shape(self.base_layer, self.op)
        ranks, device = config.ranks, self.base_weight.device
        up, down = torch.zeros(rows, sum(ranks)), torch.zeros(sum(ranks), columns)
        # as large as the base, so in its dtype
        dense = torch.zeros(ranks.count(0), rows, columns, dtype=self.base_dtype)
        if config.vectors is None:
            # all of them together are a tenth of the start of a linear layer, about as large as vectors of real tasks
            up, down = 0.1 * torch.randn_like(up) / columns**0.5, torch.randn_like(down) / len(down) ** 0.5
        start = place = 0
        for vector in config.read or ():
            own_up, own_down = vector.factors.get(self.path, (up[:, :0], down[:0]))
            up[:, start : start + len(own_down)], down[start : start + len(own_down)] = own_up, own_down
            start += vector.rank
            if vector.dense:
                dense[place] = vector.dense.get(self.path, dense[place])
                place += 1
        if len(down):
            self.atlas_A[adapter], self.atlas_B[adapter] = down.to(device), up.to(device)
        if len(dense):
            self.atlas_dense[adapter] = dense.to(device)
        if config.blocks is not None:
            self.atlas_chosen[adapter] = torch.full((len(ranks),), UNREAD, device=device)
        return {"atlas_lambda": torch.zeros(len(ranks), config.partitions)}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for adapter in tuple(self.unloaded):
            if any(f"{prefix}{part}.{adapter}" in state_dict for part in ("atlas_A", "atlas_dense")):
                self.unloaded.discard(adapter)

    def check_loaded(self, adapter: str) -> None:
        """Refuse an adapter whose vectors were neither read nor loaded.

        Raises:
            ConfigError: its config came from a file, and its state was not loaded.
        """
        if adapter not in self.unloaded:
            return
        kept = [getattr(self, part)[adapter] for part in ("atlas_B", "atlas_dense") if adapter in getattr(self, part)]
        if not any(value.any() for value in kept):
            raise ConfigError(
                f'Adapter "{adapter}" of atlas has no vectors: its config came from a file, whose folders are not '
                "opened, and its weights were not loaded; load the adapter whole (PeftModel.from_pretrained, "
                "load_adapter), or name the folders in ATLASConfig(vectors=[...])."
            )
        self.unloaded.discard(adapter)

    # Coefficients -----------------------------------------------------------------------------------------------

    def coefficients(self, adapter: str) -> Tensor:
        """Coefficients (vectors, partitions), zero for the pairs that are not trained.

        Raises:
            ConfigError: a training begins before the blocks are chosen, or the vectors were not loaded.
        """
        self.check_loaded(adapter)
        values: Tensor = self.atlas_lambda[adapter]
        if adapter not in self.atlas_chosen:
            return values
        chosen = self.atlas_chosen[adapter]
        if self.training and torch.is_grad_enabled() and (chosen == UNREAD).any():
            raise ConfigError(
                "blocks chooses by the gradients on the training data, and nobody has handed them over: add "
                "peft_lab.ReadTrainingData() to the callbacks of the Trainer, or call peft_lab.read_training_data("
                "model, batches)."
            )
        return values * chosen.clamp_min(0)[:, None].to(values)

    def by_row(self, adapter: str, coefficients: Tensor) -> Tensor:
        """Coefficients (vectors, out) of each output row; (vectors, 1) without partitions."""
        count = coefficients.shape[1]
        if count == 1:
            return coefficients
        rows = matrix_shape(self.base_layer, self.op)[0]
        part = torch.arange(rows, device=coefficients.device) * count // rows
        return coefficients[:, part]

    def scaled(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Factors B (out, ranks), times the coefficients, and A (ranks, in); None without low-rank vectors."""
        if adapter not in self.atlas_A:
            return None
        coefficients = self.by_row(adapter, self.coefficients(adapter))
        parts = zip(coefficients, self.configs[adapter].ranks, strict=True)
        of_rank = torch.cat([own.expand(rank, -1) for own, rank in parts])
        return self.atlas_B[adapter].to(coefficients.dtype) * of_rank.T, self.atlas_A[adapter].to(coefficients.dtype)

    def dense_delta(self, adapter: str) -> Tensor | None:
        """Weighted sum (out, in) of the checkpoints' differences; None without any."""
        if adapter not in self.atlas_dense:
            return None
        coefficients = self.by_row(adapter, self.coefficients(adapter))
        of_dense = [vector for vector, rank in enumerate(self.configs[adapter].ranks) if rank == 0]
        chosen = coefficients[of_dense]
        return (chosen[:, :, None] * self.atlas_dense[adapter].to(chosen.dtype)).sum(0)

    # Outputs ----------------------------------------------------------------------------------------------------

    def delta_weight(self, adapter: str) -> Tensor:
        factors, dense = self.scaled(adapter), self.dense_delta(adapter)
        low = None if factors is None else factors[0] @ factors[1]
        if low is None or dense is None:
            found = dense if low is None else low
            assert found is not None, "an adapter has vectors"
            return found
        return low + dense

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        factors, dense, base = self.scaled(adapter), self.dense_delta(adapter), self.base_layer
        if factors is None or (self.op.op_type == "conv2d" and base.groups > 1):
            return super().delta_output(adapter, x)
        up, down = factors
        x = x.to(up.dtype) if x.is_floating_point() else x
        if self.op.op_type == "embedding":
            out = F.linear(F.embedding(x, up), down.T) * embed_scale(base)
        elif self.op.op_type == "conv2d":
            hidden = base._conv_forward(x, down.reshape(-1, *base.weight.shape[1:]), None)
            out = F.conv2d(hidden, up[:, :, None, None])
        else:
            out = F.linear(F.linear(x, down), up)
        return out if dense is None else out + apply_matrix(base, self.op, x, dense)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        return None if adapter in self.atlas_dense else self.scaled(adapter)


class ATLASTuner(AdapterTuner):
    """Tuner of aTLAS: it reads the vectors, and chooses blocks by gradient."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; the vectors of a new one are read from their folders."""
        config: Any = self.peft_config[adapter_name]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.read is not None:
                config.vector_ranks = config.ranks
                config.vector_hashes = [vector.sha256 for vector in config.read]
        finally:
            vars(config).pop("read", None)
        if config.l1 or config.l2 or config.negate:
            wrap_forward(model, opens=True).around = run_with_objective

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # no folder that a file names is opened, and a config that has fingerprints was read from a file
        if peft_config.vectors is not None and not peft_config.fingerprints:
            peft_config.read = read_vectors(peft_config.vectors, self.model)
            peft_config.check_checkpoints()
            _check_unchanged(peft_config)
            if peft_config.target_modules is None:
                modules: set[str] = set().union(*(vector.modules for vector in peft_config.read))
                peft_config.target_modules = sorted(modules)
        return super()._prepare_adapter_config(peft_config, model_config)

    def wants_data(self) -> bool:
        """Test whether an active adapter has pairs to be chosen on the training data."""
        return any(self._unread(adapter) for adapter in self.active_adapters)

    def read_data(self, batches: Iterable[Mapping[str, Any]], epoch: int) -> None:
        """Choose the pairs of a vector and a weight that are trained, by their gradients at the start.

        `peft_lab.ReadTrainingData` calls this before the first epoch.
        """
        for adapter in self.active_adapters:
            layers = self._unread(adapter)
            if layers:
                choose_blocks(self.model, layers, adapter, batches)

    def _unread(self, adapter: str) -> list[Any]:
        """Layers of an adapter whose pairs are to be chosen."""
        layers = [module for module in self.model.modules() if isinstance(module, ATLASLayer)]
        layers = [layer for layer in layers if adapter in layer.atlas_chosen]
        return layers if all((layer.atlas_chosen[adapter] == UNREAD).all() for layer in layers) else []


def _check_unchanged(config: Any) -> None:
    """Raise `ConfigError` if the vectors are others than those of an earlier adapter with this config."""
    for name, vector, known in zip(config.vectors, config.read, config.vector_hashes or (), strict=False):
        if vector.sha256 != known:
            raise ConfigError(
                f'The task vector "{name}" has changed since an adapter was made with this config; make a new one.'
            )


register(METHOD, ATLASConfig, ATLASLayer, ATLASTuner)
