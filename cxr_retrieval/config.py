"""Every setting of the system: one frozen schema, read from YAML files and `section.key=value` words.

Later files win over earlier ones, and words on the command line win over files. Whatever is wrong is refused in one
line that names the key, where it was written and the nearest key that exists, before anything starts.
"""

import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cxr_retrieval.errors import UserError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # for names that become parts of a path
JIGSAW_PATCHES = 4  # a side of the shuffled puzzle
COMMAND_LINE = "the command line"
HUB = "hf://"  # a model of Hugging Face's hub
IMAGENET, IMAGENET_BACKBONE = "imagenet", "efficientnet_lite0"  # weights that are a package, and whose they are
QUOTES = ("'", '"', "|", ">", "!", "&")  # how a YAML text begins that is not written plainly


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class ColumnSettings(Section):
    """The columns of a plain table (`corpus.format=csv`), each by the name in its header."""

    image: str | None = Field(None, description="column of the image's path below the archive, or its file's name")
    patient: str | None = Field(None, description="column of the patient")
    findings: str | dict[str, str] | None = Field(
        None,
        description="column of all findings of the image, or one for each, as {Mass: mass_01}, whose cells are 1, 0 or"
        " -1 (uncertain); a blank cell tells nothing",
    )
    unknown: str | None = Field(None, description="column of the findings that are uncertain")
    study: str | None = Field(None, description="column of the study")
    date: str | None = Field(None, description="column of the study's date, as 2014-09-15 or 20140915")
    age: str | None = Field(None, description="column of the age in years")
    sex: str | None = Field(None, description="column of the sex")
    view: str | None = Field(None, description="column of the view, e.g. PA")
    follow_up: str | None = Field(None, description="column of the number of the follow-up")


class CorpusSettings(Section):
    archive: str | None = Field(None, description="folder or s3:// prefix that holds the archive")
    format: Literal["nih", "chexpert", "mimic", "padchest", "vindr", "dicom", "csv"] = Field(
        "nih",
        description="layout of the archive: its folders and label tables; csv: a table that corpus.columns tells of",
    )
    labels: str | None = Field(
        None,
        description="table of findings (format = dicom; null: no finding of any image is known), or of all that is told"
        " of images (format = csv; null: the one *.csv at the archive's top)",
    )
    columns: ColumnSettings = ColumnSettings()
    separator: str = Field("|", min_length=1, description="what stands between findings of one cell (format = csv)")
    labelled: list[str] | None = Field(
        None,
        description="findings that the table tells of, e.g. [Mass, Hernia] (format = csv); null: those that rows name,"
        " and a row that is the first to name one prepares all images anew",
    )
    uncertain: Literal["unknown", "present", "absent"] = Field(
        "unknown",
        description="what an uncertain finding is taken for (format = chexpert, mimic, dicom, csv with"
        " a column for each)",
    )
    unmentioned: Literal["unknown", "absent"] = Field(
        "unknown",
        description="what a finding is taken for that a row neither mentions nor rules out by No Finding"
        " (format = chexpert, mimic, dicom, csv)",
    )
    name: str = Field("chest", pattern=NAME, description="name of the prepared corpus in the workspace")
    size: int = Field(256, ge=32, le=1024, description="side of a prepared image in pixels")
    fit: Literal["letterbox", "stretch"] = Field("letterbox", description="how an image that is not square is fitted")
    box_frame: int | None = Field(
        None, ge=1, description="side in pixels of the frame that boxes are given in; null: as the format says"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are quarantined before they are decoded")
    min_side: int = Field(32, ge=1, description="images with a shorter side in pixels are quarantined")
    max_quarantined: float = Field(0.02, ge=0, le=1, description="share of quarantined images that fails the job")
    views: list[str] | None = Field(None, description="keep only these views, e.g. [PA, AP]; null keeps all")
    ages: list[int] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="keep only ages from the first to the second, in years, e.g. [18, 120]; null keeps all",
    )
    source_side: int | None = Field(
        None, ge=1, description="keep only images with so many pixels or more on the shorter side; null keeps all"
    )
    burned_in: Literal["keep", "exclude"] = Field(
        "keep",
        description="images whose DICOM header says that text is burned in (BurnedInAnnotation = YES): keep or exclude",
    )
    split: Literal["hash", "official", "all_test"] = Field(
        "hash",
        description="hash: patients by salted hash; official: as the archive itself says; all_test: all is test",
    )
    split_seed: int = Field(0, ge=0, description="salt of the patient hash")
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="share of patients held out for choosing")
    test_share: float = Field(0.2, gt=0, lt=0.8, description="share of patients held out for testing (split = hash)")
    partition_images: int = Field(1024, ge=8, le=65536, description="images of one partition, and so of one shard")
    row_group_images: int = Field(128, ge=8, le=256, description="images of one Parquet row group")

    @model_validator(mode="after")
    def _columns_fit_the_format(self) -> "CorpusSettings":
        if self.format == "csv":
            for name in ("image", "patient"):
                if not getattr(self.columns, name):
                    raise ValueError(f"corpus.format=csv needs corpus.columns.{name}: the name of that column")
            for name, value in (("columns.unknown", self.columns.unknown), ("labelled", self.labelled)):
                if value and isinstance(self.columns.findings, dict):
                    raise ValueError(
                        f"corpus.{name} is for one column of all findings: where corpus.columns.findings names a column"
                        " for each, their cells say it"
                    )
        elif self.columns != ColumnSettings():
            raise ValueError(f"corpus.columns needs corpus.format=csv: {self.format} knows the columns of its tables")
        return self


