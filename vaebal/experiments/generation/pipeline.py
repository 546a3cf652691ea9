"""Which stages a pipeline has, what each is trained on, and what the tables call its methods."""

from typing import Any, NamedTuple

# Where the first VAE's error is measured: in pixels behind the autoencoder's decoder, in its codes,
# or straight in images, without an autoencoder; "balanced": under the adaptive homotopy.
SPACES = ("pixels", "codes", "images", "balanced codes", "balanced images")
# A stage is one of these, and behind it the space of the first VAE on its way, if there is one.
# "opening": a balanced VAE while its latents are opened one by one; "vae" goes on from there.
KINDS = ("ae", "opening", "vae_plus", "vae", "flow", "wae", "classifier")
SECOND = ("vae_plus", "flow")  # those on the latents of a first VAE
FLOW = "Flow matching"  # what the tables call it


class Stage(NamedTuple):
    """One training run of the pipeline `seed`; a cell."""

    stage: str  # "ae", "vae_pixels", "vae_plus_pixels", "opening_balanced_codes", ..., "wae"
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.stage}_seed{self.seed}"

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if self.stage.startswith(kind))

    @property
    def space(self) -> str:
        """Of the first VAE on its way, as in the config; "" if there is none."""
        return self.stage.removeprefix(self.kind).strip("_").replace("_", " ")

    @property
    def balanced(self) -> bool:
        """Whether it is a VAE under the adaptive homotopy."""
        return self.kind in ("opening", "vae") and self.space.startswith("balanced")

    @property
    def section(self) -> str:
        """The config's section for it."""
        return "balanced" if self.balanced else self.kind

    @property
    def network(self) -> str:
        """Which of the networks it trains."""
        if self.kind not in ("opening", "vae"):
            return self.kind
        if self.space.endswith("images"):
            return "vae_images"
        return "vae_balanced" if self.balanced else "vae"

    @property
    def before(self) -> "Stage | None":
        """The stage whose outputs, or weights, this one is trained on."""
        if self.kind in SECOND:
            return stage_of("vae", self.space, self.seed)
        if self.kind == "vae" and self.balanced:
            return stage_of("opening", self.space, self.seed)
        without = self.kind in ("ae", "classifier") or self.space.endswith("images")
        return None if without else Stage("ae", self.seed)

    @property
    def reads(self) -> tuple[str, ...]:
        """What its batches hold: "images", "codes" or both, or "latents"."""
        if self.kind in SECOND:
            return ("latents",)
        if self.before is None or self.space.endswith("images"):
            return ("images",)
        return ("codes",) if self.space.endswith("codes") else ("codes", "images")

    @property
    def alone(self) -> bool:
        """Whether it is a VAE of what it reads, with no decoder behind it."""
        return self.kind in ("opening", "vae") and len(self.reads) == 1


def stage_of(kind: str, space: str, seed: int) -> Stage:
    """The stage of a kind on the way of a first VAE."""
    return Stage(f"{kind}_{space.replace(' ', '_')}", seed)


def pipeline(config: Any) -> list[str]:
    """The names of a pipeline's stages, each after the one it needs."""
    names = ["ae"]
    for space in config.vae.spaces:
        kinds = (*(("opening",) if space.startswith("balanced") else ()), "vae", "vae_plus")
        kinds += ("flow",) if config.flow.epochs else ()
        names += [stage_of(kind, space, 0).stage for kind in kinds]
    return [*names, "wae"]


def method(kind: str, space: str, config: Any) -> str:
    """The name in the tables of one of `kinds`; the first space listed is the plain one."""
    return kind if space == config.vae.spaces[0] else f"{kind} ({space})"


def kinds(config: Any) -> tuple[str, ...]:
    """What samples of a first VAE come by: its prior, or a second stage."""
    return ("VAE", "VAE+", *((FLOW,) if config.flow.epochs else ()))


def methods(config: Any) -> list[str]:
    """The names of all methods with a model, in the tables' order."""
    spaces = config.vae.spaces
    small = [method(kind, space, config) for space in spaces for kind in kinds(config)]
    return ["AE", *small, "WAE-MMD"]
