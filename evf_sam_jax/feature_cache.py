"""Frozen features of a segmenter, computed once for all that a run is trained on.

    python -m evf_sam_jax.main --mode cache_features --config CONFIG --workdir FEATURES
    python -m evf_sam_jax.main --config CONFIG --config.data.features=FEATURES --workdir RUN

An image that no augmentation changes has the same features in each epoch, and computing them is
most of a training step. Each picture of the mixture is encoded once, over all devices and
processes; of processes, each writes files of its own to the directory, which they share. Started
again, with the same mixture or another, the command looks up each picture in the files that are
there, and writes the features of those that have none. No file that is whole is removed; all
images of a damaged one are computed again.

Features are those of one segmenter: training compares the fingerprint of its own parameters, sizes
and dtypes with theirs, and refuses others. SAM-2's end before the two convolutions that belong to
its decoder where a stage trains them, and then take five times the space.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, UInt8, UInt32, UInt64
from tqdm import tqdm

from data_pipelines.features import (
    MANIFEST,
    FeatureManifest,
    FeatureStore,
    Layout,
    image_key,
    keys_name,
    read_feature_manifest,
    record_keys,
    short_keys,
    write_keys,
)
from data_pipelines.mixture import Mixture
from data_pipelines.own_data import OWN
from data_pipelines.record_files import (
    Shard,
    file_sha256,
    fingerprint_of_shard,
    finished_shard,
    is_remote,
    remove_leftovers,
    reporting,
    write_shard,
    write_text,
)
from data_pipelines.source import IndexedSource
from data_pipelines.tower_images import TowerImages
from evf_sam_jax.errors import UserError
from evf_sam_jax.experiment import ExperimentConfig
from evf_sam_jax.initialize import initial_params
from evf_sam_jax.model_dir import path_leaves, require_space
from evf_sam_jax.model_inputs import tower_images
from evf_sam_jax.models.evf_sam import EvfSamConfig, encode_image, param_shapes
from evf_sam_jax.models.families import tower_to_dict
from evf_sam_jax.param_rules import Params
from evf_sam_jax.processes import on_each_process, on_first_process, text_to_all
from evf_sam_jax.sharding import MeshConfig, batch_sharding, make_mesh, replicated
from evf_sam_jax.stage import cast_when_frozen, never_trained, on_devices
from evf_sam_jax.training_data import TrainingData, open_data

ENCODER = "segmenter/image_encoder/"
# At least so many images of each data set, evenly over it, are looked up when a run begins.
PROBED = 16
# Of a segmenter, what changes no feature.
_WITHOUT_EFFECT = ("remat", "encoder_chunk")

# The segmenter's frame of an image, and height and width of its content.
Frame = tuple[UInt8[np.ndarray, "s s 3"], tuple[int, int]]
# Rows of the mixture that show one picture.
Rows = tuple[int, ...]
# An index of the mixture, with the key of the image and its frame, or why it cannot be read.
Read = tuple[int, bytes, Frame | None, str]
_SHARE = "do all processes write to the same directory?"
# Names of what is written to a directory beside its manifest, without their endings.
_SHARDS = "features-[^.]+"


def cache_features(config: ExperimentConfig, directory: str | os.PathLike) -> FeatureManifest:
    """Writes the features of all images that the experiment is trained on, or what is missing.

    Raises:
      UserError: as `write_features`, or the data cannot be opened.
    """
    # The config may be the one of the training, which names features that are not there yet.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, features=""))
    ends_finished(config)  # refused before data are opened, which may take minutes
    return write_features(config, open_data(config).mixture, directory)


def write_features(
    config: ExperimentConfig, mixture: Mixture, directory: str | os.PathLike
) -> FeatureManifest:
    """Writes the features of each picture of the mixture, or what is missing.

    Raises:
      UserError: a stage trains the image encoder, or the directory cannot be written, holds
        features of another segmenter, or something else.
    """
    if is_remote(directory):
        raise UserError(f"--workdir: expected a local or mounted directory, found {directory}")
    finished = ends_finished(config)
    pictures = distinct_images(mixture)
    mesh = make_mesh(MeshConfig(data=len(jax.local_devices())), jax.local_devices())
    layout = feature_layout(config.model, config.feature_cache.dtype, finished)
    each = f"{layout.record_bytes / 1e6:.3g} MB each"
    _say(f"{len(pictures):,} images, {each}: ", len(pictures), layout)
    params = initial_params(
        config,
        dict.fromkeys(_encoder_paths(config), replicated(mesh)),
        cast_when_frozen(config),
        ENCODER,
    )
    fingerprint = features_fingerprint(config.model, params, finished)
    folder = epath.Path(directory)
    kept = _whole_files(folder, layout, fingerprint)
    missing = _without_features(folder, kept, mixture, pictures)
    images = int(missing.sum())
    if kept:
        _say(f"{images:,} of them have none there: ", images, layout)
    on_first_process(functools.partial(_make_room, folder, kept, images, layout), folder)
    todo = [rows for rows, one in zip(pictures, missing, strict=True) if one]
    length = config.feature_cache.images_a_file
    parts = [todo[begin : begin + length] for begin in range(0, len(todo), length)]
    mine = parts[jax.process_index() :: jax.process_count()]
    with jax.set_mesh(mesh), tqdm(total=sum(map(len, mine)), unit="image") as bar:
        encode = _make_encode(config, mesh, params, layout)
        for part in mine:
            file = _new_name(folder, [f"{row} {mixture.describe(row)}" for row, *_ in part])
            _write(folder, file, fingerprint, part, mixture, encode, layout)
            bar.update(len(part))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("features are written")
    conclude = functools.partial(_conclude, folder, layout, fingerprint, mixture, kept, len(parts))
    on_first_process(conclude, folder)
    manifest = read_feature_manifest(folder)
    assert manifest is not None, "process 0 has written it, to the same directory"
    return manifest


def ends_finished(config: ExperimentConfig) -> bool:
    """Whether features may be cached as the decoder takes them, since no stage trains any of it.

    Raises:
      UserError: a stage trains what they are computed by.
    """
    trained = sorted(_encoder_paths(config) - never_trained(config))
    pattern = config.model.segmenter.finishing
    others = [path for path in trained if not (pattern and re.fullmatch(pattern, path))]
    if others:
        raise UserError(
            f"features can be cached of an image encoder that no stage trains; found {others[0]} "
            f"and {len(others) - 1} more that one does"
        )
    return not trained


def check_features(config: ExperimentConfig, data: TrainingData) -> None:
    """Looks whether the cached features are of this model's shapes, and of this run's images.

    Raises:
      UserError: they are not, or a stage trains what they are computed by.
    """
    store = data.features
    if store is None:
        return
    layout, finished = store.manifest.layout, ends_finished(config)
    expected = feature_layout(config.model, layout.dtype, layout.finished)
    if layout != expected:
        raise UserError(
            f"data.features: expected arrays of {_shapes(expected)} an image, found "
            f"{_shapes(layout)} in {store.directory}"
        )
    if layout.finished and not finished:
        raise UserError(
            f"data.features: expected features that end before what a stage trains "
            f"({config.model.segmenter.finishing}), found some that end after it in "
            f"{store.directory}"
        )
    for source in data.mixture.sources:
        probed = range(0, len(source), max(1, len(source) // PROBED))
        missing = [index for index in probed if not _has(store, source, index)]
        if len(missing) == len(probed):
            raise UserError(
                f"data.features: expected features of {source.describe(missing[0])}, found none "
                f"of {len(probed)} images that were looked up in {store.directory}"
            )
        if missing and jax.process_index() == 0:
            logging.warning(
                "data.features: %d of %d images that were looked up have none in %s, such as %s: "
                "training will leave them out (data.max_skipped)",
                len(missing),
                len(probed),
                store.directory,
                source.describe(missing[0]),
            )


def check_fingerprint(config: ExperimentConfig, store: FeatureStore, params: Params) -> None:
    """Raises UserError unless features were computed by these parameters.

    Args:
      params: with all of the image encoder that features are computed by.
    """
    found = features_fingerprint(config.model, params, store.manifest.layout.finished)
    if found != store.manifest.fingerprint:
        raise UserError(
            f"data.features: expected features of this run's segmenter ({found}), found those of "
            f"another, or of another dtype or profile ({store.manifest.fingerprint}) in "
            f"{store.directory}"
        )


def feature_layout(config: EvfSamConfig, dtype: str, finished: bool) -> Layout:
    """The arrays that are stored of an image."""
    side = config.segmenter.image_size
    leaves = jax.eval_shape(
        functools.partial(_encode, config, finished),
        param_shapes(config),
        jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8),
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
    )
    return Layout(tuple(tuple(leaf.shape[1:]) for leaf in leaves), dtype, finished)


def features_fingerprint(config: EvfSamConfig, params: Params, finished: bool) -> str:
    """A short text that changes with whatever features depend on, but for the image.

    Parameters are summed as integers, so it is the same however they are split over devices.
    """
    segmenter = tower_to_dict(config.segmenter)
    sizes = {key: value for key, value in segmenter.items() if key not in _WITHOUT_EFFECT}
    images = tower_images(config)
    used = {
        path: leaf
        for path, leaf in path_leaves(params).items()
        if path.startswith(ENCODER)
        and (finished or not re.fullmatch(config.segmenter.finishing, path))
    }
    sums = jax.device_get({path: _checksum(leaf) for path, leaf in used.items()})
    what = {
        "segmenter": sizes,
        "profile": config.profile,
        "frame": (images.frame, images.fit, images.stretched_later),
        "finished": finished,
        "params": {
            path: (str(used[path].dtype), used[path].shape, *map(int, sums[path]))
            for path in sorted(used)
        },
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def distinct_images(mixture: Mixture) -> list[Rows]:
    """Each picture once where sources name it alike, with all rows of the mixture that show it."""
    found: dict[object, list[int]] = {}
    begin = 0
    for source in mixture.sources:
        for row in range(len(source)):
            name: object = begin + row
            if isinstance(source, IndexedSource):
                image_id = source.index.image_id(int(source.images[row]))
                # One's own pictures are named after their files, and every folder has a 1.jpg.
                own = image_id.startswith(OWN)
                name = (begin, image_id) if own else image_id
            found.setdefault(name, []).append(begin + row)
        begin += len(source)
    return [tuple(rows) for rows in found.values()]


def _conclude(
    folder: epath.Path,
    layout: Layout,
    fingerprint: str,
    mixture: Mixture,
    kept: Sequence[str],
    written: int,
) -> None:
    """Writes the manifest of the files kept and of those that all processes wrote, and reports."""
    shards = _finished(folder, layout, fingerprint)
    if len(shards) < len(kept) + written:
        raise UserError(
            f"{folder}: expected {len(kept) + written} files, found {len(shards)}; {_SHARE}"
        )
    manifest = FeatureManifest(fingerprint, layout, tuple(shards.values()))
    write_text(folder / MANIFEST, manifest.to_json())
    _report(mixture, manifest, [shards[file] for file in shards if file not in kept])


def _whole_files(folder: epath.Path, layout: Layout, fingerprint: str) -> list[str]:
    """Makes the directory, or looks whether it is to be gone on with; returns its whole files.

    The keys that belong to them are written anew, of their records. Processes share the reading,
    so that none waits for long.
    """
    names = on_first_process(functools.partial(_files, folder, layout, fingerprint), folder)
    files = json.loads(text_to_all(json.dumps(names)))

    def is_whole(number: int) -> bool:
        file = folder / files[number]
        if not file.exists():
            raise UserError(f"{file}: expected it, as process 0 has it, found nothing; {_SHARE}")
        shard = finished_shard(folder, file.name, _of_shard(layout, fingerprint))
        if shard is None or not shard.records or not _is_undamaged(folder, shard):
            return False
        write_keys(folder, shard.file, record_keys(folder, shard.file))
        return True

    whole = _shared(is_whole, len(files), "file", folder)
    for file, one in zip(files, whole, strict=True):
        if not one and jax.process_index() == 0:
            logging.warning("%s is not whole, or empty: its images are computed again", file)
    return [file for file, one in zip(files, whole, strict=True) if one]


def _files(folder: epath.Path, layout: Layout, fingerprint: str) -> list[str]:
    """Makes the directory, or looks whether all files in it are of these features."""
    found = read_feature_manifest(folder)
    others = found is not None and (found.fingerprint, found.layout) != (fingerprint, layout)
    with reporting(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if not re.fullmatch(rf"{_SHARDS}\..+|{MANIFEST}|\..+", name):
            raise UserError(
                f"--workdir: expected a new directory, or one of features, found {name} in {folder}"
            )
    files = [name for name in names if name.endswith(".array_record")]
    made_of = {fingerprint_of_shard(folder, file) for file in files}
    if others or made_of - {None, _of_shard(layout, fingerprint)}:
        raise UserError(
            f"--workdir: expected nothing, or features of the same segmenter and dtype, found "
            f"others in {folder}; remove it first"
        )
    return files


def _make_room(folder: epath.Path, kept: Sequence[str], images: int, layout: Layout) -> None:
    """Looks whether so many images more have room, and removes all files but those that are kept.

    Raises:
      UserError: they have none.
    """
    require_space(Path(folder) / "features-*", images * layout.record_bytes)
    with reporting(folder):
        (folder / MANIFEST).unlink(missing_ok=True)  # it is not whole until the end
        remove_leftovers(folder, _SHARDS, kept)


def _finished(folder: epath.Path, layout: Layout, fingerprint: str) -> dict[str, Shard]:
    """Files that have been written to their end, by name."""
    files = sorted(path.name for path in folder.iterdir() if path.name.endswith(".array_record"))
    of = _of_shard(layout, fingerprint)
    found = {file: finished_shard(folder, file, of) for file in files}
    return {file: shard for file, shard in found.items() if shard is not None}


def _of_shard(layout: Layout, fingerprint: str) -> str:
    """What each file says that it is made of; shapes are a part of the fingerprint."""
    return f"{fingerprint} {layout.dtype}"


def _is_undamaged(folder: epath.Path, shard: Shard) -> bool:
    try:
        return file_sha256(Path(folder / shard.file)) == shard.sha256
    except OSError:
        return False


def _without_features(
    folder: epath.Path, files: Sequence[str], mixture: Mixture, pictures: Sequence[Rows]
) -> Bool[np.ndarray, " n"]:
    """Whether each picture has no record in these files, or cannot be read now."""
    if not files:
        return np.ones(len(pictures), bool)
    known = on_each_process(functools.partial(_known, folder, files), folder)

    def is_missing(number: int) -> bool:
        image, key, _ = _read(mixture, pictures[number])
        if image is None:
            return True
        [short] = short_keys([key])
        at = int(np.searchsorted(known, short))
        return at == len(known) or bool(known[at] != short)

    return _shared(is_missing, len(pictures), "image", folder)


def _known(folder: epath.Path, files: Sequence[str]) -> UInt64[np.ndarray, " m"]:
    """The keys of all records of these files, ascending."""
    try:
        keys = [np.load(folder / keys_name(file)) for file in files]
    except OSError as error:
        raise UserError(f"{folder}: expected the keys of records: {error}; {_SHARE}") from None
    return np.sort(np.concatenate(keys))


def _shared(
    work: Callable[[int], bool], length: int, unit: str, folder: epath.Path
) -> Bool[np.ndarray, " n"]:
    """What `work` says of each of so many things, which processes and their threads share."""
    mine = range(jax.process_index(), length, jax.process_count())
    silent = jax.process_index() > 0 or not mine

    def look() -> Bool[np.ndarray, " n"]:
        found = np.zeros(length, bool)
        with (
            ThreadPoolExecutor(_threads()) as pool,
            tqdm(total=len(mine), unit=unit, desc="looked up", disable=silent) as bar,
        ):
            for number, answer in zip(mine, pool.map(work, mine), strict=True):
                found[number] = answer
                bar.update()
        return found

    found = on_each_process(look, folder)
    return found if jax.process_count() == 1 else multihost_utils.process_allgather(found).any(0)


def _new_name(folder: epath.Path, images: Sequence[str]) -> str:
    """A file for these images that is not there yet, as it is where the pictures have changed."""
    text = "\0".join(images)
    while True:
        file = f"features-{hashlib.sha256(text.encode()).hexdigest()[:16]}.array_record"
        if not (folder / file).exists():
            return file
        text += "\0"


def _write(
    folder: epath.Path,
    file: str,
    fingerprint: str,
    pictures: Sequence[Rows],
    mixture: Mixture,
    encode: "_Encode",
    layout: Layout,
) -> None:
    keys: list[bytes] = []

    def records() -> Iterator[bytes | tuple[int, str]]:
        for row, key, features in _encoded(pictures, mixture, encode):
            if isinstance(features, str):
                yield row, features
            else:
                if not all(np.isfinite(feature).all() for feature in features):
                    raise UserError(
                        f"{mixture.describe(row)}: expected finite features, found others; do they "
                        "need float32 (model.segmenter.dtype)?"
                    )
                keys.append(key)
                yield layout.encode(key, features)
        write_keys(folder, file, keys)  # before the file counts as finished

    write_shard(folder, file, _of_shard(layout, fingerprint), records())


def _encoded(
    pictures: Sequence[Rows],
    mixture: Mixture,
    encode: "_Encode",
) -> Iterator[tuple[int, bytes, Sequence[np.ndarray] | str]]:
    """The first row of each, with its key and features, or with why it has none; in order.

    The host reads the next images while the devices compute.
    """

    def read(rows: Rows) -> Read:
        image, key, reason = _read(mixture, rows)
        return rows[0], key, None if image is None else encode.images.segmenter(image), reason

    def groups() -> Iterator[tuple[list[Read], Any]]:
        with ThreadPoolExecutor(_threads()) as pool:
            for begin in range(0, len(pictures), encode.batch_size):
                group = list(pool.map(read, pictures[begin : begin + encode.batch_size]))
                frames = [one[2] for one in group if one[2] is not None]
                yield group, encode(frames) if frames else None

    pending: collections.deque = collections.deque()
    for item in groups():
        pending.append(item)
        if len(pending) > 1:
            yield from _split(*pending.popleft())
    for item in pending:
        yield from _split(*item)


def _read(mixture: Mixture, rows: Rows) -> tuple[UInt8[np.ndarray, "h w 3"] | None, bytes, str]:
    """The first that can be read of a picture's copies, with its key, or why none can be."""
    reasons = []
    for row in rows:
        try:
            image = mixture.read(row, ()).image
        except UserError as error:
            reasons.append(str(error))
        else:
            return image, image_key(image), ""
    return None, b"", "; ".join(dict.fromkeys(reasons))


