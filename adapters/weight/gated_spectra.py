"""Gated spectral components: rank-one components of each weight, gated for each row (experimental).

Source: Xie et al. 2024, KIND: Knowledge Integration and Diversion for Training Decomposable Models, arXiv:2408.07337.

KIND pretrains a model whose weights are sums of rank-one components u_i sigma_i v_i^T: some for all classes, the others
("tailors") for the classes of a group alone. This method is an experiment that takes the idea to a pretrained weight;
it is no reproduction, because neither the paper's code nor its gate was at hand. Readings that were built:

- the frozen weight keeps all of its components, in place of the shared ones; the last N of its singular value
  decomposition are where the vectors of the N trained components start, and their values start at zero:
  y = W x + U (g * sigma * (V x)), so that the model begins bit-exactly as the base;
- `gate="column"`: g is a mask; component i is on for the rows of group floor(i * groups / N) alone, and the row input
  `component_group`, a column of the task, holds the group of each row as a whole number from 0 (the class or task of
  KIND; the column of the label is refused, because a classifier would be told the answer);
- `gate="learned"`: g = softmax(G x) for each token, with a small matrix G for each weight, zero at the start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterConfig, MethodInfo, RowInput, WeightLayer, matrix_shape, register
from peft_lab.tuners.spectral import singular_bases

METHOD = MethodInfo(
    name="gated_spectra",
    title="Gated spectral components (experimental, after KIND)",
    paper="2408.07337",
    place="weight",
    config="GatedSpectraConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "mixed_batch", "identity_start"),
    learning_rate=3e-2,
    budget=(1.0, 1.12),
    row_columns=("component_group",),
)

#: Row input that names the group of components of each row.
GROUP = "component_group"


@dataclass
class GatedSpectraConfig(AdapterConfig):
    """Configuration of gated spectral components, an experimental method.

    Trainable parameters for each adapted weight: components (in + out + 1), and components * in more with a learned
    gate.

    Raises:
        ConfigError: a number below 1, or more groups than components.
    """

    components: int = field(default=8, metadata={"help": "Trained rank-one components of each weight.", "other": 4})
    gate: Literal["learned", "column"] = field(
        default="learned",
        metadata={
            "help": "Gate of the components: a softmax of the input, or the `column` called component_group (an "
            "argument of the forward).",
            "untried": "the row input has tests of its own",
        },
    )
    groups: int = field(
        default=2,
        metadata={
            "help": "Groups of components with gate=column; a row has those of one group.",
            "untried": "acts with gate=column alone",
        },
    )

    def check(self) -> None:
        for name in ("components", "groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.gate == "column" and self.groups > self.components:
            raise ConfigError(f"groups={self.groups} needs a component each, and components={self.components}.")

    def row_inputs(self) -> tuple[RowInput, ...]:
        return (RowInput(GROUP, "int64", column=GROUP),) if self.gate == "column" else ()


class GatedSpectraLayer(WeightLayer):
    """Frozen weight with trained rank-one components that a gate weights for each row or token.

    float32: `gated_spectra_left[adapter]` (out, n), `gated_spectra_sigma` (n,), `gated_spectra_right` (n, in), and with
    a learned gate `gated_spectra_gate` (n, in). A weight with a side below `components` has that many.
    """

    adapter_layer_names = ("gated_spectra_left", "gated_spectra_sigma", "gated_spectra_right", "gated_spectra_gate")
    decayed_vectors = ("gated_spectra_sigma",)

    def initial_values(self, adapter: str, config: GatedSpectraConfig) -> dict[str, Tensor]:
        out, inside = matrix_shape(self.base_layer, self.op)
        count = min(config.components, out, inside)
        if config.gate == "column" and config.groups > count:
            raise ConfigError(
                f"groups={config.groups} is above {count}, the components that a weight of {out} x {inside} has; give "
                "fewer groups, or choose other target_modules."
            )
        values = {"gated_spectra_sigma": torch.zeros(count)}
        if config.gate == "learned":
            values["gated_spectra_gate"] = torch.zeros(count, inside)
        if self.base_weight.is_meta:
            left, right = torch.empty(out, count), torch.empty(count, inside)
        else:
            bases = singular_bases(self.op.matrix(self.dense_weight()), "full", key=self.fingerprint()["sha256"])
            last = bases.select(count, "minor")
            # Copies, because other layers on this weight hold the bases too.
            left, right = last.u.clone(), last.vh.clone()
        return {**values, "gated_spectra_left": left, "gated_spectra_right": right}

    def gates(self, adapter: str, x: Tensor) -> Tensor:
        """Gate g of each component, (..., n) for tokens or (rows, 1, ..., n).

        Raises:
            ConfigError: a row's group is none of the adapter's.
        """
        config, count = self.configs[adapter], len(self.gated_spectra_sigma[adapter])
        if config.gate == "learned":
            gate = self.gated_spectra_gate[adapter]
            return F.linear(x.to(gate.dtype), gate).softmax(-1)
        group = self.row_input(GROUP, x)
        assert group is not None, "the config declares it with a column"
        if group.numel() and not 0 <= int(group.min()) <= int(group.max()) < config.groups:
            raise ConfigError(
                f"{GROUP} must be from 0 to {config.groups - 1} for groups={config.groups}, and goes from "
                f"{int(group.min())} to {int(group.max())}."
            )
        group_of = torch.arange(count, device=x.device) * config.groups // count
        mask = group.to(x.device)[:, None] == group_of
        return mask.reshape(len(mask), *(1,) * (x.ndim - 2), count)

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        left, right = self.gated_spectra_left[adapter], self.gated_spectra_right[adapter]
        hidden = F.linear(x.to(right.dtype), right) * self.gated_spectra_sigma[adapter]
        return F.linear(hidden * self.gates(adapter, x), left)

    def delta_weight(self, adapter: str) -> Tensor:
        raise ConfigError(f'The delta of adapter "{adapter}" differs from row to row, so it has no one weight.')


register(METHOD, GatedSpectraConfig, GatedSpectraLayer)
