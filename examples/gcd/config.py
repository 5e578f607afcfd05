"""Everything that can be set, with its default; each field is a command-line flag."""

import argparse
import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Generalized category discovery. Defaults are for scikit-learn's digits."""

    # What to run.
    method: str = "eagc"  # sum, eagc, aga, eep, or a name in optax_mtl.METHODS.
    objective: str = "simgcd"  # Or rankstats.
    seed: int = 0
    out: str = "runs/gcd"
    resume: bool = False
    save_every: int = 10  # Epochs between checkpoints and evaluations.
    tensorboard: bool = False

    # Data.
    data: str = "digits"  # Or FILE.npz, or a folder with CIFAR's Python pickles.
    known: int = 0  # Known classes; 0 is half of the classes.
    max_classes: int = 0  # Use the first so many classes only; 0 is all.
    max_images: int = 0  # Use so many images, drawn at random; 0 is all.
    labelled_share: float = 0.5  # Of the images of known classes.
    image_size: int = 0  # Resize to this; 0 keeps the size.
    flip: bool = False  # Mirror images: for photos, not for characters.
    jitter: float = 0.2  # Brightness and contrast.

    # Model.
    preset: str = "tiny"  # A name in model.PRESETS.
    backbone_weights: str = ""  # DINO or DINOv2: FILE.safetensors or FILE.npz.
    trainable: str = "all"  # Of the backbone: all, or last (block).
    dtype: str = "float32"  # Of the computation; bfloat16 for TPU and GPU.

    # Stage 1: reference model on the labelled set.
    reference_epochs: int = 30
    reference_batch_size: int = 32
    reference_lr: float = 0.02

    # Stage 2: conceptor.
    aperture: float = 2.0
    relative_aperture: bool = True  # Indifferent to the scale of features.

    # Stage 3: discovery.
    epochs: int = 50
    batch_size: int = 128
    lr: float = 0.1  # Of the heads.
    backbone_lr: float = 0.1
    weight_decay: float = 5e-5
    supervised_weight: float = 0.35
    entropy_weight: float = 1.0
    teacher_warmup_epochs: int = 30
    strength: float = 0.5  # EAGC's projection.
    anchor: float = 0.7  # EAGC's alignment.

    # Diagnostics.
    diagnose_steps: int = 200  # GDC at each of the first so many steps.
    soc_every: int = 10  # Steps between values of SOC among them.


def parse(argv: list[str] | None = None) -> Config:
    """Reads a configuration from the command line."""
    parser = argparse.ArgumentParser(
        description=f"{Config.__doc__} Flags are explained in config.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        kind = {"type": type(field.default)}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag, default=field.default, help=" ", **kind)
    return Config(**vars(parser.parse_args(argv)))
