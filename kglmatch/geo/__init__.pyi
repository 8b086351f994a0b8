from .grid import Grid as Grid
from .raster import Raster as Raster
from .register import RasterCheck as RasterCheck
from .register import RasterRegistration as RasterRegistration
from .register import check_rasters as check_rasters
from .register import register_rasters as register_rasters
from .write import save_on_grid as save_on_grid
from .write import save_shifted as save_shifted
