"""The functions of an artifact as the outside sees them: arguments, the cache, results, fences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from compile.mlir import Builder, Dim, Tensor, tensor_type

MAX_ARGUMENT_SIZE = 1 << 22


@contextmanager
def function(
    b: Builder, name: str, n: int, page_size: int, num_summed: int
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """`prefill` or `decode` for n rows; with `_next`, one that takes scales and sums logits up.

    Yields the arguments but the cache, and whether it is such a one: then it has `num_summed`
    results.
    """
    is_next = name.endswith("_next")
    shapes = _shapes(name, n, page_size)
    num_results = num_summed if is_next else 1
    signature = ", ".join(f"%{a}: !hal.buffer_view" for a in [*shapes, "cache"])
    with b.block(
        f'util.func public @"{name}_bs{n}$async"({signature}, %wait: !hal.fence, '
        f"%signal: !hal.fence) -> ({', '.join(['!hal.buffer_view'] * num_results)}) attributes "
        f'{{inlining_policy = #util.inline.never, iree.abi.model = "coarse-fences", '
        f"iree.abi.stub}} {{"
    ):
        yield {a: _import_tensor(b, a, *s) for a, s in shapes.items()}, is_next


def _shapes(name: str, n: int, page_size: int) -> dict[str, tuple[tuple[Dim, ...], str]]:
    """Shapes and dtypes in order; "%8" is a dynamic size that is a multiple of 8."""
    is_decode = name.startswith("decode")
    shapes: dict[str, tuple[tuple[Dim, ...], str]] = {
        "tokens": ((n, 1 if is_decode else f"%{page_size}"), "i64")
    }
    for lens in ("seq_lens", "start_pos") if is_decode else ("start_pos", "seq_lens"):
        shapes[lens] = ((n,), "i64")
    shapes["seq_block_ids"] = ((n, "%1"), "i64")
    if name.endswith("_next"):
        shapes["scales"] = ((n,), "f32")
    return shapes


def _import_tensor(b: Builder, name: str, shape: Sequence[Dim], dtype: str) -> Tensor:
    sizes = tuple(
        _dynamic_size(b, name, axis, int(d[1:])) if isinstance(d, str) else d
        for axis, d in enumerate(shape)
    )
    dynamic = ", ".join(d for d in sizes if isinstance(d, str))
    return b.tensor(
        f"hal.tensor.import wait(%wait) => %{name} : !hal.buffer_view -> "
        f"{tensor_type(sizes, dtype)}" + (f"{{{dynamic}}}" if dynamic else ""),
        sizes,
        dtype,
    )


def _dynamic_size(b: Builder, name: str, axis: int, multiple: int) -> str:
    """The size of one dimension of an argument, promised to be a multiple of `multiple`."""
    size = b.op(f"hal.buffer_view.dim<%{name} : !hal.buffer_view>[{axis}] : index", "index")
    limit = MAX_ARGUMENT_SIZE
    return b.op(
        f"util.assume.int {size.name}<umin = {multiple}, umax = {limit - limit % multiple}"
        f"{f', udiv = {multiple}' if multiple > 1 else ''}> : index",
        "index",
    ).name


def import_cache(b: Builder, page_elements: int, dtype: str) -> Tensor:
    """The cache [pages, page_elements]; consumed, so that updates happen in place."""
    pages = b.op("hal.buffer_view.dim<%cache : !hal.buffer_view>[0] : index", "index")
    kind = tensor_type(("?", page_elements), dtype)
    return b.tensor(
        f"hal.tensor.import wait(%wait) => consume %cache : !hal.buffer_view -> "
        f"{kind}{{{pages.name}}}",
        (pages.name, page_elements),
        dtype,
    )


def return_results(b: Builder, results: Sequence[Tensor], cache: Tensor) -> None:
    """Store the cache [pages, page_elements] back into its argument; return when all is ready."""
    alias = b.fresh()
    b.emit(
        f"{alias} = hal.tensor.alias wait(%wait) => {cache.name} : {cache.type}"
        f"{{{cache.shape[0]}}} to %cache : !hal.buffer_view"
    )
    ready = b.fresh()
    b.emit(
        f"{ready}:{len(results) + 1} = hal.tensor.barrier join("
        f"{', '.join([*(r.name for r in results), alias])} : "
        f"{', '.join([*(r.type for r in results), cache.type])}) => %signal : !hal.fence"
    )
    views = []
    for i, result in enumerate(results):
        dynamic = ", ".join(d for d in result.shape if isinstance(d, str))
        views.append(b.fresh())
        b.emit(
            f"{views[-1]} = hal.tensor.export {ready}#{i} : {result.type}"
            f"{f'{{{dynamic}}}' if dynamic else ''} -> !hal.buffer_view"
        )
    b.emit(f"util.return {', '.join(views)} : {', '.join(['!hal.buffer_view'] * len(views))}")
