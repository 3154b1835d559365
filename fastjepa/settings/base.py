"""What every setting is made with: its help, its limits and what a changed value means for a resume."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Resume = Literal["fatal", "warn", "free"]
# No whole number of a run is larger, but its seed: beyond it, sizes overflow in places that name no setting.
LARGEST = 10**9


def setting(default: Any, help: str, resume: Resume = "fatal", **limits: Any) -> Any:
    """A field with its help and its class: `fatal` values are a run's identity, a changed `warn` value is reported."""
    return Field(default=default, description=help, json_schema_extra={"resume": resume}, **limits)


class Section(BaseModel):
    """A group of settings: strict types, frozen, unknown keys refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_reason(cls, value: Any, info: ValidationInfo) -> Any:
        """Limits of all fields. The words continue those of what the field expects."""
        if isinstance(value, int) and value > LARGEST and info.field_name != "seed":
            raise ValueError(f"at most {LARGEST}")
        if any(isinstance(text, str) and "\0" in text for text in (value if isinstance(value, dict) else [value])):
            raise ValueError("without a zero byte")  # the system ends names of files there
        return value


Count = Annotated[int, Field(ge=1)]
