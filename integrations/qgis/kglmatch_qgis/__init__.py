"""QGIS plugin: the Processing provider of kglmatch."""


def classFactory(iface):
    """Called by QGIS when it loads the plugin.

    Args:
        iface: the interface of QGIS's window; None in qgis_process.
    """
    from .plugin import KGLMatchPlugin

    return KGLMatchPlugin()
