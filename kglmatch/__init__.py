"""kglmatch: match image patches and whole images across spectra with KGL-Net (arXiv 2412.11161)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and the module that holds each; loaded on first use, so that `import kglmatch` is quick.
_PUBLIC = {
    "Matcher": "kglmatch.matcher",
    "Features": "kglmatch.features",
    "Matches": "kglmatch.features",
    "Registration": "kglmatch.results",
    "RegistrationCheck": "kglmatch.results",
    "BandRegistration": "kglmatch.results",
    "KGLNetConfig": "kglmatch.config",
    "KGLMatchError": "kglmatch.errors",
    "detect_keypoints": "kglmatch.keypoints",
    "extract_patches": "kglmatch.patches",
    "list_pretrained": "kglmatch.pretrained",
    "load_image": "kglmatch.images",
}

__all__ = [
    "BandRegistration",
    "Features",
    "KGLMatchError",
    "KGLNetConfig",
    "Matcher",
    "Matches",
    "Registration",
    "RegistrationCheck",
    "__version__",
    "detect_keypoints",
    "extract_patches",
    "list_pretrained",
    "load_image",
]

if TYPE_CHECKING:
    from kglmatch.config import KGLNetConfig
    from kglmatch.errors import KGLMatchError
    from kglmatch.features import Features, Matches
    from kglmatch.images import load_image
    from kglmatch.keypoints import detect_keypoints
    from kglmatch.matcher import Matcher
    from kglmatch.patches import extract_patches
    from kglmatch.pretrained import list_pretrained
    from kglmatch.results import BandRegistration, Registration, RegistrationCheck


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kglmatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
