"""Records that a family states of its transformer: the sound side, and the names of its first publication.

Owns no family; each makes its own. Read by the trainer, by encoding and by conversions through
`protocol.Family`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

PIPELINE_PREFIX = "model.diffusion_model."
"""Of the transformer's tensors in a file that may hold a VAE and more beside it, as ComfyUI reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundFacts:
    """What there is to know of the sound that a transformer makes.

    Attributes:
        token_width: Values per token of sound.
        text_width: Of the prompt's embeddings for sound.
        latents_per_second: As the positions of sound have it; what the audio VAE makes must be the same.
        rate_keys: What in the model's configuration says so, as a message names it.
    """

    token_width: int
    text_width: int
    latents_per_second: float
    rate_keys: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedNames:
    """How the one file of a model's first publication names its tensors.

    Attributes:
        prefix: Before every name.
        rules: Pattern and replacement, as `re.sub` takes them, applied to a name of diffusers one after
            another.
    """

    prefix: str
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

    def name_of(self, name: str) -> str:
        """Returns the publication's name of the tensor that diffusers calls `name`."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return self.prefix + name

    def layer_of(self, module_name: str) -> str:
        """Returns the publication's name of the module that diffusers calls `module_name`, without the
        prefix: what a LoRA has for it."""
        weight = self.name_of(f"{module_name}.weight")
        return weight.removeprefix(self.prefix).removesuffix(".weight")
