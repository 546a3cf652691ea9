"""Writes docs/claims.md: one row a claim, with numbers read from results/ and never typed in.

python docs/claims.py

What the paper says, and its numbers, stand here; what was measured is computed from the committed
rows by the functions of `docs/claims_measured.py`, the verdict included. A source's date is kept on
the page with a digest of the source, and moves when the digest does.
"""

import datetime
import hashlib
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import claims_measured as measured
from claims_rows import Found, NoRows, Source

from vaebal.experiments import table1

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "claims.md"
RESULTS = DOCS.parent / "results"


class Claim(NamedTuple):
    """One row."""

    says: str
    source: str  # a folder or a page of results/; "" where nothing was run
    measure: Callable[[Source], Found] | None = None
    paper: str = "–"
    command: str = ""  # after `vaebal run --config=`; a whole command if it has a blank
    data: str = ""  # where the rows do not say; of the config, as in "κ = {model[kappa]}"


MNIST_KAPPA = ("mnist_kappa", "mnist_kappa --config.train.epochs=100")
MNIST_KAPPA_SKIPS = (
    "mnist_kappa_skips",
    "mnist_kappa --config.model.linear_variance=False --config.train.epochs=100 "
    "--config.train.learning_rate=3e-3",
)
MNIST_LONG = "mnist_gamma --config.train.epochs=60 --config.train.settled_learning_rate=1e-3"
FASHION = "mnist_gamma --config.data.name=fashion_mnist --config.train.settled_learning_rate=1e-3"
SETTLED = (  # runs of the homotopy that went on, beside plain VAEs of as many latents
    ("MNIST", "mnist_gamma", "mnist_gamma"),
    ("MNIST, 60 epochs", "mnist_gamma_60_epochs", MNIST_LONG),
    ("Fashion-MNIST", "fashion_mnist_gamma", FASHION),
    (
        *("photographs of faces (LFW), 64×64", "faces_gamma"),
        "folder_gamma --config.train.epochs=120",
    ),
)
PAPER_FRONT = "; ".join(f"{count}: {error}" for error, _, count in table1.PAPER.values())
PAPER = [
    Claim(
        "Theorem 1: the affine VAE has no bad minima",
        *("theorem1", measured.stationary_points, "proof", "theorem1"),
        "eigenvalues {data[eigenvalues]}, κ = {model[kappa]}, γ = {model[gamma]}",
    ),
    Claim(
        "Theorem 2: collapsed latents are stationary",
        *("theorem2/certificates.csv", measured.collapsed_gradients, "proof", "theorem2"),
        "random networks",
    ),
    Claim(
        "Skip connections are the way out of collapse",
        *("theorem2/training.csv", measured.ways_out, "argued", "theorem2"),
        "covariance with variances {data[variances]}, decoders of 3 blocks",
    ),
    Claim(
        "the same in training: the digits from γ = 1",
        *("digits_kappa", measured.affine_skip, "argued", "digits_kappa"),
    ),
    Claim(
        "Theorem 3: a balanced h needs an unbounded slope at 0",
        *("theorem3/linear.csv", measured.slopes, "proof", "theorem3"),
        "rank {linear[rank]}, linear decoders",
    ),
    Claim(
        "Table 2: γ fixed at its learned value gives a higher MMD at the same error",
        *("network_gamma", measured.fixed_against_learned),
        paper="MMD 20.2 → 69.6 and 93.3 → 291.8, error × .99 (CelebA)",
        command="network_gamma",
    ),
    Claim(
        "the same where nothing bends",
        *("linear_gamma", measured.fixed_against_learned),
        paper="as above",
        command="linear_gamma",
    ),
    Claim(
        "the same on drawn scenes of 64×64 pixels",
        *("rendered64_gamma_quick", measured.fixed_against_learned),
        paper="as above",
        command="rendered64_gamma:quick",
    ),
    Claim(
        "the same on Fashion-MNIST, at the adaptive homotopy's γ",
        *("fashion_mnist_gamma", measured.fixed_against_learned),
        paper="as above",
        command=FASHION,
    ),
    Claim(
        "the same on MNIST, at the adaptive homotopy's γ",
        *("mnist_gamma_60_epochs", measured.fixed_against_learned),
        paper="as above",
        command=MNIST_LONG,
    ),
    *(
        Claim(
            f"the same on 7,225 photographs of faces (LFW), {side}×{side}, at the adaptive "
            "homotopy's γ",
            *(folder, measured.fixed_against_learned),
            paper=f"as above; {paper} at {side}×{side}",
            command=command,
        )
        for side, folder, paper, command in (
            (64, "faces_gamma", "20.2 → 69.6", "folder_gamma --config.train.epochs=120"),
            (
                *(128, "faces128_gamma", "93.3 → 291.8"),
                "folder_gamma --config.data.resolution=128 --config.model.pool=4",
            ),
        )
    ),
    Claim("Table 2 and Figure 1 on CelebA, 64 and 128 pixels", "", command="celeba64_gamma"),
    *(
        Claim(
            f"Table 1, MNIST: error and NLL at κ = {kappa}",
            *(MNIST_KAPPA[0], measured.table_1(kappa, error, nll)),
            paper=f"{error}, −{-nll}",
            command=MNIST_KAPPA[1],
        )
        for kappa, (error, nll, _) in table1.PAPER.items()
    ),
    *(
        Claim(
            f"Table 1: few latents are active, whatever κ{name}",
            *(folder, measured.saturation((10, 22))),
            paper="10 to 22 for κ = 50 to 784",
            command=command,
        )
        for name, folder, command in (
            ("", *MNIST_KAPPA),
            (", at a rate of .003", *MNIST_KAPPA_SKIPS),
            (", at a rate of .003 for 10 epochs", "mnist_kappa_quick", "mnist_kappa:quick"),
        )
    ),
    *(
        Claim(
            f"Table 1 as a front: the error at the paper's numbers of latents or fewer, {name}",
            *(folder, measured.front),
            paper=PAPER_FRONT,
            command=command,
        )
        for name, folder, command in (
            *SETTLED[:2],
            ("MNIST, short", "mnist_gamma_quick", "mnist_gamma:quick"),
        )
    ),
    Claim(
        "Table 1's sentence: without skips the net collapses",
        *(MNIST_KAPPA_SKIPS[0], measured.without_skips),
        paper="0 latents",
        command=MNIST_KAPPA_SKIPS[1],
    ),
    Claim(
        "the same from γ = 1 and a posterior variance of 1",
        *("earlier/mnist_from_gamma_1", measured.without_skips),
        paper="0 latents",
        command="mnist_kappa",
    ),
    Claim(
        "the same over initial weights, γ's and σ²'s start, activation, depth and rate",
        *("mnist_collapse", measured.collapsing),
        paper="0 latents",
        command="mnist_collapse",
        data="κ = {model[kappas]}, {train[epochs]} epochs",
    ),
    *(
        Claim(
            f"Tables 3 and 4: samples of VAE+ match its reconstructions, {name}",
            *(folder, measured.second_stage),
            paper="FID of samples 47.5, of reconstructions 45.6; VAE 64.8, WAE-MMD 66.9 (CelebA)",
            command=command,
        )
        for name, folder, command in (
            ("MNIST", "mnist_generation_quick", "mnist_generation:quick"),
            (
                *("Fashion-MNIST", "fashion_mnist_generation"),
                "mnist_generation:images --config.data.name=fashion_mnist",
            ),
            ("drawn scenes", "rendered64_generation_quick", "rendered64_generation:quick"),
            ("digits", "digits_generation_quick", "digits_generation:quick"),
            ("photographs of faces (LFW), 64×64", "faces_generation", "folder_generation:mlp"),
        )
    ),
    Claim(
        "Table 4: VAE+ fills the bins of the data better than VAE and WAE-MMD, "
        "photographs of faces (LFW), 64×64",
        *("faces_generation", measured.bins_that_differ),
        paper="NDB/100, 200, 300: VAE+ .29, .28, .24; VAE .88, .85, .81; WAE-MMD .64, .62, .58; "
        "Downsample .05, .06, .04 (CelebA)",
        command="folder_generation:mlp",
    ),
    Claim("Tables 3 and 4 on CelebA, 128 pixels", "", command="celeba128_generation"),
]