class PhantomSettings(Section):
    images: int = Field(600, ge=1, description="radiographs to draw")
    size: int = Field(512, ge=128, le=2048, description="side of a drawn radiograph in pixels")
    seed: int = Field(0, ge=0, description="seed of the patients' anatomy and findings")
    out: str | None = Field(None, description="folder or s3:// prefix that the archive is written to")


class NetworkSettings(Section):
    backbone: Literal[
        "resnet18_half", "resnet18", "resnet50", "efficientnet_lite0", "convnextv2_tiny", "dinov2_base"
    ] = Field("resnet18_half", description="backbone by name; resnet18_half is for CPUs")
    weights: str | None = Field(
        None,
        description="the backbone's weights: a safetensors file (local or s3://), hf://OWNER/NAME of the hub, or"
        " imagenet (efficientnet_lite0)",
    )
    normalisation: Literal["group", "batch", "frozen_batch"] = Field(
        "group", description="group norm, per-worker batch norm (synchronised on GPUs), or frozen batch statistics"
    )
    steps: int = Field(3, ge=1, le=4, description="progressive steps: the last stages of the backbone")
    dimensions: int = Field(128, ge=8, le=1024, description="dimensions of each step's embedding")
    crop_threshold: float = Field(
        0.5, gt=0, lt=1, description="crop where the heat map exceeds this share of its maximum"
    )
    whole_side: int | None = Field(None, ge=32, le=1024, description="side in pixels that the whole image is seen at")
    crop_side: int | None = Field(None, ge=32, le=1024, description="side in pixels that the crop is seen at")
    crop_minimum: float = Field(0.4, gt=0, le=1, description="shortest side of the crop as a share of the image's side")


