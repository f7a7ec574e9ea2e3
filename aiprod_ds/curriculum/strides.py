"""How a model divides its input: what a plan must know of it to snap sizes and lengths.

A pure record; `aiprod_ds.models` measures it. It stands here, not there, because the curriculum reads it and
knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStrides:
    """How many pixels and frames become one latent; from the model's own configuration. Frames of sound are
    its samples.

    Attributes:
        spatial: Height and width must be multiples of it; 1 for sound.
        temporal: Frames that become one latent; see `is_causal`.
        is_causal: The model takes 1 + temporal * k frames, as most video models do; otherwise temporal * k,
            k >= 1.
    """

    spatial: int
    temporal: int
    is_causal: bool = True

    def latents(self, frames: int) -> int:
        """Returns the latent positions along time of a clip of `frames`, which the model takes."""
        return 1 + (frames - 1) // self.temporal if self.is_causal else frames // self.temporal

    def snap(self, requested: int) -> int:
        """Returns the smallest number of frames that the model takes and that is at least `requested`.

        Example: 8 -> 9 and 16 -> 17 for causal strides 4 and 8; 49 stays 49 and 1 (an image) stays 1. Sound
        of 66,150 samples with a hop of 2048 becomes 67,584.
        """
        first = 1 if self.is_causal else 0
        return first + -(-(requested - first) // self.temporal) * self.temporal

    def fit(self, available: int) -> int:
        """Returns the largest number of frames that the model takes and that is at most `available`; 0 if
        there is none.

        Example: 8 -> 5 and 17 -> 17 for a causal stride of 4; sound of 5000 samples with a hop of 2048
        becomes 4096.
        """
        first = 1 if self.is_causal else 0
        return max(0, first + (available - first) // self.temporal * self.temporal) if available else 0

    @property
    def rule(self) -> str:
        """What the model takes, in words: `1 + 8 * k frames` or `2048 * k samples`."""
        if self.is_causal:
            return f"1 + {self.temporal} * k frames"
        return f"{self.temporal} * k {'samples' if self.spatial == 1 else 'frames'}"
