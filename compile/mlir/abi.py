"""The ABI of an artifact's functions: names, arguments, the KV cache, results and fences.

Every function is asynchronous: it takes two fences, one to wait for and one to signal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from compile.mlir.builder import Builder, Dim, Tensor, tensor_type

MAX_ARGUMENT_SIZE = 1 << 22  # of a dynamic dimension


@contextmanager
def function(
    b: Builder, name: str, n: int, page_size: int, hidden_size: int, num_summed: int
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Write the function `name` for n sequences; its body is what is emitted inside.

    "prefill" and "decode" return logits of all tokens. With "_next" they take `scales`, the inverse
    temperatures, and return `num_summed` results: logits after the last tokens, and summaries of
    them. With "_embeds" they take embeddings, too, for tokens that are negative.

    Yields the arguments by name, without the cache, and whether the name ends in "_next".
    """
    is_next = name.endswith("_next")
    shapes = _shapes(name, n, page_size, hidden_size)
    with _function(b, f"{name}_bs{n}", [*shapes, "cache"], num_summed if is_next else 1):
        yield {a: _import_tensor(b, a, *s) for a, s in shapes.items()}, is_next


@contextmanager
def image_function(b: Builder, n: int, image_size: int) -> Iterator[Tensor]:
    """Write the function `encode_image`, which returns embeddings of n tiles of images.

    Yields the tiles' pixels, f32 [n, 3, image_size, image_size].
    """
    with _function(b, f"encode_image_bs{n}", ["pixels"], 1):
        yield _import_tensor(b, "pixels", (n, 3, image_size, image_size), "f32")


@contextmanager
def _function(b: Builder, name: str, arguments: Sequence[str], num_results: int) -> Iterator[None]:
    signature = ", ".join(f"%{a}: !hal.buffer_view" for a in arguments)
    with b.block(
        f'util.func public @"{name}$async"({signature}, %wait: !hal.fence, '
        f"%signal: !hal.fence) -> ({', '.join(['!hal.buffer_view'] * num_results)}) attributes "
        f'{{inlining_policy = #util.inline.never, iree.abi.model = "coarse-fences", '
        f"iree.abi.stub}} {{"
    ):
        yield


def _shapes(
    name: str, n: int, page_size: int, hidden_size: int
) -> dict[str, tuple[tuple[Dim, ...], str]]:
    """Shapes and dtypes of the arguments, in order; "%8" is a dynamic multiple of 8."""
    is_decode = name.startswith("decode")
    shapes: dict[str, tuple[tuple[Dim, ...], str]] = {
        "tokens": ((n, 1 if is_decode else f"%{page_size}"), "i64")
    }
    if "_embeds" in name:
        shapes["embeds"] = ((n, f"%{page_size}", hidden_size), "f32")
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
    """The size of one dimension of an argument; the compiler may rely on `multiple`."""
    size = b.op(f"hal.buffer_view.dim<%{name} : !hal.buffer_view>[{axis}] : index", "index")
    limit = MAX_ARGUMENT_SIZE
    return b.op(
        f"util.assume.int {size.name}<umin = {multiple}, umax = {limit - limit % multiple}"
        f"{f', udiv = {multiple}' if multiple > 1 else ''}> : index",
        "index",
    ).name


def import_cache(b: Builder, page_elements: int, dtype: str) -> Tensor:
    """The cache argument [pages, page_elements]; consumed, so that updates happen in place."""
    pages = b.op("hal.buffer_view.dim<%cache : !hal.buffer_view>[0] : index", "index")
    kind = tensor_type(("?", page_elements), dtype)
    return b.tensor(
        f"hal.tensor.import wait(%wait) => consume %cache : !hal.buffer_view -> "
        f"{kind}{{{pages.name}}}",
        (pages.name, page_elements),
        dtype,
    )


def store_cache(b: Builder, cache: Tensor) -> Tensor:
    """The cache [pages, page_elements], stored back into the argument's memory."""
    return b.tensor(
        f"hal.tensor.alias wait(%wait) => {cache.name} : {cache.type}"
        f"{{{cache.shape[0]}}} to %cache : !hal.buffer_view",
        cache.shape,
        cache.dtype,
    )


def return_results(b: Builder, results: Sequence[Tensor], *stored: Tensor) -> None:
    """Return `results`, and signal the fence when they and what was `stored` are ready."""
    ready, joined = b.fresh(), [*results, *stored]
    count = f":{len(joined)}" if len(joined) > 1 else ""
    b.emit(
        f"{ready}{count} = hal.tensor.barrier join({', '.join(t.name for t in joined)} : "
        f"{', '.join(t.type for t in joined)}) => %signal : !hal.fence"
    )
    views = []
    for i, result in enumerate(results):
        dynamic = ", ".join(d for d in result.shape if isinstance(d, str))
        views.append(b.fresh())
        b.emit(
            f"{views[-1]} = hal.tensor.export {ready}{f'#{i}' if count else ''} : {result.type}"
            f"{f'{{{dynamic}}}' if dynamic else ''} -> !hal.buffer_view"
        )
    b.emit(f"util.return {', '.join(views)} : {', '.join(['!hal.buffer_view'] * len(views))}")
