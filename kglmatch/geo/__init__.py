"""Rasters on the map: GeoTIFF, COG, VRT and what else rasterio opens. Needs `pip install "kglmatch[geo]"`."""
