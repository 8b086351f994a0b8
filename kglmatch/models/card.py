"""The model card: a `README.md` that the Hugging Face Hub shows and indexes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kglmatch.errors import KGLMatchError
from kglmatch.models.config import KGLNetConfig
from kglmatch.models.cost import cost

LIBRARY = "kglmatch"
# A task of the Hub; it has none for matching.
PIPELINE_TAG = "image-feature-extraction"

_SENSORS = {
    "nir": "near infrared",
    "lwir": "thermal infrared",
    "sar": "synthetic aperture radar",
    "other": "another sensor",
}
# The Hub refuses a card whose data sets are not named like repositories.
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

_CONFIDENCE = """\
The confidence of a registration is calibrated for these weights (`inference.confidence` in `config.json`): on
pairs that test nothing, about that share of the registrations with such evidence was within 5 pixels. Fitted
by `python benchmarks/proof DATA -o OUT --fit`."""

_CITATION = """\
```bibtex
@article{yu2024kglnet,
  title   = {Why and How: Knowledge-Guided Learning for Cross-Spectral Image Patch Matching},
  author  = {Yu, Chuang and Liu, Yunpeng and Zhao, Jinmiao and Yue, Xiangyu},
  journal = {arXiv preprint arXiv:2412.11161},
  year    = {2024}
}
```"""


@dataclass(frozen=True)
class Result:
    """One measured figure.

    Attributes:
        dataset: what it was measured on, in plain text ("RGB-NIR scenes, field").
        metric: its name ("FPR95"); give the unit with it where there is one ("FPR95 (%)").
        value: the figure.
        split: part of the data set.
    """

    dataset: str
    metric: str
    value: float
    split: str = "test"


@dataclass(frozen=True)
class TrainingSet:
    """Data that a model was trained on.

    Attributes:
        description: what it is, in Markdown, with its source.
        terms: what its terms allow ("research use", "CC BY 4.0").
    """

    description: str
    terms: str


@dataclass(frozen=True)
class ModelCard:
    """What a model card says beyond the configuration.

    Attributes:
        name: the model's name, the title of the card.
        load: what `Matcher.from_pretrained` is given to load it; None takes the name.
        license: of the weights, as the Hub calls it ("apache-2.0", "cc-by-nc-4.0"); None if unknown.
        terms: what the weights may be used for, in a sentence; the first line below the title.
        datasets: training data by its identifier on the Hub, or one like it ("rgb-nir-scene").
        pairs_seen: patch pairs seen in training, all runs together.
        results: measured figures, in the order in which to show them.
        command: what measured them, as typed in a shell.
        base_model: the model on the Hub that this one was made from, "owner/name".
        notes: more Markdown: intended use, limits.

    Raises:
        KGLMatchError: an identifier of a data set that the Hub would refuse, or results without the
            command that measured them.
    """

    name: str
    load: str | None = None
    license: str | None = None
    terms: str = ""
    datasets: Mapping[str, TrainingSet] = field(default_factory=dict)
    pairs_seen: int | None = None
    results: Sequence[Result] = ()
    command: str | None = None
    base_model: str | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        for identifier in self.datasets:
            if not _DATASET_ID.fullmatch(identifier):
                raise KGLMatchError(
                    f'a data set of a model card is named "name" or "owner/name" (letters, digits, ".", "-", '
                    f'"_"), got {identifier!r}'
                )
        if self.results and not self.command:
            raise KGLMatchError("results of a model card need the command that measured them")

    def render(self, config: KGLNetConfig) -> str:
        """The text of the `README.md` of a model with this configuration."""
        parts = [
            f"---\n{self._metadata(config)}\n---\n\n# {self.name}",
            f"**Terms**: {self._terms()}",
            _introduction(config),
            f"## Use\n\n{_usage(self.load or self.name)}",
        ]
        if "confidence" in config.inference:
            parts.append(_CONFIDENCE)
        if self.notes:
            parts.append(self.notes.strip())
        if self.datasets or self.pairs_seen is not None:
            parts.append("## Training data")
        if self.pairs_seen is not None:
            parts.append(f"{self.pairs_seen:,} patch pairs were seen in training.")
        if self.datasets:
            rows = [f"| {data.description} | {data.terms} |" for data in self.datasets.values()]
            parts.append("\n".join(["| data | terms |", "|---|---|", *rows]))
        if self.results:
            parts.append(
                f"## Results\n\n{_table(self.results)}\n\nMeasured by:\n\n```bash\n{self.command}\n```"
            )
        parts.append(f"## Citation\n\n{_CITATION}")
        return "\n\n".join(parts) + "\n"

    def _terms(self) -> str:
        if self.terms:
            return self.terms
        if self.license is not None:
            return f"those of the license `{self.license}`."
        return "not stated by whoever saved these weights."

    def _metadata(self, config: KGLNetConfig) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        results = [
            EvalResult(
                task_type=PIPELINE_TAG,
                dataset_type=_slug(result.dataset),
                dataset_name=result.dataset,
                dataset_split=result.split,
                metric_type=_slug(result.metric),
                metric_name=result.metric,
                metric_value=result.value,
            )
            for result in self.results
        ]
        data = ModelCardData(
            library_name=LIBRARY,
            pipeline_tag=PIPELINE_TAG,
            license=self.license,
            base_model=self.base_model,
            datasets=list(self.datasets) or None,
            metrics=list(dict.fromkeys(_slug(result.metric) for result in self.results)) or None,
            tags=["image-matching", "cross-spectral", "patch-descriptor", f"vis-{config.ir_kind}"],
            model_name=self.name if results else None,
            eval_results=results or None,
        )
        return data.to_yaml().strip()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _introduction(config: KGLNetConfig) -> str:
    size, macs = config.patch_size, cost(config)
    trunk = "the descriptor trunk" if config.metric_trunk == "descriptor" else "metric trunks of their own"
    return (
        f"KGL-Net weights for the Python package kglmatch: matches grey {size} x {size} "
        "pixel patches, and whole images, of a visible camera against "
        f"{_SENSORS[config.ir_kind]}. Each patch gets a {config.descriptor_dim}-d descriptor, which finds "
        "candidates, and a metric map; a small head turns two maps into the probability that the patches "
        f"show the same place. The maps come from {trunk}. "
        f"Multiply-adds: {macs.descriptor / 1e6:.0f} million for a patch's descriptor, "
        f"{macs.descriptor_and_map / 1e6:.0f} million with its map, "
        f"{macs.score / 1e6:.0f} million to score a pair."
    )


def _usage(name: str) -> str:
    return f"""\
```python
from kglmatch import Matcher

matcher = Matcher.from_pretrained("{name}")
matches = matcher.match_images("scene_vis.png", "scene_ir.png")  # the visible image first
print(matches.keypoints_vis, matches.keypoints_ir, matches.scores, matches.homography)
```

The two branches have weights of their own: the visible image comes first, the other sensor's second.
The files are `config.json` and `model.safetensors`; no pickle is involved."""


def _table(results: Sequence[Result]) -> str:
    lines = ["| data | split | metric | value |", "|---|---|---|---|"]
    lines += [f"| {r.dataset} | {r.split} | {r.metric} | {r.value:g} |" for r in results]
    return "\n".join(lines)