def _threads() -> int:
    """That read images."""
    return max(2, (os.cpu_count() or 2) // 2)


def _split(group: Sequence[Read], features: Any) -> Iterator[Any]:
    """The features of a group, brought to the host, with the images that they are of."""
    arrays = None if features is None else jax.device_get(features)
    at = 0
    for row, key, frame, reason in group:
        if frame is None:
            yield row, key, reason
        else:
            yield row, key, [array[at] for array in arrays or ()]
            at += 1


@dataclasses.dataclass(frozen=True)
class _Encode:
    """The compiled encoder, for up to `batch_size` images as `images` prepares them."""

    images: TowerImages
    batch_size: int
    compiled: Callable[..., Any]
    params: Params

    def __call__(self, frames: Sequence[Frame]) -> Any:
        missing = self.batch_size - len(frames)
        padded = [*frames, *[frames[-1]] * missing]
        image = np.stack([frame for frame, _ in padded])
        size = np.array([content for _, content in padded], np.int32)
        return self.compiled(self.params, image, size)


def _make_encode(config: ExperimentConfig, mesh: Mesh, params: Params, layout: Layout) -> _Encode:
    model = on_devices(config.model, mesh.size)
    # int8 is made on the host, of exact values.
    dtype = jnp.bfloat16 if layout.dtype == "bfloat16" else jnp.float32

    def encode(params: Params, image: Array, size: Array) -> tuple[Array, ...]:
        leaves = _encode(model, layout.finished, params, image, size)
        return tuple(leaf.astype(dtype) for leaf in leaves)

    batch = batch_sharding(mesh)
    compiled = jax.jit(encode, in_shardings=(replicated(mesh), batch, batch), out_shardings=batch)
    size = -(-config.feature_cache.batch_size // mesh.size) * mesh.size
    return _Encode(tower_images(config.model), size, compiled, params)


def _encode(
    config: EvfSamConfig, finished: bool, params: Params, image: Array, size: Array
) -> tuple[Array, ...]:
    features = encode_image(config, params, image, size, finished)
    return features.embedding, *features.high_res


@jax.jit
def _checksum(leaf: Array) -> UInt32[Array, " 2"]:
    """Two sums of the bits of all values, one of them weighted by place, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, length in enumerate(leaf.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    weight = place * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * weight).sum(dtype=jnp.uint32)])


def _encoder_paths(config: ExperimentConfig) -> frozenset[str]:
    shapes = path_leaves(param_shapes(config.model))
    return frozenset(path for path in shapes if path.startswith(ENCODER))


def _has(store: FeatureStore, source: Any, index: int) -> bool:
    """Whether the features of an image can be read, if the image can."""
    try:
        image = source.read(index, ()).image
    except UserError:
        return True
    try:
        store.read(image)
    except UserError:
        return False
    return True


def _shapes(layout: Layout) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in layout.shapes)


def _say(words: str, images: int, layout: Layout) -> None:
    """Prints how much disk images take, once for all processes."""
    if jax.process_index() == 0:
        print(f"{words}{images * layout.record_bytes / 1e9:.3g} GB", flush=True)


def _report(mixture: Mixture, manifest: FeatureManifest, written: Sequence[Shard]) -> None:
    left_out = [pair for shard in written for pair in shard.left_out]
    for row, reason in left_out[:10]:
        logging.warning("%s was left out: %s", mixture.describe(row), reason)
    if left_out:
        logging.warning("%d images were left out, since they cannot be read", len(left_out))
    size = sum(shard.bytes for shard in manifest.shards)
    print(f"{manifest.images:,} images have features, in {size / 1e9:.3g} GB", flush=True)
