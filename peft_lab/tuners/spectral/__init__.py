"""Building blocks of a method in the singular bases of its weights.

Method authors import from here.
"""

from __future__ import annotations

from peft_lab.tuners.spectral.kernels import spectral_conv2d, spectral_delta, spectral_linear
from peft_lab.tuners.spectral.layer import SpectralConfig, SpectralLayer
from peft_lab.tuners.spectral.svd import Bases, leading, parse_rank
from peft_lab.tuners.spectral.svd import bases as singular_bases

__all__ = [
    "Bases",
    "SpectralConfig",
    "SpectralLayer",
    "leading",
    "parse_rank",
    "singular_bases",
    "spectral_conv2d",
    "spectral_delta",
    "spectral_linear",
]
