"""The discrete VAE of DALL-E: OpenAI's module and parameter names and package API, on torch alone.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", arXiv 2102.12092, appendix A.
"""

from dall_e.decoder import Decoder
from dall_e.encoder import Encoder
from dall_e.loading import ModelFileError, load_model
from dall_e.utils import map_pixels, unmap_pixels

__all__ = ["Decoder", "Encoder", "ModelFileError", "load_model", "map_pixels", "unmap_pixels"]
