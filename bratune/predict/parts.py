"""Parts: the kernels of every part of a block, of a whole block and of a whole model.

Part names are those of `bratune.cell.PARTS`. Sizes come from the published layouts (`bratune.variant`).
`products` is the one list of what a block multiplies by weights; here it becomes kernels, with what a
machine adds to it (whole tiles, bytes, launches), and in `bratune.work.count` multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass

from bratune import variant as variants
from bratune.cell import Cell
from bratune.errors import UnsupportedError
from bratune.predict import attention, work
from bratune.predict.work import Op
from bratune.problem import Problem
from bratune.variant import Stage, Variant

__all__ = [
    "BlockShape",
    "Group",
    "Product",
    "block_of",
    "groups",
    "model_blocks",
    "part_ops",
    "products",
    "stage_block",
]

# The side of the convolution in the place of attention (official top-k 0).
CONV_SIDE = 5
# Parts that a block consists of: both norms are one part, and a part that ends with a residual addition
# includes it, so that the parts add up to the block.
BLOCK_PARTS = ("pos_embed", "norm", "qkv", "routing", "attention", "lepe", "proj", "mlp")


@dataclass(frozen=True)
class Group:
    """Kernels that share a calibration: one part, or one backend's attention.

    Attributes:
        name: The part, or the backend's name for attention.
        ops: Its kernels, forward.
        times: How often the cell runs them.
        problem: The routed call that they compute, for attention.
    """

    name: str
    ops: tuple[Op, ...]
    times: int = 1
    problem: Problem | None = None


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """One block in numbers.

    Attributes:
        problem: Its attention call; None for a block without attention.
        backend: Who computes that call.
        rows: Tokens of the batch, unpadded.
        projected_rows: Tokens that projections and LePE see: with padding where the module pads its input,
            without where it pads queries, keys and values.
        dim: Channels.
        mlp_ratio: Hidden over outer channels of the MLP.
        side: Side of the LePE convolution.
        item: Bytes of a number.
        kind: ``routed``, ``full`` or ``conv``.
        pos_embed: Whether it adds a position embedding.
        local: Whether a depthwise convolution enhances the values, or stands in the place of attention.
    """

    problem: Problem | None
    backend: str
    rows: int
    projected_rows: int
    dim: int
    mlp_ratio: int
    side: int
    item: int
    kind: str = "routed"
    pos_embed: bool = True
    local: bool = True


@dataclass(frozen=True)
class Product:
    """A linear layer, or a depthwise convolution.

    Attributes:
        name: What it computes.
        rows: Tokens of the batch.
        inner: Channels that an output sums over; 1 of a depthwise convolution.
        outer: Channels that it writes.
        taps: Positions that an output sums over.
    """

    name: str
    rows: int
    inner: int
    outer: int
    taps: int = 1

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.rows * self.inner * self.outer * self.taps


def block_of(cell: Cell) -> BlockShape:
    """The block that a part's cell belongs to; a bare call gets a block of its own sizes."""
    p = cell.problem
    plain = BlockShape(
        problem=p,
        backend=cell.backend,
        rows=p.batch * p.tokens,
        projected_rows=p.batch * p.tokens,
        dim=p.channels,
        mlp_ratio=3,
        side=5,
        item=p.item_bytes,
    )
    if cell.model not in variants.VARIANTS or not cell.stage:
        return plain
    variant = variants.get_variant(cell.model)
    height, width = variant.maps(*cell.image)[cell.stage - 1] if cell.image[0] else (p.height, p.width)
    topk = int(cell.topk or variant.topks[cell.stage - 1])
    return BlockShape(
        problem=p,
        backend=cell.backend,
        rows=p.batch * height * width,
        projected_rows=plain.projected_rows,
        dim=variant.dims[cell.stage - 1],
        mlp_ratio=variant.mlp_ratio,
        side=variant.side_dwconv,
        item=p.item_bytes,
        kind="full" if topk < 0 else "routed",
        pos_embed=variant.layout == "biformer",
        local=_enhances(variant, topk),
    )