class LossSettings(Section):
    form: Literal["margin", "softmax"] = Field("softmax", description="form of CCLoss")
    margin: float = Field(1.4, gt=0, le=2, description="distance that other findings' centres are pushed to (margin)")
    negative_weight: float = Field(1.0, ge=0, description="weight of the push against the pull (margin)")
    temperature: float = Field(0.5, gt=0, le=10, description="temperature (softmax)")
    centre_rate: float = Field(0.05, gt=0, le=1, description="share of the way that a centre moves in one update")
    no_finding: Literal["center", "negatives_only", "ignore"] = Field(
        "ignore",
        description="No Finding images: a centre of their own, pushed from all centres (margin form only), or left out:"
        " to pull healthy images together costs retrieval",
    )
    contrastive_weight: float = Field(0.1, ge=0, description="weight of CCLoss in the sum")
    contrastive_from: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="share of the steps after which CCLoss joins: centres of untrained features mislead",
    )
    classification_weight: float = Field(1.0, ge=0, description="weight of the multi-label cross-entropy in the sum")
    smoothing: float = Field(0.0, ge=0, lt=0.5, description="label smoothing of the cross-entropy")
    class_balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="power of a finding's inverse frequency in its weight; to weigh rare ones up costs all of them",
    )


class TrainingSettings(Section):
    epochs: int = Field(30, ge=1, description="passes over the training split")
    pretraining: int = Field(
        0, ge=0, description="passes over the training images before these, by jigsaw puzzles and without labels"
    )
    batch_size: int = Field(32, ge=2, description="images of one optimizer step, over all workers")
    accumulation: int = Field(
        1,
        ge=1,
        description="micro-batches that a worker adds up to one optimizer step, each with statistics of its own",
    )
    workers: int = Field(1, ge=1, description="Ray Train workers")
    min_workers: int | None = Field(
        None, ge=1, description="start and go on with as few workers where the cluster has no room for all; null: never"
    )
    gpu: bool = Field(False, description="give each worker a GPU")
    cpus_per_worker: float = Field(0.5, gt=0, description="logical CPUs of a worker; the rest feeds Ray Data")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the hardware has it, else float32; float16 is for GPUs without it"
    )
    compile: bool = Field(
        False, description="compile the backbone: minutes at the start for faster steps; takes a C++ compiler"
    )
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation mAP that end the run; null: it trains all epochs"
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate (AdamW, warm-up, cosine)")
    weight_decay: float = Field(0.05, ge=0, le=1, description="decoupled weight decay")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of the steps that warms up")
    averaging: float = Field(
        0.998, ge=0, lt=1, description="decay of the running average of the weights, which is what becomes the model"
    )
    shallow_share: float = Field(
        0.3, ge=0, le=1, description="share of the steps until the deepest step has full weight"
    )
    crop_from: float = Field(0.3, ge=0, lt=1, description="share of the steps after which the crop is seen too")
    unseen: list[str] = Field(
        [], description="findings whose images training never sees, e.g. [Hernia]; evaluation asks for them apart"
    )
    jigsaw: bool = Field(False, description="shuffle patches for the shallow steps while they lead")
    augment: bool = Field(
        True, description="small rotations, shifts, scalings and exposure changes; never a mirror image"
    )
    shuffle_images: int = Field(
        4096, ge=64, description="images in the shuffle at a time; each lane puts its own share of them in random order"
    )
    lanes: int = Field(4, ge=1, le=1024, description="data streams of one optimizer step; a multiple of the workers")
    tracking: Literal["tensorboard", "mlflow"] | None = Field(
        None, description="where curves are shown while training: in RUN/tensorboard, or where MLFLOW_TRACKING_URI says"
    )
    checkpoint_steps: int = Field(500, ge=1, description="steps between checkpoints inside an epoch")
    max_failures: int = Field(3, ge=0, description="worker failures that a run survives")


class EvaluationSettings(Section):
    draws: int = Field(2000, ge=100, description="bootstrap draws over patients")
    split: Literal["test", "validation"] = Field("test", description="whose images are the queries")
    apart: Literal["unseen", "all"] = Field(
        "unseen",
        description="findings that are asked for each by itself: those that training never saw, or all, to compare",
    )
    max_images: int = Field(
        150_000, ge=100, description="most images of one gallery; of a larger one, patients are drawn by a hash"
    )


class EmbeddingSettings(Section):
    batch_size: int = Field(64, ge=1, description="images of one forward pass")
    workers: int | None = Field(None, ge=1, description="model-holding actors; null: one per GPU, else per CPU")


