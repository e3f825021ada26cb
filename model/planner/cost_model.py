"""What a training step on many ranks should cost: bytes and operations of each part over what a machine moves and does.

A step of rank r, global batch B on N ranks, b = B / N rows each, W_r the widths of its pieces:

    MLPs          6 M b operations (forward 2, backward 4; M: weights), over the matrix rate
    interaction   forward and backward read and write its inputs and outputs, over the memory bandwidth
    tables        B W_r numbers looked up and written out, gradients and rows read, rows written; over the bandwidth
    vectors       sent: B W_r (N - 1) / N numbers, received: b sum of W_s of the other ranks; each way, over the link
    all-reduce    2 (N - 1) / N of the MLPs' and the replicated tables' gradients, over the link

Vectors hide behind the bottom MLP's forward, their gradients behind its backward, the all-reduce behind the backward of
the interaction and the bottom MLP, ids behind the step before; what does not fit there is exposed and counts. The
slowest rank's time is the step's. Loading data and evaluation are left out.
"""

from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.planner.plan import NUMBER, STATE_NUMBERS, Plan, whole


@dataclass(frozen=True)
class Machine:
    """What one rank's device has and does. memory: bytes for everything; stream: bytes/s of copying in its memory;
    matrix: operations/s of large matrix products; link: bytes/s to ranks of its node, each way; network: to others;
    latency: seconds of a collective over nothing; per_node: ranks of a node; overhead: seconds a step that neither
    bytes nor operations explain (launches, small kernels)."""

    name: str
    memory: float
    stream: float
    matrix: float
    link: float
    network: float
    latency: float = 20e-6
    per_node: int = 8
    overhead: float = 100e-6

    def link_to(self, world: int) -> float:
        """Bytes/s, each way, of an exchange among `world` ranks: the share that leaves the node goes by the network."""
        if world <= self.per_node:
            return self.link
        outside = (world - self.per_node) / (world - 1)
        return 1 / max(outside / self.network, (1 - outside) / self.link)


# Shares of the peaks in the makers' data sheets that real steps reach: memory 0.8 for gathered rows of 256 B and more,
# bf16 matrices 0.45 at MLP sizes, NVLink 0.75 for all-to-all, network 0.8. The network is one 400 Gb/s card a GPU.
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("a100", 80e9 * 0.92, 2.0e12 * 0.8, 312e12 * 0.45, 300e9 * 0.75, 25e9 * 0.8),
        Machine("h100", 80e9 * 0.92, 3.35e12 * 0.8, 989e12 * 0.45, 450e9 * 0.75, 50e9 * 0.8),
        Machine("h200", 141e9 * 0.92, 4.8e12 * 0.8, 989e12 * 0.45, 450e9 * 0.75, 50e9 * 0.8),
        Machine("b200", 180e9 * 0.92, 8.0e12 * 0.8, 2250e12 * 0.45, 900e9 * 0.75, 50e9 * 0.8),
        Machine("cpu", 16e9, 10e9, 100e9, 2e9, 1e9, 200e-6, 64, 1e-3),
    )
}


