"""What QGIS loads: registers the provider, nothing else."""

from __future__ import annotations

from qgis.core import QgsApplication

from .provider import KGLMatchProvider


class KGLMatchPlugin:
    """Adds the provider to Processing."""

    def __init__(self):
        self._provider = None

    def initProcessing(self):
        """Also called by qgis_process, without a window."""
        self._provider = KGLMatchProvider()
        QgsApplication.processingRegistry().addProvider(self._provider)

    def initGui(self):
        """Called in QGIS's window."""
        self.initProcessing()

    def unload(self):
        """Takes the provider away again."""
        if self._provider is not None:
            QgsApplication.processingRegistry().removeProvider(self._provider)
            self._provider = None
