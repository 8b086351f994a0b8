"""`Matcher`: the one object that users hold. Loads, saves and exports weights, matches, registers, checks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.backends.base import Backend, Providers
from kglmatch.errors import BackendError, KGLMatchError
from kglmatch.features import to_numpy
from kglmatch.files import atomic_outputs
from kglmatch.models.card import ModelCard
from kglmatch.models.files import ModelFiles
from kglmatch.models.hub import HubOptions, upload
from kglmatch.models.pretrained import copy_onnx, load_files, resolve, save_card, save_model
from kglmatch.options import (
    BACKENDS,
    DEFAULT_BAND_ROTATION,
    DEFAULT_BAND_SCALE,
    DEFAULT_CHECK_DISPLACEMENT,
    DEFAULT_KIND,
    DEFAULT_MAX_KEYPOINTS,
    DEFAULT_MAX_ROTATION,
    DEFAULT_MAX_SCALE,
    DEFAULT_MIN_SCORE,
    DEFAULT_MODEL,
    DEFAULT_THRESHOLD,
    DEFAULT_TOP_K,
)
from kglmatch.patch_matcher import PatchMatcher
from kglmatch.patches import check_patches

# Registration and the work on many images are loaded where they are used: matching starts without them.
if TYPE_CHECKING:
    from kglmatch.export import ExportReport
    from kglmatch.registration.masks import Masks
    from kglmatch.registration.proposals import Proposer
    from kglmatch.registration.results import BandRegistration, Registration, RegistrationCheck
    from kglmatch.streaming.results import PairMatches, PairRegistration


class Matcher(PatchMatcher):
    """Matches patches and images of two sensors: "vis" is the visible one, "ir" the other.

    The costly part, `describe` (or `extract` for an image), is done once a patch set; `score` and
    `match` then work on `Features`.

    Examples:
        >>> matcher = Matcher.from_pretrained("kglnet-vis-nir")
        >>> vis = matcher.describe(vis_patches, "vis")      # (N, 64, 64) -> Features
        >>> ir = matcher.describe(ir_patches, "ir")
        >>> matcher.match(vis, ir).indices                  # (K, 2)

    Args:
        backend: runs the network; see `from_pretrained`.
        source: where its weights came from, if from files.
    """

    def __init__(self, backend: Backend, source: ModelFiles | None = None) -> None:
        super().__init__(backend)
        self.source = source

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        backend: str = "torch",
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | None = None,
        providers: Providers = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        endpoint: str | None = None,
    ) -> Matcher:
        """Loads trained weights.

        Args:
            name_or_path: a bundled model's name (`kglmatch.list_pretrained()`), a local folder with
                `config.json` and `model.safetensors`, or a model on the Hugging Face Hub,
                "owner/name" or "owner/name@revision"; looked for in this order.
            backend: "torch", or "onnx" for onnxruntime. Graphs stored with the model, in a folder
                `onnx`, are taken; else they are made once, by PyTorch, and kept in the cache.
            device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
            dtype: "float32", "float16" or "bfloat16" (PyTorch only); None takes float16 on CUDA, else
                float32, and graphs stored with the model as they are.
            batch_size: patches that go through the network at once; None suits the device.
            providers: of onnxruntime, see `from_onnx`.
            revision, token, cache_dir, local_files_only, force_download, endpoint: how to reach the
                Hub, see `kglmatch.models.hub.HubOptions`.

        Raises:
            WeightsError: no such model, damaged files, or what went wrong with the Hub.
            ConfigError: a wrong `config.json`.
            BackendError: a device that cannot be had; nothing else is taken in its place.
        """
        if backend not in BACKENDS:
            raise BackendError(f"backend must be one of {BACKENDS}, got {backend!r}")
        hub = HubOptions(revision, token, cache_dir, local_files_only, force_download, endpoint)
        if backend == "onnx":
            from kglmatch.onnx_cache import load_pretrained

            return cls(
                load_pretrained(
                    name_or_path,
                    hub,
                    providers=providers,
                    device=device,
                    dtype=dtype,
                    batch_size=batch_size,
                )
            )
        if providers is not None:
            raise BackendError(f'providers={providers!r} are of onnxruntime: give backend="onnx" with them')
        from kglmatch.backends.torch import TorchBackend

        files = resolve(name_or_path, hub)
        state, config = load_files(files)
        return cls(TorchBackend(state, config, device=device, dtype=dtype, batch_size=batch_size), files)

    @classmethod
    def from_onnx(
        cls,
        folder: str | Path,
        *,
        providers: Providers = None,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> Matcher:
        """Runs exported graphs by onnxruntime. PyTorch is not needed, and not imported.

        Args:
            folder: what `export_onnx` wrote.
            providers: None or "auto" goes by `device`; else onnxruntime's execution providers by rank,
                names or (name, options) pairs. One that does not start is an error.
            device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N".
            batch_size: patches that go through the network at once; None suits the device.

        Raises:
            WeightsError: a folder that lacks files, a damaged graph, or graphs of different models.
            ConfigError: a wrong `config.json`.
            BackendError: a device or provider that cannot be had.
        """
        from kglmatch.backends.onnx import OnnxBackend

        return cls(OnnxBackend(folder, providers=providers, device=device, batch_size=batch_size))

    def export_onnx(
        self,
        folder: str | Path,
        *,
        half: bool = False,
        calibrate: tuple[Any, Any] | None = None,
        batch: int | None = None,
        opset: int | None = None,
    ) -> ExportReport:
        """Writes ONNX graphs for `from_onnx`, C++ or TensorRT, after comparing them with PyTorch.

        Args:
            folder: a new folder, or an empty one.
            half: convolutions in float16.
            calibrate: visible and infrared patches, each (N, 64, 64) as `describe` takes them, row by row of
                the same place, N at least 16, better 200: convolutions in int8, with ranges measured on them.
            batch: a fixed number of rows; None leaves it open.
            opset: 18 to 23; None takes 23.

        Returns:
            files, sizes, node counts and measured differences; see `kglmatch.export.export_onnx`.

        Raises:
            KGLMatchError: an ONNX matcher, weights held in bfloat16, a wrong batch or opset, or patches that
                int8 cannot be calibrated with.
            ExportError: the graphs do not give PyTorch's numbers; nothing is left behind.
            OutputError: the folder cannot be made.
        """
        if self.backend.name != "torch":
            raise KGLMatchError("an ONNX matcher is exported already: copy its folder")
        if self.backend.dtype == "bfloat16":
            raise KGLMatchError('the weights are held as bfloat16: load them with dtype="float32" to export')
        from kglmatch.export import DEFAULT_OPSET, export_onnx

        return export_onnx(
            {key: value.float() for key, value in self.backend.state_dict().items()},
            self.config,
            folder,
            name=self.source.name if self.source else "KGL-Net",
            half=half,
            calibration=None if calibrate is None else self._calibration(calibrate),
            batch=batch,
            opset=DEFAULT_OPSET if opset is None else opset,
        )

    def _calibration(self, patches: tuple[Any, Any]) -> dict[str, NDArray[np.float32]]:
        """Patches of both sensors as the network sees them: (N, P, P) float32."""
        found = {}
        for modality, values in zip(("vis", "ir"), patches, strict=True):
            size, name = self.config.patch_size, f"calibrate, {modality}"
            checked = to_numpy(check_patches(values, patch_size=size, name=name))
            scale = np.float32(255 if checked.dtype == np.uint8 else 1)
            found[modality] = checked.astype(np.float32) / scale
        return found

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        card: ModelCard | str | None = None,
        half: bool = True,
        onnx: str | Path | None = None,
    ) -> None:
        """Writes `config.json`, `model.safetensors` and the model card `README.md`.

        Args:
            folder: made if missing; files of these names in it are replaced.
            card: the model card, or its text; None keeps the one that came with the weights, or
                writes a short one.
            half: store float16, which halves the file and costs about 1e-3 of a weight's size.
            onnx: a folder that `kglmatch export --onnx` wrote, to copy along as `onnx/`.

        Raises:
            KGLMatchError: the matcher holds no weights (ONNX), or in a precision below the one asked
                for; no graphs in `onnx`.
            OutputError: the folder cannot be written.
        """
        self._save(folder, str(folder), card, half, onnx)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: ModelCard | str | None = None,
        half: bool = True,
        onnx: str | Path | None = None,
        message: str = "Upload KGL-Net weights",
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face Hub, as one commit.

        Args:
            repo_id: "owner/name"; made if missing.
            card, half, onnx: as for `save_pretrained`.
            message, private, revision, token, endpoint: see `kglmatch.models.hub.upload` and `HubOptions`.

        Returns:
            the commit's address.

        Raises:
            KGLMatchError: as for `save_pretrained`.
            OutputError: no permission, or a Hub that cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._save(folder, repo_id, card, half, onnx)
            hub = HubOptions(revision=revision, token=token, endpoint=endpoint)
            return upload(repo_id, Path(folder), hub, message=message, private=private)

    def _save(
        self,
        folder: str | Path,
        load: str,
        card: ModelCard | str | None,
        half: bool,
        onnx: str | Path | None,
    ) -> None:
        state = self.backend.state_dict()
        if self.backend.dtype not in (("float32", "float16") if half else ("float32",)):
            raise KGLMatchError(
                f'the weights are held as {self.backend.dtype}: load them with dtype="float32" to save them'
            )
        with atomic_outputs():
            save_model(folder, state, self.config, half=half)
            save_card(folder, self.config, card, load=load, source=self.source)
            if onnx is not None:
                copy_onnx(onnx, folder)

    # --- whole images -------------------------------------------------------------------------

    def register(
        self,
        vis: Any,
        ir: Any,
        *,
        kind: str = DEFAULT_KIND,
        max_displacement: float | None = None,
        max_rotation: float = DEFAULT_MAX_ROTATION,
        max_scale: float = DEFAULT_MAX_SCALE,
        proposers: Sequence[Proposer] = (),
        local: bool = False,
    ) -> Registration:
        """Finds the transform between two whole images, and says whether to believe it.

        The structure of the images (directions of edges) is searched and refined to a fraction of a
        pixel; the network judges what was found. See `kglmatch.registration`.

        Args:
            vis, ir: images, as for `extract`; sizes and resolutions may differ. Pixels that are NaN or masked
                (numpy's masked arrays) do not count.
            kind: "translation", "similarity", "affine", "homography", or "auto": the simplest
                that no other clearly beats.
            max_displacement: pixels that the middle of the image may be moved by; None for any shift
                that leaves a third of the image in common.
            max_rotation: degrees, either way; 180 searches every rotation.
            max_scale: factor, either way, in addition to the ratio of the image sizes.
            proposers: callables ``(vis, ir) -> matches or transform`` that propose too: other matchers
                through `kglmatch.proposers`, or functions of your own. They get both images as (H, W) float32
                in [0, 1]; what they may return is in `kglmatch.registration.proposals`. All proposals within
                the limits are refined and judged alike.
            local: also look for the smooth displacement that the transform leaves over, and apply it
                where the images support it (`Registration.local`, `Registration.correction`).

        Returns:
            `Registration`; its verdict is "failed" where nothing was found that holds, its `proposer` says
            who proposed it, and its `errors` which proposers raised.

        Raises:
            ImageError: unreadable, or smaller than a patch.
            KGLMatchError: a parameter out of range, or a proposer that cannot be called.
        """
        from kglmatch.registration.limits import Limits
        from kglmatch.registration.verdict import register

        limits = Limits(kind, max_displacement, max_rotation, max_scale)
        images, masks = self._load_pair(vis, ir)
        found = register(self, *images, limits, proposers, masks)
        if not local:
            return found
        from kglmatch.registration.corrected import correct_locally

        return correct_locally(self, *images, found, masks)

    def verify(
        self, vis: Any, ir: Any, transform: Any, *, kind: str = DEFAULT_KIND, refine: bool = False
    ) -> Registration:
        """Says whether a transform, or matches, from anywhere hold between two whole images.

        A transform is judged as it is given: where it is more than 3 pixels (`options.VERIFY_TOLERANCE`) from
        what holds around it, at 5 % of the places that were compared or more, it is not "registered", and
        more than twice as far it has "failed". Pixels are those of the image with the larger ones.

        Args:
            vis, ir: images, as for `register`.
            transform: (3, 3) or (2, 3) from visible to ir pixels; or matches: (N, 4) with x and y in the
                visible and in the ir image, two arrays (N, 2), or `Matches` with keypoints. Of matches, the
                transform that most agree on is judged.
            kind: of the transform that is fitted to matches, or found by `refine`; as for `register`.
            refine: give the refined transform, to a fraction of a pixel, with its own verdict. It is looked
                for up to a twenty-fifth of the image's longer side from the given one.

        Returns:
            `Registration`, with `proposer` "given"; its verdict is "failed" where matches agree on no
            transform.

        Raises:
            ImageError: unreadable, or smaller than a patch.
            KGLMatchError: another kind; a transform that is not (3, 3) or (2, 3), not finite or cannot be
                inverted; matches of another shape.
        """
        from kglmatch.registration.limits import Limits
        from kglmatch.registration.proposals import read_proposal
        from kglmatch.registration.verify import verify

        limits = Limits(kind)
        given = read_proposal(transform, "given")
        images, masks = self._load_pair(vis, ir)
        return verify(self, *images, given, kind=limits.kind, refined=refine, masks=masks)

    def check(
        self, vis: Any, ir: Any, *, max_displacement: float = DEFAULT_CHECK_DISPLACEMENT
    ) -> RegistrationCheck:
        """How well are two images registered that should be aligned, and where not?

        Args:
            vis, ir: images of one size, as for `extract`.
            max_displacement: pixels, 1 to 64; larger displacements are not found.

        Returns:
            `RegistrationCheck`: displacements on a grid, and their summary.

        Raises:
            ImageError: unreadable, smaller than a patch, or of different sizes.
            KGLMatchError: a parameter out of range.
        """
        from kglmatch.registration.verdict import check

        images, masks = self._load_pair(vis, ir)
        return check(self, *images, max_displacement=max_displacement, masks=masks)

    def _load_pair(self, vis: Any, ir: Any) -> tuple[tuple[Any, Any], Masks | None]:
        """Two images, grey, and which pixels hold data; None where all do."""
        from kglmatch.registration.masks import fill_pair

        return fill_pair(self.load_masked(vis), self.load_masked(ir))

    def register_stack(
        self,
        reference: Any,
        bands: Sequence[Any],
        *,
        names: Sequence[str] | None = None,
        kind: str = DEFAULT_KIND,
        max_displacement: float | None = None,
        max_rotation: float = DEFAULT_BAND_ROTATION,
        max_scale: float = DEFAULT_BAND_SCALE,
    ) -> list[BandRegistration]:
        """Registers every band of a multispectral rig to one reference.

        A band that is not registered directly is tried through the bands that are, the most reliable first;
        its confidence is then the product of both, unless the reference and the band speak for more.
        A band that fails all the same says so in its verdict and has no transform.

        Args:
            reference: image, as for `extract`: the "vis" side.
            bands: images: the "ir" side.
            names: of the bands; their positions if None.
            kind, max_displacement, max_rotation, max_scale: as for `register`.

        Returns:
            one `BandRegistration` a band, in the order given.

        Raises:
            ImageError, KGLMatchError: as for `register`, or names that do not fit the bands.
        """
        from kglmatch.registration.limits import Limits
        from kglmatch.registration.verdict import register_stack

        limits = Limits(kind, max_displacement, max_rotation, max_scale)
        images = [self.load(band) for band in bands]
        return register_stack(self, self.load(reference), images, limits, names=names)

    # --- many images --------------------------------------------------------------------------

    def match_many(
        self,
        pairs: Iterable[Any],
        *,
        workers: int | None = None,
        detector: str | None = None,
        max_keypoints: int = DEFAULT_MAX_KEYPOINTS,
        top_k: int | None = DEFAULT_TOP_K,
        mutual: bool = True,
        one_to_one: bool = True,
        min_score: float = DEFAULT_MIN_SCORE,
        max_displacement: float | None = None,
        decide: str | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        dense: bool = False,
        upright: bool = True,
        nodata: float | None = None,
    ) -> Iterator[PairMatches]:
        """Matches many pairs of images, in bounded memory however many they are.

        Worker processes read the images of the next pairs and find their keypoints while the network
        works; patches of several pairs go through it together. Results are those of `match_images`.

        Args:
            pairs: (vis, ir) or `kglmatch.Pair`, images as for `extract`; drawn a few ahead. Paths
                are read by the workers, other images are sent to them.
            workers: processes; None takes one a processor, but no more than 4; 0 uses a thread.
            detector, max_keypoints, upright: as for `extract`.
            top_k, mutual, one_to_one, min_score, max_displacement, decide: as for `match`.
            threshold, dense: as for `match_images`.
            nodata: a pixel value that says "no data here", see `kglmatch.images.load_image`.

        Returns:
            an iterator over one `PairMatches` a pair, in their order. What goes wrong with a pair is its
            `error`, and the rest continues. Closing the iterator ends the workers.

        Raises:
            KGLMatchError: a parameter out of range; or, while iterating, something that is no pair.
        """
        from kglmatch.streaming.match import match_many

        return match_many(
            self,
            pairs,
            workers=workers,
            detector=detector,
            max_keypoints=max_keypoints,
            top_k=top_k,
            mutual=mutual,
            one_to_one=one_to_one,
            min_score=min_score,
            max_displacement=max_displacement,
            decide=decide,
            threshold=threshold,
            dense=dense,
            upright=upright,
            nodata=nodata,
        )

    def register_many(
        self,
        pairs: Iterable[Any],
        *,
        workers: int | None = None,
        kind: str = DEFAULT_KIND,
        max_displacement: float | None = None,
        max_rotation: float = DEFAULT_MAX_ROTATION,
        max_scale: float = DEFAULT_MAX_SCALE,
        nodata: float | None = None,
    ) -> Iterator[PairRegistration]:
        """Registers many pairs of images, in bounded memory however many they are.

        Worker processes read the images of the next pairs and align them by structure while the network
        judges. Results are those of `register`.

        Args:
            pairs: as for `match_many`.
            workers: processes; None takes one a processor; 0 uses a thread.
            kind, max_displacement, max_rotation, max_scale: as for `register`.
            nodata: a pixel value that says "no data here", see `kglmatch.images.load_image`.

        Returns:
            an iterator over one `PairRegistration` a pair, in their order. What goes wrong with a pair is
            its `error`, and the rest continues. Closing the iterator ends the workers.

        Raises:
            KGLMatchError: a parameter out of range; or, while iterating, something that is no pair.
        """
        from kglmatch.streaming.register import register_many

        return register_many(
            self,
            pairs,
            workers=workers,
            kind=kind,
            max_displacement=max_displacement,
            max_rotation=max_rotation,
            max_scale=max_scale,
            nodata=nodata,
        )
