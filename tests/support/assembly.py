"""Kernels written by hand, in the form in which iree-compile writes them for an assembler."""

from __future__ import annotations

from compile.tools.gpu_code import Code, parse

_KERNEL = """
	.text
	.type	{name},@function
{name}:
{body}
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_kernel {name}
		.amdhsa_group_segment_fixed_size {lds}
		.amdhsa_private_segment_fixed_size {spilled}
		.amdhsa_user_sgpr_count 15
		.amdhsa_user_sgpr_dispatch_ptr 0
		.amdhsa_user_sgpr_queue_ptr 0
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_wavefront_size32 {is_wave32}
		.amdhsa_next_free_vgpr {vgprs}
		.amdhsa_next_free_sgpr 20
	.end_amdhsa_kernel
	.text
.Lfunc_end0:
	.size	{name}, .Lfunc_end0-{name}
	.set {name}.num_vgpr, 33
	.set {name}.num_agpr, 0
	.set {name}.numbered_sgpr, 20
"""


def assembly(
    name: str, body: str, *, lanes: int = 32, vgprs: int = 48, lds: int = 0, spilled: int = 0
) -> str:
    """A kernel of these instructions and s_endpgm. Arguments are at s[0:1], the workgroup's number
    in s15, the thread's in v0."""
    return _KERNEL.format(
        name=name, body=body, lds=lds, spilled=spilled, is_wave32=int(lanes == 32), vgprs=vgprs
    )


def kernel(body: str, *, lanes: int = 32, vgprs: int = 48, lds: int = 0) -> Code:
    """The same, as it is read."""
    return parse(assembly("kernel", body, lanes=lanes, vgprs=vgprs, lds=lds))["kernel"]


def loop(body: str, times: int) -> str:
    """Instructions that are executed so many times; s2 counts."""
    return f"""
	s_mov_b32 s2, 0
.LBB0_1:
{body}
	s_add_i32 s2, s2, 1
	s_cmp_lt_u32 s2, {times}
	s_cbranch_scc1 .LBB0_1
"""
