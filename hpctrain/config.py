"""Every knob of a run, and how it is set: task defaults, TOML file, environment, flags.

Later layers win. A key is written ``section.name``: in a TOML file as a table, on the command line
as ``--set section.name=value``, in the environment as ``HPCTRAIN__SECTION__NAME=value``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
)

from hpctrain.errors import Error, nearest
from hpctrain.files import read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "HPCTRAIN__"

TOML_BYTES = 2**20
MOST_DEPTH = 64
MOST_DOTS = 1000
"""Bounds on a file of configuration: whoever wrote it, reading it takes no time and no memory."""

OWN_OPTIMIZERS = ("sgd", "adamw", "lamb")
OWN_SCHEDULES = ("constant", "linear", "cosine")
"""Names whose meaning is hpctrain's own; others are of classes."""

Layer = dict[str, Any]
"""Nested mapping of section -> name -> value, as a TOML file gives it."""


class Section(BaseModel):
    """Base of every group of knobs: unknown names are refused, values are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class MixtureEntry(Section):
    """One shard set of a mixture."""

    path: Path = Field(description="Folder of a shard set.")
    weight: float = Field(gt=0, description="Its proportion, to any sum.")


class SplitConfig(Section):
    """How one set of samples is divided: by fractions, into folds, or by lists."""

    of: Literal["train", "validation", "test"] = Field(
        "train", description="The split that is divided."
    )
    train: float | list[int] | Path | None = Field(
        None, description="A fraction, sample numbers, or a file of them (.npy, .json, .txt)."
    )
    validation: float | list[int] | Path | None = Field(None, description="Likewise.")
    test: float | list[int] | Path | None = Field(None, description="Likewise.")
    folds: int | None = Field(None, ge=2, description="Equal parts, of which one validates.")
    fold: int | None = Field(None, ge=0, description="Which one, counted from 0.")
    by: Literal["random", "stratified", "group"] = Field(
        "random",
        description="`stratified`: each value of `column` in the same proportions; `group`: all "
        "samples of a value in one split.",
    )
    column: str | None = Field(None, description="A field with one value a sample.")
    seed: int | None = Field(None, ge=0, description="Of the choice; unset: the run's.")


class DataConfig(Section):
    """Where samples come from, and how they are read."""

    path: Path | None = Field(None, description="Folder of a shard set (`hpctrain data import`).")
    mixture: list[MixtureEntry] = Field(
        [],
        description="Shard sets {path, weight} whose training samples are mixed; validation is on "
        "`path`, or else the first. An epoch has as many samples as all together.",
    )
    weights: str | None = Field(
        None,
        description="Field that holds each training sample's sampling weight: samples are then "
        "drawn by it, with replacement.",
    )
    split: SplitConfig | None = Field(
        None,
        description="Splits made of one, such as {train = 0.8, validation = 0.2, by = "
        '"stratified", column = "label"}, {folds = 5, fold = 0}, or lists of sample numbers.',
    )
    order: Literal["block", "full", "none"] = Field(
        "block",
        description="Order of the training samples: `block` reads neighbours at a time and mixes "
        "as well, `full` permutes all samples, `none` keeps their own order.",
    )
    workers: int = Field(
        2, ge=0, description="Batches made at a time in the background; 0: each when asked for."
    )
    worker_kind: Literal["thread", "process"] = Field(
        "thread", description="`process` for transforms in plain Python, or with global randomness."
    )
    drop_last: bool = Field(
        False, description="Leave out the incomplete batch at the end of an epoch."
    )
    on_bad_shard: Literal["stop", "skip"] = Field(
        "stop", description="`skip` leaves out the samples of unreadable shards, and counts them."
    )
    stage_dir: Path | None = Field(
        None,
        description="Node-local folder (such as $SLURM_TMPDIR) to copy the shards to first; what "
        "does not fit is read where it is.",
    )


class TrainConfig(Section):
    """The loop."""

    epochs: int = Field(10, ge=1, description="Passes over the training samples.")
    steps: int | None = Field(
        None, ge=1, description="Optimizer steps; where set, it decides instead of `epochs`."
    )
    batch_size: int = Field(
        64, ge=1, description="Global batch: samples per optimizer step, over all ranks together."
    )
    accumulate: int = Field(
        1, ge=1, description="Passes in which each rank takes its part of a batch (saves memory)."
    )
    dtype: Literal["float32", "float64", "bf16", "fp16"] = Field(
        "float32",
        description="Arithmetic. `float64` makes float32 parameters, buffers and samples float64 "
        "(complex64: complex128); `bf16` and `fp16` keep float32 and compute under autocast, "
        "`fp16` with losses scaled up. What the task makes of other types stays.",
    )
    loss_scale: float = Field(
        65536.0,
        ge=1,
        description="With `fp16`, what losses are multiplied by at first. A gradient that is not "
        "finite halves it, and its step is left out; 2,000 good steps double it.",
    )
    recompute: Literal["none", "blocks"] = Field(
        "none",
        description="`blocks`: of each block only the input is kept for the backward pass, which "
        "computes the rest once more (activation checkpointing). Blocks are what the task's "
        "`blocks(model)` gives, or the parts of the outermost nn.Sequential and ModuleList.",
    )
    compile: str = Field(
        "none",
        description="Compiler of torch by which blocks are compiled, such as `inductor`.",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Largest 2-norm of the whole gradient; larger ones are scaled down."
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Decay of an average of the weights, used for validation."
    )
    validate_every_steps: int | None = Field(
        None, ge=1, description="Steps between validations; unset: at the end of every epoch."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many validations without a better monitored metric."
    )
    nonfinite: Literal["stop", "skip", "allow"] = Field(
        "stop",
        description="Where a loss, or a parameter, is no number: end the run at the next log line, "
        "validation or checkpoint; `skip` leaves out steps whose gradient is not finite (and waits "
        "for the device in each); `allow` goes on. All are counted, and none such is saved.",
    )
    sync_batchnorm: bool = Field(
        False,
        description="With horovod: BatchNorm takes its statistics of the global batch instead of "
        "each rank's part of it.",
    )
    freeze: list[str] = Field(
        [],
        description="Patterns of parameters' names, such as `backbone.*`, that are not trained.",
    )
    unfreeze_at_step: int | None = Field(
        None, ge=1, description="Step from which on they are trained; unset: they never are."
    )
    callbacks: list[str] = Field(
        [],
        description="What is done besides at a run's events: ready ones (statistics, summary, "
        "profiler, time-budget, samples) or `package.module:Class`, each with options: "
        "`time-budget,minutes=50`.",
    )
    deterministic: bool = Field(
        False, description="Refuse kernels whose result depends on timing (matters on GPUs)."
    )


class InitConfig(Section):
    """What a model begins with, instead of what the task makes it with."""

    source: Path | None = Field(
        None,
        description="A run, a checkpoint, a .safetensors file, or a file of torch.save() with "
        "tensors alone, whose weights are taken over by name. A resumed run goes on with its own.",
    )
    partial: bool = Field(
        False,
        description="Take what fits by name and shape; else all has to. What does not is said.",
    )
    rename: dict[str, str] = Field(
        default_factory=dict,
        description='New beginnings of the source\'s names, such as {"backbone." = "encoder."}.',
    )


class GroupConfig(Section):
    """Parameters that have something else of the optimizer; further keys are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)

    match: str | list[str] = Field(description="Patterns of parameters' names, such as `head.*`.")
    lr: float | None = Field(None, gt=0, description="Their peak learning rate.")
    weight_decay: float | None = Field(None, ge=0, description="Of their matrices and filters.")


