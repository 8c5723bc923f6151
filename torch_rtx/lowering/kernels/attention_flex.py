"""The kernel of `flex_attention`: that of attention, with modifications inlined in the tile of scores.

A program goes over the blocks of keys that are listed for its block of queries: first those to which the mask applies,
then those that are seen as a whole. No other block is read.
"""

from __future__ import annotations

from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.attention import Attention, attention_of
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig, attention_configs
from torch_rtx.lowering.kernels.attention_forward import ForwardWriter, forward_kernel
from torch_rtx.lowering.kernels.attention_modified import Modified, Walk
from torch_rtx.lowering.kernels.attention_tiles import LOG2E, NEAR
from torch_rtx.lowering.kernels.emit import indent
from torch_rtx.lowering.kernels.index import constant, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.targets import Arch


def flex_configs(region: Region, arch: Arch) -> list[AttentionConfig]:
    """See `attention_configs`: those whose tiles lie within blocks."""
    attn = attention_of(region)
    found = [one for one in attention_configs(region, arch) if fits(attn, one)]
    if not found:
        raise Unsupported("blocks that no tile divides")
    return found


def fits(attn: Attention, config: AttentionConfig) -> bool:
    """Every tile lies within one block of a block mask."""
    modified = attn.modified
    if modified is None or not modified.lists:
        return True
    rows, keys = modified.size
    one_block = attn.packed > 1 or (isinstance(attn.queries, int) and attn.queries <= rows)
    return keys % config.keys == 0 and (one_block or rows % config.rows == 0)


def flex_kernel(region: Region, name: str, config: AttentionConfig) -> Kernel:
    """The kernel that computes `region`.

    Raises:
        Unsupported: see `attention_kernel` and `modified_of`; or a tile does not lie within a block.
    """
    attn = attention_of(region)
    if not fits(attn, config):
        raise Unsupported("blocks that the tile does not divide")
    return forward_kernel(_FlexWriter(region, attn, config), name)


class _FlexWriter(ForwardWriter):
    """The lines of one kernel."""

    near = NEAR

    def __init__(self, region: Region, attn: Attention, config: AttentionConfig) -> None:
        super().__init__(region, attn, config)
        assert attn.modified is not None
        self.modified: Modified = attn.modified
        self.early_masks = []
        self.starts_last = bool(attn.modified.lists)
        self.shares: int | None = None
        if attn.partial:
            assert region.anchor is not None
            shares = region.anchor.arg("shares")
            assert isinstance(shares, int)
            self.shares, share = shares, variable("share", constant(shares))
            self.programs, self.program = (shares, *self.programs), (share, *self.program)
            self.before, self.sizes_before = (share,), (constant(shares),)
            if not attn.modified.lists:  # the keys of a share end anywhere
                self.sizes |= dict.fromkeys(("N", "J"), variable("end"))

    def walk(self) -> None:
        """Loop over the listed blocks of keys."""
        attn, lines = self.attn, self.emitter.outer.lines
        if not self.modified.lists and self.shares is None:
            super().walk()
            return
        if not self.modified.lists:
            size = (attn.keys + constant(self.shares or 1) - ONE) // constant(self.shares or 1)
            lines += [f"begin = share * {size.factor}", f"end = tl.minimum(begin + {size}, {attn.keys})"]
            body = self.block(masked=True)
            lines += [f"for start in range(begin, end, {self.config.keys}):", *indent(body)]
            return
        is_one = attn.packed > 1 or (isinstance(attn.queries, int) and attn.queries <= self.modified.size[0])
        lines.append(f"part = {0 if is_one else f'first // {self.modified.size[0]}'}")
        place = self.lead[:2] if attn.packed == 1 else (*self.group[:-1], ZERO)
        for lists in self.modified.lists:
            sizes = self.modified.size[1], self.config.keys, attn.keys
            walk = Walk(lists, place, variable("part"), *sizes, self.shares)
            lines += walk.lines(self.block(masked=True))
            self.mask = None
        self.mask = attn.mask

    def numbers(self) -> dict[int, str]:
        """The statistics of rows: for the backward, and for whoever asks."""
        if self.attn.partial:
            return super().numbers()
        lines, largest = self.emitter.outer.lines, f"top * {LOG2E!r}" if self.scale_first else "top"
        none = 'total == 0, float("-inf")'
        lines.append(f"logsumexp = tl.where({none}, {largest} + tl.log2(total))[:, None]")
        lines.append(f"largest = tl.where({none}, {largest})[:, None]")
        return {1: "logsumexp", 2: "largest"}
