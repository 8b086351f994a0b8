"""Constants and defaults that the API and the commands share."""

from __future__ import annotations

from typing import Literal, get_args

__version__ = "0.1.0"

BACKENDS = ("torch", "onnx")
DTYPES = ("float32", "float16", "bfloat16")

# What a match is decided by: both answers together, the metric head, or the descriptors.
DECISIONS = ("fused", "metric", "descriptor")

# What finds keypoints, see `kglmatch.keypoints.detect_keypoints`.
DETECTORS = ("sift", "fast", "orb", "gftt", "structure", "grid")

PATCH_SIZE = 64  # pixels, side of the patches that the bundled models take

DEFAULT_MODEL = "kglnet-vis-nir"
DEFAULT_DETECTOR = "structure"  # where a model names none
DEFAULT_MAX_KEYPOINTS = 2048
DEFAULT_TOP_K = 3
DEFAULT_MIN_SCORE = 0.5
DEFAULT_THRESHOLD = 3.0  # pixels, of the homography

TransformKind = Literal["translation", "similarity", "affine", "homography"]
TRANSFORMS: tuple[TransformKind, ...] = get_args(TransformKind)
# "auto": the simplest that no other clearly beats.
KINDS = ("auto", *TRANSFORMS)
DEFAULT_KIND = "auto"
DEFAULT_MAX_ROTATION = 15.0  # degrees
DEFAULT_MAX_SCALE = 1.25
DEFAULT_CHECK_DISPLACEMENT = 16.0  # pixels
CHECK_DISPLACEMENTS = (1.0, 64.0)  # that may be asked for
# Pixels that a transform given to `verify` may be off, of the image that has the larger pixels.
VERIFY_TOLERANCE = 3.0
# Proposers that the command line knows by name, see `kglmatch.proposers`.
PROPOSERS = ("sift", "akaze", "orb")
# Two rasters on one map are nearly aligned already.
DEFAULT_MAP_ROTATION = 2.0
DEFAULT_MAP_SCALE = 1.02
# How `register` resamples rasters, by GDAL.
RESAMPLINGS = ("cubic", "bilinear", "nearest", "lanczos", "average", "mode")
DEFAULT_RESAMPLING = "cubic"
# The bands of a rig are mounted side by side.
DEFAULT_BAND_ROTATION = 5.0
DEFAULT_BAND_SCALE = 1.1

# What `kglmatch eval` measures alongside a model, see `kglmatch.evaluation.baselines`.
PATCH_BASELINES = ("sift", "gradient", "xfeat", "aliked", "hardnet", "hynet", "ncc", "nmi")
DEFAULT_PATCH_BASELINES = ("sift",)
REGISTRATION_BASELINES = ("sift", "orb", "xfeat")
DEFAULT_REGISTRATION_BASELINES = ("sift", "orb")
DEFAULT_NEGATIVES = 1  # non-matching pairs a point, as in the protocol of `kglmatch.datasets`

CALIBRATION_PAIRS = 192  # patches of each sensor that `kglmatch export --int8` draws

DEFAULT_RIG_TOLERANCE = 1.0  # pixels within which a capture agrees with its rig
DEFAULT_RIG_CAPTURES = 200  # of a flight that a calibration looks at
