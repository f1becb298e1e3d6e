"""What a section of a config is made of: types of single values, and the class that checks its keys together."""

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

# Every number has a largest value: far above what anybody can train, and far below what overflows where it is used (64-bit integers,
# 53 bits of a double in JSON, the timers of the operating system). Numbers that are multiplied are checked again in the plan.
SEED_END = 2**63  # torch and NumPy take 64 bits; a step is added to it
MOST = 10**15  # tokens, bytes
MOST_STEPS = 10**12
MOST_SECONDS = 1e8  # three years; timers end at about 9e9

Int = Annotated[int, Field(ge=-MOST_STEPS, le=MOST_STEPS), Number]
Seed = Annotated[int, Field(ge=0, lt=SEED_END), Number]
Positive = Annotated[int, Field(gt=0, le=MOST), Number]
Steps = Annotated[int, Field(gt=0, le=MOST_STEPS), Number]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST_STEPS), Number]
Size = Annotated[int, Field(gt=0, le=2**20), Number]  # of a model, a micro-batch, a number of processes, lanes
Words = Annotated[int, Field(gt=0, le=2**24), Number]  # tokens of a row, a vocabulary, a sample
PositiveFloat = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False), Number]
Large = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False), Number]  # floating-point operations
Rate = Annotated[float, Field(gt=0, le=1e20, allow_inf_nan=False), Number]  # what diverges is said by training
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False), Number]
Fraction = Annotated[float, Field(ge=0, le=1), Number]
Decay = Annotated[float, Field(ge=0, lt=1), Number]
NO_NUL = r"^[^\x00]*$"  # no system call takes a NUL
Text = Annotated[str, Field(min_length=1, pattern=NO_NUL)]


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
