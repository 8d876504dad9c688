"""What a run reads: its sources by name, mixed, and the shapes of their batches."""

import dataclasses
import hashlib
from pathlib import Path

from absl import logging
from etils import epath

from data_pipelines.assemble import BatchSpec
from data_pipelines.buckets import Buckets
from data_pipelines.datasets import find_dataset
from data_pipelines.features import FeatureStore, Layout
from data_pipelines.mixture import Mixture, exclude_images
from data_pipelines.prepared import open_prepared, read_manifest
from data_pipelines.shapes import ShapesSource
from data_pipelines.source import IndexedSource, Source
from data_pipelines.tokenizers import Tokenizer
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import (
    DatasetConfig,
    DatasetsConfig,
    ExperimentConfig,
    ShapesDataConfig,
    StageConfig,
)
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.run_log import FEATURE_IMAGES


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The opened data of a run.

    Attributes:
      mixture: what it is trained on.
      held_out: what it is measured on.
      phrases: k, phrases an image.
      buckets: the shapes to choose from for each batch; None: the largest for all.
      features: of the images it is trained on; None: they are computed.
    """

    mixture: Mixture
    held_out: Source
    phrases: int
    buckets: Buckets | None
    features: FeatureStore | None = None

    def fingerprints(self) -> dict[str, str]:
        """Each data set by its place -> what tells it from another, and so for cached features."""
        train = {f"data.train.{i}": one for i, one in enumerate(self.mixture.sources)}
        named = {**train, "data.held_out": self.held_out}
        found = {name: fingerprint(source) for name, source in named.items()}
        if self.features is not None:
            manifest = self.features.manifest
            found["data.features"] = f"{manifest.fingerprint} {manifest.layout.dtype}"
            found[FEATURE_IMAGES] = self.features.images_fingerprint()
        return found

    def why_unread(self, tokenizer: Tokenizer, index: int) -> str:
        """Why an example of the mixture cannot be trained on; "" if it can be by now."""
        try:
            image = self.mixture.read(index, ()).image
            if self.features is not None:
                self.features.read(image)
            for phrase in range(self.mixture.phrase_count(index)):  # each with its mask alone
                self.mixture.read(index, (phrase,))
        except UserError as error:
            return str(error)
        buckets = self.buckets
        if buckets is None or buckets.fits(self.mixture.entry(index), tokenizer):
            return ""
        return f"expected phrases of at most {buckets.text_lengths[-1]} tokens, found a longer one"


def batch_spec(
    config: ExperimentConfig,
    stage: StageConfig,
    batch_size: int,
    shrink: bool,
    features: Layout | None = None,
) -> BatchSpec:
    """The largest shapes of batches, as far as they do not depend on what is in the data."""
    data, model = config.data, config.model
    if isinstance(data, ShapesDataConfig):
        phrases, text_length, canvas = data.shapes.phrases, data.text_length, data.canvas
    else:
        phrases, text_length = data.phrases, _text_lengths(config, data)[-1]
        canvas = data.canvases[-1]
    return BatchSpec(
        batch_size=batch_size,
        phrases=phrases,
        text_length=text_length,
        images=tower_images(model),
        canvas=canvas,
        prompts=stage.prompts != "text",
        shrink=shrink,
        features=features,
    )


def fingerprint(source: Source) -> str:
    """A short text that changes with the annotations of a source, not with where they are."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in range(0, len(source), max(1, len(source) // 1000)):
        digest.update(repr(source.entry(index)).encode())
    return digest.hexdigest()[:16]


def open_data(config: ExperimentConfig) -> TrainingData:
    """Opens all data sets of a run, building their indices where there are none yet.

    Raises:
      UserError: an unknown data set or split, missing files, or a data set for evaluation only.
    """
    data, images = config.data, config.evaluation.images
    if isinstance(data, ShapesDataConfig):
        train = ShapesSource("train", data.shapes)
        held_out = ShapesSource(config.evaluation.split, data.shapes, images)
        mixture = Mixture((train,), (1.0,))
        return TrainingData(mixture, held_out, data.shapes.phrases, None, open_features(data))
    for entry in data.train:
        if find_dataset(entry.name).evaluation_only:
            raise UserError(
                f"data.train: expected data to train on, found {entry.name}, which "
                "is for evaluation only"
            )
    sources = [open_source(entry) for entry in data.train]
    held_out = [open_source(entry) for entry in data.held_out]
    if data.exclude_images_of:
        indices = [open_source(entry).index for entry in data.exclude_images_of]
        for i, source in enumerate(sources):
            sources[i], dropped = exclude_images(source, indices)
            logging.warning(
                "%s: left out %d of %d images, which evaluation splits have",
                source.name,
                dropped,
                len(source),
            )
    mixture = Mixture(tuple(sources), tuple(entry.weight for entry in data.train))
    together = Mixture(tuple(_first(source, images) for source in held_out), (1.0,) * len(held_out))
    buckets = Buckets(_text_lengths(config, data), data.canvases)
    return TrainingData(mixture, together, data.phrases, buckets, open_features(data))


def open_features(data: ShapesDataConfig | DatasetsConfig) -> FeatureStore | None:
    """The store that `data.features` names. Raises UserError if it is none, or not whole."""
    return FeatureStore(data.features) if data.features else None


def _text_lengths(config: ExperimentConfig, data: DatasetsConfig) -> tuple[int, ...]:
    """Those asked for, but none longer than the model has positions for."""
    longest = config.model.encoder.max_text_tokens
    return tuple(sorted({min(length, longest) for length in data.text_lengths}))


def open_source(entry: DatasetConfig) -> IndexedSource:
    """One data set, read by the original's rules where the entry does not say otherwise.

    If its root holds the split as `data_pipelines.prepare` writes it, that is read.
    """
    dataset = find_dataset(entry.name)
    rules = dataset.train_rules if entry.split == "train" else dataset.eval_rules
    rules = dataclasses.replace(rules, **dict(entry.rules))
    prepared = epath.Path(entry.root) / entry.name / entry.split
    if read_manifest(prepared) is not None:
        return open_prepared(prepared, rules)
    return dataset.source(Path(entry.root), entry.split, rules)


def _first(source: IndexedSource, images: int) -> IndexedSource:
    if len(source) <= images:
        return source
    return IndexedSource(source.index, source.store, source.rules, source.images[:images])
