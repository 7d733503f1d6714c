"""InternVL2 as OpenGVLab publishes it, converted to transformers' own layout."""

from pipeline.models.internvl2.convert import GB, Converted, Progress, convert
from pipeline.models.internvl2.source import ConversionError

__all__ = ["GB", "ConversionError", "Converted", "Progress", "convert"]
