"""What the schema is made of: types of single values, and the section that checks its keys together."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from picotrain.errors import Problem

CREDENTIALS = re.compile(  # in URLs, which a config would keep for everybody to read
    r"\w+://([^/?]*@|.*[?&][^=&]*(token|key|sig|secret|password|credential)[^=&]*=)", re.IGNORECASE
)  # of URLs, which a config would keep


def _no_bool(value: Any) -> Any:
    """YAML's true is no number: `train.seq_len=true` is a mistake, not 1."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not a boolean")
    return value


Number = BeforeValidator(_no_bool)
Int = Annotated[int, Number]
Positive = Annotated[int, Field(gt=0), Number]
NonNegativeInt = Annotated[int, Field(ge=0), Number]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Fraction = Annotated[float, Field(ge=0, le=1), Number]
Decay = Annotated[float, Field(ge=0, lt=1), Number]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def _problems(self) -> list[Problem]:
        """What is wrong between the keys of this section."""
        return []

    @model_validator(mode="after")
    def _check(self) -> Section:
        if problems := self._problems():
            text = "; ".join(map(str, problems))
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "problems": problems})
        return self
