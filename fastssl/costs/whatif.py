"""How fast it would go elsewhere: from what a loader costs here and what a step costs on paper.

The closed form: every resource alone would allow so many images a second, and the least of these is the answer.

    loader   cores it gets / CPU seconds an image; planning is one thread's
    disk     bytes a second / bytes an image, idle while a batch is finished
    step     memory traffic / bandwidth, at the share of the roofline that such GPUs reach, plus the wait for messages

What is measured: the loader's CPU seconds an image by stage, and where a GPU is at hand its share of the roofline. What
is modelled: everything about machines that are not here.

Two small simulations tell what means cannot, and were nearer to measured runs (`tools/profile_evidence.py`):
`simulate`, of the queue between a loader and a step whose times scatter, and `render_s`, of threads that take turns at
a disk and then decode.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastssl.costs.cost import StepCost, ring_bytes

HEADLINE = "paws.rn50_100ep"
HEADLINE_RANKS = 64
CORE_SPREAD = 0.3  # how much slower or faster a core of another machine may be than one of this
GRADIENT_TAIL = 0.1  # of the gradients' messages that no computation hides; estimated


# ------------------------------------------------------------------------------------------------------- the loader


@dataclass(frozen=True)
class LoaderCost:
    """What an image of the epoch's stream costs the loader, with its share of the other streams' images.

    cpu_s          of a core, all stages together
    serial_s       of one thread, during which the others wait: planning
    decode_s       the part of cpu_s that a cache of decoded images saves of the recurring streams
    bytes_read     of files
    finish_s       the part of cpu_s after rendering, during which nothing is read
    cached_bytes_read  the part of them that such a cache saves
    batch          images that are rendered before any is finished
    sizes          files' bytes over their mean, of some: large ones keep the other threads waiting
    """

    cpu_s: float
    serial_s: float
    bytes_read: float
    decode_s: float = 0.0
    cached_bytes_read: float = 0.0
    finish_s: float = 0.0
    batch: int = 64
    sizes: tuple[float, ...] = (1.0,)

    def with_cache(self, share: float) -> LoaderCost:
        """With `share` of the recurring images kept decoded."""
        return replace(
            self,
            cpu_s=self.cpu_s - share * self.decode_s,
            bytes_read=self.bytes_read - share * self.cached_bytes_read,
        )

    def images_per_s(
        self, cores: float, disk_bytes_s: float = math.inf, threads: int | None = None
    ) -> tuple[float, str]:
        """Images a second, and what binds: "loader" or "disk". `cores` may be a fraction: what `threads` (None: as
        many) get of them; reading takes a thread but no core."""
        rendering_s = (self.cpu_s - self.serial_s - self.finish_s) / cores
        read_s = self.bytes_read / disk_bytes_s
        if read_s:
            threads = threads or math.ceil(cores)
            rendered_s = render_s([read_s * size for size in self.sizes], rendering_s * threads, threads, self.batch)
        else:
            rendered_s = rendering_s
        took_s = self.serial_s + rendered_s + self.finish_s / cores
        return 1 / took_s, "disk" if read_s > rendering_s else "loader"

    def cores_for(self, images_per_s: float) -> int | None:
        """Cores that prepare so many; None where planning alone would not keep up."""
        left_s = 1 / images_per_s - self.serial_s
        return None if left_s <= 0 else max(1, math.ceil((self.cpu_s - self.serial_s) / left_s))


@dataclass(frozen=True)
class Store:
    """A way to store the images: the bytes of one on average, and what they cost the loader."""

    bytes_per_image: float
    cost: LoaderCost


def render_s(read_s: Sequence[float], decode_s: float, threads: int, batch: int, a_task: int = 4) -> float:
    """Seconds an image of batches, whose images `threads` threads take in tasks of `a_task`: each image is read, one at
    a time over all threads, which takes as long as the next of `read_s`, over and over; then decoded and cropped, which
    takes a thread `decode_s`."""
    took_s, reads = 0.0, itertools.cycle(read_s)
    num = -(-len(read_s) // batch)
    for _ in range(num):
        tasks = [min(a_task, batch - begin) for begin in range(0, batch, a_task)]
        turns = [(0.0, thread, 0) for thread in range(threads)]  # (free since, thread, images left of its task)
        disk_free = end = 0.0
        while turns:
            now, thread, left = heapq.heappop(turns)
            if not left and not tasks:
                continue
            left = left or tasks.pop(0)
            disk_free = max(disk_free, now) + next(reads)
            end = max(end, disk_free + decode_s)
            heapq.heappush(turns, (disk_free + decode_s, thread, left - 1))
        took_s += end
    return took_s / (num * batch)


def simulate(prepare_s: Sequence[float], consume_s: Sequence[float], depth: int) -> float:
    """Batches a second of a loader that is `depth` batches ahead at most, beside one that it is working on; each takes
    as long as the next of `prepare_s`, and the step as the next of `consume_s`, both over and over."""
    num = 20 * max(len(prepare_s), len(consume_s), 50)
    taken = [0.0] * num  # when the step takes batch i
    begin = free = 0.0  # when the loader begins the next batch, and the step is done with the last
    for i in range(num):
        ready = begin + prepare_s[i % len(prepare_s)]
        put = max(ready, taken[i - depth] if i >= depth else 0.0)
        taken[i] = max(put, free)
        free = taken[i] + consume_s[i % len(consume_s)]
        begin = put
    half = num // 2
    return (num - half) / (free - taken[half])


# ------------------------------------------------------------------------------------------------------- the cluster


@dataclass(frozen=True)
class Cluster:
    """GPUs, and what is assumed about them.

    bandwidth_bytes_s  of a GPU's memory, by its datasheet
    roofline       (low, middle, high) share of what that bandwidth allows a step of fused kernels: low our own aim or
                   less, middle PyTorch's as others published it, high MLPerf's
    message_s      one small all-reduce; bus_bytes_s  what a ring moves past each rank
    cores          for each GPU
    """

    name: str
    ranks: int
    bandwidth_bytes_s: float
    roofline: tuple[float, float, float]
    message_s: float
    bus_bytes_s: float
    cores: int
    source: str


CLUSTERS = (
    Cluster("64 V100-16G, 100 Gb/s a host", 64, 0.9e12, (0.30, 0.39, 0.53), 300e-6, 11e9, 10,
            "DLE-PyTorch 1,040, MLPerf 0.7 1,398 images/s a GPU; latency estimated for a ring"),
    Cluster("8 A100-80G, NVLink", 8, 2.04e12, (0.27, 0.35, 0.60), 33.7e-6, 200e9, 16,
            "DLE-PyTorch 2,078, MLPerf 3.0 3,576 images/s a GPU; latency nccl-tests#123"),
    Cluster("8 H100-80G, NVLink", 8, 3.35e12, (0.22, 0.28, 0.73), 33.7e-6, 350e9, 16,
            "Lambda-PyTorch 2,757, MLPerf 4.0 7,160 images/s a GPU; latency as 8 A100's"),
    Cluster("8 H200-141G, NVLink", 8, 4.8e12, (0.22, 0.30, 0.57), 33.7e-6, 350e9, 16,
            "our least aim 4,215, MLPerf 4.0 7,950 images/s a GPU; latency as 8 A100's"),
    Cluster("64 H100-80G, 400 Gb/s a GPU", 64, 3.35e12, (0.18, 0.25, 0.50), 47e-6, 300e9, 16,
            "smaller shards than 8 H100's; MLPerf 4.0 4,908 images/s a GPU; latency nccl#1244"),
)  # fmt: skip


@dataclass(frozen=True)
class Projection:
    """The headline job on a cluster. Seconds of one step; each alone, then the step as the longest of them."""

    cluster: Cluster
    compute_s: float
    messages_s: float
    loader_s: float | None
    disk_s: float | None

    @property
    def gpu_s(self) -> float:
        return self.compute_s + self.messages_s

    @property
    def step_s(self) -> float:
        return max(self.gpu_s, self.loader_s or 0.0, self.disk_s or 0.0)

    @property
    def binding(self) -> str:
        parts = {"GPU memory traffic": self.compute_s, "messages": self.messages_s}
        gpu = max(parts, key=parts.__getitem__)
        return max({gpu: self.gpu_s, "loader": self.loader_s or 0.0, "disk": self.disk_s or 0.0}.items(),
                   key=lambda item: item[1])[0]  # fmt: skip


def project(
    cost: StepCost,
    cluster: Cluster,
    loader: LoaderCost | None,
    images: int,
    roofline: float | None = None,
    disk_bytes_s: float | None = None,
    core_speed: float = 1.0,
) -> Projection:
    """The step of `cost` (of any number of ranks), `images` of the epoch's stream, on the cluster."""
    traffic_bytes = cost.traffic_bytes * cost.world / cluster.ranks
    compute_s = traffic_bytes / (cluster.bandwidth_bytes_s * (roofline or cluster.roofline[1]))
    moved = sum(ring_bytes(op, size, cluster.ranks) for op, (_, size) in cost.rows.items())
    tail = GRADIENT_TAIL * ring_bytes("all_reduce", cost.gradient_bytes, cluster.ranks)
    messages_s = cost.num_statistics_messages * cluster.message_s + (moved + tail) / cluster.bus_bytes_s
    loader_s = disk_s = None
    if loader is not None:
        loader_s = images / cluster.ranks / loader.images_per_s(cluster.cores * core_speed)[0]
        disk_s = images * loader.bytes_read / disk_bytes_s if disk_bytes_s else None
    return Projection(cluster, compute_s, messages_s, loader_s, disk_s)