class IndexSettings(Section):
    name: str = Field("chest", pattern=NAME, description="name of the index in the workspace")
    embedding: str | None = Field(None, description="embedding to index; null: the one that validation chose")
    shard_rows: int = Field(
        200_000, ge=1, description="rows that a shard is filled up to, by whole partitions; S3 takes files up to 5 GB"
    )
    training: int = Field(
        1, ge=1, description="raise it to train lists and codes anew: they are kept while the corpus grows"
    )
    recall_target: float = Field(
        0.95, gt=0, le=1, description="recall@10 against exact search that the proof must reach"
    )
    latency_ms: float = Field(
        50, gt=0, description="milliseconds of one search on one core that the plan aims at; exact where it can be"
    )
    memory_gib: float = Field(8, gt=0, description="memory in GiB that a machine has for searching and for building")
    proof_queries: int = Field(500, ge=1, description="held-out queries of the proof")


class PublishSettings(Section):
    to: str | None = Field(None, description="folder or s3:// prefix of the published index; null: in the workspace")
    alias: str = Field("latest", pattern=NAME, description="alias that is moved to the new version")


class SearchSettings(Section):
    k: int = Field(8, ge=1, le=1000, description="hits of one query")
    queries: int = Field(6, ge=1, le=100, description="test images that the pipeline searches with")
    exclude_own_patient: bool = Field(True, description="leave out the query's own patient")
    one_per_patient: bool = Field(False, description="find as many patients, each by the nearest of their images")


class ServeSettings(Section):
    host: str = Field("127.0.0.1", description="address to listen on; beyond this machine it takes a token and TLS")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    upload_mb: int = Field(32, ge=1, le=1024, description="largest upload in MB (2**20 bytes)")
    poll_seconds: float = Field(5.0, gt=0, le=3600, description="seconds between two looks at where the alias points")
    groups: int | None = Field(
        None, ge=1, description="groups of shards that a Ray cluster holds apart; null: one for every node"
    )
    replicas: int = Field(
        1, ge=1, description="Ray Serve replicas of every group: with two, no search waits for one that died"
    )
    certificate: str | None = Field(None, description="PEM file of the TLS certificate, with its chain")
    certificate_key: str | None = Field(None, description="PEM file of the certificate's private key")


class PrivacySettings(Section):
    pseudonymise: bool = Field(
        True, description="outside the corpus, know patients, images and sources by keyed HMAC only"
    )
    key_file: str | None = Field(None, description="file that holds the key; else the variable CXR_PRIVACY_KEY")