def stage_block(
    variant: Variant, stage: Stage, batch: int = 1, *, backend: str = "", item: int = 0
) -> BlockShape:
    """One of the blocks of a stage.

    Args:
        variant: The model that the stage belongs to.
        stage: The stage; its problem's batch says how large that is, and nothing else.
        batch: Images.
        backend: Who attends.
        item: Bytes of a number.
    """
    tokens = stage.height * stage.width
    return BlockShape(
        problem=stage.problem,
        backend=backend,
        rows=batch * tokens,
        projected_rows=batch * (tokens if stage.problem is None else stage.problem.tokens),
        dim=stage.dim,
        mlp_ratio=variant.mlp_ratio,
        side=variant.side_dwconv if stage.problem is not None else CONV_SIDE,
        item=item,
        kind=stage.kind,
        pos_embed=variant.layout == "biformer",
        local=_enhances(variant, stage.topk),
    )


def _enhances(variant: Variant, topk: int) -> bool:
    """Whether a block has a depthwise convolution beside its 3x3 one; full attention of top-k -1 has none."""
    return topk != -1 or variant.layout == "stl_nchw"


def products(block: BlockShape) -> dict[str, tuple[Product, ...]]:
    """What a block multiplies by weights, by part; products of two activations are the problem's."""
    dim, hidden, rows = block.dim, block.dim * block.mlp_ratio, block.projected_rows
    found = {
        "qkv": (Product("q, k, v", rows, dim, 3 * dim),),
        "proj": (Product("projection", rows, dim, dim),),
        "mlp": (
            Product("first linear", block.rows, dim, hidden),
            Product("second linear", block.rows, hidden, dim),
        ),
    }
    if block.kind == "conv":
        found["qkv"] = (Product("first 1x1", rows, dim, dim),)
    if block.pos_embed:
        found["pos_embed"] = (Product("depthwise, 9 taps", block.rows, 1, dim, 9),)
    if block.local:
        taps = block.side**2
        found["lepe"] = (Product(f"depthwise, {taps} taps", rows, 1, dim, taps),)
    return found


def part_ops(block: BlockShape, part: str) -> tuple[Op, ...]:
    """The kernels of one part of a block, forward.

    Raises:
        UnsupportedError: the backend is not one whose work is counted.
    """
    p, item = block.problem, block.item
    map_bytes = float(block.rows * block.dim * item)
    if part == "attention":
        return _attention(block)
    if part == "routing":
        return attention.routing_ops(p) if p is not None and block.kind == "routed" else ()
    if part == "norm":
        norm = work.elementwise(
            "layer norm", map_bytes, map_bytes, cold=map_bytes, item=item, slots=8, rate="layer-norm"
        )
        return norm, norm
    ops = tuple(_product_op(one, item, cold=not i) for i, one in enumerate(products(block).get(part, ())))
    if not ops:
        return ()
    if part == "mlp":
        hidden = float(block.rows * block.dim * block.mlp_ratio * item)
        gelu = work.elementwise("GELU", hidden, hidden, item=item, slots=12)
        return ops[0], gelu, ops[1], _add("residual", map_bytes, item)
    if part == "pos_embed":
        return *ops, _add("add position", map_bytes, item)
    if part == "lepe" and block.kind != "conv":
        return *ops, _add("add LePE", float(block.projected_rows * block.dim * item), item)
    return (*ops, _add("residual", map_bytes, item)) if part == "proj" else ops


def _product_op(product: Product, item: int, *, cold: bool) -> Op:
    rows, inner, outer = product.rows, product.inner, product.outer
    if inner > 1:
        return work.matmul(product.name, rows, inner, outer, item, cold=cold)
    size = float(rows * outer)
    return work.conv_op(product.name, size, size, product.taps, item, depthwise=True)


def _add(name: str, size: float, item: int) -> Op:
    return work.elementwise(name, 2 * size, size, item=item)


def _attention(block: BlockShape) -> tuple[Op, ...]:
    if block.problem is None:
        return ()
    if block.kind == "full":
        return attention.full_attention_ops(block.problem, composed=block.backend in attention.COMPOSED)
    try:
        return attention.attention_ops(block.problem, block.backend)
    except KeyError:
        known = ", ".join(attention.ATTENTION)
        raise UnsupportedError(
            block.backend, [f"what it moves and multiplies is not counted; these backends are: {known}"]
        ) from None


def _block_groups(block: BlockShape, times: int) -> list[Group]:
    found = [_group(block, part, times) for part in BLOCK_PARTS]
    return [group for group in found if group.ops]