@dataclass(frozen=True)
class Job:
    """What is trained: batch_size: global; optimizer: of the tables; wire: bytes of a number on the wire; activation:
    bytes of a number in the MLPs (2 with bf16 or fp16)."""

    config: ModelConfig
    batch_size: int
    optimizer: str = "sgd"
    wire: int = NUMBER
    activation: int = 2

    def layers(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(inputs, outputs) of the bottom MLP's layers, and of all that comes after it."""
        config = self.config
        bottom = _chain(config.num_numerical_features, config.bottom_mlp_sizes)
        vectors, dim = 1 + len(config.categorical_feature_sizes), config.embedding_dim
        if config.interaction_op == "dot":
            width = dim + vectors * (vectors + (1 if config.self_interaction else -1)) // 2 + 1
            return bottom, _chain(width, config.top_mlp_sizes)
        width, rank = vectors * dim, config.dcn_low_rank_dim
        cross = [(width, rank), (rank, width)] * config.dcn_num_layers if config.interaction_op == "dcnv2" else []
        return bottom, [*cross, *_chain(width, config.top_mlp_sizes)]

    @property
    def dense_numbers(self) -> int:
        """Parameters of the MLPs and the interaction."""
        return sum(i * o + o for part in self.layers() for i, o in part)


def _chain(inputs: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip((inputs, *sizes[:-1]), sizes, strict=True))


@dataclass(frozen=True)
class Cost:
    """Of one rank: gigabytes it holds; milliseconds of a step by part; exposed: of the exchange and the all-reduce,
    what nothing hides; bytes_sent: a step's vectors, gradients, ids and all-reduce."""

    gigabytes: float
    mlps: float
    interaction: float
    tables: float
    vectors: float
    all_reduce: float
    exposed: float
    overhead: float
    bytes_sent: float

    @property
    def milliseconds(self) -> float:
        """Of the step."""
        return self.mlps + self.interaction + self.tables + self.exposed + self.overhead


def table_bytes(job: Job, rows: int, width: int) -> int:
    """Bytes of a piece and of what its optimiser remembers."""
    element, row = STATE_NUMBERS[job.optimizer]
    return NUMBER * rows * (width * (1 + element) + row)


def fixed_bytes(plan: Plan, job: Job) -> int:
    """Bytes of what every rank holds beside its pieces: replicated tables with their dense gradient, the MLPs with
    gradient, bucket and optimiser, activations, buffers of vectors and gradients on the receiving side."""
    copies = sum(table_bytes(job, plan.sizes[t], plan.dim) + NUMBER * plan.sizes[t] * plan.dim for t in plan.replicated)
    b = -(-job.batch_size // plan.world)
    activations = 2 * b * job.activation * sum(o for part in job.layers() for _, o in part)
    wires = 2 * b * (NUMBER + job.wire) * sum(piece.width for piece in plan.pieces)
    return copies + 5 * NUMBER * job.dense_numbers + activations + wires


def rank_bytes(plan: Plan, job: Job, rank: int) -> int:
    """Bytes that a rank needs in all."""
    pieces = plan.of(rank)
    held = sum(table_bytes(job, p.rows + 1, p.width) for p in pieces)
    out = 2 * job.batch_size * (NUMBER + job.wire) * sum(p.width for p in pieces) if plan.world > 1 else 0
    return held + out + fixed_bytes(plan, job)


def exchange_bytes(plan: Plan, job: Job, rank: int) -> dict[str, int]:
    """Bytes that a rank sends to others a step: the least that the plan needs. A ring's all-reduce: 2 (N - 1) / N."""
    world, b = plan.world, -(-job.batch_size // plan.world)
    own = plan.of(rank)
    there = [piece for piece in plan.pieces if piece.rank != rank]
    rows = sum(plan.sizes[t] for t in plan.replicated)
    counts = 1 if job.optimizer == "adam" else 0
    copies = rows * (plan.dim + counts) * NUMBER
    return {
        "ids": b * len(there) * 4,
        "vectors": (world - 1) * b * sum(p.width for p in own) * job.wire,
        "gradients": b * sum(p.width for p in there) * job.wire,
        "all_reduce": 2 * (world - 1) * (copies + NUMBER * job.dense_numbers) // world,
    }


def rank_cost(plan: Plan, job: Job, machine: Machine, rank: int) -> Cost:
    """What a step costs one rank."""
    world, b, link = plan.world, job.batch_size / plan.world, machine.link_to(plan.world)
    bottom, rest = ([i * o for i, o in part] for part in job.layers())
    width, numbers = sum(p.width for p in plan.of(rank)), len(plan.sizes) * plan.dim
    bottom_forward = 2 * b * sum(bottom) / machine.matrix
    mlps = 3 * bottom_forward + 6 * b * sum(rest) / machine.matrix
    # Forward reads the vectors and writes the top MLP's input; backward reads both and writes the vectors' gradients.
    top_input = job.layers()[1][0][0]
    interaction = b * (3 * (numbers + plan.dim) + 2 * top_input) * job.activation / machine.stream
    # A look-up reads and writes; the update reads the gradient, reads and writes the row (and what is remembered).
    element, row = STATE_NUMBERS[job.optimizer]
    each = NUMBER * (5 + 2 * element) + (2 * NUMBER * row / plan.dim)
    copies = len(plan.replicated) * plan.dim
    replicated = sum(plan.sizes[t] for t in plan.replicated) * plan.dim * NUMBER * (4 + 2 * element)
    tables = (job.batch_size * width * each + b * copies * 4 * NUMBER + replicated) / machine.stream
    sent = exchange_bytes(plan, job, rank)
    if world == 1:
        return _cost(plan, job, rank, machine, mlps, interaction, tables, 0.0, 0.0, 0.0, 0)
    # Packing and unpacking pass through memory once more on both sides.
    tables += 2 * (sent["vectors"] + sent["gradients"]) / machine.stream
    one_way = max(sent["vectors"], sent["gradients"]) / link + machine.latency
    all_reduce = sent["all_reduce"] / link + machine.latency
    hidden = [bottom_forward, 2 * bottom_forward, 2 * bottom_forward + interaction / 2]
    exposed = sum(max(0.0, t - h) for t, h in zip((one_way, one_way, all_reduce), hidden, strict=True))
    total = sum(sent.values())
    return _cost(plan, job, rank, machine, mlps, interaction, tables, 2 * one_way, all_reduce, exposed, total)


def _cost(plan, job, rank, machine, mlps, interaction, tables, vectors, all_reduce, exposed, sent) -> Cost:
    seconds = (mlps, interaction, tables, vectors, all_reduce, exposed, machine.overhead)
    return Cost(rank_bytes(plan, job, rank) / 1e9, *(1e3 * part for part in seconds), sent)


def costs(plan: Plan, job: Job, machine: Machine) -> list[Cost]:
    """Of every rank."""
    return [rank_cost(plan, job, machine, rank) for rank in range(plan.world)]


def step_seconds(plan: Plan, job: Job, machine: Machine) -> float:
    """Of the slowest rank."""
    return max(cost.milliseconds for cost in costs(plan, job, machine)) / 1e3


def alone(job: Job, machine: Machine) -> float:
    """Seconds of a step of one process without any plan; its memory is taken to suffice."""
    plan = whole(1, job.config, [0] * len(job.config.categorical_feature_sizes))
    return step_seconds(plan, job, replace(machine, memory=float("inf")))
