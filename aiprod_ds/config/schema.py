"""The strict base of every configuration record, its types of numbers and the most that they may be.

Owns strictness (frozen, unknown keys refused, no silent coercion), bounds that no machine reaches, the rule
that code must be trusted before it is named, and nothing about any trainer. To import a module is to run it,
so that rule stands where a file is read. What a program of one's own puts into these records is its own code
and is not judged, nor is a run folder's copy of a configuration, of which nothing is imported.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from typing_extensions import Self

from aiprod_ds.config.problems.gather import problems_in_code
from aiprod_ds.config.problems.rules import UNRULED, broken_rules
from aiprod_ds.errors import ConfigError
from aiprod_ds.import_path import INSTALLED, is_installed

TRUST_CODE = "trust_code"
"""To a file what `base` is: whether it may name code of its own. `--trust-code` says so, too."""

LARGEST_COUNT = 10**12
"""Of clips, updates, pixels, samples: no run gets there, and products of a few of them stay exact."""
LARGEST_SEED = 2**63 - 1
"""And of whole numbers for classes that are not ours: what torch can hold."""
LARGEST_NUMBER = 1e12
SMALLEST_NUMBER = 1e-30
"""Of rates, lengths and weights that must be above 0; fp32 holds it with some digits."""


def _count(value: int) -> int:
    if value > LARGEST_COUNT:
        raise ValueError(f"must be at most {LARGEST_COUNT}, got {_told(value)}. Use a smaller value.")
    return value


def _seed(value: int) -> int:
    if value > LARGEST_SEED:
        raise ValueError(f"must be at most {LARGEST_SEED}, got {_told(value)}. Use a smaller value.")
    return value


def _number(value: float) -> float:
    if value > LARGEST_NUMBER:
        raise ValueError(f"must be at most {LARGEST_NUMBER:g}, got {value:g}. Use a smaller value.")
    if 0 < value < SMALLEST_NUMBER:
        raise ValueError(f"must be at least {SMALLEST_NUMBER:g}, got {value:g}. Use a larger value.")
    return value


def _told(value: int) -> str:
    # Python refuses to write integers of more than 4300 digits.
    return (
        str(value) if value.bit_length() < 300 else f"one of about {value.bit_length() * 0.30103:.0f} digits"
    )


# The upper bounds stand in no schema: the tables of docs/configuration.md would repeat them at every key.
PositiveInt = Annotated[int, Field(ge=1), AfterValidator(_count)]
NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(_count)]
Seed = Annotated[int, Field(ge=0), AfterValidator(_seed)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_number)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_number)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity: the resolved configuration and the fingerprint would say null.
    pending: list[Any] = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"must hold finite numbers only, got {value}. Correct the value.")
        if isinstance(value, int) and abs(value) > LARGEST_SEED:
            raise ValueError(
                f"must hold whole numbers of at most {LARGEST_SEED}, got {_told(value)}. Use a smaller one."
            )
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return values


FreeMapping = Annotated[
    dict[str, Any], AfterValidator(_finite)
]  # keys of a class or a file that is not ours, checked there


def _judged(path: str, info: ValidationInfo) -> str:
    # Only `load` gives a context, and says in it whether the file may name code.
    if info.context is not None and not info.context.get(TRUST_CODE, True):
        problem = untrusted(path)
        if problem is not None:
            raise ValueError(problem)
    return path


CodePath = Annotated[str, AfterValidator(_judged)]


def untrusted(path: str) -> str | None:
    """Returns what is wrong with `path` in a file that may not name code; None for an installed package's and
    for what is no import path."""
    if ":" not in path or is_installed(path):
        return None
    return (
        f"names code outside of {' and '.join(INSTALLED)}, which runs only if it is trusted, got {path!r}. "
        f"If you would run it yourself, add --trust-code, or `{TRUST_CODE}: true` to the file."
    )


class StrictModel(BaseModel):
    """A frozen record that refuses unknown keys and wrong types, and asks its rules (`problems.rules.rule`).

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

    def __init__(self, /, **values: Any) -> None:
        """Makes the record.

        Raises:
            ConfigError: With one problem for every rule that is broken.
        """
        try:
            super().__init__(**values)
        except ValidationError:
            raise problems_in_code(type(self), values) from None

    # Without it pydantic would call this for each record inside another, and tell the problems of one alone.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Returns the record that the mapping `obj` describes, as pydantic does.

        Raises:
            ConfigError: With one problem for every rule that is broken.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            if not isinstance(obj, Mapping):
                raise ConfigError(f"{cls.__name__}: must be a mapping, got {obj!r:.80}.") from error
            raise problems_in_code(cls, obj) from None

    @model_validator(mode="after")
    def _keeps_its_rules(self, info: ValidationInfo) -> Self:
        if not (info.context or {}).get(UNRULED):
            problems = list(broken_rules(self))
            if problems:
                raise ValueError("\n".join(problems))
        return self
