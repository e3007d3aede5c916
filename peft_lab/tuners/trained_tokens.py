"""Rows of the token embeddings that an adapter trains, `trainable_token_indices` of peft.

A chat template may add tokens, whose embeddings must be trained though the others stay frozen. peft wraps the
embedding, and an output layer whose weight is tied to it; here its wrappers also serve several adapters of which some
train no rows, rows of one batch with different adapters, and adapters that were frozen before they were disabled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    _get_input_embeddings_name,
)
from torch import Tensor, nn

from peft_lab.adapter_files.names import TRAINED_TOKENS
from peft_lab.backbones.names import ends_with
from peft_lab.errors import ConfigError
from peft_lab.tuners.active_adapters import KeepsTrainability
from peft_lab.tuners.mixed_batch import BASE, current_row_adapters

#: Field of a config.
FIELD = "trainable_token_indices"


class TokenLayer(KeepsTrainability, TrainableTokensLayer):
    """peft's layer of trained token rows; a tied one shows those of the embedding."""

    adapter_layer_names = ("trainable_tokens_delta",)

    def _named_values(self) -> Iterator[tuple[str, nn.Parameter]]:
        # The rows of a tied layer are the embedding's, whose own layer freezes and trains them.
        if not self.tied_adapter:
            yield from super()._named_values()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; a merge that does not go with them is undone."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if self.merged and not {*self.merged_adapters} <= {*names}:
            self.unmerge()
        super().set_adapter(adapter_names, inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the trained rows of adapters into the embedding.

        Raises:
            ConfigError: they are not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.trainable_tokens_delta]
        self.check_finite(names)
        if names:
            super().merge(safe_merge=False, adapter_names=names)

    def check_finite(self, names: list[str]) -> None:
        """Raise `ConfigError` for trained rows that are not finite in the dtype of the embedding."""
        for name in names:
            rows = self.trainable_tokens_delta.get(name)
            if rows is not None and not bool(rows.to(self.base_layer.weight.dtype).isfinite().all()):
                raise ConfigError(
                    f'The trained token rows of adapter "{name}" hold NaNs or infinite numbers; train it again.'
                )


class _ItemsAlone(dict[str, str]):
    """Mapping of names that a loop over its keys does not see.

    transformers reads the items. peft loops over the keys, and would end in a KeyError for a file without the rows or
    with another path; there `renamed_rows` does the same.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(())


class TrainedTokens(TrainableTokensWrapper):
    """peft's wrapper of an embedding, for adapters of which some train no rows.

    Rows and active adapters without trained tokens have the base's.
    """

    token_adapter: Any

    def _hasattr_wrapped(self, name: str, modules: Any) -> bool:
        # peft shows the weight alone, and models also ask for num_embeddings and its like
        return name == "weight" or hasattr(self.original_module, name)

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        return super()._getattr_wrapped(name, modules) if name == "weight" else getattr(self.original_module, name)

    def _present(self, adapter_names: str | list[str]) -> list[str]:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        return [name for name in names if name in self.token_adapter.trainable_tokens_delta]

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Name of the adapter to activate here; None for none.

        Raises:
            ConfigError: several of the adapters train token rows.
        """
        present = self._present(adapter_name)
        if len(present) > 1:
            raise ConfigError(
                f"The adapters {', '.join(present)} all train rows of the token embeddings, and one at a time can be "
                "active; set one of them."
            )
        return present[0] if present else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(self._present(adapter_names), inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Remove an adapter; those that are active now are so here too."""
        layer = self.token_adapter
        self._adapters.discard(adapter_name)
        for values in (layer.trainable_tokens_delta, layer.trainable_tokens_original, layer.token_indices):
            if adapter_name in values:
                del values[adapter_name]
        if adapter_name in self.active_adapters:
            self._active_adapter = []
            layer._active_adapter = []
        left = self._present(new_active_adapters or [])
        if left and left != self.active_adapters:
            self.set_adapter(left)

    def adapter_state_dict(self, adapter_name: str, *state: Any) -> dict[str, Tensor]:
        return super().adapter_state_dict(adapter_name, *state) if self._present(adapter_name) else {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        return _ItemsAlone(super().adapter_state_dict_load_map(adapter_name) if self._present(adapter_name) else {})

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """Run the module with the rows of the active adapter, or with each batch row's own."""
        rows = current_row_adapters()
        if rows is None or self.disable_adapters:
            if adapter_names is not None:
                kwargs["adapter_names"] = adapter_names
            return super().forward(*args, **kwargs)
        # Beams of a row lie next to each other.
        present = [name if self._present(name) else BASE for name in rows.names]
        names = [present[i] for i in rows.index(len(args[0]), args[0].device).tolist()]
        if len({*names}) > 1:
            return self._mixed_batch_forward(*args, adapter_names=names, **kwargs)
        return self.token_adapter.forward_adapters(*args, [] if names[0] == BASE else names[:1], **kwargs)


def adopt_trained_tokens(model: nn.Module) -> None:
    """Make `TrainedTokens` of all modules whose rows peft trains."""
    for module in list(model.modules()):
        # A head that is trained whole is tied no longer, and its own values count.
        for name, child in list(module.named_children()):
            if isinstance(child, TrainableTokensWrapper) and isinstance(child.original_module, ModulesToSaveWrapper):
                setattr(module, name, child.original_module)
    for module in model.modules():
        # peft makes them itself and offers no way to choose the class.
        if type(module) is TrainableTokensWrapper:
            module.__class__ = TrainedTokens
        elif type(module) is TrainableTokensLayer:
            module.__class__ = TokenLayer


def check_trained_tokens(model: Any, config: Any) -> None:
    """Check the token rows that a config trains against a model, before anything is put into it.

    Raises:
        ConfigError: there is no such embedding or token, or the embedding is adapted or saved whole as well.
    """
    wrapped = [path for path, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)]
    for path in wrapped:
        if config.target_modules and check_target_module_exists(config, path):
            raise ConfigError(
                f'Another adapter trains rows of "{path}", which method "{config.info.name}" cannot adapt as well; '
                "leave it out of target_modules."
            )
    chosen, whole = getattr(config, FIELD), config.modules_to_save or ()
    for path in wrapped:
        if any(path.endswith(name) for name in whole):
            raise ConfigError(
                f'Another adapter trains rows of "{path}" or of the embedding that it is tied to, so it cannot be '
                "trained whole; leave it out of modules_to_save."
            )
    if chosen is None:
        return
    _check_tied_head(model, whole)
    # The field may have been changed after the config was made, as TRL does for the tokens of a chat template.
    check_indices(chosen)
    by_name = chosen if isinstance(chosen, Mapping) else {_input_embeddings(model): chosen}
    for name, indices in by_name.items():
        found = {path: module for path, module in model.named_modules() if path.endswith(name)}
        if not found:
            raise ConfigError(f'{FIELD} names "{name}", and {type(model).__name__} has no such module.')
        for path, module in found.items():
            _check_embedding(path, module, indices, config)


