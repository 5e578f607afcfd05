"""Everything that can be set, with its default; each field is a command-line flag."""

import dataclasses

from examples import flags
from examples.flags import Number, setting, whole
from examples.gcd.model import PRESETS

# EAGC and its halves, by whether they project and align.
COORDINATED = {"eagc": (True, True), "aga": (False, True), "eep": (True, False)}
OBJECTIVES = ("simgcd", "rankstats")


@dataclasses.dataclass(frozen=True)
class Config:
    """Generalized category discovery. Defaults are for scikit-learn's digits."""

    # What to run.
    method: str = setting(
        "eagc",
        "sum, eagc, aga, eep, or a name in optax_mtl.METHODS",
        flags.method("sum", *COORDINATED),
    )
    objective: str = setting("simgcd", "losses of discovery", choices=OBJECTIVES)
    seed: int = setting(0, "of the split, the weights and the batches", whole(0))
    out: str = setting("runs/gcd", "folder of logs, figures and checkpoints")
    resume: bool = setting(False, "continue the run in --out")
    save_every: int = setting(10, "epochs between checkpoints, evaluations", whole(1))
    tensorboard: bool = setting(False, "log there, too")

    # Data.
    data: str = setting(
        "digits", "digits, FILE.npz, or a folder with CIFAR's Python pickles"
    )
    known: int = setting(0, "known classes; 0: half of the classes", whole(0))
    max_classes: int = setting(0, "use the first so many only; 0: all", whole(0))
    max_images: int = setting(0, "use so many, drawn at random; 0: all", whole(0))
    labelled_share: float = setting(
        0.5, "of the images of known classes", Number(float, above=0, most=1)
    )
    image_size: int = setting(0, "resize to it; 0: as they are", whole(0))
    flip: bool = setting(False, "mirror images: for photos, not for characters")
    jitter: float = setting(
        0.2, "of brightness and contrast", Number(float, least=0, most=1)
    )
    warp: float = setting(
        0.0, "turn, stretch and bend images", Number(float, least=0, most=1)
    )
    strokes: float = setting(
        0.0, "thicken and thin strokes: for characters", Number(float, least=0, most=1)
    )

    # Model.
    preset: str = setting("tiny", "of backbone and heads", choices=tuple(PRESETS))
    backbone_weights: str = setting(
        "",
        "FILE.safetensors or FILE.npz: of DINO, DINOv2, --pretrain or examples.ssl",
    )
    trainable: str = setting(
        "all", "blocks of the backbone that train", choices=("all", "last")
    )
    dtype: str = setting(
        "float32",
        "of the computation; bfloat16 for TPU and GPU",
        choices=("float32", "bfloat16"),
    )

    # Stage 0: the backbone learns all images without labels.
    pretrain: str = setting(
        "none", "ssl: contrast views of the images", choices=("none", "ssl")
    )
    pretrain_epochs: int = setting(20, "of pretraining", whole(1))
    pretrain_batch_size: int = setting(
        256, "images in a step, each in two views", whole(2)
    )
    pretrain_lr: float = setting(
        1e-3, "its peak learning rate, of AdamW", Number(float, above=0)
    )
    pretrain_temperature: float = setting(
        0.5, "of the contrast", Number(float, above=0)
    )

    # Stage 1: reference model on the labelled set.
    reference_epochs: int = setting(30, "of the reference model", whole(0))
    reference_batch_size: int = setting(32, "of the reference model", whole(1))
    reference_lr: float = setting(
        0.02, "its learning rate at the start", Number(float, above=0)
    )

    # Stage 2: conceptor.
    aperture: float = setting(2.0, "of the conceptor", Number(float, above=0))
    relative_aperture: bool = setting(True, "indifferent to the scale of features")

    # Stage 3: discovery.
    epochs: int = setting(50, "of discovery", whole(1))
    batch_size: int = setting(128, "images in a step, each in two views", whole(1))
    lr: float = setting(
        0.1, "learning rate of the heads at the start", Number(float, above=0)
    )
    backbone_lr: float = setting(
        0.1, "learning rate of the backbone at the start", Number(float, least=0)
    )
    weight_decay: float = setting(5e-5, "of matrices", Number(float, least=0))
    supervised_weight: float = setting(
        0.35,
        "of the supervised loss; the other has the rest of 1",
        Number(float, least=0, most=1),
    )
    entropy_weight: float = setting(1.0, "of the mean entropy", Number(float, least=0))
    teacher_warmup_epochs: int = setting(
        30, "in which the teacher's temperature falls", whole(0)
    )
    strength: float = setting(
        0.5, "of EAGC's projection", Number(float, least=0, most=1)
    )
    anchor: float = setting(0.7, "weight of EAGC's alignment", Number(float, least=0))

    # Diagnostics.
    diagnose_steps: int = setting(
        200, "GDC at each of the first so many steps", whole(0)
    )
    soc_every: int = setting(10, "steps between values of SOC among them", whole(1))


def parse(arguments: list[str] | None = None) -> Config:
    """Reads a configuration from the command line."""
    return flags.parse(Config, arguments, Config.__doc__ or "")
