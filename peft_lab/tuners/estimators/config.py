"""Config fields of heads whose arrays an estimator finds in the training data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from peft_lab.errors import ConfigError
from peft_lab.tuners.head_layer import HeadConfig


@dataclass
class EstimatorConfig(HeadConfig):
    """Base of the configs of estimators; the fields of a method are the arguments of its array estimator.

    The metadata of a field may hold its lowest and highest value as `range`.

    Raises:
        ConfigError: an unknown pooling, or a value out of its range.
    """

    pooling: Literal["auto", "head", "mean"] = field(
        default="auto",
        metadata={
            "help": "Feature of a row: `head` (what the model's own head reads), `mean` (of the last hidden states, "
            "without class tokens and padding), or `auto` (`head` for images, `mean` for texts)."
        },
    )

    values_from_data = True
    #: The array estimator's class.
    estimator_class: ClassVar[Any]
    #: Argument of the estimator's `fit` for rows whose label is negative; "" if it takes none.
    unlabelled_rows: ClassVar[str] = ""

    def check(self) -> None:
        super().check()
        for f in fields(self):
            lowest, highest = f.metadata.get("range", (None, None))
            value = getattr(self, f.name)
            if lowest is not None and value is not None and not lowest <= value <= highest:
                raise ConfigError(f"{f.name}={value} must be from {lowest:g} to {highest:g}.")

    def estimator(self) -> Any:
        """Array estimator with the values of the fields."""
        known = {f.name for f in fields(self)}
        given = {name: getattr(self, name) for name in self.estimator_class._get_param_names() if name in known}
        return self.estimator_class(**given)