def described(
    cost: StepCost,
    cluster: Cluster,
    loader: LoaderCost | None,
    images: int,
    images_an_epoch: int,
    measured_roofline: float | None = None,
) -> dict[str, Any]:
    """A row of the table: hours for 100 epochs with low and high, images a second, what binds."""
    low, middle, high = cluster.roofline
    if measured_roofline is not None:  # of a GPU at hand: others are supposed to do as well
        low, middle, high = 0.8 * measured_roofline, measured_roofline, 1.2 * measured_roofline

    def at(share: float, core_speed: float) -> Projection:
        return project(cost, cluster, loader, images, share, core_speed=core_speed)

    found = at(middle, 1.0)
    steps = 100 * (images_an_epoch // images)

    def hours(p: Projection) -> float:
        return steps * p.step_s / 3600

    return {
        "machine": cluster.name,
        "ranks": cluster.ranks,
        "hours_per_100_epochs": hours(found),
        "hours_low": hours(at(high, 1 + CORE_SPREAD)),
        "hours_high": hours(at(low, 1 - CORE_SPREAD)),
        "unlabelled_images_per_s": images / found.step_s,
        "image_equivalents_per_s": cost.image_equivalents / found.step_s,
        "step_s": found.step_s,
        "compute_s": found.compute_s,
        "messages_s": found.messages_s,
        "loader_s": found.loader_s,
        "loader_cores_needed_per_gpu": None
        if loader is None
        else loader.cores_for(images / found.gpu_s / cluster.ranks),
        "binding": found.binding,
        "assumed": asdict(cluster),
    }


def over_ranks(cost: StepCost, loader: LoaderCost | None, images: int, images_an_epoch: int) -> list[dict[str, Any]]:
    """64 H100s' kind from 8 to 1,024 ranks, latency growing by the logarithm of their number: on paper, where
    1,024 ranks have four images each."""
    base = CLUSTERS[-1]
    rows = []
    for ranks in (8, 16, 32, 64, 128, 256, 512, 1024):
        latency_s = base.message_s * max(1.0, math.log2(ranks) / math.log2(base.ranks))
        cluster = replace(base, name=f"{ranks:,} H100-80G", ranks=ranks, message_s=latency_s)
        rows.append(described(cost, cluster, loader, images, images_an_epoch))
    return rows


def around(
    loader: LoaderCost,
    step_images_per_s: float,
    cores: int,
    efficiency: float,
    caches: Mapping[str, float],
    loaders: Mapping[str, LoaderCost],
    stores: Mapping[str, Store],
) -> dict[str, list[dict[str, Any]]]:
    """What this machine would do with other cores, loaders, disks, caches and stores: images a second and what binds.

    `efficiency`: what a core is worth when all are busy. `caches`: share of recurring images kept, by name. `loaders`:
    what others were measured to cost. `stores`: ways to store the images, the present one first; each with what it
    asks for to keep up with the step (where none was measured, with what the loader does now): bytes a second of a
    disk, when no image comes from memory, and cores, which are kept busy all the time.
    """

    def row(name: str, cost: LoaderCost, cores: int, disk_bytes_s: float = math.inf) -> dict[str, Any]:
        prepared, binding = cost.images_per_s(cores * efficiency, disk_bytes_s, cores)
        rate = min(prepared, step_images_per_s)
        return {
            "what": name,
            "loader_images_per_s": prepared,
            "images_per_s": rate,
            "binding": "step" if step_images_per_s <= prepared else binding,
        }

    def stored(name: str, store: Store) -> dict[str, Any]:
        wanted = step_images_per_s if math.isfinite(step_images_per_s) else loader.images_per_s(cores * efficiency)[0]
        return {
            **row(name, store.cost, cores),
            "bytes_per_image": store.bytes_per_image,
            "wanted_images_per_s": wanted,
            "disk_bytes_per_s": wanted * store.cost.bytes_read,
            "cores": wanted * store.cost.cpu_s,
            "cores_saved": wanted * (loader.cpu_s - store.cost.cpu_s),
        }

    disks = {"hard disk, 150 MB/s": 150e6, "SATA SSD, 500 MB/s": 500e6, "network, 1.2 GB/s": 1.2e9, "NVMe, 5 GB/s": 5e9}
    return {
        "cores": [row(f"{n} core{'s' * (n > 1)}", loader, n) for n in (1, 2, 4, 8, 16, 32, 64)],
        "loaders": [row(name, cost, cores) for name, cost in loaders.items()],
        "disks": [row(name, loader, cores, rate) for name, rate in disks.items()] if loader.bytes_read else [],
        "caches": [row(name, loader.with_cache(share), cores) for name, share in caches.items()],
        "stores": [stored(name, store) for name, store in stores.items()],
    }
