"""One stage of training, made of its config: optimizer, placement, compiled step, batches.

The loop, the plan and the replay of a failure build the same step from here.
"""

import dataclasses
import functools
import re
from typing import Any, cast

import grain
import jax
import optax
from jax.sharding import Mesh

from data_pipelines.batch import Batch
from data_pipelines.tokenizers import Tokenizer
from data_pipelines.train_pipeline import train_dataset
from evf_sam_jax.experiment import ExperimentConfig, StageConfig
from evf_sam_jax.flops import step_flops, without_remat
from evf_sam_jax.model_dir import nest, path_leaves
from evf_sam_jax.models.evf_sam import MATRICES, EvfSamConfig, param_shapes
from evf_sam_jax.optimizer import learning_rate_schedule, make_optimizer
from evf_sam_jax.param_rules import Params
from evf_sam_jax.sharding import Placement, check_batch_size, place, process_rows, replicated
from evf_sam_jax.train_state import TrainState, create_state, split_params
from evf_sam_jax.train_step import PromptKind, make_loss, make_train_step
from evf_sam_jax.training_data import TrainingData, batch_spec


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage needs besides its parameters.

    Attributes:
      shapes: of the training state, with the sharding of each leaf.
    """

    config: StageConfig
    experiment: ExperimentConfig
    mesh: Mesh
    optimizer: optax.GradientTransformation
    placement: Placement
    shapes: TrainState

    @property
    def model(self) -> EvfSamConfig:
        """The model on this mesh: what a chunk holds is meant for each device."""
        return on_devices(self.experiment.model, self.mesh.size)

    @property
    def prompts(self) -> PromptKind:
        """What tells the segmenter which object is meant."""
        return cast(PromptKind, self.config.prompts)  # StageConfig has checked it

    def create(self, params: Params) -> TrainState:
        """The state before the first step, of parameters that live where they shall."""
        trainable, frozen = split_params(params, self.config.trainable)
        make = functools.partial(
            create_state, optimizer=self.optimizer, ema=self.config.ema_decay is not None
        )
        places = dataclasses.replace(self.placement.state, trainable={}, frozen={})

        def rest(trainable: Params) -> TrainState:
            return dataclasses.replace(make(trainable, {}), trainable={}, frozen={})

        state = jax.jit(rest, out_shardings=places)(trainable)
        return dataclasses.replace(state, trainable=trainable, frozen=frozen)

    def step(self):
        """The compiled step, which is given the state for good."""
        function = make_train_step(
            self.model,
            self.prompts,
            self.config.loss,
            self.optimizer,
            learning_rate_schedule(self.config.optimizer, self.config.steps),
            accumulate=self.config.accumulate,
            ema_decay=self.config.ema_decay,
            placement=self.placement,
        )
        return jax.jit(
            function,
            donate_argnums=0,
            in_shardings=(self.placement.state, self.placement.batch),
            out_shardings=(self.placement.state, replicated(self.mesh)),
        )

    def flops(self, batch: Batch) -> int:
        """Model FLOPs of a step, all devices together; recomputation does not count."""
        model = without_remat(self.model)
        loss = make_loss(model, self.prompts, self.config.loss)
        phrases = jax.ShapeDtypeStruct((), "float32")
        return step_flops(
            loss, self.shapes.trainable, self.shapes.frozen, batch, phrases, has_aux=True
        )

    def batches(
        self, data: TrainingData, tokenizer: Tokenizer, whole: bool = False
    ) -> grain.MapDataset[Batch]:
        """The stream of batches: the rows that this process holds, or all."""
        stages = self.experiment.stages
        # Each has an order of its own: otherwise the second would begin with the same images.
        seed = self.experiment.seed + 1 + [other.name for other in stages].index(self.config.name)
        size = self.config.batch_size
        layout = None if data.features is None else data.features.manifest.layout
        return train_dataset(
            data.mixture,
            tokenizer,
            batch_spec(self.experiment, self.config, size, shrink=True, features=layout),
            seed=seed,
            steps=self.config.steps,
            rows=None if whole else process_rows(self.mesh, size),
            buckets=data.buckets,
            features=data.features,
        )


def make_stage(experiment: ExperimentConfig, config: StageConfig, mesh: Mesh) -> Stage:
    """Decides where everything lives; reads and computes nothing.

    Raises:
      UserError: the batch cannot be split, or rules do not cover the parameters.
    """
    key = f"stages.{config.name}.batch_size"
    check_batch_size(mesh, key, config.batch_size, config.accumulate)
    check_batch_size(mesh, "evaluation.batch_size", experiment.evaluation.batch_size)
    trainable, frozen = split_params(param_shapes(experiment.model), config.trainable)
    cast = cast_when_frozen(experiment)
    dtype = experiment.init.frozen_dtype
    frozen = nest(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype if path in cast else leaf.dtype)
            for path, leaf in path_leaves(frozen).items()
        }
    )
    optimizer = make_optimizer(config.optimizer, config.steps, trainable)
    ema = config.ema_decay is not None
    placement = place(experiment.mesh, mesh, trainable, frozen, optimizer, ema)
    shapes = jax.eval_shape(
        functools.partial(create_state, optimizer=optimizer, ema=ema), trainable, frozen
    )
    shapes = jax.tree.map(_with_sharding, shapes, placement.state)
    return Stage(config, experiment, mesh, optimizer, placement, shapes)


def never_trained(experiment: ExperimentConfig) -> frozenset[str]:
    """Paths of the parameters that no stage trains."""
    shapes = param_shapes(experiment.model)
    trained: set[str] = set()
    for stage in experiment.stages:
        trained |= path_leaves(split_params(shapes, stage.trainable)[0]).keys()
    return frozenset(path_leaves(shapes).keys() - trained)


def cast_when_frozen(experiment: ExperimentConfig) -> frozenset[str]:
    """Paths of the parameters that `init.frozen_dtype` is for: matrices that no stage trains."""
    return frozenset(path for path in never_trained(experiment) if re.fullmatch(MATRICES, path))


def on_devices(config: EvfSamConfig, devices: int) -> EvfSamConfig:
    """The config whose encoder takes `encoder_chunk` images on each of so many devices at once."""
    chunk = config.segmenter.encoder_chunk
    if chunk is None:
        return config
    segmenter = dataclasses.replace(config.segmenter, encoder_chunk=chunk * devices)
    return dataclasses.replace(config, segmenter=segmenter)


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