class Settings(Section):
    workspace: str = Field("./workspace", description="folder or s3:// prefix of everything that jobs write")
    model: str | None = Field(None, description="URI of a model artifact; null: the one that these settings train")
    seed: int = Field(0, ge=0, description="seed of initial weights, order and augmentation")
    corpus: CorpusSettings = CorpusSettings()
    phantom: PhantomSettings = PhantomSettings()
    network: NetworkSettings = NetworkSettings()
    losses: LossSettings = LossSettings()
    training: TrainingSettings = TrainingSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    index: IndexSettings = IndexSettings()
    publish: PublishSettings = PublishSettings()
    search: SearchSettings = SearchSettings()
    serve: ServeSettings = ServeSettings()
    privacy: PrivacySettings = PrivacySettings()

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        corpus, training = self.corpus, self.training
        if corpus.ages is not None and not 0 <= corpus.ages[0] <= corpus.ages[1]:
            raise ValueError(f"corpus.ages={corpus.ages} must be two ages in years, the lower one first")
        if corpus.split == "hash" and corpus.validation_share + corpus.test_share >= 0.9:
            raise ValueError(
                "corpus.validation_share + corpus.test_share leave under a tenth of the patients to train on"
            )
        if corpus.labels is not None and corpus.format not in ("dicom", "csv"):
            raise ValueError(
                f"corpus.labels is for corpus.format=dicom and csv: corpus.format={corpus.format} has tables of its own"
            )
        if training.lanes % training.workers:
            raise ValueError(
                f"training.lanes={training.lanes} is not a multiple of training.workers={training.workers}"
            )
        if training.min_workers is not None:
            if training.min_workers > training.workers:
                raise ValueError(
                    f"training.min_workers={training.min_workers} is above training.workers={training.workers}"
                )
            if self.network.normalisation == "batch" and not training.gpu:
                raise ValueError(
                    "training.min_workers with network.normalisation=batch needs training.gpu=true: on CPUs batch"
                    " statistics are each worker's own, and would change with their number"
                )
        if training.batch_size % (training.lanes * training.accumulation):
            raise ValueError(
                f"training.batch_size={training.batch_size} is not a multiple of training.lanes={training.lanes}"
                f" x training.accumulation={training.accumulation}"
            )
        if training.precision == "float16" and not training.gpu:
            raise ValueError("training.precision=float16 needs training.gpu=true: CPUs have bfloat16 or float32")
        if self.network.normalisation == "frozen_batch" and self.network.weights is None and self.model is None:
            raise ValueError(
                "network.normalisation=frozen_batch needs network.weights: there are no statistics to freeze"
            )
        if self.network.weights == IMAGENET and self.network.backbone != IMAGENET_BACKBONE:
            raise ValueError(
                f"network.weights={IMAGENET} are those of network.backbone={IMAGENET_BACKBONE},"
                f" not of {self.network.backbone}"
            )
        if self.losses.form == "softmax" and self.losses.no_finding == "negatives_only":
            raise ValueError(
                "losses.no_finding=negatives_only needs losses.form=margin: in losses.form=softmax an image without a"
                " finding has no part; ignore says so"
            )
        if training.jigsaw and (corpus.size % JIGSAW_PATCHES or self.network.steps < 2):
            raise ValueError(
                f"training.jigsaw needs corpus.size in multiples of {JIGSAW_PATCHES} and network.steps above 1"
            )
        if training.pretraining and not training.augment:
            raise ValueError(
                "training.pretraining needs training.augment=true: it learns from what two varied views have in common"
            )
        if training.pretraining and corpus.size % 2**self.network.steps:
            raise ValueError(
                f"training.pretraining with network.steps={self.network.steps} needs corpus.size in multiples of"
                f" {2**self.network.steps}, the patches a side of its finest puzzle"
            )
        return self


def read_local(file: str) -> bytes:
    """The bytes of a local file."""
    return Path(file).read_bytes()


def load_settings(
    files: Sequence[str] = (), words: Sequence[str] = (), read: Callable[[str], bytes] = read_local
) -> Settings:
    """Settings from YAML `files` (later ones win) and `section.key=value` `words` (they win over files).

    `read` gives a file's bytes, wherever it lies.

    Raises UserError, one line, for a file that cannot be read, a key that does not exist (with the nearest one that
    does), a value of the wrong type or out of range.
    """
    values: dict[str, tuple[Any, str]] = {}
    for file in files:
        values.update({key: (value, file) for key, value in flat(_read_yaml(file, read))})
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"cannot read {word!r} from {COMMAND_LINE}: write section.key=value")
        values.update({name: (value, COMMAND_LINE) for name, value in flat({key.strip(): _parse(text, word)})})
    return validate(values)


def validate(values: Mapping[str, tuple[Any, str]]) -> Settings:
    """Settings from dotted keys, each with its value and where it was written. Raises UserError as `load_settings`."""
    known = _names()
    tree: dict[str, Any] = {}
    for key, (value, origin) in values.items():
        if key not in known:
            raise UserError(f"unknown setting {key!r} in {origin}: did you mean {_nearest(key, known)!r}?")
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"] if not isinstance(part, int)]
        key = next((key for end in range(len(parts)) if (key := ".".join(parts[: end + 1])) in values), "")
        message = first["msg"].removeprefix("Value error, ")
        if not key:  # a rule between settings: its message names the keys
            origins = dict.fromkeys(origin for name, (_, origin) in values.items() if name in message)
            raise UserError(f"{message} (in {', '.join(origins)})" if origins else message) from None
        value, origin = values[key]
        raise UserError(f"setting {key}={value!r} in {origin}: {message[0].lower()}{message[1:]}") from None


