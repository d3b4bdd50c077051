"""Writes docs/papers.md: where each section, table and figure of the four papers is in this code.

    python -m tools.papers_page          # a test fails where the page is behind, or names what there is not

What a paper describes stands in `ROWS` below; the numbers of its tables are those that the recipes hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastssl.recipes.published import published_of
from fastssl.recipes.resolve import recipes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "papers.md"

HEAD = """# The four papers, row by row

This page is written by `python -m tools.papers_page`. For each paper first what it describes, in the order of its
sections, then the numbers that recipes are told to reach.

Status: **there**: as the paper has it. **differs**: how is said. **missing**: not in this code. A setting stands behind
the recipe that it changes. "Code" is what a paper's authors released. Nobody has trained the ImageNet recipes with this
code yet.
"""


class Row(NamedTuple):
    """`place` in the paper, `what` it describes, the recipe or setting, and what is to be said of it."""

    place: str
    what: str
    how: str
    status: str


class Paper(NamedTuple):
    """`sources`: beginnings of the sources that published numbers name."""

    title: str
    sources: tuple[str, ...]
    rows: tuple[Row, ...]


PAWS = (
    Row("3.2", "classes by similarity to labelled supports, sharpened targets", "`paws.rn50_100ep`", "there"),
    Row("3.2", "any number of views: the target is the mean of the image's others",
        "`paws.rn50_100ep --set global_view.copies=3`", "there"),
    Row("3.2", "without sharpening", "`paws.rn50_100ep --set sharpen_T=1`", "there"),
    Row("eq. 1", "targets below 1e-4 become 0", "`paws.rn50_100ep`", "differs: the code's; the paper keeps them"),
    Row("4, D.1", "label targets", "`paws.rn50_100ep --set label_targets=true`",
        "there; the paper has no numbers, `benchmarks/results/paws_collapse_cpu_202611.md` those on digits"),
    Row("D.2", "entropy minimised", "`paws.rn50_100ep --set entropy=0.1`",
        "there; the paper gives no weight; numbers on digits as above"),
    Row("5, A", "optimiser, rates, heads, views, supports", "`paws.rn50_100ep`", "there"),
    Row("5", "norms of shortcuts neither adapted nor decayed", "`paws.rn50_100ep --set optimizer.rule=paper`",
        "differs by default: the code adapts four of them"),
    Row("A", "no multi-crop", "`paws.rn50_100ep --set small_view=none --set global_view.crop.area=0.08,1`", "there"),
    Row("A", "other supports by epochs of the labelled set", "", "missing: an idea that the paper did not try"),
    Row("table 4", "supports: 960 x 4: 63.7 / 72.0; 448 x 8: 61.8 / 70.1",
        "`paws.rn50_100ep --set classes_global=448 --set images_per_class=8`", "there"),
    Row("table 5", "no prediction head, 10 %: 74.2 / 75.2 after 100 / 200 epochs",
        "`paws.rn50_100ep --set prediction=false`", "there"),
    Row("table 6", "no ME-MAX: 52.9 / 73.6 with 1 / 10 %", "`paws.rn50_100ep --set me_max=0`", "there"),
    Row("tables 2, 3", "twice as wide, 100 / 300 epochs: 68.2 / 69.6 with 1 %, 77.0 / 77.7 with 10 %",
        "`paws.rn50w2_200ep --set epochs=100`", "there"),
    Row("table 2", "four times as wide, 100 epochs: 69.8 / 78.5", "`paws.rn50w4_200ep --set epochs=100`", "there"),
    Row("A", "fine-tuning, chosen among ten settings on 12 held-out images a class",
        "`supervised.paws_rn50_finetune_10pct` with `--sweep rate.peak=.01,.02,.05,.1,.2 --sweep epochs=30,50`",
        "there"),
    Row("A", "nearest neighbours, features from before the prediction head",
        "`--protocol soft-nn --tap h`", "differs by default: after it, as the code"),
    Row("table 1", "SwAV + CT", "", "missing: another method"),
    Row("figure 4a", "cross-entropy of the anchors", "logged as `cross_entropy`", "there"),
    Row("figure 4b", "instance discrimination; classification of the supports",
        "logged as `instance_discrimination`, `support_classification`", "there; layer and temperature are not said"),
    Row("figure 4c", "confidence of the targets", "logged as `target_confidence`", "there"),
    Row("figure 6, B", "supervised: 90 epochs, crops and flips; wider ones with colours",
        "`supervised.rn50_100pct`, `supervised.rn50w2_colour_100pct`, `supervised.rn50w4_colour_100pct`", "there"),
    Row("C", "CIFAR-10", "`paws.cifar10`", "differs: the code's solarising and equalising, no grey"),
    Row("C", "180 steps of SuNCEt, momentum SGD, no augmentation", "`suncet.cifar10_sgd`", "there"),
    Row("C", "the same as the code does it: LARS, two flipped views", "`suncet.cifar10`, `suncet.cifar10_two_stages`",
        "there; the code keeps the epoch of the best test accuracy, this the last"),
    Row("C", "five published splits of 4,000 labels", "`--labels paws-cifar10-4000-split-321`", "there"),
    Row("figure 7a", "supervised with all labels: 94.9 ± 0.2", "`supervised.cifar10_wrn28_2_100pct`",
        "there; rate and views are not published"),
)  # fmt: skip

SIMCLRV2 = (
    Row("2, 3.1", "NT-Xent, views, head, optimiser, rates", "`simclrv2.rn50_800ep`", "there"),
    Row("3.1", "warm-up of the first 5 % of whatever length", "`simclrv2.rn50_800ep --set rate.warmup=5%`", "there"),
    Row("2, note 2", "a wider head on a narrow network", "`simclrv2.rn50_800ep --set hidden_features=4096`", "there"),
    Row("3.1, D", "memory of 64K keys, average of .999", "`simclrv2.rn152w3_sk_800ep --set memory=default`",
        "there, for every network; off by default, as it was never released"),
    Row("table 1", "13 networks, each fine-tuned with 1, 10 and 100 %, and supervised", "the numbers below", "there"),
    Row("3.1", "fine-tuning: the rate by the network, the head by the labels",
        "`supervised.simclrv2_rn50_finetune_10pct --set encoder.selective_kernel=true`", "there"),
    Row("figure 5, E", "fine-tuning from layer 0, 1, 2 of heads of 2, 3, 4 layers",
        "`simclrv2.rn50_800ep --set head_layers=4`, then `supervised.simclrv2_rn50_finetune_10pct --set head.layers=2`",
        "there"),
    Row("3.1, C", "linear evaluation with all labels", "`--protocol linear --labels all`",
        "differs: without augmentation, since features are computed once"),
    Row("figure 4, A.1", "supervised with 1 and 10 %: AutoAugment, smoothed labels",
        "`supervised.rn50_autoaugment_1pct`, `supervised.rn50_autoaugment_10pct`",
        "there; length, rate and decay are S4L's. The figure is a plot, without numbers"),
    Row("eq. 2", "distillation", "`simclrv2.distill_rn50`", "there"),
    Row("eq. 3", "distillation beside labels", "`simclrv2.distill_rn50 --set alpha=0.5`",
        "there, also where labelled images are a set of their own"),
    Row("table 2", "on the labelled set alone: 23.6 / 66.2",
        "`simclrv2.distill_rn50_from_rn50w2_sk --set images=labelled`", "there"),
    Row("table 2", "labels alone: 12.3 / 52.0", "`supervised.rn50_1pct`, `supervised.rn50_10pct`",
        "differs: its settings are S4L's"),
    Row("figure F.1", "alpha and temperature", "`simclrv2.distill_rn50 --set temperature=2`", "there"),
    Row("3.4", "distilled into itself, then into a smaller one",
        "`simclrv2.distill_rn152w3_sk`, `simclrv2.distill_rn50_from_rn152w3_sk`", "there"),
    Row("G", "CIFAR-10, six depths", "`simclrv2.cifar10_rn18_sk_800ep`",
        "differs: no Sobel filter and no broader colours, which are not specified further"),
    Row("G", "fine-tuned with 250, 4,000 and all labels", "`supervised.simclrv2_cifar10_rn18_sk_finetune_4000`",
        "there; batch and length are not published"),
    Row("figures A.1, B.1, C.1, F.2", "accuracy by size, by way of training, by teacher", "",
        "missing: plots of these numbers"),
)  # fmt: skip

SEMPPL = (
    Row("2, eq. 1-10, B, C", "ReLICv2 with semantic positives by votes of queues", "`semppl.rn50_300ep`",
        "there; what the paper leaves open is listed in `fastssl/methods/semppl.py`"),
    Row("2", "queues begin as random vectors", "`semppl.rn50_300ep --set start=random`", "differs by default: empty"),
    Row("B", "the divergence's positive is the online embedding", "`semppl.rn50_300ep`",
        "differs: the queue has none; see `fastssl/losses/semppl.py`"),
    Row("2.1, D.1", "rate by the batch, queues of 20 batches", "`semppl.rn50_300ep --set batch_global=1024`", "there"),
    Row("E", "views, masks of the foreground", "`semppl.rn50_300ep`", "there; masks by `python -m tools.saliency`"),
    Row("A.1", "fine-tuning, 108 settings with rates for 256 images",
        "`supervised.semppl_rn50_finetune_10pct` with `--sweep batch_global=512,1024,2048 --sweep "
        "rate.peak=.005,.0035,.003,.0025,.002,.001 --sweep head_peak=.5,.3,.2,.1,.05,.025`",
        "differs: the classifier begins at zero"),
    Row("3.4, figure 2", "all labels: SimCLR 76.0, BYOL 77.7, ReLICv2 79.7",
        "`semppl.rn50_300ep --set labels=all`, then `supervised.semppl_rn50_finetune_100pct`", "there"),
    Row("table 4a", "BYOL and ReLICv2 without semantic positives", "`byol.rn50_300ep`, `relicv2.rn50_300ep`",
        "differs: the paper quotes runs of 1,000 epochs"),
    Row("table 4b", "no pseudo-labels: 61.9 / 71.1", "`semppl.rn50_300ep --set pseudo_labels=false`", "there"),
    Row("tables 4b, 11", "alpha 0: 72.4, 1: 74.6", "`semppl.rn50_300ep --set alpha=1`", "there"),
    Row("table 5", "oracle: 71.6", "", "missing: no loss here sees labels that a run is not given"),
    Row("table 8a", "1, 2, 3, 5, 10 positives", "`semppl.rn50_100ep --set positives=5`", "there"),
    Row("table 8b", "100 / 200 / 300 / 500 epochs: 69.9 / 72.4 / 72.7 / 72.3", "`semppl.rn50_100ep --set epochs=500`",
        "there; the headline for 300 epochs is 76.0"),
    Row("table 9", "no voting: 69.0", "`semppl.rn50_100ep --set voting=false`",
        "differs: the first view asks, not one at random"),
    Row("table 10a", "1, 2, 3, 5, 10 neighbours", "`semppl.rn50_100ep --set neighbours=10`", "there"),
    Row("table 10b", "queues of 4,000 to 200,000", "`semppl.rn50_100ep --set capacity=20480`",
        "differs: 4,096 is the least, a batch"),
    Row("figure 3", "precision and recall by votes", "logged", "there, at four thresholds, of the logged batch"),
    Row("tables 2, 7", "ImageNetV2, R, ObjectNet, C", "`--protocol robustness --labels all`", "there"),
    Row("table 3", "transfer to 11 sets", "`--protocol transfer`", "differs: another sweep, which the output tells"),
    Row("reproducibility", "released checkpoints",
        "`semppl.rn50_300ep` with `--init-from FILE --unsafe-pickle`",
        "there for networks without selective kernels; tried on a file of that structure, not on theirs"),
    Row("F", "cost of votes, queues, loss", "`python -m benchmarks.semppl`", "there, but for the loss's share"),
)  # fmt: skip

S4L = (
    Row("3, 3.1", "class, and rotation or exemplar of all images", "`s4l.rotation`, `s4l.exemplar`",
        "there; rate .03, and exemplar's batch and warm-up, are the code's"),
    Row("3.2", "VAT, KL(p(x) || p(x + r))", "`s4l.vat --set vat.divergence=paper`",
        "differs by default: the code has the reverse"),
    Row("3.2", "entropy minimised", "`s4l.vat_entmin`", "there"),
    Row("3.2", "VAT and entropy of unlabelled images alone", "`s4l.vat_entmin --set smoothed=unlabelled`",
        "differs by default: of all, as the code"),
    Row("4", "1,231,121 images to train on and 50,046 to choose by", "`--sweep`, `--held-out`",
        "differs: held-out images stay in the unlabelled stream, without their label"),
    Row("4.1", "supervised with 10, 1 and 100 %", "`s4l.supervised`, `s4l.supervised_1pct`, `s4l.supervised_100pct`",
        "there; warm-up with 1 % is the code's"),
    Row("4.1", "ResNets of 18, 34 and 50 layers, v1 and v2, half to four times as wide",
        "`s4l.supervised --set encoder='S4lResNet(18, base_width=32)'`, `s4l.supervised --set 'encoder=ResNet(34)'`",
        "there; v1 is torchvision's"),
    Row("4.2", "pseudo-labels", "`s4l.pseudo_label`", "differs: labelled images keep their label, as in the code"),
    Row("4.2", "only those above .5", "`s4l.pseudo_label --set label.least_confidence=0.5`", "there"),
    Row("4.2", "VAT's length: 50, 39.7, 31.5, 25", "`s4l.vat --set vat.epsilon=39.7`", "there"),
    Row("4.2", "entropy's weight: .03, .1, .3, 1", "`s4l.vat_entmin --set entropy_weight=0.3`", "there"),
    Row("4.2", "VAT on CIFAR-10: 86.4", "`s4l.vat_cifar10_small`", "differs: a small network; the paper names none"),
    Row("4.3", "self-supervision, then linear", "`s4l.rotation_pretrain`, `s4l.exemplar_pretrain`, then "
        "`s4l.linear_10pct`, `s4l.linear_1pct`", "there; lengths are inferred"),
    Row("4.3", "self-supervision, then fine-tuned", "`s4l.rotation_pretrain`, then `s4l.supervised` with "
        "`--init-from RUN`", "there"),
    Row("4.4", "no self-supervision of labelled images", "`s4l.rotation --set self_supervised_on=unlabelled`", "there"),
    Row("4.4", "class of the upright copy alone", "`s4l.rotation --set class_on=upright`", "there"),
    Row("4.4", "four turns vote", "`--protocol turned-classifier`", "there"),
    Row("4.4", "ResNet-152 v2, twice as wide", "`s4l.rotation_rn152w2`, `s4l.rotation_rn152w2_1pct`",
        "there; settings are not published"),
    Row("5", "MOAM: 88.8, 90.0, 91.2 after its three stages", "`s4l.moam`",
        "differs: weights and length of VAT are the code's"),
    Row("5", "its weight of rotation, .7", "`s4l.moam --set joint.rotation.weight=0.7`", "there"),
    Row("table 2", "MOAM with all labels", "`s4l.moam_100pct`", "there"),
    Row("6, figure 2", "Places205: accuracy by epoch of a linear classifier", "`--protocol probe --labels all`",
        "there, on any images; without augmentation"),
    Row("7, figure 3", "choosing by 1,000, 5,000 or 50,046 images", "`python -m tools.validation_sizes SWEEP`",
        "there"),
)  # fmt: skip

PAPERS = (
    Paper("PAWS, arXiv 2104.13963", ("PAWS", "facebookresearch/suncet"), PAWS),
    Paper("SimCLRv2, arXiv 2006.10029", ("SimCLRv2",), SIMCLRV2),
    Paper("SemPPL, arXiv 2301.05158", ("SemPPL",), SEMPPL),
    Paper("S4L, arXiv 1905.03670", ("S4L",), S4L),
)


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(paper) for paper in PAPERS)


def _section(paper: Paper) -> str:
    told = [_line(*row) for row in paper.rows]
    numbers = [
        _line(f"`{name}`", str(each))
        for name, recipe in recipes().items()
        for each in published_of(recipe)
        if each.source.startswith(paper.sources)
    ]
    return "\n".join([
        f"\n## {paper.title}\n",
        _line("where", "what", "recipe, setting", "status"), _line(*["---"] * 4), *told, "",
        _line("recipe", "published"), _line(*["---"] * 2), *numbers, "",
    ])  # fmt: skip


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('||', '∥') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page())
