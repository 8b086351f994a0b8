"""The provider: its name, its setting, its algorithms."""

from __future__ import annotations

from pathlib import Path

from processing.core.ProcessingConfig import ProcessingConfig, Setting
from qgis.core import QgsProcessingProvider
from qgis.PyQt.QtGui import QIcon

from .algorithms import EXECUTABLE, CheckAlgorithm, RegisterAlgorithm, TiePointsAlgorithm

_NAME = "kglmatch"


class KGLMatchProvider(QgsProcessingProvider):
    """kglmatch in the Processing toolbox."""

    def id(self):
        return "kglmatch"

    def name(self):
        return _NAME

    def longName(self):
        return "kglmatch: registration across sensors"

    def icon(self):
        return QIcon(str(Path(__file__).with_name("icon.svg")))

    def load(self):
        """Adds the setting of the program (Settings > Options > Processing > Providers > kglmatch)."""
        ProcessingConfig.settingIcons[_NAME] = self.icon()
        description = "kglmatch program (empty: found on PATH)"
        ProcessingConfig.addSetting(Setting(_NAME, EXECUTABLE, description, "", valuetype=Setting.FILE))
        ProcessingConfig.readSettings()
        self.refreshAlgorithms()
        return True

    def unload(self):
        ProcessingConfig.removeSetting(EXECUTABLE)

    def loadAlgorithms(self):
        for algorithm in (RegisterAlgorithm, CheckAlgorithm, TiePointsAlgorithm):
            self.addAlgorithm(algorithm())

    def supportedOutputRasterLayerExtensions(self):
        return ["tif", "tiff"]

    def supportedOutputVectorLayerExtensions(self):
        return ["gpkg", "csv"]

    def defaultVectorFileExtension(self, hasGeometry=True):
        return "gpkg"

    def defaultRasterFileExtension(self):
        return "tif"

    def supportsNonFileBasedOutput(self):
        return False
