"""Loops, their paths and their instruction mix, on machine code small enough to count by hand."""

from __future__ import annotations

import pytest

from fastrl.bench.disassembly import parse

# A loop over tiles (.L_x_0) that holds a loop over depth (.L_x_1), a turn for the last tile (to .L_x_2), a
# slow path behind the kernel (.L_x_4), and the padding that ends every kernel (.L_x_5).
TILES = """
	.section	.text.tiles,"ax",@progbits
tiles:
.text.tiles:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MOV R9, RZ ;
.L_x_1:
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0050*/              @P1 BRA `(.L_x_1) ;
        /*0060*/              @P2 BRA `(.L_x_2) ;
        /*0070*/                   FSETP.GT.AND P3, PT, R4, RZ, PT ;
        /*0080*/                   FSEL R4, R4, RZ, P3 ;
.L_x_2:
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/                   FFMA R8, R4, R5, R8 ;
        /*00b0*/              @P4 BRA `(.L_x_4) ;
        /*00c0*/             @!P5 BRA `(.L_x_0) ;
.L_x_3:
        /*00d0*/                   STG.E desc[UR4][R2.64], R8 ;
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   CALL.REL.NOINC `(slow) ;
        /*0100*/                   BRA `(.L_x_0) ;
.L_x_5:
        /*0110*/                   BRA `(.L_x_5);
        /*0120*/                   NOP ;
"""

# A loop that stores a pack in one piece, in eight, or not at all, and skips the exponential of a dead row.
PACKS = """
	.section	.text.packs,"ax",@progbits
.L_x_0:
        /*0000*/                   LDS.128 R4, [R2] ;
        /*0010*/             @!P5 BRA `(.L_x_1) ;
        /*0020*/                   FMUL R4, R4, R28 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
.L_x_1:
        /*0040*/              @P0 BRA `(.L_x_4) ;
        /*0050*/             @!P1 BRA `(.L_x_2) ;
        /*0060*/                   STG.E.64 desc[UR4][R20.64], R4 ;
        /*0070*/                   STG.E.64 desc[UR4][R20.64+0x8], R6 ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0090*/                   PRMT R5, R5, 0x5410, R6 ;
        /*00a0*/                   PRMT R6, R6, 0x5410, R7 ;
        /*00b0*/                   STG.E.128 desc[UR4][R20.64], R4 ;
.L_x_3:
        /*00c0*/              @P6 BRA `(.L_x_0) ;
.L_x_4:
        /*00d0*/                   EXIT ;
"""


def test_a_loop_is_all_that_leads_back_to_its_head():
    (code,) = parse(TILES).values()
    outer, inner = code.loops  # the padding behind EXIT, a loop that nothing reaches, is none
    assert [i.address for i in inner.body] == [0x40, 0x50] and not inner.nested
    # wrong: a loop ends at its last branch back, without the slow path behind EXIT
    assert [i.address for i in outer.body] == [*range(0x20, 0xD0, 0x10), 0xF0, 0x100] and outer.nested


def test_a_path_has_neither_rare_turns_nor_nested_loops():
    (code,) = parse(TILES).values()
    outer, inner = code.loops
    assert [i.address for i in code.iteration(inner).instructions] == [0x40, 0x50]
    # wrong: with the loop over depth, the mask of the last tile, or the slow path
    path = code.iteration(outer, exponentials=1)
    assert [i.address for i in path.instructions] == [0x20, 0x30, 0x60, 0x90, 0xA0, 0xB0, 0xC0]
    assert path.moved("LDG") == 16 and path.moved("STG") == 0
    assert path.mix == {"LDG": 1, "move": 1, "branch": 3, "MUFU": 1, "fp32": 1}


def test_the_whole_kernel_passes_its_loops():
    (code,) = parse(TILES).values()
    assert [i.address for i in code.whole().instructions] == [0x0, 0x10, 0xD0, 0xE0]


def test_a_path_takes_wide_accesses_and_its_exponentials():
    (code,) = parse(PACKS).values()
    (loop,) = code.loops
    # wrong: the shortest way of all, without the exponential; or the one with two narrow stores
    path = code.iteration(loop, exponentials=1)
    assert [i.opcode for i in path.instructions if i.name == "STG"] == ["STG.E.128"]
    assert path.mix["MUFU"] == 1 and len(path) == 10
    assert len(code.iteration(loop)) == 8  # where none is asked for


def test_a_loop_is_found_by_a_width():
    (loop,) = next(iter(parse(PACKS).values())).loops
    assert loop.has("STG") and loop.has("STG.E.128") and loop.has("STG.E.64")
    assert not loop.has("STG.E.12") and not loop.has("ST") and not loop.has("LDG")


def test_what_an_instruction_moves():
    sizes = {"LDG.E.128.CONSTANT": 16, "LDG.E.U16": 2, "LDG.E": 4, "LDS.U8": 1, "FFMA": 0, "STG.E.64": 8}
    sizes["LDGSTS.E.BYPASS.LTC128B.128"] = 16  # wrong: 4, as the cache hint is taken for the size
    text = "".join(f"        /*{i:04x}*/ {name} R0, R1 ;\n" for i, name in enumerate(sizes))
    (code,) = parse("\t.section\t.text.all,\n" + text).values()
    assert [i.moved for i in code.instructions] == list(sizes.values())


def test_a_jump_to_a_register_is_refused():
    (code,) = parse("\t.section\t.text.table,\n        /*0000*/  BRX R4 -0x10 ;\n").values()
    with pytest.raises(ValueError, match="table: BRX at 0x0 jumps to a register"):
        code.loops  # noqa: B018


def test_a_jump_to_a_register_leads_where_the_disassembler_says():
    """Wrong: the loop of a specialised warp, which is reached by such a jump only, is not seen."""
    text = """	.section	.text.table,"ax"
        /*0000*/  BRX R4 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*) ;
.L_x_1:
        /*0010*/  MUFU.EX2 R1, R1 ;
        /*0020*/  @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/  EXIT ;
"""
    (code,) = parse(text).values()
    assert code.edges[0] == [1, 2] and len(code.loops) == 1 and code.loops[0].has("MUFU")