class OptimizerConfig(Section):
    """The optimizer a task gets unless it builds its own."""

    name: str = Field(
        "adamw",
        description="`sgd` (with Nesterov momentum), `adamw`, `lamb` (for very large batches); any "
        "of torch.optim by its name, such as `RMSprop`; or `package.module:Class`.",
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate, for `lr_batch_size`.")
    lr_batch_size: int | None = Field(
        None,
        ge=1,
        description="Global batch that `lr` was tuned for: the rate is scaled linearly from it to "
        "`train.batch_size` (Goyal et al., 2017). Unset: `lr` is used as it is.",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum.")
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="Decays of AdamW's and LAMB's averages."
    )
    weight_decay: float = Field(
        0.01, ge=0, description="Decay of matrices and filters; biases and norms have none."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of the optimizer by name, such as {alpha = 0.9} of RMSprop. "
        "What is set neither here nor above is, of torch's optimizers, torch's own default.",
    )

    groups: list[GroupConfig] = Field(
        [],
        description="Parameters {match, lr, weight_decay, ...} with settings of their own, by "
        "patterns of their names; the first that matches counts.",
    )

    def is_set(self, name: str) -> bool:
        """Whether a key was set, by a user or a task, and does not have hpctrain's default."""
        return name in self.model_fields_set

    @model_serializer(mode="wrap")
    def _as_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out defaults that an optimizer of torch does not have, so that they are not set."""
        values: dict[str, Any] = handler(self)
        if self.name in OWN_OPTIMIZERS:
            return values
        unset = {"lr", "momentum", "betas", "weight_decay"} - self.model_fields_set
        return {name: value for name, value in values.items() if name not in unset}


class ScheduleConfig(Section):
    """The learning rate over a run."""

    name: str = Field(
        "cosine",
        description="What follows the warm-up: `constant`, or a fall to `final` by the last step, "
        "`linear` or `cosine`; any of torch.optim.lr_scheduler by its name, such as "
        "`CosineAnnealingWarmRestarts`; or `package.module:Class`.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear rise to the peak.")
    warmup_epochs: float = Field(
        0.0, ge=0, description="The same in epochs; counts where `warmup_steps` is 0."
    )
    final: float = Field(
        0.0, ge=0, le=1, description="Last rate of `linear` and `cosine`, as a part of the peak."
    )
    every: Literal["step", "epoch"] = Field(
        "step",
        description="When one of torch's schedulers takes a step: after each of the optimizer (but "
        "for the warm-up's), or after each epoch. ReduceLROnPlateau: after each validation.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of torch's scheduler, by name, such as {T_0 = 500}. T_max, "
        "total_steps and max_lr are the run's own unless they are here.",
    )


class CheckpointConfig(Section):
    """Snapshots of the train state."""

    every_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints; unset: at the end of every epoch."
    )
    keep: int = Field(2, ge=1, description="Newest checkpoints kept; the best one is kept besides.")


class InterruptConfig(Section):
    """Being asked to stop before the end."""

    signal: str = Field(
        "USR1",
        description="Signal on which a checkpoint is saved and the run ends with exit code 75; a "
        "file `stop` in the run folder does the same. Some versions of NCCL use USR1 themselves.",
    )


class LogConfig(Section):
    """What is recorded of a run, and who takes it."""

    every_steps: int = Field(50, ge=1, description="Steps between lines of metrics.jsonl.")
    tensorboard: bool = Field(
        True, description="Write TensorBoard event files, as if `loggers` named tensorboard."
    )
    loggers: list[str] = Field(
        [],
        description="What takes the records besides metrics.jsonl: csv, tensorboard, wandb, mlflow "
        "or `package.module:Class`, each with options: `wandb,project=mine`.",
    )
    profile: bool = Field(
        False, description="Trace a few steps by torch's profiler, on every rank."
    )
    trace_samples: bool = Field(
        False,
        description="Write which samples each step consumed; `hpctrain trace RUN` checks that "
        "none was left out or taken twice.",
    )


class HorovodConfig(Section):
    """The Horovod strategy."""

    bucket_bytes: int = Field(
        25 * 2**20,
        ge=1,
        description="Gradients are all-reduced in flat buckets of about this size.",
    )
    compression: str = Field(
        "none",
        description="Of gradients: none, fp16, bf16, int8, topk:FRACTION, or powersgd:RANK.",
    )
    compression_feedback: bool = Field(
        True,
        description="What int8, topk and powersgd leave out is kept, and sent with the next "
        "gradients (error feedback).",
    )
    compression_warmup_steps: NonNegativeInt = Field(
        0,
        description="First steps in which powersgd sends all, and topk begins with a fourth of "
        "the values and sends ever fewer.",
    )
    compression_momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Momentum that each rank applies before topk chooses values (momentum "
        "correction, Lin et al., 2018), in place of the optimizer's.",
    )
    compression_warm_start: bool = Field(
        True, description="powersgd begins with the last step's factors instead of random ones."
    )
    compression_min_rate: float = Field(
        2.0,
        ge=0,
        description="powersgd sends matrices as they are that would become less than so many "
        "times as small; vectors always.",
    )


class ElasticConfig(Section):
    """Outliving the loss of processes and nodes."""

    mode: Literal["off", "auto", "ulfm", "gloo", "restart"] = Field(
        "off",
        description="With horovod. `ulfm`: the ranks that are left go on in the same processes, by "
        "MPI's fault tolerance; `gloo`: the same under `hpctrain launch`; `restart`: the run ends, "
        "and is to be started again from its last checkpoint; `auto`: the best that the launcher "
        "allows. (`ps` outlives losses by itself.)",
    )
    batch: Literal["keep-global", "keep-local"] = Field(
        "keep-global",
        description="When the world's size changes: the same global batch, in more passes; or the "
        "same part a rank, with the learning rate scaled by the size.",
    )
    hang_seconds: float = Field(
        2.0, gt=0, description="A rank that gives no sign of life for so long is lost."
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Ranks to have, under mpirun: where some were lost, new ones are started by "
        "MPI spawn and join.",
    )


class PsConfig(Section):
    """The parameter server."""

    servers: int = Field(1, ge=1, description="Ranks that hold parameters.")
    colocate: bool = Field(
        False,
        description="Servers are threads of the first workers, instead of ranks of their own.",
    )
    consistency: str = Field(
        "sync",
        description="`sync`; `async`; `ssp:S`: workers at most S clocks ahead of the slowest; "
        "`backup:B`: sync without waiting for the B slowest; or `package.module:Class`, a mode of "
        "your own.",
    )
    slice_bytes: int | None = Field(
        None,
        ge=64,
        description="Parameters are cut into slices of at most this size. Unset: 2 MiB, or less "
        "where servers would have too few for an even load.",
    )
    placement: Literal["hash", "greedy"] = Field(
        "hash",
        description="Slices to servers: consistent hashing with bounded loads, or largest first.",
    )
    replicas: int = Field(
        0, ge=0, description="Other servers that hold a copy of each slice, in case one is lost."
    )
    shared_memory: bool = Field(
        True, description="Workers and servers of one host exchange through shared memory."
    )
    compression: str = Field(
        "none", description="Of pushed gradients: none, fp16, bf16, int8, or topk:FRACTION."
    )
    pull_every: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        1, description="Steps between pulls of new weights; a list: by worker."
    )
    shares: Literal["equal", "speed"] | list[NonNegativeInt] | None = Field(
        None,
        description="Parts of each global batch by worker: `equal`, by measured `speed`, or a "
        "list. Unset: as the consistency has it: `speed` with ssp, which else goes at the slowest "
        "one's pace; `equal` with sync, async and backup.",
    )
    share_steps: int = Field(
        32, ge=1, description="Steps between looks at who takes part and, by speed, at shares."
    )
    lr_by_delay: bool | None = Field(
        None,
        description="Divide the rate by the updates a push missed (Zhang et al., 2016). Unset: "
        "as the consistency has it: with async and ssp.",
    )
    delay_compensation: float = Field(
        0.0, ge=0, description="Lambda of DC-ASGD (Zheng et al., 2017); 0: none."
    )
    silence_seconds: float = Field(
        10.0,
        gt=0,
        description="A worker or server that says nothing for so long is lost; before training "
        "has begun, 30 s are allowed at least.",
    )
    key_file: Path | None = Field(
        None,
        description="Key (64 hex digits) to encrypt what is sent; else HPCTRAIN_PS_KEY, if set.",
    )
    record_order: Path | None = Field(None, description="Folder to record the order of pushes in.")
    replay: Path | None = Field(
        None, description="Recorded order to repeat, bit for bit, on any servers."
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Workers to have: where there are fewer, because fewer were started or some "
        "were lost, new ones are started by MPI spawn and join.",
    )


class RunConfig(Section):
    """A whole run. The resolved form is kept as `config.toml` in the run folder."""

    task: str = Field("digits", description="A ready task, `file.py[:Name]` or `package.mod:Name`.")
    strategy: str = Field(
        "auto",
        description="How replicas agree: one that `hpctrain strategies` lists, or "
        "`package.mod:Name`. `auto`: horovod on several ranks, else single.",
    )
    out: Path | None = Field(None, description="Run folder; unset: runs/TASK-TIME.")
    resume: str | None = Field(
        None, description="`auto` (newest good checkpoint of the run folder, if any) or a path."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Start values, sample order, augmentation.")
    world_size: int | None = Field(
        None, ge=1, description="Ranks this run must have; any other world is refused."
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="Longest wait for another rank before it counts as lost."
    )
    data: DataConfig = Field(default_factory=DataConfig)
    init: InitConfig = Field(default_factory=InitConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    interrupt: InterruptConfig = Field(default_factory=InterruptConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    horovod: HorovodConfig = Field(default_factory=HorovodConfig)
    ps: PsConfig = Field(default_factory=PsConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    options: dict[str, Any] = Field(
        default_factory=dict, description="The task's own knobs (its dataclass fields)."
    )

    def section(self, name: str) -> Section | None:
        """Return the section of that name, if there is one."""
        found = getattr(self, name, None)
        return found if isinstance(found, Section) else None

    def to_toml(self) -> str:
        """Render the configuration as TOML; unset knobs are left out, because TOML has no null."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def with_section(name: str, kind: type[Section]) -> type[RunConfig]:
    """Return a configuration that has another section: the knobs of a strategy.

    Args:
        name: Of the section.
        kind: Its class.

    Raises:
        Error: Something else is called so.
    """
    known = RunConfig.model_fields.get(name)
    if known is not None:
        if known.annotation is kind:
            return RunConfig
        raise Error(f"'{name}' is a key of every run's.", hint="call the strategy something else.")
    if not kind.model_fields:
        return RunConfig
    field: Any = (kind, Field(default_factory=kind))
    return create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, **{name: field})