OURS = [
    *(
        Claim(
            f"The adaptive homotopy ends with as many active latents as the data has dimensions: "
            f"{name}",
            *(folder, measured.exact("adaptive")),
            command=command,
        )
        for name, folder, command in (
            ("curved manifolds", "network_gamma", "network_gamma"),
            ("others, three an r", "network_gamma_data_seeds", "network_gamma"),
            (
                *("with 784 latents to take instead of 20", "network_gamma_784"),
                "network_gamma --config.model.latents=784",
            ),
            ("flat cubes", "linear_gamma", "linear_gamma"),
            ("scenes, 16×16", "rendered16_gamma", "rendered16_gamma"),
            ("scenes, 64×64", "rendered64_gamma_seeds", "rendered64_gamma:seeds"),
            ("scenes, 64×64", "earlier/rendered64_gamma_r12", "rendered64_gamma:seeds"),
        )
    ),
    *(
        Claim(
            f"γ learned slowly (.002 nats a step) does so as well: {name}",
            *(folder, measured.by_both_criteria("learned 2e-3")),
            command=folder,
        )
        for name, folder in (("curved manifolds", "network_gamma"), ("flat cubes", "linear_gamma"))
    ),
    Claim(
        "γ learned as fast as the error falls crowds the latents",
        *("network_gamma", measured.crowded("learned 1e-1")),
        command="network_gamma",
    ),
    Claim(
        "γ fixed from scratch does so too",
        *("network_gamma", measured.crowded("fixed at adaptive")),
        command="network_gamma",
    ),
    *(
        Claim(
            f"Noise takes the cost of a fast γ away: white noise of {sigma}",
            *(f"earlier/network_gamma_noise/{sigma}", measured.beside_adaptive("learned 1e-1")),
            command="network_gamma",
        )
        for sigma in ("0.02", "0.05", "0.1")
    ),
    Claim(
        "MNIST needs as many latents, whatever the seed",
        *("mnist_gamma", measured.one_count),
        paper="10 at κ = 50",
        command="mnist_gamma",
    ),
    Claim(
        "the same over 60 epochs",
        *("mnist_gamma_60_epochs", measured.one_count),
        paper="10 at κ = 50",
        command=MNIST_LONG,
    ),
    Claim(
        "Fashion-MNIST needs as many latents, whatever the seed",
        *("fashion_mnist_gamma", measured.one_count),
        command=FASHION,
    ),
    *(
        Claim(
            "It learns less by heart than a plain VAE of as many latents: the test error over that "
            f"in training, {name}",
            *(folder, measured.generalises),
            command=command,
        )
        for name, folder, command in SETTLED
    ),
    Claim(
        "`fit`, given nothing but data, finds their dimension",
        *("fit", measured.fit_counts),
        command="python -m vaebal.estimator.validation",
    ),
    Claim(
        "`fit` on closed shapes: a circle, a sphere, a torus take r latents or one more",
        *("fit", measured.closed_counts),
        command="python -m vaebal.estimator.validation",
    ),
    Claim(
        "`fit` on photographs: turns of a film take what a closed curve allows",
        *("photographs", measured.allowed_counts("film")),
        command="python -m vaebal.estimator.photographs",
    ),
    Claim(
        "`fit` on photographs: a face under light from two angles takes two latents",
        *("photographs", measured.allowed_counts("face")),
        command="python -m vaebal.estimator.photographs",
    ),
    Claim(
        "`diagnose` tells the state of a VAE",
        *("diagnosis/table.md", measured.verdicts),
        command="python -m vaebal.diagnosis.validation",
    ),
    Claim(
        "the same of VAEs made by PyTorch alone and by pythae",
        *("diagnosis/torch.md", measured.verdicts),
        command="python -m vaebal.diagnosis.validation --torch --sets=8",
    ),
    Claim(
        "Against rivals on the same data, the adaptive homotopy's count is right most often",
        *("arena", measured.arena),
        command="arena",
    ),
    Claim(
        "the same on drawn scenes, with layers as wide as `fit` takes for their pixels",
        *("arena_wide", measured.arena),
        command="arena:wide",
    ),
    Claim(
        "the same with noise, and with 500 and 2,000 examples",
        *("arena_hard", measured.arena),
        command="arena:hard",
    ),
    *(
        Claim(
            f"Published counter-claims, learned variances keep more than r: not under the adaptive "
            f"homotopy, {name}",
            *(folder, measured.superset),
            command=folder.replace("_", ":"),
        )
        for name, folder in (
            ("sigmoid sets", "counterclaim"),
            ("spheres", "counterclaim_spheres"),
            ("by where γ starts", "counterclaim_starts"),
        )
    ),
    *(
        Claim(f"{says}, {name}", *(folder, measure), command=command)
        for says, measure in (
            (
                "A VAE on an autoencoder's codes needs no second stage",
                measured.without_second_stage,
            ),
            (
                "Latents opened one by one bring its samples nearer than a plain one's",
                measured.opened_against_plain("codes"),
            ),
        )
        for name, folder, command in (
            ("digits", "digits_generation_quick", "digits_generation:quick"),
            ("MNIST", "mnist_generation_codes", "mnist_generation:codes"),
        )
    ),
    *(
        Claim(f"{says}, {name}", *(folder, measure), command=command)
        for says, measure in (
            (
                "The same of a VAE straight on images",
                measured.opened_against_plain("images"),
            ),
            (
                "The same of a second VAE over it",
                measured.opened_against_plain("images", "VAE+"),
            ),
            (
                "The same of flow matching over it",
                measured.opened_against_plain("images", "Flow matching"),
            ),
            *(
                (
                    f"By flow matching over a {first} VAE samples come within 1.5 times their "
                    "reconstructions' distance",
                    measured.reaches_reconstructions(method),
                )
                for first, method in (
                    ("balanced", "Flow matching (balanced images)"),
                    ("plain", "Flow matching"),
                )
            ),
        )
        for name, folder, command in (
            ("MNIST", "mnist_generation_images", "mnist_generation:images"),
            (
                *("Fashion-MNIST", "fashion_mnist_generation"),
                "mnist_generation:images --config.data.name=fashion_mnist",
            ),
        )
    ),
    Claim(
        "The same of the digits",
        *("digits_generation_quick", measured.reaches_reconstructions("Flow matching")),
        command="digits_generation:quick",
    ),
    Claim(
        "Opened one by one on an autoencoder's codes, as many latents as factors, drawn scenes",
        *("rendered64_generation_quick", measured.counts_factors("VAE (balanced codes)")),
        command="rendered64_generation:quick",
    ),
    Claim(
        "By flow matching over it samples come within 1.5 times their reconstructions' distance",
        *(
            "rendered64_generation_quick",
            measured.reaches_reconstructions("Flow matching (balanced codes)"),
        ),
        command="rendered64_generation:quick",
    ),
    *(
        Claim(
            f"Latent diffusion's prior over balanced latents needs a third of the steps, {name}",
            *(f"{folder}/priors.json", measured.prior_speed(stage)),
            command=command,
        )
        for name, stage, folder, command in (
            ("flow matching, MNIST", "flow 512", *2 * ("latent_diffusion",)),
            (
                *("flow matching, Fashion-MNIST", "flow 512", "fashion_mnist_latent_diffusion"),
                "latent_diffusion --config.data.name=fashion_mnist",
            ),
            (
                *("flow matching, drawn scenes of eight factors, 64×64", "flow 256"),
                *("rendered64_latent_diffusion", "latent_diffusion:rendered64"),
            ),
            (
                "flow matching, photographs of faces (LFW), 32×32",
                "flow 256",
                *("faces_latent_diffusion", "latent_diffusion:folder --config.data.resolution=32"),
            ),
            *(
                (f"{kind}, digits", stage, "latent_diffusion_quick", "latent_diffusion:quick")
                for kind, stage in (
                    ("flow matching", "flow 64"),
                    ("an invertible network", "invertible 32"),
                    ("a second VAE", "vae 64"),
                )
            ),
        )
    ),
    *(
        Claim(
            "A training step of the MNIST net against PyTorch's best",
            *(f"bench/{page}.md", measured.step_speed),
            command="python -m vaebal.bench",
        )
        for page in ("mnist_kappa_cpu", "mnist_kappa_amd_cpu")
    ),
    Claim(
        "32 digits VAEs in one program against separate runs",
        *("bench/sweep_digits_kappa_cpu.md", measured.sweep_speed),
        command="python -m vaebal.bench --what=sweep",
    ),
]

