"""Everything that can be set, with its default; each field is a command-line flag."""

import argparse
import dataclasses

from examples import flags
from examples.flags import Number, setting, whole

MODES = ("stochastic", "exact")
THIRD_TASKS = ("none", "contrastive", "classification")


def encoder(name: str) -> str:
    """Reads the name of an encoder."""
    from examples.ssl.model import ENCODERS  # That module reads this one.

    if name not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise argparse.ArgumentTypeError(f"there is no {name!r}; known are {known}")
    return name


@dataclasses.dataclass(frozen=True)
class Config:
    """Self-supervised learning with several losses. Defaults suit two CPU cores."""

    # What to run.
    method: str = setting(
        "gcond", "sum, or a name in optax_mtl.METHODS", flags.method("sum")
    )
    mode: str = setting(
        "stochastic",
        "one task in each micro-batch, or exact: all in each",
        choices=MODES,
    )
    momentum: float = setting(
        0.9,
        "between method and AdamW, which then has none; 0: AdamW's own",
        Number(float, least=0, below=1),
    )
    seed: int = setting(0, "of the weights, the batches and the masks", whole(0))
    out: str = setting("runs/ssl", "folder of logs, figures and checkpoints")
    resume: bool = setting(False, "continue the run in --out")
    devices: int = setting(0, "data parallel over so many; 0: all", whole(0))
    tensorboard: bool = setting(False, "log there, too")

    # Data: patches of the photos in scikit-learn and scikit-image, or one of these.
    data: str = setting(
        "", "FILE.npz with x (N, H, W[, C]) in uint8, and y or label; by default photos"
    )
    image_folder: str = setting(
        "", "photos, in one folder for each class if they have classes"
    )
    image_size: int = setting(32, "height and width, in pixels", whole(1))
    max_images: int = setting(0, "use so many, drawn at random; 0: all", whole(0))
    valid_share: float = setting(
        0.1, "of the images, to validate on", Number(float, above=0, below=1)
    )

    # Model.
    encoder: str = setting(
        "convnext_micro", "a name in examples.ssl.model.ENCODERS", encoder
    )
    mask_ratio: float = setting(
        0.75, "share of the patches to hide", Number(float, above=0, below=1)
    )
    decoder_width: int = setting(64, "features of a patch", whole(1))
    decoder_depth: int = setting(2, "blocks of the decoder", whole(0))
    decoder_heads: int = setting(4, "of attention", whole(1))
    dropout: float = setting(0.0, "in the decoder", Number(float, least=0, below=1))
    evaluation_mode: bool = setting(
        False, "batch norm and dropout as in evaluation while training"
    )
    bfloat16: bool = setting(False, "compute in it; parameters and losses: float32")

    # Tasks: the weight of each loss. Both reconstruct the same masked patches.
    l1_weight: float = setting(0.85, "of the absolute error", Number(float, above=0))
    ssim_weight: float = setting(0.15, "of 1 - SSIM", Number(float, above=0))
    third_task: str = setting("none", "one more loss", choices=THIRD_TASKS)
    third_weight: float = setting(0.1, "of the third loss", Number(float, above=0))

    # Optimization.
    batch_size: int = setting(128, "images in a step", whole(1))
    micro_batches: int = setting(4, "parts of a batch", whole(1))
    steps: int = setting(500, "of training", whole(1))
    warmup_steps: int = setting(50, "in which the learning rate rises", whole(0))
    learning_rate: float = setting(2e-3, "its peak", Number(float, above=0))
    final_learning_rate: float = setting(1e-6, "its end", Number(float, least=0))
    weight_decay: float = setting(0.05, "of AdamW", Number(float, least=0))
    clip: float = setting(
        50.0, "largest norm of the resolved gradient", Number(float, above=0)
    )

    # Reports.
    eval_every: int = setting(100, "steps between evaluations, checkpoints", whole(1))
    eval_images: int = setting(512, "to validate on, at most", whole(1))


def parse(arguments: list[str] | None = None) -> Config:
    """Reads a :class:`Config` from the command line."""
    return flags.parse(Config, arguments, Config.__doc__ or "", check)


def check(config: Config) -> None:
    """Raises ValueError for settings that do not go together."""
    if config.data and config.image_folder:
        raise ValueError("give --data or --image-folder, not both")
    if config.decoder_width % config.decoder_heads:
        raise ValueError(
            f"--decoder-width {config.decoder_width} does not split into "
            f"--decoder-heads {config.decoder_heads}"
        )
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"--batch-size {config.batch_size} does not split into "
            f"--micro-batches {config.micro_batches} of equal size"
        )
    tasks = 2 if config.third_task == "none" else 3
    stochastic = config.mode == "stochastic" and config.method != "sum"
    if stochastic and config.micro_batches % tasks:
        raise ValueError(
            f"--mode stochastic needs --micro-batches in multiples of the {tasks} "
            f"tasks, got {config.micro_batches}"
        )
    if config.warmup_steps >= config.steps:
        raise ValueError(
            f"--warmup-steps {config.warmup_steps}: expected fewer than "
            f"--steps {config.steps}"
        )