def _check_tied_head(model: Any, whole: Iterable[str]) -> None:
    """Refuse a head that shows the embedding's rows for one adapter and is trained whole by another."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    for path, module in model.named_modules():
        head = isinstance(module, ModulesToSaveWrapper) and module is model.get_output_embeddings()
        if head and not any(path.endswith(name) for name in whole):
            raise ConfigError(
                f'Another adapter trains "{path}" whole, which is tied to the embedding whose rows {FIELD} trains; '
                f'give modules_to_save=["{path.rpartition(".")[2]}"] too, or use a model for each adapter.'
            )


def _input_embeddings(model: Any) -> str:
    try:
        name = _get_input_embeddings_name(model, None)
    except (AttributeError, NotImplementedError):  # transformers' answer of models without token embeddings
        name = None
    if not name:
        raise ConfigError(
            f"{type(model).__name__} shows no token embeddings; name their module: {FIELD}={{name: [ids]}}."
        )
    return name


def _check_embedding(path: str, module: Any, indices: list[int], config: Any) -> None:
    targeted = bool(config.target_modules) and check_target_module_exists(config, path)
    if targeted or (isinstance(module, BaseTunerLayer) and not isinstance(module, AuxiliaryTrainingWrapper)):
        raise ConfigError(
            f'{FIELD} trains rows of "{path}", which is adapted by a method as well; leave it out of target_modules, '
            f"or leave {FIELD} out."
        )
    whole = [name for name in config.modules_to_save or () if path.endswith(name)]
    if whole:
        raise ConfigError(
            f'{FIELD} trains rows of "{path}", which modules_to_save names to be trained whole; leave one of them out.'
        )
    base = module.token_adapter.base_layer if isinstance(module, TrainableTokensWrapper) else module
    if not isinstance(base, nn.Embedding | nn.Linear):
        raise ConfigError(f'{FIELD} names "{path}", which is a {type(base).__name__} and no token embedding.')
    tokens = base.weight.shape[0]
    if max(indices) >= tokens:
        raise ConfigError(
            f'{FIELD} holds token {max(indices)}, and "{path}" has {tokens} tokens; call '
            "model.resize_token_embeddings(len(tokenizer)) first."
        )


def check_indices(chosen: Any) -> None:
    """Check numbers of tokens, a list or one for each module.

    Raises:
        ConfigError: a list is empty, or holds a negative or a repeated number.
    """
    for indices in chosen.values() if isinstance(chosen, Mapping) else [chosen]:
        if not indices:
            raise ConfigError(f"{FIELD} names no token; leave it out, or list the numbers of the tokens to train.")
        if min(indices) < 0 or len({*indices}) < len(indices):
            raise ConfigError(f"{FIELD} must hold distinct numbers from 0 on, got {indices[:20]}.")


def trained_rows(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Trained token rows of an adapter (tokens, dim), by the path of the wrapper; tied layers are left out."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            rows = module.token_adapter.trainable_tokens_delta
            if adapter in rows:
                found[path] = rows[adapter]
    return found


def renamed_rows(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the entries of a file for trained token rows the names that they have in a model.

    The embedding may lie below another module there.
    """
    ending = f".{TRAINED_TOKENS}"
    paths, keys = list(trained_rows(model, adapter)), [key for key in state if key.endswith(ending)]
    renamed = {key: value for key, value in state.items() if key not in keys}
    for key in keys:
        path = key.removesuffix(ending)
        near = [here for here in paths if ends_with(here, path) or ends_with(path, here)]
        # one embedding here and one there are the same, whatever they are called
        if not near and len(paths) == len(keys) == 1:
            near = paths
        renamed[f"{near[0] if near else path}{ending}.{adapter}"] = state[key]
    return renamed


def check_rows(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
    """Names of the trained rows that an adapter has, and of those that a file with the model's names holds."""
    wanted = {f"{path}.{TRAINED_TOKENS}.{adapter}" for path in trained_rows(model, adapter)}
    return wanted, {key for key in state if f".{TRAINED_TOKENS}" in key}