WRONG = [
    Claim(
        "Theorem 1's number of equivalent minima leaves out the signs of the columns",
        *("theorem1", measured.copies, "κ!/(κ−r)!", "theorem1"),
        "eigenvalues {data[eigenvalues]}, κ = {model[kappa]}, γ = {model[gamma]}",
    ),
    Claim(
        "Theorem 2 needs the heads' biases at 0, and the noise averaged",
        *("theorem2/certificates.csv", measured.conditions, "not said", "theorem2"),
        "random networks",
    ),
    Claim(
        "Theorem 3's slope is necessary, not sufficient: u^p keeps zero error for p ≤ ½ alone",
        *("theorem3/power.csv", measured.powers, "not said", "theorem3"),
        "rank {linear[rank]}, linear decoders",
    ),
    Claim(
        "Table 1's two columns do not fit each other: at κ = 50, the NLL's reconstruction term at "
        "the γ of its error",
        "",
        measured.table_1_columns(4.98, -315, 784),
        "error 4.98, NLL −315",
    ),
]

SHORT = [
    Claim(
        "The price of balance without noise: error and −ELBO beside γ learned at .1",
        *("network_gamma", measured.beside("learned 1e-1")),
        command="network_gamma",
    ),
    Claim(
        "The price at 64×64 pixels, beside γ fixed at the same value with all latents open",
        *("rendered64_gamma_quick", measured.beside("fixed at adaptive")),
        command="rendered64_gamma:quick",
    ),
    Claim(
        "At r = 12 the count is right and not all of the content: factors predicted from latents",
        *("earlier/rendered64_gamma_r12", measured.content),
        command="rendered64_gamma:seeds",
    ),
    Claim(
        "How many latents MNIST takes should not depend on the homotopy's patience",
        *("mnist_gamma", measured.by_patience),
        command="mnist_gamma",
    ),
    *(
        Claim(
            "Gone on with at its count, the homotopy's error falls to a plain VAE's or below, "
            f"{name}",
            *(folder, measured.settled_against_plain),
            command=command,
        )
        for name, folder, command in SETTLED
    ),
    Claim("The full configs of rendered scenes and CelebA, which want a GPU", ""),
]

