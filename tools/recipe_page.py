"""Writes docs/recipes.md from the recipes: what each trains, what is published and what was measured of it; and the
README's few rows of results.

    python -m tools.recipe_page          # writes both; a test fails where they are behind the recipes
"""

from __future__ import annotations

from pathlib import Path

from fastssl.recipes.measured import MEASURED
from fastssl.recipes.published import cells
from fastssl.recipes.resolve import recipes

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "recipes.md", ROOT / "README.md"

HEAD = """# Recipes

This page is written by `python -m tools.recipe_page` from `fastssl/recipes/`.

`fastssl train RECIPE` trains one; `fastssl recipes` lists them with their sources; `--dry-run` prints what one would
do, without data or devices. A recipe of your own needs no place here: [extending.md](extending.md).
[papers.md](papers.md) has them in the order of the papers' sections and tables.

Accuracies are top-1 in %. NN: by soft nearest neighbours, without training a classifier. Fine-tuned: or of the
classifier that the recipe itself trains. Several numbers of a paper are with several shares of the labels, or after
several lengths of pre-training, or the paper's beside the authors' code's; `fastssl recipes` tells them apart. Those of
a run of another length have it beside them. Measured: with this code, with the command and its
output in `benchmarks/results/`. An empty cell means that nobody has measured it with this code.

`labels` is the setting of that name: which images show their label in training, or, where a method uses none, are used
to evaluate it. `--labels simclr-1` changes it to 1 % of ImageNet's.
"""

NOTES = {
    "paws": (
        "The paper trained 100 epochs of ResNet-50 in 8.5 hours on 64 V100 GPUs. In half an hour on two cores PAWS "
        "does not overtake the supervised baseline on CIFAR-10 (`benchmarks/results/cifar10_small_cpu_202611.md`). Of "
        "two numbers by nearest neighbours with 1 % of the labels the first is the paper's, whose neighbours are among "
        "10 %, the second its authors' correction."
    ),
    "semppl": (
        "SemPPL's authors released no training code. What their paper leaves open is a setting, with the reason for "
        "its default, in `fastssl/methods/semppl.py`; their ablations are `--set` changes in "
        "`fastssl/recipes/semppl.py`. At the length of the small recipes unlabelled images do not help yet: "
        "`benchmarks/results/semppl_cifar10_cpu_202611.md` says why."
    ),
    "relicv2": "SemPPL without semantic positives. The numbers are as SemPPL's paper quotes them.",
    "byol": (
        "SemPPL without semantic positives and without its contrast. The numbers are as SemPPL's paper quotes them."
    ),
    "simclrv2": (
        "The three numbers are with 1, 10 and 100 % of the labels, after pre-training with a momentum memory that was "
        "never released: `simclrv2.rn50_800ep_memory` has one. Distillation's two are with 1 and 10 %; `--set "
        "teacher=RUN` names the teacher, any run with a classifier."
    ),
    "s4l": (
        "Numbers are of the classifiers that the recipes train: the paper's where it gives top-1, then what the "
        "authors' code reaches; the paper's tables are in top-5. The label lists are "
        "the authors' own (`fastssl/methods/s4l.py`). `--protocol turned-classifier` averages over an image's four "
        "quarter turns. Batch norm's statistics are those of 8 or 32 of the authors' cores, which ranks share; with "
        "more ranks than that, `--set core_images=none`. At the length of the small recipes unlabelled images do not "
        "help yet: `benchmarks/results/s4l_cifar10_cpu_202611.md` says why."
    ),
    "supervised": (
        "These train on the labelled images alone: from scratch for comparison, or, as `_finetune` says, from the "
        "weights of another run, which `--init-from RUN` names."
    ),
}
IN_README = (
    "paws.digits",
    "paws.digits_20",
    "paws.cifar10_small",
    "supervised.cifar10_small",
    "suncet.cifar10_small",
    "semppl.cifar10_small",
    "s4l.exemplar_cifar10_small",
)
README_COLUMNS = ("recipe", "labels", "top-1", "read out by", "time", "commit, how")
COLUMNS = ("recipe", "what", "labels", "network", "length", "NN, paper", "fine-tuned, paper", "measured here")


def page() -> str:
    """The whole page: a section a method."""
    rows: dict[str, list[str]] = {}
    for name in recipes():
        rows.setdefault(name.partition(".")[0], []).append(row(name))
    return HEAD + "".join(_section(method, each) for method, each in rows.items())


def row(name: str) -> str:
    """A recipe's line of the table."""
    recipe = recipes()[name]
    first = recipe()[0]
    encoder = getattr(first.config, "encoder", None)
    measured = MEASURED.get(name)
    told = f"{measured} [how](../benchmarks/results/{measured.results})" if measured else ""
    what = " ".join((recipe.__doc__ or "").split()).partition(". ")[0].rstrip(".")
    network = encoder.name if encoder is not None else ""
    return _line([f"`{name}`", what, f"`{first.config.labels}`", network, str(first.length), *cells(recipe), told])


def results() -> str:
    """The README's table."""
    rows = [_line(README_COLUMNS), _line(["---"] * len(README_COLUMNS))]
    for name in IN_README:
        each, (first, *_) = MEASURED[name], recipes()[name]()
        spread = "" if each.spread is None else f" ± {each.spread}"
        seeds = "single seed" if each.seeds == 1 else f"{each.seeds} seeds"
        how = f"[{each.commit or 'how'}](benchmarks/results/{each.results})"
        cells = [
            f"`{name}`",
            f"`{each.labels or first.config.labels}`",
            f"{each.top1}{spread} ({seeds})",
            each.how,
            each.took,
            how,
        ]
        rows.append(_line(cells))
    return "\n".join(rows) + "\n"


def with_results(readme: str) -> str:
    """The README with its table as it is now."""
    before, heading, rest = readme.partition("\n## Results\n")
    paragraph, _, table = rest.partition("\n| ")
    return before + heading + paragraph + "\n" + results() + "\n" + table.partition("\n\n")[2]


def _section(method: str, rows: list[str]) -> str:
    note = f"{NOTES[method]}\n\n" if method in NOTES else ""
    return f"\n## {method}\n\n{note}{_line(COLUMNS)}\n{_line(['---'] * len(COLUMNS))}\n" + "".join(
        f"{each}\n" for each in rows
    )


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(with_results(README.read_text()))
