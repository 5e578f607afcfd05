"""Everything that can be set, with its default; each field is a command-line flag."""

import argparse
import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Self-supervised learning with several losses. Defaults suit two CPU cores."""

    # What to run.
    method: str = "gcond"  # "sum", or a name in optax_mtl.METHODS.
    mode: str = "stochastic"  # One task per micro-batch; "exact": all in each.
    momentum: float = 0.9  # Between method and AdamW, with b1 = 0; 0: AdamW's own.
    seed: int = 0
    out: str = "runs/ssl"
    resume: bool = False
    devices: int = 0  # Data parallel over so many; 0: all of them.
    tensorboard: bool = False

    # Data: patches of the photos in scikit-learn and scikit-image, or one of these.
    data: str = ""  # FILE.npz with x (N, H, W[, C]) in uint8, and y or label.
    image_folder: str = ""  # Photos, in one folder per class if they have classes.
    image_size: int = 32
    max_images: int = 0  # Use so many, drawn at random; 0: all.
    valid_share: float = 0.1

    # Model.
    encoder: str = "convnext_micro"  # A name in model.ENCODERS.
    mask_ratio: float = 0.75
    decoder_width: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 4
    dropout: float = 0.0
    evaluation_mode: bool = False  # Batch norm and dropout as in evaluation.
    bfloat16: bool = False  # Compute in it; parameters and losses are float32.

    # Tasks: the weight of each loss. Both reconstruct the same masked patches.
    l1_weight: float = 0.85
    ssim_weight: float = 0.15
    third_task: str = "none"  # "contrastive" or "classification".
    third_weight: float = 0.1

    # Optimization.
    batch_size: int = 128  # Images in a step.
    micro_batches: int = 4  # It is split into so many.
    steps: int = 500
    warmup_steps: int = 50
    learning_rate: float = 2e-3
    final_learning_rate: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 50.0  # Largest norm of the resolved gradient.

    # Reports.
    eval_every: int = 100  # Steps between evaluations and checkpoints.
    eval_images: int = 512


POSITIVE = ["image_size", "batch_size", "micro_batches", "steps", "eval_every"]
POSITIVE += ["eval_images", "l1_weight", "ssim_weight", "third_weight", "clip"]


def parse(arguments: list[str] | None = None) -> Config:
    """Reads a :class:`Config` from the command line."""
    parser = argparse.ArgumentParser(
        description=f"{Config.__doc__} The flags are explained in config.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        kind = {"type": type(field.default)}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, help=" ", **kind)
    config = Config(**vars(parser.parse_args(arguments)))
    check(config)
    return config


def check(config: Config) -> None:
    """Raises ValueError for settings that cannot work, before any work is done."""
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(config, name)}: expected more than 0")
    if not 0 < config.mask_ratio < 1:
        raise ValueError(f"--mask-ratio {config.mask_ratio}: expected between 0 and 1")
    if config.mode not in ("exact", "stochastic"):
        raise ValueError(f"--mode {config.mode}: expected exact or stochastic")
    if config.third_task not in ("none", "contrastive", "classification"):
        raise ValueError(
            f"--third-task {config.third_task}: expected none, contrastive or "
            "classification"
        )
    if config.data and config.image_folder:
        raise ValueError("give --data or --image-folder, not both")
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
    if not 0 <= config.warmup_steps < config.steps:
        raise ValueError(
            f"--warmup-steps {config.warmup_steps}: expected fewer than "
            f"--steps {config.steps}"
        )