def groups(cell: Cell) -> tuple[Group, ...]:
    """The kernels of a cell, forward, by what they are calibrated with.

    Raises:
        UnsupportedError: see `part_ops`.
    """
    if cell.part == "model":
        return _model_groups(cell)
    block = block_of(cell)
    if cell.part == "block":
        return tuple(_block_groups(block, 1))
    return (_group(block, cell.part, 1),)


def _group(block: BlockShape, part: str, times: int) -> Group:
    if part != "attention":
        return Group(part, part_ops(block, part), times)
    routed = block.problem if block.kind == "routed" else None
    return Group(block.backend, part_ops(block, part), times, routed)


# --- whole models ------------------------------------------------------------------------------------


def model_stages(cell: Cell) -> tuple[Variant, tuple[Stage, ...]]:
    """The stages of a ``model`` cell, rebuilt from its S and top-k per stage."""
    variant, p = variants.get_variant(cell.model), cell.problem
    count = len(variant.dims)
    windows = [int(n) for n in cell.n_win.split(",") if n]
    topks = [int(k) for k in cell.topk.split(",") if k]
    found = variants.stages(
        variant,
        *cell.image,
        batch=p.batch,
        n_win=(windows * count)[:count] if len(windows) == 1 else windows or 7,
        topks=topks or None,
        dtype=p.dtype,
        direction=p.direction,
    )
    return variant, found


def model_blocks(cell: Cell) -> tuple[tuple[BlockShape, int], ...]:
    """One block per stage of a model, with how often it is repeated."""
    variant, found = model_stages(cell)
    names = [name.strip() for name in cell.backend.split(",")]
    names = names * len(found) if len(names) == 1 else names
    item = cell.problem.item_bytes
    blocks = []
    for stage, backend in zip(found, names + names[-1:] * (len(found) - len(names)), strict=True):
        block = stage_block(variant, stage, cell.problem.batch, backend=backend, item=item)
        blocks.append((block, stage.blocks))
    return tuple(blocks)


def _model_groups(cell: Cell) -> tuple[Group, ...]:
    """Stem, blocks, downsampling and head."""
    variant, found = model_stages(cell)
    batch, item = cell.problem.batch, cell.problem.item_bytes
    parts = [Group("stem", _stem(variant, cell, found[0]))]
    for i, (block, repeats) in enumerate(model_blocks(cell)):
        if i:
            parts.append(Group("downsample", _downsample(found[i - 1], found[i], batch, item)))
        parts += _block_groups(block, repeats)
    last = found[-1]
    features = float(batch * last.height * last.width * last.dim * item)
    head = (
        work.elementwise("final norm", features, features, item=item, rate="layer-norm"),
        work.matmul("head", batch, last.dim, 1000, item),
    )
    return (*parts, Group("head", head))


def _norm(stage_elements: float, item: int) -> Op:
    return work.elementwise(
        "batch norm", stage_elements * item, stage_elements * item, item=item, slots=4, rate="batch-norm"
    )


def _stem(variant: Variant, cell: Cell, first: Stage) -> tuple[Op, ...]:
    batch, item = cell.problem.batch, cell.problem.item_bytes
    image = float(batch * 3 * cell.image[0] * cell.image[1])
    out = float(batch * first.height * first.width * first.dim)
    if variant.layout != "biformer":
        return (work.conv_op("patches", image, out, 48, item, depthwise=False, channels=3), _norm(out, item))
    middle = out * 2  # half the channels on four times the positions
    return (
        work.conv_op("stem 1", image, middle, 27, item, depthwise=False, channels=3),
        _norm(middle, item),
        work.elementwise("GELU", middle * item, middle * item, item=item, slots=12),
        work.conv_op(
            "stem 2", middle, out, 9 * first.dim // 2, item, depthwise=False, channels=first.dim // 2
        ),
        _norm(out, item),
    )


def _downsample(before: Stage, after: Stage, batch: int, item: int) -> tuple[Op, ...]:
    elements_in = float(batch * before.height * before.width * before.dim)
    elements_out = float(batch * after.height * after.width * after.dim)
    conv = work.conv_op(
        "downsample",
        elements_in,
        elements_out,
        9 * before.dim,
        item,
        depthwise=False,
        channels=before.dim,
    )
    return conv, _norm(elements_out, item)
