"""Register, Check and Tie points in the Processing toolbox."""

from __future__ import annotations

from processing.core.ProcessingConfig import ProcessingConfig
from qgis.core import (
    QgsProcessing,
    QgsProcessingAlgorithm,
    QgsProcessingException,
    QgsProcessingOutputNumber,
    QgsProcessingOutputString,
    QgsProcessingParameterBand,
    QgsProcessingParameterBoolean,
    QgsProcessingParameterDefinition,
    QgsProcessingParameterEnum,
    QgsProcessingParameterFileDestination,
    QgsProcessingParameterNumber,
    QgsProcessingParameterRasterDestination,
    QgsProcessingParameterRasterLayer,
    QgsProcessingParameterString,
    QgsProcessingParameterVectorDestination,
)

from . import command as kglmatch

EXECUTABLE = "KGLMATCH_EXECUTABLE"  # Processing's setting

_MODEL_HELP = (
    "<b>Model</b>: for the kind of the second sensor: near infrared (nir), thermal infrared (lwir) or radar "
    "(sar).<br><b>Other model</b>: a model folder, or owner/name on the Hugging Face Hub, in place of the "
    "model.<br>"
)
_BANDS_HELP = (
    "<b>Bands</b>: one band of each raster is compared; not set: the grey value of red, green and blue where "
    "the file says which they are, else the first band.<br>"
)
_DISPLACEMENT_HELP = (
    "<b>Largest displacement</b>: by how much the map of the second raster may be wrong, in pixels of the "
    "visible raster or in metres on the ground.<br>"
)


class _Algorithm(QgsProcessingAlgorithm):
    """What the algorithms share: both rasters, the model, and how the program is called."""

    COMMAND = "register"

    def createInstance(self):
        return type(self)()

    # --- parameters -----------------------------------------------------------------------------------

    def _add_rasters(self):
        for name, what, of in (
            ("VIS", "Visible raster", "visible"),
            ("IR", "Raster of the other sensor", "other"),
        ):
            self.addParameter(QgsProcessingParameterRasterLayer(name, what))
            self.addParameter(
                QgsProcessingParameterBand(
                    f"{name}_BAND", f"Band of the {of} raster", parentLayerParameterName=name, optional=True
                )
            )
        self.addParameter(
            QgsProcessingParameterEnum(
                "MODEL", "Model", kglmatch.MODELS, defaultValue=kglmatch.MODELS[0], usesStaticStrings=True
            )
        )
        self._add_advanced(QgsProcessingParameterString("OTHER_MODEL", "Other model", optional=True))

    def _add_displacement(self, default=None):
        number = QgsProcessingParameterNumber(
            "MAX_DISPLACEMENT",
            "Largest displacement",
            QgsProcessingParameterNumber.Double,
            defaultValue=default,
            optional=default is None,
            minValue=0,
        )
        self.addParameter(number)
        self.addParameter(
            QgsProcessingParameterEnum(
                "UNIT",
                "Unit of the largest displacement",
                kglmatch.UNITS,
                defaultValue=kglmatch.UNITS[0],
                usesStaticStrings=True,
            )
        )

    def _add_kind(self):
        self.addParameter(
            QgsProcessingParameterEnum(
                "KIND", "Kind of transform", kglmatch.KINDS, defaultValue="auto", usesStaticStrings=True
            )
        )

    def _add_report(self):
        self.addParameter(
            QgsProcessingParameterFileDestination(
                "REPORT", "Report", "HTML files (*.html)", optional=True, createByDefault=False
            )
        )

    def _add_advanced(self, parameter):
        parameter.setFlags(parameter.flags() | QgsProcessingParameterDefinition.FlagAdvanced)
        self.addParameter(parameter)

    def _add_verdict(self):
        self.addOutput(QgsProcessingOutputString("VERDICT", "Verdict: registered, doubtful or failed"))

    # --- the run --------------------------------------------------------------------------------------

    def _file(self, parameters, name, context):
        layer = self.parameterAsRasterLayer(parameters, name, context)
        if layer is None:
            raise QgsProcessingException(self.invalidRasterError(parameters, name))
        return kglmatch.local_file(layer.providerType(), layer.source(), layer.name())

    def _band(self, parameters, name, context):
        if parameters.get(name) is None:
            return None
        return self.parameterAsInt(parameters, name, context) or None

    def _number(self, parameters, name, context):
        value = parameters.get(name, self.parameterDefinition(name).defaultValue())
        return None if value is None else self.parameterAsDouble(parameters, name, context)

    def _target(self, parameters, name, context):
        return self.parameterAsFileOutput(parameters, name, context) or None

    def _common(self, parameters, context):
        """The options that all commands take."""
        other = self.parameterAsString(parameters, "OTHER_MODEL", context).strip()
        displacement = self._number(parameters, "MAX_DISPLACEMENT", context)
        return {
            "vis-band": self._band(parameters, "VIS_BAND", context),
            "ir-band": self._band(parameters, "IR_BAND", context),
            "model": other or self.parameterAsEnumString(parameters, "MODEL", context),
            "max-displacement": kglmatch.length(
                displacement, self.parameterAsEnumString(parameters, "UNIT", context)
            ),
        }

    def _call(self, parameters, context, feedback, options):
        """Runs the program; returns what it printed as JSON, and whether its verdict is a failure.

        Raises:
            QgsProcessingException: what it says is wrong.
        """
        try:
            vis, ir = (self._file(parameters, name, context) for name in ("VIS", "IR"))
            program = kglmatch.find_program(ProcessingConfig.getSetting(EXECUTABLE) or "")
            line = [program, *kglmatch.arguments(self.COMMAND, vis, ir, options)]
            feedback.pushCommandInfo(kglmatch.shown(line))
            finished = kglmatch.run(
                line,
                say=lambda text: _push(feedback, text),
                advance=feedback.setProgress,
                cancelled=feedback.isCanceled,
            )
        except kglmatch.CommandError as error:
            raise QgsProcessingException(str(error)) from None
        except kglmatch.Cancelled:
            raise QgsProcessingException("kglmatch was cancelled; nothing was written") from None
        problem = kglmatch.problem_of(finished)
        if problem is not None:
            raise QgsProcessingException(problem)
        result = finished.result
        for path in result.get("written", []):
            feedback.pushInfo(f"wrote {path}")
        feedback.pushInfo(kglmatch.summary(result))
        if result.get("verdict") == "doubtful":
            feedback.pushWarning("The result is doubtful: look at it before you use it.")
        return result, finished.code == kglmatch.FAILED

    def _registered(self, parameters, context, feedback, options):
        """As `_call`, of a registration: one that failed is an exception."""
        result, failed = self._call(parameters, context, feedback, options)
        if failed:
            report = options.get("report")
            more = f"; the report is {report}" if report and report in result.get("written", []) else ""
            raise QgsProcessingException(
                "the rasters were not registered: no displacement was found that both support. Check the "
                f"model, the bands and the largest displacement{more}"
            )
        return result


