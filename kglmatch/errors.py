"""Errors that users can act on. All are `ValueError`s; the command line prints them in one line."""

from __future__ import annotations


class KGLMatchError(ValueError):
    """Base of the errors below: says what was given, what was expected, and the way out."""


class ImageError(KGLMatchError):
    """An image that cannot be read or used."""


class PatchError(KGLMatchError):
    """Patches of the wrong shape, type or content."""


class ConfigError(KGLMatchError):
    """A configuration that describes no network, or no training run."""


class WeightsError(KGLMatchError):
    """Weights that are missing, damaged, or of another model."""


class NoGraphsError(WeightsError):
    """A model that has no ONNX graphs of its own, or none that can be reached."""


class BackendError(KGLMatchError):
    """A device or execution provider that was asked for and cannot be had."""


class DataError(KGLMatchError):
    """A data set, or a file of results or features, that cannot be read or used."""


class OutputError(KGLMatchError):
    """An output that cannot be written."""


class KeypointError(KGLMatchError):
    """Keypoints that are no positions, or asked for in a way that no detector offers."""


class ExportError(KGLMatchError):
    """An exported graph that does not give the network's numbers."""