def keys(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of the configuration with its pydantic field, sections unfolded.

    Args:
        section: Whose keys; the default is the whole configuration.
        prefix: What keys begin with, such as ``train.``; "" for the whole configuration.
    """
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def description(key: str, kind: type[RunConfig] = RunConfig) -> str:
    """Return the sentence that explains one key.

    Args:
        key: Dotted.
        kind: Of the configuration.
    """
    return str(dict(keys(kind))[key].description)


def reference(config: RunConfig) -> str:
    """Render every key as commented TOML: its explanation, and its value in ``config``."""
    lines: list[str] = []
    table = ""
    values = config.model_dump(mode="json")
    for key, field in sorted(keys(type(config)), key=lambda item: "." in item[0]):
        section, _, name = key.rpartition(".")
        if section != table:
            table = section
            lines += ["", f"[{table}]"]
        value = (values[section] if section else values).get(name)
        setting = f"# {name} is unset" if value is None else f"{name} = {_inline(value)}"
        lines += [f"# {field.description}", setting]
    return "\n".join(lines).lstrip() + "\n"


def _inline(value: Any) -> str:
    """Render a value as TOML has it on one line."""
    if isinstance(value, dict):
        items = [f"{_inline(str(k))} = {_inline(v)}" for k, v in value.items() if v is not None]
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return tomli_w.dumps({"it": value}).strip().removeprefix("it = ")


def read_toml(path: Path) -> Layer:
    """Read the layer of configuration that a TOML file gives.

    Raises:
        Error: The file cannot be read or is not TOML.
    """
    try:
        text = read_regular(path, TOML_BYTES).decode("utf-8")
        if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
            raise ValueError("a line with too many dots")
        layer: Layer = tomllib.loads(text)
        _check_depth(layer)
        return layer
    except OSError as error:
        raise Error(
            f"cannot read {path}: {error.strerror}.", hint="check the path given to --config."
        ) from error
    except (ValueError, RecursionError) as error:
        raise Error(f"{path} is not TOML: {error}.", hint="see https://toml.io.") from error


def _check_depth(layer: Layer) -> None:
    """Refuse what is nested more deeply than a configuration ever is.

    Raises:
        ValueError: It is.
    """
    level: list[Any] = [layer]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_DEPTH} deep")


def read_environment(environment: Mapping[str, str] = os.environ) -> Layer:
    """Read the layer that ``HPCTRAIN__SECTION__NAME=value`` variables give."""
    layer: Layer = {}
    for variable, value in sorted(environment.items()):
        if variable.startswith(ENVIRONMENT_PREFIX):
            path = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            put(layer, ".".join(path), value_of(value))
    return layer


def read_settings(settings: Iterable[str]) -> Layer:
    """Read the layer that ``--set key=value`` arguments give.

    Raises:
        Error: An argument has no ``=``.
    """
    layer: Layer = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise Error(f"--set {setting!r} is not key=value.", hint="for example --set seed=1.")
        put(layer, key.strip(), value_of(value.strip()))
    return layer


def value_of(text: str) -> Any:
    """Parse a value typed on a command line: TOML if it is such, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def put(layer: Layer, key: str, value: Any) -> None:
    """Set the value of ``section.name`` in a nested layer, in place.

    Args:
        layer: To be changed; sections that are not there are made.
        key: Dotted.
        value: Plain.

    Raises:
        Error: A part of the key is a value, not a section.
    """
    *sections, name = key.split(".")
    for section in sections:
        inner = layer.setdefault(section, {})
        if not isinstance(inner, dict):
            raise Error(f"'{section}' in '{key}' is a value, not a section.", hint="see --help.")
        layer = inner
    layer[name] = value


def resolve(layers: Iterable[tuple[str, Layer]], kind: type[RunConfig] = RunConfig) -> RunConfig:
    """Resolve layers into one configuration, later ones winning.

    Args:
        layers: Pairs of where a layer comes from (for error messages) and the layer.
        kind: With the sections there are.

    Raises:
        Error: A key is unknown or a value is not what the key takes; the source is named.
    """
    merged: Layer = {}
    origin: dict[str, str] = {}
    fields = dict(keys(kind))
    known = set(fields)
    open_ = tuple(f"{key}." for key in known if key.rpartition(".")[2] == "options")
    whole = {key for key in known if not f"{key}.".startswith(open_)}
    for source, layer in layers:
        for key, value in _flatten(layer, open_, whole):
            if key not in known and not key.startswith(open_):
                raise Error(
                    f"{source}: unknown key '{key}'.", hint=nearest(key, known, "`hpctrain config`")
                )
            _check_text(source, key, value)
            origin[key] = source
            put(merged, key, value)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        key = next(
            (k for n in range(len(path), 0, -1) if (k := ".".join(path[:n])) in known), path[0]
        )
        raise Error(
            f"{origin.get(key, 'configuration')}: {key} = {first['input']!r}: {first['msg']}.",
            hint=description(key, kind) if key in known else "see `hpctrain config`.",
        ) from error


def _check_text(source: str, key: str, value: Any) -> None:
    """Refuse bytes of the command line or the environment that are no text."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise Error(
            f"{source}: {key} = {value!a} is not UTF-8 text.",
            hint="rename the file or folder; the run's files are written in UTF-8.",
        ) from None


def _flatten(
    layer: Layer, open_: tuple[str, ...], whole: Container[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield values by dotted key; those of open sections are whatever stands there.

    Args:
        layer: Nested.
        open_: What their keys begin with.
        whole: Keys whose value may be a table.
        prefix: Of the keys.
    """
    for name, value in layer.items():
        key = prefix + name
        if isinstance(value, dict) and key not in whole and not prefix.startswith(open_):
            yield from _flatten(value, open_, whole, f"{key}.")
        else:
            yield key, value
