"""Detect whether a completion's log-probabilities depend on other completions, or on the padding, of the same call."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

# Parts of the names of numeric settings for randomness, and for routing that depends on the whole batch.
RANDOM_OR_SHARED = ("drop", "jitter", "expert_capacity", "capacity_factor")
UNUSED_HEADS = ("classifier", "summary")  # dropout of heads that do not affect log-probabilities
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # their frequencies depend on the padded length


class BatchDependence:
    """Detects whether a completion's log-probabilities depend on its call. The list of modules is made only once."""

    def __init__(self, model: nn.Module):
        self.model = model
        modules = list(model.modules())
        self._dropouts = [m for m in modules if isinstance(m, _DropoutNd)]
        self._norms = [m for m in modules if isinstance(m, _BatchNorm)]
        self._numbers = [(m, name) for m in modules for name in _telling(m)]
        configs = {id(c): c for m in modules for c in _configs(vars(m).get("config"))}
        self._configs = list(configs.values())
        rope_types = {str(vars(m).get("rope_type")) for m in modules}
        # torch.compile(module) holds the original module, module.compile() the compiled call.
        self.compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules)
        self.on_length = any(kind in rope_type for kind in LENGTH_DEPENDENT_ROPE for rope_type in rope_types)

    def why(self) -> str | None:
        """The cause of the dependence, or None."""
        for module in self._dropouts:
            if module.training and module.p > 0:
                return f"dropout {module.p}"
        for module in self._norms:
            if module.training:
                return type(module).__name__
        for module, name in self._numbers:
            if module.training and _above_zero(value := getattr(module, name, None)):
                return f"{name}={value}"
        for config in self._configs:
            for name in _telling(config):
                if not name.startswith(UNUSED_HEADS) and _above_zero(value := getattr(config, name)):
                    return f"{name}={value} in the model's config"
        return None


def _telling(owner: object) -> list[str]:
    return [name for name in vars(owner) if any(word in name for word in RANDOM_OR_SHARED)]


def _above_zero(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _configs(config: object, within: tuple = ()) -> Iterator[object]:
    """A config and the configs nested in it."""
    if hasattr(config, "to_dict") and hasattr(config, "__dict__") and not any(config is outer for outer in within):
        yield config
        for value in vars(config).values():
            yield from _configs(value, (*within, config))
