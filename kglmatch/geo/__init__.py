"""Rasters on the map: GeoTIFF, COG, VRT and what else rasterio opens. Needs `pip install "kglmatch[geo]"`."""

import lazy_loader

# The names stand in `__init__.pyi`; each is loaded on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
