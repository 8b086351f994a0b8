"""kglmatch: match image patches and whole images across spectra with KGL-Net (arXiv 2412.11161)."""

import lazy_loader

from kglmatch.options import __version__ as __version__

# `__init__.pyi` lists the public names; each is loaded on first use, so that `import kglmatch` is fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