SECTIONS = (
    ("The paper's claims", PAPER),
    ("What was found here", OURS),
    ("Where the paper is wrong, or says too little", WRONG),
    ("Where we fall short", SHORT),
)
HEAD = ("claim", "here", "paper", "verdict", "data and seeds", "command, page and date")
INTRODUCTION = """# Claims

One row a claim, of the paper and of ours. Numbers are computed from the rows in `results/` by
`python docs/claims.py`, mean ± standard deviation over runs; brackets are Wilson's 95 % intervals.
The pages have protocol and estimators, [results](results.md) the story. A command is
`vaebal run --config=` and what stands here; arms and seeds, where they are not the config's,
stand in the page's own command; those of earlier pages had other fields, which stand at its end.

*Reproduced*: as the paper has it. *Sharpened*: so, and more can be said. *In part*: some of what is
said, or in some of the cases, and not the rest. *Direction only*: ahead of those it is set against,
and not where it is said to be. *Not reached*: the paper's is better. *Not so here*: measured
otherwise. *Holds*, *falls short*: ours. *Shown*: what the paper has wrong. *Not run*: no rows."""


def line(claim: Claim, dates: dict[str, str]) -> list[str]:
    """A claim's cells."""
    source = Source.of(RESULTS, claim.source) if claim.source else None
    if claim.measure is None or (claim.source and source is None):
        here = Found("–", "not run")
    else:
        try:
            here = claim.measure(source)
        except NoRows as missing:
            here = Found(f"no rows with {missing}", "not run")
    data = "–"
    made = [f"`{claim.command}`"] if claim.command else []
    if source is not None:
        data = claim.data.format_map(source.config) if claim.data else source.data(here.arms)
        if source.seeds:
            data += f"; seed{'' if source.seeds.isdigit() else 's'} {source.seeds}"
        name = "earlier page" if source.page.startswith("earlier") else "page"
        made += [f"[{name}](../results/{source.page})", dates[claim.source]]
    return [claim.says, here.text, claim.paper, here.verdict, data, ", ".join(made) or "–"]


