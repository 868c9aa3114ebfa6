"""The public ops: each validates its arguments, picks a backend and owns the autograd.

Legend of the shape comments, everywhere in this package:

  B  batch (images)            R  rays of one image        S  samples of one ray      N  points
  C  channels                  H, W  height, width         K  fine samples of one ray L  label numbers

planes are [B, 3*C, H, W]; points [B, N, 3]; t, a distance along a unit ray in world units, [B, R, S]; images are in
[-1, 1]. Every op takes `backend`: None for the fastest that is there for the tensors' device, or one of
`backends.BACKENDS`; one that is named and missing is an error that says how to get it.
"""

from .bias_act import bias_act
from .composite import Composite, composite
from .cut import cut
from .decode_triplane import Network, decode_triplane, decode_triplane_coarse_to_fine, decode_triplane_rays
from .draws import draw_seed
from .layer_epilogue import layer_epilogue
from .modulated_conv2d import conv2d_resample, modulated_conv2d, modulated_layer
from .modulation import Modulation, OfWeight, modulation
from .sample_importance import sample_importance, sample_stratified
from .sample_triplane import PlaneRegion, sample_triplane
from .upfirdn2d import upfirdn2d

__all__ = [
    "Composite",
    "Modulation",
    "Network",
    "OfWeight",
    "PlaneRegion",
    "bias_act",
    "composite",
    "conv2d_resample",
    "cut",
    "decode_triplane",
    "decode_triplane_coarse_to_fine",
    "decode_triplane_rays",
    "draw_seed",
    "layer_epilogue",
    "modulated_conv2d",
    "modulated_layer",
    "modulation",
    "sample_importance",
    "sample_stratified",
    "sample_triplane",
    "upfirdn2d",
]
