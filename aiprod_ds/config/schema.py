"""The strict base of every configuration record and the two value types that YAML writes as strings.

Owns strictness (frozen, unknown keys refused, no silent coercion) and nothing about any trainer.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity: the resolved configuration and the fingerprint would say null.
    pending: list[Any] = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"must hold finite numbers only, got {value}. Correct the value.")
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return values


FreeMapping = Annotated[
    dict[str, Any], AfterValidator(_finite)
]  # keys of a class or a file that is not ours, checked there


class StrictModel(BaseModel):
    """A frozen record that refuses unknown keys and wrong types.

    The text under a field is its description: `tools/config_reference.py` prints it in docs/configuration.md.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