def digest(source: str) -> str:
    """The first letters of the SHA-256 of a source's rows."""
    return hashlib.sha256(Source.file(RESULTS, source).read_bytes()).hexdigest()[:12]


def dated(sources: Sequence[str], page: str) -> dict[str, tuple[str, str]]:
    """Source: digest and date; a new source's date is Git's, a changed one's today's."""
    before = dict(re.findall(r"^\| `([^`]+)` \| `(\w+ [-\d]+)`", page, re.M))
    found = {}
    for source in sources:
        old, _, date = before.get(source, "").partition(" ")
        if not date:
            file = str(Source.file(RESULTS, source))
            asked = ["git", "log", "-1", "--follow", "--diff-filter=AM", "--format=%as", "--", file]
            date = subprocess.run(asked, cwd=DOCS, capture_output=True, text=True).stdout.strip()
        changed = old not in ("", digest(source))
        today = datetime.date.today().isoformat()
        found[source] = (digest(source), today if changed or not date else date)
    return found


def written(page: str) -> str:
    """The page, of the page as it was."""
    claims = [claim for _, listed in SECTIONS for claim in listed if claim.source]
    there = [c.source for c in claims if Source.of(RESULTS, c.source) is not None]
    sources = dated(sorted(set(there)), page)
    parts = [INTRODUCTION]
    for title, listed in SECTIONS:
        dates = {source: date for source, (_, date) in sources.items()}
        lines = [line(claim, dates) for claim in listed]
        rule = [":---"] * len(HEAD)
        table = ["| " + " | ".join(cells) + " |" for cells in (HEAD, rule, *lines)]
        parts.append(f"## {title}\n\n" + "\n".join(table))
    told = [f"| `{name}` | `{mark} {date}` |" for name, (mark, date) in sources.items()]
    head = ["| rows | digest, and since when |", "| :--- | :--- |"]
    parts.append("## Sources\n\n" + "\n".join([*head, *told]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text() if PAGE.exists() else ""))