def _push(feedback, text):
    if text.startswith("kglmatch: error"):
        return  # becomes the exception
    feedback.pushConsoleInfo(text)


class RegisterAlgorithm(_Algorithm):
    """`kglmatch register`."""

    def name(self):
        return "register"

    def displayName(self):
        return "Register"

    def shortDescription(self):
        return "Corrects the place of a raster on the map by the content of a visible one"

    def tags(self):
        return ["registration", "coregistration", "align", "warp", "shift", "infrared", "thermal", "SAR"]

    def shortHelpString(self):
        return (
            "Finds by how much the map of a raster is wrong, compared with a visible raster of the same "
            "place, and writes it corrected: all its bands on the pixel grid of the visible raster, or "
            "(shift only) its own pixels with a corrected geotransform. The rasters may differ in coordinate "
            "reference system, resolution and size. If no displacement is found that both rasters support, "
            f"nothing is written.<br><br>{_BANDS_HELP}{_MODEL_HELP}{_DISPLACEMENT_HELP}"
            "<b>Shift only</b>: keep the pixels, find a translation, correct the geotransform.<br>"
            "<b>Local correction</b>: also correct the smooth displacement that the transform leaves over, "
            "where the rasters support it; not with shift only.<br>"
            "<b>Report</b>: an HTML file with pictures, residuals and the verdict."
        )

    def initAlgorithm(self, configuration=None):
        self._add_rasters()
        self._add_displacement()
        self._add_kind()
        self.addParameter(QgsProcessingParameterBoolean("SHIFT_ONLY", "Shift only", defaultValue=False))
        self.addParameter(QgsProcessingParameterBoolean("LOCAL", "Local correction", defaultValue=False))
        self._add_report()
        self.addParameter(QgsProcessingParameterRasterDestination("OUTPUT", "Registered"))
        self._add_verdict()
        for name, what in (
            ("CONFIDENCE", "Confidence, 0 to 1"),
            ("SHIFT_EAST", "Shift to the east, metres"),
            ("SHIFT_NORTH", "Shift to the north, metres"),
        ):
            self.addOutput(QgsProcessingOutputNumber(name, what))

    def checkParameterValues(self, parameters, context):
        if self.parameterAsBool(parameters, "SHIFT_ONLY", context) and self.parameterAsBool(
            parameters, "LOCAL", context
        ):
            return False, "Shift only keeps the pixels, and local correction moves them: choose one of them"
        return super().checkParameterValues(parameters, context)

    def processAlgorithm(self, parameters, context, feedback):
        shift_only = self.parameterAsBool(parameters, "SHIFT_ONLY", context)
        output = self.parameterAsOutputLayer(parameters, "OUTPUT", context)
        report = self._target(parameters, "REPORT", context)
        options = {
            "o": output,
            **self._common(parameters, context),
            "kind": None if shift_only else self.parameterAsEnumString(parameters, "KIND", context),
            "shift-only": shift_only,
            "local": self.parameterAsBool(parameters, "LOCAL", context),
            "report": report,
        }
        result = self._registered(parameters, context, feedback, options)
        east, north = result.get("shift_metres") or (None, None)
        found = {
            "OUTPUT": output,
            "VERDICT": result["verdict"],
            "CONFIDENCE": result["confidence"],
            "SHIFT_EAST": east,
            "SHIFT_NORTH": north,
        }
        return found if report is None else {**found, "REPORT": report}


