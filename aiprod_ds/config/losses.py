"""What the loss sections of all trainers have in common: weights that a phase may override."""

from __future__ import annotations

from aiprod_ds.config.schema import StrictModel


class LossConfig(StrictModel):
    """A weighted sum of terms."""

    def weights(self) -> dict[str, float]:
        """Returns the fields that a phase may override, by name: every `*_weight`."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_weight")}
