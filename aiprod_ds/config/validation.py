"""A document and a schema -> one validated record, or every problem at once.

The last step of every reader of a configuration file (`loader`, `encode`): `document` has merged the values before, `problems`
words what pydantic finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from aiprod_ds.config.merge import Document
from aiprod_ds.config.messages import problems_of
from aiprod_ds.errors import ConfigError

Record = TypeVar("Record", bound=BaseModel)


def validated(document: Document, schema: type[Record], problems: Sequence[str] = ()) -> Record:
    """Returns the record of class `schema` that `document` holds.

    Args:
        document: With the command line's overrides applied.
        schema: The class of the record.
        problems: What was found wrong before; it is raised together with what is wrong here.

    Raises:
        ConfigError: With `problems` and one more for every rule that is broken.
    """
    try:
        record = schema.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError([*problems, *problems_of(error, schema, document)]) from None
    if problems:
        raise ConfigError(problems)
    return record