class CheckAlgorithm(_Algorithm):
    """`kglmatch check`."""

    COMMAND = "check"

    def name(self):
        return "check"

    def displayName(self):
        return "Check"

    def shortDescription(self):
        return "Measures how far the contents of two rasters are apart"

    def tags(self):
        return ["registration", "accuracy", "residuals", "displacement", "quality"]

    def shortHelpString(self):
        return (
            "Measures at a grid of points how far the contents of two rasters are apart that the map puts "
            "at one place. The residual field is a raster of two bands: displacement in x and in y, in "
            f"pixels of the visible raster.<br><br>{_BANDS_HELP}{_MODEL_HELP}{_DISPLACEMENT_HELP}"
            "<b>Report</b>: an HTML file with arrows, histogram, RMSE and CE90.<br>"
            "<b>Verdict</b>: failed where the content of one raster was not found in the other within the "
            "largest displacement."
        )

    def initAlgorithm(self, configuration=None):
        self._add_rasters()
        self._add_displacement(16.0)
        self._add_report()
        self.addParameter(
            QgsProcessingParameterRasterDestination(
                "RESIDUAL_FIELD", "Residual field", optional=True, createByDefault=True
            )
        )
        self._add_verdict()
        for name, what in (
            ("MEDIAN_ERROR", "Median displacement, pixels of the visible raster"),
            ("P95_ERROR", "95 % of the displacements are smaller, pixels"),
            ("SHIFT_X", "Median displacement in x, pixels"),
            ("SHIFT_Y", "Median displacement in y, pixels"),
        ):
            self.addOutput(QgsProcessingOutputNumber(name, what))

    def processAlgorithm(self, parameters, context, feedback):
        field = self.parameterAsOutputLayer(parameters, "RESIDUAL_FIELD", context) or None
        report = self._target(parameters, "REPORT", context)
        options = {**self._common(parameters, context), "report": report, "residual-field": field}
        result, failed = self._call(parameters, context, feedback, options)
        if failed:
            feedback.reportError("The content of one raster was not found in the other.", False)
        x, y = result.get("shift") or (None, None)
        found = {
            "VERDICT": result["verdict"],
            "MEDIAN_ERROR": result.get("median_error"),
            "P95_ERROR": result.get("p95_error"),
            "SHIFT_X": x,
            "SHIFT_Y": y,
        }
        for name, path in (("RESIDUAL_FIELD", field), ("REPORT", report)):
            if path is not None and path in result.get("written", []):
                found[name] = path
        return found


class TiePointsAlgorithm(_Algorithm):
    """`kglmatch register --tie-points`."""

    def name(self):
        return "tiepoints"

    def displayName(self):
        return "Tie points"

    def shortDescription(self):
        return "Places of two rasters that show the same, as points with displacement and confidence"

    def tags(self):
        return ["registration", "matching", "ground control points", "GCP", "displacement"]

    def shortHelpString(self):
        return (
            "Registers two rasters and writes the places that were compared: a GeoPackage (or CSV) of "
            "points in the coordinate reference system of the visible raster, with pixel coordinates "
            f"in both rasters, displacement and confidence.<br><br>"
            f"{_BANDS_HELP}{_MODEL_HELP}{_DISPLACEMENT_HELP}"
        )

    def initAlgorithm(self, configuration=None):
        self._add_rasters()
        self._add_displacement()
        self._add_kind()
        self.addParameter(
            QgsProcessingParameterVectorDestination("OUTPUT", "Tie points", QgsProcessing.TypeVectorPoint)
        )
        self._add_verdict()

    def processAlgorithm(self, parameters, context, feedback):
        output = self.parameterAsOutputLayer(parameters, "OUTPUT", context)
        options = {
            **self._common(parameters, context),
            "kind": self.parameterAsEnumString(parameters, "KIND", context),
            "tie-points": output,
        }
        result = self._registered(parameters, context, feedback, options)
        return {"OUTPUT": output, "VERDICT": result["verdict"]}