def settings_fields() -> Iterator[tuple[str, Any]]:
    """Every dotted key with its pydantic field, in the order of the schema."""
    return _fields(Settings, "")


def _fields(section: type[Section], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def with_values(settings: Settings, values: Mapping[str, Any], origin: str) -> Settings:
    """These settings with some dotted keys set anew, checked as `load_settings` checks. `origin` is named in errors."""
    known = {key: (value, "the settings") for key, value in flat(settings.model_dump(mode="json"))}
    return validate(known | {key: (value, origin) for key, value in values.items()})


# Of the places, those that are written to, each with a folder in it that every writer has a right to.
WRITTEN = {"workspace": "runs", "phantom.out": "images", "publish.to": "objects"}


def places(settings: Settings) -> dict[str, str]:
    """The settings that name files or folders which every node of a cluster reads or writes, those that are set."""
    named = {
        "workspace": settings.workspace,
        "model": settings.model,
        "corpus.archive": settings.corpus.archive,
        "corpus.labels": settings.corpus.labels,
        "phantom.out": settings.phantom.out,
        "network.weights": settings.network.weights,
        "publish.to": settings.publish.to,
    }
    return {key: uri for key, uri in named.items() if uri not in (None, IMAGENET) and not uri.startswith(HUB)}


def describe_type(annotation: Any) -> str:
    """A field's type in a user's words: `int`, `text`, `margin | softmax`."""
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join("null" if part is type(None) else describe_type(part) for part in get_args(annotation))
    if get_origin(annotation) is dict:
        return f"names with {describe_type(get_args(annotation)[1])} each"
    if get_origin(annotation) is list:
        return f"list of {describe_type(get_args(annotation)[0])}"
    return {str: "text", int: "int", float: "number", bool: "true | false"}.get(annotation, str(annotation))


def describe_range(field: Any) -> str:
    """A field's bounds in a user's words: `>= 1, <= 4`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "matches"}
    return ", ".join(
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    )


def dump_settings(settings: Settings) -> str:
    """The settings as YAML that `load_settings` reads back to the same settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _read_yaml(file: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(read(file).decode())
    except FileNotFoundError:
        raise UserError(f"config file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: PyYAML on the 45th of a month
        raise UserError(f"config file {file} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config file {file} must hold sections with settings, not a {type(tree).__name__}")
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings; a setting may itself be a mapping."""
    for last, value in tree.items():
        key = f"{prefix}{last}"
        if isinstance(value, Mapping) and key not in _names():
            yield from flat(value, f"{key}.")
        elif not (value is None and key in _sections()):
            yield key, value


@cache
def _names() -> set[str]:
    return {key for key, _ in settings_fields()}


@cache
def _sections() -> set[str]:
    return {key.rpartition(".")[0] for key in _names()}


def _parse(text: str, word: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError):
        raise UserError(f"cannot read {word!r} from {COMMAND_LINE}: the value is not YAML") from None
    if isinstance(value, str) and text[:1] not in QUOTES:
        value = text.strip()  # ` #` begins a comment in YAML, and is part of a path here
        # YAML 1.1 reads 1e-3 as text; a person means the number.
        try:
            return float(value) if value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _nearest(key: str, known: set[str]) -> str:
    """The key that a user most likely meant: the same last word in another section, else the closest spelling."""
    name = key.rpartition(".")[2]
    same = sorted(full for full in known if full.rpartition(".")[2] == name)
    return difflib.get_close_matches(key, same or sorted(known), n=1, cutoff=0.0)[0]
